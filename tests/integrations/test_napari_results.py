"""Results in a viewer without a window: they stay on their image layer, and say what they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.manifest import IGNORE_INDEX
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.integrations import napari_results
from hpddrnet_trt.integrations.napari_job import OpenModel, Progress, Request, segment_planes
from hpddrnet_trt.integrations.napari_layers import layer_planes
from hpddrnet_trt.integrations.napari_results import (
    METADATA_KEY,
    TRANSFORM,
    ResultLayers,
    area_text,
    class_rows,
    find_layer,
    show_class,
)
from tests.integrations.napari_viewer import Image, Labels, ToyModel, ViewerModel
from tests.toy import CLASSES, ToyEngine, grey_image

NM = {"scale": (5.0, 5.0), "units": ("nm", "nm")}


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> ToyModel:
    return ToyModel(monkeypatch)


def segment(viewer: Any, layer: Any, *, all_planes: bool = False, **request: Any) -> Any:
    planes = layer_planes(layer, viewer.dims, all_planes=all_planes)
    shown = ResultLayers(viewer, layer, planes)
    labels = None
    for result in segment_planes(planes, Request("toy", **request), OpenModel(), Progress()):
        labels = shown.add(result)
    return labels


def toy_labels(picture: Any) -> Any:
    return Segmenter(ToyEngine()).segment(picture).labels


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
    other = viewer.add_image(np.zeros((9, 9), np.uint8))
    viewer.layers.selection.active = other
    labels = segment(viewer, source)
    assert isinstance(labels, Labels)
    assert_same_place(labels, source)
    np.testing.assert_array_equal(labels.data, toy_labels(picture))
    assert labels.name == "sample 3 classes"
    assert list(viewer.layers) == [source, labels, other]
    assert viewer.layers.selection.active is other
    assert set(viewer.layers.selection) == {other}


def test_labels_follow_their_source_and_learn_the_pixel_size_later() -> None:
    viewer = ViewerModel()
    source = viewer.add_image(grey_image(40, 56))
    labels = segment(viewer, source)
    assert [row.area_m2 for row in class_rows(labels)] == [None] * 3
    source.scale, source.units, source.translate, source.rotate = (4, 4), ("nm", "nm"), (70, 8), 45
    assert_same_place(labels, source)
    assert sum(row.area_m2 or 0.0 for row in class_rows(labels)) == pytest.approx(40 * 56 * 16e-18)


def test_a_second_run_updates_the_same_layer() -> None:
    viewer = ViewerModel()
    source = viewer.add_image(grey_image(40, 56))
    labels = segment(viewer, source)
    labels.name, labels.opacity = "mine", 0.9
    show_class(labels, 0, True)
    source.data = grey_image(40, 56, seed=8)
    source.name = "renamed"
    assert segment(viewer, source) is labels
    np.testing.assert_array_equal(labels.data, toy_labels(grey_image(40, 56, seed=8)))
    assert len(viewer.layers) == 2
    assert (labels.name, labels.opacity) == ("mine", 0.9)
    assert [row.visible for row in class_rows(labels)] == [True] * 3


def test_two_images_have_their_own_labels() -> None:
    viewer = ViewerModel()
    first, second = viewer.add_image(grey_image(16, 24)), viewer.add_image(grey_image(24, 16))
    labels = [segment(viewer, layer) for layer in (first, second)]
    assert labels[0] is not labels[1]
    assert [find_layer(viewer, layer, "labels") for layer in (first, second)] == labels


def test_classes_have_their_colours_and_names() -> None:
    viewer = ViewerModel()
    picture = grey_image(40, 56)
    labels = segment(viewer, viewer.add_image(picture))
    for index, info in enumerate(CLASSES):
        colour = labels.colormap.color_dict[index]
        np.testing.assert_allclose(colour[:3], np.array(info.color) / 255, atol=1e-6)
        assert colour[3] == (0.0 if index == 0 else 1.0)
        row, column = np.argwhere(labels.data == index)[0]
        assert f"class: {info.name}" in labels.get_status((row, column))["value"]
    assert labels.colormap.color_dict[None][3] == 0.0


def test_a_class_can_be_shown_and_hidden() -> None:
    viewer = ViewerModel()
    labels = segment(viewer, viewer.add_image(grey_image(40, 56)))
    show_class(labels, 0, True)
    show_class(labels, 2, False)
    assert [row.visible for row in class_rows(labels)] == [True, True, False]
    shown = labels.colormap.map(np.array([0, 1, 2, IGNORE_INDEX], np.uint8))
    np.testing.assert_array_equal(shown[:, 3], [1, 1, 0, 0])


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
    assert (result["model"], result["engine"], result["window"]) == ("toy", "numpy", [0.0, 255.0])
    assert [(row.pixels, row.info) for row in class_rows(labels)] == list(zip(counts, CLASSES, strict=True))
    assert area_text(class_rows(labels)[0].area_m2) == f"{counts[0] * 4e-5:.4g}"
    assert area_text(None) == "–"


def test_planes_of_a_stack_come_into_one_layer() -> None:
    viewer = ViewerModel()
    stack = np.stack([grey_image(16, 24, seed) for seed in range(4)])
    source = viewer.add_image(stack, scale=(10, 5, 5), translate=(100, 0, 0), units=("nm",) * 3)
    viewer.dims.set_point(0, 120)
    labels = segment(viewer, source)
    assert_same_place(labels, source)
    assert [int(plane.max()) == IGNORE_INDEX for plane in labels.data] == [True, True, False, True]
    np.testing.assert_array_equal(labels.data[2], toy_labels(stack[2]))
    assert sum(row.pixels for row in class_rows(labels)) == 16 * 24
    assert segment(viewer, source, all_planes=True) is labels
    for plane, picture in zip(labels.data, stack, strict=True):
        np.testing.assert_array_equal(plane, toy_labels(picture))
    rows = class_rows(labels)
    assert sum(row.pixels for row in rows) == stack.size
    assert sum(row.fraction for row in rows) == pytest.approx(1)
    assert list(labels.metadata[METADATA_KEY]["planes"]) == ["2", "0", "1", "3"]


def test_another_model_or_shape_starts_the_stack_anew(toy: ToyModel) -> None:
    viewer = ViewerModel()
    source = viewer.add_image(np.stack([grey_image(16, 24, seed) for seed in range(3)]))
    labels = segment(viewer, source, all_planes=True)
    toy.checksum = "b" * 64
    viewer.dims.set_point(0, 1)
    assert segment(viewer, source) is labels
    assert list(labels.metadata[METADATA_KEY]["planes"]) == ["1"]
    assert [int(plane.max()) == IGNORE_INDEX for plane in labels.data] == [True, False, True]
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


def test_confidence_of_a_stack() -> None:
    viewer = ViewerModel()
    source = viewer.add_image(np.stack([grey_image(16, 24, seed) for seed in range(3)]))
    segment(viewer, source, confidence=True, all_planes=True)
    viewer.dims.set_point(0, 1)
    segment(viewer, source)
    confidence = find_layer(viewer, source, "confidence")
    assert [bool(np.isnan(plane).all()) for plane in confidence.data] == [False, True, False]


def test_a_layer_that_is_gone_or_changed_takes_no_result() -> None:
    viewer = ViewerModel()
    source = viewer.add_image(grey_image(16, 24), name="frame")
    planes = layer_planes(source, viewer.dims)
    (result,) = segment_planes(planes, Request("toy"), OpenModel(), Progress())
    shown = ResultLayers(viewer, source, planes)
    source.data = grey_image(16, 24, seed=1)
    with pytest.raises(UserError, match="'frame' got other data while it was segmented"):
        shown.add(result)
    viewer.layers.remove(source)
    with pytest.raises(UserError, match="'frame' was removed while it was segmented"):
        shown.add(result)
    assert not viewer.layers


def test_a_multiscale_layer_has_labels_of_level_0() -> None:
    viewer = ViewerModel()
    picture = grey_image(64, 96)
    source = viewer.add_image([picture, picture[::2, ::2]], multiscale=True, **NM)
    labels = segment(viewer, source)
    np.testing.assert_array_equal(labels.data, toy_labels(picture))
    assert_same_place(labels, source)


def test_colour_layers_have_grey_results() -> None:
    viewer = ViewerModel()
    grey = grey_image(16, 24)
    source = viewer.add_image(np.repeat(grey[..., None], 3, axis=2), rgb=True, **NM)
    labels = segment(viewer, source)
    np.testing.assert_array_equal(labels.data, toy_labels(grey))
    assert_same_place(labels, source)


def test_a_picture_that_becomes_a_stack() -> None:
    viewer = ViewerModel()
    source = viewer.add_image(grey_image(16, 24), **NM)
    labels = segment(viewer, source)
    source.data = np.stack([grey_image(16, 24, seed) for seed in range(3)])
    assert segment(viewer, source, all_planes=True) is labels
    assert labels.data.shape == (3, 16, 24)
    assert_same_place(labels, source)


def test_a_stack_whose_labels_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(napari_results, "MAX_STACK_BYTES", 1000)
    viewer = ViewerModel()
    source = viewer.add_image(np.zeros((3, 16, 24), np.uint8), name="huge")
    with pytest.raises(UserError, match="the whole stack 'huge' would take"):
        segment(viewer, source)
    assert list(viewer.layers) == [source]


def test_transform_names_every_place_attribute() -> None:
    """Scale and its like are what ``as_layer_data_tuple`` calls by these names."""
    _, described, _ = Image(np.zeros((4, 6))).as_layer_data_tuple()
    assert set(TRANSFORM) <= set(described)


def test_a_real_micrograph_with_the_shipped_model(sem_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    from hpddrnet_trt.data.micrograph import read_mask, read_micrograph

    viewer = ViewerModel()
    source = viewer.add_image(read_micrograph(sem_data / "nasa-super1/images/test/spot1_0d_1.png").pixels)
    planes = layer_planes(source, viewer.dims)
    (result,) = segment_planes(planes, Request("nasa-super1"), OpenModel(), Progress())
    labels = ResultLayers(viewer, source, planes).add(result)
    truth = read_mask(sem_data / "nasa-super1/masks/test/spot1_0d_1.png")
    assert (labels.data == truth).mean() > 0.9
    assert [row.info.name for row in class_rows(labels)] == ["matrix", "secondary", "tertiary"]
