"""TensorRT engines on simulated CUDA, with ONNX Runtime as the truth."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest

from hpddrnet_trt.core.manifest import sidecar_path
from hpddrnet_trt.engines import cuda as cuda_memory
from hpddrnet_trt.engines import tensorrt as engine_module
from hpddrnet_trt.engines.profiles import Profile
from hpddrnet_trt.engines.tensorrt import TensorRTEngine
from hpddrnet_trt.export.tensorrt import build_engine
from tests.engines.simulated_cuda import SimulatedCuda, array_reader
from tests.engines.simulated_tensorrt import SimulatedTensorRT
from tests.tiny_onnx import QUIET, tiny_model

if TYPE_CHECKING:
    from tests.triton_server import Server

SHAPES = "1x1x64x64:1x1x128x128:2x1x256x256,4x1x512x512"


@pytest.fixture
def triton_server() -> Iterator[Server]:
    """A running server without models; what it registered of this PC's memory is taken back in the end."""
    pytest.importorskip("tritonclient.grpc")
    from tests.triton_server import Server

    server = Server()
    server.start()
    yield server
    left = list(server.regions)
    server.stop()
    assert left == []


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ONNX and engine files by output kind, built by the real TensorRT-RTX."""
    for name in ("tensorrt_rtx", "cuda.bindings", "cuda.core"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name}, which this test uses without a GPU, is missing")
    folder = tmp_path_factory.mktemp("engines")
    found = {}
    for kind in ("labels", "logits"):
        source = tiny_model(folder / f"{kind}.onnx", output=kind, domain=kind == "logits")  # type: ignore[arg-type]
        build_engine(
            source,
            folder / f"{kind}.engine",
            precision="fp32",
            runtime="tensorrt-rtx",
            shapes=SHAPES,
            settings=QUIET,
        )
        found[kind] = folder / f"{kind}.engine"
    return found


def noise(*shape: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Images of noise."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


class Bench:
    """An engine on simulated CUDA, with ONNX Runtime as the truth."""

    def __init__(self, cuda: SimulatedCuda, library: SimulatedTensorRT, engine: TensorRTEngine, path: Path) -> None:
        self.cuda, self.library, self.engine, self.path = cuda, library, engine, path
        self._session = library.session

    def truth(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        return np.asarray(self._session.run(None, {"image": images})[0])

    def check(self, images: npt.NDArray[np.uint8], labels: npt.NDArray[Any]) -> None:
        """``labels`` (or logits, as the engine's file gives) are exactly those of ``images``."""
        np.testing.assert_array_equal(labels, self.truth(images))

    def check_infer(self, images: npt.NDArray[np.uint8]) -> None:
        """The engine gives exactly the labels of ``images``."""
        self.check(images, self.engine.infer(images).labels)

    def count(self, operation: str) -> int:
        """How often a stream operation was logged."""
        return sum(entry[0] == operation for entry in self.cuda.log)


@pytest.fixture
def bench(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bench]:
    real = cuda_memory.cudart()

    def start(kind: str = "labels", version: str | None = None, **options: Any) -> Bench:
        """``version``: of TensorRT, in place of the TensorRT-RTX that built the file."""
        onnx_file, path = models[kind].with_suffix(".onnx"), tmp_path / f"{kind}.engine"
        path.write_bytes(models[kind].read_bytes())
        description = json.loads(sidecar_path(models[kind]).read_text())
        record = description["engine"]
        if version is not None:
            record.update(runtime="tensorrt", version=version, compute_capabilities=["8.9"])
        sidecar_path(path).write_text(json.dumps(description))
        cuda = SimulatedCuda(real)
        monkeypatch.setattr(cuda_memory, "cudart", lambda: cuda)
        monkeypatch.setattr(cuda_memory, "cuda_driver", lambda: cuda)
        monkeypatch.setattr(cuda_memory, "strided_memory_view", lambda: array_reader(cuda))
        profiles = [Profile.from_record(entry) for entry in record["profiles"]]
        library = SimulatedTensorRT(cuda, onnx_file, profiles, record["runtime"], record["version"])
        monkeypatch.setattr(engine_module, "load_tensorrt", lambda name: library.api)
        return Bench(cuda, library, TensorRTEngine(path, **options), path)

    return start
