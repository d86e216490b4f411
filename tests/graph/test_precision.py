"""FP16 and BF16 typing: which tensor has which type, that labels stay, what TensorRT makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from PIL import Image

from hpddrnet_trt.data.simulate import simulate
from hpddrnet_trt.export.layer_precision import check_report, report_from_network
from hpddrnet_trt.graph.attention import in_type
from hpddrnet_trt.graph.model import load_model
from hpddrnet_trt.graph.nodes import consumers, initializers, producers, tensor_types
from hpddrnet_trt.graph.precision import (
    FP16_MAX,
    SMALLEST_SCALE,
    attention_score_nodes,
    half_scale,
    normalization_nodes,
    score_nodes,
    to_half,
)
from hpddrnet_trt.graph.rounding import simulate_rounding
from tests.graph.conftest import SHIPPED
from tests.graph.parsed_rtx import Parsed
from tests.tiny_export import small_model, write_loud

FP32, FP16, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16

@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_loud(tmp_path_factory.mktemp("precision") / "fp32.onnx")


@pytest.fixture(scope="module")
def half(source: Path) -> onnx.ModelProto:
    return to_half(load_model(source)[0])


@pytest.fixture(scope="module")
def brain(source: Path) -> onnx.ModelProto:
    return to_half(load_model(source)[0], kind="bf16")


def picture(height: int = 64, width: int = 96, seed: int = 0) -> npt.NDArray[np.uint8]:
    return simulate(height, width, seed=seed)[0]


def run(model: onnx.ModelProto, image: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, {model.graph.input[0].name: image}))


def test_everything_is_fp16_but_what_needs_more(half: onnx.ModelProto) -> None:
    model = half
    types = tensor_types(model)
    scores = attention_score_nodes(model.graph)
    full = {
        node.name
        for node in model.graph.node
        if node.op_type != "Cast" and any(types[name] == FP32 for name in node.output)
    }
    assert {types[name] for node in model.graph.node if node.name in scores for name in node.output} == {BF16}
    confidence = full - normalization_nodes(model.graph)
    assert {node.op_type for node in model.graph.node if node.name in confidence} == {
        "Max", "Sub", "Exp", "Add", "Reciprocal", "DepthToSpace", "Squeeze",
    }  # fmt: skip
    weights = [entry for entry in model.graph.initializer if entry.data_type == FP32]
    assert {reader.op_type for entry in weights for reader in consumers(model.graph)[entry.name]} <= {
        "Resize", "Mul", "Add",  # the last two: of the image's normalisation
    }  # fmt: skip


@pytest.mark.parametrize("scores", ["bf16", "fp32"])
def test_attention_is_wider_than_fp16(half: onnx.ModelProto, source: Path, scores: str) -> None:
    """BF16 throughout; with FP32 scores the product with the values is FP16 again."""
    graph = half.graph if scores == "bf16" else in_type(to_half(load_model(source)[0]), "fp32").graph
    made, readers = producers(graph), consumers(graph)
    softmaxes = [node for node in graph.node if node.op_type == "Softmax"]
    assert len(softmaxes) == 2
    for softmax in softmaxes:
        product, (after,) = made[softmax.input[0]], readers[softmax.output[0]]
        assert product.op_type == "MatMul"  # and no cast between the two
        read = list(product.input)
        if scores == "bf16":
            assert after.op_type == "MatMul"  # nor between these
            read.append(after.input[1])
            (after,) = readers[after.output[0]]
            assert after.op_type == "Squeeze"
            (after,) = readers[after.output[0]]
        for name in read:
            assert (made[name].op_type, made[name].attribute[0].i) == ("Cast", {"bf16": BF16, "fp32": FP32}[scores])
        assert (after.op_type, after.attribute[0].i) == ("Cast", FP16)


def test_the_image_is_normalized_in_fp32_and_rounded_once(half: onnx.ModelProto) -> None:
    graph = half.graph
    (node,) = consumers(graph)["image"]
    assert (node.op_type, node.attribute[0].i) == ("Cast", FP32)
    operators = []
    while node.op_type != "Conv":
        operators.append(node.op_type)
        (node,) = consumers(graph)[node.output[0]]
    assert operators == ["Cast", "Mul", "Add", "Cast"]


def test_a_sum_of_grey_levels_and_features_is_no_normalization() -> None:
    """The image's own channels may be joined; what a convolution made of it ends the normalisation."""
    constants = {"w": np.ones((3, 3, 1, 1), np.float32), "h": np.float32(0.5)}
    nodes = [
        helper.make_node("Mul", ["image", "h"], ["scaled"], "scaled"),
        helper.make_node("Shape", ["image"], ["size"], "size"),
        helper.make_node("ConstantOfShape", ["size"], ["empty"], "empty"),
        helper.make_node("Sub", ["scaled", "empty"], ["grey"], "grey"),
        helper.make_node("Conv", ["grey", "w"], ["features"], "features"),
        helper.make_node("Add", ["grey", "features"], ["sum"], "sum"),
        helper.make_node("Mul", ["sum", "h"], ["product"], "product"),
        helper.make_node("Concat", ["grey", "scaled"], ["both"], "both", axis=1),
        helper.make_node("Concat", ["both", "product"], ["logits"], "all", axis=1),
    ]
    model = small_model(nodes, constants, (1, 3, 4, 4), channels=9)
    assert normalization_nodes(model.graph) == {"scaled", "grey", "both"}


