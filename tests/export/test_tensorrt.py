"""Building engines with the real TensorRT-RTX builder, which needs no GPU."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError
from hpddrnet_trt.core.manifest import EngineRecord, Manifest, read_manifest, sidecar_path
from hpddrnet_trt.engines.tensorrt_library import load_tensorrt
from hpddrnet_trt.export.build_settings import BuildSettings
from hpddrnet_trt.export.layer_precision import (
    check_report,
    check_sizes,
    reformats_from_inspector,
    report_from_inspector,
    report_from_network,
    summary,
)
from hpddrnet_trt.export.onnx import store_in_half
from hpddrnet_trt.export.tensorrt import build_engine
from hpddrnet_trt.graph.model import save_model
from hpddrnet_trt.graph.nodes import fold_constants
from tests.graph.parsed_rtx import Parsed, needs_rtx
from tests.tiny_export import exported, pictures, write_fp16, write_fp32
from tests.tiny_onnx import HIDDEN, tiny_model

SHAPES = "1x1x64x64:1x1x128x128:2x1x256x256"


def engine_of(source: Path, precision: Any = "fp32", *, target: Path | None = None, **options: Any) -> Manifest:
    """Build an engine of TensorRT-RTX without a progress bar; ``options`` of the builder, or of the function."""
    settings = {entry.name for entry in fields(BuildSettings)} & set(options)
    chosen = BuildSettings(**{"progress": False, **{name: options.pop(name) for name in settings}})
    target = target or source.with_name("m.engine")
    return build_engine(source, target, precision=precision, settings=chosen, **{"runtime": "tensorrt-rtx", **options})


def record_of(manifest: Manifest) -> EngineRecord:
    assert manifest.engine is not None
    return manifest.engine


def nothing_written(source: Path) -> bool:
    return list(source.parent.iterdir()) == [source]


@pytest.fixture
def static(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "m.onnx", shape=(1, 64, 64))


# --- building


@needs_rtx
@pytest.mark.parametrize(("precision", "operands"), [("fp32", "FLOAT"), ("fp16", "HALF"), ("int8", "INT8")])
def test_engine_description_and_proof(tmp_path: Path, precision: Any, operands: str) -> None:
    source, target = tiny_model(tmp_path / "m.onnx", typing=precision), tmp_path / "out" / "m.engine"
    manifest = engine_of(source, precision, target=target, shapes=SHAPES)
    assert set(target.parent.iterdir()) == {target, sidecar_path(target)}
    assert read_manifest(target) == manifest
    engine = record_of(manifest)
    assert engine.sha256 == hashlib.sha256(target.read_bytes()).hexdigest()
    assert engine.bytes == target.stat().st_size > 1000
    assert (engine.runtime, engine.compute_capabilities) == ("tensorrt-rtx", ["portable"])
    assert engine.profiles == [{"min": [1, 1, 64, 64], "opt": [1, 1, 128, 128], "max": [2, 1, 256, 256]}]
    assert manifest.precision == precision
    assert manifest.input is not None
    assert (str(manifest.input.batch), str(manifest.input.height)) == ("1..2", "64..256")
    assert manifest.versions["tensorrt-rtx"] == engine.version
    parsed = engine.layer_precision.get("parsed_network", engine.layer_precision)  # nested where the inspector spoke
    assert parsed["source"] == "parsed network"
    assert parsed["convolutions"] == {precision: 2}
    assert parsed["macs_share"] == {precision: 1.0}
    assert parsed["macs"] == 128 * 128 * (9 * HIDDEN + HIDDEN * 3)
    assert [row["operands"] for row in parsed["layers"]] == [[operands] * 2] * 2
    graph = engine.layer_precision["graph"]
    if "parsed_network" not in engine.layer_precision:
        assert {"grey", "labels"} <= {entry["name"] for entry in graph if entry["conversion"]}
        assert {entry["precision"] for entry in graph if entry["type"] == "CONVOLUTION"} == {precision}
        assert graph[0]["inputs"] == ["image"]
    assert f"{precision} 2 of 2 convolutions and 100% of all multiply-accumulates" in summary(parsed)


@needs_rtx
def test_multiply_accumulates_of_every_product() -> None:
    """Counted by hand: transposed matrix product, grouped convolution, transposed convolution."""
    api = load_tensorrt("tensorrt-rtx")
    trt = api.module
    network = trt.Builder(api.log).create_network(0)
    image = network.add_input("image", trt.float32, (1, 6, -1, 16))
    kernel, widening = np.ones((4, 3, 3, 3), np.float16), np.ones((6, 5, 2, 2), np.float32)
    half = network.add_cast(image, trt.float16).get_output(0)
    grouped = network.add_convolution_nd(half, 4, (3, 3), trt.Weights(kernel), trt.Weights())
    grouped.num_groups, grouped.padding_nd = 2, (1, 1)
    wider = network.add_deconvolution_nd(image, 5, (2, 2), trt.Weights(widening), trt.Weights())
    wider.stride_nd = (2, 2)
    product = network.add_matrix_multiply(image, trt.MatrixOperation.TRANSPOSE, image, trt.MatrixOperation.NONE)
    for layer in (grouped, wider, product):
        network.mark_output(layer.get_output(0))
    proof = report_from_network(trt, network, (1, 6, 8, 16))
    assert {row["type"]: row["macs"] for row in proof["layers"]} == {
        "CONVOLUTION": 8 * 16 * 4 * 9 * 3,  # pixels, output channels, window, input channels of a group
        "DECONVOLUTION": 8 * 16 * 6 * 4 * 5,  # input pixels, input channels, window, output channels
        "MATRIX_MULTIPLY": 6 * 16 * 16 * 8,  # matrices, rows, columns, inner size
    }
    assert proof["convolutions"] == {"fp16": 1, "fp32": 1}
    assert proof["macs"] == sum(row["macs"] for row in proof["layers"])
    assert sum(proof["macs_share"].values()) == pytest.approx(1, abs=1e-5)
    assert network.get_input(0).shape == (1, 6, -1, 16)


@needs_rtx
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_an_fp32_file_is_converted_or_calibrated(static: Path, precision: str) -> None:
    images = pictures(static.parent / "images", 4) if precision == "int8" else None
    manifest = engine_of(static, precision, calibration_images=images)
    assert manifest.precision == precision
    assert record_of(manifest).layer_precision["convolutions"].get(precision, 0) > 0
    assert (manifest.quantized_for, manifest.calibration is not None) == (
        ("tensorrt", True) if images else (None, False)
    )
    assert read_manifest(static).precision == "fp32"


@needs_rtx
def test_a_static_model_needs_no_shapes_and_builds_are_repeatable(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Options that an RTX engine does not depend on say so, and the bar goes to a terminal on stderr."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    source, plans = tiny_model(tmp_path / "m.onnx", shape=(2, 64, 128)), set()
    ignored: list[dict[str, Any]] = [{"optimization_level": 5}, {"tiling": "full"}, {"sparsity": True}]
    for options in ({}, {"progress": True}, *ignored, {"timing_cache": tmp_path / "t.cache"}):
        caplog.clear()
        engine = record_of(engine_of(source, **options))
        assert engine.profiles == [{key: [2, 1, 64, 128] for key in ("min", "opt", "max")}]
        assert ("do not change the file" in caplog.text) == (options in ignored)
        assert ("has no timing cache" in caplog.text) == ("timing_cache" in options)
        plans.add((tmp_path / "m.engine").read_bytes())
        captured = capsys.readouterr()
        assert captured.out == ""
        assert ("building m: 100%" in captured.err) == ("progress" in options)
    assert len(plans) == 1
    assert not (tmp_path / "t.cache").exists()


@needs_rtx
def test_a_dynamic_model_without_shapes_names_its_profile(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hpddrnet_trt.export.tensorrt"):
        engine_of(tiny_model(tmp_path / "m.onnx"))
    assert "building for 1x1x8x8:1x1x1024x1024:1x1x2048x2048" in caplog.text


@needs_rtx
def test_several_profiles_targets_and_level(tmp_path: Path) -> None:
    options = {"compute_capabilities": ["8.9", "12.0", "8.9"], "optimization_level": 0, "workspace_mib": 512}
    manifest = engine_of(tiny_model(tmp_path / "m.onnx"), shapes=f"{SHAPES},4x1x64x64", **options)
    assert len(record_of(manifest).profiles) == 2
    assert record_of(manifest).compute_capabilities == ["8.9", "12.0"]
    assert manifest.input is not None
    assert str(manifest.input.batch) == "1..4"


@needs_rtx
@pytest.mark.parametrize(("shapes", "known"), [("1x1x128x128", True), ("1x1x64x64:1x1x128x128:2x1x128x128", False)])
def test_memory_for_activations_is_known_of_one_shape(tmp_path: Path, shapes: str, known: bool) -> None:
    activations = record_of(engine_of(tiny_model(tmp_path / "m.onnx"), shapes=shapes)).activation_bytes
    assert (activations is not None) == known
    assert activations is None or activations > 0


@needs_rtx
def test_weights_stored_in_half_are_constants_of_the_engine(tmp_path: Path) -> None:
    """Kernels behind casts would be second inputs of their convolutions."""
    model, manifest = exported()
    store_in_half(model)
    stored = save_model(model, tmp_path / "m.onnx", manifest)
    fold_constants(model.graph)
    plain = save_model(model, tmp_path / "plain.onnx", manifest)
    plans = []
    for source in (stored, plain):
        engine_of(source, shapes="1x1x64x64")
        plans.append((tmp_path / "m.engine").read_bytes())
    assert plans[0] == plans[1]


# --- refusals


def test_tensors_that_kernels_cannot_address(tmp_path: Path) -> None:
    """Scores of 8 x (2048 / 16)^4 are one more than fits; in BF16 they are never stored."""
    half = Parsed(onnx.load(str(write_fp16(tmp_path / "half.onnx"))))
    check_sizes(half.trt, half.network, (8, 1, 2048, 2048))
    source = write_fp32(tmp_path / "m.onnx")
    full = Parsed(onnx.load(str(source)))
    check_sizes(full.trt, full.network, (7, 1, 2048, 2048))
    with pytest.raises(UsageError, match=r"at 8x1x2048x2048 .*sps.* makes 2147483648 .* smaller largest batch"):
        engine_of(source, shapes="1x1x64x64,8x1x2048x2048")
    assert not list(tmp_path.glob("*.engine*"))


@needs_rtx
@pytest.mark.parametrize(
    ("described", "precision", "images", "says"),
    [
        ({}, "int8", None, "hpddrnet-trt calibrate m.onnx m.int8.onnx --data"),
        ({"precision": "int8", "quantized_for": "onnxruntime"}, "int8", None, "quantised for ONNX Runtime"),
        ({"precision": "int8", "quantized_for": "tensorrt"}, "fp32", None, "INT8, FP32 was asked for"),
        ({"precision": "fp16"}, "int8", None, "FP16, INT8 was asked for"),
        ({"precision": "fp16"}, "fp32", None, "choose --precision fp16"),
        ({}, "fp32", "images", "leave the images out"),
        ({"precision": "fp16"}, "fp16", "images", "leave the images out"),
        ({"precision": "int8", "quantized_for": "tensorrt"}, "int8", "images", "leave the images out"),
        ({}, "fp8", None, "hpddrnet-trt calibrate m.onnx m.fp8.onnx --data"),
        ({}, "int4", None, "precision 'int4' is unknown; choose fp32, fp16, bf16, int8, fp8"),
    ],
)
def test_precision_refusals(
    tmp_path: Path, described: dict[str, Any], precision: Any, images: str | None, says: str
) -> None:
    source = tiny_model(tmp_path / "m.onnx", shape=(1, 64, 64), **described)
    with pytest.raises(UsageError) as caught:
        engine_of(source, precision, calibration_images=images)
    assert says in str(caught.value)
    assert nothing_written(source)


@needs_rtx
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"runtime": "trt"}, "runtime 'trt' is unknown"),
        ({"compute_capabilities": ["9.0"]}, "'9.0' is not one that TensorRT-RTX"),
        ({"workspace_mib": 0}, "give at least 1"),
        ({"optimization_level": 6}, "give 0 to 5"),
        ({"tiling": "deep"}, "tiling 'deep' is unknown; choose none, fast, moderate, full"),
        ({"version_compatible": True}, "cannot build version-compatible engines"),
    ],
)
def test_option_refusals(static: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        engine_of(static, **options)
    assert says in str(caught.value)
    assert nothing_written(static)


@needs_rtx
def test_tensorrt_builds_for_the_gpu_it_runs_on() -> None:
    api = load_tensorrt("tensorrt-rtx")
    with pytest.raises(UsageError, match="builds for the GPU it runs on"):
        BuildSettings(compute_capabilities=["8.9"]).check(type(api)("tensorrt", api.module, api.version, api.log))


def test_bad_files(tmp_path: Path) -> None:
    good = tiny_model(tmp_path / "good.onnx", shape=(1, 64, 64))
    (tmp_path / "m.safetensors").write_bytes(b"x")
    (tmp_path / "garbage.onnx").write_bytes(good.read_bytes()[:200])
    tiny_model(tmp_path / "foreign.onnx", shape=(1, 64, 64), described=False)
    tiny_model(tmp_path / "half.onnx", shape=(1, 64, 64), input=None)
    for source, target, kind, says in (
        ("none.onnx", "m.engine", BadInputFile, r"none\.onnx does not exist"),
        ("good.onnx", "m.trt", UsageError, r"must end with \.engine; write .*m\.engine"),
        ("m.safetensors", "m.engine", UsageError, "is not an ONNX file"),
        ("garbage.onnx", "m.engine", BadInputFile, "is not a readable ONNX file"),
        ("foreign.onnx", "m.engine", BadInputFile, "carries no description"),
        ("half.onnx", "m.engine", BadInputFile, "does not describe its input"),
    ):
        with pytest.raises(kind, match=says):
            engine_of(tmp_path / source, target=tmp_path / target)
    assert not list(tmp_path.glob("*.engine*"))


def _mystery(model: onnx.ModelProto) -> None:
    model.graph.node[0].CopyFrom(helper.make_node("Mystery", ["image"], ["grey"], name="odd", domain="nowhere"))
    model.opset_import.append(helper.make_opsetid("nowhere", 1))


def _other_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 1, 64, 64]))
    model.graph.node[0].input[0] = "x"


def _quantized_weights_alone(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "Conv":
            node.input[0] = node.input[0].removesuffix("_dq")


@needs_rtx
@pytest.mark.parametrize(
    ("typing", "described", "change", "says"),
    [
        ("fp32", "fp32", _mystery, r"cannot read .*m\.onnx: .*Mystery"),
        ("fp32", "fp32", _other_input, r"inputs \['x'\] instead of \['image'\]"),
        ("int8", "int8", _quantized_weights_alone, r"labelled INT8, but none of its .* is .*2 in FP16.*calibrate"),
        ("fp32", "fp16", lambda model: None, "labelled FP16, but none of its convolutions is"),
    ],
)
def test_what_the_file_does_not_hold(tmp_path: Path, typing: Any, described: str, change: Any, says: str) -> None:
    source = tiny_model(tmp_path / "m.onnx", typing=typing, shape=(1, 64, 64), precision=described)
    model = onnx.load(str(source))
    change(model)
    onnx.save(model, str(source))
    with pytest.raises(UserError, match=says) as caught:
        engine_of(source, described)
    assert "\n" not in str(caught.value)
    assert nothing_written(source)


@needs_rtx
@pytest.mark.parametrize(
    ("precision", "options", "says"),
    [
        ("int8", {"shapes": "1x1x2048x2048", "workspace_mib": 1}, "workspace limit of 1 MiB may be too small"),
        ("bf16", {"compute_capabilities": ["7.5"]}, r"BF16 runs on compute capability 8\.0 and later"),
        ("fp16", {"compute_capabilities": ["7.5"]}, r"no FP32 matrix products .* build with TensorRT 10 on that GPU"),
    ],
)
def test_a_failed_build_gives_advice_and_leaves_nothing(
    tmp_path: Path, precision: str, options: dict[str, Any], says: str
) -> None:
    if precision == "fp16":  # with position attention
        source = write_fp16(tmp_path / "m.onnx")
    else:
        source = tiny_model(tmp_path / "m.onnx", typing="int8" if precision == "int8" else "fp32")
    with pytest.raises(UserError, match=f"could not build .*{says}") as caught:
        engine_of(source, precision, **{"shapes": "1x1x64x64", **options})
    assert "/_src/" not in str(caught.value)
    assert nothing_written(source)


@needs_rtx
def test_an_unwritable_target(static: Path) -> None:
    (static.parent / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write"):
        engine_of(static, target=static.parent / "file" / "m.engine")


# --- what the engine inspector says (its JSON needs a GPU: the forms are those of NVIDIA's documentation)

PARSED = {"source": "parsed network", "convolutions": {"int8": 1}, "macs_share": {"int8": 1.0}}


def _cask(weights: str, source: dict[str, str]) -> dict[str, Any]:
    return {
        "Name": "conv + relu",
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "x", "Dimensions": [1, 8, 64, 64], **source}],
        "ParameterType": "Convolution",
        "Weights": {"Type": weights, "Count": 64},
        "Bias": {"Type": "Float", "Count": 8},
    }


@pytest.mark.parametrize(
    ("layer", "precision"),
    [
        (_cask("Int8", {"Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format."}), "int8"),
        (_cask("Half", {"Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}), "fp16"),
        (_cask("Float", {"Format/Datatype": "Row major linear FP32"}), "fp32"),
        (_cask("Int8", {"Format/Datatype": "Row major linear FP16 format"}), "fp16"),
        (_cask("Int8", {"DataType": "Int8", "Format": "kCHW32"}), "int8"),
        (_cask("Int8", {"Format/Datatype": "N/A due to dynamic shapes"}), "int8"),
        ({"LayerType": "conv", "Inputs": [{"Name": "x", "Format/Datatype": "BFloat16"}]}, "bf16"),
    ],
)
def test_inspector_forms(layer: dict[str, Any], precision: str) -> None:
    layers = [{"LayerType": "Reformat", "Inputs": [{"Format/Datatype": "Row major linear FP32"}]}, layer]
    proof = report_from_inspector(json.dumps({"Layers": layers, "Bindings": ["image"]}), PARSED)
    assert proof["source"] == "engine inspector"
    assert proof["convolutions"] == {precision: 1}
    assert proof["layer_types"] == {"Reformat": 1, layer["LayerType"]: 1}
    assert proof["parsed_network"] == PARSED
    copy, built = proof["graph"]
    assert (copy["type"], copy["precision"], copy["conversion"]) == ("Reformat", "", True)
    assert (built["inputs"], built["precision"], built["conversion"]) == (["x"], precision, False)
    if precision != "int8":
        with pytest.raises(UserError, match=f"labelled INT8, but .* .engine inspector: 1 in {precision.upper()}"):
            check_report(proof, "int8", "the engine")


COPY = "Reformatting CopyNode for Input Tensor 0 to conv + relu"


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ([{"Name": COPY, "LayerType": "Reformat", "ParameterType": "Reformat"}, _cask("Int8", {})], [COPY]),
        ([{"Name": "image_cast", "LayerType": "Reformat"}, _cask("Int8", {})], ["image_cast"]),
        ([{"Name": COPY, "LayerType": "NoOp"}], [COPY]),
        ([COPY, "conv + relu", COPY.replace("Input", "Output")], [COPY, COPY.replace("Input", "Output")]),
        ([_cask("Int8", {})], []),
        ([], []),
    ],
)
def test_conversions_in_the_engine(layers: list[Any], names: list[str]) -> None:
    found = reformats_from_inspector(json.dumps({"Layers": layers, "Bindings": ["image"]}))
    assert (found["names"], found["layers"], found["reformats"]) == (names, len(layers), len(names))
    assert found["share"] == pytest.approx(len(names) / max(len(layers), 1), abs=1e-6)
    assert "remark" not in found


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"Layers": ["conv + relu"]}', '{"Layers": [{"LayerType": "kgen"}]}'])
def test_silent_inspector_falls_back_to_the_parsed_network(text: str) -> None:
    proof = report_from_inspector(text, PARSED)
    assert (proof["source"], proof["convolutions"]) == ("parsed network", PARSED["convolutions"])
    assert "engine inspector" in proof["remark"]
    if "Layers" not in text:
        assert "no readable list" in reformats_from_inspector(text)["remark"]
