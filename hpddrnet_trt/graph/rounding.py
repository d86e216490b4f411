"""What FP16, BF16 and FP8 rounding do to a network, shown on any CPU.

ONNX Runtime computes FP16 graphs in FP32 on a CPU and runs no BF16 or FP8 convolution. So a typed
graph is rewritten here into an FP32 graph of the same structure, in which every tensor that was
FP16 or BF16 is rounded to that type where it is produced. A pair of Casts rounds: to the narrow type
and back. ONNX Runtime keeps such a pair at every optimisation level, because it loses precision, and
its Cast rounds to nearest even with gradual underflow, overflow to infinity (FP16, BF16) and
saturation at 448 (FP8 E4M3): bit for bit what numpy and ml_dtypes give (tests/graph/test_rounding.py).

Not modelled, because it depends on the GPU and the kernel chosen: the order and the width of sums
inside an operator (taken as FP32 throughout), and fusions, after which a tensor between two fused
operators is not rounded at all. Only the fusion that defines INT8 and FP8 kernels is followed: what
a dequantise node hands to a quantised convolution or matrix product is not rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.graph.nodes import (
    along,
    cast,
    consumers,
    copied,
    int_attribute,
    producers,
    replace_nodes,
    store,
    tensor_types,
)

if TYPE_CHECKING:
    import onnx

RUNTIME_REMARK = "simulated rounding, FP32 accumulation"  # what evidence says about such a run
# They choose or move values, or map zero and order onto themselves: their results need no rounding.
_EXACT = frozenset({
    "Abs", "Concat", "Expand", "Flatten", "Gather", "Identity", "Max", "MaxPool", "Min", "Neg", "Pad", "ReduceMax",
    "ReduceMin", "Relu", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where",
})  # fmt: skip
_PRODUCTS = ("Conv", "MatMul", "Gemm", "ConvTranspose")


def simulate_rounding(model: onnx.ModelProto) -> onnx.ModelProto:
    """An FP32 graph that computes ``model`` (typed FP16 or BF16, perhaps with INT8 or FP8 pairs) with its rounding.

    Same inputs, outputs, node names and tensor names; runs on ONNX Runtime's CPU provider with every
    optimisation. Constants are rounded already. INT8 pairs keep their nodes, with FP32 scales of the
    same value; FP8 pairs become a division, the rounding and a product; quantised constants are stored
    dequantised. An FP32 graph comes back unchanged. What is not modelled: see the module. Raises
    :class:`UsageError` where an input of the graph is FP16 or BF16, or a subgraph hides in a node.
    """
    result = copied(model)
    graph = result.graph
    types = tensor_types(result)
    _check(graph, types)
    rewriting = _Rewriting(graph, types)
    nodes = [made for node in graph.node for made in rewriting.convert(node)]
    rewriting.widen_constants()
    for entry in graph.output:
        if entry.type.tensor_type.elem_type in rewriting.narrow:
            entry.type.tensor_type.elem_type = rewriting.fp32
    replace_nodes(graph, nodes)
    del graph.value_info[:]
    return result


def uses_half(model: onnx.ModelProto) -> bool:
    """Whether a graph computes anything in FP16, BF16 or FP8, which ONNX Runtime's CPU kernels would not show.

    Constants stored in FP16 and cast to FP32 do not count.
    """
    from onnx import TensorProto

    narrow = {TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN}
    types = tensor_types(model)
    return any(types.get(name) in narrow for node in model.graph.node for name in node.output)


def _check(graph: onnx.GraphProto, types: dict[str, int]) -> None:
    from onnx import TensorProto

    for entry in graph.input:
        if types[entry.name] in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
            raise UsageError(f"the input {entry.name!r} is FP16 or BF16; give one with FP32 or 8-bit inputs")
    for node in graph.node:
        if any(attribute.HasField("g") for attribute in node.attribute):
            raise UsageError(f"{node.name or node.op_type} holds a subgraph, whose rounding cannot be simulated")


class _Rewriting:
    """One walk over the graph; see :func:`simulate_rounding`."""

    def __init__(self, graph: onnx.GraphProto, types: dict[str, int]) -> None:
        from onnx import TensorProto

        self.graph, self.types = graph, types
        self.fp32, self.fp8 = int(TensorProto.FLOAT), int(TensorProto.FLOAT8E4M3FN)
        self.narrow = {int(TensorProto.FLOAT16), int(TensorProto.BFLOAT16)}
        self.constants = {entry.name: entry for entry in graph.initializer}
        self.readers = consumers(graph)
        self.producers = producers(graph)

    def convert(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """What takes the node's place, in order."""
        from onnx import helper

        if node.op_type == "DequantizeLinear" and node.input[0] in self.constants:
            self._store_dequantized(node)
            return
        if node.op_type == "QuantizeLinear" and self.types[node.output[0]] == self.fp8:
            scaled = f"{node.output[0]}.scaled"
            yield helper.make_node("Div", node.input[:2], [scaled], node.name)
            yield _cast(scaled, node.output[0], self.fp8, saturate=1)
            return
        if node.op_type == "DequantizeLinear" and self.types[node.input[0]] == self.fp8:
            wide = f"{node.output[0]}.wide"
            product = helper.make_node("Mul", [wide, node.input[1]], node.output, node.name)
            parts = [_cast(node.input[0], wide, self.fp32), product]
        else:
            self._widen(node)
            parts = [node]
        last = parts[-1]
        rounding = []
        for slot, name in enumerate(last.output):
            kind = self.types.get(name, 0)
            if kind in self.narrow and not self._is_exact(node):
                last.output[slot] = f"{name}.exact"
                rounding += [_cast(f"{name}.exact", f"{name}.rounded", kind), _cast(f"{name}.rounded", name, self.fp32)]
        yield from parts
        yield from rounding

    def widen_constants(self) -> None:
        """Constants of a narrow type become FP32, with their values."""
        for entry in self.constants.values():
            if entry.data_type in self.narrow:
                store(entry, _values(entry))

    def _is_exact(self, node: onnx.NodeProto) -> bool:
        if node.op_type == "DequantizeLinear":
            return all(self._is_quantized_product(reader) for reader in self.readers[node.output[0]])
        return node.op_type in _EXACT

    def _is_quantized_product(self, node: onnx.NodeProto) -> bool:
        makers = [self.producers[name].op_type for name in node.input[:2] if name in self.producers]
        return node.op_type in _PRODUCTS and makers == ["DequantizeLinear"] * 2

    def _store_dequantized(self, node: onnx.NodeProto) -> None:
        """A quantised constant, as the values that the node would give."""
        from onnx import numpy_helper

        stored, scale = (self.constants[name] for name in node.input[:2])
        whole, axis = _values(stored), int_attribute(node, "axis", 1)
        if len(node.input) > 2:
            whole = whole - along(_values(self.constants[node.input[2]]), axis, whole.ndim)
        values = whole * along(_values(scale), axis, whole.ndim)
        name, kind = node.output[0], self.types[node.output[0]]
        if kind in self.narrow and not self._is_exact(node):
            from onnx.helper import tensor_dtype_to_np_dtype

            values = values.astype(tensor_dtype_to_np_dtype(kind)).astype(np.float32)
        self.graph.initializer.append(numpy_helper.from_array(values, name))

    def _widen(self, node: onnx.NodeProto) -> None:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in self.narrow:
                attribute.i = self.fp32
            elif attribute.HasField("t") and attribute.t.data_type in self.narrow:  # Constant, ConstantOfShape
                store(attribute.t, _values(attribute.t))


def _values(entry: onnx.TensorProto) -> npt.NDArray[np.float32]:
    from onnx import numpy_helper

    return numpy_helper.to_array(entry).astype(np.float32)


def _cast(source: str, target: str, kind: int, **attributes: Any) -> onnx.NodeProto:
    node = cast(source, target, kind, **attributes)
    node.name = f"{target}/rounding/Cast"  # the typed graph's own cast to this tensor has the other name
    return node
