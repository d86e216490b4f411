"""What TensorRT can make of a quantised graph: fused INT8 kernels, floating-point islands, conversions.

:mod:`hpddrnet_trt.graph.qdq` places the pairs; this module reads a finished ONNX graph (before or
after the conversion to FP16, INT8 or FP8) and checks every pair against the published rules, without
knowing how it was placed. It needs no GPU, and predicts what a builder can fuse, not what it will
do: :func:`reformats_from_inspector` counts the conversions in a built engine.

Rules (NVIDIA's guide, TensorRT 10 and 11, "Working with Quantized Types": explicit quantization,
TensorRT processing of Q/DQ networks, Q/DQ layer-placement recommendations):

``weighted inputs``   data and kernel of a convolution are both quantised, or neither.
``weighted output``   nothing stands between a convolution and the sum or ReLU that its kernel takes in.
``residual input``    the other operand of such a sum is quantised if the result is: in floating point it
                      would keep the kernel from writing INT8.
``one output``        the kernel's result goes into exactly one quantisation, or to floating point only; a
                      sum with an INT8 operand always into a quantisation.
``bias``              biases are not quantised.
``quantised once``    no tensor is quantised twice, and none anew with the scale that it has.
``one scale``         ReLU, resize, maximum pooling and concatenation keep their INT8 scale.
``symmetric``         zero points are zero, activations have one scale.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hpddrnet_trt.core.precisions import BY_ONNX_TYPE
from hpddrnet_trt.graph.attention import attentions
from hpddrnet_trt.graph.fp8 import suits_fp8
from hpddrnet_trt.graph.nodes import consumers, enlarges, producers

if TYPE_CHECKING:
    import onnx

_POINTWISE = {"Add", "BatchNormalization", "Clip", "Mul", "Relu", "Sigmoid", "Sub"}
# A quantisation moves through these towards the convolution before them.
_MOVING = {"Concat", "Flatten", "MaxPool", "Reshape", "Resize", "Slice", "Transpose"}
_ONE_SCALE = {"Concat", "MaxPool", "Relu", "Resize"}
_LONGEST_STAGE = 3  # convolutions on the main path


@dataclass(frozen=True)
class Convolution:
    """``precision``: what it computes in (one of :data:`PRECISIONS`); ``reason``: why not in 8 bits."""

    name: str
    precision: str
    reason: str = ""


@dataclass(frozen=True)
class Violation:
    """A pair, or the lack of one, that keeps TensorRT from a published fusion."""

    rule: str
    where: str
    detail: str


@dataclass(frozen=True)
class Reformat:
    """A tensor converted outside a convolution's kernel; ``kind``: quantise, dequantise or requantise."""

    kind: str
    tensor: str
    where: str


@dataclass(frozen=True)
class Stage:
    """A residual block: the convolutions of its main path in order, its shortcut's (if any) last."""

    name: str
    convolutions: tuple[str, ...]
    precision: str  # of all of them, "mixed" where they differ
    violations: tuple[Violation, ...] = ()
    reformats: tuple[Reformat, ...] = ()


@dataclass(frozen=True)
class Island:
    """Connected operators in floating point; ``operators`` by kind."""

    name: str
    reason: str
    operators: dict[str, int]

    @property
    def operator_count(self) -> int:
        """How many operators it has."""
        return sum(self.operators.values())


