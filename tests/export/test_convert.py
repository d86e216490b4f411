"""An FP32 file becomes an FP16 or BF16 one: what stays in FP32 for its values or labels, evidence, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.core.manifest import ValidationRecord, read_manifest
from hpddrnet_trt.data.simulate import simulate
from hpddrnet_trt.engines.onnxruntime import OnnxRuntimeEngine
from hpddrnet_trt.export.convert import GraphComparison, _keep_blocks, convert_precision, fp16_range_report
from hpddrnet_trt.graph.model import load_model, save_model
from hpddrnet_trt.graph.nodes import replace_nodes, tensor_types
from hpddrnet_trt.graph.precision import attention_score_nodes, large_nodes, to_half
from tests.graph.residual_onnx import residual_model
from tests.tiny_export import small_model, write_loud

FP32 = TensorProto.FLOAT


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_loud(tmp_path_factory.mktemp("convert") / "fp32.onnx")


@pytest.fixture(scope="module")
def half(source: Path) -> Path:
    target = source.with_name("fp16.onnx")
    convert_precision(source, target)
    return target


@pytest.fixture(scope="module")
def brain(source: Path) -> Path:
    target = source.with_name("bf16.onnx")
    convert_precision(source, target, "bf16")
    return target


def picture(height: int = 64, width: int = 96, seed: int = 0) -> npt.NDArray[np.uint8]:
    return simulate(height, width, seed=seed)[0]


def run(model: onnx.ModelProto, image: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {model.graph.input[0].name: image}))


def test_description_and_contract(source: Path, half: Path) -> None:
    manifest = read_manifest(half)
    assert manifest.precision == "fp16"
    evidence = manifest.validation[-1]
    assert evidence.what == "conversion to FP16"
    assert evidence.runtime.endswith("(CPU), simulated rounding, FP32 accumulation")
    assert evidence.values["agreement"] > 0.98
    assert evidence.values["miou_against_fp32"] > 0.95
    before, after = onnx.load(str(source)).graph, onnx.load(str(half)).graph
    assert list(before.input) == list(after.input)
    assert list(before.output) == list(after.output)
    assert half.stat().st_size < 0.7 * source.stat().st_size


def test_range_report_and_nodes_kept_in_fp32(source: Path, tmp_path: Path) -> None:
    model, manifest = load_model(source)
    weights = {entry.name: entry for entry in model.graph.initializer}
    inner = next(node for node in model.graph.node if node.name == "backbone.down_1.conv/Conv")
    for name in inner.input[1:]:
        weights[name].CopyFrom(numpy_helper.from_array(2e4 * numpy_helper.to_array(weights[name]), name))
    loud = tmp_path / "loud.onnx"
    save_model(model, loud, manifest)
    image = tmp_path / "a.png"
    Image.fromarray(picture()).save(image)

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


def test_refuses_what_makes_no_sense(source: Path, half: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.onnx"
    with pytest.raises(UsageError, match="needs an FP32 file"):
        convert_precision(half, target)
    with pytest.raises(UsageError, match="no node called nowhere"):
        convert_precision(source, target, keep_fp32=["nowhere"])
    with pytest.raises(UsageError, match="unknown precision"):
        convert_precision(source, target, "int8")  # type: ignore[arg-type]
    assert not target.exists()


def test_fp32_is_a_copy(source: Path, tmp_path: Path) -> None:
    manifest = convert_precision(source, tmp_path / "same.onnx", "fp32")
    assert manifest == read_manifest(source) == read_manifest(tmp_path / "same.onnx")
    image = picture()[None, None]
    first, second = (run(onnx.load(str(path)), image)[0] for path in (source, tmp_path / "same.onnx"))
    assert np.array_equal(first, second)


def test_bf16_file_is_described(brain: Path) -> None:
    manifest = read_manifest(brain)
    assert manifest.precision == "bf16"
    assert manifest.validation[-1].what == "conversion to BF16"
    assert manifest.validation[-1].values["agreement"] > 0.95


def test_onnxruntime_says_that_it_has_no_bf16(brain: Path) -> None:
    with pytest.raises(UsageError, match=r"is BF16, which ONNX Runtime .* has no kernels for on CPU"):
        OnnxRuntimeEngine(brain)


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
    save_model(model, target, manifest)
    return target


def test_harmed_blocks_stay_in_fp32(source: Path, tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    Image.fromarray(picture()).save(image)
    fragile = fragile_file(source, tmp_path / "fragile.onnx", 15000.0)  # where FP16 counts in eights
    target = tmp_path / "half.onnx"
    written = convert_precision(fragile, target, images=[image], least_iou=0.97)
    (remark,) = [remark for remark in written.remarks if "rounding it costs labels" in remark]
    assert remark.startswith("fragile.part stays in FP32")
    types = tensor_types(onnx.load(str(target)))
    assert types["away"] == types["back"] == FP32
    evidence = written.validation[-1]
    assert evidence.values["miou_against_fp32"] >= 0.97
    assert evidence.source == "a.png"
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


def test_the_evidence_names_the_micrographs_that_were_used(tmp_path: Path) -> None:
    images = [tmp_path / f"{name}.png" for name in "abcd"]
    for image in images:
        Image.fromarray(picture()).save(image)
    source = residual_model(tmp_path / "m.onnx", batch=1, size=64)
    evidence = convert_precision(source, tmp_path / "half.onnx", images=images, least_iou=0).validation[-1]
    assert (evidence.images, evidence.source) == (2, "a.png, b.png")


def test_no_choice_of_blocks_is_enough(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = tmp_path / "a.png"
    Image.fromarray(picture()).save(image)
    source = residual_model(tmp_path / "m.onnx", batch=1, size=64)
    convert_precision(source, tmp_path / "half.onnx", images=[image], least_iou=1.01)
    assert "no choice of blocks in FP32 brings" in caplog.text


def test_overflow_is_seen_and_nothing_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding is simulated, so that scores beyond FP16 become infinite as they would on a GPU."""
    monkeypatch.setattr("hpddrnet_trt.graph.precision.attention_score_nodes", lambda graph: set())
    monkeypatch.setattr("hpddrnet_trt.graph.precision.in_type", lambda model, scores, leave: model)
    with pytest.raises(UserError, match="conversion to FP16: the new graph gives values that are not finite"):
        convert_precision(source, tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()
