"""ONNX files of this package: reading, writing, and the small graph queries the passes share."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import UsageError, UserError, require
from hpddrnet_trt.core.files import atomic_path
from hpddrnet_trt.core.manifest import METADATA_KEY, Manifest, read_manifest
from hpddrnet_trt.graph.attention import as_function, expanded
from hpddrnet_trt.graph.check import check_onnx, load_graph

if TYPE_CHECKING:
    import onnx


def load_model(path: str | Path) -> tuple[onnx.ModelProto, Manifest]:
    """Read an ONNX file of this package and its description; functions are written out as their operators.

    Raises :class:`~hpddrnet_trt.core.errors.BadInputFile` for a damaged or foreign file.
    """
    manifest = read_manifest(path)
    check_onnx(Path(path))
    model = load_graph(Path(path))
    return expanded(model) if model.functions else model, manifest


def save_model(model: onnx.ModelProto, target: str | Path, manifest: Manifest) -> Path:
    """Check ``model``, put ``manifest`` into its ``metadata_props`` and write one self-contained file.

    Position attention becomes a function where the manifest says so. The file appears complete or not at
    all. ``model`` itself is changed (its metadata).
    """
    onnx = require("onnx", "export", "write ONNX files")
    if manifest.attention == "function" and not model.functions:
        model = as_function(model)
    del model.metadata_props[:]
    model.metadata_props.add(key=METADATA_KEY, value=manifest.to_json())
    model.producer_name = "hpddrnet-trt"
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
        raise UserError(f"the graph meant for {target} is not valid ONNX ({exc}); please report this") from exc
    with atomic_path(target) as temporary:
        onnx.save(model, str(temporary))
    return Path(target)


def check_target(source: str | Path, target: str | Path) -> None:
    """Raise :class:`UsageError` unless ``target`` may hold what a pass makes of the FP32 file ``source``."""
    source, target = Path(source), Path(target)
    if target.suffix.lower() != ".onnx":
        raise UsageError(f"the ONNX file to write, {target}, must end with .onnx; write {target.with_suffix('.onnx')}")
    if source.resolve() == target.resolve():
        raise UsageError(f"{target} would overwrite the FP32 model it is made from; choose another output path")


def producers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Tensor name to the node that makes it."""
    return {name: node for node in graph.node for name in node.output if name}


def consumers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """Tensor name to the nodes that read it."""
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            readers[name].append(node)
    return readers


def class_scores(graph: onnx.GraphProto) -> str:
    """Name of the class scores at low resolution: what the graph's first output is enlarged from.

    Raises :class:`UserError` for a graph that enlarges nothing.
    """
    made = producers(graph)
    frontier = [graph.output[0].name]
    while frontier:
        node = made.get(frontier.pop(0))
        if node is None:
            continue
        if node.op_type == "Resize":
            return node.input[0]
        if enlarges(node, made):
            return made[node.input[0]].input[0]
        frontier.extend(node.input)
    raise UserError("the graph enlarges no class scores; export the model again")


def enlarges(node: onnx.NodeProto, made: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether a node is the convolution that enlarges the scores (``Phases`` of :mod:`.reformulate`).

    It is the only one that repeats the outermost pixels at the border. Its weights are interpolation weights, so it
    is no part of the network to quantise. ``made``: :func:`producers`.
    """
    before = made.get(node.input[0]) if node.op_type == "Conv" else None
    return before is not None and before.op_type == "Pad"


def initializers(graph: onnx.GraphProto) -> dict[str, npt.NDArray[np.generic]]:
    """Initialiser name to its values."""
    from onnx import numpy_helper

    return {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}


def int_attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    """An integer attribute of a node, or the operator's default."""
    return next((int(entry.i) for entry in node.attribute if entry.name == name), default)


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Give the graph these nodes, in topological order; drop nodes and initialisers nothing reads."""
    ordered = _live(graph, _sorted(graph, list(nodes)))
    del graph.node[:]
    graph.node.extend(ordered)
    used = {name for node in ordered for name in node.input} | {entry.name for entry in graph.output}
    kept = [entry for entry in graph.initializer if entry.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _sorted(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    made = {name for node in nodes for name in node.output if name}  # "" is an optional output left out
    waiting = [(node, {name for name in node.input if name in made}) for node in nodes]
    ready: set[str] = set()
    ordered: list[onnx.NodeProto] = []
    while waiting:
        rest = []
        for node, needs in waiting:
            if needs <= ready:
                ordered.append(node)
                ready.update(node.output)
            else:
                rest.append((node, needs))
        if len(rest) == len(waiting):
            raise ValueError(f"the graph has a cycle through {rest[0][0].name!r}")
        waiting = rest
    return ordered


def _live(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    needed = {entry.name for entry in graph.output}
    kept = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(name for name in node.input if name)
    return kept[::-1]


def count_operators(model: onnx.ModelProto) -> Counter[str]:
    """How many nodes of each operator the graph has."""
    return Counter(node.op_type for node in model.graph.node)
