"""From an image layer to micrographs: pixel size, planes, grey levels."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpddrnet_trt.core.errors import ContractError, UserError
from hpddrnet_trt.integrations.napari_layers import LayerPlanes, layer_planes, layer_shape, pixel_metres
from tests.integrations.napari_viewer import Image, ViewerModel
from tests.toy import grey_image

METRES = {"nm": 1e-9, "um": 1e-6, "mm": 1e-3, "angstrom": 1e-10, "inch": 0.0254}


@settings(deadline=None)  # pint reads its unit definitions first
@given(
    unit=st.sampled_from(sorted(METRES)),
    scale=st.tuples(*[st.floats(1e-3, 1e3)] * 2),
    angle=st.floats(-180, 180),
    mirrored=st.booleans(),
)
def test_pixel_size_follows_scale_and_units(
    unit: str, scale: tuple[float, float], angle: float, mirrored: bool
) -> None:
    """Where a layer lies and how it is turned does not change how large its pixels are."""
    turn = cv2.getRotationMatrix2D((0, 0), angle, 1.0)
    affine = np.vstack([turn, [0, 0, 1]])
    signed = (-scale[0] if mirrored else scale[0], scale[1])
    layer = Image(np.zeros((4, 6), np.uint8), scale=signed, units=(unit, unit), translate=(3, -8), rotate=angle,
                  affine=affine)  # fmt: skip
    found = pixel_metres(layer)
    assert found is not None
    assert found == pytest.approx([value * METRES[unit] for value in scale], rel=1e-9)


@pytest.mark.parametrize(
    "place",
    [
        {},
        {"scale": (5, 5)},
        {"scale": (5, 5), "units": ("pixel", "pixel")},
        {"scale": (5, 5), "units": ("second", "nm")},
        {"scale": (5, 5), "units": ("nm", "nm"), "affine": np.diag([2.0, 2.0, 1.0])},
    ],
)
def test_pixel_size_is_unknown_without_lengths_or_when_stretched(place: dict[str, Any]) -> None:
    layer = Image(np.zeros((4, 6), np.uint8), **place)
    assert pixel_metres(layer) is None
    assert layer_planes(layer, ViewerModel().dims).read(()).pixel_size_m is None


def test_only_square_pixels_have_one_size() -> None:
    viewer = ViewerModel()
    square = viewer.add_image(np.zeros((4, 6), np.uint8), scale=(5, 5.001), units=("nm", "nm"))
    flat = viewer.add_image(np.zeros((4, 6), np.uint8), scale=(5, 6), units=("nm", "nm"))
    assert layer_planes(square, viewer.dims).read(()).pixel_size_m == pytest.approx(5e-9, rel=1e-3)
    planes = layer_planes(flat, viewer.dims)
    assert planes.pixel_m == pytest.approx((5e-9, 6e-9))
    assert planes.pixel_size_m is None


def test_the_plane_under_the_sliders() -> None:
    viewer = ViewerModel()
    data = np.arange(2 * 5, dtype=np.uint8).reshape(2, 5, 1, 1) * np.ones((1, 1, 4, 6), np.uint8)
    layer = viewer.add_image(data, scale=(1, 10, 2, 2), translate=(0, 100, 0, 0))
    single = viewer.add_image(np.zeros((4, 6), np.uint8))
    viewer.dims.set_point(0, 1)
    viewer.dims.set_point(1, 130)
    planes = layer_planes(layer, viewer.dims)
    assert planes.indices == ((1, 3),)
    np.testing.assert_array_equal(planes.read((1, 3)).pixels, 8)
    assert layer_planes(single, viewer.dims).indices == ((),)
    everything = layer_planes(layer, viewer.dims, all_planes=True)
    assert everything.indices == tuple(np.ndindex(2, 5))


def test_sliders_count_in_the_viewers_units() -> None:
    """A stack in micrometres under sliders in nanometres."""
    viewer = ViewerModel()
    if not hasattr(viewer.dims, "units"):
        pytest.skip("this napari does not convert between layers' units")
    viewer.add_image(np.zeros((1000, 4, 6), np.uint8), units=("nm",) * 3)
    stack = viewer.add_image(np.zeros((5, 4, 6), np.uint8), scale=(0.1, 1, 1), units=("um",) * 3)
    viewer.dims.set_point(0, 310)
    assert layer_planes(stack, viewer.dims).indices == ((3,),)


def test_sliders_outside_the_layer() -> None:
    viewer = ViewerModel()
    viewer.add_image(np.zeros((9, 4, 6), np.uint8))
    short = viewer.add_image(np.zeros((3, 4, 6), np.uint8), name="short")
    viewer.dims.set_point(0, 7)
    with pytest.raises(UserError, match="'short' has no plane at the sliders' position"):
        layer_planes(short, viewer.dims)


def test_lazy_data_are_read_plane_by_plane() -> None:
    array = pytest.importorskip("dask.array")
    read: list[int] = []

    def load(block_info: Any = None) -> Any:
        plane = block_info[None]["chunk-location"][0]
        read.append(plane)
        return np.full((1, 4, 6), plane, np.uint8)

    lazy = array.map_blocks(load, chunks=((1,) * 5, (4,), (6,)), dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8))
    planes = layer_planes(Image(lazy, contrast_limits=(0, 255)), ViewerModel().dims, all_planes=True)
    read.clear()  # of the layer's thumbnail
    np.testing.assert_array_equal(planes.read((3,)).pixels, 3)
    assert read == [3]


def test_multiscale_uses_level_0() -> None:
    picture = grey_image(64, 96)
    layer = Image([picture, picture[::2, ::2], picture[::4, ::4]], multiscale=True)
    assert layer_shape(layer) == (64, 96)
    np.testing.assert_array_equal(layer_planes(layer, ViewerModel().dims).read(()).pixels, picture)


@pytest.mark.parametrize("channels", [3, 4])
def test_colour_becomes_luminance(channels: int) -> None:
    colours = np.random.default_rng(0).integers(0, 255, (2, 8, 9, channels)).astype(np.uint8)
    layer = Image(colours, rgb=True)
    planes = layer_planes(layer, ViewerModel().dims, all_planes=True)
    assert planes.shape == (2, 8, 9)
    micrograph = planes.read((1,))
    weighted = colours[1, ..., :3] @ [0.299, 0.587, 0.114]
    assert np.abs(micrograph.pixels - weighted).max() <= 1
    assert micrograph.remarks == ("the layer has colour: its luminance is used",)


@pytest.mark.parametrize(
    ("dtype", "given", "expected"),
    [
        (bool, [0, 1], np.array([0, 255], np.uint8)),
        (np.uint8, [0, 200], np.array([0, 200], np.uint8)),
        (">u2", [0, 40000], np.array([0, 40000], np.uint16)),
        (np.int16, [0, 30000], np.array([0, 30000], np.uint16)),
        (np.int16, [-5, 30000], np.array([-5, 30000], np.float32)),
        (np.int64, [0, 70000], np.array([0, 70000], np.float32)),
        (np.float16, [0.5, 2], np.array([0.5, 2], np.float32)),
        (np.float64, [-1e300, 2], np.array([-np.inf, 2], np.float32)),
    ],
)
def test_every_real_type_becomes_one_of_a_micrograph(dtype: Any, given: list[float], expected: Any) -> None:
    layer = Image(np.tile(np.array(given).astype(dtype), (3, 2)), contrast_limits=(0, 1))
    pixels = layer_planes(layer, ViewerModel().dims).read(()).pixels
    assert pixels.dtype == expected.dtype
    assert pixels.dtype.isnative
    np.testing.assert_array_equal(pixels, np.tile(expected, (3, 2)))


def test_complex_numbers_and_unreadable_data_give_a_sentence() -> None:
    class Broken:
        shape, dtype, ndim, size = (3, 4, 6), np.dtype(np.uint8), 3, 72
        fail = False

        def __getitem__(self, index: Any) -> Any:
            if self.fail:
                raise OSError("the drive is gone")
            return np.zeros(self.shape, np.uint8)[index]

    dims = ViewerModel().dims
    data = Broken()
    planes = layer_planes(Image(data, name="lazy", contrast_limits=(0, 255)), dims, all_planes=True)
    data.fail = True
    with pytest.raises(UserError, match="layer 'lazy', plane 2, cannot be read: the drive is gone"):
        planes.read((2,))
    with pytest.raises(ContractError, match="'waves' holds complex64 values"):
        LayerPlanes("waves", np.ones((4, 6), np.complex64), False, (4, 6), ((),)).read(())
