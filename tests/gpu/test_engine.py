"""Engines built and run on a real GPU, against ONNX Runtime on the CPU running the same ONNX file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest

from hpddrnet_trt.core.errors import BadInputFile, ContractError
from hpddrnet_trt.core.manifest import sidecar_path
from hpddrnet_trt.engines.cuda import check, cudart
from hpddrnet_trt.engines.tensorrt import LeanTensorRTEngine, TensorRTEngine
from hpddrnet_trt.export.build_settings import BuildSettings
from hpddrnet_trt.export.tensorrt import build_engine
from tests.tiny_onnx import QUIET, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("require_gpu")]

SHAPES = "1x1x64x64:1x1x256x256:4x1x512x512"
# Arg-max may tip where two scores are equal to within the precision: that many pixels may differ.
AGREEMENT = {"fp32": 0.9999, "fp16": 0.99, "int8": 0.98}


def _images(*shape: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _truth(source: Path, images: npt.NDArray[Any]) -> npt.NDArray[Any]:
    options = onnxruntime.SessionOptions()
    session = onnxruntime.InferenceSession(
        str(source), options, providers=["CPUExecutionProvider"], disabled_optimizers=["WeightBiasQuantization"]
    )
    return np.asarray(session.run(None, {"image": images})[0])


def _agreement(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> float:
    assert left.shape == right.shape
    return float((left == right).mean())


def _built(folder: Path, runtime: str, precision: Any = "fp32", **options: Any) -> tuple[Path, Path]:
    source = tiny_model(folder / f"{precision}.onnx", typing=precision)
    target = folder / f"{precision}.engine"
    settings = BuildSettings(progress=False, **options)
    build_engine(source, target, precision=precision, runtime=runtime, shapes=SHAPES, settings=settings)
    return source, target


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_labels_agree_with_onnx_runtime(tmp_path: Path, runtime: str, precision: str) -> None:
    source, target = _built(tmp_path, runtime, precision)
    with TensorRTEngine(target) as engine:
        for shape in ((1, 1, 256, 256), (4, 1, 64, 128), (1, 1, 512, 512), (1, 1, 256, 256)):
            images = _images(*shape)
            assert _agreement(engine.infer(images).labels, _truth(source, images)) >= AGREEMENT[precision]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_precision_is_proven_on_the_gpu(tmp_path: Path, runtime: str, precision: str) -> None:
    _, target = _built(tmp_path, runtime, precision)
    record = json.loads(sidecar_path(target).read_text())["engine"]
    proof = record["layer_precision"]
    assert record["gpu"]
    assert proof["convolutions"][precision] > 0
    # Either the inspector spoke, or the proof says why it did not.
    assert proof["source"] == "engine inspector" or "engine" in proof["remark"]


def test_the_real_network_agrees(tmp_path: Path, runtime: str) -> None:
    """The exported network, random weights, FP32 and FP16 engines against ONNX Runtime."""
    torch = pytest.importorskip("torch", reason="PyTorch, which exports the network, is not installed")
    from hpddrnet_trt.core.manifest import ClassInfo, Manifest
    from hpddrnet_trt.export.onnx import export_onnx
    from hpddrnet_trt.models.checkpoints import save_checkpoint
    from hpddrnet_trt.models.network import HPDDRNet, network_config

    torch.manual_seed(0)
    config = network_config("hpddrnet-23-slim", 3)
    classes = [ClassInfo(name=name, color=(0, 0, 0)) for name in "abc"]
    checkpoint = save_checkpoint(
        tmp_path / "m.safetensors", HPDDRNet(config).eval(), Manifest(network=config, classes=classes)
    )
    source = tmp_path / "m.onnx"
    export_onnx(checkpoint, source)
    images = _images(1, 1, 256, 384)
    truth = _truth(source, images)
    for precision in ("fp32", "fp16"):
        target = tmp_path / f"m.{precision}.engine"
        build_engine(
            source, target, precision=precision, runtime=runtime,  # type: ignore[arg-type]
            shapes="1x1x256x256:1x1x256x384:1x1x512x512", settings=QUIET,
        )  # fmt: skip
        with TensorRTEngine(target) as engine:
            assert _agreement(engine.infer(images).labels, truth) >= AGREEMENT[precision]


def _torch_array(images: npt.NDArray[Any]) -> Any:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    return torch.from_numpy(images).cuda()


def _cupy_array(images: npt.NDArray[Any]) -> Any:
    return pytest.importorskip("cupy", reason="CuPy is not installed").asarray(images)


def _pycuda_array(images: npt.NDArray[Any]) -> Any:
    pytest.importorskip("pycuda.autoprimaryctx", reason="PyCUDA is not installed")
    from pycuda import gpuarray

    return gpuarray.to_gpu(images)


@pytest.mark.parametrize("place", [_torch_array, _cupy_array, _pycuda_array])
def test_arrays_of_other_libraries(tmp_path: Path, runtime: str, place: Any) -> None:
    source, target = _built(tmp_path, runtime)
    images = _images(2, 1, 128, 256)
    with TensorRTEngine(target) as engine:
        there = place(images)
        assert _agreement(engine.infer(there).labels, _truth(source, images)) >= AGREEMENT["fp32"]
        with pytest.raises(ContractError, match="C-contiguous"):
            engine.infer(there[:, :, :, ::2])


def test_results_on_the_gpu_reach_pytorch(tmp_path: Path, runtime: str) -> None:
    source, target = _built(tmp_path, runtime)
    images = _images(1, 1, 256, 256)
    there = _torch_array(images)
    import torch

    with TensorRTEngine(target) as engine:
        labels = torch.as_tensor(engine.infer_device(there)["labels"], device="cuda")
        assert _agreement(labels.cpu().numpy(), _truth(source, images)) >= AGREEMENT["fp32"]
        # An array that starts in the middle of an allocation is not aligned as TensorRT wants it.
        two = torch.cat([there[:, :, :, :8], there], dim=3).flatten()[3 : 3 + there.numel()].reshape(there.shape)
        assert _agreement(engine.infer(two).labels, _truth(source, two.cpu().numpy())) >= AGREEMENT["fp32"]


def test_steady_frames_take_no_more_memory(tmp_path: Path, runtime: str) -> None:
    _, target = _built(tmp_path, runtime)
    images = _images(4, 1, 512, 512)
    with TensorRTEngine(target) as engine:
        engine.infer(images)
        free, _ = check(cudart().cudaMemGetInfo(), "reading free memory")
        for _ in range(100):
            engine.infer(images)
        after, _ = check(cudart().cudaMemGetInfo(), "reading free memory")
    assert free - after < 16 << 20


def test_graphs_equal_plain_runs_equal_onnx_runtime(
    tmp_path: Path, runtime: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Frames of several shapes, each often enough to come from a graph, and in changing order."""
    source, target = _built(tmp_path, runtime)
    shapes = [(1, 1, 64, 64), (1, 1, 256, 256), (2, 1, 128, 64)]
    batches = [_images(*shape, seed=seed) for seed in range(5) for shape in shapes for _ in range(2)]
    with TensorRTEngine(target) as quick, TensorRTEngine(target, graphs=False) as plain:
        for images in batches:
            labels = quick.infer(images).labels
            np.testing.assert_array_equal(labels, plain.infer(images).labels)
            assert _agreement(labels, _truth(source, images)) >= AGREEMENT["fp32"]
    assert "no CUDA graph can be made" not in caplog.text


