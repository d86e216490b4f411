"""Thermo Fisher and FEI: an INI-like text in tag 34682 (older: 34680), XML in tag 34683; Phenom: other XML there.

Facts: [Image] ResolutionX/Y is the scan, so a taller file carries the information bar below it.
[Beam] Scan names the section of the beam that took the picture: in a dual beam the other one may hold
an older scan. DatabarHeight is often empty.
"""

from __future__ import annotations

import tifffile

from hpddrnet_trt.data.vendors.metadata import VendorMetadata, length, number, whole
from hpddrnet_trt.data.vendors.texts import Sections, decoded, ini_sections, tag_bytes, xml_values

VENDOR = "Thermo Fisher / FEI"
_XML = 34683
_RESULT = "Metadata/BinaryResult"
_PHENOM = "FeiImage"


def read(page: tifffile.TiffPage) -> list[VendorMetadata]:
    """VendorMetadata of the text and of the XML, each where present."""
    stored = (page.imagewidth, page.imagelength)
    statements = []
    for code in (34682, 34680):
        content = tag_bytes(page, code)
        if content:
            statements.append(_from_text(ini_sections(decoded(content)), code, stored))
            break
    content = tag_bytes(page, _XML)
    if content:
        statements.append(_from_xml(decoded(content), stored))
    return statements


def _from_text(sections: Sections, code: int, stored: tuple[int, int]) -> VendorMetadata:
    metadata = VendorMetadata(VENDOR)
    image = sections.get("Image", {})
    metadata.check_acquired((whole(image.get("ResolutionX")), whole(image.get("ResolutionY"))), stored)
    # [Scan] is the saved picture's own scan: it has to agree with the beam's section. Where the file does not say
    # which beam it was, both beams' sections have to agree.
    active = sections.get("Beam", {}).get("Scan", "")
    names = [name for name in (active, "Scan") if name in sections] if active else ["Scan"]
    if not active and "Scan" not in sections:
        names = ["EScan", "IScan"]
    for name in names:
        section = sections.get(name, {})
        width, height = number(section.get("PixelWidth")), number(section.get("PixelHeight"))
        metadata.add_size(width, height, f"FEI tag {code} [{name}] PixelWidth")
        if metadata.doubts:
            break
    return metadata


def _from_xml(text: str, stored: tuple[int, int]) -> VendorMetadata:
    wanted = {f"{_RESULT}/{kind}/{axis}" for kind in ("PixelSize", "ImageSize") for axis in "XY"}
    wanted |= {f"{_PHENOM}/{name}" for name in ("pixelWidth", "pixelHeight", "databarHeight")}
    values = xml_values(text, wanted)

    def in_metres(path: str, unit: str) -> float | None:
        attributes, content = values.get(path, ({}, ""))
        return length(f"{content.strip()} {attributes.get('unit', unit)}")

    metadata = VendorMetadata(VENDOR)
    width, height = (in_metres(f"{_RESULT}/PixelSize/{axis}", "m") for axis in "XY")
    metadata.add_size(width, height, f"FEI tag {_XML} BinaryResult/PixelSize")
    columns, rows = (whole(values.get(f"{_RESULT}/ImageSize/{axis}", ({}, ""))[1]) for axis in "XY")
    metadata.check_acquired((columns, rows), stored)
    width, height = (in_metres(f"{_PHENOM}/{name}", "um") for name in ("pixelWidth", "pixelHeight"))
    metadata.add_size(width, height, f"Phenom tag {_XML} pixelWidth")
    metadata.state_bar(whole(values.get(f"{_PHENOM}/databarHeight", ({}, ""))[1]), stored)
    return metadata
