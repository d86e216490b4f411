"""The figures of an assessment: confusion, phase fractions, learning curves, robustness."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.accuracy.evaluate import Assessment, ImageResult, fractions
from hpddrnet_trt.accuracy.measurements import FIGURES
from hpddrnet_trt.accuracy.robustness import Robustness, Sweep, tested
from hpddrnet_trt.core.text import scaled
from hpddrnet_trt.data.augment import Shift
from hpddrnet_trt.report.style import (
    BLACK,
    BLUE,
    COLORS,
    GREEN,
    GREY,
    label_axes,
    legend_below,
    logarithmic,
    new_figure,
    panels,
    style,
)

# The markers tell classes apart without colour; black is the mean. The classes' own colours can be as light as
# the paper: they stay in the pictures.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_MEAN = {"color": BLACK, "linewidth": 2.6, "marker": "o", "markersize": 5, "label": "mIoU"}
COLUMNS, _WIDTH = 3, 4.0  # panels side by side (1 on a telephone), inches of each
LEARNING_CURVES = "metrics.csv"  # written by hpddrnet_trt.training.callbacks.Records
_NEEDED = {"step", "lr", "train/loss", "val/loss", "val/miou"}
_CLASS = "val/iou/"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Curves:
    """The course of the training run that made a model.

    ``columns``: (step, value) pairs of each column of the file, gaps left out.
    """

    source: Path
    columns: dict[str, list[tuple[int, float]]]

    @property
    def classes(self) -> dict[str, list[tuple[int, float]]]:
        """Validation IoU of each class."""
        return {name.removeprefix(_CLASS): values for name, values in self.columns.items() if name.startswith(_CLASS)}


def curves_beside(model: str | Path) -> Curves | None:
    """Learning curves of the run in whose folder ``model`` lies, or None when there are none.

    A ``metrics.csv`` that another program wrote is passed over, with a log message.
    """
    source = Path(model).parent / LEARNING_CURVES
    if not source.is_file():
        return None
    try:
        with source.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            columns = list(reader.fieldnames or [])
            rows = [row for row in reader if None not in row.values()]  # the last one may be half written
        if not set(columns) >= _NEEDED:
            raise ValueError(f"it has no column {sorted(_NEEDED - set(columns))[0]}")
        pairs = {name: _pairs(rows, name) for name in columns if name != "step"}
    except (OSError, ValueError) as exc:
        log.warning("%s is not the record of a training run (%s): no learning curves", source, exc)
        return None
    return Curves(source, pairs) if rows else None


def _pairs(rows: list[dict[str, str]], name: str) -> list[tuple[int, float]]:
    return [(int(row["step"]), float(row[name])) for row in rows if row[name]]


def class_style(index: int, name: str) -> dict[str, Any]:
    """Colour, marker and label of a class in every figure."""
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": ("-", "--", ":")[index // len(COLORS) % 3],
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
            color = "white" if share > 0.55 else BLACK
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8 if small else 10)
        axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        axes.grid(visible=False)
        axes.set_title("Confusion: % of the true class" + ("" if small else ", and pixels"))
        figure.colorbar(image, ax=axes, shrink=0.7, format=lambda value, _: f"{100 * value:.0f} %")
    return figure


def fractions_figure(assessment: Assessment, columns: int = COLUMNS) -> Any:
    """Area fraction of each class in each image, predicted against true; a panel per class."""
    names = assessment.class_names
    measured = [image for image in assessment.images if image.counts.any()]
    with style():
        figure, grid = panels(len(names), _WIDTH, 3.5, columns=columns)
        for index, (axes, name) in enumerate(zip(grid, names, strict=True)):
            _draw_fractions(axes, measured, index, name)
    return figure


def errors_figure(assessment: Assessment, columns: int = 2) -> Any:
    """Error of each figure in each image, predicted minus true, by class; a bar for the mean's interval."""
    names = assessment.class_names
    with style():
        figure, grid = panels(
            len(FIGURES), 6.0 if columns > 1 else _WIDTH + 0.6, 1.5 + 0.42 * len(names), columns=columns
        )
        for place, (axes, entry) in enumerate(zip(grid, FIGURES, strict=True)):
            for index, name in enumerate(names):
                _draw_errors(axes, assessment, index, place, class_style(index, name))
            axes.axvline(0, color=GREY, linestyle="--", linewidth=1.1)
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.5, -0.5)
            label_axes(axes, entry.title.capitalize(), f"predicted − true, {entry.unit}", "")
    return figure


def _draw_errors(axes: Any, assessment: Assessment, index: int, place: int, look: dict[str, Any]) -> None:
    found = assessment.errors[index][place]
    if math.isnan(found.error.value):
        return
    whole = found.truth if found.figure.relative else 1.0
    pictures = [image.measured for image in assessment.images]
    values = [100 * float(one.predicted[place, index] - one.truth[place, index]) / whole for one in pictures if whole]
    axes.scatter(
        values, [index] * len(values), s=26, color=look["color"], alpha=0.45, linewidth=0, marker=look["marker"]
    )
    if found.error.low is not None and found.error.high is not None:
        axes.plot([100 * found.error.low, 100 * found.error.high], [index, index], color=BLACK, linewidth=2.2)
    axes.plot(100 * found.error.value, index, "|", color=BLACK, markersize=15, markeredgewidth=2.2)


