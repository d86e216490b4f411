"""Label maps: reading masks, writing them with their colours, drawing them over micrographs."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image, PngImagePlugin

from hpddrnet_trt.core.errors import BadInputFile, ContractError, UsageError
from hpddrnet_trt.core.files import atomic_path, write_bytes
from hpddrnet_trt.core.manifest import IGNORE_INDEX
from hpddrnet_trt.data.decode import decode
from hpddrnet_trt.data.decoded import MAX_PIXELS

Palette = Sequence[tuple[int, int, int]]
IGNORE_COLOR = (255, 255, 255)
UNKNOWN_COLOR = (255, 0, 255)  # label values outside the classes: meant to hurt the eye
PNG_KEYWORD = "hpddrnet-trt"  # of the text chunk that holds a label map's provenance
_LABEL_LEVEL = 3  # of compression: 2.4 ms for 13 kB where 6, the default, takes 5.7 for 9, and 1 takes 1.9 for 17
_MOST_IN_MEMORY = 1 << 27  # bytes of colour values
_PNG_LARGEST = 2**31 - 1  # pixels per metre that a PNG can state, as a whole number
_TIFF_LARGEST = 2**32 - 1  # pixels per centimetre that a TIFF can


class MaskColors:
    """The colours of masks that belong together: what has one colour must have one index in all of them.

    Programs that save each picture with a palette of its own number the colours anew in every file.
    """

    def __init__(self) -> None:
        self._first: dict[tuple[int, ...], tuple[int, Path]] = {}  # colour to its index in the mask that had it first

    def add(self, path: Path, indices: npt.NDArray[np.uint8], palette: npt.NDArray[np.uint8]) -> None:
        """Raise :class:`BadInputFile` when the mask contradicts an earlier one."""
        occurring = np.flatnonzero(np.bincount(indices.ravel(), minlength=256))
        used = [int(index) for index in occurring if index < len(palette)]
        colors = [tuple(int(value) for value in palette[index]) for index in used]
        for index, color in zip(used, colors, strict=True):
            if colors.count(color) > 1:  # a palette that was not filled in says nothing
                continue
            other, where = self._first.setdefault(color, (index, path))
            if other != index:
                raise BadInputFile(
                    f"the colour {color} is class {index} in mask {path} but class {other} in {where}: their palettes "
                    "differ, so the numbers mean nothing; save all masks with one palette, or as grey pictures"
                )


def read_mask(
    path: str | Path, *, max_pixels: int = MAX_PIXELS, colors: MaskColors | None = None
) -> npt.NDArray[np.uint8]:
    """Read a mask as class indices, uint8 ``[H, W]``.

    The stored numbers count, not their colours: palette files give indices, 1-bit files 0 and 1. ``colors``: of the
    masks read before, which this one must not contradict.
    RGB masks are accepted when their channels are equal, wider types when they hold 0..255.
    Raises :class:`BadInputFile` otherwise, for stacks, and for JPEG, which does not keep numbers.
    """
    path = Path(path)
    decoded = decode(path, "mask", max_pixels)
    if decoded.format == "JPEG":
        raise BadInputFile(f"mask {path} is a JPEG, which alters label values; save masks as PNG or TIFF")
    if decoded.pages > 1:
        raise BadInputFile(
            f"mask {path} holds {decoded.pages} pages, of which no one is the labels; "
            "save one picture with a class index per pixel"
        )
    values = decoded.values
    if values.ndim == 3 and decoded.alpha and values.shape[2] > 1:
        if values[..., -1].min() != values[..., -1].max():
            raise BadInputFile(
                f"mask {path} is partly transparent, which says nothing about classes; "
                f"save it without opacity, {IGNORE_INDEX} where it has no label"
            )
        values = values[..., :-1]
    if values.ndim == 3:
        if np.any(values != values[..., :1]):
            raise BadInputFile(
                f"mask {path} is a colour picture; save it with one class index per pixel, or use `dataset import`"
            )
        values = values[..., 0]
    indices = _indices(values, path)
    if colors is not None and decoded.palette is not None:
        colors.add(path, indices, decoded.palette)
    return indices


def _indices(values: npt.NDArray[Any], path: Path) -> npt.NDArray[np.uint8]:
    if values.dtype == np.uint8 or values.dtype == bool:
        return np.ascontiguousarray(values, dtype=np.uint8)
    if values.dtype.kind not in "uif":
        raise BadInputFile(f"mask {path} holds {values.dtype} values; save it with one class index per pixel")
    bad = ~((values >= 0) & (values <= 255)) if values.dtype.kind != "f" else ~np.isin(values, np.arange(256))
    if np.any(bad):
        raise BadInputFile(
            f"mask {path} holds the value {values[bad].flat[0]}; class indices are whole numbers from 0 to 255"
        )
    return values.astype(np.uint8)


def write_labels(
    path: str | Path,
    labels: npt.NDArray[np.uint8],
    palette: Palette,
    *,
    pixel_size_m: float | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write a label map as PNG or TIFF, as the path's ending says; see the two writers."""
    suffix = Path(path).suffix.lower()
    if suffix == ".png":
        return write_label_png(path, labels, palette, pixel_size_m=pixel_size_m, provenance=provenance)
    if suffix in {".tif", ".tiff"}:
        return write_label_tiff(path, labels, palette, pixel_size_m=pixel_size_m, provenance=provenance)
    raise UsageError(f"label maps are written as .png or .tif, not as {Path(path).name}; change the output's ending")


