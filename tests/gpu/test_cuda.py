"""What our runner does with CUDA, without TensorRT: on the stand-in of the tests, and on a GPU where one is.

The stand-in's turns hold it to what the real one must do as well. On a GPU: written without one; not run yet.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from hpddrnet_trt.core.errors import ContractError, UserError
from hpddrnet_trt.engines import cuda
from hpddrnet_trt.engines.cuda import (
    CaptureError,
    CudaGraph,
    DeviceArray,
    DeviceBuffer,
    PinnedBuffer,
    Stream,
    check,
    current_device,
    view_device_array,
)
from tests.toy import grey_image

pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
pytest.importorskip("cuda.core.utils", reason="cuda-core is not installed")
REPOSITORY = Path(__file__).resolve().parents[2]
BYTES = np.random.default_rng(0).integers(0, 256, (2, 64, 96), dtype=np.uint8)


class RealProgram:
    """A program with a CUDA context of its own, made and used through the driver as ``pycuda.autoinit`` does."""

    def __init__(self) -> None:
        self.driver = cuda.cuda_driver()
        check(self.driver.cuInit(0), "starting CUDA")
        device = check(self.driver.cuDeviceGet(0), "looking up the GPU")
        arguments = (None, 0, device) if self.driver.CUDA_VERSION >= 13000 else (0, device)
        self.context = check(self.driver.cuCtxCreate(*arguments), "making a context")

    def array(self, values: npt.NDArray[Any]) -> Any:
        pointer = int(check(self.driver.cuMemAlloc(values.nbytes), "allocating"))
        check(self.driver.cuMemcpyHtoD(pointer, values.ctypes.data, values.nbytes), "copying")
        interface = {"shape": values.shape, "typestr": values.dtype.str, "data": (pointer, False), "version": 3,
                     "strides": values.strides, "stream": None}  # fmt: skip
        return SimpleNamespace(__cuda_array_interface__=interface)

    def read(self, array: Any) -> npt.NDArray[Any]:
        interface = array.__cuda_array_interface__
        found = np.empty(interface["shape"], np.dtype(interface["typestr"]))
        check(self.driver.cuMemcpyDtoH(found.ctypes.data, interface["data"][0], found.nbytes), "copying")
        return found

    def fill(self, array: Any, value: int, stream: int) -> None:
        pointer, nbytes = array.__cuda_array_interface__["data"][0], BYTES.nbytes
        check(self.driver.cuMemsetD8Async(pointer, value, nbytes, stream), "filling")

    def stream(self) -> int:
        return int(check(self.driver.cuStreamCreate(1), "making a stream"))

    def close(self) -> None:
        check(self.driver.cuCtxDestroy(self.context), "freeing a context")


@pytest.fixture(params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Any]]:
    """Gives the thread a context of a program's own, when it is called; the primary one may come on top."""
    if request.param == "gpu":
        request.getfixturevalue("require_gpu")
        opened: list[RealProgram] = []

        def real() -> RealProgram:
            opened.append(RealProgram())
            return opened[-1]

        yield real
        for each in opened:
            each.close()
        return
    from tests.engines.simulated_cuda import SimulatedCuda, array_reader, read

    stand_in = SimulatedCuda(cuda.cudart())
    answers = {"cudart": stand_in, "cuda_driver": stand_in, "strided_memory_view": array_reader(stand_in)}
    for name, answer in answers.items():
        monkeypatch.setattr(cuda, name, lambda answer=answer: answer)

    def fill(array: Any, value: int, stream: int) -> None:
        pointer = array.__cuda_array_interface__["data"][0]
        stand_in.queue(stream, lambda: ctypes.memset(pointer, value, BYTES.nbytes))

    def simulated() -> Any:
        context = stand_in.context()
        return SimpleNamespace(
            context=context, array=lambda values: stand_in.array(values, context=context), read=read,
            stream=stand_in.stream, fill=fill,
        )  # fmt: skip

    yield simulated


@pytest.fixture
def primary(program: Callable[[], Any]) -> Iterator[None]:
    with current_device(0):
        yield


def pinned(values: npt.NDArray[Any] | None = None) -> PinnedBuffer:
    buffer = PinnedBuffer(BYTES.nbytes)
    buffer.view(BYTES.shape, np.uint8)[...] = 0 if values is None else values
    return buffer


def content(buffer: PinnedBuffer) -> npt.NDArray[np.uint8]:
    return buffer.view(BYTES.shape, np.uint8)


