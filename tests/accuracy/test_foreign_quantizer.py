"""A Q/DQ file of another quantizer, described as docs/modelopt.md says, goes through build and gate."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from hpddrnet_trt.accuracy.acceptance import WHAT, Budget
from hpddrnet_trt.accuracy.build import build_verified
from hpddrnet_trt.core.errors import BadInputFile, UserError
from hpddrnet_trt.core.manifest import METADATA_KEY, read_manifest
from hpddrnet_trt.graph.model import load_model, save_model
from tests.accuracy.builds import build
from tests.graph.parsed_rtx import needs_rtx


def quantized_elsewhere(source: Path, largest: float) -> onnx.ModelProto:
    """The file as another program would write it: its own names and producer, a pair on every input of a convolution.

    No pair stands on the sums behind them, kernels are integers with a dequantize node, one scale per output
    channel, and nothing is left of the description. ``largest``: what every activation is clipped at.
    """
    model, _ = load_model(source)
    graph = model.graph
    weights = {entry.name: entry for entry in graph.initializer}
    added: dict[str, Any] = {}
    nodes: list[Any] = []

    def constant(name: str, values: Any) -> str:
        added[name] = numpy_helper.from_array(values, name)
        return name

    zero = constant("const_zero", np.zeros((), np.int8))
    for index, node in enumerate(graph.node):
        node.name = f"node_{index}"
        if node.op_type == "Conv" and node.input[1] in weights:
            data, kernel = node.input[:2]
            if f"QL_{data}" not in added:
                scale = constant(f"QL_{data}", np.array(largest / 127, np.float32))
                for kind, read, written in (("Quantize", data, f"q_{data}"), ("Dequantize", f"q_{data}", f"dq_{data}")):
                    nodes.append(helper.make_node(f"{kind}Linear", [read, scale, zero], [written], f"{kind}_{index}"))
            values = numpy_helper.to_array(weights[kernel])
            steps = np.maximum(np.abs(values).max(axis=(1, 2, 3)) / 127, 1e-9).astype(np.float32)
            stored = np.rint(values / steps[:, None, None, None]).astype(np.int8)
            parts = [constant(f"int_{index}", stored), constant(f"steps_{index}", steps)]
            parts.append(constant(f"zeros_{index}", np.zeros(len(steps), np.int8)))
            nodes.append(helper.make_node("DequantizeLinear", parts, [f"kernel_{index}"], f"w_{index}", axis=0))
            node.input[0], node.input[1] = f"dq_{data}", f"kernel_{index}"
        nodes.append(node)
    model = helper.make_model(
        helper.make_graph(nodes, "theirs", graph.input, graph.output, [*graph.initializer, *added.values()]),
        opset_imports=model.opset_import, ir_version=model.ir_version, producer_name="another quantizer",
    )  # fmt: skip
    assert METADATA_KEY not in {entry.key for entry in model.metadata_props}
    return model


@pytest.fixture
def theirs(tmp_path: Path, fp32: Path) -> Callable[[float], Path]:
    """Their file with our description."""
    source = Path(shutil.copy(fp32, tmp_path / "model.onnx"))

    def write(largest: float) -> Path:
        onnx.save(quantized_elsewhere(source, largest), str(tmp_path / "theirs.onnx"))
        description = read_manifest(source).replace(precision="int8", quantized_for="tensorrt")
        return save_model(onnx.load(str(tmp_path / "theirs.onnx")), tmp_path / "model.theirs.onnx", description)

    return write


@needs_rtx
def test_it_is_built_and_verified(theirs: Callable[[float], Path], data: Path, tmp_path: Path) -> None:
    manifest = build(theirs(8.0), tmp_path / "m.engine", data, Budget(max_miou_drop=3.0))
    assert manifest.validation[-1].what == WHAT
    assert manifest.engine is not None
    proof = manifest.engine.layer_precision
    assert proof.get("parsed_network", proof)["convolutions"]["int8"] == 6  # all, the channel gate's too


@needs_rtx
def test_the_gate_refuses_a_bad_one(theirs: Callable[[float], Path], data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="INT8 misses the budget"):
        build(theirs(0.8), tmp_path / "m.engine", data, Budget(max_miou_drop=0.5))
    assert not (tmp_path / "m.engine").exists()


def test_without_a_description_it_is_refused(theirs: Callable[[float], Path], tmp_path: Path) -> None:
    theirs(8.0)
    with pytest.raises(BadInputFile, match="carries no description"):
        build_verified(tmp_path / "theirs.onnx", tmp_path / "m.engine", precision="int8", acceptance=None)
