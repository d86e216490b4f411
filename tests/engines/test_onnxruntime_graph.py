"""What ONNX Runtime is given in place of a file: FP32 scores for BF16 ones, blocks for large images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from hpddrnet_trt.core.manifest import read_manifest
from hpddrnet_trt.engines import onnxruntime as module
from hpddrnet_trt.engines.onnxruntime import OnnxRuntimeEngine, needs_blocks, source_for_cpu
from hpddrnet_trt.export.convert import convert_precision
from hpddrnet_trt.graph.attention import FUNCTION_NAME, in_blocks, position_attentions, uses_bf16
from hpddrnet_trt.graph.model import load_model
from tests.tiny_export import frames, write_fp16, write_fp32, write_int8
from tests.tiny_onnx import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
# The last has 60 tokens in the finer attention and 15 in the other: no multiples of a block of 7 queries.
SHAPES = [(1, 64, 96), (2, 64, 64), (2, 96, 160)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("graph")
    write_fp32(made / "fp32.onnx")
    write_fp32(made / "function.onnx", attention="function")
    write_fp16(made / "fp16.onnx")
    write_int8(made / "int8.onnx")
    write_int8(made / "int8-cpu.onnx", runtime="onnxruntime")
    return made


@pytest.fixture
def always_in_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every image is large; blocks have 7 queries. Notes the attentions of each graph that was rewritten."""
    made: list[int] = []

    def small_blocks(model: onnx.ModelProto) -> onnx.ModelProto:
        made.append(len(position_attentions(model)))
        return in_blocks(model, 7)

    monkeypatch.setattr(module, "LARGEST_SCORES_MIB", 0)
    monkeypatch.setattr(module, "in_blocks", small_blocks)
    return made


def test_blocks_begin_above_the_limit() -> None:
    # 256 MiB are 8192 x 8192 scores in FP32: 128 x 64 tokens of 16 x 16 pixels.
    assert not needs_blocks((1, 1, 2048, 1024))
    assert needs_blocks((1, 1, 2048, 1032))  # a part of a token is one
    assert not needs_blocks((4, 1, 1024, 1024))
    assert needs_blocks((5, 1, 1024, 1024))
    assert needs_blocks((1, 1, 2048, 2048))


def test_a_plain_file_is_loaded_as_it_is(folder: Path, tmp_path: Path) -> None:
    for name in ("fp32", "function"):
        path = folder / f"{name}.onnx"
        assert source_for_cpu(path, read_manifest(path), blocks=False) == path
    without = tiny_model(tmp_path / "m.onnx", typing="fp16")  # typed, but without attention
    assert source_for_cpu(without, read_manifest(without), blocks=True) == without


@pytest.mark.parametrize("name", ["fp16", "int8"])
@pytest.mark.parametrize("blocks", [False, True])
def test_bf16_scores_become_fp32(folder: Path, name: str, blocks: bool) -> None:
    path = folder / f"{name}.onnx"
    assert uses_bf16(onnx.load(str(path)))
    source = source_for_cpu(path, read_manifest(path), blocks)
    assert isinstance(source, bytes)
    model = onnx.load_from_string(source)
    onnx.checker.check_model(model, full_check=True)
    types = {attribute.i for node in model.graph.node if node.op_type == "Cast" for attribute in node.attribute}
    assert onnx.TensorProto.BFLOAT16 not in types
    assert [node.op_type for node in model.graph.node].count("Scan") == (2 if blocks else 0)


def test_a_function_is_written_out_for_blocks(folder: Path) -> None:
    path = folder / "function.onnx"
    source = source_for_cpu(path, read_manifest(path), blocks=True)
    assert isinstance(source, bytes)
    model = onnx.load_from_string(source)
    assert not model.functions
    assert [node.op_type for node in model.graph.node].count("Scan") == 2


@pytest.mark.parametrize(("name", "least"), [("function", 1.0), ("fp16", 0.98), ("int8", 0.8)])
def test_every_form_runs(folder: Path, name: str, least: float) -> None:
    images = frames(2, 64, 96)
    with OnnxRuntimeEngine(folder / f"{name}.onnx", threads=1) as engine:
        found = engine.infer(images).labels
    with OnnxRuntimeEngine(folder / "fp32.onnx", threads=1) as engine:
        expected = engine.infer(images).labels
    assert len(np.unique(expected)) > 1
    assert (found == expected).mean() >= least


@pytest.mark.parametrize(
    ("name", "least"),
    [("fp32", 0.999), ("function", 0.999), ("fp16", 0.999), ("int8", 0.99), ("int8-cpu", 0.99)],
)
def test_blocks_give_the_same_labels(folder: Path, name: str, least: float, request: pytest.FixtureRequest) -> None:
    with OnnxRuntimeEngine(folder / f"{name}.onnx", threads=1) as engine:
        expected = [engine.infer(frames(*shape)).labels for shape in SHAPES]
    made = request.getfixturevalue("always_in_blocks")
    with OnnxRuntimeEngine(folder / f"{name}.onnx", threads=1) as engine:
        assert made == []  # only with the first image
        found = [engine.infer(frames(*shape)).labels for shape in SHAPES]
        many = [prediction.labels for prediction in engine.infer_many(frames(*shape) for shape in SHAPES)]
        assert made == [2]  # one session for every shape
    for one, other, want in zip(found, many, expected, strict=True):
        np.testing.assert_array_equal(one, other)
        assert (one == want).mean() > least  # but for ties, and steps of INT8


def test_bound_batches_and_layer_times_use_blocks(folder: Path, always_in_blocks: list[int]) -> None:
    images = frames(2, 96, 160)
    with OnnxRuntimeEngine(folder / "fp32.onnx", threads=1) as engine:
        engine.bind(images)()
        assert always_in_blocks == [2]
        names = engine.layer_times(images, runs=2)
    assert always_in_blocks == [2, 2]  # the profiler has a session of its own
    assert min(names.values()) >= 0
    assert sum("Scan" in name for name in names) == 2
    assert not any("Softmax" in name for name in names)


def test_defaults_never_use_blocks(folder: Path, always_in_blocks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_: Any) -> str:
        raise AssertionError("the file itself is loaded")

    monkeypatch.setattr(module, "source_for_cpu", unexpected)
    images = frames(1, 64, 96)
    with OnnxRuntimeEngine(folder / "fp32.onnx", threads=1, defaults=True) as engine:
        assert engine.infer(images).labels.shape == (1, 64, 96)
        engine.bind(images)()
        assert any("Softmax" in name for name in engine.layer_times(images, runs=1))
    assert always_in_blocks == []


def test_conversion_keeps_the_function(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "fp16.onnx"
    manifest = convert_precision(folder / "function.onnx", path)
    assert (manifest.precision, manifest.attention) == ("fp16", "function")
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node].count(FUNCTION_NAME) == 2
    assert uses_bf16(load_model(path)[0])
    images = frames(1, 64, 96)
    with OnnxRuntimeEngine(path, threads=1) as engine, OnnxRuntimeEngine(folder / "fp16.onnx", threads=1) as other:
        np.testing.assert_array_equal(engine.infer(images).labels, other.infer(images).labels)
