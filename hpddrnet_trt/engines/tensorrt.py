"""Run a TensorRT engine file: TensorRT 10 and 11, and TensorRT for RTX 1, on an NVIDIA GPU.

A file that cannot run here is refused in one sentence, before TensorRT sees it: without a GPU some
versions crash the process.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.engines.base import EngineBase, Prediction, check_input, check_shape, input_contract
from hpddrnet_trt.engines.cuda_memory import (
    DeviceArray,
    DeviceBuffer,
    Gpu,
    PinnedBuffer,
    Stream,
    current_device,
    find_gpu,
    on_device,
    view_device_array,
)
from hpddrnet_trt.engines.outputs import expected_outputs, to_prediction
from hpddrnet_trt.engines.shapes import Profile, choose_profile
from hpddrnet_trt.engines.tensorrt_api import INPUT, PORTABLE, TensorRT, layer_profiler, load_flavour
from hpddrnet_trt.errors import BadInputFile, ContractError, UserError
from hpddrnet_trt.files import existing_file
from hpddrnet_trt.manifest import EngineRecord, InputContract, Manifest, read_manifest

logger = logging.getLogger(__name__)

# TensorRT wants tensor addresses aligned to this many bytes (its API reference, setTensorAddress);
# cudaMalloc gives that, a slice of somebody's array may not.
ALIGNMENT = 256
# What a default TensorRT-RTX engine runs on: this compute capability and later (its documentation).
PORTABLE_FROM = "8.0"


class TensorRTEngine(EngineBase):
    """A loaded engine with its own CUDA stream and reused buffers.

    Host arrays go through page-locked memory. Buffers grow to the largest input seen and are then
    reused, so frames of a steady size allocate nothing. Calls from several threads are safe but run
    one after the other; for parallel work give each thread its own engine object.
    """

    def __init__(self, path: str | Path, *, device: int = 0) -> None:
        """Load ``path`` (with its ``.json`` beside it) on the GPU with CUDA index ``device``.

        Raises :class:`BadInputFile` (missing, truncated, changed, other version or GPU),
        :class:`MissingDependency`, :class:`NoGpu`, or :class:`UserError` (out of GPU memory).
        """
        path = existing_file(path, "engine file")
        self.manifest = read_manifest(path)
        self._contract: InputContract = input_contract(self.manifest)
        record = engine_record(path, self.manifest)
        content = verified_content(path, record)
        self._api = load_flavour(record.flavour)
        check_version(path, record, self._api)
        self._gpu = find_gpu(device)
        check_gpu(path, record, self._gpu)
        self._profiles = [Profile.from_record(entry) for entry in record.profiles]
        self._lock = threading.Lock()
        with current_device(device):
            self._load(path, record, content)
            self._stream = Stream()
        self._outputs = self._output_types(path)
        self._device_buffers: dict[str, DeviceBuffer] = {}
        self._pinned_buffers: dict[str, PinnedBuffer] = {}
        self._views: dict[str, DeviceArray] = {}
        self._profile = 0
        self._shape: tuple[int, ...] | None = None
        self._source: DeviceArray | None = None
        self._open = True

    def _load(self, path: Path, record: EngineRecord, content: bytes) -> None:
        api = self._api
        api.log.clear()
        self._runtime = api.runtime()
        if record.version_compatible:
            self._runtime.engine_host_code_allowed = True  # such a plan carries its own runtime library
        self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise BadInputFile(
                f"{api.label} cannot load {path} on {self._gpu.name}: {api.log.explain('no reason given')}; "
                "build the engine again on this machine"
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise UserError(
                f"the GPU {self._gpu.name} has too little free memory for {path} "
                f"({api.log.explain('no reason given')}); close other programs that use it, or build the engine "
                "with smaller --shapes"
            )

    def _output_types(self, path: Path) -> dict[str, np.dtype[Any]]:
        """Output names and types of the engine; they must be those that the description promises."""
        trt, engine = self._api.module, self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        if inputs != [INPUT]:
            raise BadInputFile(f"{path} has the inputs {inputs} instead of [{INPUT!r}]; build the engine again")
        expected_outputs(self.manifest, outputs, path)
        # Every output needs an address to run, also one that the description does not name.
        return {name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in outputs}

    @property
    def runtime(self) -> str:
        """For people, e.g. ``TensorRT 10.16.1 (NVIDIA H200, fp16)``."""
        return f"{self._api.label} ({self._gpu.name}, {self.manifest.precision})"

    @property
    def stream(self) -> int:
        """Handle of the CUDA stream that this engine runs on."""
        return self._stream.handle

    def infer(self, images: npt.NDArray[Any] | Any) -> Prediction:
        """Run one batch; the result is on the host.

        ``images`` follows ``manifest.input``: a numpy array, or an array already on this GPU (PyTorch,
        CuPy, PyCUDA, Numba: DLPack or CUDA array interface), which is used in place; see
        :func:`~hpddrnet_trt.engines.cuda_memory.view_device_array` for what it waits for.
        Raises :class:`ContractError` or :class:`UserError`.
        """
        with self._lock, current_device(self._gpu.index):
            results = {name: self._download(name, view) for name, view in self._run(images).items()}
            self._stream.synchronise()
            return to_prediction({name: result.copy() for name, result in results.items()})

    def infer_device(self, images: npt.NDArray[Any] | Any, *, synchronise: bool = True) -> dict[str, DeviceArray]:
        """Run one batch; the results stay on the GPU, by output name.

        They lie in this engine's own buffers: valid until the next call or :meth:`close`, so copy what
        must live longer. With ``synchronise=False`` the call returns while the GPU still works; each
        result names the stream in its ``__cuda_array_interface__``. CuPy and Numba heed that, PyTorch
        does not: with PyTorch keep the default, or let its stream wait for :attr:`stream`. The input
        must not be changed before the results are complete.
        """
        with self._lock, current_device(self._gpu.index):
            views = self._run(images)
            if not synchronise:
                return views
            self._stream.synchronise()
            return {
                name: DeviceArray(view.pointer, view.shape, view.dtype, view.owner) for name, view in views.items()
            }

    def profile(self, images: npt.NDArray[Any], runs: int) -> list[list[tuple[str, float]]]:
        """Run one batch ``runs`` times with a profiler: (layer, milliseconds) of every layer of each run.

        The profiler stays attached and slows later runs down: close the engine afterwards.
        """
        with self._lock, current_device(self._gpu.index):
            profiler = layer_profiler(self._api.module)
            self._context.profiler = profiler
            found = []
            for _ in range(runs):
                profiler.layers.clear()
                self._run(images)
                self._stream.synchronise()
                found.append(list(profiler.layers))
            return found

    def _run(self, images: Any) -> dict[str, DeviceArray]:
        if not self._open:
            raise ContractError("this engine was closed; load the file again")
        source = self._on_gpu(images)
        if source.shape != self._shape:
            self._set_shape(source.shape)
        self._source = source  # keeps a borrowed array alive while the GPU reads it
        self._api.log.clear()
        bound = self._context.set_tensor_address(INPUT, source.pointer)
        if not (bound and self._context.execute_async_v3(self._stream.handle)):
            self._shape = None
            raise UserError(
                f"{self._api.label} failed on an input of {'x'.join(map(str, source.shape))}: "
                f"{self._api.log.explain('no reason given')}; try a smaller image or load the engine again"
            )
        return self._views

    def _on_gpu(self, images: Any) -> DeviceArray:
        """The batch on this GPU: an array there is used in place, one on the host is copied."""
        if not on_device(images):
            check_input(images, self._contract)
            return self._upload(images)
        view = view_device_array(images, self._stream, self._gpu.index)
        check_device_array(view, self._contract)
        if view.pointer % ALIGNMENT == 0:
            return view
        buffer = self._device_buffer(INPUT, view.nbytes)
        self._stream.copy(buffer.pointer, view.pointer, view.nbytes)
        # The copy is queued: both the borrowed array and our buffer must outlive it.
        return DeviceArray(buffer.pointer, view.shape, view.dtype, (buffer, view))

    def _upload(self, images: npt.NDArray[Any]) -> DeviceArray:
        self._stream.synchronise()  # an earlier call that did not wait may still read the page-locked memory
        pinned, buffer = self._pinned_buffer(INPUT, images.nbytes), self._device_buffer(INPUT, images.nbytes)
        np.copyto(pinned.view(images.shape, images.dtype), images)
        self._stream.copy(buffer.pointer, pinned.pointer, images.nbytes)
        return DeviceArray(buffer.pointer, images.shape, images.dtype, buffer)

    def _download(self, name: str, view: DeviceArray) -> npt.NDArray[Any]:
        pinned = self._pinned_buffer(name, view.nbytes)
        self._stream.copy(pinned.pointer, view.pointer, view.nbytes)
        return pinned.view(view.shape, view.dtype)

    def _set_shape(self, shape: tuple[int, ...]) -> None:
        """Choose the profile, tell the context the input's shape, and bind output buffers that fit."""
        index = choose_profile(self._profiles, shape)
        context, self._shape = self._context, None
        self._stream.synchronise()  # the context and its buffers must be idle while they change
        self._api.log.clear()
        accepted = index == self._profile or context.set_optimization_profile_async(index, self._stream.handle)
        self._stream.synchronise()
        if not (accepted and context.set_input_shape(INPUT, shape)) or context.infer_shapes():
            raise ContractError(
                f"{self._api.label} refuses an input of {'x'.join(map(str, shape))}: "
                f"{self._api.log.explain('no reason given')}; build the engine with other --shapes"
            )
        self._profile = index
        self._views = {name: self._bind_output(name, dtype) for name, dtype in self._outputs.items()}
        self._shape = shape

    def _bind_output(self, name: str, dtype: np.dtype[Any]) -> DeviceArray:
        shape = tuple(self._context.get_tensor_shape(name))
        nbytes = int(np.prod(shape)) * dtype.itemsize
        buffer = self._device_buffer(name, nbytes)
        if not self._context.set_tensor_address(name, buffer.pointer):
            raise UserError(f"{self._api.label} refuses the output {name}: {self._api.log.explain('no reason given')}")
        return DeviceArray(buffer.pointer, shape, dtype, buffer, self._stream.handle)

    def _device_buffer(self, name: str, nbytes: int) -> DeviceBuffer:
        buffer = self._device_buffers.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            if buffer is not None:
                buffer.close()  # waits for the GPU; before the larger one, so that both need not fit
            buffer = self._device_buffers[name] = DeviceBuffer(nbytes)
        return buffer

    def _pinned_buffer(self, name: str, nbytes: int) -> PinnedBuffer:
        buffer = self._pinned_buffers.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            if buffer is not None:
                buffer.close()
            buffer = self._pinned_buffers[name] = PinnedBuffer(nbytes)
        return buffer

    def close(self) -> None:
        """Free the GPU; calling it again does nothing."""
        with self._lock:
            if not self._open:
                return
            self._open = False
            with current_device(self._gpu.index):
                self._stream.synchronise()
                del self._context, self._engine, self._runtime  # in this order: each needs the next
                buffers: list[DeviceBuffer | PinnedBuffer] = [
                    *self._device_buffers.values(),
                    *self._pinned_buffers.values(),
                ]
                for buffer in buffers:
                    buffer.close()
                self._stream.close()
            self._views, self._source = {}, None


