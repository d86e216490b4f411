"""FP16 and BF16 typing of an ONNX graph: precision lives in the file, never in a builder's flag.

The pass walks the graph once and gives every floating-point node one type. Casts appear only where
a tensor goes from one type to the other. Everything is FP16 (or BF16) except

* position attention: trained scores reach 2e7 and FP16 ends at 65504. Both products and the softmax are
  BF16, which has the range of FP32: TensorRT-RTX fuses them into one kernel that stores no scores (see
  :mod:`hpddrnet_trt.graph.attention`, which also puts FP32 scores back, for GPUs without BF16). Labels equal to
  those of FP32 attention, on three datasets: 99.999 % with inputs and weights rounded to BF16, as in the
  fused kernel; 99.994 % with the scores rounded as well, as in kernels of their own;
* the normalisation of the image: see :func:`normalization_nodes`;
* the confidence map, which is an exponential of differences;
* in BF16, the class scores: see :func:`score_nodes`;
* the pooling for the domain guard: see :func:`hpddrnet_trt.graph.domain.domain_nodes`;
* nodes whose weights do not fit into FP16, and those the caller names.

Floating-point inputs and outputs of the graph stay FP32, so the file's contract does not change.
Explicit INT8 and FP8 graphs work as well: the scales of quantise and dequantise nodes become FP16, see :func:`to_half`.

Why not a library: ONNX Runtime's float16 converter with a block list for MatMul and Softmax casts the
scores to FP16 and back *between* the two, where they overflow; it does not know scales either.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.domain import OUTPUT as DOMAIN_OUTPUT
from hpddrnet_trt.core.precisions import Half
from hpddrnet_trt.graph.attention import attentions, in_type
from hpddrnet_trt.graph.domain import domain_nodes
from hpddrnet_trt.graph.nodes import (
    along,
    cast,
    consumers,
    copied,
    enlarges,
    fold_constants,
    initializers,
    int_attribute,
    name_nodes,
    producers,
    replace_nodes,
    store,
    tensor_types,
)

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)

FP16_MAX = 65504.0
# An activation this large on the micrographs tried could pass the end of FP16 on others.
SAFE_RANGE = FP16_MAX / 4
# Of quantise and dequantise nodes. A subnormal FP16 number: its neighbours are 6 % apart, so a scale that is
# rounded up to the next one makes steps at most that much coarser. Raising scales to the smallest
# *normal* number instead would leave channels in four kernels of nasa-super1 with 2 to 8 of 127 steps.
SMALLEST_SCALE = 2.0**-20
_SMALLEST_NORMAL = 2.0**-14
# Convolution and average pooling take BF16 from this version of the ONNX operators on.
_BF16_OPSET = 22
_NORMALIZING = ("Cast", "Sub", "Mul", "Add", "Div", "Concat")
# Inputs that the ONNX standard fixes to FP32 whatever the node's type: Resize's roi and scales.
_ALWAYS_FP32 = {("Resize", 1), ("Resize", 2)}


# ------------------------------------------------------------------------------ typing


def to_half(model: onnx.ModelProto, keep_fp32: Iterable[str] = (), kind: Half = "fp16") -> onnx.ModelProto:
    """A copy of ``model`` in FP16 or BF16 (``kind``), but for what the module names; attention is BF16.

    ``keep_fp32`` names nodes that stay in FP32 besides. Works on plain FP32 graphs and on explicit INT8
    and FP8 graphs (opset 19 and later): there the scales take the type, so that dequantised tensors
    have it. A scale below the smallest normal FP16 number (2^-14) is raised to the next subnormal one
    (2^-20 at least), and weights stored as integers are re-rounded to it (symmetric quantisation is
    assumed: zero points of zero). A BF16 graph is of opset 22 or later, which is where ONNX begins to
    have BF16 convolutions.
    """
    asked = set(keep_fp32)
    result = copied(model)
    if kind == "bf16":
        result = _at_least_opset(result, _BF16_OPSET)
    graph = result.graph
    fold_constants(graph)
    name_nodes(result)
    keep = asked | attention_score_nodes(graph) | normalization_nodes(graph) | domain_nodes(graph)
    if kind == "bf16":
        keep |= score_nodes(graph)
    else:
        _raise_small_scales(graph)
        keep |= _confidence_nodes(graph) | _unfit_nodes(graph)
    keep |= _dequantizing_nodes(graph, keep)
    typing = _Typing(graph, tensor_types(result), keep, kind)
    nodes = [made for node in graph.node for made in typing.convert(node)]
    nodes += typing.cast_outputs(nodes)
    typing.convert_initializers()
    replace_nodes(graph, nodes)
    del graph.value_info[:]
    return in_type(result, "bf16", asked)


def _at_least_opset(model: onnx.ModelProto, version: int) -> onnx.ModelProto:
    from onnx import version_converter

    if any(entry.domain in ("", "ai.onnx") and entry.version < version for entry in model.opset_import):
        return version_converter.convert_version(model, version)
    return model


class _Typing:
    """One walk over the graph in topological order; see :func:`to_half`."""

    def __init__(self, graph: onnx.GraphProto, types: Mapping[str, int], keep: set[str], kind: Half) -> None:
        from onnx import TensorProto

        self.fp32 = int(TensorProto.FLOAT)
        self.half = int(TensorProto.FLOAT16 if kind == "fp16" else TensorProto.BFLOAT16)
        self.graph, self.keep, self.kind = graph, keep, kind
        self.floats = {name for name, kind in types.items() if kind == self.fp32}
        self.weights = {entry.name for entry in graph.initializer} & self.floats
        self.now = {entry.name: self.fp32 for entry in graph.input}  # type of each activation so far
        self.casts: set[str] = set()
        self.reads: dict[str, list[tuple[onnx.NodeProto, int, int]]] = {}  # weight: node, slot, type

    def convert(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """The casts this node needs, then the node itself."""
        want = self.fp32 if node.name in self.keep else self.half
        for slot, name in enumerate(node.input):
            if name not in self.floats or node.op_type == "Cast":
                continue
            kind = self.fp32 if (node.op_type, slot) in _ALWAYS_FP32 else want
            if name in self.weights:
                self.reads.setdefault(name, []).append((node, slot, kind))
            elif self.now[name] != kind:
                node.input[slot] = f"{name}.{'fp32' if kind == self.fp32 else self.kind}"
                if node.input[slot] not in self.casts:
                    self.casts.add(node.input[slot])
                    yield cast(name, node.input[slot], kind)
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == self.fp32:
                attribute.i = want
        self.now.update({name: want for name in node.output if name in self.floats})
        yield node

    def cast_outputs(self, nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """Floating-point outputs of the graph stay FP32."""
        narrow = {entry.name for entry in self.graph.output if self.now.get(entry.name) == self.half}
        for node in nodes:
            for names in (node.input, node.output):
                for place, name in enumerate(names):
                    if name in narrow:
                        names[place] = f"{name}.inner"
        outputs = [entry.name for entry in self.graph.output if entry.name in narrow]
        return [cast(f"{name}.inner", name, self.fp32) for name in outputs]

    def convert_initializers(self) -> None:
        """Weights read in FP16 (BF16) take that type; one read in both types gets a copy."""
        from onnx import helper, numpy_helper

        dtype = helper.tensor_dtype_to_np_dtype(self.half)
        for entry in list(self.graph.initializer):
            reads = self.reads.get(entry.name, [])
            halves = [(node, slot) for node, slot, kind in reads if kind == self.half]
            if not halves:
                continue
            values = numpy_helper.to_array(entry).astype(dtype)
            if len(halves) == len(reads):
                store(entry, values)
                continue
            if any(node.op_type == "QuantizeLinear" for node, _ in halves):
                # What quantises and what dequantises must agree on the scale.
                store(entry, values.astype(np.float32))
            name = f"{entry.name}.{self.kind}"
            self.graph.initializer.append(numpy_helper.from_array(values, name))
            for node, slot in halves:
                node.input[slot] = name


# ------------------------------------------------------------------- what stays in FP32


def attention_score_nodes(graph: onnx.GraphProto) -> set[str]:
    """Names of the nodes of attention whose values do not fit into FP16: its scores, and any softmax."""
    scores = {node.name for attention in attentions(graph.node) for node in attention.scores}
    return scores | {node.name for node in graph.node if node.op_type == "Softmax"}


def normalization_nodes(graph: onnx.GraphProto) -> set[str]:
    """From the image to the first operator that is not elementwise: the normalisation of grey levels.

    It subtracts numbers of one size, which makes rounding errors relatively larger, and every later layer
    sees them; in FP32 it is rounded once, at the end, on few channels. Measured on nasa-super1 (simulated
    rounding, the first 512x512 pixels of all 14 images): the normalised grey levels are off by 0.03 %
    (RMS) instead of 0.08 % in FP16, and 0.002 % of the labels differ from FP32's instead of 0.004 %. In
    BF16 it makes no difference (0.021 % and 0.019 %).
    """
    found: set[str] = set()
    levels = {entry.name for entry in graph.input}
    features: set[str] = set()  # what other operators make of them: a sum with these is no normalisation
    for node in graph.node:
        if node.op_type == "Shape" or (levels | features).isdisjoint(node.input):
            continue
        if node.op_type in _NORMALIZING and features.isdisjoint(node.input):
            found.add(node.name)
            levels.update(node.output)
        else:
            features.update(node.output)
    return found


def _confidence_nodes(graph: onnx.GraphProto) -> set[str]:
    """The nodes that nothing but the confidence map reads, back to a resize if there is one."""
    made, readers = producers(graph), consumers(graph)
    found: set[str] = set()
    frontier = [entry.name for entry in graph.output if entry.name == "confidence"]
    while frontier:
        name = frontier.pop()
        node = made.get(name)
        if node is None or node.op_type == "Resize" or any(reader.name not in found for reader in readers[name]):
            continue
        found.add(node.name)
        frontier.extend(node.input)
    return found


def score_nodes(graph: onnx.GraphProto) -> set[str]:
    """From the classifier's convolution (the last one on the way to each output but the guard's) to the outputs.

    In BF16 these stay in FP32: two classes whose scores differ by less than one part in 256 would tie
    there, and arg-max would give every tie to the first class. Measured on nasa-super1 (14 images,
    simulated rounding): mean IoU against FP32 labels 0.9989 with these in FP32, 0.9988 without, for 0.05 %
    of the multiply-accumulates.
    """
    made = producers(graph)
    found: set[str] = set()
    frontier = [entry.name for entry in graph.output if entry.name != DOMAIN_OUTPUT]
    while frontier:
        node = made.get(frontier.pop())
        if node is not None and node.name not in found:
            found.add(node.name)
            if node.op_type != "Conv" or enlarges(node, made):
                frontier.extend(node.input)
    return found


def _dequantizing_nodes(graph: onnx.GraphProto, keep: set[str]) -> set[str]:
    """Dequantising nodes that only nodes in FP32 read: they give FP32, and stay next to the kernel they belong to.

    A Cast between the two would leave a quantised convolution without its pattern.
    """
    readers = consumers(graph)
    return {
        node.name
        for node in graph.node
        if node.op_type == "DequantizeLinear" and all(reader.name in keep for reader in readers[node.output[0]])
    }


def _unfit_nodes(graph: onnx.GraphProto) -> set[str]:
    """Nodes with a weight beyond the end of FP16."""
    large = {
        name
        for name, values in initializers(graph).items()
        if values.dtype == np.float32 and values.size and float(np.abs(values).max()) > FP16_MAX
    }
    found = {node.name for node in graph.node if large.intersection(node.input)}
    if found:
        logger.warning("weights beyond FP16: these nodes stay in FP32: %s", ", ".join(sorted(found)))
    return found


def large_nodes(graph: onnx.GraphProto, report: Mapping[str, float], limit: float = SAFE_RANGE) -> dict[str, float]:
    """Nodes that write or read a tensor beyond ``limit``, outside what is kept in FP32 anyway, with its peak."""
    kept = attention_score_nodes(graph) | domain_nodes(graph)
    found: dict[str, float] = {}
    for node in graph.node:
        peak = max((report.get(name, 0.0) for name in [*node.input, *node.output]), default=0.0)
        if peak > limit and node.name not in kept:
            found[node.name] = peak
    return found


# ------------------------------------------------------------------------ preparing the graph


def _raise_small_scales(graph: onnx.GraphProto) -> None:
    """Scales of quantise and dequantise nodes that FP16 cannot hold well; see :func:`to_half`."""
    from onnx import numpy_helper

    entries = {entry.name: entry for entry in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    raised: dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]] = {}
    for name in {node.input[1] for node in nodes} & entries.keys():
        old = numpy_helper.to_array(entries[name])
        if old.dtype == np.float32 and (old < _SMALLEST_NORMAL).any():
            raised[name] = old, np.where(old < _SMALLEST_NORMAL, half_scale(old), old)
            store(entries[name], raised[name][1])
    stored = {
        node.input[0]: node
        for node in nodes
        if node.op_type == "DequantizeLinear" and node.input[0] in entries and node.input[1] in raised
    }
    for name, node in stored.items():
        integers = numpy_helper.to_array(entries[name])
        old, new = raised[node.input[1]]
        factor = along(old / new, int_attribute(node, "axis", 1), integers.ndim)
        store(entries[name], np.rint(integers * factor).astype(integers.dtype))
    if raised:
        logger.debug("scales of %d tensors are subnormal FP16 numbers", len(raised))


def half_scale(scales: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The smallest FP16 numbers that are not below ``scales``, and not below :data:`SMALLEST_SCALE`; as float32.

    Scales beyond the end of FP16 come back as they are: :func:`to_half` leaves their nodes in FP32.
    """
    least = np.maximum(scales, np.float32(SMALLEST_SCALE)).astype(np.float32)
    fitting = np.minimum(least, np.float32(FP16_MAX))
    nearest = fitting.astype(np.float16)
    with np.errstate(over="ignore"):  # infinity follows the largest number, and is not taken
        above = np.nextafter(nearest, np.float16(np.inf))
    up = np.where(nearest.astype(np.float32) < fitting, above, nearest)
    return np.where(least > FP16_MAX, least, up.astype(np.float32))
