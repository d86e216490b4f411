"""FP16 typing of an ONNX graph: precision lives in the file, never in a builder's flag.

The pass walks the graph once and gives every floating-point node one type. Casts appear only where
a tensor goes from one type to the other. Everything is FP16 except

* position attention's scores: the product of query and keys and its softmax. Trained scores reach
  5e4 and FP16 ends at 65504, so the product's inputs are cast to FP32 and the softmax's result back;
* the confidence map, which is an exponential of differences;
* nodes whose weights do not fit into FP16, and those the caller names.

The 8-bit input is cast to FP16 directly, which is exact for 0..255. Floating-point inputs and outputs
of the graph stay FP32, so the file's contract does not change. Explicit INT8 graphs work as well: the
scales of quantise and dequantise nodes become FP16, see :func:`to_half`.

Why not a library: ONNX Runtime's float16 converter with a block list for MatMul and Softmax casts the
scores to FP16 and back *between* the two, where they overflow; it does not know scales either.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.deploy.onnx_graph import consumers, initializers, load_model, producers, replace_nodes, save_model
from hpddrnet_trt.errors import UsageError, require
from hpddrnet_trt.manifest import Manifest

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)

FP16_MAX = 65504.0
# An activation this large on the micrographs tried could pass the end of FP16 on others.
SAFE_RANGE = FP16_MAX / 4
# Smallest normal FP16 number; scales below it lose bits.
SMALLEST_SCALE = 2.0**-14
# Inputs that the ONNX standard fixes to FP32 whatever the node's type: Resize's roi and scales.
_ALWAYS_FP32 = {("Resize", 1), ("Resize", 2)}


def convert_precision(
    source: str | Path,
    target: str | Path,
    precision: Literal["fp16", "fp32"] = "fp16",
    *,
    keep_fp32: Iterable[str] = (),
    images: Sequence[Path] = (),
) -> Manifest:
    """Write ``source`` (an FP32 file of this package) to ``target`` in ``precision``.

    ``keep_fp32`` names further nodes to leave in FP32. With ``images`` (micrographs) the FP32 graph is
    run on them first, and nodes whose values come near the end of FP16 stay in FP32 as well. The
    result is run on ONNX Runtime and its labels compared with those of ``source``; that runtime
    computes FP16 graphs in FP32 on a CPU, so it proves the graph, not FP16's rounding. Raises
    :class:`UsageError` for a source that is not FP32 or an unknown node name, :class:`UserError` when
    the converted graph does not run or gives other labels.
    """
    if precision not in ("fp16", "fp32"):
        raise UsageError(f"unknown precision {precision!r}; choose fp16 or fp32 (INT8 comes from calibration)")
    model, manifest = load_model(source)
    if manifest.precision != "fp32":
        raise UsageError(f"{source} is {manifest.precision}, conversion needs an FP32 file; give the exported one")
    if precision == "fp32":
        save_model(model, target, manifest)
        return manifest
    keep = set(keep_fp32)
    if unknown := keep - {node.name for node in model.graph.node}:
        raise UsageError(f"{source} has no node called {', '.join(sorted(unknown))}; nodes to keep must exist")
    remarks = list(manifest.remarks)
    if images:
        report = fp16_range_report(model, manifest, images)
        for name, peak in large_nodes(model.graph, report).items():
            keep.add(name)
            remarks.append(f"{name} stays in FP32: its values reach {peak:.3g}")
    from hpddrnet_trt.deploy.verify import compare_graphs

    half = to_half(model, keep)
    evidence = compare_graphs(half, model, manifest, images, what="conversion to FP16")
    manifest = manifest.replace(precision="fp16", remarks=remarks, evidence=[*manifest.evidence, evidence])
    save_model(half, target, manifest)
    return manifest


# ------------------------------------------------------------------------------ typing


def to_half(model: onnx.ModelProto, keep_fp32: Iterable[str] = ()) -> onnx.ModelProto:
    """A copy of ``model`` in FP16 with the FP32 islands that the module describes.

    Works on plain FP32 graphs and on explicit INT8 graphs (opset 19 and later): there the scales
    become FP16, so that dequantised tensors are FP16. A scale below the smallest normal FP16 number
    (2^-14) is raised to it; weights stored as integers are re-rounded to the raised scale, which
    moves each by at most half a step of 2^-14, and an activation keeps its values in fewer steps
    (symmetric quantisation is assumed: zero points of zero).
    """
    onnx = require("onnx", "export", "convert ONNX files to FP16")
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    _constants_to_initializers(graph)
    _name_nodes(graph)
    _raise_small_scales(graph)
    keep = set(keep_fp32) | attention_score_nodes(graph) | _confidence_nodes(graph) | _unfit_nodes(graph)
    typing = _Typing(graph, tensor_types(result), keep)
    nodes = [made for node in graph.node for made in typing.convert(node)]
    nodes += typing.cast_outputs(nodes)
    typing.convert_initializers()
    replace_nodes(graph, nodes)
    del graph.value_info[:]
    return result


class _Typing:
    """One walk over the graph in topological order; see :func:`to_half`."""

    def __init__(self, graph: onnx.GraphProto, types: Mapping[str, int], keep: set[str]) -> None:
        from onnx import TensorProto

        self.fp32, self.fp16 = int(TensorProto.FLOAT), int(TensorProto.FLOAT16)
        self.graph, self.keep = graph, keep
        self.floats = {name for name, kind in types.items() if kind == self.fp32}
        self.weights = {entry.name for entry in graph.initializer} & self.floats
        self.now = {entry.name: self.fp32 for entry in graph.input}  # type of each activation so far
        self.casts: set[str] = set()
        self.reads: dict[str, list[tuple[onnx.NodeProto, int, int]]] = {}  # weight: node, slot, type

    def convert(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """The casts this node needs, then the node itself."""
        want = self.fp32 if node.name in self.keep else self.fp16
        for slot, name in enumerate(node.input):
            if name not in self.floats or node.op_type == "Cast":
                continue
            kind = self.fp32 if (node.op_type, slot) in _ALWAYS_FP32 else want
            if name in self.weights:
                self.reads.setdefault(name, []).append((node, slot, kind))
            elif self.now[name] != kind:
                node.input[slot] = f"{name}.{'fp32' if kind == self.fp32 else 'fp16'}"
                if node.input[slot] not in self.casts:
                    self.casts.add(node.input[slot])
                    yield _cast(name, node.input[slot], kind)
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == self.fp32:
                attribute.i = want
        self.now.update({name: want for name in node.output if name in self.floats})
        yield node

    def cast_outputs(self, nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """Floating-point outputs of the graph stay FP32."""
        made = []
        for entry in self.graph.output:
            if self.now.get(entry.name) != self.fp16:
                continue
            inner = f"{entry.name}.inner"
            for node in nodes:
                _rename(node.input, entry.name, inner)
                _rename(node.output, entry.name, inner)
            made.append(_cast(inner, entry.name, self.fp32))
        return made

    def convert_initializers(self) -> None:
        """Weights read in FP16 become FP16; one read in both types gets a copy."""
        from onnx import numpy_helper

        for entry in list(self.graph.initializer):
            reads = self.reads.get(entry.name, [])
            halves = [(node, slot) for node, slot, kind in reads if kind == self.fp16]
            if not halves:
                continue
            both = len(halves) < len(reads)
            name = f"{entry.name}.fp16" if both else entry.name
            half = numpy_helper.from_array(numpy_helper.to_array(entry).astype(np.float16), name)
            if not both:
                entry.CopyFrom(half)
                continue
            self.graph.initializer.append(half)
            for node, slot in halves:
                node.input[slot] = name


def _cast(source: str, target: str, kind: int) -> onnx.NodeProto:
    from onnx import helper

    return helper.make_node("Cast", [source], [target], f"{target}/Cast", to=kind)


def _rename(names: Any, old: str, new: str) -> None:
    for index, name in enumerate(names):
        if name == old:
            names[index] = new


def tensor_types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every tensor, initialisers included."""
    from onnx import shape_inference

    graph = shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {entry.name: int(entry.data_type) for entry in graph.initializer}
    for entry in [*graph.value_info, *graph.input, *graph.output]:
        types[entry.name] = int(entry.type.tensor_type.elem_type)
    return types


