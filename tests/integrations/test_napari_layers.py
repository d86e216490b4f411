"""From an image layer to micrographs: pixel size, planes, grey levels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpddrnet_trt.core.errors import ContractError, UserError
from hpddrnet_trt.core.manifest import IGNORE_INDEX
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.integrations import napari_layers
from hpddrnet_trt.integrations.napari_layers import (
    METADATA_KEY,
    LayerPlanes,
    PlaneResult,
    ResultLayers,
    find_layer,
    layer_planes,
    pixel_metres,
)
from tests.integrations.live import toy_labels
from tests.integrations.napari_viewer import Image, Labels, ViewerModel
from tests.toy import CLASSES, ToyEngine, grey_image

NM = {"scale": (5.0, 5.0), "units": ("nm", "nm")}
METRES_PER = {"nm": 1e-9, "um": 1e-6, "mm": 1e-3, "angstrom": 1e-10, "inch": 0.0254}


@settings(deadline=None)  # pint reads its unit definitions first
@given(
    unit=st.sampled_from(sorted(METRES_PER)),
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
    assert found == pytest.approx([value * METRES_PER[unit] for value in scale], rel=1e-9)


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
    for width, size in ((5.001, 5e-9), (6, None)):  # only square pixels have one size
        planes = layer_planes(Image(np.zeros((4, 6), np.uint8), scale=(5, width), units=("nm", "nm")), None)
        assert planes.read(()).pixel_size_m == (None if size is None else pytest.approx(size, rel=1e-3))


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
    short = viewer.add_image(np.zeros((130, 4, 6), np.uint8), name="short")  # its last plane is 129
    with pytest.raises(UserError, match="'short' has no plane at the sliders' position"):
        layer_planes(short, viewer.dims)


def test_sliders_count_in_the_viewers_units() -> None:
    """A stack in micrometres under sliders in nanometres."""
    viewer = ViewerModel()
    if not hasattr(viewer.dims, "units"):
        pytest.skip("this napari does not convert between layers' units")
    viewer.add_image(np.zeros((1000, 4, 6), np.uint8), units=("nm",) * 3)
    stack = viewer.add_image(np.zeros((5, 4, 6), np.uint8), scale=(0.1, 1, 1), units=("um",) * 3)
    viewer.dims.set_point(0, 310)
    assert layer_planes(stack, viewer.dims).indices == ((3,),)


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


# Results


def segment(viewer: Any, layer: Any, *, all_planes: bool = False, model: str = "a", first_class: bool = False,
            confidence: bool = False) -> Any:  # fmt: skip
    planes = layer_planes(layer, viewer.dims, all_planes=all_planes)
    shown = ResultLayers(viewer, layer, planes, first_class=first_class)
    segmenter = Segmenter(ToyEngine(), model_sha256=model * 64, confidence=confidence)
    labels = None
    for index in planes.indices:
        labels = shown.add(PlaneResult(index, segmenter.segment(planes.read(index))))
    return labels


def assert_same_place(first: Any, second: Any) -> None:
    assert first.units == second.units
    corners: Sequence[tuple[int, ...]] = [(0,) * first.ndim, (7,) * first.ndim]
    for corner in corners:
        assert first.data_to_world(corner) == pytest.approx(second.data_to_world(corner))


PLACES: list[dict[str, Any]] = [
    {},
    NM,
    {**NM, "translate": (300, -20), "rotate": 30},
    {**NM, "shear": [0.3], "affine": np.array([[0.0, 1.0, 9.0], [-1.0, 0.0, 4.0], [0.0, 0.0, 1.0]])},
]


@pytest.mark.parametrize("place", PLACES)
def test_labels_lie_on_their_source(place: dict[str, Any]) -> None:
    viewer = ViewerModel()
    picture = grey_image(40, 56)
    source = viewer.add_image(picture, name="sample 3", **place)
    other = viewer.add_image(grey_image(24, 16))
    viewer.layers.selection.active = other
    labels = segment(viewer, source)
    assert isinstance(labels, Labels)
    assert_same_place(labels, source)
    np.testing.assert_array_equal(labels.data, toy_labels(picture))
    assert labels.name == "sample 3 classes"
    assert list(viewer.layers) == [source, labels, other]
    assert viewer.layers.selection.active is other
    assert set(viewer.layers.selection) == {other}
    of_other = segment(viewer, other)  # every image has labels of its own
    assert [find_layer(viewer, layer, "labels") for layer in (source, other)] == [labels, of_other]
    assert labels is not of_other


def test_classes_have_their_colours_and_names() -> None:
    viewer = ViewerModel()
    labels = segment(viewer, viewer.add_image(grey_image(40, 56)))
    for index, info in enumerate(CLASSES):
        colour = labels.colormap.color_dict[index]
        np.testing.assert_allclose(colour[:3], np.array(info.color) / 255, atol=1e-6)
        assert colour[3] == (0.0 if index == 0 else 1.0)
        row, column = np.argwhere(labels.data == index)[0]
        assert f"class: {info.name}" in labels.get_status((row, column))["value"]
    assert labels.colormap.color_dict[None][3] == 0.0


def test_figures_and_provenance_are_in_the_layer() -> None:
    viewer = ViewerModel()
    picture = grey_image(40, 56)
    labels = segment(viewer, viewer.add_image(picture, scale=(5, 8), units=("nm", "nm")))
    record = json.loads(json.dumps(labels.metadata[METADATA_KEY]))
    counts = np.bincount(toy_labels(picture).ravel(), minlength=3)
    names = [info.name for info in CLASSES]
    assert record["fractions"] == pytest.approx(dict(zip(names, counts / picture.size, strict=True)))
    assert record["areas_m2"] == pytest.approx(dict(zip(names, counts * 40e-18, strict=True)))
    assert record["pixel_size_m"] == pytest.approx([5e-9, 8e-9])
    result = record["planes"][""]["result"]
    assert (result["model"], result["engine"]) == ("toy", "numpy")
    assert list(labels.features["class"]) == names
    assert list(labels.features["fraction"]) == pytest.approx(counts / picture.size)
    assert list(labels.features["area / µm²"]) == pytest.approx(counts * 4e-5)


def test_planes_of_a_stack_come_into_one_layer() -> None:
    viewer = ViewerModel()
    stack = np.stack([grey_image(16, 24, seed) for seed in range(4)])
    source = viewer.add_image(stack, scale=(10, 5, 5), translate=(100, 0, 0), units=("nm",) * 3)
    viewer.dims.set_point(0, 120)
    labels = segment(viewer, source)
    assert_same_place(labels, source)
    assert [int(plane.max()) == IGNORE_INDEX for plane in labels.data] == [True, True, False, True]
    np.testing.assert_array_equal(labels.data[2], toy_labels(stack[2]))
    assert sum(labels.metadata[METADATA_KEY]["planes"]["2"]["pixels"]) == 16 * 24
    assert segment(viewer, source, all_planes=True) is labels
    for plane, picture in zip(labels.data, stack, strict=True):
        np.testing.assert_array_equal(plane, toy_labels(picture))
    assert sum(labels.metadata[METADATA_KEY]["fractions"].values()) == pytest.approx(1)
    assert list(labels.metadata[METADATA_KEY]["planes"]) == ["2", "0", "1", "3"]
    # Another model or shape starts the stack anew.
    viewer.dims.set_point(0, 110)
    assert segment(viewer, source, model="b") is labels
    assert list(labels.metadata[METADATA_KEY]["planes"]) == ["1"]
    assert [int(plane.max()) == IGNORE_INDEX for plane in labels.data] == [True, False, True, True]
    source.data = np.stack([grey_image(8, 24, seed) for seed in range(3)])
    assert segment(viewer, source) is labels
    assert labels.data.shape == (3, 8, 24)


def test_confidence_is_a_hidden_layer_that_is_never_out_of_date() -> None:
    viewer = ViewerModel()
    picture = grey_image(40, 56)
    source = viewer.add_image(picture, **NM)
    labels = segment(viewer, source, confidence=True)
    confidence = find_layer(viewer, source, "confidence")
    assert isinstance(confidence, Image)
    assert list(viewer.layers) == [source, confidence, labels]
    assert_same_place(confidence, source)
    assert not confidence.visible
    expected = Segmenter(ToyEngine(), confidence=True).segment(picture).confidence
    np.testing.assert_array_equal(confidence.data, expected)
    segment(viewer, source)
    assert list(viewer.layers) == [source, labels]


def test_labels_follow_their_source_and_a_second_run_updates_them() -> None:
    viewer = ViewerModel()
    source = viewer.add_image(grey_image(40, 56))
    labels = segment(viewer, source)
    assert labels.metadata[METADATA_KEY]["areas_m2"] is None
    source.scale, source.units, source.translate, source.rotate = (4, 4), ("nm", "nm"), (70, 8), 45
    assert_same_place(labels, source)
    labels.name, labels.opacity = "mine", 0.9
    earlier = ResultLayers(viewer, source, layer_planes(source, viewer.dims))
    source.data, source.name = grey_image(40, 56, seed=8), "renamed"
    with pytest.raises(UserError, match="got other data while it was segmented"):
        earlier.add(PlaneResult((), Segmenter(ToyEngine()).segment(grey_image(40, 56))))
    assert segment(viewer, source, first_class=True) is labels
    np.testing.assert_array_equal(labels.data, toy_labels(grey_image(40, 56, seed=8)))
    assert len(viewer.layers) == 2
    assert (labels.name, labels.opacity) == ("mine", 0.9)
    shown = labels.colormap.map(np.array([0, 1, 2, IGNORE_INDEX], np.uint8))
    np.testing.assert_array_equal(shown[:, 3], [1, 1, 1, 0])
    assert sum(labels.metadata[METADATA_KEY]["areas_m2"].values()) == pytest.approx(40 * 56 * 16e-18)


@pytest.mark.parametrize("kind", ["multiscale", "colour"])
def test_other_kinds_of_image_layers_have_grey_results_of_level_0(kind: str) -> None:
    viewer, grey = ViewerModel(), grey_image(64, 96)
    if kind == "colour":
        source = viewer.add_image(np.repeat(grey[..., None], 3, axis=2), rgb=True, **NM)
    else:
        source = viewer.add_image([grey, grey[::2, ::2], grey[::4, ::4]], multiscale=True, **NM)
    labels = segment(viewer, source)
    np.testing.assert_array_equal(labels.data, toy_labels(grey))
    assert_same_place(labels, source)


def test_a_stack_whose_labels_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(napari_layers, "MAX_STACK_BYTES", 1000)
    viewer = ViewerModel()
    source = viewer.add_image(np.zeros((3, 16, 24), np.uint8), name="huge")
    with pytest.raises(UserError, match="the whole stack 'huge' would take"):
        segment(viewer, source)
    assert list(viewer.layers) == [source]
