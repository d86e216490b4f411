"""Label maps as OME-TIFF and OME-Zarr, with physical pixel size, class names and provenance.

OME-Zarr 0.5 (https://ngff.openmicroscopy.org/0.5/) also holds the micrograph that the labels belong to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

from hpddrnet_trt import __version__
from hpddrnet_trt.core.errors import ContractError, require
from hpddrnet_trt.core.files import atomic_folder, atomic_path, printable
from hpddrnet_trt.core.manifest import ClassInfo
from hpddrnet_trt.core.text import micrometres
from hpddrnet_trt.data.labels import check_labels, palette_options, scale_options

CLASSES = "hpddrnet-trt/classes"  # namespaces of the two map annotations of OME-TIFF
PROVENANCE = "hpddrnet-trt/provenance"
# The OME schema's unit is the micro sign U+00B5. The Greek letter U+03BC looks the same and is no unit to any reader.
MICROMETRE = "\u00b5m"
ZARR_VERSION = "0.5"
LABELS = "classes"  # name of the label image in OME-Zarr
OWN = "hpddrnet-trt"  # key of our own attributes, beside "ome"
CHUNK = 1024  # pixels along each side
_SMALLEST = 256  # the pyramid ends when the shorter side would fall below


def write_ome_tiff(
    path: str | Path,
    labels: npt.NDArray[np.uint8],
    classes: Sequence[ClassInfo],
    *,
    pixel_size_m: float | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write class indices uint8 ``[H, W]`` as an OME-TIFF (schema 2016-06) with the classes' colours as palette.

    ``PhysicalSizeX`` and ``Y`` are in micrometres, absent when the size is unknown. Two map annotations:
    ``hpddrnet-trt/classes`` (index: name) and ``hpddrnet-trt/provenance`` (values that are no text as JSON).
    """
    check_labels(labels)
    with atomic_path(path) as temporary:
        tifffile.imwrite(
            temporary,
            labels,
            ome=True,
            metadata=ome_metadata(Path(path).name, "YX", classes, pixel_size_m, provenance),
            **palette_options([entry.color for entry in classes]),
            **scale_options(pixel_size_m),
        )
    return Path(path)


def ome_metadata(
    name: str,
    axes: str,
    classes: Sequence[ClassInfo],
    pixel_size_m: float | None,
    provenance: Mapping[str, Any] | None,
    spacing_m: float | None = None,
) -> dict[str, Any]:
    """What tifffile is told to write into the OME-XML."""
    names = {str(index): entry.name for index, entry in enumerate(classes)}
    annotations = [{"Namespace": CLASSES, "Description": "class of each pixel value", "Value": names}]
    if provenance:
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in provenance.items()}
        annotations.append({"Namespace": PROVENANCE, "Description": "where the labels come from", "Value": texts})
    sizes = {"X": pixel_size_m, "Y": pixel_size_m, "Z": spacing_m}
    known = {axis: micrometres(size) for axis, size in sizes.items() if size is not None}
    return {
        "axes": axes,
        "Creator": f"hpddrnet-trt {__version__}",
        "Name": printable(name),
        "Channel": {"Name": "classes"},
        "MapAnnotation": annotations,
        **{f"PhysicalSize{axis}": size for axis, size in known.items()},
        **{f"PhysicalSize{axis}Unit": MICROMETRE for axis in known},
    }


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
    with atomic_folder(path) as folder:
        root = zarr.open_group(str(folder), mode="w", zarr_format=3)
        if image is None:
            _write_labels(root, labels, classes, pixel_size_m, None)
        else:
            _write_pyramid(root, image, printable(Path(path).name).split(".")[0] or "image", pixel_size_m, "resize")
            group = root.create_group(f"labels/{LABELS}")
            root["labels"].attrs["ome"] = {"version": ZARR_VERSION, "labels": [LABELS]}
            _write_labels(group, labels, classes, pixel_size_m, {"image": "../../"})
        root.attrs[OWN] = own_attributes(classes, pixel_size_m, provenance)
    return Path(path)


