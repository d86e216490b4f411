"""CUDA without a framework: arrays of other libraries, contexts of a program's own, and what goes wrong on a GPU."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import inspect
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hpddrnet_trt.core.errors import ContractError, NoGpu, UserError
from hpddrnet_trt.engines import cuda as cuda_memory
from hpddrnet_trt.engines.cuda import (
    LEGACY_STREAM,
    DeviceArray,
    as_device_array,
    check,
    find_gpu,
    on_device,
    view_device_array,
)
from hpddrnet_trt.inference import Segmenter

StridedMemoryView = pytest.importorskip("cuda.core.utils", reason="cuda-core is not installed").StridedMemoryView
pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
from tests.engines.conftest import Bench, noise  # noqa: E402
from tests.engines.simulated_cuda import FOREIGN, ForeignArray, SimulatedCuda, array_reader, read  # noqa: E402

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "segment_pycuda_arrays.py"
needs_tensorrt = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx, which builds the engine, is missing"
)


@pytest.fixture(autouse=True, scope="module")
def cuda() -> Iterator[SimulatedCuda]:
    """Without an engine too, the stand-in answers for CUDA."""
    real = cuda_memory.cudart()
    with pytest.MonkeyPatch.context() as patch:
        stand_in = SimulatedCuda(real)
        stand_in.contexts.append(0)
        patch.setattr(cuda_memory, "cudart", lambda: stand_in)
        patch.setattr(cuda_memory, "cuda_driver", lambda: stand_in)
        yield stand_in


# --- arrays of other libraries


class Exporter:
    """A numpy array that says it is on GPU 0, and takes part in DLPack as PyTorch and CuPy do."""

    def __init__(self, values: npt.NDArray[Any]) -> None:
        self.values, self.stream = values, 0

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, stream: int, max_version: tuple[int, int] | None = None) -> Any:
        self.stream = stream
        return self.values.__dlpack__(max_version=max_version)


OURS: Any = SimpleNamespace(handle=5)  # a stream


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.sampled_from([np.uint8, np.float32, np.float16, np.int64, np.bool_]),
)
def test_dlpack_is_read(shape: list[int], dtype: Any) -> None:
    exporter = Exporter(np.arange(np.prod(shape)).astype(dtype).reshape(shape))
    view = view_device_array(exporter, OURS, 0)
    assert (view.pointer, view.shape, view.dtype) == (exporter.values.ctypes.data, tuple(shape), exporter.values.dtype)
    assert exporter.stream == OURS.handle  # the producer makes it wait
    assert view.stream is None


def test_dlpack_offset_strides_and_what_may_not_be_written() -> None:
    values = np.zeros((4, 6), np.float32)
    assert view_device_array(Exporter(values[2:]), OURS, 0).pointer == values.ctypes.data + 48
    assert view_device_array(Exporter(values[:0, ::2]), OURS, 0).shape == (0, 3)
    for strided in (values[:, ::2], values.T):
        with pytest.raises(ContractError, match="not C-contiguous; make a contiguous copy"):
            view_device_array(Exporter(strided), OURS, 0)
    values.flags.writeable = False
    view_device_array(Exporter(values), OURS, 0)
    with pytest.raises(ContractError, match="read-only"):
        view_device_array(Exporter(values), OURS, 0, writable=True)


class Refusing(Exporter):
    """As PyTorch, which raises for what needs gradients."""

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("requires grad, use detach()")


class Gradients:
    @property
    def __cuda_array_interface__(self) -> Any:
        raise RuntimeError("requires grad")


def test_which_arrays_are_on_a_gpu() -> None:
    for here in (np.zeros(3), [1, 2], memoryview(b"x"), SimpleNamespace(__dlpack_device__=lambda: (1, 0))):
        assert not on_device(here)
    assert on_device(ForeignArray(4096, np.zeros(3)))
    assert on_device(SimpleNamespace(__dlpack_device__=lambda: (2, 0)))
    with pytest.raises(ContractError, match=r"requires grad.*detach"):
        on_device(Gradients())
    with pytest.raises(ContractError, match=r"cannot be used in place \(requires grad, use detach\(\)\)"):
        view_device_array(Refusing(np.zeros(3)), OURS, 0)


def test_dlpack_of_pytorch_keeps_the_memory_alive() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    view = as_device_array(StridedMemoryView.from_dlpack(torch.full((2, 3), 7, dtype=torch.uint8), stream_ptr=-1))
    gc.collect()
    assert ctypes.string_at(view.pointer, view.nbytes) == bytes([7] * 6)


def test_the_stand_in_for_cuda_core_has_its_names_and_signatures() -> None:
    stand_in = array_reader(SimulatedCuda(cuda_memory.cudart()))
    for name in ("from_dlpack", "from_cuda_array_interface"):
        real = inspect.signature(getattr(StridedMemoryView, name)).parameters
        ours = inspect.signature(getattr(stand_in, name)).parameters
        assert [(one.name, one.kind, one.default) for one in ours.values()] == [
            (one.name, one.kind, one.default) for one in real.values()
        ]
    view = stand_in.from_cuda_array_interface(ForeignArray(4096, np.zeros(3)), stream_ptr=5)
    assert all(hasattr(StridedMemoryView, name) for name in vars(view))


def _viewed(bench: Callable[..., Bench], **changes: Any) -> tuple[DeviceArray, Bench]:
    job = bench()
    job.cuda.contexts.append(0)
    job.cuda.log.clear()
    array = ForeignArray(4096, np.zeros((2, 1, 8, 8), np.uint8), **changes)
    return view_device_array(array, job.engine._slot.stream, 0), job


@pytest.mark.parametrize(
    ("changes", "waits_for"),
    [
        ({}, None),
        ({"stream": 7}, 7),
        ({"version": 2}, LEGACY_STREAM),  # cannot say whether work is pending (PyCUDA)
        ({"strides": (64, 999, 8, 1)}, None),
    ],
)
def test_cuda_array_interface_is_read(bench: Callable[..., Bench], changes: Any, waits_for: int | None) -> None:
    view, job = _viewed(bench, **changes)
    assert (view.pointer, view.shape, view.dtype, view.stream) == (4096, (2, 1, 8, 8), np.dtype(np.uint8), None)
    assert job.cuda.log == ([] if waits_for is None else [("record", waits_for), ("wait", job.engine.stream)])
    assert view.__cuda_array_interface__["version"] == 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"strides": (64, 64, 1, 8)}, "not C-contiguous"),
        ({"mask": object()}, "mask"),
        ({"version": 1}, "version 1; 2 or newer"),
        ({"stream": 0}, "stream 0"),
        ({"typestr": "nonsense"}, "cannot be used in place"),
        ({"data": None}, "cannot be used in place"),
        ({"shape": ("a",)}, "cannot be used in place"),
    ],
)
def test_unusable_interfaces(bench: Callable[..., Bench], changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ContractError, match=says):
        _viewed(bench, **changes)


def test_cuda_errors_are_sentences() -> None:
    errors = cuda_memory.cudart().cudaError_t
    for failed, says in (
        (errors.cudaErrorMemoryAllocation, r"out of memory while starting.*smaller"),
        (errors.cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver while starting; install or update"),
    ):
        with pytest.raises(UserError, match=says):
            check((failed, None), "starting")
    assert [check((errors.cudaSuccess, *values), "") for values in ((3,), (), (1, 2))] == [3, None, (1, 2)]


# --- a program with a context of its own


Start = Callable[..., Bench]


def _gpuarray(job: Bench, values: npt.NDArray[Any], context: int, **changes: Any) -> ForeignArray:
    """As PyCUDA holds it: version 3, strides always, no stream whatever is queued."""
    array = job.cuda.array(values, context=context)
    array.__cuda_array_interface__ |= {"strides": values.strides, **changes}
    return array


@needs_tensorrt
@pytest.mark.parametrize("out_there", [False, True])
def test_arrays_of_another_context_are_copied_and_waited_for(bench: Start, out_there: bool) -> None:
    job, images = bench(), noise(1, 1, 64, 64)
    context = job.cuda.context()
    stream = job.cuda.stream()
    frame = _gpuarray(job, np.zeros_like(images), context, stream=stream)
    labels = _gpuarray(job, np.zeros((1, 64, 64), np.uint8), context)
    pointer = frame.__cuda_array_interface__["data"][0]
    job.cuda.queue(stream, lambda: ctypes.memmove(pointer, images.ctypes.data, images.nbytes))
    if out_there:
        job.engine.infer_device(frame, out=labels)
        job.check(images, read(labels))
    else:
        job.check(images, job.engine.infer(frame).labels)
    assert job.count("peer copy") == 1 + out_there
    assert job.cuda.contexts == [context]
    assert job.cuda.sticky is None


@needs_tensorrt
def test_streams_of_another_context_are_waited_for_by_the_host(bench: Start) -> None:
    job, images = bench(), noise(1, 1, 64, 64)
    context = job.cuda.context()
    stream = job.cuda.stream()
    frame = _gpuarray(job, np.zeros_like(images), context)
    labels = _gpuarray(job, np.zeros((1, 64, 64), np.uint8), context)
    pointer = frame.__cuda_array_interface__["data"][0]
    job.cuda.queue(stream, lambda: ctypes.memmove(pointer, images.ctypes.data, images.nbytes))
    job.engine.infer_device(frame, out=labels, stream=stream)
    assert not job.cuda.queues[job.engine.stream]  # what is queued on theirs from now on comes after
    job.check(images, read(labels))
    segmenter = Segmenter(job.engine)
    flat = _gpuarray(job, images[0, 0], context)
    np.testing.assert_array_equal(segmenter.segment(flat, stream=stream).labels, job.truth(images)[0])
    assert job.cuda.contexts == [context]


@needs_tensorrt
def test_pycudas_default_stream_is_waited_for_in_the_primary_context(bench: Start) -> None:
    job, images = bench(), noise(1, 1, 64, 64)
    kind = type("GPUArray", (ForeignArray,), {"__module__": "pycuda.gpuarray"})
    frame = job.cuda.array(np.zeros_like(images))
    frame.__class__ = kind
    pointer = frame.__cuda_array_interface__["data"][0]
    job.cuda.queue(LEGACY_STREAM, lambda: ctypes.memmove(pointer, images.ctypes.data, images.nbytes))
    job.check(images, job.engine.infer(frame).labels)
    assert job.count("peer copy") == 0
    assert job.cuda.memory[pointer][2] < FOREIGN


@needs_tensorrt
@pytest.mark.parametrize("own", [False, True])
def test_the_example_with_pycudas_arrays(
    bench: Start, own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job, images = bench(), noise(1, 1, 64, 64)
    job.cuda.contexts[:] = [job.cuda.context() if own else 0]

    class Stream:
        def __init__(self) -> None:
            self.handle = job.cuda.stream()

        def synchronize(self) -> None:
            job.cuda.finish(self.handle)

    class GPUArray(ForeignArray):
        __module__ = "pycuda.gpuarray"

        def __init__(self, values: npt.NDArray[Any]) -> None:
            self.__cuda_array_interface__ = _gpuarray(job, values, job.cuda.contexts[-1] or 0).__cuda_array_interface__

        def get_async(self, stream: Stream) -> npt.NDArray[Any]:
            found = np.empty_like(read(self))
            job.cuda.queue(stream.handle, lambda: np.copyto(found, read(self)))
            return found

    def to_gpu_async(values: npt.NDArray[Any], stream: Stream) -> GPUArray:
        array = GPUArray(np.zeros_like(values))
        pointer = array.__cuda_array_interface__["data"][0]
        job.cuda.queue(stream.handle, lambda: ctypes.memmove(pointer, values.ctypes.data, values.nbytes))
        return array

    modules = {
        "pycuda": None, "pycuda.autoinit": None, "pycuda.autoprimaryctx": None, "pycuda.driver": {"Stream": Stream},
        "pycuda.gpuarray": {"to_gpu_async": to_gpu_async, "empty": lambda *like: GPUArray(np.zeros(*like))},
    }  # fmt: skip
    for name, names in modules.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**names or {}))  # type: ignore[arg-type]
    Image.fromarray(images[0, 0]).save(tmp_path / "a.png")
    arguments = [str(job.path), str(tmp_path / "a.png"), *(["--own-context"] if own else [])]
    monkeypatch.setattr(sys, "argv", ["example", *arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"on Simulated 0, pycuda.{'autoinit' if own else 'autoprimaryctx'}"
    names = [entry.name for entry in job.engine.manifest.classes]
    shares = np.bincount(job.truth(images).ravel(), minlength=len(names)) / images.size
    assert lines == [f"  {name} {share:.1%}" for name, share in zip(names, shares, strict=True)]
    assert job.count("peer copy") == 2 * own


# --- what goes wrong on a GPU


def test_a_driver_older_than_the_wheels_is_told_from_none(cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = cuda.cudaError_t.cudaErrorInsufficientDriver
    monkeypatch.setattr(cuda, "cudaGetDeviceCount", lambda: (refused, None))
    monkeypatch.setattr(cuda, "cudaRuntimeGetVersion", lambda: (cuda.ok, 13040), raising=False)
    for driver, says in (
        (12080, r"driver is made for CUDA 12.8, and the installed libraries for CUDA 13.4; update the driver, or .* "
                r"pip install tensorrt-cu12 'cuda-python<13'"),
        (0, "no NVIDIA GPU can be used here"),
    ):  # fmt: skip
        monkeypatch.setattr(cuda, "cudaDriverGetVersion", lambda driver=driver: (cuda.ok, driver), raising=False)
        with pytest.raises(NoGpu, match=says):
            find_gpu()


@needs_tensorrt
def test_an_illegal_access_is_told_at_every_call_and_closing_stays_quiet(bench: Start) -> None:
    job, images = bench(graphs=False), noise(1, 1, 64, 64)
    job.engine.infer(images)
    theirs = _gpuarray(job, images, job.cuda.context()).__cuda_array_interface__["data"][0]
    job.cuda.contexts.clear()
    job.cuda.cudaMemcpyAsync(theirs, theirs, 1, None, job.engine.stream)
    for _ in range(2):
        with pytest.raises(UserError, match=r"cudaErrorIllegalAddress .*; the GPU's state may be lost: restart"):
            job.engine.infer(images)
    job.engine.close()


@needs_tensorrt
def test_exhausted_memory_is_a_sentence_and_not_the_end(bench: Start) -> None:
    job, images = bench(), noise(1, 1, 64, 64)
    job.engine.infer(images)
    before, job.cuda.room = job.cuda.room, 1000
    with pytest.raises(UserError, match=r"out of memory while allocating .* on the GPU; close other programs"):
        job.engine.infer(noise(1, 1, 128, 128))
    job.cuda.room = before
    job.check_infer(images)
    job.check_infer(noise(1, 1, 128, 128))
