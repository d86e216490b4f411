"""Counting work: the published totals in two ways, graphs as they are deployed, loops and functions."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.export.onnx import name_after_modules, quiet
from hpddrnet_trt.graph import qdq
from hpddrnet_trt.graph.attention import BLOCK_ROWS, as_function, in_blocks
from hpddrnet_trt.graph.fp8 import to_fp8
from hpddrnet_trt.graph.nodes import fold_constants, name_nodes
from hpddrnet_trt.graph.precision import to_half
from hpddrnet_trt.graph.work import TypedWork, macs_and_bytes, typed_work
from hpddrnet_trt.models.network import HPDDRNet, ScaledDotProduct, network_config

pytestmark = pytest.mark.usefixtures("one_thread")
SHIPPED = Path(__file__).resolve().parents[2] / "hpddrnet_trt" / "weights" / "nasa-super1.onnx"
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
    for work in (macs_and_bytes(model, (1, 3, 1024, 1024)), typed_work(model, (1, 3, 1024, 1024))):
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


@pytest.fixture(scope="module")
def shipped() -> Any:
    model = onnx.load(str(SHIPPED))
    fold_constants(model.graph)
    name_nodes(model)
    return model


@pytest.fixture(scope="module")
def quantised(shipped: Any) -> Any:
    plan = qdq.plan(shipped, "tensorrt")
    return qdq.quantise(shipped, "tensorrt", plan, dict.fromkeys(plan.tensors, (-2.0, 2.0)))


def by_precision(work: dict[str, TypedWork]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for entry in work.values():
        if entry.precision is not None:
            counts[entry.precision] += entry.macs
    return counts


def moved(work: dict[str, TypedWork]) -> int:
    return sum(entry.bytes for entry in work.values())


def test_precisions_of_the_trained_network(shipped: Any, quantised: Any) -> None:
    """The same products in every form of the graph, each in its own precision, in fewer and fewer bytes."""
    shape = (1, 1, 512, 512)
    exact = total(macs_and_bytes(shipped, shape))
    eight = {"int8": quantised, "fp8": to_fp8(quantised, shipped)}
    graphs = {"fp32": shipped, "fp16": to_half(shipped), "bf16": to_half(shipped, kind="bf16"), **eight}
    graphs |= {f"{kind}+fp16": to_half(graph) for kind, graph in eight.items()}
    work = {kind: typed_work(graph, shape) for kind, graph in graphs.items()}
    assert {kind: total(entry) for kind, entry in work.items()} == dict.fromkeys(work, exact)
    assert set(by_precision(work["fp32"])) == {"fp32"}
    for kind in ("fp16", "bf16"):  # but for attention's scores
        assert set(by_precision(work[kind])) <= {kind, "fp32", "bf16"}
        assert by_precision(work[kind])[kind] > 0.9 * exact
        assert 0.45 < moved(work[kind]) / moved(work["fp32"]) < 0.62
    for kind in eight:
        assert by_precision(work[kind])[kind] == by_precision(work[f"{kind}+fp16"])[kind] > 0.8 * exact
        assert moved(work[f"{kind}+fp16"]) < moved(work[kind]) < moved(work["fp16"])


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is missing")
@pytest.mark.parametrize("form", ["int8+fp16", "bf16"])
def test_precisions_are_those_of_the_parsed_network(shipped: Any, quantised: Any, form: str) -> None:
    import tensorrt_rtx as trt

    from hpddrnet_trt.export.proof import proof_from_network

    graph = to_half(quantised) if form == "int8+fp16" else to_half(shipped, kind="bf16")
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(graph.SerializeToString())
    proof = proof_from_network(trt, network, (1, 1, 512, 768))
    work = typed_work(graph, (1, 1, 512, 768))
    assert {name: (entry.precision, entry.macs) for name, entry in work.items() if entry.macs} == {
        layer["name"]: (layer["precision"], layer["macs"]) for layer in proof["layers"]
    }


@given(batch=st.integers(1, 3), height=st.integers(2, 20), width=st.integers(2, 20))
@settings(max_examples=10, deadline=None)
def test_kernels_do_the_operators_work_and_move_less(
    shipped: Any, quantised: Any, batch: int, height: int, width: int
) -> None:
    shape = (batch, 1, 64 * height, 64 * width)
    operators, kernels = macs_and_bytes(shipped, shape), typed_work(shipped, shape)
    assert total(operators) == total(kernels) == total(typed_work(quantised, shape))
    assert moved(kernels) < sum(work.bytes() for work in operators.values())
    one = typed_work(shipped, (1, *shape[1:]))
    assert total(kernels) == batch * total(one)
    weights = sum(work.weights for work in one.values())
    assert moved(kernels) - weights == batch * (moved(one) - weights)


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


@pytest.fixture
def pairs() -> Graph:
    """FP16 ``x`` [1, 4, 8, 8]: INT8 convolution to 8 channels, residual sum, ReLU, quantised; ends in ``r_dq``."""
    graph = Graph(TensorProto.FLOAT16, (1, 4, 8, 8))
    graph.constant("scale", np.float16(0.1))
    graph.constant("zero", np.int8(0))
    for name, inputs, kernel in (("main", 4, 3), ("side", 4, 1)):
        graph.constant(f"{name}_q", np.ones((8, inputs, kernel, kernel), np.int8))
        graph.add("DequantizeLinear", f"{name}_q scale zero", f"{name}_w")
    graph.add("QuantizeLinear", "x scale zero", "x_q")
    graph.add("DequantizeLinear", "x_q scale zero", "x_dq")
    graph.add("Conv", "x_dq side_w", "shortcut")
    graph.add("Conv", "x_dq main_w", "main", pads=[1] * 4)
    graph.add("Add", "shortcut main", "sum")
    graph.add("Relu", "sum", "r")
    graph.add("QuantizeLinear", "r scale zero", "r_q")
    graph.add("DequantizeLinear", "r_q scale zero", "r_dq")
    return graph


def test_bytes_of_a_quantised_residual_block(pairs: Graph) -> None:
    """Sum, ReLU and quantisation belong to the last convolution; FP16 is left where the shortcut is stored."""
    pairs.add("MaxPool", "r_dq", "y", kernel_shape=[2, 2], strides=[2, 2])
    work = typed_work(pairs.model("y", TensorProto.FLOAT16), (1, 4, 8, 8))
    pixels, scalars = 64, 2 + 1  # a quantisation's scale and zero point
    assert work == {
        "x_q": TypedWork(None, 0, 2 * 4 * pixels, scalars, 4 * pixels),
        "shortcut": TypedWork("int8", 8 * 4 * pixels, 4 * pixels, 8 * 4, 2 * 8 * pixels),
        "main": TypedWork(
            "int8", 8 * 4 * 9 * pixels, 4 * pixels + 2 * 8 * pixels, 8 * 4 * 9 + scalars, 8 * pixels
        ),
        "y": TypedWork(None, 0, 8 * pixels, 0, 2 * 8 * 16),
    }
    assert work["x_q"].bytes == 12 * pixels + scalars


def test_what_two_readers_need_is_stored(pairs: Graph) -> None:
    pairs.add("Sigmoid", "r", "gate")
    pairs.add("Mul", "r_dq gate", "y")
    work = typed_work(pairs.model("y", TensorProto.FLOAT16), (1, 4, 8, 8))
    pixels = 64
    assert work["main"].written == 2 * 8 * pixels
    assert work["r_q"].read == 2 * 8 * pixels
    assert work["gate"].read == 2 * 8 * pixels + 8 * pixels
    assert work["gate"].written == 2 * 8 * pixels  # the product is computed where its factor is
    assert "y" not in work


def test_one_quantised_operand_is_not_enough() -> None:
    graph = Graph(TensorProto.FLOAT, (1, 4, 8, 8))
    graph.constant("scale", np.float32(0.1))
    graph.constant("zero", np.int8(0))
    graph.constant("w", np.ones((8, 4, 1, 1), np.float32))
    graph.add("QuantizeLinear", "x scale zero", "q")
    graph.add("DequantizeLinear", "q scale zero", "dq")
    graph.add("Conv", "dq w", "y")
    work = typed_work(graph.model("y", TensorProto.FLOAT), (1, 4, 8, 8))
    assert work["y"] == TypedWork("fp32", 8 * 4 * 64, 4 * 64, 4 * 8 * 4, 4 * 8 * 64)


# --- attention in its forms


@pytest.mark.parametrize("quantise", [False, True])
def test_forms_of_attention_do_the_same_work(shipped: Any, quantised: Any, quantise: bool) -> None:
    graph = to_half(quantised) if quantise else shipped
    side = 1024  # 64 x 64 and 32 x 32 tokens: whole blocks
    assert (side // 32) ** 2 % BLOCK_ROWS == 0
    plain = typed_work(graph, (1, 1, side, side))
    blocks = typed_work(in_blocks(graph), (1, 1, side, side))
    function = typed_work(as_function(graph), (1, 1, side, side))
    assert by_precision(plain) == by_precision(blocks) == by_precision(function)
    assert moved(function) == moved(plain)
    # Each block reads keys and values anew; nobody stores the scores, 64 MiB of them in FP32.
    inside = [work for name, work in blocks.items() if name.startswith("backbone.sps.0/Scan")]
    again = 4096 // BLOCK_ROWS * 2 * 4096 * 128 * 4
    assert again / 2 < sum(work.read for work in inside) <= again + 4096 * 128 * 4
    assert sum(work.written for work in inside) <= 4096 * 128 * 4
    assert total(macs_and_bytes(in_blocks(graph), (1, 1, side, side))) == total(plain)


def test_filled_up_blocks_are_counted(shipped: Any) -> None:
    """3 x 5 tokens fill one block of 8 of the second attention: its products are done for all 8 rows twice."""
    shape = (1, 1, 96, 160)
    tokens, rows = (6 * 10, 3 * 5), 8
    missing = sum(2 * width * count * (-count % rows) for width, count in zip((128, 256), tokens, strict=True))
    assert total(typed_work(in_blocks(shipped, rows), shape)) - total(typed_work(shipped, shape)) == missing > 0


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
        work = typed_work(graph.model("y", TensorProto.FLOAT, opset=23), shape)["y"]
        assert work.macs == 2 * 2 * heads * tokens * keys * width
        assert work.precision == "fp32"
        assert (work.read, work.weights, work.written) == tuple(
            4 * 2 * heads * width * count for count in (tokens, keys, tokens)
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
    model = turning(7)
    work = typed_work(model, (5, 16))
    assert work["rows/product"] == TypedWork("fp32", 7 * 256, 7 * 64, 7 * 1024, 7 * 64)
    assert macs_and_bytes(model, (5, 16))["rows/product"].macs == 7 * 256


@pytest.mark.parametrize(
    ("model", "message"),
    [(turning(None), "how often the loop 'rows' turns"), (turning(7, "If"), "what is chosen as it runs")],
)
def test_what_the_input_size_does_not_fix(model: onnx.ModelProto, message: str) -> None:
    with pytest.raises(UserError, match=message):
        typed_work(model, (5, 16))


def test_the_model_is_left_as_it_is(shipped: Any) -> None:
    before = shipped.SerializeToString(deterministic=True)
    typed_work(as_function(shipped), (1, 1, 128, 128))
    typed_work(shipped, (1, 1, 128, 128))
    assert shipped.SerializeToString(deterministic=True) == before
