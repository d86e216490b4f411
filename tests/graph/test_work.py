"""Counting work: the published totals in two ways, graphs as they are deployed, loops and functions."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.export.layer_precision import report_from_network
from hpddrnet_trt.export.onnx import name_after_modules, quiet
from hpddrnet_trt.graph.attention import BLOCK_ROWS, as_function, in_blocks
from hpddrnet_trt.graph.fp8 import to_fp8
from hpddrnet_trt.graph.precision import to_half
from hpddrnet_trt.graph.work import macs_and_bytes
from hpddrnet_trt.models.network import HPDDRNet, ScaledDotProduct, network_config
from tests.graph.parsed_rtx import Parsed
from tests.graph.residual_onnx import fusion_model

pytestmark = pytest.mark.usefixtures("one_thread")
TOTALS = {"hpddrnet-23-slim": (24.70, 24_700_585_088), "ddrnet-23-slim": (18.12, 18_123_915_264)}
CLASSES = 3


def total(work: dict[str, Any]) -> int:
    return sum(entry.macs for entry in work.values())


def hooked_macs(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of one forward call, counted by the modules as they run."""
    counted = 0

    def convolution(module: Any, _: Any, result: torch.Tensor) -> None:
        nonlocal counted
        counted += result.numel() * module.weight[0].numel()

    def linear(module: Any, _: Any, result: torch.Tensor) -> None:
        nonlocal counted
        counted += result.numel() * module.in_features

    def attention(_: Any, inputs: Any, result: torch.Tensor) -> None:
        nonlocal counted
        counted += 2 * result.numel() * inputs[0].shape[1]  # scores, and their product with the values

    hooks = {nn.Conv1d: convolution, nn.Conv2d: convolution, nn.Linear: linear, ScaledDotProduct: attention}
    for module in network.modules():
        if type(module) in hooks:
            module.register_forward_hook(hooks[type(module)])
    network(torch.empty(shape, device="meta"))
    return counted


def test_the_published_totals_in_two_ways() -> None:
    """24.70 and 18.12 GMAC at 1024x1024: the authors' network, unfolded, three channels, three classes."""
    for variant, (printed, exact) in TOTALS.items():
        with torch.device("meta"):
            network = HPDDRNet(network_config(variant, CLASSES)).eval()
        assert hooked_macs(network, (1, 3, 1024, 1024)) == exact
        assert round(exact / 1e9, 2) == printed
    plain = HPDDRNet(network_config("hpddrnet-23-slim", CLASSES)).eval()
    axes = {2: 8 * torch.export.Dim("height", min=1), 3: 8 * torch.export.Dim("width", min=1)}
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            plain, (torch.zeros(1, 3, 64, 64),), dynamo=True, opset_version=20, dynamic_shapes=(axes,), verbose=False
        )
    assert program is not None
    model = program.model_proto
    name_after_modules(model)
    # Nothing was simplified: sizes are computed inside the graph, with divisions.
    work = macs_and_bytes(model, (1, 3, 1024, 1024))
    assert total(work) == TOTALS["hpddrnet-23-slim"][1]
    rest = {name: entry for name, entry in work.items() if ".sps." not in name and ".ecas." not in name}
    assert total(rest) == TOTALS["ddrnet-23-slim"][1]


def test_what_the_totals_include() -> None:
    """As the module's docstring says: from 2 to 4 classes the printed digits stay, with 19 they do not."""
    digits = {}
    for classes in (2, 4, 19):
        with torch.device("meta"):
            networks = [HPDDRNet(network_config(variant, classes)).eval() for variant in TOTALS]
        digits[classes] = [round(hooked_macs(network, (1, 3, 1024, 1024)) / 1e9, 2) for network in networks]
    assert digits == {2: [24.70, 18.12], 4: [24.70, 18.12], 19: [24.72, 18.14]}
    tokens = {128: 64 * 64, 256: 32 * 32}
    scores = sum(2 * count**2 * width for width, count in tokens.items())
    projections = sum(4 * count * width**2 for width, count in tokens.items())
    convolutions = sum(9 * count * width**2 for width, count in tokens.items())
    assert [round(part / 1e9, 2) for part in (scores, projections, convolutions)] == [4.83, 0.54, 1.21]
    channel_attention = 3 * (128 + 256)
    difference = TOTALS["hpddrnet-23-slim"][1] - TOTALS["ddrnet-23-slim"][1]
    assert difference == scores + projections + convolutions + channel_attention


