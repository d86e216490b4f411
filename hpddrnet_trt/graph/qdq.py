"""Where quantise/dequantise pairs go, for TensorRT and for ONNX Runtime's CPU kernels.

ONNX Runtime's quantiser rewrites the graph; this module decides what it may touch, and
:mod:`hpddrnet_trt.graph.lint` proves that the result follows the rules.

TensorRT: symmetric INT8 (or FP8), one scale per output channel for weights and one per tensor for
activations. The rules, from "Working with Quantized Types" (explicit quantization: TensorRT
processing of Q/DQ networks; Q/DQ layer-placement recommendations) of NVIDIA's guide, TensorRT 10 and
11, and from answers of its developers:

1. Both inputs of every weighted operation get a pair; its output does not, so that batch
   normalisation, ReLU and sum are taken into its kernel ("quantize all inputs of weighted
   operations; by default, do not quantize the outputs").
2. Where a sum follows a convolution, its other operand gets a pair: the precision of that operand
   decides whether the fused kernel can write INT8 ("quantize the residual inputs in
   skip-connections"; NVIDIA/TensorRT issues 1992 and 3270). The convolution's own operand stays bare.
3. What comes out of such a kernel is written once, in INT8: the pair stands behind the ReLU when the
   ReLU alone reads the sum, on the sum itself otherwise. The last sum of a stage of both branches is
   read by a ReLU and by the other branch or the attention; in floating point it would leave the
   kernel unquantised, beside an INT8 operand.
4. Operations without weights run in INT8 only with INT8 on both sides, so a pair on their inputs
   calls for one on their output: average pooling of an INT8 map, and the sum of an INT8 map with an
   upsampled one. A quantisation moves up through a resize on its own (issue 2976), so the resize's
   input gets none. Where a build leaves that resize in floating point, nothing is lost but speed.
5. ReLU, resize and maximum pooling do not change the scale: their INT8 input and output share one. (Nor
   does concatenation, which no pair of ours surrounds.)
6. Biases are never quantised.

In floating point stay: position attention (its scores do not fit into 8 bits; the convolution before
it is quantised), the convolution that enlarges the class scores (it interpolates), channel attention
and every convolution on a 1x1 map (global means: they cost nothing and weigh on every pixel), and what
lies between the inputs and outputs of the pyramid pooling (sums of resized maps, concatenation): its
maps are 1/64 of the image, each is read by a sum and by the concatenation, so that INT8 would need
both outputs or more pairs than it saves.

Measured on nasa-super1 (calibrated on train; labels against FP32 on the four 512x512 crops of val and
test): convolution inputs and projected shortcuts only: agreement 0.99857, mean IoU 0.9910; with rules
3 to 5: 0.99856 and 0.9915; with the whole pyramid in INT8 as well: 0.99859 and 0.9919. Leaving out
two of the ten calibration images changes these by 0.0001 and 0.001, so the three are equal. The first
and last convolution in floating point as well change no more than that (0.9988 against 0.9987 on val), so
they are quantised.

ONNX Runtime on a CPU: asymmetric uint8 activations and int8 weights for convolutions and the ReLUs
behind them. Weights use 7 bits: without VNNI instructions its kernels add two uint8 x int8 products
in a 16-bit register, which saturates for full-range weights (2 * 255 * 127 > 32767) and would give
other labels on older computers; 2 * 255 * 64 always fits. Convolutions on 1x1 maps stay in floating
point here too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from hpddrnet_trt.core.precisions import LowPrecision
from hpddrnet_trt.core.quiet import quiet
from hpddrnet_trt.core.runtimes import load_onnxruntime
from hpddrnet_trt.graph.fp8 import suits_fp8, to_fp8
from hpddrnet_trt.graph.nodes import consumers, copied, enlarges, producers, replace_nodes

Runtime = Literal["tensorrt", "onnxruntime"]
Range = tuple[float, float]  # lowest and highest value to represent
# Wider sets (residual sums, pooling, concatenation, resizing) were measured: no faster, less exact.
_CPU_OPERATORS = ("Conv", "Relu")


@dataclass(frozen=True)
class Plan:
    """What is quantised, by name: nodes, the activations whose ranges are needed, pairs, common scales."""

    operators: tuple[str, ...]
    nodes: tuple[str, ...]
    tensors: tuple[str, ...]
    shortcuts: tuple[str, ...] = ()  # activations that get a pair beyond what the nodes ask for
    shared: tuple[tuple[str, ...], ...] = ()  # activations on one scale


class _Graph:
    """Look-ups over an ONNX graph with inferred shapes."""

    def __init__(self, model: Any) -> None:
        import onnx

        graph = onnx.shape_inference.infer_shapes(model).graph
        self.nodes = list(graph.node)
        self.constants = {entry.name: list(entry.dims) for entry in graph.initializer}
        self.producer = producers(graph)
        self.readers = consumers(graph)
        self._types = {entry.name: entry.type.tensor_type for entry in [*graph.value_info, *graph.input, *graph.output]}

    def is_feature_map(self, name: str) -> bool:
        """A float32 activation ``[N, C, h, w]`` that is not known to be 1x1."""
        import onnx

        kind = self._types.get(name)
        if kind is None or kind.elem_type != onnx.TensorProto.FLOAT:
            return False
        sizes = [axis.dim_value for axis in kind.shape.dim]  # 0 where dynamic
        return len(sizes) == 4 and sizes[2:] != [1, 1]

    def data_readers(self, name: str) -> list[Any]:
        """The nodes that read the values of a tensor, not only its shape."""
        return [node for node in self.readers[name] if node.op_type != "Shape"]

    def is_left_out(self, node: Any, names: Collection[str]) -> bool:
        """Whether ``node`` is one of :meth:`convolutions` without being in ``names``."""
        return self.is_map_convolution(node.output[0]) and node.name not in names

    def is_map_convolution(self, name: str) -> bool:
        """Whether a tensor is the result of one of :meth:`convolutions`."""
        node = self.producer.get(name)
        return (
            node is not None
            and node.op_type == "Conv"
            and node.input[1] in self.constants
            and not enlarges(node, self.producer)
            and self.is_feature_map(node.input[0])
        )

    def convolutions(self) -> list[Any]:
        """Convolutions of feature maps with constant kernels."""
        return [node for node in self.nodes if self.is_map_convolution(node.output[0])]


class _Low(NamedTuple):
    """What sets a low precision apart from INT8, whose rules and pairs the others start from."""

    suits: Callable[[Any, Sequence[int]], bool] | None = None  # a convolution and the shape of its kernel
    retyped: Callable[[Any, Any], Any] | None = None  # the graph with INT8 pairs, and the float graph


_LOW: dict[LowPrecision, _Low] = {"int8": _Low(), "fp8": _Low(suits_fp8, to_fp8)}


def plan(model: Any, runtime: Runtime, precision: LowPrecision = "int8") -> Plan:
    """Decide what to quantise in a float ``ModelProto`` whose nodes are named."""
    graph = _Graph(model)
    full, suits = _plan(graph, runtime), _LOW[precision].suits
    if suits is None:
        return full
    convolutions = [node for node in graph.convolutions() if node.name in full.nodes]
    return _plan(graph, runtime, {node.name for node in convolutions if suits(node, graph.constants[node.input[1]])})


def _plan(graph: _Graph, runtime: Runtime, only: Collection[str] | None = None) -> Plan:
    return _tensorrt_plan(graph, only) if runtime == "tensorrt" else _cpu_plan(graph, only)


def subset(model: Any, runtime: Runtime, convolutions: Collection[str]) -> Plan:
    """The plan with only these convolutions quantised, for mixed precision.

    Its nodes and tensors are among those of :func:`plan`, so ranges observed for the full plan serve
    every subset. Pairs that only served the convolutions left out are dropped. Raises
    :class:`ValueError` for a name that the full plan does not quantise.
    """
    graph = _Graph(model)
    wanted = set(convolutions)
    full = _plan(graph, runtime)
    if unknown := wanted - {node.name for node in graph.convolutions() if node.name in full.nodes}:
        raise ValueError(f"the plan quantises no convolution called {', '.join(sorted(unknown))}")
    return _plan(graph, runtime, wanted)


def _tensorrt_plan(graph: _Graph, only: Collection[str] | None = None) -> Plan:
    nodes = [node for node in graph.convolutions() if only is None or node.name in only]
    names = {node.name for node in nodes}
    inputs = [node.input[0] for node in nodes]
    pairs: dict[str, None] = {}
    paired = set(inputs)
    for node in graph.nodes:  # rules 2 and 3
        closing = _closing(graph, node)
        if closing is None or graph.producer[closing].name not in names:
            continue
        other, tail = next(name for name in node.input if name != closing), _tail(graph, node)
        # A sum that only convolutions in floating point read stays as exact as they are, unless its
        # other operand is INT8 anyway.
        if other in paired or not all(graph.is_left_out(reader, names) for reader in graph.data_readers(tail)):
            pairs.update(dict.fromkeys((other, tail)))
            paired.update((other, tail))
    for node in graph.nodes:  # in topological order: a pair set here is seen by the nodes behind
        added = _weightless(graph, node, paired)
        pairs.update(dict.fromkeys(added))
        paired.update(added)
    shared = [
        (node.input[0], node.output[0])
        for node in graph.nodes
        if node.op_type in _ONE_SCALE and {node.input[0], node.output[0]} <= paired  # rule 5
    ]
    tensors = dict.fromkeys([*inputs, *pairs])
    return Plan(("Conv",), tuple(node.name for node in nodes), tuple(tensors), tuple(pairs), _joined(shared))


# Operators whose INT8 input and output are on one scale.
_ONE_SCALE = ("Relu", "Resize", "MaxPool")


def _closing(graph: _Graph, node: Any) -> str | None:
    """The operand of a sum that the convolution before it computes for this sum alone.

    That convolution takes the sum into its own kernel, so its result must not be rounded before it.
    Of two convolutions it is the one on the main path: a projected shortcut reads the block's input,
    which the main path reads too.
    """
    if node.op_type != "Add" or len(set(node.input)) < 2 or graph.constants.keys() & set(node.input):
        return None
    candidates = [name for name in node.input if graph.is_map_convolution(name) and len(graph.data_readers(name)) == 1]
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    main = [name for name in candidates if len(graph.data_readers(graph.producer[name].input[0])) == 1]
    return str(main[0] if len(main) == 1 else candidates[0])


def _tail(graph: _Graph, node: Any) -> str:
    """What the kernel that takes in the sum ``node`` writes: the ReLU's output where only that reads the sum."""
    readers = graph.data_readers(node.output[0])
    return str(readers[0].output[0] if [reader.op_type for reader in readers] == ["Relu"] else node.output[0])


