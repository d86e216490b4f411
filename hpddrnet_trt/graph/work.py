"""What each operator of a graph computes and moves, counted on the ONNX file itself.

:func:`macs_and_bytes` counts multiply-accumulates and elements; a cost model multiplies the latter with the
precisions it considers. Counted are convolutions and matrix products, those inside Attention operators and local
functions included; not bias and normalisation, residual sums, softmax, pooling, resizing. Counts agree with
:func:`hpddrnet_trt.export.layer_precision.report_from_network`, which needs TensorRT's parser and does not look
into Attention operators.

At 1024x1024 the authors' network (three channels, unfolded, no detail step, evaluation mode, 2 to 4
classes) has 24.70 GMAC as HPDDRNet-23-slim and 18.12 GMAC as DDRNet-23-slim. Of the 24.70, position
attention is 6.58: both products of the scores 4.83, all four projections 0.54, its two 3x3 convolutions
1.21; the main head and its classifier are in, the auxiliary head is not, channel attention is 1e-6. With
19 classes they are 24.72 and 18.14.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import UsageError, UserError, require
from hpddrnet_trt.graph.nodes import copied, int_attribute, stored_constants

if TYPE_CHECKING:
    import onnx

Shape = tuple[int, ...]
Values = npt.NDArray[Any]

_SMALL = 64  # elements: what may be a size; the values of larger constants are never looked at


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

    Operators that only compute shapes are left out. Raises :class:`UsageError` for a shape that the graph does
    not take and :class:`UserError` when a size cannot be inferred, or for an operator that runs another graph.
    """
    graph = at_size(model, shape).graph
    sizes, data, found = Sizes(graph), {graph.input[0].name}, {}
    for node in graph.node:
        if any(entry.HasField("g") for entry in node.attribute):
            raise UserError(f"the work of {node.name!r} depends on what is chosen as it runs, no count fits")
        if node.op_type != "Shape" and data.intersection(node.input):
            data.update(name for name in node.output if name)
            found[node.name or node.output[0]] = _work(node, sizes, data)
    return found


def _work(node: Any, sizes: Sizes, data: Collection[str]) -> Work:
    constants = [name for name in node.input if name in sizes.shapes and name not in data]
    return Work(
        macs=_macs(node, sizes),
        inputs=sum(sizes.elements(name) for name in node.input if name in data),
        weights=sum(map(sizes.elements, constants)),
        outputs=sum(sizes.elements(name) for name in node.output if name),
    )


def _macs(node: Any, sizes: Sizes) -> int:
    if node.op_type == "Conv":  # each output value sums over the kernel's window and its group's channels
        return sizes.elements(node.output[0]) * math.prod(sizes.shape(node.input[1])[1:])
    if node.op_type == "ConvTranspose":
        return sizes.elements(node.input[0]) * math.prod(sizes.shape(node.input[1])[1:])
    if node.op_type == "MatMul":
        return sizes.elements(node.output[0]) * sizes.shape(node.input[0])[-1]
    if node.op_type == "Gemm":
        inner = 0 if int_attribute(node, "transA", 0) else -1
        return sizes.elements(node.output[0]) * sizes.shape(node.input[0])[inner]
    if node.op_type == "Attention":  # scores and mixing: every query meets every key, in each head
        return (sizes.elements(node.input[0]) + sizes.elements(node.output[0])) * sizes.shape(node.input[1])[-2]
    return 0


# ------------------------------------------------------------------------ sizes of tensors


