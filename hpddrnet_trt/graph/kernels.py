"""What each operator of a graph computes and moves, counted on the ONNX file itself.

:func:`macs_and_bytes` counts elements of every operator: a cost model multiplies them with the precisions it
considers. :func:`typed_work` counts a graph as it is deployed: bytes in the types that it stores, kernel
by kernel. Both count multiply-accumulates of convolutions and matrix products, those inside Attention
operators, local functions and the bodies of Scan and Loop included; not bias and normalisation,
residual sums, softmax, pooling, resizing. Counts agree with
:func:`hpddrnet_trt.export.layer_precision.report_from_network`, which needs TensorRT's parser and does not look
into Attention operators and loops.

At 1024x1024 the authors' network (three channels, unfolded, no detail step, evaluation mode, 2 to 4
classes) has 24.70 GMAC as HPDDRNet-23-slim and 18.12 GMAC as DDRNet-23-slim. Of the 24.70, position
attention is 6.58: both products of the scores 4.83, all four projections 0.54, its two 3x3 convolutions
1.21; the main head and its classifier are in, the auxiliary head is not, channel attention is 1e-6. With
19 classes they are 24.72 and 18.14.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.precisions import product_precision
from hpddrnet_trt.graph.attention import attentions
from hpddrnet_trt.graph.nodes import int_attribute
from hpddrnet_trt.graph.tensor_sizes import Tensors, at_size, tensors_of

if TYPE_CHECKING:
    import onnx

# They neither compute nor copy: their readers read the tensor before them.
_VIEWS = ("DequantizeLinear", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")
# A kernel that makes one of their operands takes them in, and that operand is never stored.
_POINTWISE = ("Add", "BatchNormalization", "Cast", "Clip", "Div", "Exp", "Greater", "Mul", "QuantizeLinear",
              "Reciprocal", "Relu", "Sigmoid", "Sub")  # fmt: skip
_PRODUCTS = ("Attention", "Conv", "ConvTranspose", "Gemm", "MatMul")


class Work(NamedTuple):
    """One operator: multiply-accumulates, and elements of its activations in, weights, activations out."""

    macs: int
    inputs: int
    weights: int
    outputs: int

    def bytes(self, input_size: float = 4, weight_size: float = 4, output_size: float = 4) -> float:
        """Bytes read and written at these element sizes in bytes."""
        return self.inputs * input_size + self.weights * weight_size + self.outputs * output_size


class TypedWork(NamedTuple):
    """One kernel: what it multiplies in which precision, and the bytes that it moves.

    ``precision``: one of :data:`PRECISIONS`, None without products. ``read`` and ``written`` are bytes
    of activations, ``weights`` those of constants (scales of quantised tensors left out).
    """

    precision: str | None
    macs: int
    read: int
    weights: int
    written: int

    @property
    def bytes(self) -> int:
        """All bytes read and written, each tensor once."""
        return self.read + self.weights + self.written


def macs_and_bytes(model: onnx.ModelProto, shape: Sequence[int]) -> dict[str, Work]:
    """Work of every operator on the image, by node name, at the input shape ``[N, C, H, W]``.

    Nodes of the body of a Scan or Loop are named ``loop/node`` and counted for all turns. Operators
    that only compute shapes are left out. Raises :class:`UsageError` for a shape that the graph does
    not take and :class:`UserError` when a size cannot be inferred.
    """
    return {
        level.name(node): _operator(node, level) for level in _levels(model, shape) for node in level.nodes
    }


def typed_work(model: onnx.ModelProto, shape: Sequence[int]) -> dict[str, TypedWork]:
    """Work of every kernel of a graph as it is deployed, at the input shape ``[N, C, H, W]``.

    A kernel is an operator with the pointwise operators (residual sum, ReLU, normalisation, cast,
    quantisation) that alone read its result: every runtime here fuses those, and what stays inside moves
    nothing. It is named after its first node. Quantised tensors are stored in one byte, and read as such by
    whoever reads them dequantised; a product of two dequantised operands runs in INT8 or FP8, one with
    a single such operand in the type of the other (as in :mod:`hpddrnet_trt.export.layer_precision`). Attention
    scores are never stored, in any form of attention: the count is the least that a runtime moves, with a
    fused kernel (Dao et al., FlashAttention, NeurIPS 2022, arXiv:2205.14135) or blocks that stay in the
    cache. Raises as :func:`macs_and_bytes`.
    """
    result: dict[str, TypedWork] = {}
    for level in _levels(model, shape):
        _count_kernels(level, result)
    return result


@dataclass(frozen=True)
class _Level:
    """A graph or a loop's body: the nodes that compute on the image, in order, without loops and shapes."""

    nodes: list[Any]
    tensors: Tensors
    data: set[str]  # tensors that depend on the image
    outside: set[str]  # tensors that others read: outputs, and what bodies capture
    before: dict[str, str]  # result of each view to its source
    turns: int
    prefix: str

    def name(self, node: Any) -> str:
        return self.prefix + (node.name or str(node.output[0]))

    def elements(self, name: str) -> int:
        return math.prod(self.tensors.shape(name))

    def root(self, name: str) -> str:
        """The stored tensor behind reshapes and dequantisation."""
        while name in self.before:
            name = self.before[name]
        return name

    def operands(self, node: Any) -> list[str]:
        """The stored tensors that a node reads and that depend on the image, each once."""
        return list(dict.fromkeys(self.root(name) for name in node.input if name in self.data))

    def constants(self, node: Any) -> list[str]:
        """Likewise those that do not."""
        names = [name for name in node.input if name and name not in self.data]
        return list(dict.fromkeys(map(self.root, names)))

    def bytes(self, name: str) -> int:
        """Size of a stored tensor."""
        return self.elements(name) * self.tensors.item_size(name)


