"""How latencies scatter: boxes with every sample's extremes, and cumulative curves on the same axis."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.benchmark.result import BenchmarkResult
from hpddrnet_trt.benchmark.shapes import Shape, at
from hpddrnet_trt.report.bars import FAR, WIDTH, far_apart
from hpddrnet_trt.report.figure_labels import wrapped
from hpddrnet_trt.report.looks import Look, looks
from hpddrnet_trt.report.style import logarithmic, new_figure, style

_RANGE = 4  # latencies farther apart than this are drawn on a logarithmic axis


class Samples(NamedTuple):
    """An entry's latencies as drawn: ms, or percent of their median."""

    label: str
    values: npt.NDArray[np.float64]
    look: Look


def latency_figure(result: BenchmarkResult, shape: Shape) -> Any | None:
    """Above: box plots of the latencies, frame to labels. Below: their cumulative distribution, same colours and axis.

    Latencies too far apart for one axis are drawn relative to each entry's own median.
    """
    timed = [(row.label, found) for row in result.measured if (found := at(row.timings, shape)) is not None]
    if not timed:
        return None
    medians, look = [timing.p50_ms for _, timing in timed], looks(result)
    relative = far_apart(medians)
    entries = [
        Samples(label, np.asarray(timing.samples_ms) * (100 / timing.p50_ms if relative else 1), look[label])
        for label, timing in timed
    ]
    boxes = 0.5 + 0.36 * len(entries)
    with style():
        figure = new_figure(WIDTH, boxes + 2.9)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(boxes, 2.1))
        _draw_boxes(above, entries)
        _draw_curves(below, entries)
        if not relative and max(medians) > _RANGE * min(medians):
            logarithmic(below)
        elif not relative:
            below.set_xlim(left=0)
        above.set_title(f"Latency, frame to labels, {shape}")
        unit = "ms per frame" if shape.batch == 1 else f"ms per batch of {shape.batch}"
        below.set_xlabel(f"% of the entry's own median {FAR}" if relative else unit)
    return figure


def _draw_boxes(axes: Any, entries: list[Samples]) -> None:
    parts = axes.boxplot(
        [entry.values for entry in entries], orientation="horizontal", whis=(5, 95), patch_artist=True, widths=0.62,
        medianprops={"color": "#111111", "linewidth": 1.8},
        flierprops={"marker": ".", "markersize": 4, "markerfacecolor": "#555555", "markeredgecolor": "none"},
    )  # fmt: skip
    for box, entry in zip(parts["boxes"], entries, strict=True):
        box.set(facecolor=entry.look.colour, edgecolor=entry.look.colour)
    axes.set_yticks(range(1, len(entries) + 1), [wrapped(entry.label) for entry in entries], fontsize=9)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


def _draw_curves(axes: Any, entries: list[Samples]) -> None:
    for entry in entries:
        values = np.sort(entry.values)
        axes.step(
            np.concatenate([values[:1], values]), np.linspace(0, 100, len(values) + 1), where="post", linewidth=1.7,
            color=entry.look.colour, linestyle=entry.look.line,
        )  # fmt: skip
    axes.set_ylabel("rounds at or below, %")
    axes.set_ylim(0, 103)
