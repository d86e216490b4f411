"""Precision on a real GPU: the gate runs the engine itself, the simulation is close to it, layers are timed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpddrnet_trt.accuracy.acceptance import WHAT, AcceptanceCheck, Budget
from hpddrnet_trt.accuracy.build import build_verified
from hpddrnet_trt.accuracy.cost import by_convolution
from hpddrnet_trt.accuracy.evaluator import AccuracyEvaluator
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.engines.tensorrt import TensorRTEngine
from hpddrnet_trt.export.calibrate import calibrate
from hpddrnet_trt.graph.model import load_model
from hpddrnet_trt.inference import load_segmenter
from hpddrnet_trt.weights import locate
from tests.tiny_onnx import QUIET

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("require_gpu")]

MODEL = "nasa-super1"
SHAPES = "1x1x512x512:1x1x512x512:1x1x512x512"


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory, sem_data: Path) -> Path:
    target = tmp_path_factory.mktemp("int8") / "m.int8.onnx"
    calibrate(locate(MODEL, ".onnx"), target, sorted((sem_data / MODEL / "images" / "train").iterdir()))
    return target


@pytest.fixture(scope="module")
def engine(int8: Path, runtime: str, sem_data: Path) -> Path:
    target = int8.with_name(f"{runtime}.engine")
    manifest = build_verified(
        int8, target, precision="int8", runtime=runtime, shapes=SHAPES, settings=QUIET,
        acceptance=AcceptanceCheck(sem_data / MODEL, Budget(max_miou_drop=0.5), reference=locate(MODEL, ".onnx")),
    )  # fmt: skip
    evidence = manifest.validation[-1]
    assert evidence.what == WHAT
    assert "onnxruntime" not in evidence.runtime  # the engine itself was judged
    assert manifest.engine is not None
    assert manifest.engine.layer_precision["reformats"]["layers"] > 0
    return target


def test_the_simulation_is_close_to_the_engine(engine: Path, int8: Path, sem_data: Path) -> None:
    dataset = FolderDataset.open(sem_data / MODEL)
    with load_segmenter(engine) as run, AccuracyEvaluator(dataset, "test", run, progress=False) as judge:
        found = judge.score_graph(*load_model(int8))
    assert found.agreement > 0.998
    assert abs(found.drop) < 0.3


def test_layer_times_name_the_convolutions(engine: Path, int8: Path) -> None:
    with TensorRTEngine(engine) as run:
        times = run.layer_times(np.zeros((1, 1, 512, 512), np.uint8), runs=10)
    assert sum(times.values()) > 0
    names = [node.name for node in load_model(int8)[0].graph.node if node.op_type == "Conv"]
    shared = by_convolution(times, names)
    assert sum(value > 0 for value in shared.values()) > len(names) // 2
