"""FP8 pairs: their scales and values, what TensorRT makes of them, and that they keep the labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.manifest import Manifest, read_manifest
from hpddrnet_trt.data.simulate import simulate
from hpddrnet_trt.engines.onnxruntime import OnnxRuntimeEngine
from hpddrnet_trt.export.layer_precision import check_report, report_from_network
from hpddrnet_trt.export.statistics import extremes
from hpddrnet_trt.graph import qdq
from hpddrnet_trt.graph.fp8 import E4M3_MAX, suits_fp8, to_fp8
from hpddrnet_trt.graph.model import load_model, save_model
from hpddrnet_trt.graph.nodes import copied, initializers, store, tensor_types
from hpddrnet_trt.graph.precision import half_scale, to_half
from hpddrnet_trt.graph.rounding import simulate_rounding, uses_half
from tests.graph.conftest import SHIPPED
from tests.graph.parsed_rtx import Parsed
from tests.graph.residual_onnx import QUANTIZABLE, residual_model

FP8, FP16 = TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT16


class Made:
    """The residual network and its INT8 and FP8 forms, with ranges of simulated micrographs."""

    def __init__(self, folder: Path) -> None:
        self.path = residual_model(folder / "fp32.onnx")
        self.model, self.manifest = load_model(self.path)
        self.image = simulate(64, 96, seed=3)[0][None, None]
        self.plan = qdq.plan(self.model, "tensorrt")
        self.ranges = extremes(self.model, self.plan.tensors, [self.image])
        self.int8 = qdq.quantize(self.model, "tensorrt", self.plan, self.ranges)
        self.fp8 = to_fp8(self.int8, self.model)

    @property
    def description(self) -> Manifest:
        return self.manifest.replace(precision="fp8", quantized_for="tensorrt")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("fp8"))


def labels(path: Path, image: Any) -> Any:
    with OnnxRuntimeEngine(path, threads=1) as engine:
        return engine.infer(image).labels


def test_same_pairs_in_fp8(made: Made) -> None:
    onnx.checker.check_model(made.fp8, full_check=True)
    assert [(node.op_type, node.name) for node in made.fp8.graph.node] == [
        (node.op_type, node.name) for node in made.int8.graph.node
    ]
    types = tensor_types(made.fp8)
    for node in made.fp8.graph.node:
        if node.op_type == "QuantizeLinear":
            assert types[node.output[0]] == types[node.input[2]] == FP8
        if node.op_type == "DequantizeLinear":
            assert types[node.input[0]] == types[node.input[2]] == FP8
    assert TensorProto.INT8 not in types.values()
    assert qdq.count_convolutions(made.fp8) == qdq.count_convolutions(made.int8)


def test_activation_scales_map_the_largest_magnitude_to_448(made: Made) -> None:
    values = initializers(made.fp8.graph)
    scales = {
        node.input[0]: float(values[node.input[1]]) for node in made.fp8.graph.node if node.op_type == "QuantizeLinear"
    }
    peaks = {name: max(map(abs, made.ranges[name])) for name in scales if name in made.ranges}
    assert len(peaks) >= 4
    shared = {name for group in made.plan.shared for name in group}
    for name, peak in peaks.items():
        if name not in shared:
            assert scales[name] * E4M3_MAX == pytest.approx(peak, rel=1e-3), name


def test_weights_are_rounded_from_fp32_per_channel(made: Made) -> None:
    values, weights = initializers(made.fp8.graph), initializers(made.model.graph)
    for layer in QUANTIZABLE:
        kernel = weights[f"{layer}.weight"].astype(np.float32)
        stored, steps = (values[f"{layer}.weight_{part}"] for part in ("quantized", "scale"))
        assert stored.dtype == ml_dtypes.float8_e4m3fn
        assert steps.shape == (len(kernel),)
        least = half_scale(np.abs(kernel).max(axis=(1, 2, 3)) / np.float32(E4M3_MAX))
        assert ((least <= steps) & (steps < 2 * least)).all()
        plain = kernel / least.reshape(-1, 1, 1, 1)  # no worse than without the search for a scale
        rounded = plain.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * least.reshape(-1, 1, 1, 1)
        found = stored.astype(np.float32) * steps.reshape(-1, 1, 1, 1)
        errors = [np.square(values - kernel).sum(axis=(1, 2, 3)) for values in (found, rounded)]
        assert (errors[0] <= errors[1] * (1 + 1e-6)).all()
        smallest = steps.reshape(-1, 1, 1, 1) * 2.0**-9  # spacing of subnormals
        assert (np.abs(found - kernel) <= np.maximum(np.abs(kernel) * 2.0**-4, smallest / 2) * (1 + 1e-3)).all()


def test_scales_survive_fp16(made: Made) -> None:
    before, after = initializers(made.fp8.graph), initializers(to_half(made.fp8).graph)
    for node in made.fp8.graph.node:
        if node.op_type == "DequantizeLinear":
            assert after[node.input[1]].dtype == np.float16
            np.testing.assert_array_equal(after[node.input[1]].astype(np.float32), before[node.input[1]])
    tiny = copied(made.model)
    for entry in tiny.graph.initializer:
        if entry.name == "second.weight":
            store(entry, 1e-3 * numpy_helper.to_array(entry))
    stored = initializers(to_fp8(made.int8, tiny).graph)
    steps = stored["second.weight_scale"]
    assert (steps < 2.0**-14).all()  # subnormal FP16 numbers
    back = stored["second.weight_quantized"].astype(np.float32) * steps.reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(back, initializers(tiny.graph)["second.weight"], rtol=2.0**-4, atol=2.0**-24)


def test_labels_survive(made: Made, tmp_path: Path) -> None:
    """Through the engine as the file is, and with the rest's FP16 rounding simulated."""
    want = labels(made.path, made.image)
    assert len(np.unique(want)) == 3
    typed = to_half(made.fp8)
    plain = save_model(typed, tmp_path / "fp8.onnx", made.description)
    simulated = save_model(simulate_rounding(typed), tmp_path / "s.onnx", made.manifest)
    assert uses_half(typed)
    assert uses_half(made.fp8)
    assert np.mean(labels(plain, made.image) == want) > 0.9
    assert np.mean(labels(simulated, made.image) == want) > 0.9
    assert np.mean(labels(plain, made.image) == labels(simulated, made.image)) > 0.98


