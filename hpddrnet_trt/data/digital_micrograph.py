"""Gatan DigitalMicrograph files, dm3 and dm4, through nionswift-io (Apache-2.0, extra ``dm``).

Only nionswift-io's tag parser is used; the picture is made here, for three reasons: its loader returns unsigned
8-bit pictures as signed ones, it reads whatever length a tag claims, and it keeps version and
integer size of the file being read in module globals, so that two files must not be parsed at once.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import BadInputFile, require
from hpddrnet_trt.data.decoded import Decoded, check_size, damaged
from hpddrnet_trt.data.vendors.metadata import VendorMetadata, metres

_PARSER = "nionswift_plugin.DM_IO.parse_dm3"
_PARSING = threading.Lock()
_BYTES_PER_PIXEL = 16  # of a file, times the limit of pixels: 64-bit values and as much again around them
_ROOM = 64 << 20
# ImageData.DataType of the pictures that can be segmented; the rest is complex, packed or colour.
_TYPES = {1: "i2", 2: "f4", 6: "u1", 7: "i4", 9: "i1", 10: "u2", 11: "u4", 12: "f8", 14: "u1"}
_COLOUR = 23


def is_digital_micrograph(head: bytes) -> bool:
    """Whether a file's first 16 bytes are those of a dm3 or dm4: version, length, 1 for little-endian data."""
    one = (1).to_bytes(4, "big")
    return (head[:4] == b"\0\0\0\3" and head[8:12] == one) or (head[:4] == b"\0\0\0\4" and head[12:16] == one)


def decode_dm(path: Path, what: str, max_pixels: int) -> Decoded:
    """The last image of the file (the first one is a thumbnail) as stored; of a stack the first picture.

    Raises :class:`BadInputFile` for spectra, complex and 4-D data and damaged files, and
    :class:`~hpddrnet_trt.core.errors.MissingDependency` without nionswift-io.
    """
    parser = require(_PARSER, "dm", "read dm3 and dm4 files")
    size = path.stat().st_size
    if size > _BYTES_PER_PIXEL * max_pixels + _ROOM:
        raise BadInputFile(f"{what} {path} has {size} bytes, too many for {max_pixels} pixels; save one picture of it")
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content, _PARSING:
        root = parser.dm_read_header(_Bounded(content))
    image = _image(root, path, what)
    data = image["ImageData"]
    dimensions = [int(value) for value in data["Dimensions"]]
    _refuse_spectrum(image, dimensions, path, what)
    check_size(path, what, dimensions[0], dimensions[1], max_pixels)
    values = _values(data, dimensions, path, what)
    remarks = (f"the first of {dimensions[2]} pictures is used",) if len(dimensions) == 3 and dimensions[2] > 1 else ()
    return Decoded(
        "DM", values, 8 * values.dtype.itemsize, metadata=(_calibration(data, dimensions),), remarks=remarks
    )


class _Bounded:
    """A file of which nothing can be read that is not there: a claimed length takes no memory."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content

    def read(self, count: int) -> bytes:
        if count < 0 or count > len(self._content) - self._content.tell():
            raise EOFError(f"{count} bytes are claimed at byte {self._content.tell()} of {len(self._content)}")
        return self._content.read(count)

    def tell(self) -> int:
        return self._content.tell()


def _image(root: Any, path: Path, what: str) -> Mapping[str, Any]:
    images = root.get("ImageList") if isinstance(root, dict) else None
    image = images[-1] if isinstance(images, list) and images else None
    data = image.get("ImageData") if isinstance(image, dict) else None
    if not isinstance(image, dict) or not isinstance(data, dict) or not {"Data", "DataType", "Dimensions"} <= set(data):
        raise damaged(path, what, "it holds no image")
    if not isinstance(data["Dimensions"], list) or not data["Dimensions"]:
        raise damaged(path, what, "its image has no dimensions")
    return image


def _refuse_spectrum(image: Mapping[str, Any], dimensions: list[int], path: Path, what: str) -> None:
    tags = image.get("ImageTags")
    meta = tags.get("Meta Data") if isinstance(tags, dict) else None
    form = meta.get("Format") if isinstance(meta, dict) else None
    spectrum = "spectrum" in _text(form).lower()
    if spectrum or not 2 <= len(dimensions) <= 3:
        kind = "a spectrum" if spectrum or len(dimensions) == 1 else f"{len(dimensions)}-dimensional data"
        raise BadInputFile(f"{what} {path} holds {kind}, not a picture; save the picture to segment")


def _values(data: Mapping[str, Any], dimensions: list[int], path: Path, what: str) -> npt.NDArray[Any]:
    """``[H, W]``, or ``[H, W, 3]`` for colour; 8-bit values are unsigned where the file says so."""
    stored = data["Data"]
    kind = data["DataType"]
    if kind != _COLOUR and kind not in _TYPES:
        raise BadInputFile(f"{what} {path} holds complex or packed values (DataType {kind}); save it as a real picture")
    dtype = np.dtype("u4" if kind == _COLOUR else _TYPES[kind])
    if getattr(stored, "itemsize", None) != dtype.itemsize:
        raise damaged(path, what, f"its values do not have the {dtype.itemsize} bytes that their type has")
    flat = np.frombuffer(stored, dtype)
    if min(dimensions) < 1 or flat.size != np.prod([float(value) for value in dimensions]):
        raise damaged(path, what, f"{flat.size} values do not fill {' x '.join(map(str, dimensions))}")
    width, height = dimensions[:2]
    picture = flat[: width * height].reshape(height, width)
    if kind == _COLOUR:
        return np.ascontiguousarray(picture.view(np.uint8).reshape(height, width, 4)[..., :3])
    return picture.copy()  # of a stack the rest is let go


def _calibration(data: Mapping[str, Any], dimensions: list[int]) -> VendorMetadata:
    metadata = VendorMetadata("Gatan")
    calibrations = data.get("Calibrations")
    axes = calibrations.get("Dimension") if isinstance(calibrations, dict) else None
    if not isinstance(axes, list) or len(axes) < 2 or not all(isinstance(axis, dict) for axis in axes[:2]):
        return metadata
    scales = [axis.get("Scale") for axis in axes[:2]]
    units = [_text(axis.get("Units")) for axis in axes[:2]]
    if not all(isinstance(scale, float | int) for scale in scales):
        return metadata
    sizes = [metres(float(scale), unit) for scale, unit in zip(scales, units, strict=True)]
    if sizes[0] is None and units[0] not in ("", "pixels"):
        metadata.doubts.append(f"its axes are in {units[0][:20]!r}, which is no length (a diffraction pattern?)")
    elif sizes[0] is not None and sizes[1] is None:
        metadata.doubts.append("only one of its axes has a length")
    else:
        metadata.add_size(sizes[0], sizes[1], "Calibrations.Dimension Scale")
    return metadata


def _text(value: Any) -> str:
    """Texts are arrays of 16-bit characters; the parser makes strings of some."""
    if isinstance(value, str):
        return value
    if getattr(value, "typecode", None) == "H":
        return value.tobytes().decode("utf-16-le", errors="replace")
    return ""
