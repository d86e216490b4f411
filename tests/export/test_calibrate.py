"""Calibration from file to file: where the pairs go, what the file says, and that a bad result is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from PIL import Image

from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError
from hpddrnet_trt.core.manifest import Manifest, read_manifest
from hpddrnet_trt.data.datasets import find_images
from hpddrnet_trt.data.simulate import simulate
from hpddrnet_trt.engines.onnxruntime import OnnxRuntimeEngine
from hpddrnet_trt.export import images as micrographs
from hpddrnet_trt.export import statistics
from hpddrnet_trt.export.calibrate import METHODS_TRIED, CalibrationSettings
from hpddrnet_trt.export.calibrate import calibrate as run
from hpddrnet_trt.export.ranges import METHODS
from hpddrnet_trt.graph import fp8, qdq
from hpddrnet_trt.weights import locate
from tests.graph import parsed_rtx as rtx
from tests.graph.residual_onnx import GATE, QUANTIZABLE, residual_model
from tests.tiny_export import pictures
from tests.tiny_onnx import tiny_model

SIZE = 96
RUNTIMES = ("tensorrt", "onnxruntime")


def calibrate(
    source_onnx: Path, target_onnx: Path, images: list[Path], held_out: Any = None, **settings: Any
) -> Manifest:
    return run(source_onnx, target_onnx, images, CalibrationSettings(**settings), held_out=held_out)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return pictures(tmp_path_factory.mktemp("micrographs"), 12, SIZE, SIZE)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return residual_model(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, source: Path, images: list[Path]) -> dict[str, Path]:
    """Both forms of the same model."""
    folder = tmp_path_factory.mktemp("int8")
    paths = {runtime: folder / f"{runtime}.onnx" for runtime in RUNTIMES}
    for runtime, path in paths.items():
        calibrate(source, path, images, runtime=runtime, size=(SIZE, SIZE))  # type: ignore[arg-type]
    return paths


class Parsed:
    """A graph by name."""

    def __init__(self, path: Path) -> None:
        graph = onnx.load(str(path)).graph
        self.nodes = list(graph.node)
        self.maker = {name: node for node in self.nodes for name in node.output}
        self.values = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}

    def named(self, name: str) -> Any:
        return next(node for node in self.nodes if node.name == name)

    def dequantizer(self, tensor: str) -> Any:
        """The DequantizeLinear that makes ``tensor``, or None."""
        node = self.maker.get(tensor)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def weights(self, convolution: str) -> tuple[Any, Any]:
        """(int8 weights, scales) of a quantized convolution."""
        node = self.dequantizer(self.named(convolution).input[1])
        return self.values[node.input[0]], self.values[node.input[1]]

    def kinds(self, kind: str) -> list[Any]:
        return [node for node in self.nodes if node.op_type == kind]


# --- the quantised graphs


@pytest.mark.parametrize(
    ("runtime", "expected"), [("tensorrt", set(QUANTIZABLE)), ("onnxruntime", set(QUANTIZABLE[1:-1]))]
)
def test_convolutions_of_feature_maps_are_quantized(
    quantized: dict[str, Path], runtime: str, expected: set[str]
) -> None:
    """And attention and gate stay in floating point."""
    graph = Parsed(quantized[runtime])
    paired = {node.name for node in graph.kinds("Conv") if all(map(graph.dequantizer, node.input[:2]))}
    assert paired == expected
    assert qdq.count_convolutions(onnx.load(str(quantized[runtime]))) == (len(expected), len(QUANTIZABLE) + 1)
    exact = [graph.named(GATE), *graph.kinds("MatMul"), *graph.kinds("Softmax")]
    assert len(exact) == 4
    for node in exact:
        assert not any(map(graph.dequantizer, node.input))
        assert not any(node.output[0] in other.input for other in graph.kinds("QuantizeLinear"))


def test_tensorrt_form_is_symmetric_int8_with_floating_biases(quantized: dict[str, Path]) -> None:
    graph = Parsed(quantized["tensorrt"])
    pairs = [*graph.kinds("QuantizeLinear"), *graph.kinds("DequantizeLinear")]
    for node in pairs:
        zero, scale = graph.values[node.input[2]], graph.values[node.input[1]]
        assert zero.dtype == np.int8
        assert not zero.any()
        assert scale.dtype == np.float16
        assert (scale > 0).all()
    for name in QUANTIZABLE:
        weights, scales = graph.weights(name)
        assert scales.shape == (weights.shape[0],)
        assert np.abs(weights.astype(int)).max() == 127
        assert graph.values[graph.named(name).input[2]].dtype == np.float16


def test_pairs_of_the_tensorrt_form(quantized: dict[str, Path]) -> None:
    """Each is read by a convolution or a sum or ends a block; of a sum's operands the projected shortcut has one."""
    graph = Parsed(quantized["tensorrt"])
    main, shortcut = graph.named("sum").input
    assert graph.maker[main].name == "second"  # takes the sum into its kernel and must reach it unrounded
    assert graph.maker[graph.maker[graph.dequantizer(shortcut).input[0]].input[0]].name == "shortcut"
    for node in graph.kinds("DequantizeLinear"):
        readers = {other.op_type for other in graph.nodes if node.output[0] in other.input}
        made = graph.maker.get(node.input[0])
        if made is not None and made.input[0] == "block":  # the sum's kernel writes it once, in INT8
            assert readers == {"ReduceMean", "Mul"}
        else:
            assert readers
            assert readers <= {"Conv", "Add"}


