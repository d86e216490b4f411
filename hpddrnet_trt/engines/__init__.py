"""Engines: one model file, one runtime, one small interface (:mod:`hpddrnet_trt.engines.base`).

:data:`ENGINES` is the one list of them, for the command line, the benchmark, the reports and the napari widget.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import hpddrnet_trt
from hpddrnet_trt.core.errors import UsageError, UserError, require
from hpddrnet_trt.core.manifest import Manifest, read_manifest
from hpddrnet_trt.engines.base import Engine, Prediction
from hpddrnet_trt.weights import CHECKPOINT, INT8, locate, shipped_models

__all__ = ["ENGINES", "Engine", "EngineKind", "Prediction", "available_engines", "engine_status", "load_engine"]

logger = logging.getLogger(__name__)
CHECKPOINTS = (".safetensors", ".pth", ".pt")
# What labels are computed in. `file`: what the file is in. `auto`: of an ONNX file the fastest way that keeps its
# labels on this processor (hpddrnet_trt.engines.choice). A precision: of a shipped model its file in it, of another
# file that precision, which must be its own, but that OpenVINO computes FP32 and FP16 files in BF16 when asked.
Arithmetic = Literal["file", "auto", "fp32", "fp16", "bf16", "int8", "fp8"]
_OTHER_LIBRARIES = ("onnx", "numpy", "opencv-python-headless")  # that matter for a result, whatever the engine


def _as_it_comes(manifest: Manifest | None) -> list[dict[str, Any]]:
    return [{}]


def _labels_only(manifest: Manifest | None) -> list[dict[str, Any]]:
    return [{"output": "labels"}]  # like the other engines: logits need not leave the GPU


def _openvino_variants(manifest: Manifest | None) -> list[dict[str, Any]]:
    if manifest is not None and manifest.quantized_for == "onnxruntime":
        return []  # OpenVINO can crash on this form
    if manifest is None or manifest.precision != "fp32":
        return [{}]
    from hpddrnet_trt.engines.openvino import computes_bf16

    return [{}, {"precision": "bf16"}] if computes_bf16() else [{}]


def _version_compatible(manifest: Manifest | None) -> list[dict[str, Any]]:
    runs = manifest is not None and manifest.engine is not None and manifest.engine.version_compatible
    return [{}] if runs else []


@dataclass(frozen=True)
class EngineKind:
    """One engine: its name for people, its class, the files it runs, and what it needs.

    - ``label``: its name in tables and figures; ``implementation``: module of this folder and class in it;
    - ``suffixes``: endings of the files that it runs, or beginnings of the addresses;
    - ``library``: import name of the runtime, brought by ``extra`` of this package; ``distributions``: packages
      whose versions say what computed a result;
    - ``gpu``: whether it needs an NVIDIA GPU;
    - ``variants``: the options to compare in a benchmark of a file with this description (None where it has none).
    """

    label: str
    implementation: tuple[str, str]
    suffixes: tuple[str, ...]
    library: str
    extra: str
    distributions: tuple[str, ...]
    gpu: bool = False
    variants: Callable[[Manifest | None], list[dict[str, Any]]] = _as_it_comes

    def load_class(self) -> Any:
        """The engine's class; imports its module."""
        module, name = self.implementation
        return getattr(importlib.import_module(f"hpddrnet_trt.engines.{module}"), name)


# By the name that `--engine` and `load_engine` take. The first one that runs a suffix is what `auto` chooses (but see
# `engine_of` and `Arithmetic`).
ENGINES: dict[str, EngineKind] = {
    "torch": EngineKind(
        "PyTorch", ("torch", "TorchEngine"), CHECKPOINTS, "torch", "export", ("torch",), variants=_labels_only
    ),
    "onnxruntime": EngineKind(
        "ONNX Runtime", ("onnxruntime", "OnnxRuntimeEngine"), (".onnx",), "onnxruntime", "export",
        ("onnxruntime", "onnxruntime-gpu"),
    ),
    "openvino": EngineKind(
        "OpenVINO", ("openvino", "OpenVINOEngine"), (".onnx",), "openvino", "openvino", ("openvino",),
        variants=_openvino_variants,
    ),
    "tensorrt": EngineKind(
        "TensorRT", ("tensorrt", "TensorRTEngine"), (".engine",), "tensorrt", "tensorrt", ("tensorrt", "cuda-python"),
        gpu=True,
    ),
    "tensorrt-lean": EngineKind(
        "TensorRT lean", ("tensorrt", "LeanTensorRTEngine"), (".engine",), "tensorrt_lean", "tensorrt-lean",
        ("tensorrt-lean", "cuda-python"), gpu=True, variants=_version_compatible,
    ),
    "tensorrt-rtx": EngineKind(
        "TensorRT-RTX", ("tensorrt", "TensorRTEngine"), (".engine",), "tensorrt_rtx", "tensorrt-rtx",
        ("tensorrt_rtx", "cuda-python"), gpu=True,
    ),
    "triton": EngineKind(
        "Triton", ("triton", "TritonEngine"), ("triton://", "tritons://", "triton+http://", "triton+https://"),
        "tritonclient", "triton", ("tritonclient",),
    ),
}  # fmt: skip


