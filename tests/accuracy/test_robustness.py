"""Robustness on a model whose answers to some shifts are known."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from hpddrnet_trt.accuracy import assess, measure_robustness
from hpddrnet_trt.accuracy.robustness import Point, Robustness, Sweep
from hpddrnet_trt.core.errors import ContractError, UsageError
from hpddrnet_trt.core.metrics import LabelComparison
from hpddrnet_trt.data.augment import SHIFTS, Shift, brightness, magnification
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.inference import Segmenter
from tests.toy import ToyEngine, manifest

BRIGHTNESS = Shift("brightness", "grey levels", "added", 0, (-80, -20, 0, 20, 80), brightness)
MAGNIFICATION = Shift("magnification", "factor", "rescaled", 1, (0.5, 1, 2), magnification, True, True)


@pytest.fixture
def found(segmenter: Segmenter, dataset: FolderDataset) -> Robustness:
    return measure_robustness(segmenter, dataset, "test", progress=False)


def test_every_shift_passes_the_plain_score(found: Robustness, segmenter: Segmenter, dataset: FolderDataset) -> None:
    plain = assess(segmenter, dataset, "test", progress=False).scores
    assert [sweep.shift.name for sweep in found.sweeps] == [shift.name for shift in SHIFTS]
    for sweep in found.sweeps:
        assert sweep.unchanged.scores == plain
        assert tuple(point.value for point in sweep.points) == sweep.shift.values
        assert all(point.scores is not None and point.scores.images == 5 for point in sweep.points)


def test_a_threshold_on_grey_levels_fails_under_brightness(segmenter: Segmenter, dataset: FolderDataset) -> None:
    sweep = measure_robustness(segmenter, dataset, "test", shifts=[BRIGHTNESS], progress=False).sweeps[0]
    far_dark, dark, unchanged, bright, far_bright = (point.miou for point in sweep.points)
    assert far_dark < dark < unchanged > bright > far_bright
    assert sweep.worst.miou == min(far_dark, far_bright)


def test_the_same_seed_gives_the_same_figures(segmenter: Segmenter, dataset: FolderDataset) -> None:
    noise = [shift for shift in SHIFTS if shift.name == "noise"]
    first, again, other = (
        measure_robustness(segmenter, dataset, "test", shifts=noise, seed=seed, progress=False).sweeps[0]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert [point.miou for point in first.points] != [point.miou for point in other.points]


def test_the_unchanged_image_is_segmented_once(dataset: FolderDataset) -> None:
    engine = ToyEngine()
    measure_robustness(Segmenter(engine), dataset, "test", shifts=[BRIGHTNESS, MAGNIFICATION], progress=False)
    assert len(engine.shapes) == 5 * (1 + 4 + 2)


def test_a_size_the_model_does_not_take_is_a_point_without_scores(dataset: FolderDataset) -> None:
    fixed = Segmenter(ToyEngine(manifest("logits", size=40)), tile="whole")
    sweep = measure_robustness(fixed, dataset, "test", shifts=[MAGNIFICATION], progress=False).sweeps[0]
    smaller, unchanged, larger = sweep.points
    assert smaller.scores is not None
    assert unchanged.scores is not None
    assert larger.scores is None
    assert larger.reason is not None
    assert "does not fit this model" in larger.reason
    assert math.isnan(larger.miou)
    assert sweep.worst is smaller
    small = Segmenter(ToyEngine(manifest("logits", size=24)), tile="whole")
    with pytest.raises(ContractError, match="does not fit this model"):  # no shift is to blame here
        measure_robustness(small, dataset, "test", shifts=[BRIGHTNESS], progress=False)


def test_a_size_the_model_takes_in_tiles_has_scores(dataset: FolderDataset) -> None:
    fixed = Segmenter(ToyEngine(manifest("logits", size=40)))
    *_, larger = measure_robustness(fixed, dataset, "test", shifts=[MAGNIFICATION], progress=False).sweeps[0].points
    assert larger.scores is not None


def sweep_of(mious: list[float], neutral: float = 3.0, values: tuple[float, ...] = (1, 2, 3, 4, 5)) -> Sweep:
    scores = LabelComparison(2).scores()
    shift = replace(BRIGHTNESS, neutral=neutral, values=values)
    return Sweep(shift, [Point(value, replace(scores, miou=miou)) for value, miou in zip(values, mious, strict=True)])


@pytest.mark.parametrize(
    ("mious", "span", "text"),
    [
        ([0.1, 0.78, 0.8, 0.76, 0.1], (2, 4), "2 to 4"),
        ([0.8, 0.74, 0.8, 0.74, 0.8], (3, 3), "only unchanged"),  # what lies beyond a failure does not count
        ([0.9, 0.9, 0.8, 0.1, 0.1], (1, 3), "≤ 1 to 3"),
        ([0.8, 0.8, 0.8, 0.8, 0.8], (1, 5), "≤ 1 to ≥ 5"),
        ([0.8, 0.8, 0.8, math.nan, 0.8], (1, 3), "≤ 1 to 3"),
    ],
)
def test_the_working_range(mious: list[float], span: tuple[float, float], text: str) -> None:
    sweep = sweep_of(mious)
    assert sweep.working_range() == span
    assert sweep.working_range_text() == text


def test_the_working_range_at_the_end_of_a_sweep() -> None:
    assert sweep_of([0.1, 0.2, 0.78, 0.79, 0.8], math.inf, (1, 2, 3, 4, math.inf)).working_range_text() == "3 or more"
    assert sweep_of([0.8, 0.8, 0.8, 0.8, 0.1], 0, (0, 2, 3, 4, 5)).working_range_text() == "0 to 4"
    assert sweep_of([0.1, 0.2, 0.78, 0.79, 0.8], 3, (-2, -1, 3, 4, 5)).working_range_text() == "3 to ≥ 5"
    assert sweep_of([math.nan] * 5).working_range() is None
    assert sweep_of([math.nan] * 5).working_range_text() == "–"


def test_record_and_table(found: Robustness) -> None:
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    noise = next(sweep for sweep in record["sweeps"] if sweep["shift"] == "noise")
    assert noise["points"][-1]["value"] is None  # no noise added: infinitely many electrons
    assert noise["points"][-1]["miou"] == found.sweeps[0].unchanged.miou
    np.testing.assert_allclose(noise["points"][0]["scores"]["iou"], found.sweeps[3].points[0].scores.iou)
    lines = found.table().splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [shift.name for shift in SHIFTS]
    assert "within 5 points" in lines[-1]


def test_an_unknown_split_is_told(segmenter: Segmenter, dataset: FolderDataset) -> None:
    with pytest.raises(UsageError, match="no split 'val'"):
        measure_robustness(segmenter, dataset, "val", progress=False)
