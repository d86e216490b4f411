"""From a PNG, JPEG, BMP, TIFF or DigitalMicrograph file to an array, with every failure turned into one sentence.

The format is told by the file's first bytes, not by its name. Sizes are checked against a limit
before anything is decompressed, and only these decoders can ever be reached.
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
from PIL import BmpImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin

from hpddrnet_trt.core.errors import BadInputFile, MissingDependency
from hpddrnet_trt.core.files import existing_file
from hpddrnet_trt.data import digital_micrograph
from hpddrnet_trt.data.decoded import JPEG_PIXELS_PER_BYTE, MAX_PIXELS, ORIENTATION, Decoded, check_size, damaged
from hpddrnet_trt.data.tiff import SIGNATURES as _TIFF_SIGNATURES
from hpddrnet_trt.data.tiff import decode_tiff, tiff_size
from hpddrnet_trt.data.vendors.metadata import VendorMetadata

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".dm3", ".dm4")

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_SIGNATURE = b"\xff\xd8\xff"
_BMP_SIGNATURE = b"BM"
# The plugins' classes, not Image.open: that has a global limit of its own and would guess formats.
_PLUGINS: dict[bytes, type[ImageFile.ImageFile]] = {
    _PNG_SIGNATURE: PngImagePlugin.PngImageFile,
    _JPEG_SIGNATURE: JpegImagePlugin.JpegImageFile,
    _BMP_SIGNATURE: BmpImagePlugin.BmpImageFile,
}
_JPEG_SCANS = 200  # a progressive JPEG has about ten; each costs a pass over the whole picture
_PNG_GREY, _PNG_PALETTE = 0, 3  # colour types in a PNG header
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_BMP_PIXELS_PER_BYTE = 128  # of its run lengths: two bytes give 255 pixels at most
# A tiny file must not make a decoder take memory for a huge picture that cannot be in it.
_DEFLATE_RATIO = 1032  # zlib's own limit: 258 bytes from two bits


def decode(
    path: str | Path, what: str = "micrograph", max_pixels: int = MAX_PIXELS, page: int | None = None
) -> Decoded:
    """Decode one file, upright as viewers show it; ``what`` names it in errors ("micrograph", "mask").

    ``page``: which picture of a TIFF's :class:`~hpddrnet_trt.data.tiff.Series`; by default the first.

    Raises :class:`BadInputFile` when the file is missing, unreadable, truncated, of another
    format, or has more than ``max_pixels`` pixels.
    """
    path = existing_file(path, what)
    return _upright(_decode(path, what, max_pixels, page))


def stored_size(path: str | Path, what: str = "micrograph") -> tuple[int, int, tuple[VendorMetadata, ...]]:
    """Width and height, upright, and the file's own metadata, without its pixels (but for dm3 and dm4).

    Raises :class:`BadInputFile` as :func:`decode` does; that the pixels can be decoded is not known.
    """
    path = existing_file(path, what)
    with _told(path, what):
        head = _head(path, what)
        if head.startswith(_TIFF_SIGNATURES):
            return tiff_size(path, what)
        plugin = next((plugin for signature, plugin in _PLUGINS.items() if head.startswith(signature)), None)
        if plugin is None:
            decoded = decode(path, what)
            return decoded.values.shape[1], decoded.values.shape[0], decoded.metadata
        with plugin(str(path)) as image:
            width, height = image.size
            return (height, width, ()) if _exif_orientation(image) >= 5 else (width, height, ())


def _decode(path: Path, what: str, max_pixels: int, page: int | None) -> Decoded:
    with _told(path, what):
        head = _head(path, what)
        if head.startswith(_PNG_SIGNATURE):
            return _decode_png(path, what, max_pixels, head)
        if head.startswith(_JPEG_SIGNATURE):
            return _decode_jpeg(path, what, max_pixels)
        if head.startswith(_BMP_SIGNATURE):
            return _decode_bmp(path, what, max_pixels)
        if head.startswith(_TIFF_SIGNATURES):
            return decode_tiff(path, what, max_pixels, page)
        if digital_micrograph.is_digital_micrograph(head):
            return digital_micrograph.decode_dm(path, what, max_pixels)
        raise BadInputFile(f"{what} {path} is neither PNG, JPEG, BMP, TIFF nor dm3/dm4; convert it to one of these")


def _head(path: Path, what: str) -> bytes:
    with path.open("rb") as stream:
        head = stream.read(32)
    if not head:
        raise BadInputFile(f"{what} {path} is an empty file; copy it again")
    return head


@contextmanager
def _told(path: Path, what: str) -> Iterator[None]:
    """Whatever goes wrong within becomes one sentence."""
    try:
        yield
    except (BadInputFile, MissingDependency):
        raise
    except MemoryError as exc:
        raise BadInputFile(f"{what} {path} does not fit into memory; cut it into smaller pictures") from exc
    except PermissionError as exc:
        raise BadInputFile(f"{what} {path} may not be read ({exc.strerror}); change its permissions") from exc
    except Exception as exc:  # damaged files raise whatever the decoders stumble over; the cause is kept
        raise damaged(path, what, f"{type(exc).__name__}: {exc}") from exc


def _upright(decoded: Decoded) -> Decoded:
    """Turned and mirrored as its orientation says (TIFF 6.0, section 8; EXIF 2.3, 4.6.4)."""
    if decoded.orientation not in range(2, 9):
        return decoded
    values = decoded.values
    if decoded.orientation >= 5:  # stored rows are columns
        values = np.swapaxes(values, 0, 1)
    if decoded.orientation in (3, 4, 7, 8):
        values = values[::-1]
    if decoded.orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    remark = f"its pixels are stored turned or mirrored (orientation {decoded.orientation}): set upright"
    return replace(decoded, values=np.ascontiguousarray(values), orientation=1, remarks=(*decoded.remarks, remark))


def _exif_orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF, which viewers pass over
        return 1


def _decode_png(path: Path, what: str, max_pixels: int, head: bytes) -> Decoded:
    bit_depth, colour_type, interlaced = head[24], head[25], head[28]
    with PngImagePlugin.PngImageFile(str(path)) as image:
        check_size(path, what, image.width, image.height, max_pixels)
        row_bytes = (image.width * _PNG_CHANNELS.get(colour_type, 1) * bit_depth + 7) // 8
        needed = image.height * (row_bytes if interlaced else row_bytes + 1)  # each row begins with its filter
        if needed > _DEFLATE_RATIO * path.stat().st_size:
            raise damaged(path, what, f"{image.width} x {image.height} pixels cannot be in {path.stat().st_size} bytes")
        if bit_depth == 16 and colour_type != _PNG_GREY:
            values = _deep_colour_png(path, what, needed)
        else:
            image.load()
            values = np.asarray(image)
        # Pillow leaves rows black that the data do not reach.
        if not values[-1].any() and (held := _png_data_bytes(path, needed)) < needed:
            raise damaged(path, what, f"its pixels need {needed} bytes but {held} are there")
        if image.mode == "I":
            values = values.astype(np.uint16)
        orientation = _exif_orientation(image)
        palette = None
        if colour_type == _PNG_PALETTE:
            palette = np.array(image.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)
    if colour_type == _PNG_GREY and 1 < bit_depth < 8:
        values = values // (255 // ((1 << bit_depth) - 1))  # Pillow stretches 2 and 4 bits to 0..255
    return Decoded("PNG", values, bit_depth, palette, alpha=colour_type in (4, 6), orientation=orientation)


def _deep_colour_png(path: Path, what: str, needed: int) -> npt.NDArray[Any]:
    """16-bit colour or grey + alpha, which Pillow would cut to 8 bits; RGB(A) order."""
    if path.stat().st_size > 2 * needed + (64 << 20):  # the whole file is taken into memory here
        raise damaged(path, what, "it is far larger than its picture")
    return imagecodecs.png_decode(path.read_bytes())


def _png_data_bytes(path: Path, enough: int) -> int:
    """Length of the unpacked pixel data, counted up to ``enough`` without keeping them (PNG specification, 5.3, 10)."""
    count, unpacker = 0, zlib.decompressobj()
    with path.open("rb") as stream:
        stream.seek(len(_PNG_SIGNATURE))
        while count < enough and len(header := stream.read(8)) == 8:
            length, following = int.from_bytes(header[:4], "big"), stream.tell()
            if header[4:] == b"IDAT":
                packed = stream.read(length)
                while packed and count < enough and not unpacker.eof:
                    count += len(unpacker.decompress(packed, 1 << 20))
                    packed = unpacker.unconsumed_tail
            stream.seek(following + length + 4)
    return count


def _decode_jpeg(path: Path, what: str, max_pixels: int) -> Decoded:
    with JpegImagePlugin.JpegImageFile(str(path)) as image:
        check_size(path, what, image.width, image.height, max_pixels)
        if image.width * image.height > JPEG_PIXELS_PER_BYTE * path.stat().st_size:
            raise damaged(path, what, f"{image.width} x {image.height} pixels cannot be in {path.stat().st_size} bytes")
        if _scans(path) > _JPEG_SCANS:
            raise damaged(path, what, f"it holds more than {_JPEG_SCANS} scans of the same picture")
        orientation = _exif_orientation(image)
        image.load()
        plain: Image.Image = image if image.mode in {"L", "RGB"} else image.convert("RGB")
        return Decoded("JPEG", np.asarray(plain), 8, orientation=orientation)


def _decode_bmp(path: Path, what: str, max_pixels: int) -> Decoded:
    with BmpImagePlugin.BmpImageFile(str(path)) as image:
        check_size(path, what, image.width, image.height, max_pixels)
        if image.width * image.height > _BMP_PIXELS_PER_BYTE * path.stat().st_size:
            raise damaged(path, what, f"{image.width} x {image.height} pixels cannot be in {path.stat().st_size} bytes")
        image.load()
        palette = image.getpalette("RGB") if image.mode == "P" else None
        values = np.asarray(image if image.mode in {"1", "L", "P", "RGB", "RGBA"} else image.convert("RGB"))
    colours = None if palette is None else np.array(palette, dtype=np.uint8).reshape(-1, 3)
    return Decoded("BMP", values, 1 if image.mode == "1" else 8, colours, alpha=image.mode == "RGBA")


def _scans(path: Path) -> int:
    """How often "start of scan" occurs; counting ends just above the limit."""
    count, position = 0, 0
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        while count <= _JPEG_SCANS and (position := content.find(b"\xff\xda", position)) >= 0:
            count, position = count + 1, position + 2
    return count
