"""From a napari image layer to micrographs, and from their results to layers that stay on it.

A layer's *plane* is its last two axes (rows, columns), whatever order the viewer shows the axes in; the axes
before them are the stack's. An image layer is only read, plane by plane, so that lazy data (dask, zarr) stay lazy.

Label values are class indices, as in every mask of this package; :data:`~hpddrnet_trt.core.manifest.IGNORE_INDEX` marks
what has not been segmented yet (other planes of a stack). Class 0 is napari's background, what its eraser leaves, and
in practice the matrix that fills most of a micrograph: it is transparent unless it is asked for, so that the
micrograph stays readable. Nothing here needs a display; call what shows results in the GUI's thread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import ContractError, UserError, one_line
from hpddrnet_trt.core.manifest import IGNORE_INDEX, ClassInfo
from hpddrnet_trt.core.text import is_square
from hpddrnet_trt.data.micrograph import Micrograph, luminance
from hpddrnet_trt.inference.result import Segmentation

METADATA_KEY = "hpddrnet_trt"  # in ``layer.metadata``
TRANSFORM = ("scale", "units", "translate", "rotate", "shear", "affine")
OPACITY = 0.4  # as in the overlay pictures of this package
MAX_STACK_BYTES = 4 << 30  # of the labels of a stack; they lie in memory at one byte per pixel


@dataclass(frozen=True)
class LayerPlanes:
    """The planes of one image layer that are to be segmented, as the layer was when they were chosen.

    ``data``: the layer's array (level 0 of a multiscale layer) of ``shape`` ``[*stack, H, W]``, with a colour axis
    at the end when ``rgb``. ``indices``: the chosen planes, indices into ``stack``; ``()`` is the only plane of a
    single picture. ``pixel_m``: height and width of a pixel in metres, None when unknown.
    """

    layer_name: str
    data: Any
    rgb: bool
    shape: tuple[int, ...]
    indices: tuple[tuple[int, ...], ...]
    pixel_m: tuple[float, float] | None = None

    @property
    def pixel_size_m(self) -> float | None:
        """Metres per pixel; None when unknown or when pixels are not square."""
        if self.pixel_m is None or not is_square(*self.pixel_m):
            return None
        return math.sqrt(self.pixel_m[0] * self.pixel_m[1])

    def read(self, index: tuple[int, ...]) -> Micrograph:
        """One plane as a grey picture; colour becomes luminance (ITU-R BT.601), with a remark.

        Raises :class:`UserError` when the layer's data cannot be read, :class:`ContractError` for complex numbers.
        """
        try:
            values = np.asarray(self.data[index])
        except Exception as exc:  # lazy data: whatever the file format's library raises
            place = f", plane {plane_name(index)}," if index else ""
            raise UserError(f"layer {self.layer_name!r}{place} cannot be read: {one_line(exc)}") from exc
        grey = _grey_type(values, self.layer_name)
        remarks: tuple[str, ...] = ()
        if self.rgb:
            grey = luminance(grey[..., :3])
            remarks = ("the layer has colour: its luminance is used",)
        return Micrograph(grey, None, self.pixel_size_m, remarks=remarks)


def layer_planes(layer: Any, dims: Any, *, all_planes: bool = False) -> LayerPlanes:
    """The plane of an image layer that the viewer's sliders (``viewer.dims``) point at, or all of them.

    Raises :class:`UserError` when the sliders are outside the layer.
    """
    shape = layer_shape(layer)
    stack = shape[:-2]
    indices = tuple(product(*map(range, stack))) if all_planes else (_current(layer, dims, stack),)
    return LayerPlanes(layer.name, layer_array(layer), bool(layer.rgb), shape, indices, pixel_metres(layer))


def layer_array(layer: Any) -> Any:
    """The array of an image layer, level 0 of a multiscale one."""
    return layer.data[0] if layer.multiscale else layer.data


def layer_shape(layer: Any) -> tuple[int, ...]:
    """``[*stack, H, W]`` of an image layer, without the colour axis."""
    shape = layer_array(layer).shape
    return tuple(int(size) for size in (shape[:-1] if layer.rgb else shape))


def plane_name(index: tuple[int, ...]) -> str:
    """An index into the stack as text: ``"3"``, ``"0, 3"``, empty for a single picture."""
    return ", ".join(map(str, index))


def pixel_metres(layer: Any) -> tuple[float, float] | None:
    """Height and width of a layer's pixel in metres; None when unknown.

    It is unknown when the layer's units are not lengths (napari's default is ``pixel``), and when the layer carries
    an ``affine`` that stretches it: its scale then no longer says how large the specimen is.
    """
    # napari's data -> physical -> world: scale and units make the first step, ``affine`` is the second.
    linear = np.asarray(layer.affine.linear_matrix)
    if not np.allclose(linear @ linear.T, np.eye(len(linear)), atol=1e-6):
        return None
    sizes = []
    for step, unit in zip(layer.scale[-2:], layer.units[-2:], strict=True):
        if not unit.is_compatible_with("m"):
            return None
        size = abs(float(step)) * float((1.0 * unit).to("m").magnitude)
        if not (math.isfinite(size) and size > 0):
            return None
        sizes.append(size)
    return sizes[0], sizes[1]


def _current(layer: Any, dims: Any, stack: tuple[int, ...]) -> tuple[int, ...]:
    if not stack:
        return ()
    point = np.array(dims.point[-layer.ndim :], dtype=float)
    # The sliders are in the viewer's units, which are another layer's when several lengths are mixed; layers that
    # cannot be compared (pixels beside nanometres) leave the viewer without units. Older napari has none at all.
    units = getattr(dims, "units", None)
    if units is not None:
        point *= [
            float((1.0 * shown).to(own).magnitude)
            for shown, own in zip(units[-layer.ndim :], layer.units, strict=True)
        ]
    index = tuple(int(value) for value in np.round(layer.world_to_data(point)[: len(stack)]))
    if any(not 0 <= position < size for position, size in zip(index, stack, strict=True)):
        raise UserError(f"layer {layer.name!r} has no plane at the sliders' position; move them to one that shows it")
    return index


def _grey_type(values: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    """Values as uint8, uint16 or float32, the types of a :class:`Micrograph`."""
    if values.dtype == bool:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype in (np.uint8, np.uint16):
        return values.astype(values.dtype.newbyteorder("="), copy=False)
    if values.dtype.kind in "iu" and values.size and values.min() >= 0 and values.max() <= np.iinfo(np.uint16).max:
        return values.astype(np.uint16)
    if values.dtype.kind in "iuf":
        with np.errstate(over="ignore"):  # beyond float32 becomes infinite, which the segmenter reports
            return values.astype(np.float32)
    raise ContractError(f"layer {name!r} holds {values.dtype} values; show its magnitude or real part instead")


@dataclass(frozen=True)
class PlaneResult:
    """One plane that is done; ``index`` into the stack's axes."""

    index: tuple[int, ...]
    segmentation: Segmentation


