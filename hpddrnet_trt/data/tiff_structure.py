"""The skeleton of a TIFF file, read before any library sees it.

A few hundred bytes can claim a billion strip offsets or pages that follow each other in a circle.
This module walks the chain of image file directories (TIFF 6.0, section 2; BigTIFF) with bounds on
everything, so that what is handed to the decoder has a size.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MAX_PAGES = 65_536
MAX_TAGS = 4096
_TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_NEW_SUBFILE_TYPE = 254
_DESCRIPTION = 270
_BULKY = {273, 279, 324, 325, 330, 347}  # offsets, byte counts and tables, which the decoder loads as Python numbers
_MAX_BULKY_BYTES = 16 << 20
_MAX_DESCRIPTION_BYTES = 64 << 20


class BadStructure(ValueError):
    """The chain of directories makes no sense; the message says where."""


@dataclass(frozen=True)
class TiffStructure:
    """``pages``: full-size images in the chain (reduced ones, such as thumbnails, do not count)."""

    pages: int


def read_structure(path: Path) -> TiffStructure:
    """Walk all directories of the main chain. Raises :class:`BadStructure`."""
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        order, big, offset = _header(stream)
        seen: set[int] = set()
        pages = 0
        while offset:
            if offset in seen:
                raise BadStructure(f"its pages follow each other in a circle (directory at byte {offset} comes again)")
            if len(seen) >= MAX_PAGES:
                raise BadStructure(f"it has more than {MAX_PAGES} pages")
            seen.add(offset)
            entries, following = _directory(stream, order, big, offset, size)
            if len(seen) == 1:
                _check_bulk(entries)
            reduced = entries.get(_NEW_SUBFILE_TYPE, (0, 0))[1] & 1
            pages += not reduced or len(seen) == 1
            offset = following
    return TiffStructure(pages)


def _header(stream: BinaryIO) -> tuple[str, bool, int]:
    """Byte order for struct, whether it is a BigTIFF, and the first directory's offset."""
    head = stream.read(16)
    order = "<" if head[:2] == b"II" else ">"
    big = struct.unpack(order + "H", head[2:4])[0] == 43
    try:
        return order, big, struct.unpack_from(order + ("Q" if big else "I"), head, 8 if big else 4)[0]
    except struct.error:
        raise BadStructure("it ends within its header") from None


def _directory(
    stream: BinaryIO, order: str, big: bool, offset: int, size: int
) -> tuple[dict[int, tuple[int, int]], int]:
    """``{code: (bytes of the value, value where it is small)}`` and the next directory's offset."""
    count_format, entry_size = ("Q", 20) if big else ("H", 12)
    count_size, offset_format = struct.calcsize(order + count_format), "Q" if big else "I"
    offset_size = struct.calcsize(order + offset_format)
    if offset + count_size > size:
        raise BadStructure(f"a page should begin at byte {offset} but the file has {size}")
    stream.seek(offset)
    count = struct.unpack(order + count_format, stream.read(count_size))[0]
    if not 0 < count <= MAX_TAGS:
        raise BadStructure(f"a page claims {count} tags")
    block = stream.read(count * entry_size + offset_size)
    if len(block) < count * entry_size:
        raise BadStructure("it ends within a page's tags")
    entries = {}
    for start in range(0, count * entry_size, entry_size):
        code, kind, items = struct.unpack_from(order + "HH" + offset_format, block, start)
        small = struct.unpack_from(order + ("H" if kind == 3 else "I"), block, start + 4 + offset_size)[0]
        entries[code] = (items * _TYPE_SIZES.get(kind, 1), small)
    following = block[count * entry_size :]
    if len(following) < offset_size:  # some writers leave out the last link
        return entries, 0
    return entries, struct.unpack(order + offset_format, following)[0]


def _check_bulk(entries: dict[int, tuple[int, int]]) -> None:
    for code, (length, _) in entries.items():
        limit = _MAX_BULKY_BYTES if code in _BULKY else _MAX_DESCRIPTION_BYTES if code == _DESCRIPTION else None
        if limit is not None and length > limit:
            raise BadStructure(f"its tag {code} claims {length} bytes")
