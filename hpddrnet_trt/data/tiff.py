"""TIFF through tifffile, with everything the file claims held against the file before memory is taken.

A few hundred bytes can claim a billion strip offsets or pages that follow each other in a circle, and tifffile follows
them: so the chain of image file directories (TIFF 6.0, section 2; BigTIFF) is walked first, with bounds on everything.
"""

from __future__ import annotations

import bisect
import math
import os
import struct
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import tifffile

from hpddrnet_trt.core.errors import BadInputFile
from hpddrnet_trt.data import vendors
from hpddrnet_trt.data.decoded import JPEG_PIXELS_PER_BYTE, ORIENTATION, Decoded, check_size, damaged
from hpddrnet_trt.data.vendors.metadata import VendorMetadata

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

UNCOMPRESSED = 1
# Bytes that one byte can become at most: LZW, Deflate (two numbers), PackBits; LZMA and Zstandard have no bound.
_PACKED = {5: 3000.0, 8: 1100.0, 32946: 1100.0, 32773: 65.0, 34925: float("inf"), 50000: float("inf")}
JPEG = (6, 7)  # these decoders take the size from the stream, so that is checked as well
_JPEG_SIZE_MARKERS = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_JPEG_BARE_MARKERS = {0x01, *range(0xD0, 0xD9)}
_LARGE_TILE = 1 << 24  # pixels: 4096 x 4096, padded even for a small picture
_SAMPLES = 4  # times the limit of pixels, for colour with opacity or a few planes


class Series(NamedTuple):
    """The pictures of a TIFF that belong together: full-size, of one kind, of one channel.

    ``places``: their pages in the chain of directories or, where ``hidden``, their numbers behind the first page
    (``first``), where ImageJ keeps planes without a directory. ``channels``: how many there are in the file.
    ``spacing_m``: metres from one slice to the next, where the file says so. ``pages``: all full-size ones, of any
    kind. ``metadata``: of the first.
    """

    first: int
    places: tuple[int, ...]
    hidden: bool
    channels: int
    spacing_m: float | None
    pages: int
    metadata: tuple[VendorMetadata, ...]


def decode_tiff(path: Path, what: str, max_pixels: int, page: int | None = None) -> Decoded:
    """Full-size image of a TIFF or BigTIFF as stored; see :class:`Decoded`. Thumbnails are passed over.

    ``page``: number in the :class:`Series`; by default the first, with a remark that there are others.

    Raises :class:`BadInputFile`, or whatever tifffile and its codecs stumble over in a damaged file.
    """
    series = tiff_series(path, what)
    place = series.places[page or 0]  # an IndexError where the file has changed
    with tifffile.TiffFile(path) as tif:
        first = tif.pages[series.first if series.hidden else place].aspage()
        check_size(path, what, first.imagewidth, first.imagelength, max_pixels)
        check_claims(first, path, what, max_pixels)
        _check_data(tif, first, path, what)
        values = _hidden_plane(tif, first, place) if series.hidden and place else first.asarray()
        pages, remarks = series.pages, []
        axes = first.axes
        if axes[0] == "Z":
            pages = max(pages, values.shape[0])
            remarks.append(f"the first of {values.shape[0]} planes is used")
            values, axes = values[0], axes[1:]
        if axes[0] == "S":
            values = np.moveaxis(values, 0, -1)
        if values.ndim not in (2, 3):
            raise damaged(path, what, f"its pixel array has the shape {values.shape}")
        if page is None and pages > 1 and axes == first.axes:
            remarks.append(f"the first of {pages} pages is used")
        if page is not None and series.channels > 1:
            remarks.append(f"the first of {series.channels} channels is used")
        return replace(decoded_page(first, values), pages=pages, metadata=series.metadata, remarks=tuple(remarks))


