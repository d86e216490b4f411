"""The information bar in the picture itself: a drawn strip along the lower edge with text or a scale bar.

A micrograph has noise, so that no single grey level owns more than a few percent of a row; a drawn bar is
one flat level with marks on it, pasted on along a straight edge. All of these are asked for, because to
cut off specimen is worse than to leave a bar: the level fills nearly all of the bar's first and last row, it stops
within one row over the whole width, and the marks on it are connected strokes of strong
contrast, not noise. An unfinished scan or a black margin is flat as well, but has no marks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

_HIGHEST = 0.25  # of the picture's height
_LOWEST = 0.02
_LEAST_ROWS = 12  # no text is readable in fewer
_PURE = 0.9  # share of the bar's level in its first and last rows; a logo box may touch them
_SOME = 0.15  # ... and in each of its rows, which may be full of text
_STEP = 0.25  # by how much that share has to rise from the picture to the bar, within one row
_ABOVE = 8  # rows of picture that are compared
_PASTED = 0.8  # contrast to the bar's level of the row that touches it, relative to rows above: no blur, no tilt
_TEXT = (0.002, 0.5)  # share of marks in the bar
_CONTRAST = 0.25  # of the marks to the level, as a share of the picture's range
_STROKE = 4  # pixels of the smallest mark; noise has one or two
_STROKES = 4  # marks: a number, a unit and a bar
_STROKE_SHARE = 0.9  # of the marked pixels that belong to strokes
_JPEG_TOLERANCE = 12 / 255  # ripples that JPEG leaves around text


class _Level(NamedTuple):
    share: npt.NDArray[np.float64]  # per row: share of pixels at the bar's level
    drawn: npt.NDArray[np.bool_]  # per row: nearly one level of its own (a line across), or nearly the bar's
    contrast: npt.NDArray[np.float64]  # per row: mean difference from it
    marks: npt.NDArray[np.bool_]  # pixels that differ from it strongly


def find_info_bar(pixels: npt.NDArray[Any]) -> int | None:
    """First row of the information bar of a grey picture ``[H, W]``, or None when there is no certain one."""
    height, width = pixels.shape
    least = max(_LEAST_ROWS, int(height * _LOWEST))
    begin = height - int(height * _HIGHEST)
    if height - begin < least + _ABOVE or width < 64:
        return None
    lower = pixels[begin - _ABOVE :]
    low, high = _range(lower)
    if not low < high:
        return None
    for tolerance in (0.0, _JPEG_TOLERANCE * (high - low)):
        level = _level(lower[-least:])
        if level is None:
            return None
        rows = _compare(lower, level, tolerance, _CONTRAST * (high - low))
        first = _first_row(rows, least)
        if first is not None and _is_text(rows.marks[first:]):
            return begin - _ABOVE + first
    return None


def has_drawn_rows(pixels: npt.NDArray[Any], first: int) -> bool:
    """Whether the rows from ``first`` on look drawn, asked where metadata state a bar: less than to find one."""
    strip = pixels[first:]
    level = _level(strip)
    if level is None:
        return False
    low, high = _range(pixels)
    share = np.mean(_near(strip, level, _JPEG_TOLERANCE * (high - low)), axis=1)
    return bool(np.median(share) > 2 * _SOME)


def _range(pixels: npt.NDArray[Any]) -> tuple[float, float]:
    if pixels.dtype.kind != "f":
        return float(pixels.min()), float(pixels.max())
    finite = pixels[np.isfinite(pixels)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def _level(strip: npt.NDArray[Any]) -> float | None:
    """The most frequent value of a strip; None when it does not even fill a sixth of it."""
    if strip.dtype.kind == "u":
        counts = np.bincount(strip.ravel())
        values: npt.NDArray[Any] = np.arange(counts.size)
    else:
        values, counts = np.unique(strip, return_counts=True)
    most = int(counts.argmax())
    return float(values[most]) if counts[most] >= _SOME * strip.size and np.isfinite(values[most]) else None


def _near(values: npt.NDArray[Any], level: Any, tolerance: float) -> npt.NDArray[np.bool_]:
    if tolerance == 0:
        return values == values.dtype.type(level) if np.ndim(level) == 0 else values == level
    return np.abs(values.astype(np.float32) - level) <= tolerance


def _compare(pixels: npt.NDArray[Any], level: float, tolerance: float, contrast: float) -> _Level:
    share = _near(pixels, level, tolerance).mean(axis=1)
    lines = _near(pixels, np.median(pixels, axis=1, keepdims=True), tolerance).mean(axis=1)
    difference = np.abs(pixels.astype(np.float32) - np.float32(level))
    np.nan_to_num(difference, copy=False)
    drawn = (share >= _PURE) | (lines >= _PURE)
    return _Level(share, drawn, difference.mean(axis=1, dtype=np.float64), difference > contrast)


def _first_row(rows: _Level, least: int) -> int | None:
    """The topmost row where drawn rows begin at once and go on to the lower edge."""
    if not rows.drawn[-1]:
        return None
    flat = rows.drawn | (rows.share >= _SOME)
    broken = np.flatnonzero(~flat)
    highest = max(int(broken[-1]) + 1 if broken.size else 0, _ABOVE)
    for first in range(highest, len(flat) - least + 1):
        above = slice(first - _ABOVE, first)
        if (
            rows.drawn[first : first + 2].all()
            and not rows.drawn[above].any()
            and rows.share[above].max() <= 1 - _STEP
            and rows.share[first : first + 4].max() - rows.share[above].max() >= _STEP
            and rows.contrast[first - 1] >= _PASTED * np.median(rows.contrast[above])
        ):
            return first
    return None


def _is_text(marks: npt.NDArray[np.bool_]) -> bool:
    """Whether marks cover a likely share of the bar and are strokes."""
    marked = float(marks.mean())
    if not _TEXT[0] <= marked <= _TEXT[1]:
        return False
    count, _, statistics, _ = cv2.connectedComponentsWithStats(marks.astype(np.uint8), connectivity=8)
    areas = statistics[1:count, cv2.CC_STAT_AREA]
    strokes = areas[areas >= _STROKE]
    return len(strokes) >= _STROKES and strokes.sum() >= _STROKE_SHARE * areas.sum()
