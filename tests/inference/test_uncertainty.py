"""Error bars of fractions through the segmenter: from every way a picture goes, and from none that cannot."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from scipy import stats

from hpddrnet_trt.core.errors import ContractError, UsageError
from hpddrnet_trt.core.manifest import FractionErrorRecord
from hpddrnet_trt.core.metrics import softmax
from hpddrnet_trt.core.uncertainty import STEP, Reliability, calibrated
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.data.labels import write_pair
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.inference.files import ResultSettings
from hpddrnet_trt.inference.folder import SegmentSummary, segment_paths
from hpddrnet_trt.inference.journal import JOURNAL
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
    before, after = (Reliability.of(pictures, value).expected_calibration_error for value in (None, found.temperature))
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


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def micrographs(folder: Path, names: Sequence[str]) -> Path:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(64, 160, seed)).save(folder / name)
    return folder


def run(segmenter: Segmenter, *arguments: Any, **settings: Any) -> SegmentSummary:
    return segment_paths(segmenter, *arguments, ResultSettings(**settings), progress=False)


def test_table_journal_and_overlay_have_the_intervals_and_resumed_results_keep_them(tmp_path: Path) -> None:
    pictures = micrographs(tmp_path / "in", ["a.png", "b.png"])
    for _ in range(2):
        summary = run(toy(intervals=True), pictures, tmp_path / "out", overlay=True)
        assert not summary.failed
        table = rows(tmp_path / "out" / "fractions.csv")
        assert len(table) == 6
        for row in table:
            assert float(row["fraction_low"]) < float(row["fraction"]) < float(row["fraction_high"])
    assert len(summary.skipped) == 2
    lines = [json.loads(line) for line in (tmp_path / "out" / JOURNAL).read_text().splitlines()]
    assert {name: each["low"] for name, each in lines[0]["intervals"].items()} == pytest.approx(
        {row["class"]: float(row["fraction_low"]) for row in table if row["image"] == "a"}
    )
    with Image.open(tmp_path / "out" / "overlays" / "a.png") as drawn:
        overlay = np.asarray(drawn)
    again = run(toy(), pictures, tmp_path / "out")  # without: other results
    assert len(again.written) == 2
    assert all(row["fraction_low"] == "" for row in rows(tmp_path / "out" / "fractions.csv"))
    with Image.open(tmp_path / "out" / "overlays" / "a.png") as drawn:
        assert not np.array_equal(np.asarray(drawn)[64:], overlay[64:])  # the legend has no interval


def test_the_summary_says_why_pictures_have_no_interval(tmp_path: Path) -> None:
    pictures = micrographs(tmp_path / "in", ["a.png"])
    Image.fromarray(np.full((64, 96), 230, np.uint8)).save(pictures / "odd.png")
    summary = run(toy(domain=True, intervals=True), pictures, tmp_path / "out")
    assert "odd" in summary.no_interval["the picture is foreign to the model, whose errors are known on pictures like "
                                        "its own"]
    assert "no interval of the fractions of" in str(summary)
    assert not run(toy(), pictures, tmp_path / "plain").no_interval


def test_specimens_have_their_mean_its_interval_and_how_many_more(tmp_path: Path) -> None:
    names = [f"{specimen}_{number}.png" for specimen in ("S1", "S2") for number in range(4)]
    pictures = micrographs(tmp_path / "in", names)
    summary = run(toy(intervals=True), pictures, tmp_path / "out", specimen="auto")
    table = rows(tmp_path / "out" / "specimens.csv")
    assert [(row["specimen"], row["class"], row["pictures"]) for row in table[:4:3]] == [
        ("S1", "grain", "4"), ("S2", "grain", "4")]  # fmt: skip
    per_picture = rows(tmp_path / "out" / "fractions.csv")
    for row in table:
        own = [float(each["fraction"]) for each in per_picture
               if each["image"].startswith(row["specimen"]) and each["class"] == row["class"]]  # fmt: skip
        assert float(row["fraction"]) == pytest.approx(np.mean(own))
        model = float(row["model_error"])
        half = np.hypot(stats.t.ppf(0.975, 3) * np.std(own, ddof=1) / 2, model)
        assert float(row["fraction_high"]) - np.mean(own) == pytest.approx(half, rel=3e-3)
    assert summary.files["specimens"] == "specimens.csv"
    text = str(summary)
    assert "specimens: by specimen, told by how the names begin (2: S1, S2)" in text
    assert "  S1 (4 pictures): grain " in text
    assert json.dumps(summary.record())
    plain = run(toy(), pictures, tmp_path / "plain", specimen="all")
    assert "all (8 pictures): grain" in str(plain)
    assert "without the model's own error" in str(plain)


def test_one_picture_of_a_specimen_says_that_there_is_no_interval(tmp_path: Path) -> None:
    pictures = micrographs(tmp_path / "in", ["S1_0.png", "S1_1.png", "S2_0.png"])
    summary = run(toy(), pictures, tmp_path / "out", specimen="^S[0-9]")
    assert "S2 (1 picture): " in str(summary)
    assert "one picture does not tell how others vary" in str(summary)
    assert [row["fraction_low"] != "" for row in rows(tmp_path / "out" / "specimens.csv")] == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    ("rule", "fault"),
    [("auto", "neither folders nor names tell"), ("(", "is no regular expression"), ("^Z", "finds nothing in")],
)
def test_specimens_that_are_not_told_apart_are_one_sentence_and_nothing_is_written(
    tmp_path: Path, rule: str, fault: str
) -> None:
    pictures = micrographs(tmp_path / "in", ["a.png", "b.png"])
    with pytest.raises(UsageError, match=fault):
        run(toy(), pictures, tmp_path / "out", specimen=rule)
    assert not (tmp_path / "out").exists()
