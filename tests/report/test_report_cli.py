"""`hpddrnet-trt evaluate --report`: the command from model file to page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hpddrnet_trt.cli import app
from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.data.datasets import FolderDataset
from tests.toy import manifest, write_toy_onnx


def test_report_robustness_and_json(dataset: FolderDataset, tmp_path: Path) -> None:
    model = write_toy_onnx(tmp_path / "toy.onnx", manifest("labels"))
    page, figures = tmp_path / "out" / "page.html", tmp_path / "figures.json"
    done = CliRunner().invoke(
        app, ["evaluate", str(model), "--data", str(dataset.root), "--report", str(page), "--robustness",
              "--json", str(figures)], catch_exceptions=False,
    )  # fmt: skip
    assert done.exit_code == 0
    assert "mean image micro IoU" in done.stdout
    assert "working range" in done.stdout
    for path in (page, page.with_suffix(".csv"), page.with_suffix(".robustness.png"), figures):
        assert f"written: {path}" in done.stdout
        assert path.is_file()
    record = json.loads(figures.read_text())
    assert record["model"] == str(model)
    assert 0.5 < record["miou"] < record["pixel_accuracy"] < 1
    assert record["robustness"]["sweeps"][0]["shift"] == "contrast"
    assert f"no metrics.csv of a training run lies beside {model}" in page.read_text(encoding="utf-8")


def test_without_report_only_the_table(dataset: FolderDataset, tmp_path: Path) -> None:
    model = write_toy_onnx(tmp_path / "toy.onnx", manifest("labels"))
    before = sorted(tmp_path.iterdir())
    done = CliRunner().invoke(app, ["evaluate", str(model), "--data", str(dataset.root)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "pixel accuracy" in done.stdout
    assert "working range" not in done.stdout
    assert sorted(tmp_path.iterdir()) == before


def test_a_bad_target_is_told_before_anything_is_measured(dataset: FolderDataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ends in"):
        CliRunner().invoke(
            app, ["evaluate", "none.onnx", "--data", str(dataset.root), "--report", str(tmp_path / "page.pdf")],
            catch_exceptions=False,
        )  # fmt: skip
