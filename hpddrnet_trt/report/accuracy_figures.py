"""The figures of an assessment: confusion, phase fractions, learning curves, robustness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.accuracy.evaluate import Assessment, ImageResult, fractions
from hpddrnet_trt.accuracy.robustness import Robustness, Sweep, tested
from hpddrnet_trt.core.text import scaled
from hpddrnet_trt.data.augment import Shift
from hpddrnet_trt.report.learning_curves import Curves
from hpddrnet_trt.report.style import logarithmic, new_figure, style

# Okabe and Ito's colours, told apart with any colour vision; the markers tell them apart without colour.
# Black is the mean. The classes' own colours can be as light as the paper: they stay in the pictures.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_MEAN = {"color": "black", "linewidth": 2.6, "marker": "o", "markersize": 5, "label": "mIoU"}
_RANGE = "#009E73"
_COLUMNS = 3  # panels side by side


def class_style(index: int, name: str) -> dict[str, Any]:
    """Colour, marker and label of a class in every figure."""
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": ("-", "--", ":")[index // len(_COLOURS) % 3],
        "label": name,
    }


def confusion_figure(assessment: Assessment) -> Any:
    """True class by predicted class: share of the true class's pixels, and their number."""
    counts, names = assessment.counts, assessment.class_names
    columns = [*names, "no class"]
    if not counts[:, -1].any():  # predictions outside the classes: only with a broken model
        counts, columns = counts[:, :-1], names
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    small = len(names) > 8
    with style():
        edge = 2.3 + (0.6 if small else 1.05) * len(columns)
        figure = new_figure(min(edge, 14), min(edge - 0.8, 13))
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), share in np.ndenumerate(shares):
            text = f"{100 * share:.0f}" if small else f"{100 * share:.2f} %\n{scaled(int(counts[row, column]))}"
            colour = "white" if share > 0.55 else "#1d232b"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8 if small else 10)
        axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        axes.grid(visible=False)
        axes.set_title("Confusion: % of the true class" + ("" if small else ", and pixels"))
        figure.colorbar(image, ax=axes, shrink=0.7, format=lambda value, _: f"{100 * value:.0f} %")
    return figure


def fractions_figure(assessment: Assessment) -> Any:
    """Area fraction of each class in each image, predicted against true; a panel per class."""
    names = assessment.class_names
    measured = [image for image in assessment.images if image.counts.any()]
    with style():
        figure, panels = _panels(len(names), 3.5)
        for index, (axes, name) in enumerate(zip(panels, names, strict=True)):
            _draw_fractions(axes, measured, index, name)
    return figure


def curves_figure(curves: Curves, best_step: int | None = None) -> Any:
    """Loss, IoU and learning rate by step; a line at the step of the model that was kept."""
    with style():
        figure, (loss, iou, rate) = _panels(3, 3.8)
        for name, label, look in (("train/loss", "training", "#9a9a9a"), ("val/loss", "validation", "#0072B2")):
            loss.plot(*_points(curves.columns[name]), color=look, linewidth=1.6, label=label)
        loss.set_ylim(bottom=0)
        _finish(loss, "Loss", "training step", "loss")
        for index, (name, values) in enumerate(curves.classes.items()):
            iou.plot(*_points(values), linewidth=1.1, markersize=3, **class_style(index, name))
        iou.plot(*_points(curves.columns["val/miou"]), **(_MEAN | {"markersize": 3}))
        iou.set_ylim(0, 1)
        _finish(iou, "Validation IoU", "training step", "IoU")
        steps, rates = _points(curves.columns["lr"])
        rate.plot(steps, [1000 * value for value in rates], color="#9a9a9a", linewidth=1.6)
        rate.set_ylim(bottom=0)
        _finish(rate, "Learning rate", "training step", "rate, 1/1000")
        for axes in (loss, iou, rate) if best_step is not None else ():
            axes.axvline(best_step, color="#666666", linestyle="--", linewidth=1.1, label="step of this model")
        _legend_below(figure, loss, iou)
    return figure


