"""Building engines with the real TensorRT-RTX builder, which needs no GPU."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError
from hpddrnet_trt.core.manifest import METADATA_KEY, Manifest, read_manifest, sidecar_path
from hpddrnet_trt.engines.tensorrt_library import (
    load_tensorrt,
)
from hpddrnet_trt.export.build_settings import BuildSettings
from hpddrnet_trt.export.layer_precision import check_report, report_from_inspector, report_from_network, summary
from hpddrnet_trt.export.tensorrt import build_engine
from tests.tiny_export import write_fp16
from tests.tiny_onnx import HIDDEN, tiny_model

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx, which builds without a GPU, is missing"
)
SHAPES = "1x1x64x64:1x1x128x128:2x1x256x256"


def engine_of(source: Path, precision: Any = "fp32", *, target: Path | None = None, **options: Any) -> Manifest:
    """Build an engine of TensorRT-RTX without a progress bar; ``options`` of the builder, or of the function."""
    settings = {entry.name for entry in fields(BuildSettings)} & set(options)
    chosen = BuildSettings(**{"progress": False, **{name: options.pop(name) for name in settings}})
    target = target or source.with_name("m.engine")
    return build_engine(source, target, precision=precision, settings=chosen, **{"runtime": "tensorrt-rtx", **options})


def _nothing_written(folder: Path, *kept: Path) -> bool:
    return set(folder.iterdir()) == set(kept)


# --- building


@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_engine_and_description(tmp_path: Path, precision: Any) -> None:
    source = tiny_model(tmp_path / "m.onnx", typing=precision)
    target = tmp_path / "out" / "m.engine"
    manifest = engine_of(source, precision, target=target, shapes=SHAPES)
    assert _nothing_written(target.parent, target, sidecar_path(target))
    assert read_manifest(target) == manifest
    assert manifest.engine is not None
    assert manifest.engine.sha256 == hashlib.sha256(target.read_bytes()).hexdigest()
    assert manifest.engine.bytes == target.stat().st_size > 1000
    assert manifest.engine.runtime == "tensorrt-rtx"
    assert manifest.engine.compute_capabilities == ["portable"]
    assert manifest.engine.profiles == [{"min": [1, 1, 64, 64], "opt": [1, 1, 128, 128], "max": [2, 1, 256, 256]}]
    assert manifest.precision == precision
    assert manifest.input is not None
    assert (str(manifest.input.batch), str(manifest.input.height)) == ("1..2", "64..256")
    assert manifest.versions["tensorrt-rtx"] == manifest.engine.version


@needs_rtx
def test_proof_counts_convolutions_and_multiply_accumulates(tmp_path: Path) -> None:
    for precision in ("fp32", "fp16", "int8"):
        source = tiny_model(tmp_path / f"{precision}.onnx", typing=precision)
        manifest = engine_of(source, precision, target=tmp_path / f"{precision}.engine", shapes=SHAPES)
        assert manifest.engine is not None
        proof = manifest.engine.layer_precision
        parsed = proof.get("parsed_network", proof)  # nested where a GPU let the inspector speak
        assert parsed["source"] == "parsed network"
        assert parsed["convolutions"] == {precision: 2}
        assert parsed["macs_share"] == {precision: 1.0}
        assert parsed["macs"] == 128 * 128 * (9 * HIDDEN + HIDDEN * 3)
        assert [row["operands"] for row in parsed["layers"]] == [
            {"fp32": ["FLOAT"] * 2, "fp16": ["HALF"] * 2, "int8": ["INT8"] * 2}[precision]
        ] * 2
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
    macs = {row["type"]: row["macs"] for row in proof["layers"]}
    assert macs["CONVOLUTION"] == 8 * 16 * 4 * 9 * 3  # pixels, output channels, window, input channels of a group
    assert macs["DECONVOLUTION"] == 8 * 16 * 6 * 4 * 5  # input pixels, input channels, window, output channels
    assert macs["MATRIX_MULTIPLY"] == 6 * 16 * 16 * 8  # matrices, rows, columns, inner size
    assert proof["convolutions"] == {"fp16": 1, "fp32": 1}
    assert proof["macs"] == sum(macs.values())
    assert sum(proof["macs_share"].values()) == pytest.approx(1, abs=1e-5)
    assert network.get_input(0).shape == (1, 6, -1, 16)


@needs_rtx
def test_micrographs_calibrate_an_fp32_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    images = tmp_path / "images"
    images.mkdir()
    for index in range(4):
        Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8)).save(images / f"{index}.png")
    source = tiny_model(tmp_path / "m.onnx", shape=(1, 64, 64))
    manifest = engine_of(source, "int8", calibration_images=images)
    assert manifest.precision == "int8"
    assert manifest.quantized_for == "tensorrt"
    assert manifest.calibration is not None
    assert manifest.engine is not None
    assert manifest.engine.layer_precision["convolutions"].get("int8", 0) > 0


@needs_rtx
def test_quantised_weights_alone_are_not_int8(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "m.onnx", typing="int8", shape=(1, 64, 64))
    model = onnx.load(str(source))
    for node in model.graph.node:
        if node.op_type == "Conv":
            node.input[0] = node.input[0].removesuffix("_dq")
    onnx.save(model, str(source))
    with pytest.raises(UserError, match=r"labelled INT8, but none of its convolutions is .*2 in FP16.*calibrate"):
        engine_of(source, "int8")
    assert _nothing_written(tmp_path, source)


@needs_rtx
def test_wrong_label_is_an_error(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "m.onnx", typing="fp32", precision="fp16", shape=(1, 64, 64))
    with pytest.raises(UserError, match="labelled FP16, but none of its convolutions is"):
        engine_of(source, "fp16")
    assert _nothing_written(tmp_path, source)


@needs_rtx
def test_static_model_needs_no_shapes_and_builds_are_repeatable(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "m.onnx", shape=(2, 64, 128))
    records = [
        engine_of(source, "fp32", target=tmp_path / name).engine
        for name in ("a.engine", "b.engine")
    ]
    assert records[0] is not None
    assert records[1] is not None
    assert records[0].profiles == [{key: [2, 1, 64, 128] for key in ("min", "opt", "max")}]
    assert records[0].sha256 == records[1].sha256


@needs_rtx
def test_dynamic_model_without_shapes_names_its_profile(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tiny_model(tmp_path / "m.onnx")
    with caplog.at_level(logging.WARNING, logger="hpddrnet_trt.export.tensorrt"):
        engine_of(source, "fp32")
    assert "building for 1x1x8x8:1x1x1024x1024:1x1x2048x2048" in caplog.text


@needs_rtx
def test_several_profiles_targets_and_level(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "m.onnx")
    manifest = engine_of(
        source, "fp32", shapes=f"{SHAPES},4x1x64x64",
        compute_capabilities=["8.9", "12.0", "8.9"], optimization_level=0, workspace_mib=512,
    )
    assert manifest.engine is not None
    assert len(manifest.engine.profiles) == 2
    assert manifest.engine.compute_capabilities == ["8.9", "12.0"]
    assert manifest.input is not None
    assert str(manifest.input.batch) == "1..4"


@needs_rtx
def test_timing_cache_is_ignored_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tiny_model(tmp_path / "m.onnx", shape=(1, 64, 64))
    engine_of(source, "fp32", timing_cache=tmp_path / "t.cache")
    assert "has no timing cache" in caplog.text
    assert not (tmp_path / "t.cache").exists()


@needs_rtx
def test_fp32_file_is_converted_to_fp16(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "m.onnx", shape=(1, 64, 64))
    manifest = engine_of(source, "fp16")
    assert manifest.precision == "fp16"
    assert manifest.engine is not None
    assert manifest.engine.layer_precision["convolutions"].get("fp16", 0) > 0
    assert read_manifest(source).precision == "fp32"


@needs_rtx
def test_progress_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_model(tmp_path / "m.onnx", shape=(1, 64, 64))
    engine_of(source, "fp32", progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "building m: 100%" in captured.err


# --- refusals


@pytest.mark.parametrize(
    ("fields", "precision", "images", "says"),
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
@needs_rtx
def test_precision_refusals(
    tmp_path: Path, fields: dict[str, Any], precision: Any, images: str | None, says: str
) -> None:
    source = tiny_model(tmp_path / "m.onnx", shape=(1, 64, 64), **fields)
    with pytest.raises(UsageError) as caught:
        engine_of(source, precision, calibration_images=images)
    assert says in str(caught.value)
    assert _nothing_written(tmp_path, source)


def test_bad_files(tmp_path: Path) -> None:
    def build(source: Path, target: str = "m.engine") -> None:
        engine_of(source, "fp32", target=tmp_path / target)

    good = tiny_model(tmp_path / "good.onnx", shape=(1, 64, 64))
    with pytest.raises(BadInputFile, match=r"none\.onnx does not exist"):
        build(tmp_path / "none.onnx")
    with pytest.raises(UsageError, match=r"must end with \.engine; write .*m\.engine"):
        build(good, "m.trt")
    other = tmp_path / "m.safetensors"
    other.write_bytes(b"x")
    with pytest.raises(UsageError, match="is not an ONNX file"):
        build(other)
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(good.read_bytes()[:200])
    with pytest.raises(BadInputFile, match="is not a readable ONNX file"):
        build(garbage)
    with pytest.raises(BadInputFile, match="carries no description"):
        build(tiny_model(tmp_path / "foreign.onnx", shape=(1, 64, 64), described=False))
    with pytest.raises(BadInputFile, match="does not describe its input"):
        build(tiny_model(tmp_path / "half.onnx", shape=(1, 64, 64), input=None))
    assert not list(tmp_path.glob("*.engine*"))


@needs_rtx
def test_operator_that_the_parser_does_not_know(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "m.onnx", shape=(1, 64, 64))
    model = onnx.load(str(source))
    model.graph.node[0].CopyFrom(helper.make_node("Mystery", ["image"], ["grey"], name="odd", domain="nowhere"))
    model.opset_import.append(helper.make_opsetid("nowhere", 1))
    onnx.save(model, str(source))
    with pytest.raises(BadInputFile, match=r"cannot read .*m\.onnx: .*Mystery") as caught:
        engine_of(source, "fp32")
    assert "\n" not in str(caught.value)
    assert _nothing_written(tmp_path, source)


@needs_rtx
def test_other_input_name(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "m.onnx", shape=(1, 64, 64))
    model = onnx.load(str(source))
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 1, 64, 64]))
    model.graph.node[0].input[0] = "x"
    onnx.save(model, str(source))
    with pytest.raises(BadInputFile, match=r"inputs \['x'\] instead of \['image'\]"):
        engine_of(source, "fp32")


@needs_rtx
def test_failed_build_explains_itself_and_leaves_nothing(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "m.onnx", typing="int8")
    with pytest.raises(UserError) as caught:
        engine_of(source, "int8", shapes="1x1x2048x2048", workspace_mib=1)
    assert "could not build" in str(caught.value)
    assert "workspace limit of 1 MiB" in str(caught.value)
    assert "/_src/" not in str(caught.value)
    assert _nothing_written(tmp_path, source)


@needs_rtx
def test_unwritable_target_keeps_the_old_engine(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "m.onnx", shape=(1, 64, 64))
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write"):
        engine_of(source, "fp32", target=tmp_path / "file" / "m.engine")


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
def test_option_refusals(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    source = tiny_model(tmp_path / "m.onnx", shape=(1, 64, 64))
    with pytest.raises(UsageError) as caught:
        engine_of(source, **options)
    assert says in str(caught.value)
    assert _nothing_written(tmp_path, source)


@needs_rtx
def test_builder_options_do_not_change_an_rtx_engine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What the warning says: its kernels are chosen where the engine runs."""
    source = tiny_model(tmp_path / "m.onnx", shape=(1, 64, 64))
    given: list[dict[str, Any]] = [{}, {"optimization_level": 5}, {"tiling": "full"}, {"sparsity": True}]
    plans = set()
    for options in given:
        caplog.clear()
        engine_of(source, "fp32", **options)
        assert ("do not change the file" in caplog.text) == bool(options)
        plans.add((tmp_path / "m.engine").read_bytes())
    assert len(plans) == 1


