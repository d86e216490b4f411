"""Names beside the points and lines of a figure that never lie on top of each other."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]

WRAP = 26  # characters of a line
_STEP = 6  # pixels between places that are tried
_GAP = 3  # pixels that stay free around a name
_POINT = 8  # pixels around the middle of a marker that stay free
_NEAR = 14  # pixels: a name farther from its point gets a line to it
_SIZE = 8.5


class Named(NamedTuple):
    """A point in data coordinates and what to write beside it."""

    x: float
    y: float
    text: str
    colour: str


def wrapped(text: str, width: int = WRAP) -> str:
    """In lines of at most ``width`` characters."""
    return "\n".join(textwrap.wrap(text, width))


def name_points(axes: Any, points: Sequence[Named], line: Sequence[tuple[float, float]] = ()) -> list[Any]:
    """Write each name at the free place next to its point, off the ``line`` where possible; returns the texts.

    Call it last: axes limits and everything outside must be in place. Places on a grid are compared:
    on another name is worst, then on a marker or on a line to a name, then far away.
    """
    figure = axes.get_figure(root=True)
    figure.draw_without_rendering()
    area = axes.get_window_extent()
    spots: Numbers = axes.transData.transform([(point.x, point.y) for point in points])
    texts = [axes.text(0, 0, wrapped(point.text), fontsize=_SIZE, color=point.colour, ha="center", va="center",
                       linespacing=1.05, zorder=9, in_layout=False) for point in points]  # fmt: skip
    corners: Numbers = axes.transData.transform(line) if line else np.empty((0, 2))
    markers = np.vstack([np.column_stack([spots - _POINT, spots + _POINT]), *map(_along, corners, corners[1:])])
    names: Numbers = np.empty((0, 4))
    for point, spot, text in zip(points, spots, texts, strict=True):
        extent = text.get_window_extent()
        half = np.array([extent.width, extent.height]) / 2 + _GAP
        others = spots[np.any(spots != spot, axis=1)]
        centre, clear = _best(_centres(area, half), half, spot, others, names, markers)
        text.set_position(axes.transAxes.inverted().transform(centre))
        text.set_transform(axes.transAxes)
        names = np.vstack([names, [*(centre - half), *(centre + half)]])
        if not clear:
            end = np.clip(spot, centre - half, centre + half)
            markers = np.vstack([markers, _along(spot, end)])
            ends = axes.transAxes.inverted().transform([spot, end])
            axes.plot(*ends.T, transform=axes.transAxes, color=point.colour, linewidth=0.7, alpha=0.7, zorder=2)
    return texts


def name_ends(axes: Any, ends: Sequence[Named]) -> list[Any]:
    """Write each name in a column right of the axes, at the height of its line's end or next to it.

    Call it last; the axes become narrower. Returns the texts, from the top.
    """
    figure = axes.get_figure(root=True)
    figure.draw_without_rendering()
    area = axes.get_window_extent()
    spots: Numbers = axes.transAxes.inverted().transform(
        axes.transData.transform([(end.x, end.y) for end in ends])
    )  # fmt: skip
    order = np.argsort(-spots[:, 1])
    line = _SIZE * 1.3 * figure.dpi / 72 / area.height  # of the axes' height
    texts = [wrapped(ends[place].text) for place in order]
    heights = [line * (1 + text.count("\n")) + 0.4 * line for text in texts]
    found = []
    for place, text, y in zip(order, texts, _spread(spots[order, 1], np.array(heights)), strict=True):
        found.append(axes.annotate(
            text, spots[place], (1.05, y), "axes fraction", "axes fraction", va="center", fontsize=_SIZE,
            color=ends[place].colour, annotation_clip=False, linespacing=1.05,
            arrowprops={"arrowstyle": "-", "color": ends[place].colour, "linewidth": 0.7, "alpha": 0.7,
                        "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 4},
        ))  # fmt: skip
    return found


def _spread(wanted: Numbers, heights: Numbers) -> Numbers:
    """Middles, from the top, close to those wanted, so that boxes of these heights do not overlap.

    Boxes that would overlap are joined and moved as one (pool adjacent violators), which keeps the
    sum of squared moves smallest; the column is held inside the axes, 0 to 1, if it fits.
    """
    offsets = np.cumsum(heights) - heights / 2  # of each middle below the top of a column without gaps
    pools: list[tuple[float, int]] = []
    for value in wanted + offsets:
        pools.append((float(value), 1))
        while len(pools) > 1 and pools[-2][0] < pools[-1][0]:
            (low, few), (high, many) = pools[-2:]
            pools[-2:] = [((low * few + high * many) / (few + many), few + many)]
    tops = np.repeat([value for value, _ in pools], [number for _, number in pools])
    return np.asarray(np.clip(tops, min(1.0, float(heights.sum())), 1) - offsets)


def _centres(area: Any, half: Numbers) -> Numbers:
    """Middles ``[K, 2]`` of a grid on which a name stays inside the axes."""
    x = np.arange(area.x0 + half[0], max(area.x1 - half[0], area.x0 + half[0] + 1), _STEP)
    y = np.arange(area.y0 + half[1], max(area.y1 - half[1], area.y0 + half[1] + 1), _STEP)
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def _best(
    centres: Numbers, half: Numbers, spot: Numbers, others: Numbers, names: Numbers, markers: Numbers
) -> tuple[Numbers, bool]:
    """The best middle for a name of half size ``half``, and whether it is clear without a line whose name it is."""
    gaps = _gaps(centres, half, spot)
    nearest_other = np.min([_gaps(centres, half, other) for other in others], axis=0, initial=np.inf)
    clear = (gaps <= _NEAR) & (gaps < nearest_other - 2)
    path = spot + (np.clip(spot, centres - half, centres + half) - spot) * np.linspace(0, 1, 12)[:, None, None]
    crossable = np.vstack([names, np.column_stack([others - _POINT, others + _POINT])])
    crossed = sum(_hits(points, np.zeros(2), crossable) for points in path)
    cost = gaps + 1e5 * _hits(centres, half, names) + 400.0 * _hits(centres, half, markers)
    cost += 60.0 * crossed + 20.0 * ~clear
    cost += 0.05 * np.hypot(*(centres - spot).T)  # beside the point's middle rather than shifted
    place = int(np.argmin(cost))
    return centres[place], bool(clear[place])


def _gaps(centres: Numbers, half: Numbers, spot: Numbers) -> Numbers:
    """Distance of ``spot`` from each box."""
    return np.asarray(np.hypot(*np.maximum(np.abs(centres - spot) - half, 0).T))


def _hits(centres: Numbers, half: Numbers, boxes: Numbers) -> Numbers:
    """How many of ``boxes`` ``[M, 4]`` (left, bottom, right, top) each box around ``centres`` ``[K, 2]`` touches."""
    low, high = (centres - half)[:, None], (centres + half)[:, None]
    return np.all((low < boxes[:, 2:]) & (high > boxes[:, :2]), axis=2).sum(axis=1).astype(np.float64)


def _along(start: Numbers, end: Numbers) -> Numbers:
    """Small boxes along a line."""
    points = start + (end - start) * np.linspace(0, 1, 2 + int(np.hypot(*(end - start)) / 8))[:, None]
    return np.column_stack([points - 1, points + 1])
