"""Every file and engine from one checkpoint: what is made, what a failure leaves, what is not made again."""

from __future__ import annotations

import importlib.util
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hpddrnet_trt.benchmark import preparation as module
from hpddrnet_trt.benchmark.preparation import Prepared, prepare
from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError
from hpddrnet_trt.core.manifest import read_manifest
from hpddrnet_trt.graph.attention import uses_bf16
from hpddrnet_trt.graph.model import load_model
from hpddrnet_trt.models.checkpoints import save_checkpoint
from tests.tiny_export import pictures, write_fp32
from tests.tiny_network import lively, tiny_manifest, tiny_network

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx, which builds without a GPU, is missing"
)
pytestmark = pytest.mark.usefixtures("one_thread")
GRAPHS = ["model.onnx", "model.fp16.onnx", "model.bf16.onnx", "model.fp16-fp32-scores.onnx", "model.int8.onnx",
          "model.fp8.onnx"]  # fmt: skip
OWN = "model.int8-cpu.onnx"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = lively(tiny_network())
    return save_checkpoint(tmp_path_factory.mktemp("prepare") / "tiny.safetensors", network, tiny_manifest(network))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"), 2)[0].parent


def stand_ins(patch: pytest.MonkeyPatch) -> list[str]:
    """Steps that only write their file, in place of the real ones; notes each file that is made."""
    made: list[str] = []

    def write(_: Path, target: Path, kind: Any = None, *__: Any, precision: Any = "int8", **___: Any) -> None:
        made.append(target.name)
        if target.suffix == ".engine":
            target.write_bytes(b"an engine")
        else:
            write_fp32(target, precision=kind if isinstance(kind, str) else precision)

    for step in ("export_onnx", "convert_precision", "calibrate", "build_engine"):
        patch.setattr(module, step, write)
    return made


@needs_rtx
def test_everything_from_one_checkpoint(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real steps, but for the export: tests of its own."""
    monkeypatch.setattr(module, "export_onnx", lambda _, target: write_fp32(target))
    # Otherwise a random network, whose labels rounding changes, has each of its blocks tried in FP32.
    monkeypatch.setattr(module, "convert_precision", partial(module.convert_precision, least_iou=0.0))
    folder = tmp_path / "all"
    prepared = prepare(checkpoint, data, folder, shapes="1x1x64x96")
    engines = [Path(name).with_suffix(".engine").name for name in GRAPHS]
    assert prepared.problems == {}
    assert [path.name for path in prepared.files] == ["model.safetensors", *GRAPHS, OWN, *engines]
    for path in prepared.files:
        manifest = read_manifest(path)
        parts = path.name.split(".")
        if path.suffix == ".engine":
            assert manifest.engine is not None
            assert manifest.engine.activation_bytes
        if path.suffix == ".onnx":
            assert manifest.precision == (parts[1].partition("-")[0] if len(parts) > 2 else "fp32")
    scores = {path.name: uses_bf16(load_model(path)[0]) for path in prepared.files if path.suffix == ".onnx"}
    assert (scores["model.fp16.onnx"], scores["model.fp16-fp32-scores.onnx"]) == (True, False)
    assert read_manifest(folder / OWN).quantized_for == "onnxruntime"

    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = prepare(checkpoint, data, folder, shapes="1x1x64x96")
    assert again == prepared
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_engines_of_every_runtime(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stand_ins(monkeypatch)
    prepare(checkpoint, data, tmp_path, shapes="1x1x64x96", runtimes=("tensorrt", "tensorrt-rtx"))
    engines = [name for name in made if name.endswith(".engine")]
    stems = [name.removesuffix(".onnx") for name in GRAPHS]
    assert engines == [f"{stem}.{runtime}.engine" for runtime in ("tensorrt", "tensorrt-rtx") for stem in stems]


def test_a_failure_is_noted_and_what_depends_on_it_left_out(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = stand_ins(monkeypatch)
    convert = module.convert_precision

    def no_fp16(source: Path, target: Path, kind: Any, **options: Any) -> Any:
        if kind == "fp16":
            raise UserError("no luck with it")
        return convert(source, target, kind, **options)

    monkeypatch.setattr(module, "convert_precision", no_fp16)
    with caplog.at_level(logging.WARNING):
        prepared = prepare(checkpoint, data, tmp_path, shapes="1x1x64x96")
    assert prepared.problems == {"model.fp16.onnx": "no luck with it"}
    assert "model.fp16.onnx: no luck with it" in caplog.text
    assert not any("fp16" in path.name for path in prepared.files)
    assert "model.bf16.engine" in made

    monkeypatch.setattr(module, "convert_precision", convert)  # the next preparation goes on from there
    made.clear()
    monkeypatch.setattr(module, "_with_fp32_scores", lambda source, target: target.write_bytes(source.read_bytes()))
    assert prepare(checkpoint, data, tmp_path, shapes="1x1x64x96").problems == {}
    assert made == ["model.fp16.onnx", "model.fp16.engine", "model.fp16-fp32-scores.engine"]

    def no_export(*_: Any) -> None:
        raise UserError("PyTorch could not")

    monkeypatch.setattr(module, "export_onnx", no_export)
    folder = tmp_path / "without"  # everything depends on the export
    prepared = prepare(checkpoint, data, folder, shapes="1x1x64x96")
    assert prepared == Prepared([folder / "model.safetensors"], {"model.onnx": "PyTorch could not"})


def test_refusals(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(BadInputFile, match=r"none\.safetensors"):
        prepare(tmp_path / "none.safetensors", data, folder, shapes="1x1x64x96")
    with pytest.raises(BadInputFile, match="none"):
        prepare(checkpoint, tmp_path / "none", folder, shapes="1x1x64x96")
    assert not folder.exists()
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"of another training")
    with pytest.raises(UsageError, match="holds files of another checkpoint"):
        prepare(checkpoint, data, folder, shapes="1x1x64x96")
