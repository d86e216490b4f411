"""One pass over a split with known answers: the figures, their records, and which pictures are kept."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import cv2
import numpy as np
import pytest

from hpddrnet_trt.accuracy import Assessment, assess
from hpddrnet_trt.accuracy.evaluate import ImageResult, _Ranking, fractions, picture
from hpddrnet_trt.accuracy.measurements import measure
from hpddrnet_trt.accuracy.tables import table
from hpddrnet_trt.core.errors import BadInputFile, ContractError, UsageError
from hpddrnet_trt.core.manifest import DataRecord
from hpddrnet_trt.core.metrics import LabelComparison
from hpddrnet_trt.core.text import plain
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.inference import Segmenter
from tests.accuracy.small_dataset import IGNORED_ROWS, SHAPE, WRONG_ROWS, write_dataset
from tests.toy import CLASSES, ToyEngine, grey_image, manifest

LABELLED_ROWS = SHAPE[0] - IGNORED_ROWS


@pytest.fixture
def found(segmenter: Segmenter, dataset: FolderDataset) -> Assessment:
    return assess(segmenter, dataset, "test", progress=False)


def test_scores_are_those_of_the_known_mistakes(found: Assessment) -> None:
    accuracies = [1 - wrong / LABELLED_ROWS for wrong in WRONG_ROWS.values()]
    assert found.scores.images == 5
    assert found.scores.pixel_accuracy == pytest.approx(np.mean(accuracies))
    assert 0.5 < found.scores.miou < found.scores.pixel_accuracy
    assert found.scores.mean_image_micro_iou == pytest.approx(np.mean([a / (2 - a) for a in accuracies]))
    assert found.counts.sum() == 5 * LABELLED_ROWS * SHAPE[1]
    np.testing.assert_array_equal(found.counts, sum(image.counts for image in found.images))
    for image, accuracy in zip(found.images, accuracies, strict=True):
        assert image.scores.pixel_accuracy == pytest.approx(accuracy)
        assert image.ignored == IGNORED_ROWS * SHAPE[1]
    assert found.ignored_fraction == pytest.approx(IGNORED_ROWS / SHAPE[0])


def test_images_of_another_pixel_size_are_read_at_the_models_and_measured_at_their_own(dataset: FolderDataset) -> None:
    engine = ToyEngine(manifest(data=DataRecord(name="steel", pixel_size_m=(10e-9, 10e-9))))
    found = assess(Segmenter(engine), replace(dataset, pixel_size_m=20e-9), "test", progress=False)
    assert {shape[2:] for shape in engine.shapes} == {tuple(-(-2 * edge // 8) * 8 for edge in SHAPE)}
    assert {(image.height, image.width) for image in found.images} == {SHAPE}
    assert found.counts.sum() == 5 * LABELLED_ROWS * SHAPE[1]


@pytest.mark.parametrize(("worst", "names"), [(2, "dac"), (4, "dabec"), (9, "dabec"), (0, "")])
def test_pictures_are_the_worst_and_then_the_best(
    segmenter: Segmenter, dataset: FolderDataset, worst: int, names: str
) -> None:
    pictures = assess(segmenter, dataset, "test", worst=worst, progress=False).pictures
    assert [entry.result.name for entry in pictures] == list(names)


def result(name: str, miou: float) -> ImageResult:
    blank, scores = np.zeros((2, 2), np.uint8), replace(LabelComparison(2).scores(), miou=miou)
    return ImageResult(name, None, 2, 2, np.zeros((2, 3), np.int64), scores, measure(blank, blank, 2))


def test_ranking_does_not_depend_on_the_order_of_the_images() -> None:
    blank = np.zeros((2, 2), np.uint8)
    images = [result(name, miou) for name, miou in zip("abcde", (0.5, 0.5, 0.1, 0.9, 0.7), strict=True)]
    for order in permutations(images):
        ranking = _Ranking(2)
        for image in [*order, result("unlabelled", math.nan)]:
            ranking.offer(image, blank, blank, blank)
            assert len(ranking.pictures) <= 3
        assert [entry.result.name for entry in ranking.pictures] == ["c", "a", "d"]


def test_large_images_are_kept_reduced() -> None:
    grey = grey_image(90, 50)
    labels = (np.arange(90 * 50).reshape(90, 50) % 3).astype(np.uint8)
    kept = picture(result("large", 0.5), grey, labels, labels, edge=32)
    assert (kept.step, kept.grey.shape, kept.truth.shape) == (3, (30, 17), (30, 17))
    np.testing.assert_array_equal(kept.truth, labels[1::3, 1::3])
    assert kept.grey.mean() == pytest.approx(grey.mean(), abs=5)
    assert picture(result("small", 0.5), grey, labels, labels, edge=90).grey is grey


def test_record_and_table_of_images(segmenter: Segmenter, dataset: FolderDataset, tmp_path: Path) -> None:
    cv2.imwrite(str(dataset.split("test")[0].mask), np.full(SHAPE, 255, np.uint8))  # without a labelled pixel
    found = assess(segmenter, dataset, "test", progress=False)
    record = json.loads(json.dumps(plain(found.record()), allow_nan=False))
    assert record["classes"] == ["grain", "pore", "clay"]
    assert (record["miou"], record["confusion"]) == (found.scores.miou, found.counts.tolist())
    assert (record["model"], record["data"], record["split"], record["mode"]) == ("toy", "small", "test", "single")
    assert [image["name"] for image in record["per_image"]] == list("abcde")
    assert (record["per_image"][0]["miou"], record["per_image"][0]["truth_fractions"]) == (None, [None] * 3)
    assert "a" not in [entry.result.name for entry in found.pictures]
    unlabelled, *rows = csv.DictReader(io.StringIO(found.to_csv()))
    assert (unlabelled["name"], unlabelled["miou"], unlabelled["truth_pore"]) == ("a", "", "")
    for row, image in zip(rows, found.images[1:], strict=True):
        assert (row["name"], float(row["miou"])) == (image.name, image.scores.miou)
        assert float(row["iou_pore"]) == image.scores.iou[1]
        truth, predicted = fractions(image.counts)
        assert [float(row[f"truth_{entry.name}"]) for entry in CLASSES] == truth
        assert [float(row[f"predicted_{entry.name}"]) for entry in CLASSES] == predicted


def test_what_laboratories_measure_is_in_record_and_table_of_images(
    segmenter: Segmenter, dataset: FolderDataset
) -> None:
    found = assess(segmenter, replace(dataset, pixel_size_m=2e-9), "test", progress=False)
    record = json.loads(json.dumps(plain(found.record()), allow_nan=False))
    assert record["remarks"] == ["intervals are over 5 pictures, 95 %; they hold for more pictures like these"]
    miou, area = record["intervals"]["miou"], record["measurements"]["pore"]["area_fraction"]
    assert (miou["value"], miou["units"]) == (pytest.approx(found.scores.miou), 5)
    assert 0 <= miou["low"] < miou["value"] < miou["high"] <= 1
    errors = [predicted[1] - truth[1] for truth, predicted in (fractions(image.counts) for image in found.images)]
    assert area["error"]["value"] == pytest.approx(np.mean(errors))
    assert area["absolute_error"]["value"] == pytest.approx(np.mean(np.abs(errors)))
    assert area["error"]["low"] <= area["error"]["value"] <= area["error"]["high"]
    right = record["per_image"][2]  # "c" has no mistake
    assert right["hausdorff95_px"] == [0, 0, 0]
    assert right["objects"]["truth"] == right["objects"]["predicted"]
    first, written = record["per_image"][0], next(csv.DictReader(io.StringIO(found.to_csv())))
    assert first["hausdorff95_m"] == pytest.approx([2e-9 * value for value in first["hausdorff95_px"]])
    assert float(written["hausdorff95_px_pore"]) == first["hausdorff95_px"][1] > 0
    assert float(written["boundary_px_predicted_clay"]) == first["boundary_px"]["predicted"][2]
    assert float(written["pixel_size_m"]) == 2e-9


def test_the_table_fits_80_columns_and_says_why_there_are_no_intervals(
    segmenter: Segmenter, dataset: FolderDataset, tmp_path: Path
) -> None:
    found = assess(segmenter, dataset, "test", progress=False)
    lines = table(found).splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 30
    scores, interval = found.scores, found.intervals.iou[1]
    row = next(line for line in lines if line.startswith("pore")).split()
    assert (row[1], row[4:6]) == (f"{scores.iou[1]:.4f}", [f"{scores.accuracy[1]:.4f}", f"{scores.dice[1]:.4f}"])
    assert " ".join(row[2:4]) == interval.text(3)
    for line in ("mean (mIoU)", "mean, classes in masks", "pixel accuracy", "micro IoU, whole set", "area fraction"):
        assert any(line in other for other in lines)
    few = assess(segmenter, write_dataset(tmp_path / "two", {"a": 6, "b": 3}), "test", progress=False)
    assert table(few).endswith("no interval: 2 pictures, and fewer than 5 do not tell how others vary")
    assert "[0." not in table(few)
    assert "[+" not in table(few)


def test_specimens_are_the_units_where_they_are_known(segmenter: Segmenter, dataset: FolderDataset) -> None:
    samples = [replace(sample, group="AAABB"[place]) for place, sample in enumerate(dataset.split("test"))]
    found = assess(segmenter, replace(dataset, samples={"test": samples}), "test", progress=False)
    assert found.intervals.miou.units == 2
    assert found.remarks == ["no interval: 2 specimens, and fewer than 5 do not tell how others vary"]


def test_reliability_is_of_the_scores_as_they_are_and_at_the_models_temperature(dataset: FolderDataset) -> None:
    described = Segmenter(ToyEngine(manifest("logits", temperature=2.0)))
    found = assess(described, dataset, "test", progress=False)
    assert list(found.reliability) == [None, 2.0]
    labelled = found.counts.sum()
    for each in found.reliability.values():
        assert each.sums[0].sum() == pytest.approx(labelled / 16, rel=0.2)  # every fourth pixel in each direction
    errors = [entry["expected_calibration_error"] for entry in found.record()["calibration"]]
    assert errors[0] != errors[1]
    assert assess(Segmenter(ToyEngine(manifest("labels"))), dataset, "test", progress=False).reliability == {}


def test_the_origin_names_model_and_data(dataset: FolderDataset, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"weights")
    described = manifest("logits", metrics={"step": 120.0, "val/miou": 0.8}, data={"name": "other"})
    origin = assess(Segmenter(ToyEngine(described)), dataset, "test", model_file=file, progress=False).origin
    assert (origin.file, origin.sha256) == (str(file), hashlib.sha256(b"weights").hexdigest())
    assert (origin.data, origin.license, origin.data_sha256) == ("small", "MIT", dataset.checksum())
    assert (origin.runtime, origin.best_step, origin.trained_on) == ("numpy", 120, "other")
    assert origin.versions["numpy"] == np.__version__


def test_fractions_by_hand() -> None:
    assert fractions(np.array([[2, 1, 1], [0, 4, 0]])) == ([0.5, 0.5], [0.25, 0.625])  # one lies outside the classes


def test_refusals(segmenter: Segmenter, dataset: FolderDataset) -> None:
    renamed = Segmenter(ToyEngine(manifest("logits", classes=CLASSES[::-1])))
    with pytest.raises(ContractError, match="knows the classes clay, pore, grain, but dataset 'small'"):
        assess(renamed, dataset, "test", progress=False)
    with pytest.raises(UsageError, match="no split 'val'"):
        assess(segmenter, dataset, "val", progress=False)
    with pytest.raises(UsageError, match="second grey window"):
        assess(Segmenter(ToyEngine(), window=(0, 9)), dataset, "test", progress=False)
    cv2.imwrite(str(dataset.split("test")[1].mask), np.full(SHAPE, 7, np.uint8))
    with pytest.raises(BadInputFile, match=r"b\.png holds the value 7"):
        assess(segmenter, dataset, "test", progress=False)
