"""Engines: one model file, one runtime, one small interface (:mod:`hpddrnet_trt.engines.base`)."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any, NamedTuple

from hpddrnet_trt.core.errors import UsageError, UserError, require
from hpddrnet_trt.engines.base import Engine, Prediction
from hpddrnet_trt.weights import locate, shipped_models

__all__ = ["ENGINES", "Engine", "Prediction", "available_engines", "engine_status", "load_engine"]


class _Kind(NamedTuple):
    """One engine: where its class is, the files it runs, and what it needs."""

    module: str
    class_name: str
    suffixes: tuple[str, ...]
    needs: str  # import name of the runtime
    extra: str
    gpu: bool = False


_CHECKPOINTS = (".safetensors", ".pth", ".pt")

# The first engine that takes a suffix is the one `auto` chooses.
_KINDS: dict[str, _Kind] = {
    "torch": _Kind("torch", "TorchEngine", _CHECKPOINTS, "torch", "export"),
    "onnxruntime": _Kind("onnxruntime", "OnnxRuntimeEngine", (".onnx",), "onnxruntime", "export"),
    "openvino": _Kind("openvino", "OpenVINOEngine", (".onnx",), "openvino", "openvino"),
    "tensorrt": _Kind("tensorrt", "TensorRTEngine", (".engine",), "tensorrt", "tensorrt", gpu=True),
    "tensorrt-rtx": _Kind("tensorrt", "TensorRTEngine", (".engine",), "tensorrt_rtx", "tensorrt-rtx", gpu=True),
    "torch-tensorrt": _Kind(
        "torch_tensorrt", "TorchTensorRTEngine", _CHECKPOINTS, "torch_tensorrt", "torch-tensorrt", gpu=True
    ),
}
ENGINES: tuple[str, ...] = tuple(_KINDS)
_FOR_CHECKPOINTS = tuple(name for name, kind in _KINDS.items() if kind.suffixes == _CHECKPOINTS)


class EngineStatus(NamedTuple):
    """Whether an engine can run on this machine; ``detail`` is its version, or the reason why not."""

    usable: bool
    detail: str


def load_engine(path: str | Path, engine: str = "auto", **options: Any) -> Engine:
    """Open a model file, or a model that comes with the package by its name, with the engine that suits it.

    ``engine``: ``auto`` chooses by the file's ending (``.safetensors`` and ``.pth``: torch,
    ``.onnx``: onnxruntime, ``.engine``: the TensorRT flavour it was built with), or one of
    :data:`ENGINES`. ``options`` go to the engine's class; those that are None are left out.

    Raises :class:`UsageError` for an unknown engine, ending or option, and what the engine raises:
    :class:`BadInputFile`, :class:`MissingDependency`, :class:`NoGpu`.
    """
    path = locate(path, ".safetensors" if engine in _FOR_CHECKPOINTS else ".onnx")
    name = _choose(path, engine)
    kind = _KINDS[name]
    if name in _FOR_CHECKPOINTS:
        require("torch", kind.extra, f"run the checkpoint {path}")
    cls = getattr(importlib.import_module(f"hpddrnet_trt.engines.{kind.module}"), kind.class_name)
    given = {key: value for key, value in options.items() if value is not None}
    known = [key for key in inspect.signature(cls).parameters if key != "path"]
    unknown = [key for key in given if key not in known]
    if unknown:
        raise UsageError(f"the {name} engine has no option {', '.join(unknown)}; it has: {', '.join(known)}")
    loaded: Engine = cls(path, **given)
    return loaded


def _choose(path: Path, engine: str) -> str:
    if engine != "auto" and engine not in _KINDS:
        raise UsageError(f"unknown engine {engine!r}; choose one of: auto, {', '.join(ENGINES)}")
    suitable = [name for name, kind in _KINDS.items() if path.suffix.lower() in kind.suffixes]
    if engine == "auto" and suitable:
        return suitable[0]
    if engine == "auto":
        endings = sorted({suffix for kind in _KINDS.values() for suffix in kind.suffixes})
        raise UsageError(
            f"{path} has none of the known endings of model files ({', '.join(endings)}) and is no model that comes "
            f"with the package ({', '.join(shipped_models())})"
        )
    if engine not in suitable:
        raise UsageError(f"the {engine} engine runs {' and '.join(_KINDS[engine].suffixes)} files, not {path}")
    return engine


def engine_status(name: str) -> EngineStatus:
    """Whether the engine ``name`` can run here, without loading its runtime."""
    if name not in _KINDS:
        raise UsageError(f"unknown engine {name!r}; choose one of: {', '.join(ENGINES)}")
    kind = _KINDS[name]
    if importlib.util.find_spec(kind.needs) is None:
        return EngineStatus(False, f"not installed; pip install 'hpddrnet-trt[{kind.extra}]'")
    number = _version(kind)
    if kind.gpu and (reason := _no_gpu()):
        return EngineStatus(False, f"{number} is installed, but {reason}")
    return EngineStatus(True, number)


def available_engines() -> dict[str, str]:
    """Every engine's version, or ``not available: <reason>``, by name."""
    found = {name: engine_status(name) for name in ENGINES}
    return {name: state.detail if state.usable else f"not available: {state.detail}" for name, state in found.items()}


def _version(kind: _Kind) -> str:
    installed = _distributions().get(kind.needs)
    return version(installed[0]) if installed else "unknown version"


@cache  # reads what every installed package says of itself: 0.3 s
def _distributions() -> Mapping[str, list[str]]:
    """Names of the distributions by what can be imported from them."""
    return packages_distributions()


def _no_gpu() -> str | None:
    """Why no GPU can be used, or None when one can."""
    from hpddrnet_trt.engines import cuda as cuda_memory

    try:
        cuda_memory.find_gpu()
    except UserError as exc:
        return str(exc)
    return None
