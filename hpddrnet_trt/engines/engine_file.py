"""What the description beside an engine file says, and whether the file runs here: asked before TensorRT sees it."""

from __future__ import annotations

import hashlib
import logging
import sys
from pathlib import Path

from hpddrnet_trt.core.errors import BadInputFile, EngineDoesNotFit, UsageError
from hpddrnet_trt.core.manifest import EngineRecord, Manifest
from hpddrnet_trt.engines.cuda import Gpu
from hpddrnet_trt.engines.tensorrt_library import PORTABLE, TensorRT

logger = logging.getLogger(__name__)

# What a default TensorRT-RTX engine runs on: this compute capability and later (its documentation).
PORTABLE_FROM = "8.0"
BUILD_AGAIN = "build the engine again here, from its ONNX file (--rebuild does that)"


def engine_record(path: Path, manifest: Manifest) -> EngineRecord:
    """The engine's part of the description, or :class:`BadInputFile`."""
    if manifest.engine is None or not manifest.engine.profiles:
        raise BadInputFile(f"the description beside {path} is not that of an engine; build the engine again")
    return manifest.engine


def verified_content(path: Path, record: EngineRecord) -> bytes:
    """The file's bytes if size and checksum are those of the description, else :class:`BadInputFile`."""
    size = path.stat().st_size
    if size < record.bytes:
        raise BadInputFile(
            f"{path} is truncated ({size} of {record.bytes} bytes); copy it again or build the engine again"
        )
    content = path.read_bytes() if size == record.bytes else b""
    if len(content) != record.bytes or hashlib.sha256(content).hexdigest() != record.sha256:
        raise BadInputFile(
            f"{path} is not the engine that {path.name}.json describes (size or checksum differ); "
            "copy both files again or build the engine again"
        )
    return content


def check_version(path: Path, record: EngineRecord, api: TensorRT) -> None:
    """Engines run on the exact library version that built them, version-compatible ones on later ones too."""
    if api.version == record.version:
        return
    if record.version_compatible and _numbers(api.version) >= _numbers(record.version):
        return
    raise EngineDoesNotFit(
        f"{path} was built with {record.runtime} {record.version}, installed is {api.version}: {BUILD_AGAIN}, or "
        f"install {record.runtime}=={record.version}"
    )


def check_lean(path: Path, record: EngineRecord) -> None:
    """Raise :class:`UsageError` for an engine that TensorRT's lean runtime does not run."""
    if record.runtime != "tensorrt":
        raise UsageError(f"{path} was built for {record.runtime}, which the lean runtime does not run; install that")
    if not record.version_compatible:
        raise UsageError(
            f"{path} needs all of TensorRT, of which only the lean runtime is to run it; build it with "
            "--version-compatible, or: pip install 'hpddrnet-trt[tensorrt]'"
        )


def check_gpu(path: Path, record: EngineRecord, gpu: Gpu) -> None:
    """Raise :class:`EngineDoesNotFit` when the engine was built for other GPUs than ``gpu``.

    And :class:`BadInputFile` when it does not run on any as it is.
    """
    if record.platform == "windows" and sys.platform != "win32":
        raise BadInputFile(f"{path} was built for Windows; run it there, or build the engine again for this machine")
    if record.stripped:
        raise BadInputFile(f"{path} was written without its weights; run: hpddrnet-trt refit {path} MODEL.onnx")
    targets = record.compute_capabilities
    here = f"{gpu.name} has compute capability {gpu.compute_capability}"
    if PORTABLE in targets:
        if _numbers(gpu.compute_capability) < _numbers(PORTABLE_FROM):
            with_option = f"build it again with --compute-capability {gpu.compute_capability}"
            raise EngineDoesNotFit(
                f"{path} runs on GPUs of compute capability {PORTABLE_FROM} and later, {here}; "
                f"{with_option if record.runtime == 'tensorrt-rtx' else BUILD_AGAIN}"
            )
        return
    if gpu.compute_capability not in targets:
        raise EngineDoesNotFit(
            f"{path} was built for GPUs of compute capability {', '.join(targets)}, {here}; {BUILD_AGAIN}"
        )
    if record.runtime == "tensorrt" and record.gpu not in (None, gpu.name):
        logger.warning("%s was built on %s and may be slower on %s; build it here", path, record.gpu, gpu.name)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isascii() and part.isdigit())
