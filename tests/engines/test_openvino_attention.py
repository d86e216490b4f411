"""Position attention as OpenVINO's fused operator: found in every typing, exact, and nothing else taken for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from hpddrnet_trt.engines.onnxruntime import OnnxRuntimeEngine
from hpddrnet_trt.engines.openvino import OpenVINOEngine, fuse_attention
from tests.tiny_export import frames, write_fp16, write_fp32, write_int8
from tests.tiny_onnx import tiny_model

openvino = pytest.importorskip("openvino", reason="OpenVINO is an optional extra and not installed")

pytestmark = pytest.mark.usefixtures("one_thread")
FUSED = "ScaledDotProductAttention"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fused")
    write_fp32(made / "fp32.onnx")
    write_fp16(made / "fp16.onnx")
    write_int8(made / "int8.onnx")
    return made


def operators(model: Any) -> list[str]:
    return [node.get_type_name() for node in model.get_ops()]


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
def test_both_attentions_are_fused(folder: Path, name: str) -> None:
    model = openvino.Core().read_model(str(folder / f"{name}.onnx"))
    assert operators(model).count("Softmax") == 2
    assert fuse_attention(model) == 2
    assert "Softmax" not in operators(model)
    assert operators(model).count(FUSED) == 2
    assert fuse_attention(model) == 0


@pytest.mark.parametrize(("name", "least"), [("fp32", 0.999), ("fp16", 0.99), ("int8", 0.9)])
@pytest.mark.parametrize("shape", [(1, 64, 96), (2, 72, 40)])
def test_labels_are_those_of_onnxruntime(folder: Path, name: str, least: float, shape: tuple[int, int, int]) -> None:
    path, images = folder / f"{name}.onnx", frames(*shape)
    with OpenVINOEngine(path, threads=1, precision="fp32") as engine, OnnxRuntimeEngine(path, threads=1) as other:
        found, expected = engine.infer(images).labels, other.infer(images).labels
    assert len(np.unique(expected)) > 1
    # Typed activations turn the last bits of a sum into whole steps, which this small random network enlarges.
    assert (found == expected).mean() > least


def test_a_model_without_attention_stays_as_it_is(tmp_path: Path) -> None:
    model = openvino.Core().read_model(str(tiny_model(tmp_path / "m.onnx")))
    before = operators(model)
    assert fuse_attention(model) == 0
    assert operators(model) == before


def attention(folder: Path, *, axis: int = -1, weights_first: bool = True, heads: bool = False) -> Any:
    """``softmax(q k) v`` for square inputs ``[2, 5, 5]`` (with ``heads`` ``[2, 1, 5, 5]``), and variants of it."""
    shape = [2, 1, 5, 5] if heads else [2, 5, 5]
    nodes = [
        helper.make_node("MatMul", ["q", "k"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["weights"], axis=axis),
        helper.make_node("MatMul", ["weights", "v"] if weights_first else ["v", "weights"], ["mixed"]),
        helper.make_node("Relu", ["mixed"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes, "attention", [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "qkv"],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, shape)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(folder / "attention.onnx"))
    return openvino.Core().read_model(str(folder / "attention.onnx"))


@pytest.mark.parametrize(
    ("changes", "fused"),
    [({}, 1), ({"axis": 2}, 1), ({"axis": 1}, 0), ({"weights_first": False}, 0), ({"heads": True}, 1)],
)
def test_only_what_the_operator_computes_is_fused(tmp_path: Path, changes: dict[str, Any], fused: int) -> None:
    rng = np.random.default_rng(0)
    feed = [rng.normal(size=(2, 1, 5, 5) if "heads" in changes else (2, 5, 5)).astype(np.float32) for _ in "qkv"]
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = attention(tmp_path, **changes)
    want = openvino.compile_model(model, "CPU", settings)(feed)[0]
    assert fuse_attention(model) == fused
    got = openvino.compile_model(model, "CPU", settings)(feed)[0]
    np.testing.assert_allclose(got, want, atol=1e-5)
