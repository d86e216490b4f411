"""Ratios of two results with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpddrnet_trt.benchmark.compare import Change
from hpddrnet_trt.report.bars import name_bars
from hpddrnet_trt.report.figure_labels import WRAP
from hpddrnet_trt.report.style import new_figure, style

# Okabe and Ito's colours; the marker says the same without colour.
_LOOKS = {"faster": ("#00875F", ">"), "slower": ("#D55E00", "<")}
_NEUTRAL = ("#6b7580", "o")


def changes_figure(changes: Sequence[Change]) -> Any | None:
    """Old over new latency from frame to labels, one line per entry and size; None when nothing was in both."""
    found = [(change, change.ratio) for change in changes if change.measure == "timings" and change.ratio is not None]
    if not found:
        return None
    with style():
        figure = new_figure(8.6, max(2.4, 1.2 + 0.34 * len(found)))
        axes = figure.subplots()
        axes.axvline(1, color="#1d232b", linewidth=1)
        for place, (change, ratio) in enumerate(found):
            colour, marker = _LOOKS.get(change.verdict, _NEUTRAL)
            if ratio.low is not None and ratio.high is not None:
                axes.plot([ratio.low, ratio.high], [place, place], color=colour, linewidth=2.4, solid_capstyle="butt")
            axes.plot(ratio.value, place, color=colour, marker=marker, markersize=8)
        name_bars(axes, [f"{change.label}, {change.size.replace('x', '×')}" for change, _ in found], 2 * WRAP)
        axes.set_xlabel("median before / median now, 95 % interval (right of the line: faster now)")
        axes.set_title("Frame to labels: what changed")
    return figure
