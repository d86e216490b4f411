"""Hitachi: NAME.txt beside the picture, one section [SemImageFile].

Facts: PixelSize is nanometres without a unit; DataSize is "1280x960". Older instruments (S-4700) write no
PixelSize, and their magnification refers to a print of 127 mm: that is left alone. The files are
Windows text, sometimes UTF-16.
"""

from __future__ import annotations

from hpddrnet_trt.data.vendors.metadata import VendorMetadata, length, whole
from hpddrnet_trt.data.vendors.texts import ini_sections

VENDOR = "Hitachi"
MARKS = (b"[SemImageFile]", b"[TemImageFile]")


def read_sidecar_text(text: str, name: str, stored: tuple[int, int]) -> VendorMetadata | None:
    """VendorMetadata of the text file called ``name``; None when it is not Hitachi's."""
    sections = ini_sections(text)
    values = sections.get("SemImageFile", sections.get("TemImageFile"))
    if values is None:
        return None
    metadata = VendorMetadata(VENDOR)
    metadata.add_size(length(values.get("PixelSize"), "nm"), None, f"Hitachi {name} PixelSize")
    columns, _, rows = values.get("DataSize", "").lower().partition("x")
    metadata.check_acquired((whole(columns), whole(rows)), stored)
    return metadata
