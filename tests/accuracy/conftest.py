"""A small FP32 network, and a dataset whose masks are its labels with some noise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpddrnet_trt.accuracy.candidates import QuantizationConfig
from hpddrnet_trt.data.simulate import simulate
from hpddrnet_trt.graph import qdq
from hpddrnet_trt.graph.model import load_model
from hpddrnet_trt.graph.nodes import name_nodes
from hpddrnet_trt.inference import load_segmenter
from tests.accuracy.small_dataset import dataset, segmenter
from tests.graph.residual_onnx import residual_model

__all__ = ["dataset", "segmenter"]

SIZE = 96
COUNTS = {"train": 6, "val": 3, "test": 2}


@pytest.fixture(scope="session")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network of tests/graph/residual_onnx.py: stem, residual block, gate, attention, classifier."""
    return residual_model(tmp_path_factory.mktemp("fp32") / "model.onnx")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, fp32: Path) -> Path:
    """Simulated micrographs; 5 % of each mask's pixels carry another class."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(5)
    with load_segmenter(fp32) as segmenter:
        classes = segmenter.manifest.classes
        seed = 0
        for split, count in COUNTS.items():
            for index in range(count):
                seed += 1
                image = simulate(SIZE, SIZE, seed)[0]
                mask = segmenter.segment(image).labels
                wrong = rng.random(mask.shape) < 0.05
                mask[wrong] = (mask[wrong] + 1) % len(classes)
                for kind, picture in (("images", image), ("masks", mask)):
                    path = root / kind / split / f"{index}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(picture).save(path)
    table = [{"index": i, "name": entry.name, "color": [50 * i, 0, 0]} for i, entry in enumerate(classes)]
    (root / "dataset.json").write_text(json.dumps({"name": "simulated", "classes": table}))
    return root


@pytest.fixture(scope="session")
def config(fp32: Path) -> QuantizationConfig:
    """The network with every layer that can be quantised, all ranges alike."""
    model, manifest = load_model(fp32)
    name_nodes(model)
    plan = qdq.plan(model, "tensorrt")
    return QuantizationConfig(model, manifest, plan, dict.fromkeys(plan.tensors, (-6.0, 6.0)))
