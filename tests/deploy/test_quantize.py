"""Calibration: which images, which ranges, where the pairs go, and that a bad result is refused."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from PIL import Image

from hpddrnet_trt.data.datasets import find_images
from hpddrnet_trt.data.simulate import simulate
from hpddrnet_trt.deploy import calibration_data, qdq, ranges
from hpddrnet_trt.deploy.calibration_data import Crop
from hpddrnet_trt.deploy.quantize import calibrate
from hpddrnet_trt.engines.onnxruntime import OnnxRuntimeEngine
from hpddrnet_trt.errors import BadInputFile, UsageError, UserError
from hpddrnet_trt.manifest import AxisRange, InputContract, Normalisation, read_manifest
from tests.deploy.residual_onnx import GATE, QUANTISABLE, residual_model
from tests.tiny_onnx import tiny_model

SIZE = 96
FORMS = ("tensorrt", "onnxruntime")
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx, which builds without a GPU, is missing"
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twelve simulated micrographs."""
    folder = tmp_path_factory.mktemp("micrographs")
    paths = [folder / f"{seed:02d}.png" for seed in range(12)]
    for seed, path in enumerate(paths):
        Image.fromarray(simulate(SIZE, SIZE, seed)[0]).save(path)
    return paths


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return residual_model(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory, source: Path, images: list[Path]) -> dict[str, Path]:
    """Both forms of the same model."""
    folder = tmp_path_factory.mktemp("int8")
    paths = {form: folder / f"{form}.onnx" for form in FORMS}
    for form, path in paths.items():
        calibrate(source, path, images, form=form, size=(SIZE, SIZE))  # type: ignore[arg-type]
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
    ("form", "expected"), [("tensorrt", set(QUANTISABLE)), ("onnxruntime", set(QUANTISABLE[1:-1]))]
)
def test_convolutions_of_feature_maps_are_quantised(
    quantised: dict[str, Path], form: str, expected: set[str]
) -> None:
    graph = Parsed(quantised[form])
    found = {
        node.name for node in graph.kinds("Conv") if all(graph.dequantiser(name) is not None for name in node.input[:2])
    }
    assert found == expected
    assert qdq.count_convolutions(onnx.load(str(quantised[form]))) == (len(expected), len(QUANTISABLE) + 1)
    assert not any(graph.dequantiser(name) for name in graph.named(GATE).input)


@pytest.mark.parametrize("form", FORMS)
def test_attention_stays_in_floating_point(quantised: dict[str, Path], form: str) -> None:
    graph = Parsed(quantised[form])
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


def test_every_quantiser_is_read_by_a_convolution_or_a_sum(quantised: dict[str, Path]) -> None:
    graph = Parsed(quantised["tensorrt"])
    for node in graph.kinds("DequantizeLinear"):
        readers = [other.op_type for other in graph.nodes if node.output[0] in other.input]
        assert readers
        assert set(readers) <= {"Conv", "Add"}


def test_full_precision_islands_on_request(tmp_path: Path, source: Path, images: list[Path]) -> None:
    calibrate(source, tmp_path / "int8.onnx", images[:4], form="tensorrt", half=False, size=(SIZE, SIZE))
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


@pytest.mark.parametrize(("form", "convolution"), [("tensorrt", "first"), ("onnxruntime", "first")])
def test_weights_are_within_half_a_step(quantised: dict[str, Path], source: Path, form: str, convolution: str) -> None:
    weights, scales = Parsed(quantised[form]).weights(convolution)
    original = Parsed(source).values[f"{convolution}.weight"]
    steps = scales.astype(np.float64).reshape(-1, 1, 1, 1)
    # FP16 scales differ by up to 2^-11 from the ones the weights were rounded with.
    slack = 127 * steps * 2.0**-11 if scales.dtype == np.float16 else 1e-6
    assert (np.abs(weights * steps - original) <= steps / 2 + slack).all()