@dataclass(frozen=True)
class Placement:
    """The analysis of one graph. ``violations`` and ``reformats`` are those outside the stages."""

    convolutions: tuple[Convolution, ...]
    stages: tuple[Stage, ...]
    float_regions: tuple[Island, ...]
    violations: tuple[Violation, ...]
    reformats: tuple[Reformat, ...]
    int8_operators: dict[str, int] = field(default_factory=dict)  # without weights, 8 bits on both sides

    @property
    def all_violations(self) -> tuple[Violation, ...]:
        """Inside and outside the stages."""
        return (*(entry for stage in self.stages for entry in stage.violations), *self.violations)

    @property
    def stage_reformats(self) -> int:
        """Conversions inside residual stages; none in a sound placement."""
        return sum(len(stage.reformats) for stage in self.stages)

    def record(self) -> dict[str, Any]:
        """For the manifest: plain JSON values."""
        result: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        result["counts"] = {
            "convolutions": dict(Counter(entry.precision for entry in self.convolutions)),
            "residual_stages": len(self.stages),
            "violations": len(self.all_violations),
            "float_regions": len(self.float_regions),
            "reformats_in_stages": self.stage_reformats,
            "reformats_elsewhere": len(self.reformats),
        }
        return result

    def text(self) -> str:
        """For people: several lines."""
        kinds = Counter(entry.precision for entry in self.convolutions)
        lines = [f"convolutions: {', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}"]
        lines += [f"  {entry.name}: {entry.precision}, {entry.reason}" for entry in self.convolutions if entry.reason]
        sound = sum(not stage.violations and not stage.reformats for stage in self.stages)
        lines.append(f"residual stages: {sound} of {len(self.stages)} without violations and conversions")
        lines += [
            f"  {stage.name} ({stage.precision}): {entry.kind} {entry.tensor}, {entry.where}"
            for stage in self.stages
            for entry in stage.reformats
        ]
        lines.append(f"violations: {len(self.all_violations)}")
        lines += [f"  {entry.rule}: {entry.where}: {entry.detail}" for entry in self.all_violations]
        lines.append(f"floating-point islands: {len(self.float_regions)}")
        lines += [f"  {entry.name}: {entry.operator_count} operators; {entry.reason}" for entry in self.float_regions]
        lines.append(f"conversions expected outside residual stages: {len(self.reformats)}")
        lines += [f"  {entry.kind} {entry.tensor}, {entry.where}" for entry in self.reformats]
        return "\n".join(lines)


def analyse(model: onnx.ModelProto, kept: Collection[str] = ()) -> Placement:
    """Check a quantised graph; ``kept``: convolutions that a mixed-precision search left in floating point."""
    graph = _Graph(model)
    findings = _Findings(graph)
    groups = [group for group in _float_groups(graph) if group]
    eight_bit = [group for group in groups if _runs_in_eight_bits(graph, group)]
    names = {id(node): _island_name(graph, group) for group in groups for node in group}
    islands = [group for group in groups if group not in eight_bit]
    reformats = [
        *findings.reformats,
        *(entry for group in islands for entry in _island_reformats(graph, group, names[id(group[0])])),
    ]
    stages = tuple(
        Stage(
            _module(block.sum.name) or block.sum.name,
            tuple(node.name for node in (*block.main, *block.projection)),
            _common({graph.precision(node) for node in (*block.main, *block.projection)}),
            tuple(entry for node, entry in findings.violations if id(node) in block.members),
            tuple(entry for nodes, entry in reformats if nodes <= block.members),
        )
        for block in graph.blocks
    )
    inside = set().union(*(block.members for block in graph.blocks))
    return Placement(
        convolutions=tuple(
            Convolution(node.name, graph.precision(node), _reason(graph, node, kept)) for node in graph.convolutions
        ),
        stages=stages,
        float_regions=tuple(
            Island(names[id(group[0])], _island_reason(graph, group), dict(Counter(node.op_type for node in group)))
            for group in islands
        ),
        violations=tuple(entry for node, entry in findings.violations if id(node) not in inside),
        reformats=tuple(
            entry for nodes, entry in reformats if not any(nodes <= block.members for block in graph.blocks)
        ),
        int8_operators=dict(Counter(node.op_type for group in eight_bit for node in group)),
    )


# --------------------------------------------------------------------------------- the graph


@dataclass(frozen=True)
class _Kernel:
    """A quantised convolution with what its kernel takes in: at most a sum, then at most a ReLU."""

    convolution: Any
    taken: tuple[Any, ...]
    result: str
    sum: Any | None = None
    other: str = ""  # the sum's other operand