def test_honest_fp16_arithmetic(source: Path, half: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX's own evaluator rounds every result to FP16; without BF16 attention it gives no numbers."""
    image = picture()[None, None]
    want, want_confidence = run(onnx.load(str(source)), image)
    labels, confidence = ReferenceEvaluator(half).run(None, {"image": image})
    assert len(np.unique(want)) > 1
    assert np.isfinite(confidence).all()
    assert np.mean(labels == want) > 0.97
    assert np.mean(np.abs(confidence - want_confidence)) < 0.02
    monkeypatch.setattr("hpddrnet_trt.graph.precision.attention_score_nodes", lambda graph: set())
    monkeypatch.setattr("hpddrnet_trt.graph.precision.in_type", lambda model, scores, leave: model)
    naive = to_half(load_model(source)[0])
    with np.errstate(all="ignore"):
        _, confidence = ReferenceEvaluator(naive).run(None, {"image": image})
    assert not np.isfinite(confidence).all()


def test_named_nodes_and_oversized_weights_stay(source: Path) -> None:
    model, _ = load_model(source)
    classifier = next(node for node in model.graph.node if node.name == "conv_seg/Conv")
    del classifier.input[2:]
    classifier.input.append("large")
    model.graph.initializer.append(numpy_helper.from_array(np.array([1e5, 0, 0], np.float32), "large"))
    result = to_half(model, ["backbone.stem.1.conv/Conv"])
    types = tensor_types(result)
    outputs = {node.name: node.output[0] for node in result.graph.node}
    assert types[outputs["conv_seg/Conv"]] == FP32
    assert types[outputs["backbone.stem.1.conv/Conv"]] == FP32
    assert types[outputs["backbone.stem.0.conv.conv/Conv"]] == FP16
    onnx.checker.check_model(result, full_check=True)


def test_float_input_and_logits_stay_fp32() -> None:
    constants = {"w": np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1)}
    model = small_model([helper.make_node("Conv", ["image", "w"], ["logits"], "c")], constants, (1, 3, 4, 4))
    result = to_half(model)
    onnx.checker.check_model(result, full_check=True)
    assert [node.op_type for node in result.graph.node] == ["Cast", "Conv", "Cast"]


def test_weight_read_in_both_types_is_stored_twice() -> None:
    constants = {"w": np.full((3, 1, 1), 0.5, np.float32)}
    nodes = [helper.make_node("Max", ["image", "w"], ["a"], "m"), helper.make_node("Add", ["a", "w"], ["logits"], "s")]
    result = to_half(small_model(nodes, constants, (1, 3, 4, 4)), ["s"])
    assert {entry.name: entry.data_type for entry in result.graph.initializer} == {"w": FP32, "w.fp16": FP16}
    (got,) = run(result, np.ones((1, 3, 4, 4), np.float32))
    np.testing.assert_allclose(got, 1.5, atol=1e-3)


