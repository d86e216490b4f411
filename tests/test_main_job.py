"""The main job through the recipes: train, evaluate, export, calibrate, build, segment, benchmark.

A small network and few steps, but real micrographs (simulated ones without the reference data), the
real TensorRT-RTX builder and every runtime that is installed. Stages run as a person runs them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpddrnet_trt.core.manifest import read_manifest
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.data.simulate import write_dataset

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = [
    "network={channels: 8, ppm_channels: 16, head_channels: 16, detail: true, pool_border: ignored}",
    "augmentation.crop=[64, 64]",
    "optimization.max_steps=30", "optimization.warmup_steps=5", "optimization.ema_decay=0.9", "run.val_every=30",
    "run.checkpoint_every=30", "run.workers=0", "run.progress=false", "data.simulated.size=128",
]  # fmt: skip


def call(folder: Path, *arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    real = Path(os.environ.get("HPDDRNET_SHARED", REPOSITORY.parent / "shared")) / "data" / "nasa-super1"
    if real.is_dir():
        return real.resolve()
    folder = tmp_path_factory.mktemp("simulated") / "data"
    write_dataset(folder, train=4, val=1, test=1, size=128, seed=0)
    return folder


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A folder in which the stages have run, up to the engines."""
    folder = tmp_path_factory.mktemp("job")
    said = call(folder, REPOSITORY / "train/train.py", data, "--recipe", "demo", "run.name=t", *TINY)
    assert "next: hpddrnet-trt segment MICROGRAPHS --model runs/t/t.onnx" in said
    for name, made in (("t.safetensors", "t.safetensors"), ("model.onnx", "t.onnx")):
        (folder / name).write_bytes((folder / "runs" / "t" / made).read_bytes())
    for name, form in (("model.int8.onnx", "tensorrt"), ("model.int8-cpu.onnx", "onnxruntime")):
        # A network of 30 steps is unsure of many pixels: what is tested here is the path, not accuracy.
        call(
            folder, REPOSITORY / "export/calibrate.py", "model.onnx", name, "--data", data, "--runtime", form,
            "--max-images", "4", "--min-agreement", "0.5",
        )  # fmt: skip
    for source, precision in (("model.onnx", "fp32"), ("model.onnx", "fp16"), ("model.int8.onnx", "int8")):
        call(
            folder, REPOSITORY / "export/build_engine.py", source, "--precision", precision,
            "--runtime", "tensorrt-rtx", "--shapes", "1x1x64x64:1x1x128x128:2x1x512x512",
        )  # fmt: skip
    return folder


def test_every_stage_leaves_its_file_with_its_description(job: Path, data: Path) -> None:
    dataset = FolderDataset.open(data)
    expected = {
        "t.safetensors": None,
        "model.onnx": "fp32",
        "model.int8.onnx": "int8",
        "model.int8-cpu.onnx": "int8",
        "model.fp32.engine": "fp32",
        "model.fp16.engine": "fp16",
        "model.int8.engine": "int8",
    }
    for name, precision in expected.items():
        manifest = read_manifest(job / name)
        assert manifest.precision == precision
        assert manifest.class_names == dataset.class_names
        assert manifest.data is not None
        assert manifest.data.sha256 == dataset.checksum()
    engine = read_manifest(job / "model.int8.engine").engine
    assert engine is not None
    assert engine.layer_precision["convolutions"]["int8"] > 40
    assert not [path.name for path in job.iterdir() if ".tmp" in path.name]


def test_fp32_export_gives_the_labels_of_pytorch(job: Path, data: Path) -> None:
    figures = []
    for name in ("t.safetensors", "model.onnx"):
        call(job, REPOSITORY / "train/evaluate.py", name, "--data", data, "--json", f"{name}.json")
        figures.append(json.loads((job / f"{name}.json").read_text()))
    assert figures[0]["iou"] == pytest.approx(figures[1]["iou"], abs=1e-4)
    assert figures[0]["pixel_accuracy"] == pytest.approx(figures[1]["pixel_accuracy"], abs=1e-4)


def test_segment_and_benchmark(job: Path, data: Path) -> None:
    call(job, "-m", "hpddrnet_trt", "segment", data, "--output", "labels", "--model", "model.onnx")
    dataset = FolderDataset.open(data)
    for sample in dataset.split("test"):
        with Image.open(job / "labels" / f"{sample.name}.png") as labels, Image.open(sample.image) as image:
            assert labels.size == image.size
            assert np.asarray(labels).max() < len(dataset.classes)
    out = call(
        job, REPOSITORY / "benchmarks/benchmark.py", ".", "--data", data, "--size", "64x64", "--rounds", "3",
        "-o", "report",
    )  # fmt: skip
    result = json.loads((job / "report" / "result.json").read_text())
    rows = {row["label"]: row["status"] for row in result["rows"]}
    assert rows["PyTorch FP32"] == "measured"
    assert rows["ONNX Runtime FP32"] == "measured"
    assert sum("TensorRT-RTX" in label for label in rows) == 3
    assert all(label in out for label in rows)
    assert "<html" in (job / "report" / "report.html").read_text()
