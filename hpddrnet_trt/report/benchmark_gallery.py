"""Pictures of the report: everybody's labels over parts of the test images, and where they differ."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image as PillowImage

from hpddrnet_trt.benchmark.result import BenchmarkResult, Picture
from hpddrnet_trt.core.manifest import IGNORE_INDEX
from hpddrnet_trt.core.text import percent
from hpddrnet_trt.report.pictures import jpeg, palette_png

_ALPHA = 115  # of 255, opacity of the labels over the micrograph
_DIFFERENCE = (255, 176, 0)  # bright amber: told from grey by brightness alone
_DIMMED = (10, 14, 22)


class Panel(NamedTuple):
    """One overlay of the gallery: PNG data address drawn over the micrograph."""

    title: str
    note: str
    overlay: str | None  # None: the micrograph alone


class Gallery(NamedTuple):
    """One test image with its panels, in pairs that belong together."""

    name: str
    part: str
    ratio: str  # CSS aspect ratio, width / height
    base: str  # data address of the micrograph
    pairs: list[list[Panel]]


def gallery(result: BenchmarkResult) -> list[Gallery]:
    """One for each picture of the result."""
    return [_gallery(result, picture) for picture in result.pictures]


def _gallery(result: BenchmarkResult, picture: Picture) -> Gallery:
    grey = _decode(picture.image)
    mask = None if picture.mask is None else _decode(picture.mask)
    labels = {label: _decode(content) for label, content in picture.labels.items()}
    palette = [entry.color for entry in result.classes]
    reference = labels.get(result.reference) if result.reference is not None else None
    mask_panel = [] if mask is None else [Panel("mask", "as annotated", _label_overlay(mask, palette))]
    pairs = [[Panel("micrograph", picture.part, None), *mask_panel]]
    for label, found in labels.items():
        pair = [Panel(label, _score(found, mask), _label_overlay(found, palette))]
        if label != result.reference and reference is not None:
            pair.append(_difference(f"{label}, against reference", found != reference))
        elif mask is not None:
            pair.append(_difference(f"{label}, against mask", (found != mask) & (mask != IGNORE_INDEX)))
        pairs.append(pair)
    height, width = grey.shape
    return Gallery(picture.name, picture.part, f"{width} / {height}", jpeg(grey), pairs)


def _difference(title: str, different: npt.NDArray[np.bool_]) -> Panel:
    count = int(np.count_nonzero(different))
    note = f"{count:,} of {different.size:,} pixels differ ({percent(count / different.size, 3)})"
    return Panel(title, note, _difference_overlay(different))


def _score(labels: npt.NDArray[np.uint8], mask: npt.NDArray[np.uint8] | None) -> str:
    if mask is None:
        return "labels"
    valid = mask != IGNORE_INDEX
    return f"{percent(float(np.mean(labels[valid] == mask[valid])) if valid.any() else None)} of pixels as annotated"


def _label_overlay(labels: npt.NDArray[np.uint8], palette: Sequence[tuple[int, int, int]]) -> str:
    colours = np.zeros((256, 4), dtype=np.uint8)
    colours[: len(palette), :3] = palette
    colours[: len(palette), 3] = _ALPHA
    return palette_png(labels, colours)


def _difference_overlay(different: npt.NDArray[np.bool_]) -> str:
    # Grown by one pixel on each side, or single pixels would vanish on the page.
    grown = cv2.dilate(different.astype(np.uint8), np.ones((3, 3), dtype=np.uint8))
    colours = np.zeros((256, 4), dtype=np.uint8)
    colours[0], colours[1] = (*_DIMMED, 150), (*_DIFFERENCE, 255)
    return palette_png(np.asarray(grown, dtype=np.uint8), colours)


def _decode(content: str) -> npt.NDArray[np.uint8]:
    with PillowImage.open(io.BytesIO(base64.b64decode(content))) as image:
        return np.asarray(image, dtype=np.uint8)
