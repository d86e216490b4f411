"""CUDA without a framework: the GPU, streams, buffers, and arrays that others hold on the GPU.

Streams, memory and graphs go through ``cuda.bindings``, arrays of others through ``cuda.core``; both are imported
where used. ``cuda.core`` has the former too, but selects a GPU for good instead of giving a thread its context
back, frees page-locked memory in whatever context a garbage collection finds, keeps freed memory of the GPU
for itself, and makes a class and an event for each wait for a stream of the caller.

Everything lives in the device's primary context, the one PyTorch, CuPy and (through ``pycuda.autoprimaryctx``)
PyCUDA share, so their arrays can be used in place. What lies in a context of a program's own (``pycuda.autoinit``)
must not be read from this one: the driver tells, and such arrays are copied from context to context. Each call leaves
the thread's current context as it found it, whichever that is, or none.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import ContractError, MissingDependency, NoGpu, UserError, one_line, require

if TYPE_CHECKING:  # types made of the real modules by tests/engines/real_modules.py; Module is the module itself
    from cuda.bindings import driver, runtime
    from cuda.core.utils import StridedMemoryView

# Stream handles 1 and 2 are CUDA's legacy and per-thread default streams (CUDA array interface, version 3).
LEGACY_STREAM = 1

_DLPACK_CUDA = 2
_DLPACK_CUDA_MANAGED = 13


def cudart() -> runtime.Module:
    """The ``cuda.bindings.runtime`` module, or :class:`MissingDependency`."""
    module: Any = require("cuda.bindings.runtime", "tensorrt", "use an NVIDIA GPU")
    return module


def cuda_driver() -> driver.Module:
    """The ``cuda.bindings.driver`` module, or :class:`MissingDependency`."""
    module: Any = require("cuda.bindings.driver", "tensorrt", "use an NVIDIA GPU")
    return module


def check(result: tuple[Any, ...], doing: str) -> Any:
    """Unpack a cuda-python result tuple; raise :class:`UserError` saying what failed ``doing``."""
    if result[0]:  # cudaSuccess is 0
        raise _failure(result[0], doing)
    return result[1] if len(result) == 2 else result[1:] or None


def _failure(status: Any, doing: str) -> UserError:
    if status == cudart().cudaError_t.cudaErrorMemoryAllocation:
        return UserError(
            f"out of memory while {doing}; close other programs that use it, use smaller images or "
            "batches, or build the engine with smaller --shapes"
        )
    return UserError(f"CUDA reports {status.name} while {doing}; {_advice(status.name)}")


def _advice(name: str) -> str:
    if name in {"cudaErrorInsufficientDriver", "cudaErrorNoDevice"}:
        return "install or update the NVIDIA driver"
    if name in {"cudaErrorInvalidResourceHandle", "cudaErrorContextIsDestroyed"}:
        return "give a stream of the engine's GPU that still exists"
    return "the GPU's state may be lost: restart the program"


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU: CUDA index, name, compute capability like ``"8.9"``."""

    index: int
    name: str
    compute_capability: str


def gpu_count() -> int:
    """How many NVIDIA GPUs CUDA shows; none is no error."""
    status, count = cudart().cudaGetDeviceCount()
    return int(count) if status == cudart().cudaError_t.cudaSuccess else 0


def find_gpu(index: int = 0) -> Gpu:
    """The GPU with this CUDA index; raises :class:`NoGpu` when the driver shows none.

    Asks the CUDA driver only: safe where TensorRT itself would crash without a device.
    """
    runtime = cudart()
    status, count = runtime.cudaGetDeviceCount()
    if status == runtime.cudaError_t.cudaErrorInsufficientDriver:
        driver = check(runtime.cudaDriverGetVersion(), "reading the version of the NVIDIA driver")
        if driver:  # 0: there is none
            wheels = check(runtime.cudaRuntimeGetVersion(), "reading the version of CUDA")
            raise NoGpu(
                f"the NVIDIA driver is made for CUDA {_version(driver)}, and the installed libraries for CUDA "
                f"{_version(wheels)}; update the driver, or install libraries for the older one: "
                "pip install tensorrt-cu12 'cuda-python<13'"
            )
    if status != runtime.cudaError_t.cudaSuccess or not count:
        raise NoGpu(
            f"no NVIDIA GPU can be used here (CUDA says {status.name}); run this on a machine with an NVIDIA GPU "
            "and a current driver, or use the ONNX file with the CPU engine"
        )
    if not 0 <= index < count:
        raise NoGpu(f"GPU {index} does not exist, this machine has {count}; choose 0 to {count - 1}")
    properties = check(runtime.cudaGetDeviceProperties(index), f"reading the properties of GPU {index}")
    name = properties.name.decode(errors="replace") if isinstance(properties.name, bytes) else str(properties.name)
    return Gpu(index, name.rstrip("\0"), f"{properties.major}.{properties.minor}")


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def gpu_or_none(index: int = 0) -> Gpu | None:
    """:func:`find_gpu`, or None where there is no usable GPU or no ``cuda-python``."""
    try:
        return find_gpu(index)
    except (NoGpu, MissingDependency):
        return None


