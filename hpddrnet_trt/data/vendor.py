"""What the microscope wrote into its TIFF: pixel size and the strip below the picture.

Thermo Fisher / FEI keep an INI-like text in tag 34682, Zeiss SmartSEM in tag 34118; tifffile
parses both. Anything that is missing or contradicts the picture stays unknown: a wrong scale is
worse than none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tifffile

_METRES = {"m": 1.0, "mm": 1e-3, "µm": 1e-6, "um": 1e-6, "nm": 1e-9, "pm": 1e-12, "fm": 1e-15}
_ZEISS_UNNAMED_PIXEL_SIZE = 3  # position in SmartSEM's unnamed list: the same size with more digits


@dataclass(frozen=True)
class VendorInfo:
    """``pixel_size_m``: metres per stored pixel; ``picture_rows``: rows above the information bar."""

    pixel_size_m: float | None = None
    picture_rows: int | None = None
    remarks: tuple[str, ...] = ()


def read_vendor_info(tif: tifffile.TiffFile) -> VendorInfo:
    """Read FEI or Zeiss metadata of the file's first page; unknown vendors give an empty record."""
    page = tif.pages.first
    if tif.is_fei and tif.fei_metadata:
        return _fei(tif.fei_metadata, page.imagewidth, page.imagelength)
    if tif.is_sem and tif.sem_metadata:
        return _zeiss(tif.sem_metadata, page.imagewidth, page.imagelength)
    return VendorInfo()


def _fei(metadata: Mapping[str, Any], width: int, height: int) -> VendorInfo:
    image = _section(metadata, "Image")
    columns, rows = image.get("ResolutionX"), image.get("ResolutionY")
    if isinstance(columns, int) and columns > 0 and columns != width:
        return VendorInfo(
            remarks=(f"resized after acquisition ({columns} to {width} columns): its pixel size is unknown",)
        )
    # The beam's own section comes first: in a dual beam the other one may hold an older scan.
    active = str(_section(metadata, "Beam").get("Scan", ""))
    sizes = (
        _positive(_section(metadata, name).get("PixelWidth")) for name in (active, "Scan", "EScan", "IScan")
    )
    size = next((value for value in sizes if value is not None), None)
    picture_rows = rows if isinstance(rows, int) and 0 < rows < height else None
    return VendorInfo(size, picture_rows)


def _zeiss(metadata: Mapping[Any, Any], width: int, height: int) -> VendorInfo:
    stored = _entry(metadata, "dp_image_store")
    numbers = [int(part) for part in str(stored[0]).split("*") if part.strip().isdigit()] if stored else []
    if len(numbers) == 2 and numbers != [width, height]:
        return VendorInfo(
            remarks=(
                f"resized after acquisition ({numbers[0]} x {numbers[1]} to {width} x {height}): "
                "its pixel size is unknown",
            )
        )
    # ap_image_pixel_size is the stored picture's; ap_pixel_size follows the live scan.
    entry = _entry(metadata, "ap_image_pixel_size")
    if len(entry) < 2 or entry[1] not in _METRES:
        return VendorInfo()
    value = _positive(entry[0])
    if value is None:
        return VendorInfo()
    named = value * _METRES[entry[1]]
    unnamed = metadata.get("", ())
    if len(unnamed) > _ZEISS_UNNAMED_PIXEL_SIZE:
        precise = _positive(unnamed[_ZEISS_UNNAMED_PIXEL_SIZE])
        if precise is not None and math.isclose(precise, named, rel_tol=1e-3):
            return VendorInfo(precise)
    return VendorInfo(named)


def _section(metadata: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = metadata.get(name)
    return section if isinstance(section, Mapping) else {}


def _entry(metadata: Mapping[Any, Any], key: str) -> tuple[Any, ...]:
    """SmartSEM entries are (label, value[, unit]); return (value[, unit])."""
    entry = metadata.get(key)
    return tuple(entry[1:]) if isinstance(entry, tuple) else ()


def _positive(value: Any) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0:
        return float(value)
    return None
