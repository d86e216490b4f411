"""What `inspect` prints: every kind of file, and what it must not leave out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpddrnet_trt.core.manifest import (
    CalibrationRecord,
    DataRecord,
    EngineRecord,
    InputContract,
    Manifest,
    MixedPrecisionRecord,
    ValidationRecord,
    read_manifest,
)
from hpddrnet_trt.export.describe import describe
from hpddrnet_trt.export.layer_precision import reformats_from_inspector
from hpddrnet_trt.graph.lint import analyze
from tests.graph.residual_onnx import residual_model
from tests.tiny_onnx import tiny_model

EVIDENCE = ValidationRecord(
    what="accuracy against FP32", runtime="a runtime", images=2, source="steel/test", values={"miou_drop_points": 0.125}
)


@pytest.fixture
def quantized(tmp_path: Path) -> Manifest:
    import onnx

    manifest = read_manifest(residual_model(tmp_path / "m.onnx"))
    placement = analyze(onnx.load(str(tiny_model(tmp_path / "int8.onnx", typing="int8"))), kept=["scores"])
    return manifest.replace(
        precision="int8",
        quantized_for="tensorrt",
        data=DataRecord(name="steel", license="MIT", train_images=10, pixel_size_m=(5e-9, 8e-9)),
        calibration=CalibrationRecord(method="mse", images=7, images_sha256="0", source="here", tool="ours"),
        mixed=MixedPrecisionRecord(
            budget="a tenth", floating=["conv_seg/Conv"], layers=58, searched_on="steel/val", candidates=[],
            cost_source="x",
        ),
        qdq_report=placement.record(),
        validation=[EVIDENCE],
    )


def test_an_onnx_file(quantized: Manifest) -> None:
    text = describe(quantized, "m.onnx")
    for words in (
        "m.onnx: ONNX file, quantised for TensorRT",
        "dark, middle, bright",
        "steel, 10 images (licence: MIT)",
        "5 nm to 8 nm a pixel",
        "uint8 [1..any, 1, 8..any, 8..any], grey levels",
        "uint8 labels [batch, height, width]",
        "convolutions as quantised: 2 int8",
        "trtexec --onnx=m.onnx --saveEngine=m.engine --stronglyTyped --noTF32 --profilingVerbosity=detailed "
        "--minShapes=image:1x1x8x8 --optShapes=image:1x1x1024x1024 --maxShapes=image:1x1x2048x2048",
        "mse, 7 images (here), ours",
        "1 of 58 layers in FP16 for: a tenth (on steel/val)",
        "conv_seg/Conv",
        "accuracy against FP32: 2 images, steel/test; a runtime",
        "miou_drop_points                   0.125",
    ):
        assert words in text, words


def test_an_engine_with_its_layers(quantized: Manifest) -> None:
    fixed = {"minimum": 8, "maximum": 8}
    layer = {"name": "stem", "precision": "int8", "macs": 2_000_000}
    proof = {
        "source": "engine inspector",
        "convolutions": {"int8": 5, "fp16": 1},
        "macs_share": {"int8": 0.9, "fp16": 0.1},
        "parsed_network": {"layers": [layer]},
        "graph": [{"name": "copy", "type": "Reformat", "precision": "int8", "conversion": True}],
        "reformats": reformats_from_inspector('{"Layers": ["stem", "Reformatting CopyNode for Input Tensor 0"]}'),
    }
    record = EngineRecord(
        runtime="tensorrt", version="11.1", compute_capabilities=["9.0"], gpu="a GPU", sha256="0", bytes=2_500_000,
        profiles=[{"min": [1, 1, 8, 8], "opt": [1, 1, 16, 16], "max": [2, 1, 16, 16]},
                  {key: [4, 1, 16, 16] for key in ("min", "opt", "max")}],
        layer_precision=proof, build_seconds=3.0, version_compatible=True, platform="windows",
    )  # fmt: skip
    manifest = quantized.replace(engine=record)
    text = describe(manifest, "m.engine", layers=True)
    for words in (
        "m.engine: engine of tensorrt 11.1 for 9.0 (a GPU), 2.5 MB, built in 3.0 s, version-compatible, for windows",
        "int8 5 of 6 convolutions and 90% of all multiply-accumulates",
        "reformats in the engine: 1 of 2 layers",
        "int8        2.0 MMAC  stem",
        "layers of the engine inspector: 1, conversions marked *",
        "* int8  Reformat         copy",
        "min 1x1x8x8  opt 1x1x16x16  max 2x1x16x16",
        "trtexec --loadEngine=m.engine --shapes=image:1x1x16x16 --versionCompatible --useCudaGraph --noDataTransfers",
        "trtexec --loadEngine=m.engine --shapes=image:4x1x16x16 --useProfile=1 --versionCompatible",
    ):
        assert words in text, words
    static = quantized.replace(input=InputContract.model_validate(dict.fromkeys(("batch", "height", "width"), fixed)))
    assert describe(static, "m.onnx").count("Shapes=") == 0
    assert "trtexec" not in describe(quantized.replace(quantized_for="onnxruntime"), "m.onnx")
    assert "MMAC" not in describe(manifest, "m.engine")
    rtx = manifest.replace(engine=record.model_copy(update={"runtime": "tensorrt-rtx", "version_compatible": False}))
    assert "tensorrt_rtx --loadEngine='my engine' --shapes=image:1x1x16x16 --useCudaGraph" in describe(rtx, "my engine")


def test_a_checkpoint_has_no_contract(quantized: Manifest) -> None:
    bare = Manifest(network=quantized.network, classes=quantized.classes, remarks=["converted"])
    text = describe(bare, "m.safetensors")
    assert text.startswith("m.safetensors: checkpoint")
    assert "input" not in text
    assert "remarks      converted" in text


@pytest.mark.parametrize("report", [{}, {"convolutions": []}, {"convolutions": {"int8": "many"}}])
def test_an_engine_without_a_readable_report_of_layers(quantized: Manifest, report: dict[str, Any]) -> None:
    record = EngineRecord(
        runtime="tensorrt", version="11.1", compute_capabilities=["9.0"], sha256="0", bytes=1, layer_precision=report,
        profiles=[{key: [1, 1, 16, 16] for key in ("min", "opt", "max")}], build_seconds=3.0,
    )  # fmt: skip
    assert "no readable report of layers" in describe(quantized.replace(engine=record), "m.engine", layers=True)
