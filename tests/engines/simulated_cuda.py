"""Enough of the CUDA runtime and of TensorRT's runtime to follow our control flow without a GPU.

Device memory is host memory at checked addresses; an execution context runs the ONNX file on ONNX
Runtime, reading and writing only the addresses it was given. What a real GPU adds (timing, real
streams, real kernels) is tested in tests/gpu.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from hpddrnet_trt.engines.shapes import Profile

ALIGNMENT = 256


class SimulatedCuda:
    """Stands in for ``cuda.bindings.runtime``; ``log`` lists stream operations in order."""

    cudaStreamNonBlocking = 1
    cudaEventDisableTiming = 2

    def __init__(self, real: Any, name: str = "Simulated", capability: tuple[int, int] = (8, 9)) -> None:
        self.cudaError_t, self.cudaMemcpyKind = real.cudaError_t, real.cudaMemcpyKind
        self.ok = real.cudaError_t.cudaSuccess
        self.name, self.capability = name, capability
        self.memory: dict[int, tuple[Any, int]] = {}
        self.log: list[tuple[Any, ...]] = []
        self.current, self.count, self.allocations = 0, 2, 0
        self._handles = 1000

    def cudaGetDeviceCount(self) -> tuple[Any, int]:
        return self.ok, self.count

    def cudaGetDeviceProperties(self, index: int) -> tuple[Any, Any]:
        major, minor = self.capability
        return self.ok, SimpleNamespace(name=f"{self.name} {index}".encode(), major=major, minor=minor)

    def cudaGetDevice(self) -> tuple[Any, int]:
        return self.ok, self.current

    def cudaSetDevice(self, index: int) -> tuple[Any]:
        self.current = index
        return (self.ok,)

    def cudaMalloc(self, nbytes: int) -> tuple[Any, int]:
        raw = ctypes.create_string_buffer(nbytes + ALIGNMENT)
        pointer = -(-ctypes.addressof(raw) // ALIGNMENT) * ALIGNMENT
        self.memory[pointer] = (raw, nbytes)
        self.allocations += 1
        return self.ok, pointer

    cudaMallocHost = cudaMalloc

    def cudaFree(self, pointer: int) -> tuple[Any]:
        del self.memory[pointer]  # a double or foreign free is a KeyError
        return (self.ok,)

    cudaFreeHost = cudaFree

    def cudaPointerGetAttributes(self, pointer: int) -> tuple[Any, Any]:
        return self.ok, SimpleNamespace(device=0)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, int]:
        self._handles += 1
        return self.ok, self._handles

    cudaEventCreateWithFlags = cudaStreamCreateWithFlags

    def cudaStreamDestroy(self, handle: int) -> tuple[Any]:
        self.log.append(("destroy", handle))
        return (self.ok,)

    cudaEventDestroy = cudaStreamDestroy

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any]:
        self.log.append(("synchronise", stream))
        return (self.ok,)

    def cudaEventRecord(self, event: int, stream: int) -> tuple[Any]:
        self.log.append(("record", stream))
        return (self.ok,)

    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[Any]:
        self.log.append(("wait", stream))
        return (self.ok,)

    def cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: Any, stream: int) -> tuple[Any]:
        self.require(target, nbytes)
        self.log.append(("copy", nbytes))
        ctypes.memmove(target, source, nbytes)
        return (self.ok,)

    def require(self, pointer: int, nbytes: int) -> None:
        """The whole range must lie in memory that was allocated here and not freed."""
        assert any(start <= pointer and pointer + nbytes <= start + size for start, (_, size) in self.memory.items())

    def array(self, values: npt.NDArray[Any], offset: int = 0) -> ForeignArray:
        """An array "on the GPU", as another library would hold it; ``offset`` bytes into its allocation."""
        _, pointer = self.cudaMalloc(values.nbytes + offset)
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


def read(array: Any) -> npt.NDArray[Any]:
    """Copy an array with the CUDA array interface out of simulated device memory."""
    interface = array.__cuda_array_interface__
    dtype, shape = np.dtype(interface["typestr"]), interface["shape"]
    return np.frombuffer(
        ctypes.string_at(interface["data"][0], int(np.prod(shape)) * dtype.itemsize), dtype
    ).reshape(shape)  # fmt: skip


class SimulatedTensorRT:
    """Stands in for :class:`~hpddrnet_trt.engines.tensorrt_api.TensorRT`."""

    label = "Simulated TensorRT"

    def __init__(self, cuda: SimulatedCuda, onnx_file: Path, profiles: list[Profile], version: str) -> None:
        self.version = version
        self.module = SimpleNamespace(
            TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
            nptype=lambda dtype: dtype,
            IProfiler=SimulatedProfiler,
        )
        self.log = SimpleNamespace(clear=lambda: None, explain=lambda otherwise: otherwise)
        self.context = SimulatedContext(cuda, onnx_file, profiles)
        self.loads = True

    def runtime(self) -> Any:
        names = ["image", *self.context.outputs]
        engine = SimpleNamespace(
            num_io_tensors=len(names),
            get_tensor_name=lambda index: names[index],
            get_tensor_mode=lambda name: "in" if name == "image" else "out",
            get_tensor_dtype=lambda name: self.context.outputs[name],
            create_execution_context=lambda: self.context,
        )
        return SimpleNamespace(deserialize_cuda_engine=lambda content: engine if self.loads else None)


class SimulatedProfiler:
    """``IProfiler``: the library calls its method once per layer and run."""


class SimulatedContext:
    """Execution context: holds the rules of the real one (profile, shape, addresses before running)."""

    def __init__(self, cuda: SimulatedCuda, onnx_file: Path, profiles: list[Profile]) -> None:
        self._cuda, self._profiles = cuda, profiles
        self._session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
        self.outputs = {
            output.name: {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}[output.type]
            for output in self._session.get_outputs()
        }
        self.profile, self.shape, self.addresses = 0, None, {}
        self.fails = False
        self.profiler: Any = None
        self.runs = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile, self.shape = index, None
        return 0 <= index < len(self._profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if not self._profiles[self.profile].admits(shape):
            return False
        self.shape = shape
        return True

    def infer_shapes(self) -> list[str]:
        return [] if self.shape is not None else ["image"]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch, _, height, width = self.shape
        return (batch, height, width) if name == "labels" else (batch, 3, height, width)

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        assert pointer % ALIGNMENT == 0
        self.addresses[name] = pointer
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self.fails:
            return False
        image = np.frombuffer(ctypes.string_at(self.addresses["image"], int(np.prod(self.shape))), np.uint8)
        self._cuda.require(self.addresses["image"], image.nbytes)
        results = self._session.run(list(self.outputs), {"image": image.reshape(self.shape)})
        for name, result in zip(self.outputs, results, strict=True):
            assert result.shape == self.get_tensor_shape(name)
            self._cuda.require(self.addresses[name], result.nbytes)
            ctypes.memmove(self.addresses[name], np.ascontiguousarray(result).ctypes.data, result.nbytes)
        self.runs += 1
        if self.profiler is not None:
            self.profiler.report_layer_time("stem + relu", 0.5 if self.runs % 2 else 0.25)
            self.profiler.report_layer_time("head", 0.125)
        return True