@pytest.mark.usefixtures("primary")
@pytest.mark.parametrize("how", ["wait_for", "precede", "same stream"])
def test_bytes_go_there_and_back_in_the_order_of_streams(how: str) -> None:
    there, back = Stream(), Stream()
    source, target, between = pinned(BYTES), pinned(), DeviceBuffer(BYTES.nbytes)
    there.copy(between.pointer, source.pointer, BYTES.nbytes)
    if how == "wait_for":
        back.wait_for(there.handle)
    elif how == "precede":
        there.precede(back.handle)
    else:
        back = there
    back.copy(target.pointer, between.pointer, BYTES.nbytes)
    back.synchronize()
    assert np.array_equal(content(target), BYTES)


@pytest.mark.usefixtures("primary")
def test_a_graph_replays_what_was_recorded() -> None:
    stream, source, target, between = Stream(), pinned(BYTES), pinned(), DeviceBuffer(BYTES.nbytes)

    def record() -> None:
        stream.copy(between.pointer, source.pointer, BYTES.nbytes)
        stream.copy(target.pointer, between.pointer, BYTES.nbytes)

    graph = CudaGraph(stream, record)
    assert not content(target).any()  # recorded, not run
    for values in (BYTES, 255 - BYTES):
        content(source)[...] = values
        graph.launch()
        stream.synchronize()
        assert np.array_equal(content(target), values)
    graph.close()


@pytest.mark.usefixtures("primary")
def test_what_cannot_be_recorded_is_said_and_the_stream_goes_on() -> None:
    stream, source, target = Stream(), pinned(BYTES), pinned()
    with pytest.raises(CaptureError, match="CUDA reports cudaErrorStreamCapture"):
        CudaGraph(stream, stream.synchronize)
    stream.copy(target.pointer, source.pointer, BYTES.nbytes)
    stream.synchronize()
    assert np.array_equal(content(target), BYTES)


@pytest.mark.usefixtures("primary")
def test_memory_that_is_not_to_be_had_is_a_sentence_and_memory_that_is_gone_is_refused() -> None:
    for kind in (DeviceBuffer, PinnedBuffer):
        with pytest.raises(UserError, match=r"out of memory while allocating .*; close other programs"):
            kind(1 << 50)
    buffer = DeviceBuffer(BYTES.nbytes)
    array = DeviceArray(buffer.pointer, BYTES.shape, BYTES.dtype, buffer)
    assert array.__cuda_array_interface__["data"] == (buffer.pointer, False)
    buffer.close()
    with pytest.raises(ContractError, match="this GPU array is gone"):
        _ = array.__cuda_array_interface__


def test_arrays_of_a_context_of_a_programs_own_are_copied_both_ways(program: Callable[[], Any]) -> None:
    host = program()
    theirs, empty = host.array(BYTES), host.array(np.zeros_like(BYTES))
    with current_device(0):
        stream, between, target = Stream(), DeviceBuffer(BYTES.nbytes), pinned()
        given, wanted = (view_device_array(array, stream, 0) for array in (theirs, empty))
        assert int(given.context) == int(wanted.context) == int(host.context)
        stream.read(given, between.pointer)
        stream.copy(target.pointer, between.pointer, BYTES.nbytes)
        stream.write(wanted, between.pointer)  # complete on return
        assert np.array_equal(content(target), BYTES)
        ours = DeviceArray(between.pointer, BYTES.shape, BYTES.dtype, between)
        assert view_device_array(ours, stream, 0).context is None
    assert np.array_equal(host.read(empty), BYTES)


def test_streams_of_a_context_of_a_programs_own_keep_the_order(program: Callable[[], Any]) -> None:
    host = program()
    other, theirs = host.stream(), host.array(np.zeros_like(BYTES))
    host.fill(theirs, 7, other)
    with current_device(0):
        stream, source, target = Stream(), pinned(BYTES), pinned()
        stream.wait_for(other)
        stream.copy(target.pointer, source.pointer, BYTES.nbytes)
        stream.precede(other)
        assert np.array_equal(content(target), BYTES)  # the host has waited
    assert (host.read(theirs) == 7).all()  # for them as well


# --- with other libraries, on a GPU only


def _gpu_module(name: str) -> Any:
    """PyTorch or CuPy where it can use the GPU; else the test is skipped with the reason."""
    module = pytest.importorskip(name, reason=f"{name} is not installed")
    if name == "torch" and not module.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    return module


