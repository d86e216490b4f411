"""Time that Python spends around one TensorRT inference: `python benchmarks/python_overhead.py [MODEL.engine]`.

Median time of `engine.infer` minus copying frame and labels in memory. Without an engine, CUDA and
TensorRT are stand-ins that do nothing (it runs on any PC): what remains is this package's own share of each
frame. With one, the time inside CUDA's calls is measured and subtracted; that inside TensorRT's is not.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from hpddrnet_trt.core.manifest import (
    ClassInfo,
    EngineRecord,
    InputContract,
    Manifest,
    NetworkConfig,
    OutputContract,
    sidecar_path,
)
from hpddrnet_trt.engines import cuda as cuda_memory
from hpddrnet_trt.engines import cuda_graph, tensorrt
from hpddrnet_trt.engines import tensorrt_context as tensorrt_slots
from hpddrnet_trt.engines.tensorrt_library import TensorRT

TARGET_US = 50  # of one frame


class NoCuda:
    """`cuda.bindings.runtime` and `.driver` that do nothing at once; only memory on the host is real."""

    def __init__(self) -> None:
        self._memory: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        special = {
            "cudaError_t": SimpleNamespace(cudaSuccess=0),
            "cudaMemcpyKind": SimpleNamespace(cudaMemcpyDefault=4),
            "cudaStreamCaptureMode": SimpleNamespace(cudaStreamCaptureModeThreadLocal=1),
            "cudaGetDeviceProperties": lambda index: (0, SimpleNamespace(name=b"nothing", major=8, minor=9)),
            "cudaMallocHost": self._allocate,
            "cudaMalloc": self._allocate,
            "cudaGetDevice": lambda: (0, 0),
            "cudaGraphLaunch": lambda graph, stream: (0,),
            "cudaStreamSynchronize": lambda stream: (0,),
            "cuCtxPushCurrent": lambda context: (0,),
            "cuCtxPopCurrent": lambda: (0, 1),
        }
        value = special.get(name, 1 if name.endswith(("NonBlocking", "Timing")) else lambda *_: (0, 1))
        setattr(self, name, value)  # looked up once
        return value

    def _allocate(self, nbytes: int) -> tuple[int, int]:
        self._memory.append(ctypes.create_string_buffer(nbytes + 256))
        return 0, -(-ctypes.addressof(self._memory[-1]) // 256) * 256


def stand_in(folder: Path, size: int) -> tuple[Path, TensorRT]:
    """An engine file of nothing, and a library that runs it by doing nothing."""
    shape = [1, 1, size, size]
    content = b"nothing"
    path = folder / "nothing.engine"
    path.write_bytes(content)
    record = EngineRecord(
        flavour="tensorrt", version="10.0.0", compute_capabilities=["8.9"], gpu="nothing",
        profiles=[{"min": shape, "opt": shape, "max": shape}], sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content), precision_proof={}, build_seconds=0.0,
    )  # fmt: skip
    manifest = Manifest(
        network=NetworkConfig(num_classes=3),
        classes=[ClassInfo(name=name, color=(0, 0, 0)) for name in "abc"],
        input=InputContract(), output=OutputContract(), precision="fp16", engine=record,
    )  # fmt: skip
    sidecar_path(path).write_text(manifest.to_json(), encoding="utf-8")
    context = SimpleNamespace(
        active_optimization_profile=0, set_device_memory=lambda pointer, nbytes: None,
        set_input_shape=lambda name, shape: True, infer_shapes=list, get_tensor_shape=lambda name: (1, size, size),
        set_tensor_address=lambda name, pointer: True, execute_async_v3=lambda stream: True,
    )  # fmt: skip
    engine = SimpleNamespace(
        num_io_tensors=2, get_tensor_name=lambda index: ("image", "labels")[index],
        get_tensor_mode=lambda name: name == "image", get_tensor_dtype=lambda name: np.uint8,
        device_memory_size_v2=1, create_execution_context=lambda strategy: context,
    )  # fmt: skip
    module = SimpleNamespace(
        TensorIOMode=SimpleNamespace(INPUT=True), nptype=lambda dtype: dtype,
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=2),
        Runtime=lambda log: SimpleNamespace(deserialize_cuda_engine=lambda plan: engine),
    )  # fmt: skip
    log = SimpleNamespace(clear=lambda: None, explain=lambda otherwise: otherwise)
    return path, TensorRT("tensorrt", module, "10.0.0", log)


class TimedCuda:
    """The real `cuda.bindings.runtime` or `.driver`; time inside the functions of both adds up in `inside`, in ns."""

    inside = 0

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        if name.startswith("cu") and callable(value) and not isinstance(value, type):
            value = self._timed(value)
        setattr(self, name, value)
        return value

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            started = time.perf_counter_ns()
            result = function(*arguments)
            TimedCuda.inside += time.perf_counter_ns() - started
            return result

        return call


def _median_us(work: Callable[[], int], runs: int) -> float:
    """Microseconds of ``work``, without the nanoseconds that it returns."""
    times = []
    for _ in range(runs + 10 * tensorrt_slots.WARM_UP):
        started = time.perf_counter_ns()
        elsewhere = work()
        times.append(time.perf_counter_ns() - started - elsewhere)
    return statistics.median(times[-runs:]) / 1000


def measure(path: Path, size: int, runs: int) -> None:
    """Print the medians of one frame."""
    with tensorrt.TensorRTEngine(path) as engine:
        frame = np.random.default_rng(0).integers(0, 256, (1, 1, size, size), dtype=np.uint8)
        labels, result, pinned = frame[:, 0].copy(), frame[:, 0].copy(), frame.copy()

        def infer() -> int:
            inside = TimedCuda.inside
            engine.infer(frame, out=labels)
            return TimedCuda.inside - inside

        def copy() -> int:
            np.copyto(pinned, frame)
            np.copyto(labels, result)
            return 0

        spent, moved = _median_us(infer, runs), _median_us(copy, runs)
        print(f"{engine.runtime}, {size}x{size}, median of {runs} frames:")
        print(f"  infer without CUDA {spent:.1f} us, of which copying frame and labels {moved:.1f} us")
        print(f"  Python's overhead {spent - moved:.1f} us (target: below {TARGET_US} us)")


def _same(value: Any, *_: Any) -> Any:
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", nargs="?", type=Path, help="engine file, for a machine with a GPU")
    parser.add_argument("--size", type=int, default=64, help="height and width; large copies are noisy")
    parser.add_argument("--runs", type=int, default=2000)
    options = parser.parse_args()
    with ExitStack() as stack:
        if options.engine is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            path, library = stand_in(folder, options.size)
            stack.enter_context(mock.patch.object(tensorrt, "load_flavour", partial(_same, library)))
            runtime: Any = NoCuda()
            driver: Any = runtime
        else:
            path = options.engine
            runtime, driver = TimedCuda(cuda_memory.cudart()), TimedCuda(cuda_memory.cuda_driver())
        for module in (cuda_memory, cuda_graph):
            stack.enter_context(mock.patch.object(module, "cudart", partial(_same, runtime)))
        stack.enter_context(mock.patch.object(cuda_memory, "cuda_driver", partial(_same, driver)))
        measure(path, options.size, options.runs)


if __name__ == "__main__":
    main()
