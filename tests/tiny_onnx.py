"""Tiny uint8-in, uint8-out ONNX models with a description, which TensorRT builds in a second.

Two convolutions with the input and output contract of the exported network; random weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from hpddrnet_trt.core.manifest import (
    METADATA_KEY,
    AxisRange,
    ClassInfo,
    DomainRecord,
    InputContract,
    Manifest,
    NetworkConfig,
    OutputContract,
)
from hpddrnet_trt.export.build_settings import BuildSettings

QUIET = BuildSettings(progress=False)
CLASSES = [ClassInfo(name=name, color=(40 * index, 0, 0)) for index, name in enumerate(("matrix", "pore", "grain"))]
HIDDEN = 8
DOMAIN = DomainRecord(
    mean=[0.0, 0.0, 0.0], scale=[1.0, 1.0, 1.0], residual=1.0, unusual=2.0, foreign=4.0, crops=64, pictures=4
)


class _Graph:
    """Collects nodes and constants; ``typing`` is what the convolutions are typed in."""

    def __init__(self, typing: Literal["fp32", "fp16", "int8"]) -> None:
        self.typing = typing
        self.float_type = TensorProto.FLOAT if typing == "fp32" else TensorProto.FLOAT16
        self.dtype = np.float32 if typing == "fp32" else np.float16
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, value: npt.NDArray[Any]) -> str:
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def quantised(self, source: str, scale: float) -> str:
        """QuantizeLinear and DequantizeLinear, symmetric, per tensor."""
        parts = [
            self.constant(f"{source}_scale", np.array(scale, self.dtype)),
            self.constant(f"{source}_zero", np.array(0, np.int8)),
        ]
        self.node("QuantizeLinear", [source, *parts], f"{source}_q")
        return self.node("DequantizeLinear", [f"{source}_q", *parts], f"{source}_dq")

    def convolution(self, source: str, weights: npt.NDArray[np.float32], name: str, scale: float) -> str:
        bias = self.constant(f"{name}_bias", np.linspace(-1, 1, len(weights)).astype(self.dtype))
        pad = weights.shape[-1] // 2
        if self.typing == "int8":
            source = self.quantised(source, scale)
            steps = (np.abs(weights).max((1, 2, 3)) / 127).astype(self.dtype)
            whole = np.round(weights / steps.astype(np.float32)[:, None, None, None]).clip(-127, 127).astype(np.int8)
            parts = [
                self.constant(f"{name}_q", whole),
                self.constant(f"{name}_scale", steps),
                self.constant(f"{name}_zero", np.zeros(len(weights), np.int8)),
            ]
            kernel = self.node("DequantizeLinear", parts, f"{name}_weights", axis=0)
        else:
            kernel = self.constant(f"{name}_weights", weights.astype(self.dtype))
        return self.node("Conv", [source, kernel, bias], name, pads=[pad] * 4)


def tiny_model(
    path: Path,
    *,
    typing: Literal["fp32", "fp16", "int8"] = "fp32",
    shape: tuple[int, int, int] | None = None,
    output: Literal["labels", "logits"] = "labels",
    described: bool = True,
    domain: bool = False,
    **manifest: Any,
) -> Path:
    """Write a model to ``path``; ``shape`` (batch, height, width) makes it static; with ``domain`` it also gives the
    mean scores of every 8 x 8 pixels as features of its domain.

    ``manifest`` overrides fields of its description.
    """
    rng = np.random.default_rng(3)
    graph = _Graph(typing)
    graph.node("Cast", ["image"], "grey", to=graph.float_type)
    graph.node("Mul", ["grey", graph.constant("unit", np.array(1 / 64, graph.dtype))], "scaled")
    first = rng.normal(0, 0.3, (HIDDEN, 1, 3, 3)).astype(np.float32)
    last = rng.normal(0, 0.3, (len(CLASSES), HIDDEN, 1, 1)).astype(np.float32)
    graph.node("Relu", [graph.convolution("scaled", first, "first", 4 / 127)], "hidden")
    graph.convolution("hidden", last, "scores", 8 / 127)
    sizes: list[int | str] = list(shape) if shape is not None else ["batch", "height", "width"]
    if output == "labels":
        graph.node("ArgMax", ["scores"], "index", axis=1, keepdims=0)
        graph.node("Cast", ["index"], "labels", to=TensorProto.UINT8)
        result = helper.make_tensor_value_info("labels", TensorProto.UINT8, sizes)
    else:
        graph.node("Cast", ["scores"], "logits", to=TensorProto.FLOAT)
        result = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [sizes[0], len(CLASSES), *sizes[1:]])
    results = [result]
    if domain:
        graph.node("Cast", ["scores"], "float_scores", to=TensorProto.FLOAT)
        graph.node("AveragePool", ["float_scores"], "domain_features", kernel_shape=[8, 8], strides=[8, 8])
        cells = [f"{size} / 8" if isinstance(size, str) else size // 8 for size in sizes[1:]]
        results.append(
            helper.make_tensor_value_info("domain_features", TensorProto.FLOAT, [sizes[0], len(CLASSES), *cells])
        )
        manifest = {"output": OutputContract(kind=output, domain=True), "domain": DOMAIN, **manifest}
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, [sizes[0], 1, *sizes[1:]])
    model = helper.make_model(
        helper.make_graph(graph.nodes, "tiny", [image], results, graph.constants),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )
    onnx.checker.check_model(model, full_check=True)
    if described:
        helper.set_model_props(model, {METADATA_KEY: _description(typing, shape, output, manifest).to_json()})
    onnx.save(model, str(path))
    return path


def _description(
    typing: str, shape: tuple[int, int, int] | None, output: Any, overrides: dict[str, Any]
) -> Manifest:
    contract = InputContract()
    if shape is not None:
        batch, height, width = (AxisRange(minimum=size, maximum=size) for size in shape)
        contract = InputContract(batch=batch, height=height, width=width)
    fields: dict[str, Any] = {
        "name": "tiny",
        "network": NetworkConfig(num_classes=len(CLASSES)),
        "classes": CLASSES,
        "input": contract,
        "output": OutputContract(kind=output),
        "precision": typing,
        "quantized_for": "tensorrt" if typing == "int8" else None,
        "attention": "matmul",
    }
    return Manifest(**{**fields, **overrides})
