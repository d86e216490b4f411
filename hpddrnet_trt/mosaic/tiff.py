"""A TIFF as a mosaic or volume: the full resolution of a pyramid, tiles or strips as they are needed, pages as slices.

Which pages belong together, and that the file's structure can be trusted, says :mod:`hpddrnet_trt.data.tiff`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import tifffile

from hpddrnet_trt.core.errors import BadInputFile, describe
from hpddrnet_trt.data import vendors
from hpddrnet_trt.data.decoded import damaged
from hpddrnet_trt.data.micrograph import grey_pixels
from hpddrnet_trt.data.tiff import (
    JPEG,
    SIGNATURES,
    UNCOMPRESSED,
    check_claims,
    check_jpeg,
    decoded_page,
    plane_bytes,
    tiff_series,
)
from hpddrnet_trt.mosaic.layout import Box, Piece
from hpddrnet_trt.mosaic.reading import (
    FileState,
    OpenedSource,
    Options,
    check_unchanged,
    check_unit,
    chosen_channel,
    file_state,
    log,
    pixel_type,
    signature_of,
    stated_length,
)

_WHAT = "mosaic"


@dataclass
class TiffPages(OpenedSource):
    """``state``: of the file when it was opened. ``pages``: of each slice, the page in the chain of directories, or
    where ``hidden`` its number behind the page ``first``, all without compression."""

    state: FileState
    pages: tuple[int, ...]
    hidden: bool
    first: int

    def read(self, box: Box) -> Piece:
        """See :class:`~hpddrnet_trt.mosaic.layout.Source`: a tile without a place in the file holds the fill value."""
        pixels, bad = self._filled(box), []
        plane = self.pages[box.z]
        page = _page(self.path, self.state, self.first if self.hidden else plane)
        with self.path.open("rb") as stream:
            for part, index, offset, count in self._segments(page, box, plane if self.hidden else 0):
                try:
                    if _by_rows(page):
                        values = _rows(stream, page, part, offset)
                    else:
                        values = self._decoded(stream, page, index, (offset, count))
                        rows, columns = page.chunks[:2]
                        values = values[part.top % rows :, part.left % columns :][: part.height, : part.width]
                    pixels[part.within(box)] = self._grey(grey_pixels(decoded_page(page, values), self.path)[0])
                except MemoryError:
                    raise
                except Exception as exc:  # whatever codecs stumble over
                    kind = "tile" if page.is_tiled else "strip"
                    bad.append(
                        (part, f"{kind} {index} of {self.path} cannot be decoded ({describe(exc)}); copy it again")
                    )
        check_unchanged(self.path, self.state)
        return Piece(pixels, tuple(bad))

    def signature(self, box: Box) -> str:
        """See :class:`~hpddrnet_trt.mosaic.layout.Source`: of the whole file."""
        return signature_of([self.path])

    def _segments(self, page: tifffile.TiffPage, box: Box, plane: int) -> Iterator[tuple[Box, int, int, int]]:
        """The tiles or strips that hold a part of ``box``: that part, their number, first byte and count of bytes."""
        rows, columns = page.chunks[:2]
        if self.hidden:  # planes follow each other without a directory
            yield box, 0, page.dataoffsets[0] + plane * plane_bytes(page), plane_bytes(page)
            return
        across = page.chunked[1]
        for row in range(box.top // rows, (box.rows.stop - 1) // rows + 1):
            for column in range(box.left // columns, (box.columns.stop - 1) // columns + 1):
                index = row * across + column
                offset, count = page.dataoffsets[index], page.databytecounts[index]
                if offset == 0 and count == 0:
                    continue  # a sparse file
                yield box.common(Box(box.z, row * rows, column * columns, rows, columns)), index, offset, count

    def _decoded(
        self, stream: BinaryIO, page: tifffile.TiffPage, index: int, place: tuple[int, int]
    ) -> npt.NDArray[Any]:
        """``[H, W]`` or ``[H, W, C]`` of one tile or strip."""
        offset, count = place
        if offset < 8 or count < 1 or offset + count > self.state[0]:
            raise ValueError(f"it should lie in bytes {offset} to {offset + count} of {self.state[0]}")
        stream.seek(offset)
        data = stream.read(count)
        if page.compression in JPEG:
            check_jpeg(data, (page.chunks[1], page.chunks[0]), self.path, _WHAT)
        values = page.decode(data, index, jpegtables=page.jpegtables, jpegheader=page.jpegheader)[0]
        if values is None:
            raise ValueError("it is empty")
        return values[0] if page.samplesperpixel > 1 else values[0, ..., 0]


def is_tiff(path: Path) -> bool:
    """Whether a file begins as TIFF and BigTIFF do."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(4).startswith(SIGNATURES)


