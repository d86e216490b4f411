"""Run a TensorRT engine file: TensorRT 10 and 11, and TensorRT for RTX 1, on an NVIDIA GPU.

A file that cannot run here is refused in one sentence, before TensorRT sees it: without a GPU some
versions crash the process.
"""

from __future__ import annotations

import json
import logging
import threading
import warnings
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import BadInputFile, ContractError, EngineDoesNotFit, UsageError, UserError
from hpddrnet_trt.core.files import existing_file, write_text
from hpddrnet_trt.core.manifest import EngineRecord, InputContract, read_manifest
from hpddrnet_trt.engines.base import Bound, EngineBase, Prediction, check_input, expected_outputs, input_contract
from hpddrnet_trt.engines.cuda import (
    DeviceArray,
    current_device,
    find_gpu,
    on_device,
    stream_handle,
    view_device_array,
)
from hpddrnet_trt.engines.engine_file import (
    BUILD_AGAIN,
    check_gpu,
    check_lean,
    check_version,
    engine_record,
    verified_content,
)
from hpddrnet_trt.engines.profiles import Profile
from hpddrnet_trt.engines.tensorrt_context import ExecutionContext, InferenceStream, Network
from hpddrnet_trt.engines.tensorrt_library import (
    INPUT,
    LEAN,
    EngineContexts,
    installed_library,
    layer_profiler,
    load_tensorrt,
)

if TYPE_CHECKING:
    import tensorrt as trt

logger = logging.getLogger(__name__)

WARM_UP = 5  # profiled runs that are not counted
SHAPES_REMEMBERED = 1024


