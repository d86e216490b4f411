"""The layer at fault is named, what is only inherited is not blamed, and equal files are equal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from hpddrnet_trt.accuracy.compare import compare, near_border, polygraphy_command
from hpddrnet_trt.accuracy.comparison import Comparison, LabelAgreement
from hpddrnet_trt.accuracy.comparison_figures import save_figure
from hpddrnet_trt.accuracy.comparison_layers import Probe, match_layers, ratio
from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError
from hpddrnet_trt.core.manifest import read_manifest, sidecar_path
from hpddrnet_trt.data.datasets import find_images
from hpddrnet_trt.data.simulate import simulate
from hpddrnet_trt.engines.onnxruntime import OnnxRuntimeEngine
from hpddrnet_trt.export.calibrate import calibrate
from hpddrnet_trt.graph.model import load_model, save_model
from hpddrnet_trt.graph.precision import to_half
from hpddrnet_trt.models.checkpoints import save_checkpoint
from hpddrnet_trt.weights import locate
from tests.graph.residual_onnx import QUANTISABLE, residual_model
from tests.tiny_network import lively, tiny_manifest, tiny_network
from tests.tiny_onnx import tiny_model

SIZE = (64, 64)


@pytest.fixture(scope="module")
def micrographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("micrographs")
    for seed in range(4):
        Image.fromarray(simulate(96, 128, seed=seed)[0]).save(folder / f"{seed}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return residual_model(tmp_path_factory.mktemp("plain") / "fp32.onnx")


@pytest.fixture(scope="module")
def int8(plain: Path, micrographs: list[Path]) -> Path:
    target = plain.with_name("int8.onnx")
    calibrate(plain, target, micrographs, size=SIZE, half=False)
    return target


def changed(source: Path, target: Path, name: str, factor: float) -> Path:
    """A copy with one constant multiplied."""
    model, manifest = load_model(source)
    entry = next(entry for entry in model.graph.initializer if entry.name == name)
    values = numpy_helper.to_array(entry)
    entry.CopyFrom(numpy_helper.from_array((values * factor).astype(values.dtype), name))
    return save_model(model, target, manifest)


def layer(found: Comparison, name: str) -> Any:
    return next(entry for entry in found.layers if entry.name == name)


# ------------------------------------------------------------------------------- verdict


@pytest.mark.parametrize("which", ["plain", "int8"])
def test_identical_files_differ_in_nothing(which: str, micrographs: list[Path], request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(which)
    found = compare(path, path, micrographs, size=SIZE)
    assert len(found.layers) > 15
    assert all(
        entry.error == entry.own == entry.input_rounding == entry.constants == entry.largest == 0
        and entry.cosine == 1 and entry.sqnr_db == math.inf for entry in found.layers
    )  # fmt: skip
    assert found.first is None
    assert found.worst() == []
    assert found.labels.agreement == 1
    assert "no layer diverges: every activation is equal" in found.text()


def test_a_sound_quantisation_has_no_divergence(plain: Path, int8: Path, micrographs: list[Path]) -> None:
    found = compare(plain, int8, micrographs, size=SIZE)
    assert found.first is None
    assert {entry.name for entry in found.layers if entry.own > 0} >= set(QUANTISABLE)
    assert all(entry.own == 0 for entry in found.layers if entry.operator in ("Relu", "Softmax", "Sigmoid", "MatMul"))
    assert all(0.3 < entry.span < 3 for entry in found.layers if entry.span is not None)
    assert found.labels.agreement > 0.9
    assert found.scores is not None
    assert found.scores.name == "classifier"
    assert 0 < found.scores.error < 0.1


@settings(max_examples=8, deadline=None)
@given(name=st.sampled_from(QUANTISABLE), factor=st.floats(2, 16) | st.floats(-8, 0.5))
def test_a_corrupt_weight_scale_names_its_layer(
    name: str, factor: float, plain: Path, int8: Path, micrographs: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    broken = changed(int8, tmp_path_factory.mktemp("broken") / "int8.onnx", f"{name}.weight_scale", factor)
    found = compare(plain, broken, micrographs, size=SIZE, max_images=1)
    assert found.first is not None
    assert found.first.name == name
    assert [entry.name for entry in found.layers if found.diverges(entry)] == [name]  # followers only inherit
    assert found.first.constants == pytest.approx(abs(factor - 1), rel=0.1, abs=0.05)
    assert "its weights differ" in found.text()


def test_a_corrupt_activation_scale_names_its_readers(
    plain: Path, int8: Path, micrographs: list[Path], tmp_path: Path
) -> None:
    for factor, word in ((8, "could hold values"), (1 / 8, "its quantiser can hold")):
        broken = changed(int8, tmp_path / f"{factor}.onnx", "first_out_scale", factor)
        found = compare(plain, broken, micrographs, size=SIZE)
        assert found.first is not None
        assert found.first.name == "second"
        assert found.first.input_rounding > 3 * layer(compare(plain, int8, micrographs, size=SIZE), "second").own
        assert word in found.first.reason()
        assert found.first.span == pytest.approx(factor, rel=0.5)


def test_inherited_errors_are_told_from_made_ones(plain: Path, micrographs: list[Path], tmp_path: Path) -> None:
    found = compare(plain, changed(plain, tmp_path / "b.onnx", "stem.bias", 3), micrographs, size=SIZE)
    assert [entry.name for entry in found.layers if entry.own > 0] == ["stem"]
    stem, after = layer(found, "stem"), layer(found, "stem_out")
    assert stem.error == stem.own
    assert stem.inherited == 0
    assert after.own == 0
    assert after.error > 0
    assert after.inherited == stem.error
    assert all(entry.error == 0 for entry in found.layers[: found.layers.index(stem)])


def test_figures_are_those_of_numpy(plain: Path, micrographs: list[Path], tmp_path: Path) -> None:
    """Scores scaled by 1.25: error 0.25, SQNR 12.04 dB, cosine 1, and the largest difference a quarter of the peak."""
    model, manifest = load_model(plain)
    for name in ("classifier.weight", "classifier.bias"):
        entry = next(entry for entry in model.graph.initializer if entry.name == name)
        entry.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(entry) * np.float32(1.25), name))
    found = compare(plain, save_model(model, tmp_path / "b.onnx", manifest), micrographs, size=SIZE)
    scores = found.scores
    assert scores is not None
    assert scores.error == pytest.approx(0.25, rel=1e-4)
    assert scores.own == pytest.approx(0.25, rel=1e-4)
    assert scores.sqnr_db == pytest.approx(12.0412, abs=1e-3)
    assert scores.cosine == pytest.approx(1, abs=1e-5)
    assert len(scores.place) == 4
    assert scores.image.startswith(("0.png", "1.png", "2.png", "3.png"))
    assert found.labels.agreement == 1


def test_values_that_are_not_finite_in_the_reference(
    plain: Path, int8: Path, micrographs: list[Path], tmp_path: Path
) -> None:
    found = compare(changed(plain, tmp_path / "a.onnx", "first.bias", math.inf), int8, micrographs, size=SIZE)
    assert found.first is not None
    assert found.first.name == "first"
    assert "not finite" in found.text()


def test_values_that_are_not_finite(plain: Path, micrographs: list[Path], tmp_path: Path) -> None:
    broken = changed(plain, tmp_path / "b.onnx", "second.bias", math.inf)
    found = compare(plain, broken, micrographs, size=SIZE)
    assert found.first is not None
    assert found.first.name == "second"
    assert found.first.own == math.inf
    assert found.first.reason() == "its values are not finite"
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert record["first_divergence"] == "second"
    assert next(entry for entry in record["layers"] if entry["name"] == "second")["own"] is None
    assert save_figure(found, tmp_path / "figure.png").stat().st_size > 10_000


def test_a_value_that_is_no_number_stays_the_largest_difference() -> None:
    """Whatever later batches hold."""

    def root(factor: float) -> onnx.ModelProto:
        nodes = [helper.make_node("Mul", ["x", "c"], ["m"], "m"), helper.make_node("Sqrt", ["m"], ["y"], "y")]
        ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 1, 1])] for name in "xy"]
        constant = numpy_helper.from_array(np.float32(factor), "c")
        graph = helper.make_graph(nodes, "g", *ends, [constant])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)

    a, b = root(1), root(1.1)
    probe = Probe(a, b, match_layers(a, b))
    for value in (1, -1, 9):
        image = np.full((1, 1, 1, 1), value, np.float32)
        probe.run(image, image)
    product, result = probe.sums
    assert (product.largest, product.batch) == (pytest.approx(0.9, rel=1e-5), 2)
    assert math.isnan(result.largest)
    assert result.batch == 1


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_simulated(plain: Path, micrographs: list[Path], tmp_path: Path, precision: Any) -> None:
    model, manifest = load_model(plain)
    half = to_half(model, kind=precision)
    path = save_model(half, tmp_path / "half.onnx", manifest.replace(precision=precision))
    found = compare(plain, path, micrographs, size=SIZE)
    step = {"fp16": 2.0**-11, "bf16": 2.0**-8}[precision]
    assert found.first is None
    stem = layer(found, "stem")
    assert step / 10 < stem.own < 2 * step
    assert any("simulated rounding" in remark and remark.startswith("B") for remark in found.remarks)
    assert len(found.layers) == len(match_layers(model, model))  # the rounding hides no layer


def test_quantisation_for_onnxruntime(plain: Path, micrographs: list[Path], tmp_path: Path) -> None:
    """It drops ReLUs and hands their tensors' names to the convolutions before: those must not be mixed up."""
    target = tmp_path / "cpu.onnx"
    calibrate(plain, target, micrographs, form="onnxruntime", size=SIZE)
    found = compare(plain, target, micrographs, size=SIZE)
    assert found.first is None
    assert found.labels.agreement > 0.9
    assert max(entry.own for entry in found.layers) < 0.1
    assert "int8 for onnxruntime" in found.b