@needs_rtx
def test_bf16_for_a_gpu_without_it(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "m.onnx", shape=(1, 64, 64))
    with pytest.raises(UserError, match=r"could not build .*BF16 runs on compute capability 8\.0 and later"):
        engine_of(source, "bf16", compute_capabilities=["7.5"])
    assert _nothing_written(tmp_path, source)


@needs_rtx
def test_attention_for_a_gpu_without_bf16_names_another_library(tmp_path: Path) -> None:
    source = write_fp16(tmp_path / "m.onnx")
    with pytest.raises(UserError, match=r"no FP32 matrix products .* build with TensorRT 10 on that GPU"):
        engine_of(source, "fp16", shapes="1x1x64x64", compute_capabilities=["7.5"])
    assert _nothing_written(tmp_path, source)


@needs_rtx
@pytest.mark.parametrize(("shapes", "known"), [("1x1x128x128", True), ("1x1x64x64:1x1x128x128:2x1x128x128", False)])
def test_memory_for_activations_is_known_of_one_shape(tmp_path: Path, shapes: str, known: bool) -> None:
    source = tiny_model(tmp_path / "m.onnx")
    engine = engine_of(source, "fp32", shapes=shapes).engine
    assert engine is not None
    assert (engine.activation_bytes is not None) == known
    assert engine.activation_bytes is None or engine.activation_bytes > 0


# --- what the engine inspector says (its JSON needs a GPU: the forms are those of NVIDIA's documentation)

PARSED = {"source": "parsed network", "convolutions": {"int8": 2}, "macs_share": {"int8": 1.0}}


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


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"Layers": ["conv + relu"]}', '{"Layers": [{"LayerType": "kgen"}]}'])
def test_silent_inspector_falls_back_to_the_parsed_network(text: str) -> None:
    proof = report_from_inspector(text, PARSED)
    assert proof["source"] == "parsed network"
    assert proof["convolutions"] == PARSED["convolutions"]
    assert "engine inspector" in proof["remark"]


def test_inspected_engine_of_another_precision_is_refused() -> None:
    half = report_from_inspector(json.dumps({"Layers": [_cask("Half", {"DataType": "Half"})]}), PARSED)
    with pytest.raises(UserError, match=r"labelled INT8, but none .* is .engine inspector: 1 in FP16"):
        check_report(half, "int8", "the engine")


def test_description_key_is_the_packages() -> None:
    assert METADATA_KEY == "hpddrnet_trt"
