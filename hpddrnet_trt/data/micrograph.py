"""Micrographs: from a file to a two-dimensional grey picture."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import BadInputFile, UsageError
from hpddrnet_trt.core.magnification import plausible
from hpddrnet_trt.data import vendors
from hpddrnet_trt.data.decode import decode, stored_size
from hpddrnet_trt.data.decoded import MAX_PIXELS, Decoded
from hpddrnet_trt.data.description import FILE_NAME, stated_pixel_size
from hpddrnet_trt.data.info_bar import find_info_bar, has_drawn_rows

log = logging.getLogger(__name__)

InfoBar = Literal["auto", "metadata", "none"] | int
_COLOR_TOLERANCE = 2  # of 255: grey JPEGs come back with channels a step apart
_BAR_ROUNDING = 2  # rows by which metadata and picture may differ about the same bar


@dataclass(frozen=True)
class Micrograph:
    """One grey picture as acquired, from a file or live: ``Micrograph(frame, pixel_size_m=5e-9)``.

    ``pixels``: ``[H, W]``, uint8, uint16 or float32, the information bar already cut off.
    ``source``: the file, None for a live frame. ``pixel_size_m``: metres per pixel, None when unknown.
    ``info_bar_rows``: the rows ``(first, last + 1)`` of the file that held the bar, None when there was
    none or it is unknown. ``remarks``: what was done to the picture that its owner should know.
    ``vendor``: who wrote the metadata, such as "Zeiss". ``pixel_size_source``: where the pixel size was found.
    """

    pixels: npt.NDArray[Any]
    source: Path | None = None
    pixel_size_m: float | None = None
    info_bar_rows: tuple[int, int] | None = None
    remarks: tuple[str, ...] = ()
    vendor: str | None = None
    pixel_size_source: str | None = None


def read_micrograph(
    path: str | Path, *, max_pixels: int = MAX_PIXELS, info_bar: InfoBar = "auto", page: int | None = None
) -> Micrograph:
    """Read a PNG, JPEG, BMP, TIFF (8-bit, 16-bit, float, 1-bit, palette, RGB(A)), dm3 or dm4 file as a grey picture.

    RGB whose channels are equal becomes that grey; real colour becomes luminance (ITU-R BT.601)
    with a remark. Other integer and float types become float32. The pixel size comes from the metadata of
    Thermo Fisher/FEI, Zeiss, TESCAN, Hitachi, JEOL, Gatan, OME-TIFF and ImageJ, in the file or beside it
    (:mod:`hpddrnet_trt.data.vendors`), and is None when unknown or contradicted. Of a dataset's picture, what its
    ``dataset.json`` states comes first.

    ``info_bar``: what is cut off below. ``"auto"``: what the metadata say, checked against the picture, or else a
    bar found in the picture; ``"metadata"``: only what they say; ``"none"``: nothing; a number: that many rows are
    kept. ``page``: which slice of a stack (:mod:`hpddrnet_trt.data.stack`); by default a file's first picture. Remarks
    are also logged.

    Raises :class:`BadInputFile` for anything that cannot be read, :class:`UsageError` for a senseless ``info_bar``
    and :class:`~hpddrnet_trt.core.errors.MissingDependency` for a dm3 or dm4 file without the extra ``dm``.
    """
    path = Path(path)
    check_info_bar(info_bar)
    decoded = decode(path, "micrograph", max_pixels, page)
    pixels, picture_remarks = grey_pixels(decoded, path)
    height, width = pixels.shape
    info = vendors.resolve([*decoded.metadata, *vendors.read_sidecars(path, (width, height))])
    kept, bar_remarks, rescaled = _picture_rows(pixels, info, info_bar, path)
    remarks = [*decoded.remarks, *info.remarks, *picture_remarks, *bar_remarks]
    size = (None, None) if rescaled else (info.pixel_size_m, info.pixel_size_source)
    stated = stated_pixel_size(path)
    if stated is not None and plausible(stated):
        size = stated, FILE_NAME
    elif stated is not None:
        remarks.append(f"{FILE_NAME} states pixels of {stated:g} m, which no microscope has: this is passed over")
    bar = (kept, height) if kept < height else None
    if bar is not None:
        remarks.append(f"the information bar (rows {bar[0]} to {bar[1] - 1}) is cut off")
    for remark in remarks:
        log.warning("%s: %s", path, remark)
    return Micrograph(np.ascontiguousarray(pixels[:kept]), path, size[0], bar, tuple(remarks), info.vendor, size[1])


class Stored(NamedTuple):
    """A picture by its header alone: stored size with the information bar, metres per pixel or None."""

    width: int
    height: int
    pixel_size_m: float | None


def stored_picture(path: Path) -> Stored:
    """What is known of a picture before it is decoded; raises :class:`BadInputFile` as :func:`read_micrograph` does."""
    width, height, metadata = stored_size(path)
    info = vendors.resolve([*metadata, *vendors.read_sidecars(path, (width, height))])
    return Stored(width, height, info.pixel_size_m)


def check_info_bar(info_bar: InfoBar) -> None:
    """Raise :class:`UsageError` for what :func:`read_micrograph` cannot make sense of."""
    if not (info_bar in ("auto", "metadata", "none") or (type(info_bar) is int and info_bar > 0)):
        raise UsageError(f'info_bar is "auto", "metadata", "none" or a number of rows to keep, not {info_bar!r}')


def _picture_rows(
    pixels: npt.NDArray[Any], info: vendors.VendorInfo, info_bar: InfoBar, path: Path
) -> tuple[int, list[str], bool]:
    """Rows above the information bar, remarks, and whether the bar proves that the picture was rescaled."""
    height = pixels.shape[0]
    stated = height if info.picture_rows is None else info.picture_rows
    if isinstance(info_bar, int):
        if info_bar > height:
            raise UsageError(f"{info_bar} rows cannot be kept of {path}, which has {height}")
        return info_bar, [], False
    if info_bar == "none":
        return height, [], False
    if info_bar == "metadata":
        return stated, [], False
    first_row = find_info_bar(pixels)
    if first_row is None:
        if stated == height or info.rows_follow or has_drawn_rows(pixels, stated):
            return stated, [], False
        claim = f"its metadata state an information bar of {height - stated} rows but there is none: nothing is cut off"
        return height, [claim], False
    if info.picture_rows is None or abs(first_row - stated) <= _BAR_ROUNDING:
        return (first_row if info.picture_rows is None else stated), [], False
    remark = f"its metadata say that the information bar begins at row {stated}, the picture says {first_row}"
    if info.rows_follow or info.pixel_size_m is None:
        return first_row, [remark], False
    return first_row, [f"{remark}: resized after acquisition, its pixel size is unknown"], True


def grey_pixels(decoded: Decoded, path: Path) -> tuple[npt.NDArray[Any], list[str]]:
    """Pixels ``[H, W]``, uint8, uint16 or float32, of what a decoder gave, and remarks on how they became grey.

    Raises :class:`BadInputFile` for values that are no picture's.
    """
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
        values, colour = _grey_of_channels(values, path)
        if colour:
            remarks.append("it has real colour (not a plain micrograph?): its luminance is used")
    if decoded.inverted:
        values = (np.iinfo(values.dtype).max if values.dtype.kind == "u" else values.max()) - values
    return values, remarks


def _apply_palette(indices: npt.NDArray[Any], palette: npt.NDArray[np.uint8], path: Path) -> npt.NDArray[np.uint8]:
    if indices.dtype == bool:
        indices = indices.astype(np.uint8)
    if indices.dtype.kind != "u":
        raise BadInputFile(f"micrograph {path} has a palette for {indices.dtype} values; save it as a grey picture")
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


def _grey_of_channels(values: npt.NDArray[Any], path: Path) -> tuple[npt.NDArray[Any], bool]:
    """Reduce ``[H, W, C]`` to grey; the flag says whether there was real colour."""
    if values.shape[2] == 1:
        return values[..., 0], False
    if values.shape[2] != 3:
        raise BadInputFile(
            f"micrograph {path} has {values.shape[2]} channels; save the one to segment as a grey picture"
        )
    spread = values.max(axis=2) - values.min(axis=2)
    full = {"u1": 255.0, "u2": 65535.0}.get(values.dtype.str[1:], float(np.nanmax(np.abs(values))))
    colour = bool(np.nanmax(spread) > _COLOR_TOLERANCE * full / 255)
    if not np.any(spread):
        return values[..., 0], False  # exact for floats too
    return luminance(values), colour


def luminance(rgb: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Grey (ITU-R BT.601) of ``[H, W, 3]`` uint8, uint16, float32, in that type; grey of 8 and 16 bits stays exact."""
    return cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2GRAY)
