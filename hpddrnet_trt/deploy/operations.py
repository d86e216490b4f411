"""What each operator of an FP32 graph computes and moves, counted on the ONNX file itself.

Multiply-accumulates and numbers of elements at one input size; a cost model multiplies them with the
precisions it considers. Counts agree with those of :func:`hpddrnet_trt.deploy.proof.proof_from_network`,
which need TensorRT's parser.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hpddrnet_trt.deploy.onnx_graph import int_attribute
from hpddrnet_trt.errors import UsageError, UserError, require

if TYPE_CHECKING:
    import onnx

Shape = tuple[int, ...]


class Work(NamedTuple):
    """One operator: multiply-accumulates, and elements of its activations in, weights, activations out."""

    macs: int
    inputs: int
    weights: int
    outputs: int

    def bytes(self, input_size: float = 4, weight_size: float = 4, output_size: float = 4) -> float:
        """Bytes read and written at these element sizes in bytes."""
        return self.inputs * input_size + self.weights * weight_size + self.outputs * output_size


def macs_and_bytes(model: onnx.ModelProto, shape: Sequence[int]) -> dict[str, Work]:
    """Work of every operator on the image, by node name, at the input shape ``[N, C, H, W]``.

    Convolutions and matrix products have multiply-accumulates, other operators none (those inside
    Attention operators are not counted). Operators that only compute shapes are left out. Raises
    :class:`UsageError` for a shape that the graph does not take and :class:`UserError` when a size
    cannot be inferred.
    """
    shapes = static_shapes(model, shape)
    data = {entry.name for entry in model.graph.input}
    result: dict[str, Work] = {}
    for node in model.graph.node:
        if node.op_type == "Shape" or not data.intersection(node.input):
            continue
        data.update(node.output)
        result[node.name] = Work(
            macs=_macs(node, shapes),
            inputs=sum(_elements(shapes, name) for name in node.input if name in data),
            weights=sum(math.prod(shapes[name]) for name in node.input if name in shapes and name not in data),
            outputs=sum(_elements(shapes, name) for name in node.output if name),
        )
    return result


def static_shapes(model: onnx.ModelProto, shape: Sequence[int]) -> dict[str, Shape]:
    """Sizes of all tensors, initialisers included, with the graph's one input at ``shape``."""
    onnx = require("onnx", "export", "count a network's operations")
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    axes = fixed.graph.input[0].type.tensor_type.shape.dim
    if len(axes) != len(shape) or any(axis.dim_value not in (0, size) for axis, size in zip(axes, shape, strict=True)):
        wanted = "x".join(axis.dim_param or str(axis.dim_value) for axis in axes)
        raise UsageError(f"the graph takes {wanted}, not {'x'.join(map(str, shape))}")
    for axis, size in zip(axes, shape, strict=True):
        axis.dim_value = size
    # Declared sizes of the dynamic graph are symbols, which would stand against the inferred ones.
    del fixed.graph.value_info[:]
    for entry in fixed.graph.output:
        entry.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    shapes: dict[str, Shape] = {entry.name: tuple(entry.dims) for entry in graph.initializer}
    for entry in [*graph.input, *graph.value_info, *graph.output]:
        kind = entry.type.tensor_type
        sizes = tuple(axis.dim_value if axis.HasField("dim_value") else -1 for axis in kind.shape.dim)
        if kind.HasField("shape") and -1 not in sizes:
            shapes[entry.name] = sizes
    return shapes


def _size(shapes: Mapping[str, Shape], name: str) -> Shape:
    if name not in shapes:
        raise UserError(f"the size of {name!r} cannot be inferred from the graph; export the model again")
    return shapes[name]


def _elements(shapes: Mapping[str, Shape], name: str) -> int:
    return math.prod(_size(shapes, name))


def _macs(node: Any, shapes: Mapping[str, Shape]) -> int:
    if node.op_type == "Conv":  # each output value sums over the kernel's window and its group's channels
        return _elements(shapes, node.output[0]) * math.prod(_size(shapes, node.input[1])[1:])
    if node.op_type == "ConvTranspose":
        return _elements(shapes, node.input[0]) * math.prod(_size(shapes, node.input[1])[1:])
    if node.op_type == "MatMul":
        return _elements(shapes, node.output[0]) * _size(shapes, node.input[0])[-1]
    if node.op_type == "Gemm":
        inner = 0 if int_attribute(node, "transA", 0) else -1
        return _elements(shapes, node.output[0]) * _size(shapes, node.input[0])[inner]
    return 0