def write_label_png(
    path: str | Path,
    labels: npt.NDArray[np.uint8],
    palette: Palette,
    *,
    pixel_size_m: float | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write uint8 ``[H, W]`` class indices as a palette PNG: numbers for programs, colours for people.

    The scale, where known, goes to the pHYs chunk (whole pixels per metre; left out where rounding would falsify
    it), ``provenance`` as JSON to an iTXt chunk named ``hpddrnet-trt``.
    """
    check_labels(labels)
    options: dict[str, Any] = {}
    if pixel_size_m is not None and 1000 <= 1 / pixel_size_m <= _PNG_LARGEST:
        options["dpi"] = (0.0254 / pixel_size_m,) * 2  # Pillow's only way to it
    if provenance is not None:
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt(PNG_KEYWORD, json.dumps(provenance, ensure_ascii=False))
    with atomic_path(path) as temporary:
        image = Image.fromarray(labels)
        image.putpalette(_colours(palette).tobytes())
        image.save(temporary, format="PNG", compress_level=_LABEL_LEVEL, **options)
    return Path(path)


def write_rgb_png(path: str | Path, picture: npt.NDArray[np.uint8]) -> Path:
    """Write RGB uint8 ``[H, W, 3]`` as PNG, quickly: each byte less the one of the pixel before it, by libdeflate.

    A coloured micrograph of 512 x 512 took 5 ms and 205 kB; with Pillow 30 ms and 251 kB at level 1, 97 ms and 231 kB
    at level 6. (PNG specification, https://www.w3.org/TR/png-3, filter type 1 of every row.) Very large pictures go
    through Pillow, which takes no copies.
    """
    if picture.size > _MOST_IN_MEMORY:
        with atomic_path(path) as temporary:
            Image.fromarray(picture).save(temporary, format="PNG", compress_level=1)
        return Path(path)
    height, width, _ = picture.shape
    flat = picture.reshape(height, 3 * width)
    rows = np.empty((height, 1 + 3 * width), np.uint8)
    rows[:, 0] = 1
    rows[:, 1:4] = flat[:, :3]
    np.subtract(flat[:, 3:], flat[:, :-3], out=rows[:, 4:])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = imagecodecs.deflate_encode(rows.tobytes(), level=1, raw=False)
    parts = [
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b""))
    ]
    return write_bytes(path, b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def write_pair(
    root: Path, split: str, name: str, image: npt.NDArray[Any], mask: npt.NDArray[np.uint8], palette: Palette
) -> None:
    """Write a micrograph and its mask, both ``[H, W]``, to ``root/images|masks/SPLIT/NAME.png``."""
    with atomic_path(root / "images" / split / f"{name}.png") as temporary:
        Image.fromarray(np.ascontiguousarray(image)).save(temporary, format="PNG")
    write_label_png(root / "masks" / split / f"{name}.png", np.ascontiguousarray(mask), palette)


def write_label_tiff(
    path: str | Path,
    labels: npt.NDArray[np.uint8],
    palette: Palette,
    *,
    pixel_size_m: float | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write uint8 ``[H, W]`` class indices as a palette TIFF, with its scale when it is known.

    ``provenance`` goes as JSON to the ImageDescription tag.
    """
    check_labels(labels)
    with atomic_path(path) as temporary:
        tifffile.imwrite(
            temporary,
            labels,
            **palette_options(palette),
            description=None if provenance is None else json.dumps(provenance),  # that tag is ASCII
            metadata=None,
            **scale_options(pixel_size_m),
        )
    return Path(path)


def palette_options(palette: Palette) -> dict[str, Any]:
    """What tifffile is told to write class indices with their colours."""
    return {
        "photometric": "palette",
        "colormap": _colours(palette).T.astype(np.uint16) * 257,
        "compression": "zlib",
    }


def scale_options(pixel_size_m: float | None) -> dict[str, Any]:
    """What tifffile is told to write the scale: pixels per centimetre, nothing when it is unknown."""
    if pixel_size_m is None or not 1 / _TIFF_LARGEST <= 1e-2 / pixel_size_m <= _TIFF_LARGEST:
        return {}
    return {"resolution": (1e-2 / pixel_size_m,) * 2, "resolutionunit": "CENTIMETER"}


def overlay(
    grey8: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8], palette: Palette, alpha: float = 0.4
) -> npt.NDArray[np.uint8]:
    """Draw labels over a micrograph: two uint8 ``[H, W]`` arrays to RGB uint8 ``[H, W, 3]``.

    ``alpha`` is the colour's share. Ignored pixels (255) stay grey; label values outside the
    palette are drawn in magenta.
    """
    check_labels(labels)
    if grey8.shape != labels.shape or grey8.dtype != np.uint8:
        raise ContractError(
            f"micrograph {grey8.dtype} {grey8.shape} and labels {labels.shape} do not fit together for an overlay"
        )
    if not 0 <= alpha <= 1:
        raise UsageError(f"the overlay's alpha must be between 0 and 1, got {alpha}")
    pairs = labels.astype(np.uint16) << 8 | grey8
    drawn = np.take(_mixed(tuple(map(tuple, palette)), alpha), pairs).view(np.uint8).reshape(*labels.shape, 4)
    return np.asarray(cv2.cvtColor(drawn, cv2.COLOR_RGBA2RGB), np.uint8)


@lru_cache(maxsize=4)
def _mixed(palette: tuple[tuple[int, int, int], ...], alpha: float) -> npt.NDArray[np.uint32]:
    """The colour of every pair of label and grey, ``[65536]``: words are looked up six times as fast as triples."""
    grey = np.arange(256, dtype=np.float32)[None, :, None]
    mixed = (1 - alpha) * grey + alpha * _colours(palette).astype(np.float32)[:, None, :]
    mixed[IGNORE_INDEX] = grey[0]
    table = np.zeros((256, 256, 4), np.uint8)
    table[..., :3] = np.rint(mixed)
    return table.view(np.uint32).ravel()


def _colours(palette: Palette) -> npt.NDArray[np.uint8]:
    """A full table of 256 colours, uint8 ``[256, 3]``."""
    if len(palette) > IGNORE_INDEX:
        raise UsageError(f"a palette has at most {IGNORE_INDEX} colours, got {len(palette)}")
    table = np.full((256, 3), UNKNOWN_COLOR, dtype=np.uint8)
    if len(palette):
        table[: len(palette)] = np.asarray(palette, dtype=np.uint8)
    table[IGNORE_INDEX] = IGNORE_COLOR
    return table


def check_labels(labels: npt.NDArray[Any]) -> None:
    """Raise :class:`ContractError` for what is not a uint8 array ``[H, W]`` with at least one pixel."""
    if labels.ndim != 2 or labels.dtype != np.uint8 or not labels.size:
        raise ContractError(f"a label map is a two-dimensional uint8 array, got {labels.dtype} {labels.shape}")
