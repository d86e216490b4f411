"""Execution contexts of a TensorRT engine, their buffers and CUDA graphs, and the streams they run on.

An :class:`ExecutionContext` is one context with its buffers. An :class:`InferenceStream` is one stream on which several
executions take turns; they share scratch memory. Two streams run at the same time.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import ContractError, UserError, one_line
from hpddrnet_trt.core.manifest import Manifest
from hpddrnet_trt.engines.base import Prediction, checked_prediction
from hpddrnet_trt.engines.cuda import CaptureError, CudaGraph, DeviceArray, DeviceBuffer, PinnedBuffer, Stream
from hpddrnet_trt.engines.profiles import Profile, choose_profile
from hpddrnet_trt.engines.tensorrt_library import INPUT, EngineContexts, TensorRT

if TYPE_CHECKING:
    import tensorrt as trt

logger = logging.getLogger(__name__)

# A graph is for one context in the state in which it was recorded (TensorRT developer guide, "CUDA
# graphs": one context per graph), so every shape with a graph has a context of its own.
GRAPHS = 4  # shapes that have one, per stream
WARM_UP = 2  # runs of a shape before it gets a graph
COMPILE = 6  # ... where it has kernels compiled for it first (TensorRT-RTX)
REPLACE = 16  # ... before it takes the place of another's: new contexts cost milliseconds
SHAPES_COUNTED = 256
CAPTURES = 3  # failed recordings after which a stream runs without graphs: some causes pass, as a lack of memory
BORROWED = 16  # arrays of others held at a time for work that nobody has waited for
# TensorRT wants tensor addresses aligned to this many bytes (its API reference, setTensorAddress);
# cudaMalloc gives that, a slice of somebody's array may not.
ALIGNMENT = 256


@dataclass(frozen=True)
class Network:
    """What all contexts of a loaded engine share. ``outputs``: types by name; ``dtype``: of the input."""

    manifest: Manifest
    api: TensorRT
    engine: trt.ICudaEngine
    contexts: EngineContexts
    profiles: Sequence[Profile]
    dtype: np.dtype[Any]
    outputs: dict[str, np.dtype[Any]]

    @property
    def compiles(self) -> bool:
        """Whether kernels for a shape are compiled when it comes."""
        return self.api.is_rtx and any(profile.minimum != profile.maximum for profile in self.profiles)

    def refusal(self, what: str, shape: Sequence[int], otherwise: str = "no reason given") -> str:
        """The library's own reason in a sentence about an input ``shape``, or ``otherwise``."""
        return f"{self.api.label} {what} an input of {'x'.join(map(str, shape))}: {self.api.log.explain(otherwise)}"


