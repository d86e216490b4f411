"""Where two ONNX graphs of one network part: the error of every layer, and the part of it made there.

Graph A is the reference. Its activations are fed into a *probe*, a graph that holds B twice: once as
it is, which gives every layer's error, inherited ones included; and once with each layer reading A's
activations instead of its predecessors', which gives the error that the layer makes by itself, the
rounding of its inputs and weights included. Only sums leave the probe, one batch at a time, so memory
depends on the size of the crops and not on their number.

ONNX Runtime's graph optimisations are off in both: every quantise/dequantise pair rounds as written.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core import runtimes
from hpddrnet_trt.core.errors import UserError, one_line, require
from hpddrnet_trt.graph.nodes import class_scores, initializers, producers

if TYPE_CHECKING:
    import onnx

_ALONE = "//alone"  # a tensor of B, computed from A's activations
_REFERENCE = "//reference"  # an activation of A
# Nodes that a rounding pass puts between a layer and the tensor that keeps the layer's name.
_ROUNDING = ("Cast", "Identity", "QuantizeLinear", "DequantizeLinear")
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Layer:
    """A float activation that both graphs have, and what leads to it.

    ``name`` and ``operator`` are of the node, ``a`` and ``b`` the tensor's names in the graphs. ``rounded``:
    (name in A, name in B) of inputs that B does not read as the compared activation itself, but
    quantised and dequantised, for example. ``constants``: the same of weights. ``sources``: places, in
    the list of layers, of the nearest compared activations that it depends on in B.
    """

    name: str
    operator: str
    a: str
    b: str
    rounded: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, str], ...]
    sources: tuple[int, ...]


@dataclass
class Sums:
    """Sums over all crops of one layer."""

    reference: float = 0.0  # squares of A's values
    other: float = 0.0  # squares of B's values
    difference: float = 0.0  # squares of their difference
    alone: float = 0.0  # the same for the layer run on A's activations
    rounded: list[tuple[float, float]] = field(default_factory=list)  # per input: squared rounding error, values
    spans: list[tuple[float, float]] = field(default_factory=list)  # per input: smallest and largest value in A, and 0
    largest: float = 0.0  # absolute difference
    batch: int = 0  # where the largest is: number of the batch,
    place: tuple[int, ...] = ()  # index in the tensor


def ratio(squares: float, reference: float) -> float:
    """RMS of an error over RMS of the values: 0 where nothing differs, infinite for values that are not finite."""
    if squares == 0:
        return 0.0
    if not (math.isfinite(squares) and math.isfinite(reference)) or reference == 0:
        return math.inf
    return math.sqrt(squares / reference)


# ----------------------------------------------------------------------------- matching


def match_layers(a: onnx.ModelProto, b: onnx.ModelProto) -> list[Layer]:
    """Float32 activations that two graphs share, in B's order.

    Two tensors are one when name and operator are equal. Where both graphs have the node that makes B's
    tensor, under one name, but A calls its output otherwise, the node decides: another export counts
    its tensors differently, and ONNX Runtime's quantiser drops ReLUs and hands their name on. What a
    node gives before it is rounded is not compared where its rounded form has A's name.
    """
    first, second = _Side(a), _Side(b)
    paired: dict[str, str] = {}  # B's name: A's name
    for name, node in second.activations.items():
        twin = first.nodes.get(node.name)
        in_a = name
        if twin is not None and twin.op_type == node.op_type and name not in twin.output:
            slot = list(node.output).index(name)
            in_a = twin.output[slot] if slot < len(twin.output) else ""
            if in_a in second.activations and second.core(in_a, paired) is node:
                continue
        if in_a not in first.activations or in_a in paired.values():
            continue
        if first.core(in_a, paired.values()).op_type == second.core(name, paired).op_type:
            paired[name] = in_a
    places = {name: place for place, name in enumerate(paired)}
    return [_layer(name, paired, places, first, second) for name in paired]


class _Side:
    """Look-ups in one graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        from onnx import TensorProto, shape_inference

        graph = shape_inference.infer_shapes(model).graph
        types = {entry.name: entry.type.tensor_type.elem_type for entry in [*graph.value_info, *graph.output]}
        self.made = producers(model.graph)
        self.constants = constant_tensors(model.graph)
        self.activations = {
            name: node
            for node in model.graph.node
            for name in node.output
            if name not in self.constants and types.get(name) == TensorProto.FLOAT
        }
        counts = Counter(node.name for node in model.graph.node)
        self.nodes = {node.name: node for node in model.graph.node if node.name and counts[node.name] == 1}

    def core(self, name: str, compared: Iterable[str]) -> onnx.NodeProto:
        """The node that computes ``name``, behind the rounding of its result."""
        node = self.made[name]
        while (
            node.op_type in _ROUNDING
            and node.input[0] in self.made
            and node.input[0] not in compared
            and node.input[0] not in self.constants
        ):
            node = self.made[node.input[0]]
        return node