@pytest.mark.parametrize("form", FORMS)
def test_labels_agree_with_fp32(quantised: dict[str, Path], source: Path, form: str) -> None:
    unseen = np.stack([simulate(128, 160, seed)[0] for seed in (100, 101)])[:, np.newaxis]
    with OnnxRuntimeEngine(source) as reference, OnnxRuntimeEngine(quantised[form]) as engine:
        expected, got = reference.infer(unseen).labels, engine.infer(unseen).labels
    assert len(np.unique(expected)) == 3
    assert (expected == got).mean() > 0.97


@pytest.mark.parametrize("form", FORMS)
def test_the_file_describes_its_calibration(
    quantised: dict[str, Path], source: Path, images: list[Path], form: str
) -> None:
    manifest = read_manifest(quantised[form])
    assert (manifest.precision, manifest.quantised_for) == ("int8", form)
    assert manifest.classes == read_manifest(source).classes
    assert manifest.calibration is not None
    assert manifest.calibration.images == 9  # every fourth of twelve is held out
    kept = [path for path in images if path not in images[3::4]]
    assert manifest.calibration.images_sha256 == calibration_data.checksum(kept)
    evidence = manifest.evidence[-1]
    assert evidence.images == 3
    assert "not calibrated on" in evidence.source
    assert 0.97 < evidence.values["agreement"] <= 1
    assert evidence.values["worst_crop_agreement"] <= evidence.values["agreement"]


def test_the_same_images_give_the_same_file(
    tmp_path: Path, source: Path, images: list[Path], quantised: dict[str, Path]
) -> None:
    again = tmp_path / "again.onnx"
    calibrate(source, again, images[::-1], form="tensorrt", size=(SIZE, SIZE))
    assert again.read_bytes() == quantised["tensorrt"].read_bytes()


def test_nothing_is_logged_by_the_quantiser(
    tmp_path: Path, source: Path, images: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        calibrate(source, tmp_path / "int8.onnx", images[:4], form="onnxruntime", size=(SIZE, SIZE))
    assert {record.name for record in caplog.records} == {"hpddrnet_trt.deploy.quantize"}
    assert any("3 of 6 convolutions are INT8" in message for message in caplog.messages)


def test_static_model_with_a_batch(tmp_path: Path, images: list[Path]) -> None:
    source = residual_model(tmp_path / "model.onnx", batch=4, size=64)
    manifest = calibrate(source, tmp_path / "int8.onnx", images[:5], form="onnxruntime")
    assert manifest.calibration is not None
    assert "crops of 64x64" in manifest.calibration.source


def test_both_forms_on_real_micrographs(tmp_path: Path, source: Path, sem_data: Path) -> None:
    train, test = (find_images(sem_data / "nasa-super1", split) for split in ("train", "test"))
    for form in FORMS:
        target = tmp_path / f"{form}.onnx"
        manifest = calibrate(source, target, train, form=form, held_out=test, size=(128, 128))  # type: ignore[arg-type]
        assert manifest.evidence[-1].images == len(test)
        assert manifest.evidence[-1].values["agreement"] > 0.97


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
    per_class = [value for key, value in manifest.evidence[-1].values.items() if key.startswith("iou_against_fp32/")]
    assert np.mean(per_class) == pytest.approx(manifest.evidence[-1].values["miou_against_fp32"])


def test_images_judged_on_themselves_are_called_so(tmp_path: Path, source: Path, images: list[Path]) -> None:
    manifest = calibrate(source, tmp_path / "int8.onnx", images[:2], form="onnxruntime", size=(SIZE, SIZE))
    assert manifest.evidence[-1].source.startswith("the calibration images themselves")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, "no calibration image"),
        ({"form": "openvino"}, "unknown form 'openvino'.*tensorrt, onnxruntime"),
        ({"method": "entropy"}, "unknown calibration method 'entropy'.*minmax"),
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