def test_full_precision_regions_on_request(tmp_path: Path, source: Path, images: list[Path]) -> None:
    calibrate(source, tmp_path / "int8.onnx", images[:4], runtime="tensorrt", half=False, size=(SIZE, SIZE))
    types = {entry.data_type for entry in onnx.load(str(tmp_path / "int8.onnx")).graph.initializer}
    assert TensorProto.FLOAT in types
    assert TensorProto.FLOAT16 not in types


def test_cpu_form_cannot_saturate_without_vnni(quantized: dict[str, Path]) -> None:
    graph = Parsed(quantized["onnxruntime"])
    for name in QUANTIZABLE[1:-1]:
        weights, _ = graph.weights(name)
        # Two neighbouring products of uint8 and int8 are summed in 16 bits.
        assert 2 * 255 * np.abs(weights.astype(int)).max() <= np.iinfo(np.int16).max
    zeros = {graph.values[node.input[2]].dtype for node in graph.kinds("QuantizeLinear")}
    assert zeros == {np.dtype(np.uint8)}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_weights_are_within_half_a_step(quantized: dict[str, Path], source: Path, runtime: str) -> None:
    weights, scales = Parsed(quantized[runtime]).weights("first")
    steps = scales.astype(np.float64).reshape(-1, 1, 1, 1)
    # FP16 scales differ by up to 2^-11 from the ones the weights were rounded with.
    slack = 127 * steps * 2.0**-11 if scales.dtype == np.float16 else 1e-6
    assert (np.abs(weights * steps - Parsed(source).values["first.weight"]) <= steps / 2 + slack).all()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_labels_agree_with_fp32(quantized: dict[str, Path], source: Path, runtime: str) -> None:
    unseen = np.stack([simulate(128, 160, seed)[0] for seed in (100, 101)])[:, np.newaxis]
    with OnnxRuntimeEngine(source) as reference, OnnxRuntimeEngine(quantized[runtime]) as engine:
        expected, got = reference.infer(unseen).labels, engine.infer(unseen).labels
    assert len(np.unique(expected)) == 3
    assert (expected == got).mean() > 0.96


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_file_describes_its_calibration(
    quantized: dict[str, Path], source: Path, images: list[Path], runtime: str
) -> None:
    manifest = read_manifest(quantized[runtime])
    assert (manifest.precision, manifest.quantized_for) == ("int8", runtime)
    assert manifest.classes == read_manifest(source).classes
    assert manifest.calibration is not None
    assert manifest.calibration.images == 9  # every fourth of twelve is held out
    kept = [path for path in images if path not in images[3::4]]
    assert manifest.calibration.images_sha256 == micrographs.checksum(kept)
    evidence = manifest.validation[-1]
    assert evidence.images == 3
    assert "not calibrated on" in evidence.source
    assert 0.97 < evidence.values["agreement"] <= 1
    assert evidence.values["worst_crop_agreement"] <= evidence.values["agreement"]


