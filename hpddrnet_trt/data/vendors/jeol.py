"""JEOL: NAME.txt beside the picture, lines "$CM_NAME value" and "$$SM_NAME value".

Facts: $CM_FULL_SIZE is the scanned picture, so a taller file (1280 x 1024 for 1280 x 960) carries the
information bar below it. $$SM_MICRON_BAR is the scale bar's length in whole pixels and
$$SM_MICRON_MARKER what it stands for ("5um"): their quotient is as exact as a pixel in the bar.
Newer software adds $CM_PIXEL_SIZE with a unit, and writes one $ where there were two.
"""

from __future__ import annotations

import math

from hpddrnet_trt.data.vendors.metadata import VendorMetadata, length, number, whole

VENDOR = "JEOL"
MARKS = (b"$CM_",)
_BAR_ROUNDING = 2.0  # pixels: both ends of a drawn bar


def read_sidecar_text(text: str, name: str, stored: tuple[int, int]) -> VendorMetadata | None:
    """VendorMetadata of the text file called ``name``; None when it is not JEOL's."""
    values: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.strip().partition(" ")
        if key.startswith("$"):
            values.setdefault(key.lstrip("$"), value.strip())
    if not any(key.startswith("CM_") for key in values):
        return None
    metadata = VendorMetadata(VENDOR)
    stated = length(values.get("CM_PIXEL_SIZE"))
    marker, bar = length(values.get("SM_MICRON_MARKER")), number(values.get("SM_MICRON_BAR"))
    drawn = marker / bar if marker is not None and bar is not None and bar >= 1 else None
    if stated is not None and drawn is not None and bar is not None:
        if not math.isclose(stated, drawn, rel_tol=_BAR_ROUNDING / bar):
            metadata.doubts.append(f"{name} states {stated:.6g} m but draws a scale bar of {drawn:.6g} m per pixel")
        drawn = None  # the same, with fewer digits
    metadata.add_size(stated, None, f"JEOL {name} $CM_PIXEL_SIZE")
    metadata.add_size(drawn, None, f"JEOL {name} $$SM_MICRON_MARKER / $$SM_MICRON_BAR")
    columns, _, rows = values.get("CM_FULL_SIZE", values.get("CM_IMAGE_SIZE", "")).partition(" ")
    metadata.check_acquired((whole(columns), whole(rows)), stored)
    return metadata
