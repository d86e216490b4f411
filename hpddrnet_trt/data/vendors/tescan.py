"""TESCAN: "key=value" lines in tag 50431 behind an embedded thumbnail, and in NAME-tif.hdr or NAME.hdr.

Facts: PixelSizeX and PixelSizeY are metres. ImageStripSize is the height of the information bar inside
the picture. The width and height of the picture are not stated, so that only the bar tells of resizing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import tifffile

from hpddrnet_trt.data.vendors.metadata import VendorMetadata, number, whole
from hpddrnet_trt.data.vendors.texts import ini_sections, sidecar, tag_bytes

VENDOR = "TESCAN"
_TAG = 50431
_LINE = re.compile(rb"(?:^|[\x00-\x1f])(PixelSizeX|PixelSizeY|ImageStripSize)=([^\x00-\x1f]{1,64})")


def read(page: tifffile.TiffPage) -> list[VendorMetadata]:
    """VendorMetadata of the tag; it is no registered number, so other content gives none."""
    content = tag_bytes(page, _TAG)
    if not content:
        return []
    # A thumbnail may hold anything: the text comes behind it, so that the last occurrence is the real one.
    values = {key.decode(): value.decode("latin-1") for key, value in _LINE.findall(content)}
    if "PixelSizeX" not in values:
        return []
    return [_metadata(values, f"TESCAN tag {_TAG} PixelSizeX", (page.imagewidth, page.imagelength))]


def read_sidecar(picture: Path, stored: tuple[int, int]) -> list[VendorMetadata]:
    """VendorMetadata of the header file beside the picture."""
    ending = picture.suffix.lstrip(".")
    names = [f"{picture.stem}-{ending}.hdr", f"{picture.stem}-{ending.lower()}.hdr", f"{picture.stem}.hdr"]
    beside = sidecar(picture.parent, dict.fromkeys([*names, *(name.upper() for name in names)]), (b"[MAIN]",))
    if beside is None:
        return []
    name, text = beside
    values = ini_sections(text).get("MAIN", {})
    return [_metadata(values, f"TESCAN {name} [MAIN] PixelSizeX", stored)] if "PixelSizeX" in values else []


def _metadata(values: Mapping[str, str], source: str, stored: tuple[int, int]) -> VendorMetadata:
    metadata = VendorMetadata(VENDOR)
    metadata.add_size(number(values["PixelSizeX"]), number(values.get("PixelSizeY")), source)
    metadata.state_bar(whole(values.get("ImageStripSize")), stored)
    return metadata
