"""What a piece of metadata says about scale and information bar, and how several pieces become one answer.

A wrong scale is worse than none: whatever is senseless, not square, or contradicted by another piece
of metadata or by the picture itself leaves the pixel size unknown, with a sentence that says why.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from hpddrnet_trt.core.magnification import plausible
from hpddrnet_trt.core.text import METRES, is_square

_AGREE = 1e-2  # relative difference of two statements about the same picture
# Not the 12 of "12,5": a decimal comma would be a wrong number, and "1,250" may be either.
_QUANTITY = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?![\d.]|,\d)\s*([^\W\d_]*)")


@dataclass
class VendorMetadata:
    """One source's statements; filled by the module of its vendor.

    ``sizes``: ``(metres per pixel, where it was found)``. ``doubts``: why a stated pixel size is not used.
    ``picture_rows``: rows above the information bar. ``rows_follow``: whether that number follows from the
    acquired size (then it holds for this file), or only a bar's height is stated, which outlives cropping.
    """

    vendor: str | None = None
    sizes: list[tuple[float, str]] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    picture_rows: int | None = None
    rows_follow: bool = True

    def add_size(self, width_m: float | None, height_m: float | None, source: str) -> None:
        """Note a pixel's width and height in metres; a missing height means square pixels."""
        if width_m is None or not math.isfinite(width_m) or width_m == 0:
            return  # 0 and nothing mean "not measured" to the vendors as well
        if not plausible(width_m):
            self.doubts.append(f"{source} states a senseless pixel size of {width_m:g} m")
        elif height_m is not None and not is_square(width_m, height_m):
            self.doubts.append(f"its pixels are not square ({width_m:.6g} x {height_m:.6g} m, {source})")
        else:
            self.sizes.append((width_m, source))

    def check_acquired(self, acquired: tuple[int | None, int | None], stored: tuple[int, int]) -> None:
        """Compare the acquired ``(width, height)`` with the stored one: extra rows are the bar, the rest is doubt."""
        columns, rows = acquired
        if columns is not None and columns > 0 and columns != stored[0]:
            size = f"{columns}" if rows is None else f"{columns} x {rows}"
            self.doubts.append(f"resized or cropped after acquisition ({size} to {stored[0]} x {stored[1]})")
        elif rows is not None and 0 < rows < stored[1]:
            self.picture_rows = rows

    def state_bar(self, bar_rows: int | None, stored: tuple[int, int]) -> None:
        """Note the stated height of an information bar inside the picture."""
        if bar_rows is not None and 0 < bar_rows < stored[1]:
            self.picture_rows = stored[1] - bar_rows
            self.rows_follow = False


@dataclass(frozen=True)
class Planes:
    """How the planes of a file lie: ``sizes`` of the axes C (channel), Z and T, ``order`` from the fastest to the
    slowest, and metres from one slice to the next."""

    sizes: Mapping[str, int] = field(default_factory=lambda: {"C": 1, "Z": 1, "T": 1})
    order: str = "CZT"
    spacing_m: float | None = None

    @property
    def channels(self) -> int:
        return self.sizes["C"]

    @property
    def pages(self) -> int:
        return math.prod(self.sizes.values())

    def of_channel(self, channel: int) -> list[int]:
        """Numbers of one channel's planes."""
        step = math.prod(self.sizes[axis] for axis in self.order[: self.order.index("C")])
        return [number for number in range(self.pages) if number // step % self.channels == channel]


@dataclass(frozen=True)
class VendorInfo:
    """The answer of all metadata together; ``remarks`` says why a stated pixel size is left unknown."""

    vendor: str | None = None
    pixel_size_m: float | None = None
    pixel_size_source: str | None = None
    picture_rows: int | None = None
    rows_follow: bool = True
    remarks: tuple[str, ...] = ()


def resolve(metadata: Iterable[VendorMetadata]) -> VendorInfo:
    """Put metadata together, best source first: its vendor, size and bar count, if nobody contradicts the size."""
    statements = list(metadata)
    sizes = [size for statement in statements for size in statement.sizes]
    doubts = [doubt for statement in statements for doubt in statement.doubts]
    doubts += [
        f"{sizes[0][1]} says {sizes[0][0]:.6g} m but {other} says {value:.6g} m"
        for value, other in sizes[1:]
        if not math.isclose(value, sizes[0][0], rel_tol=_AGREE)
    ]
    vendor = next((statement.vendor for statement in statements if statement.vendor is not None), None)
    bar = next((statement for statement in statements if statement.picture_rows is not None), VendorMetadata())
    metres_per_pixel, source = sizes[0] if sizes and not doubts else (None, None)
    remarks = tuple(f"{doubt}: its pixel size is unknown" for doubt in dict.fromkeys(doubts))
    return VendorInfo(vendor, metres_per_pixel, source, bar.picture_rows, bar.rows_follow, remarks)


def metres(value: float | None, unit: str) -> float | None:
    """``value`` in ``unit`` as metres; None for units that are no length ("pixel", "1/nm")."""
    factor = METRES.get(unit)
    return None if value is None or factor is None else value * factor


def number(text: str | None) -> float | None:
    """The number that a text begins with, or None."""
    match = _QUANTITY.match(text or "")
    return float(match[1]) if match else None


def whole(text: str | None) -> int | None:
    """The whole number that a text begins with, or None."""
    value = number(text)
    return int(value) if value is not None and math.isfinite(value) and value == int(value) else None


def length(text: str | None, unit: str | None = None) -> float | None:
    """A text such as ``"55.82 nm"`` in metres; ``unit`` applies where the text names none."""
    match = _QUANTITY.match(text or "")
    return metres(float(match[1]), match[2] or unit or "") if match else None