class current_context:  # a class because a generator would cost more at every frame
    """Make a CUDA context current for this thread inside a ``with``.

    What was current before is so again afterwards: it is pushed and popped (CUDA driver API, "Context
    management"). Selecting the previous *device* instead would give a program with a context of its own
    another one, and make one on a GPU that it does not use. One object serves all threads, nested too.
    """

    __slots__ = ("_context", "_pop", "_push")

    def __init__(self, context: Any) -> None:
        driver = cuda_driver()
        self._context = context
        self._push, self._pop = driver.cuCtxPushCurrent, driver.cuCtxPopCurrent

    def __enter__(self) -> None:
        check(self._push(self._context), "selecting the engine's GPU")

    def __exit__(self, *_: object) -> None:
        check(self._pop(), "going back to the GPU that was selected before")


def current_device(index: int) -> current_context:
    """The primary context of GPU ``index``, which lives as long as the process."""
    return current_context(_primary_context(cuda_driver(), index))


@lru_cache(maxsize=64)  # retained once for each GPU, and never released: TensorRT keeps parts of itself in it
def _primary_context(driver: driver.Module, index: int) -> Any:
    doing = f"selecting GPU {index}"
    check(driver.cuInit(0), doing)
    return check(driver.cuDevicePrimaryCtxRetain(check(driver.cuDeviceGet(index), doing)), doing)


def freed_with(owner: object, free: Callable[..., Any], *handles: Any) -> Any:
    """Call ``free`` with each handle, on the GPU that is current now, when ``owner`` goes or the result is called."""
    index = check(cudart().cudaGetDevice(), "reading the current GPU")
    finalizer = weakref.finalize(owner, _free, current_device(index), free, *handles)
    finalizer.atexit = False  # the driver cleans up at exit, when it may already be unloaded
    return finalizer


def _free(gpu: current_context, free: Callable[..., Any], *handles: Any) -> None:
    # The garbage collector may run this in any thread, with any context, or none, as the current one.
    with suppress(UserError), gpu:
        for handle in handles:
            free(handle)


def stream_handle(stream: Any) -> int:
    """The number of a caller's CUDA stream.

    Takes that number, or an object of PyTorch (``cuda_stream``), CuPy (``ptr``), PyCUDA or cuda.core
    (``handle``), cuda-python (``int()``), or with the method ``__cuda_stream__``
    (https://nvidia.github.io/cuda-python/cuda-core/latest/interoperability.html). 0 is the default
    stream. Raises :class:`ContractError` for anything else.
    """
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        stream = (protocol() if callable(protocol) else protocol)[1]  # version, handle
    for name in ("cuda_stream", "ptr", "handle"):
        stream = getattr(stream, name, stream)
    if isinstance(stream, (bool, float)) or not hasattr(stream, "__int__"):
        raise ContractError(
            f"a {type(stream).__name__} is no CUDA stream; give its number, or a stream of PyTorch, CuPy, PyCUDA or "
            "cuda-python"
        )
    return int(stream) or LEGACY_STREAM


