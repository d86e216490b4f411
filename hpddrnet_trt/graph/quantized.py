"""A quantised graph as TensorRT's builder sees it: which kernel takes in what, and where the residual blocks are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.precisions import BY_ONNX_TYPE
from hpddrnet_trt.graph.nodes import consumers, enlarges, producers, stored_constants

if TYPE_CHECKING:
    import onnx

_LONGEST_STAGE = 3  # convolutions on the main path


@dataclass(frozen=True)
class Kernel:
    """A quantised convolution with what its kernel takes in: at most a sum, then at most a ReLU."""

    convolution: Any
    taken: tuple[Any, ...]
    result: str
    sum: Any | None = None
    other: str = ""  # the sum's other operand


@dataclass(frozen=True)
class Block:
    """A residual block on the graph without its pairs."""

    sum: Any
    convolutions: tuple[Any, ...]  # of the main path in order, then the shortcut's, if it has one
    end: Any  # of the main path
    members: frozenset[int]  # ids of its nodes


class QuantizedGraph:
    """Look-ups over a quantised graph. Nodes are compared by identity: their ``id`` is a key."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.nodes = list(graph.node)
        self.entries = stored_constants(graph)
        self.maker = producers(graph)
        self._readers = consumers(graph)
        self.inputs = {entry.name for entry in graph.input} - self.entries.keys()
        self.outputs = {entry.name for entry in graph.output}
        reached, self.data = set(self.inputs), set[int]()  # the latter: nodes that compute on the image
        for node in self.nodes:
            if node.op_type != "Shape" and reached.intersection(node.input):
                self.data.add(id(node))
                reached.update(node.output)
        self.convolutions = [
            node for node in self.nodes if node.op_type in ("Conv", "ConvTranspose") and not enlarges(node, self.maker)
        ]
        sums = [node for node in self.nodes if self.is_sum(node)]
        found = (next(filter(None, (self._block(node, slot) for slot in (0, 1))), None) for node in sums)
        self.blocks = [block for block in found if block is not None]
        self.kernels = self._kernels()
        self.results = {kernel.result for kernel in self.kernels}
        self.in_kernel = {id(node) for kernel in self.kernels for node in (kernel.convolution, *kernel.taken)}

    def readers(self, name: str) -> list[Any]:
        """The nodes that read a tensor's values, not only its shape."""
        return [node for node in self._readers.get(name, ()) if node.op_type != "Shape"]

    def quantizers(self, name: str) -> list[Any]:
        """Those of them that quantise it."""
        return [node for node in self.readers(name) if node.op_type == "QuantizeLinear"]

    def behind(self, quantizer: Any) -> list[Any]:
        """Who reads a quantised tensor, behind its dequantisation."""
        return [reader for pair in self.readers(quantizer.output[0]) for reader in self.readers(pair.output[0])]

    def made_by(self, name: str, *kinds: str) -> Any | None:
        """The node that makes a tensor, if it is of one of these kinds."""
        node = self.maker.get(name)
        return node if node is not None and node.op_type in kinds else None

    def dequantizer(self, name: str) -> Any | None:
        """The DequantizeLinear that makes a tensor."""
        return self.made_by(name, "DequantizeLinear")

    def source(self, name: str) -> str:
        """The tensor before the pairs and casts that lead to ``name``."""
        node = self.made_by(name, "DequantizeLinear", "QuantizeLinear", "Cast")
        while node is not None and node.input[0] in self.maker:
            name = node.input[0]
            node = self.made_by(name, "DequantizeLinear", "QuantizeLinear", "Cast")
        return name

    def is_quantized(self, node: Any) -> bool:
        """Whether data and kernel of a convolution are both quantised."""
        return all(self.dequantizer(name) is not None for name in node.input[:2])

    def is_sum(self, node: Any) -> bool:
        """A sum of two different tensors that are computed."""
        return node.op_type == "Add" and len(set(node.input)) == 2 and not self.entries.keys() & set(node.input)

    def precision(self, node: Any) -> str:
        """What a convolution computes in, by the type of its stored kernel."""
        from onnx import TensorProto

        name = node.input[1]
        dequantizer = self.dequantizer(name)
        if dequantizer is not None and self.is_quantized(node):
            name = dequantizer.input[2] if len(dequantizer.input) > 2 else dequantizer.input[0]
        elif dequantizer is not None:
            name = dequantizer.input[1]  # computes in the type of the scale
        kind = self.entries[name].data_type if name in self.entries else TensorProto.FLOAT
        # Unsigned pairs are none that TensorRT takes.
        return "uint8" if kind == TensorProto.UINT8 else BY_ONNX_TYPE.get(TensorProto.DataType.Name(kind), "fp32")

    def values(self, name: str) -> npt.NDArray[np.float32]:
        """A constant, such as the scale of a pair."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.entries[name]).astype(np.float32)

    def _only_reader(self, name: str) -> Any | None:
        readers = self.readers(name)
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def _kernels(self) -> list[Kernel]:
        # A sum belongs to the convolution that ends a block's main path, which may be in floating point.
        ends = {id(block.sum): block.end for block in self.blocks}
        kernels, taken = [], set()
        for node in filter(self.is_quantized, self.convolutions):
            result, summed, other, parts = node.output[0], None, "", []
            total = self._only_reader(result)
            if total is not None and self.is_sum(total) and id(total) not in taken:
                operand = next(name for name in total.input if name != result)
                if self.is_quantized(ends.get(id(total), self.made_by(operand, "Conv") or node)):
                    result, summed, other = total.output[0], total, operand
                    taken.add(id(total))
                    parts.append(total)
            reader = self._only_reader(result)
            if reader is not None and reader.op_type == "Relu":
                result = reader.output[0]
                parts.append(reader)
            kernels.append(Kernel(node, tuple(parts), result, summed, other))
        return kernels

    def _block(self, total: Any, slot: int) -> Block | None:
        """The residual block that ends in ``total`` with its main path in operand ``slot``."""
        shortcut = self.source(total.input[1 - slot])
        projection = self.made_by(shortcut, "Conv")
        starts = {shortcut} if projection is None else {shortcut, self.source(projection.input[0])}
        chain: list[Any] = []
        between: list[Any] = []
        name = self.source(total.input[slot])
        while len(chain) < _LONGEST_STAGE:
            relu = self.made_by(name, "Relu")
            if relu is not None and chain:
                between.append(relu)
                name = self.source(relu.input[0])
            node = self.made_by(name, "Conv")
            if node is None:
                return None
            chain.insert(0, node)
            name = self.source(node.input[0])
            if len(chain) > 1 and name in starts:
                break
        else:
            return None
        projected = [projection] if projection is not None and name != shortcut else []
        readers = self.readers(total.output[0])
        tail = readers if [reader.op_type for reader in readers] == ["Relu"] else []
        members = frozenset(map(id, [total, *chain, *between, *projected, *tail]))
        return Block(total, (*chain, *projected), chain[-1], members)
