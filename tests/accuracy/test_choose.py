"""From a budget to a file, end to end on a small network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from hpddrnet_trt.accuracy.acceptance import Budget
from hpddrnet_trt.accuracy.candidates import CandidateCache, Study, StudySettings, open_study
from hpddrnet_trt.accuracy.search import Choice, Frontier, Point, _none_holds, choose_precision
from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.core.manifest import read_manifest
from hpddrnet_trt.graph.qdq import count_convolutions
from tests.accuracy.builds import build
from tests.accuracy.fakes import FakeCost, accuracy
from tests.graph.parsed_rtx import needs_rtx
from tests.graph.residual_onnx import QUANTIZABLE


@pytest.fixture
def study(fp32: Path, data: Path) -> Iterator[Study]:
    with open_study(fp32, StudySettings(data, size=(96, 96))) as found:
        yield found


def spoilt(study: Study, tensor: str) -> CandidateCache:
    """The same study with one activation's range far too small."""
    ranges = {**study.cache.config.ranges, tensor: (-0.01, 0.01)}
    return CandidateCache(replace(study.cache.config, ranges=ranges), study.evaluator)


def choose(study: Study, cache: CandidateCache, target: Path, budget: Budget) -> Choice:
    cost = FakeCost(dict.fromkeys(cache.config.layers, 0.1))
    return choose_precision(cache, target, budget, cost, calibration=study.calibration, progress=False)


def test_int8_throughout_where_that_holds(study: Study, tmp_path: Path) -> None:
    choice = choose(study, study.cache, tmp_path / "m.onnx", Budget(max_miou_drop=5.0))
    assert choice.frontier is None
    manifest = read_manifest(tmp_path / "m.onnx")
    assert (manifest.precision, manifest.quantized_for, manifest.mixed) == ("int8", "tensorrt", None)
    assert manifest.calibration is not None
    assert manifest.calibration.images == 6
    assert manifest.qdq_report is not None
    assert manifest.qdq_report["counts"]["reformats_in_stages"] == 0
    assert count_convolutions(onnx.load(str(tmp_path / "m.onnx"))) == (len(QUANTIZABLE), 6)


def test_the_layer_that_breaks_the_budget_stays_in_fp16(study: Study, tmp_path: Path) -> None:
    cache = spoilt(study, "stem_out")  # read by `first` and `shortcut`
    choice = choose(study, cache, tmp_path / "m.onnx", Budget(max_miou_drop=2.0))
    assert choice.frontier is not None
    manifest = read_manifest(tmp_path / "m.onnx")
    assert manifest.mixed is not None
    assert {"first", "shortcut"} <= set(manifest.mixed.floating)
    assert len(manifest.mixed.floating) < len(QUANTIZABLE)
    assert choice.accuracy.drop <= 2.0
    assert manifest.validation[-1].values["masked_miou_drop_percentage_points"] == choice.accuracy.drop
    kept = [entry for entry in manifest.qdq_report["convolutions"] if entry["name"] == "first"]  # type: ignore[index]
    assert "search" in kept[0]["reason"]


def test_nothing_is_written_when_no_choice_holds(study: Study, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no choice of layers keeps the budget .* was not written"):
        choose(study, study.cache, tmp_path / "m.onnx", Budget(min_agreement=1.0))
    assert list(tmp_path.iterdir()) == []


@needs_rtx
def test_from_a_budget_to_an_engine(fp32: Path, data: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.engine"
    manifest = build(fp32, target, data, Budget(max_miou_drop=8.0), precision="auto")
    assert manifest.precision == "int8"
    assert [entry.what for entry in manifest.validation[-2:]] == [
        "choice of precision for simulated/val", "accuracy against FP32",
    ]  # fmt: skip
    assert read_manifest(target) == manifest


def test_a_study_refuses_before_it_measures(fp32: Path, data: Path, tmp_path: Path) -> None:
    def opened(folder: Path, **options: Any) -> None:
        with open_study(fp32, StudySettings(folder, **{"size": (96, 96), **options})):
            pytest.fail("measured")

    without_training = tmp_path / "data"
    shutil.copytree(data, without_training, ignore=shutil.ignore_patterns("train"))
    with pytest.raises(UsageError, match="no training split to calibrate on; name micrographs with --calib"):
        opened(without_training)
    with pytest.raises(UsageError, match="no split 'tset'"):
        opened(data, split="tset")
    with pytest.raises(UsageError, match=r"frame of 100x90: the model's \w+ is a multiple of"):
        opened(data, frame=(100, 90))


def test_judging_what_was_calibrated_on_is_said(fp32: Path, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = sorted((data / "images" / "val").iterdir())
    for calibrated_on, warned in ((images[:2], True), (None, False)):
        caplog.clear()
        with open_study(fp32, StudySettings(data, size=(96, 96), calibration_images=calibrated_on)):
            assert ("2 of the 3 micrographs of simulated/val" in caplog.text) == warned


def test_the_best_of_what_fails_is_by_the_limit_that_fails() -> None:
    """mIoU, which nobody limits here, happens to be highest where everything is quantised."""
    points = (
        Point((), accuracy(0.0, agreement=0.99), 1.0), Point(("a",), accuracy(0.1, agreement=0.999), 2.0),
    )  # fmt: skip
    failed = Frontier("int8", Budget(min_agreement=1.0), "formula/val", 1, points, None, "formula")
    assert "the best, with 1 of 1 layers in FP16" in _none_holds(failed, "m.onnx")
    both = replace(failed, budget=Budget(max_miou_drop=0.5, min_agreement=1.0))
    assert "the best, with 0 of 1 layers in FP16" in _none_holds(both, "m.onnx")
