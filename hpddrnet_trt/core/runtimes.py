"""Runtimes, imported without the reports that they send over the network by default.

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
from types import ModuleType

from hpddrnet_trt.core.errors import require

_SWITCH = "ORT_DISABLE_TELEMETRY"
_REPORTER = "openvino_telemetry"


def load_onnxruntime(purpose: str = "run ONNX files") -> ModuleType:
    """The ``onnxruntime`` module; raises :class:`MissingDependency` saying that it is needed to ``purpose``."""
    if "onnxruntime" in sys.modules or _SWITCH in os.environ:
        return require("onnxruntime", "export", purpose)
    os.environ[_SWITCH] = "1"  # read once, during the import
    try:
        return require("onnxruntime", "export", purpose)
    finally:
        os.environ.pop(_SWITCH, None)


def load_openvino(purpose: str = "run models with OpenVINO") -> ModuleType:
    """The ``openvino`` module; raises :class:`MissingDependency` saying that it is needed to ``purpose``."""
    if "openvino" in sys.modules or _REPORTER in sys.modules:
        return require("openvino", "openvino", purpose)
    sys.modules[_REPORTER] = None  # type: ignore[assignment]  # Python's way to say that it cannot be imported
    try:
        return require("openvino", "openvino", purpose)
    finally:
        sys.modules.pop(_REPORTER, None)
