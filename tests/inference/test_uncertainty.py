"""Error bars of fractions through the segmenter: from every way a picture goes, and from none that cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from hpddrnet_trt.core.errors import ContractError
from hpddrnet_trt.core.manifest import FractionErrorRecord
from hpddrnet_trt.core.metrics import softmax
from hpddrnet_trt.core.uncertainty import STEP, calibrated, reliability
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.data.labels import write_pair
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.inference.result import Segmentation
from hpddrnet_trt.inference.uncertainty import scored, with_uncertainty
from tests.toy import CLASSES, ToyEngine, manifest, toy_logits

ERRORS = FractionErrorRecord(shared=0.2, patch=30, pixels=96 * 64, pictures=4, source="toy/val")
KNOWN: dict[str, Any] = {"temperature": 2.0, "fraction_errors": ERRORS}


def noise(height: int = 64, width: int = 96, seed: int = 0) -> npt.NDArray[np.uint8]:
    """A ramp with noise: all three classes, none of them sure everywhere."""
    ramp = np.linspace(20, 230, width) + np.random.default_rng(seed).normal(0, 20, (height, width))
    return ramp.clip(0, 255).astype(np.uint8)


def toy(kind: str = "logits", *, domain: bool = False, known: bool = True, **options: Any) -> Segmenter:
    return Segmenter(ToyEngine(manifest(kind, domain=domain, **(KNOWN if known else {}))), **options)


def intervals(result: Segmentation) -> npt.NDArray[np.float64]:
    return np.array([(entry.low, entry.high) for entry in result.area_fractions()], dtype=np.float64)


def test_an_interval_holds_the_fraction_and_stays_between_0_and_1() -> None:
    result = toy(intervals=True).segment(noise())
    assert result.no_interval is None
    for entry in result.area_fractions():
        assert entry.low is not None
        assert entry.high is not None
        assert 0 <= entry.low < entry.fraction < entry.high <= 1
    low, high = intervals(result)[0] * 100
    assert f"[{low:.2f}, {high:.2f}]" in str(result)
    empty = toy(intervals=True).segment(np.zeros((64, 96), np.uint8))
    assert intervals(empty)[2][0] == 0 < intervals(empty)[2][1] < 0.01  # of a class that is not there


def test_without_asking_nothing_changes() -> None:
    result = toy().segment(noise())
    assert result.sampled_scores is None
    assert result.half_widths() is None
    assert all(entry.low is entry.high is None for entry in result.area_fractions())
    assert "[" not in str(result)


def test_sampled_scores_are_those_of_every_fourth_pixel_however_the_picture_runs() -> None:
    image = noise(67, 99)
    expected = softmax(toy_logits(image)[np.newaxis])[0][:, ::STEP, ::STEP]
    segmenter = toy(intervals=True)
    single = segmenter.segment(image)
    ways = [single, *segmenter.segment_batch([image, image]), *segmenter.segment_many([image, image])]
    ways.append(toy(intervals=True, confidence=True).segment(image))
    for result in ways:
        assert isinstance(result, Segmentation)
        assert result.sampled_scores is not None
        assert np.allclose(result.sampled_scores, expected, atol=1e-5)
    tiled, flipped = toy(intervals=True, tile=48).segment(image), toy(intervals=True, mode="flip").segment(image)
    assert tiled.tiling is not None
    for result in (tiled, flipped):
        assert result.sampled_scores is not None
        assert result.sampled_scores.shape == expected.shape
        assert np.abs(result.sampled_scores - expected).mean() < 0.02
        assert intervals(result) == pytest.approx(intervals(single), abs=0.01)


@pytest.mark.parametrize("mode", ["single", "flip"])
@pytest.mark.parametrize("tile", ["whole", 48])
def test_a_temperature_changes_confidence_and_no_label(mode: Any, tile: Any) -> None:
    image = noise()
    plain, soft = (toy(known=known, confidence=True, mode=mode, tile=tile) for known in (False, True))
    before, after = plain.segment(image), soft.segment(image)
    assert np.array_equal(before.labels, after.labels)
    scores = calibrated(plain.class_scores(image)[np.newaxis], 2.0)[0]
    assert np.allclose(soft.class_scores(image), scores, atol=1e-5)
    assert after.confidence is not None
    assert np.allclose(after.confidence, scores.max(axis=0), atol=1e-5)
    (many,) = soft.segment_many([image])
    assert isinstance(many, Segmentation)
    assert many.confidence is not None
    assert np.allclose(many.confidence, after.confidence)


@pytest.mark.parametrize(("level", "state"), [(120, None), (170, "unusual"), (230, "foreign")])
def test_no_interval_is_claimed_for_a_picture_unlike_the_training(level: int, state: str | None) -> None:
    result = toy(domain=True, intervals=True).segment(np.full((64, 96), level, np.uint8))
    assert (result.half_widths() is None) == (state is not None)
    assert state is None or f"is {state} to the model" in str(result.no_interval)


def test_what_cannot_give_intervals_says_why() -> None:
    with pytest.raises(ContractError, match="without class scores there is no interval"):
        toy("labels", intervals=True)
    result = toy(known=False, intervals=True).segment(noise())
    assert result.half_widths() is None
    assert "does not say how far its area fractions were off" in str(result.no_interval)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> FolderDataset:
    """Masks with blocks of other classes, that the model does not see: some 5 % of the pixels are wrong."""
    root = tmp_path_factory.mktemp("data") / "toy"
    for index in range(6):
        rng, image = np.random.default_rng(index), noise(128, 192, index)
        truth = toy_logits(image).argmax(axis=0).astype(np.uint8)
        for top, left in rng.integers(0, 112, (8, 2)):
            truth[top : top + 12, left : left + 12] = rng.integers(3)
        write_pair(root, "val" if index < 5 else "train", f"p{index}", image, truth, [entry.color for entry in CLASSES])
    return FolderDataset.open(root, classes=[entry.name for entry in CLASSES])


def test_a_description_gets_both_from_pictures_with_masks(dataset: FolderDataset) -> None:
    description = manifest("logits")
    segmenter = Segmenter(ToyEngine(description))
    found = with_uncertainty(description, segmenter, dataset, progress=False)
    assert found.temperature is not None
    pictures = list(scored(segmenter, dataset, dataset.split("val")))
    before, after = (reliability(pictures, value).expected_calibration_error for value in (None, found.temperature))
    assert after < 0.6 * before
    assert found.fraction_errors is not None
    assert (found.fraction_errors.pictures, found.fraction_errors.source) == (5, f"{dataset.name}/val")
    assert with_uncertainty(found, Segmenter(ToyEngine(found)), dataset, progress=False) == found  # again the same
    described = Segmenter(ToyEngine(found), intervals=True).segment(noise(128, 192, 9))
    assert described.half_widths() is not None


def test_a_dataset_without_the_split_leaves_the_description_and_other_classes_are_refused(
    dataset: FolderDataset, tmp_path: Path
) -> None:
    description = manifest("logits")
    segmenter = Segmenter(ToyEngine(description))
    assert with_uncertainty(description, segmenter, dataset, "test", progress=False) == description
    other = description.replace(classes=[entry.model_copy(update={"name": f"{entry.name}2"}) for entry in CLASSES])
    with pytest.raises(ContractError, match="knows the classes grain2"):
        with_uncertainty(other, segmenter, dataset, progress=False)
    with pytest.raises(ContractError, match="computes its confidence itself"):
        with_uncertainty(manifest("labels", confidence=True), segmenter, dataset, progress=False)
