"""Results in the viewer: one labels layer on each segmented image layer, and the table of its classes.

Label values are class indices, as in every mask of this package; :data:`~hpddrnet_trt.core.manifest.IGNORE_INDEX` marks
what has not been segmented yet (other planes of a stack). Class 0 is napari's background, what its eraser leaves,
and in practice the matrix or background that fills most of a micrograph: it begins transparent, so that the
micrograph stays readable, and :func:`show_class` shows it. Call all of this in the GUI's thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.manifest import IGNORE_INDEX, ClassInfo
from hpddrnet_trt.integrations.napari_job import PlaneResult
from hpddrnet_trt.integrations.napari_layers import LayerPlanes, layer_array, pixel_metres, plane_name

METADATA_KEY = "hpddrnet_trt"  # in ``layer.metadata``
TRANSFORM = ("scale", "units", "translate", "rotate", "shear", "affine")
OPACITY = 0.4  # as in the overlay pictures of this package
MAX_STACK_BYTES = 4 << 30  # of the labels of a stack; they lie in memory at one byte per pixel


@dataclass(frozen=True)
class ClassRow:
    """One class of a result, over all segmented planes; ``area_m2`` None while the pixel size is unknown."""

    index: int
    info: ClassInfo
    pixels: int
    fraction: float
    area_m2: float | None
    visible: bool


class ResultLayers:
    """The layers that show the results of one image layer; the same ones again at every run.

    ``viewer``: a napari ``Viewer`` or ``ViewerModel``; ``source``: its image layer that ``planes`` came from.
    Nothing is added to the viewer before the first result.
    """

    def __init__(self, viewer: Any, source: Any, planes: LayerPlanes) -> None:
        self.viewer, self.source, self.planes = viewer, source, planes

    def add(self, result: PlaneResult) -> Any:
        """Show one plane's result, and return the labels layer.

        Raises :class:`UserError` when the image layer is gone or shows other data by now, and when the labels of
        its stack would not fit into memory.
        """
        self._check_source()
        found = result.segmentation
        known_by = found.provenance.model_sha256 if found.provenance is not None else None
        labels = self._labels_layer(found.classes, known_by or found.manifest.name)
        _write(labels, result.index, found.labels)
        self._confidence(result)
        record = labels.metadata[METADATA_KEY]
        counts = np.bincount(found.labels.ravel(), minlength=len(found.classes))
        record["planes"][plane_name(result.index)] = {
            "pixels": [int(count) for count in counts], "result": found.record()
        }  # fmt: skip
        _summarise(labels)
        return labels

    def _check_source(self) -> None:
        name = self.planes.layer_name
        if self.source not in self.viewer.layers:
            raise UserError(f"layer {name!r} was removed while it was segmented; its result is dropped")
        if layer_array(self.source) is not self.planes.data:
            raise UserError(f"layer {name!r} got other data while it was segmented; press Run again")

    def _labels_layer(self, classes: Sequence[ClassInfo], model: str) -> Any:
        from napari.layers import Labels

        shape = self.planes.shape
        labels = find_layer(self.viewer, self.source, "labels")
        record = {
            "kind": "labels",
            "source_id": str(self.source.unique_id),
            "source_layer": self.source.name,
            "model": model,
            "classes": [entry.model_dump(mode="json") for entry in classes],
            "planes": {},
        }
        if labels is None:
            labels = Labels(
                self._empty(shape, IGNORE_INDEX, np.uint8), name=f"{self.source.name} classes", opacity=OPACITY,
                colormap=class_colormap(classes, hidden={0}), metadata={METADATA_KEY: record},
                **_transform(self.source),
            )  # fmt: skip
            self._insert(labels, above=self.source)
            return labels
        known = labels.metadata[METADATA_KEY]
        if labels.data.shape != shape or any(known[key] != record[key] for key in ("model", "classes")):
            # Planes of two models, or of two shapes of the image, do not belong into one layer.
            labels.data = self._empty(shape, IGNORE_INDEX, np.uint8)
            if known["classes"] != record["classes"]:
                labels.colormap = class_colormap(classes, hidden={0})
            labels.metadata = {**labels.metadata, METADATA_KEY: record}
        for name, value in _transform(self.source).items():
            setattr(labels, name, value)
        return labels

    def _confidence(self, result: PlaneResult) -> None:
        """Show the confidence where there is one; elsewhere what an earlier run left is out of date, and goes."""
        from napari.layers import Image

        layer = find_layer(self.viewer, self.source, "confidence")
        confidence = result.segmentation.confidence
        if layer is not None and (layer.data.shape != self.planes.shape or (confidence is None and not result.index)):
            self.viewer.layers.remove(layer)
            layer = None
        if layer is None and confidence is None:
            return
        if layer is None:
            record = {"kind": "confidence", "source_id": str(self.source.unique_id)}
            layer = Image(
                self._empty(self.planes.shape, np.nan, np.float32), name=f"{self.source.name} confidence",
                contrast_limits=(0.0, 1.0), colormap="viridis", visible=False, metadata={METADATA_KEY: record},
                **_transform(self.source),
            )  # fmt: skip
            self._insert(layer, above=self.source)
        unknown = np.full(self.planes.shape[-2:], np.nan, np.float32)
        _write(layer, result.index, unknown if confidence is None else confidence)

    def _empty(self, shape: tuple[int, ...], value: float, dtype: Any) -> npt.NDArray[Any]:
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if len(shape) > 2 and size > MAX_STACK_BYTES:
            raise UserError(
                f"the results of the whole stack {self.planes.layer_name!r} would take {size / 2**30:.0f} GiB of "
                "memory; copy the planes to segment into a layer of their own"
            )
        return np.full(shape, value, dtype)

    def _insert(self, layer: Any, above: Any) -> None:
        """Put a new layer right above another one, whatever is selected, and leave the selection alone."""
        from napari.experimental import link_layers

        layers = self.viewer.layers
        selected, active = set(layers.selection), layers.selection.active
        layers.insert(layers.index(above) + 1, layer)
        layers.selection = selected
        layers.selection.active = active
        # The result stays on its source when that is moved or gets its pixel size later.
        link_layers([above, layer], TRANSFORM)


def find_layer(viewer: Any, source: Any, kind: str) -> Any | None:
    """The ``"labels"`` or ``"confidence"`` layer that belongs to an image layer, None while there is none."""
    for layer in viewer.layers:
        record = layer.metadata.get(METADATA_KEY)
        if isinstance(record, dict) and (record["kind"], record["source_id"]) == (kind, str(source.unique_id)):
            return layer
    return None


def class_rows(labels: Any) -> list[ClassRow]:
    """The classes of a labels layer with their share of what has been segmented, and its area."""
    record = labels.metadata[METADATA_KEY]
    counts = np.sum([plane["pixels"] for plane in record["planes"].values()], axis=0)
    pixel = pixel_metres(labels)
    return [
        ClassRow(
            index=index,
            info=ClassInfo.model_validate(entry),
            pixels=int(count),
            fraction=float(count / counts.sum()),
            area_m2=None if pixel is None else int(count) * pixel[0] * pixel[1],
            visible=bool(labels.colormap.color_dict[index][3]),
        )
        for index, (entry, count) in enumerate(zip(record["classes"], counts, strict=True))
    ]


def show_class(labels: Any, index: int, visible: bool) -> None:
    """Draw a class of a labels layer, or leave it transparent."""
    rows = class_rows(labels)
    hidden = {row.index for row in rows if (row.index != index and not row.visible)} | (set() if visible else {index})
    labels.colormap = class_colormap([row.info for row in rows], hidden)


def area_text(square_metres: float | None) -> str:
    """An area in square micrometres, the unit of the package's tables; a dash when it is unknown."""
    return "–" if square_metres is None else f"{square_metres * 1e12:.4g}"