def open_tiff(path: Path, options: Options) -> TiffPages:
    """The full-size pages of a TIFF. Raises :class:`BadInputFile` for a file that is damaged or of an unusual kind,
    :class:`UsageError` where a channel has to be chosen."""
    state = file_state(path)
    try:
        series = tiff_series(path, _WHAT)
        channel = chosen_channel(path, series.channels, options.channel)
        series = tiff_series(path, _WHAT, channel)
        first = series.first if series.hidden else series.places[0]
        page = _page(path, state, first)
    except MemoryError as exc:
        raise BadInputFile(f"the pages of {path} do not fit into memory; save it with larger tiles") from exc
    except (ValueError, LookupError, TypeError, OSError, tifffile.TiffFileError) as exc:
        raise damaged(path, _WHAT, describe(exc)) from exc
    height, width = page.imagelength, page.imagewidth
    rows, columns = page.chunks[:2]
    by_rows = series.hidden or _by_rows(page)
    if not by_rows:
        check_unit(
            path,
            (rows, columns),
            page.samplesperpixel * np.dtype(page.dtype).itemsize,
            "tiles" if page.is_tiled else "strips",
        )
    info = vendors.resolve([*series.metadata, *vendors.read_sidecars(path, (width, height))])
    palette = decoded_page(page, np.zeros((1, 1), np.uint8)).palette
    for remark in info.remarks if options.pixel_size is None else ():
        log.warning("%s: %s", path, remark)
    return TiffPages(
        path=path,
        shape=(len(series.places), height, width),
        dtype=pixel_type(np.dtype(np.uint8 if palette is not None else page.dtype), path),
        fill_value=0.0,
        pixel_size_m=options.pixel_size or info.pixel_size_m,
        spacing_m=options.spacing or stated_length(path, series.spacing_m, "distance of slices"),
        unit=(1, 1) if by_rows else (rows, columns),
        state=state,
        pages=series.places,
        hidden=series.hidden,
        first=first,
    )


@lru_cache(maxsize=16)  # in every process, for as long as the file is the same
def _page(path: Path, state: FileState, number: int) -> tifffile.TiffPage:
    """A page with all that is needed to find and decode its tiles, looked through."""
    with tifffile.TiffFile(path) as tif:
        page = tif.pages[number].aspage()
        if page.imagewidth < 1 or page.imagelength < 1:
            raise damaged(path, _WHAT, f"its size is {page.imagewidth} x {page.imagelength}")
        check_claims(page, path, _WHAT, page.imagewidth * page.imagelength)
        listed, expected = len(page.dataoffsets), math.prod(page.chunked)
        if not listed == len(page.databytecounts) == expected:
            raise damaged(path, _WHAT, f"it lists {listed} strips or tiles of pixel data instead of {expected}")
        page.jpegtables, page.jpegheader, page.decode  # noqa: B018  # made while the file is open
        unusual = _unusual(page)
        if unusual is not None:
            raise BadInputFile(f"{path} {unusual}; save it as grey, or as RGB of 8 or 16 bits")
        one = np.zeros((1, 1, page.samplesperpixel)[: 2 + (page.samplesperpixel > 1)], page.dtype)
        grey_pixels(decoded_page(page, one), path)  # refuses what no picture has
        return page


def _unusual(page: tifffile.TiffPage) -> str | None:
    """What of a page would be read in another way for every tile, or in none."""
    orientation = decoded_page(page, np.zeros((1, 1), np.uint8)).orientation
    if page.imagedepth != 1 or page.tiledepth > 1:
        return "holds volumes within one page"
    if page.samplesperpixel > 1 and page.planarconfig != 1:
        return "holds its color channels one behind the other"
    if np.dtype(page.dtype).kind == "f" and (
        page.samplesperpixel > 1 or page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
    ):
        return "holds color or a negative in floating point"
    if orientation not in (0, 1):
        return f"is stored turned or mirrored (orientation {orientation})"
    return None


def _by_rows(page: tifffile.TiffPage) -> bool:
    """Whether any part of a row can be read by itself."""
    plain = page.compression == UNCOMPRESSED and page.predictor == 1 and page.fillorder == 1
    return bool(plain and not page.is_tiled and page.bitspersample in (8, 16, 32, 64))


def _rows(stream: BinaryIO, page: tifffile.TiffPage, part: Box, offset: int) -> npt.NDArray[Any]:
    """``part`` of a strip without compression that begins at ``offset``."""
    samples = page.samplesperpixel
    kind = np.dtype(page.dtype).newbyteorder(page.parent.byteorder)
    values = np.empty((part.height, part.width, samples), kind)
    step = page.imagewidth * samples * kind.itemsize
    for row in range(part.height):
        stream.seek(offset + (part.top + row) % page.chunks[0] * step + part.left * samples * kind.itemsize)
        if stream.readinto(values[row].data) < values[row].nbytes:  # type: ignore[attr-defined]
            raise ValueError(f"the file ends in row {part.top + row}")
    return values if samples > 1 else values[..., 0]
