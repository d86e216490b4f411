"""The report's figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hpddrnet_trt.benchmark.result import BenchmarkResult, Row, Timing
from hpddrnet_trt.pages.drawing import logarithmic, new_figure, png, style, svg_address
from hpddrnet_trt.pages.text import number

# Okabe and Ito's colour-blind safe palette: one colour per runtime; the precision is the marker.
_COLOURS = {
    "PyTorch": "#555555", "ONNX Runtime": "#0072B2", "OpenVINO": "#CC79A7", "TensorRT": "#009E73",
    "TensorRT-RTX": "#D55E00",
}  # fmt: skip
_OTHERS = ("#E69F00", "#56B4E9", "#000000", "#8C6D1F")
_MARKERS = {"FP32": "o", "FP16": "s", "BF16": "D", "INT8": "^", "FP8": "v"}
_AREAS = {"o": 150, "s": 95, "^": 70}  # larger below smaller, so that points on top of each other show
_HATCHES = {"FP16": "//", "BF16": "//", "INT8": "..", "FP8": ".."}


def figures(result: BenchmarkResult) -> dict[str, str]:
    """Figures by name as ``data:`` addresses of SVG pictures; empty when nothing was timed.

    ``main``: images per second, and accuracy against speed. ``latency-HxW``: distributions per size.
    """
    if not result.measured:
        return {}
    drawn = {"main": svg_address(main_figure(result))}
    for timing in _sizes(result):
        drawn[f"latency-{timing.height}x{timing.width}"] = svg_address(latency_figure(result, timing))
    return drawn


def main_png(result: BenchmarkResult) -> bytes:
    """The main figure as PNG at 160 dpi."""
    return png(main_figure(result))


def main_figure(result: BenchmarkResult) -> Any:
    """Left: throughput bars at the last size. Right: mIoU (or agreement) against throughput."""
    return _two_panels(result, _sizes(result)[-1], _draw_bars, _draw_accuracy)


def latency_figure(result: BenchmarkResult, timing: Timing) -> Any:
    """Left: box plots of the latencies. Right: their cumulative distribution."""
    return _two_panels(result, timing, _draw_boxes, _draw_curves)


def _two_panels(
    result: BenchmarkResult, timing: Timing, draw_left: Callable[..., None], draw_right: Callable[..., None]
) -> Any:
    """Two drawings of the entries measured at one size, a row's height for each entry."""
    rows = [(row, found) for row in result.measured if (found := _at(row, timing)) is not None]
    with style():
        figure = new_figure(11.6, max(3.6, 1.5 + 0.42 * len(rows)))
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        draw_left(left, rows, result, timing)
        draw_right(right, rows, result)
    return figure


def colour_of(result: BenchmarkResult, row: Row) -> str:
    """Colour of an entry: by runtime where its label names a known one, else by position."""
    known = [name for name in _COLOURS if row.label.startswith(name)]
    if known:
        return _COLOURS[max(known, key=len)]
    return _OTHERS[[entry.label for entry in result.rows].index(row.label) % len(_OTHERS)]


def _draw_bars(axes: Any, rows: Sequence[tuple[Row, Timing]], result: BenchmarkResult, timing: Timing) -> None:
    for place, (row, found) in enumerate(rows):
        axes.barh(
            place, found.images_per_s, color=colour_of(result, row), edgecolor="white",
            hatch=_HATCHES.get(row.precision or ""), height=0.72,
        )  # fmt: skip
        ratio = ""
        if found.ratio is not None and row.label != result.reference:
            ratio = f"   {number(found.ratio.value)}×{' (wide interval)' if found.ratio.wide else ''}"
        axes.annotate(
            f"{number(found.images_per_s)}{ratio}", (found.images_per_s, place), (5, 0), textcoords="offset points",
            va="center", fontsize=9.5,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [row.label for row, _ in rows])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.3 * max(found.images_per_s for _, found in rows))
    axes.set_xlabel("images/s (from the median latency)")
    axes.set_title(f"Frame to labels, {timing.size.replace('x', '×')}")


