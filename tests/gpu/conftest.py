"""GPU tests run where a GPU and a TensorRT library are, and say why they are skipped elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from hpddrnet_trt.core.errors import MissingDependency, NoGpu, UserError
from hpddrnet_trt.engines.cuda import Gpu, find_gpu
from hpddrnet_trt.engines.tensorrt import TensorRTEngine
from hpddrnet_trt.engines.tensorrt_library import RuntimeName, load_tensorrt
from hpddrnet_trt.export.tensorrt import build_engine
from tests.tiny_onnx import QUIET, tiny_model


@pytest.fixture(scope="session")
def require_gpu() -> Gpu:
    """The GPU, or a skip with the reason."""
    try:
        return find_gpu()
    except (NoGpu, MissingDependency) as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="session", params=get_args(RuntimeName))
def runtime(request: pytest.FixtureRequest, require_gpu: Gpu, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Each installed library that can run an engine on this GPU."""
    name: RuntimeName = request.param
    try:
        load_tensorrt(name)
    except MissingDependency as exc:
        pytest.skip(str(exc))
    folder: Path = tmp_path_factory.mktemp("probe")
    source = tiny_model(folder / "probe.onnx", shape=(1, 64, 64))
    try:
        build_engine(source, folder / "probe.engine", precision="fp32", runtime=name, settings=QUIET)
        TensorRTEngine(folder / "probe.engine").close()
    except UserError as exc:
        if name == "tensorrt":  # supports every current GPU; TensorRT-RTX names the ones it runs on
            raise
        pytest.skip(f"{name} does not run on {require_gpu.name}: {exc}")
    return name