def tiff_size(path: Path, what: str) -> tuple[int, int, tuple[VendorMetadata, ...]]:
    """Width and height, upright, of the first picture of the :class:`Series`, and its metadata; raises as
    :func:`decode_tiff`."""
    series = tiff_series(path, what)
    with tifffile.TiffFile(path) as tif:
        page = tif.pages[series.first].aspage()
        turned = int(page.tags.valueof(ORIENTATION, 1)) >= 5
        size = page.imagewidth, page.imagelength
    width, height = size[::-1] if turned else size
    return width, height, series.metadata


def decoded_page(page: tifffile.TiffPage, values: npt.NDArray[Any]) -> Decoded:
    """``values``, ``[H, W]`` or ``[H, W, C]``, all pixels of ``page`` or a part, with what it says about them."""
    palette = None
    if page.photometric == tifffile.PHOTOMETRIC.PALETTE and page.colormap is not None:
        # 16 bits by the specification, but some writers put 8 bits there, and readers take them so.
        palette = (page.colormap >> (8 if page.colormap.max() > 255 else 0)).astype(np.uint8).T
    return Decoded(
        "TIFF",
        values,
        int(page.bitspersample),
        palette,
        alpha=values.ndim == 3 and _has_opacity(page),
        inverted=page.photometric == tifffile.PHOTOMETRIC.MINISWHITE,
        orientation=int(page.tags.valueof(ORIENTATION, 1)),
    )


def tiff_series(path: Path, what: str = "micrograph", channel: int = 0) -> Series:
    """What of a TIFF belongs together; raises :class:`BadInputFile`, or what tifffile stumbles over."""
    state = os.stat(path)
    try:
        return _series(path, channel, state.st_size, state.st_mtime_ns, state.st_ino)
    except BadStructure as exc:
        raise damaged(path, what, str(exc)) from exc


@lru_cache(maxsize=8)  # every slice asks
def _series(path: Path, channel: int, *state: int) -> Series:
    chain = full_size_pages(path)
    with tifffile.TiffFile(path) as tif:
        first = tif.pages[chain.alike[0]].aspage()
        metadata, said = vendors.read_tags(first), vendors.read_planes(first)
        planes = vendors.imagej.images(first)  # ImageJ hides planes behind the first page
        hidden = len(chain.alike) == 1 and planes > 1 and _holds_planes(tif, first, planes)
        places = tuple(range(planes)) if hidden else chain.alike
        if said.channels > 1 and said.pages == len(places):
            places = tuple(places[number] for number in said.of_channel(channel))
        channels = said.channels if len(places) * said.channels == said.pages else 1
        pages = max(chain.pages, planes)
    return Series(chain.alike[0], places, hidden, channels, said.spacing_m, pages, metadata)


def _holds_planes(tif: tifffile.TiffFile, page: tifffile.TiffPage, planes: int) -> bool:
    """Whether the file can hold so many planes one behind the other, without compression."""
    if page.compression != UNCOMPRESSED or page.dtype is None or page.bitspersample % 8 or not page.dataoffsets:
        return False
    return bool(page.dataoffsets[0] + planes * plane_bytes(page) <= tif.filehandle.size)


def plane_bytes(page: tifffile.TiffPage) -> int:
    """Bytes of a page without compression."""
    return int(math.prod(page.shape)) * int(page.bitspersample) // 8


def _hidden_plane(tif: tifffile.TiffFile, page: tifffile.TiffPage, plane: int) -> npt.NDArray[Any]:
    tif.filehandle.seek(page.dataoffsets[0] + plane * plane_bytes(page))
    kind = np.dtype(page.dtype).newbyteorder(tif.byteorder)
    return np.frombuffer(tif.filehandle.read(plane_bytes(page)), kind).reshape(page.shape)