def _weightless(graph: _Graph, node: Any, paired: Collection[str]) -> list[str]:
    """Tensors that need a pair so that this operation without weights runs in INT8 (rule 4)."""
    if not any(name in paired for name in node.input):
        return []
    if node.op_type == "AveragePool" and _ends_quantized(graph, node.output[0], paired):
        return [node.output[0]]
    if node.op_type == "Add" and _ends_quantized(graph, node.output[0], paired):
        resized = [name for name in node.input if name in graph.producer and graph.producer[name].op_type == "Resize"]
        return [name for name in resized if name not in paired and len(graph.data_readers(name)) == 1]
    return []


def _ends_quantized(graph: _Graph, name: str, paired: Collection[str]) -> bool:
    """Whether a tensor, normalised and rectified at most, reaches a pair and nothing else."""
    while name not in paired:
        readers = graph.data_readers(name)
        if len(readers) != 1 or readers[0].op_type not in ("Relu", "BatchNormalization"):
            return False
        name = readers[0].output[0]
    return True


def _joined(groups: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """Groups with a member in common become one."""
    joined: list[dict[str, None]] = []
    for group in groups:
        touching = [known for known in joined if not known.keys().isdisjoint(group)]
        joined = [known for known in joined if known not in touching]
        joined.append({name: None for known in [*touching, dict.fromkeys(group)] for name in known})
    return tuple(tuple(group) for group in joined)


def share_ranges(chosen: Plan, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """``ranges`` with the widest of each group of ``chosen.shared`` for all its members."""
    result = dict(ranges)
    for group in chosen.shared:
        widest = min(ranges[name][0] for name in group), max(ranges[name][1] for name in group)
        result.update(dict.fromkeys(group, widest))
    return result


def _cpu_plan(graph: _Graph, only: Collection[str] | None = None) -> Plan:
    # Both ends stay in floating point, which costs no measurable time. The first convolution of a network
    # whose three channels have means of their own sees the grey levels and a constant channel, whose
    # weights differ by far; the last one gives the scores, whose differences between classes may be small.
    # nasa-super1 is no such network: 99.90 % of its labels equal FP32's with either of the two quantised or
    # none (calibrated on train; the first 512x512 pixels of the four images of val and test).
    full = {node.name for node in graph.convolutions()[1:-1]}
    convolutions = full if only is None else full.intersection(only)

    def wanted(node: Any) -> bool:
        if node.op_type == "Conv":
            return node.name in convolutions
        if node.op_type not in _CPU_OPERATORS or not all(graph.is_feature_map(name) for name in node.input):
            return False
        # A ReLU goes with its convolutions: where all beside it are left out, a pair would only cost.
        neighbours = [graph.producer.get(node.input[0], node), *graph.readers[node.output[0]]]
        beside = full.intersection(other.name for other in neighbours)
        return not beside or not beside.isdisjoint(convolutions)

    nodes = [node for node in graph.nodes if wanted(node)]
    tensors = dict.fromkeys(
        name for node in nodes for name in [*node.input, *node.output] if name not in graph.constants
    )
    return Plan(_CPU_OPERATORS, tuple(node.name for node in nodes), tuple(tensors))


def quantize(
    model: Any, runtime: Runtime, chosen: Plan, ranges: Mapping[str, Range], precision: LowPrecision = "int8"
) -> Any:
    """A new ``ModelProto`` with the pairs in place; ``ranges`` holds every tensor of the plan.

    A plan without nodes gives a copy.
    """
    load_onnxruntime("quantise models")
    from onnxruntime.quantization import QDQQuantizer, QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData

    source = copied(model)
    if not chosen.nodes:  # to the quantiser an empty list means every node
        return source
    limits = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high))
        for name, (low, high) in share_ranges(chosen, ranges).items()
    }
    tensorrt = runtime == "tensorrt"
    options: dict[str, Any] = {"WeightSymmetric": True}
    if tensorrt:
        options |= {
            "ActivationSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": ["Conv"],
        }
    # Its remarks (no preprocessing, biases adjusted) go through the root logger.
    with quiet("", hints=[""], module=r"onnxruntime\.quantization"):
        quantizer = QDQQuantizer(
            source,
            per_channel=True,
            reduce_range=not tensorrt,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QInt8 if tensorrt else QuantType.QUInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, limits),
            nodes_to_quantize=list(chosen.nodes),
            nodes_to_exclude=[],
            op_types_to_quantize=list(chosen.operators),
            extra_options=options,
        )
        for name in chosen.shortcuts:
            quantizer.quantize_activation_tensor(name)
        result = quantizer.quantize_model()
    replace_nodes(result.graph, result.graph.node)  # the quantiser appends its nodes at the end
    del result.graph.value_info[:]  # shapes and types of the float graph
    retyped = _LOW[precision].retyped
    return result if retyped is None else retyped(result, model)


def count_convolutions(model: Any) -> tuple[int, int]:
    """(quantised, all) convolutions of the network; quantised are those with dequantised image and kernel."""
    dequantized = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    made = producers(model.graph)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv" and not enlarges(node, made)]
    return sum(set(node.input[:2]) <= dequantized for node in convolutions), len(convolutions)
