"""The small form of a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from hpddrnet_trt.data.simulate import simulate
from hpddrnet_trt.engines import load_engine
from hpddrnet_trt.export.shipping import ship, store_in_half
from hpddrnet_trt.models.checkpoints import load_checkpoint, save_checkpoint
from tests.tiny_network import tiny_manifest, tiny_network

pytestmark = pytest.mark.usefixtures("one_thread")


def test_ship_writes_half_the_bytes_and_the_same_labels(tmp_path: Path) -> None:
    network = tiny_network(channels=8, detail=True)
    source = save_checkpoint(tmp_path / "run.safetensors", network, tiny_manifest(network))
    files = ship(source, tmp_path / "out", name="small")
    assert [path.name for path in files] == ["small.safetensors", "small.onnx"]
    assert files.checkpoint.stat().st_size < 0.6 * source.stat().st_size
    rounded, manifest = load_checkpoint(files.checkpoint)
    assert manifest.name == "small"
    for name, value in network.state_dict().items():
        stored = rounded.state_dict()[name]
        assert stored.dtype == value.dtype
        assert torch.equal(stored, value if value.ndim < 2 else value.half().float())
    image = simulate(64, 96, seed=0)[0][None, None]
    with load_engine(files.onnx) as deployed, load_engine(files.checkpoint) as reference:
        assert np.mean(deployed.infer(image).labels == reference.infer(np.ascontiguousarray(image)).labels) > 0.999


def test_only_large_constants_that_fit_are_stored_in_half() -> None:
    values = {
        "large": np.full((64, 64), 0.1, np.float32), "small": np.ones((2, 2), np.float32),
        "huge": np.full((64, 64), 1e6, np.float32), "vector": np.ones(4096, np.float32),
        "indices": np.ones((64, 64), np.int64),
    }  # fmt: skip
    graph = onnx.GraphProto()
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    model = onnx.ModelProto(graph=graph)
    store_in_half(model)
    types = {entry.name: entry.data_type for entry in model.graph.initializer}
    assert types == {"large.half": TensorProto.FLOAT16, "small": 1, "huge": 1, "vector": 1, "indices": 7}
    (cast,) = model.graph.node
    assert (list(cast.input), list(cast.output)) == (["large.half"], ["large"])
