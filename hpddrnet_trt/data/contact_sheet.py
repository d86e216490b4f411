"""A contact sheet: pictures of a dataset beside their masks, on one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from hpddrnet_trt.core.files import atomic_path
from hpddrnet_trt.core.manifest import ClassInfo
from hpddrnet_trt.data.datasets import read_pair
from hpddrnet_trt.data.labels import overlay
from hpddrnet_trt.data.layouts import Sample

_TILE = 240  # edge of the square a picture is fitted into, pixels
_GAP = 12
_CAPTION = 20
_PAIRS_PER_ROW = 3
_INK, _PAPER, _FAINT = (20, 20, 20), (250, 250, 250), (110, 110, 110)
_ALPHA = 0.45


def draw_contact_sheet(
    target: str | Path,
    title: str,
    classes: Sequence[ClassInfo],
    splits: Mapping[str, Sequence[Sample]],
    *,
    per_split: int = 9,
) -> Path:
    """Write a PNG with up to ``per_split`` evenly chosen samples of each split: picture, overlay, name.

    Label values outside ``classes`` are magenta, ignored pixels (255) stay grey. Samples must be
    readable and of matching size.
    """
    chosen = {name: _evenly(samples, per_split) for name, samples in splits.items() if samples}
    width = _GAP + _PAIRS_PER_ROW * (2 * _TILE + 2 * _GAP)
    heading, text, small = (ImageFont.load_default(size) for size in (22, 16, 12))
    legend_rows = _legend_layout(classes, text, width)
    top = 44 + 26 * len(legend_rows)
    rows = sum(-(-len(samples) // _PAIRS_PER_ROW) for samples in chosen.values())
    height = top + len(chosen) * 34 + rows * (_TILE + _CAPTION + _GAP) + _GAP
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, 10), title, fill=_INK, font=heading)
    for row, entries in enumerate(legend_rows):
        for x, entry in entries:
            y = 44 + 26 * row
            pen.rectangle((x, y, x + 18, y + 18), fill=entry.color, outline=_INK)
            pen.text((x + 26, y - 1), entry.name, fill=_INK, font=text)
    y = top
    for name, samples in chosen.items():
        total = len(splits[name])
        shown = f"{total} images" if len(samples) == total else f"{len(samples)} of {total} images"
        pen.text((_GAP, y + 6), f"{name}: {shown}", fill=_INK, font=text)
        y += 34
        for place, sample in enumerate(samples):
            column = place % _PAIRS_PER_ROW
            if place and column == 0:
                y += _TILE + _CAPTION + _GAP
            _draw_pair(sheet, pen, (_GAP + column * (2 * _TILE + 2 * _GAP), y), sample, classes, small)
        y += _TILE + _CAPTION + _GAP
    with atomic_path(target) as temporary:
        sheet.save(temporary, format="PNG")
    return Path(target)


def _draw_pair(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    sample: Sample,
    classes: Sequence[ClassInfo],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    grey, mask = read_pair(sample)
    drawn = overlay(grey, mask, [entry.color for entry in classes], alpha=_ALPHA)
    x, y = corner
    sheet.paste(Image.fromarray(_fit(np.stack([grey] * 3, axis=2))), (x, y))
    sheet.paste(Image.fromarray(_fit(drawn)), (x + _TILE + 2, y))
    size = f"  {grey.shape[1]} x {grey.shape[0]}"
    space = 2 * _TILE + 2 - pen.textlength(size, font=font)
    name = _shorten(sample.name, space, pen, font)
    pen.text((x, y + _TILE + 3), name, fill=_INK, font=font)
    pen.text((x + pen.textlength(name, font=font), y + _TILE + 3), size, fill=_FAINT, font=font)


def _fit(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Scale to fit the tile; large pictures are averaged, so that thin features stay visible."""
    height, width = picture.shape[:2]
    scale = _TILE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    return np.asarray(cv2.resize(picture, size, interpolation=way), dtype=np.uint8)


def _evenly(samples: Sequence[Sample], count: int) -> list[Sample]:
    if len(samples) <= count:
        return list(samples)
    return [samples[round(place * (len(samples) - 1) / (count - 1))] for place in range(count)]


def _legend_layout(
    classes: Sequence[ClassInfo], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[list[tuple[int, ClassInfo]]]:
    rows: list[list[tuple[int, ClassInfo]]] = [[]]
    x = _GAP
    for entry in classes:
        needed = 26 + round(font.getlength(entry.name)) + 24
        if rows[-1] and x + needed > width:
            rows.append([])
            x = _GAP
        rows[-1].append((x, entry))
        x += needed
    return rows


def _shorten(
    text: str, space: float, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> str:
    if pen.textlength(text, font=font) <= space:
        return text
    while text and pen.textlength(text + "...", font=font) > space:
        text = text[:-1]
    return text + "..."
