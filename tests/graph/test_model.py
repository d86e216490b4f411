"""Graph queries and edits that the passes share."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from hpddrnet_trt.graph.nodes import int_attribute, replace_nodes


def test_optional_tensors_left_out_are_no_tensor() -> None:
    """An output left out and an input left out have the same name, the empty one."""
    nodes = [
        helper.make_node("LSTM", ["r", "w", "u"], ["", "", "z"], "lstm", hidden_size=1),
        helper.make_node("Resize", ["x", "", "scales"], ["r"], "resize"),
        helper.make_node("LSTM", ["r", "w", "u"], ["", "dead"], "dead", hidden_size=1),
    ]
    outputs = [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", [], outputs)
    replace_nodes(graph, list(graph.node))
    assert [node.name for node in graph.node] == ["resize", "lstm"]


def test_integer_attributes_and_their_default() -> None:
    node: onnx.NodeProto = helper.make_node("Conv", ["x", "w"], ["y"], group=4)
    assert (int_attribute(node, "group", 1), int_attribute(node, "axis", 1)) == (4, 1)
