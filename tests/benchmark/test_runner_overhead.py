"""The recipe that compares a segmenter with its bare engine."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.toy import manifest, write_toy_onnx

RECIPE = Path(__file__).resolve().parents[2] / "benchmarks" / "runner_overhead.py"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("runner_overhead", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_the_segmenter_adds_is_found(recipe: ModuleType) -> None:
    """Known differences under a common mood of the machine."""
    rng = np.random.default_rng(0)
    mood = rng.uniform(100, 300, 200)
    times = {name: mood + more + rng.normal(0, 0.1, 200) for name, more in (("segment", 5), ("infer", 3), ("bound", 0))}
    found = recipe.summary(times)
    for other, added in (("infer", 2), ("bound", 5)):
        part = found[f"segment over {other}"]
        low, high = part["added_ms_95"]
        assert low < part["added_ms"] < high
        assert low == pytest.approx(added, abs=0.1)
        assert high == pytest.approx(added, abs=0.1)
        assert part["ratio_95"][0] < part["ratio"] < part["ratio_95"][1]
    assert found["segment"]["p50_ms"] < found["segment"]["p95_ms"]


def test_figures_are_printed_and_written(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("psutil")
    model, target = write_toy_onnx(tmp_path / "m.onnx", manifest()), tmp_path / "overhead.json"
    monkeypatch.setattr(
        sys, "argv",
        [str(RECIPE), "--model", str(model), "--engines", "nothing", "onnxruntime", "--size", "64", "--runs", "5",
         "--threads", "1", "--output", str(target)],
    )  # fmt: skip
    recipe.main()
    printed = capsys.readouterr().out
    assert "nothing (nothing)\n" in printed
    assert "onnxruntime (onnxruntime " in printed
    written = json.loads(target.read_text())
    assert written["size"] == 64
    assert written["command"].startswith("python ")
    assert written["engines"]["nothing"]["runs"] == 100
    for name in ("nothing", "onnxruntime"):
        figures = written["engines"][name]
        assert figures["segment"]["p50_ms"] > 0
        assert set(figures["segment over infer"]) == {"added_ms", "added_ms_95", "ratio", "ratio_95"}
