"""Regions in parts: sums that add up over the parts of a region, and the figures that follow from them.

A picture that fits into memory is one block, and each of its regions one part. A mosaic has many blocks, and a region
that crosses a border has a part on either side: :func:`joined` adds them. Sums are exact integers, so figures do not
depend on where a region was cut.

Perimeter: Crofton's formula in four directions counts the chords of a region along rows, columns and both diagonals.
Along each, chords are pixels less pairs of neighboring pixels, and pairs add up over parts as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_ROUND = 1e-6  # axes closer than this, relative to the major one, have no direction
_EXACT = 1 << 33  # of area^2 times width times height: below it, products of second moments fit into 64 bits
_AT_ONCE = 1 << 20  # distances computed at a time


@dataclass(frozen=True)
class Parts:
    """Sums of N parts, in pixels of the picture or mosaic.

    ``box`` ``[N, 4]``: left, top, and right, bottom beyond the last pixel. ``first_column`` ``[N]``: of the first
    pixel, whose row is the box's top. ``area`` ``[N]``. ``sums`` ``[N, 5]``: of x, y, x^2, xy, y^2 from the box's
    corner; Python's integers where 64 bits may not suffice. ``pairs`` ``[N, 2]``: neighboring pixels of the part, along
    rows and columns, and along diagonals. ``hull`` ``[M, 3]``: part, x, y of the corners of each part's convex hull,
    part by part and around each; pixels are squares, and the first one's corner is (0, 0).
    """

    box: Integers
    first_column: Integers
    area: Integers
    sums: npt.NDArray[np.int64] | npt.NDArray[np.object_]
    pairs: Integers
    hull: Integers

    def __len__(self) -> int:
        return len(self.area)

    def take(self, chosen: Integers) -> Parts:
        """The parts of these indices, in their order."""
        new = np.full(len(self), -1)
        new[chosen] = np.arange(len(chosen))
        hull = np.column_stack([new[self.hull[:, 0]], self.hull[:, 1:]])
        hull = hull[hull[:, 0] >= 0]
        hull = hull[np.argsort(hull[:, 0], kind="stable")]
        return Parts(
            self.box[chosen], self.first_column[chosen], self.area[chosen], self.sums[chosen], self.pairs[chosen], hull
        )


def parts_of(numbers: npt.NDArray[np.int32], count: int, left: int = 0, top: int = 0) -> Parts:
    """The parts 1 to ``count`` of ``numbers`` ``[H, W]`` (0 for none), whose first pixel lies at ``left``, ``top``."""
    width = numbers.shape[1]
    change = np.ones(numbers.shape, np.bool_)
    np.not_equal(numbers[:, 1:], numbers[:, :-1], out=change[:, 1:])
    starts = np.flatnonzero(change)
    lengths = np.diff(starts, append=numbers.size)
    part = numbers.ravel()[starts].astype(np.int64) - 1
    order = np.argsort(part, kind="stable")  # chords of rows: part by part, row by row, from left to right
    order = order[np.searchsorted(part[order], 0) :]
    part, lengths = part[order], lengths[order]
    y, x = np.divmod(starts[order], width)
    begin = np.searchsorted(part, np.arange(count))
    last = np.append(begin[1:], len(part)) - 1
    if not count:
        none = np.zeros((0, 5), np.int64)
        return Parts(none[:, :4], none[:, 0], none[:, 0], none, none[:, :2], none[:, :3])
    box = np.stack([
        np.minimum.reduceat(x, begin), y[begin], np.maximum.reduceat(x + lengths, begin), y[last] + 1
    ], axis=1)  # fmt: skip
    area = np.add.reduceat(lengths, begin)
    x0, y0 = x - box[part, 0], y - box[part, 1]
    one, two = lengths * (lengths - 1) // 2, (lengths - 1) * lengths * (2 * lengths - 1) // 6
    along = lengths * x0 + one
    terms = (along, lengths * y0, x0 * (lengths * x0 + 2 * one) + two, along * y0, lengths * y0 * y0)
    below = _inside(numbers[:-1], numbers[1:], count)
    diagonal = _inside(numbers[:-1, :-1], numbers[1:, 1:], count) + _inside(numbers[:-1, 1:], numbers[1:, :-1], count)
    hull = _hulls(part, x, x + lengths, y)
    return Parts(
        box=box + np.array([left, top, left, top]),
        first_column=x[begin] + left,
        area=area,
        sums=np.stack([np.add.reduceat(term, begin) for term in terms], axis=1),
        pairs=np.stack([area - np.diff(begin, append=len(part)) + below, diagonal], axis=1),
        hull=hull + np.array([0, left, top]),
    )


def _inside(here: npt.NDArray[np.int32], there: npt.NDArray[np.int32], count: int) -> Integers:
    """How often both say the same part, for each."""
    return np.bincount(here[here == there], minlength=count + 1)[1:]


def concatenated(several: Sequence[Parts]) -> Parts:
    """The parts of all, one after another."""
    none = parts_of(np.zeros((0, 0), np.int32), 0)
    several = [none, *several]
    shift = np.cumsum([0, *map(len, several)])
    hulls = [parts.hull + np.array([before, 0, 0]) for parts, before in zip(several, shift, strict=False)]
    columns = ("box", "first_column", "area", "sums", "pairs")
    return Parts(
        **{name: np.concatenate([getattr(parts, name) for parts in several]) for name in columns},
        hull=np.concatenate(hulls),
    )


def joined(parts: Parts, region: Integers) -> Parts:
    """The regions 0, 1, ... that have these ``parts``; ``region`` ``[N]`` says which each belongs to."""
    if not len(parts):
        return parts
    order = np.argsort(region, kind="stable")
    begin = np.flatnonzero(np.diff(region[order], prepend=-1))
    low = np.minimum.reduceat(parts.box[order, :2], begin)
    high = np.maximum.reduceat(parts.box[order, 2:], begin)
    at_top = parts.box[:, 1] == low[region, 1]
    columns = np.where(at_top, parts.first_column, np.iinfo(np.int64).max)
    area, (dx, dy) = parts.area.astype(object), (parts.box[:, :2] - low[region]).astype(object).T
    x, y, xx, xy, yy = parts.sums.astype(object).T
    moved = (
        x + area * dx, y + area * dy, xx + dx * (2 * x + area * dx), xy + dx * y + dy * x + area * dx * dy,
        yy + dy * (2 * y + area * dy),
    )  # fmt: skip
    points = parts.hull
    by_row = np.lexsort((points[:, 1], points[:, 2], region[points[:, 0]]))
    x_of, y_of = points[by_row, 1], points[by_row, 2]
    return Parts(
        box=np.hstack([low, high]),
        first_column=np.minimum.reduceat(columns[order], begin),
        area=np.add.reduceat(parts.area[order], begin),
        sums=np.stack([np.add.reduceat(term[order], begin) for term in moved], axis=1),
        pairs=np.add.reduceat(parts.pairs[order], begin),
        hull=_hulls(region[points[by_row, 0]], x_of, x_of, y_of, thick=0),
    )


def _hulls(part: Integers, left: Integers, right: Integers, row: Integers, thick: int = 1) -> Integers:
    """Convex hulls, as :attr:`Parts.hull`, of chords from ``left`` to ``right``, ordered by part, ``row`` and ``left``;
    ``thick``: 1 for rows of pixels, 0 for lines."""
    new = np.ones(len(part), np.bool_)
    new[1:] = (np.diff(part) != 0) | (np.diff(row) != 0)
    first = np.flatnonzero(new)
    last = np.append(first[1:], len(part)) - 1
    # The left outline of each part from top to bottom, and the right one, mirrored.
    chain = np.repeat(np.concatenate([2 * part[first], 2 * part[last] + 1]), 1 + thick)
    x = np.repeat(np.concatenate([left[first], -right[last]]), 1 + thick)
    y = np.concatenate([row[first], row[last]])
    if thick:
        y = np.stack([y, y + 1], axis=1).ravel()
    done = []
    while len(chain):
        # A point that is not outside of the line between its neighbors is none of the hull's, and can go at once.
        a, b, c = slice(None, -2), slice(1, -1), slice(2, None)
        dent = (x[b] - x[a]) * (y[c] - y[a]) >= (x[c] - x[a]) * (y[b] - y[a])
        dent &= (chain[a] == chain[b]) & (chain[b] == chain[c])
        gone = np.zeros(len(chain), np.bool_)
        gone[b] = dent
        open_chains = np.zeros(int(chain.max()) + 1, np.bool_)
        open_chains[chain[gone]] = True
        still = open_chains[chain]
        done.append(np.stack([chain[~still], x[~still], y[~still]]))
        chain, x, y = (values[still & ~gone] for values in (chain, x, y))
    chain, x, y = np.concatenate([np.zeros((3, 0), np.int64), *done], axis=1)
    side = chain & 1
    order = np.lexsort((np.where(side, -y, y), chain))
    return np.stack([chain >> 1, np.where(side, -x, x), y], axis=1)[order]


def figures(parts: Parts) -> dict[str, Any]:
    """What :class:`hpddrnet_trt.results.regions.RegionTable` holds of each region by itself, by the same names."""
    area = parts.area.astype(np.float64)
    chords = 2 * parts.area[:, np.newaxis] - parts.pairs
    perimeter = np.pi / 4 * (chords[:, 0] + chords[:, 1] / np.sqrt(2))
    axes, degrees = _ellipses(parts)
    hull_area, feret = _hull_figures(parts.hull, len(parts))
    return {
        "area_px": parts.area,
        "equivalent_diameter_px": np.sqrt(4 * area / np.pi),
        "centroid_px": parts.box[:, :2] + (parts.sums[:, :2] / parts.area[:, np.newaxis]).astype(np.float64),
        "axes_px": axes,
        "orientation_deg": degrees,
        "box_px": np.hstack([parts.box[:, :2], parts.box[:, 2:] - parts.box[:, :2]]),
        "perimeter_px": perimeter,
        "circularity": 4 * np.pi * area / perimeter**2,
        "solidity": area / hull_area,
        "feret_px": feret,
    }


def _ellipses(parts: Parts) -> tuple[Floats, Floats]:
    """Axes ``[N, 2]`` and orientation of the ellipses of equal second moments.

    The determinant of a long region's moments is a small difference of large products: it is computed in integers.
    """
    axes, degrees = np.zeros((len(parts), 2)), np.full(len(parts), np.nan)
    width, height = (parts.box[:, 2:] - parts.box[:, :2]).T.astype(np.float64)
    small = parts.area.astype(np.float64) ** 2 * width * height < _EXACT
    for chosen, kind in ((small, np.int64), (~small, object)):
        n, sums = parts.area[chosen].astype(kind), parts.sums[chosen].astype(kind)
        x, y, xx, xy, yy = sums.T
        a, b, c = n * xx - x * x, n * yy - y * y, n * xy - x * y
        determinant = (a * b - c * c).astype(np.float64)
        trace, difference, mixed = ((a + b).astype(np.float64), (a - b).astype(np.float64), c.astype(np.float64))
        large = (trace + np.hypot(difference, 2 * mixed)) / 2
        lesser = np.divide(determinant, large, out=np.zeros(len(large)), where=large > 0)
        axes[chosen] = 4 * np.sqrt(np.stack([large, lesser], axis=1)) / parts.area[chosen, np.newaxis]
        degrees[chosen] = np.mod(np.degrees(np.arctan2(-2 * mixed, difference)) / 2, 180)  # rows grow downwards
    return axes, np.where(axes[:, 0] - axes[:, 1] > _ROUND * axes[:, 0], degrees, np.nan)


def _hull_figures(hull: Integers, count: int) -> tuple[Floats, Floats]:
    """Area of each convex hull, and its largest and smallest Feret diameter ``[N, 2]``."""
    area, feret = np.zeros(count), np.zeros((count, 2))
    corners = np.bincount(hull[:, 0], minlength=count)
    begin = np.cumsum(corners) - corners
    for size in np.unique(corners):
        of_size = np.flatnonzero(corners == size)
        for chosen in np.array_split(of_size, -(-len(of_size) * int(size) ** 2 // _AT_ONCE)):
            points = hull[begin[chosen, np.newaxis] + np.arange(size), 1:]
            points = (points - points[:, :1]).astype(np.float64)
            sides = np.roll(points, -1, axis=1) - points
            x, y = points[..., 0], points[..., 1]
            area[chosen] = np.abs(np.sum(x * sides[..., 1] - y * sides[..., 0], axis=1)) / 2
            normals = np.stack([-sides[..., 1], sides[..., 0]], axis=2) / np.linalg.norm(sides, axis=2, keepdims=True)
            most, least = np.zeros(len(chosen)), np.full(len(chosen), np.inf)
            step = max(1, _AT_ONCE // int(size))
            for start in range(0, size, step):
                some = np.s_[:, start : start + step]
                across = np.ptp(normals[some] @ points.transpose(0, 2, 1), axis=2).min(axis=1)
                far = ((points[some][:, :, np.newaxis] - points[:, np.newaxis]) ** 2).sum(axis=3).max(axis=(1, 2))
                most, least = np.maximum(most, far), np.minimum(least, across)
            feret[chosen] = np.stack([np.sqrt(most), least], axis=1)
    return area, feret
