"""An assessment for people: one HTML page with everything inside it, and a table of the images beside it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.accuracy.evaluate import EDGE, Assessment, ImageResult, fractions
from hpddrnet_trt.accuracy.measurements import FIGURES, ClassErrors
from hpddrnet_trt.accuracy.robustness import TOLERANCE, Robustness, tested
from hpddrnet_trt.accuracy.tables import error_digits, error_text
from hpddrnet_trt.core.errors import UsageError, require
from hpddrnet_trt.core.files import check_writable, write_bytes, write_text
from hpddrnet_trt.core.intervals import Interval
from hpddrnet_trt.core.manifest import IGNORE_INDEX
from hpddrnet_trt.core.text import length, number, percent, scaled
from hpddrnet_trt.report.accuracy_figures import (
    COLUMNS,
    Curves,
    confusion_figure,
    curves_figure,
    errors_figure,
    fractions_figure,
    reliability_figure,
    robustness_figure,
)
from hpddrnet_trt.report.style import (
    DIMMED,
    Gallery,
    Grey8,
    Palette,
    Panel,
    gallery,
    overlay_colors,
    palette_png,
    png,
    render,
    svg_address,
)

ROWS = 100  # images in the page's table; all are in the CSV file
_VEIL = 205  # opacity of the veil over what is right, in the map of errors
_CLEAR = IGNORE_INDEX - 1  # code of pixels where the micrograph shows; no dataset has so many classes
_STRIPE = (255, 255, 255, 215)
_VEILED_STRIPE = (128, 128, 128, 215)
_STRANGE = (255, 0, 255)  # predictions outside the classes: meant to hurt the eye


class ReportFiles(NamedTuple):
    """What :func:`write_report` wrote; ``robustness`` is a PNG, None when it was not measured."""

    html: Path
    csv: Path
    robustness: Path | None


class Confusion(NamedTuple):
    """Pixels of one class taken for another; ``share`` of all wrong pixels."""

    truth: str
    predicted: str
    pixels: int
    share: float


class ClassRow(NamedTuple):
    """One line of the table of classes; fractions 0..1, ``truth`` and ``predicted`` of the labelled pixels."""

    name: str
    color: tuple[int, int, int]
    iou: float
    accuracy: float
    precision: float
    dice: float
    truth: float
    predicted: float
    interval: Interval  # of the IoU
    errors: list[ClassErrors]
    distance: Interval  # Hausdorff, 95 %, pixels


def check_target(path: str | Path) -> Path:
    """See, before a long measurement, that a report can be written to ``path``.

    Raises :class:`UsageError` for another ending than .html, :class:`UserError` for a folder that
    cannot be made or written to, :class:`MissingDependency` without matplotlib or jinja2.
    """
    path = Path(path)
    if path.suffix.lower() not in {".html", ".htm"} or path.is_dir():
        raise UsageError(f"the report is an HTML file, not {path}; give a name that ends in .html")
    require("jinja2", "benchmark", "write the report")
    require("matplotlib", "benchmark", "draw the report's figures")
    check_writable(path.parent)
    return path


def write_report(
    assessment: Assessment,
    path: str | Path,
    *,
    curves: Curves | None = None,
    robustness: Robustness | None = None,
) -> ReportFiles:
    """Write the page, ``NAME.csv`` with a row per image, and with robustness ``NAME.robustness.png``.

    Each file is written whole or not at all. Raises as :func:`check_target` does.
    """
    path = check_target(path)
    table = write_text(path.with_suffix(".csv"), assessment.to_csv())
    html = write_text(path, render_html(assessment, curves=curves, robustness=robustness))
    figure = None
    if robustness is not None:
        figure = write_bytes(path.with_suffix(".robustness.png"), png(robustness_figure(robustness)))
    return ReportFiles(html, table, figure)


def render_html(
    assessment: Assessment, *, curves: Curves | None = None, robustness: Robustness | None = None
) -> str:
    """The page as text."""
    origin = assessment.origin
    return render(
        "accuracy.html.j2",
        filters={"tested": tested, "count": scaled, "error": error_text, "number": number, "distance": length},
        assessment=assessment,
        origin=origin,
        headline=headline(assessment),
        warnings=warnings(assessment),
        rows=class_rows(assessment),
        confusions=largest_confusions(assessment),
        fractions=fractions,
        measured=FIGURES,
        error_digits=error_digits,
        pixel_size_m=assessment.images[0].measured.pixel_size_m if _one_pixel_size(assessment) else None,
        figures=_figures(assessment, curves, robustness),
        curves=curves,
        robustness=robustness,
        tolerance=TOLERANCE,
        gallery=[gallery_image(assessment, number) for number in range(1, len(assessment.pictures) + 1)],
        veil=veil_color([entry.color for entry in assessment.classes]),
        command=origin.command,
        row_limit=ROWS,
        edge=EDGE,
    )


def headline(assessment: Assessment) -> str:
    """The finding in one sentence or two."""
    scores = assessment.scores
    if math.isnan(scores.miou):
        return f"The {scores.images} images of {assessment.origin.split} have no labelled pixel: nothing to measure."
    rows = class_rows(assessment)
    lowest = min((row for row in rows if not math.isnan(row.iou)), key=lambda row: row.iou)
    largest = max(rows, key=lambda row: abs(row.predicted - row.truth))
    images = f"{scores.images} images" if scores.images > 1 else "1 image"
    interval = assessment.intervals.miou.text(1, 100)
    of_interval = f" {interval}" if interval else ""
    return (
        f"mIoU {percent(scores.miou)}{of_interval} on {images}, "
        f"{percent(scores.pixel_accuracy)} of the labelled pixels are right. "
        f"Lowest class: {lowest.name}, IoU {percent(lowest.iou)}. Phase fractions of the whole set are within "
        f"{100 * abs(largest.predicted - largest.truth):.2f} points of the truth."
    )


def warnings(assessment: Assessment) -> list[str]:
    """What a reader must know before quoting a figure."""
    origin, sentences = assessment.origin, []
    if origin.split == "train" and origin.trained_on == origin.data:
        sentences.append("these are the images that the model was trained on: the figures do not hold for new ones")
    outside = int(assessment.counts[:, -1].sum())
    if outside:
        sentences.append(f"{outside:,} predictions lie outside the classes: the model file may be damaged")
    absent = [row.name for row in class_rows(assessment) if not row.truth > 0]
    if absent:
        sentences.append(f"not in the truth of these images: {', '.join(absent)}")
    return sentences


def class_rows(assessment: Assessment) -> list[ClassRow]:
    """The table of classes."""
    scores = assessment.scores
    truth, predicted = fractions(assessment.counts)
    columns = (scores.iou, scores.accuracy, scores.precision, scores.dice, truth, predicted, assessment.intervals.iou,
               assessment.errors, assessment.distances)  # fmt: skip
    return [
        ClassRow(entry.name, entry.color, *values) for entry, *values in zip(assessment.classes, *columns, strict=True)
    ]


def largest_confusions(assessment: Assessment, limit: int = 6) -> list[Confusion]:
    """The pairs of classes with the most wrong pixels, most first."""
    wrong = assessment.counts.copy()
    np.fill_diagonal(wrong, 0)
    names = [*assessment.class_names, "no class"]
    pairs = [
        Confusion(names[truth], names[predicted], int(pixels), int(pixels) / int(wrong.sum()))
        for (truth, predicted), pixels in np.ndenumerate(wrong)
        if pixels
    ]
    return sorted(pairs, key=lambda pair: -pair.pixels)[:limit]


def _one_pixel_size(assessment: Assessment) -> bool:
    return len({image.measured.pixel_size_m for image in assessment.images}) == 1


def _figures(
    assessment: Assessment, curves: Curves | None, robustness: Robustness | None
) -> dict[str, list[str]]:
    """Addresses of each figure; of those with several panels a second one, for a narrow screen."""
    drawn: dict[str, list[Any]] = {
        "confusion": [confusion_figure(assessment)],
        "fractions": [fractions_figure(assessment, columns) for columns in (COLUMNS, 1)],
        "errors": [errors_figure(assessment, columns) for columns in (2, 1)],
    }
    if assessment.reliability:
        drawn["reliability"] = [reliability_figure(assessment)]
    if curves is not None:
        best = assessment.origin.best_step
        drawn["curves"] = [curves_figure(curves, best, columns) for columns in (COLUMNS, 1)]
    if robustness is not None:
        drawn["robustness"] = [robustness_figure(robustness, columns) for columns in (COLUMNS, 1)]
    return {name: [svg_address(figure) for figure in figures] for name, figures in drawn.items()}


# -- the gallery -----------------------------------------------------------------------------------


def gallery_image(assessment: Assessment, number: int) -> Gallery:
    """The four panels of the ``number``-th image, from 1."""
    picture, palette = assessment.pictures[number - 1], [entry.color for entry in assessment.classes]
    ignored = picture.truth == IGNORE_INDEX
    wrong = picture.predicted != picture.truth  # or not labelled, which stripes hide
    reduced = f", shown at 1/{picture.step} of its size" if picture.step > 1 else ""
    result = picture.result
    labelled = int(result.counts.sum())
    missed = labelled - int(np.trace(result.counts[:, :-1]))
    scores, right = result.scores, percent(result.scores.pixel_accuracy)
    panels = [
        Panel("micrograph", f"{result.width} × {result.height} pixels{reduced}", None),
        Panel("truth", _ignored_note(result), palette_png(_striped(picture.truth, ignored), _colors(palette, 0))),
        Panel("prediction", f"{right} of the labelled pixels right",
              palette_png(picture.predicted, _colors(palette, 0))),
        Panel("errors", f"{missed:,} of {labelled:,} labelled pixels", _errors(picture.truth, wrong, ignored, palette)),
    ]  # fmt: skip
    ious = ", ".join(f"{name} {percent(iou, 1)}" for name, iou in zip(assessment.class_names, scores.iou, strict=True))
    rank = _rank(number, len(assessment.pictures))
    note = f"{rank} · mIoU {percent(scores.miou)} · pixel accuracy {right} · IoU {ious}"
    return gallery(number, result.name, note, picture.grey, [panels])


def _errors(
    truth: Grey8, wrong: npt.NDArray[np.bool_], ignored: npt.NDArray[np.bool_], palette: Palette
) -> str:
    """Wrong pixels in the colour of their true class; what is right lies under a veil."""
    codes = np.where(wrong, truth, _CLEAR).astype(np.uint8)
    colors = _colors(palette, _VEIL)
    colors[: len(palette), 3] = 255
    colors[IGNORE_INDEX] = _VEILED_STRIPE
    return palette_png(_striped(codes, ignored), colors)


def _striped(codes: Grey8, ignored: npt.NDArray[np.bool_]) -> Grey8:
    """``codes`` with diagonal stripes where nothing is labelled."""
    height, width = codes.shape
    period = max(6, max(height, width) // 40)
    rows, columns = np.ogrid[:height, :width]
    stripe = (rows + columns) % period < max(2, period // 4)
    striped: Grey8 = np.where(ignored, np.where(stripe, IGNORE_INDEX, _CLEAR), codes).astype(np.uint8)
    return striped


def _colors(palette: Palette, veil: int) -> npt.NDArray[np.uint8]:
    """RGBA for each code: classes, the veil of clear pixels, stripes, and anything else."""
    colors = overlay_colors(palette)
    colors[len(palette) :] = (*_STRANGE, 255)
    colors[_CLEAR] = (*veil_color(palette), veil)
    colors[IGNORE_INDEX] = _STRIPE
    return colors


def veil_color(palette: Palette) -> tuple[int, int, int]:
    """White or near black, whichever is farther from the class nearest to it."""
    classes = np.asarray(palette, dtype=np.float64)
    candidates = ((255, 255, 255), DIMMED)
    return max(candidates, key=lambda color: float(np.linalg.norm(classes - np.asarray(color), axis=1).min()))


def _ignored_note(result: ImageResult) -> str:
    return f"{result.ignored:,} pixels not labelled (striped)" if result.ignored else "all pixels labelled"


def _rank(number: int, count: int) -> str:
    if count == 1:
        return "only image"
    ordinals = {1: "", 2: "2nd ", 3: "3rd "}
    return "best" if number == count else f"{ordinals.get(number, f'{number}th ')}worst"
