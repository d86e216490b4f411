"""Simulated rounding: bit for bit what numpy and ml_dtypes round to, through every optimisation of the runtime."""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.data.simulate import simulate
from hpddrnet_trt.export.onnx import store_in_half
from hpddrnet_trt.graph import qdq
from hpddrnet_trt.graph.attention import in_type as attention_in_type
from hpddrnet_trt.graph.model import load_model
from hpddrnet_trt.graph.nodes import copied, initializers, tensor_types
from hpddrnet_trt.graph.precision import to_half
from hpddrnet_trt.graph.rounding import simulate_rounding, uses_half
from tests.graph.residual_onnx import residual_model

FP32, FP16, BF16, FP8 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN
NUMPY: dict[int, Any] = {FP16: np.float16, BF16: ml_dtypes.bfloat16, FP8: ml_dtypes.float8_e4m3fn}
SCALE = 0.03125  # of the FP8 pair


def session(model: onnx.ModelProto) -> Any:
    """With every optimisation, which is the default."""
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto, feed: dict[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return np.asarray(session(model).run(None, feed)[0])


def graph(nodes: list[onnx.NodeProto], constants: dict[str, npt.NDArray[Any]]) -> onnx.ModelProto:
    """Of an FP32 input ``x`` to an FP32 output ``y``, both ``[1, 1, n, 1]``."""
    shape = [1, 1, "n", 1]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FP32, shape)],
        [helper.make_tensor_value_info("y", FP32, shape)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


@cache
def chain(kind: int) -> Any:
    """x -> convolution -> ReLU -> product -> sum, all typed ``kind``: what a runtime likes to fuse."""
    dtype = NUMPY[kind]
    model = graph(
        [
            helper.make_node("Cast", ["x"], ["in"], "in", to=kind),
            helper.make_node("Conv", ["in", "w"], ["c"], "c"),
            helper.make_node("Relu", ["c"], ["r"], "r"),
            helper.make_node("Mul", ["r", "m"], ["p"], "p"),
            helper.make_node("Add", ["p", "in"], ["s"], "s"),
            helper.make_node("Cast", ["s"], ["y"], "y", to=FP32),
        ],
        {"w": np.full((1, 1, 1, 1), 1.37, dtype), "m": np.full((1,), 0.77, dtype)},
    )
    return session(simulate_rounding(model))


@cache
def pair() -> Any:
    """x -> FP8 quantise -> dequantise -> y."""
    constants = {"s": np.array(SCALE, np.float32), "z": np.zeros((), NUMPY[FP8])}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], "d"),
    ]
    return session(simulate_rounding(graph(nodes, constants)))