class Stream:
    """A CUDA stream that does not wait for the default stream. Create with the device current.

    ``handle`` is its number, ``object`` what cuda-python takes without converting it at each call. Streams of other
    contexts are waited for by the host, since events work within one context only.
    """

    def __init__(self) -> None:
        runtime, self._driver = cudart(), cuda_driver()
        self._context = check(self._driver.cuCtxGetCurrent(), "reading the current CUDA context")
        self.object = check(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking), "creating a CUDA stream")
        self._event = check(runtime.cudaEventCreateWithFlags(runtime.cudaEventDisableTiming), "creating a CUDA event")
        self.handle = int(self.object)
        self._runtime = runtime
        self._any_direction = runtime.cudaMemcpyKind.cudaMemcpyDefault
        self._frees = [
            freed_with(self, runtime.cudaEventDestroy, self._event),
            freed_with(self, runtime.cudaStreamDestroy, self.object),
        ]

    def wait_for(self, other: int) -> None:
        """Work queued here from now on starts after the work queued so far on stream ``other``."""
        context = self._foreign(other)
        if context is not None:
            with current_context(context):
                check(self._driver.cuStreamSynchronize(other), "waiting for another CUDA stream")
            return
        check(self._runtime.cudaEventRecord(self._event, other), "waiting for another CUDA stream")
        check(self._runtime.cudaStreamWaitEvent(self.object, self._event, 0), "waiting for another CUDA stream")

    def precede(self, other: int) -> None:
        """Work queued on stream ``other`` from now on starts after the work queued so far here."""
        if self._foreign(other) is not None:
            self.synchronize()
            return
        check(self._runtime.cudaEventRecord(self._event, self.object), "making another CUDA stream wait")
        check(self._runtime.cudaStreamWaitEvent(other, self._event, 0), "making another CUDA stream wait")

    def _foreign(self, other: int) -> Any:
        """The context of stream ``other`` where it is not ours; default streams are those of ours."""
        context = check(self._driver.cuStreamGetCtx(other), "asking for the context of a CUDA stream")
        return None if int(context) == int(self._context) else context

    def synchronize(self) -> None:
        """Block until all work queued on this stream has ended."""
        check(self._runtime.cudaStreamSynchronize(self.object), "running the engine on the GPU")

    def timed(self, queue: Callable[[], None], runs: int) -> list[float]:
        """The GPU's seconds of each of ``runs`` pieces of work that ``queue`` puts on this stream.

        Between CUDA events before and after each; every piece is queued while the one before runs, so a host that
        queues fast enough leaves no gap.
        """
        runtime = self._runtime
        events: list[Any] = []
        try:
            make = runtime.cudaEventCreateWithFlags
            events.extend(check(make(runtime.cudaEventDefault), "creating a CUDA event") for _ in range(2 * runs))
            pairs = list(zip(events[::2], events[1::2], strict=True))
            for place, (start, end) in enumerate(pairs):
                check(runtime.cudaEventRecord(start, self.object), "timing work on the GPU")
                queue()
                check(runtime.cudaEventRecord(end, self.object), "timing work on the GPU")
                if place:
                    check(runtime.cudaEventSynchronize(pairs[place - 1][1]), "running the engine on the GPU")
            self.synchronize()
            return [check(runtime.cudaEventElapsedTime(*pair), "timing work on the GPU") / 1000 for pair in pairs]
        finally:
            for event in events:
                runtime.cudaEventDestroy(event)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Queue a copy of ``nbytes`` between any two addresses (CUDA finds the direction)."""
        check(
            self._runtime.cudaMemcpyAsync(target, source, nbytes, self._any_direction, self.object),
            "copying to or from the GPU",
        )

    def read(self, array: DeviceArray, target: int) -> None:
        """Queue a copy of an array, of whichever context, to an address of this one.

        Of another context all work that is queued there is waited for: whatever stream makes the array has made it.
        """
        if array.context is None:
            self.copy(target, array.pointer, array.nbytes)
            return
        with current_context(array.context):
            check(self._driver.cuCtxSynchronize(), "waiting for the CUDA context of the array")
        self._between(target, self._context, array.pointer, array.context, array.nbytes)

    def write(self, array: DeviceArray, source: int) -> None:
        """Queue a copy from an address of this context to an array; into another context it is complete on return."""
        if array.context is None:
            self.copy(array.pointer, source, array.nbytes)
            return
        self._between(array.pointer, array.context, source, self._context, array.nbytes)
        self.synchronize()

    def _between(self, target: int, into: Any, source: int, out_of: Any, nbytes: int) -> None:
        copied = self._driver.cuMemcpyPeerAsync(target, into, source, out_of, nbytes, self.object)
        check(copied, "copying between two CUDA contexts; make the primary one yours (pycuda.autoprimaryctx)")

    def close(self) -> None:
        """Free the stream; what is queued on it still runs."""
        for free in self._frees:
            free()


class DeviceBuffer:
    """Memory on the current GPU. Freed by :meth:`close` or with the object."""

    def __init__(self, nbytes: int) -> None:
        runtime = cudart()
        self.nbytes = max(nbytes, 1)
        self.pointer = int(check(runtime.cudaMalloc(self.nbytes), f"allocating {self.nbytes} bytes on the GPU"))
        self.close = freed_with(self, runtime.cudaFree, self.pointer)


class PinnedBuffer:
    """Page-locked host memory: copies to and from the GPU at full speed, without an extra staging copy."""

    def __init__(self, nbytes: int) -> None:
        runtime = cudart()
        self.nbytes = max(nbytes, 1)
        self.pointer = int(
            check(runtime.cudaMallocHost(self.nbytes), f"allocating {self.nbytes} bytes of page-locked memory")
        )
        self._bytes = (ctypes.c_uint8 * self.nbytes).from_address(self.pointer)
        self.close = freed_with(self, runtime.cudaFreeHost, self.pointer)

    def view(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """The start of this memory as an array; valid until :meth:`close`."""
        dtype = np.dtype(dtype)
        count = int(np.prod(shape))
        if count * dtype.itemsize > self.nbytes:
            raise ValueError(f"{shape} of {dtype} does not fit {self.nbytes} bytes")
        return np.frombuffer(memoryview(self._bytes), dtype=dtype, count=count).reshape(shape)


@dataclass(frozen=True)
class DeviceArray:
    """A C-contiguous array on the GPU.

    ``stream``: CUDA stream that may still be writing it, None when it is complete. ``owner`` keeps the
    memory alive. ``context``: the CUDA context that holds it, None for the GPU's primary one and for memory that every
    context may use; from another it can only be copied (:meth:`Stream.read`, :meth:`Stream.write`). Has
    ``__cuda_array_interface__`` (version 3), so ``torch.as_tensor``, ``cupy.asarray`` and Numba take it without a copy.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: Any
    stream: int | None = None
    context: Any = None

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if isinstance(self.owner, DeviceBuffer) and not self.owner.close.alive:
            raise ContractError("this GPU array is gone: its engine was closed or given a larger input; copy it before")
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "strides": None,
            "stream": self.stream,
        }


