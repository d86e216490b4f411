"""OME-TIFF: XML in the image description, Pixels PhysicalSizeX/Y with their units (micrometres by default).

OME schema 2016-06. The units "pixel" and "reference frame" are no lengths.
"""

from __future__ import annotations

import tifffile

from hpddrnet_trt.data.vendors.metadata import Planes, VendorMetadata, metres, number, whole
from hpddrnet_trt.data.vendors.texts import TooLarge, decoded, tag_bytes, xml_values

VENDOR = "OME-TIFF"
_DESCRIPTION = 270
_PIXELS = "OME/Image/Pixels"


def read(page: tifffile.TiffPage) -> list[VendorMetadata]:
    """VendorMetadata of the first image's Pixels element."""
    attributes = _pixels(page)
    if attributes is None:
        return []
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


def planes(page: tifffile.TiffPage) -> Planes | None:
    """How the first image's planes are ordered, as long as its TiffData elements do not say otherwise."""
    attributes = _pixels(page)
    if attributes is None:
        return None
    sizes = {axis: whole(attributes.get(f"Size{axis}")) or 1 for axis in "CZT"}
    order = attributes.get("DimensionOrder", "XYCZT")[2:]
    spacing = metres(number(attributes.get("PhysicalSizeZ")), attributes.get("PhysicalSizeZUnit", "µm"))
    return Planes(sizes, order if sorted(order) == ["C", "T", "Z"] else "CZT", spacing)


def _pixels(page: tifffile.TiffPage) -> dict[str, str] | None:
    """Attributes of the first Pixels element; None where there is no OME-XML."""
    try:
        content = tag_bytes(page, _DESCRIPTION)
    except TooLarge:
        return None  # a description may be anything
    if not content or b"<OME" not in content[:4096].replace(b"<OME:OME", b"<OME"):
        return None
    return xml_values(decoded(content), (_PIXELS,)).get(_PIXELS, ({}, ""))[0]