def constant_tensors(graph: onnx.GraphProto) -> set[str]:
    """Initialisers and what follows from them alone, such as dequantised weights."""
    found = {entry.name for entry in graph.initializer} | {""}
    for node in graph.node:  # in topological order
        if all(name in found for name in node.input):
            found.update(node.output)
    return found - {""}


def _layer(name: str, paired: Mapping[str, str], places: Mapping[str, int], first: _Side, second: _Side) -> Layer:
    node = second.core(name, paired)
    twin = first.core(paired[name], set(paired.values()))
    rounded, constants = [], []
    for in_a, in_b in zip(twin.input, node.input, strict=False):
        if in_a in first.constants and in_b in second.constants:
            constants.append((in_a, in_b))
        elif in_a in first.activations and in_b in second.activations and paired.get(in_b) != in_a:
            rounded.append((in_a, in_b))
    sources = _sources(name, paired, second)
    return Layer(
        name=node.name or name,
        operator=node.op_type,
        a=paired[name],
        b=name,
        rounded=tuple(rounded),
        constants=tuple(constants),
        sources=tuple(sorted(places[source] for source in sources)),
    )


def _sources(name: str, paired: Mapping[str, str], side: _Side) -> set[str]:
    found: set[str] = set()
    seen: set[str] = set()
    frontier = list(side.made[name].input)
    while frontier:
        source = frontier.pop()
        node = side.made.get(source)
        if source in paired:
            found.add(source)
        elif node is not None and node.op_type != "Shape" and source not in seen:
            seen.add(source)
            frontier.extend(node.input)
    return found


def nearest_layer(b: onnx.ModelProto, layers: Sequence[Layer]) -> int | None:
    """Place of the class scores: the activation that B enlarges to full size, or that this one follows from."""
    made = producers(b.graph)
    places = {layer.b: place for place, layer in enumerate(layers)}
    name = class_scores(b.graph)
    while name not in places and name in made and made[name].input:
        name = made[name].input[0]
    return places.get(name)


# ------------------------------------------------------------------------------ probing


