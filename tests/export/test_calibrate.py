"""Calibration from file to file: where the pairs go, what the file says, and that a bad result is refused."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
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
from tests.graph.residual_onnx import GATE, QUANTISABLE, residual_model
from tests.tiny_export import pictures
from tests.tiny_onnx import tiny_model

SIZE = 96
RUNTIMES = ("tensorrt", "onnxruntime")
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx, which builds without a GPU, is missing"
)


def calibrate(
    source_onnx: Path, target_onnx: Path, images: list[Path], held_out: Any = None, **settings: Any
) -> Manifest:
    return run(source_onnx, target_onnx, images, CalibrationSettings(**settings), held_out=held_out)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What calibrations keep, away from the user's own folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPDDRNET_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return pictures(tmp_path_factory.mktemp("micrographs"), 12, SIZE, SIZE)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return residual_model(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory, source: Path, images: list[Path]) -> dict[str, Path]:
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

    def dequantiser(self, tensor: str) -> Any:
        """The DequantizeLinear that makes ``tensor``, or None."""
        node = self.maker.get(tensor)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def weights(self, convolution: str) -> tuple[Any, Any]:
        """(int8 weights, scales) of a quantised convolution."""
        node = self.dequantiser(self.named(convolution).input[1])
        return self.values[node.input[0]], self.values[node.input[1]]

    def kinds(self, kind: str) -> list[Any]:
        return [node for node in self.nodes if node.op_type == kind]


# --- the quantised graphs


@pytest.mark.parametrize(
    ("runtime", "expected"), [("tensorrt", set(QUANTISABLE)), ("onnxruntime", set(QUANTISABLE[1:-1]))]
)
def test_convolutions_of_feature_maps_are_quantised(
    quantised: dict[str, Path], runtime: str, expected: set[str]
) -> None:
    graph = Parsed(quantised[runtime])
    found = {
        node.name for node in graph.kinds("Conv") if all(graph.dequantiser(name) is not None for name in node.input[:2])
    }
    assert found == expected
    assert qdq.count_convolutions(onnx.load(str(quantised[runtime]))) == (len(expected), len(QUANTISABLE) + 1)
    assert not any(graph.dequantiser(name) for name in graph.named(GATE).input)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_attention_stays_in_floating_point(quantised: dict[str, Path], runtime: str) -> None:
    graph = Parsed(quantised[runtime])
    touched = [node for kind in ("MatMul", "Softmax") for node in graph.kinds(kind)]
    assert len(touched) == 3
    for node in touched:
        assert not any(graph.dequantiser(name) for name in node.input)
        assert not any(node.output[0] in other.input for other in graph.kinds("QuantizeLinear"))


def test_tensorrt_form_is_symmetric_int8_with_floating_biases(quantised: dict[str, Path]) -> None:
    graph = Parsed(quantised["tensorrt"])
    pairs = [*graph.kinds("QuantizeLinear"), *graph.kinds("DequantizeLinear")]
    for node in pairs:
        zero, scale = graph.values[node.input[2]], graph.values[node.input[1]]
        assert zero.dtype == np.int8
        assert not zero.any()
        assert scale.dtype == np.float16
        assert (scale > 0).all()
    for name in QUANTISABLE:
        weights, scales = graph.weights(name)
        assert scales.shape == (weights.shape[0],)
        assert np.abs(weights.astype(int)).max() == 127
        assert graph.values[graph.named(name).input[2]].dtype == np.float16


def test_tensorrt_form_quantises_the_projected_shortcut_only(quantised: dict[str, Path]) -> None:
    # The main path's convolution takes the sum into its kernel and must reach it unrounded.
    graph = Parsed(quantised["tensorrt"])
    main, shortcut = graph.named("sum").input
    assert graph.maker[main].name == "second"
    pair = graph.dequantiser(shortcut)
    assert graph.maker[graph.maker[pair.input[0]].input[0]].name == "shortcut"


def test_every_quantiser_is_read_by_a_convolution_or_a_sum_or_ends_a_block(quantised: dict[str, Path]) -> None:
    graph = Parsed(quantised["tensorrt"])
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


def test_cpu_form_cannot_saturate_without_vnni(quantised: dict[str, Path]) -> None:
    graph = Parsed(quantised["onnxruntime"])
    for name in QUANTISABLE[1:-1]:
        weights, _ = graph.weights(name)
        # Two neighbouring products of uint8 and int8 are summed in 16 bits.
        assert 2 * 255 * np.abs(weights.astype(int)).max() <= np.iinfo(np.int16).max
    zeros = {graph.values[node.input[2]].dtype for node in graph.kinds("QuantizeLinear")}
    assert zeros == {np.dtype(np.uint8)}


@pytest.mark.parametrize(("runtime", "convolution"), [("tensorrt", "first"), ("onnxruntime", "first")])
def test_weights_are_within_half_a_step(
    quantised: dict[str, Path], source: Path, runtime: str, convolution: str
) -> None:
    weights, scales = Parsed(quantised[runtime]).weights(convolution)
    original = Parsed(source).values[f"{convolution}.weight"]
    steps = scales.astype(np.float64).reshape(-1, 1, 1, 1)
    # FP16 scales differ by up to 2^-11 from the ones the weights were rounded with.
    slack = 127 * steps * 2.0**-11 if scales.dtype == np.float16 else 1e-6
    assert (np.abs(weights * steps - original) <= steps / 2 + slack).all()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_labels_agree_with_fp32(quantised: dict[str, Path], source: Path, runtime: str) -> None:
    unseen = np.stack([simulate(128, 160, seed)[0] for seed in (100, 101)])[:, np.newaxis]
    with OnnxRuntimeEngine(source) as reference, OnnxRuntimeEngine(quantised[runtime]) as engine:
        expected, got = reference.infer(unseen).labels, engine.infer(unseen).labels
    assert len(np.unique(expected)) == 3
    assert (expected == got).mean() > 0.96


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_file_describes_its_calibration(
    quantised: dict[str, Path], source: Path, images: list[Path], runtime: str
) -> None:
    manifest = read_manifest(quantised[runtime])
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
    tmp_path: Path, source: Path, images: list[Path], quantised: dict[str, Path]
) -> None:
    again = tmp_path / "again.onnx"
    calibrate(source, again, images[::-1], runtime="tensorrt", size=(SIZE, SIZE))
    assert again.read_bytes() == quantised["tensorrt"].read_bytes()


def test_nothing_is_logged_by_the_quantiser(
    tmp_path: Path, source: Path, images: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        calibrate(source, tmp_path / "int8.onnx", images[:4], runtime="onnxruntime", size=(SIZE, SIZE))
    assert {record.name for record in caplog.records} == {"hpddrnet_trt.export.calibrate"}
    assert any("3 of 6 convolutions are INT8" in message for message in caplog.messages)


def test_static_model_with_a_batch(tmp_path: Path, images: list[Path]) -> None:
    source = residual_model(tmp_path / "model.onnx", batch=4, size=64)
    manifest = calibrate(source, tmp_path / "int8.onnx", images[:5], runtime="onnxruntime")
    assert manifest.calibration is not None
    assert "crops of 64x64" in manifest.calibration.source


def test_both_forms_on_real_micrographs(tmp_path: Path, source: Path, sem_data: Path) -> None:
    train, test = (find_images(sem_data / "nasa-super1", split) for split in ("train", "test"))
    for runtime in RUNTIMES:
        target = tmp_path / f"{runtime}.onnx"
        manifest = calibrate(source, target, train, runtime=runtime, held_out=test, size=(128, 128))  # type: ignore[arg-type]
        assert manifest.validation[-1].images == len(test)
        assert manifest.validation[-1].values["agreement"] > 0.97


@needs_rtx
def test_tensorrt_builds_it_strongly_typed(quantised: dict[str, Path]) -> None:
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(quantised["tensorrt"].read_bytes())
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("image", (1, 1, 64, 64), (1, 1, 96, 96), (2, 1, 256, 256))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    assert engine.nbytes > 0


# --- what is refused


def test_a_broken_calibration_is_refused(tmp_path: Path, source: Path, images: list[Path]) -> None:
    black = tmp_path / "black.png"
    Image.fromarray(np.zeros((SIZE, SIZE), np.uint8)).save(black)
    target = tmp_path / "out" / "int8.onnx"
    with pytest.raises(UserError, match=r"below the agreement of 0\.9 asked for.*was not written.*more varied"):
        calibrate(source, target, [black], held_out=images, size=(SIZE, SIZE))
    assert not target.exists()


def test_a_lost_class_is_refused_on_request_and_warned_about(
    tmp_path: Path, source: Path, images: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    black = tmp_path / "black.png"
    Image.fromarray(np.zeros((SIZE, SIZE), np.uint8)).save(black)
    options: dict[str, Any] = {"held_out": images, "size": (SIZE, SIZE), "min_agreement": 0.0}
    target = tmp_path / "int8.onnx"
    with pytest.raises(UserError, match=r"worst class, '\w+'.*below the IoU per class of 0\.5"):
        calibrate(source, target, [black], min_class_iou=0.5, **options)
    assert not target.exists()
    manifest = calibrate(source, target, [black], **options)
    assert any("INT8 changes class" in message for message in caplog.messages)
    per_class = [value for key, value in manifest.validation[-1].values.items() if key.startswith("iou_against_fp32/")]
    assert np.mean(per_class) == pytest.approx(manifest.validation[-1].values["miou_against_fp32"])


def test_images_judged_on_themselves_are_called_so(tmp_path: Path, source: Path, images: list[Path]) -> None:
    manifest = calibrate(source, tmp_path / "int8.onnx", images[:2], runtime="onnxruntime", size=(SIZE, SIZE))
    assert manifest.validation[-1].source.startswith("the calibration images themselves")


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


def test_sources_that_are_not_fp32(tmp_path: Path, quantised: dict[str, Path], images: list[Path]) -> None:
    target = tmp_path / "out.onnx"
    half = tiny_model(tmp_path / "half.onnx", typing="fp16")
    checkpoint = tmp_path / "model.safetensors"
    for path, message in (
        (quantised["tensorrt"], "quantised already; give the FP32 file"),
        (half, "typed FP16, calibration needs FP32"),
        (checkpoint, "not an ONNX file"),
    ):
        with pytest.raises(UsageError, match=message):
            calibrate(path, target, images)
    with pytest.raises(UsageError, match="would overwrite"):
        calibrate(half, half, images)
    assert not target.exists()


def test_static_size_cannot_be_changed(tmp_path: Path, images: list[Path]) -> None:
    source = residual_model(tmp_path / "model.onnx", batch=1, size=64)
    with pytest.raises(UsageError, match="height must be a multiple of 8 within 64"):
        calibrate(source, tmp_path / "int8.onnx", images, size=(128, 128))


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
        assert len(computed) == 4  # of nine
        calibrate(source, target, images, method="entropy", **options)
        assert len(computed) == 4
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
    assert chosen.values["miou_against_fp32"] == max(tried.values.values())
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


def test_every_method_on_a_trained_network(sem_data: Path, tmp_path: Path) -> None:
    train, test = (find_images(sem_data / "nasa-super1", split) for split in ("train", "test"))
    options: dict[str, Any] = {"held_out": test[:1], "max_images": 4, "size": (256, 256), "cache": tmp_path / "cache"}
    manifest = calibrate(locate("nasa-super1"), tmp_path / "int8.onnx", train, method="auto", **options)
    assert min(manifest.validation[-2].values.values()) > 0.97
    assert manifest.validation[-1].values["agreement"] > 0.995