class ResultLayers:
    """The layers that show the results of one image layer; the same ones again at every run.

    ``viewer``: a napari ``Viewer`` or ``ViewerModel``; ``source``: its image layer that ``planes`` came from.
    ``first_class``: draw class 0, too. Nothing is added to the viewer before the first result.
    """

    def __init__(self, viewer: Any, source: Any, planes: LayerPlanes, *, first_class: bool = False) -> None:
        self.viewer, self.source, self.planes, self.first_class = viewer, source, planes, first_class

    def add(self, result: PlaneResult) -> Any:
        """Show one plane's result, and return the labels layer.

        Raises :class:`UserError` when the image layer is gone or shows other data by now, and when the labels of
        its stack would not fit into memory.
        """
        name = self.planes.layer_name
        if self.source not in self.viewer.layers:
            raise UserError(f"layer {name!r} was removed while it was segmented; its result is dropped")
        if layer_array(self.source) is not self.planes.data:
            raise UserError(f"layer {name!r} got other data while it was segmented; press Run again")
        segmentation = result.segmentation
        labels = self._labels_layer(segmentation)
        _write(labels, result.index, segmentation.labels)
        self._confidence(result)
        counts = np.bincount(segmentation.labels.ravel(), minlength=len(segmentation.classes))
        labels.metadata[METADATA_KEY]["planes"][plane_name(result.index)] = {
            "pixels": [int(count) for count in counts], "result": segmentation.record()
        }  # fmt: skip
        _summarize(labels)
        return labels

    def _labels_layer(self, segmentation: Segmentation) -> Any:
        from napari.layers import Labels

        shape, provenance = self.planes.shape, segmentation.provenance
        record = {
            "kind": "labels",
            "source_id": str(self.source.unique_id),
            "source_layer": self.source.name,
            "model": (provenance.model_sha256 if provenance is not None else None) or segmentation.manifest.name,
            "classes": [entry.model_dump(mode="json") for entry in segmentation.classes],
            "first_class": self.first_class,
            "planes": {},
        }
        labels = find_layer(self.viewer, self.source, "labels")
        if labels is None:
            labels = Labels(
                self._empty(IGNORE_INDEX, np.uint8), name=f"{self.source.name} classes", opacity=OPACITY,
                colormap=_colormap(record), metadata={METADATA_KEY: record}, **_transform(self.source),
            )  # fmt: skip
            self._insert(labels)
            return labels
        known = labels.metadata[METADATA_KEY]
        if any(known[key] != record[key] for key in ("classes", "first_class")):
            labels.colormap = _colormap(record)
        if labels.data.shape != shape or any(known[key] != record[key] for key in ("model", "classes")):
            # Planes of two models, or of two shapes of the image, do not belong into one layer.
            labels.data = self._empty(IGNORE_INDEX, np.uint8)
            labels.metadata = {**labels.metadata, METADATA_KEY: record}
        labels.metadata[METADATA_KEY]["first_class"] = self.first_class
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
                self._empty(np.nan, np.float32), name=f"{self.source.name} confidence", contrast_limits=(0.0, 1.0),
                colormap="viridis", visible=False, metadata={METADATA_KEY: record}, **_transform(self.source),
            )  # fmt: skip
            self._insert(layer)
        unknown = np.full(self.planes.shape[-2:], np.nan, np.float32)
        _write(layer, result.index, unknown if confidence is None else confidence)

    def _empty(self, value: float, dtype: Any) -> npt.NDArray[Any]:
        shape = self.planes.shape
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if len(shape) > 2 and size > MAX_STACK_BYTES:
            raise UserError(
                f"the results of the whole stack {self.planes.layer_name!r} would take {size / 2**30:.0f} GiB of "
                "memory; copy the planes to segment into a layer of their own"
            )
        return np.full(shape, value, dtype)

    def _insert(self, layer: Any) -> None:
        """Put a new layer right above its source, whatever is selected, and leave the selection alone."""
        from napari.experimental import link_layers

        layers = self.viewer.layers
        selected, active = set(layers.selection), layers.selection.active
        layers.insert(layers.index(self.source) + 1, layer)
        layers.selection = selected
        layers.selection.active = active
        # The result stays on its source when that is moved or gets its pixel size later.
        link_layers([self.source, layer], TRANSFORM)