class ExecutionContext:
    """One context with device and page-locked buffers, for one input shape at a time.

    Runs on ``stream`` in memory from ``scratch``, a function of its size, which other executions on that stream may
    share. ``specialized``: see :meth:`~hpddrnet_trt.engines.tensorrt_library.EngineContexts.create`.
    """

    def __init__(
        self, network: Network, stream: Stream, scratch: Callable[[int], DeviceBuffer], *, specialized: bool = False
    ) -> None:
        """Raises :class:`UserError` when the GPU has too little memory."""
        self._network, self._stream, self._take_scratch = network, stream, scratch
        network.api.log.clear()
        context = network.contexts.create(specialized=specialized)
        if context is None:
            raise UserError(
                f"the GPU has too little free memory for another execution of this engine "
                f"({network.api.log.explain('no reason given')}); close other programs that use it, or build the "
                "engine with smaller --shapes"
            )
        self.context: trt.IExecutionContext = context
        self._scratch: DeviceBuffer | None = None
        self.shape: tuple[int, ...] | None = None
        self.views: dict[str, DeviceArray] = {}
        self.graph: CudaGraph | None = None
        self._device: dict[str, DeviceBuffer] = {}
        self._pinned: dict[str, PinnedBuffer] = {}
        self._source = 0  # address that the context reads from
        self._targets: dict[str, int] = {}  # addresses that it writes to
        self._frame: npt.NDArray[Any] | None = None
        self._downloads: list[tuple[int, int, int]] = []
        self.results: dict[str, npt.NDArray[Any]] = {}

    def set_shape(self, shape: tuple[int, ...]) -> None:
        """Choose the profile and give outputs of this input shape their buffers; the stream must be idle.

        Raises :class:`ContractError` or :class:`UserError`.
        """
        if shape == self.shape:
            return
        network, context = self._network, self.context
        index = choose_profile(network.profiles, shape)
        self.shape, self._frame = None, None
        network.api.log.clear()
        reason = "no reason given"
        try:
            accepted = context.active_optimization_profile == index or context.set_optimization_profile_async(
                index, self._stream.handle
            )
            self._stream.synchronize()
            accepted = accepted and context.set_input_shape(INPUT, shape) and not context.infer_shapes()
        except RuntimeError as exc:  # what present bindings raise where older ones return False
            accepted, reason = False, one_line(exc)
        if not accepted:
            raise ContractError(f"{network.refusal('refuses', shape, reason)}; build the engine with other --shapes")
        # As trtexec sizes it (--allocationStrategy=profile): what this profile needs, not the largest of all.
        nbytes = int(network.engine.get_device_memory_size_for_profile_v2(index))
        if self._scratch is None or self._scratch.nbytes < nbytes:
            self._scratch = None
            self._scratch = self._take_scratch(nbytes)
            context.set_device_memory(self._scratch.pointer, self._scratch.nbytes)
        self.views = {name: self._bind_output(name, dtype) for name, dtype in network.outputs.items()}
        self.shape = shape

    def _bind_output(self, name: str, dtype: np.dtype[Any]) -> DeviceArray:
        shape = tuple(self.context.get_tensor_shape(name))
        if min(shape, default=1) < 1:
            raise UserError(self._network.refusal(f"gives no size of the output {name} of", shape))
        buffer = _grown(self._device, DeviceBuffer, name, prod(shape) * dtype.itemsize)
        if not self.context.set_tensor_address(name, buffer.pointer):
            raise UserError(self._network.refusal(f"refuses the output {name} of", shape))
        self._targets[name] = buffer.pointer
        return DeviceArray(buffer.pointer, shape, dtype, buffer, self._stream.handle)

    def _host_side(self) -> None:
        """Page-locked memory for the frame and the results of the present shape."""
        assert self.shape is not None
        dtype = self._network.dtype
        nbytes = int(np.prod(self.shape)) * dtype.itemsize
        frame = _grown(self._pinned, PinnedBuffer, INPUT, nbytes)
        self._upload = (_grown(self._device, DeviceBuffer, INPUT, nbytes).pointer, frame.pointer, nbytes)
        self._downloads, self.results = [], {}
        for name, view in self.views.items():
            pinned = _grown(self._pinned, PinnedBuffer, name, view.nbytes)
            self._downloads.append((pinned.pointer, view.pointer, view.nbytes))
            self.results[name] = pinned.view(view.shape, view.dtype)
        self._frame = frame.view(self.shape, dtype)

    def load(self, images: npt.NDArray[Any]) -> None:
        """Copy a batch of the present shape into page-locked memory, which no earlier work may still read."""
        if self._frame is None:
            self._host_side()
        np.copyto(self._frame, images)  # type: ignore[arg-type]  # made by _host_side

    def take(self, view: DeviceArray) -> None:
        """Queue a copy of a batch on the GPU to where :meth:`upload` would bring it."""
        if self._frame is None:
            self._host_side()
        self._stream.read(view, self._upload[0])

    def upload(self) -> None:
        """Queue the copy of what :meth:`load` took to the GPU."""
        self._stream.copy(*self._upload)

    def enqueue(self, source: int | None = None, targets: Mapping[str, int] | None = None) -> None:
        """Queue the network; raises :class:`UserError`.

        It reads from the address ``source``, or the uploaded batch, and writes each output to its address
        in ``targets``, or to the buffer of this execution.
        """
        assert self.shape is not None
        address = self._upload[0] if source is None else source
        api = self._network.api
        api.log.clear()
        if address != self._source:
            self._source = address if self.context.set_tensor_address(INPUT, address) else 0
        for name, view in self.views.items():
            target = view.pointer if targets is None else targets.get(name, view.pointer)
            if target != self._targets[name]:
                self._targets[name] = target if self.context.set_tensor_address(name, target) else 0
        ready = self._source and all(self._targets.values())
        if not (ready and self.context.execute_async_v3(self._stream.handle)):
            shape, self.shape = self.shape, None
            reason = self._network.refusal("failed on", shape)
            raise UserError(f"{reason}; try a smaller image or load the engine again")

    def download(self) -> None:
        """Queue the copies of all outputs to :attr:`results`."""
        if self._frame is None:
            self._host_side()
        for copy in self._downloads:
            self._stream.copy(*copy)

    def whole(self) -> None:
        """Queue everything between :meth:`load` and :attr:`results`."""
        self.upload()
        self.enqueue()
        self.download()

    def close(self) -> None:
        """Free context and buffers; the stream must be idle."""
        if self.graph is not None:
            self.graph.close()
        self.graph, self.context, self._scratch = None, cast(Any, None), None
        buffers: list[DeviceBuffer | PinnedBuffer] = [*self._device.values(), *self._pinned.values()]
        for buffer in buffers:
            buffer.close()
        self.views, self.results, self._frame = {}, {}, None


