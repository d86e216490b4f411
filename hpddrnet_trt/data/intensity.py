"""Grey values of any depth in 8 bits: which of them are black and white.

A network sees 8-bit pictures, and its labels depend on their contrast. So a model records the intensity range of its
training (:class:`~hpddrnet_trt.core.manifest.IntensityRecord`), and every door brings pictures into it: the same
micrograph in 8, 12 or 16 bits, or as floats, gives the same labels. What a file does not tell is guessed by its values,
and the guess is a remark.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import ContractError
from hpddrnet_trt.core.manifest import IntensityRecord

DEPTHS = (8, 10, 12, 14, 16)  # bits that detectors give
_BLOCK = 1 << 20  # pixels
_SHIFTED = 4  # low bits unused at least, where 8 bits fill 12, 14 or 16, or 12 bits 16
_FLAT = 1 / 16  # of full scale: less than that leaves fewer than 16 grey levels
_NARROW = 0.25  # of full scale: training pictures that use less are stretched, or 8 bits would lose their contrast


@dataclass(frozen=True)
class Percentiles:
    """An intensity range by the share of pixels, in percent, that lie below ``black`` and below ``white``."""

    black: float
    white: float

    def __post_init__(self) -> None:
        if not 0 <= self.black < self.white <= 100:
            raise ContractError(
                f"percentiles of grey are 0 <= black < white <= 100, not {self.black:g} and {self.white:g}"
            )


@dataclass(frozen=True)
class FullScale:
    """An intensity range as shares of what a picture's bit depth can hold; the default is all of it.

    ``bits``: the least depth that 16-bit files are taken to have, of the pictures that a model was trained on.
    """

    black: float = 0.0
    white: float = 1.0
    bits: int | None = None

    def __post_init__(self) -> None:
        if not (np.isfinite([self.black, self.white]).all() and self.black < self.white):
            raise ContractError(f"shares of full scale are black < white, not {self.black:g} and {self.white:g}")

    @property
    def whole(self) -> bool:
        """Whether 8-bit pictures stay as they are."""
        return (self.black, self.white) == (0, 1)


IntensityRange = tuple[float, float] | Percentiles | FullScale | None
_USUAL = Percentiles(0.1, 99.9)  # hot pixels and dead corners stay outside


class Grey8(NamedTuple):
    """``pixels`` uint8 ``[H, W]``; ``window``: the grey values of the original that became 0 and 255; ``remarks``."""

    pixels: npt.NDArray[np.uint8]
    window: tuple[float, float]
    remarks: tuple[str, ...] = ()


def to_grey8(pixels: npt.NDArray[Any], intensity_range: IntensityRange = None) -> Grey8:
    """Map grey values linearly to 0..255.

    ``pixels``: ``[H, W]``, uint8, uint16 or float32. ``intensity_range``: ``(black, white)`` in the picture's own
    units; :class:`FullScale`, also by default; ``Percentiles(1, 99)`` of this picture. Values outside are clipped,
    NaN is black, with a remark. At full scale 8-bit pictures pass unchanged (the same array), 16-bit ones are taken as
    8, 10, 12, 14 or 16 bits deep, whatever holds their largest value, and floats as 0..1, 0..255 or 0..65535; a remark
    says so where the values do not tell. Other floats, and what would be left with fewer than 16 grey levels, get their
    0.1 and 99.9 percentiles, with a remark.

    Raises :class:`ContractError` for arrays that are not grey pictures, without a finite value, or an empty range.
    """
    if pixels.ndim != 2 or pixels.dtype not in (np.uint8, np.uint16, np.float32) or not pixels.size:
        raise ContractError(
            f"a micrograph is a two-dimensional uint8, uint16 or float32 array, got {pixels.dtype} {pixels.shape}"
        )
    remarks: list[str] = []
    if pixels.dtype == np.float32 and (undefined := int(np.count_nonzero(~np.isfinite(pixels)))):
        if undefined == pixels.size:
            raise ContractError("the micrograph holds no finite value; it cannot be shown or segmented")
        remarks.append(f"{undefined} of its pixels are NaN or infinite: NaN is taken as black")
    if intensity_range is None:
        intensity_range = FullScale()
    if isinstance(intensity_range, FullScale):
        if pixels.dtype == np.uint8 and intensity_range.whole:
            return Grey8(pixels, (0.0, 255.0))
        scale = _full_scale(pixels, intensity_range.bits)
        remarks += scale.remarks
        intensity_range = _shares(pixels, intensity_range, scale, remarks)
    if isinstance(intensity_range, Percentiles):
        black, white = _from_percentiles(pixels, intensity_range)
    else:
        black, white = map(float, intensity_range)
    if not (np.isfinite(black) and np.isfinite(white) and black < white):
        raise ContractError(f"the intensity range ({black}, {white}) is empty; give black < white, both finite")
    return Grey8(in_window(pixels, (black, white)), (black, white), tuple(remarks))


def in_window(pixels: npt.NDArray[Any], window: tuple[float, float]) -> npt.NDArray[np.uint8]:
    """Grey values ``[H, W]``, uint8, uint16 or float32, from the first of ``window``, black, to the second, white."""
    if pixels.dtype == np.float32:
        return _stretch(pixels, *window)
    if pixels.dtype == np.uint8 and window == (0, 255):
        return pixels
    levels = np.arange(np.iinfo(pixels.dtype).max + 1, dtype=np.float32)
    return _stretch(levels, *window)[pixels]


def range_of(record: IntensityRecord | None) -> Percentiles | FullScale | tuple[float, float]:
    """The intensity range of a model, for :func:`to_grey8`; full scale where it does not say."""
    if record is None:
        return FullScale()
    if record.unit == "percentile":
        return Percentiles(record.black, record.white)
    if record.unit == "value":
        return record.black, record.white
    return FullScale(record.black, record.white, record.bits)


def bit_depth(pixels: npt.NDArray[Any]) -> int | None:
    """The smallest usual depth that holds all values of an unsigned picture; None for floats."""
    if pixels.dtype.kind != "u":
        return None
    return _depth(int(pixels.max())) if pixels.size else DEPTHS[0]


def _depth(largest: int) -> int:
    return next(bits for bits in DEPTHS if largest < 1 << bits)


class _Scale(NamedTuple):
    white: float | None  # the value that the picture's depth makes white; None where nothing tells
    copy: bool = False  # of an 8-bit picture, level for level
    remarks: tuple[str, ...] = ()  # about a guess


def _shares(
    pixels: npt.NDArray[Any], shares: FullScale, scale: _Scale, remarks: list[str]
) -> Percentiles | tuple[float, float]:
    if scale.white is None:
        return _USUAL
    if shares.whole and not scale.copy:
        black, white = _from_percentiles(pixels, _USUAL)
        if white - black < _FLAT * scale.white:
            remarks.append(
                f"it uses {(white - black) / scale.white:.1%} of its full scale, which 8 bits would leave without "
                f"contrast: {black:g} to {white:g} is stretched; state an intensity range if it should not be"
            )
            return black, white
    return shares.black * scale.white, shares.white * scale.white


def _full_scale(pixels: npt.NDArray[Any], bits: int | None) -> _Scale:
    if pixels.dtype == np.uint8:
        return _Scale(255.0, copy=True)
    if pixels.dtype == np.uint16:
        return _full_scale_of_counts(pixels, bits, "16-bit")
    finite = pixels[np.isfinite(pixels)]
    lowest, highest = float(finite.min()), float(finite.max())
    if lowest >= 0 and 0.5 < highest <= 1:
        return _Scale(1.0, copy=bool(np.array_equal(finite * 255, np.rint(finite * 255))))
    if lowest >= 0 and 1 < highest <= 65535 and np.array_equal(finite, np.rint(finite)):
        return _full_scale_of_counts(finite.astype(np.uint16), bits, "float")
    if lowest >= 0 and 127 < highest <= 255:
        return _Scale(255.0)
    remark = (
        f"its values, {lowest:g} to {highest:g}, do not tell what is black and white: their 0.1 and 99.9 percentiles "
        "are taken; state an intensity range if the contrast means something"
    )
    return _Scale(None, remarks=(remark,))


def _full_scale_of_counts(counts: npt.NDArray[np.uint16], bits: int | None, kind: str) -> _Scale:
    largest, used_bits = int(counts.max()), int(np.bitwise_or.reduce(counts, axis=None))
    depth = max(_depth(largest), bits or 0)
    unused = (used_bits & -used_bits).bit_length() - 1  # low bits that are 0 everywhere
    if largest < 256 or unused < _SHIFTED:
        unused = 0
    elif (shifted := _depth(largest >> unused) + unused) in DEPTHS:
        depth = max(depth, shifted)  # so many bits, shifted up to fill the deeper ones
    if largest > 255 and not np.any(counts % 257):
        return _Scale(65535.0, copy=True)  # 8 bits, repeated in both bytes
    # Whole numbers up to 255 are bytes among floats; 16 bits with so little in them may be of any depth.
    certain = depth in (bits, DEPTHS[-1]) or (largest >= 1 << (depth - 1) and (depth > DEPTHS[0] or kind == "float"))
    white = float((1 << depth) - (1 << unused))
    remark = (
        f"its {kind} values reach {largest} only: taken as {depth} bits, {white:g} is white; "
        "state an intensity range if that is wrong"
    )
    return _Scale(white, depth - unused == DEPTHS[0], () if certain else (remark,))


def training_range(pictures: Any) -> tuple[IntensityRecord, tuple[str, ...]]:
    """What a model records that is trained on ``pictures`` (an iterable of arrays ``[H, W]``), and remarks.

    Full scale of the largest bit depth among them, so that a dark picture is not taken for one of fewer bits. Where
    all of them together use less than a quarter of it, what they do use, which 8 bits could not resolve otherwise.
    Floats of other units: the 0.1 and 99.9 percentiles of all pictures, as values.
    """
    depths: dict[int, int] = {}
    lowest, highest = np.inf, -np.inf  # of the pictures' percentiles: shares of full scale, or values
    values = False
    for pixels in pictures:
        full = _full_scale(pixels, None).white
        values |= full is None
        black, white = _from_percentiles(pixels, _USUAL)
        lowest, highest = min(lowest, black / (full or 1.0)), max(highest, white / (full or 1.0))
        depth = bit_depth(pixels) or 0
        depths[depth] = depths.get(depth, 0) + 1
    remarks: list[str] = []
    if len(depths) > 1:
        counted = ", ".join(f"{count} of {f'{depth} bits' if depth else 'floats'}" for depth, count in depths.items())
        remarks.append(f"pictures of different depth are mixed ({counted}): each is taken at its own full scale")
    if values:
        return IntensityRecord(unit="value", black=lowest, white=highest), tuple(remarks)
    bits = max(depths) or None
    if set(depths) != {DEPTHS[0]} and highest - lowest < _NARROW:
        remarks.append(f"pictures use {highest - lowest:.1%} of their full scale: that part becomes black to white")
        return IntensityRecord(black=max(0.0, lowest), white=highest, bits=bits), tuple(remarks)
    return IntensityRecord(bits=bits), tuple(remarks)


def _stretch(values: npt.NDArray[np.float32], black: float, white: float) -> npt.NDArray[np.uint8]:
    grey = np.empty(values.shape, np.uint8)
    step = max(1, _BLOCK * len(values) // values.size)  # rows at a time: the copies in 64 bits stay small
    for start in range(0, len(values), step):
        scaled = (values[start : start + step].astype(np.float64) - black) * (255.0 / (white - black))
        np.nan_to_num(scaled, copy=False, nan=0.0, posinf=255.0, neginf=0.0)
        grey[start : start + step] = np.rint(np.clip(scaled, 0, 255))
    return grey


def _from_percentiles(pixels: npt.NDArray[Any], percentiles: Percentiles) -> tuple[float, float]:
    if pixels.dtype == np.float32:
        # float64, so that the interpolation between extreme values cannot overflow
        finite = pixels[np.isfinite(pixels)].astype(np.float64)
        black, white = (float(value) for value in np.percentile(finite, (percentiles.black, percentiles.white)))
        lowest, highest = float(finite.min()), float(finite.max())
    else:
        below = np.cumsum(level_counts(pixels))
        black, white = _of_counts(below, percentiles.black), _of_counts(below, percentiles.white)
        lowest, highest = _of_counts(below, 0), _of_counts(below, 100)
    if black == white:  # flat but for rare pixels, or constant
        black, white = lowest, highest
    return (black, white) if black < white else (black, black + max(1.0, 1e-6 * abs(black)))


def level_counts(pixels: npt.NDArray[Any]) -> npt.NDArray[np.integer]:
    """Pixels of each level in ``[H, W]``, unsigned; block by block, since bincount makes 8 bytes of each value."""
    levels = np.iinfo(pixels.dtype).max + 1
    counts = np.zeros(levels, np.int64)
    rows = max(1, _BLOCK // max(1, pixels.shape[1]))
    for start in range(0, pixels.shape[0], rows):
        counts += np.bincount(pixels[start : start + rows].ravel(), minlength=levels)
    return counts


def _of_counts(below: npt.NDArray[np.integer], percent: float) -> float:
    """numpy's percentile (linear between ranks) from the counts of values up to each level: no sorting."""
    rank = percent / 100 * (int(below[-1]) - 1)
    first = int(rank)
    low, high = np.searchsorted(below, (first + 1, min(first + 2, int(below[-1]))))
    return float(low + (high - low) * (rank - first))
