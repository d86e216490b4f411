"""One pass over a split with known answers: the figures, their records, and which pictures are kept."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import cv2
import numpy as np
import pytest

from hpddrnet_trt.accuracy import Assessment, assess
from hpddrnet_trt.accuracy.evaluate import ImageResult, _Ranking, evaluate, fractions, picture, plain
from hpddrnet_trt.core.errors import BadInputFile, ContractError, UsageError
from hpddrnet_trt.core.metrics import LabelComparison
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.inference import Segmenter
from tests.accuracy.small_dataset import IGNORED_ROWS, SHAPE, WRONG_ROWS
from tests.toy import CLASSES, ToyEngine, grey_image, manifest

LABELLED_ROWS = SHAPE[0] - IGNORED_ROWS


@pytest.fixture
def found(segmenter: Segmenter, dataset: FolderDataset) -> Assessment:
    return assess(segmenter, dataset, "test", progress=False)


def test_scores_are_those_of_the_known_mistakes(segmenter: Segmenter, dataset: FolderDataset) -> None:
    scores = evaluate(segmenter, dataset, "test", progress=False)
    accuracies = [1 - wrong / LABELLED_ROWS for wrong in WRONG_ROWS.values()]
    assert scores.images == 5
    assert scores.pixel_accuracy == pytest.approx(np.mean(accuracies))
    assert 0.5 < scores.miou < scores.pixel_accuracy
    assert scores.mean_image_micro_iou == pytest.approx(np.mean([a / (2 - a) for a in accuracies]))  # of each image


def test_an_assessment_has_the_scores_of_evaluate_and_those_of_every_image(
    found: Assessment, segmenter: Segmenter, dataset: FolderDataset
) -> None:
    assert found.scores == evaluate(segmenter, dataset, "test", progress=False)
    assert found.counts.sum() == 5 * LABELLED_ROWS * SHAPE[1]
    np.testing.assert_array_equal(found.counts, sum(image.counts for image in found.images))
    for image in found.images:
        assert image.scores.pixel_accuracy == pytest.approx(1 - WRONG_ROWS[image.name] / LABELLED_ROWS)
        assert image.ignored == IGNORED_ROWS * SHAPE[1]
    assert found.ignored_fraction == pytest.approx(IGNORED_ROWS / SHAPE[0])


def test_the_mode_overrides_the_segmenters(dataset: FolderDataset) -> None:
    engine = ToyEngine()
    single = assess(Segmenter(engine), dataset, "test", progress=False)
    assert len(engine.shapes) == 5
    averaged = assess(Segmenter(engine), dataset, "test", "multiscale", progress=False)
    assert len(engine.shapes) == 5 + 5 * 12
    assert averaged.scores == evaluate(Segmenter(engine), dataset, "test", "multiscale", progress=False)
    assert averaged.scores.miou < single.scores.miou  # the masks came from the single view
    assert (single.origin.mode, averaged.origin.mode) == ("single", "multiscale")


@pytest.mark.parametrize(("worst", "names"), [(2, "dac"), (4, "dabec"), (9, "dabec"), (0, "")])
def test_pictures_are_the_worst_and_then_the_best(
    segmenter: Segmenter, dataset: FolderDataset, worst: int, names: str
) -> None:
    pictures = assess(segmenter, dataset, "test", worst=worst, progress=False).pictures
    assert [entry.result.name for entry in pictures] == list(names)


def result(name: str, miou: float) -> ImageResult:
    return ImageResult(name, None, 2, 2, np.zeros((2, 3), np.int64), replace(LabelComparison(2).scores(), miou=miou))


def test_ranking_does_not_depend_on_the_order_of_the_images() -> None:
    blank = np.zeros((2, 2), np.uint8)
    images = [result("a", 0.5), result("b", 0.5), result("c", 0.1), result("d", 0.9), result("e", 0.7)]
    for order in permutations(images):
        ranking = _Ranking(2)
        for image in order:
            ranking.offer(image, blank, blank, blank)
            assert len(ranking.pictures) <= 3
        ranking.offer(result("unlabelled", math.nan), blank, blank, blank)
        assert [entry.result.name for entry in ranking.pictures] == ["c", "a", "d"]


def test_large_images_are_kept_reduced() -> None:
    grey = grey_image(90, 50)
    labels = (np.arange(90 * 50).reshape(90, 50) % 3).astype(np.uint8)
    kept = picture(result("large", 0.5), grey, labels, labels, edge=32)
    assert kept.step == 3
    assert kept.grey.shape == kept.truth.shape == (30, 17)
    np.testing.assert_array_equal(kept.truth, labels[1::3, 1::3])
    assert kept.grey.mean() == pytest.approx(grey.mean(), abs=5)
    small = picture(result("small", 0.5), grey, labels, labels, edge=90)
    assert small.step == 1
    assert small.grey is grey


def test_the_record_is_json_that_every_reader_takes(segmenter: Segmenter, dataset: FolderDataset) -> None:
    mask = dataset.split("test")[0].mask
    cv2.imwrite(str(mask), np.full(SHAPE, 255, np.uint8))  # an image without a labelled pixel
    found = assess(segmenter, dataset, "test", progress=False)
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert record["classes"] == ["grain", "pore", "clay"]
    assert record["miou"] == found.scores.miou
    assert record["mean_image_micro_iou"] == found.scores.mean_image_micro_iou
    assert record["confusion"] == found.counts.tolist()
    assert (record["model"], record["data"], record["split"], record["mode"]) == ("toy", "small", "test", "single")
    assert [image["name"] for image in record["per_image"]] == list("abcde")
    assert record["per_image"][0]["miou"] is None
    assert record["per_image"][0]["truth_fractions"] == [None] * 3
    assert sum(record["per_image"][1]["truth_fractions"]) == pytest.approx(1)
    assert "a" not in [entry.result.name for entry in found.pictures]


def test_the_csv_has_a_row_per_image(found: Assessment) -> None:
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [row["name"] for row in rows] == list("abcde")
    for row, image in zip(rows, found.images, strict=True):
        assert float(row["miou"]) == image.scores.miou
        assert float(row["iou_pore"]) == image.scores.iou[1]
        truth, predicted = fractions(image.counts)
        assert [float(row[f"truth_{entry.name}"]) for entry in CLASSES] == truth
        assert [float(row[f"predicted_{entry.name}"]) for entry in CLASSES] == predicted


def test_the_origin_names_model_and_data(dataset: FolderDataset, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"weights")
    described = manifest("logits", metrics={"step": 120.0, "val/miou": 0.8}, data={"name": "other"})
    origin = assess(Segmenter(ToyEngine(described)), dataset, "test", model_file=file, progress=False).origin
    assert (origin.file, origin.sha256) == (str(file), hashlib.sha256(b"weights").hexdigest())
    assert origin.data_sha256 == dataset.checksum()
    assert (origin.data, origin.license, origin.runtime) == ("small", "MIT", "numpy")
    assert (origin.best_step, origin.trained_on) == (120, "other")
    assert origin.versions["numpy"] == np.__version__


def test_fractions_and_plain_values_by_hand() -> None:
    counts = np.array([[2, 1, 1], [0, 4, 0]])  # one prediction lies outside the classes
    assert fractions(counts) == ([0.5, 0.5], [0.25, 0.625])
    assert plain({"a": (1.5, math.nan), "b": [math.inf, "x", 2, True]}) == {"a": [1.5, None], "b": [None, "x", 2, True]}


@pytest.mark.parametrize("judge", [evaluate, assess])
def test_refusals(segmenter: Segmenter, dataset: FolderDataset, judge: Callable[..., object]) -> None:
    renamed = Segmenter(ToyEngine(manifest("logits", classes=CLASSES[::-1])))
    with pytest.raises(ContractError, match="knows the classes clay, pore, grain, but dataset 'small'"):
        judge(renamed, dataset, "test", progress=False)
    with pytest.raises(UsageError, match="no split 'val'"):
        judge(segmenter, dataset, "val", progress=False)
    with pytest.raises(UsageError, match="second grey window"):
        judge(Segmenter(ToyEngine(), window=(0, 9)), dataset, "test", progress=False)
    cv2.imwrite(str(dataset.split("test")[1].mask), np.full(SHAPE, 7, np.uint8))
    with pytest.raises(BadInputFile, match=r"b\.png holds the value 7"):
        judge(segmenter, dataset, "test", progress=False)
