"""Labels of a whole stack as TIFF, OME-TIFF and OME-Zarr, slice by slice: one slice is in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

from hpddrnet_trt.core.errors import require
from hpddrnet_trt.core.files import atomic_folder, atomic_path, printable
from hpddrnet_trt.core.manifest import ClassInfo
from hpddrnet_trt.data.labels import palette_options, scale_options
from hpddrnet_trt.results.ome import (
    CHUNK,
    OWN,
    Placement,
    describe_labels,
    describe_pyramid,
    ome_metadata,
    own_attributes,
    reductions,
)

_BIG = 1 << 31  # bytes, before compression, from which a BigTIFF is written


@dataclass(frozen=True)
class LabelStack:
    """Labels of the slices of a stack, uint8 ``shape`` = (slices, height, width), read one by one: ``read(number)``.

    ``spacing_m``: metres from one slice to the next; it and ``pixel_size_m`` are None where unknown. ``record``: what
    a written file carries beside the labels.
    """

    shape: tuple[int, int, int]
    read: Callable[[int], npt.NDArray[np.uint8]]
    classes: Sequence[ClassInfo]
    pixel_size_m: float | None = None
    spacing_m: float | None = None
    record: Mapping[str, Any] | None = None

    def __iter__(self) -> Iterator[npt.NDArray[np.uint8]]:
        return map(self.read, range(self.shape[0]))


def write_tiff_stack(path: Path, stack: LabelStack) -> Path:
    """A page a slice, with the classes' colours as palette and the pixel size; the distance of slices is in the
    description (JSON) of the first."""
    about = {**(stack.record or {}), "spacing_m": stack.spacing_m}
    return _write_pages(path, stack, metadata=None, description=json.dumps(about))


def write_ome_tiff_stack(path: Path, stack: LabelStack) -> Path:
    """An OME-TIFF with axis Z; ``PhysicalSizeZ`` is the distance of slices, absent when unknown."""
    metadata = ome_metadata(path.name, "ZYX", stack.classes, stack.pixel_size_m, stack.record, stack.spacing_m)
    return _write_pages(path, stack, ome=True, metadata=metadata)


def _write_pages(path: Path, stack: LabelStack, *, ome: bool | None = None, **options: Any) -> Path:
    slices, height, width = stack.shape
    with (
        atomic_path(path) as temporary,
        tifffile.TiffWriter(temporary, bigtiff=slices * height * width > _BIG, ome=ome) as writer,
    ):
        writer.write(
            iter(stack),
            shape=stack.shape,
            dtype="uint8",
            **palette_options([entry.color for entry in stack.classes]),
            **scale_options(stack.pixel_size_m),
            **options,
        )
    return path


def write_ome_zarr_stack(path: Path, stack: LabelStack) -> Path:
    """An OME-Zarr 0.5 label image with the axes z, y, x (extra ``results``); the pyramid halves y and x only.

    Axes are in micrometres; one of unknown size has no unit and the scale 1. The micrographs are not in it.
    """
    zarr = require("zarr", "results", "write OME-Zarr")
    require("ome_zarr.writer", "results", "write OME-Zarr")
    slices, *sides = stack.shape
    with atomic_folder(path) as folder:
        root = zarr.open_group(str(folder), mode="w", zarr_format=3)
        levels = [
            root.create_array(
                str(level),
                shape=(slices, *(-(-side // 2**level) for side in sides)),
                chunks=(1, *(min(CHUNK, -(-side // 2**level)) for side in sides)),
                dtype="uint8",
            )
            for level in range(reductions(sides) + 1)
        ]
        for number, labels in enumerate(stack):
            for level, array in enumerate(levels):
                array[number] = labels[:: 2**level, :: 2**level]
        placement = Placement.of(stack.pixel_size_m, stack.spacing_m, volume=True)
        name = printable(path.name).split(".")[0] or "labels"
        describe_pyramid(root, name, placement, [2**level for level in range(len(levels))])
        describe_labels(root, stack.classes)
        root.attrs[OWN] = own_attributes(stack.classes, stack.pixel_size_m, stack.record)
    return path
