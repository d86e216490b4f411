"""Large images in overlapping tiles: where the tiles lie, how they become one picture, and how well they agree.

An approximation for this network: position attention and the pyramid pooling see their whole input, so a
pixel's scores depend on the tile it is computed in. Scores of overlapping tiles are therefore blended with
a smooth window, and the disagreement of the tiles is reported. For a network that looks no further than the
outer quarter of an overlap, tiles give exactly what the whole image gives.

Tiles come row by row and what is complete leaves at once, so memory grows with the image's width, not its area.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

# Neighbours share at least a quarter of a tile's edge, as in MONAI's sliding window inference
# (https://monai.readthedocs.io/en/stable/inferers.html); more costs time with the square.
OVERLAP = 4

Method = Literal["blended scores", "cut labels"]


@dataclass(frozen=True)
class TilingReport:
    """How a large image was put together.

    ``tile``: height and width in pixels. ``overlap``: pixels that neighbours share at least. ``tiles``: how many.
    ``method``: ``blended scores``, or ``cut labels`` for a model that gives labels only: each pixel then has
    the label of one tile, and overlaps are cut in their middle.

    ``seam_disagreement``: over all pairs of tiles next to each other in a row or a column, and all
    pixels that both tiles of a pair see, the share of pixels to which the two give different labels, each on
    its own, before blending. 0 is perfect; 0 also for a single tile. It counts the tiles' outermost pixels,
    whose labels are the least certain and end in no result, so it is an upper estimate.
    """

    tile: tuple[int, int]
    overlap: int
    tiles: int
    method: Method
    seam_disagreement: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "tile": list(self.tile)}


@dataclass(frozen=True)
class TilePlan:
    """Equal tiles that cover an image of ``height`` x ``width``; see :func:`plan_tiles`.

    ``rows`` and ``columns``: first row and first column of the tiles. A tile is never larger than the image.
    """

    height: int
    width: int
    tile: tuple[int, int]
    overlap: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def tiles(self) -> int:
        return len(self.rows) * len(self.columns)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of the image that each tile covers, from left to right, then from top to bottom."""
        for top in self.rows:
            for left in self.columns:
                yield slice(top, top + self.tile[0]), slice(left, left + self.tile[1])

    def report(self, method: Method, seams: Seams) -> TilingReport:
        return TilingReport(self.tile, self.overlap, self.tiles, method, seams.disagreement)


