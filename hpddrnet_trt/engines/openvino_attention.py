"""Position attention as OpenVINO's fused operator.

Its CPU plugin runs ``ScaledDotProductAttention`` as one kernel that works on blocks of queries and
stores no scores; MatMul, Softmax, MatMul it runs as three, with all scores in memory. OpenVINO's own
passes recognise the pattern only with heads, so it is replaced here, exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hpddrnet_trt.core.errors import require


def fuse_attention(model: Any) -> int:
    """Replace each softmax of a matrix product in an ``openvino.Model`` by the fused operator; returns how many.

    What does not fit the pattern (tensors of rank 3, one reader of each, weights that sum to one in each row
    and are multiplied from the left) is left as it is.
    """
    openvino = require("openvino", "openvino", "run models with OpenVINO")
    count = 0
    for softmax in model.get_ordered_ops():
        if softmax.get_type_name() == "Softmax" and _fuse(softmax, openvino):
            count += 1
    if count:
        model.validate_nodes_and_infer_types()
    return count


def _fuse(softmax: Any, openvino: Any) -> bool:
    before = _past_converts(softmax, _source)
    after = _past_converts(softmax, _only_reader)
    if not (_is_product(before) and _is_product(after)):
        return False
    rank, axis = softmax.get_output_partial_shape(0).rank, softmax.get_attributes()["axis"]
    scores, mix = before.get_attributes(), after.get_attributes()
    if rank.is_dynamic or rank.get_length() != 3 or axis not in (-1, 2):
        return False
    if scores["transpose_a"] or mix["transpose_a"] or _past_converts(after, _source) != softmax:
        return False
    ops = require("openvino.opset13", "openvino", "run models with OpenVINO")

    def part(value: Any, transposed: bool) -> Any:
        """FP32 ``[N, 1, T, C]`` of a product's operand ``[N, T, C]`` or, transposed, ``[N, C, T]``."""
        if transposed:
            value = ops.transpose(value, np.array([0, 2, 1], np.int64)).output(0)
        if value.get_element_type() != openvino.Type.f32:
            value = ops.convert(value, "f32").output(0)
        return ops.unsqueeze(value, np.array(1, np.int64)).output(0)

    fused = ops.scaled_dot_product_attention(
        part(before.input_value(0), scores["transpose_a"]),
        # A product with plain operands multiplies with the keys' columns.
        part(before.input_value(1), not scores["transpose_b"]),
        part(after.input_value(1), mix["transpose_b"]),
        attention_mask=np.array(0, np.float32),
        scale=np.array(1, np.float32),
    )
    result = ops.squeeze(fused, np.array([1], np.int64))
    kind = after.output(0).get_element_type()
    if kind != openvino.Type.f32:
        result = ops.convert(result, kind)
    result.set_friendly_name(after.get_friendly_name())
    fused.set_friendly_name(softmax.get_friendly_name())
    for reader in list(after.output(0).get_target_inputs()):
        reader.replace_source_output(result.output(0))
    return True


def _is_product(node: Any | None) -> bool:
    return node is not None and node.get_type_name() == "MatMul"


def _source(node: Any) -> Any:
    return node.input_value(0).get_node()


def _only_reader(node: Any) -> Any | None:
    readers = list(node.output(0).get_target_inputs())
    return readers[0].get_node() if len(readers) == 1 else None


def _past_converts(start: Any, step: Any) -> Any:
    """What is beside ``start``, behind nothing but type conversions; None at a fork."""
    node = step(start)
    while node is not None and node.get_type_name() == "Convert":
        node = step(node)
    return node
