"""OME-TIFF: XML in the image description, Pixels PhysicalSizeX/Y with their units (micrometres by default).

OME schema 2016-06. The units "pixel" and "reference frame" are no lengths.
"""

from __future__ import annotations

import tifffile

from hpddrnet_trt.data.vendors.metadata import VendorMetadata, metres, number, whole
from hpddrnet_trt.data.vendors.texts import TooLarge, decoded, tag_bytes, xml_values

VENDOR = "OME-TIFF"
_DESCRIPTION = 270
_PIXELS = "OME/Image/Pixels"


def read(page: tifffile.TiffPage) -> list[VendorMetadata]:
    """VendorMetadata of the first image's Pixels element."""
    try:
        content = tag_bytes(page, _DESCRIPTION)
    except TooLarge:
        return []  # a description may be anything
    if not content or b"<OME" not in content[:4096].replace(b"<OME:OME", b"<OME"):
        return []
    attributes, _ = xml_values(decoded(content), (_PIXELS,)).get(_PIXELS, ({}, ""))
    sizes = [
        metres(number(attributes.get(f"PhysicalSize{axis}")), attributes.get(f"PhysicalSize{axis}Unit", "µm"))
        for axis in "XY"
    ]
    metadata = VendorMetadata(VENDOR)
    metadata.add_size(sizes[0], sizes[1], f"{_PIXELS} PhysicalSizeX")
    columns, rows = (whole(attributes.get(f"Size{axis}")) for axis in "XY")
    metadata.check_acquired((columns, rows), (page.imagewidth, page.imagelength))
    metadata.picture_rows = None  # OME-XML counts all rows: fewer of them are no bar
    if columns == page.imagewidth and rows != page.imagelength:
        metadata.doubts.append(f"its OME-XML describes {rows} rows, not {page.imagelength}")
    return [metadata]
