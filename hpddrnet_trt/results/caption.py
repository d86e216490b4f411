"""The bar below an overlay: scale bar, and the classes' colours with their area fractions."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from hpddrnet_trt.core.manifest import ClassInfo
from hpddrnet_trt.core.text import length as length_text
from hpddrnet_trt.results.regions import AreaFraction

NARROWEST = 128  # pixels: below, no text would fit
MOST_CLASSES = 12  # named in one bar
_SIGNS = str.maketrans("μ′’ʹ″”“–—−‐", "µ'''\"\"\"----")
_BACKGROUND, _INK, _FRAME, _WARNING = (22, 22, 24), (240, 240, 240), (130, 130, 130), (255, 180, 70)


@dataclass(frozen=True)
class ScaleBar:
    """A round length: ``length_m`` metres, drawn ``pixels`` long, named ``label``."""

    length_m: float
    pixels: int
    label: str


class _Pen:
    """Text in the scalable font that comes with Pillow, which has ASCII and little else, not even the micro sign."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._font = ImageFont.load_default(size)

    def length(self, text: str) -> int:
        """Pixels that ``text`` takes."""
        return math.ceil(self._font.getlength(_drawable(text).replace("µ", "u")))

    def write(
        self, on: ImageDraw.ImageDraw, x: int, middle: int, text: str, ink: tuple[int, int, int] = _INK
    ) -> None:
        """Draw ``text`` from ``x``, its capitals centred on ``middle``."""
        text, base = _drawable(text), middle + round(0.36 * self.size)
        on.text((x, base), text.replace("µ", "u"), fill=ink, font=self._font, anchor="ls")
        for position in (index for index, letter in enumerate(text) if letter == "µ"):  # a u with a longer left stem
            stem = x + round(self._font.getlength(text[:position].replace("µ", "u"))) + self._stem[0]
            top, foot = base - self.size // 4, base + round(0.2 * self.size)
            on.rectangle((stem, top, stem + self._stem[1] - 1, foot), fill=ink)

    @cached_property
    def _stem(self) -> tuple[int, int]:
        """First column and width of the left stem of a u."""
        mask = self._font.getmask("u")
        row = [mask.getpixel((column, 1)) > 100 for column in range(mask.size[0] // 2)]
        return row.index(True), sum(row)


@dataclass(frozen=True)
class _Item:
    width: int
    draw: Callable[[ImageDraw.ImageDraw, int, int], None]  # at x and the middle of the row


def scale_bar(width: int, pixel_size_m: float) -> ScaleBar:
    """The length 1, 2 or 5 x 10^n metres nearest to a fifth of an image ``width`` pixels wide (12 to 32 percent)."""
    wanted = 0.2 * width * pixel_size_m
    decade = math.floor(math.log10(wanted))
    mantissa, exponent = min(
        ((mantissa, decade + step) for step in (0, 1) for mantissa in (1, 2, 5)),
        key=lambda pair: abs(math.log(pair[0] * 10.0 ** pair[1] / wanted)),
    )
    length = float(f"{mantissa}e{exponent}")
    return ScaleBar(length, max(1, round(length / pixel_size_m)), length_text(length, 6))


def with_caption(
    picture: npt.NDArray[np.uint8],
    classes: Sequence[ClassInfo],
    fractions: Sequence[AreaFraction],
    pixel_size_m: float | None = None,
    notice: str | None = None,
) -> npt.NDArray[np.uint8]:
    """RGB uint8 ``[H, W, 3]`` with a bar added below: ``[H + h, W, 3]``; the picture itself stays free.

    ``fractions`` name the classes to show; of more than twelve, those that cover most. The scale bar needs a pixel
    size; ``notice`` stands out at the end. Pictures narrower than 128 pixels come back as they are. Text grows with the
    picture.
    """
    width = picture.shape[1]
    if width < NARROWEST or not (fractions or pixel_size_m):
        return picture
    size = max(12, round(width / 50))
    pen = _Pen(size)
    margin, row_height, gap = max(4, size // 2), round(1.7 * size), round(1.2 * size)
    largest = sorted(range(len(fractions)), key=lambda index: -fractions[index].fraction)[:MOST_CLASSES]
    colors = {entry.name: entry.color for entry in classes}
    items = [
        _legend_entry(pen, fractions[index], colors[fractions[index].name], width - 2 * margin)
        for index in sorted(largest)
    ]
    if len(fractions) > MOST_CLASSES:
        text = f"and {len(fractions) - MOST_CLASSES} more"
        items.append(_Item(pen.length(text), lambda on, x, middle: pen.write(on, x, middle, text)))
    if notice is not None:
        warning = _fitted(pen, notice, "", width - 2 * margin)
        items.append(_Item(pen.length(warning), lambda on, x, middle: pen.write(on, x, middle, warning, _WARNING)))
    if pixel_size_m is not None:
        items.insert(0, _bar_item(pen, scale_bar(width, pixel_size_m)))
    x, row, places = margin, 0, []  # in reading order, as many in a row as fit
    for item in items:
        if x > margin and x + item.width > width - margin:
            x, row = margin, row + 1
        places.append((x, row))
        x += item.width + gap
    strip = Image.new("RGB", (width, (row + 1) * row_height + margin), _BACKGROUND)
    draw = ImageDraw.Draw(strip)
    for item, (x, row) in zip(items, places, strict=True):
        item.draw(draw, x, margin // 2 + row * row_height + row_height // 2)
    return np.concatenate([picture, np.asarray(strip)])


def _bar_item(pen: _Pen, bar: ScaleBar) -> _Item:
    thick, tick, gap = max(1, pen.size // 7), max(3, pen.size // 3), pen.size // 2

    def draw(on: ImageDraw.ImageDraw, x: int, middle: int) -> None:
        right = x + bar.pixels - 1
        on.rectangle((x, middle - thick // 2, right, middle - thick // 2 + thick - 1), fill=_INK)
        for end in (x, right - thick + 1):  # inside the length
            on.rectangle((end, middle - tick, end + thick - 1, middle + tick), fill=_INK)
        pen.write(on, right + gap, middle, bar.label)

    return _Item(bar.pixels + gap + pen.length(bar.label), draw)


def _legend_entry(pen: _Pen, entry: AreaFraction, color: tuple[int, int, int], widest: int) -> _Item:
    side, gap = round(0.85 * pen.size), max(3, pen.size // 3)
    percent = "<0.1 %" if 0 < entry.fraction < 5e-4 else f"{100 * entry.fraction:.1f} %"
    if entry.low is not None and entry.high is not None:
        percent += f" [{100 * entry.low:.1f}, {100 * entry.high:.1f}]"
    text = _fitted(pen, entry.name, f"  {percent}", widest - side - gap)

    def draw(on: ImageDraw.ImageDraw, x: int, middle: int) -> None:
        top = middle - side // 2
        frame = max(1, pen.size // 16)
        on.rectangle((x, top, x + side - 1, top + side - 1), fill=color, outline=_FRAME, width=frame)
        pen.write(on, x + side + gap, middle, text)

    return _Item(side + gap + pen.length(text), draw)


def _fitted(pen: _Pen, name: str, ending: str, width: int) -> str:
    """Name and ending, the name shortened as far as needed."""
    if pen.length(name + ending) <= width:
        return name + ending
    while name and pen.length(f"{name}...{ending}") > width:
        name = name[:-1]
    return f"{name.rstrip()}...{ending}"


def _drawable(text: str) -> str:
    """``text`` in ASCII and µ: accents dropped, Greek letters by name (phases: gamma'), a question mark for others."""
    return "".join(_letter(sign) for sign in text.translate(_SIGNS))


def _letter(sign: str) -> str:
    if sign == "µ" or (sign.isascii() and sign.isprintable()):
        return sign
    name = unicodedata.name(sign, "")
    if name.startswith("GREEK") and "LETTER" in name:
        word = name.split("LETTER ")[1].split(" WITH ")[0].split()[-1]
        return word.capitalize() if "CAPITAL" in name else word.lower()
    return " " if sign.isascii() else unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode() or "?"
