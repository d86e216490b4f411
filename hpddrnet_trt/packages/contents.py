"""What every package is made of: the checked ONNX file, a test picture with the file's outputs, and the zip file."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core import runtimes
from hpddrnet_trt.core.errors import BadInputFile, UsageError, one_line
from hpddrnet_trt.core.files import atomic_path, read_file
from hpddrnet_trt.core.magnification import TOLERANCE
from hpddrnet_trt.core.manifest import InputContract, Manifest, OutputContract, read_manifest
from hpddrnet_trt.core.metrics import arg_max
from hpddrnet_trt.core.precisions import is_calibrated
from hpddrnet_trt.data.preprocess import network_input, padded_size
from hpddrnet_trt.data.simulate import MIN_SIZE, simulate
from hpddrnet_trt.graph.check import check_onnx

Files = dict[str, bytes | Path]  # of a package: name inside, content or the file to take it from
Arrays = dict[str, npt.NDArray[Any]]

SEED = 7  # of the simulated test picture
_DATE = (1980, 1, 1, 0, 0, 0)  # of every file inside, so that the same model gives the same package


@dataclass(frozen=True)
class PackageSettings:
    """What a package says beside the model's own description.

    ``size``: height and width of the test picture, or of the tiles of a CZANN file. ``authors``: names. ``license``:
    an SPDX identifier, or the license's text; default: that of the training data. ``checkpoint``: added to a
    bioimage.io package as it is.
    """

    size: tuple[int, int] | None = None
    authors: tuple[str, ...] = ()
    license: str | None = None
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Packed:
    """An ONNX file that is to be packed, and what it says about itself."""

    path: Path
    manifest: Manifest
    input: InputContract
    output: OutputContract

    @property
    def pixel_size_m(self) -> float | None:
        """The one that the network reads at, in metres; None where there is none, or a range of them."""
        sizes = self.manifest.read_at_m
        return None if sizes is None or sizes[1] > sizes[0] * TOLERANCE else math.sqrt(sizes[0] * sizes[1])

    def feed(self, grey: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """What the file takes of a grey picture ``[H, W]``."""
        return network_input([grey], self.input, self.manifest.normalization)


def read_packed(path: Path) -> Packed:
    """Check that other programs can run the file; raises :class:`UserError` otherwise."""
    manifest = read_manifest(path)
    if path.suffix.lower() != ".onnx" or manifest.input is None or manifest.output is None:
        raise UsageError(f"{path} is no ONNX file, which packages hold; give the file that hpddrnet-trt export wrote")
    if is_calibrated(manifest.precision) and manifest.quantized_for != "onnxruntime":
        raise UsageError(
            f"{path} is quantized for TensorRT, and other programs compute such files with other labels; package the "
            "FP32 or FP16 file, or calibrate it with --runtime onnxruntime"
        )
    if not manifest.input.batch.admits(1):
        raise UsageError(
            f"{path} takes {manifest.input.batch} pictures at once; for a package export it with --batch 1"
        )
    check_onnx(path, "operators")
    return Packed(path, manifest, manifest.input, manifest.output)


def test_picture(size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """A simulated grey picture ``[H, W]`` of that size, which is free of rights."""
    height, width = size
    return simulate(max(height, MIN_SIZE), max(width, MIN_SIZE), SEED)[0][:height, :width]


def input_size(contract: InputContract, size: tuple[int, int] | None, usual: int) -> tuple[int, int]:
    """Height and width: as asked for, or the nearest to ``usual`` that the model admits."""
    asked = size or tuple(min(usual, axis.maximum or usual) for axis in (contract.height, contract.width))
    height, width = (
        padded_size(least // contract.multiple * contract.multiple, axis, contract.multiple, name)
        for least, axis, name in zip(asked, (contract.height, contract.width), ("height", "width"), strict=True)
    )
    if size not in (None, (height, width)):
        raise UsageError(f"a size of {asked[0]}x{asked[1]} does not fit this model; give {height}x{width} instead")
    return height, width


def run_plainly(packed: Packed, model: bytes, batch: npt.NDArray[Any]) -> Arrays:
    """All outputs by name and in the file's order, computed as other programs do: ONNX Runtime's own settings."""
    try:
        session = runtimes.session(model, threads=1)
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, {session.get_inputs()[0].name: batch}), strict=True))
    except runtimes.onnxruntime_errors() as exc:
        raise BadInputFile(
            f"{packed.path} cannot be run by ONNX Runtime as other programs do ({one_line(exc, 'first')}); package "
            "the FP32 file"
        ) from exc


def labels_of(outputs: Arrays) -> npt.NDArray[np.uint8]:
    """Class indices, uint8 ``[N, H, W]``, of outputs with labels or logits."""
    return np.asarray(outputs["labels"], np.uint8) if "labels" in outputs else arg_max(outputs["logits"])


def license_of(packed: Packed, settings: PackageSettings) -> str | None:
    """As asked for, or that of the training data."""
    return settings.license or (packed.manifest.data.license if packed.manifest.data is not None else None)


def pack(target: Path, files: Mapping[str, bytes | Path]) -> Path:
    """Write a zip file, whole or not at all; the same contents give the same bytes."""
    with atomic_path(target) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, _DATE)
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, read_file(content, "file") if isinstance(content, Path) else content)
    return target
