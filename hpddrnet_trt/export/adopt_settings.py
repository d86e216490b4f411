"""What a stranger's ONNX file does not say of itself, and how a person says it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.manifest import ClassInfo, DataRecord, IntensityRecord, Normalization, default_palette

_LARGEST_UNIT = 4.0  # means and deviations up to this are of grey levels 0..1

NORMALIZATIONS = {
    "imagenet": Normalization(),
    "half": Normalization(mean=(127.5,) * 3, std=(127.5,) * 3),
    "unit": Normalization(mean=(0.0,) * 3, std=(255.0,) * 3),
    "none": Normalization(mean=(0.0,) * 3, std=(1.0,) * 3),
}
"""By name: ImageNet's means and deviations, grey levels as -1..1, as 0..1, and as they are (0..255)."""


@dataclass(frozen=True)
class AdoptSettings:
    """What a stranger's file does not say of itself.

    ``classes``: in the order of the scores. ``normalization``: in grey levels 0..255, red first; a file with one
    channel takes the first of each. ``channel_order``: which channel the file takes first. ``scores``: name of the
    output to take, where there are several. ``align_corners``: how scores of lower resolution are enlarged.
    ``multiple``: of which height and width must be where they are dynamic. ``output``, ``confidence``: as
    :class:`~hpddrnet_trt.core.manifest.OutputContract`. ``name``: of the model, default the file's.
    ``data``: what it was trained on; its ``crop`` is the size of tiles. ``intensity``: which grey values are black and
    white for it.
    """

    classes: Sequence[ClassInfo]
    normalization: Normalization = field(default_factory=Normalization)
    channel_order: Literal["rgb", "bgr"] = "rgb"
    scores: str | None = None
    align_corners: bool = False
    multiple: int = 32
    output: Literal["labels", "logits"] = "labels"
    confidence: bool = False
    name: str | None = None
    data: DataRecord | None = None
    intensity: IntensityRecord | None = None

    def __post_init__(self) -> None:
        if not 2 <= len(self.classes) <= 255:
            raise UsageError(f"a segmenter has 2 to 255 classes, {len(self.classes)} are named")
        if not 1 <= self.multiple <= 1024:
            raise UsageError(f"sizes are multiples of 1 to 1024 pixels, not of {self.multiple}")
        if self.confidence and self.output != "labels":
            raise UsageError("a confidence map goes with labels; logits already carry the confidence")


def parse_classes(text: str) -> list[ClassInfo]:
    """``matrix,pore=#d55e00``: names with or without a colour; raises :class:`UsageError`."""
    entries = [part.strip() for part in text.split(",")]
    names, palette = [], default_palette(len(entries))
    for place, entry in enumerate(entries):
        name, _, color = (part.strip() for part in entry.partition("="))
        if not name or name in names or (color and not re.fullmatch(r"#[0-9a-fA-F]{6}", color)):
            raise UsageError(
                f"{entry!r} of the classes {text!r} is not a name of its own, alone or as NAME=#RRGGBB; "
                "write them as matrix,pore=#d55e00"
            )
        names.append(name)
        if color:
            red, green, blue = bytes.fromhex(color[1:])
            palette[place] = red, green, blue
    return [ClassInfo(name=name, color=color) for name, color in zip(names, palette, strict=True)]


def parse_normalization(text: str) -> Normalization:
    """A name in :data:`NORMALIZATIONS`, or ``MEAN/STD`` with one or three numbers each.

    Numbers are of grey levels 0..1 where all are small, and of 0..255 where each mean is either 0 or large and all
    deviations are large; raises :class:`UsageError` for anything between, where only the name can tell.
    """
    if text in NORMALIZATIONS:
        return NORMALIZATIONS[text]
    known = f"one of {', '.join(NORMALIZATIONS)}, or MEAN/STD such as 123.7,116.3,103.5/58.4,57.1,57.4"
    try:
        mean, std = ([float(number) for number in part.split(",")] for part in text.split("/"))
        if {len(mean), len(std)} - {1, 3} or not np.isfinite([*mean, *std]).all() or min(std) <= 0:
            raise ValueError
    except ValueError as exc:
        raise UsageError(f"the normalization {text!r} is not understood; give {known}") from exc
    small = max(map(abs, mean)) <= _LARGEST_UNIT and max(std) <= _LARGEST_UNIT
    large = min(std) > _LARGEST_UNIT and all(value == 0 or abs(value) > _LARGEST_UNIT for value in mean)
    plain = not any(mean) and set(std) == {1.0}
    if plain or not (small or large):
        raise UsageError(
            f"the normalization {text!r} may be of grey levels 0..1 or 0..255; give both in one unit, or 'unit' for "
            "grey levels brought to 0..1 and 'none' for those left as they are"
        )
    factor = 255.0 if small else 1.0
    red, green, blue = (factor * value for value in mean * (3 // len(mean)))
    of_red, of_green, of_blue = (factor * value for value in std * (3 // len(std)))
    return Normalization(mean=(red, green, blue), std=(of_red, of_green, of_blue))