# ------------------------------------------------------------------- what stays in FP32


def attention_score_nodes(graph: onnx.GraphProto) -> set[str]:
    """Names of the nodes of position attention whose values do not fit into FP16.

    Every Softmax with the matrix product before it and what lies between the two, and every Attention
    operator as a whole.
    """
    made = producers(graph)
    found = set()
    for node in graph.node:
        if node.op_type == "Attention":
            found.add(node.name)
        elif node.op_type == "Softmax":
            found.add(node.name)
            before: onnx.NodeProto | None = node
            while before is not None and before.op_type != "MatMul":
                before = next((made[name] for name in before.input if name in made), None)
                if before is not None:
                    found.add(before.name)
    return found


def _confidence_nodes(graph: onnx.GraphProto) -> set[str]:
    """From the resize on, the nodes that nothing but the confidence map reads."""
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


def fp16_range_report(model: onnx.ModelProto, manifest: Manifest, images: Sequence[Path]) -> dict[str, float]:
    """Largest absolute value of every floating-point activation of an FP32 graph over micrographs.

    The images are run at the model's own size, or in crops of 512 pixels where it is dynamic.
    """
    from onnx import TensorProto

    from hpddrnet_trt.deploy.calibration_data import batches, crop_size, plan_crops
    from hpddrnet_trt.deploy.ranges import observe
    from hpddrnet_trt.engines.base import input_contract

    contract = input_contract(manifest)
    types = tensor_types(model)
    tensors = [name for name in producers(model.graph) if types.get(name) == TensorProto.FLOAT]
    height, width = crop_size(contract, None)
    crops = plan_crops(images, height, width)
    ranges = observe(
        model, tensors, lambda: batches(crops, height, width, contract, manifest.normalisation), "minmax"
    )  # fmt: skip
    return {name: max(abs(low), abs(high)) for name, (low, high) in ranges.items()}


