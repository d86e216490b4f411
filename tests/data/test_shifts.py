"""Shifts: nothing at the neutral value, the physics they claim elsewhere, labels never invented."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.data.shifts import SHIFTS, Shift, brightness, contrast, defocus, gamma, magnification, noise
from tests.toy import grey_image

shapes = st.tuples(st.integers(1, 20), st.integers(1, 20))
grey_images = hnp.arrays(np.uint8, shapes)
sweeps = pytest.mark.parametrize("shift", SHIFTS, ids=lambda shift: shift.name)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def no_mask(image: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.zeros(image.shape, np.uint8)


@sweeps
def test_sweeps_rise_and_pass_the_neutral_value(shift: Shift) -> None:
    assert list(shift.values) == sorted(set(shift.values))
    assert shift.neutral in shift.values
    assert 5 <= len(shift.values) <= 12
    assert not shift.logarithmic or min(shift.values) > 0


@sweeps
@given(image=grey_images)
def test_the_neutral_value_returns_its_input(shift: Shift, image: npt.NDArray[np.uint8]) -> None:
    mask = image % 4
    generator = rng()
    shifted, labels = shift(image, mask, shift.neutral, generator)
    assert shifted is image
    assert labels is mask
    assert generator.random() == rng().random()  # nothing was drawn


@sweeps
@given(data=st.data(), image=grey_images)
def test_every_value_gives_a_pair_of_one_size_and_changes_no_input(
    shift: Shift, data: st.DataObject, image: npt.NDArray[np.uint8]
) -> None:
    value = data.draw(st.sampled_from(shift.values))
    mask = np.where(image % 5 == 4, 255, image % 5).astype(np.uint8)
    before = image.copy(), mask.copy()
    shifted, labels = shift(image, mask, value, rng())
    assert shifted.dtype == labels.dtype == np.uint8
    assert shifted.shape == labels.shape
    assert set(np.unique(labels)) <= set(np.unique(mask))
    if not shift.resizes:
        assert shifted.shape == image.shape
        np.testing.assert_array_equal(labels, mask)
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(mask, before[1])


@sweeps
def test_the_same_seed_gives_the_same_picture(shift: Shift) -> None:
    image = grey_image(24, 30, 3)
    first, again = (shift(image, no_mask(image), shift.values[1], rng(5))[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("shift", [shift for shift in SHIFTS if not shift.resizes], ids=lambda shift: shift.name)
def test_farther_from_neutral_is_farther_from_the_picture(shift: Shift) -> None:
    image = grey_image(64, 64, 1)
    distances = [
        float(np.abs(shift(image, no_mask(image), value, rng())[0].astype(float) - image).mean())
        for value in shift.values
    ]
    place = shift.values.index(shift.neutral)
    assert distances[: place + 1] == sorted(distances[: place + 1], reverse=True)
    assert distances[place:] == sorted(distances[place:])
    assert distances[place] == 0
    assert sum(distance == 0 for distance in distances) == 1


def test_grey_levels_by_hand() -> None:
    image = np.array([[0, 100, 200]], np.uint8)
    assert contrast(image, no_mask(image), 0.5, rng())[0].tolist() == [[50, 100, 150]]
    assert contrast(image, no_mask(image), 2.0, rng())[0].tolist() == [[0, 100, 255]]
    assert brightness(image, no_mask(image), -60, rng())[0].tolist() == [[0, 40, 140]]
    assert brightness(image, no_mask(image), 60, rng())[0].tolist() == [[60, 160, 255]]
    expected = [[0, round(255 * (100 / 255) ** 2), round(255 * (200 / 255) ** 2)]]
    assert gamma(image, no_mask(image), 2.0, rng())[0].tolist() == expected


@pytest.mark.parametrize(("grey", "dose"), [(60, 40.0), (128, 20.0), (128, 320.0)])
def test_noise_is_that_of_counting_electrons(grey: int, dose: float) -> None:
    image = np.full((200, 200), grey, np.uint8)
    noisy = noise(image, no_mask(image), dose, rng(2))[0].astype(float)
    electrons = grey / 255 * dose
    assert noisy.mean() == pytest.approx(grey, rel=0.02)
    assert noisy.std() == pytest.approx(255 / dose * math.sqrt(electrons), rel=0.05)
    assert abs(np.corrcoef(noisy[:, :-1].ravel(), noisy[:, 1:].ravel())[0, 1]) < 0.03


@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_defocus_spreads_a_point_as_its_probe(sigma: float) -> None:
    image = np.zeros((61, 61), np.uint8)
    image[20:41, 20:41] = 250
    blurred = defocus(image, no_mask(image), sigma, rng())[0].astype(float)
    slope = np.diff(blurred[30, 8:31])  # across an edge: the probe itself
    places = np.arange(slope.size)
    middle = (slope * places).sum() / slope.sum()
    assert blurred.sum() == pytest.approx(image.astype(float).sum(), rel=0.01)
    assert math.sqrt((slope * (places - middle) ** 2).sum() / slope.sum()) == pytest.approx(sigma, rel=0.08)
    assert np.unique(defocus(np.full((5, 4), 77, np.uint8), no_mask(np.zeros((5, 4))), sigma, rng())[0]) == [77]


def test_magnification_scales_image_and_mask_together() -> None:
    mask = np.kron(np.array([[0, 1], [2, 255]]), np.ones((8, 8))).astype(np.uint8)
    image = np.where(mask == 255, 30, mask * 100).astype(np.uint8)
    smaller, labels = magnification(image, mask, 0.5, rng())
    np.testing.assert_array_equal(smaller, image[::2, ::2])
    np.testing.assert_array_equal(labels, mask[::2, ::2])
    larger, labels = magnification(image, mask, 2.0, rng())
    assert larger.shape == (32, 32)
    np.testing.assert_array_equal(labels, np.kron(mask, np.ones((2, 2))))
    assert [larger[8, 8], larger[8, 24], larger[24, 8], larger[24, 24]] == [0, 100, 200, 30]


def test_shrinking_averages_over_areas() -> None:
    image = np.array([[0, 100], [100, 200]], np.uint8)
    assert magnification(image, no_mask(image), 0.5, rng())[0].tolist() == [[100]]


@pytest.mark.parametrize("apply", [contrast, gamma, noise, defocus, magnification])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_senseless_values_are_sentences(apply: Any, value: float) -> None:
    with pytest.raises(UsageError, match="must be a positive number"):
        apply(grey_image(4, 4), no_mask(np.zeros((4, 4))), value, rng())