def find_layer(viewer: Any, source: Any, kind: str) -> Any | None:
    """The ``"labels"`` or ``"confidence"`` layer that belongs to an image layer, None while there is none."""
    for layer in viewer.layers:
        record = layer.metadata.get(METADATA_KEY)
        if isinstance(record, dict) and (record["kind"], record["source_id"]) == (kind, str(source.unique_id)):
            return layer
    return None


def _summarize(labels: Any) -> None:
    """Write the whole result's figures where people and scripts look for them: metadata and features."""
    record = labels.metadata[METADATA_KEY]
    names = [ClassInfo.model_validate(entry).name for entry in record["classes"]]
    counts = np.sum([plane["pixels"] for plane in record["planes"].values()], axis=0)
    pixel = pixel_metres(labels)
    record["pixel_size_m"] = None if pixel is None else list(pixel)
    record["fractions"] = dict(zip(names, map(float, counts / counts.sum()), strict=True))
    areas = None if pixel is None else [float(count) * pixel[0] * pixel[1] for count in counts]
    record["areas_m2"] = None if areas is None else dict(zip(names, areas, strict=True))
    # napari shows the class's name under the cursor: it finds a label's row by the column ``index``.
    features: dict[str, Any] = {"index": range(len(names)), "class": names, "fraction": record["fractions"].values()}
    if areas is not None:
        features["area / µm²"] = [area * 1e12 for area in areas]
    labels.features = {name: list(values) for name, values in features.items()}


def _write(layer: Any, index: tuple[int, ...], plane: npt.NDArray[Any]) -> None:
    if not index:
        layer.data = plane
        return
    layer.data[index] = plane
    layer.refresh()


def _colormap(record: Mapping[str, Any]) -> Any:
    """The classes' own colours; values that are no class are transparent."""
    from napari.utils.colormaps import DirectLabelColormap

    colors: dict[int | None, Any] = {None: (0.0, 0.0, 0.0, 0.0)}
    for index, entry in enumerate(record["classes"]):
        colors[index] = (*(value / 255 for value in entry["color"]), float(index > 0 or record["first_class"]))
    return DirectLabelColormap(color_dict=colors)


def _transform(layer: Any) -> Mapping[str, Any]:
    return {name: getattr(layer, name) for name in TRANSFORM}
