"""Every pair in a quantised graph follows TensorRT's fusion rules, and the check can fail."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hpddrnet_trt.export.onnx import ExportOptions, export_network
from hpddrnet_trt.graph import qdq
from hpddrnet_trt.graph.fp8 import to_fp8
from hpddrnet_trt.graph.lint import QdqReport, analyze, report_lines
from hpddrnet_trt.graph.nodes import name_nodes, store
from hpddrnet_trt.graph.precision import to_half
from tests.graph import residual_onnx
from tests.graph.parsed_rtx import Parsed
from tests.graph.residual_onnx import STAGE, fusion_model
from tests.tiny_network import lively, tiny_manifest, tiny_network

pytestmark = pytest.mark.usefixtures("one_thread")
# The residual blocks of the network: two per basic stage, one per bottleneck.
STAGES = {
    *(f"backbone.stem.{stage}.{block}" for stage in (2, 4) for block in (0, 1)),
    *(
        f"backbone.{branch}_branch_layers.{stage}.{block}"
        for branch in ("context", "spatial")
        for stage, block in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0))
    ),
}


def _assert_sound(found: QdqReport, stages: set[str] = STAGES) -> None:
    assert {stage.name for stage in found.stages} == stages
    for stage in found.stages:  # every one, so that a failure names it
        assert not stage.violations, stage.name
        assert not stage.reformats, stage.name
        assert stage.precision in ("int8", "fp8"), stage.name
        assert len(stage.convolutions) == (4 if stage.name.endswith("layers.2.0") else 3 - (stage.name in IDENTITY))
    assert not found.all_violations
    assert found.stage_reformats == 0


KEPT = "kept by the mixed-precision search"
# Blocks whose shortcut is no convolution.
IDENTITY = {name for name in STAGES if name.endswith(".1") or "stem.2" in name or "spatial_branch_layers.0" in name}
IDENTITY |= {"backbone.spatial_branch_layers.1.0"}


# --- networks of full structure


def test_every_residual_stage_fuses(quantized: Any) -> None:
    found = analyze(quantized)
    _assert_sound(found)
    assert [region.name for region in found.float_regions] == [
        "backbone.stem.0.conv (input normalisation)",
        "domain guard (features of the domain)",
        "backbone.sps.0 (position attention) + backbone.ecas.0 (channel attention)",
        "backbone.sps.1 (position attention) + backbone.ecas.1 (channel attention)",
        "backbone.spp (pyramid pooling)",
        "output (upsampling and labels)",
    ]
    reasons = {entry.reason for entry in found.convolutions} - {""}
    assert reasons == {"channel attention", "1x1 map"}
    assert found.int8_operators == {"Relu": 10, "Resize": 4, "Add": 3, "BatchNormalization": 6, "AveragePool": 3}
    # At the borders of the regions and nowhere else; the output's reads floating point.
    borders = {entry.where.removeprefix("into ").removeprefix("out of ") for entry in found.reformats}
    assert borders == {region.name for region in found.float_regions[:-1]}
    record = json.loads(json.dumps(found.record()))
    assert record["counts"] == {
        "convolutions": {"int8": 58, "fp32": 3}, "residual_stages": 14, "violations": 0, "float_regions": 6,
        "reformats_in_stages": 0, "reformats_elsewhere": 14,
    }  # fmt: skip
    assert {"name", "precision", "reason"} == record["convolutions"][0].keys()
    text = "\n".join(report_lines(record))
    assert "residual stages: 14 of 14 without a broken fusion rule or a conversion inside" in text
    assert "unquantized (high-precision) regions: 6" in text
    assert "backbone.spp (pyramid pooling)" in text


@pytest.mark.parametrize(
    "changes", [{"eca": "none", "pam": "none"}, {"eca": "spatial", "pam": "context", "num_classes": 2}], ids=str
)
def test_variants_of_the_network(tmp_path: Path, changes: dict[str, Any]) -> None:
    network = lively(tiny_network(**changes))
    export_network(network, tiny_manifest(network), tmp_path / "model.onnx", ExportOptions(), verify=False)
    model = onnx.load(str(tmp_path / "model.onnx"))
    name_nodes(model)
    _assert_sound(analyze(residual_onnx.quantized(model)))


def test_types_do_not_matter(shipped: Any, quantized: Any) -> None:
    """FP16 or BF16 beside INT8 or FP8: the same pairs, the same verdict."""
    full, half = analyze(quantized), analyze(to_half(quantized))
    assert half.stages == full.stages
    assert [entry.name for entry in half.float_regions] == [entry.name for entry in full.float_regions]
    assert len(half.reformats) == len(full.reformats)
    assert {entry.precision for entry in half.convolutions} == {"int8", "fp16"}
    eight = analyze(to_half(to_fp8(quantized, shipped)))
    _assert_sound(eight)
    assert {entry.precision for entry in eight.convolutions} == {"fp8", "fp16"}
    for graph, kind in ((quantized, "int8"), (to_fp8(quantized, shipped), "fp8")):
        brain = analyze(to_half(graph, kind="bf16"))
        _assert_sound(brain)
        assert {entry.precision for entry in brain.convolutions} == {kind, "bf16"}
        assert len(brain.reformats) == len(full.reformats)


def test_convolutions_that_stay_out_of_fp8_say_why(shipped: Any) -> None:
    plan = qdq.plan(shipped, "tensorrt", "fp8")
    found = analyze(to_fp8(residual_onnx.quantized(shipped, plan), shipped))
    reasons = {entry.name: entry.reason for entry in found.convolutions if entry.precision != "fp8"}
    assert reasons["backbone.stem.0.conv.conv/Conv"] == "first layer"
    assert reasons["conv_seg/Conv"] == "last layer"
    _assert_sound(found)
    source = fusion_model()  # of 8 channels
    names = set(qdq.plan(source, "tensorrt").nodes) - {"three"}
    found = analyze(to_fp8(residual_onnx.quantized(source, qdq.subset(source, "tensorrt", names)), source))
    reasons = {entry.name: entry.reason for entry in found.convolutions if entry.reason}
    assert reasons == {"three": "no fast FP8 kernel for its shape"}


@pytest.mark.parametrize("left_out", [1, 5, 20, 50])
def test_mixed_precision_keeps_the_rules(shipped: Any, left_out: int) -> None:
    full = qdq.plan(shipped, "tensorrt")
    kept = set(random.Random(left_out).sample(full.nodes, left_out))
    plan = qdq.subset(shipped, "tensorrt", set(full.nodes) - kept)
    found = analyze(residual_onnx.quantized(shipped, plan), kept=kept)
    text = report_lines(found.record())
    assert {line for line in text if "kept by" in line} == {f"  {name}: fp32, {KEPT}" for name in kept}
    assert not found.all_violations
    for stage in found.stages:
        inside = kept.intersection(stage.convolutions)
        assert stage.precision == ("fp32" if inside == {*stage.convolutions} else "mixed" if inside else "int8")
        assert inside or not stage.reformats  # conversions only where the search asked for them


def test_tensorrt_builds_the_full_structure(quantized: Any) -> None:
    parsed = Parsed(to_half(quantized))
    assert parsed.build((1, 1, 64, 64), (1, 1, 128, 128), (2, 1, 256, 256)) is not None


def test_a_float_graph_has_no_pairs_to_judge(shipped: Any) -> None:
    found = analyze(shipped)
    assert {stage.name for stage in found.stages} == STAGES
    assert {stage.precision for stage in found.stages} == {"fp32"}
    assert not found.all_violations
    assert not found.reformats
    assert len(found.float_regions) == 1


# --- each rule can be broken


class Surgery:
    """Changes to the quantised :func:`fusion_model`."""

    def __init__(self) -> None:
        self.model = residual_onnx.quantized(fusion_model())
        self.graph = self.model.graph

    def node(self, name: str) -> Any:
        return next(node for node in self.graph.node if node.name == name)

    def maker(self, tensor: str) -> Any:
        return next(node for node in self.graph.node if tensor in node.output)

    def bypass(self, reader: str, slot: int) -> None:
        """Let ``reader`` take the values before the pair."""
        node = self.node(reader)
        quantizer = self.maker(self.maker(node.input[slot]).input[0])
        node.input[slot] = quantizer.input[0]

    def constant(self, name: str, value: Any) -> str:
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def pair(self, reader: str, slot: int, scale: float = 0.5, zero: int = 0) -> None:
        """Put a pair before one input of ``reader``."""
        node = self.node(reader)
        source, at = node.input[slot], list(self.graph.node).index(node)
        parts = [self.constant(f"{reader}.s", np.float32(scale)), self.constant(f"{reader}.z", np.int8(zero))]
        for kind, one, other in (("Quantize", source, f"{reader}.q"), ("Dequantize", f"{reader}.q", f"{reader}.dq")):
            self.graph.node.insert(at, helper.make_node(f"{kind}Linear", [one, *parts], [other], name=f"{other}.new"))
            at += 1
        self.node(reader).input[slot] = f"{reader}.dq"

    def scale(self, tensor: str, value: Any = None) -> Any:
        """The scale of a quantised activation, after giving it another ``value``."""
        pair = next(node for node in self.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == tensor)
        entry = next(entry for entry in self.graph.initializer if entry.name == pair.input[1])
        if value is not None:
            store(entry, value)
        return numpy_helper.to_array(entry)


def _float_kernel(cut: Surgery) -> None:
    cut.node("one").input[1] = cut.constant("plain", np.ones((8, 8, 3, 3), np.float32))
    cut.bypass("stage/stage", 1)  # so that the data is quantised for this convolution alone


def _float_result(cut: Surgery) -> None:
    cut.bypass("stage_relu", 0)
    cut.bypass("fused", 0)


def _inner_float_reader(cut: Surgery) -> None:
    cut.graph.node.append(helper.make_node("Abs", ["inner"], ["extra"], name="extra"))
    cut.graph.output.append(helper.make_tensor_value_info("extra", TensorProto.FLOAT, None))


def _quantized_twice(cut: Surgery) -> None:
    cut.bypass("stage_relu", 0)
    cut.pair("stage_relu", 0)


def _shifted(cut: Surgery) -> None:
    cut.bypass("two", 0)
    cut.pair("two", 0, zero=3)


@pytest.mark.parametrize(
    ("change", "rule", "where", "converts"),  # the last: whether a conversion stands inside the stage then
    [
        (lambda cut: cut.bypass("one", 0), "weighted inputs", "one", False),
        (_float_kernel, "weighted inputs", "one", False),
        (lambda cut: cut.pair("stage/stage", 0), "weighted output", "two", False),
        (lambda cut: cut.pair("inner", 0), "weighted output", "one", False),
        (lambda cut: cut.bypass("stage/stage", 1), "residual input", "stage/stage", True),
        (lambda cut: cut.bypass("fused", 0), "one output", "stage/stage", True),
        (_float_result, "one output", "stage/stage", True),
        (_inner_float_reader, "one output", "one", True),
        (lambda cut: cut.pair("one", 2), "bias", "one", False),
        (_quantized_twice, "quantised once", ".q.new", False),
        (lambda cut: cut.pair("two", 0, float(cut.scale("inner"))), "quantised once", "two.q.new", False),
        (lambda cut: cut.scale("stage_relu", np.float32(0.3)), "one scale", "stage_relu", False),
        (_shifted, "symmetric", "two.q.new", False),
        (lambda cut: cut.scale("inner", np.full(8, 0.1, np.float32)), "symmetric", "inner", False),
    ],
)
def test_a_broken_rule_is_found(change: Callable[[Surgery], Any], rule: str, where: str, converts: bool) -> None:
    cut = Surgery()
    assert not analyze(cut.model).all_violations
    change(cut)
    found = analyze(cut.model)
    broken = [entry for entry in found.all_violations if entry.rule == rule and where in entry.where]
    text = "\n".join(report_lines(found.record()))
    assert broken, text
    assert f"{rule}: {broken[0].where}" in text
    assert found.record()["counts"]["violations"] == len(found.all_violations) >= 1
    if converts:
        stage = next(stage for stage in found.stages if stage.name == STAGE)
        assert stage.violations
        assert len(stage.reformats) == 1
