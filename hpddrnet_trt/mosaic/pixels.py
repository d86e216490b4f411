"""What is read of a mosaic for one block, and what the network sees of it in each tile.

Both follow from where a tile lies in the mosaic, and from nothing else, so every block that computes a tile computes
the same. At another magnification the grid's tiles lie in the mosaic as the network sees it, enlarged or shrunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.data.intensity import in_window
from hpddrnet_trt.inference.tiled import seen_from
from hpddrnet_trt.inference.tiling import TilePart, TilePlan
from hpddrnet_trt.mosaic.layout import CELL, Box, Source

Grey8 = npt.NDArray[np.uint8]
Real = npt.NDArray[np.float32]

_BAND = 1024  # rows that are read at a time, at least
_SHARPNESS = -0.75  # of the cubic, as in OpenCV


def tiles_of(grid: TilePlan, shape: tuple[int, int, int], box: Box) -> TilePart:
    """The tiles with a say in ``box`` of a mosaic of ``shape``."""
    places, own = [], []
    for place, size, seen in ((box.rows, shape[1], grid.height), (box.columns, shape[2], grid.width)):
        before, first, last = seen_from(np.array([place.start - 1, place.start, place.stop - 1]), size, seen).tolist()
        # Shrunk, two blocks may share a pixel; enlarged, some pixels are between those that become the mosaic's.
        begin = 0 if place.start == 0 else before + 1
        places.append(slice(min(begin, first), seen if place.stop == size else last + 1))
        own.append(begin)
    return grid.part(places[0], places[1], (own[0], own[1]))


def read_box(grid: TilePlan, shape: tuple[int, int, int], box: Box) -> Box:
    """What is read for ``box``: all that its tiles see, in whole cells, and the cells next to its own."""
    part = tiles_of(grid, shape, box)
    edges = []
    for own, starts, chosen, tile, size, seen in (
        (box.rows, grid.rows, part.down, grid.tile[0], shape[1], grid.height),
        (box.columns, grid.columns, part.across, grid.tile[1], shape[2], grid.width),
    ):
        sees = _Direction(size, seen).sees(slice(starts[chosen[0]], starts[chosen[-1]] + tile))
        first, last = min(sees.start, max(own.start - CELL, 0)), max(sees.stop, own.stop + CELL)
        edges.append((first // CELL * CELL, min(-(-last // CELL) * CELL, size)))
    (top, bottom), (left, right) = edges
    return Box(box.z, top, left, bottom - top, right - left)


@dataclass(frozen=True)
class Pixels:
    """``box`` of a mosaic in 8 bits: ``grey`` ``[h, w]``; ``empty``: of each cell, whether nothing was acquired in it;
    ``filled``: of each pixel, whether it holds the fill value, as bits ``[h, w / 8]``, None where that does not matter.
    ``unreadable``: see :class:`~hpddrnet_trt.mosaic.layout.Piece`. ``bytes_read``: as the source gave them."""

    box: Box
    grey: Grey8
    empty: npt.NDArray[np.bool_]
    filled: npt.NDArray[np.uint8] | None
    unreadable: tuple[tuple[Box, str], ...]
    bytes_read: int
    _rows: _Direction
    _columns: _Direction

    def picture(self, place: tuple[slice, slice]) -> Grey8 | None:
        """What the network sees of the tile at ``place`` of the grid; None where all of it lies in empty cells.

        At factor 1 the pixels themselves. Else means over the mosaic's pixels where these are smaller, and cubic
        interpolation where they are larger: :func:`~hpddrnet_trt.data.preprocess.magnified` of the whole mosaic, but
        for at most one grey level (it rounds weights to 1/2048), with positions counted from the mosaic's corner.
        """
        rows, columns = self._rows.sees(place[0]), self._columns.sees(place[1])
        if self.cells_of(rows, columns).all():
            return None
        here = slice(rows.start - self.box.top, rows.stop - self.box.top)
        grey = self.grey[here, columns.start - self.box.left : columns.stop - self.box.left]
        if self._rows.same and self._columns.same:
            return grey
        high = _combined(grey, *self._rows.weights(place[0]), rows.start)
        both = _combined(np.ascontiguousarray(high.T), *self._columns.weights(place[1]), columns.start)
        return np.clip(np.rint(both.T), 0, 255).astype(np.uint8, order="C")

    def edges_of_empty(self, box: Box) -> Iterator[tuple[slice, slice, npt.NDArray[np.bool_]]]:
        """Of cells of ``box`` that touch empty ones: rows and columns of ``box``, and which pixels there belong to what
        is empty: those with the fill value from which such pixels go on to an edge of the cell both in their row and in
        their column."""
        if self.filled is None:
            return
        around = np.lib.stride_tricks.sliding_window_view(np.pad(self.empty, 1), (3, 3))
        touching: npt.NDArray[np.bool_] = np.any(around, axis=(2, 3)) & ~self.empty
        top, left = (box.top - self.box.top) // CELL, (box.left - self.box.left) // CELL
        bottom, right = top + -(-box.height // CELL), left + -(-box.width // CELL)
        for row, column in np.argwhere(touching[top:bottom, left:right]).tolist():
            rows = slice(row * CELL, min((row + 1) * CELL, box.height))
            columns = slice(column * CELL, min((column + 1) * CELL, box.width))
            first = (left + column) * CELL // 8
            bits = self.filled[top * CELL + rows.start : top * CELL + rows.stop, first : first + CELL // 8]
            filled = np.unpackbits(bits, axis=1, count=columns.stop - columns.start).astype(np.bool_)
            yield rows, columns, _to_an_edge(filled) & _to_an_edge(filled.T).T

    def cells_of(self, rows: slice, columns: slice) -> npt.NDArray[np.bool_]:
        """:attr:`empty` of the cells that these rows and columns of the mosaic touch."""
        top, left = self.box.top, self.box.left
        return self.empty[
            (rows.start - top) // CELL : -(-(rows.stop - top) // CELL),
            (columns.start - left) // CELL : -(-(columns.stop - left) // CELL),
        ]


def read_pixels(
    source: Source, grid: TilePlan, window: tuple[float, float], box: Box, *, skip_empty: bool = True
) -> Pixels:
    """Read what the tiles of ``box`` see, in bands that end where ``source.unit`` does: each is decoded once, and what
    is held is the pixels in 8 bits and one band. ``skip_empty``: see
    :class:`~hpddrnet_trt.mosaic.layout.MosaicSettings`."""
    area = read_box(grid, source.shape, box)
    grey = np.empty((area.height, area.width), np.uint8)
    empty = np.zeros((-(-area.height // CELL), -(-area.width // CELL)), np.bool_)
    bits = np.empty((area.height, -(-area.width // 8)), np.uint8)
    unreadable: list[tuple[Box, str]] = []
    bytes_read = 0
    for band in _bands(area, source.unit[0]):
        piece = source.read(band)
        begin = band.top - area.top
        grey[begin : begin + band.height] = in_window(piece.pixels, window)
        if skip_empty:
            filled = np.isnan(piece.pixels) if np.isnan(source.fill_value) else piece.pixels == source.fill_value
            bits[begin : begin + band.height] = np.packbits(filled, axis=1)
            if filled[::CELL, ::CELL].any():
                empty[begin // CELL : -(-(begin + band.height) // CELL)] = _all_of(filled)
        unreadable += piece.unreadable
        bytes_read += piece.pixels.nbytes
    directions = _Direction(source.shape[1], grid.height), _Direction(source.shape[2], grid.width)
    return Pixels(area, grey, empty, bits if empty.any() else None, tuple(unreadable), bytes_read, *directions)


def _all_of(filled: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Of each cell whether all of it is ``filled``; the last ones may be smaller."""
    corners = [np.arange(0, size, CELL) for size in filled.shape]
    every: npt.NDArray[np.bool_] = np.logical_and.reduceat(filled, corners[0], axis=0)
    return np.logical_and.reduceat(every, corners[1], axis=1)


