"""An FP32 file becomes an FP16 or BF16 one: what stays in FP32 for its values or labels, evidence, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.core.manifest import ValidationRecord, read_manifest
from hpddrnet_trt.engines.onnxruntime import OnnxRuntimeEngine
from hpddrnet_trt.export.convert import GraphComparison, _keep_blocks, convert_precision, fp16_range_report
from hpddrnet_trt.graph.model import load_model, save_model
from hpddrnet_trt.graph.nodes import replace_nodes, store, tensor_types
from hpddrnet_trt.graph.precision import attention_score_nodes, large_nodes, to_half
from tests.graph.residual_onnx import residual_model
from tests.tiny_export import pictures, small_model, write_loud

FP32 = TensorProto.FLOAT


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_loud(tmp_path_factory.mktemp("convert") / "fp32.onnx")


@pytest.fixture(scope="module")
def typed(source: Path) -> dict[str, Path]:
    paths = {kind: source.with_name(f"{kind}.onnx") for kind in ("fp16", "bf16")}
    for kind, path in paths.items():
        convert_precision(source, path, kind)  # type: ignore[arg-type]
    return paths


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return pictures(tmp_path / "images", 1)[0]


@pytest.mark.parametrize(("precision", "agreement"), [("fp16", 0.98), ("bf16", 0.95)])
def test_description_and_contract(source: Path, typed: dict[str, Path], precision: str, agreement: float) -> None:
    manifest = read_manifest(typed[precision])
    assert manifest.precision == precision
    evidence = manifest.validation[-1]
    assert evidence.what == f"conversion to {precision.upper()}"
    assert evidence.runtime.endswith("(CPU), simulated rounding, FP32 accumulation")
    assert evidence.values["agreement"] > agreement
    assert evidence.values["miou_against_fp32"] > agreement - 0.03
    before, after = (onnx.load(str(path)).graph for path in (source, typed[precision]))
    assert list(before.input) == list(after.input)
    assert list(before.output) == list(after.output)
    assert typed[precision].stat().st_size < 0.7 * source.stat().st_size
    if precision == "bf16":
        with pytest.raises(UsageError, match=r"is BF16, which ONNX Runtime .* has no kernels for on CPU"):
            OnnxRuntimeEngine(typed[precision])


def test_range_report_and_nodes_kept_in_fp32(source: Path, image: Path, tmp_path: Path) -> None:
    model, manifest = load_model(source)
    weights = {entry.name: entry for entry in model.graph.initializer}
    inner = next(node for node in model.graph.node if node.name == "backbone.down_1.conv/Conv")
    for name in inner.input[1:]:
        store(weights[name], 2e4 * numpy_helper.to_array(weights[name]))
    loud = save_model(model, tmp_path / "loud.onnx", manifest)
    report = fp16_range_report(model, manifest, [image])
    assert report[inner.output[0]] > 16376
    found = large_nodes(model.graph, report)
    assert inner.name in found
    assert not attention_score_nodes(model.graph) & found.keys()

    target = tmp_path / "half.onnx"
    written = convert_precision(loud, target, images=[image])
    types = tensor_types(onnx.load(str(target)))
    assert types[inner.output[0]] == FP32
    assert any(inner.name in remark for remark in written.remarks)


def test_refuses_what_makes_no_sense(source: Path, typed: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "x.onnx"
    refused: list[tuple[Path, dict[str, Any], str]] = [
        (typed["fp16"], {}, "needs an FP32 file"),
        (source, {"keep_fp32": ["nowhere"]}, "no node called nowhere"),
        (source, {"precision": "int8"}, "unknown precision"),
    ]
    for path, options, says in refused:
        with pytest.raises(UsageError, match=says):
            convert_precision(path, target, **options)
    assert not target.exists()


def test_fp32_is_a_copy(source: Path, tmp_path: Path) -> None:
    manifest = convert_precision(source, tmp_path / "same.onnx", "fp32")
    assert manifest == read_manifest(source) == read_manifest(tmp_path / "same.onnx")
    first, second = (onnx.load(str(path)).graph for path in (source, tmp_path / "same.onnx"))
    assert first == second


# ----------------------------------------------------------------- blocks that rounding harms


def fragile_file(source: Path, target: Path, distance: float) -> Path:
    """The class scores rest on ``(x + distance) - distance``, in a block of its own."""
    model, manifest = load_model(source)
    graph = model.graph
    classifier = next(node for node in graph.node if node.name == "conv_seg/Conv")
    features = classifier.input[0]
    graph.initializer.append(numpy_helper.from_array(np.array(distance, np.float32), "far"))
    graph.node.extend([
        helper.make_node("Add", [features, "far"], ["away"], "fragile.part.conv1/Add"),
        helper.make_node("Sub", ["away", "far"], ["back"], "fragile.part.conv2/Sub"),
    ])  # fmt: skip
    classifier.input[0] = "back"
    replace_nodes(graph, graph.node)
    return save_model(model, target, manifest)


def test_harmed_blocks_stay_in_fp32(source: Path, image: Path, tmp_path: Path) -> None:
    fragile = fragile_file(source, tmp_path / "fragile.onnx", 15000.0)  # where FP16 counts in eights
    target = tmp_path / "half.onnx"
    written = convert_precision(fragile, target, images=[image], least_iou=0.97)
    (remark,) = [remark for remark in written.remarks if "rounding it costs labels" in remark]
    assert remark.startswith("fragile.part stays in FP32")
    types = tensor_types(onnx.load(str(target)))
    assert types["away"] == types["back"] == FP32
    evidence = written.validation[-1]
    assert evidence.values["miou_against_fp32"] >= 0.97
    assert evidence.source == image.name
    # Without micrographs nothing is chosen.
    assert not any("fragile" in remark for remark in convert_precision(fragile, target).remarks)


class Scripted:
    """Answers by which of the two blocks is in FP32."""

    def __init__(self, answers: dict[str, tuple[bool, float]]) -> None:
        self.answers = answers

    def compare(self, model: onnx.ModelProto, what: str) -> GraphComparison:
        types = tensor_types(model)
        finite, iou = self.answers["".join(name for name in "ab" if types[name] == FP32)]
        values = {"agreement": iou, "miou_against_fp32": iou}
        record = ValidationRecord(what=what, runtime="none", values=values, images=1, source="none")
        return GraphComparison(record, finite)


@pytest.mark.parametrize("named", [True, False])
def test_values_that_are_finite_come_before_labels_that_are_right(named: bool) -> None:
    constants = {name: np.ones((3, 3, 1, 1), np.float32) for name in ("v", "w")}
    nodes = [
        helper.make_node("Conv", ["image", "v"], ["a"], "one/Conv" if named else ""),
        helper.make_node("Conv", ["a", "w"], ["b"], "two/Conv" if named else ""),
        helper.make_node("Relu", ["b"], ["logits"], "last/Relu" if named else ""),
    ]
    model = small_model(nodes, constants, (1, 3, 4, 4))
    comparison: Any = Scripted({"": (False, 0.8), "a": (False, 0.95), "b": (True, 0.7), "ab": (True, 0.9)})
    before = comparison.compare(to_half(model), "conversion")
    half, found, remarks = _keep_blocks(model, set(), "fp16", comparison, before, 0.85)
    assert (found.finite, found.iou) == (True, 0.9)
    first, second = ("two", "one") if named else ("Conv_1", "Conv_0")
    assert [remark.split()[0] for remark in remarks] == [first, second]
    assert {tensor_types(half)[name] for name in "ab"} == {FP32}


def test_the_evidence_names_the_micrographs_that_were_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = pictures(tmp_path / "images", 4)
    source = residual_model(tmp_path / "m.onnx", batch=1, size=64)
    evidence = convert_precision(source, tmp_path / "half.onnx", images=images, least_iou=1.01).validation[-1]
    assert (evidence.images, evidence.source) == (2, "00.png, 01.png")
    assert "no choice of blocks in FP32 brings" in caplog.text


def test_overflow_is_seen_and_nothing_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding is simulated, so that scores beyond FP16 become infinite as they would on a GPU."""
    monkeypatch.setattr("hpddrnet_trt.graph.precision.attention_score_nodes", lambda graph: set())
    monkeypatch.setattr("hpddrnet_trt.graph.precision.in_type", lambda model, scores, leave: model)
    with pytest.raises(UserError, match="conversion to FP16: the new graph gives values that are not finite"):
        convert_precision(source, tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()
