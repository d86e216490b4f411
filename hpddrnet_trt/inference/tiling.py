"""Large images in overlapping tiles: where the tiles lie, how they become one picture, and how well they agree.

An approximation for this network: position attention and the pyramid pooling see their whole input, so a
pixel's scores depend on the tile it is computed in. Scores of overlapping tiles are therefore blended with
a smooth window, and the disagreement of the tiles is reported. For a network that looks no further than the
outer quarter of an overlap, tiles give exactly what the whole image gives.

Tiles come row by row and what is complete leaves at once, so memory grows with the image's width, not its area.

A rectangle of the image can be made by itself (:class:`TilePart`): from those tiles that have a say in it, with the
weights that they have in the whole image, added in the same order. Each pixel then is what it is in the whole image.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, product
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
    def whole(self) -> TilePart:
        """All tiles, for the whole image."""
        return self.part(slice(0, self.height), slice(0, self.width))

    def part(self, rows: slice, columns: slice, own: tuple[int, int] | None = None) -> TilePart:
        """The tiles that have a say in ``rows`` x ``columns`` of the image: a weight there that is not 0.

        Where rectangles cover an image, a tile is a part's own if its say begins there; ``own``: in rows and columns
        from there on (default: in all of the rectangle), for rectangles that overlap.
        """
        begins = (rows.start, columns.start) if own is None else own
        down, own_down = _with_a_say(self.rows, self.tile[0], self.overlap, rows, begins[0])
        across, own_across = _with_a_say(self.columns, self.tile[1], self.overlap, columns, begins[1])
        return TilePart(self, rows, columns, down, across, own_down, own_across)

    def report(self, method: Method, seams: Seams) -> TilingReport:
        return TilingReport(self.tile, self.overlap, len(self.whole), method, seams.disagreement)


@dataclass(frozen=True)
class TilePart:
    """The tiles of ``plan`` for ``rows`` x ``columns`` of its image; see :meth:`TilePlan.part`.

    ``down`` and ``across``: their numbers among the plan's ``rows`` and ``columns``; ``own_down`` and ``own_across``:
    of those that are the part's own, whose left and upper neighbors are among its tiles, too.
    """

    plan: TilePlan
    rows: slice
    columns: slice
    down: range
    across: range
    own_down: range
    own_across: range

    def __len__(self) -> int:
        return len(self.down) * len(self.across)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of the image that each tile covers, from left to right, then from top to bottom."""
        height, width = self.plan.tile
        for row, column in self.numbers:
            top, left = self.plan.rows[row], self.plan.columns[column]
            yield slice(top, top + height), slice(left, left + width)

    @property
    def numbers(self) -> Iterator[tuple[int, int]]:
        """The same tiles as numbers of a row and a column of the plan."""
        return product(self.down, self.across)

    def owns(self, row: int, column: int) -> bool:
        """Whether the tile of these numbers is the part's own."""
        return row in self.own_down and column in self.own_across


