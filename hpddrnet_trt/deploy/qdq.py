"""Where quantise/dequantise pairs go, for TensorRT and for ONNX Runtime's CPU kernels.

ONNX Runtime's quantiser rewrites the graph; this module decides what it may touch.

TensorRT (NVIDIA's guide, "Working with quantized types", explicit quantisation): symmetric INT8,
one scale per output channel for weights and one per tensor for activations, in front of every
convolution, and on the shortcut of a residual sum, so that convolution, sum and ReLU can become one
INT8 kernel. Biases, attention, channel attention, pooling and upsampling stay in floating point.

ONNX Runtime on a CPU: asymmetric uint8 activations and int8 weights for convolutions and the ReLUs
behind them. Weights use 7 bits: without VNNI instructions its kernels add two uint8 x int8 products
in a 16-bit register, which saturates for full-range weights (2 * 255 * 127 > 32767) and would give
other labels on older computers; 2 * 255 * 64 always fits.

Convolutions on 1x1 maps (global means: channel attention, the last pyramid scale) stay in floating
point in both forms: they cost nothing and weigh on every pixel.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hpddrnet_trt.deploy.onnx_graph import consumers, producers, replace_nodes
from hpddrnet_trt.deploy.ranges import Range

Form = Literal["tensorrt", "onnxruntime"]
# Wider sets (residual sums, pooling, concatenation, resizing) were measured: no faster, less exact.
_CPU_OPERATORS = ("Conv", "Relu")


@dataclass(frozen=True)
class Plan:
    """What is quantised, by name: nodes, the activations whose ranges are needed, shortcuts."""

    operators: tuple[str, ...]
    nodes: tuple[str, ...]
    tensors: tuple[str, ...]
    shortcuts: tuple[str, ...] = ()  # activations that get a pair beyond what the nodes ask for


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

    def convolutions(self) -> list[Any]:
        """Convolutions of feature maps with constant kernels."""
        return [
            node
            for node in self.nodes
            if node.op_type == "Conv" and node.input[1] in self.constants and self.is_feature_map(node.input[0])
        ]


def name_nodes(model: Any) -> None:
    """Give every node a name of its own (the quantiser selects by name)."""
    seen: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{index}"
        seen.add(node.name)


def plan(model: Any, form: Form) -> Plan:
    """Decide what to quantise in a float ``ModelProto`` whose nodes are named."""
    graph = _Graph(model)
    return _tensorrt_plan(graph) if form == "tensorrt" else _cpu_plan(graph)


def _tensorrt_plan(graph: _Graph) -> Plan:
    nodes = graph.convolutions()
    shortcuts = [name for node in graph.nodes if (name := _shortcut(graph, node)) is not None]
    tensors = dict.fromkeys([*(node.input[0] for node in nodes), *shortcuts])
    return Plan(("Conv",), tuple(node.name for node in nodes), tuple(tensors), tuple(shortcuts))


def _shortcut(graph: _Graph, node: Any) -> str | None:
    """Where two convolutions meet in a sum, the one off the main path.

    The other one takes the sum into its own kernel and must not be rounded before it. An identity
    shortcut needs nothing: it is the block's input, which is quantised for the convolution after it.
    """
    if node.op_type != "Add":
        return None
    producers = [graph.producer.get(name) for name in node.input]
    if any(producer is None or producer.op_type != "Conv" for producer in producers):
        return None
    # A projected shortcut reads the block's input, which the main path reads too.
    forks = [
        name
        for name, producer in zip(node.input, producers, strict=True)
        if producer is not None and len(graph.readers[producer.input[0]]) > 1
    ]
    return str(forks[0] if len(forks) == 1 else node.input[1])


def _cpu_plan(graph: _Graph) -> Plan:
    # Both ends stay in floating point, which costs no measurable time. The first convolution sees the
    # grey levels and a constant channel, whose weights differ by far: 7 bits cost 0.3 % of the labels
    # there. The last one gives the scores: 8 bits would round away small differences between classes.
    convolutions = {node.name for node in graph.convolutions()[1:-1]}

    def wanted(node: Any) -> bool:
        if node.op_type == "Conv":
            return node.name in convolutions
        return node.op_type in _CPU_OPERATORS and all(graph.is_feature_map(name) for name in node.input)

    nodes = [node for node in graph.nodes if wanted(node)]
    tensors = dict.fromkeys(
        name for node in nodes for name in [*node.input, *node.output] if name not in graph.constants
    )
    return Plan(_CPU_OPERATORS, tuple(node.name for node in nodes), tuple(tensors))


def quantise(model: Any, form: Form, chosen: Plan, ranges: Mapping[str, Range]) -> Any:
    """A new ``ModelProto`` with the pairs in place; ``ranges`` holds every tensor of the plan."""
    import onnx
    from onnxruntime.quantization import QDQQuantizer, QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData

    source = onnx.ModelProto()
    source.CopyFrom(model)
    limits = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()
    }
    tensorrt = form == "tensorrt"
    options: dict[str, Any] = {"WeightSymmetric": True}
    if tensorrt:
        options |= {
            "ActivationSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": ["Conv"],
        }
    with _quiet():
        quantiser = QDQQuantizer(
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
            quantiser.quantize_activation_tensor(name)
        result = quantiser.quantize_model()
    replace_nodes(result.graph, result.graph.node)  # the quantiser appends its nodes at the end
    del result.graph.value_info[:]  # shapes and types of the float graph
    return result


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser's remarks (no preprocessing, biases adjusted) go through the root logger: hold them back."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"onnxruntime\.quantization")
            yield
    finally:
        root.setLevel(level)


def count_convolutions(model: Any) -> tuple[int, int]:
    """(quantised, all) convolutions; one counts as quantised when image and kernel are both dequantised."""
    dequantised = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    return sum(set(node.input[:2]) <= dequantised for node in convolutions), len(convolutions)
