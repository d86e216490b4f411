"""OpenFIBSEM: JSON in the image description, ``pixel_size`` in metres (fibsem.structures.FibsemImage.save)."""

from __future__ import annotations

import json

import tifffile

from hpddrnet_trt.data.vendors.metadata import VendorMetadata, number, whole
from hpddrnet_trt.data.vendors.texts import TooLarge, decoded, tag_bytes

VENDOR = "OpenFIBSEM"
_DESCRIPTION = 270


def read(page: tifffile.TiffPage) -> list[VendorMetadata]:
    """Pixel size and acquired resolution; nothing for a description of another kind."""
    try:
        content = tag_bytes(page, _DESCRIPTION)
    except TooLarge:
        return []  # a description may be anything
    if not content or not content.lstrip().startswith(b"{") or b"pixel_size" not in content:
        return []
    try:
        record = json.loads(decoded(content).rstrip("\0"))
        size, image = record["pixel_size"], record["image"]
        width, height = number(str(size["x"])), number(str(size["y"]))
        columns, rows = (whole(str(value)) for value in image["resolution"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
    metadata = VendorMetadata(VENDOR)
    metadata.add_size(width, height, "OpenFIBSEM pixel_size")
    metadata.check_acquired((columns, rows), (page.imagewidth, page.imagelength))
    return [metadata]
