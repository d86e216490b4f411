"""OME-Zarr 0.4 (zarr 2) and 0.5 (zarr 3, sharded too) as a mosaic or volume: the full resolution of one image.

Specifications: https://ngff.openmicroscopy.org/0.4/, https://ngff.openmicroscopy.org/0.5/ and, for stores of several
images, https://github.com/glencoesoftware/bioformats2raw.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError, describe, one_line, require
from hpddrnet_trt.data.vendors.metadata import VendorMetadata, metres, resolve
from hpddrnet_trt.mosaic.layout import Box, Piece
from hpddrnet_trt.mosaic.reading import (
    FileState,
    OpenedSource,
    Options,
    check_shape,
    check_unchanged,
    check_unit,
    chosen_channel,
    file_state,
    halves,
    pixel_type,
    signature_of,
    stated_length,
)

log = logging.getLogger(__name__)

MARKS = ("zarr.json", ".zgroup", ".zattrs", ".zarray")  # one of them lies in every folder of a store
_ARRAY_MARKS = ("zarr.json", ".zarray")
_READ = "read OME-Zarr"


@dataclass
class OmeZarr(OpenedSource):
    """``folder``: the group of the image. ``array``: the folder of the full-resolution array, ``metadata`` its file,
    ``state`` as it was opened. ``axes``: letters in the array's order; ``channel``: the place along c. ``cells``: the
    chunks inside shards, rows and columns; ``files``: the extent of a file along each axis."""

    folder: Path
    array: Path
    metadata: Path
    state: FileState
    axes: str
    channel: int
    cells: tuple[int, int]
    files: tuple[int, ...]

    def read(self, box: Box) -> Piece:
        """See :class:`~hpddrnet_trt.mosaic.layout.Source`: a chunk that is not there holds the fill value."""
        pixels = self._filled(box)
        unreadable = self._read_into(pixels, box, box)
        check_unchanged(self.metadata, self.state)  # a store that has gone looks like one that is empty
        return Piece(pixels, tuple(unreadable))

    def signature(self, box: Box) -> str:
        """See :class:`~hpddrnet_trt.mosaic.layout.Source`."""
        return signature_of([self.metadata, *self._files(box)])

    def _read_into(self, pixels: npt.NDArray[Any], box: Box, whole: Box) -> list[tuple[Box, str]]:
        """Fill the part ``box`` of ``whole``; where that fails, its halves, down to single chunks."""
        try:
            values = _array(self.array, self.state)[self._selection(box)]
        except (MemoryError, UserError):
            raise
        except Exception as exc:  # whatever codecs stumble over
            shards = halves(box, self.unit)
            parts = shards or halves(box, self.cells)
            if parts is None:
                file = next(self._files(box)).relative_to(self.path)
                return [(box, f"chunk {file} of {self.path} cannot be decoded ({describe(exc)}); copy it again")]
            bad = [damage for part in parts for damage in self._read_into(pixels, part, whole)]
            return [(box, bad[0][1])] if shards is None and tuple(part for part, _ in bad) == parts else bad
        if self.axes.index("y") > self.axes.index("x"):
            values = values.T
        pixels[box.within(whole)] = self._grey(values)
        return []

    def _selection(self, box: Box) -> tuple[int | slice, ...]:
        places: dict[str, int | slice] = {"t": 0, "c": self.channel, "z": box.z, "y": box.rows, "x": box.columns}
        return tuple(places[axis] for axis in self.axes)

    def _files(self, box: Box) -> Iterator[Path]:
        key = _array(self.array, self.state).metadata.encode_chunk_key
        ranges = []
        for place, side in zip(self._selection(box), self.files, strict=True):
            first, last = (place.start, place.stop - 1) if isinstance(place, slice) else (place, place)
            ranges.append(range(first // side, last // side + 1))
        return (self.array / key(place) for place in itertools.product(*ranges))


def is_zarr(path: Path) -> bool:
    """Whether a folder is, or calls itself, a Zarr store."""
    return path.is_dir() and (path.suffix == ".zarr" or any((path / mark).exists() for mark in MARKS))


def open_ome_zarr(path: Path, options: Options) -> OmeZarr:
    """The first image of a store, or the one that ``options.image`` names.

    Raises :class:`BadInputFile` where there is none or its metadata are damaged, :class:`UsageError` where an image or
    a channel has to be chosen.
    """
    folder, pyramid = image_in(path, path, options.image)
    try:
        axes = [axis if isinstance(axis, dict) else {"name": axis} for axis in pyramid["axes"]]
        names = [str(axis["name"]) for axis in axes]
        level = pyramid["datasets"][0]
        place = _inside(folder, str(level["path"]))
        scale = _scale(level, len(axes)) * _scale(pyramid, len(axes))
        sizes = [metres(float(step), str(axis.get("unit"))) for step, axis in zip(scale, axes, strict=True)]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as exc:
        raise BadInputFile(
            f"{folder} is no image of OME-Zarr 0.4 or 0.5: its metadata make no sense ({describe(exc)}); write it again"
        ) from exc
    if len(set(names)) != len(names) or not {"y", "x"} <= set(names) <= set("tczyx"):
        raise BadInputFile(
            f"{folder} has the axes {one_line(names)}; an image has y and x, and of t, c, z each at most one"
        )
    metadata = next((place / mark for mark in _ARRAY_MARKS if (place / mark).is_file()), None)
    if metadata is None:
        raise BadInputFile(f"{place}, the full resolution of {folder}, is not there; copy the whole store again")
    state = file_state(metadata)
    array = _array(place, state)
    if array.ndim != len(names):
        raise BadInputFile(f"{place} has {array.ndim} axes but its metadata name {len(names)}; write it again")
    extent = dict(zip(names, array.shape, strict=True))
    shape = (extent.get("z", 1), extent["y"], extent["x"])
    check_shape(path, shape)
    if extent.get("t", 1) != 1:
        raise BadInputFile(f"{path} has {extent['t']} points in time; save the one to segment as an image of its own")
    channel = chosen_channel(path, extent.get("c", 1), options.channel)
    dtype = pixel_type(array.dtype, place)
    files = tuple(array.shards or array.chunks)
    cells, outer = dict(zip(names, array.chunks, strict=True)), dict(zip(names, files, strict=True))
    check_unit(path, array.chunks, array.dtype.itemsize, "chunks")
    if cells.get("z", 1) > 1 and shape[0] > 1:
        log.warning(
            "%s: its chunks are %d slices deep and are decoded again for every slice; those of one slice read faster",
            path, cells["z"],
        )  # fmt: skip
    said = VendorMetadata("OME-Zarr")
    by_axis = dict(zip(names, sizes, strict=True))
    said.add_size(by_axis["x"], by_axis["y"], "coordinateTransformations")
    info = resolve([said])
    for remark in info.remarks if options.pixel_size is None else ():
        log.warning("%s: %s", path, remark)
    spacing = options.spacing or stated_length(path, by_axis.get("z"), "distance of slices")
    filled = np.asarray(0 if array.fill_value is None else array.fill_value, array.dtype).astype(np.float64)
    fill_value = float(filled) * (255 if array.dtype == bool else 1)
    return OmeZarr(
        path, shape, dtype, fill_value if math.isfinite(fill_value) else 0.0, options.pixel_size or info.pixel_size_m,
        spacing, (outer["y"], outer["x"]), folder, place, metadata, state, "".join(names), channel,
        (cells["y"], cells["x"]), files,
    )  # fmt: skip


def image_in(store: Path, folder: Path, image: str | None) -> tuple[Path, dict[str, Any]]:
    """The folder of the image to read, and its first ``multiscales`` entry.

    Raises :class:`BadInputFile` where there is none, :class:`UsageError` where one has to be chosen."""
    attributes = _attributes(folder)
    if image is not None:
        return image_in(store, _inside(folder, image), None)
    if "image-label" in attributes:
        raise BadInputFile(f"{folder} holds labels, no micrograph; give the image that they belong to")
    if pyramids := attributes.get("multiscales"):
        if isinstance(pyramids, list) and isinstance(pyramids[0], dict):
            return folder, pyramids[0]
        raise BadInputFile(f"the multiscales of {folder} are no list of images; write it again")
    images = _images(folder, attributes)
    if not images:
        raise BadInputFile(
            f"{folder} holds no image of OME-Zarr 0.4 or 0.5 (no multiscales in its attributes); give an image's folder"
        )
    if len(images) > 1:
        some = ", ".join(images[:4]) + (f" ... ({len(images)} in all)" if len(images) > 4 else "")
        raise UsageError(f"{store} holds several images: {some}; choose one with --image, such as --image {images[0]}")
    return image_in(store, _inside(folder, images[0]), None)


def _images(folder: Path, attributes: dict[str, Any]) -> list[str]:
    """Images in a folder that is none itself: a plate, a well, or a conversion by bioformats2raw."""
    try:
        if "plate" in attributes:
            wells = [str(well["path"]) for well in attributes["plate"]["wells"]]
            fields = _images(folder / wells[0], _attributes(_inside(folder, wells[0]))) if wells else []
            return [f"{well}/{field}" for well in wells for field in fields]
        if "well" in attributes:
            return [str(field["path"]) for field in attributes["well"]["images"]]
        if "bioformats2raw.layout" in attributes:
            listed = _attributes(folder / "OME").get("series") if (folder / "OME").is_dir() else None
            numbered = [entry.name for entry in folder.iterdir() if entry.name.isdecimal() and entry.is_dir()]
            return [str(name) for name in listed or sorted(numbered, key=int)]
    except (KeyError, TypeError) as exc:
        raise BadInputFile(f"{folder} lists its images in no way that makes sense ({describe(exc)})") from exc
    return []


def _attributes(folder: Path) -> dict[str, Any]:
    """OME's attributes of a group: 0.5 keeps them under a key of their own."""
    zarr = require("zarr", "mosaic", _READ)
    if not folder.is_dir():
        raise BadInputFile(f"{folder} does not exist; check the path and --image")
    try:
        attributes = zarr.open_group(str(folder), mode="r", use_consolidated=False).attrs.asdict()
    except Exception as exc:  # no store, or whatever zarr stumbles over in a damaged one
        if any((folder / mark).exists() for mark in MARKS):
            reason = f"its metadata cannot be read ({describe(exc)})"
        else:
            reason = "there is neither zarr.json nor .zgroup in it"
        raise BadInputFile(f"{folder} is no OME-Zarr image: {reason}; copy it again or give another folder") from exc
    inner = attributes.get("ome", attributes)
    return inner if isinstance(inner, dict) else {}


@lru_cache(maxsize=8)  # in every process, for as long as the file is the same
def _array(folder: Path, state: FileState) -> Any:
    zarr = require("zarr", "mosaic", _READ)
    try:
        return zarr.open_array(str(folder), mode="r")
    except Exception as exc:  # unknown codecs, damaged or contradictory metadata
        raise BadInputFile(f"{folder} is no Zarr array that can be read here ({describe(exc)})") from exc


def _inside(folder: Path, name: str) -> Path:
    """A folder inside another, by a name from metadata or a person."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise BadInputFile(f"{folder} is asked for {one_line(name)}, which does not lie in it; check --image")
    return folder / parts


def _scale(said: dict[str, Any], axes: int) -> npt.NDArray[np.float64]:
    """Product of all transformations that scale; ones where there are none."""
    product = np.ones(axes)
    for step in said.get("coordinateTransformations") or []:
        if step["type"] == "scale":
            if len(step["scale"]) != axes:
                raise ValueError(f"a scale of {len(step['scale'])} numbers for {axes} axes")
            product *= np.asarray(step["scale"], np.float64)
    return product
