"""Enough of the CUDA runtime to follow our control flow without a GPU.

Device memory is host memory at checked addresses. Streams are lazy: queued work runs when somebody
waits for it, so a result that is read too early, or a buffer that is refilled too early, shows; work
behind an event waits for what was queued before the event. Memory and streams are made and freed with a
context current, as each thread has its own, and memory is reached from the context that holds it only: what
is read or written from another is an illegal access, after which every call fails, as on a GPU. What a real
GPU adds (timing, real streams, real kernels) is tested in tests/gpu.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda.bindings import driver as real_driver

ALIGNMENT = 256
Work = Callable[[], None]
FOREIGN = 5000  # from here on, contexts that programs have made for themselves; below, primary ones by GPU


class IllegalAccess(Exception):
    """Work of a stream touched memory that its context does not hold."""


class Marker:
    """An event's place in the work of a stream, and when it was passed."""

    passed = False
    seconds = 0.0

    def __call__(self) -> None:
        self.passed, self.seconds = True, time.perf_counter()


def locked(kind: type[Any]) -> type[Any]:
    """``kind`` with methods that take turns, as CUDA's functions may be called from any thread."""

    def turn(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *arguments: Any) -> Any:
            with self.lock:
                failed = method.__name__.startswith("cu") and not method.__name__.startswith("cuCtx") and self.sticky
                return (self.sticky, None) if failed else method(self, *arguments)

        return call

    for name, method in list(vars(kind).items()):
        if name.startswith(("cu", "queue", "finish")) and callable(method):
            setattr(kind, name, turn(method))
    return kind


