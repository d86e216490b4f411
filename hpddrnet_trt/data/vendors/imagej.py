"""ImageJ, and plain resolution tags.

Facts: ImageJ writes "key=value" lines into the image description, among them the unit, and pixels per
unit into the resolution tags; an uncalibrated picture has the unit "pixel" or one pixel per unit. Without ImageJ's
description the resolution tags are almost always for a printer or a screen (72, 96, 300 dpi): only a
resolution that no printer has is taken for a calibration.
"""

from __future__ import annotations

import tifffile

from hpddrnet_trt.data.vendors.metadata import Planes, VendorMetadata, metres, number, whole
from hpddrnet_trt.data.vendors.texts import TooLarge, decoded, ini_sections, tag_bytes

VENDOR = "ImageJ"
_DESCRIPTION, _X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT = 270, 282, 283, 296
_UNIT_METRES = {2: 0.0254, 3: 0.01}
_NO_PRINTER = 1e-6  # metres per pixel: 25400 dpi, beyond film recorders
_PRINT_UNITS = ("inch", "inches", "in", "cm")  # what ImageJ makes of a print resolution
_ESCAPED_MICRO = "\\u00B5"


def read(page: tifffile.TiffPage) -> list[VendorMetadata]:
    """VendorMetadata of ImageJ's description."""
    values = _description(page)
    if not values:
        return []
    metadata = VendorMetadata(VENDOR)
    unit = values.get("unit", "").replace(_ESCAPED_MICRO, "µ")
    across, down = (_per_unit(page, code) for code in (_X_RESOLUTION, _Y_RESOLUTION))
    if unit not in _PRINT_UNITS and metres(1.0, unit) is not None and across:
        if across == 1:
            metadata.doubts.append(f"ImageJ says 1 pixel per {unit}, as for a picture without calibration")
        else:
            height = metres(1 / down, unit) if down else None
            metadata.add_size(metres(1 / across, unit), height, "ImageJ resolution and unit")
    return [metadata]


def read_resolution(page: tifffile.TiffPage) -> list[VendorMetadata]:
    """VendorMetadata of the resolution tags alone, where they cannot be meant for a printer."""
    unit = page.tags.valueof(_RESOLUTION_UNIT, 2)
    factor = _UNIT_METRES.get(unit) if isinstance(unit, int) else None
    across, down = (_per_unit(page, code) for code in (_X_RESOLUTION, _Y_RESOLUTION))
    if factor is None or not across or not down or factor / across > _NO_PRINTER:
        return []
    metadata = VendorMetadata()
    metadata.add_size(factor / across, factor / down, "TIFF resolution tags")
    return [metadata]


def images(page: tifffile.TiffPage) -> int:
    """How many images ImageJ says are in the file; it may keep all but the first without directories."""
    return whole(_description(page).get("images")) or 1


def planes(page: tifffile.TiffPage) -> Planes | None:
    """How ImageJ orders them: channels first, then slices, then frames."""
    values = _description(page)
    if not values:
        return None
    channels, slices, frames = (whole(values.get(key)) or 1 for key in ("channels", "slices", "frames"))
    unit = values.get("unit", "").replace(_ESCAPED_MICRO, "µ")
    return Planes({"C": channels, "Z": slices, "T": frames}, "CZT", metres(number(values.get("spacing")), unit))


def _description(page: tifffile.TiffPage) -> dict[str, str]:
    try:
        content = tag_bytes(page, _DESCRIPTION)
    except TooLarge:
        return {}
    if not content or not content.startswith(b"ImageJ="):
        return {}
    return dict(ini_sections(decoded(content))[""])


def _per_unit(page: tifffile.TiffPage, code: int) -> float | None:
    value = page.tags.valueof(code)
    if not isinstance(value, tuple) or len(value) != 2 or not value[1] or value[0] < 1:
        return None
    return float(value[0]) / float(value[1])
