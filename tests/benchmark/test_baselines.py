"""The baselines: set up as their users would, and giving the reference's labels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from hpddrnet_trt.benchmark import baselines
from hpddrnet_trt.benchmark.baselines import baseline_entries, export_plain
from hpddrnet_trt.benchmark.entries import Entry
from hpddrnet_trt.benchmark.measures import end_to_end
from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.manifest import read_manifest
from hpddrnet_trt.data.micrograph import read_micrograph
from hpddrnet_trt.engines import EngineStatus, load_engine
from hpddrnet_trt.graph.layers import group_of
from hpddrnet_trt.models.checkpoints import save_checkpoint
from hpddrnet_trt.weights import locate
from tests.tiny_network import lively, tiny_manifest, tiny_network

SIZE = (192, 256)
CHECKPOINT = locate("nasa-super1", ".safetensors")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Entry]:
    found = baseline_entries(CHECKPOINT, tmp_path_factory.mktemp("baselines"), size=SIZE)
    return {entry.label: entry for entry in found}


@pytest.fixture(scope="module")
def frame(sem_data: Path) -> npt.NDArray[np.uint8]:
    """A part of a real micrograph, ``[1, H, W]``."""
    file = sorted((sem_data / "nasa-super1" / "images" / "test").iterdir())[0]
    pixels = read_micrograph(file).pixels
    grey = pixels if pixels.ndim == 2 else pixels[..., 0]
    return np.ascontiguousarray(grey[None, : SIZE[0], : SIZE[1]])


@pytest.fixture(scope="module")
def reference(frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    with load_engine(CHECKPOINT, "torch", device="cpu", threads=1) as engine:
        return end_to_end(engine)(frame)


@pytest.mark.parametrize(
    ("label", "least"),
    [("PyTorch AMP channels last", 0.998), ("ONNX Runtime plain export", 0.9999), ("OpenVINO plain export", 0.998)],
)
def test_labels_are_the_references(
    entries: dict[str, Entry], frame: npt.NDArray[np.uint8], reference: npt.NDArray[np.uint8], label: str, least: float
) -> None:
    if label not in entries:
        pytest.skip(f"{label.split()[0]} is an optional extra and not installed")
    entry = entries[label]
    with load_engine(entry.path, entry.engine, threads=1, **entry.options) as engine:
        labels = end_to_end(engine)(frame)
        engine.bind(np.zeros((1, 3, *SIZE), np.float32) if entry.path.suffix == ".onnx" else frame[:, None])()
    assert len(np.unique(reference)) > 1
    assert (labels == reference).mean() > least


def test_entries_for_their_users(entries: dict[str, Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = {label: entry.options for label, entry in entries.items() if "compile" in entry.options}
    assert [(label, given["compile"], given.get("autocast")) for label, given in compiled.items()] == [
        ("PyTorch compiled", "max-autotune", None), ("PyTorch compiled AMP", "max-autotune", "bf16"),
    ]  # fmt: skip
    assert all(entry.options["output"] == "labels" for entry in entries.values() if entry.engine == "torch")
    assert not any(entry.can_be_reference for entry in entries.values())
    assert entries["ONNX Runtime plain export"].options["defaults"] is True
    monkeypatch.setattr(baselines, "export_plain", lambda *_, **__: None)
    for usable in (True, False):  # only what is installed
        monkeypatch.setattr(baselines, "engine_status", lambda name, usable=usable: EngineStatus(usable, ""))
        made = baseline_entries(CHECKPOINT, tmp_path, size=(64, 96), batch=2)
        assert ("openvino" in {entry.engine for entry in made}) == usable


def test_plain_export_is_the_authors_network(tmp_path: Path) -> None:
    network = lively(tiny_network())
    checkpoint = save_checkpoint(tmp_path / "tiny.safetensors", network, tiny_manifest(network))
    manifest = export_plain(checkpoint, tmp_path / "plain.onnx", size=(64, 96), batch=2)
    assert read_manifest(tmp_path / "plain.onnx") == manifest
    assert (manifest.attention, manifest.precision) == ("plain", "fp32")
    graph = onnx.load(str(tmp_path / "plain.onnx")).graph
    shapes = [[dim.dim_value for dim in entry.type.tensor_type.shape.dim] for entry in (*graph.input, *graph.output)]
    assert shapes == [[2, 3, 64, 96], [2, 3, 64, 96]]
    operators = Counter(node.op_type for node in graph.node)
    assert operators["Softmax"] == 2
    assert operators["MatMul"] + operators["Gemm"] == 2 * (4 + 2)  # four projections, two products
    assert "ArgMax" not in operators
    groups = {group_of(node.name) for node in graph.node}
    assert {"stem", "position attention", "head", "output"} <= groups
    images = np.random.default_rng(0).normal(size=(2, 3, 64, 96)).astype(np.float32)
    options: dict[str, Any] = {"device": "cpu", "threads": 1}
    with (
        load_engine(tmp_path / "plain.onnx", "onnxruntime", defaults=True, **options) as exported,
        load_engine(checkpoint, "torch", input_dtype="float32", **options) as reference,
    ):
        found, expected = exported.infer(images), reference.infer(images)
    assert np.abs(found.logits - expected.logits).max() < 1e-4
    np.testing.assert_array_equal(found.labels, expected.labels)


@pytest.mark.parametrize(
    ("name", "size", "batch", "message"),
    [
        ("missing.safetensors", SIZE, 1, "does not exist"),
        (None, (100, 96), 1, "height must be a positive multiple of 8"),
        (None, SIZE, 0, "batch must be at least 1"),
    ],
)
def test_refusals(tmp_path: Path, name: str | None, size: tuple[int, int], batch: int, message: str) -> None:
    checkpoint = CHECKPOINT if name is None else tmp_path / name
    with pytest.raises(UserError, match=message):
        baseline_entries(checkpoint, tmp_path, size=size, batch=batch)
