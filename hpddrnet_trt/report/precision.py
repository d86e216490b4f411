"""Pictures of a sensitivity analysis and of a mixed-precision search."""

from __future__ import annotations

from collections.abc import Callable
from math import log10
from pathlib import Path
from typing import Any

from hpddrnet_trt.accuracy.evaluator import Accuracy
from hpddrnet_trt.accuracy.search import Frontier, Part, Sensitivity
from hpddrnet_trt.core.files import write_bytes
from hpddrnet_trt.graph.layers import short
from hpddrnet_trt.report.style import BLUE, GREEN, GREY, ORANGE, new_figure, png, style

_ROWS = 30  # bars of the ranking
_NAMED = 6  # points with a name in the scatter
_FLOOR = 1e-3  # percent: what is smaller is drawn here, on logarithmic axes


def draw_sensitivity(found: Sensitivity, target: str | Path) -> Path:
    """Left: the most sensitive parts. Right: harm against share of the operations, what a search weighs."""
    rows = found.parts[:_ROWS][::-1]
    with style():
        figure = new_figure(12.4, max(4.2, 1.6 + 0.24 * len(rows)))
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        places = range(len(rows))
        left.barh(places, [100 * part.harm for part in rows], color=BLUE, height=0.62)
        left.set_yticks(places, [short(part.name) for part in rows], fontsize=8)
        left.set_xlabel(f"labels' IoU lost against FP32, % ({found.precision.upper()} in this {found.by} alone)")
        left.grid(axis="y", visible=False)
        count = f"{len(rows)} of {len(found.parts)}" if len(rows) < len(found.parts) else str(len(rows))
        left.set_title(f"Most sensitive {found.by}s ({count})")
        for place, part in zip(places, rows, strict=True):
            left.annotate(
                f"{-part.accuracy.drop:+.2f}", (100 * part.harm, place), xytext=(4, 0), textcoords="offset points",
                va="center", fontsize=7.5, color=GREY,
            )  # fmt: skip
        left.margins(x=0.12, y=0.015)
        _scatter(right, found)
        figure.suptitle(
            f"{found.source}, {found.together.images} images; grey figures: change of masked mIoU in points; "
            f"all at once {-found.together.drop:+.2f} points, IoU to FP32 {100 * found.together.fidelity:.2f} %",
            fontsize=10,
        )  # fmt: skip
    return write_bytes(target, png(figure))


def _scatter(axes: Any, found: Sensitivity) -> None:
    def place(part: Part) -> tuple[float, float]:
        return max(100 * part.operations, _FLOOR), max(100 * part.harm, _FLOOR)

    axes.scatter(*zip(*(place(part) for part in found.parts), strict=True), s=26, color=ORANGE, alpha=0.75)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("share of multiply-accumulates, %")
    axes.set_ylabel("labels' IoU lost against FP32, %")
    axes.set_title("Harm against work")
    named: list[tuple[float, float]] = []
    for part in found.parts:
        where = place(part)
        if len(named) < _NAMED and all(_apart(where, other) for other in named):
            axes.annotate(short(part.name), where, xytext=(-5, 4), textcoords="offset points", ha="right", fontsize=7.5)
            named.append(where)


def _apart(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether the names of two points, on logarithmic axes, do not touch."""
    return abs(log10(one[0] / other[0])) > 1.2 or abs(log10(one[1] / other[1])) > 0.06


def draw_frontier(found: Frontier, target: str | Path) -> Path:
    """Change of mIoU, and share of changed labels, against time: a point for each measured choice."""
    budget = found.budget
    with style():
        figure = new_figure(12.0, 4.8)
        left, right = figure.subplots(1, 2)
        _choices(left, found, lambda accuracy: -accuracy.drop)
        left.set_ylabel("change of masked mIoU against FP32, percentage points")
        if budget.max_miou_drop is not None:
            left.axhline(-budget.max_miou_drop, color=ORANGE, linewidth=1, linestyle="--", label="budget")
        _choices(right, found, lambda accuracy: 100 * (1 - accuracy.least_agreement))
        right.set_ylabel("pixels with another label than FP32, %")
        if budget.min_agreement is not None:
            right.axhline(100 * (1 - budget.min_agreement), color=ORANGE, linewidth=1, linestyle="--", label="budget")
        for axes in (left, right):
            axes.set_xlabel("ms per frame")
            axes.legend(fontsize=9)
        figure.suptitle(
            f"{found.precision.upper()} with layers kept in FP16 (their number beside each point), {found.source}; "
            f"{found.cost_source}", fontsize=10,
        )  # fmt: skip
    return write_bytes(target, png(figure))


def _choices(axes: Any, found: Frontier, value: Callable[[Accuracy], float]) -> None:
    for kept, color, label in ((True, GREEN, "keeps the budget"), (False, GREY, "misses it")):
        points = [point for point in found.points if found.budget.kept_by(point.accuracy) == kept]
        axes.scatter(
            [point.milliseconds for point in points], [value(point.accuracy) for point in points],
            s=34, color=color, label=label,
        )  # fmt: skip
    for point in found.points:
        axes.annotate(
            str(len(point.floating)), (point.milliseconds, value(point.accuracy)), xytext=(4, 4),
            textcoords="offset points", fontsize=7.5, color=GREY,
        )  # fmt: skip
    if found.chosen is not None:
        axes.scatter(
            [found.chosen.milliseconds], [value(found.chosen.accuracy)], s=150, facecolors="none",
            edgecolors=ORANGE, linewidths=2, label="chosen",
        )  # fmt: skip
