"""Counting work: the published totals, graphs as they are deployed, attention in its forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.export.layer_precision import report_from_network
from hpddrnet_trt.export.onnx import name_after_modules, quiet
from hpddrnet_trt.graph.attention import as_function
from hpddrnet_trt.graph.fp8 import to_fp8
from hpddrnet_trt.graph.precision import to_half
from hpddrnet_trt.graph.work import macs_and_bytes
from hpddrnet_trt.models.network import HPDDRNet, network_config
from tests.graph.parsed_rtx import Parsed
from tests.graph.residual_onnx import fusion_model

pytestmark = pytest.mark.usefixtures("one_thread")
FP32 = TensorProto.FLOAT


def total(work: dict[str, Any]) -> int:
    return sum(entry.macs for entry in work.values())


def test_the_published_totals() -> None:
    """24.70 and 18.12 GMAC at 1024x1024: the authors' network, unfolded, three channels, three classes."""
    plain = HPDDRNet(network_config("hpddrnet-23-slim", 3)).eval()
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
    assert total(work) == 24_700_585_088
    rest = {name: entry for name, entry in work.items() if ".sps." not in name and ".ecas." not in name}
    assert total(rest) == 18_123_915_264


def test_every_form_of_the_trained_network_does_the_same_work(shipped: Any, quantized: Any) -> None:
    shape = (1, 1, 512, 512)
    exact = total(macs_and_bytes(shipped, shape))
    before = shipped.SerializeToString(deterministic=True)
    eight = [quantized, to_fp8(quantized, shipped)]
    forms = [to_half(shipped), to_half(shipped, kind="bf16"), *eight, *map(to_half, eight)]
    for graph in (*forms, as_function(shipped), as_function(to_half(quantized))):
        assert total(macs_and_bytes(graph, shape)) == exact
    assert shipped.SerializeToString(deterministic=True) == before


@given(batch=st.integers(1, 3), height=st.integers(2, 20), width=st.integers(2, 20))
@settings(max_examples=10, deadline=None)
def test_work_grows_with_the_batch_and_weights_do_not(shipped: Any, batch: int, height: int, width: int) -> None:
    size = (1, 64 * height, 64 * width)
    one, many = (macs_and_bytes(shipped, (count, *size)) for count in (1, batch))
    assert total(many) == batch * total(one)
    for name, work in many.items():
        assert work.weights == one[name].weights
        assert (work.inputs, work.outputs) == (batch * one[name].inputs, batch * one[name].outputs)


def model_of(shape: tuple[int, ...], constants: dict[str, Any], operator: str, inputs: str, **options: Any) -> Any:
    """One operator that makes ``y`` of ``x`` and constants."""
    node = helper.make_node(operator, inputs.split(), ["y"], name="y", **options)
    graph = helper.make_graph(
        [node], "small", [helper.make_tensor_value_info("x", FP32, shape)],
        [helper.make_tensor_value_info("y", FP32, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


@pytest.mark.parametrize("heads", [1, 4])
def test_the_attention_operator(heads: int) -> None:
    tokens, keys, width = 24, 40, 16
    flat, split = (2, tokens, heads * width), (2, heads, tokens, width)
    options = {"q_num_heads": heads, "kv_num_heads": heads}
    for shape, key_shape, given_ in ((flat, (2, keys, heads * width), options), (split, (2, heads, keys, width), {})):
        model = model_of(shape, {"k": np.ones(key_shape, np.float32)}, "Attention", "x k k", **given_)
        work = macs_and_bytes(model, shape)["y"]
        assert work.macs == 2 * 2 * heads * tokens * keys * width
        assert (work.inputs, work.weights, work.outputs) == tuple(
            2 * heads * width * count for count in (tokens, 2 * keys, tokens)
        )


@pytest.mark.parametrize(
    ("operator", "kernel", "shape", "macs", "options"),
    [
        ("ConvTranspose", (6, 5, 2, 2), (1, 6, 8, 16), 8 * 16 * 6 * 4 * 5, {"strides": [2, 2]}),
        ("Gemm", (8, 3), (5, 8), 5 * 8 * 3, {}),
        ("Gemm", (8, 3), (8, 5), 5 * 8 * 3, {"transA": 1}),
    ],
)
def test_other_products(
    operator: str, kernel: tuple[int, ...], shape: tuple[int, ...], macs: int, options: dict[str, Any]
) -> None:
    model = model_of(shape, {"w": np.ones(kernel, np.float32)}, operator, "x w", **options)
    assert macs_and_bytes(model, shape)["y"].macs == macs


def test_what_the_input_size_does_not_fix() -> None:
    branch = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["same"])], "branch", [], [helper.make_tensor_value_info("same", FP32, None)]
    )
    model = model_of((5, 16), {"go": True}, "If", "go", then_branch=branch, else_branch=branch)
    with pytest.raises(UserError, match="the work of 'y' depends on what is chosen as it runs"):
        macs_and_bytes(model, (5, 16))


@pytest.mark.parametrize("shape", [(1, 1, 1024, 1024), (2, 1, 256, 384)])
def test_multiply_accumulates_are_those_of_the_parsed_network(shipped: Any, shape: tuple[int, ...]) -> None:
    parsed = Parsed(shipped)
    proof = report_from_network(parsed.trt, parsed.network, shape)
    work = macs_and_bytes(shipped, shape)
    counted = {layer["name"]: layer["macs"] for layer in proof["layers"]}
    assert {name: entry.macs for name, entry in work.items() if entry.macs} == counted
    assert total(work) == proof["macs"]


def test_elements_of_one_convolution() -> None:
    work = macs_and_bytes(fusion_model(), (1, 4, 16, 16))
    assert work["down"] == (8 * 8 * 8 * 8 * 9, 8 * 16 * 16, 8 * 8 * 9 + 8, 8 * 8 * 8)
    assert work["down"].bytes(1, 1, 2) == 8 * 16 * 16 + 8 * 8 * 9 + 8 + 2 * 8 * 8 * 8
    assert (work["upsampled"].macs, work["upsampled"].outputs) == (0, 8 * 16 * 16)
    assert work["fused"].inputs == 2 * 8 * 16 * 16


@pytest.mark.parametrize("shape", [(1, 4, 16), (1, 4, 16, 24)])
def test_shapes_that_the_graph_does_not_take(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="the graph takes 1x4x16x16, not 1x4x16"):
        macs_and_bytes(fusion_model(), shape)