def is_address(model: str | Path) -> bool:
    """Whether a model is one on a server, ``triton://host:8001/model``; as a path it has lost a slash."""
    return re.match(r"triton(s|\+https?)?:/", str(model)) is not None


class EngineStatus(NamedTuple):
    """Whether an engine can run on this machine; ``detail`` is its version, or the reason why not."""

    usable: bool
    detail: str


def load_engine(
    path: str | Path, engine: str = "auto", *, precision: Arithmetic = "file", **options: Any
) -> Engine:
    """Open a model file, a model that comes with the package by its name, or one on a server by its address, with the
    engine that suits it.

    ``engine``: ``auto`` chooses by the file's ending (``.safetensors`` and ``.pth``: torch, ``.onnx``: onnxruntime, or
    openvino where it is installed and the file is quantized for TensorRT, ``.engine``: the TensorRT runtime it was
    built with, its lean runtime where only that is installed), or a name in :data:`ENGINES`. ``precision``: see
    :data:`Arithmetic`. ``options`` go to the engine's class; those that are None are left out.

    Raises :class:`UsageError` for an unknown engine, ending or option, and what the engine raises:
    :class:`BadInputFile`, :class:`MissingDependency`, :class:`NoGpu`.
    """
    return opening_of(path, engine, precision, options).open()


@dataclass(frozen=True)
class Opening:
    """How a model file is opened: the engine's name, and all options of its class."""

    path: Path
    engine: str
    options: Mapping[str, Any]

    def open(self, path: Path | None = None) -> Engine:
        """The engine of the file, or of another form of the same file."""
        kind = ENGINES[self.engine]
        if kind.suffixes == CHECKPOINTS:
            require("torch", kind.extra, f"run the checkpoint {self.path}")
        loaded: Engine = kind.load_class()(path or self.path, **self.options)
        return loaded


def opening_of(
    model: str | Path, engine: str = "auto", precision: Arithmetic = "file", options: Mapping[str, Any] | None = None
) -> Opening:
    """How :func:`load_engine` opens a model; raises what it says of engines, endings, precisions and options."""
    if precision not in get_args(Arithmetic):
        raise UsageError(f"unknown precision {precision!r}; choose one of: {', '.join(get_args(Arithmetic))}")
    path = model_file(model, engine, precision)
    given = {key: value for key, value in (options or {}).items() if value is not None}
    if is_address(path):
        if engine not in ("auto", "triton") or precision not in ("auto", "file"):
            raise UsageError(f"what computes {path}, and in which precision, is its server's; leave both to auto")
        return _checked(Opening(path, "triton", given))
    on_gpu = str(given.get("device", "cpu")) not in ("cpu", "auto")
    in_bf16 = engine == "auto" and precision == "bf16" and path.suffix.lower() == ".onnx"
    name = engine_of(path, "openvino" if in_bf16 else engine, on_gpu=on_gpu)
    arithmetic = _arithmetic(path, name, precision)
    if precision in ("auto", "fp32") and engine in ("auto", "openvino") and "openvino" in engines_for(path):
        from hpddrnet_trt.engines.choice import fastest

        choice = fastest(path, on_gpu=on_gpu, only_fp32=precision == "fp32")
        if engine in ("auto", choice.engine):
            name, arithmetic = choice.engine, choice.options
            logger.info("%s: %s", path.name, choice.why)
    given |= arithmetic
    if engine == "auto" or precision != "file":
        _warn_of_slow_int8(path, name, on_gpu)
    if "device" in given:
        given |= {"device": _device(given["device"], name)}
        if not on_gpu and "device" not in _known_options(name):
            del given["device"]
    return _checked(Opening(path, name, given))


def _known_options(engine: str) -> list[str]:
    return [key for key in inspect.signature(ENGINES[engine].load_class()).parameters if key != "path"]


def _checked(opening: Opening) -> Opening:
    known = _known_options(opening.engine)
    if unknown := [key for key in opening.options if key not in known]:
        raise UsageError(f"the {opening.engine} engine has no option {', '.join(unknown)}; it has: {', '.join(known)}")
    return opening


def model_file(model: str | Path, engine: str = "auto", precision: str = "file") -> Path:
    """The file of a model that comes with the package, as ``engine`` runs it in ``precision``; any other ``model`` as
    a path."""
    kind = ENGINES.get(engine)
    if kind is not None and kind.suffixes == CHECKPOINTS:
        return locate(model, CHECKPOINT)
    return locate(model, INT8 if precision == "int8" else ".onnx")


