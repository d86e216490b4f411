"""A small comparison of real engines, measured once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpddrnet_trt.benchmark import measures
from hpddrnet_trt.benchmark.entries import Entry
from hpddrnet_trt.benchmark.images import Image, ImageSet
from hpddrnet_trt.benchmark.result import BenchmarkResult, Settings
from hpddrnet_trt.benchmark.run import run_benchmark
from tests.tiny_onnx import CLASSES, tiny_model


def image_set(masks: bool = True) -> ImageSet:
    """Three images of different sizes, two of them not multiples of 8."""
    rng = np.random.default_rng(5)
    images = []
    for index, shape in enumerate(((40, 56), (33, 47), (24, 24))):
        grey = rng.integers(0, 256, shape, dtype=np.uint8)
        mask = rng.integers(0, 3, shape, dtype=np.uint8)
        mask[:2] = 255
        images.append(Image(f"image-{index}", grey, mask if masks else None))
    return ImageSet("noise/test", images, CLASSES if masks else None)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``fp32.onnx``, ``int8.onnx``, a file cut short, and an engine file that nothing here can run."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model(folder / "fp32.onnx")
    tiny_model(folder / "int8.onnx", typing="int8")
    (folder / "cut.onnx").write_bytes((folder / "fp32.onnx").read_bytes()[:300])
    (folder / "lonely.engine").write_bytes(b"an engine without its description")
    return folder


@pytest.fixture(scope="session")
def measured(models: Path) -> BenchmarkResult:
    entries = [
        Entry("plain", models / "fp32.onnx"),
        Entry("small", models / "int8.onnx"),
        Entry("cut", models / "cut.onnx"),
        Entry("lonely", models / "lonely.engine"),
    ]
    plan = Settings(
        sizes=((32, 48), (64, 64)), memory_sizes=((96, 96),), batches=(1, 2), rounds=6, warmup=1, threads=1,
        reference="plain", pause_ms=0, burst_ms=1, gallery=2,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "ROUND_S", 0.01)
        return run_benchmark(entries, image_set(), plan, command="python benchmark.py", progress=False)
