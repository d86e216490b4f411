"""Images per second, and accuracy against them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from hpddrnet_trt.benchmark.result import BenchmarkResult, Row, Timing
from hpddrnet_trt.benchmark.shapes import at, main_shape
from hpddrnet_trt.core.text import number
from hpddrnet_trt.report.bars import bar_figure, name_bars, value_right
from hpddrnet_trt.report.figure_labels import Named, name_points
from hpddrnet_trt.report.looks import looks
from hpddrnet_trt.report.style import logarithmic, new_figure, style

_RANGE = 8  # speeds farther apart than this are drawn on a logarithmic axis


class Point(NamedTuple):
    """An entry in the plane of speed (images/s) and accuracy (%)."""

    row: Row
    speed: float
    accuracy: float


def main_figure(result: BenchmarkResult) -> Any | None:
    """Left: images per second. Right: accuracy against them, where it was measured."""
    timed, points = _timed(result), _points(result)
    if not timed:
        return None
    if not points:
        return speed_figure(result)
    with style():
        figure = new_figure(13.6, max(4.8, 1.2 + 0.42 * len(timed)))
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
        _draw_bars(left, timed, result)
        _draw_plane(right, points, result)
    return figure


def speed_figure(result: BenchmarkResult) -> Any | None:
    """Bars of images per second at the size that is quoted."""
    timed = _timed(result)
    if not timed:
        return None
    with style():
        figure = bar_figure(len(timed))
        _draw_bars(figure.subplots(), timed, result)
    return figure


def pareto_figure(result: BenchmarkResult) -> Any | None:
    """mIoU, or agreement without masks, against images per second, with the line that nobody is beyond."""
    points = _points(result)
    if not points:
        return None
    with style():
        figure = new_figure(7.6, 5.4)
        _draw_plane(figure.subplots(), points, result)
    return figure


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in one measure without losing in the other, slowest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (-point.speed, -point.accuracy)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    return best[::-1]


def _timed(result: BenchmarkResult) -> list[tuple[Row, Timing]]:
    shape = main_shape(result)
    if shape is None:
        return []
    return [(row, found) for row in result.measured if (found := at(row.timings, shape)) is not None]


def _by_miou(result: BenchmarkResult) -> bool:
    return any(row.accuracy is not None and row.accuracy.miou is not None for row in result.measured)


def _points(result: BenchmarkResult) -> list[Point]:
    by_miou = _by_miou(result)
    return [
        Point(row, timing.images_per_s, 100 * value)
        for row, timing in _timed(result)
        if row.accuracy and (value := row.accuracy.miou if by_miou else row.accuracy.agreement) is not None
    ]


def _draw_bars(axes: Any, timed: Sequence[tuple[Row, Timing]], result: BenchmarkResult) -> None:
    look = looks(result)
    for place, (row, timing) in enumerate(timed):
        axes.barh(
            place, timing.images_per_s, color=look[row.label].colour, edgecolor="white", height=0.72,
            hatch=look[row.label].hatch,
        )  # fmt: skip
        ratio = "" if row.label != result.reference else "  reference"
        if timing.ratio is not None and row.label != result.reference:
            ratio = f"  {number(timing.ratio.value)}×{' (wide)' if timing.ratio.wide else ''}"
        value_right(axes, timing.images_per_s, place, f"{number(timing.images_per_s)}{ratio}")
    name_bars(axes, [row.label for row, _ in timed])
    axes.set_xlim(0, 1.32 * max(timing.images_per_s for _, timing in timed))
    axes.set_xlabel("images/s, one at a time (right is better)")
    axes.set_title(f"Frame to labels, {main_shape(result)}")


def _draw_plane(axes: Any, points: Sequence[Point], result: BenchmarkResult) -> None:
    look = looks(result)
    best = frontier(points)
    _set_limits(axes, points)
    low = axes.get_ylim()[0]
    speeds, values = [point.speed for point in best], [point.accuracy for point in best]
    line = _steps([axes.get_xlim()[0], *speeds, speeds[-1]], [values[0], *values, low])
    axes.plot(*zip(*line, strict=True), color="#9aa3ad", linewidth=1.4, zorder=1.5)
    for point in points:
        marker = look[point.row.label].point()
        axes.plot(point.speed, point.accuracy, linestyle="none", markersize=9, zorder=4, **marker)
    axes.set_xlabel("images/s, frame to labels, one at a time (right is better)")
    axes.set_ylabel(f"{'mIoU' if _by_miou(result) else 'agreement with the reference'}, % (up is better)")
    axes.set_title(f"Accuracy against speed, {main_shape(result)}")
    name_points(axes, [
        Named(point.speed, point.accuracy, point.row.label, look[point.row.label].colour) for point in points
    ], line)  # fmt: skip


def _steps(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    """Corners of the line through these points that goes down first and then right."""
    corners = [(x[0], y[0])]
    for place in range(1, len(x)):
        corners += [(x[place - 1], y[place]), (x[place], y[place])]
    return corners


def _set_limits(axes: Any, points: Sequence[Point]) -> None:
    speeds, values = [point.speed for point in points], [point.accuracy for point in points]
    middle, half = (max(values) + min(values)) / 2, max(0.25, 0.75 * (max(values) - min(values)))
    axes.set_ylim(middle - half, middle + half)
    if max(speeds) > _RANGE * min(speeds):
        axes.set_xlim(min(speeds) / 1.6, max(speeds) * 1.6)
        logarithmic(axes)
    else:
        axes.set_xlim(0, 1.15 * max(speeds))