def _to_an_edge(filled: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which of the ``filled`` have nothing else between them and the left or the right edge."""
    left: npt.NDArray[np.bool_] = np.logical_and.accumulate(filled, axis=1)
    right: npt.NDArray[np.bool_] = np.logical_and.accumulate(filled[:, ::-1], axis=1)
    return left | right[:, ::-1]


def _bands(area: Box, unit: int) -> Iterator[Box]:
    step = math.lcm(max(unit, 1), CELL)
    step *= -(-_BAND // step)
    top, bottom = area.top, area.top + area.height
    while top < bottom:
        end = min((top // step + 1) * step, bottom)
        yield area._replace(top=top, height=end - top)
        top = end


@dataclass(frozen=True)
class _Direction:
    """Rows or columns of a mosaic: ``size`` of them, of which the network sees ``seen``."""

    size: int
    seen: int

    @property
    def same(self) -> bool:
        return self.size == self.seen

    def sees(self, place: slice) -> slice:
        """Of the mosaic, what ``place`` is made of as the network sees it."""
        if self.same:
            return place
        first, last = (self.weights(slice(at, at + 1))[0][0] for at in (place.start, place.stop - 1))
        return slice(int(first[0]), int(last[-1]) + 1)

    def weights(self, place: slice) -> tuple[npt.NDArray[np.intp], Real]:
        """Numbers ``[n, taps]`` of the pixels that each one of ``place`` is made of, and how they count; those beyond
        the border are its outermost again."""
        at, step = np.arange(place.start, place.stop), self.size / self.seen
        if step > 1:  # shrunk: by how much of each lies in it
            begins = at * step
            numbers = np.floor(begins)[:, np.newaxis] + np.arange(math.ceil(step) + 1)
            ends = np.minimum(numbers + 1, (begins + step)[:, np.newaxis])
            counts = np.clip(ends - np.maximum(numbers, begins[:, np.newaxis]), 0, None) / step
        else:
            middles = (at + 0.5) * step - 0.5
            numbers = np.floor(middles)[:, np.newaxis] + np.arange(-1, 3)
            counts = _cubic(np.abs(numbers - middles[:, np.newaxis]))
        return np.clip(numbers, 0, self.size - 1).astype(np.intp), counts.astype(np.float32)


def _cubic(distance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """R. G. Keys, "Cubic convolution interpolation for digital image processing", IEEE Trans. ASSP 29, 1981."""
    a, d = _SHARPNESS, distance
    near = ((a + 2) * d - (a + 3)) * d**2 + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _combined(values: npt.NDArray[Any], numbers: npt.NDArray[np.intp], counts: Real, first: int) -> Real:
    """Sums ``[n, w]`` of rows of ``values``, whose first is number ``first``."""
    total: Real = values[numbers[:, 0] - first] * counts[:, :1]
    for tap in range(1, numbers.shape[1]):
        total += values[numbers[:, tap] - first] * counts[:, tap, np.newaxis]
    return total