class TensorRTEngine(EngineBase):
    """A loaded engine with its own CUDA streams and reused buffers.

    Host arrays go through page-locked memory. A shape that comes often gets a CUDA graph of upload,
    network and download, so that a frame costs one launch, one wait and two copies on the host, and
    allocates nothing but its result (nothing at all with ``out``). Calls from several threads are safe
    but run one after the other; for parallel work use :meth:`infer_many`, or one engine per thread.

    Works in the GPU's primary context, beside PyTorch, CuPy and PyCUDA (``pycuda.autoprimaryctx``), and
    leaves the calling thread's current context as it was.
    """

    LIBRARY: ClassVar[str | None] = None  # that is used whatever else is installed

    def __init__(self, path: str | Path, *, device: int = 0, graphs: bool = True, slots: int = 2) -> None:
        """Load ``path`` (with its ``.json`` beside it) on the GPU with CUDA index ``device``.

        The file's bytes are compared with the checksum in the ``.json`` before TensorRT reads any of
        them. That finds damage, it is no signature, and TensorRT's reader is not made for hostile files:
        take engines only from where you would take software.

        ``graphs``: use CUDA graphs where the engine allows it. ``slots``: batches in flight in
        :meth:`infer_many`; each but one needs scratch memory of its own while that runs.

        TensorRT-RTX compiles kernels for this GPU; they are kept in ``PATH.kernels`` for the next start. Where only
        the lean runtime of TensorRT is installed, it runs the engine.

        Raises :class:`BadInputFile` (missing, truncated, changed), its kind :class:`EngineDoesNotFit` (other version
        or GPU), :class:`MissingDependency`, :class:`NoGpu`, :class:`UsageError`, or :class:`UserError` (out of
        GPU memory).
        """
        if isinstance(device, bool) or not isinstance(device, int):
            raise UsageError(f"device is a GPU's number from 0 on, got {device!r}")
        if slots < 1:
            raise UsageError(f"slots is the number of batches in flight, at least 1; got {slots}")
        path = existing_file(path, "engine file")
        self.manifest = read_manifest(path)
        self._contract: InputContract = input_contract(self.manifest)
        record = engine_record(path, self.manifest)
        content = verified_content(path, record)
        library = self.LIBRARY or installed_library(record.runtime)
        if library == LEAN:
            check_lean(path, record)
        self._api = load_tensorrt(library)
        check_version(path, record, self._api)
        self._gpu = find_gpu(device)
        check_gpu(path, record, self._gpu)
        self._profiles = [Profile.from_record(entry) for entry in record.profiles]
        self._dtype = np.dtype(self._contract.dtype)
        # Entered again when the garbage collector ends an abandoned infer_many inside another call.
        self._lock = threading.RLock()
        self._graphs, self._parallel = graphs, slots
        self._admitted: set[tuple[int, ...]] = set()
        self._on_gpu = current_device(device)
        with self._on_gpu:
            self._load(path, record, content)
            self._slot = InferenceStream(self._network, graphs=graphs)
        self._slot.lock = self._lock  # infer_many uses it, too
        self._slots = [self._slot]  # all there are
        self._lent = False  # whether an infer_many has the first
        self._set_aside: Prediction | UserError | None = None  # what infer_many will want of it
        self._open = True

    def _load(self, path: Path, record: EngineRecord, content: bytes) -> None:
        api = self._api
        api.log.clear()
        self._runtime = api.runtime(host_code=record.version_compatible)
        engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise EngineDoesNotFit(
                f"{api.label} cannot load {path} on {self._gpu.name}: {api.log.explain('no reason given')}; "
                f"{BUILD_AGAIN}"
            )
        outputs = self._output_types(path, engine)
        contexts = EngineContexts(api, engine, path.with_name(f"{path.name}.kernels"))
        self._network = Network(self.manifest, api, engine, contexts, self._profiles, self._dtype, outputs)

    def _output_types(self, path: Path, engine: trt.ICudaEngine) -> dict[str, np.dtype[Any]]:
        """Output names and types of the engine; they must be those that the description promises."""
        trt = self._api.module
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        if inputs != [INPUT]:
            raise BadInputFile(f"{path} has the inputs {inputs} instead of [{INPUT!r}]; build the engine again")
        expected_outputs(self.manifest, {name: tuple(engine.get_tensor_shape(name)) for name in outputs}, path)
        try:
            # Every output needs an address to run, also one that the description does not name.
            return {name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in outputs}
        except TypeError as exc:  # BF16, FP8
            raise BadInputFile(f"{path} has an output of a type that numpy lacks ({exc}); build it again") from exc

    @property
    def runtime(self) -> str:
        """For people, e.g. ``TensorRT 10.16.1 (NVIDIA H200, fp16)``."""
        return f"{self._api.label} ({self._gpu.name}, {self.manifest.precision})"

    @property
    def stream(self) -> int:
        """Handle of the CUDA stream that :meth:`infer` and :meth:`infer_device` run on."""
        return self._slot.stream.handle

    def infer(
        self, images: npt.NDArray[Any] | Any, out: npt.NDArray[np.uint8] | None = None, *, stream: Any = None
    ) -> Prediction:
        """Run one batch; the result is on the host.

        ``images`` follows ``manifest.input``: a numpy array, or an array already on this GPU (PyTorch,
        CuPy, PyCUDA, Numba: DLPack or CUDA array interface), which is used in place (copied, if it is
        in another CUDA context), without a CUDA graph; see
        :func:`~hpddrnet_trt.engines.cuda.view_device_array` for what it waits for.
        ``out``: uint8 ``[N, H, W]`` that takes the labels, which are then not allocated anew.
        ``stream``: the CUDA stream that makes ``images``, for arrays that do not say it themselves, see
        :func:`~hpddrnet_trt.engines.cuda.stream_handle`.
        Raises :class:`ContractError` or :class:`UserError`.
        """
        with self._lock, self._on_gpu:
            self._check_open()
            if stream is not None:
                self._slot.stream.wait_for(stream_handle(stream))
            self._keep_what_waits()
            self._submit(self._slot, images, out)
            return self._slot.collect(out)

    def _keep_what_waits(self) -> None:
        """Take the result of a running :meth:`infer_many` out of the slot that is to be used for something else."""
        if self._lent and self._set_aside is None and self._slot.waits:
            try:
                self._set_aside = self._slot.collect()
            except UserError as exc:
                self._set_aside = exc

    def _submit(self, slot: InferenceStream, images: Any, out: npt.NDArray[np.uint8] | None = None) -> None:
        """Queue one batch from wherever it is."""
        batch = self._batch(slot, images)
        _check_out(out, batch.shape)
        if isinstance(batch, DeviceArray):
            slot.run(batch, download=True)
        else:
            slot.submit(batch)

    def infer_device(
        self,
        images: npt.NDArray[Any] | Any,
        *,
        out: Any | Mapping[str, Any] | None = None,
        stream: Any = None,
        synchronize: bool = True,
        synchronise: bool | None = None,
    ) -> dict[str, DeviceArray]:
        """Run one batch; the results stay on the GPU, by output name.

        They lie in this engine's own buffers: valid until the next call or :meth:`close`, so copy what
        must live longer, or give ``out``: an array on this GPU that takes the labels (the logits of a
        model with logits), or several by output name, of exactly the output's shape and type.

        ``stream``: a CUDA stream of the caller, see
        :func:`~hpddrnet_trt.engines.cuda.stream_handle`. The inference starts after the work queued
        on it so far, and the work queued on it from now on starts after the inference: no other waiting
        is needed on either side, the call returns while the GPU still works, and the next call with the
        same stream may overwrite the results.

        Without ``stream``, ``synchronize=False`` also returns while the GPU still works; each result names
        the engine's stream in its ``__cuda_array_interface__``. CuPy and Numba heed that, PyTorch does
        not: with PyTorch keep the default, or give its stream. The input must not be changed before the
        results are complete. ``synchronise`` is the former name of that option.

        Raises :class:`ContractError` or :class:`UserError`. ``out`` and ``stream`` have been run on a
        simulated GPU only.
        """
        if synchronise is not None:
            warnings.warn("infer_device(synchronise=...) is called synchronize", DeprecationWarning, stacklevel=2)
            synchronize = synchronise
        with self._lock, self._on_gpu:
            self._check_open()
            self._keep_what_waits()
            slot = self._slot
            theirs = None if stream is None else stream_handle(stream)
            if theirs is not None:
                slot.stream.wait_for(theirs)
            targets = self._targets(slot, out)
            views = slot.run(self._batch(slot, images), targets=targets)
            if theirs is not None:
                slot.stream.precede(theirs)
                return {name: replace(view, stream=theirs) for name, view in views.items()}
            if synchronize:
                slot.finish()
                return {name: replace(view, stream=None) for name, view in views.items()}
            return dict(views)

    def _targets(self, slot: InferenceStream, out: Any | Mapping[str, Any] | None) -> dict[str, DeviceArray] | None:
        if out is None:
            return None
        assert self.manifest.output is not None  # input_contract has asked
        named = out if isinstance(out, Mapping) else {self.manifest.output.kind: out}
        gpu = self._gpu.index
        return {name: view_device_array(array, slot.stream, gpu, writable=True) for name, array in named.items()}

    def infer_many(self, batches: Iterable[npt.NDArray[Any]]) -> Iterator[Prediction]:
        """Run batches with ``slots`` of them in flight: one is copied while another is computed.

        Results come in the order of the batches, each a result of its own as from :meth:`infer`. A batch
        that fails ends the iteration after the results before it; the engine stays usable. Each slot
        has a stream, a context and buffers; the first is that of :meth:`infer`, the others are made when they are
        needed, as far as there is memory, and freed at the end. The calling thread does all the work.
        """
        slots: list[InferenceStream] = []
        free, waiting = deque[InferenceStream](), deque[InferenceStream]()
        problem: UserError | None = None
        try:
            for images in batches:
                if not free and len(slots) < self._parallel:
                    free += self._another(slots)
                if not free:
                    yield self._collect(waiting[0])
                    free.append(waiting.popleft())
                try:
                    with free[0].lock, self._on_gpu:
                        self._check_open()
                        self._submit(free[0], images)
                except UserError as exc:
                    problem = exc
                    break
                waiting.append(free.popleft())
            while waiting:
                yield self._collect(waiting[0])
                waiting.popleft()
            if problem is not None:
                raise problem
        finally:
            self._give_back(slots)

    def _collect(self, slot: InferenceStream) -> Prediction:
        with slot.lock, self._on_gpu:
            self._check_open()
            if slot is self._slot and self._set_aside is not None:
                found, self._set_aside = self._set_aside, None
                if isinstance(found, UserError):
                    raise found
                return found
            return slot.collect()

    def _another(self, taken: list[InferenceStream]) -> list[InferenceStream]:
        """One more slot for an :meth:`infer_many` that has ``taken`` some, or none where the memory ends."""
        with self._lock, self._on_gpu:
            self._check_open()
            if not self._lent:
                self._lent, slot = True, self._slot
            else:
                try:
                    slot = InferenceStream(self._network, graphs=self._graphs)
                except UserError as exc:
                    if not taken:
                        raise
                    logger.debug("%d batches in flight instead of %d: %s", len(taken), self._parallel, exc)
                    return []
                self._slots.append(slot)
            taken.append(slot)
            return [slot]

    def _give_back(self, slots: list[InferenceStream]) -> None:
        with self._lock, self._on_gpu:
            for slot in slots if self._open else ():
                slot.drop()  # of a call that ended early
                if slot is self._slot:
                    self._lent, self._set_aside = False, None
                else:
                    self._slots.remove(slot)
                    slot.close()

    def bind(self, images: npt.NDArray[Any] | Any) -> Bound:
        """One batch placed on the GPU; see :class:`~hpddrnet_trt.engines.base.Engine`.

        A call launches a CUDA graph of the network alone (or queues the network) and waits for it.
        """
        with self._lock, self._on_gpu:
            execution = self._bind(images, graph=True)
        stream = self._slot.stream
        queue = execution.enqueue if execution.graph is None else execution.graph.launch

        def run() -> None:
            with self._lock, self._on_gpu:
                self._check_open()
                queue()
                stream.synchronize()

        def burst(runs: int) -> list[float]:
            with self._lock, self._on_gpu:
                self._check_open()
                return stream.timed(queue, runs)

        return Bound(run, burst)

    def _bind(self, images: Any, *, graph: bool) -> ExecutionContext:
        self._check_open()
        self._keep_what_waits()
        return self._slot.bind(self._batch(self._slot, images), graph=graph)

    def layer_times(self, images: npt.NDArray[Any] | Any, runs: int = 20) -> dict[str, float]:
        """Median milliseconds of each engine layer, by the layer's name, over ``runs`` inferences of one batch.

        Layers are timed one after the other, so their sum is more than the time of an undisturbed run. In a
        context of its own, without CUDA graphs: other calls are not slowed down.
        """
        times: dict[str, list[float]] = defaultdict(list)
        with self._lock, self._on_gpu:
            execution = self._bind(images, graph=False)
            try:
                profiler = layer_profiler(self._api.module)
                execution.context.profiler = profiler
                for number in range(WARM_UP + runs):
                    profiler.layers.clear()
                    execution.enqueue()
                    self._slot.finish()
                    for name, milliseconds in profiler.layers if number >= WARM_UP else ():
                        times[name].append(milliseconds)
            finally:
                self._slot.release(execution)
        return {name: median(values) for name, values in times.items()}

    def _batch(self, slot: InferenceStream, images: Any) -> npt.NDArray[Any] | DeviceArray:
        """``images``, a view of them where they are on the GPU, once they have been found to follow the contract."""
        if on_device(images):
            view = view_device_array(images, slot.stream, self._gpu.index)
            check_input(view, self._contract, on_gpu=True)
            return view
        # Remembering the shapes that have passed saves a frame some microseconds.
        known = isinstance(images, np.ndarray) and images.dtype == self._dtype and images.shape in self._admitted
        if not known:
            check_input(images, self._contract)
            if len(self._admitted) < SHAPES_REMEMBERED:
                self._admitted.add(images.shape)
        return images

    def _check_open(self) -> None:
        if not self._open:
            raise ContractError("this engine was closed; load the file again")

    def close(self) -> None:
        """Free the GPU, once the calls that other threads are in have ended; calling it again does nothing."""
        with self._lock:
            if not self._open:
                return
            self._open = False
            slots, self._slots = self._slots, []
            with self._on_gpu:
                self._network.contexts.save_kernels()
        # Not under the engine's lock: a thread inside a slot may need that to get out.
        for slot in slots:
            with slot.lock, self._on_gpu:
                slot.close()
        del self._network, self._runtime  # in this order: each needs the next


