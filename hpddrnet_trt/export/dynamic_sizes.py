"""Shorter shape arithmetic for graphs with dynamic sizes.

The exporter computes every size of the graph from the input's height and width. Here each size is
read from the tensor that has it already: a resize whose result is added to another tensor takes that
tensor's size, and position attention, which flattens a feature map, takes the size back from that map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hpddrnet_trt.core.errors import require
from hpddrnet_trt.graph.nodes import consumers, initializers, producers, replace_nodes

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


def shorten_sizes(model: ModelProto) -> None:
    """Rewrite ``model`` in place; nodes that do not follow the two patterns stay as they are."""
    require("onnx", "export", "export to ONNX")
    from onnx import helper, numpy_helper, shape_inference

    graph = model.graph
    ranks = _ranks(shape_inference.infer_shapes(model))
    constant = set(initializers(graph))
    made, readers = producers(graph), consumers(graph)
    added: list[NodeProto] = []
    for node in graph.node:
        if node.op_type == "Resize" and len(node.input) == 4 and node.input[3] not in constant:
            _size_of_summand(node, readers, added)
        elif node.op_type == "Reshape" and node.input[1] not in constant:
            if ranks.get(node.output[0]) == 3:
                graph.initializer.append(
                    numpy_helper.from_array(np.array([0, 0, -1], dtype=np.int64), f"{node.name}.shape")
                )
                node.input[1] = f"{node.name}.shape"
                del node.attribute[:]  # allowzero, which would take the zeros for sizes
            elif flatten := _flatten_before(node, made, ranks):
                node.input[1] = f"{node.name}.shape"
                added.append(helper.make_node("Shape", [flatten.input[0]], [node.input[1]], f"{node.name}/Shape"))
    replace_nodes(graph, [*graph.node, *added])


def _ranks(model: ModelProto) -> dict[str, int]:
    entries = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    return {entry.name: len(entry.type.tensor_type.shape.dim) for entry in entries}


def _size_of_summand(
    resize: NodeProto, readers: dict[str, list[NodeProto]], added: list[NodeProto]
) -> None:
    from onnx import helper

    sums = [node for node in readers[resize.output[0]] if node.op_type == "Add"]
    if len(sums) != 1:
        return
    other = next(name for name in sums[0].input if name != resize.output[0])
    parts = [f"{resize.name}.{part}" for part in ("outer", "inner", "sizes")]
    added += [
        helper.make_node("Shape", [resize.input[0]], parts[:1], f"{resize.name}/Shape", start=0, end=2),
        helper.make_node("Shape", [other], parts[1:2], f"{resize.name}/Shape_2", start=2, end=4),
        helper.make_node("Concat", parts[:2], parts[2:], f"{resize.name}/Concat", axis=0),
    ]
    resize.input[3] = parts[2]


def _flatten_before(
    node: NodeProto, made: dict[str, NodeProto], ranks: dict[str, int]
) -> NodeProto | None:
    """The nearest reshape to rank 3 among the ancestors of ``node``."""
    frontier = [node.input[0]]
    while frontier:
        parent = made.get(frontier.pop(0))
        if parent is None:
            continue
        if parent.op_type == "Reshape" and ranks.get(parent.output[0]) == 3:
            return parent
        frontier.extend(parent.input)
    return None
