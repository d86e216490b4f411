"""Enough of TensorRT's runtime, on simulated CUDA, to follow our control flow without a GPU.

An execution context runs the ONNX file on ONNX Runtime, reading and writing only the addresses it was given, in
scratch memory that it was given. A graph that is launched after its context was changed fails, as NVIDIA's
documentation warns. Calls fail as those of present bindings do: some return None or False, some raise RuntimeError.
TensorRT-RTX compiles kernels: for a context that wants them specialized before a shape runs, which is noted.
"""

from __future__ import annotations

import ast
import ctypes
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from hpddrnet_trt.engines.profiles import Profile
from hpddrnet_trt.engines.tensorrt_library import RuntimeName, TensorRT
from tests.engines.simulated_cuda import ALIGNMENT, SimulatedCuda


class SimulatedTensorRT:
    """A simulated library: ``api`` is the real :class:`TensorRT` on a module with the names of one version.

    Engines, contexts and modules have the names that the real ones of that version have, as far as
    running is concerned, and no others.
    """

    SCRATCH = (5000, 17000)  # bytes that a context needs with each profile
    CONTEXT = 3000  # bytes that it takes for itself

    def __init__(
        self, cuda: SimulatedCuda, onnx_file: Path, profiles: list[Profile], runtime: RuntimeName, version: str
    ) -> None:
        self.cuda, self.profiles = cuda, profiles
        self.session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
        self.outputs = {
            output.name: {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}[output.type]
            for output in self.session.get_outputs()
        }
        ports = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.sizes = {
            port.name: tuple(-1 if isinstance(size, str) else size for size in port.shape) for port in ports
        }
        self.loads, self.memory, self.capturable, self.fails = True, True, True, False
        self.raises = ""  # a method of contexts that does
        self.host_code = False  # whether the plan carries code for the host
        self.contexts: list[SimulatedContext] = []
        self.configurations: list[SimulatedRuntimeConfig] = []
        self.lies = 0  # runs whose results are wrong
        self.refused = 0  # recordings
        self.compiled: list[tuple[int, ...]] = []  # shapes that had to wait for kernels of their own
        log = SimpleNamespace(clear=lambda: None, explain=lambda otherwise: otherwise)
        module = SimpleNamespace(
            TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
            nptype=lambda dtype: dtype,
            IProfiler=SimulatedProfiler,
            Runtime=self._runtime,
        )
        self.api = TensorRT(runtime, module, version, log)
        module.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="ours")
        if self.api.is_rtx:
            module.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager", LAZY="lazy")

    def _runtime(self, log: Any) -> Any:
        runtime = SimpleNamespace(engine_host_code_allowed=False)

        def deserialize(content: bytes) -> Any:
            allowed = runtime.engine_host_code_allowed or not self.host_code
            return self._engine() if self.loads and allowed else None

        runtime.deserialize_cuda_engine = deserialize
        return runtime

    def _engine(self) -> Any:
        names = ["image", *self.outputs]
        engine = SimpleNamespace(
            num_io_tensors=len(names),
            get_tensor_name=lambda index: names[index],
            get_tensor_mode=lambda name: "in" if name == "image" else "out",
            get_tensor_dtype=lambda name: self.outputs[name],
        )
        engine.get_tensor_shape = lambda name: self.sizes[name]
        engine.get_device_memory_size_for_profile_v2 = lambda index: self.SCRATCH[index]
        if self.api.is_rtx:
            engine.create_runtime_config = self._configuration
        engine.create_execution_context = self._context
        return engine

    def is_capturable(self, stream: int) -> bool:
        self.refused += not self.capturable
        return self.capturable

    def _configuration(self) -> SimulatedRuntimeConfig:
        self.configurations.append(SimulatedRuntimeConfig(self.api.version))
        return self.configurations[-1]

    def _context(self, configuration: Any) -> Any:
        assert (configuration.strategy if self.api.is_rtx else configuration) == "ours"
        if not self.memory:
            return None
        self.contexts.append(SimulatedContext(self, configuration))
        return ContextHandle(self.contexts[-1])


class SimulatedRuntimeConfig:
    """``IRuntimeConfig`` of TensorRT-RTX."""

    strategy: Any = None
    dynamic_shapes_kernel_specialization_strategy: Any = "lazy"

    def __init__(self, version: str) -> None:
        self.kernels = SimulatedRuntimeCache(version)

    def create_runtime_cache(self) -> SimulatedRuntimeCache:
        return SimulatedRuntimeCache(self.kernels.version)

    def set_runtime_cache(self, kernels: SimulatedRuntimeCache) -> bool:
        self.kernels = kernels
        return True

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy


class SimulatedRuntimeCache:
    """``IRuntimeCache`` of TensorRT-RTX: the shapes that have kernels, for one version."""

    def __init__(self, version: str) -> None:
        self.version, self.shapes = version, set[tuple[int, ...]]()

    def serialize(self) -> bytes:
        return repr((self.version, sorted(self.shapes))).encode()

    def deserialize(self, blob: bytes) -> bool:
        try:
            version, shapes = ast.literal_eval(blob.decode())
        except (ValueError, SyntaxError):
            return False
        if version == self.version:
            self.shapes |= set(shapes)
        return bool(version == self.version)


class SimulatedProfiler:
    """``IProfiler``: the library calls its method once per layer and run."""


class ContextHandle:
    """What the engine holds of a context: memory of the GPU goes with it, as with the real one."""

    def __init__(self, context: SimulatedContext) -> None:
        vars(self)["_context"] = context
        cuda = context.cuda
        with cuda.lock:
            pointer = cuda._allocated(SimulatedTensorRT.CONTEXT)

        def free() -> None:
            with cuda.lock:
                del cuda.memory[pointer]

        weakref.finalize(self, free)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._context, name, value)


class SimulatedContext:
    """Execution context: holds the rules of the real one (profile, shape, memory, addresses before running)."""

    def __init__(self, library: SimulatedTensorRT, configuration: Any) -> None:
        self._library, self.cuda, self._configuration = library, library.cuda, configuration
        # As it was when the context was made.
        self.specialized = getattr(configuration, "dynamic_shapes_kernel_specialization_strategy", "") == "eager"
        self.active_optimization_profile = 0
        self.shape: Any = None
        self.addresses: dict[str, int] = {}
        self.scratch = (0, 0)
        self.state = 0  # changes with whatever a graph depends on
        self.queued = 0  # runs that are not done
        self.profiler: Any = None
        self.runs = 0
        if library.api.is_rtx:
            self.is_stream_capturable = library.is_capturable

    def set_device_memory(self, pointer: int, nbytes: int) -> None:
        with self.cuda.lock:
            self.cuda.require(pointer, nbytes)
        self.scratch = (pointer, nbytes)
        self.state += 1

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._may_raise("set_optimization_profile_async")
        assert not self.queued, "the context is still to run with what is changed"
        self.active_optimization_profile, self.shape = index, None
        self.state += 1
        return True

    def _may_raise(self, method: str) -> None:
        if self._library.raises == method:
            raise RuntimeError(f"{method} failed")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert not self.queued, "the context is still to run with what is changed"
        if not self._library.profiles[self.active_optimization_profile].admits(shape):
            return False
        self.shape = shape
        self.state += 1
        return True

    def infer_shapes(self) -> list[str]:
        self._may_raise("infer_shapes")
        return [] if self.shape is not None else ["image"]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        blank = np.zeros(self.shape, np.uint8)
        return tuple(self._library.session.run([name], {"image": blank})[0].shape)

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        assert pointer % ALIGNMENT == 0
        self.addresses[name] = pointer
        self.state += 1
        return True

    def execute_async_v3(self, stream: int) -> bool:
        library = self._library
        if library.fails:
            return False
        if stream in self.cuda.recording and not library.capturable:
            library.refused += 1
            self.cuda.broken.add(stream)
            return False
        kernels = getattr(self._configuration, "kernels", None)
        if self.specialized and kernels is not None and self.shape not in kernels.shapes:
            library.compiled.append(self.shape)
            kernels.shapes.add(self.shape)
        shape, addresses, state, scratch = self.shape, dict(self.addresses), self.state, self.scratch
        assert scratch[1] >= library.SCRATCH[self.active_optimization_profile], "too little scratch memory"
        recorded = stream in self.cuda.recording
        assert not recorded or self.runs, "a context runs once before it is recorded"

        self.queued += not recorded

        def compute() -> None:
            self.queued -= not recorded
            assert not recorded or self.state == state, "the context was changed after its graph was recorded"
            self.cuda.require(*scratch)
            size = int(np.prod(shape))
            self.cuda.require(addresses["image"], size)
            image = np.frombuffer(ctypes.string_at(addresses["image"], size), np.uint8).reshape(shape)
            results = library.session.run(list(library.outputs), {"image": image})
            if library.lies:
                library.lies -= 1
                results = [np.full_like(result, 99) for result in results]
            for name, result in zip(library.outputs, results, strict=True):
                self.cuda.require(addresses[name], result.nbytes)
                ctypes.memmove(addresses[name], np.ascontiguousarray(result).ctypes.data, result.nbytes)
            if self.profiler is not None:
                self.profiler.report_layer_time("stem + relu", 0.5 if self.runs % 2 else 0.25)
                self.profiler.report_layer_time("head", 0.125)

        self.runs += 1
        self.cuda.queue(stream, compute)
        return True