def check_claims(page: tifffile.TiffPage, path: Path, what: str, max_pixels: int) -> None:
    """Size of the array and of a tile, kind of values and compression: all before the first byte is decoded."""
    width, height = page.imagewidth, page.imagelength
    samples = page.samplesperpixel * page.imagedepth
    if samples < 1 or width * height * samples > _SAMPLES * max_pixels:
        raise BadInputFile(
            f"{what} {path} claims {width} x {height} pixels with {samples} values each, more than the limit of "
            f"{_SAMPLES * max_pixels} values; save the one picture to segment"
        )
    if page.dtype is None:
        raise damaged(path, what, f"its values have {page.bitspersample} bits of an unknown kind")
    if page.is_tiled:
        tile = page.tilewidth * page.tilelength * page.tiledepth
        if not 0 < tile <= max(_LARGE_TILE, width * height):
            raise damaged(path, what, f"its tiles are {page.tilewidth} x {page.tilelength} x {page.tiledepth}")
    if page.compression not in (UNCOMPRESSED, *JPEG, *_PACKED):
        raise BadInputFile(
            f"{what} {path} is compressed with a method that is not supported ({_name(page.compression)}); "
            "save it uncompressed or with LZW or Deflate"
        )


def _check_data(tif: tifffile.TiffFile, page: tifffile.TiffPage, path: Path, what: str) -> None:
    end = tif.filehandle.size
    expected = math.prod(page.chunked)
    if (listed := len(page.dataoffsets)) != expected:
        raise damaged(path, what, f"it lists {listed} strips or tiles of pixel data instead of {expected}")
    page.databytecounts = _byte_counts(page, end)
    segments = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    for offset, count in segments:
        if offset < 8 or count < 1:  # tifffile would fill such a strip with zeros
            raise damaged(path, what, "a strip or tile of its pixel data is missing")
        if offset + count > end:
            raise damaged(path, what, f"its pixel data should reach byte {offset + count} but the file has {end}")
    ratio = 1.0 if page.compression == UNCOMPRESSED else _PACKED.get(page.compression, JPEG_PIXELS_PER_BYTE)
    needed = math.prod(page.shaped) * int(page.bitspersample) // 8
    held = sum(count for _, count in segments)
    if held * ratio < needed:
        raise damaged(path, what, f"its pixels need {needed} bytes, which cannot be in the {held} that it lists")
    if page.compression in JPEG:
        largest = (page.tilewidth, page.tilelength) if page.is_tiled else (page.imagewidth, page.rowsperstrip)
        for offset, count in segments:
            tif.filehandle.seek(offset)
            check_jpeg(tif.filehandle.read(count), largest, path, what)


