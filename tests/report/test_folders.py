"""Which files are compared, and where a report worth keeping goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpddrnet_trt.benchmark.result import BenchmarkResult
from hpddrnet_trt.core.errors import BadInputFile
from hpddrnet_trt.report.benchmark import ReportFiles
from hpddrnet_trt.report.folders import model_files, publish_report


def test_folders_give_their_models_checkpoints_first(tmp_path: Path) -> None:
    for name in ("b.onnx", "a.engine", "a.engine.json", "z.safetensors", ".half.onnx", "notes.txt", "a.onnx"):
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "deeper.onnx").touch()
    assert [path.name for path in model_files([tmp_path])] == ["z.safetensors", "a.onnx", "b.onnx", "a.engine"]
    given = tmp_path / "missing.onnx"
    assert model_files([given, tmp_path / "sub"]) == [given, tmp_path / "sub" / "deeper.onnx"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInputFile, match="empty holds no model file"):
        model_files([tmp_path / "empty"])


def test_published_report_is_named_after_device_and_day(measured: BenchmarkResult, tmp_path: Path) -> None:
    json_file, html_file = tmp_path / "result.json", tmp_path / "report.html"
    json_file.write_text("{}")
    html_file.write_text("<html></html>")
    machine = measured.machine.model_copy(update={"gpus": [], "cpu": "Some CPU (R) 9000"})
    outcome = measured.model_copy(update={"machine": machine, "created": "2031-02-03T04:05:06+00:00"})
    page = publish_report(ReportFiles(html_file, json_file, json_file, None), outcome, tmp_path / "results")
    assert page == tmp_path / "results" / "some-cpu-r-9000-2031-02-03.html"
    assert page.read_text() == "<html></html>"
    assert page.with_suffix(".json").read_text() == "{}"
