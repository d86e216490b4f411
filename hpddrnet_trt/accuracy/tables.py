"""An assessment in a terminal, within 80 columns for classes with short names."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hpddrnet_trt.accuracy.evaluate import Assessment
from hpddrnet_trt.accuracy.measurements import FIGURES, ClassErrors, Figure
from hpddrnet_trt.core.intervals import Interval
from hpddrnet_trt.core.text import aligned

_MEASURED = "predicted - true: mean over pictures [95 %], and mean size of the error"


def table(assessment: Assessment) -> str:
    """Scores by class with their intervals; errors of what laboratories measure; what to know of the intervals."""
    blocks = ["\n".join(_scores(assessment)), "\n".join([_MEASURED, *_errors(assessment, FIGURES[:2])]),
              "\n".join(_errors(assessment, FIGURES[2:])), "\n".join(assessment.remarks)]  # fmt: skip
    return "\n\n".join(blocks)


def _scores(assessment: Assessment) -> list[str]:
    scores, intervals = assessment.scores, assessment.intervals
    lines = [["class", "IoU", "95 %", "acc", "Dice", "HD95 px"]]
    columns = (intervals.iou, scores.accuracy, scores.dice, assessment.distances)
    for name, iou, accuracy, dice, distance in zip(assessment.class_names, *columns, strict=True):
        lines.append([name, *_cells(iou, 4), _number(accuracy, 4), _number(dice, 4), _number(distance.value, 1)])
    means = [_number(value, 4) for value in (scores.mean_accuracy, scores.mean_dice)]
    lines += [
        ["mean (mIoU)", *_cells(intervals.miou, 4), *means, ""],
        ["mean, classes in masks", *_cells(intervals.masked_miou, 4), "", "", ""],
        ["pixel accuracy", *_cells(intervals.pixel_accuracy, 4), "", "", ""],
        ["micro IoU, whole set", _number(scores.micro_iou, 4), "", "", "", ""],
        ["micro IoU, per picture", _number(scores.mean_image_micro_iou, 4), "", "", "", ""],
    ]
    return aligned(lines, left={0})


def _errors(assessment: Assessment, figures: Sequence[Figure]) -> list[str]:
    head = ["class"]
    for figure in figures:
        head += [f"{figure.title}, {'%' if figure.relative else 'points'}", "size"]
    lines = [head]
    for name, errors in zip(assessment.class_names, assessment.errors, strict=True):
        cells = [_error_cells(entry) for entry in errors if entry.figure in figures]
        lines.append([name, *(cell for pair in cells for cell in pair)])
    return aligned(lines, left={0})


def _error_cells(errors: ClassErrors) -> tuple[str, str]:
    digits = error_digits(errors.figure)
    return error_text(errors), _number(100 * errors.size.value, digits)


def error_digits(figure: Figure) -> int:
    """Decimals with which an error is shown, in % or points."""
    return 1 if figure.relative else 2


def error_text(errors: ClassErrors) -> str:
    """E.g. ``+0.31 [-0.20, +0.71]``; a dash where no picture has the figure."""
    if math.isnan(errors.error.value):
        return "–"
    digits = error_digits(errors.figure)
    return f"{100 * errors.error.value:+.{digits}f} {errors.error.text(digits, 100, sign=True)}".rstrip()


def _cells(interval: Interval, digits: int) -> tuple[str, str]:
    return _number(interval.value, digits), interval.text(digits - 1)


def _number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"