def _summarise(labels: Any) -> None:
    """Write the whole result's figures where people and scripts look for them: metadata and features."""
    record, rows = labels.metadata[METADATA_KEY], class_rows(labels)
    pixel = pixel_metres(labels)
    record["pixel_size_m"] = None if pixel is None else list(pixel)
    record["fractions"] = {row.info.name: row.fraction for row in rows}
    record["areas_m2"] = None if pixel is None else {row.info.name: row.area_m2 for row in rows}
    # napari shows the class's name under the cursor: it finds a label's row by the column ``index``.
    labels.features = {"index": [row.index for row in rows], "class": [row.info.name for row in rows]}


def _write(layer: Any, index: tuple[int, ...], plane: npt.NDArray[Any]) -> None:
    if not index:
        layer.data = plane
        return
    layer.data[index] = plane
    layer.refresh()


def class_colormap(classes: Sequence[ClassInfo], hidden: set[int]) -> Any:
    """The classes' own colours; ``hidden`` ones and values that are no class are transparent."""
    from napari.utils.colormaps import DirectLabelColormap

    colours: dict[int | None, Any] = {
        index: (*(value / 255 for value in entry.color), 0.0 if index in hidden else 1.0)
        for index, entry in enumerate(classes)
    }
    return DirectLabelColormap(color_dict={**colours, None: (0.0, 0.0, 0.0, 0.0)})


def _transform(layer: Any) -> Mapping[str, Any]:
    return {name: getattr(layer, name) for name in TRANSFORM}

