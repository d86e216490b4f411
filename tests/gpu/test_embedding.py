"""A host application's streams, buffers, contexts and threads on a real GPU. Written without one; not run yet."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from hpddrnet_trt.engines.cuda import (
    DeviceArray,
    DeviceBuffer,
    Gpu,
    PinnedBuffer,
    Stream,
    check,
    cuda_driver,
    current_device,
)
from hpddrnet_trt.engines.tensorrt import TensorRTEngine
from hpddrnet_trt.export.tensorrt import build_engine
from tests.tiny_onnx import QUIET, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("require_gpu")]
SHAPE = (1, 1, 256, 256)


@pytest.fixture(scope="module")
def engine_file(runtime: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedding")
    source = tiny_model(folder / "m.onnx")
    shapes = "1x1x64x64:1x1x256x256:4x1x512x512"
    build_engine(source, folder / "m.engine", precision="fp32", runtime=runtime, shapes=shapes, settings=QUIET)  # type: ignore[arg-type]
    return folder / "m.engine"


def _images(seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, SHAPE, dtype=np.uint8)


@pytest.mark.parametrize("offset", [0, 3])
def test_frames_and_labels_stay_on_the_callers_stream(engine_file: Path, require_gpu: Gpu, offset: int) -> None:
    """Ten frames queued without waiting on the host, each read back on the same stream."""
    with TensorRTEngine(engine_file) as engine, current_device(require_gpu.index):
        expected = [engine.infer(_images(seed)).labels for seed in range(10)]
        stream = Stream()
        source, target = DeviceBuffer(np.prod(SHAPE)), DeviceBuffer(256 * 256 + offset)
        frames, results = [], []
        batch = DeviceArray(source.pointer, SHAPE, np.dtype(np.uint8), source)
        labels = DeviceArray(target.pointer + offset, (1, 256, 256), np.dtype(np.uint8), target)
        for seed in range(10):
            frame, result = PinnedBuffer(batch.nbytes), PinnedBuffer(labels.nbytes)
            frame.view(SHAPE, np.uint8)[...] = _images(seed)
            stream.copy(source.pointer, frame.pointer, batch.nbytes)
            found = engine.infer_device(batch, out=labels, stream=stream.handle)["labels"]
            assert found.pointer == labels.pointer
            stream.copy(result.pointer, labels.pointer, labels.nbytes)
            frames.append(frame)
            results.append(result)
        stream.synchronize()
        for result, wanted in zip(results, expected, strict=True):
            np.testing.assert_array_equal(result.view((1, 256, 256), np.uint8), wanted)


def test_pytorchs_stream_and_tensors(engine_file: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    with TensorRTEngine(engine_file) as engine:
        wanted = engine.infer(_images()).labels
        out = torch.empty(1, 256, 256, dtype=torch.uint8, device="cuda")
        for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                batch = torch.from_numpy(_images()).cuda(non_blocking=True)
                engine.infer_device(batch, out=out, stream=stream)
                found = out.clone()
            stream.synchronize()
            np.testing.assert_array_equal(found.cpu().numpy(), wanted)


def _current() -> Any:
    return check(cuda_driver().cuCtxGetCurrent(), "reading the current context")


def test_a_context_of_the_host_application_stays_current(engine_file: Path, require_gpu: Gpu) -> None:
    """One that is not the primary context, and none at all."""
    driver = cuda_driver()
    raised: list[BaseException] = []

    def without_context() -> None:
        try:
            assert int(_current()) == 0
            with TensorRTEngine(engine_file) as engine:
                engine.infer(_images())
                assert int(_current()) == 0
            assert int(_current()) == 0
        except BaseException as exc:  # handed to the test
            raised.append(exc)

    thread = threading.Thread(target=without_context)
    thread.start()
    thread.join()
    assert raised == []
    device = check(driver.cuDeviceGet(require_gpu.index), "looking up the GPU")
    try:
        own = check(driver.cuCtxCreate(None, 0, device), "making a context")  # CUDA 13
    except TypeError:
        own = check(driver.cuCtxCreate(0, device), "making a context")
    try:
        with TensorRTEngine(engine_file) as engine:
            for seed in range(4):
                engine.infer(_images(seed))
                assert int(_current()) == int(own)
    finally:
        check(driver.cuCtxDestroy(own), "freeing a context")


def test_one_engine_in_many_threads(engine_file: Path) -> None:
    raised: list[BaseException] = []
    with TensorRTEngine(engine_file) as engine:
        wanted = [engine.infer(_images(seed)).labels for seed in range(4)]

        def work(seed: int) -> None:
            try:
                for _ in range(20):
                    np.testing.assert_array_equal(engine.infer(_images(seed)).labels, wanted[seed])
                for found in engine.infer_many([_images(seed)] * 20):
                    np.testing.assert_array_equal(found.labels, wanted[seed])
            except BaseException as exc:  # handed to the test
                raised.append(exc)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert raised == []