def test_explicit_int8_graph() -> None:
    """Scales become FP16; those that FP16 cannot hold are raised and the stored weights re-rounded."""
    rng = np.random.default_rng(0)
    scales = np.array([1e-2, 3e-6], np.float32)  # the second is below the smallest normal FP16 number
    stored = rng.integers(-127, 128, (2, 3, 1, 1)).astype(np.int8)
    constants = {
        "sx": np.float32(0.02), "zx": np.int8(0), "w": stored, "sw": scales, "zw": np.zeros(2, np.int8),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "sx", "zx"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "sx", "zx"], ["x"], "dx"),
        helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["wf"], "dw", axis=0),
        helper.make_node("Conv", ["x", "wf"], ["logits"], "c"),
    ]
    model = small_model(nodes, constants, (1, 3, 4, 4), channels=2)
    result = to_half(model)
    onnx.checker.check_model(result, full_check=True)
    types = tensor_types(result)
    assert {types[name] for name in ("sx", "sw", "x", "wf")} == {FP16}
    assert types["q"] == types["w"] == TensorProto.INT8
    values = {entry.name: numpy_helper.to_array(entry) for entry in result.graph.initializer}
    kept = values["sw"].astype(np.float32)
    before = stored * scales.reshape(2, 1, 1, 1)
    after = values["w"] * values["sw"].astype(np.float32).reshape(2, 1, 1, 1)
    assert np.abs(after - before)[1].max() <= kept[1] / 2 * (1 + 1e-6)
    np.testing.assert_allclose(after[0], before[0], rtol=1e-3)


@given(st.lists(st.floats(2.0**-30, 100, width=32), min_size=1))
def test_half_scales_are_never_too_small_and_hardly_too_large(wanted: list[float]) -> None:
    """Beyond the end of FP16 they stay, instead of an infinite scale that makes every value NaN."""
    scales = np.array(wanted, np.float32)
    kept = half_scale(scales)
    assert (kept >= scales).all()
    assert (kept <= np.maximum(scales * (1 + 1 / 16), SMALLEST_SCALE)).all()
    np.testing.assert_array_equal(kept.astype(np.float16).astype(np.float32), kept)
    large = np.array([FP16_MAX, np.nextafter(np.float32(FP16_MAX), np.float32(np.inf)), 1e9], np.float32)
    np.testing.assert_array_equal(half_scale(large), large)


# ------------------------------------------------------------------------------ BF16


def test_bf16_file(source: Path, brain: onnx.ModelProto) -> None:
    """Everything is BF16 but the image's normalisation and the class scores; the contract does not change."""
    before, model = onnx.load(str(source)), brain
    assert list(before.graph.input) == list(model.graph.input)
    assert list(before.graph.output) == list(model.graph.output)
    assert model.opset_import[0].version == 22
    types, scores = tensor_types(model), score_nodes(model.graph)
    computing = [node for node in model.graph.node if node.op_type != "Cast"]
    full = {node.name for node in computing if any(types[name] == FP32 for name in node.output)}
    assert "conv_seg/Conv" in scores
    assert full == {"backbone.stem.0.conv/Mul", "backbone.stem.0.conv/Add"} | {
        node.name for node in computing if node.name in scores and types[node.output[0]] == FP32
    }
    assert FP16 not in types.values()
    for node in computing:
        if node.op_type == "Conv" and node.name not in scores:
            assert {types[name] for name in [*node.input, *node.output]} == {BF16}
    original = initializers(before.graph)
    rounded = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer if entry.data_type == BF16}
    assert len(rounded) > 50
    for name, values in rounded.items():
        np.testing.assert_allclose(values.astype(np.float32), original[name.removesuffix(".bf16")], rtol=2.0**-8)