def reliability_figure(assessment: Assessment) -> Any:
    """Share of right labels against the probability that the model gives them, before and after calibration."""
    with style():
        figure = new_figure(5.2, 4.6)
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1.1)
        for (temperature, found), (color, marker) in zip(
            assessment.reliability.items(), ((BLUE, "o"), (GREEN, "s")), strict=False
        ):
            said = "as the network gives them" if temperature is None else f"at its temperature, {temperature:.2f}"
            label = f"{said}: error {100 * found.expected_calibration_error:.1f} %"
            axes.plot(found.confidence, found.accuracy, color=color, marker=marker, linewidth=1.4, label=label)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_aspect("equal")
        label_axes(axes, "Reliability of the class scores", "probability of the label", "share of right labels")
        legend_below(figure, axes, columns=1)
    return figure


def curves_figure(curves: Curves, best_step: int | None = None, columns: int = COLUMNS) -> Any:
    """Loss, IoU and learning rate by step; a line at the step of the model that was kept."""
    with style():
        figure, (loss, iou, rate) = panels(3, _WIDTH, 3.8, columns=columns)
        for name, label, look in (("train/loss", "training", GREY), ("val/loss", "validation", BLUE)):
            loss.plot(*_points(curves.columns[name]), color=look, linewidth=1.6, label=label)
        loss.set_ylim(bottom=0)
        label_axes(loss, "Loss", "training step", "loss")
        for index, (name, values) in enumerate(curves.classes.items()):
            iou.plot(*_points(values), linewidth=1.1, markersize=3, **class_style(index, name))
        iou.plot(*_points(curves.columns["val/miou"]), **(_MEAN | {"markersize": 3}))
        iou.set_ylim(0, 1)
        label_axes(iou, "Validation IoU", "training step", "IoU")
        steps, rates = _points(curves.columns["lr"])
        rate.plot(steps, [1000 * value for value in rates], color=GREY, linewidth=1.6)
        rate.set_ylim(bottom=0)
        label_axes(rate, "Learning rate", "training step", "rate, 1/1000")
        for axes in (loss, iou, rate) if best_step is not None else ():
            axes.axvline(best_step, color=GREY, linestyle="--", linewidth=1.1, label="step of this model")
        legend_below(figure, loss, iou, columns=2 * columns)
    return figure


def robustness_figure(robustness: Robustness, columns: int = COLUMNS) -> Any:
    """IoU against each shift; the working range is shaded, the unchanged point ringed."""
    with style():
        figure, grid = panels(len(robustness.sweeps), _WIDTH, 3.7, columns=columns)
        for axes, sweep in zip(grid, robustness.sweeps, strict=True):
            _draw_sweep(axes, sweep, robustness.class_names)
        legend_below(figure, grid[0], columns=2 * columns)
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
        axes.axvspan(*edges, color=GREEN, alpha=0.13, linewidth=0, label="working range (within 5 points of mIoU)")
    for index, name in enumerate(class_names):
        values = [scores.iou[index] for _, scores in measured]
        axes.plot(x, values, linewidth=1.1, markersize=3.5, **class_style(index, name))
    axes.plot(x, [scores.miou for _, scores in measured], **_MEAN)
    neutral = sweep.shift.values.index(sweep.shift.neutral)
    axes.plot(
        places[neutral], sweep.unchanged.miou, "o", markersize=12, markerfacecolor="none", markeredgecolor=BLACK,
        markeredgewidth=1.4, label="unchanged micrographs",
    )  # fmt: skip
    # Ticks at the tested values, labels at every second one counted from the unchanged value.
    labels = ["" if (place - neutral) % 2 else tested(value) for place, value in enumerate(sweep.shift.values)]
    axes.set_xticks(places, labels)
    axes.set_ylim(0, 1.02)
    label_axes(axes, sweep.shift.name.capitalize(), sweep.shift.axis, "IoU")


def _places(shift: Shift) -> list[float]:
    """Where the values are drawn: as they are, an infinite one a step beyond the last finite one."""
    finite = [value for value in shift.values if math.isfinite(value)]
    return [value if math.isfinite(value) else 2 * finite[-1] for value in shift.values]


def _draw_fractions(axes: Any, images: Sequence[ImageResult], index: int, name: str) -> None:
    truth = np.array([fractions(image.counts)[0][index] for image in images])
    predicted = np.array([fractions(image.counts)[1][index] for image in images])
    look = {key: value for key, value in class_style(index, name).items() if key in ("color", "marker")}
    axes.scatter(100 * truth, 100 * predicted, s=46, edgecolor="white", linewidth=0.7, zorder=3, clip_on=False, **look)
    low, high = _limits(np.concatenate([truth, predicted]))
    axes.plot([low, high], [low, high], color=GREY, linestyle="--", linewidth=1.1)
    axes.annotate("equal", (high, high), (-17, -8), textcoords="offset points", ha="right", fontsize=9, color=GREY)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    label_axes(axes, name, "true area fraction, %", "predicted area fraction, %")


def _limits(shares: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Limits in percent around all shares, not narrower than two points."""
    if not shares.size:
        return 0.0, 100.0
    low, high = 100 * float(shares.min()), 100 * float(shares.max())
    margin = max(0.12 * (high - low), (2 - (high - low)) / 2, 0.1)
    return max(0.0, low - margin), min(100.0, high + margin)


def _points(values: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in values], [value for _, value in values]
