"""Engines: one model file, one runtime, one small interface (:mod:`hpddrnet_trt.engines.base`).

:data:`ENGINES` is the one list of them, for the command line, the benchmark, the reports and the napari widget.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any, NamedTuple

import hpddrnet_trt
from hpddrnet_trt.core.errors import UsageError, UserError, require
from hpddrnet_trt.core.manifest import Manifest, read_manifest
from hpddrnet_trt.engines.base import Engine, Prediction
from hpddrnet_trt.weights import locate, shipped_models

__all__ = ["ENGINES", "Engine", "EngineKind", "Prediction", "available_engines", "engine_status", "load_engine"]

logger = logging.getLogger(__name__)
CHECKPOINTS = (".safetensors", ".pth", ".pt")
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
    - ``suffixes``: endings of the files that it runs;
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
# `_first_choice`).
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
}  # fmt: skip


class EngineStatus(NamedTuple):
    """Whether an engine can run on this machine; ``detail`` is its version, or the reason why not."""

    usable: bool
    detail: str


def load_engine(path: str | Path, engine: str = "auto", **options: Any) -> Engine:
    """Open a model file, or a model that comes with the package by its name, with the engine that suits it.

    ``engine``: ``auto`` chooses by the file's ending (``.safetensors`` and ``.pth``: torch, ``.onnx``: onnxruntime, or
    openvino where it is installed and the file is quantized for TensorRT, ``.engine``: the TensorRT runtime it was
    built with, its lean runtime where only that is installed), or a name in :data:`ENGINES`. ``options`` go to the
    engine's class; those that are None are left out.

    Raises :class:`UsageError` for an unknown engine, ending or option, and what the engine raises:
    :class:`BadInputFile`, :class:`MissingDependency`, :class:`NoGpu`.
    """
    path = model_file(path, engine)
    given = {key: value for key, value in options.items() if value is not None}
    name = engine_of(path, engine, given)
    kind = ENGINES[name]
    if kind.suffixes == CHECKPOINTS:
        require("torch", kind.extra, f"run the checkpoint {path}")
    cls = kind.load_class()
    known = [key for key in inspect.signature(cls).parameters if key != "path"]
    unknown = [key for key in given if key not in known]
    if unknown:
        raise UsageError(f"the {name} engine has no option {', '.join(unknown)}; it has: {', '.join(known)}")
    loaded: Engine = cls(path, **given)
    return loaded


def model_file(model: str | Path, engine: str = "auto") -> Path:
    """The file of a model that comes with the package, as ``engine`` runs it; any other ``model`` as a path."""
    kind = ENGINES.get(engine)
    return locate(model, ".safetensors" if kind is not None and kind.suffixes == CHECKPOINTS else ".onnx")


def engine_of(path: Path, engine: str = "auto", options: Collection[str] = ()) -> str:
    """The name of the engine that runs ``path`` with these options; :class:`UsageError` where there is none."""
    if engine != "auto":
        suffixes = _kind(engine, "auto").suffixes
        if path.suffix.lower() not in suffixes:
            raise UsageError(f"the {engine} engine runs {' and '.join(suffixes)} files, not {path}")
        return engine
    suitable = engines_for(path)
    if not suitable:
        endings = sorted({suffix for kind in ENGINES.values() for suffix in kind.suffixes})
        raise UsageError(
            f"{path} has none of the known endings of model files ({', '.join(endings)}) and is no model that comes "
            f"with the package ({', '.join(shipped_models())})"
        )
    return _first_choice(path, suitable, options)


def _first_choice(path: Path, suitable: list[str], options: Collection[str]) -> str:
    """The first engine, except that ONNX Runtime runs the Q/DQ form of TensorRT slower on a CPU than the FP32 file."""
    if "openvino" not in suitable or not path.is_file() or read_manifest(path).quantized_for != "tensorrt":
        return suitable[0]
    if not set(options) <= set(inspect.signature(ENGINES["openvino"].load_class()).parameters):
        return suitable[0]  # asked for what OpenVINO does not do here, a GPU for example
    if importlib.util.find_spec("openvino") is not None:
        return "openvino"
    logger.warning(
        "%s is quantized for TensorRT; without one, OpenVINO runs it several times faster than %s: "
        "pip install 'hpddrnet-trt[openvino]', or calibrate with --runtime onnxruntime", path, suitable[0]
    )  # fmt: skip
    return suitable[0]


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