def test_bf16_explicit_int8_graph() -> None:
    """BF16 leaves the class scores' convolution in FP32: no Cast may part it from what dequantises for it."""
    constants = {
        "s": np.float32(0.02), "z": np.int8(0), "w": np.eye(3, dtype=np.float32)[..., None, None],
        "sr": np.float32(0.021), "sw": np.array([0.013, 0.017, 0.019], np.float32),
        "zw": np.zeros(3, np.int8), "wl": np.diag([50, 60, 70]).astype(np.int8)[..., None, None],
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "s", "z"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["x"], "d"),
        helper.make_node("Conv", ["x", "w"], ["c"], "c"),
        helper.make_node("Relu", ["c"], ["r"], "r"),
        helper.make_node("QuantizeLinear", ["r", "sr", "z"], ["qr"], "qr"),
        helper.make_node("DequantizeLinear", ["qr", "sr", "z"], ["xr"], "dr"),
        helper.make_node("DequantizeLinear", ["wl", "sw", "zw"], ["k"], "dw", axis=0),
        helper.make_node("Conv", ["xr", "k"], ["logits"], "last"),
    ]
    result = to_half(small_model(nodes, constants, (1, 3, 4, 4)), kind="bf16")
    onnx.checker.check_model(result, full_check=True)
    made, types = producers(result.graph), tensor_types(result)
    assert {types[name] for name in ("s", "x", "c", "r")} == {BF16}
    assert types["q"] == TensorProto.INT8
    last = made["logits"]
    assert [made[name].op_type for name in last.input] == ["DequantizeLinear"] * 2
    assert {types[name] for name in [*last.input, *last.output]} == {FP32}
    # Both sides of the pair have one scale, the one that BF16 can hold.
    values = {entry.name: numpy_helper.to_array(entry) for entry in result.graph.initializer}
    quantized, dequantized = (values[made[name].input[1]].astype(np.float32) for name in ("qr", "xr"))
    assert quantized == dequantized != np.float32(0.021)


# ---------------------------------------------------------------------------- real data


def test_shipped_network_on_real_micrographs(shipped: Any, sem_data: Path) -> None:
    """Rounding costs the shipped network next to nothing."""
    folder = sem_data / "nasa-super1" / "images" / "test"
    images = [np.asarray(Image.open(path))[None, None, :512, :512] for path in sorted(folder.glob("*.png"))]
    want = [run(shipped, image)[0] for image in images]
    for kind, least in (("fp16", 0.9995), ("bf16", 0.999)):
        simulation = simulate_rounding(to_half(shipped, kind=kind))  # type: ignore[arg-type]
        for image, expected in zip(images, want, strict=True):
            assert np.mean(run(simulation, image)[0] == expected) > least


def test_casts_of_constants_are_folded(shipped: onnx.ModelProto) -> None:
    """Its weights are stored in FP16 behind casts."""
    casts = sum(node.op_type == "Cast" for node in onnx.load(str(SHIPPED)).graph.node)
    assert sum(node.op_type == "Cast" for node in shipped.graph.node) == 3 < casts  # image, comparison, labels
    assert {entry.data_type for entry in shipped.graph.initializer} == {FP32, TensorProto.INT64}


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_tensorrt_rtx_parses_and_builds(half: onnx.ModelProto, brain: onnx.ModelProto, kind: str) -> None:
    parsed = Parsed({"fp16": half, "bf16": brain}[kind])
    trt, network = parsed.trt, parsed.network
    types = [network.get_layer(i).get_output(0).dtype for i in range(network.num_layers)]
    assert types.count({"fp16": trt.DataType.HALF, "bf16": trt.DataType.BF16}[kind]) > 0.8 * len(types)
    proof = report_from_network(trt, network, (1, 1, 64, 96))
    check_report(proof, kind, "it")
    # The classifier's, and the one that enlarges its scores.
    assert proof["convolutions"].get("fp32", 0) == (2 if kind == "bf16" else 0)
    operands = {name for row in proof["layers"] for name in row["operands"]}
    assert operands == {"BF16", {"fp16": "HALF", "bf16": "FLOAT"}[kind]}
    assert parsed.build() is not None