def own_attributes(
    classes: Sequence[ClassInfo], pixel_size_m: float | None, provenance: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What an OME-Zarr of ours says beside the standard."""
    return {
        "scale_unit": "pixel" if pixel_size_m is None else "micrometer",
        "classes": [entry.name for entry in classes],
        "provenance": dict(provenance or {}),
    }


def _write_labels(
    group: Any,
    labels: npt.NDArray[np.uint8],
    classes: Sequence[ClassInfo],
    pixel_size_m: float | None,
    source: dict[str, str] | None,
) -> None:
    _write_pyramid(group, labels, LABELS, pixel_size_m, "nearest")
    describe_labels(group, classes, source)


@dataclass(frozen=True)
class Placement:
    """Where an image lies: for each of its ``axes`` (y and x, or z before them) the distance of two pixels, where the
    middle of the first one is, and, where known, its unit."""

    axes: tuple[str, ...]
    scale: tuple[float, ...]
    translation: tuple[float, ...]
    units: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, pixel_size_m: float | None, spacing_m: float | None = None, *, volume: bool) -> Placement:
        """At the origin, in micrometres; an axis of unknown size has no unit and the scale 1."""
        sizes = {**({"z": spacing_m} if volume else {}), "y": pixel_size_m, "x": pixel_size_m}
        scale = tuple(1.0 if size is None else micrometres(size) for size in sizes.values())
        units = {axis: "micrometer" for axis, size in sizes.items() if size is not None}
        return cls(tuple(sizes), scale, (0.0,) * len(sizes), units)

    def of_cells(self, side: int) -> Placement:
        """Of an image whose pixels each stand for a cell of ``side`` x ``side`` pixels, and lie in its middle."""
        scale = np.array(self.scale)
        sides = np.array([1] * (len(scale) - 2) + [side] * 2)
        middle = np.array(self.translation) + scale * (sides - 1) / 2
        return replace(self, scale=tuple((scale * sides).tolist()), translation=tuple(middle.tolist()))


def describe_pyramid(group: Any, name: str, placement: Placement, factors: Sequence[int]) -> None:
    """Say of the arrays ``0``, ``1`` ... in ``group`` that they are one image, and where it lies.

    ``factors``: of each, how many pixels of the image along y and along x are one of its.
    """
    writer = require("ome_zarr.writer", "results", "write OME-Zarr")
    levels = []
    for level, factor in enumerate(factors):
        scale = [*placement.scale[:-2], *(size * factor for size in placement.scale[-2:])]
        transformations: list[dict[str, Any]] = [{"type": "scale", "scale": scale}]
        if any(placement.translation):
            transformations.append({"type": "translation", "translation": list(placement.translation)})
        levels.append({"path": str(level), "coordinateTransformations": transformations})
    writer.write_multiscales_metadata(
        group, levels, axes=list(placement.axes), axes_units=dict(placement.units) or None, name=name
    )


def describe_labels(
    group: Any, classes: Sequence[ClassInfo], source: dict[str, str] | None = None, no_data: int | None = None
) -> None:
    """Say of an OME-Zarr image that it holds labels, and which; ``no_data``: the label of pixels without a class,
    which is transparent."""
    named = [(index, [*entry.color, 255], entry.name) for index, entry in enumerate(classes)]
    if no_data is not None:
        named.append((no_data, [0, 0, 0, 0], "no data"))
    description: dict[str, Any] = {
        "version": ZARR_VERSION,
        "colors": [{"label-value": value, "rgba": color} for value, color, _ in named],
        "properties": [{"label-value": value, "class": name} for value, _, name in named],
    }
    if source is not None:
        description["source"] = source
    group.attrs["ome"] = {**group.attrs["ome"], "image-label": description}


def _write_pyramid(
    group: Any, pixels: npt.NDArray[Any], name: str, pixel_size_m: float | None, method: str
) -> None:
    writer = require("ome_zarr.writer", "results", "write OME-Zarr")
    methods = require("ome_zarr.scale", "results", "write OME-Zarr").Methods
    steps = range(1, reductions(pixels.shape) + 1)
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
        storage_options={"chunks": tuple(min(CHUNK, side) for side in pixels.shape)},
    )


def reductions(shape: Sequence[int]) -> int:
    """How often a pyramid halves an image of ``shape`` = (height, width)."""
    return int(np.log2(max(1.0, min(shape) / _SMALLEST)))