@locked
class SimulatedCuda:
    """Stands in for ``cuda.bindings.runtime`` and ``.driver``; ``log`` lists stream operations in order.

    ``contexts``: the calling thread's, the current one last; None is a context of somebody else. ``room``: bytes that
    can be allocated. ``sticky``: the error that every call gives after an illegal access.
    """

    cudaStreamNonBlocking = 1
    cudaEventDefault, cudaEventDisableTiming = 0, 2

    def __init__(self, real: Any, name: str = "Simulated", capability: tuple[int, int] = (8, 9)) -> None:
        self.cudaError_t, self.cudaMemcpyKind = real.cudaError_t, real.cudaMemcpyKind
        self.cudaStreamCaptureMode = real.cudaStreamCaptureMode
        self.ok = real.cudaError_t.cudaSuccess
        self.name, self.capability = name, capability
        self.CUpointer_attribute = real_driver.CUpointer_attribute
        self.memory: dict[int, tuple[Any, int, int]] = {}  # by address: the bytes, how many, and their context
        self.room, self.sticky = 1 << 40, None
        self.streams: dict[int, int] = {}  # the context of each
        self.log: list[tuple[Any, ...]] = []
        self.lock = threading.RLock()
        self.count, self.allocations = 2, 0
        self._thread = threading.local()
        self.primary: set[int] = set()  # GPUs that have a primary context
        self.events: dict[int, Marker] = {}
        self.timing: set[int] = set()  # events that may be timed
        self.queues: dict[int, list[Work]] = defaultdict(list)
        self.recording: dict[int, list[Work]] = {}
        self.recorders: dict[int, int] = {}  # stream to the thread that records it, whose calls alone are limited
        self.broken: set[int] = set()  # streams whose recording has failed
        self.graphs: dict[int, list[Work]] = {}
        self.templates: dict[int, list[Work]] = {}
        self.most_in_flight = 0
        self._handles = 1000

    def _handle(self) -> int:
        self._handles += 1
        return self._handles

    def queue(self, stream: int, work: Work) -> None:
        """Add work to a stream, or to what is being recorded from it."""
        if stream in self.recording:
            self.recording[stream].append(work)
            return
        self.queues[stream].append(work)
        self.most_in_flight = max(self.most_in_flight, sum(bool(queue) for queue in self.queues.values()))

    def finish(self, stream: int) -> None:
        """Run what is queued."""
        while self.queues[stream]:
            try:
                self.queues[stream].pop(0)()
            except IllegalAccess:
                self.sticky = self.cudaError_t.cudaErrorIllegalAddress
                self.queues.clear()

    def finish_all(self) -> None:
        """Run what is queued on any stream."""
        for stream in list(self.queues):
            self.finish(stream)

    def cudaGetDeviceCount(self) -> tuple[Any, int]:
        return self.ok, self.count

    def cudaGetDeviceProperties(self, index: int) -> tuple[Any, Any]:
        major, minor = self.capability
        return self.ok, SimpleNamespace(name=f"{self.name} {index}".encode(), major=major, minor=minor)

    @property
    def contexts(self) -> list[int | None]:
        if not hasattr(self._thread, "contexts"):
            self._thread.contexts = []
        return self._thread.contexts  # type: ignore[no-any-return]

    def _current(self) -> int:
        assert self.contexts, "no context is current: the real one would make one on GPU 0"
        assert self.contexts[-1] is not None, "the current context is somebody else's"
        return self.contexts[-1]

    def cuInit(self, flags: int) -> tuple[Any]:
        return (self.ok,)

    def cuDeviceGet(self, index: int) -> tuple[Any, int]:
        return self.ok, index

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, int]:
        self.primary.add(device)
        return self.ok, device

    def cuCtxPushCurrent(self, context: int) -> tuple[Any]:
        self.contexts.append(context)
        return (self.ok,)

    def cuCtxPopCurrent(self) -> tuple[Any, Any]:
        return self.ok, self.contexts.pop()

    def cudaGetDevice(self) -> tuple[Any, int]:
        return self.ok, self._current()

    def cudaGetLastError(self) -> tuple[Any]:
        return (self.ok,)

    def cudaMalloc(self, nbytes: int) -> tuple[Any, int]:
        context = self._current()
        if nbytes > self.room:
            return self.cudaError_t.cudaErrorMemoryAllocation, None
        return self.ok, self._allocated(nbytes, context)

    def _allocated(self, nbytes: int, context: int = 0) -> int:
        recorders = self.recorders.values()
        assert threading.get_ident() not in recorders, "allocating is not allowed while a graph is recorded"
        raw = ctypes.create_string_buffer(nbytes + ALIGNMENT)
        pointer = -(-ctypes.addressof(raw) // ALIGNMENT) * ALIGNMENT
        self.memory[pointer] = (raw, nbytes, context)
        self.allocations += 1
        self.room -= nbytes
        return pointer

    cudaMallocHost = cudaMalloc

    def cudaFree(self, pointer: int) -> tuple[Any]:
        self._current()
        self.finish_all()  # the real one waits as well
        self.room += self.memory.pop(pointer)[1]  # a double or foreign free is a KeyError
        return (self.ok,)

    cudaFreeHost = cudaFree

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, int]:
        handle = self._handle()
        self.streams[handle] = self._current()
        return self.ok, handle

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[Any, int]:
        result = self.cudaStreamCreateWithFlags(flags)
        if flags == self.cudaEventDefault:
            self.timing.add(result[1])
        return result

    def cudaStreamDestroy(self, handle: int) -> tuple[Any]:
        self._current()
        self.log.append(("destroy", handle))
        return (self.ok,)

    def cudaEventDestroy(self, handle: int) -> tuple[Any]:
        self.timing.discard(handle)
        return self.cudaStreamDestroy(handle)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any]:
        if stream in self.recording:
            self.broken.add(stream)
            return (self.cudaError_t.cudaErrorStreamCaptureUnsupported,)
        self.log.append(("synchronize", stream))
        self.finish(stream)
        return (self.sticky or self.ok,)

    def cudaEventRecord(self, event: int, stream: int) -> tuple[Any]:
        self.log.append(("record", stream))
        assert self.streams.get(stream, 0) < FOREIGN, "an event is recorded on a stream of its own context only"
        self.events[event] = marker = Marker()
        self.queue(stream, marker)
        return (self.ok,)

    def cudaEventSynchronize(self, event: int) -> tuple[Any]:
        marker = self.events[event]
        source = next((queue for queue in self.queues.values() if marker in queue), [])
        while not marker.passed:
            source.pop(0)()
        self.log.append(("event", len(source)))  # what is still queued behind it
        return (self.ok,)

    def cudaEventElapsedTime(self, start: int, end: int) -> tuple[Any, float]:
        if not {start, end} <= self.timing:
            return self.cudaError_t.cudaErrorInvalidResourceHandle, 0.0
        first, last = self.events[start], self.events[end]
        assert first.passed
        assert last.passed, "the real one says cudaErrorNotReady"
        return self.ok, 1000 * (last.seconds - first.seconds)

    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[Any]:
        self.log.append(("wait", stream))
        marker = self.events[event]  # as it was recorded last: recording again does not change who waits

        def wait() -> None:
            source = next((queue for queue in self.queues.values() if marker in queue), None)
            while source and not marker.passed:
                source.pop(0)()

        self.queue(stream, wait)
        return (self.ok,)

    def cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: Any, stream: int) -> tuple[Any]:
        def copy() -> None:
            self.require(target, nbytes)
            if self._found(source):
                self.require(source, nbytes)
            ctypes.memmove(target, source, nbytes)

        self.log.append(("copy", nbytes))
        self.queue(stream, copy)
        return (self.ok,)

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> tuple[Any]:
        assert not self.queues[stream], "work from before would not be in the graph"
        assert stream not in self.recording
        assert mode == self.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.recording[stream], self.recorders[stream] = [], threading.get_ident()
        return (self.ok,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        work = self.recording.pop(stream)
        assert self.recorders.pop(stream) == threading.get_ident(), "a graph is recorded by one thread"
        if stream in self.broken:
            self.broken.remove(stream)
            return self.cudaError_t.cudaErrorStreamCaptureInvalidated, None
        handle = self._handle()
        self.templates[handle] = work
        return self.ok, handle

    def cudaGraphInstantiateWithFlags(self, graph: int, flags: int) -> tuple[Any, int]:
        handle = self._handle()
        self.graphs[handle] = self.templates[graph]
        return self.ok, handle

    def cudaGraphDestroy(self, graph: int) -> tuple[Any]:
        del self.templates[graph]
        return (self.ok,)

    def cudaGraphExecDestroy(self, graph: int) -> tuple[Any]:
        del self.graphs[graph]
        return (self.ok,)

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Any]:
        self.log.append(("launch", stream))
        for work in self.graphs[graph]:
            self.queue(stream, work)
        return (self.ok,)

    def cuCtxGetCurrent(self) -> tuple[Any, int]:
        return self.ok, self._current()

    def cuCtxSynchronize(self) -> tuple[Any]:
        for stream, context in list(self.streams.items()):
            if context == self.contexts[-1]:
                self.finish(stream)
        return (self.ok,)

    def cuStreamGetCtx(self, stream: int) -> tuple[Any, int]:
        return self.ok, self.streams.get(stream, self._current())  # of a default stream the current one

    def cuStreamSynchronize(self, stream: int) -> tuple[Any]:
        assert self.streams[stream] == self.contexts[-1]
        return self.cudaStreamSynchronize(stream)  # type: ignore[no-any-return]

    def cuPointerGetAttribute(self, attribute: Any, pointer: int) -> tuple[Any, int | None]:
        assert attribute is self.CUpointer_attribute.CU_POINTER_ATTRIBUTE_CONTEXT
        found = self._found(pointer)
        return (self.cudaError_t.cudaErrorInvalidValue, None) if found is None else (self.ok, found[2])

    def cuMemcpyPeerAsync(
        self, target: int, into: int, source: int, out_of: int, nbytes: int, stream: int
    ) -> tuple[Any]:
        def copy() -> None:
            self.require(target, nbytes, into)
            self.require(source, nbytes, out_of)
            ctypes.memmove(target, source, nbytes)

        self.log.append(("peer copy", nbytes))
        self.queue(stream, copy)
        return (self.ok,)

    def _found(self, pointer: int) -> tuple[Any, int, int] | None:
        """The allocation that holds this address."""
        inside = (entry for start, entry in self.memory.items() if start <= pointer < start + entry[1])
        return next(inside, None)

    def require(self, pointer: int, nbytes: int, context: int | None = None) -> None:
        """The whole range must lie in memory that was allocated here and not freed, of this or a primary context."""
        assert any(start <= pointer and pointer + nbytes <= start + size for start, (_, size, _) in self.memory.items())
        found = self._found(pointer)
        assert found is not None
        if found[2] >= FOREIGN if context is None else found[2] != context:
            raise IllegalAccess

    def context(self) -> int:
        """A context of a program's own, current for this thread."""
        self.contexts.append(FOREIGN + self._handle())
        return self.contexts[-1]  # type: ignore[return-value]

    def stream(self) -> int:
        """A stream of a program, in the context that is current."""
        handle = self._handle()
        self.streams[handle] = self._current()
        return handle

    def array(self, values: npt.NDArray[Any], offset: int = 0, context: int = 0) -> ForeignArray:
        """An array "on the GPU", as another library would hold it; ``offset`` bytes into its allocation."""
        pointer = self._allocated(values.nbytes + offset, context)
        ctypes.memmove(pointer + offset, values.ctypes.data, values.nbytes)
        return ForeignArray(pointer + offset, values)


