"""From a napari image layer to micrographs: which planes, which grey levels, what pixel size.

A layer's *plane* is its last two axes (rows, columns), whatever order the viewer shows the axes in; the axes
before them are the stack's. A layer is only read here, plane by plane, so that lazy data (dask, zarr) stay lazy.
Nothing here needs a display.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import ContractError, UserError
from hpddrnet_trt.core.text import is_square
from hpddrnet_trt.data.micrograph import Micrograph


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
            raise UserError(f"layer {self.layer_name!r}{place} cannot be read: {exc or type(exc).__name__}") from exc
        grey = _grey_type(values, self.layer_name)
        remarks: tuple[str, ...] = ()
        if self.rgb:
            grey = cv2.cvtColor(np.ascontiguousarray(grey[..., :3]), cv2.COLOR_RGB2GRAY)
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
