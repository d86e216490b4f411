"""The shipped network on real micrographs: every precision within its budget, and a broken calibration refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hpddrnet_trt.accuracy.acceptance import WHAT, Budget
from hpddrnet_trt.accuracy.candidates import CandidateCache, Study, StudySettings, open_study, precision_table
from hpddrnet_trt.accuracy.cost import cost_model
from hpddrnet_trt.accuracy.search import choose_precision
from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.manifest import read_manifest
from hpddrnet_trt.export.calibrate import CalibrationSettings, calibrate
from hpddrnet_trt.graph import qdq
from hpddrnet_trt.weights import locate
from tests.accuracy.builds import build
from tests.graph.parsed_rtx import needs_rtx

MODEL = "nasa-super1"


@pytest.fixture(scope="module")
def study(sem_data: Path) -> Iterator[Study]:
    model = locate(MODEL, ".onnx")
    settings = StudySettings(sem_data / MODEL, split="test", reference=model, max_images=4, method="entropy")
    with open_study(model, settings) as found:
        yield found


def test_every_precision_keeps_its_budget(study: Study) -> None:
    found = {row.name: row for row in precision_table(study, progress=False).rows}
    assert list(found) == [
        "FP16", "BF16", "INT8 max", "INT8 percentile", "INT8 entropy", "INT8 mse", "FP8 max",
    ]  # fmt: skip
    assert abs(found["FP16"].accuracy.drop) < 0.1
    assert found["FP16"].accuracy.agreement > 0.9995
    for name, row in found.items():
        assert row.accuracy.drop < 0.5, name
        assert row.accuracy.agreement > 0.997, name
    assert found["INT8 max"].layers == 58


def test_a_strict_budget_keeps_layers_in_fp16(study: Study, tmp_path: Path) -> None:
    """Of the stem's convolutions, which are the most sensitive ones; the others stay FP16 throughout."""
    whole = study.cache.config
    stem = [name for name in whole.layers if name.startswith("backbone.stem")]
    config = replace(whole, plan=qdq.subset(whole.model, "tensorrt", stem))
    cache = CandidateCache(config, study.evaluator)
    budget = Budget(max_miou_drop=0.3, min_agreement=0.9992)
    assert not budget.kept_by(cache.measure(config.layers, half=True))
    cost, target = cost_model(config, study.operations), tmp_path / "mixed.onnx"
    choice = choose_precision(cache, target, budget, cost, calibration=study.calibration, progress=False)
    assert budget.kept_by(choice.accuracy)
    manifest = read_manifest(target)
    assert manifest.mixed is not None
    assert 0 < len(manifest.mixed.floating) < len(stem) == manifest.mixed.layers
    assert manifest.qdq_report is not None
    assert manifest.qdq_report["counts"]["violations"] == 0


@needs_rtx
def test_an_engine_with_its_evidence(sem_data: Path, tmp_path: Path) -> None:
    source, target = locate(MODEL, ".onnx"), tmp_path / "m.engine"
    data = sem_data / MODEL
    build(source, target, data, Budget(max_miou_drop=0.5), size=512, reference=source, calibration_images=data)
    evidence = read_manifest(target).validation[-1]
    assert evidence.what == WHAT
    assert evidence.values["masked_miou_drop_percentage_points"] < 0.5
    assert evidence.images == 2


@needs_rtx
def test_a_calibration_on_one_micrograph_is_refused(sem_data: Path, tmp_path: Path) -> None:
    """One that does not show what the others do: pixel agreement stays high, the rare class suffers."""
    source, broken = locate(MODEL, ".onnx"), tmp_path / "broken.int8.onnx"
    one = sem_data / MODEL / "images" / "train" / "spot4_180d_2.png"
    manifest = calibrate(source, broken, [one], CalibrationSettings(under_shift=False))
    assert manifest.validation[-1].values["agreement"] > 0.9
    with pytest.raises(UserError, match=r"INT8 misses the budget on .*calibrated on 1 image \(method max\)"):
        build(broken, tmp_path / "m.engine", sem_data / MODEL, Budget(max_miou_drop=0.5), size=512, reference=source)
    assert not (tmp_path / "m.engine").exists()