def _grown(buffers: dict[str, Any], kind: type[Any], name: str, nbytes: int) -> Any:
    buffer = buffers.get(name)
    if buffer is None or buffer.nbytes < nbytes:
        if buffer is not None:
            buffers.pop(name).close()  # waits for the GPU; before the larger one, so that both need not fit
        buffer = buffers[name] = kind(nbytes)
    return buffer


def _usable(array: DeviceArray) -> bool:
    """Whether the network may read or write it where it lies."""
    return array.context is None and array.pointer % ALIGNMENT == 0


def _fitting(execution: ExecutionContext, targets: Mapping[str, DeviceArray] | None) -> dict[str, DeviceArray]:
    """``targets``, or :class:`ContractError` when one is not made for the output of its name."""
    for name, target in (targets or {}).items():
        view = execution.views.get(name)
        if view is None:
            raise ContractError(f"this engine has no output {name!r}; it has: {', '.join(execution.views)}")
        if (target.shape, target.dtype) != (view.shape, view.dtype):
            raise ContractError(
                f"the array for the output {name} must be {view.dtype} {view.shape}, got {target.dtype} {target.shape}"
            )
    return dict(targets or {})


class InferenceStream:
    """One stream with its executions: one batch in flight. For one thread at a time, the one that holds ``lock``.

    Shapes that come often get a context of their own and a CUDA graph of upload, network and download;
    all others share one context. Where a graph cannot be made, one message says why, and it is tried again later.
    """

    def __init__(self, network: Network, *, graphs: bool) -> None:
        """Create with the device current; raises :class:`UserError` when memory is short."""
        self._network, self._graphs = network, graphs
        self.lock = threading.RLock()
        self.stream = Stream()
        self._scratch: DeviceBuffer | None = None
        self._shared: ExecutionContext | None = self.new_execution()
        self._own: OrderedDict[tuple[int, ...], ExecutionContext] = OrderedDict()
        self._runs: dict[tuple[int, ...], int] = {}
        self._bound: list[ExecutionContext] = []
        self._running: ExecutionContext | None = None
        self._shape: tuple[int, ...] = ()  # of the batch that runs
        self._borrowed: list[DeviceArray] = []  # live while the GPU may read them
        self._busy = False
        self._failures, self._told = 0, False  # recordings that failed, and whether a message said so

    def new_execution(self, *, specialized: bool = False) -> ExecutionContext:
        """Another context on this stream and scratch memory."""
        return ExecutionContext(self._network, self.stream, self._scratch_of, specialized=specialized)

    def _scratch_of(self, nbytes: int) -> DeviceBuffer:
        """Memory that the executions on this stream share; a smaller one lives on while one of them has it."""
        if self._scratch is None or self._scratch.nbytes < nbytes:
            self._scratch = None
            self._scratch = DeviceBuffer(nbytes)
        return self._scratch

    # --- one batch: submit, or run in place; then collect

    def submit(self, images: npt.NDArray[Any]) -> None:
        """Queue one batch from the host; the result comes from :meth:`collect`."""
        if self._busy:
            self.finish()
        own = self._own.get(images.shape)
        execution = self._ready(images.shape) if own is None else own
        execution.load(images)
        self._busy = True
        if own is not None and len(self._own) > 1:
            self._own.move_to_end(images.shape)
        if execution.graph is not None:
            execution.graph.launch()
        else:
            execution.whole()
        self._running, self._shape = execution, images.shape
        if execution.graph is None and self._graphs and self._is_due(images.shape):
            self._record(execution, images)

    def run(
        self,
        batch: npt.NDArray[Any] | DeviceArray,
        *,
        download: bool = False,
        targets: Mapping[str, DeviceArray] | None = None,
    ) -> dict[str, DeviceArray]:
        """Queue one batch, in place where it is on this GPU and aligned; the results stay on the GPU.

        ``targets``: arrays of others on this GPU that take the outputs of those names, likewise in place.
        With ``download``, :meth:`collect` may follow.
        """
        on_gpu = isinstance(batch, DeviceArray)
        if len(self._borrowed) >= BORROWED or (self._busy and not on_gpu):
            self.finish()
        execution = self._ready(batch.shape)
        taken = _fitting(execution, targets)
        self._borrowed += taken.values()
        self._busy = True
        source = None
        if not isinstance(batch, DeviceArray):
            execution.load(batch)
            execution.upload()
        else:
            self._borrowed.append(batch)
            if _usable(batch):
                source = batch.pointer
            else:
                execution.take(batch)
        in_place = {name: view.pointer for name, view in taken.items() if _usable(view)}
        execution.enqueue(source, in_place)
        for name, view in taken.items():
            if name not in in_place:
                self.stream.write(view, execution.views[name].pointer)
        if download:
            execution.download()
            self._running, self._shape = execution, batch.shape
        handle = self.stream.handle
        return {**execution.views, **{name: replace(view, stream=handle) for name, view in taken.items()}}

    def collect(self, labels: npt.NDArray[np.uint8] | None = None) -> Prediction:
        """Wait for the batch and copy its results out; ``labels`` is the array that takes the labels.

        Raises :class:`BadInputFile` for results that the description does not promise.
        """
        execution, self._running = self._running, None
        assert execution is not None
        self.finish()
        results = dict(execution.results)
        if labels is not None and "labels" in results:
            np.copyto(labels, results["labels"])
            results["labels"] = labels
        results = {name: result if result is labels else result.copy() for name, result in results.items()}
        prediction = checked_prediction(results, self._network.manifest, self._shape)
        if labels is None or prediction.labels is labels:
            return prediction
        np.copyto(labels, prediction.labels)
        return replace(prediction, labels=labels)

    @property
    def waits(self) -> bool:
        """Whether a batch has been queued whose result nobody has collected."""
        return self._running is not None

    def drop(self) -> None:
        """Wait, and forget the result."""
        self.finish()
        self._running = None

    def finish(self) -> None:
        """Wait for all work of this stream."""
        self.stream.synchronize()
        self._busy = False
        self._borrowed.clear()

    # --- contexts and graphs

    def _ready(self, shape: tuple[int, ...]) -> ExecutionContext:
        """The shared context, ready for ``shape``."""
        if self._shared is None:
            self._shared = self.new_execution()
        if self._shared.shape != shape:
            if self._busy:
                self.finish()  # the context and its buffers must be idle while they change
            self._shared.set_shape(shape)
        return self._shared

    def _is_due(self, shape: tuple[int, ...]) -> bool:
        """Whether this shape has come often enough for a graph."""
        if len(self._runs) >= SHAPES_COUNTED:
            self._runs.clear()
        self._runs[shape] = self._runs.get(shape, 0) + 1
        first = COMPILE if self._network.compiles else WARM_UP
        return self._runs[shape] >= (first if len(self._own) < GRAPHS else REPLACE)

    def _record(self, execution: ExecutionContext, images: npt.NDArray[Any]) -> None:
        """Make a graph of what has just run; the context then belongs to this shape."""
        self.finish()
        own = execution
        if execution is self._shared and self._network.compiles:
            own = self._specialized(images) or execution
            self._running = own
        own.graph = self._graph(own, own.whole)
        if own.graph is None:
            self._runs[images.shape] = -REPLACE  # until it is tried again
        if own is not execution or own.graph is not None:
            self._keep(own, images.shape)

    def _specialized(self, images: npt.NDArray[Any]) -> ExecutionContext | None:
        """A context that has run this batch with kernels compiled for its very shape; None without memory for it."""
        own: ExecutionContext | None = None
        try:
            own = self.new_execution(specialized=True)
            own.set_shape(images.shape)
            own.load(images)
            own.whole()
            self.finish()
        except UserError as exc:
            logger.debug("no context for this shape alone: %s", exc)
            if own is not None:
                self.finish()
                own.close()
            return None
        self._network.contexts.save_kernels()
        return own

    def _keep(self, own: ExecutionContext, shape: tuple[int, ...]) -> None:
        """Let a context be the one for ``shape``; the one that was used least recently goes."""
        if shape not in self._own and len(self._own) >= GRAPHS:
            rare, oldest = self._own.popitem(last=False)
            self._runs.pop(rare, None)
            oldest.close()
        self._own[shape] = own
        if own is self._shared:
            self._shared = None

    def _graph(self, execution: ExecutionContext, record: Callable[[], None]) -> CudaGraph | None:
        """A graph of an execution that has just run so, or None where it cannot be made."""
        try:
            if reason := self._network.api.capture_refusal(execution.context, self.stream.handle):
                self._failures = CAPTURES  # that does not pass
                raise CaptureError(reason)
            return CudaGraph(self.stream, record)
        except CaptureError as exc:
            self._failures += 1
            level = logging.WARNING if self._graphs and not self._told else logging.DEBUG
            logger.log(level, "no CUDA graph can be made of this engine, it runs without (%s)", exc)
            self._told, self._graphs = True, self._failures < CAPTURES
            return None

    def bind(self, images: npt.NDArray[Any] | DeviceArray, *, graph: bool) -> ExecutionContext:
        """A context of its own that has run this batch once, with the batch in its device memory.

        With ``graph`` it has one of the network alone, where one can be made. Lives until :meth:`release`.
        """
        self.finish()
        execution = self.new_execution(specialized=True)
        self._bound.append(execution)
        try:
            execution.set_shape(images.shape)
            if isinstance(images, DeviceArray):
                execution.take(images)
            else:
                execution.load(images)
                execution.upload()
            execution.enqueue()
            self.finish()
            if graph and self._graphs:
                execution.graph = self._graph(execution, execution.enqueue)
                execution.set_shape(images.shape)  # again, where recording failed inside the library
        except BaseException:
            self.release(execution)
            raise
        return execution

    def release(self, execution: ExecutionContext) -> None:
        """Free a bound execution."""
        self.finish()
        self._bound.remove(execution)
        execution.close()

    def close(self) -> None:
        """Free everything, on a GPU that has failed as well: its errors were told where they came."""
        with suppress(UserError):
            self.finish()
        shared = [] if self._shared is None else [self._shared]
        for execution in (*shared, *self._own.values(), *self._bound):
            execution.close()
        self._running = self._shared = None
        self._own.clear()
        self._bound.clear()
        self._scratch = None
        self.stream.close()