def large_nodes(graph: onnx.GraphProto, report: Mapping[str, float], limit: float = SAFE_RANGE) -> dict[str, float]:
    """Nodes that write or read a tensor beyond ``limit``, outside the attention's scores, with its peak."""
    island = attention_score_nodes(graph)
    found: dict[str, float] = {}
    for node in graph.node:
        peak = max((report.get(name, 0.0) for name in [*node.input, *node.output]), default=0.0)
        if peak > limit and node.name not in island:
            found[node.name] = peak
    return found


# ------------------------------------------------------------------------ preparing the graph


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    from onnx import numpy_helper

    kept = []
    for node in graph.node:
        value = next((entry.t for entry in node.attribute if entry.name == "value"), None)
        if node.op_type == "Constant" and value is not None:
            graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(value), node.output[0]))
        else:
            kept.append(node)
    replace_nodes(graph, kept)


def _name_nodes(graph: onnx.GraphProto) -> None:
    seen: set[str] = set()
    for index, node in enumerate(graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{index}"
        seen.add(node.name)


def _raise_small_scales(graph: onnx.GraphProto) -> None:
    """Scales of quantise and dequantise nodes that FP16 cannot hold well; see :func:`to_half`."""
    from onnx import numpy_helper

    entries = {entry.name: entry for entry in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    raised: dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]] = {}
    for name in {node.input[1] for node in nodes} & entries.keys():
        old = numpy_helper.to_array(entries[name])
        if old.dtype == np.float32 and (old < SMALLEST_SCALE).any():
            raised[name] = old, np.maximum(old, np.float32(SMALLEST_SCALE))
            entries[name].CopyFrom(numpy_helper.from_array(raised[name][1], name))
    stored = {
        node.input[0]: node
        for node in nodes
        if node.op_type == "DequantizeLinear" and node.input[0] in entries and node.input[1] in raised
    }
    for name, node in stored.items():
        integers = numpy_helper.to_array(entries[name])
        old, new = raised[node.input[1]]
        shape = [1] * integers.ndim
        if old.ndim:
            shape[next((entry.i for entry in node.attribute if entry.name == "axis"), 1)] = -1
        rounded = np.rint(integers * (old / new).reshape(shape)).astype(integers.dtype)
        entries[name].CopyFrom(numpy_helper.from_array(rounded, name))
    if raised:
        logger.info("%d scales below the smallest normal FP16 number were raised to it", len(raised))