def plan_tiles(height: int, width: int, tile: tuple[int, int]) -> TilePlan:
    """As few tiles of ``tile`` = (height, width), at least 4 pixels each, as cover the image.

    Neighbours share at least a quarter of the tile's shorter edge. They are spread evenly: the first begins at the
    image's border, the last ends at the other. In a direction in which the image is not larger than a tile there is
    one, of the image's size.
    """
    overlap = max(3, min(tile) // OVERLAP)  # so that two neighbors both have a say in some pixels between them
    rows, columns = _starts(height, tile[0], overlap), _starts(width, tile[1], overlap)
    return TilePlan(height, width, (min(tile[0], height), min(tile[1], width)), overlap, rows, columns)


def _starts(size: int, tile: int, overlap: int) -> tuple[int, ...]:
    if size <= tile:
        return (0,)
    count = -(-(size - overlap) // (tile - overlap))
    return tuple(index * (size - tile) // (count - 1) for index in range(count))


def _outer(overlap: int) -> int:
    """Pixels of a tile, where another one follows, that have no say."""
    return max(1, overlap // 4)


def _with_a_say(starts: Sequence[int], tile: int, overlap: int, where: slice, own: int) -> tuple[range, range]:
    """Numbers of the tiles along one direction that have a say in ``where``, and of those whose say begins there, not
    before ``own``."""
    outer = _outer(overlap)
    begins = [0, *(start + outer for start in starts[1:])]
    ends = [*(start + tile - outer for start in starts[:-1]), starts[-1] + tile]
    stop = bisect_left(begins, where.stop)
    return range(bisect_right(ends, where.start), stop), range(bisect_left(begins, own), stop)


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
    outer = _outer(overlap)
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
    part: TilePart, tiles: Iterable[npt.NDArray[np.float32] | None]
) -> Iterator[tuple[slice, npt.NDArray[np.float32]]]:
    """Blend the tiles' class scores ``[C, h, w]``, given in the part's order; None for a tile that is left out.

    Yields rows of the image, from top to bottom, with their scores ``[C, rows, columns]`` in the part's columns, valid
    until the next ones: only the rows that more tiles are to come for are held. Rows before the first tile that is
    given are left out; other pixels that no tile was given for are 0.
    """
    plan = part.plan
    height, width = plan.tile
    down = blending_weights(plan.rows, height, plan.height, plan.overlap)
    across = blending_weights(plan.columns, width, plan.width, plan.overlap)
    given = iter(tiles)
    sums: npt.NDArray[np.float32] | None = None  # from the row that is to leave next
    first = part.rows.start
    for row in part.down:
        # The tile's rows in the part that are not done.
        high = slice(first - plan.rows[row], min(part.rows.stop - plan.rows[row], height))
        for column in part.across:
            scores = next(given)
            if scores is None:
                continue
            if sums is None:
                sums = np.zeros((len(scores), height, part.columns.stop - part.columns.start), dtype=np.float32)
            left = plan.columns[column]
            start, stop = max(part.columns.start, left), min(part.columns.stop, left + width)
            wide, here = (slice(start - zero, stop - zero) for zero in (left, part.columns.start))
            weights = down[row][high, np.newaxis] * across[column][wide]
            sums[:, : high.stop - high.start, here] += scores[:, high, wide] * weights
        after = part.rows.stop if row == part.down[-1] else max(first, plan.rows[row + 1])
        done = after - first
        if sums is not None and done:
            yield slice(first, after), sums[:, :done]
            sums[:, : height - done] = sums[:, done:]
            sums[:, height - done :] = 0
        first = after


def own_parts(part: TilePart) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """What each tile alone decides, cut in the middle of overlaps, of the part's rectangle, in its order.

    Yields rows and columns of the image, and the same rows and columns inside the tile; none where it decides nothing.
    """
    plan = part.plan
    rows, columns = cuts(plan.rows, plan.tile[0], plan.height), cuts(plan.columns, plan.tile[1], plan.width)
    for row, column in part.numbers:
        here = tuple(
            slice(begin := max(of[number], within.start), max(begin, min(of[number + 1], within.stop)))
            for of, number, within in ((rows, row, part.rows), (columns, column, part.columns))
        )
        top, left = plan.rows[row], plan.columns[column]
        inside = slice(here[0].start - top, here[0].stop - top), slice(here[1].start - left, here[1].stop - left)
        yield (here[0], here[1]), inside


def cuts(starts: Sequence[int], tile: int, size: int) -> list[int]:
    """Where what each tile decides begins, along one direction, and where the last one's ends."""
    return [0, *((before + tile + after) // 2 for before, after in pairwise(starts)), size]


class Seams:
    """Compares the labels of each of a part's own tiles with those of its left and upper neighbors; see
    :class:`TilingReport`. Over parts that cover an image, each pair is counted once.

    ``compared``: pixels so far that both of a pair see; ``different``: those of them with two labels.
    """

    def __init__(self, part: TilePart) -> None:
        self._part, self._numbers = part, part.numbers
        self._left: npt.NDArray[np.uint8] | None = None  # what the previous tile shares with this one
        self._above: dict[int, npt.NDArray[np.uint8] | None] = {}  # the same of the row above, by column
        self.different = self.compared = 0

    def add(self, labels: npt.NDArray[np.uint8] | None) -> None:
        """Labels ``[h, w]`` of the next tile in the part's order; None for one that is left out."""
        rows, columns = self._part.plan.rows, self._part.plan.columns
        row, column = next(self._numbers)
        above = self._above.pop(column, None)
        if labels is not None and self._part.owns(row, column):
            if self._left is not None:
                self._compare(labels[:, : self._left.shape[1]], self._left)
            if above is not None:
                self._compare(labels[: above.shape[0]], above)
        self._left = None
        if labels is None:
            return
        # Copies: a view would keep the whole tile.
        if column != self._part.across[-1]:
            self._left = labels[:, columns[column + 1] - columns[column] :].copy()
        if row != self._part.down[-1]:
            self._above[column] = labels[rows[row + 1] - rows[row] :].copy()

    def _compare(self, labels: npt.NDArray[np.uint8], others: npt.NDArray[np.uint8]) -> None:
        self.different += int(np.count_nonzero(labels != others))
        self.compared += labels.size

    @property
    def disagreement(self) -> float:
        """Share of shared pixels with two different labels so far."""
        return self.different / self.compared if self.compared else 0.0
