"""The check of a GPU in a few minutes, rehearsed: on the processor, and on the stand-in for CUDA and TensorRT."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import ModelFiles
from hpddrnet_trt.benchmark.result import BenchmarkResult, load_result
from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError
from hpddrnet_trt.core.manifest import read_manifest
from hpddrnet_trt.graph.attention import uses_bf16
from hpddrnet_trt.graph.model import load_model
from hpddrnet_trt.models.checkpoints import save_checkpoint
from tests.engines.conftest import SHAPES, Bench, bench, models
from tests.graph.parsed_rtx import needs_rtx
from tests.tiny_export import pictures, write_fp32
from tests.tiny_network import lively, tiny_manifest, tiny_network
from tests.tiny_onnx import CLASSES, QUIET, tiny_model

__all__ = ["bench", "models"]

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = lively(tiny_network())
    folder = tmp_path_factory.mktemp("checkpoint")
    return save_checkpoint(folder / "tiny.safetensors", network, tiny_manifest(network).replace(classes=CLASSES))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"), 2)[0].parent


@needs_rtx
def test_every_file_is_made_once_from_one_checkpoint(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real steps, but for the export: tests of its own."""
    monkeypatch.setattr(gpu_check, "export_onnx", lambda _, target: write_fp32(target))
    monkeypatch.setattr(gpu_check, "SHAPES", "1x1x64x96")
    # Otherwise a random network, whose labels rounding changes, has each of its blocks tried in FP32.
    convert = gpu_check.convert_precision
    monkeypatch.setattr(gpu_check, "convert_precision", lambda *a, **b: convert(*a, **b, least_iou=0.0))
    files = ModelFiles(checkpoint, data, tmp_path / "all")
    for name in reversed(files.graphs):  # in any order: what one is made from is made before
        manifest = read_manifest(files.get(name))
        middle = name.split(".")[1]
        assert manifest.precision == ("fp32" if middle == "onnx" else middle.partition("-")[0])
    scores = [uses_bf16(load_model(files.get(f"model.{kind}.onnx"))[0]) for kind in ("fp16", "fp16-fp32-scores")]
    assert scores == [True, False]
    assert read_manifest(files.get("model.int8-cpu.onnx")).quantized_for == "onnxruntime"
    target = tmp_path / "all" / "model.int8.tensorrt-rtx.engine"
    files.build("model.int8.onnx", "tensorrt-rtx", target)
    assert read_manifest(target).precision == "int8"
    times = {path: path.stat().st_mtime_ns for path in files.folder.glob("*.onnx")}
    again = ModelFiles(checkpoint, data, files.folder)
    assert {again.get(name): again.get(name).stat().st_mtime_ns for name in again.graphs} == times


