"""What laboratories measure, of shapes with known answers, and what must hold for any label maps."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from hpddrnet_trt.accuracy import measurements
from hpddrnet_trt.accuracy.measurements import (
    FIGURES,
    Labels,
    Measured,
    boundary_f,
    boundary_lengths,
    centerline_f,
    class_errors,
    hausdorff,
    mean_boundary_f,
    mean_centerline_f,
    mean_distance,
    measure,
)
from hpddrnet_trt.core.manifest import ClassInfo
from hpddrnet_trt.results.regions import regions

maps = hnp.arrays(np.uint8, (9, 12), elements=st.sampled_from([0, 1, 2, 255]))
KEYS = [figure.key for figure in FIGURES]


def disc(radius: float, size: int = 200, offset: int = 0) -> Labels:
    rows, columns = np.ogrid[:size, :size]
    middle = (size - 1) / 2
    return ((rows - middle) ** 2 + (columns - middle - offset) ** 2 <= radius**2).astype(np.uint8)


def bands(degrees: float, size: int = 400) -> tuple[Labels, float]:
    """Two classes with a straight boundary through the middle, and its length."""
    angle = math.radians(degrees)
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    labels = (x * math.sin(angle) - y * math.cos(angle) > 0.01).astype(np.uint8)
    return labels, size / max(abs(math.cos(angle)), abs(math.sin(angle)))


def test_boundary_of_a_disc_and_of_lines_of_all_directions() -> None:
    np.testing.assert_allclose(boundary_lengths(disc(60), 2), 2 * math.pi * 60, rtol=0.01)
    ratios = []
    for degrees in range(0, 180, 5):
        labels, length = bands(degrees)
        ratios.append(boundary_lengths(labels, 2)[0] / length)
    assert np.mean(ratios) == pytest.approx(1, abs=0.01)
    assert max(abs(ratio - 1) for ratio in ratios) < 0.06


def test_the_pictures_edge_and_what_is_not_labelled_are_no_boundary() -> None:
    assert not boundary_lengths(np.ones((30, 30), np.uint8), 2).any()
    labels, _ = bands(0, 60)
    labels[20:40] = 255
    assert not boundary_lengths(labels, 2).any()


def test_each_class_has_its_boundary_to_all_others() -> None:
    labels = np.repeat(np.arange(3, dtype=np.uint8), 20)[np.newaxis].repeat(60, axis=0)
    first, second, third = boundary_lengths(labels, 4)[:3]
    assert second == pytest.approx(first + third)
    assert boundary_lengths(labels, 4)[3] == 0


@settings(deadline=None, max_examples=40)
@given(maps)
def test_objects_and_sizes_are_those_of_regions(labels: Labels) -> None:
    found = measure(labels, labels, 3)
    measured = regions(labels, [ClassInfo(name=name, color=(place, 0, 0)) for place, name in enumerate("abc")])
    for index in range(3):
        diameters = measured.equivalent_diameter_px[measured.class_index == index]
        assert found.predicted[KEYS.index("objects"), index] == len(diameters)
        if len(diameters):
            assert found.predicted[KEYS.index("diameter_px"), index] == pytest.approx(diameters.mean())
        else:
            assert math.isnan(found.predicted[KEYS.index("diameter_px"), index])


@settings(deadline=None, max_examples=40)
@given(maps, maps)
def test_distance_is_symmetric_nothing_for_equal_maps_and_as_by_brute_force(truth: Labels, predicted: Labels) -> None:
    predicted[truth == 255] = 255
    truth[predicted == 255] = 255
    for index in range(3):
        found = hausdorff(truth, predicted, index)
        # OpenCV's distances are of single precision, and their last digit depends on where an array lies in memory.
        assert found == pytest.approx(hausdorff(predicted, truth, index), rel=1e-6, nan_ok=True)
        same = hausdorff(truth, truth, index)
        assert same == 0 if (truth == index).any() else math.isnan(same)
        if found > 0:
            edges = [np.argwhere(measurements._boundary(labels, index)) for labels in (truth, predicted)]
            table = np.linalg.norm(edges[0][:, np.newaxis] - edges[1][np.newaxis], axis=2)
            expected = max(np.percentile(table.min(axis=side), 95) for side in (0, 1))
            assert found == pytest.approx(expected, rel=1e-5)


def test_distance_of_shifted_discs_and_absent_classes() -> None:
    one, other = disc(40), disc(40, offset=10)
    assert 9 < hausdorff(one, other, 1) <= 10
    empty = np.zeros_like(one)
    assert math.isnan(hausdorff(one, empty, 1))
    assert math.isnan(hausdorff(empty, one, 1))
    assert math.isnan(hausdorff(empty, one, 0))  # fills one of both
    assert hausdorff(empty, empty, 0) == 0


def test_one_stray_object_does_not_decide_the_distance() -> None:
    truth = disc(60)
    stray = truth.copy()
    stray[2:4, 2:4] = 1
    assert hausdorff(truth, stray, 1) == 0
    away = ndimage.distance_transform_edt(1 - truth)[2:4, 2:4].max()
    assert away > 60


def test_distances_of_large_pictures_are_exact_to_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = disc(40), disc(40, offset=12)
    exact = hausdorff(one, other, 1)
    monkeypatch.setattr(measurements, "LARGEST", one.size // 9)
    assert hausdorff(one, other, 1) == pytest.approx(exact, abs=3)
    assert hausdorff(one, one, 1) == 0
    assert hausdorff(one, other, 1) == pytest.approx(hausdorff(other, one, 1), rel=1e-6)


def test_the_boundary_score_forgives_one_pixel_and_no_more() -> None:
    line = np.zeros((20, 30), np.uint8)
    line[8:11] = 1  # three pixels wide, as a crack
    for moved, expected in ((0, 1), (1, 1), (2, 0.5), (9, 0)):
        assert boundary_f(line, np.roll(line, moved, axis=0), 1) == pytest.approx(expected), moved
    assert boundary_f(line, np.zeros_like(line), 1) == 0
    assert math.isnan(boundary_f(np.zeros_like(line), np.zeros_like(line), 1))
    assert boundary_f(line, np.where(line == 1, 255, line).astype(np.uint8), 1) == 0


def test_the_centerline_score_forgives_width_and_counts_gaps() -> None:
    line = np.zeros((20, 200), np.uint8)
    line[8:11] = 1
    wide, broken, gone = line.copy(), line.copy(), np.zeros_like(line)
    wide[6:13] = 1
    broken[:, 80:120] = 0
    assert centerline_f(line, line, 1) == centerline_f(line, wide, 1) == 1  # IoU: 3 / 7
    assert centerline_f(line, broken, 1) == pytest.approx(2 * 0.8 / 1.8, abs=0.01)  # a fifth is missing
    assert centerline_f(line, np.roll(line, 4, axis=0), 1) == 0
    assert centerline_f(line, gone, 1) == centerline_f(gone, line, 1) == 0
    assert math.isnan(centerline_f(gone, gone, 1))
    assert math.isnan(centerline_f(np.ones_like(line), np.ones_like(line), 1))  # thicker than any line


@settings(deadline=None, max_examples=40)
@given(maps, maps)
def test_the_centerline_score_is_symmetric_and_whole_for_what_is_equal(truth: Labels, predicted: Labels) -> None:
    for index in range(3):
        score = centerline_f(truth, predicted, index)
        np.testing.assert_equal(score, centerline_f(predicted, truth, index))
        assert math.isnan(score) or 0 <= score <= 1
        own = centerline_f(truth, truth, index)
        assert math.isnan(own) or own == 1


@settings(deadline=None, max_examples=40)
@given(maps, maps, maps)
def test_ignored_pixels_never_count(truth: Labels, predicted: Labels, other: Labels) -> None:
    changed = np.where(truth == 255, other, predicted)
    first, second = measure(truth, predicted, 3), measure(truth, changed, 3)
    for key in ("truth", "predicted", "hausdorff_px", "boundary_f", "centerline_f"):
        np.testing.assert_array_equal(getattr(first, key), getattr(second, key))


def measured(truth: float, predicted: float, distance: float = math.nan, score: float = math.nan) -> Measured:
    figures = [np.full((len(FIGURES), 1), value) for value in (truth, predicted)]
    return Measured(*figures, np.array([distance]), np.array([score]), np.array([score]))


def test_errors_over_pictures() -> None:
    pictures = [measured(10, 12, 3), measured(30, 28, 5), measured(20, 26), measured(0, 0), measured(math.nan, 4)]
    area, objects, *_ = class_errors(pictures, [None] * 5, 0)
    assert (area.truth, area.predicted, area.error.units) == (20, 22, 3)
    assert area.error.value == pytest.approx(2)
    assert area.size.value == pytest.approx(10 / 3)
    assert objects.error.value == pytest.approx(0.1)  # 6 more of 60
    assert objects.size.value == pytest.approx(10 / 60)
    assert str(area.error.remark).startswith("no interval: 3 pictures")
    distance = mean_distance(pictures, [None] * 5, 0)
    assert (distance.value, distance.units) == (4, 2)
    for mean in (mean_boundary_f, mean_centerline_f):
        score = mean([measured(1, 1, score=value) for value in (0.5, 1, math.nan)], [None] * 3, 0)
        assert (score.value, score.units) == (0.75, 2)
    nothing = class_errors([measured(math.nan, math.nan)], [None], 0)[1]
    assert math.isnan(nothing.error.value)
    assert nothing.error.units == 0


def test_errors_of_specimens_have_specimens_as_units() -> None:
    pictures = [measured(10, 10 + place) for place in range(12)]
    groups: list[str | None] = [str(place // 2) for place in range(12)]
    of_specimens = class_errors(pictures, groups, 0)[0].error
    assert of_specimens.units == 6
    assert class_errors(pictures, [None] * 12, 0)[0].error.value == pytest.approx(of_specimens.value)
    assert of_specimens.low is not None
    assert of_specimens.low < of_specimens.value < (of_specimens.high or 0)
