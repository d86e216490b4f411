"""Position attention in ONNX graphs: found, computed in blocks, in another type, as a function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.graph.attention import (
    FUNCTION_NAME,
    as_function,
    attentions,
    expanded,
    in_blocks,
    in_type,
    position_attentions,
    uses_bf16,
)

CHANNELS = 6
FP32, FP16, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16


def attention_model(kind: int = FP32) -> onnx.ModelProto:
    """``y + softmax(q y') y`` for a query ``q`` and tokens ``y`` ``[N, T, 6]``; with FP16 as the export types it."""

    def cast(source: str, target: str, to: int) -> Any:
        return helper.make_node("Cast", [source], [target], f"sps.0/{target}", to=to)

    nodes = [cast("q", "query.narrow", kind), cast("y", "tokens", kind)]
    nodes += [
        helper.make_node("Transpose", ["tokens"], ["columns"], "sps.0/Transpose", perm=[0, 2, 1]),
        cast("query.narrow", "query", FP32),
        cast("columns", "keys", FP32),
        helper.make_node("MatMul", ["query", "keys"], ["scores"], "sps.0/MatMul"),
        helper.make_node("Softmax", ["scores"], ["weights"], "sps.0/Softmax", axis=-1),
        cast("weights", "weights.narrow", kind),
        helper.make_node("MatMul", ["weights.narrow", "tokens"], ["mixed"], "sps.0/MatMul_2"),
        helper.make_node("Add", ["mixed", "tokens"], ["sum"], "sps.0/Add"),
        cast("sum", "out", FP32),
    ]
    if kind == FP32:  # without casts, as an FP32 export has it
        nodes = [node for node in nodes if node.op_type != "Cast"]
        names = {"query": "q", "tokens": "y", "keys": "columns", "weights.narrow": "weights", "sum": "out"}
        for node in nodes:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]
    tokens = ["n", "t", CHANNELS]
    graph = helper.make_graph(
        nodes, "attention", [helper.make_tensor_value_info(name, FP32, tokens) for name in "qy"],
        [helper.make_tensor_value_info("out", FP32, tokens)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, feed: dict[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feed))


def tokens(batch: int, count: int, seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(batch, count, CHANNELS)).astype(np.float32) for name in "qy"}


def operators(model: onnx.ModelProto) -> Sequence[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("kind", [FP32, FP16])
def test_attention_is_found_behind_casts(kind: int) -> None:
    (found,) = position_attentions(attention_model(kind))
    assert [node.op_type for node in found.nodes if node.op_type != "Cast"] == ["MatMul", "Softmax", "MatMul"]
    assert (found.values, found.output) == ("y" if kind == FP32 else "tokens", "mixed")


def test_other_softmaxes_are_no_attention() -> None:
    model = attention_model()
    scores = next(node for node in model.graph.node if node.op_type == "Softmax")
    model.graph.output.append(helper.make_tensor_value_info("extra", FP32, None))
    model.graph.node.append(helper.make_node("Relu", [scores.output[0]], ["extra"], "reader"))
    assert position_attentions(model) == []  # its weights are read elsewhere too
    for rewrite in (in_blocks, as_function):
        with pytest.raises(UsageError, match="no position attention"):
            rewrite(model)


@given(rows=st.integers(1, 9), batch=st.integers(1, 3), count=st.integers(1, 20), seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_blocks_of_any_size_give_the_same_result(rows: int, batch: int, count: int, seed: int) -> None:
    model, feed = attention_model(), tokens(batch, count, seed)
    (want,), (got,) = run(model, feed), run(in_blocks(model, rows), feed)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_function_and_back() -> None:
    model, feed = attention_model(), tokens(2, 5)
    function = as_function(model)
    assert FUNCTION_NAME in operators(function)
    assert "Softmax" not in operators(function)
    np.testing.assert_allclose(run(function, feed)[0], run(model, feed)[0], atol=1e-6)
    back = expanded(function)
    assert [(node.op_type, node.name) for node in back.graph.node] == [
        (node.op_type, node.name) for node in model.graph.node
    ]
    assert not back.functions
    np.testing.assert_array_equal(run(back, feed)[0], run(model, feed)[0])


def test_equal_attentions_share_a_function() -> None:
    model = attention_model()
    second = onnx.compose.add_prefix(attention_model(), "b.")
    joined = onnx.compose.merge_models(model, second, io_map=[("out", "b.q")])
    function = as_function(joined)
    assert operators(function).count(FUNCTION_NAME) == 2
    assert len(function.functions) == 1
    feed = {**tokens(1, 4), "b.y": tokens(1, 4, seed=1)["y"]}
    for got, want in zip(run(function, feed), run(joined, feed), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_bf16_attention_is_one_head_of_rank_4_and_takes_what_was_only_widened() -> None:
    typed = in_type(attention_model(FP16), "bf16")
    onnx.checker.check_model(typed, full_check=True)
    entries = onnx.shape_inference.infer_shapes(typed).graph.value_info
    shapes = {entry.name: entry.type.tensor_type.shape for entry in entries}
    (found,) = position_attentions(typed)
    assert [node.op_type for node in found.nodes] == ["MatMul", "Softmax", "MatMul"]  # nothing between them
    made = {node.output[0]: node for node in typed.graph.node}
    for name, source in ((found.query, "query.narrow"), (found.keys, "columns"), (found.values, "tokens")):
        assert made[name].op_type == "Cast"
        assert helper.get_node_attr_value(made[name], "to") == BF16
        head = made[made[name].input[0]]
        assert (head.op_type, head.input[0]) == ("Unsqueeze", source)
        assert len(shapes[name].dim) == 4
        assert shapes[name].dim[1].dim_value == 1
    assert uses_bf16(typed)
    assert not uses_bf16(attention_model(FP16))


def test_back_to_fp32_scores_is_the_original() -> None:
    model, feed = attention_model(FP16), tokens(2, 7)
    back = in_type(in_type(in_type(model, "bf16"), "bf16"), "fp32")  # the second time changes nothing
    assert not uses_bf16(back)
    assert sorted(operators(back)) == sorted(operators(model))
    np.testing.assert_array_equal(run(back, feed)[0], run(model, feed)[0])


def test_attention_can_be_left_out() -> None:
    model = attention_model(FP16)
    assert not uses_bf16(in_type(model, "bf16", leave=["sps.0/Softmax"]))
    assert uses_bf16(in_type(model, "bf16", leave=["sps.1/Softmax"]))


def test_several_heads_are_left_alone() -> None:
    """Those of a transformer: one softmax over [N, heads, T, T]."""
    model = attention_model()
    model.graph.node[0].attribute[0].CopyFrom(helper.make_attribute("perm", [0, 1, 3, 2]))
    for entry in [*model.graph.input, *model.graph.output]:
        entry.CopyFrom(helper.make_tensor_value_info(entry.name, FP32, ["n", 2, "t", CHANNELS]))
    assert len(attentions(model.graph.node)) == 1
    assert position_attentions(model) == []
    feed = {name: np.repeat(values[:, None], 2, axis=1) for name, values in tokens(1, 9).items()}
    (expected,), (found,) = run(model, feed), run(in_type(model, "bf16"), feed)
    assert np.array_equal(found, expected)


def test_what_blocks_need_to_know() -> None:
    model = attention_model()
    with pytest.raises(UsageError, match="rows per block must be at least 1"):
        in_blocks(model, 0)
    for entry in [*model.graph.input, *model.graph.output]:
        entry.type.tensor_type.shape.dim[2].ClearField("dim_value")
    with pytest.raises(UsageError, match="number of channels"):
        in_blocks(model)
