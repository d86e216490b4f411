"""Layers by part of the network: names as each runtime writes them, real ones where it can run here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpddrnet_trt.engines.onnxruntime import OnnxRuntimeEngine
from hpddrnet_trt.graph.attention import as_function, in_blocks
from hpddrnet_trt.graph.layers import GROUPS, block_of, group_of, group_times, short, tensor_owners
from hpddrnet_trt.models.network import HPDDRNet, network_config

PARTS = GROUPS[:-2]


OWNERS = {
    "relu_13": "backbone.spatial_branch_layers.0.0.conv1/Relu",
    "getitem_30": "backbone.spp.shortcut.bn/BatchNormalization",
    "sigmoid": "backbone.ecas.0/Sigmoid",
}


@pytest.mark.parametrize(
    ("name", "group"),
    [
        # nodes of an exported file
        ("backbone.stem.0.conv.conv/Conv", "stem"),
        ("backbone.spatial_branch_layers.1.0/Add", "spatial branch"),
        ("backbone.context_branch_layers.2.0.conv3.conv/Conv", "context branch"),
        ("backbone.compression_2.conv/Conv", "bilateral fusion"),
        ("backbone.down_2.1.conv/Conv", "bilateral fusion"),
        ("backbone/Resize_2", "bilateral fusion"),
        ("backbone.ecas.1.mix/Conv", "channel attention"),
        ("backbone.sps.0/MatMul_2", "position attention"),
        ("backbone.sps.0/Scan_mixed", "position attention"),
        ("backbone.sps.1/PositionAttention", "position attention"),
        ("backbone.spp.scales.4.0/ReduceMean", "pyramid"),
        ("detail.mix.conv/Conv", "detail"),
        ("head.0.conv/Conv", "head"),
        ("conv_seg/Conv", "head"),
        ("output.full_size/Resize", "output"),
        ("output/ArgMax", "output"),
        ("output/Cast", "conversions"),
        ("relu_18_QuantizeLinear", "conversions"),
        ("head.0.conv.weight_DequantizeLinear", "conversions"),
        ("something else", "other"),
        ("", "other"),
        ("heading/Conv", "other"),
        ("outputs", "other"),
        # TensorRT, as NVIDIA's documentation and tools print them; no GPU was there to profile on
        ("backbone.stem.0.conv.conv/Conv + backbone.stem.0/Relu", "stem"),
        # The sum that a branch's convolution takes in joins the branches: the time is the convolution's.
        ("backbone/Add_10 + backbone.compression_1.conv/Conv + backbone/Relu_4", "bilateral fusion"),
        ("backbone.spatial_branch_layers.1.1.conv2.conv/Conv + backbone/Add_12 + backbone/Relu_7", "spatial branch"),
        (
            "backbone.spp.shortcut.conv.weight + backbone.spp.shortcut.conv.weight_DequantizeLinear + "
            "backbone.spp.shortcut.conv/Conv",
            "pyramid",
        ),
        ("add_20_QuantizeLinear + add_20_DequantizeLinear", "conversions"),
        ("PWN(PWN(backbone.ecas.0/Sigmoid), backbone.ecas.0/Mul)", "channel attention"),
        ("PWN(backbone/Relu_8)", "bilateral fusion"),
        ("Reformatting CopyNode for Input Tensor 0 to backbone.stem.0.conv.conv/Conv + backbone.stem.0/Relu",
         "conversions"),
        ("Reformatting CopyNode for Output Tensor 0 to conv_seg/Conv", "conversions"),
        ("{ForeignNode[backbone.sps.0/Reshape_2...backbone.sps.0/Transpose_2]}", "position attention"),
        ("{ForeignNode[backbone.sps.0.query.weight + ONNXTRT_Broadcast...backbone/Relu_3]}", "position attention"),
        ("{ForeignNode[backbone/Relu_6...backbone.sps.1/Softmax]}", "position attention"),
        ("__myl_MulMaxSubExpSumDiv_myl0_3", "position attention"),
        ("__mye1234-__myl_CastSoftCast_myl0_7", "position attention"),
        ("_gemm_mha_v2_myl0_5", "position attention"),
        ("__myl_Fc_myl0_1 [ONNX Layer: backbone.sps.0.query/MatMul]", "position attention"),
        ("__myl_TranReshMove_myl0_1", "other"),
        ("labels", "output"),
        # OpenVINO
        ("backbone.stem.1.conv/Conv/WithoutBiases", "stem"),
        ("output.full_size/Resize_bf16_acdb_f32_abcd_TopK_1077", "conversions"),
        ("backbone.sps.0.cnn/Conv/WithoutBiases_acdb_abcd_backbone.sps.0/Reshape_2", "conversions"),
        ("backbone.spp.shortcut.conv/Conv_i8_f32_backbone.spp.compression.conv/Conv", "conversions"),
        ("Constant_22104_abcd_aBcd16b_relu_35_QuantizeLinear", "conversions"),
        ("backbone.sps.0.out/Add_abc_acdb_fake", "conversions"),
        ("backbone/Add_9,backbone/Relu_3,relu_18_QuantizeLinear", "bilateral fusion"),
        ("backbone.ecas.0/Mul,backbone/Relu_2", "channel attention"),
        ("backbone/Add_13,head.0.bn/BatchNormalization,Multiply_20039,head.0/Relu,relu_46_QuantizeLinear", "head"),
        ("TopK_1077", "output"),
        ("Multiply_47884", "other"),
        # ONNX Runtime
        ("relu_13_nchwc_kernel_time", "spatial branch"),
        ("getitem_30_bn_nchwc", "pyramid"),
        ("InsertedPrecisionFreeCast_sigmoid_nchwc", "channel attention"),
        ("InsertedPrecisionFreeCast_relu_13", "conversions"),
        ("ReorderOutput_token_209_kernel_time", "conversions"),
        ("Reshape_token_80", "conversions"),
        ("relu_9_DequantizeLinear/duplicated_token_5_kernel_time", "conversions"),
        ("backbone.sps.0.query/MatMul/MatmulTransposeFusion/", "position attention"),
        ("Softmax_215", "position attention"),
        ("/MatmulTransposeFusion/_token_1", "position attention"),
        ("unknown_nchwc", "other"),
    ],
)  # fmt: skip
def test_names(name: str, group: str) -> None:
    assert group_of(name, OWNERS) == group


def test_modules_of_pytorch() -> None:
    """Every module of the network that has work of its own belongs to a part."""
    import torch

    with torch.device("meta"):
        network = HPDDRNet(network_config("hpddrnet-23-slim", 3).model_copy(update={"detail": True}))
    found = {name: group_of(name) for name, module in network.named_modules() if name and not list(module.children())}
    assert "other" not in found.values()
    assert set(found.values()) == set(PARTS) - {"output", "domain guard"}
    assert found["decode_head.detail.mix.conv"] == "detail"
    assert found["decode_head.conv_seg"] == "head"
    assert group_of("backbone") == "bilateral fusion"
    assert group_of("output") == "output"


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory, shipped: Any, quantized: Any) -> dict[str, Path]:
    """The trained network in FP32, as attention in blocks and as a function, and in INT8."""
    folder = tmp_path_factory.mktemp("graphs")
    forms = {"fp32": shipped, "blocks": in_blocks(shipped, 64), "function": as_function(shipped), "int8": quantized}
    for name, form in forms.items():
        onnx.save(form, str(folder / f"{name}.onnx"))
    return {name: folder / f"{name}.onnx" for name in forms}


@pytest.mark.parametrize("form", ["fp32", "blocks", "function", "int8"])
def test_real_profile_of_onnxruntime(graphs: dict[str, Path], form: str) -> None:
    with OnnxRuntimeEngine(graphs[form], threads=1) as engine:
        times = engine.layer_times(np.zeros((1, 1, 64, 64), np.uint8), runs=1)
    owners = tensor_owners(graphs[form])
    assert len(times) > 150
    assert [name for name in times if group_of(name, owners) == "other"] == []
    _assert_all_parts(dict.fromkeys(times, 1.0), owners)


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
@pytest.mark.parametrize("form", ["fp32", "int8"])
def test_real_profile_of_openvino(graphs: dict[str, Path], form: str) -> None:
    from hpddrnet_trt.engines.openvino import OpenVINOEngine

    with OpenVINOEngine(graphs[form], threads=1) as engine:
        times = engine.layer_times(np.zeros((1, 1, 64, 64), np.uint8), runs=1)
    assert len(times) > 80
    _assert_all_parts(dict.fromkeys(times, 1.0), {})
    rest = [name for name in times if group_of(name) == "other"]
    assert all(name.startswith(("Multiply_", "Transpose_", "Convert_")) for name in rest), rest
    assert len(rest) <= 6


def _assert_all_parts(times: dict[str, float], owners: dict[str, str]) -> None:
    sums = group_times(times, owners)
    assert set(PARTS) <= set(sums)
    assert sum(sums.values()) == len(times)
    assert list(sums) == [group for group in GROUPS if group in sums]


def test_every_node_of_the_trained_network_has_a_part(shipped: Any) -> None:
    found = {node.name: group_of(node.name) for node in shipped.graph.node}
    assert set(found.values()) >= set(PARTS)
    assert [name for name, group in found.items() if group == "other"] == []


@given(st.dictionaries(st.text(max_size=40), st.floats(0, 100), max_size=6))
def test_any_name_goes_somewhere_and_no_time_is_lost(times: dict[str, float]) -> None:
    sums = group_times(times)
    assert set(sums) <= set(GROUPS)
    assert sum(sums.values()) == pytest.approx(sum(times.values()))


def test_only_onnx_files_know_their_tensors(graphs: dict[str, Path], tmp_path: Path) -> None:
    assert tensor_owners(tmp_path / "model.engine") == {}
    assert tensor_owners(graphs["fp32"])["relu_13"] == "backbone.spatial_branch_layers.0.0.conv1/Relu"


@pytest.mark.parametrize(
    ("node", "block"),
    [
        ("backbone.stem.0.conv.conv/Conv", "backbone.stem.0"),
        ("backbone.stem.2.0.conv1.conv/Conv", "backbone.stem.2.0"),
        ("backbone.stem.2.0.conv2.conv/Conv", "backbone.stem.2.0"),
        ("backbone.context_branch_layers.0.0.downsample.0/Conv", "backbone.context_branch_layers.0.0"),
        ("backbone.spp.scales.1.1.conv/Conv", "backbone.spp"),
        ("backbone.spp.compression.conv/Conv", "backbone.spp"),
        ("backbone.down_2.1.conv/Conv", "backbone.down_2"),
        ("backbone.compression_1.conv/Conv", "backbone.compression_1"),
        ("backbone.sps.0.cnn/Conv", "backbone.sps.0"),
        ("backbone.ecas.1.mix/Conv", "backbone.ecas.1"),
        ("head.0.conv/Conv", "head"),
        ("detail.mix.conv/Conv", "detail"),
        ("conv_seg/Conv", "conv_seg"),
        ("Conv_17", "Conv_17"),
    ],
)
def test_blocks(node: str, block: str) -> None:
    assert block_of(node) == block


def test_short_names() -> None:
    assert short("backbone.stem.2.0.conv1.conv/Conv") == "stem.2.0.conv1"