def engine_of(path: Path, engine: str = "auto", *, on_gpu: bool = False) -> str:
    """The name of the engine that runs ``path`` as it is; :class:`UsageError` where there is none.

    ``on_gpu``: on a GPU, which OpenVINO does not use here.
    """
    if engine != "auto":
        suffixes = _kind(engine, "auto").suffixes
        if path.suffix.lower() not in suffixes:
            what = "files" if suffixes[0].startswith(".") else "addresses"
            raise UsageError(f"the {engine} engine runs {' and '.join(suffixes)} {what}, not {path}")
        return engine
    suitable = engines_for(path)
    if not suitable:
        endings = sorted({suffix for kind in ENGINES.values() for suffix in kind.suffixes if suffix[0] == "."})
        raise UsageError(
            f"{path} has none of the known endings of model files ({', '.join(endings)}) and is no model that comes "
            f"with the package ({', '.join(shipped_models())})"
        )
    if not on_gpu and _for_tensorrt(path) and importlib.util.find_spec("openvino") is not None:
        return "openvino"
    return suitable[0]


def _for_tensorrt(path: Path) -> bool:
    """Whether an ONNX file is in the Q/DQ form of TensorRT, which ONNX Runtime runs slower than FP32 on a CPU."""
    return path.suffix.lower() == ".onnx" and path.is_file() and read_manifest(path).quantized_for == "tensorrt"


def _warn_of_slow_int8(path: Path, name: str, on_gpu: bool) -> None:
    if name == "onnxruntime" and not on_gpu and _for_tensorrt(path):
        logger.warning(
            "%s is quantized for TensorRT; without one, OpenVINO runs it several times faster than ONNX Runtime: "
            "pip install openvino and leave the engine to auto, or calibrate with --runtime onnxruntime", path
        )  # fmt: skip


def _arithmetic(path: Path, name: str, precision: Arithmetic) -> dict[str, str]:
    """The option that makes an engine compute a file in ``precision``; :class:`UsageError` where none does."""
    if precision in ("file", "auto"):
        return {}
    described = path.suffix.lower() in (".onnx", ".engine") and path.is_file()
    own = (read_manifest(path).precision if described else None) or "fp32"
    if precision == own:
        return {"precision": "fp32"} if name == "openvino" and own == "fp32" else {}
    if precision == "bf16" and name == "openvino" and own in ("fp32", "fp16"):
        return {"precision": "bf16"}
    if precision == "bf16" and own == "fp32" and path.suffix.lower() == ".onnx":
        raise UsageError(f"the {name} engine computes {path} in FP32; OpenVINO can do it in BF16: --engine openvino")
    made_by = "calibrate" if precision == "int8" else f"export --precision {precision}"
    other = "give the file it was made from" if precision == "fp32" else f"make another with hpddrnet-trt {made_by}"
    raise UsageError(f"{path} is {own.upper()}, and its engine does not compute it in {precision.upper()}; {other}")


def _device(device: str | int, name: str) -> str | int:
    """``device`` as the engine takes it: TensorRT a number, the others a word."""
    text = f"cuda:{device}" if str(device).isdigit() else str(device)
    place = re.fullmatch(r"cuda(?::(\d{1,3}))?|auto", text)
    if not ENGINES[name].gpu:
        return text
    if place is None:
        raise UsageError(f"the {name} engine runs on a GPU: give the device as cuda or cuda:1, not {text!r}")
    return int(place[1] or 0)


def engines_for(path: Path) -> list[str]:
    """Names of the engines that run files of this ending, the one that ``auto`` chooses first."""
    return [name for name, kind in ENGINES.items() if path.suffix.lower() in kind.suffixes]


def _kind(name: str, *others: str) -> EngineKind:
    if name not in ENGINES:
        raise UsageError(f"unknown engine {name!r}; choose one of: {', '.join([*others, *ENGINES])}")
    return ENGINES[name]


def engine_status(name: str) -> EngineStatus:
    """Whether the engine ``name`` can run here, without loading its runtime."""
    from hpddrnet_trt.engines.cuda import find_gpu

    kind = _kind(name)
    if importlib.util.find_spec(kind.library) is None:
        return EngineStatus(False, f"not installed; pip install 'hpddrnet-trt[{kind.extra}]'")
    installed = _distributions().get(kind.library)
    number = version(installed[0]) if installed else "unknown version"
    try:
        if kind.gpu:
            find_gpu()
    except UserError as exc:
        return EngineStatus(False, f"{number} is installed, but {exc}")
    return EngineStatus(True, number)


def available_engines() -> dict[str, str]:
    """Every engine's version, or ``not available: <reason>``, by name."""
    states = {name: engine_status(name) for name in ENGINES}
    return {name: state.detail if state.usable else f"not available: {state.detail}" for name, state in states.items()}


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that matter for a result, and of this package."""
    versions = {"hpddrnet-trt": hpddrnet_trt.__version__}
    for name in dict.fromkeys([*(one for kind in ENGINES.values() for one in kind.distributions), *_OTHER_LIBRARIES]):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


@cache  # reads what every installed package says of itself: 0.3 s
def _distributions() -> Mapping[str, list[str]]:
    """Names of the distributions by what can be imported from them."""
    return packages_distributions()