def test_interruption_leaves_nothing(
    tmp_path: Path, source: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut, calls = calibration_data.cut, iter(range(100))

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return cut(*arguments)

    monkeypatch.setattr(calibration_data, "cut", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(source, tmp_path / "int8.onnx", images, size=(SIZE, SIZE))
    assert not list(tmp_path.iterdir())


# --- ranges


def _named_model(source: Path) -> Any:
    model = onnx.load(str(source))
    qdq.name_nodes(model)
    return model


@pytest.mark.parametrize("method", ranges.METHODS)
def test_ranges_of_activations(source: Path, method: str) -> None:
    import onnxruntime

    model = _named_model(source)
    batches = [simulate(64, 64, seed)[0][np.newaxis, np.newaxis] for seed in range(3)]
    tensors = ["grey", "stem_out", "shortcut"]
    got = ranges.observe(model, tensors, lambda: batches, method)

    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in tensors)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for name in tensors:
        values = np.concatenate([session.run([name], {"image": batch})[0].ravel() for batch in batches])
        low, high = got[name]
        if method == "minmax":
            assert (low, high) == pytest.approx((values.min(), values.max()), rel=1e-5)
        elif method == "percentile":
            slack = float(values.max() - values.min()) / ranges.BINS
            assert np.mean((values < low - slack) | (values > high + slack)) <= 1e-4
            assert values.min() <= low < high <= values.max()
        else:
            assert min(values.min(), 0) - 1e-5 <= low <= 0
            assert 0 < high <= values.max() + 1e-5


def test_memory_does_not_grow_with_the_images(source: Path) -> None:
    seen: list[weakref.ref[Any]] = []

    def batches() -> Iterator[Any]:
        for seed in range(6):
            # All but the batch in use have been let go.
            assert sum(entry() is not None for entry in seen) <= 1
            batch = np.full((1, 1, 64, 64), seed, np.uint8)
            seen.append(weakref.ref(batch))
            yield batch

    ranges.observe(_named_model(source), ["stem_out"], batches, "mse")
    assert len(seen) == 12  # two passes


def test_percentile_leaves_out_one_in_ten_thousand() -> None:
    counts = np.zeros(ranges.BINS, np.int64)
    counts[100], counts[200:400], counts[1900] = 45, 5_000, 45  # 0.0045 % on either side
    low, high = ranges._percentile_range(counts, (0.0, float(ranges.BINS)))
    assert (low, high) == (200, 400)
    counts[1900] = 60  # more than half of 0.01 %: stays in
    assert ranges._percentile_range(counts, (0.0, float(ranges.BINS)))[1] == 1901


def test_mse_cuts_an_outlier_and_keeps_a_uniform_range() -> None:
    uniform = np.ones(ranges.BINS, np.int64)
    assert ranges._mse_range(uniform, (0.0, 1.0)) == (0.0, 1.0)
    spiked = np.zeros(ranges.BINS, np.int64)
    spiked[: ranges.BINS // 4], spiked[-1] = 100_000, 1
    assert ranges._mse_range(spiked, (0.0, 1.0))[1] == pytest.approx(0.25, abs=0.05)


@given(
    seed=st.integers(0, 10_000),
    tail=st.floats(0.3, 3),  # exponent of the counts: from flat to a few heavy bins
    extremes=st.tuples(st.floats(-100, 100), st.floats(-100, 100)),
)
def test_narrowed_ranges_stay_inside(seed: int, tail: float, extremes: tuple[float, float]) -> None:
    counts = (np.random.default_rng(seed).pareto(tail, ranges.BINS) * 10).clip(0, 1e9).astype(np.int64)
    low, high = extremes = (min(extremes), max(extremes))
    first, last = ranges._percentile_range(counts, extremes)
    assert low <= first <= last <= high
    first, last = ranges._mse_range(counts, extremes)
    assert min(low, 0) <= first <= last <= max(high, 0) or (first, last) == extremes


def test_non_finite_activations_are_named(source: Path) -> None:
    model = _named_model(source)
    weight = next(entry for entry in model.graph.initializer if entry.name == "first.weight")
    weight.CopyFrom(numpy_helper.from_array(np.full((16, 8, 3, 3), np.inf, np.float32), weight.name))
    batch = np.full((1, 1, 32, 32), 200, np.uint8)
    with pytest.raises(UserError, match="'first_out' is not finite"):
        ranges.observe(model, ["stem_out", "first_out"], lambda: [batch], "minmax")


# --- micrographs


def test_chosen_images_span_the_grey_levels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths = []
    for index, level in enumerate([100] * 10 + [20, 240]):
        paths.append(tmp_path / f"{index:02d}.png")
        pixels = np.clip(rng.normal(level, 3, (32, 32)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(paths[-1])
    chosen = calibration_data.choose_images(paths, 3)
    assert len(chosen) == 3
    assert {paths[10], paths[11]} <= set(chosen)
    assert calibration_data.choose_images(paths[::-1], 3) == chosen
    assert calibration_data.choose_images(paths, 50) == paths


def test_images_are_found_in_datasets_folders_and_lists(tmp_path: Path, images: list[Path]) -> None:
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / kind / split).mkdir(parents=True)
        for name in ("b.png", "a.png"):
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "images" / split / name)
    assert [path.parent.name + "/" + path.name for path in find_images(tmp_path)] == ["train/a.png", "train/b.png"]
    assert {path.parent.name for path in find_images(tmp_path, "val")} == {"val"}
    with pytest.raises(UsageError, match="no micrograph in split 'test'"):
        find_images(tmp_path, "test")
    assert find_images(images[0].parent) == images
    assert find_images(images[:3]) == images[:3]
    with pytest.raises(BadInputFile, match="does not exist"):
        find_images(tmp_path / "nowhere")


@given(length=st.integers(1, 3000), crop=st.integers(8, 1024))
def test_crops_fit_and_do_not_overlap(length: int, crop: int) -> None:
    starts = calibration_data._starts(length, crop)
    assert all(0 <= start <= max(length - crop, 0) for start in starts)
    assert all(second - first >= crop for first, second in itertools.pairwise(starts))


def test_few_images_are_cut_into_several_crops(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.fromarray(np.zeros((300, 200), np.uint8)).save(path)
    crops = calibration_data.plan_crops([path], 64, 64, minimum=5)
    assert len(set(crops)) == 5
    assert calibration_data.plan_crops([path], 512, 512, minimum=5) == [Crop(path, 0, 0)]
    assert len(calibration_data.plan_crops([path] * 5, 64, 64, minimum=5)) == 5


def test_a_small_image_is_continued_by_reflection() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    got = calibration_data.cut(grey, Crop(Path(), 0, 0), 8, 8)
    assert got.shape == (8, 8)
    np.testing.assert_array_equal(got[:5, 0], [0, 4, 8, 4, 0])
    np.testing.assert_array_equal(got[0], [0, 1, 2, 3, 2, 1, 0, 1])


def test_float_input_is_normalised_rgb() -> None:
    grey = np.array([[[[0, 255]]]], np.uint8)
    contract = InputContract(dtype="float32", channels=3)
    got = calibration_data.to_input(grey, contract, Normalisation(mean=(1, 2, 3), std=(2, 4, 8)))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[0, :, 0, 1], [127, 63.25, 31.5])
    assert calibration_data.to_input(grey, InputContract(), Normalisation()) is not None
    np.testing.assert_array_equal(calibration_data.to_input(grey, InputContract(), Normalisation()), grey)


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (AxisRange(minimum=8), 512),
        (AxisRange(minimum=64, maximum=300), 296),
        (AxisRange(minimum=600, maximum=2048), 600),
        (AxisRange(minimum=1024, maximum=1024), 1024),
    ],
)
def test_crop_size_follows_the_model(axis: AxisRange, expected: int) -> None:
    assert calibration_data.crop_size(InputContract(height=axis, width=axis), None) == (expected, expected)


def test_checksum_is_of_contents(images: list[Path]) -> None:
    assert calibration_data.checksum(images) == calibration_data.checksum(images[::-1])
    assert calibration_data.checksum(images) != calibration_data.checksum(images[1:])
