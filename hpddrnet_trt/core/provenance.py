"""Where a result comes from: the command that made it and the versions of the libraries behind it."""

from __future__ import annotations

import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hpddrnet_trt import __version__

LIBRARIES = (
    "torch", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt_rtx", "cuda-python",
    "numpy", "opencv-python-headless",
)  # fmt: skip


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that matter for a result, and of this package."""
    found = {name: number for name in LIBRARIES if (number := _version(name)) is not None}
    return {"hpddrnet-trt": __version__, **found}


def command_line() -> str:
    """The command of this process, to repeat it."""
    interpreter, *arguments = sys.orig_argv
    return shlex.join([Path(interpreter).name, *arguments])


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