class ForeignArray:
    """Holds only what the CUDA array interface asks for."""

    def __init__(self, pointer: int, values: npt.NDArray[Any], **changes: Any) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": values.shape,
            "typestr": values.dtype.str,
            "data": (pointer, False),
            "strides": None,
            "stream": None,
            **changes,
        }


def array_reader(cuda: SimulatedCuda) -> Any:
    """A stand-in for ``cuda.core``'s class: DLPack is read by the real one, the interface that asks the driver here."""
    from cuda.core.utils import StridedMemoryView

    class SimulatedStridedMemoryView:
        from_dlpack = StridedMemoryView.from_dlpack

        @classmethod
        def from_cuda_array_interface(cls, obj: Any, stream_ptr: int | None = None) -> Any:
            interface = obj.__cuda_array_interface__
            assert interface["version"] == 3
            if interface.get("mask") is not None:
                raise BufferError("mask is not supported")
            pointer, readonly = interface["data"]
            dtype, strides, producer = np.dtype(interface["typestr"]), interface["strides"], interface["stream"]
            if producer not in (None, stream_ptr):
                assert stream_ptr is not None
                event = cuda.cudaEventCreateWithFlags(cuda.cudaEventDisableTiming)[1]
                cuda.cudaEventRecord(event, producer)
                cuda.cudaStreamWaitEvent(stream_ptr, event, 0)
            return SimpleNamespace(
                ptr=pointer, readonly=readonly, device_id=0, shape=tuple(map(int, interface["shape"])), dtype=dtype,
                strides=None if strides is None else tuple(step // dtype.itemsize for step in strides),
                exporting_obj=obj,
            )  # fmt: skip

    return SimulatedStridedMemoryView


def read(array: Any) -> npt.NDArray[Any]:
    """Copy an array with the CUDA array interface out of simulated device memory."""
    interface = array.__cuda_array_interface__
    dtype, shape = np.dtype(interface["typestr"]), interface["shape"]
    return np.frombuffer(
        ctypes.string_at(interface["data"][0], int(np.prod(shape)) * dtype.itemsize), dtype
    ).reshape(shape)  # fmt: skip
