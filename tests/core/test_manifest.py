"""What a model file says about itself."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from pydantic import ValidationError

from hpddrnet_trt.core.errors import BadInputFile
from hpddrnet_trt.core.manifest import (
    FORMAT_VERSION,
    MAX_DESCRIPTION_BYTES,
    METADATA_KEY,
    AxisRange,
    CalibrationRecord,
    ClassInfo,
    DataRecord,
    EngineRecord,
    InputContract,
    Manifest,
    NetworkConfig,
    Normalization,
    OutputContract,
    ValidationRecord,
    default_palette,
    parse_manifest,
    read_manifest,
    sidecar_path,
)
from hpddrnet_trt.models.network import VARIANTS

DATA = Path(__file__).parent / "data"
CLASSES = [ClassInfo(name="grain", color=(0, 0, 0)), ClassInfo(name="pöre", color=(255, 1, 2))]
SMALL = Manifest(network=NetworkConfig(num_classes=2), classes=CLASSES)
FULL = SMALL.replace(
    name="full",
    data=DataRecord(name="d", sha256="a", license="MIT", train_images=3, grey_mean=1.5, grey_std=0.5),
    metrics={"val/miou": 0.25},
    remarks=["one"],
    checkpoint_sha256="b",
    versions={"torch": "2"},
    input=InputContract(height=AxisRange(minimum=8, maximum=64), width=AxisRange(minimum=32, maximum=32)),
    output=OutputContract(kind="logits"),
    attention="matmul",
    precision="int8",
    quantized_for="tensorrt",
    calibration=CalibrationRecord(method="minmax", images=3, images_sha256="c", source="x", tool="y"),
    validation=[ValidationRecord(what="accuracy", runtime="r", values={"miou": 0.5}, images=2, source="s")],
    engine=EngineRecord(
        runtime="tensorrt-rtx", version="1.7", compute_capabilities=["portable"], gpu=None,
        profiles=[{"min": [1, 1, 8, 8], "opt": [1, 1, 8, 8], "max": [1, 1, 8, 8]}],
        sha256="d", bytes=5, layer_precision={"from": "network", "share": {"int8": 0.5}}, build_seconds=1.5,
    ),
)  # fmt: skip


def safetensors_file(path: Path, header: Any) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    return path


def onnx_file(path: Path, properties: dict[str, str]) -> Path:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    model = helper.make_model(helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [out]))
    helper.set_model_props(model, properties)
    onnx.save(model, str(path))
    return path


def engine_file(path: Path, text: bytes | None) -> Path:
    path.write_bytes(b"engine")
    if text is not None:
        sidecar_path(path).write_bytes(text)
    return path


@pytest.mark.parametrize("manifest", [SMALL, FULL], ids=["small", "full"])
@pytest.mark.parametrize("kind", ["safetensors", "onnx", "ONNX", "engine"])
def test_every_file_carries_it(tmp_path: Path, kind: str, manifest: Manifest) -> None:
    path, text = tmp_path / f"model.{kind}", manifest.to_json()
    if kind == "safetensors":
        safetensors_file(path, {"__metadata__": {METADATA_KEY: text}})
    elif kind != "engine":
        onnx_file(path, {METADATA_KEY: text, "other": "x"})
    else:
        engine_file(path, text.encode())
        assert sidecar_path(path).name == "model.engine.json"
    assert read_manifest(path) == manifest


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: safetensors_file(p / "m.pth", {}), r"known endings: .*hpddrnet-trt convert-checkpoint"),
        (lambda p: safetensors_file(p / "m.safetensors", {}), "carries no description"),
        (lambda p: safetensors_file(p / "m.safetensors", {"__metadata__": {"other": "x"}}), "carries no description"),
        (lambda p: safetensors_file(p / "m.safetensors", []), "carries no description"),
        (lambda p: safetensors_file(p / "m.safetensors", b"{nonsense"), "damaged header"),
        (lambda p: safetensors_file(p / "m.safetensors", b"\xff\xfe{}"), "damaged header"),
        (lambda p: safetensors_file(p / "m.safetensors", {"__metadata__": {METADATA_KEY: "no"}}), "is not valid"),
        (lambda p: onnx_file(p / "m.onnx", {}), "carries no description.*docs/modelopt.md"),
        (lambda p: onnx_file(p / "m.onnx", {METADATA_KEY: "{}"}), r"is not valid \((network|classes)"),
        (lambda p: engine_file(p / "m.engine", None), r"m\.engine\.json is missing; keep it beside m\.engine"),
        (lambda p: engine_file(p / "m.engine", b"\xff"), r"m\.engine\.json cannot be read"),
        (lambda p: engine_file(p / "m.engine", b"[]"), r"is not valid \(description"),
        (lambda p: p / "none.onnx", "does not exist"),
        (lambda p: p, "is not a file"),
    ],
)
def test_unreadable_files(tmp_path: Path, make: Any, message: str) -> None:
    path = make(tmp_path)
    with pytest.raises(BadInputFile, match=message):
        read_manifest(path)


@pytest.mark.parametrize("content", [b"", b"\x01", bytes(8), b"\xff" * 8, struct.pack("<Q", 100) + b"{}"])
def test_truncated_files(tmp_path: Path, content: bytes) -> None:
    for name in ("m.safetensors", "m.onnx"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInputFile, match=name):
            read_manifest(tmp_path / name)


def test_an_onnx_file_without_its_last_bytes(tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "m.onnx", {METADATA_KEY: SMALL.to_json()})
    content = path.read_bytes()
    for cut in (1, 5, 20):
        path.write_bytes(content[:-cut])
        with pytest.raises(BadInputFile, match="cut off in the middle"):
            read_manifest(path)


@settings(max_examples=200, deadline=None)
@given(kind=st.sampled_from(["onnx", "safetensors", "engine"]), data=st.data())
def test_damaged_bytes(tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject) -> None:
    """Flipped bits: a description or a readable error, never another exception."""
    path, text = tmp_path_factory.getbasetemp() / f"damaged.{kind}", SMALL.to_json()
    if kind == "onnx":
        damaged = onnx_file(path, {METADATA_KEY: text})
    elif kind == "safetensors":
        damaged = safetensors_file(path, {"__metadata__": {METADATA_KEY: text}})
    else:
        damaged = sidecar_path(engine_file(path, text.encode()))
    content = bytearray(damaged.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    damaged.write_bytes(content)
    try:
        read_manifest(path)
    except BadInputFile as exc:
        assert str(path) in str(exc)  # noqa: PT017 - either outcome is right


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": CLASSES[:1]}, "1 classes are described but the network has 2"),
        ({"format_version": FORMAT_VERSION + 1}, "newer than this package reads"),
        ({"network": {"num_classes": 1}}, "num_classes"),
        ({"network": {"num_classes": 2, "eca": "everywhere"}}, "eca"),
        ({"classes": [{"name": "", "color": [0, 0, 0]}, {"name": "b", "color": [0, 0, 0]}]}, "name"),
        ({"classes": [{"name": "a", "color": [0, 0, 256]}, {"name": "b", "color": [0, 0, 0]}]}, "color"),
        ({"normalization": {"std": [1, 0, 1]}}, "std must be positive"),
        ({"normalization": {"std": [1, 1e-300, 1]}}, "std must be positive"),
        ({"normalization": {"std": [1, math.nan, 1]}}, "finite number"),
        ({"normalization": {"mean": [math.inf, 0, 0]}}, "finite number"),
        ({"network": {"num_classes": 2, "channels": 10**12}}, "channels"),
        ({"input": {"multiple": 0}}, "multiple"),
        ({"input": {"height": {"minimum": 16, "maximum": 8}}}, "the range 16..8 admits nothing"),
        ({"input": {"height": {"minimum": 10**9}}}, "the smallest input, 1x1x1000000000x8, has more than 268435456"),
        ({"input": {"batch": {"minimum": 2**23}}}, "the smallest input"),
        ({"name": "x" * 1001}, "name"),
        ({"precision": "fp4"}, "precision"),
        ({"precision": "x" * 10_000}, "precision"),
    ],
)
def test_impossible_descriptions(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SMALL.replace(**changes)
    text = json.dumps({**json.loads(SMALL.to_json()), **json.loads(json.dumps(changes, default=dict))})
    with pytest.raises(BadInputFile, match=r"the description in somewhere is not valid") as caught:
        parse_manifest(text, "somewhere")
    assert len(str(caught.value)) < 1000


def test_descriptions_without_end(tmp_path: Path) -> None:
    """Deep nesting, and more text than any description has: refused before it is taken apart."""
    deep = "[" * 100_000
    for make in (
        lambda text: safetensors_file(tmp_path / "m.safetensors", text.encode()),
        lambda text: safetensors_file(tmp_path / "m.safetensors", {"__metadata__": {METADATA_KEY: text}}),
        lambda text: onnx_file(tmp_path / "m.onnx", {METADATA_KEY: text}),
        lambda text: engine_file(tmp_path / "m.engine", text.encode()),
    ):
        for text in (deep, SMALL.to_json().replace("{", '{"later": ' + deep + "]" * len(deep) + ", ", 1)):
            with pytest.raises(BadInputFile, match=r"damaged header|is not valid"):
                read_manifest(make(text))
        with pytest.raises(BadInputFile, match=r"more than 16 MiB|not a safetensors file"):
            read_manifest(make(" " * MAX_DESCRIPTION_BYTES + "{}"))


def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = onnx_file(tmp_path / "m.onnx", {METADATA_KEY: SMALL.to_json()})

    def fails(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", fails)
    with pytest.raises(BadInputFile, match=r"m\.onnx cannot be read \(Permission denied\); check its permissions"):
        read_manifest(path)


def test_unknown_entries_are_ignored() -> None:
    """A file of a later minor version stays readable."""
    assert parse_manifest(json.dumps({**json.loads(SMALL.to_json()), "later": 1}), "x") == SMALL


@pytest.mark.parametrize("name", ["version1.onnx", "version1.engine"])
def test_files_of_format_version_1(tmp_path: Path, name: str) -> None:
    """Written by the version before entries were renamed: everything is there, and is written anew in version 2."""
    for path in DATA.glob("version1.*"):
        shutil.copy(path, tmp_path)
    (tmp_path / "version1.engine").write_bytes(b"engine")
    manifest = read_manifest(tmp_path / name)
    assert manifest.format_version == FORMAT_VERSION
    assert (manifest.name, manifest.class_names, manifest.precision) == ("version 1", ["grain", "pöre"], "int8")
    assert manifest.normalization == Normalization(mean=(100, 101, 102), std=(50, 51, 52))
    assert manifest.quantized_for == "tensorrt"
    assert manifest.data == DataRecord(
        name="d", sha256="a", license="MIT", train_images=3, grey_mean=1.5, grey_std=0.5, crop=(512, 256)
    )
    assert manifest.calibration == CalibrationRecord(method="max", images=3, images_sha256="c", source="x", tool="y")
    assert manifest.mixed is not None
    assert manifest.mixed.candidates == [
        {"floating": 1.0, "milliseconds": 2.5, "miou_drop_points": 0.25, "agreement": 0.99}
    ]
    (record,) = manifest.validation
    assert (record.what, record.images, record.values["reference_miou"]) == ("accuracy against FP32", 2, 0.75)
    assert math.isnan(record.values["iou_against_reference/pöre"])
    assert manifest.qdq_report is not None
    assert [region["name"] for region in manifest.qdq_report["float_regions"]][1] == "position attention"
    assert manifest.qdq_report["counts"]["float_regions"] == 3
    if name.endswith(".engine"):
        assert manifest.engine is not None
        assert manifest.engine.runtime == "tensorrt-rtx"
        assert manifest.engine.layer_precision == {"from": "network", "share": {"int8": 0.5}}
    written = manifest.to_json()
    assert not {"licence", "evidence", "placement", "quantised_for", "normalisation", "flavour"} & set(
        re.findall(r'"(\w+)":', written)
    )
    assert parse_manifest(written, "x").to_json() == written


def test_metrics_of_absent_classes() -> None:
    """NaN is a figure like any other, and the JSON stays valid for other programs."""
    evidence = ValidationRecord(what="w", runtime="r", values={"iou/pore": math.nan}, images=1, source="s")
    text = SMALL.replace(metrics={"val/iou/pore": math.nan, "x": math.inf}, validation=[evidence]).to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    back = parse_manifest(text, "x")
    assert math.isnan(back.metrics["val/iou/pore"])
    assert back.metrics["x"] == math.inf
    assert math.isnan(back.validation[0].values["iou/pore"])


def test_views_and_changes() -> None:
    with pytest.raises(ValidationError):
        SMALL.name = "other"  # type: ignore[misc]
    assert SMALL.replace(name="other").name == "other"
    assert SMALL.name == "model"
    assert SMALL.class_names == ["grain", "pöre"]
    assert SMALL.palette == [(0, 0, 0), (255, 1, 2)]
    assert "engine" not in json.loads(SMALL.to_json())


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_of_variants(variant: str) -> None:
    """The name of a configuration is the name it is chosen by."""
    assert NetworkConfig(num_classes=2, **VARIANTS[variant]).name == variant
    assert NetworkConfig(num_classes=2, channels=4, pam="none").name == "hpddrnet-4ch-no-pam"


def test_the_largest_input_that_is_padded_to() -> None:
    side = AxisRange(minimum=16384, maximum=16384)
    assert SMALL.replace(input=InputContract(height=side, width=side)).input is not None


@given(minimum=st.integers(1, 50), span=st.none() | st.integers(0, 50), size=st.integers(0, 120))
def test_axis_ranges(minimum: int, span: int | None, size: int) -> None:
    axis = AxisRange(minimum=minimum, maximum=None if span is None else minimum + span)
    upper = 10**9 if span is None else minimum + span
    assert axis.admits(size) == (minimum <= size <= upper)
    assert axis.fixed == (minimum if span == 0 else None)
    assert str(axis) == (f"{minimum}" if span == 0 else f"{minimum}..{'any' if span is None else upper}")


@given(st.integers(2, 255))
def test_default_palette_is_distinct_and_stable(count: int) -> None:
    palette = default_palette(count)
    assert len(palette) == count
    assert palette[:2] == default_palette(2)
    assert all(0 <= channel <= 255 for color in palette for channel in color)
    assert len(set(palette)) >= 0.95 * count