def robustness_figure(found: Robustness) -> Any:
    """IoU against each shift; the working range is shaded, the unchanged point ringed."""
    with style():
        figure, panels = _panels(len(found.sweeps), 3.7)
        for axes, sweep in zip(panels, found.sweeps, strict=True):
            _draw_sweep(axes, sweep, found.class_names)
        _legend_below(figure, panels[0])
    return figure


def _draw_sweep(axes: Any, sweep: Sweep, class_names: Sequence[str]) -> None:
    places = _places(sweep.shift)
    measured = [(place, point.scores) for place, point in zip(places, sweep.points, strict=True) if point.scores]
    x = [place for place, _ in measured]
    if sweep.shift.logarithmic:
        axes.set_xlim(min(places) / 1.15, max(places) * 1.15)
        logarithmic(axes)
    span = sweep.working_range()
    if span is not None:
        edges = [places[sweep.shift.values.index(value)] for value in span]
        axes.axvspan(*edges, color=_RANGE, alpha=0.13, linewidth=0, label="working range (within 5 points of mIoU)")
    for index, name in enumerate(class_names):
        values = [scores.iou[index] for _, scores in measured]
        axes.plot(x, values, linewidth=1.1, markersize=3.5, **class_style(index, name))
    axes.plot(x, [scores.miou for _, scores in measured], **_MEAN)
    neutral = places[sweep.shift.values.index(sweep.shift.neutral)]
    axes.plot(
        neutral, sweep.unchanged.miou, "o", markersize=12, markerfacecolor="none", markeredgecolor="black",
        markeredgewidth=1.4, label="unchanged micrographs",
    )  # fmt: skip
    _label_every_second(axes, sweep.shift, places)
    axes.set_ylim(0, 1.02)
    _finish(axes, sweep.shift.name.capitalize(), sweep.shift.axis, "IoU")


def _places(shift: Shift) -> list[float]:
    """Where the values are drawn: as they are, an infinite one a step beyond the last finite one."""
    finite = [value for value in shift.values if math.isfinite(value)]
    return [value if math.isfinite(value) else 2 * finite[-1] for value in shift.values]


def _label_every_second(axes: Any, shift: Shift, places: Sequence[float]) -> None:
    """Ticks at the tested values, labels at every second one counted from the unchanged value."""
    neutral = shift.values.index(shift.neutral)
    labels = [
        "" if (index - neutral) % 2 else tested(value)
        for index, value in enumerate(shift.values)
    ]
    axes.set_xticks(places, labels)


def _draw_fractions(axes: Any, images: Sequence[ImageResult], index: int, name: str) -> None:
    truth = np.array([fractions(image.counts)[0][index] for image in images])
    predicted = np.array([fractions(image.counts)[1][index] for image in images])
    look = {key: value for key, value in class_style(index, name).items() if key in ("color", "marker")}
    axes.scatter(100 * truth, 100 * predicted, s=46, edgecolor="white", linewidth=0.7, zorder=3, clip_on=False, **look)
    low, high = _limits(np.concatenate([truth, predicted]))
    axes.plot([low, high], [low, high], color="#666666", linestyle="--", linewidth=1.1)
    axes.annotate("equal", (high, high), (-17, -8), textcoords="offset points", ha="right", fontsize=9, color="#666666")
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    _finish(axes, name, "true area fraction, %", "predicted area fraction, %")


def _limits(shares: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Limits in percent around all shares, not narrower than two points."""
    if not shares.size:
        return 0.0, 100.0
    low, high = 100 * float(shares.min()), 100 * float(shares.max())
    margin = max(0.12 * (high - low), (2 - (high - low)) / 2, 0.1)
    return max(0.0, low - margin), min(100.0, high + margin)


def _panels(count: int, height: float) -> tuple[Any, list[Any]]:
    """A figure with ``count`` panels, rows of three, ``height`` inches each."""
    rows, columns = -(-count // _COLUMNS), min(count, _COLUMNS)
    figure = new_figure(4.0 * columns, height * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for spare in grid[count:]:
        spare.remove()
    return figure, grid[:count]


def _legend_below(figure: Any, *panels: Any) -> None:
    """One legend for what the panels show, each name once."""
    found = [pair for axes in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    entries = {label: handle for handle, label in found}
    columns = min(6, len(entries))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, fontsize=10)


def _finish(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _points(values: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in values], [value for _, value in values]