@dataclass(frozen=True)
class _Block:
    """A residual block on the graph without its pairs."""

    sum: Any
    main: tuple[Any, ...]  # convolutions, in order
    projection: tuple[Any, ...]  # the shortcut's convolution, if it has one
    members: frozenset[int]  # ids of its nodes


class _Graph:
    """Look-ups over a quantised graph. Nodes are compared by identity: their ``id`` is a key."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.nodes = list(graph.node)
        self.entries = {entry.name: entry for entry in graph.initializer}
        for node in self.nodes:
            value = next((entry.t for entry in node.attribute if entry.name == "value"), None)
            if node.op_type == "Constant" and value is not None:
                self.entries[node.output[0]] = value
        self.maker = producers(graph)
        self._readers = consumers(graph)
        self.inputs = {entry.name for entry in graph.input} - self.entries.keys()
        self.outputs = {entry.name for entry in graph.output}
        self.data = self._data_nodes()
        self.attention = {id(attention.scores[-1]) for attention in attentions(self.nodes)}
        self.convolutions = [
            node
            for node in self.nodes
            if node.op_type in ("Conv", "ConvTranspose") and not enlarges(node, self.maker)
        ]
        self.blocks = list(self._blocks())
        self.kernels = self._kernels()
        self.in_kernel = {id(node) for kernel in self.kernels for node in (kernel.convolution, *kernel.taken)}

    def _data_nodes(self) -> set[int]:
        """Ids of the nodes that compute on the image, not on shapes or constants."""
        reached, found = set(self.inputs), set()
        for node in self.nodes:
            if node.op_type != "Shape" and reached.intersection(node.input):
                found.add(id(node))
                reached.update(node.output)
        return found

    def readers(self, name: str) -> list[Any]:
        """The nodes that read a tensor's values, not only its shape."""
        return [node for node in self._readers.get(name, ()) if node.op_type != "Shape"]

    def made_by(self, name: str, *kinds: str) -> Any | None:
        """The node that makes a tensor, if it is of one of these kinds."""
        node = self.maker.get(name)
        return node if node is not None and node.op_type in kinds else None

    def dequantiser(self, name: str) -> Any | None:
        """The DequantizeLinear that makes a tensor."""
        return self.made_by(name, "DequantizeLinear")

    def source(self, name: str) -> str:
        """The tensor before the pairs and casts that lead to ``name``."""
        node = self.made_by(name, "DequantizeLinear", "QuantizeLinear", "Cast")
        while node is not None and node.input[0] in self.maker:
            name = node.input[0]
            node = self.made_by(name, "DequantizeLinear", "QuantizeLinear", "Cast")
        return name

    def is_quantised(self, node: Any) -> bool:
        """Whether data and kernel of a convolution are both quantised."""
        return all(self.dequantiser(name) is not None for name in node.input[:2])

    def precision(self, node: Any) -> str:
        """What a convolution computes in, by the type of its stored kernel."""
        name = node.input[1]
        dequantiser = self.dequantiser(name)
        if dequantiser is not None and self.is_quantised(node):
            name = dequantiser.input[2] if len(dequantiser.input) > 2 else dequantiser.input[0]
        elif dequantiser is not None:
            name = dequantiser.input[1]  # computes in the type of the scale
        return _type_name(self.entries[name].data_type) if name in self.entries else "fp32"

    def scale(self, node: Any) -> Any:
        """Scale of a quantise or dequantise node, as float32."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.entries[node.input[1]]).astype(np.float32)

    def _kernels(self) -> list[_Kernel]:
        # A sum belongs to the convolution that ends a block's main path, which may be in floating point.
        ends = {id(block.sum): block.main[-1] for block in self.blocks}
        found, taken = [], set()
        for node in self.convolutions:
            if not self.is_quantised(node):
                continue
            result, other = node.output[0], ""
            total = self._only_reader(result)
            if (
                total is not None
                and self.is_sum(total)
                and id(total) not in taken
                and self.is_quantised(ends.get(id(total), self._other_convolution(total, result) or node))
            ):
                other = next(name for name in total.input if name != result)
                result = total.output[0]
                taken.add(id(total))
            else:
                total = None
            relu = self._only_reader(result)
            if relu is not None and relu.op_type == "Relu":
                result = relu.output[0]
            else:
                relu = None
            parts = tuple(part for part in (total, relu) if part is not None)
            found.append(_Kernel(node, parts, result, total, other))
        return found

    def _other_convolution(self, total: Any, name: str) -> Any | None:
        return next((self.made_by(other, "Conv") for other in total.input if other != name), None)

    def _only_reader(self, name: str) -> Any | None:
        readers = self.readers(name)
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def is_sum(self, node: Any) -> bool:
        """A sum of two different tensors that are computed."""
        return node.op_type == "Add" and len(set(node.input)) == 2 and not self.entries.keys() & set(node.input)

    def _blocks(self) -> Iterator[_Block]:
        for node in self.nodes:
            if self.is_sum(node):
                block = next(filter(None, (self._block(node, slot) for slot in (0, 1))), None)
                if block is not None:
                    yield block

    def _block(self, total: Any, slot: int) -> _Block | None:
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
        tail = [node for node in self.readers(total.output[0]) if node.op_type == "Relu"]
        members = [total, *chain, *between, *projected, *(tail if len(self.readers(total.output[0])) == 1 else [])]
        return _Block(total, tuple(chain), tuple(projected), frozenset(map(id, members)))


def _type_name(kind: int) -> str:
    from onnx import TensorProto

    # Unsigned pairs are none that TensorRT takes.
    return "uint8" if kind == TensorProto.UINT8 else BY_ONNX_TYPE.get(TensorProto.DataType.Name(kind), "fp32")


def _module(name: str) -> str:
    return name.rpartition("/")[0]


def _common(kinds: set[str]) -> str:
    return kinds.pop() if len(kinds) == 1 else "mixed"


# ---------------------------------------------------------------------------------- the rules


class _Findings:
    """Violations with the node they belong to, and conversions with the nodes on both sides, by id."""

    def __init__(self, graph: _Graph) -> None:
        self.graph = graph
        self.violations: list[tuple[Any, Violation]] = []
        self.reformats: list[tuple[frozenset[int], Reformat]] = []
        for node in graph.convolutions:
            self._weights(node)
        for kernel in graph.kernels:
            self._kernel(kernel)
        for node in graph.nodes:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                self._pair(node)
            elif node.op_type in _ONE_SCALE and id(node) in graph.data:
                self._one_scale(node)
        for name in {node.input[0]: None for node in graph.nodes if node.op_type == "QuantizeLinear"}:
            self._once(name)

    def _break(self, node: Any, rule: str, detail: str) -> None:
        self.violations.append((node, Violation(rule, node.name or node.op_type, detail)))

    def _weights(self, node: Any) -> None:
        graph = self.graph
        data, kernel = (graph.dequantiser(name) is not None for name in node.input[:2])
        if kernel and not data:
            self._break(node, "weighted inputs", "its kernel is quantised, its data is not")
        # A convolution kept in floating point may read what others read in INT8.
        if data and not kernel and graph.readers(node.input[0]) == [node]:
            self._break(node, "weighted inputs", "its data is quantised, its kernel is not")
        if len(node.input) > 2 and graph.dequantiser(node.input[2]) is not None:
            self._break(node, "bias", "its bias is quantised")
        if not graph.is_quantised(node):
            return
        for reader in graph.readers(node.output[0]):
            if reader.op_type == "QuantizeLinear":
                self._bare(node, reader)

    def _bare(self, node: Any, quantiser: Any) -> None:
        """A pair between a convolution and the ReLU or sum that could be in its kernel."""
        graph = self.graph
        behind = [
            reader
            for dequantiser in graph.readers(quantiser.output[0])
            for reader in graph.readers(dequantiser.output[0])
        ]
        if len(behind) != 1:
            return
        total = behind[0]
        if total.op_type == "Relu":
            self._break(node, "weighted output", f"a pair stands between it and {total.name}")
        elif graph.is_sum(total) and not any(kernel.sum is total for kernel in graph.kernels):
            self._break(node, "weighted output", f"a pair stands between it and the sum {total.name}")

    def _kernel(self, kernel: _Kernel) -> None:
        graph = self.graph
        node = kernel.convolution if kernel.sum is None else kernel.sum
        readers = graph.readers(kernel.result)
        quantisers = [reader for reader in readers if reader.op_type == "QuantizeLinear"]
        others = len(readers) - len(quantisers) + (kernel.result in graph.outputs)
        here = frozenset({id(node)})
        single = len(quantisers) == 1 and not others
        if quantisers and not single:
            self._break(node, "one output", f"{len(quantisers)} quantisations and {others} others read its result")
            self.reformats.append((here, Reformat("quantise", kernel.result, "beside a second output")))
        if kernel.sum is None:
            return
        int8_operand = graph.dequantiser(kernel.other) is not None
        if quantisers and not int8_operand:
            self._break(node, "residual input", f"its operand {kernel.other} is in floating point")
            self.reformats.append((here, Reformat("quantise", kernel.result, "behind a floating-point sum")))
        elif int8_operand and not quantisers:
            self._break(node, "one output", "its result is in floating point, its other operand is not")
            self.reformats.append((here, Reformat("dequantise", graph.source(kernel.other), "before the sum")))

    def _pair(self, node: Any) -> None:
        from onnx import numpy_helper

        graph = self.graph
        before = graph.dequantiser(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if before is not None:
            sides = frozenset({id(graph.maker.get(graph.source(node.input[0])))})
            self.reformats.append((sides, Reformat("requantise", graph.source(node.input[0]), "from scale to scale")))
            if np.array_equal(graph.scale(before), graph.scale(node)):
                self._break(node, "quantised once", "it repeats the quantisation before it, on the same scale")
        if len(node.input) > 2 and node.input[2] in graph.entries:
            zero = numpy_helper.to_array(graph.entries[node.input[2]])
            if zero.astype(np.float32).any():
                self._break(node, "symmetric", "its zero point is not zero")
        if node.input[0] not in graph.entries and graph.scale(node).size != 1:
            self._break(node, "symmetric", "an activation has more than one scale")

    def _once(self, name: str) -> None:
        quantisers = [node for node in self.graph.readers(name) if node.op_type == "QuantizeLinear"]
        if len(quantisers) > 1:
            self._break(quantisers[1], "quantised once", f"{name} is quantised {len(quantisers)} times")

    def _one_scale(self, node: Any) -> None:
        graph = self.graph
        sources = [node.input[0]] if node.op_type != "Concat" else list(node.input)
        before = [graph.dequantiser(name) for name in sources]
        after = [reader for reader in graph.readers(node.output[0]) if reader.op_type == "QuantizeLinear"]
        scales = {float(graph.scale(entry).ravel()[0]) for entry in [*before, *after] if entry is not None}
        if after and None not in before and len(scales) > 1:
            self._break(node, "one scale", f"its INT8 tensors have {len(scales)} scales")


# -------------------------------------------------------------------------------- the islands


def _float_groups(graph: _Graph) -> list[list[Any]]:
    """Operators on the image that are neither pairs nor in a quantised kernel, in connected groups.

    Two are connected when one reads the other's result, or both the floating-point result of one kernel.
    """
    candidates = [
        node
        for node in graph.nodes
        if id(node) in graph.data
        and id(node) not in graph.in_kernel
        and node.op_type not in ("QuantizeLinear", "DequantizeLinear")
    ]
    group_of = {id(node): [node] for node in candidates}

    def join(one: Any, other: Any) -> None:
        mine, theirs = group_of[id(one)], group_of[id(other)]
        if mine is not theirs:
            mine.extend(theirs)
            group_of.update({id(member): mine for member in theirs})

    first: dict[str, Any] = {}  # who reads a kernel's floating-point result
    results = {kernel.result for kernel in graph.kernels}
    for node in candidates:
        for name in node.input:
            if id(graph.maker.get(name)) in group_of:
                join(graph.maker[name], node)
            elif name in results:
                join(first.setdefault(name, node), node)
    return list({id(group): group for group in group_of.values()}.values())


def _leaving(graph: _Graph, group: Sequence[Any]) -> Iterator[tuple[Any, str, list[Any]]]:
    """(node, tensor, readers outside) for tensors that leave a group; no readers for an output of the graph."""
    members = set(map(id, group))
    for node in group:
        for name in node.output:
            outside = [reader for reader in graph.readers(name) if id(reader) not in members]
            if outside or name in graph.outputs:
                yield node, name, outside


def _entering(graph: _Graph, group: Sequence[Any]) -> Iterator[tuple[Any, str]]:
    """(reader, tensor) for data that enters a group."""
    members = set(map(id, group))
    for node in group:
        for name in dict.fromkeys(node.input):
            maker = graph.maker.get(name)
            if name in graph.inputs or (maker is not None and id(maker) in graph.data and id(maker) not in members):
                yield node, name


def _runs_in_eight_bits(graph: _Graph, group: Sequence[Any]) -> bool:
    """Whether a group of operators without weights becomes INT8 kernels: 8 bits on both of its sides.

    Pointwise operators are fused with the pairs around them, as one average pooling is. A
    quantisation behind operators that move values only (and a resize) goes up through them into the
    kernel of the convolution before.
    """
    kinds = {node.op_type for node in group}
    moving = kinds <= _MOVING
    if not (kinds <= _POINTWISE or moving or (kinds == {"AveragePool"} and len(group) == 1)):
        return False
    for _, name, outside in _leaving(graph, group):
        if name in graph.outputs or any(reader.op_type != "QuantizeLinear" for reader in outside):
            return False
    results = {kernel.result for kernel in graph.kernels}
    return all(
        graph.dequantiser(name) is not None or (moving and name in results and len(graph.readers(name)) == 1)
        for _, name in _entering(graph, group)
    )


def _island_reformats(graph: _Graph, group: Sequence[Any], where: str) -> Iterator[tuple[frozenset[int], Reformat]]:
    """Conversions at the border of an island, one per tensor, with the ids of the nodes on both sides."""
    seen: set[str] = set()
    for node, name in _entering(graph, group):
        if graph.dequantiser(name) is not None and name not in seen:
            seen.add(name)
            source = graph.source(name)
            yield frozenset({id(graph.maker.get(source)), id(node)}), Reformat("dequantise", source, f"into {where}")
    for node, name, outside in _leaving(graph, group):
        for quantiser in outside:
            if quantiser.op_type == "QuantizeLinear":
                behind = [
                    reader for pair in graph.readers(quantiser.output[0]) for reader in graph.readers(pair.output[0])
                ]
                reader = id(behind[0]) if len(behind) == 1 else id(quantiser)
                yield frozenset({id(node), reader}), Reformat("quantise", name, f"out of {where}")


def _roles(graph: _Graph, group: Sequence[Any]) -> dict[str, str]:
    """Modules of the group that are recognised by their operators, with what they are."""
    found: dict[str, str] = {}
    kinds = {node.op_type for node in group}
    for node in group:
        module = _module(node.name)
        if graph.inputs.intersection(node.input):
            found[module] = "input normalisation"
        elif id(node) in graph.attention:
            found[module] = "position attention"
        elif node.op_type == "Sigmoid" and "ReduceMean" in kinds:
            found[module] = "channel attention"
        elif node.op_type == "Concat" and "Resize" in kinds:
            found[module] = "pyramid pooling"
        elif graph.outputs.intersection(node.output):
            found["output"] = "upsampling and labels"
    return found


def _island_name(graph: _Graph, group: Sequence[Any]) -> str:
    roles = _roles(graph, group)
    if roles:
        return " + ".join(f"{module} ({role})" if module and module != role else role for module, role in roles.items())
    modules = dict.fromkeys(_module(node.name) or node.name for node in group if node.op_type != "Cast")
    return next(iter(modules), group[0].name)


_ISLAND_REASONS = {
    "position attention": "attention scores do not fit into 8 bits",
    "channel attention": "global means cost nothing and weigh on every pixel",
    "pyramid pooling": "small maps, each read by a sum and by the concatenation",
    "input normalisation": "grey levels become floating-point values once",
    "upsampling and labels": "class scores are compared in floating point",
}


def _island_reason(graph: _Graph, group: Sequence[Any]) -> str:
    reasons = [_ISLAND_REASONS[role] for role in _roles(graph, group).values()]
    if any(node.op_type in ("Conv", "ConvTranspose") for node in group) and not reasons:
        return "its convolution is in floating point"
    return "; ".join(dict.fromkeys(reasons)) or "its values are not quantised on both sides"


def _reason(graph: _Graph, node: Any, kept: Collection[str]) -> str:
    """Why a convolution is in floating point; empty for a quantised one."""
    if graph.is_quantised(node):
        return ""
    if node.name in kept:
        return "kept by the mixed-precision search"
    if _reads_global_mean(graph, node):
        gate = any(reader.op_type in ("Sigmoid", "HardSigmoid") for reader in graph.readers(node.output[0]))
        return "channel attention" if gate else "1x1 map"
    attention = tuple(f"{_module(entry.name)}." for entry in graph.nodes if id(entry) in graph.attention)
    if _module(node.name) and f"{_module(node.name)}.".startswith(attention):
        return "position attention"
    if node is graph.convolutions[0]:
        return "first layer"
    if node is graph.convolutions[-1]:
        return "last layer"
    kernel = graph.entries.get(node.input[1])
    fp8 = any(graph.precision(other) == "fp8" for other in graph.convolutions)
    if fp8 and kernel is not None and not suits_fp8(node, list(kernel.dims)):
        return "no fast FP8 kernel for its shape"
    return "not quantised"


def _reads_global_mean(graph: _Graph, node: Any) -> bool:
    name = node.input[0]
    while True:
        maker = graph.maker.get(graph.source(name))
        if maker is None or maker.op_type not in ("Relu", "BatchNormalization"):
            return maker is not None and maker.op_type in ("ReduceMean", "GlobalAveragePool")
        name = maker.input[0]


# ------------------------------------------------------------------------- the built engine


def reformats_from_inspector(information: str) -> dict[str, Any]:
    """Conversion layers in a built engine: ``{layers, reformats, share, names}``.

    ``information``: the engine inspector's JSON. Its layers are objects (detailed verbosity; type
    ``Reformat``) or bare names (``Reformatting CopyNode for Input Tensor 0 to ...``). ``share`` is of
    the layers, not of time. A text that lists no layers gives zeros and a ``remark``.
    """
    try:
        listed = list(json.loads(information)["Layers"])
    except (ValueError, KeyError, TypeError):
        return {
            "layers": 0, "reformats": 0, "share": 0.0, "names": [],
            "remark": "the engine inspector gave no readable list of layers",
        }  # fmt: skip
    names = [name for name in map(_reformat_name, listed) if name is not None]
    share = round(len(names) / len(listed), 6) if listed else 0.0
    return {"layers": len(listed), "reformats": len(names), "share": share, "names": names}


def _reformat_name(layer: Any) -> str | None:
    """Name of an inspector entry that converts a tensor, else None."""
    if isinstance(layer, dict):
        name = str(layer.get("Name", ""))
        kinds: Iterable[str] = (str(layer.get(key, "")) for key in ("LayerType", "ParameterType"))
        return name if "Reformat" in kinds or name.startswith("Reformatting CopyNode") else None
    return str(layer) if str(layer).startswith("Reformatting CopyNode") else None