def every_boundary(kind: int) -> npt.NDArray[np.float32]:
    """Each finite number of the type, the middle to its neighbour (a tie), and what is next to the middle."""
    width = 8 if kind == FP8 else 16
    bits = np.arange(2**width, dtype=f"uint{width}")
    with np.errstate(invalid="ignore"):  # of signalling NaNs among the patterns
        numbers = bits.view(NUMPY[kind]).astype(np.float32)
    numbers = np.unique(numbers[np.isfinite(numbers)])
    middles = ((numbers[1:].astype(np.float64) + numbers[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(middles, np.float32(side)) for side in (-np.inf, np.inf)]
    return np.concatenate([numbers, middles, *beside, np.float32([-0.0, 65519.9, 65520, 1e30, -1e30, np.inf, -np.inf])])


def in_type(x: npt.NDArray[np.float32], kind: int) -> npt.NDArray[np.float32]:
    """The chain, in numpy's own arithmetic of the type."""
    dtype = NUMPY[kind]
    with np.errstate(all="ignore"):
        narrow = x.astype(dtype)
        relu = np.maximum(narrow * dtype(1.37), dtype(0))
        return np.asarray((relu * dtype(0.77) + narrow).astype(np.float32))


def in_fp8(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    with np.errstate(all="ignore"):
        saturated = np.clip(x / np.float32(SCALE), -448, 448)
        return np.asarray(saturated.astype(NUMPY[FP8]).astype(np.float32) * np.float32(SCALE))


def assert_same(got: npt.NDArray[np.float32], want: npt.NDArray[np.float32]) -> None:
    got, same = got.ravel(), np.isnan(want)  # infinity minus infinity
    assert np.isnan(got[same]).all()
    np.testing.assert_array_equal(got[~same], want[~same])


def feed(x: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[np.float32]]:
    return {"x": x.reshape(1, 1, -1, 1)}


def test_every_boundary() -> None:
    for kind in (FP16, BF16):
        x = every_boundary(kind)
        assert_same(chain(kind).run(None, feed(x))[0], in_type(x, kind))
    x = every_boundary(FP8) * np.float32(SCALE)
    assert_same(pair().run(None, feed(x))[0], in_fp8(x))


floats = hnp.arrays(np.float32, st.integers(1, 50), elements=st.floats(width=32, allow_nan=False))


@given(x=floats)
@settings(max_examples=200, deadline=None)
def test_any_numbers(x: npt.NDArray[np.float32]) -> None:
    for kind in (FP16, BF16):
        assert_same(chain(kind).run(None, feed(x))[0], in_type(x, kind))
    assert_same(pair().run(None, feed(x))[0], in_fp8(x))


def test_convolution_sums_are_fp32() -> None:
    """2048 + 1 + 1 would stay 2048 in FP16 sums; only the result is rounded."""
    weights = np.ones((1, 1, 3, 1), np.float16)
    nodes = [
        helper.make_node("Cast", ["x"], ["in"], to=FP16),
        helper.make_node("Conv", ["in", "w"], ["c"], pads=[1, 0, 1, 0]),
        helper.make_node("Cast", ["c"], ["y"], to=FP32),
    ]
    got = run(simulate_rounding(graph(nodes, {"w": weights})), feed(np.float32([1, 2048, 1])))
    assert got.ravel().tolist() == [2048, 2050, 2048]  # 2049 lies between two FP16 numbers


@pytest.fixture(scope="module")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    return load_model(residual_model(tmp_path_factory.mktemp("rounding") / "m.onnx"))[0]


def quantized(model: onnx.ModelProto) -> onnx.ModelProto:
    plan = qdq.plan(model, "tensorrt")
    return qdq.quantize(model, "tensorrt", plan, dict.fromkeys(plan.tensors, (-3.0, 3.0)))


@pytest.mark.parametrize("form", ["fp16", "bf16", "int8"])
def test_every_tensor_of_a_network_is_rounded(float_model: onnx.ModelProto, form: Any) -> None:
    """Observed inside, behind the optimiser: no tensor that was FP16 or BF16 holds more bits than that."""
    typed = to_half(quantized(float_model)) if form == "int8" else to_half(float_model, kind=form)
    simulation = simulate_rounding(typed)
    onnx.checker.check_model(simulation, full_check=True)
    assert set(tensor_types(simulation).values()) <= {
        FP32, FP16, BF16, TensorProto.INT64, TensorProto.UINT8, TensorProto.INT8,
    }  # fmt: skip
    assert list(simulation.graph.input) == list(typed.graph.input)
    assert list(simulation.graph.output) == list(typed.graph.output)
    types = tensor_types(typed)
    dequantized = {name for node in typed.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    narrow = {
        name: NUMPY[types[name]]
        for node in typed.graph.node
        for name in node.output
        if types[name] in (FP16, BF16) and name not in dequantized
    }
    assert len(narrow) > 15
    del simulation.graph.output[:]
    simulation.graph.output.extend(helper.make_tensor_value_info(name, FP32, None) for name in narrow)
    image = simulate(64, 96, seed=1)[0][None, None]
    for (name, dtype), values in zip(narrow.items(), session(simulation).run(None, {"image": image}), strict=True):
        assert values.dtype == np.float32, name
        np.testing.assert_array_equal(values.astype(dtype).astype(np.float32), values, err_msg=name)


def test_network_agrees_with_real_fp16_arithmetic(float_model: onnx.ModelProto) -> None:
    """ONNX's own evaluator computes in numpy's float16."""
    typed = attention_in_type(to_half(float_model), "fp32")  # as PyTorch runs it below
    image = simulate(64, 96, seed=2)[0][None, None]
    (want,) = ReferenceEvaluator(typed).run(None, {"image": image})
    assert len(np.unique(want)) > 1
    assert np.mean(run(simulate_rounding(typed), {"image": image}) == want) > 0.99


def test_int8_kernels_see_exact_products() -> None:
    """INT8 pairs stay, weights are stored dequantised, and only the convolution's result is rounded to FP16."""
    weights = np.array([[[[101]]]], np.int8)
    constants: dict[str, npt.NDArray[Any]] = {
        "s": np.array(0.0303, np.float16), "z": np.array(0, np.int8), "w": weights,
        "sw": np.array([0.0117], np.float16), "zw": np.array([0], np.int8),
    }  # fmt: skip
    nodes = [
        helper.make_node("Cast", ["x"], ["in"], "in", to=FP16),
        helper.make_node("QuantizeLinear", ["in", "s", "z"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "d"),
        helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["wd"], "wd", axis=0),
        helper.make_node("Conv", ["d", "wd"], ["c"], "c"),
        helper.make_node("Cast", ["c"], ["y"], "y", to=FP32),
    ]
    simulation = simulate_rounding(graph(nodes, constants))
    assert [node.op_type for node in simulation.graph.node if "Linear" in node.op_type] == [
        "QuantizeLinear", "DequantizeLinear",
    ]  # fmt: skip
    x = np.linspace(-5, 5, 201, dtype=np.float32)
    step, weight = (np.float32(constants[name].reshape(-1)[0]) for name in ("s", "sw"))
    whole = np.clip(np.rint(x.astype(np.float16).astype(np.float32) / step), -128, 127)
    want = ((whole * step) * (np.float32(101) * weight)).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(run(simulation, feed(x)).ravel(), want)


def test_weight_only_quantization_is_rounded_after_the_node() -> None:
    constants: dict[str, npt.NDArray[Any]] = {
        "w": np.full((1, 1, 1, 1), 101, np.int8), "s": np.array(0.0303, np.float16), "z": np.array(0, np.int8),
    }  # fmt: skip
    nodes = [
        helper.make_node("Cast", ["x"], ["in"], "in", to=FP16),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], "d"),
        helper.make_node("Conv", ["in", "d"], ["c"], "c"),
        helper.make_node("Cast", ["c"], ["y"], "y", to=FP32),
    ]
    stored = initializers(simulate_rounding(graph(nodes, constants)).graph)["d"]
    assert stored.dtype == np.float32
    assert stored.item() == np.float32(np.float16(101 * np.float32(np.float16(0.0303))))


def test_fp32_graph_is_left_alone(float_model: onnx.ModelProto) -> None:
    assert simulate_rounding(float_model).graph.node == float_model.graph.node


def test_what_needs_simulation(float_model: onnx.ModelProto) -> None:
    stored = copied(float_model)
    store_in_half(stored)
    assert FP16 in {entry.data_type for entry in stored.graph.initializer}
    for model in (float_model, quantized(float_model), stored):
        assert not uses_half(model)
    for model in (to_half(float_model), to_half(float_model, kind="bf16"), to_half(quantized(float_model))):
        assert uses_half(model)


def test_narrow_inputs_and_subgraphs_are_refused() -> None:
    model = graph([helper.make_node("Cast", ["x"], ["y"], to=FP32)], {})
    model.graph.input[0].type.tensor_type.elem_type = FP16
    with pytest.raises(UsageError, match="input 'x' is FP16"):
        simulate_rounding(model)
    branch = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["z"])], "b", [], [helper.make_tensor_value_info("z", FP32, None)]
    )
    chosen = helper.make_node("If", ["c"], ["y"], "either", then_branch=branch, else_branch=branch)
    with pytest.raises(UsageError, match="either holds a subgraph"):
        simulate_rounding(graph([chosen], {"c": np.array(True)}))
