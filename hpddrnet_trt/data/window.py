"""One grey window per image: from any depth to 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import ContractError


@dataclass(frozen=True)
class Percentiles:
    """A grey window by the share of pixels, in percent, that lie below ``black`` and below ``white``."""

    black: float
    white: float

    def __post_init__(self) -> None:
        if not 0 <= self.black < self.white <= 100:
            raise ContractError(
                f"grey window percentiles are 0 <= black < white <= 100, not {self.black:g} and {self.white:g}"
            )


DEFAULT = Percentiles(0.1, 99.9)  # hot pixels and dead corners stay outside
_BLOCK = 1 << 20  # pixels
Window = tuple[float, float] | Percentiles | None


def to_grey8(
    pixels: npt.NDArray[Any], window: Window = None
) -> tuple[npt.NDArray[np.uint8], tuple[float, float]]:
    """Map grey values linearly to 0..255; returns the uint8 ``[H, W]`` picture and the window used.

    ``window = (black, white)`` in the picture's own units; values outside are clipped, NaN is
    black. ``Percentiles(1, 99)`` takes the window from this picture, also from an 8-bit one. Without a
    window 8-bit pictures pass unchanged (the same array), with ``(0, 255)``, and others get their
    0.1 and 99.9 percentiles. Give the same window to every picture of a series or mosaic.

    Raises :class:`ContractError` for arrays that are not grey pictures and for an empty window.
    """
    if pixels.ndim != 2 or pixels.dtype not in (np.uint8, np.uint16, np.float32) or not pixels.size:
        raise ContractError(
            f"a micrograph is a two-dimensional uint8, uint16 or float32 array, got {pixels.dtype} {pixels.shape}"
        )
    if window is None:
        if pixels.dtype == np.uint8:
            return pixels, (0.0, 255.0)
        window = DEFAULT
    black, white = _from_percentiles(pixels, window) if isinstance(window, Percentiles) else map(float, window)
    if not (np.isfinite(black) and np.isfinite(white) and black < white):
        raise ContractError(f"the grey window ({black}, {white}) is empty; give black < white, both finite")
    if pixels.dtype == np.float32:
        return _stretch(pixels, black, white), (black, white)
    levels = np.arange(np.iinfo(pixels.dtype).max + 1, dtype=np.float32)
    return _stretch(levels, black, white)[pixels], (black, white)


def _stretch(values: npt.NDArray[np.float32], black: float, white: float) -> npt.NDArray[np.uint8]:
    found = np.empty(values.shape, np.uint8)
    step = max(1, _BLOCK * len(values) // values.size)  # rows at a time: the copies in 64 bits stay small
    for start in range(0, len(values), step):
        scaled = (values[start : start + step].astype(np.float64) - black) * (255.0 / (white - black))
        np.nan_to_num(scaled, copy=False, nan=0.0, posinf=255.0, neginf=0.0)
        found[start : start + step] = np.rint(np.clip(scaled, 0, 255))
    return found


def _from_percentiles(pixels: npt.NDArray[Any], window: Percentiles) -> tuple[float, float]:
    if pixels.dtype == np.float32:
        # float64, so that the interpolation between extreme values cannot overflow
        finite = pixels[np.isfinite(pixels)].astype(np.float64)
        if not finite.size:
            raise ContractError("the micrograph holds no finite value; it cannot be shown or segmented")
        black, white = (float(value) for value in np.percentile(finite, (window.black, window.white)))
        lowest, highest = float(finite.min()), float(finite.max())
    else:
        below = np.cumsum(_counts(pixels))
        black, white = _of_counts(below, window.black), _of_counts(below, window.white)
        lowest, highest = _of_counts(below, 0), _of_counts(below, 100)
    if black == white:  # flat but for rare pixels, or constant
        black, white = lowest, highest
    return (black, white) if black < white else (black, black + max(1.0, 1e-6 * abs(black)))


def _counts(pixels: npt.NDArray[Any]) -> npt.NDArray[np.integer]:
    """Pixels of each level, block by block: bincount makes 8 bytes of each value."""
    levels = np.iinfo(pixels.dtype).max + 1
    counts = np.zeros(levels, np.int64)
    rows = max(1, _BLOCK // pixels.shape[1])
    for start in range(0, pixels.shape[0], rows):
        counts += np.bincount(pixels[start : start + rows].ravel(), minlength=levels)
    return counts


def _of_counts(below: npt.NDArray[np.integer], percent: float) -> float:
    """numpy's percentile (linear between ranks) from the counts of values up to each level: no sorting."""
    rank = percent / 100 * (int(below[-1]) - 1)
    first = int(rank)
    low, high = np.searchsorted(below, (first + 1, min(first + 2, int(below[-1]))))
    return float(low + (high - low) * (rank - first))