class LeanTensorRTEngine(TensorRTEngine):
    """An engine that was built to be version-compatible, on TensorRT's lean runtime, a fiftieth of its size.

    Raises :class:`UsageError` for other engines. Has run on simulated libraries only; the real one has been loaded.
    """

    LIBRARY = LEAN


def _check_out(out: npt.NDArray[np.uint8] | None, shape: tuple[int, ...]) -> None:
    """Raise :class:`ContractError` unless ``out`` can take the labels of images ``[N, C, H, W]``."""
    if out is None:
        return
    wanted = (shape[0], *shape[2:])
    if not isinstance(out, np.ndarray) or out.shape != wanted or out.dtype != np.uint8 or not out.flags.writeable:
        raise ContractError(
            f"out must be a writable uint8 array of shape {wanted}, got {type(out).__name__} "
            f"{getattr(out, 'dtype', '')} {getattr(out, 'shape', '')}"
        )


def write_layer_times(path: str | Path, target: str | Path, size: tuple[int, int], *, runs: int = 50) -> Path:
    """Measure the layers of an engine on this GPU, on a frame of noise of ``size`` (height, width).

    Writes JSON: ``gpu``, ``shape``, ``milliseconds``.

    Raises what :class:`TensorRTEngine` raises.
    """
    with TensorRTEngine(path) as engine:
        contract = input_contract(engine.manifest)
        shape = (contract.batch.minimum, contract.channels, *size)
        noise = np.random.default_rng(0).integers(0, 256, shape)
        images = noise.astype(np.uint8) if contract.dtype == "uint8" else (noise / 255).astype(np.float32)
        times = engine.layer_times(images, runs)
        record = {"gpu": engine.runtime, "shape": list(shape), "milliseconds": times}
    return write_text(target, json.dumps(record, indent=1) + "\n")