def _levels(model: onnx.ModelProto, shape: Sequence[int]) -> Iterator[_Level]:
    graph = at_size(model, shape).graph
    top = _Level([], tensors_of(graph), {graph.input[0].name}, set(), {}, 1, "")
    yield from _walk(graph, top)


def _walk(graph: Any, scope: _Level) -> Iterator[_Level]:
    """The level of ``graph``, of which ``scope`` knows the tensors, and those of the bodies in it."""
    bodies = []
    level = replace(scope, nodes=[], outside={entry.name for entry in graph.output})
    for node in graph.node:
        if node.op_type in _VIEWS:
            level.before[node.output[0]] = node.input[0]
        inner = [entry.g for entry in node.attribute if entry.HasField("g")]
        captured = {name for body in inner for part in body.node for name in part.input}
        if node.op_type == "Shape" or not level.data.intersection([*node.input, *captured]):
            continue
        level.data.update(name for name in node.output if name)
        if inner:
            level.outside.update(node.input, captured)
            bodies.append((node, inner))
        else:
            level.nodes.append(node)
    yield level
    for node, inner in bodies:
        if node.op_type not in ("Loop", "Scan"):
            raise UserError(f"the work of {level.name(node)!r} depends on what is chosen as it runs, no count fits")
        body = inner[0]
        turns = level.turns * _turns(node, level.tensors)
        data = level.data | {entry.name for entry in body.input}
        prefix = f"{level.name(node)}/"
        within = _Level([], level.tensors.inside(body), data, set(), dict(level.before), turns, prefix)
        yield from _walk(body, within)


def _turns(node: Any, tensors: Tensors) -> int:
    """How often a loop's body runs."""
    if node.op_type == "Loop":
        if node.input[0] not in tensors.values:
            raise UserError(f"how often the loop {node.name!r} turns is not fixed by the input size; export it again")
        return int(tensors.values[node.input[0]].item())
    scanned = int_attribute(node, "num_scan_inputs", 0)
    axes = next((list(entry.ints) for entry in node.attribute if entry.name == "scan_input_axes"), [0] * scanned)
    return tensors.shape(node.input[len(node.input) - scanned])[axes[0]]