def test_convolutions_without_a_fast_kernel() -> None:
    def suits(*kernel: int, **attributes: Any) -> bool:
        return suits_fp8(helper.make_node("Conv", ["x", "w"], ["y"], **attributes), kernel)

    assert suits(64, 32, 3, 3)
    assert suits(17, 17, 5, 5, group=1)
    assert not suits(64, 16, 3, 3)
    assert not suits(3, 64, 1, 1)
    assert not suits(64, 64, 7, 7)  # 49 taps
    assert not suits(64, 64, 3, 3, group=64)


def test_layers_of_the_shipped_network(shipped: Any) -> None:
    """All but the first convolution, which sees one channel, and the classifier, which gives three."""
    planned, layers = (qdq.plan(shipped, "tensorrt", kind).nodes for kind in ("int8", "fp8"))
    assert set(planned) - set(layers) == {"backbone.stem.0.conv.conv/Conv", "conv_seg/Conv"}


def test_refusals(made: Made) -> None:
    old = copied(made.int8)
    old.opset_import[0].version = 18
    with pytest.raises(UsageError, match="opset 19 or later"):
        to_fp8(old, made.model)
    other = copied(made.model)
    del other.graph.initializer[:]
    with pytest.raises(UsageError, match=r"no weights called 'stem\.weight'"):
        to_fp8(made.int8, other)


@pytest.mark.parametrize(("target", "builds"), [(None, True), ("SM89", True), ("SM86", False)])
def test_tensorrt_rtx(made: Made, target: str | None, builds: bool) -> None:
    parsed = Parsed(to_half(made.fp8))
    assert (parsed.build((1, 1, 64, 64), (1, 1, 64, 64), (1, 1, 128, 128), target=target) is not None) == builds
    proof = report_from_network(parsed.trt, parsed.network, (1, 1, 64, 64))
    assert proof["convolutions"] == {"fp8": len(QUANTIZABLE), "fp16": 1}  # the gate's stays
    check_report(proof, "fp8", "it")


def test_real_micrographs(shipped: Any, sem_data: Path, tmp_path: Path) -> None:
    """The shipped network in FP8 and FP16, rounding simulated, against FP32."""
    folder = sem_data / "nasa-super1" / "images"

    def crops(split: str) -> list[Any]:
        return [np.asarray(Image.open(path))[None, None, :512, :512] for path in sorted((folder / split).glob("*.png"))]

    plan = qdq.plan(shipped, "tensorrt", "fp8")
    ranges = extremes(shipped, plan.tensors, crops("train")[:2])
    typed = to_half(qdq.quantize(shipped, "tensorrt", plan, ranges, "fp8"))
    path = save_model(simulate_rounding(typed), tmp_path / "s.onnx", read_manifest(SHIPPED))
    for image in crops("test"):
        assert np.mean(labels(path, image) == labels(SHIPPED, image)) > 0.995
