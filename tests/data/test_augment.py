"""Augmentation: picture and mask stay together, no label is invented, everything is repeatable."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

from hpddrnet_trt.core.errors import ContractError
from hpddrnet_trt.data.augment import (
    SHIFTS,
    Augmentation,
    AugmentConfig,
    Shift,
    brightness,
    contrast,
    defocus,
    gamma,
    magnification,
    noise,
)
from hpddrnet_trt.data.paste import paste
from tests.toy import grey_image

Seed = st.integers(0, 2**32 - 2)
GEOMETRY: dict[str, Any] = {
    "contrast": (1, 1), "brightness": (0, 0), "gamma": (1, 1), "noise_probability": 0, "defocus_probability": 0,
}  # fmt: skip


def blobs(height: int, width: int, seed: int = 0, classes: int = 4) -> np.ndarray:
    """Smooth regions: borders are few, so that interpolation at them weighs little."""
    noise = np.random.default_rng(seed).standard_normal((height, width)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 9)
    return (np.argsort(np.argsort(smooth.ravel())) * classes // smooth.size).reshape(height, width).astype(np.uint8)


@settings(max_examples=60, deadline=None)
@given(Seed, st.integers(1, 70), st.integers(1, 70), st.integers(1, 90), st.integers(1, 90))
def test_label_set_and_shape(seed: int, height: int, width: int, crop_height: int, crop_width: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.choice(np.array([0, 3, 200], np.uint8), (height, width))
    image = rng.integers(0, 256, (height, width), dtype=np.uint8)
    kept = image.copy(), mask.copy()
    augment = Augmentation(AugmentConfig(crop=(crop_height, crop_width)))
    crop, labels = augment(image, mask, np.random.default_rng(seed))
    assert crop.shape == labels.shape == (crop_height, crop_width)
    assert crop.dtype == labels.dtype == np.uint8
    assert set(np.unique(labels)) <= set(np.unique(mask)) | {255}
    np.testing.assert_array_equal(image, kept[0])
    np.testing.assert_array_equal(mask, kept[1])


@settings(max_examples=25, deadline=None)
@given(Seed)
def test_pure_function_of_its_generator(seed: int) -> None:
    image, mask = np.random.default_rng(1).integers(0, 256, (80, 90), dtype=np.uint8), blobs(80, 90)
    augment = Augmentation(AugmentConfig(crop=(64, 48)))
    np.random.seed(seed)  # the global state must not matter
    first = augment(image, mask, np.random.default_rng(seed))
    augment(image, mask, np.random.default_rng(seed + 1))
    second = Augmentation(AugmentConfig(crop=(64, 48)))(image, mask, np.random.default_rng(seed))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


@settings(max_examples=40, deadline=None)
@given(Seed)
def test_picture_and_mask_move_together(seed: int) -> None:
    """The mask, stretched to grey levels and augmented as a picture, lands on the augmented mask."""
    mask = blobs(160, 200, seed % 5)
    crop, labels = Augmentation(AugmentConfig(crop=(96, 96), **GEOMETRY))(
        mask * np.uint8(60), mask, np.random.default_rng(seed)
    )
    inside = labels != 255
    # Away from the borders of regions both must say the same. Where the crop is shrunk, a region can be
    # too thin for nearest sampling to meet it, and the cubic picture still feels it: single pixels.
    flat = cv2.dilate(labels, np.ones((5, 5))) == cv2.erode(labels, np.ones((5, 5)))
    assert (flat & inside).sum() > 500
    assert (np.rint(crop[flat & inside] / 60) == labels[flat & inside]).mean() > 0.998
    # At the borders there is no shift: moving one against the other by a pixel only makes it worse.
    guess = np.rint(crop / 60)
    fit = {
        (dy, dx): (guess == np.roll(labels, (dy, dx), (0, 1)))[8:-8, 8:-8][inside[8:-8, 8:-8]].mean()
        for dy in (-1, 0, 1)
        for dx in (-1, 0, 1)
    }
    assert fit[0, 0] == max(fit.values())


@settings(max_examples=40, deadline=None)
@given(Seed)
def test_flips_and_quarter_turns_copy_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image, mask = rng.integers(0, 256, (40, 56), dtype=np.uint8), rng.integers(0, 5, (40, 56), dtype=np.uint8)
    config = AugmentConfig(crop=(24, 24), rotation_probability=0, scale_probability=0, **GEOMETRY)
    crop, labels = Augmentation(config)(image, mask, np.random.default_rng(seed))
    assert not (labels == 255).any()
    both = image.astype(int) * 8 + mask
    wanted = crop.astype(int) * 8 + labels
    windows = np.lib.stride_tricks.sliding_window_view(both, (24, 24))
    turned = [np.rot90(side, turns) for side in (wanted, wanted[:, ::-1]) for turns in range(4)]
    assert any((windows == entry).all(axis=(2, 3)).any() for entry in turned)


def test_horizontal_flips_leave_up_and_down_alone() -> None:
    image, mask = np.random.default_rng(0).integers(0, 256, (50, 60), dtype=np.uint8), blobs(50, 60)
    config = AugmentConfig.none((50, 60)).model_copy(update={"flip": "horizontal"})
    crops = [Augmentation(config)(image, mask, np.random.default_rng(seed)) for seed in range(20)]
    flipped = image[:, ::-1], mask[:, ::-1]
    mirrored = [all(map(np.array_equal, pair, flipped)) for pair in crops]
    same = [all(map(np.array_equal, pair, (image, mask))) for pair in crops]
    assert any(mirrored)
    assert any(same)
    assert all(one != other for one, other in zip(mirrored, same, strict=True))


def test_crop_larger_than_the_picture_mirrors_and_ignores() -> None:
    image, mask = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8), blobs(20, 30)
    crop, labels = Augmentation(AugmentConfig.none((64, 80)))(image, mask, np.random.default_rng(1))
    rows, columns = np.flatnonzero((labels != 255).any(axis=1)), np.flatnonzero((labels != 255).any(axis=0))
    assert (len(rows), len(columns)) == (20, 30)
    np.testing.assert_array_equal(labels[np.ix_(rows, columns)], mask)
    np.testing.assert_array_equal(crop[np.ix_(rows, columns)], image)
    mirrored = np.pad(image, ((rows[0], 63 - rows[-1]), (columns[0], 79 - columns[-1])), mode="reflect")
    np.testing.assert_array_equal(crop, mirrored)


def test_any_angle_and_scale_occur() -> None:
    """A bright line's direction and width in the crop cover all angles and the whole scale range."""
    image = np.zeros((201, 201), np.uint8)
    image[96:105] = 255
    config = AugmentConfig(crop=(65, 65), rotation_probability=1, scale_probability=1, class_balance=1, **GEOMETRY)
    angles, scales = [], []
    for seed in range(200):
        crop, _ = Augmentation(config)(image, (image == 0).astype(np.uint8), np.random.default_rng(seed))
        y, x = np.nonzero(crop > 127)
        if len(x) < 150:
            continue
        values, axes = np.linalg.eigh(np.cov(x, y))
        angles.append(np.arctan2(axes[1, 1], axes[0, 1]) % np.pi)
        scales.append(np.sqrt(12 * values[0]) / 9)
    assert np.histogram(angles, bins=6, range=(0, np.pi))[0].min() >= 5
    assert min(scales) < 0.75
    assert max(scales) > 1.6


