"""Sizes and types of all tensors of a graph at one input size, inside functions and loops as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import UsageError, UserError, require
from hpddrnet_trt.core.precisions import BY_ONNX_TYPE

if TYPE_CHECKING:
    import onnx

Shape = tuple[int, ...]
Values = npt.NDArray[Any]

_SMALL = 64  # elements: what may be a size; the values of larger constants are never looked at


@dataclass(frozen=True)
class Tensors:
    """What a graph sees: ``shapes`` and element types (``onnx.TensorProto.DataType``) by tensor name,
    and the ``values`` of small constants. A body sees its surrounding graph's tensors, too."""

    shapes: dict[str, Shape] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    values: dict[str, Values] = field(default_factory=dict)

    def shape(self, name: str) -> Shape:
        """Raises :class:`UserError` for a size that could not be inferred."""
        if name not in self.shapes:
            raise UserError(f"the size of {name!r} cannot be inferred from the graph; export the model again")
        return self.shapes[name]

    def item_size(self, name: str) -> int:
        """Bytes of one element; raises :class:`UserError` for a type that could not be inferred."""
        from onnx import helper

        if not self.kinds.get(name):
            raise UserError(f"the type of {name!r} cannot be inferred from the graph; export the model again")
        return int(helper.tensor_dtype_to_np_dtype(self.kinds[name]).itemsize)

    def precision(self, name: str) -> str:
        """One of :data:`PRECISIONS`: what a product of such tensors computes in."""
        from onnx import TensorProto

        kind = self.kinds.get(name, TensorProto.FLOAT)
        return BY_ONNX_TYPE.get(TensorProto.DataType.Name(kind), "fp32")

    def inside(self, body: onnx.GraphProto) -> Tensors:
        """These tensors and those of a body."""
        own = tensors_of(body)
        return Tensors(self.shapes | own.shapes, self.kinds | own.kinds, self.values | own.values)


def at_size(model: onnx.ModelProto, shape: Sequence[int]) -> onnx.ModelProto:
    """A copy of ``model`` for looking at, its one input at ``shape``, with every size written into it.

    Local functions are inlined, arithmetic on sizes is computed (ONNX's own inference knows only some of
    its operators) and becomes initialisers; weights lose their values. Raises :class:`UsageError` for a
    shape that the graph does not take.
    """
    onnx = require("onnx", "export", "count a network's operations")
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    _set_input(fixed.graph.input[0], shape)
    for entry in fixed.graph.initializer:  # inference serialises the model anew each time
        if len(entry.raw_data) > 8 * _SMALL:
            entry.ClearField("raw_data")
    if fixed.functions:
        inliner = require("onnx.inliner", "export", "count a network's operations")
        fixed = inliner.inline_local_functions(fixed)
    # Declared sizes of the dynamic graph are symbols, which would stand against the inferred ones.
    del fixed.graph.value_info[:]
    for entry in fixed.graph.output:
        entry.type.tensor_type.ClearField("shape")
    while True:
        fixed = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
        if not _compute_sizes(fixed.graph):
            return fixed


def tensors_of(graph: onnx.GraphProto) -> Tensors:
    """The tensors of one graph after :func:`at_size`, without those of its surroundings and bodies."""
    from onnx import numpy_helper

    found = Tensors()
    for entry in graph.initializer:
        found.shapes[entry.name], found.kinds[entry.name] = tuple(entry.dims), entry.data_type
        if np.prod(entry.dims) <= _SMALL:
            found.values[entry.name] = numpy_helper.to_array(entry)
    for node in graph.node:
        value = next((entry.t for entry in node.attribute if entry.name == "value"), None)
        if node.op_type == "Constant" and value is not None and np.prod(value.dims) <= _SMALL:
            found.values[node.output[0]] = numpy_helper.to_array(value)
    for entry in [*graph.input, *graph.value_info, *graph.output]:
        kind = entry.type.tensor_type
        found.kinds.setdefault(entry.name, kind.elem_type)
        sizes = tuple(axis.dim_value if axis.HasField("dim_value") else -1 for axis in kind.shape.dim)
        if kind.HasField("shape") and -1 not in sizes:
            found.shapes[entry.name] = sizes
    return found


def _set_input(entry: onnx.ValueInfoProto, shape: Sequence[int]) -> None:
    axes = entry.type.tensor_type.shape.dim
    if len(axes) != len(shape) or any(axis.dim_value not in (0, size) for axis, size in zip(axes, shape, strict=True)):
        wanted = "x".join(axis.dim_param or str(axis.dim_value) for axis in axes)
        raise UsageError(f"the graph takes {wanted}, not {'x'.join(map(str, shape))}")
    for axis, size in zip(axes, shape, strict=True):
        axis.dim_value = size


def _compute_sizes(graph: onnx.GraphProto) -> bool:
    """Replace nodes whose result is a known size by initialisers; whether there were any."""
    from onnx import numpy_helper

    tensors = tensors_of(graph)
    kept: list[Any] = []
    found: dict[str, Values] = {}
    for node in graph.node:
        values = _size_values(node, tensors)
        if values is None:
            kept.append(node)
        else:
            tensors.values.update(values)
            found.update(values)
    if not found:
        return False
    del graph.node[:]
    graph.node.extend(kept)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in found.items())
    stale = [entry for entry in graph.value_info if entry.name not in found]
    del graph.value_info[:]
    graph.value_info.extend(stale)
    return True


def _size_values(node: Any, tensors: Tensors) -> Mapping[str, Values] | None:
    """Outputs of a node that reads sizes of known tensors, or computes with known sizes; None for any other."""
    from onnx.reference import ReferenceEvaluator

    names = [name for name in node.input if name]
    if node.op_type == "Shape" and node.input[0] in tensors.shapes:
        bounds = {entry.name: entry.i for entry in node.attribute}
        sizes = tensors.shapes[node.input[0]][slice(bounds.get("start"), bounds.get("end"))]
        return {node.output[0]: np.asarray(sizes, np.int64)}
    if not names or any(name not in tensors.values for name in names) or not _only_integers(names, tensors):
        return None
    inputs = {name: tensors.values[name] for name in names}
    outputs = ReferenceEvaluator(node).run(None, inputs)
    return {name: np.asarray(value) for name, value in zip(node.output, outputs, strict=True) if name}


def _only_integers(names: Sequence[str], tensors: Tensors) -> bool:
    return all(np.issubdtype(tensors.values[name].dtype, np.integer) for name in names)
