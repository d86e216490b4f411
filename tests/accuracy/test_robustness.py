"""Robustness on a model whose answers to some shifts are known."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from hpddrnet_trt.accuracy import Robustness, assess, measure_robustness
from hpddrnet_trt.accuracy.robustness import Point, Sweep
from hpddrnet_trt.core.errors import ContractError, UsageError
from hpddrnet_trt.core.metrics import LabelComparison
from hpddrnet_trt.core.text import plain
from hpddrnet_trt.data.augment import SHIFTS, Shift, brightness, magnification
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.inference import Segmenter
from tests.toy import ToyEngine, manifest

BRIGHTNESS = Shift("brightness", "grey levels", "added", 0, (-80, -20, 0, 20, 80), brightness)
MAGNIFICATION = Shift("magnification", "factor", "rescaled", 1, (0.5, 1, 2), magnification, True, True)


def measured(segmenter: Segmenter, dataset: FolderDataset, *shifts: Shift, seed: int = 0) -> Robustness:
    return measure_robustness(segmenter, dataset, "test", shifts=shifts or SHIFTS, seed=seed, progress=False)


def test_every_shift_passes_the_plain_score(segmenter: Segmenter, dataset: FolderDataset) -> None:
    found = measured(segmenter, dataset)
    plain_scores = assess(segmenter, dataset, "test", progress=False).scores
    assert [sweep.shift.name for sweep in found.sweeps] == [shift.name for shift in SHIFTS]
    for sweep in found.sweeps:
        assert sweep.unchanged.scores == plain_scores
        assert tuple(point.value for point in sweep.points) == sweep.shift.values
        assert all(point.scores is not None and point.scores.images == 5 for point in sweep.points)
    record = json.loads(json.dumps(plain(found.record()), allow_nan=False))
    noise = next(sweep for sweep in record["sweeps"] if sweep["shift"] == "noise")
    assert noise["points"][-1]["value"] is None  # no noise added: infinitely many electrons
    assert noise["points"][-1]["miou"] == plain_scores.miou
    lines = found.table().splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [shift.name for shift in SHIFTS]
    assert "within 5 points" in lines[-1]


def test_a_threshold_on_grey_levels_fails_under_brightness(dataset: FolderDataset) -> None:
    engine = ToyEngine()
    sweep = measured(Segmenter(engine), dataset, BRIGHTNESS, MAGNIFICATION).sweeps[0]
    far_dark, dark, unchanged, bright, far_bright = (point.miou for point in sweep.points)
    assert far_dark < dark < unchanged > bright > far_bright
    assert sweep.worst.miou == min(far_dark, far_bright)
    assert len(engine.shapes) == 5 * (1 + 4 + 2)  # the unchanged image is segmented once


def test_the_same_seed_gives_the_same_figures(segmenter: Segmenter, dataset: FolderDataset) -> None:
    (noise,) = (shift for shift in SHIFTS if shift.name == "noise")
    first, again, other = (measured(segmenter, dataset, noise, seed=seed).sweeps[0] for seed in (1, 1, 2))
    assert first == again
    assert [point.miou for point in first.points] != [point.miou for point in other.points]


def test_a_size_the_model_does_not_take_is_a_point_without_scores_or_runs_in_tiles(dataset: FolderDataset) -> None:
    fixed = ToyEngine(manifest("logits", size=40))
    sweep = measured(Segmenter(fixed, tile="whole"), dataset, MAGNIFICATION).sweeps[0]
    smaller, unchanged, larger = sweep.points
    assert smaller.scores is not None
    assert unchanged.scores is not None
    assert larger.scores is None
    assert "does not fit this model" in str(larger.reason)
    assert math.isnan(larger.miou)
    assert sweep.worst is smaller
    assert measured(Segmenter(fixed), dataset, MAGNIFICATION).sweeps[0].points[-1].scores is not None
    small = Segmenter(ToyEngine(manifest("logits", size=24)), tile="whole")
    with pytest.raises(ContractError, match="does not fit this model"):  # no shift is to blame here
        measured(small, dataset, BRIGHTNESS)
    with pytest.raises(UsageError, match="no split 'val'"):
        measure_robustness(small, dataset, "val", progress=False)


ODD = (0.1, 0.2, 0.78, 0.79, 0.8)


@pytest.mark.parametrize(
    ("mious", "neutral", "values", "span", "text"),
    [
        ((0.1, 0.78, 0.8, 0.76, 0.1), 3, (1, 2, 3, 4, 5), (2, 4), "2 to 4"),
        ((0.8, 0.74, 0.8, 0.74, 0.8), 3, (1, 2, 3, 4, 5), (3, 3), "only unchanged"),  # nothing beyond a failure counts
        ((0.9, 0.9, 0.8, 0.1, 0.1), 3, (1, 2, 3, 4, 5), (1, 3), "≤ 1 to 3"),
        ((0.8, 0.8, 0.8, 0.8, 0.8), 3, (1, 2, 3, 4, 5), (1, 5), "≤ 1 to ≥ 5"),
        ((0.8, 0.8, 0.8, math.nan, 0.8), 3, (1, 2, 3, 4, 5), (1, 3), "≤ 1 to 3"),
        (ODD, math.inf, (1, 2, 3, 4, math.inf), (3, math.inf), "3 or more"),
        ((0.8, 0.8, 0.8, 0.8, 0.1), 0, (0, 2, 3, 4, 5), (0, 4), "0 to 4"),
        (ODD, 3, (-2, -1, 3, 4, 5), (3, 5), "3 to ≥ 5"),
        ((math.nan,) * 5, 3, (1, 2, 3, 4, 5), None, "–"),
    ],
)
def test_the_working_range(
    mious: tuple[float, ...], neutral: float, values: tuple[float, ...], span: tuple[float, float] | None, text: str
) -> None:
    scores, shift = LabelComparison(2).scores(), replace(BRIGHTNESS, neutral=neutral, values=values)
    sweep = Sweep(shift, [Point(value, replace(scores, miou=miou)) for value, miou in zip(values, mious, strict=True)])
    assert (sweep.working_range(), sweep.working_range_text()) == (span, text)
