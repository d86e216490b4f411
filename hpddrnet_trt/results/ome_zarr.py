"""Label maps as OME-Zarr 0.5 (https://ngff.openmicroscopy.org/0.5/), beside the micrograph they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import ContractError, require
from hpddrnet_trt.core.files import atomic_folder
from hpddrnet_trt.core.manifest import ClassInfo
from hpddrnet_trt.core.units import micrometres
from hpddrnet_trt.data.labels import check_labels

VERSION = "0.5"
LABELS = "classes"  # name of the label image
OWN = "hpddrnet-trt"  # key of our own attributes, beside "ome"
_CHUNK = 1024  # pixels along each side
_SMALLEST = 256  # the pyramid ends when the shorter side would fall below


def write_ome_zarr(
    path: str | Path,
    labels: npt.NDArray[np.uint8],
    classes: Sequence[ClassInfo],
    *,
    pixel_size_m: float | None = None,
    provenance: Mapping[str, Any] | None = None,
    image: npt.NDArray[Any] | None = None,
) -> Path:
    """Write class indices uint8 ``[H, W]`` as an OME-Zarr 0.5 folder (extra ``results``), replacing an older one.

    With ``image`` (the micrograph, grey ``[H, W]``) the folder is that image, and the labels are
    ``labels/classes`` in it; without one the folder itself is the label image. Both are pyramids by factors of
    two: means of the micrograph, single pixels of the labels, so that no class appears that is not there.

    Axes are in micrometres. For an unknown pixel size they have no unit and the scale is 1: pixels, which the
    attribute ``hpddrnet-trt`` (``scale_unit``) says in words, beside classes and provenance.
    """
    check_labels(labels)
    if image is not None and image.shape != labels.shape:
        raise ContractError(f"the micrograph {image.shape} and its labels {labels.shape} differ in size")
    zarr = require("zarr", "results", "write OME-Zarr")
    require("ome_zarr.writer", "results", "write OME-Zarr")
    own = {
        "scale_unit": "pixel" if pixel_size_m is None else "micrometer",
        "classes": [entry.name for entry in classes],
        "provenance": dict(provenance or {}),
    }
    with atomic_folder(path) as folder:
        root = zarr.open_group(str(folder), mode="w", zarr_format=3)
        if image is None:
            _write_labels(root, labels, classes, pixel_size_m, None)
        else:
            _write_pyramid(root, image, Path(path).name.split(".")[0] or "image", pixel_size_m, "resize")
            group = root.create_group(f"labels/{LABELS}")
            root["labels"].attrs["ome"] = {"version": VERSION, "labels": [LABELS]}
            _write_labels(group, labels, classes, pixel_size_m, {"image": "../../"})
        root.attrs[OWN] = own
    return Path(path)


def _write_labels(
    group: Any,
    labels: npt.NDArray[np.uint8],
    classes: Sequence[ClassInfo],
    pixel_size_m: float | None,
    source: dict[str, str] | None,
) -> None:
    _write_pyramid(group, labels, LABELS, pixel_size_m, "nearest")
    description: dict[str, Any] = {
        "version": VERSION,
        "colors": [{"label-value": index, "rgba": [*entry.color, 255]} for index, entry in enumerate(classes)],
        "properties": [{"label-value": index, "class": entry.name} for index, entry in enumerate(classes)],
    }
    if source is not None:
        description["source"] = source
    group.attrs["ome"] = {**group.attrs["ome"], "image-label": description}


def _write_pyramid(
    group: Any, pixels: npt.NDArray[Any], name: str, pixel_size_m: float | None, method: str
) -> None:
    writer = require("ome_zarr.writer", "results", "write OME-Zarr")
    methods = require("ome_zarr.scale", "results", "write OME-Zarr").Methods
    steps = range(1, int(np.log2(max(1.0, min(pixels.shape) / _SMALLEST))) + 1)
    size = 1.0 if pixel_size_m is None else micrometres(pixel_size_m)
    writer.write_image(
        pixels,
        group,
        name=name,
        axes=["y", "x"],
        # Without these two arguments the file says nothing of the scale, and means 1.
        scale={"y": size, "x": size},
        axes_units=None if pixel_size_m is None else {"y": "micrometer", "x": "micrometer"},
        scale_factors=[2**step for step in steps],
        method=methods(method),
        storage_options={"chunks": tuple(min(_CHUNK, side) for side in pixels.shape)},
    )
