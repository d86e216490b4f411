"""What TensorRT can make of a quantised graph: fused INT8 kernels, unquantized regions, conversions.

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
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hpddrnet_trt.graph.fp8 import suits_fp8
from hpddrnet_trt.graph.layers import block_of, group_of
from hpddrnet_trt.graph.quantized import Kernel, QuantizedGraph

if TYPE_CHECKING:
    import onnx

_POINTWISE = {"Add", "BatchNormalization", "Clip", "Mul", "Relu", "Sigmoid", "Sub"}
# A quantisation moves through these towards the convolution before them.
_MOVING = {"Concat", "Flatten", "MaxPool", "Reshape", "Resize", "Slice", "Transpose"}
_ONE_SCALE = {"Concat", "MaxPool", "Relu", "Resize"}
# Parts of the network that stay unquantized: what they are called here, and why.
_UNQUANTIZED = {
    "input": ("input normalisation", "grey levels become floating-point values once"),
    "position attention": ("position attention", "attention scores do not fit into 8 bits"),
    "channel attention": ("channel attention", "global means cost nothing and weigh on every pixel"),
    "pyramid": ("pyramid pooling", "small maps, each read by a sum and by the concatenation"),
    "output": ("upsampling and labels", "class scores are compared in floating point"),
    "domain guard": ("features of the domain", "sums and squares of many values"),
}

_OWN_NAMES = {"output", "domain guard"}  # that belong to no module


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
class FloatRegion:
    """An unquantized (high-precision) region: connected operators, counted by kind."""

    name: str
    reason: str
    operators: dict[str, int]


@dataclass(frozen=True)
class QdqReport:
    """The analysis of one graph. ``violations`` and ``reformats`` are those outside the stages."""

    convolutions: tuple[Convolution, ...]
    stages: tuple[Stage, ...]
    float_regions: tuple[FloatRegion, ...]
    violations: tuple[Violation, ...]
    reformats: tuple[Reformat, ...]
    int8_operators: dict[str, int] = field(default_factory=dict)  # without weights, 8 bits on both sides

    @property
    def all_violations(self) -> tuple[Violation, ...]:
        """Inside and outside the stages."""
        return (*(entry for stage in self.stages for entry in stage.violations), *self.violations)

    @property
    def stage_reformats(self) -> int:
        """Conversions inside residual stages; none in a sound graph."""
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


def report_lines(record: dict[str, Any]) -> list[str]:
    """What :meth:`QdqReport.record` holds, for people."""
    counts, stages = record["counts"], record["stages"]
    regions = record["float_regions"]
    kinds = ", ".join(f"{number} {kind}" for kind, number in counts["convolutions"].items())
    sound = sum(not stage["violations"] and not stage["reformats"] for stage in stages)
    broken = [entry for part in (*stages, record) for entry in part["violations"]]
    inside = [(stage["name"], entry) for stage in stages for entry in stage["reformats"]]
    return [
        f"convolutions as quantised: {kinds}",
        *(f"  {entry['name']}: {entry['precision']}, {entry['reason']}"
          for entry in record["convolutions"] if entry["reason"]),
        f"residual stages: {sound} of {len(stages)} without a broken fusion rule or a conversion inside",
        *(f"  {name}: {entry['kind']} {entry['tensor']}, {entry['where']}" for name, entry in inside),
        *(f"  {entry['rule']}: {entry['where']}: {entry['detail']}" for entry in broken),
        f"conversions expected elsewhere: {counts['reformats_elsewhere']}",
        f"unquantized (high-precision) regions: {len(regions)}",
        *(f"  {region['name']}: {region['reason']}" for region in regions),
    ]  # fmt: skip


def analyze(model: onnx.ModelProto, kept: Collection[str] = ()) -> QdqReport:
    """Check a quantised graph; ``kept``: convolutions that a mixed-precision search left in floating point."""
    graph = QuantizedGraph(model)
    checker = RuleChecker(graph)
    int8_groups: list[list[Any]] = []
    float_groups: list[list[Any]] = []
    for group in _groups(graph):
        (int8_groups if _runs_in_eight_bits(graph, group) else float_groups).append(group)
    regions = [_float_region(graph, group) for group in float_groups]
    reformats = list(checker.reformats)
    for region, group in zip(regions, float_groups, strict=True):
        reformats += _border(graph, group, region.name)
    inside = set().union(*(block.members for block in graph.blocks))
    stages = []
    for block in graph.blocks:
        kinds = {graph.precision(node) for node in block.convolutions}
        stages.append(
            Stage(
                name=_module(block.sum.name) or block.sum.name,
                convolutions=tuple(node.name for node in block.convolutions),
                precision=kinds.pop() if len(kinds) == 1 else "mixed",
                violations=tuple(entry for node, entry in checker.violations if id(node) in block.members),
                reformats=tuple(entry for sides, entry in reformats if sides <= block.members),
            )
        )
    return QdqReport(
        convolutions=tuple(
            Convolution(node.name, graph.precision(node), _reason(graph, node, kept)) for node in graph.convolutions
        ),
        stages=tuple(stages),
        float_regions=tuple(regions),
        violations=tuple(entry for node, entry in checker.violations if id(node) not in inside),
        reformats=tuple(
            entry for sides, entry in reformats if not any(sides <= block.members for block in graph.blocks)
        ),
        int8_operators=dict(Counter(node.op_type for group in int8_groups for node in group)),
    )


def _module(name: str) -> str:
    return name.rpartition("/")[0]


# ---------------------------------------------------------------------------------- the rules


class RuleChecker:
    """Violations with the node they belong to, and conversions with the nodes on both sides, by id."""

    def __init__(self, graph: QuantizedGraph) -> None:
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
            if len(quantizers := graph.quantizers(name)) > 1:
                self._break(quantizers[1], "quantised once", f"{name} is quantised {len(quantizers)} times")

    def _break(self, node: Any, rule: str, detail: str) -> None:
        self.violations.append((node, Violation(rule, node.name or node.op_type, detail)))

    def _convert(self, sides: Collection[Any], kind: str, tensor: str, where: str) -> None:
        self.reformats.append((frozenset(map(id, sides)), Reformat(kind, tensor, where)))

    def _weights(self, node: Any) -> None:
        graph = self.graph
        data, kernel = (graph.dequantizer(name) is not None for name in node.input[:2])
        if kernel and not data:
            self._break(node, "weighted inputs", "its kernel is quantised, its data is not")
        # A convolution kept in floating point may read what others read in INT8.
        if data and not kernel and graph.readers(node.input[0]) == [node]:
            self._break(node, "weighted inputs", "its data is quantised, its kernel is not")
        if len(node.input) > 2 and graph.dequantizer(node.input[2]) is not None:
            self._break(node, "bias", "its bias is quantised")
        for quantizer in graph.quantizers(node.output[0]) if graph.is_quantized(node) else ():
            # A pair between the convolution and the ReLU or sum that could be in its kernel.
            readers = graph.behind(quantizer)
            reader = readers[0] if len(readers) == 1 else None
            if reader is None:
                continue
            if reader.op_type == "Relu":
                self._break(node, "weighted output", f"a pair stands between it and {reader.name}")
            elif graph.is_sum(reader) and not any(kernel.sum is reader for kernel in graph.kernels):
                self._break(node, "weighted output", f"a pair stands between it and the sum {reader.name}")

    def _kernel(self, kernel: Kernel) -> None:
        graph = self.graph
        node = kernel.convolution if kernel.sum is None else kernel.sum
        quantizers = graph.quantizers(kernel.result)
        others = len(graph.readers(kernel.result)) - len(quantizers) + (kernel.result in graph.outputs)
        if quantizers and (len(quantizers) > 1 or others):
            self._break(node, "one output", f"{len(quantizers)} quantisations and {others} others read its result")
            self._convert([node], "quantise", kernel.result, "beside a second output")
        if kernel.sum is None:
            return
        int8_operand = graph.dequantizer(kernel.other) is not None
        if quantizers and not int8_operand:
            self._break(node, "residual input", f"its operand {kernel.other} is in floating point")
            self._convert([node], "quantise", kernel.result, "behind a floating-point sum")
        elif int8_operand and not quantizers:
            self._break(node, "one output", "its result is in floating point, its other operand is not")
            self._convert([node], "dequantise", graph.source(kernel.other), "before the sum")

    def _pair(self, node: Any) -> None:
        graph = self.graph
        data, scale, *zero = node.input
        before = graph.dequantizer(data) if node.op_type == "QuantizeLinear" else None
        if before is not None:
            source = graph.source(data)
            self._convert([graph.maker.get(source)], "requantise", source, "from scale to scale")
            if np.array_equal(graph.values(before.input[1]), graph.values(scale)):
                self._break(node, "quantised once", "it repeats the quantisation before it, on the same scale")
        if zero and zero[0] in graph.entries and graph.values(zero[0]).any():
            self._break(node, "symmetric", "its zero point is not zero")
        if data not in graph.entries and graph.values(scale).size != 1:
            self._break(node, "symmetric", "an activation has more than one scale")

    def _one_scale(self, node: Any) -> None:
        graph = self.graph
        before = [graph.dequantizer(name) for name in (node.input if node.op_type == "Concat" else node.input[:1])]
        after = graph.quantizers(node.output[0])
        pairs = [pair for pair in (*before, *after) if pair is not None]
        scales = {float(graph.values(pair.input[1]).ravel()[0]) for pair in pairs}
        if after and None not in before and len(scales) > 1:
            self._break(node, "one scale", f"its INT8 tensors have {len(scales)} scales")


# ------------------------------------------------------------------------ unquantized regions


def _groups(graph: QuantizedGraph) -> list[list[Any]]:
    """Operators on the image that are neither pairs nor in a quantised kernel, in connected groups.

    Two are connected when one reads the other's result, or both the floating-point result of one kernel.
    """
    group_of_node = {
        id(node): [node]
        for node in graph.nodes
        if id(node) in graph.data
        and id(node) not in graph.in_kernel
        and node.op_type not in ("QuantizeLinear", "DequantizeLinear")
    }
    first: dict[str, Any] = {}  # who reads a kernel's floating-point result
    for node in graph.nodes:
        for name in node.input if id(node) in group_of_node else ():
            other = graph.maker.get(name)
            if id(other) not in group_of_node:
                other = first.setdefault(name, node) if name in graph.results else node
            mine, theirs = group_of_node[id(other)], group_of_node[id(node)]
            if mine is not theirs:
                mine.extend(theirs)
                group_of_node.update({id(member): mine for member in theirs})
    return list({id(group): group for group in group_of_node.values()}.values())


def _leaving(graph: QuantizedGraph, group: Sequence[Any]) -> Iterator[tuple[Any, str, list[Any]]]:
    """(node, tensor, readers outside) for tensors that leave a group; no readers for an output of the graph."""
    members = set(map(id, group))
    for node in group:
        for name in node.output:
            outside = [reader for reader in graph.readers(name) if id(reader) not in members]
            if outside or name in graph.outputs:
                yield node, name, outside


def _entering(graph: QuantizedGraph, group: Sequence[Any]) -> Iterator[tuple[Any, str]]:
    """(reader, tensor) for data that enters a group."""
    members = set(map(id, group))
    for node in group:
        for name in dict.fromkeys(node.input):
            maker = graph.maker.get(name)
            if name in graph.inputs or (maker is not None and id(maker) in graph.data and id(maker) not in members):
                yield node, name


def _runs_in_eight_bits(graph: QuantizedGraph, group: Sequence[Any]) -> bool:
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
    return all(
        graph.dequantizer(name) is not None or (moving and name in graph.results and len(graph.readers(name)) == 1)
        for _, name in _entering(graph, group)
    )


def _float_region(graph: QuantizedGraph, group: Sequence[Any]) -> FloatRegion:
    """What an unquantized group of operators is called, and why it is one."""
    operators = dict(Counter(node.op_type for node in group))
    roles: dict[str, tuple[str, str]] = {}  # by module
    for node in group:
        part = group_of(node.name)
        if graph.inputs.intersection(node.input):
            roles[_module(node.name)] = _UNQUANTIZED["input"]
        elif part in _UNQUANTIZED:
            roles[part if part in _OWN_NAMES else block_of(node.name)] = _UNQUANTIZED[part]
    modules = [_module(node.name) or node.name for node in group if node.op_type != "Cast"]
    named = [f"{module} ({role})" if module else role for module, (role, _) in roles.items()]
    reason = "; ".join(dict.fromkeys(reason for _, reason in roles.values()))
    if not roles:
        convolves = "Conv" in operators
        reason = "its convolution is in floating point" if convolves else "its values are not quantised on both sides"
    return FloatRegion(" + ".join(named) or (modules or [group[0].name])[0], reason, operators)


def _border(graph: QuantizedGraph, group: Sequence[Any], region: str) -> Iterator[tuple[frozenset[int], Reformat]]:
    """Conversions at the border of an unquantized region, one per tensor, with the ids of the nodes on both sides."""
    seen: set[str] = set()
    for node, name in _entering(graph, group):
        if graph.dequantizer(name) is not None and name not in seen:
            seen.add(name)
            source = graph.source(name)
            yield frozenset({id(graph.maker.get(source)), id(node)}), Reformat("dequantise", source, f"into {region}")
    for node, name, outside in _leaving(graph, group):
        for quantizer in outside:
            if quantizer.op_type == "QuantizeLinear":
                behind = graph.behind(quantizer)
                reader = behind[0] if len(behind) == 1 else quantizer
                yield frozenset({id(node), id(reader)}), Reformat("quantise", name, f"out of {region}")


def _reason(graph: QuantizedGraph, node: Any, kept: Collection[str]) -> str:
    """Why a convolution is in floating point; empty for a quantised one."""
    if graph.is_quantized(node):
        return ""
    if node.name in kept:
        return "kept by the mixed-precision search"
    if _reads_global_mean(graph, node):
        gate = any(reader.op_type in ("Sigmoid", "HardSigmoid") for reader in graph.readers(node.output[0]))
        return "channel attention" if gate else "1x1 map"
    if group_of(node.name) == "position attention":
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


def _reads_global_mean(graph: QuantizedGraph, node: Any) -> bool:
    name = node.input[0]
    while True:
        maker = graph.maker.get(graph.source(name))
        if maker is None or maker.op_type not in ("Relu", "BatchNormalization"):
            return maker is not None and maker.op_type in ("ReduceMean", "GlobalAveragePool")
        name = maker.input[0]