def engine_record(path: Path, manifest: Manifest) -> EngineRecord:
    """The engine's part of the description, or :class:`BadInputFile`."""
    if manifest.engine is None or not manifest.engine.profiles:
        raise BadInputFile(f"the description beside {path} is not that of an engine; build the engine again")
    return manifest.engine


def verified_content(path: Path, record: EngineRecord) -> bytes:
    """The file's bytes if size and checksum are those of the description, else :class:`BadInputFile`."""
    content = path.read_bytes()
    if len(content) < record.bytes:
        raise BadInputFile(
            f"{path} is truncated ({len(content)} of {record.bytes} bytes); copy it again or build the engine again"
        )
    if len(content) > record.bytes or hashlib.sha256(content).hexdigest() != record.sha256:
        raise BadInputFile(
            f"{path} is not the engine that {path.name}.json describes (size or checksum differ); "
            "copy both files again or build the engine again"
        )
    return content


def check_version(path: Path, record: EngineRecord, api: TensorRT) -> None:
    """Engines run on the exact library version that built them, version-compatible ones on later ones too."""
    if api.version == record.version:
        return
    if record.version_compatible and _numbers(api.version) >= _numbers(record.version):
        return
    package = "tensorrt-rtx" if record.flavour == "tensorrt-rtx" else "tensorrt"
    raise BadInputFile(
        f"{path} was built with {record.flavour} {record.version}, installed is {api.version}: build the engine again "
        f"from its ONNX file, or install {package}=={record.version}"
    )


