"""Zeiss SmartSEM: lines of text in tag 34118, the same in UTF-16 in tag 34119.

Facts: a list of unnamed numbers comes first, the fourth is the pixel size in metres with all digits;
then pairs of lines, a name (AP_IMAGE_PIXEL_SIZE) and "label = value unit". AP_IMAGE_PIXEL_SIZE is the
stored picture's; AP_PIXEL_SIZE follows the live scan. The bar is drawn over the picture: no entry names it.
"""

from __future__ import annotations

import math
from itertools import pairwise

import tifffile

from hpddrnet_trt.data.vendors.metadata import VendorMetadata, length, number, whole
from hpddrnet_trt.data.vendors.texts import decoded, tag_bytes

VENDOR = "Zeiss"
_PRECISE = 3  # position in the unnamed list


def read(page: tifffile.TiffPage) -> list[VendorMetadata]:
    """VendorMetadata of either tag, each where present: they have to agree."""
    statements = []
    for code in (34118, 34119):
        content = tag_bytes(page, code)
        if content:
            statements.append(_from_text(decoded(content), code, (page.imagewidth, page.imagelength)))
    return statements


def _from_text(text: str, code: int, stored: tuple[int, int]) -> VendorMetadata:
    metadata = VendorMetadata(VENDOR)
    lines = [line.strip() for line in text.splitlines()]
    values = {
        name: entry.partition("=")[2].strip()
        for name, entry in pairwise(lines)
        if name in ("AP_IMAGE_PIXEL_SIZE", "DP_IMAGE_STORE")
    }
    size = length(values.get("AP_IMAGE_PIXEL_SIZE"))
    precise = number(lines[_PRECISE]) if len(lines) > _PRECISE else None
    if size is not None and precise is not None and math.isclose(size, precise, rel_tol=1e-3):
        size = precise
    metadata.add_size(size, None, f"Zeiss tag {code} AP_IMAGE_PIXEL_SIZE")
    columns, _, rows = values.get("DP_IMAGE_STORE", "").partition("*")
    metadata.check_acquired((whole(columns), whole(rows)), stored)
    return metadata