def _byte_counts(page: tifffile.TiffPage, end: int) -> tuple[int, ...]:
    """Bytes of each strip or tile: of uncompressed ones by their size, since some writers get the counts wrong.

    Where counts of compressed ones are missing, all that is before the next one.
    """
    if page.compression == UNCOMPRESSED:
        width, height = (page.tilewidth, page.tilelength) if page.is_tiled else (page.imagewidth, page.rowsperstrip)
        samples = page.samplesperpixel if page.planarconfig == 1 else 1
        row = (width * samples * page.bitspersample + 7) // 8
        if page.is_tiled:
            return (row * height * page.tiledepth,) * len(page.dataoffsets)
        strips = -(-page.imagelength // height)  # of one plane
        last = page.imagelength - (strips - 1) * height
        return tuple(row * (last if i % strips == strips - 1 else height) for i in range(len(page.dataoffsets)))
    stated = page.tags.valueof(_TILE_BYTE_COUNTS if page.is_tiled else _STRIP_BYTE_COUNTS) is not None
    counts = tuple(page.databytecounts) if stated or page.compression in JPEG else ()
    if len(counts) == len(page.dataoffsets) and min(counts, default=0) > 0:
        return counts
    starts = sorted(page.dataoffsets)
    return tuple([*starts, end][bisect.bisect_right(starts, start)] - start for start in page.dataoffsets)


def check_jpeg(stream: bytes, largest: tuple[int, int], path: Path, what: str) -> None:
    """See that a JPEG stream inside the TIFF is no larger than its strip or tile (ITU-T T.81, B.2.2)."""
    position = 2
    while position + 9 <= len(stream) and stream[position] == 0xFF:
        marker = stream[position + 1]
        if marker in _JPEG_SIZE_MARKERS:
            height = int.from_bytes(stream[position + 5 : position + 7], "big")
            width = int.from_bytes(stream[position + 7 : position + 9], "big")
            if width > largest[0] or height > largest[1]:
                raise damaged(path, what, f"a JPEG of {width} x {height} pixels stands in for {largest}")
            return
        bare = marker in _JPEG_BARE_MARKERS or marker == 0xFF
        length = 0 if bare else int.from_bytes(stream[position + 2 : position + 4], "big")
        position += (1 if marker == 0xFF else 2) + length
    raise damaged(path, what, "a JPEG inside it does not say its size")


def _name(compression: Any) -> str:
    return getattr(compression, "name", None) or f"number {int(compression)}"


def _has_opacity(page: tifffile.TiffPage) -> bool:
    """One extra sample that is declared as opacity, or is left unnamed after red, green and blue."""
    declared = {tifffile.EXTRASAMPLE.ASSOCALPHA, tifffile.EXTRASAMPLE.UNASSALPHA}
    extra = tuple(page.extrasamples)
    return len(extra) == 1 and (extra[0] in declared or page.photometric == tifffile.PHOTOMETRIC.RGB)


MAX_PAGES = 65_536
MAX_TAGS = 4096
_TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_NEW_SUBFILE_TYPE, _SUBFILE_TYPE, _REDUCED, _REDUCED_OR_MASK = 254, 255, 2, 5
_BITS, _SAMPLES_PER_PIXEL, _FORMAT = 258, 277, 339
_WIDTH, _LENGTH, _STRIP_BYTE_COUNTS, _TILE_BYTE_COUNTS = 256, 257, 279, 325
_DESCRIPTION = 270
_BULKY = {273, 279, 324, 325, 330, 347}  # offsets, byte counts and tables, which the decoder loads as Python numbers
_MAX_BULKY_BYTES = 16 << 20
_MAX_DESCRIPTION_BYTES = 64 << 20


class BadStructure(ValueError):
    """The chain of directories makes no sense; the message says where."""


class Chain(NamedTuple):
    """Full-size images of the main chain of directories: ``pages`` of any kind, and where those like the first are."""

    pages: int
    alike: tuple[int, ...]


def full_size_pages(path: Path) -> Chain:
    """The full-size images of a file.

    Thumbnails and masks are marked as such, or smaller than another image. Raises :class:`BadStructure`.
    """
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        order, big, offset = _header(stream)
        seen: set[int] = set()
        sizes: list[int] = []  # pixels; 0 for an image marked as reduced
        kinds: list[tuple[int, ...]] = []
        while offset:
            if offset in seen:
                raise BadStructure(f"its pages follow each other in a circle (directory at byte {offset} comes again)")
            if len(seen) >= MAX_PAGES:
                raise BadStructure(f"it has more than {MAX_PAGES} pages")
            seen.add(offset)
            entries, following = _directory(stream, order, big, offset, size)
            _check_bulk(entries)
            small = {code: value for code, (_, value) in entries.items()}
            other = small.get(_NEW_SUBFILE_TYPE, 0) & _REDUCED_OR_MASK or small.get(_SUBFILE_TYPE) == _REDUCED
            sizes.append(0 if other else small.get(_WIDTH, 0) * small.get(_LENGTH, 0))
            samples = small.get(_SAMPLES_PER_PIXEL, 1)
            # What several samples have each stands elsewhere in the file.
            kind = (small.get(_BITS, 1), small.get(_FORMAT, 1)) if samples == 1 else ()
            kinds.append((small.get(_WIDTH, 0), samples, *kind))
            offset = following
    largest = max(sizes, default=0)
    if not largest:
        return Chain(1, (0,))
    full = [index for index, pixels in enumerate(sizes) if pixels == largest]
    return Chain(len(full), tuple(index for index in full if kinds[index] == kinds[full[0]]))


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
