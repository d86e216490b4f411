"""What every source of a mosaic has in common: types of pixels, which of them are looked at for the grey window, what
is asked about files."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import BadInputFile, UsageError
from hpddrnet_trt.core.magnification import plausible
from hpddrnet_trt.core.text import megabytes
from hpddrnet_trt.mosaic.layout import Box, Piece

log = logging.getLogger(__name__)

_LARGE_UNIT = 1 << 29  # bytes that are decoded together; more is worth a warning
_LARGEST_UNIT = 1 << 34  # ... and this is refused
_PATCHES = (144, 2304)  # looked at for the grey window; the second where most of the first are empty
_ENOUGH = 0.25  # share of the wished pixels

FileState = tuple[int, int]  # bytes and nanoseconds of the last change


@dataclass(frozen=True)
class Options:
    """What :func:`~hpddrnet_trt.mosaic.sources.open_source` was told beside the path; None where nothing."""

    image: str | None = None
    positions: str | Path | None = None
    channel: int | None = None
    pixel_size: float | None = None
    spacing: float | None = None


@dataclass
class OpenedSource:
    """The fields of a :class:`~hpddrnet_trt.mosaic.layout.Source` and what follows from them."""

    path: Path
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    fill_value: float
    pixel_size_m: float | None
    spacing_m: float | None
    unit: tuple[int, int]

    def read(self, box: Box) -> Piece:
        """See :class:`~hpddrnet_trt.mosaic.layout.Source`."""
        raise NotImplementedError

    def sample(self, pixels: int) -> npt.NDArray[Any]:
        """See :class:`~hpddrnet_trt.mosaic.layout.Source`; the same for the same pixels in any kind of file."""
        values = np.empty(0, self.dtype)
        for patches in _PATCHES:
            pieces = [self.read(box).pixels for box in _patches(self.shape, pixels, patches)]
            values = np.concatenate([piece[piece != self.fill_value] for piece in pieces])
            if values.size >= _ENOUGH * min(pixels, math.prod(self.shape)):
                break
        return values

    def _filled(self, box: Box) -> npt.NDArray[Any]:
        return np.full((box.height, box.width), self.fill_value, self.dtype)

    def _grey(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Values as stored in this source's type; what is no number was never acquired."""
        if values.dtype == bool:
            values = values * np.uint8(255)
        with np.errstate(over="ignore"):  # float64 beyond float32
            values = values.astype(self.dtype, copy=False)
        if self.dtype.kind == "f" and not (finite := np.isfinite(values)).all():
            values = np.where(finite, values, self.dtype.type(self.fill_value))
        return values


def pixel_type(stored: np.dtype[Any], path: Path) -> np.dtype[Any]:
    """The type in which pixels stored as ``stored`` are read: uint8, uint16, float32; BadInputFile for no numbers."""
    if stored in (np.dtype(bool), np.dtype(np.uint8)):
        return np.dtype(np.uint8)
    if stored.kind == "u" and stored.itemsize == 2:
        return np.dtype(np.uint16)
    if stored.kind in "uif":
        return np.dtype(np.float32)
    raise BadInputFile(f"{path} holds {stored} values; save it as 8-bit, 16-bit or float grey")


def check_shape(path: Path, shape: tuple[int, int, int]) -> None:
    """Raise :class:`BadInputFile` where there are no pixels."""
    if min(shape) < 1:
        slices, height, width = shape
        raise BadInputFile(f"{path} has no pixels: {slices} slices of {width} x {height}; check what wrote it")


def check_unit(path: Path, extent: Iterable[int], itemsize: int, what: str) -> None:
    """Say what it costs where much is decoded together; ``what``: "chunks", "strips"."""
    sides = tuple(extent)
    size = math.prod(sides) * itemsize
    shape = " x ".join(map(str, sides))
    if not 0 < size <= _LARGEST_UNIT:
        raise BadInputFile(
            f"{path} has {what} of {shape} pixels, {megabytes(size)} each, which no worker can decode; "
            "save it in smaller chunks or tiles"
        )
    if size > _LARGE_UNIT:
        log.warning(
            "%s: its %s of %s pixels are decoded as a whole: every read takes %s of memory; smaller ones are faster",
            path, what, shape, megabytes(size),
        )  # fmt: skip


def chosen_channel(path: Path, channels: int, wished: int | None) -> int:
    """Which channel is read, counted from 0; :class:`UsageError` where that has to be said, or there is none."""
    if wished is None and channels > 1:
        raise UsageError(f"{path} has {channels} channels; choose one with --channel 0 to {channels - 1}")
    if not 0 <= (wished or 0) < channels:
        raise UsageError(f"{path} has no channel {wished}: there are {channels}, counted from 0")
    return wished or 0


def stated_length(path: Path, metres: float | None, what: str) -> float | None:
    """``metres``, or None with a warning where no microscope has such a ``what``."""
    if metres is None or plausible(metres):
        return metres
    log.warning("%s states a senseless %s of %g m: it is unknown", path, what, metres)
    return None


def file_state(path: str | Path) -> FileState:
    """Size and time of a file; raises OSError."""
    state = os.stat(path)
    return state.st_size, state.st_mtime_ns


def check_unchanged(path: Path, opened: FileState) -> None:
    """Raise :class:`BadInputFile` where ``path`` is not what was opened, or is gone."""
    try:
        if file_state(path) == opened:
            return
    except OSError as exc:
        raise BadInputFile(f"{path} cannot be read any more ({exc.strerror}); is its file system there?") from exc
    raise BadInputFile(f"{path} has changed since it was opened; start again when nothing writes to it")


def signature_of(files: Iterable[Path]) -> str:
    """Another text when a file is another size, was changed, appeared or went."""
    digest = hashlib.sha256()
    for file in files:
        try:
            state = file_state(file)
        except OSError:
            state = (-1, 0)
        digest.update(f"{file.name} {state[0]} {state[1]}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


def halves(box: Box, step: tuple[int, int]) -> tuple[Box, Box] | None:
    """``box`` in two along a border of cells of ``step`` rows and columns; None where it lies in one cell."""
    sides = sorted([(box.height, 0, box.top, step[0]), (box.width, 1, box.left, step[1])], reverse=True)
    for length, axis, start, cell in sides:
        first, last = start // cell, (start + length - 1) // cell
        if first < last:
            cut = (first + last + 1) // 2 * cell
            if axis == 0:
                return box._replace(height=cut - start), box._replace(top=cut, height=start + length - cut)
            return box._replace(width=cut - start), box._replace(left=cut, width=start + length - cut)
    return None


def _patches(shape: tuple[int, int, int], pixels: int, count: int) -> Iterator[Box]:
    """About ``count`` boxes in the middle of equal cells that cover ``shape``, together of about so many ``pixels``."""
    slices, height, width = shape
    depth = min(slices, 12)
    rows = min(height, max(1, round(math.sqrt(count / depth * height / width))))
    columns = min(width, max(1, count // (depth * rows)))
    side = math.ceil(math.sqrt(pixels / (depth * rows * columns)))
    for z in range(depth):
        for row in range(rows):
            top, bottom = height * row // rows, height * (row + 1) // rows
            tall = min(side, bottom - top)
            for column in range(columns):
                left, right = width * column // columns, width * (column + 1) // columns
                wide = min(side, right - left)
                yield Box(
                    (2 * z + 1) * slices // (2 * depth),
                    (top + bottom - tall) // 2,
                    (left + right - wide) // 2,
                    tall,
                    wide,
                )
