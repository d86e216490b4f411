"""Metrics against mmsegmentation's own figures, and their invariants."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hpddrnet_trt.core.errors import ContractError
from hpddrnet_trt.core.metrics import LabelComparison, Scores, arg_max, score_intervals, softmax

CLASSES = 4
IMAGE = (5, 6)


def matrix(predicted: npt.NDArray[Any], labels: npt.NDArray[Any], classes: int) -> LabelComparison:
    confusion = LabelComparison(classes)
    for guess, truth in zip(predicted, labels, strict=True):
        confusion.update(guess, truth)
    return confusion


def optional(values: list[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


@pytest.mark.parametrize("case", "ABCDEFG")
def test_reference_figures_and_areas(golden: Path, case: str) -> None:
    """Random, good, class absent everywhere or in the labels only, image ignored, 19 classes, out of range."""
    arrays = dict(np.load(golden / "metrics" / "iou_cases.npz"))
    expected = json.loads((golden / "metrics" / "iou_expected.json").read_text())
    assert len(expected) == 7
    name, facts = next((name, facts) for name, facts in expected.items() if name.startswith(case))
    confusion = matrix(arrays[f"{name}_pred"], arrays[f"{name}_label"], facts["num_classes"])
    scores = confusion.scores()
    raw, mean = facts["raw_fraction"], facts["raw_nanmean"]
    np.testing.assert_allclose(scores.iou, optional(raw["IoU"]), rtol=1e-6)
    np.testing.assert_allclose(scores.accuracy, optional(raw["Acc"]), rtol=1e-6)
    np.testing.assert_allclose(scores.dice, optional(raw["Dice"]), rtol=1e-6)
    ours = (scores.pixel_accuracy, scores.miou, scores.mean_accuracy, scores.mean_dice)
    np.testing.assert_allclose(ours, (raw["aAcc"], mean["IoU"], mean["Acc"], mean["Dice"]), rtol=1e-6)
    summary = facts["summary_percent_rounded_all"]
    for value, key in zip(ours, ("aAcc", "mIoU", "mAcc", "mDice"), strict=True):
        assert 100 * value == pytest.approx(summary[key], abs=0.00501)  # rounded to two digits there
    assert scores.images == facts["n_images"]
    square, areas = confusion.counts[:, :-1], facts["total_area"]
    hit = np.diag(square)
    assert hit.tolist() == areas["intersect"]
    assert confusion.counts.sum(axis=1).tolist() == areas["label"]
    assert square.sum(axis=0).tolist() == areas["pred"]
    assert (confusion.counts.sum(axis=1) + square.sum(axis=0) - hit).tolist() == areas["union"]
    assert scores.micro_iou == pytest.approx(sum(areas["intersect"]) / sum(areas["union"]))


def test_by_hand() -> None:
    confusion = LabelComparison(2)
    confusion.update(np.array([[0, 0, 1, 1]]), np.array([[0, 0, 1, 0]]))  # 3 of 4 right: 3 / 5
    confusion.update(np.array([[0, 0]]), np.array([[1, 255]]))  # nothing right
    confusion.update(np.array([[0, 1]]), np.array([[255, 255]]))  # nothing labelled: left out
    scores = confusion.scores()
    assert scores.mean_image_micro_iou == pytest.approx((3 / 5 + 0) / 2)
    assert scores.micro_iou == pytest.approx(3 / 7)  # the larger image counts more here
    assert scores.precision == [pytest.approx(2 / 3), pytest.approx(1 / 2)]
    assert scores.iou == [pytest.approx(2 / 4), pytest.approx(1 / 3)]
    assert scores.miou == pytest.approx((2 / 4 + 1 / 3) / 2)
    assert scores.pixel_accuracy == 3 / 5
    assert scores.images == 3


def test_what_does_not_occur_has_no_figures() -> None:
    """A class that is never predicted has no precision; without a labelled pixel there is none at all."""
    confusion = LabelComparison(2)
    confusion.update(np.array([[0, 0]]), np.array([[0, 1]]))
    scores = confusion.scores()
    assert scores.precision[0] == 1 / 2
    assert math.isnan(scores.precision[1])
    assert scores.iou[1] == 0
    confusion = LabelComparison(2)
    confusion.update(np.zeros((2, 2), np.uint8), np.full((2, 2), 255, np.uint8))
    scores = confusion.scores()
    assert scores.images == 1
    assert all(math.isnan(value) for value in (scores.miou, scores.pixel_accuracy, scores.micro_iou, *scores.iou))
    assert math.isnan(scores.mean_image_micro_iou)


def test_bad_arrays() -> None:
    confusion = LabelComparison(2)
    with pytest.raises(ContractError, match=r"shape \(2, 2\) cannot be compared with ones of \(2, 3\)"):
        confusion.update(np.zeros((2, 2), int), np.zeros((2, 3), int))
    for value in (2, -1, 254):
        with pytest.raises(ContractError, match=f"label value {value} is outside the 2 classes"):
            confusion.update(np.zeros((1, 2), int), np.array([[0, value]]))
    assert (confusion.images, confusion.counts.sum()) == (0, 0)
    confusion.update(np.array([[0, 2, -1, 200]]), np.array([[0, 0, 0, 255]]))  # labels outside the classes are wrong
    assert confusion.counts.tolist() == [[1, 0, 2], [0, 0, 0]]


predictions = hnp.arrays(np.uint8, IMAGE, elements=st.integers(0, CLASSES))  # CLASSES itself is out of range
masks = hnp.arrays(np.uint8, IMAGE, elements=st.sampled_from([*range(CLASSES), 255]))
pairs = st.lists(st.tuples(predictions, masks), min_size=1, max_size=4)


def scores_of(images: list[tuple[Any, Any]]) -> Scores:
    confusion = LabelComparison(CLASSES)
    for predicted, labels in images:
        confusion.update(predicted, labels)
    return confusion.scores()


def same(first: Scores, second: Scores) -> None:
    for name in ("iou", "accuracy", "precision", "dice", "miou", "masked_miou", "mean_accuracy", "pixel_accuracy",
                 "mean_dice", "micro_iou"):  # fmt: skip
        np.testing.assert_allclose(getattr(first, name), getattr(second, name), atol=1e-12)


def one_hot_micro_iou(predicted: Any, labels: Any) -> float:
    """The published definition, word for word: two one-hot volumes, their intersection over their union."""
    channels = np.arange(CLASSES)[:, None, None]
    labelled = labels != 255
    truth, guess = ((array == channels) & labelled for array in (labels, predicted))
    union = np.count_nonzero(truth | guess)
    return np.count_nonzero(truth & guess) / union if union else math.nan


@given(pairs)
def test_micro_iou_averaged_over_images_is_that_of_one_hot_channels(images: list[tuple[Any, Any]]) -> None:
    values = [one_hot_micro_iou(*pair) for pair, labelled in zip(images, (m != 255 for _, m in images), strict=True)
              if labelled.any()]  # fmt: skip
    expected = float(np.mean(values)) if values else math.nan
    assert scores_of(images).mean_image_micro_iou == pytest.approx(expected, nan_ok=True)
    scores = scores_of(images[:1])  # of one image both figures are the same, and follow from its accuracy
    assert scores.mean_image_micro_iou == pytest.approx(scores.micro_iou, nan_ok=True)
    predicted, mask = images[0]
    if predicted[mask != 255].max(initial=0) < CLASSES and not math.isnan(scores.pixel_accuracy):
        assert scores.micro_iou == pytest.approx(scores.pixel_accuracy / (2 - scores.pixel_accuracy))


@given(pairs, pairs)
def test_matrices_add(first: list[tuple[Any, Any]], second: list[tuple[Any, Any]]) -> None:
    total, other = LabelComparison(CLASSES), LabelComparison(CLASSES)
    for confusion, images in ((total, first), (other, second)):
        for predicted, labels in images:
            confusion.update(predicted, labels)
    total.add(other)
    together = scores_of([*first, *second])
    same(total.scores(), together)
    assert total.scores().mean_image_micro_iou == pytest.approx(together.mean_image_micro_iou, nan_ok=True)
    assert total.images == together.images


@given(pairs, predictions)
def test_order_grouping_and_ignored_pixels_do_not_matter(images: list[tuple[Any, Any]], other: Any) -> None:
    together = [(np.concatenate([p for p, _ in images]), np.concatenate([m for _, m in images]))]
    same(scores_of(images), scores_of(images[::-1]))
    same(scores_of(images), scores_of(together))
    same(scores_of(images), scores_of([(np.where(mask == 255, other, predicted), mask) for predicted, mask in images]))


@given(st.lists(st.tuples(masks, masks), min_size=1, max_size=4))
def test_agreement(images: list[tuple[Any, Any]]) -> None:
    """Of label maps, in which nothing is ignored: over all pixels, and of the image where it is least."""
    comparison = LabelComparison(CLASSES, ignore_index=-1)
    maps = [(first % CLASSES, second % CLASSES) for first, second in images]
    for first, second in maps:
        comparison.update(first, second)
    shares = [float(np.mean(first == second)) for first, second in maps]
    assert comparison.agreement == comparison.scores().pixel_accuracy == pytest.approx(np.mean(shares))
    assert comparison.worst_agreement == min(shares)


@given(pairs)
def test_the_two_means_differ_by_the_classes_that_are_only_predicted(images: list[tuple[Any, Any]]) -> None:
    comparison = matrix(*zip(*images, strict=True), CLASSES)  # type: ignore[misc]
    scores, in_truth = comparison.scores(), comparison.counts.any(axis=1)
    masked = [iou for iou, occurs in zip(scores.iou, in_truth, strict=True) if occurs]
    assert scores.masked_miou == pytest.approx(np.mean(masked) if masked else math.nan, nan_ok=True)
    only_predicted = sum(not occurs and not math.isnan(iou) for iou, occurs in zip(scores.iou, in_truth, strict=True))
    if masked:
        assert scores.miou == pytest.approx(scores.masked_miou * len(masked) / (len(masked) + only_predicted))
    names = ["a", "b", "c", "d"]
    assert list(comparison.class_ious(names).values()) == [iou for iou in scores.iou if not math.isnan(iou)]


SCORES = st.integers(2, 6).flatmap(
    lambda classes: hnp.arrays(np.float32, (2, classes, 3, 5), elements=st.integers(-3, 3).map(np.float32))
)


@settings(deadline=None)  # machines can be busy
@given(SCORES)
def test_arg_max_is_numpys_also_on_ties(scores: np.ndarray) -> None:
    labels = arg_max(scores)
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, scores.argmax(axis=1))


@settings(deadline=None)  # machines can be busy
@given(SCORES)
def test_softmax_sums_to_one_and_ignores_shifts(scores: np.ndarray) -> None:
    probabilities = softmax(scores)
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    assert np.allclose(softmax(scores + 1000), probabilities, atol=1e-5)
    assert np.array_equal(arg_max(probabilities), probabilities.argmax(axis=1))
    assert np.allclose(np.log(probabilities[:, 0] / probabilities[:, 1]), scores[:, 0] - scores[:, 1], atol=1e-4)
    assert np.isfinite(softmax(np.array([[[1e5], [-1e5]]], np.float32))).all()


# -- intervals of a split's scores ---------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(st.lists(st.tuples(predictions, masks), min_size=1, max_size=8))
def test_intervals_are_of_the_same_scores(images: list[tuple[Any, Any]]) -> None:
    pictures = [matrix(guess[np.newaxis], truth[np.newaxis], CLASSES) for guess, truth in images]
    total = LabelComparison(CLASSES)
    for picture in pictures:
        total.add(picture)
    found, scores = score_intervals([picture.counts for picture in pictures], [None] * len(pictures)), total.scores()
    names = ("miou", "masked_miou", "pixel_accuracy")
    np.testing.assert_allclose([getattr(found, name).value for name in names],
                               [getattr(scores, name) for name in names], equal_nan=True)  # fmt: skip
    np.testing.assert_allclose([entry.value for entry in found.iou], scores.iou, equal_nan=True)
    for entry in (found.miou, found.masked_miou, found.pixel_accuracy, *found.iou):
        assert (entry.low is None) == (entry.units < 5 or math.isnan(entry.value))
        if entry.low is not None and entry.high is not None:
            assert 0 <= entry.low <= entry.value <= entry.high <= 1


def test_equal_pictures_have_no_width_and_rare_classes_no_interval() -> None:
    truth = np.array([[0, 0, 1, 1, 1, 1]])
    alike = [matrix(np.array([[[0, 1, 1, 1, 1, 1]]]), truth[np.newaxis], 3).counts] * 6
    found = score_intervals(alike, [None] * 6)
    assert found.miou.low == pytest.approx(found.miou.value) == pytest.approx(found.miou.high)
    assert found.rare == []
    other = matrix(np.array([[[2, 2, 1, 1, 1, 1]]]), np.array([[[2, 0, 1, 1, 1, 1]]]), 3).counts
    rare = score_intervals([*alike, other], [None] * 7)
    assert (rare.rare, rare.iou[2].units, rare.iou[2].low) == ([2], 1, None)
    assert (rare.iou[1].units, score_intervals(alike[:4], [None] * 4).rare) == (7, [])
