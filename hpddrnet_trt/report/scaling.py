"""How time, rate and memory grow with the frame and with the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hpddrnet_trt.benchmark.result import BenchmarkResult, Memory
from hpddrnet_trt.benchmark.shapes import main_shape, one_batch, shape_of, shared_shape
from hpddrnet_trt.report.figure_labels import Named, name_ends
from hpddrnet_trt.report.looks import looks
from hpddrnet_trt.report.style import new_figure, plain_numbers, style

Curve = list[tuple[float, float]]


def size_figure(result: BenchmarkResult) -> Any | None:
    """Median latency from frame to labels against pixels, both logarithmic; None with a single size."""
    shape = main_shape(result)
    if shape is None:
        return None
    curves = {
        row.label: [(float(shape_of(timing).pixels), timing.p50_ms) for timing in one_batch(row.timings, shape.batch)]
        for row in result.measured
    }
    sizes = {shape_of(timing).pixels: shape_of(timing).size for row in result.measured for timing in row.timings}
    unit = "ms per frame" if shape.batch == 1 else f"ms per batch of {shape.batch}"
    title = "Latency, frame to labels, against image size"
    return _figure(result, curves, sizes, title, "size of a frame", unit, slope=True)


def batch_figure(result: BenchmarkResult) -> Any | None:
    """Images per second against the batch at the size that is quoted; None with a single batch."""
    shape = main_shape(result)
    if shape is None:
        return None
    curves = {
        row.label: sorted(
            (float(timing.batch), timing.images_per_s)
            for timing in row.timings
            if (timing.height, timing.width) == shape[:2]
        )
        for row in result.measured
    }
    batches = {timing.batch: str(timing.batch) for row in result.measured for timing in row.timings}
    title = f"Images/s, frame to labels, against batch, {shape.size}"
    return _figure(result, curves, batches, title, "frames per batch", "images/s, one batch at a time")


def memory_figure(result: BenchmarkResult, *, device: bool) -> Any | None:
    """Highest memory of the host or the GPU against pixels, both logarithmic; None with a single size."""
    shape = shared_shape([row.memory for row in result.measured])
    if shape is None:
        return None
    curves: dict[str, Curve] = {}
    sizes: dict[int, str] = {}
    for row in result.measured:
        for record in one_batch(row.memory, shape.batch):
            value = _mib(record, device)
            if value is not None:
                curves.setdefault(row.label, []).append((float(shape_of(record).pixels), value))
                sizes[shape_of(record).pixels] = shape_of(record).size
    title = f"Peak {'GPU' if device else 'host'} memory against image size"
    return _figure(result, curves, sizes, title, "size of a frame", "MiB", slope=True)


def _mib(record: Memory, device: bool) -> float | None:
    """None also for what a logarithmic axis cannot show."""
    value = record.device_mib if device else record.host_peak_mib
    return value if value is not None and value > 0 else None


def _figure(
    result: BenchmarkResult, curves: Mapping[str, Curve], ticks: Mapping[int, str], title: str, x: str, y: str,
    *, slope: bool = False,
) -> Any | None:  # fmt: skip
    """A line per entry on logarithmic axes, named at its end; None unless one has two points."""
    drawn = {label: curve for label, curve in curves.items() if curve}
    if max(map(len, drawn.values()), default=0) < 2:
        return None
    look = looks(result)
    with style():
        figure = new_figure(7.6, max(4.4, 1.2 + 0.32 * len(drawn)))
        axes = figure.subplots()
        for label, curve in drawn.items():
            axes.plot(*zip(*curve, strict=True), linestyle=look[label].line, linewidth=1.5, markersize=6,
                      **look[label].point())  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
        shown = sorted({place for curve in drawn.values() for place, _ in curve})
        axes.set_xticks(shown, [ticks[int(place)] for place in shown], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_xlim(shown[0] / 1.15, shown[-1] * 1.15)
        if slope:
            _draw_slopes(axes)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_title(title)
        if slope:
            axes.legend(loc="upper left", fontsize=9, frameon=True, facecolor="white", edgecolor="none")
        name_ends(axes, [Named(*curve[-1], label, look[label].colour) for label, curve in drawn.items()])
    return figure


def _draw_slopes(axes: Any) -> None:
    """Faint lines of slope 1 behind everything: what follows them grows linearly with the pixels."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    starts: Sequence[float] = np.geomspace(low * left / right, high, 8).tolist()
    for place, start in enumerate(starts):
        axes.plot([left, right], [start, start * right / left], color="#b9c0c8", linewidth=0.9, linestyle=(0, (6, 4)),
                  zorder=1, label="slope 1: grows linearly with the pixels" if place == 0 else None)  # fmt: skip
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