# -------------------------------------------------------------------------------- output


def test_text_record_and_figure(plain: Path, int8: Path, micrographs: list[Path], tmp_path: Path) -> None:
    broken = changed(int8, tmp_path / "int8.onnx", "second.weight_scale", 4)
    found = compare(plain, broken, micrographs, size=SIZE)
    text = found.text()
    assert "first layer that diverges: second (Conv, tensor second)" in text
    assert "8 crops of 64x64 from 4 micrographs" in text
    assert "dark" in text
    assert max(len(line) for line in text.splitlines() if not line.startswith(("note", "A:", "B:"))) < 160
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert record["first_divergence"] == "second" == record["ranking"][0]
    assert record["labels"]["agreement"] == found.labels.agreement < 1
    assert sum(map(sum, record["labels"]["counts"])) == 8 * 64 * 64
    assert save_figure(found, tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match=r"must end with \.png"):
        save_figure(found, tmp_path / "figure.pdf")


def test_labels_only(plain: Path, int8: Path, micrographs: list[Path], tmp_path: Path) -> None:
    whole = compare(plain, int8, micrographs, size=SIZE)
    found = compare(plain, int8, micrographs, size=SIZE, layers=False)
    assert found.layers == []
    assert found.scores is None
    assert found.first is None
    assert abs(found.labels.agreement - whole.labels.agreement) < 0.01
    assert "onnxruntime" in found.runtime
    assert "layers" not in found.text()
    with pytest.raises(UsageError, match="only labels were compared"):
        save_figure(found, tmp_path / "figure.png")