@pytest.mark.gpu
@pytest.mark.usefixtures("require_gpu")
@pytest.mark.parametrize("name", ["torch", "cupy"])
class TestArraysOfLibraries:
    def test_they_are_used_in_place_both_ways(self, name: str) -> None:
        module = _gpu_module(name)
        theirs = module.from_numpy(BYTES).cuda() if name == "torch" else module.asarray(BYTES)
        pointer = theirs.data_ptr() if name == "torch" else theirs.data.ptr
        with current_device(0):
            stream, target = Stream(), pinned()
            view = view_device_array(theirs, stream, 0)
            assert (view.pointer, view.shape, view.dtype, view.context) == (pointer, BYTES.shape, BYTES.dtype, None)
            stream.copy(target.pointer, view.pointer, view.nbytes)
            stream.synchronize()
            assert np.array_equal(content(target), BYTES)
            with pytest.raises(ContractError, match="not C-contiguous"):
                view_device_array(theirs[:, :, ::2], stream, 0)
            back = module.as_tensor(view, device="cuda") if name == "torch" else module.asarray(view)
        assert (back.data_ptr() if name == "torch" else back.data.ptr) == pointer

    def test_work_on_their_stream_is_waited_for(self, name: str) -> None:
        """Made late on a stream of theirs: by DLPack, and by the stream's number."""
        module = _gpu_module(name)
        side = module.cuda.Stream() if name == "torch" else module.cuda.Stream(non_blocking=True)
        with module.cuda.stream(side) if name == "torch" else side:
            square = module.ones((4096, 4096), dtype=module.float32, **({"device": "cuda"} if name == "torch" else {}))
            for _ in range(20):
                square = square @ square * 0 + 1
            late = square[:64, :96] * 7
            late = late.to(module.uint8).contiguous() if name == "torch" else late.astype(module.uint8)
            for by_number in (False, True):
                with current_device(0):
                    stream, target = Stream(), pinned()
                    if by_number:
                        stream.wait_for(cuda.stream_handle(side))
                    view = view_device_array(late, stream, 0)
                    stream.copy(target.pointer, view.pointer, view.nbytes)
                    stream.synchronize()
                    assert (content(target)[0] == 7).all()


@pytest.mark.gpu
@pytest.mark.usefixtures("require_gpu")
def test_memory_of_a_pool_belongs_to_no_context() -> None:
    cupy = _gpu_module("cupy")
    with cupy.cuda.using_allocator(cupy.cuda.MemoryAsyncPool().malloc), current_device(0):
        assert view_device_array(cupy.asarray(BYTES), Stream(), 0).context is None


@pytest.mark.gpu
@pytest.mark.usefixtures("require_gpu")
@pytest.mark.parametrize(("context", "foreign"), [("autoprimaryctx", False), ("autoinit", True)])
def test_pycuda_with_both_kinds_of_context(context: str, foreign: bool) -> None:
    """In a process of its own, whose first CUDA context is PyCUDA's."""
    if importlib.util.find_spec("pycuda") is None:
        pytest.skip("PyCUDA is not installed")
    script = f"""
        import pycuda.{context}, pycuda.driver, numpy as np
        from pycuda import gpuarray
        from hpddrnet_trt.engines.cuda import DeviceBuffer, Stream, current_device, stream_handle, view_device_array

        values = np.arange(4096, dtype=np.uint8).reshape(64, 64)
        theirs, back, stream = gpuarray.to_gpu(values), gpuarray.zeros((64, 64), np.uint8), pycuda.driver.Stream()
        with current_device(0):
            ours, between = Stream(), DeviceBuffer(4096)
            ours.wait_for(stream_handle(stream))
            view, target = (view_device_array(array, ours, 0) for array in (theirs, back))
            assert (view.context is not None) == {foreign}
            ours.read(view, between.pointer)
            ours.write(target, between.pointer)
            ours.precede(stream_handle(stream))
        stream.synchronize()
        assert np.array_equal(back.get(), values)
    """
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False, cwd=REPOSITORY,
        timeout=120,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr


@pytest.mark.gpu
@pytest.mark.usefixtures("require_gpu")
def test_live_frames_on_pytorchs_engine() -> None:
    """Two streams of frames at once, each frame with the labels of the CPU but for close calls."""
    _gpu_module("torch")
    from hpddrnet_trt.inference import load_segmenter
    from hpddrnet_trt.stream import State
    from hpddrnet_trt.stream import Stream as Live

    frames = [grey_image(256, 320, seed) for seed in range(6)]
    with load_segmenter("nasa-super1", engine="torch", device="cpu") as cpu:
        wanted = [cpu.segment(frame).labels for frame in frames]
    found: tuple[list[Any], list[Any]] = ([], [])

    def live(results: list[Any]) -> Live:
        def opener() -> Any:
            return load_segmenter("nasa-super1", engine="torch", device="cuda")

        return Live(opener, policy="block", on_result=results.append, warm_up=[(256, 320)])

    with live(found[0]) as first, live(found[1]) as second:
        assert [stream.wait_ready(120) for stream in (first, second)] == [State.READY] * 2
        for number, frame in enumerate(frames):
            for stream in (first, second):
                stream.submit(frame, number)
    for results in found:
        assert [result.tag for result in results] == list(range(len(frames)))
        assert all(np.mean(result.segmentation.labels == wanted[result.tag]) > 0.99 for result in results)