def test_the_same_images_give_the_same_file(
    tmp_path: Path, source: Path, images: list[Path], quantized: dict[str, Path]
) -> None:
    again = tmp_path / "again.onnx"
    calibrate(source, again, images[::-1], runtime="tensorrt", size=(SIZE, SIZE))
    assert again.read_bytes() == quantized["tensorrt"].read_bytes()


def test_nothing_is_logged_by_the_quantiser(
    tmp_path: Path, source: Path, images: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        manifest = calibrate(source, tmp_path / "int8.onnx", images[:2], runtime="onnxruntime", size=(SIZE, SIZE))
    assert {record.name for record in caplog.records} == {"hpddrnet_trt.export.calibrate"}
    assert any("3 of 6 convolutions are INT8" in message for message in caplog.messages)
    assert manifest.validation[-1].source.startswith("the calibration images themselves")


def test_static_model_with_a_batch(tmp_path: Path, images: list[Path]) -> None:
    source = residual_model(tmp_path / "model.onnx", batch=4, size=64)
    manifest = calibrate(source, tmp_path / "int8.onnx", images[:5], runtime="onnxruntime")
    assert manifest.calibration is not None
    assert "crops of 64x64" in manifest.calibration.source
    with pytest.raises(UsageError, match="height must be a multiple of 8 within 64"):
        calibrate(source, tmp_path / "other.onnx", images, size=(128, 128))


def test_tensorrt_builds_it_strongly_typed(quantized: dict[str, Path]) -> None:
    parsed = rtx.Parsed(onnx.load(str(quantized["tensorrt"])))
    assert parsed.build((1, 1, 64, 64), (1, 1, 96, 96), (2, 1, 256, 256)) is not None


# --- what is refused


def test_a_broken_calibration_is_refused_and_a_lost_class_on_request(
    tmp_path: Path, source: Path, images: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    dark = tmp_path / "dark.png"
    columns = np.linspace(0, 9, SIZE).astype(np.uint8)  # just enough to be no flat picture
    Image.fromarray(np.tile(columns, (SIZE, 1))).save(dark)
    target = tmp_path / "out" / "int8.onnx"
    options: dict[str, Any] = {"held_out": images, "size": (SIZE, SIZE), "under_shift": False}
    with pytest.raises(UserError, match=r"below the agreement of 0\.9 asked for.*was not written.*more varied"):
        calibrate(source, target, [dark], **options)
    with pytest.raises(UserError, match=r"worst class, '\w+'.*below the IoU per class of 0\.5"):
        calibrate(source, target, [dark], min_agreement=0.0, min_class_iou=0.5, **options)
    assert not target.exists()
    manifest = calibrate(source, target, [dark], min_agreement=0.0, **options)
    assert any("INT8 changes class" in message for message in caplog.messages)
    values = manifest.validation[-1].values
    per_class = [value for key, value in values.items() if key.startswith("iou_against_fp32/")]
    assert np.mean(per_class) == pytest.approx(values["miou_against_fp32"])
    assert manifest.validation[-1].source.startswith("images not calibrated on")


def test_pictures_without_content_are_refused_or_left_out(
    tmp_path: Path, source: Path, images: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    flat = []
    for seed, noise in enumerate((0, 3, 12)):
        values = np.random.default_rng(seed).normal(128, noise, (SIZE, SIZE)).clip(0, 255).astype(np.uint8)
        flat.append(tmp_path / f"flat-{noise}.png")
        Image.fromarray(values).save(flat[-1])
    target = tmp_path / "int8.onnx"
    with pytest.raises(UsageError, match=r"no content: their grey levels spread by 1\.\d of 255 at most, and need 2"):
        calibrate(source, target, flat, size=(SIZE, SIZE))
    assert not target.exists()
    manifest = calibrate(source, target, [*flat[:1], *images], held_out=flat[1:], size=(SIZE, SIZE))
    assert any("calibration crops are flat and left out" in message for message in caplog.messages)
    assert "the calibration images themselves" in manifest.validation[-1].source  # not on the flat ones


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, "no calibration image"),
        ({"runtime": "openvino"}, "unknown target runtime 'openvino'.*tensorrt, onnxruntime"),
        ({"method": "minmax"}, "unknown calibration method 'minmax'.*max, percentile, entropy, mse, auto"),
        ({"precision": "int4"}, "unknown precision 'int4'.*int8, fp8"),
        ({"precision": "fp8", "runtime": "onnxruntime"}, "no FP8"),
        ({"max_images": 0}, "at least one calibration image"),
        ({"min_agreement": 95}, "agreement is a fraction between 0 and 1, got 95"),
        ({"min_class_iou": -1}, "IoU per class is a fraction between 0 and 1, got -1"),
        ({"size": (100, 96)}, "height must be a multiple of 8"),
        ({"target_onnx": "int8.engine"}, "must end with .onnx"),
    ],
)
def test_requests_that_make_no_sense(
    tmp_path: Path, source: Path, images: list[Path], changes: dict[str, Any], message: str
) -> None:
    arguments = {"source_onnx": source, "target_onnx": "int8.onnx", "images": images, **changes}
    arguments["target_onnx"] = tmp_path / arguments["target_onnx"]
    with pytest.raises(UsageError, match=message):
        calibrate(**arguments)
    assert not list(tmp_path.iterdir())


