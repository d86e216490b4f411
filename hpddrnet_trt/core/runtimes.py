"""Runtimes: the one way to import ONNX Runtime and OpenVINO, and to open a session of ONNX Runtime.

They are imported without the reports that they send over the network by default.

A microscope's PC reports to nobody unless its owner wants that. Seen in the wheels themselves:

- onnxruntime 1.29 and later on Linux and macOS (its ``Privacy.md``; 1.31.1 looked at): importing it starts
  an uploader; sessions write an identifier and a database to ``~/.cache/Microsoft`` and send names of model
  files, checksums and times. ``ORT_DISABLE_TELEMETRY`` in the environment of the import prevents all of it.
- openvino 2026.4 with ``openvino-telemetry``, which it asks for: importing it starts a thread, writes an
  identifier to ``~/intel`` and sends an event, where nobody has declined. Without that package it does not.

A program that has imported them before, or has set ``ORT_DISABLE_TELEMETRY`` itself, has decided for itself.
On Windows some builds of ONNX Runtime hand events to the system's own collection, which its settings govern.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hpddrnet_trt.core.errors import require

if TYPE_CHECKING:
    import onnx

CPU_PROVIDER = "CPUExecutionProvider"
_SWITCH = "ORT_DISABLE_TELEMETRY"
_REPORTER = "openvino_telemetry"
_ERRORS_ONLY = 3  # least severity that ONNX Runtime logs


def load_onnxruntime(purpose: str = "run ONNX files") -> ModuleType:
    """The ``onnxruntime`` module; raises :class:`MissingDependency` saying that it is needed to ``purpose``."""
    if "onnxruntime" in sys.modules or _SWITCH in os.environ:
        return require("onnxruntime", "export", purpose)
    os.environ[_SWITCH] = "1"  # read once, during the import
    try:
        return require("onnxruntime", "export", purpose)
    finally:
        os.environ.pop(_SWITCH, None)


def session(
    model: onnx.ModelProto | bytes | str | Path,
    purpose: str = "run ONNX files",
    *,
    threads: int | None = None,
    settings: Mapping[str, Any] | None = None,
    defaults: bool = False,
    providers: Sequence[Any] = (CPU_PROVIDER,),
    disabled_optimizers: Sequence[str] | None = None,
) -> Any:
    """An ``onnxruntime.InferenceSession`` of ``model`` (a graph, its bytes, or a file) that logs errors only.

    ``threads``: of one inference (default: all cores). ``settings``: attributes of
    ``onnxruntime.SessionOptions`` by name, enumerations by their member's name, and entries of its configuration,
    whose names have dots (``session.intra_op.allow_spinning``). ``defaults`` leaves everything else to
    ONNX Runtime, its log too. ``providers`` and ``disabled_optimizers`` as ONNX Runtime takes them.

    Raises :class:`MissingDependency` saying what it is needed for, and for a model that it cannot open one of
    :func:`onnxruntime_errors`.
    """
    runtime = load_onnxruntime(purpose)
    others = {} if disabled_optimizers is None else {"disabled_optimizers": list(disabled_optimizers)}
    if hasattr(model, "SerializeToString"):
        model = model.SerializeToString()
    source = str(model) if isinstance(model, Path) else model
    asked = {} if defaults else {"log_severity_level": _ERRORS_ONLY}
    asked |= settings or {}
    if threads is not None:
        asked["intra_op_num_threads"] = threads
    options = _session_options(runtime, asked) if asked else None  # else ONNX Runtime takes its own
    return runtime.InferenceSession(source, options, providers=list(providers), **others)


def _session_options(runtime: ModuleType, settings: Mapping[str, Any]) -> Any:
    options = runtime.SessionOptions()
    for name, value in settings.items():
        if "." in name:
            options.add_session_config_entry(name, value)
            continue
        kind = type(getattr(options, name))
        setattr(options, name, getattr(kind, value) if hasattr(kind, "__members__") else value)
    return options


@cache
def onnxruntime_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises for models and inputs; its own classes share no base class."""
    load_onnxruntime()
    state = require("onnxruntime.capi.onnxruntime_pybind11_state", "export", "run ONNX files")
    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented",
             "RuntimeException", "EPFail")  # fmt: skip
    own = (getattr(state, name) for name in names if hasattr(state, name))
    # Its Python part raises ValueError (inputs that are missing, names that are no text), its binding the others.
    return (*own, ValueError, RuntimeError, MemoryError)


def load_openvino(purpose: str = "run models with OpenVINO") -> ModuleType:
    """The ``openvino`` module; raises :class:`MissingDependency` saying that it is needed to ``purpose``."""
    if "openvino" in sys.modules or _REPORTER in sys.modules:
        return require("openvino", "openvino", purpose)
    sys.modules[_REPORTER] = None  # type: ignore[assignment]  # Python's way to say that it cannot be imported
    try:
        return require("openvino", "openvino", purpose)
    finally:
        sys.modules.pop(_REPORTER, None)