def check_gpu(path: Path, record: EngineRecord, gpu: Gpu) -> None:
    """Raise :class:`BadInputFile` when the engine was built for other GPUs than ``gpu``."""
    targets = record.compute_capabilities
    here = f"{gpu.name} has compute capability {gpu.compute_capability}"
    if PORTABLE in targets:
        if _numbers(gpu.compute_capability) < _numbers(PORTABLE_FROM):
            raise BadInputFile(
                f"{path} runs on GPUs of compute capability {PORTABLE_FROM} and later, {here}; build it again with "
                f"--compute-capability {gpu.compute_capability}"
            )
        return
    if gpu.compute_capability not in targets:
        raise BadInputFile(
            f"{path} was built for GPUs of compute capability {', '.join(targets)}, {here}; "
            "build the engine again for this GPU"
        )
    if record.flavour == "tensorrt" and record.gpu not in (None, gpu.name):
        logger.warning("%s was built on %s and may be slower on %s; build it here", path, record.gpu, gpu.name)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def check_device_array(view: DeviceArray, contract: InputContract) -> None:
    """:func:`~hpddrnet_trt.engines.base.check_input` for an array on the GPU."""
    if len(view.shape) != 4:
        raise ContractError(
            f"expected an array [batch, {contract.channels}, height, width], got shape {view.shape} on the GPU"
        )
    if view.dtype != np.dtype(contract.dtype):
        raise ContractError(f"expected dtype {contract.dtype}, got {view.dtype} on the GPU; convert the image first")
    check_shape(view.shape, contract)