class Probe:
    """Runs graph A, then the probe, on one batch after the other, and adds up.

    ``a`` and ``b`` are typed FP32 (the caller simulates other types), ``layers`` is theirs by
    :func:`match_layers`. Raises :class:`UserError` where ONNX Runtime cannot run one of them.
    """

    def __init__(self, a: onnx.ModelProto, b: onnx.ModelProto, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self.sums = [
            Sums(rounded=[(0.0, 0.0)] * len(layer.rounded), spans=[(0.0, 0.0)] * len(layer.rounded)) for layer in layers
        ]
        self._tensors = list(dict.fromkeys(name for layer in layers for name in _of_a(layer)))
        self._a_outputs = [entry.name for entry in a.graph.output]
        self._b_outputs = [entry.name for entry in b.graph.output]
        self._a = _session(_with_outputs(a, self._tensors), "A")
        self._b = _session(_probe_graph(b, layers), "B")
        self._names = [entry.name for entry in self._b.get_outputs()]
        self._batches = 0

    def run(self, image_a: Array, image_b: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        """Add one batch, as each model takes it; returns the outputs of A and of B by name.

        Raises :class:`UserError` when the graphs cannot be compared tensor by tensor.
        """
        wanted = list(dict.fromkeys([*self._tensors, *self._a_outputs]))
        values = dict(zip(wanted, _run(self._a, wanted, {self._a.get_inputs()[0].name: image_a}, "A"), strict=True))
        feed = {f"{name}{_REFERENCE}": values[name] for name in self._tensors}
        inputs = {entry.name for entry in self._b.get_inputs()}
        feed = {name: array for name, array in feed.items() if name in inputs}
        feed[self._b.get_inputs()[0].name] = image_b
        found = dict(zip(self._names, _run(self._b, self._names, feed, "B"), strict=True))
        squares = {name: _squares(values[name]) for name in self._tensors}
        spans = {in_a: _span(values[in_a]) for layer in self.layers for in_a, _ in layer.rounded}
        for place, (layer, sums) in enumerate(zip(self.layers, self.sums, strict=True)):
            sums.reference += squares[layer.a]
            sums.other += float(found[f"{place}.other"])
            sums.difference += float(found[f"{place}.difference"])
            sums.alone += float(found[f"{place}.alone"])
            sums.rounded = [
                (error + float(found[f"{place}.rounded.{slot}"]), total + squares[layer.rounded[slot][0]])
                for slot, (error, total) in enumerate(sums.rounded)
            ]
            sums.spans = [
                (min(low, spans[in_a][0]), max(high, spans[in_a][1]))
                for (low, high), (in_a, _) in zip(sums.spans, layer.rounded, strict=True)
            ]
            largest = float(found[f"{place}.largest"])
            if not (math.isnan(sums.largest) or largest <= sums.largest):  # larger, or the first NaN
                index = np.unravel_index(int(found[f"{place}.place"]), values[layer.a].shape)
                sums.largest, sums.batch = largest, self._batches
                sums.place = tuple(int(axis) for axis in index)
        self._batches += 1
        return (
            {name: values[name] for name in self._a_outputs},
            {name: found[name] for name in self._b_outputs},
        )


def _of_a(layer: Layer) -> list[str]:
    return [layer.a, *(in_a for in_a, _ in layer.rounded)]


def _squares(values: Array) -> float:
    flat = values.ravel()
    return float(np.dot(flat, flat))


def _span(values: Array) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _with_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    from onnx import TensorProto, helper

    result = _copy(model)
    present = {entry.name for entry in result.graph.output}
    result.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in tensors if name not in present
    )
    return result


def _copy(model: onnx.ModelProto) -> Any:
    onnx = require("onnx", "export", "compare models layer by layer")
    result: Any = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.value_info[:]
    return result


def _probe_graph(b: onnx.ModelProto, layers: Sequence[Layer]) -> onnx.ModelProto:
    """B as it is and B layer by layer on A's activations, with sums of squares as outputs."""
    from onnx import TensorProto, helper, numpy_helper

    result = _copy(b)
    graph = result.graph
    constants = constant_tensors(b.graph)
    reference = {layer.b: f"{layer.a}{_REFERENCE}" for layer in layers}
    given = {entry.name for entry in b.graph.input}
    nodes: list[onnx.NodeProto] = list(b.graph.node)
    for node in b.graph.node:
        if all(name in constants for name in node.output):
            continue
        twin = type(node)()
        twin.CopyFrom(node)
        twin.name = f"{node.name}{_ALONE}"
        for slot, name in enumerate(node.input):
            if name and name not in constants and name not in given:
                twin.input[slot] = reference.get(name, f"{name}{_ALONE}")
        for slot, name in enumerate(node.output):
            if name:
                twin.output[slot] = f"{name}{_ALONE}"
        nodes.append(twin)

    def output(kind: str, source: str, name: str, element: int = TensorProto.FLOAT, **attributes: Any) -> None:
        nodes.append(helper.make_node(kind, [source], [name], name=name, **attributes))
        graph.output.append(helper.make_tensor_value_info(name, element, None))

    def difference(first: str, second: str, name: str) -> str:
        nodes.append(helper.make_node("Sub", [first, second], [name], name=name))
        return name

    graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "//flat"))
    for place, layer in enumerate(layers):
        twin_of = f"{layer.a}{_REFERENCE}"
        error = difference(layer.b, twin_of, f"{place}.error")
        output("ReduceSumSquare", layer.b, f"{place}.other", keepdims=0)
        output("ReduceSumSquare", error, f"{place}.difference", keepdims=0)
        size = f"{place}.size"
        nodes.append(helper.make_node("Abs", [error], [size], name=size))
        output("ReduceMax", size, f"{place}.largest", keepdims=0)
        nodes.append(helper.make_node("Reshape", [size, "//flat"], [f"{size}.flat"], name=f"{size}.flat"))
        output("ArgMax", f"{size}.flat", f"{place}.place", TensorProto.INT64, axis=0, keepdims=0)
        own = difference(f"{layer.b}{_ALONE}", twin_of, f"{place}.own")
        output("ReduceSumSquare", own, f"{place}.alone", keepdims=0)
        for slot, (in_a, in_b) in enumerate(layer.rounded):
            read = reference.get(in_b, f"{in_b}{_ALONE}")
            own = difference(read, f"{in_a}{_REFERENCE}", f"{place}.input.{slot}")
            output("ReduceSumSquare", own, f"{place}.rounded.{slot}", keepdims=0)
    needed = {name for node in nodes for name in node.input}
    graph.input.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for name in dict.fromkeys(f"{name}{_REFERENCE}" for layer in layers for name in _of_a(layer))
        if name in needed
    )
    del graph.node[:]
    graph.node.extend(nodes)
    return result