# --- graphs as they are deployed


def test_precisions_of_the_trained_network(shipped: Any, quantized: Any) -> None:
    """The same products in every form of the graph."""
    shape = (1, 1, 512, 512)
    exact = total(macs_and_bytes(shipped, shape))
    eight = [quantized, to_fp8(quantized, shipped)]
    for graph in (to_half(shipped), to_half(shipped, kind="bf16"), *eight, *map(to_half, eight)):
        assert total(macs_and_bytes(graph, shape)) == exact


@given(batch=st.integers(1, 3), height=st.integers(2, 20), width=st.integers(2, 20))
@settings(max_examples=10, deadline=None)
def test_work_grows_with_the_batch_and_weights_do_not(shipped: Any, batch: int, height: int, width: int) -> None:
    size = (1, 64 * height, 64 * width)
    one, many = (macs_and_bytes(shipped, (count, *size)) for count in (1, batch))
    assert total(many) == batch * total(one)
    for name, work in many.items():
        assert work.weights == one[name].weights
        assert (work.inputs, work.outputs) == (batch * one[name].inputs, batch * one[name].outputs)


class Graph:
    """Nodes and constants of a small model with one input ``x``."""

    def __init__(self, kind: int, shape: tuple[int, ...]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.input = helper.make_tensor_value_info("x", kind, shape)

    def add(self, operator: str, inputs: str, output: str, **options: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs.split(), [output], name=output, **options))
        return output

    def constant(self, name: str, value: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def model(self, output: str, kind: int, opset: int = 20) -> onnx.ModelProto:
        result = helper.make_tensor_value_info(output, kind, None)
        graph = helper.make_graph(self.nodes, "small", [self.input], [result], self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


# --- attention in its forms


@pytest.mark.parametrize("quantize", [False, True])
def test_forms_of_attention_do_the_same_work(shipped: Any, quantized: Any, quantize: bool) -> None:
    graph = to_half(quantized) if quantize else shipped
    side = 1024  # 64 x 64 and 32 x 32 tokens: whole blocks
    assert (side // 32) ** 2 % BLOCK_ROWS == 0
    plain, blocks, function = (
        macs_and_bytes(form, (1, 1, side, side)) for form in (graph, in_blocks(graph), as_function(graph))
    )
    assert total(plain) == total(blocks) == total(function)
    # Each block reads keys and values anew.
    products = [work for name, work in blocks.items() if re.match(r"backbone\.sps\.0/Scan.*MatMul", name)]
    operands = 4096 // BLOCK_ROWS * 2 * 4096 * 128
    scores = 4096 * 4096
    assert sum(work.inputs for work in products) == operands + 4096 * 128 + scores


def test_filled_up_blocks_are_counted(shipped: Any) -> None:
    """3 x 5 tokens fill one block of 8 of the second attention: its products are done for all 8 rows twice."""
    shape = (1, 1, 96, 160)
    tokens, rows = (6 * 10, 3 * 5), 8
    missing = sum(2 * width * count * (-count % rows) for width, count in zip((128, 256), tokens, strict=True))
    assert total(macs_and_bytes(in_blocks(shipped, rows), shape)) - total(macs_and_bytes(shipped, shape)) == missing > 0


@pytest.mark.parametrize("heads", [1, 4])
def test_the_attention_operator(heads: int) -> None:
    tokens, keys, width = 24, 40, 16
    flat = Graph(TensorProto.FLOAT, (2, tokens, heads * width))
    flat.constant("k", np.ones((2, keys, heads * width), np.float32))
    flat.add("Attention", "x k k", "y", q_num_heads=heads, kv_num_heads=heads)
    split = Graph(TensorProto.FLOAT, (2, heads, tokens, width))
    split.constant("k", np.ones((2, heads, keys, width), np.float32))
    split.add("Attention", "x k k", "y")
    for graph, shape in ((flat, (2, tokens, heads * width)), (split, (2, heads, tokens, width))):
        work = macs_and_bytes(graph.model("y", TensorProto.FLOAT, opset=23), shape)["y"]
        assert work.macs == 2 * 2 * heads * tokens * keys * width
        assert (work.inputs, work.weights, work.outputs) == tuple(
            2 * heads * width * count for count in (tokens, 2 * keys, tokens)
        )


# --- loops


def turning(trips: int | None, outer: str = "Loop") -> onnx.ModelProto:
    """A loop whose body multiplies one row of ``x`` [5, 16] by a 16 x 16 matrix."""
    graph = Graph(TensorProto.FLOAT, (5, 16))
    graph.constant("w", np.ones((16, 16), np.float32))
    graph.constant("go", np.array(True))
    axis = numpy_helper.from_array(np.array([0], np.int64), "axis")
    if trips is None:
        graph.add("ReduceMax", "x", "largest", keepdims=0)
        graph.add("Cast", "largest", "count", to=TensorProto.INT64)
    else:
        graph.constant("count", np.array(trips, np.int64))
    parts = [
        helper.make_node("Gather", ["x", "turn"], ["row"], name="pick"),
        helper.make_node("Unsqueeze", ["row", "axis"], ["line"], name="line"),
        helper.make_node("MatMul", ["line", "w"], ["result"], name="product"),
        helper.make_node("Identity", ["still"], ["further"], name="further"),
    ]
    kinds = {"turn": TensorProto.INT64, "still": TensorProto.BOOL, "further": TensorProto.BOOL,
             "result": TensorProto.FLOAT}  # fmt: skip
    ports = {name: helper.make_tensor_value_info(name, kind, [] if name != "result" else None)
             for name, kind in kinds.items()}  # fmt: skip
    body = helper.make_graph(
        parts, "body", [ports["turn"], ports["still"]], [ports["further"], ports["result"]], [axis]
    )
    if outer == "Loop":
        graph.nodes.append(helper.make_node("Loop", ["count", "go"], ["y"], name="rows", body=body))
    else:
        branch = helper.make_graph([helper.make_node("Relu", ["x"], ["same"])], "branch", [],
                                   [helper.make_tensor_value_info("same", TensorProto.FLOAT, None)])  # fmt: skip
        graph.nodes.append(helper.make_node("If", ["go"], ["y"], name="rows", then_branch=branch, else_branch=branch))
    return graph.model("y", TensorProto.FLOAT)


def test_a_loop_counts_all_its_turns() -> None:
    assert macs_and_bytes(turning(7), (5, 16))["rows/product"] == (7 * 256, 7 * 16, 7 * 256, 7 * 16)


@pytest.mark.parametrize(
    ("model", "message"),
    [(turning(None), "how often the loop 'rows' turns"), (turning(7, "If"), "what is chosen as it runs")],
)
def test_what_the_input_size_does_not_fix(model: onnx.ModelProto, message: str) -> None:
    with pytest.raises(UserError, match=message):
        macs_and_bytes(model, (5, 16))


def test_the_model_is_left_as_it_is(shipped: Any) -> None:
    before = shipped.SerializeToString(deterministic=True)
    macs_and_bytes(as_function(shipped), (1, 1, 128, 128))
    macs_and_bytes(shipped, (1, 1, 128, 128))
    assert shipped.SerializeToString(deterministic=True) == before


# --- operations


@pytest.mark.parametrize("shape", [(1, 1, 1024, 1024), (2, 1, 256, 384)])
def test_multiply_accumulates_are_those_of_the_parsed_network(shipped: Any, shape: tuple[int, ...]) -> None:
    parsed = Parsed(shipped)
    proof = report_from_network(parsed.trt, parsed.network, shape)
    work = macs_and_bytes(shipped, shape)
    assert {name: entry.macs for name, entry in work.items() if entry.macs} == {
        layer["name"]: layer["macs"] for layer in proof["layers"]
    }
    assert sum(entry.macs for entry in work.values()) == proof["macs"]


def test_elements_of_one_convolution() -> None:
    work = macs_and_bytes(fusion_model(), (1, 4, 16, 16))
    assert work["down"] == (8 * 8 * 8 * 8 * 9, 8 * 16 * 16, 8 * 8 * 9 + 8, 8 * 8 * 8)
    assert work["down"].bytes(1, 1, 2) == 8 * 16 * 16 + 8 * 8 * 9 + 8 + 2 * 8 * 8 * 8
    assert work["upsampled"].macs == 0
    assert work["upsampled"].outputs == 8 * 16 * 16
    assert work["fused"].inputs == 2 * 8 * 16 * 16


@pytest.mark.parametrize("shape", [(1, 4, 16), (1, 4, 16, 24)])
def test_shapes_that_the_graph_does_not_take(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="the graph takes 1x4x16x16, not 1x4x16"):
        macs_and_bytes(fusion_model(), shape)