def test_sources_that_are_not_fp32(tmp_path: Path, quantized: dict[str, Path], images: list[Path]) -> None:
    target = tmp_path / "out.onnx"
    half = tiny_model(tmp_path / "half.onnx", typing="fp16")
    checkpoint = tmp_path / "model.safetensors"
    for path, message in (
        (quantized["tensorrt"], "quantised already; give the FP32 file"),
        (half, "typed FP16, calibration needs FP32"),
        (checkpoint, "not an ONNX file"),
    ):
        with pytest.raises(UsageError, match=message):
            calibrate(path, target, images)
    with pytest.raises(UsageError, match="would overwrite"):
        calibrate(half, half, images)
    assert not target.exists()


def test_unreadable_image_is_named_and_nothing_written(tmp_path: Path, source: Path, images: list[Path]) -> None:
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(images[0].read_bytes()[:100])
    with pytest.raises(BadInputFile, match=r"damaged\.png"):
        calibrate(source, tmp_path / "int8.onnx", [*images, damaged], size=(SIZE, SIZE))
    assert list(tmp_path.iterdir()) == [damaged]


def test_an_interrupted_calibration_leaves_no_file_and_continues(
    tmp_path: Path, source: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    original = statistics._Probe.statistics

    def interrupted(*arguments: Any) -> Any:
        if len(computed) == 5:
            raise KeyboardInterrupt
        computed.append(1)
        return original(*arguments)

    options: dict[str, Any] = {"size": (88, 88), "cache": tmp_path / "cache"}
    target = tmp_path / "int8.onnx"
    with monkeypatch.context() as patch:
        patch.setattr(statistics._Probe, "statistics", interrupted)
        with pytest.raises(KeyboardInterrupt):
            calibrate(source, target, images, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    computed.clear()
    with monkeypatch.context() as patch:
        patch.setattr(statistics._Probe, "statistics", lambda *given: computed.append(1) or original(*given))
        calibrate(source, target, images, **options)
        assert len(computed) == 13  # of eighteen: nine pictures, each at another setting, too
        calibrate(source, target, images, method="entropy", **options)
        assert len(computed) == 13
    calibrate(source, tmp_path / "afresh.onnx", images, method="entropy", size=(88, 88), cache=None)
    assert (tmp_path / "afresh.onnx").read_bytes() == target.read_bytes()


# --- methods


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_auto_keeps_the_best_method(tmp_path: Path, source: Path, images: list[Path], runtime: Any) -> None:
    manifest = calibrate(source, tmp_path / "auto.onnx", images, runtime=runtime, method="auto", size=(SIZE, SIZE))
    tried, chosen = manifest.validation[-2:]
    assert tried.what == METHODS_TRIED
    assert set(tried.values) == set(METHODS)
    best = max(tried.values, key=lambda name: tried.values[name])
    assert manifest.calibration is not None
    assert manifest.calibration.method == f"{best} (auto)"
    both = (chosen.values[f"miou_against_fp32{where}"] for where in ("", "_under_shift"))
    assert sum(both) / 2 == max(tried.values.values())
    calibrate(source, tmp_path / "best.onnx", images, runtime=runtime, method=best, size=(SIZE, SIZE))  # type: ignore[arg-type]
    files = [onnx.load(str(tmp_path / name)).graph for name in ("auto.onnx", "best.onnx")]
    assert files[0] == files[1]


def test_fp8_on_request(
    tmp_path: Path, source: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "fp8.onnx"
    with pytest.raises(UsageError, match="no convolution that could be quantised to FP8"):
        calibrate(source, target, images, precision="fp8", size=(SIZE, SIZE))
    monkeypatch.setattr(fp8, "FEWEST_CHANNELS", 8)
    manifest = calibrate(source, target, images, precision="fp8", size=(SIZE, SIZE))
    assert (manifest.precision, manifest.quantized_for) == ("fp8", "tensorrt")
    evidence = manifest.validation[-1]
    assert evidence.what.startswith("FP8 labels")
    assert evidence.values["fp8_convolutions"] == 3  # all but the stem (1 channel) and the classifier (3)
    assert evidence.values["agreement"] > 0.95
    kinds = {entry.data_type for entry in onnx.load(str(target)).graph.initializer}
    assert TensorProto.FLOAT8E4M3FN in kinds
    assert TensorProto.INT8 not in kinds


def test_ranges_hold_at_other_settings_unless_told_otherwise(tmp_path: Path, source: Path, images: list[Path]) -> None:
    target = tmp_path / "x.onnx"
    settings = {"runtime": "onnxruntime", "size": (SIZE, SIZE), "cache": None}
    plain = calibrate(source, target, images, under_shift=False, **settings)
    shifted = calibrate(source, target, images, **settings)
    values = shifted.validation[-1].values
    assert 0.9 <= values["worst_crop_agreement_under_shift"] <= values["agreement_under_shift"] <= 1
    assert "agreement_under_shift" not in plain.validation[-1].values
    assert plain.calibration is not None
    assert shifted.calibration is not None
    crops = [int(record.source.split(": ")[1].split()[0]) for record in (plain.calibration, shifted.calibration)]
    assert crops[1] == 2 * crops[0]
    target.unlink()
    with pytest.raises(UserError, match="at other settings of the microscope"):
        calibrate(source, target, images, min_agreement=1.0, **settings)
    assert not target.exists()


def test_every_method_on_a_trained_network(sem_data: Path, tmp_path: Path) -> None:
    train, test = (find_images(sem_data / "nasa-super1", split) for split in ("train", "test"))
    options: dict[str, Any] = {
        "held_out": test[:1], "max_images": 4, "size": (256, 256), "cache": tmp_path / "cache", "under_shift": False
    }  # fmt: skip
    manifest = calibrate(locate("nasa-super1"), tmp_path / "int8.onnx", train, method="auto", **options)
    assert min(manifest.validation[-2].values.values()) > 0.97
    assert manifest.validation[-1].values["agreement"] > 0.995
