"""Pictures of the report: micrograph, truth, prediction and errors of one image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.accuracy.evaluate import Grey8, ImageResult, Picture
from hpddrnet_trt.core.manifest import IGNORE_INDEX
from hpddrnet_trt.core.text import percent
from hpddrnet_trt.report.pictures import jpeg, palette_png

_ALPHA = 115  # of 255, opacity of the labels over the micrograph
_VEIL = 205  # opacity of the veil over what is right, in the map of errors
_CLEAR = IGNORE_INDEX - 1  # code of pixels where the micrograph shows; no dataset has so many classes
_STRIPE = (255, 255, 255, 215)
_VEILED_STRIPE = (128, 128, 128, 215)
_STRANGE = (255, 0, 255)  # predictions outside the classes: meant to hurt the eye

Palette = Sequence[tuple[int, int, int]]


class Panel(NamedTuple):
    """One drawing over the micrograph, a PNG data address; None is the micrograph alone."""

    title: str
    note: str
    overlay: str | None


class Shown(NamedTuple):
    """One image of the gallery."""

    rank: str
    result: ImageResult
    ratio: str  # CSS aspect ratio, width / height
    base: str  # data address of the micrograph
    panels: list[Panel]


def shown(picture: Picture, palette: Palette, rank: str) -> Shown:
    """The four panels of one image."""
    ignored = picture.truth == IGNORE_INDEX
    wrong = (picture.predicted != picture.truth) & ~ignored
    reduced = f", shown at 1/{picture.step} of its size" if picture.step > 1 else ""
    result = picture.result
    labelled = int(result.counts.sum())
    missed = labelled - int(np.trace(result.counts[:, :-1]))
    accuracy = f"{percent(result.scores.pixel_accuracy)} of the labelled pixels right"
    height, width = picture.grey.shape
    panels = [
        Panel("micrograph", f"{result.width} × {result.height} pixels{reduced}", None),
        Panel("truth", _ignored_note(result), palette_png(_striped(picture.truth, ignored), _colours(palette, 0))),
        Panel("prediction", accuracy, palette_png(picture.predicted, _colours(palette, 0))),
        Panel("errors", f"{missed:,} of {labelled:,} labelled pixels", _errors(picture.truth, wrong, ignored, palette)),
    ]
    return Shown(rank, result, f"{width} / {height}", jpeg(picture.grey), panels)


def _errors(
    truth: Grey8, wrong: npt.NDArray[np.bool_], ignored: npt.NDArray[np.bool_], palette: Palette
) -> str:
    """Wrong pixels in the colour of their true class; what is right lies under a veil."""
    codes = np.where(wrong, truth, _CLEAR).astype(np.uint8)
    colours = _colours(palette, _VEIL)
    colours[: len(palette), 3] = 255
    colours[IGNORE_INDEX] = _VEILED_STRIPE
    return palette_png(_striped(codes, ignored), colours)


def _striped(codes: Grey8, ignored: npt.NDArray[np.bool_]) -> Grey8:
    """``codes`` with diagonal stripes where nothing is labelled."""
    height, width = codes.shape
    period = max(6, max(height, width) // 40)
    rows, columns = np.ogrid[:height, :width]
    stripe = (rows + columns) % period < max(2, period // 4)
    found: Grey8 = np.where(ignored, np.where(stripe, IGNORE_INDEX, _CLEAR), codes).astype(np.uint8)
    return found


def _colours(palette: Palette, veil: int) -> npt.NDArray[np.uint8]:
    """RGBA for each code: classes, the veil of clear pixels, stripes, and anything else."""
    colours = np.zeros((256, 4), dtype=np.uint8)
    colours[:] = (*_STRANGE, 255)
    colours[: len(palette), :3] = palette
    colours[: len(palette), 3] = _ALPHA
    colours[_CLEAR] = (*veil_colour(palette), veil)
    colours[IGNORE_INDEX] = _STRIPE
    return colours


def veil_colour(palette: Palette) -> tuple[int, int, int]:
    """White or near black, whichever is farther from the class nearest to it."""
    classes = np.asarray(palette, dtype=np.float64)
    candidates = ((255, 255, 255), (10, 14, 22))
    return max(candidates, key=lambda colour: float(np.linalg.norm(classes - np.asarray(colour), axis=1).min()))


def _ignored_note(result: ImageResult) -> str:
    return f"{result.ignored:,} pixels not labelled (striped)" if result.ignored else "all pixels labelled"
