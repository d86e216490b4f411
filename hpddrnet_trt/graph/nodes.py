"""Queries and edits of ONNX graphs that the passes share, and constants brought to one form.

Every pass takes a ``ModelProto`` and gives another; where it changes one in place, its docstring says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import UserError, require

if TYPE_CHECKING:
    import onnx


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that a pass may change."""
    result: onnx.ModelProto = require("onnx", "export", "rewrite ONNX files").ModelProto()
    result.CopyFrom(model)
    return result


def renamed(node: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    """A copy of a node with these tensors renamed."""
    copy = type(node)()
    copy.CopyFrom(node)
    for field in (copy.input, copy.output):
        for place, name in enumerate(field):
            field[place] = names.get(name, name)
    return copy


def cast(source: str, target: str, kind: int, **attributes: Any) -> onnx.NodeProto:
    """A Cast of ``source`` to the element type ``kind``, named after the tensor that it makes."""
    from onnx import helper

    return helper.make_node("Cast", [source], [target], f"{target}/Cast", to=kind, **attributes)


def store(entry: onnx.TensorProto, values: npt.NDArray[Any]) -> None:
    """Put other values, of any type, into an initialiser."""
    from onnx import numpy_helper

    entry.CopyFrom(numpy_helper.from_array(values, entry.name))


def producers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Tensor name to the node that makes it."""
    return {name: node for node in graph.node for name in node.output if name}


def consumers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """Tensor name to the nodes that read it."""
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            readers[name].append(node)
    return readers


def class_scores(graph: onnx.GraphProto) -> str:
    """Name of the class scores at low resolution: what the graph's first output is enlarged from.

    Raises :class:`UserError` for a graph that enlarges nothing.
    """
    made = producers(graph)
    frontier = [graph.output[0].name]
    while frontier:
        node = made.get(frontier.pop(0))
        if node is None:
            continue
        if node.op_type == "Resize":
            return node.input[0]
        if enlarges(node, made):
            return made[node.input[0]].input[0]
        frontier.extend(node.input)
    raise UserError("the graph enlarges no class scores; export the model again")


def enlarges(node: onnx.NodeProto, made: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether a node is the convolution that enlarges the scores (``Phases`` of :mod:`.reformulate`).

    It is the only one that repeats the outermost pixels at the border. Its weights are interpolation weights, so it
    is no part of the network to quantise. ``made``: :func:`producers`.
    """
    before = made.get(node.input[0]) if node.op_type == "Conv" else None
    return before is not None and before.op_type == "Pad"


def initializers(graph: onnx.GraphProto) -> dict[str, npt.NDArray[np.generic]]:
    """Initialiser name to its values."""
    from onnx import numpy_helper

    return {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}


def stored_constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Tensor name to its values as the file stores them: of initialisers and of Constant nodes."""
    stored = {entry.name: entry for entry in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            stored.update((node.output[0], entry.t) for entry in node.attribute if entry.name == "value")
    return stored


def int_attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    """An integer attribute of a node, or the operator's default."""
    return next((int(entry.i) for entry in node.attribute if entry.name == name), default)


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Give the graph these nodes, in topological order; drop nodes and initialisers nothing reads."""
    ordered = _live(graph, _sorted(graph, list(nodes)))
    del graph.node[:]
    graph.node.extend(ordered)
    used = {name for node in ordered for name in node.input} | {entry.name for entry in graph.output}
    kept = [entry for entry in graph.initializer if entry.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _sorted(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    made = {name for node in nodes for name in node.output if name}  # "" is an optional output left out
    waiting = [(node, {name for name in node.input if name in made}) for node in nodes]
    ready: set[str] = set()
    ordered: list[onnx.NodeProto] = []
    while waiting:
        rest = []
        for node, needs in waiting:
            if needs <= ready:
                ordered.append(node)
                ready.update(node.output)
            else:
                rest.append((node, needs))
        if len(rest) == len(waiting):
            raise ValueError(f"the graph has a cycle through {rest[0][0].name!r}")
        waiting = rest
    return ordered


def _live(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    needed = {entry.name for entry in graph.output}
    kept = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(name for name in node.input if name)
    return kept[::-1]


def name_nodes(model: onnx.ModelProto) -> None:
    """Give every node a name of its own (quantisers select by name)."""
    seen: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{index}"
        seen.add(node.name)


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

    Shipped models (:func:`hpddrnet_trt.export.onnx.ship`) store weights in FP16 behind a Cast to FP32.
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
