"""A small network with every construct that quantisation treats specially, as an FP32 ONNX file.

Stem, residual block with a projected shortcut, channel gate, position attention, classifier, upsampling.
Labels follow the grey level, so a sound quantisation hardly changes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hpddrnet_trt.core.manifest import (
    METADATA_KEY,
    AxisRange,
    ClassInfo,
    InputContract,
    Manifest,
    NetworkConfig,
    OutputContract,
)
from hpddrnet_trt.graph import qdq

QUANTIZABLE = ("stem", "first", "second", "shortcut", "classifier")  # convolutions of feature maps
GATE = "gate"
STAGE = "stage"  # the residual block of :func:`fusion_model`


def residual_model(path: Path, *, batch: int | None = None, size: int | None = None) -> Path:
    """Write the model; ``batch`` and ``size`` (height and width) make it static."""
    rng = np.random.default_rng(11)
    constants: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, value: Any, dtype: type = np.float32) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def conv(source: str, name: str, inputs: int, outputs: int, kernel: int, stride: int = 1) -> str:
        # A positive mean carries the grey level through; the noise makes channels differ.
        weights = rng.normal(1.0, 0.5, (outputs, inputs, kernel, kernel)) / (inputs * kernel * kernel)
        parts = [source, constant(f"{name}.weight", weights), constant(f"{name}.bias", rng.normal(0, 0.05, outputs))]
        return node("Conv", parts, name, strides=[stride] * 2, pads=[kernel // 2] * 4)

    grey = node("Mul", [node("Cast", ["image"], "float", to=TensorProto.FLOAT), constant("unit", 1 / 128)], "grey")
    stem = node("Relu", [conv(grey, "stem", 1, 8, 3, 2)], "stem_out")
    main = conv(node("Relu", [conv(stem, "first", 8, 16, 3, 2)], "first_out"), "second", 16, 16, 3)
    block = node("Relu", [node("Add", [main, conv(stem, "shortcut", 8, 16, 1, 2)], "sum")], "block")

    means = node("ReduceMean", [block, constant("space", [2, 3], np.int64)], "means", keepdims=1)
    gated = node("Mul", [block, node("Sigmoid", [conv(means, GATE, 16, 16, 1)], "weights")], "gated")

    flat = node("Reshape", [gated, constant("flat_shape", [0, 16, -1], np.int64)], "flat")
    tokens = node("Transpose", [flat], "tokens", perm=[0, 2, 1])
    query = node("Add", [tokens, constant("query_bias", rng.normal(0, 0.1, 16))], "query")
    attention = node("Softmax", [node("MatMul", [query, flat], "scores")], "attention", axis=-1)
    mixed = node("Transpose", [node("MatMul", [attention, tokens], "mixed")], "mixed_back", perm=[0, 2, 1])
    shape = node("Shape", [gated], "shape")
    fused = node("Add", [gated, node("Reshape", [mixed, shape], "unflat")], "fused")

    # Three classes at rising grey levels: scores a_k g - a_k^2 / 2 are largest for the nearest a_k.
    levels = np.array([3.2, 3.9, 4.6])
    weights = np.repeat(levels[:, None], 16, axis=1)[:, :, None, None] / 16
    parts = [fused, constant("classifier.weight", weights), constant("classifier.bias", -(levels**2) / 2)]
    low = node("Conv", parts, "classifier")
    scales = constant("scales", [1, 1, 4, 4])
    full = node("Resize", [low, "", scales], "full", mode="linear", coordinate_transformation_mode="half_pixel")
    node("Cast", [node("ArgMax", [full], "index", axis=1, keepdims=0)], "labels", to=TensorProto.UINT8)

    sizes: list[int | str] = [batch or "batch", size or "height", size or "width"]
    graph = helper.make_graph(
        nodes,
        "residual",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [sizes[0], 1, *sizes[1:]])],
        [helper.make_tensor_value_info("labels", TensorProto.UINT8, sizes)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    helper.set_model_props(model, {METADATA_KEY: _description(batch, size).to_json()})
    onnx.save(model, str(path))
    return path


def _description(batch: int | None, size: int | None) -> Manifest:
    side = AxisRange(minimum=size or 8, maximum=size)
    return Manifest(
        network=NetworkConfig(num_classes=3),
        classes=[ClassInfo(name=name, color=(0, 0, 0)) for name in ("dark", "middle", "bright")],
        input=InputContract(batch=AxisRange(minimum=batch or 1, maximum=batch), height=side, width=side),
        output=OutputContract(),
        precision="fp32",
        attention="matmul",
    )


def fusion_model() -> onnx.ModelProto:
    """Two branches that meet: sums, upsampling, pooling and concatenation around residual blocks.

    The block ``stage`` has an identity shortcut and no final ReLU. A ReLU reads it, which feeds the
    smaller branch (a second block, ``deeper``), and so does the sum with that branch upsampled, which is
    made of the second block pooled and unpooled, concatenated and gated. FP32, ``[1, 4, 16, 16]`` in,
    ``[1, 3, 16, 16]`` out.
    """
    rng = np.random.default_rng(5)
    constants: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        name = f"{STAGE}/{output}" if output == STAGE else output
        nodes.append(helper.make_node(kind, inputs, [output], name=name, **attributes))
        return output

    def conv(source: str, name: str, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> str:
        weights = rng.normal(0, 1, (outputs, inputs, kernel, kernel)).astype(np.float32)
        bias = rng.normal(0, 0.1, outputs).astype(np.float32)
        constants.extend(
            [numpy_helper.from_array(weights, f"{name}.weight"), numpy_helper.from_array(bias, f"{name}.bias")]
        )
        parts = [source, f"{name}.weight", f"{name}.bias"]
        return node("Conv", parts, name, strides=[stride] * 2, pads=[kernel // 2] * 4)

    x = node("Relu", [conv("image", "entry", 4, 8)], "x")
    inner = node("Relu", [conv(x, "one", 8, 8)], "inner")
    stage = node("Add", [conv(inner, "two", 8, 8), x], STAGE)
    small = node("Relu", [conv(node("Relu", [stage], "stage_relu"), "down", 8, 8, stride=2)], "small")
    deep = conv(small, "three", 8, 8)
    deeper = node("Add", [conv(node("Relu", [deep], "deep_relu"), "four", 8, 8), small], "deeper")
    pool = node("AveragePool", [node("Relu", [deeper], "deeper_relu")], "pooled", kernel_shape=[3, 3], pads=[1] * 4)
    both = node("Concat", [conv(pool, "pool_conv", 8, 8, 1), conv("deeper_relu", "side", 8, 8, 1)], "both", axis=1)
    back = conv(node("Sigmoid", [both], "gate"), "back", 16, 8, 1)
    constants.append(numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"))
    up = node("Resize", [back, "", "scales"], "upsampled", mode="linear")
    fused = node("Relu", [node("Add", [stage, up], "fused")], "fused_relu")
    conv(fused, "head", 8, 3, 1)

    graph = helper.make_graph(
        nodes,
        "fusion",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 4, 16, 16])],
        [helper.make_tensor_value_info("head", TensorProto.FLOAT, [1, 3, 16, 16])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def quantized(model: onnx.ModelProto, plan: qdq.Plan | None = None) -> onnx.ModelProto:
    """``model`` with INT8 pairs for TensorRT (where ``plan`` says, else everywhere) and invented ranges."""
    plan = plan or qdq.plan(model, "tensorrt")
    ranges = {name: (-1.0, 2.0 + index / 10) for index, name in enumerate(plan.tensors)}
    return qdq.quantize(model, "tensorrt", plan, ranges)