def _draw_accuracy(axes: Any, rows: Sequence[tuple[Row, Timing]], result: BenchmarkResult) -> None:
    by_miou = any(row.accuracy and row.accuracy.miou is not None for row, _ in rows)
    name = "mIoU" if by_miou else "label agreement with the reference"
    points = [
        (row, found.images_per_s, 100 * value)
        for row, found in rows
        if row.accuracy and (value := row.accuracy.miou if by_miou else row.accuracy.agreement) is not None
    ]
    if not points:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "accuracy was not measured", ha="center", transform=axes.transAxes, color="#666666")
        return
    seen: set[tuple[str, str]] = set()
    for row, speed, value in points:
        colour, marker = colour_of(result, row), _MARKERS.get(row.precision or "", "P")
        hollow = (colour, marker) in seen  # a second form of the same precision in the same runtime
        seen.add((colour, marker))
        axes.scatter(
            speed, value, s=_AREAS.get(marker, 80), marker=marker, facecolor="white" if hollow else colour,
            edgecolor=colour if hollow else "white", linewidth=1.5 if hollow else 0.9, label=row.label,
            zorder=3 + (marker != "o") + (marker == "^"),
        )  # fmt: skip
    speeds, values = [speed for _, speed, _ in points], [value for _, _, value in points]
    axes.set_xlim(0, 1.12 * max(speeds))
    middle, half = (max(values) + min(values)) / 2, max(0.5, 0.75 * (max(values) - min(values)))
    axes.set_ylim(middle - half, middle + half)
    axes.set_xlabel("images/s (right is better)")
    axes.set_ylabel(f"{name}, % (up is better)")
    axes.set_title("Accuracy against speed")
    _legend(axes)


def _draw_boxes(axes: Any, rows: Sequence[tuple[Row, Timing]], result: BenchmarkResult, timing: Timing) -> None:
    parts = axes.boxplot(
        [found.samples_ms for _, found in rows], orientation="horizontal", whis=(5, 95), patch_artist=True, widths=0.62,
        medianprops={"color": "#111111", "linewidth": 1.8},
        flierprops={"marker": ".", "markersize": 4, "markerfacecolor": "#555555", "markeredgecolor": "none"},
    )  # fmt: skip
    for box, (row, _) in zip(parts["boxes"], rows, strict=True):
        box.set(facecolor=colour_of(result, row), edgecolor="white")
    axes.set_yticks(range(1, len(rows) + 1), [row.label for row, _ in rows])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    medians = [found.p50_ms for _, found in rows]
    if max(medians) > 8 * min(medians):
        logarithmic(axes)
    else:
        axes.set_xlim(left=0)
    unit = "frame" if timing.batch == 1 else f"batch of {timing.batch}"
    axes.set_xlabel(f"latency per {unit}, ms (box: quartiles; whiskers: 5 to 95 %)")
    axes.set_title(f"Latency, {timing.size.replace('x', '×')}")


def _draw_curves(axes: Any, rows: Sequence[tuple[Row, Timing]], result: BenchmarkResult) -> None:
    for row, found in rows:
        values = np.sort(found.samples_ms)
        axes.step(
            np.concatenate([values[:1], values]), np.linspace(0, 100, len(values) + 1), where="post", linewidth=1.8,
            color=colour_of(result, row), label=row.label,
            linestyle={"FP16": "--", "BF16": "--", "INT8": ":", "FP8": ":"}.get(row.precision or "", "-"),
        )  # fmt: skip
    logarithmic(axes)
    axes.set_xlabel("latency, ms")
    axes.set_ylabel("rounds at or below, %")
    axes.set_title("Cumulative distribution")
    _legend(axes)


def _legend(axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=9.5)


def _sizes(result: BenchmarkResult) -> list[Timing]:
    """One timing of each measured size, smallest first."""
    found: dict[tuple[int, int], Timing] = {}
    for row in result.measured:
        for timing in row.timings:
            found.setdefault((timing.height, timing.width), timing)
    return sorted(found.values(), key=lambda timing: timing.height * timing.width)


def _at(row: Row, size: Timing) -> Timing | None:
    return next(
        (timing for timing in row.timings if (timing.height, timing.width) == (size.height, size.width)), None
    )