def test_class_balance_finds_rare_pixels() -> None:
    mask = np.zeros((300, 300), np.uint8)
    mask[250:253, 40:43] = 1
    image = mask * np.uint8(100)

    def hits(share: float) -> int:
        augment = Augmentation(AugmentConfig(crop=(48, 48), class_balance=share))
        return sum(bool((augment(image, mask, np.random.default_rng(seed))[1] == 1).any()) for seed in range(100))

    assert hits(0.0) < 15
    assert 40 <= hits(1.0) <= 75  # half of the crops aim at it, and nearly all of those see it


def test_shot_noise_has_poisson_variance_and_defocus_softens() -> None:
    image = np.repeat(np.array([[40, 160]], np.uint8), 200, axis=0).repeat(100, axis=1)
    mask = np.zeros_like(image)
    still = AugmentConfig.none((200, 200)).model_dump()
    noisy = AugmentConfig.model_validate({**still, "noise_probability": 1, "dose": (100, 100)})
    crop = Augmentation(noisy)(image, mask, np.random.default_rng(0))[0].astype(float)
    for side, grey in ((crop[:, :90], 40), (crop[:, 110:], 160)):
        assert side.mean() == pytest.approx(grey, abs=0.6)
        assert side.std() == pytest.approx(255 * np.sqrt(grey / 255 * 100) / 100, rel=0.05)
    soft = AugmentConfig.model_validate({**still, "defocus_probability": 1, "defocus": (1.5, 1.5)})
    crop = Augmentation(soft)(image, mask, np.random.default_rng(0))[0]
    assert 20 < np.diff(crop[100].astype(int)).max() < 40  # 120 grey levels over a Gaussian edge