def _operator(node: Any, level: _Level) -> Work:
    shapes, turns = level.tensors.shapes, level.turns
    constants = [name for name in node.input if name in shapes and name not in level.data]
    return Work(
        macs=turns * _macs(node, level.tensors),
        inputs=turns * sum(level.elements(name) for name in node.input if name in level.data),
        weights=turns * sum(level.elements(name) for name in constants),
        outputs=turns * sum(level.elements(name) for name in node.output if name),
    )


def _macs(node: Any, tensors: Tensors) -> int:
    def elements(name: str) -> int:
        return math.prod(tensors.shape(name))

    if node.op_type == "Conv":  # each output value sums over the kernel's window and its group's channels
        return elements(node.output[0]) * math.prod(tensors.shape(node.input[1])[1:])
    if node.op_type == "ConvTranspose":
        return elements(node.input[0]) * math.prod(tensors.shape(node.input[1])[1:])
    if node.op_type == "MatMul":
        return elements(node.output[0]) * tensors.shape(node.input[0])[-1]
    if node.op_type == "Gemm":
        inner = 0 if int_attribute(node, "transA", 0) else -1
        return elements(node.output[0]) * tensors.shape(node.input[0])[inner]
    if node.op_type == "Attention":  # scores and mixing: every query meets every key, in each head
        return (elements(node.input[0]) + elements(node.output[0])) * tensors.shape(node.input[1])[-2]
    return 0


# --------------------------------------------------------------------------------- kernels


def _count_kernels(level: _Level, result: dict[str, TypedWork]) -> None:
    nodes = [node for node in level.nodes if node.op_type not in _VIEWS]
    heads, inside = _fused(nodes, level)
    for node, head in zip(nodes, heads, strict=True):
        work = TypedWork(
            precision=_precision(node, level) if node.op_type in _PRODUCTS else None,
            macs=_macs(node, level.tensors),
            read=sum(level.bytes(name) for name in level.operands(node) if name not in inside),
            weights=sum(level.bytes(name) for name in level.constants(node)),
            written=sum(level.bytes(name) for name in node.output if name and name not in inside),
        )
        name = level.name(nodes[head])
        precision, *counts = result.get(name, TypedWork(work.precision, 0, 0, 0, 0))
        macs, *moved = (old + level.turns * new for old, new in zip(counts, work[1:], strict=True))
        result[name] = TypedWork(precision, macs, *moved)


def _fused(nodes: Sequence[Any], level: _Level) -> tuple[list[int], set[str]]:
    """For each node the index of the node whose kernel it is part of, and the tensors that stay inside kernels."""
    maker = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    readers: dict[str, list[int]] = defaultdict(list)
    for index, node in enumerate(nodes):
        for name in level.operands(node):
            readers[name].append(index)
    outside = set(map(level.root, level.outside))
    heads, inside = list(range(len(nodes))), set()
    for index, node in enumerate(nodes):
        if node.op_type not in _POINTWISE:
            continue
        size = level.elements(node.output[0])
        suitable = [
            name
            for name in level.operands(node)
            if name in maker and name not in outside and readers[name] == [index] and level.elements(name) == size
        ]
        if suitable:  # a sum belongs to the operand made last; a dequantised one was stored before
            direct = set(node.input)
            taken = max(suitable, key=lambda name: (name in direct, maker[name]))
            inside.add(taken)
            heads[index] = heads[maker[taken]]
    scores = [node for attention in attentions(nodes) if attention.mixing for node in attention.nodes[:-1]]
    return heads, inside | {name for node in scores for name in node.output}


def _precision(node: Any, level: _Level) -> str:
    operands = node.input[: 3 if node.op_type == "Attention" else 2]
    return product_precision([level.tensors.precision(level.root(name)) for name in operands])
