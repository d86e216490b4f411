"""Temperature, reliability and the error of fractions, on scores whose truth is drawn from them."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats

from hpddrnet_trt.core.manifest import FractionErrorRecord, Manifest, NetworkConfig
from hpddrnet_trt.core.metrics import arg_max, softmax
from hpddrnet_trt.core.uncertainty import (
    BINS,
    STEP,
    Reliability,
    ScoredPicture,
    calibrated,
    fit_fraction_errors,
    fit_temperature,
    fraction_errors,
    half_widths,
    mean_fraction,
    uncertain_shares,
)

Real = npt.NDArray[np.float32]


def smooth(rng: np.random.Generator, classes: int, edge: int, scale: int) -> Real:
    """Logits ``[C, edge, edge]`` with features of ``scale`` pixels."""
    coarse = rng.standard_normal((classes, edge // scale + 2, edge // scale + 2), dtype=np.float32)
    planes = [cv2.resize(plane, (edge, edge), interpolation=cv2.INTER_CUBIC) for plane in coarse]
    return np.stack(planes).astype(np.float32) * 4


def drawn(rng: np.random.Generator, logits: Real) -> npt.NDArray[np.uint8]:
    """Labels ``[H, W]``, each drawn from the softmax of its logits ``[C, H, W]``."""
    noise = rng.gumbel(size=logits.shape).astype(np.float32)
    return arg_max((logits + noise)[np.newaxis])[0]


def picture(rng: np.random.Generator, temperature: float = 1.0, edge: int = 256) -> ScoredPicture:
    """Scores that are true at ``temperature``."""
    logits = smooth(rng, 3, edge, 16)
    seen = softmax(logits[np.newaxis] * np.float32(temperature))[0]
    return ScoredPicture(seen[:, ::STEP, ::STEP], arg_max(seen[np.newaxis])[0], drawn(rng, logits))


def shifted(rng: np.random.Generator, edge: int, spread: float) -> ScoredPicture:
    """A picture whose boundaries are all moved: class 1 is told by a margin that is off by one number."""
    margin = smooth(rng, 1, edge, 24)[0] * 2
    logits = np.stack([np.zeros_like(margin), margin])
    scores = softmax(logits[np.newaxis])[0]
    truth = (margin + spread * rng.standard_normal() > 0).astype(np.uint8)
    return ScoredPicture(scores[:, ::STEP, ::STEP], arg_max(scores[np.newaxis])[0], truth)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_that_scores_were_spoilt_with_is_found(temperature: float) -> None:
    rng = np.random.default_rng(1)
    pictures = [picture(rng, temperature) for _ in range(3)]
    assert fit_temperature(pictures) == pytest.approx(temperature, rel=0.06)


def test_pixels_without_label_do_not_count_and_nothing_labelled_gives_1() -> None:
    one = picture(np.random.default_rng(2), 2.0)
    spoilt = one.truth.copy()
    spoilt[:128] = 255
    found = fit_temperature([one._replace(truth=spoilt)])
    upper = ScoredPicture(one.probabilities[:, 32:], one.labels[128:], one.truth[128:])
    assert found == fit_temperature([upper])
    assert fit_temperature([one._replace(truth=np.full_like(one.truth, 255))]) == 1.0


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1 << 30), st.floats(0.06, 15))
def test_calibrating_is_dividing_logits_and_keeps_every_label(seed: int, temperature: float) -> None:
    logits = np.random.default_rng(seed).normal(0, 3, (2, 4, 5, 6)).astype(np.float32)
    found = calibrated(softmax(logits), temperature)
    assert np.allclose(found, softmax(logits / np.float32(temperature)), atol=2e-5)
    assert np.array_equal(arg_max(found), arg_max(logits))


def test_without_temperature_probabilities_are_the_same_array() -> None:
    scores = softmax(np.zeros((1, 2, 3, 3), np.float32))
    assert calibrated(scores, None) is scores


def test_the_calibration_error_is_that_of_the_definition_and_falls_with_the_right_temperature() -> None:
    probabilities = np.zeros((2, 1, 10), np.float32)
    probabilities[0], probabilities[1] = 0.9, 0.1
    truth = np.zeros((1, 10 * STEP), np.uint8)
    truth[:, ::STEP] = [0, 0, 0, 0, 0, 0, 1, 1, 255, 255]  # 6 of 8 right where 0.9 was said
    one = ScoredPicture(probabilities, np.zeros_like(truth), truth)
    found = Reliability.of([one], None)
    assert found.expected_calibration_error == pytest.approx(0.15, abs=1e-6)
    assert found.sums[0].tolist() == [0] * 13 + [8, 0]
    assert len(found.accuracy) == BINS
    rng = np.random.default_rng(3)
    pictures = [picture(rng, 3.0) for _ in range(2)]
    before, after = (Reliability.of(pictures, value).expected_calibration_error for value in (None, 3.0))
    assert before > 5 * after
    assert after < 0.015


def test_crops_see_the_same_pixels_as_the_whole() -> None:
    rng = np.random.default_rng(4)
    one = picture(rng)
    crops, whole = fraction_errors([one], None, 128), fraction_errors([one], None)
    assert crops is not None
    assert whole is not None
    assert crops.errors.shape == (4, 3)
    assert crops.errors.mean(axis=0) == pytest.approx(whole.errors[0])
    assert crops.shares.mean(axis=0) == pytest.approx(whole.shares[0])
    assert whole.shares[0] == pytest.approx(uncertain_shares(one.probabilities, None))
    assert fraction_errors([one], None, 512) is None


def test_a_shared_error_does_not_shrink_with_the_picture_and_independent_ones_do() -> None:
    rng = np.random.default_rng(5)
    shared = fit_fraction_errors([shifted(rng, 256, 2.0) for _ in range(12)], None)
    independent = fit_fraction_errors([picture(rng) for _ in range(12)], None)
    assert shared is not None
    assert independent is not None
    assert shared.shared > 0.7
    assert shared.shared * 256 > shared.patch
    assert independent.patch > 256 * independent.shared


@pytest.mark.parametrize("known", [2, 6])
def test_intervals_of_new_pictures_hold_their_true_fraction(known: int) -> None:
    """Also where only two were held out, and of pictures of other sizes."""
    rng = np.random.default_rng(6)
    inside = []
    for _ in range(12):
        record = fit_fraction_errors([shifted(rng, 256, 1.5) for _ in range(known)], None)
        assert record is not None
        for edge in (128, 384):
            one = shifted(rng, edge, 1.5)
            half = half_widths(uncertain_shares(one.probabilities, None), edge**2, record)
            inside.append(abs(float((one.labels == 1).mean() - (one.truth == 1).mean())) <= half[1])
    assert np.mean(inside) >= 0.88


def test_a_larger_picture_than_were_measured_gets_no_narrower_interval() -> None:
    record = FractionErrorRecord(shared=0.3, patch=100, pixels=512**2, pictures=4)
    shares = np.array([0.1, 0.0])
    widths = [half_widths(shares, edge**2, record)[0] for edge in (128, 512, 2048)]
    assert widths[0] > widths[1] == widths[2]
    assert half_widths(shares, 512**2, record)[1] > 0  # a class of which the model sees nothing


def test_pictures_without_labels_give_no_record() -> None:
    one = picture(np.random.default_rng(7))
    assert fit_fraction_errors([one._replace(truth=np.full_like(one.truth, 255))], None) is None


def test_descriptions_carry_both_and_those_without_load_as_before() -> None:
    plain = Manifest(network=NetworkConfig(num_classes=2), classes=[
        {"name": "a", "color": (0, 0, 0)}, {"name": "b", "color": (1, 1, 1)}])  # fmt: skip
    assert plain.temperature is plain.fraction_errors is None
    record = FractionErrorRecord(shared=0.3, patch=100, pixels=4, pictures=2, source="x/val")
    described = plain.replace(temperature=1.3, fraction_errors=record)
    assert Manifest.model_validate_json(described.to_json()) == described
    for wrong in (0.0, -1.0, 21.0, float("nan")):
        with pytest.raises(ValidationError):
            plain.replace(temperature=wrong)


def test_the_mean_of_a_specimens_pictures_has_students_interval() -> None:
    fractions = [0.20, 0.24, 0.22, 0.26]
    found = mean_fraction(fractions)
    low, high = stats.t.interval(0.95, 3, np.mean(fractions), stats.sem(fractions))
    assert (found.value, found.low, found.high) == pytest.approx((0.23, low, high), rel=2e-3)
    assert found.deviation == pytest.approx(np.std(fractions, ddof=1))
    assert found.relative_accuracy == pytest.approx(100 * (high - 0.23) / 0.23, rel=2e-3)
    assert found.more is not None
    n = 4 + found.more  # the fewest pictures that halve it
    halves = [stats.t.ppf(0.975, count - 1) * found.deviation / count**0.5 for count in (n - 1, n)]
    assert halves[1] <= (high - 0.23) / 2 < halves[0]


def test_one_picture_has_no_interval_and_the_models_own_error_stays() -> None:
    assert mean_fraction([0.3], 0.01).low is mean_fraction([0.3], 0.01).more is None
    alone, own = mean_fraction([0.2, 0.3, 0.25]), mean_fraction([0.2, 0.3, 0.25], 0.05)
    assert alone.high is not None
    assert own.high is not None
    assert own.high - 0.25 == pytest.approx(np.hypot(alone.high - 0.25, 0.05))
    assert own.more is not None
    assert alone.more is not None
    assert own.more > alone.more
    assert mean_fraction([0.25, 0.2501, 0.2499], 0.05).more is None
    exact = mean_fraction([0.5, 0.5])
    assert (exact.low, exact.high, exact.more) == (0.5, 0.5, 0) or exact.more is None