def plan_tiles(height: int, width: int, tile: tuple[int, int]) -> TilePlan:
    """As few tiles of ``tile`` = (height, width), at least 4 pixels each, as cover the image.

    Neighbours share at least a quarter of the tile's shorter edge. They are spread evenly: the first begins at the
    image's border, the last ends at the other. In a direction in which the image is not larger than a tile there is
    one, of the image's size.
    """
    overlap = max(2, min(tile) // OVERLAP)
    rows, columns = _starts(height, tile[0], overlap), _starts(width, tile[1], overlap)
    return TilePlan(height, width, (min(tile[0], height), min(tile[1], width)), overlap, rows, columns)


def _starts(size: int, tile: int, overlap: int) -> tuple[int, ...]:
    if size <= tile:
        return (0,)
    count = -(-(size - overlap) // (tile - overlap))
    return tuple(index * (size - tile) // (count - 1) for index in range(count))


def blending_weights(
    starts: Sequence[int], tile: int, size: int, overlap: int
) -> list[npt.NDArray[np.float32]]:
    """Weight of each tile's pixels along one direction; over the tiles of a pixel they add up to 1.

    A tile's window is 1 inside, and at each side where another tile follows it falls over ``overlap`` pixels: along
    a squared sine, to 0 for the outer quarter, which sees too little of its surroundings. (Tiles start at most
    ``tile - overlap`` apart, so every pixel lies where some window is not 0.) Windows are divided by their sum. Two
    directions are multiplied: the weights of all tiles of a pixel then still add up to 1.
    """
    if len(starts) == 1:
        return [np.ones(tile, dtype=np.float32)]
    outer = max(1, overlap // 4)
    ramp = np.ones(overlap)
    ramp[:outer] = 0
    between = overlap - 2 * outer
    ramp[outer : outer + between] = np.sin(np.pi / 2 * (np.arange(between) + 0.5) / max(between, 1)) ** 2
    windows = np.ones((len(starts), tile))
    windows[1:, :overlap] = ramp
    windows[:-1, tile - overlap :] *= ramp[::-1]
    total = np.zeros(size)
    for start, window in zip(starts, windows, strict=True):
        total[start : start + tile] += window
    return [
        (window / total[start : start + tile]).astype(np.float32)
        for start, window in zip(starts, windows, strict=True)
    ]


def blend(
    plan: TilePlan, tiles: Iterable[npt.NDArray[np.float32]]
) -> Iterator[tuple[slice, npt.NDArray[np.float32]]]:
    """Blend the tiles' class scores ``[C, h, w]``, given in the plan's order.

    Yields rows of the image, from top to bottom, with their scores ``[C, rows, W]``, valid until the next ones:
    only the rows that more tiles are to come for are held.
    """
    height, width = plan.tile
    across = blending_weights(plan.columns, width, plan.width, plan.overlap)
    down = blending_weights(plan.rows, height, plan.height, plan.overlap)
    given = iter(tiles)
    sums: npt.NDArray[np.float32] | None = None
    for weights, top, bottom in zip(down, plan.rows, (*plan.rows[1:], plan.height), strict=True):
        for left, column_weights in zip(plan.columns, across, strict=True):
            scores = next(given)
            if sums is None:
                sums = np.zeros((len(scores), height, plan.width), dtype=np.float32)
            sums[:, :, left : left + width] += scores * (weights[:, None] * column_weights)
        assert sums is not None  # a plan has a tile
        done = bottom - top
        yield slice(top, bottom), sums[:, :done]
        sums[:, : height - done] = sums[:, done:]
        sums[:, height - done :] = 0


def own_parts(plan: TilePlan) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """The part of the image that each tile alone decides, cut in the middle of overlaps, in the plan's order.

    Yields rows and columns of the image, and the same rows and columns inside the tile.
    """
    rows, columns = _cuts(plan.rows, plan.tile[0], plan.height), _cuts(plan.columns, plan.tile[1], plan.width)
    for top, (first, end) in zip(plan.rows, pairwise(rows), strict=True):
        for left, (begin, stop) in zip(plan.columns, pairwise(columns), strict=True):
            inside = slice(first - top, end - top), slice(begin - left, stop - left)
            yield (slice(first, end), slice(begin, stop)), inside


def _cuts(starts: Sequence[int], tile: int, size: int) -> list[int]:
    return [0, *((before + tile + after) // 2 for before, after in pairwise(starts)), size]


class Seams:
    """Compares the labels of each tile with those of its left and upper neighbours; see :class:`TilingReport`."""

    def __init__(self, plan: TilePlan) -> None:
        self._plan = plan
        self._number = 0
        self._left: npt.NDArray[np.uint8] | None = None  # what the previous tile shares with this one
        self._above: dict[int, npt.NDArray[np.uint8]] = {}  # the same of the row above, by column
        self._different = self._compared = 0

    def add(self, labels: npt.NDArray[np.uint8]) -> None:
        """Labels ``[h, w]`` of the next tile in the plan's order."""
        plan = self._plan
        row, column = divmod(self._number, len(plan.columns))
        self._number += 1
        if column:
            assert self._left is not None
            self._compare(labels[:, : self._left.shape[1]], self._left)
        if row:
            above = self._above[column]
            self._compare(labels[: above.shape[0]], above)
        # Copies: a view would keep the whole tile.
        if column + 1 < len(plan.columns):
            self._left = labels[:, plan.columns[column + 1] - plan.columns[column] :].copy()
        if row + 1 < len(plan.rows):
            self._above[column] = labels[plan.rows[row + 1] - plan.rows[row] :].copy()

    def _compare(self, labels: npt.NDArray[np.uint8], others: npt.NDArray[np.uint8]) -> None:
        self._different += int(np.count_nonzero(labels != others))
        self._compared += labels.size

    @property
    def disagreement(self) -> float:
        """Share of shared pixels with two different labels so far."""
        return self._different / self._compared if self._compared else 0.0