def on_device(images: Any) -> bool:
    """Whether ``images`` is an array on a CUDA GPU (CUDA array interface or DLPack).

    Raises :class:`ContractError` for one that cannot tell.
    """
    if isinstance(images, np.ndarray):
        return False
    try:
        if hasattr(images, "__dlpack_device__"):
            return int(images.__dlpack_device__()[0]) in (_DLPACK_CUDA, _DLPACK_CUDA_MANAGED)
        return _interface(images) is not None
    except ContractError:
        raise
    except Exception as exc:  # another library's code, which raises what it likes
        raise ContractError(f"the {type(images).__name__} does not say where its memory is ({exc!r})") from exc


def view_device_array(images: Any, stream: Stream, device: int, *, writable: bool = False) -> DeviceArray:
    """An array on the GPU, in its place, ordered after the work that is still producing it.

    Read by ``cuda.core``. DLPack is preferred, because it says exactly on which stream the array is produced (the
    producer makes ``stream`` wait). With the CUDA array interface ``stream`` waits for the stream named there;
    one that names none (``None``) is taken as complete, as version 3 defines. Version 2 (PyTorch) cannot say and PyCUDA
    names none whatever it has queued: ``stream`` then waits for the legacy default stream. ``writable``: also refuse
    a read-only array. An array of another context than ours has that as its ``context``.
    Raises :class:`ContractError` for another device, a strided array, or a masked one.
    """
    reader = strided_memory_view()
    try:
        if hasattr(images, "__dlpack__") and hasattr(images, "__dlpack_device__"):
            kind, index = (int(part) for part in images.__dlpack_device__())
            if kind not in (_DLPACK_CUDA, _DLPACK_CUDA_MANAGED) or index != device:
                raise ContractError(
                    f"the array is on DLPack device {kind}:{index}, the engine on GPU {device}; move it there"
                )
            view = reader.from_dlpack(images, stream.handle)
        else:
            view = reader.from_cuda_array_interface(_Version3(images), stream.handle)
        array = as_device_array(view)
        array = replace(array, context=foreign_context(array.pointer))
    except UserError:
        raise
    except Exception as exc:  # the exporter's, and cuda.core's own, which has no public name
        raise ContractError(f"the array on the GPU cannot be used in place ({one_line(exc)})") from exc
    if view.device_id != device:
        raise ContractError(f"the array is on GPU {view.device_id}, the engine on GPU {device}; move it there")
    if writable and view.readonly:
        raise ContractError("the output array on the GPU is read-only; give another")
    return array


def strided_memory_view() -> type[StridedMemoryView]:
    """The class ``cuda.core.utils.StridedMemoryView``, or :class:`MissingDependency`."""
    return require("cuda.core.utils", "tensorrt", "use arrays that are on a GPU").StridedMemoryView


