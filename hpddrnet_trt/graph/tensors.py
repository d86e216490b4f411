"""Tensors of an ONNX graph: their types, and constants brought to one form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from hpddrnet_trt.graph.model import replace_nodes

if TYPE_CHECKING:
    import onnx


def tensor_types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every tensor, initialisers included."""
    from onnx import shape_inference

    graph = shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {entry.name: int(entry.data_type) for entry in graph.initializer}
    for entry in [*graph.value_info, *graph.input, *graph.output]:
        types[entry.name] = int(entry.type.tensor_type.elem_type)
    return types


def along(values: npt.NDArray[Any], axis: int, dimensions: int) -> npt.NDArray[Any]:
    """Scales or zero points (one, or one per channel on ``axis``) in the shape that multiplies a tensor."""
    if values.size == 1:
        return values.reshape(())
    shape = [1] * dimensions
    shape[axis] = -1
    return values.reshape(shape)


def fold_constants(graph: onnx.GraphProto) -> None:
    """Constant nodes become initialisers, and so do casts of initialisers.

    Shipped models (:mod:`hpddrnet_trt.export.shipping`) store weights in FP16 behind a Cast to FP32.
    """
    from onnx import helper, numpy_helper

    stored = {entry.name: entry for entry in graph.initializer}
    kept = []
    for node in graph.node:
        attributes = {entry.name: entry for entry in node.attribute}
        if node.op_type == "Constant" and "value" in attributes:
            values = numpy_helper.to_array(attributes["value"].t)
        elif node.op_type == "Cast" and node.input[0] in stored:
            dtype = helper.tensor_dtype_to_np_dtype(attributes["to"].i)
            values = numpy_helper.to_array(stored[node.input[0]]).astype(dtype)
        else:
            kept.append(node)
            continue
        stored[node.output[0]] = numpy_helper.from_array(values, node.output[0])
        graph.initializer.append(stored[node.output[0]])
    replace_nodes(graph, kept)