def test_an_engine_shows_labels_only(
    plain: Path, micrographs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU another runtime stands in for the engine."""
    engine = tmp_path / "model.engine"
    engine.write_bytes(b"engine")
    sidecar_path(engine).write_text(read_manifest(plain).to_json(), encoding="utf-8")
    monkeypatch.setattr("hpddrnet_trt.accuracy.compare.load_engine", lambda path: OnnxRuntimeEngine(plain))
    found = compare(plain, engine, micrographs, size=SIZE)
    assert found.layers == []
    assert found.labels.agreement == 1
    assert polygraphy_command("MODEL.onnx", *SIZE) in found.text()


def test_label_rows() -> None:
    counts = np.array([[90, 0, 10, 0], [0, 0, 0, 0], [20, 0, 79, 1]])
    found = LabelAgreement(["a", "b", "c"], counts, 0.5, 1.0)
    first, second, third = found.rows()
    assert found.agreement == pytest.approx(169 / 200)
    assert (first["kept"], first["iou"], first["mostly_becomes"]) == (0.9, pytest.approx(90 / 120), "c")
    assert math.isnan(second["kept"])
    assert second["mostly_becomes"] is None
    assert third["differing_pixels"] == 21
    assert third["share"] == 0.5


@given(arrays.arrays(np.uint8, (2, 7, 9), elements=st.integers(0, 2)))
def test_near_border_is_what_it_says(labels: np.ndarray[Any, Any]) -> None:
    found = near_border(labels)
    for picture, mask in zip(labels, found, strict=True):
        for row, column in np.ndindex(picture.shape):
            window = picture[max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3]
            assert mask[row, column] == (window != picture[row, column]).any() or (
                mask[row, column] and window.min() != window.max()
            )


def test_ratio() -> None:
    assert ratio(0.0, 0.0) == 0
    assert ratio(4.0, 16.0) == 0.5
    assert ratio(1.0, 0.0) == ratio(math.nan, 1.0) == ratio(1.0, math.inf) == math.inf


def test_polygraphy_command() -> None:
    """Verified by hand with Polygraphy 0.53.6; this keeps what matters in it."""
    command = polygraphy_command("model.onnx", 512, 256, batch=2)
    assert command.startswith("polygraphy run model.onnx --trt --onnxrt --strongly-typed --trt-outputs '*'")
    assert command.count("image:[2,1,512,256]") == 4


# ------------------------------------------------------------------------------- matching


def test_another_numbering_of_tensors(plain: Path, micrographs: list[Path], tmp_path: Path) -> None:
    """Node names decide where an export counts its tensors differently."""
    model, manifest = load_model(plain)
    swap = {"stem": "first", "first": "stem", "stem_out": "other", "first_out": "another"}
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = swap.get(name, name)
    found = compare(plain, save_model(model, tmp_path / "b.onnx", manifest), micrographs, size=SIZE)
    assert len(found.layers) == len(match_layers(model, model))
    assert all(entry.error == 0 for entry in found.layers)
    assert {entry.name: entry.tensor for entry in found.layers}["stem"] == "first"


def test_a_checkpoint_is_exported_for_it(micrographs: list[Path], tmp_path: Path, one_thread: None) -> None:
    from hpddrnet_trt.export.onnx import export_onnx

    network = lively(tiny_network())
    source = save_checkpoint(tmp_path / "tiny.safetensors", network, tiny_manifest(network))
    target, name = tmp_path / "tiny.onnx", "backbone.down_1.conv"
    export_onnx(source, target, batch=1, height=64, width=64, verify=False)
    labels = compare(source, target, micrographs[:1], layers=False)
    assert labels.labels.agreement > 0.999
    assert "torch" in labels.runtime
    broken = changed(target, tmp_path / "broken.onnx", f"{name}.weight", 2)
    model, manifest = load_model(broken)
    save_model(model, broken, manifest.replace(checkpoint_sha256="0" * 64))
    found = compare(source, broken, micrographs[:1])
    assert found.first is not None
    assert found.first.name == f"{name}/Conv"
    assert all(entry.own < 1e-5 for entry in found.layers if entry is not found.first)
    assert found.a.startswith(str(source))
    assert ["exported to ONNX" in found.remarks[0], "was not made from" in found.remarks[1]] == [True, True]


# --------------------------------------------------------------------------------- errors


def test_requests_that_make_no_sense(plain: Path, micrographs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no micrograph"):
        compare(plain, plain, [])
    with pytest.raises(UsageError, match="limit must be positive"):
        compare(plain, plain, micrographs, limit=0)
    with pytest.raises(UsageError, match=r"classes dark, middle, bright and .* has matrix, pore, grain"):
        compare(plain, tiny_model(tmp_path / "tiny.onnx"), micrographs)
    with pytest.raises(UsageError, match=r"takes a height of 64 and .* of 96: nothing fits both"):
        compare(residual_model(tmp_path / "s.onnx", size=64), residual_model(tmp_path / "l.onnx", size=96), micrographs)
    with pytest.raises(UsageError, match="60x64 do not fit"):
        compare(plain, plain, micrographs, size=(60, 64))
    with pytest.raises(BadInputFile, match="does not exist"):
        compare(plain, tmp_path / "missing.onnx", micrographs)


def test_networks_without_anything_in_common(plain: Path, micrographs: list[Path], tmp_path: Path) -> None:
    model, manifest = load_model(plain)
    for node in model.graph.node:
        node.name = f"other/{node.name}"
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = f"other.{name}" if name not in ("", "image", "labels") else name
    for entry in model.graph.initializer:
        entry.name = f"other.{entry.name}"
    other = save_model(model, tmp_path / "other.onnx", manifest)
    with pytest.raises(UsageError, match="no activation in common"):
        compare(plain, other, micrographs, size=SIZE)
    assert compare(plain, other, micrographs, size=SIZE, layers=False).labels.agreement == 1


def test_tensors_of_other_shapes(plain: Path, micrographs: list[Path], tmp_path: Path) -> None:
    model, manifest = load_model(plain)
    for entry in model.graph.initializer:
        if entry.name in ("first.weight", "first.bias"):  # twice the channels
            values = numpy_helper.to_array(entry)
            entry.CopyFrom(numpy_helper.from_array(np.concatenate([values, values]), entry.name))
        if entry.name == "second.weight":
            values = numpy_helper.to_array(entry) / 2
            entry.CopyFrom(numpy_helper.from_array(np.concatenate([values, values], axis=1), entry.name))
    other = save_model(model, tmp_path / "b.onnx", manifest)
    with pytest.raises(UserError, match="different shapes"):
        compare(plain, other, micrographs, size=SIZE)
    assert compare(plain, other, micrographs, size=SIZE, layers=False).labels.agreement > 0.999


def test_a_fixed_size_is_used(plain: Path, micrographs: list[Path], tmp_path: Path) -> None:
    fixed = residual_model(tmp_path / "fixed.onnx", batch=3, size=32)
    found = compare(plain, fixed, micrographs)
    assert "crops of 32x32" in found.crops
    assert found.labels.agreement == 1
    assert found.first is None


# ------------------------------------------------------------------------------ real data


def test_the_trained_network(sem_data: Path, tmp_path: Path) -> None:
    """Shipped model in FP16, one of its 61 kernels four times too large."""
    images = find_images(sem_data / "nasa-super1", "val")[:1]
    model, manifest = load_model(locate("nasa-super1"))
    name = "backbone.spatial_branch_layers.0.1.conv1.conv"
    half = save_model(to_half(model), tmp_path / "half.onnx", manifest.replace(precision="fp16"))
    broken = changed(half, tmp_path / "broken.onnx", f"{name}.weight", 4)
    found = compare("nasa-super1", broken, images, size=(128, 128))
    assert len(found.layers) > 150
    assert found.first is not None
    assert found.first.name == f"{name}/Conv"
    assert found.worst()[0] is found.first
    assert found.first.block == "backbone.spatial_branch_layers.0.1"
    assert found.worst(2)[1].own < 0.01
    softmax = next(entry for entry in found.layers if entry.operator == "Softmax")
    assert softmax.own < 0.01 < 0.3 < softmax.error


def test_probes_read_only_float32(plain: Path) -> None:
    """Shape arithmetic and labels are no layers."""
    model, _ = load_model(plain)
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    types = {entry.name: entry.type.tensor_type.elem_type for entry in inferred}
    assert {types[entry.b] for entry in match_layers(model, model)} == {TensorProto.FLOAT}
