"""Area fractions and regions: counted by hand, against scikit-image's own, in physical units or none."""

from __future__ import annotations

import math
from typing import Literal

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hpddrnet_trt.core.errors import ContractError, UsageError
from hpddrnet_trt.results.regions import area_fractions, regions
from tests.toy import CLASSES

skimage = pytest.importorskip("skimage.measure")

PICTURE = np.array(
    [
        [1, 1, 0, 0, 2],
        [1, 0, 0, 2, 0],
        [0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0],
    ],
    np.uint8,
)


def test_area_fractions_with_and_without_a_pixel_size() -> None:
    grain, pore, clay = area_fractions(PICTURE, CLASSES, 2e-6)
    assert [entry.pixels for entry in (grain, pore, clay)] == [12, 6, 2]
    assert [entry.fraction for entry in (grain, pore, clay)] == pytest.approx([0.6, 0.3, 0.1])
    assert pore.area_m2 == pytest.approx(6 * 4e-12)
    assert [entry.area_m2 for entry in area_fractions(PICTURE, CLASSES)] == [None] * 3
    ignored = np.where(PICTURE == 2, 255, PICTURE).astype(np.uint8)
    assert sum(entry.fraction for entry in area_fractions(ignored, CLASSES)) == pytest.approx(0.9)



def test_regions_by_hand() -> None:
    found = regions(PICTURE, CLASSES, 1e-6, background=["grain"])
    assert found.numbers.tolist() == [[1, 1, 0, 0, 2], [1, 0, 0, 2, 0], [0] * 5, [0, 3, 3, 3, 0]]
    assert [found.classes[index].name for index in found.class_index] == ["pore", "clay", "pore"]
    assert found.area_px.tolist() == [3, 2, 3]
    assert found.area_m2 == pytest.approx(np.array([3e-12, 2e-12, 3e-12]))
    assert found.equivalent_diameter_m == pytest.approx(2e-6 * np.sqrt(np.array([3, 2, 3]) / np.pi))
    assert found.centroid_px == pytest.approx(np.array([[1 / 3, 1 / 3], [3.5, 0.5], [2, 3]]))
    assert found.box_px.tolist() == [[0, 0, 2, 2], [3, 0, 2, 2], [1, 3, 3, 1]]
    assert found.touches_border.tolist() == [True, True, True]
    assert found.orientation_deg == pytest.approx([45, 45, 0])  # as seen: rows grow downwards
    assert len(regions(PICTURE, CLASSES, connectivity=1, background=["grain"])) == 4
    assert len(regions(PICTURE, CLASSES, connectivity=1, background=["grain"], smallest=2)) == 2
    everything = regions(PICTURE, CLASSES)
    assert everything.area_px.sum() == PICTURE.size
    assert (everything.area_m2, everything.equivalent_diameter_m) == (None, None)
    none = regions(np.zeros((5, 5), np.uint8), CLASSES, 1e-9, background=["grain"])
    assert (len(none), none.box_px.shape) == (0, (0, 4))
    assert none.area_m2 is not None
    assert none.area_m2.shape == (0,)


@pytest.mark.parametrize("degrees", [0, 20, 60, 90, 135, 170])
def test_orientation_is_counter_clockwise_from_the_horizontal(degrees: int) -> None:
    picture = np.zeros((101, 101), np.uint8)
    cv2.ellipse(picture, (50, 50), (40, 8), -degrees, 0, 360, 1, -1)  # OpenCV turns clockwise
    found = regions(picture, CLASSES, background=["grain"])
    difference = (found.orientation_deg[0] - degrees + 90) % 180 - 90
    assert abs(difference) < 1
    assert found.axes_px[0] == pytest.approx([81, 17], abs=1.5)
    assert not found.touches_border[0]
    picture[:] = 0
    picture[3, 3] = picture[10:15, 10:15] = 1  # a pixel and a square have no direction
    assert np.isnan(regions(picture, CLASSES, background=["grain"]).orientation_deg).all()



SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)


@given(hnp.arrays(np.uint8, SHAPES, elements=st.sampled_from([0, 1, 255])))
def test_regions_are_a_partition_of_the_classes_pixels(labels: np.ndarray) -> None:
    found = regions(labels, CLASSES)
    assert ((found.numbers > 0) == (labels != 255)).all()
    assert np.array_equal(np.bincount(found.numbers.ravel(), minlength=len(found) + 1)[1:], found.area_px)
    for number, (left, top, width, height) in enumerate(found.box_px, start=1):
        rows, columns = np.nonzero(found.numbers == number)
        assert (left, top, left + width, top + height) == (
            columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        )  # fmt: skip
        assert set(labels[rows, columns]) == {found.class_index[number - 1]}
        inside = found.numbers[1:-1, 1:-1]
        assert found.touches_border[number - 1] == ((inside == number).sum() < len(rows))


@given(hnp.arrays(np.uint8, SHAPES, elements=st.sampled_from([0, 1, 1, 255])), st.sampled_from([1, 2]))
def test_figures_are_those_of_other_programs(labels: np.ndarray, connectivity: Literal[1, 2]) -> None:
    """scikit-image's table, and the hull as OpenCV finds it."""
    found = regions(labels, CLASSES, connectivity=connectivity)
    others = skimage.regionprops(found.numbers)
    assert len(others) == len(found)
    for index, other in enumerate(others):
        assert found.area_px[index] == other.area
        assert found.centroid_px[index] == pytest.approx(other.centroid[::-1])
        assert found.equivalent_diameter_px[index] == pytest.approx(other.equivalent_diameter_area)
        assert found.perimeter_px[index] == pytest.approx(other.perimeter_crofton)
        axes = found.axes_px[index]
        assert axes == pytest.approx([other.axis_major_length, other.axis_minor_length], abs=1e-6)
        if axes[0] - axes[1] > 1e-3:
            turned = found.orientation_deg[index] - np.degrees(other.orientation) - 90
            assert (turned + 90) % 180 - 90 == pytest.approx(0, abs=1e-6)
        corners = (other.coords[:, np.newaxis] + [[0, 0], [0, 1], [1, 0], [1, 1]]).reshape(-1, 2).astype(np.int32)
        hull = cv2.convexHull(corners)
        assert found.solidity[index] == pytest.approx(other.area / cv2.contourArea(hull))
        far = np.linalg.norm(hull[:, 0, np.newaxis] - hull[np.newaxis, :, 0], axis=-1).max()
        assert found.feret_px[index, 0] == pytest.approx(far)
        normals = (np.roll(hull[:, 0], -1, axis=0) - hull[:, 0])[:, ::-1] * [-1.0, 1.0]
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        assert found.feret_px[index, 1] == pytest.approx(np.ptp(hull[:, 0] @ normals.T, axis=0).min())


def test_refusals() -> None:
    with pytest.raises(UsageError, match="'mortar' is no class of this model; choose from: grain, pore, clay"):
        regions(PICTURE, CLASSES, background=["mortar"])
    with pytest.raises(UsageError, match="a list of class names"):
        regions(PICTURE, CLASSES, background="grain")
    with pytest.raises(UsageError, match="at least 1 pixel"):
        regions(PICTURE, CLASSES, smallest=0)
    with pytest.raises(UsageError, match="connectivity is 1"):
        regions(PICTURE, CLASSES, connectivity=8)  # type: ignore[arg-type]
    for size in (0.0, -1e-9, math.nan, math.inf):
        for measure in (area_fractions, regions):
            with pytest.raises(UsageError, match="None means unknown"):
                measure(PICTURE, CLASSES, size)  # type: ignore[operator]
    with pytest.raises(ContractError, match="two-dimensional uint8"):
        area_fractions(PICTURE.astype(np.int64), CLASSES)  # type: ignore[arg-type]