def test_labels_go_where_the_caller_wants_them(tmp_path: Path, runtime: str) -> None:
    _, target = _built(tmp_path, runtime)
    out = np.zeros((1, 256, 256), np.uint8)
    with TensorRTEngine(target) as engine:
        for seed in range(5):
            images = _images(1, 1, 256, 256, seed=seed)
            assert engine.infer(images, out=out).labels is out
            np.testing.assert_array_equal(out, engine.infer(images).labels)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_many_in_flight_equal_one_at_a_time(tmp_path: Path, runtime: str, slots: int) -> None:
    _, target = _built(tmp_path, runtime)
    sizes = [256] * 20 + [64, 256, 512, 64] * 3
    batches = [_images(1, 1, size, size, seed=seed) for seed, size in enumerate(sizes)]
    with TensorRTEngine(target, slots=slots) as engine:
        single = [engine.infer(images).labels for images in batches]
        for _ in range(2):  # without and with graphs
            for expected, result in zip(single, engine.infer_many(batches), strict=True):
                np.testing.assert_array_equal(result.labels, expected)


def test_a_bound_batch_runs_and_disturbs_nothing(tmp_path: Path, runtime: str) -> None:
    _, target = _built(tmp_path, runtime)
    images = _images(1, 1, 256, 256)
    with TensorRTEngine(target) as engine:
        before = engine.infer(images).labels
        run = engine.bind(images)
        times = []
        for _ in range(30):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        assert 0 < np.median(times) < 1
        # The GPU's own clock sees what the host's sees, but for the launch and the wait.
        assert 0 < np.median(run.burst(30)) < 1.5 * np.median(times)
        engine.bind(_images(2, 1, 64, 64, seed=1))()
        run()
        np.testing.assert_array_equal(engine.infer(images).labels, before)
        times_of_layers = engine.layer_times(images, runs=5)
        assert times_of_layers
        assert all(milliseconds >= 0 for milliseconds in times_of_layers.values())
        np.testing.assert_array_equal(engine.infer(images).labels, before)


def test_timing_cache_is_written_and_read(tmp_path: Path, runtime: str) -> None:
    if runtime != "tensorrt":
        pytest.skip("TensorRT-RTX has no timing cache")
    cache = tmp_path / "timing.cache"
    _built(tmp_path, runtime, timing_cache=cache)
    assert cache.stat().st_size > 0
    _built(tmp_path, runtime, timing_cache=cache)


def test_compiled_kernels_are_kept_beside_the_engine(tmp_path: Path, runtime: str) -> None:
    _, target = _built(tmp_path, runtime)
    kernels = target.with_name(f"{target.name}.kernels")
    found = []
    for _ in range(2):
        with TensorRTEngine(target) as engine:
            engine.bind(_images(1, 1, 256, 256))()
            found.append(engine.infer(_images(1, 1, 256, 256)).labels)
        assert kernels.is_file() == (runtime == "tensorrt-rtx")
    np.testing.assert_array_equal(*found)


def test_the_lean_runtime_gives_the_same_labels(tmp_path: Path, runtime: str) -> None:
    pytest.importorskip("tensorrt_lean", reason="the extra tensorrt-lean is not installed")
    if runtime != "tensorrt":
        pytest.skip("the lean runtime runs engines of TensorRT")
    _, target = _built(tmp_path, runtime, version_compatible=True)
    images = _images(1, 1, 256, 256)
    with TensorRTEngine(target) as engine, LeanTensorRTEngine(target) as lean:
        np.testing.assert_array_equal(lean.infer(images).labels, engine.infer(images).labels)


def test_an_engine_for_another_gpu_is_refused(tmp_path: Path, runtime: str) -> None:
    _, target = _built(tmp_path, runtime)
    fields = json.loads(sidecar_path(target).read_text())
    fields["engine"]["compute_capabilities"] = ["5.0"]
    sidecar_path(target).write_text(json.dumps(fields))
    with pytest.raises(BadInputFile, match=r"compute capability 5\.0.*build the engine again"):
        TensorRTEngine(target)
