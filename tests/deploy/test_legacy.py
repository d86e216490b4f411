"""TensorRT before 10, with a stand-in for its interface: it cannot be installed or run here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from hpddrnet_trt.data.simulate import simulate
from hpddrnet_trt.deploy import qdq
from hpddrnet_trt.deploy.half import to_half
from hpddrnet_trt.deploy.legacy import (
    configure_weak_typing,
    creation_flags,
    legacy_problems,
    lower_opset,
    needs_weak_typing,
)
from hpddrnet_trt.errors import UsageError, UserError
from tests.deploy.residual_onnx import residual_model
from tests.tiny_onnx import tiny_model

TRT = SimpleNamespace(
    BuilderFlag=SimpleNamespace(FP16="FP16", INT8="INT8", OBEY_PRECISION_CONSTRAINTS="OBEY"),
    DataType=SimpleNamespace(FLOAT="FLOAT"),
    LayerType=SimpleNamespace(
        CAST="CAST",
        ELEMENTWISE="ELEMENTWISE",
        IDENTITY="IDENTITY",
        MATRIX_MULTIPLY="MATMUL",
        SCALE="SCALE",
        SHUFFLE="SHUFFLE",
        SOFTMAX="SOFTMAX",
        UNARY="UNARY",
    ),
    NetworkDefinitionCreationFlag=SimpleNamespace(EXPLICIT_BATCH=0, STRONGLY_TYPED=3),
)


class Layer:
    """Of the interface, what the code may use; anything else is an AttributeError."""

    num_outputs = 1

    def __init__(self, kind: str, name: str, *inputs: str) -> None:
        self.type, self.name, self.precision = kind, name, None
        self._inputs = inputs
        self.output_types: dict[int, Any] = {}

    def get_input(self, slot: int) -> Any:
        return SimpleNamespace(name=self._inputs[slot])

    def get_output(self, slot: int) -> Any:
        assert slot == 0
        return SimpleNamespace(name=self.name)

    def set_output_type(self, slot: int, kind: Any) -> None:
        self.output_types[slot] = kind


class Network:
    def __init__(self, *layers: Layer) -> None:
        self.layers, self.num_layers = layers, len(layers)

    def get_layer(self, index: int) -> Layer:
        return self.layers[index]


class Config:
    def __init__(self) -> None:
        self.flags: list[str] = []

    def set_flag(self, flag: str) -> None:
        self.flags.append(flag)


def network() -> Network:
    """Position attention with what a parser puts between, and a softmax of class scores."""
    return Network(
        Layer("CONVOLUTION", "keys", "image"),
        Layer("MATMUL", "projected", "keys", "keys"),
        Layer("SHUFFLE", "flat", "projected"),
        Layer("MATMUL", "scores", "flat", "keys"),
        Layer("ELEMENTWISE", "scaled", "scores", "factor"),
        Layer("SHUFFLE", "wide", "scaled"),
        Layer("SOFTMAX", "weights", "wide"),
        Layer("MATMUL", "mixed", "weights", "keys"),
        Layer("CONVOLUTION", "logits", "mixed"),
        Layer("SOFTMAX", "confidence", "logits"),
    )


@pytest.mark.parametrize(
    ("version", "weak", "flags"),
    [("8.5.2.2", True, 1), ("8.6.1", True, 1), ("10.0.1", False, 8), ("11.1.0.32", False, 8)],
)
def test_versions(version: str, weak: bool, flags: int) -> None:
    assert needs_weak_typing(version) is weak
    assert creation_flags(TRT, version) == flags


@pytest.mark.parametrize(("precision", "flags"), [("fp16", ["FP16", "OBEY"]), ("int8", ["INT8", "FP16", "OBEY"])])
def test_scores_stay_in_fp32(precision: str, flags: list[str]) -> None:
    parsed, config = network(), Config()
    assert configure_weak_typing(TRT, parsed, config, precision) == ["scores", "scaled", "weights"]
    assert config.flags == flags
    held = {layer.name for layer in parsed.layers if layer.precision == "FLOAT"}
    assert held == {"scores", "scaled", "weights"} == {layer.name for layer in parsed.layers if layer.output_types}
    assert all(layer.output_types == {0: "FLOAT"} for layer in parsed.layers if layer.name in held)


def test_fp32_needs_nothing() -> None:
    parsed, config = network(), Config()
    assert configure_weak_typing(TRT, parsed, config, "fp32") == []
    assert config.flags == []
    assert not any(layer.output_types for layer in parsed.layers)


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_later_precisions_are_refused(precision: str) -> None:
    with pytest.raises(UsageError, match=f"TensorRT before 10 has no {precision.upper()}; choose one of: fp32"):
        configure_weak_typing(TRT, network(), Config(), precision)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = onnx.load(str(residual_model(tmp_path_factory.mktemp("legacy") / "model.onnx")))
    qdq.name_nodes(model)
    return model


@pytest.fixture(scope="module")
def quantised(model: Any) -> Any:
    plan = qdq.plan(model, "tensorrt")
    return qdq.quantise(model, "tensorrt", plan, dict.fromkeys(plan.tensors, (-6.0, 6.0)))


def _labels(model: Any) -> Any:
    image = simulate(64, 96, 3)[0][None, None]
    options = {"providers": ["CPUExecutionProvider"], "disabled_optimizers": ["WeightBiasQuantization"]}
    return onnxruntime.InferenceSession(model.SerializeToString(), **options).run(["labels"], {"image": image})[0]


@pytest.mark.parametrize("kind", ["model", "quantised"])
def test_lowered_files_compute_the_same(kind: str, request: pytest.FixtureRequest) -> None:
    source = request.getfixturevalue(kind)
    assert legacy_problems(source) == ["opset 20 (at most 17)"]
    lowered = lower_opset(source)
    assert legacy_problems(lowered) == []
    assert np.array_equal(_labels(lowered), _labels(source))
    assert len(np.unique(_labels(source))) > 1
    assert lowered.metadata_props == source.metadata_props
    assert source.opset_import[0].version == 20


def test_lowered_shipped_model(shipped: Any) -> None:
    lowered = lower_opset(shipped)
    assert legacy_problems(lowered) == []
    assert np.array_equal(_labels(lowered), _labels(shipped))


@pytest.fixture(scope="module")
def shipped() -> Any:
    path = Path(__file__).resolve().parents[2] / "hpddrnet_trt" / "weights" / "nasa-super1.onnx"
    return onnx.load(str(path))


def test_fp16_scales_cannot_be_lowered(quantised: Any) -> None:
    half = to_half(quantised)
    assert "FP16 scales (calibrate with FP32 typing)" in legacy_problems(half)
    with pytest.raises(UserError, match="cannot be written at opset 17"):
        lower_opset(half)


def test_every_problem_is_named(tmp_path: Path) -> None:
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [], [1.0])
    zero = helper.make_tensor("zero", TensorProto.UINT8, [], [0])
    eight = helper.make_tensor("eight", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    nodes = [
        helper.make_node("Transpose", ["image"], ["turned"]),
        helper.make_node("Cast", ["turned"], ["wide"], to=TensorProto.BFLOAT16),
        helper.make_node("QuantizeLinear", ["wide", "scale", "zero"], ["low"]),
        helper.make_node("Attention", ["q", "k", "v"], ["labels"]),
    ]
    graph = helper.make_graph(
        nodes,
        "odd",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, 1, 8, 8])],
        [helper.make_tensor_value_info("labels", TensorProto.FLOAT, None)],
        [scale, zero, eight],
    )
    assert legacy_problems(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])) == [
        "opset 23 (at most 17)",
        "BF16 values",
        "FP8 values",
        "uint8 quantisation (calibrate for TensorRT)",
        "the Attention operator (export MatMul)",
        "a uint8 input read by Transpose (only Cast may)",
    ]
    half = onnx.load(str(tiny_model(tmp_path / "m.onnx", typing="int8")))
    assert "FP16 scales (calibrate with FP32 typing)" in legacy_problems(half)