def _session(model: onnx.ModelProto, which: str) -> Any:
    # Without its arena it gives memory back between batches.
    settings = {"log_severity_level": 4, "graph_optimization_level": "ORT_DISABLE_ALL", "enable_cpu_mem_arena": False}
    try:
        return runtimes.session(model, "compare models layer by layer", settings=settings)
    except runtimes.onnxruntime_errors() as exc:
        raise UserError(
            f"ONNX Runtime cannot load model {which} for a comparison layer by layer ({one_line(exc, 'first')}); "
            "compare labels only"
        ) from exc


def _run(session: Any, names: Sequence[str], feed: Mapping[str, Array], which: str) -> list[Array]:
    try:
        found: list[Array] = session.run(list(names), dict(feed))
    except runtimes.onnxruntime_errors() as exc:
        raise UserError(
            f"ONNX Runtime cannot compare the models layer by layer ({which}: {one_line(exc, 'first')}); tensors of "
            "one "
            "name may have different shapes in them, or memory may be short: compare labels only, or smaller crops"
        ) from exc
    return found


# ---------------------------------------------------------------------------- constants


def constant_errors(a: onnx.ModelProto, b: onnx.ModelProto, layers: Sequence[Layer]) -> list[float]:
    """Largest relative RMS error of each layer's constants (kernels, biases); 0 where it has none."""
    values_a = _constants(a, [in_a for layer in layers for in_a, _ in layer.constants])
    values_b = _constants(b, [in_b for layer in layers for _, in_b in layer.constants])

    def error(in_a: str, in_b: str) -> float:
        first, second = values_a[in_a], values_b[in_b]
        if first.shape != second.shape:
            return math.inf
        return ratio(_squares(second - first), _squares(first))

    return [max((error(*pair) for pair in layer.constants), default=0.0) for layer in layers]


def _constants(model: onnx.ModelProto, names: Sequence[str]) -> dict[str, npt.NDArray[np.float64]]:
    """Values of initialisers and of what nodes make of them."""
    stored = initializers(model.graph)
    made = [name for name in dict.fromkeys(names) if name not in stored]
    if made:
        from onnx import helper

        part = _copy(model)
        constants = constant_tensors(model.graph)
        kept = [node for node in model.graph.node if all(name in constants for name in node.output)]
        del part.graph.node[:], part.graph.output[:], part.graph.input[:]
        part.graph.node.extend(kept)
        part.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in made)
        stored.update(zip(made, _run(_session(part, "weights"), made, {}, "weights"), strict=True))
    return {name: np.asarray(stored[name], np.float64) for name in dict.fromkeys(names)}


def quantiser_spans(b: onnx.ModelProto, layers: Sequence[Layer]) -> list[list[tuple[float, float] | None]]:
    """Smallest and largest value that each rounded input's integer quantiser can hold; None for other rounding."""
    made = producers(b.graph)
    stored = initializers(b.graph)

    def span(name: str) -> tuple[float, float] | None:
        node = made.get(name)
        while node is not None and node.op_type == "Cast":
            node = made.get(node.input[0])
        if node is None or node.op_type != "DequantizeLinear" or not {*node.input[1:]} <= set(stored):
            return None
        scale = stored[node.input[1]].astype(np.float64)
        zero = stored[node.input[2]] if len(node.input) > 2 else np.zeros((), np.uint8)
        if scale.size != 1 or not np.issubdtype(zero.dtype, np.integer):
            return None
        limits: Any = np.iinfo(cast(Any, zero.dtype))
        step, middle = float(scale.ravel()[0]), int(zero.ravel()[0])
        return (limits.min - middle) * step, (limits.max - middle) * step

    return [[span(in_b) for _, in_b in layer.rounded] for layer in layers]