def test_refusals(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    for source, images, says in (
        (tmp_path / "none.safetensors", data, r"none\.safetensors"), (checkpoint, tmp_path / "none", "none"),
    ):  # fmt: skip
        with pytest.raises(BadInputFile, match=says):
            ModelFiles(source, images, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"of another training")
    with pytest.raises(UsageError, match="holds files of another checkpoint"):
        ModelFiles(checkpoint, data, tmp_path / "out")


def options(checkpoint: Path, data: Path, output: Path, *more: str) -> list[str]:
    return ["gpu_check.py", "--checkpoint", str(checkpoint), "--data", str(data), "--output", str(output), *more]


def stand_ins(patch: pytest.MonkeyPatch) -> list[str]:
    """Steps that only write a tiny model, in place of the real ones, and real engines of it; notes what is made."""
    made: list[str] = []
    build = gpu_check.build_engine

    def write(_: Path, target: Path, *__: Any, **___: Any) -> None:
        made.append(target.name)
        tiny_model(target)

    def built(source: Path, target: Path, **given: Any) -> None:
        made.append(target.name)
        if "int8" in target.name:
            raise UserError("no luck with it")
        build(source, target, settings=QUIET, **given)

    for step in ("export_onnx", "convert_precision", "calibrate"):
        patch.setattr(gpu_check, step, write)
    patch.setattr(gpu_check, "build_engine", built)
    patch.setattr(gpu_check, "in_type", lambda model, _: model)
    return made


@pytest.fixture
def own_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends this process stays as it is."""
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)


@needs_rtx
@pytest.mark.usefixtures("own_signals")
def test_rehearsal_on_the_stand_in(
    bench: Callable[..., Bench], checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench()  # CUDA and TensorRT-RTX are simulated from here on
    made = stand_ins(monkeypatch)
    written: list[BenchmarkResult] = []
    run_benchmark = gpu_check.run_benchmark

    def noting(*given: Any, keep: Callable[[BenchmarkResult], object], **more: Any) -> BenchmarkResult:
        wanted = [entry for entry in given[0] if "compiled" not in entry.label and "plain" not in entry.label]

        def both(result: BenchmarkResult) -> None:
            keep(result)
            written.append(load_result(tmp_path / "gpu" / "result.json"))

        return run_benchmark(wanted, *given[1:], keep=both, progress=False, **more)

    monkeypatch.setattr(gpu_check, "run_benchmark", noting)
    monkeypatch.setattr(gpu_check, "SHAPES", SHAPES)
    monkeypatch.setattr(gpu_check, "OTHERS", ())
    more = ("--size", "128x128", "--size", "64x64", "--batch", "1", "--rounds", "1", "--publish")
    monkeypatch.setattr(sys, "argv", options(checkpoint, data, tmp_path / "gpu", *more, str(tmp_path / "published")))
    assert gpu_check.main() == 0
    result = load_result(tmp_path / "gpu" / "result.json")
    assert (result.complete, result.reference) == (True, "PyTorch FP32")
    labels = [row.label for row in result.rows]
    assert labels[:6] == [
        "PyTorch FP32", "PyTorch AMP channels last", "TensorRT-RTX FP16", "TensorRT-RTX FP16 without CUDA graphs",
        "TensorRT-RTX INT8", "TensorRT-RTX FP32",
    ]  # fmt: skip
    rows = {row.label: row for row in result.rows}
    engine = rows["TensorRT-RTX FP16"]
    assert [str(timing.shape) for timing in engine.end_to_end] == ["128×128", "64×64"]
    assert all(timing.by_events for timing in engine.inference)
    assert not any(timing.by_events for timing in rows["PyTorch FP32"].inference)
    assert engine.end_to_end[0].ratio is not None
    assert not engine.end_to_end[0].ratio.paired  # one engine at a time: no rounds in common
    assert engine.accuracy is not None
    assert engine.accuracy.agreement is not None
    assert "no luck with it" in (rows["TensorRT-RTX INT8"].reason or "")
    assert len(made) == len(set(made))  # a failure is not tried again at the next size
    # Written after every case, so that nothing is lost: each holds one more.
    counts = [sum(len(row.end_to_end) for row in one.rows) for one in written]
    assert counts == sorted(counts)
    assert set(counts) == set(range(1, counts[-1] + 1))
    assert json.loads((tmp_path / "gpu" / "runner.json").read_text()).keys() == {
        "upload", "download", "both in a CUDA graph",
    }  # fmt: skip
    assert {path.suffix for path in (tmp_path / "published").iterdir()} == {".json", ".html"}


@pytest.mark.usefixtures("own_signals")
def test_what_has_not_begun_in_time_is_dropped_and_named(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = stand_ins(monkeypatch)
    late = iter([False] * 4 + [True] * 1000)  # the first entry's first case, and its labels
    monkeypatch.setattr("hpddrnet_trt.benchmark.run._Run._late", lambda _: next(late))
    monkeypatch.setattr(sys, "argv", options(checkpoint, data, tmp_path, "--size", "64x64", "--rounds", "1"))
    assert gpu_check.main() == 0
    result = load_result(tmp_path / "result.json")
    assert [row.label for row in result.measured] == ["PyTorch FP32"]
    assert made == []
    (warning,) = (warning for warning in result.warnings if "minutes was over" in warning)
    assert "ONNX Runtime FP32 at 64×64, batch 8 of 64×64" in warning
    assert "the time was over before its turn" in (result.rows[-1].reason or "")
    assert "minutes was over" in capsys.readouterr().out


def test_a_rehearsal_that_is_cut_short_keeps_its_results(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    arguments = options(checkpoint, data, tmp_path, "--size", "64x64", "--rounds", "3", "--minutes", "2")[1:]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "gpu_check.py"), *arguments]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, **streams) as child:
        end = time.monotonic() + 200
        while not (tmp_path / "result.json").exists() and child.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        child.send_signal(signal.SIGTERM)
        said = child.communicate(timeout=100)[0]
    assert child.returncode == 130, said
    result = load_result(tmp_path / "result.json")
    assert not result.complete
    assert result.measured[0].label == "PyTorch FP32"
    assert result.measured[0].end_to_end
    assert (tmp_path / "report.html").is_file()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is missing")
def test_make_gpu_takes_the_figures_first_and_failing_tests_do_not_stop_them(tmp_path: Path) -> None:
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexit 1\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "--no-print-directory", "gpu", f"PY={python}", "MINUTES=3"], cwd=REPOSITORY, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    figures, tests = log.read_text().splitlines()
    assert figures.startswith("benchmarks/gpu_check.py --minutes 3 --publish benchmarks/results")
    assert tests == "-m pytest -m gpu tests"
    assert done.returncode != 0  # but it says so at the end
