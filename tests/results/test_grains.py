"""Touching objects taken apart, and grain size as ASTM E112 has it: known values, exact shapes, simulated grains."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import cv2
import numpy as np
import pytest

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.results.grains import (
    COLUMNS,
    FIGURES,
    SUMS,
    astm_from_density,
    astm_from_intercept,
    grain_sums,
    in_metres,
    write_grains,
)
from hpddrnet_trt.results.regions import regions
from hpddrnet_trt.results.separate import separate, touching
from tests.toy import CLASSES

pytest.importorskip("skimage")
BACKGROUND = ["grain"]


def discs(*circles: tuple[float, float, float], shape: tuple[int, int] = (120, 160)) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]]
    return np.any([np.hypot(x - a, y - b) <= r for a, b, r in circles], axis=0).astype(np.uint8)


def test_touching_discs_are_taken_apart_and_others_are_not() -> None:
    labels = discs((40, 40, 20), (76, 40, 18), (40, 95, 15), (120, 90, 22), (120, 61, 8))
    assert len(regions(labels, CLASSES, background=BACKGROUND)) == 3
    found = regions(labels, CLASSES, background=BACKGROUND, separate=["pore"])
    assert len(found) == 5
    assert ((found.numbers > 0) == (labels > 0)).all()
    assert found.area_px.sum() == labels.sum()
    assert sorted(found.neighbors) == [0, 1, 1, 1, 1]
    firsts = [np.flatnonzero(found.numbers.ravel() == number)[0] for number in range(1, 6)]
    assert firsts == sorted(firsts)  # numbered by their first pixel, as all regions
    assert found.numbers[40, 50] != found.numbers[40, 70]
    for shape in (cv2.MORPH_ELLIPSE, cv2.MORPH_RECT):  # one convex object stays one, whatever its size and shape
        for size in ((3, 3), (9, 41), (60, 60), (90, 20)):
            single = cv2.copyMakeBorder(cv2.getStructuringElement(shape, size), 4, 4, 4, 4, cv2.BORDER_CONSTANT)
            assert separate(single > 0)[1] == 1, (shape, size)


def test_low_confidence_between_objects_separates_what_has_no_neck() -> None:
    mask = np.zeros((40, 80), bool)
    mask[10:30, 10:70] = True
    assert separate(mask)[1] == 1
    confidence = np.ones(mask.shape, np.float32)
    confidence[:, 38:42] = 0.5
    numbers, count = separate(mask, confidence)
    assert count == 2
    assert numbers[20, 20] != numbers[20, 60]


def test_small_parts_join_their_neighbor_and_no_pixel_is_lost() -> None:
    mask = discs((60, 60, 30), (60, 24, 8)) > 0
    assert separate(mask)[1] == 2
    assert separate(mask, smallest=300)[1] == 1
    assert separate(np.ones((9, 9), bool))[1] == 1
    assert separate(np.zeros((9, 9), bool))[1] == 0
    noise = np.random.default_rng(0).random((60, 60)) < 0.5
    for connectivity in (1, 2):
        numbers, count = separate(noise, connectivity=connectivity)  # type: ignore[arg-type]
        assert ((numbers > 0) == noise).all()
        assert set(np.unique(numbers)) == set(range(count + 1))


def test_touching_pairs_by_hand() -> None:
    numbers = np.array([[1, 1, 0, 4], [2, 0, 3, 0]], np.int32)
    values = np.arange(8, dtype=np.float32).reshape(2, 4)
    assert touching(numbers, 1)[0].tolist() == [[1, 2]]
    pairs, highest = touching(numbers, 2, values)
    assert pairs.tolist() == [[1, 2], [1, 3], [3, 4]]
    assert highest.tolist() == [1, 1, 3]


def test_simulated_grains_are_counted() -> None:
    """Discs of many sizes that overlap by up to an eighth of their diameters: the exact number is known."""
    rng = np.random.default_rng(3)
    circles: list[tuple[float, float, float]] = []
    while len(circles) < 80:
        r = rng.uniform(7, 22)
        x, y, near = rng.uniform(0, 500), rng.uniform(0, 500), None
        if circles and rng.random() < 0.7:
            a, b, near = circles[rng.integers(len(circles))]
            angle, distance = rng.uniform(0, 2 * np.pi), (near + r) * rng.uniform(0.88, 1)
            x, y = a + distance * np.cos(angle), b + distance * np.sin(angle)
        if all(np.hypot(x - a, y - b) >= 0.88 * (r + c) for a, b, c in circles) and 0 < min(x, y) < max(x, y) < 500:
            circles.append((x, y, r))
    labels = discs(*circles, shape=(500, 500))
    assert len(regions(labels, CLASSES, background=BACKGROUND)) < 40
    assert 77 <= len(regions(labels, CLASSES, background=BACKGROUND, separate=["pore"])) <= 81


def test_shapes_of_a_square_a_disc_and_a_bar() -> None:
    labels = np.zeros((100, 200), np.uint8)
    labels[10:30, 10:30] = 1
    labels |= discs((80, 50, 30), shape=labels.shape)
    labels[60, 150:190] = 1
    found = regions(labels, CLASSES, background=BACKGROUND)
    bar, square, disc = np.argsort(found.area_px)
    assert found.solidity[[square, bar]] == pytest.approx([1, 1])
    assert found.solidity[disc] > 0.95
    assert found.feret_px[square] == pytest.approx([math.hypot(20, 20), 20])
    assert found.feret_px[bar] == pytest.approx([math.hypot(40, 1), 1])
    assert found.circularity[disc] == pytest.approx(1, abs=0.03)
    assert found.perimeter_px[disc] == pytest.approx(2 * np.pi * 30.5, rel=0.03)
    assert found.nearest_px[square] == pytest.approx(np.hypot(80 - 19.5, 50 - 19.5))
    assert found.weight[square] == pytest.approx(100 * 200 / (79 * 179))
    cut = regions(discs((0, 60, 20)), CLASSES, background=BACKGROUND)
    assert cut.weight.tolist() == [0]
    assert np.isnan(cut.nearest_px).all()


@pytest.mark.parametrize(
    ("g", "per_mm2", "intercept_um"), [(0, 7.75, 320.0), (5, 248.0, 56.6), (8, 1984.0, 20.0), (10, 7936.0, 10.0)]
)
def test_the_standards_table(g: int, per_mm2: float, intercept_um: float) -> None:
    """Rows of the table of ASTM E112 that relates G, grains per square millimetre and mean intercept."""
    assert astm_from_density(per_mm2 * 1e6) == pytest.approx(g, abs=0.01)
    assert astm_from_intercept(intercept_um * 1e-6) == pytest.approx(g, abs=0.01)


def test_a_chessboard_of_grains() -> None:
    """10 x 10 squares of 20 pixels: 8 x 8 whole, edges count one half, corners one quarter: 81 grains of 400 pixels'
    area are counted in 200 x 200 pixels, as many as cover a frame that runs through the middle of the outer ones."""
    rows, columns = np.mgrid[:200, :200] // 20
    labels = ((rows + columns) % 2).astype(np.uint8)
    found = regions(labels, CLASSES, 1e-6, connectivity=1)
    assert len(found) == 100
    sums = dict(zip(SUMS, grain_sums(found, 0) + grain_sums(found, 1), strict=True))
    assert sums["count"] == 64 + 32 / 2 + 4 / 4
    assert sums["whole"] == 64
    assert sums["length_rows_px"] / sums["chords_rows"] == pytest.approx(200 / 9)  # nine walls in each line of 200
    assert sums["weight_area"] / sums["weight"] == pytest.approx(400)
    metres = in_metres(grain_sums(found, 0), 1e-6)[np.newaxis]
    figures = {name: factor * float(figure(metres)[0]) for name, (_, factor, figure) in FIGURES.items()}
    assert figures["mean_diameter"] == pytest.approx(2 * 20 / math.sqrt(math.pi))
    assert figures["mean_area"] == pytest.approx(400)


def test_mean_intercept_of_a_disc() -> None:
    """It is pi d / 4."""
    sums = dict(zip(SUMS, grain_sums(regions(discs((80, 60, 40)), CLASSES, background=BACKGROUND), 1), strict=True))
    for way in ("rows", "columns", "diagonals"):
        assert sums[f"length_{way}_px"] / sums[f"chords_{way}"] == pytest.approx(math.pi * 80 / 4, rel=0.03)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 2)])
def test_weights_undo_what_the_border_does(width: int, height: int) -> None:
    """A region at every place where it shows in 7 x 6 pixels: its weights add up to those 42, whatever its size; and
    counts to 30, the places of a frame through the middle of the outer pixels."""
    weights = counts = 0.0
    for top in range(1 - height, 6):
        for left in range(1 - width, 7):
            labels = np.zeros((6, 7), np.uint8)
            labels[max(0, top) : top + height, max(0, left) : left + width] = 1
            found = regions(labels, CLASSES, background=BACKGROUND)
            weights += float(found.weight.sum())
            counts += dict(zip(SUMS, grain_sums(found, 1), strict=True))["count"]
    assert weights == pytest.approx(42)
    assert counts == pytest.approx(30)


def test_the_table_and_refusals(tmp_path: Path) -> None:
    labels = discs((40, 40, 20), (76, 40, 18))
    for size in (50e-9, None):
        found = regions(labels, CLASSES, size, background=BACKGROUND, separate=["pore"])
        with write_grains(tmp_path / "x.grains.csv", found).open(newline="") as stream:
            (row,) = csv.DictReader(stream)
        assert row["class"] == "pore"
        assert (float(row["count"]), float(row["whole"])) == (2, 2)
        assert all((row[name] == "") == (size is None) for name in COLUMNS)
    for wrong, said in ((["mortar"], "is no class"), (["grain"], "both background and separated")):
        with pytest.raises(UsageError, match=said):
            regions(labels, CLASSES, background=BACKGROUND, separate=wrong)
    with pytest.raises(UsageError, match="a list of class names"):
        regions(labels, CLASSES, separate="pore")