class _Version3:
    """An array's CUDA array interface as version 3, the only one that ``cuda.core`` reads."""

    def __init__(self, images: Any) -> None:
        interface = _interface(images)
        if interface is None:
            raise ContractError(
                f"a {type(images).__name__} is no array on a GPU; give a numpy array, or one with "
                "__cuda_array_interface__ or __dlpack__ (PyTorch, CuPy, PyCUDA, Numba)"
            )
        version = interface.get("version", 0)
        if version < 2:
            raise ContractError(f"the input's __cuda_array_interface__ has version {version}; 2 or newer is needed")
        maker = type(getattr(images, "owner", images)).__module__
        silent = version < 3 or (maker.startswith("pycuda.") and interface.get("stream") is None)
        stream = LEGACY_STREAM if silent else interface.get("stream")
        if stream == 0:
            raise ContractError("the input's __cuda_array_interface__ names stream 0, which the interface forbids")
        if foreign_context(int(interface["data"][0])) is not None:
            stream = None  # an event of ours cannot be recorded there; see Stream.read
        self.__cuda_array_interface__ = {**interface, "version": 3, "stream": stream}
        self.images = images  # the owner of the memory


def foreign_context(pointer: int) -> Any:
    """The CUDA context that holds this memory, None where the current one may use it.

    Memory of pools belongs to no context, and neither does an address that is none; reading it will tell.
    """
    driver = cuda_driver()
    attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_CONTEXT
    status, context = driver.cuPointerGetAttribute(attribute, pointer)
    if status or not int(context):
        return None
    own = check(driver.cuCtxGetCurrent(), "reading the current CUDA context")
    return None if int(context) == int(own) else context


def _interface(images: Any) -> Mapping[str, Any] | None:
    # PyTorch raises instead of lacking the attribute: for CPU tensors AttributeError, which getattr
    # handles, and RuntimeError for tensors that require gradients.
    try:
        interface = getattr(images, "__cuda_array_interface__", None)
    except RuntimeError as exc:
        raise ContractError(f"the input array cannot be used in place ({exc}); detach it first") from exc
    return interface if isinstance(interface, Mapping) else None


def as_device_array(view: StridedMemoryView) -> DeviceArray:
    """What a ``StridedMemoryView`` holds, which it keeps alive; :class:`ContractError` where it is not in C order."""
    shape, strides = tuple(view.shape), view.strides  # counted in elements
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides or ()), strict=strides is not None):
        if size > 1 and stride != expected and 0 not in shape:
            raise ContractError("the array on the GPU is not C-contiguous; make a contiguous copy first")
        expected *= size
    return DeviceArray(int(view.ptr), shape, np.dtype(view.dtype), view)


class CaptureError(Exception):
    """The work cannot be recorded; the message says why. The stream goes on working."""


class CudaGraph:
    """What ``record`` queues on ``stream``, recorded without running it. Create with the device current.

    A launch costs the processor one call instead of one for each kernel and copy (CUDA programming guide, "CUDA
    Graphs"). Addresses and sizes are recorded with the work: they must stay as they were.

    Raises :class:`CaptureError`. Freed by :meth:`close` or with the object.
    """

    def __init__(self, stream: Stream, record: Callable[[], None]) -> None:
        runtime = cudart()
        # Other threads may go on allocating memory meanwhile ("thread local"); this one must not.
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        try:
            _captured(runtime.cudaStreamBeginCapture(stream.object, mode), "starting to record")
            try:
                record()
            finally:
                recorded = runtime.cudaStreamEndCapture(stream.object)  # also ends what has failed
            graph = _captured(recorded, "recording")
            try:
                # Of the ways to instantiate, the one with the same arguments in CUDA 11, 12 and 13.
                self._graph = _captured(runtime.cudaGraphInstantiateWithFlags(graph, 0), "preparing the graph")
            finally:
                runtime.cudaGraphDestroy(graph)
        except (CaptureError, UserError) as exc:
            runtime.cudaGetLastError()  # forget it, so that no other library takes it for its own
            raise CaptureError(str(exc)) from exc
        self._launch, self._stream = runtime.cudaGraphLaunch, stream.object
        self.close = freed_with(self, runtime.cudaGraphExecDestroy, self._graph)

    def launch(self) -> None:
        """Queue the work on its stream."""
        check(self._launch(self._graph, self._stream), "launching a CUDA graph")


def _captured(result: tuple[Any, ...], doing: str) -> Any:
    status, *values = result
    if status:
        raise CaptureError(f"CUDA reports {status.name} while {doing}")
    return values[0] if values else None
