"""Micrographs: from a file to a two-dimensional grey picture, and from any depth to 8 bits.

Masks and drawings of labels live in :mod:`hpddrnet_trt.data.labels` and are offered here too.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from hpddrnet_trt.data.decode import MAX_PIXELS, Decoded, decode
from hpddrnet_trt.data.labels import overlay, read_mask, write_label_png, write_label_tiff, write_labels
from hpddrnet_trt.errors import BadInputFile, ContractError

__all__ = [
    "Micrograph",
    "overlay",
    "read_mask",
    "read_micrograph",
    "to_grey8",
    "write_label_png",
    "write_label_tiff",
    "write_labels",
]

log = logging.getLogger(__name__)

PERCENTILES = (0.1, 99.9)  # of the default grey window: hot pixels and dead corners stay outside
_COLOUR_TOLERANCE = 2  # of 255: grey JPEGs come back with channels a step apart


@dataclass(frozen=True)
class Micrograph:
    """One grey picture as acquired.

    ``pixels``: ``[H, W]``, uint8, uint16 or float32, the information bar already cut off.
    ``pixel_size_m``: metres per pixel, None when unknown. ``info_bar_rows``: the rows
    ``(first, last + 1)`` of the file that held the bar, None when there was none or it is unknown.
    ``remarks``: what was done to the picture that its owner should know.
    """

    pixels: npt.NDArray[Any]
    source: Path
    pixel_size_m: float | None = None
    info_bar_rows: tuple[int, int] | None = None
    remarks: tuple[str, ...] = ()


def read_micrograph(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Micrograph:
    """Read a PNG, JPEG or TIFF (8-bit, 16-bit, float, 1-bit, palette, RGB(A)) as a grey picture.

    RGB whose channels are equal becomes that grey; real colour becomes luminance (ITU-R BT.601)
    with a remark. Other integer and float types become float32. The pixel size and the information bar come
    from FEI and Zeiss tags. Remarks are also logged.

    Raises :class:`BadInputFile` for anything that cannot be read.
    """
    path = Path(path)
    decoded = decode(path, "micrograph", max_pixels)
    pixels, remarks = _grey(decoded, path)
    info = decoded.vendor
    bar = None
    if info.picture_rows is not None:
        bar = (info.picture_rows, pixels.shape[0])
        pixels = pixels[: info.picture_rows]
        remarks.append(f"the information bar (rows {bar[0]} to {bar[1] - 1}) is cut off")
    remarks = [*decoded.remarks, *info.remarks, *remarks]
    for remark in remarks:
        log.warning("%s: %s", path, remark)
    return Micrograph(np.ascontiguousarray(pixels), path, info.pixel_size_m, bar, tuple(remarks))


def _grey(decoded: Decoded, path: Path) -> tuple[npt.NDArray[Any], list[str]]:
    remarks: list[str] = []
    values = decoded.values
    if decoded.palette is not None:
        values = _apply_palette(values, decoded.palette, path)
    if values.ndim == 3 and decoded.alpha and values.shape[2] > 1:
        if values[..., -1].min() != values[..., -1].max():
            remarks.append("its opacity channel is ignored")
        values = values[..., :-1]
    values = _supported_type(values, path)
    if decoded.palette is None and 1 < decoded.bit_depth < 8:  # 4-bit grey, stored as 0..15
        values = values * np.uint8(255 // ((1 << decoded.bit_depth) - 1))
    if values.ndim == 3:
        values, colour = _luminance(values, path)
        if colour:
            remarks.append("it has real colour (not a plain micrograph?): its luminance is used")
    if decoded.inverted:
        values = (np.iinfo(values.dtype).max if values.dtype.kind == "u" else values.max()) - values
    return values, remarks


def _apply_palette(indices: npt.NDArray[Any], palette: npt.NDArray[np.uint8], path: Path) -> npt.NDArray[np.uint8]:
    if indices.size and int(indices.max()) >= len(palette):
        raise BadInputFile(f"micrograph {path} uses colour {int(indices.max())} of a palette of {len(palette)}")
    return palette[indices]


def _supported_type(values: npt.NDArray[Any], path: Path) -> npt.NDArray[Any]:
    if values.dtype == bool:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return values.astype(np.uint16, copy=False)  # native byte order
    if values.dtype.kind == "i" and values.dtype.itemsize == 2 and values.min() >= 0:
        return values.astype(np.uint16)
    if values.dtype.kind in "uif":
        with np.errstate(over="ignore"):  # float64 beyond float32 becomes inf, which to_grey8 leaves out
            return values.astype(np.float32)
    raise BadInputFile(f"micrograph {path} holds {values.dtype} values; save it as 8-bit, 16-bit or float grey")


def _luminance(values: npt.NDArray[Any], path: Path) -> tuple[npt.NDArray[Any], bool]:
    """Reduce ``[H, W, C]`` to grey; the flag says whether there was real colour."""
    if values.shape[2] == 1:
        return values[..., 0], False
    if values.shape[2] != 3:
        raise BadInputFile(
            f"micrograph {path} has {values.shape[2]} channels; save the one to segment as a grey picture"
        )
    values = np.ascontiguousarray(values)
    spread = values.max(axis=2) - values.min(axis=2)
    full = {"u1": 255.0, "u2": 65535.0}.get(values.dtype.str[1:], float(np.nanmax(np.abs(values))))
    colour = bool(np.nanmax(spread) > _COLOUR_TOLERANCE * full / 255)
    if not np.any(spread):
        return values[..., 0], False  # exact for floats too
    return cv2.cvtColor(values, cv2.COLOR_RGB2GRAY), colour


def to_grey8(
    pixels: npt.NDArray[Any], window: tuple[float, float] | None = None
) -> tuple[npt.NDArray[np.uint8], tuple[float, float]]:
    """Map grey values linearly to 0..255; returns the uint8 ``[H, W]`` picture and the window used.

    ``window = (black, white)`` in the picture's own units; values outside are clipped, NaN is
    black. Without a window 8-bit pictures pass unchanged, with ``(0, 255)``, and others get their
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
        window = _default_window(pixels)
    black, white = float(window[0]), float(window[1])
    if not (np.isfinite(black) and np.isfinite(white) and black < white):
        raise ContractError(f"the grey window ({black}, {white}) is empty; give black < white, both finite")
    if pixels.dtype == np.float32:
        return _stretch(pixels, black, white), (black, white)
    levels = np.arange(np.iinfo(pixels.dtype).max + 1, dtype=np.float32)
    return _stretch(levels, black, white)[pixels], (black, white)


def _stretch(values: npt.NDArray[np.float32], black: float, white: float) -> npt.NDArray[np.uint8]:
    scaled = (values.astype(np.float64) - black) * (255.0 / (white - black))
    np.nan_to_num(scaled, copy=False, nan=0.0, posinf=255.0, neginf=0.0)
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


def _default_window(pixels: npt.NDArray[Any]) -> tuple[float, float]:
    # float64, so that the interpolation between extreme values cannot overflow
    finite = pixels[np.isfinite(pixels)].astype(np.float64) if pixels.dtype == np.float32 else pixels
    if not finite.size:
        raise ContractError("the micrograph holds no finite value; it cannot be shown or segmented")
    black, white = (float(value) for value in np.percentile(finite, PERCENTILES))
    if black == white:  # flat but for rare pixels, or constant
        black, white = float(finite.min()), float(finite.max())
    return (black, white) if black < white else (black, black + max(1.0, 1e-6 * abs(black)))
