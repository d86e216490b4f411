"""Layer groups and rooflines in a result, and a whole small benchmark on real micrographs."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpddrnet_trt.benchmark import Entry, Settings, entries_for, load_images, measures, run_benchmark
from hpddrnet_trt.benchmark.result import Ceilings
from hpddrnet_trt.core.errors import MissingDependency
from hpddrnet_trt.report.folders import model_files
from tests.benchmark.conftest import image_set
from tests.benchmark.test_run import QUICK

PLAN = {**QUICK, "rounds": 5, "network_only": True, "throughput": True, "layers": True, "roofline": True}


def fixed_ceilings(threads: int | None, device: str) -> Ceilings:
    assert (threads, device) == (1, "cpu")
    return Ceilings(device="a CPU, 1 thread", gmacs_per_s={"fp32": 50.0, "int8": 100.0}, gigabytes_per_s=8, how="given")


def test_roofs_are_of_every_size_and_batch(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpddrnet_trt.benchmark.ceilings.measure_ceilings", fixed_ceilings)
    plan = Settings(**{**QUICK, "roofline": True}, sizes=((32, 48), (64, 64)), batches=(1, 3))
    result = run_benchmark([Entry("plain", models / "fp32.onnx")], image_set(), plan, progress=False)
    assert result.ceilings == fixed_ceilings(1, "cpu")
    found = {(roof.height, roof.batch): roof for roof in result.rows[0].roofs}
    assert set(found) == {(32, 1), (32, 3), (64, 1), (64, 3)}
    assert found[32, 3].gmac == pytest.approx(3 * found[32, 1].gmac)
    assert 0 < found[64, 1].compute_ms <= found[64, 1].floor_ms


def test_without_ceilings_there_is_a_warning(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(threads: int | None, device: str) -> Ceilings:
        raise MissingDependency("the Python package 'torch' is needed")

    monkeypatch.setattr("hpddrnet_trt.benchmark.ceilings.measure_ceilings", absent)
    plan = Settings(**{**QUICK, "roofline": True})
    result = run_benchmark([Entry("plain", models / "fp32.onnx")], image_set(), plan, progress=False)
    assert result.ceilings is None
    assert result.rows[0].roofs == []
    assert "no roofline: the Python package 'torch' is needed" in result.warnings


def test_the_shipped_model_on_real_micrographs(sem_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpddrnet_trt.benchmark.ceilings.measure_ceilings", fixed_ceilings)
    monkeypatch.setattr(measures, "ROUND_S", 0.01)
    images = load_images(sem_data / "nasa-super1", "test", limit=1)
    plan = Settings(**PLAN, sizes=((64, 64),), memory_sizes=((128, 128),))
    entries = [entry for entry in entries_for(model_files(["nasa-super1"])) if entry.engine != "openvino"]
    result = run_benchmark(entries, images, plan, progress=False)
    torch, ort = result.rows
    assert (result.reference, torch.label, ort.label) == (torch.label, "PyTorch FP32", "ONNX Runtime FP32")
    for row in result.rows:
        assert row.status == "measured"
        assert all(len(timings) == 1 for _, timings in row.measures()), row.notes
        assert [(one.height, one.batch) for one in row.memory] == [(64, 1), (128, 1)]
        assert row.memory_failures == []
        assert row.accuracy is not None
        assert row.accuracy.miou is not None
        assert row.accuracy.miou > 0.6
    assert ort.accuracy is not None
    assert ort.accuracy.agreement is not None
    assert ort.accuracy.agreement > 0.999
    assert ort.attention is not None
    (groups,) = ort.layers
    assert {"stem", "position attention", "head"} <= set(groups.groups)
    assert sum(groups.groups.values()) > 0
    (roof,) = ort.roofs
    # 24.7 GMAC at 1024x1024, and attention grows faster than pixels.
    assert roof.gmac == pytest.approx(24.7 / 256, rel=0.15)
