"""From a PNG, JPEG or TIFF file to an array, with every failure turned into one sentence.

The format is told by the file's first bytes, not by its name. Sizes are checked against a limit
before anything is decompressed, and only these three decoders can ever be reached.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image, JpegImagePlugin, PngImagePlugin

from hpddrnet_trt.data import vendor
from hpddrnet_trt.errors import BadInputFile
from hpddrnet_trt.files import existing_file

MAX_PIXELS = 1 << 30  # 32768 x 32768: larger than any single frame, smaller than a memory bomb
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_SIGNATURE = b"\xff\xd8\xff"
_TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG_GREY, _PNG_PALETTE = 0, 3  # colour types in a PNG header


@dataclass(frozen=True)
class Decoded:
    """A file's stored values, before any interpretation.

    ``values``: ``[H, W]`` or ``[H, W, C]`` as stored (palette indices stay indices).
    ``palette``: uint8 ``[n, 3]`` RGB for palette files. ``alpha``: the last channel is opacity.
    ``inverted``: zero means white (TIFF MINISWHITE). ``bit_depth``: bits per sample in the file.
    """

    format: Literal["PNG", "JPEG", "TIFF"]
    values: npt.NDArray[Any]
    bit_depth: int
    palette: npt.NDArray[np.uint8] | None = None
    alpha: bool = False
    inverted: bool = False
    vendor: vendor.VendorInfo = field(default_factory=vendor.VendorInfo)
    remarks: tuple[str, ...] = ()


def decode(path: str | Path, what: str = "micrograph", max_pixels: int = MAX_PIXELS) -> Decoded:
    """Decode one file; ``what`` names it in errors ("micrograph", "mask").

    Raises :class:`BadInputFile` when the file is missing, unreadable, truncated, of another
    format, or has more than ``max_pixels`` pixels.
    """
    path = existing_file(path, what)
    try:
        with path.open("rb") as stream:
            head = stream.read(32)
        if head.startswith(_PNG_SIGNATURE):
            return _decode_png(path, what, max_pixels)
        if head.startswith(_JPEG_SIGNATURE):
            return _decode_jpeg(path, what, max_pixels)
        if head.startswith(_TIFF_SIGNATURES):
            return _decode_tiff(path, what, max_pixels)
    except BadInputFile:
        raise
    except MemoryError as exc:
        raise BadInputFile(f"{what} {path} does not fit into memory; cut it into smaller pictures") from exc
    except PermissionError as exc:
        raise BadInputFile(f"{what} {path} may not be read ({exc.strerror}); change its permissions") from exc
    except Exception as exc:  # damaged files raise whatever the decoders stumble over; the cause is kept
        raise _damaged(path, what, f"{type(exc).__name__}: {exc}") from exc
    if not head:
        raise BadInputFile(f"{what} {path} is an empty file; copy it again")
    raise BadInputFile(f"{what} {path} is neither PNG, JPEG nor TIFF; convert it to one of these")


def _damaged(path: Path, what: str, reason: str) -> BadInputFile:
    return BadInputFile(f"{what} {path} cannot be decoded ({reason}); it is damaged or truncated: copy it again")


def _check_size(path: Path, what: str, width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise _damaged(path, what, f"its size is {width} x {height}")
    if width * height > max_pixels:
        raise BadInputFile(
            f"{what} {path} claims {width} x {height} pixels, more than the limit of {max_pixels}; "
            "cut it into smaller pictures if it is genuine"
        )


def _decode_png(path: Path, what: str, max_pixels: int) -> Decoded:
    content = path.read_bytes()
    # The plugin's class, not Image.open: that has a global limit of its own and would guess formats.
    with PngImagePlugin.PngImageFile(io.BytesIO(content)) as image:
        _check_size(path, what, image.width, image.height, max_pixels)
        bit_depth, colour_type = content[24], content[25]
        image.load()
        if bit_depth == 16 and colour_type != _PNG_GREY:
            values = _deep_colour_png(content)
        elif image.mode == "I":
            values = np.asarray(image).astype(np.uint16)
        else:
            values = np.asarray(image)
        palette = None
        if colour_type == _PNG_PALETTE:
            palette = np.array(image.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)
    if colour_type == _PNG_GREY and 1 < bit_depth < 8:
        values = values // (255 // ((1 << bit_depth) - 1))  # Pillow stretches 2 and 4 bits to 0..255
    return Decoded("PNG", values, bit_depth, palette, alpha=colour_type in (4, 6))


def _deep_colour_png(content: bytes) -> npt.NDArray[Any]:
    """16-bit colour or grey + alpha, which Pillow would cut to 8 bits; RGB(A) order."""
    values = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None:
        raise ValueError("the 16-bit PNG decoder refused it")
    return cv2.cvtColor(values, cv2.COLOR_BGRA2RGBA if values.shape[2] == 4 else cv2.COLOR_BGR2RGB)


def _decode_jpeg(path: Path, what: str, max_pixels: int) -> Decoded:
    with JpegImagePlugin.JpegImageFile(str(path)) as image:
        _check_size(path, what, image.width, image.height, max_pixels)
        image.load()
        plain: Image.Image = image if image.mode in {"L", "RGB"} else image.convert("RGB")
        return Decoded("JPEG", np.asarray(plain), 8)


def _decode_tiff(path: Path, what: str, max_pixels: int) -> Decoded:
    with tifffile.TiffFile(path) as tif:
        page = tif.pages.first
        _check_size(path, what, page.imagewidth, page.imagelength, max_pixels)
        end = tif.filehandle.size
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False):
            if offset + count > end:
                raise _damaged(path, what, f"its pixel data should reach byte {offset + count} but the file has {end}")
        values = page.asarray()
        remarks = []
        axes = page.axes
        if axes[0] == "Z":
            remarks.append(f"the first of {values.shape[0]} planes is used")
            values, axes = values[0], axes[1:]
        if axes[0] == "S":
            values = np.moveaxis(values, 0, -1)
        if values.ndim not in (2, 3):
            raise _damaged(path, what, f"its pixel array has the shape {values.shape}")
        pages = _image_count(tif)
        if pages > 1:
            remarks.append(f"the first of {pages} pages is used")
        palette = None
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE and page.colormap is not None:
            palette = (page.colormap >> 8).astype(np.uint8).T
        return Decoded(
            "TIFF",
            values,
            int(page.bitspersample),
            palette,
            alpha=values.ndim == 3 and _has_opacity(page),
            inverted=page.photometric == tifffile.PHOTOMETRIC.MINISWHITE,
            vendor=vendor.read_vendor_info(tif),
            remarks=tuple(remarks),
        )


def _has_opacity(page: tifffile.TiffPage) -> bool:
    """One extra sample that is declared as opacity, or is left unnamed after red, green and blue."""
    declared = {tifffile.EXTRASAMPLE.ASSOCALPHA, tifffile.EXTRASAMPLE.UNASSALPHA}
    extra = tuple(page.extrasamples)
    return len(extra) == 1 and (extra[0] in declared or page.photometric == tifffile.PHOTOMETRIC.RGB)


def _image_count(tif: tifffile.TiffFile) -> int:
    """Images of full size in the file: thumbnails do not count, ImageJ's hidden planes do."""
    pages = sum(1 for page in tif.pages if not getattr(page, "is_reduced", False))
    imagej = tif.imagej_metadata or {}
    return max(pages, int(imagej.get("images", 1)))