def test_display_changes_keep_the_order_of_grey_levels() -> None:
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)
    config = AugmentConfig.model_validate(
        {**AugmentConfig.none((16, 16)).model_dump(), "contrast": (0.5, 2), "brightness": (-40, 40), "gamma": (0.5, 2)}
    )
    curves = set()
    for seed in range(20):
        crop, _ = Augmentation(config)(image, np.zeros_like(image), np.random.default_rng(seed))
        assert (np.diff(crop.ravel().astype(int)) >= 0).all()
        curves.add(crop.tobytes())
    assert len(curves) == 20


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        (np.zeros((4, 4), np.uint8), np.zeros((4, 5), np.uint8)),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)),
        (np.zeros((4, 4), np.uint16), np.zeros((4, 4), np.uint8)),
        (np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.int64)),
        (np.zeros((0, 4), np.uint8), np.zeros((0, 4), np.uint8)),
    ],
)
def test_wrong_arrays(image: np.ndarray, mask: np.ndarray) -> None:
    with pytest.raises(ContractError, match="must be"):
        Augmentation()(image, mask, np.random.default_rng(0))


@pytest.mark.parametrize(
    "options",
    [
        {"crop": (0, 8)}, {"crops": [(8, 0)]}, {"charging": (5, 1)}, {"scan_noise": (0, 1)},
        {"scale": (2.0, 0.5)}, {"scale": (0, 1)}, {"gamma": (1, float("inf"))},
        {"brightness": (0, 300)}, {"rotation_probability": 1.5}, {"colour_jitter": 1},
    ],
)  # fmt: skip
def test_senseless_settings(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AugmentConfig(**options)


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
    np.testing.assert_array_equal(shift(image, mask, value, rng())[0], shifted)
    assert shifted.dtype == labels.dtype == np.uint8
    assert shifted.shape == labels.shape
    assert set(np.unique(labels)) <= set(np.unique(mask))
    if not shift.resizes:
        assert shifted.shape == image.shape
        np.testing.assert_array_equal(labels, mask)
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(mask, before[1])


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
    averaged = magnification(np.array([[0, 100], [100, 200]], np.uint8), mask[:2, :2], 0.5, rng())[0]
    assert averaged.tolist() == [[100]]
    larger, labels = magnification(image, mask, 2.0, rng())
    assert larger.shape == (32, 32)
    np.testing.assert_array_equal(labels, np.kron(mask, np.ones((2, 2))))
    assert [larger[8, 8], larger[8, 24], larger[24, 8], larger[24, 24]] == [0, 100, 200, 30]


def test_charging_drifts_along_lines_and_scan_noise_is_of_lines() -> None:
    grey, mask = np.full((96, 96), 120, np.uint8), np.zeros((96, 96), np.uint8)

    def crop(**options: Any) -> np.ndarray:
        config = AugmentConfig(crop=(96, 96), rotation_probability=0, flip=False, scale_probability=0,
                               **{**GEOMETRY, **options})  # fmt: skip
        return Augmentation(config)(grey, mask, np.random.default_rng(3))[0].astype(float)

    assert (crop() == 120).all()  # off by default
    lines = crop(scan_noise_probability=1, scan_noise=(4, 4))
    assert np.ptp(lines, axis=1).max() == 0
    assert lines[:, 0].std() == pytest.approx(4, rel=0.3)
    charged = crop(charging_probability=1, charging=(20, 20))
    assert 8 < charged.std() < 30
    assert np.abs(np.diff(charged, axis=0)).max() < 10  # slow
    assert np.abs(np.diff(charged, axis=1)).mean() < np.abs(np.diff(charged, axis=0)).mean()


def test_new_chances_do_not_change_what_the_others_draw() -> None:
    image, mask = grey_image(80, 90), blobs(80, 90)
    plain = Augmentation(AugmentConfig(crop=(64, 64)))(image, mask, np.random.default_rng(5))
    never = AugmentConfig(crop=(64, 64), charging_probability=1e-9, scan_noise_probability=1e-9)
    other = Augmentation(never)(image, mask, np.random.default_rng(5))
    for one, two in zip(plain, other, strict=True):
        np.testing.assert_array_equal(one, two)


def test_etching_moves_the_grey_of_whole_classes_and_no_other_draw() -> None:
    mask = blobs(64, 64, classes=3)
    mask[:8] = 255
    image = np.full(mask.shape, 120, np.uint8)
    plain = AugmentConfig(crop=(64, 64), **GEOMETRY)
    etching = plain.model_copy(update={"etching_probability": 0.5, "etching": (-30.0, 30.0)})
    changed = 0
    for seed in range(60):
        before, labels = Augmentation(plain)(image, mask, np.random.default_rng(seed))
        after, same = Augmentation(etching)(image, mask, np.random.default_rng(seed))
        np.testing.assert_array_equal(labels, same)
        difference = after.astype(int) - before
        assert np.abs(difference).max() <= 30
        if difference.any():
            changed += 1
            for label in np.unique(labels):
                inside = cv2.erode((labels == label).astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
                assert not inside.any() or np.ptp(difference[inside]) <= 1
                assert label != 255 or not difference[inside].any()
    assert 15 <= changed <= 45


def test_the_size_of_a_crop_can_be_another() -> None:
    crop, labels = Augmentation(AugmentConfig(crop=(64, 64)))(
        grey_image(80, 90), blobs(80, 90), np.random.default_rng(0), size=(32, 96)
    )
    assert crop.shape == labels.shape == (32, 96)


def test_rare_regions_are_pasted_where_their_surroundings_are() -> None:
    donor, donor_mask = np.full((40, 60), 100, np.float32), np.zeros((40, 60), np.uint8)
    for column in (10, 30, 50):
        donor_mask[10:14, column : column + 4] = 2
    donor_mask[0:3, 20:24] = 2  # cut by the border
    donor_mask[30:33, 30:33], donor_mask[33, 30:33] = 2, 1  # beside two classes
    donor[donor_mask == 2] = 160
    image, mask = np.full((40, 60), 60, np.float32), np.zeros((40, 60), np.uint8)
    mask[:, 28:] = 1  # no place for the second and third
    mask[12, 25] = 255
    kept = mask.copy()
    assert paste(image, mask, donor, donor_mask, 2) == 1
    there = np.zeros_like(mask, bool)
    there[10:14, 10:14] = True
    np.testing.assert_array_equal(mask == 2, there)
    np.testing.assert_array_equal(mask[~there], kept[~there])
    assert (image[there] == 120).all()  # as much above its surroundings as it was
    assert (image[:, 20:] == 60).all()
    assert paste(image, mask, donor, donor_mask, 3) == 0
