"""What a decoder hands over: stored values, and the errors that all decoders share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import BadInputFile, one_line
from hpddrnet_trt.data.vendors.metadata import VendorMetadata

MAX_PIXELS = 1 << 30  # 32768 x 32768: larger than any single frame, smaller than a memory bomb
ORIENTATION = 274  # the tag, in TIFF as in EXIF
JPEG_PIXELS_PER_BYTE = 600  # each block of 64 pixels takes at least one bit; the rest is room


@dataclass(frozen=True)
class Decoded:
    """A file's stored values, before any interpretation.

    ``values``: ``[H, W]`` or ``[H, W, C]`` as stored (palette indices stay indices).
    ``palette``: uint8 ``[n, 3]`` RGB for palette files. ``alpha``: the last channel is opacity.
    ``inverted``: zero means white (TIFF MINISWHITE). ``bit_depth``: bits per sample in the file.
    ``pages``: full-size pictures in the file, of which this is the first. ``orientation``: as EXIF and TIFF count the
    eight ways of turning and mirroring; :func:`~hpddrnet_trt.data.decode.decode` gives the picture upright, with 1.
    ``metadata``: what the file's own metadata say about scale and information bar, best source first.
    """

    format: Literal["PNG", "JPEG", "BMP", "TIFF", "DM"]
    values: npt.NDArray[Any]
    bit_depth: int
    palette: npt.NDArray[np.uint8] | None = None
    alpha: bool = False
    inverted: bool = False
    pages: int = 1
    orientation: int = 1
    metadata: tuple[VendorMetadata, ...] = ()
    remarks: tuple[str, ...] = ()


def damaged(path: Path, what: str, reason: str) -> BadInputFile:
    """The error for a file whose content contradicts itself; ``reason`` becomes one line."""
    return BadInputFile(
        f"{what} {path} cannot be decoded ({one_line(reason)}); it is damaged or truncated: copy it again"
    )


def check_size(path: Path, what: str, width: int, height: int, max_pixels: int) -> None:
    """Raise :class:`BadInputFile` when the declared size is senseless or beyond ``max_pixels``."""
    if width < 1 or height < 1:
        raise damaged(path, what, f"its size is {width} x {height}")
    if width * height > max_pixels:
        raise BadInputFile(
            f"{what} {path} claims {width} x {height} pixels, more than the limit of {max_pixels}; "
            "cut it into smaller pictures if it is genuine"
        )