class Sizes:
    """Shapes of a graph's tensors by name, and the values of small constants, after :func:`at_size`."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        from onnx import numpy_helper

        self.shapes: dict[str, Shape] = {}
        self.values: dict[str, Values] = {}
        for name, entry in stored_constants(graph).items():
            self.shapes[name] = tuple(entry.dims)
            if math.prod(entry.dims) <= _SMALL:
                self.values[name] = numpy_helper.to_array(entry)
        for entry in [*graph.input, *graph.value_info, *graph.output]:
            shape = entry.type.tensor_type.shape
            known = all(axis.HasField("dim_value") for axis in shape.dim)
            if entry.type.tensor_type.HasField("shape") and known:
                self.shapes[entry.name] = tuple(axis.dim_value for axis in shape.dim)

    def shape(self, name: str) -> Shape:
        """Raises :class:`UserError` for a size that could not be inferred."""
        if name not in self.shapes:
            raise UserError(f"the size of {name!r} cannot be inferred from the graph; export the model again")
        return self.shapes[name]

    def elements(self, name: str) -> int:
        """Number of a tensor's elements; raises as :meth:`shape`."""
        return math.prod(self.shape(name))


def at_size(model: onnx.ModelProto, shape: Sequence[int]) -> onnx.ModelProto:
    """A copy of ``model`` for looking at, its one input at ``shape``, with every size written into it.

    Local functions are inlined, arithmetic on sizes is computed (ONNX's own inference knows only some of
    its operators) and becomes initialisers; weights lose their values. Raises :class:`UsageError` for a
    shape that the graph does not take.
    """
    onnx = require("onnx", "export", "count a network's operations")
    fixed = copied(model)
    axes = fixed.graph.input[0].type.tensor_type.shape.dim
    if len(axes) != len(shape) or any(axis.dim_value not in (0, size) for axis, size in zip(axes, shape, strict=True)):
        wanted = "x".join(axis.dim_param or str(axis.dim_value) for axis in axes)
        raise UsageError(f"the graph takes {wanted}, not {'x'.join(map(str, shape))}")
    for axis, size in zip(axes, shape, strict=True):
        axis.dim_value = size
    for entry in fixed.graph.initializer:  # inference serialises the model anew each time
        if len(entry.raw_data) > 8 * _SMALL:
            entry.ClearField("raw_data")
    if fixed.functions:
        fixed = require("onnx.inliner", "export", "count a network's operations").inline_local_functions(fixed)
    # Declared sizes of the dynamic graph are symbols, which would stand against the inferred ones.
    del fixed.graph.value_info[:]
    for entry in fixed.graph.output:
        entry.type.tensor_type.ClearField("shape")
    while True:
        fixed = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
        if not _compute_sizes(fixed.graph):
            return fixed


def _compute_sizes(graph: onnx.GraphProto) -> bool:
    """Replace nodes whose result is a known size by initialisers; whether there were any."""
    from onnx import numpy_helper

    sizes = Sizes(graph)
    kept: list[Any] = []
    computed: dict[str, Values] = {}
    for node in graph.node:
        values = _size_values(node, sizes)
        if values is None:
            kept.append(node)
        else:
            sizes.values.update(values)
            computed.update(values)
    if not computed:
        return False
    del graph.node[:]
    graph.node.extend(kept)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in computed.items())
    others = [entry for entry in graph.value_info if entry.name not in computed]
    del graph.value_info[:]
    graph.value_info.extend(others)
    return True


def _size_values(node: Any, sizes: Sizes) -> Mapping[str, Values] | None:
    """Outputs of a node that reads sizes of known tensors, or computes with known sizes; None for any other."""
    from onnx.reference import ReferenceEvaluator

    names = [name for name in node.input if name]
    if node.op_type == "Shape" and node.input[0] in sizes.shapes:
        bounds = {entry.name: entry.i for entry in node.attribute}
        shape = sizes.shapes[node.input[0]][slice(bounds.get("start"), bounds.get("end"))]
        return {node.output[0]: np.asarray(shape, np.int64)}
    if not names or any(
        name not in sizes.values or not np.issubdtype(sizes.values[name].dtype, np.integer) for name in names
    ):
        return None
    outputs = ReferenceEvaluator(node).run(None, {name: sizes.values[name] for name in names})
    return {name: np.asarray(value) for name, value in zip(node.output, outputs, strict=True) if name}
