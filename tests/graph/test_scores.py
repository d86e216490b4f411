"""Class scores out of files that were exported with labels: the same numbers as the network's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("torch", reason="the truth is PyTorch")

from hpddrnet_trt.core.manifest import read_manifest
from hpddrnet_trt.engines.onnxruntime import OnnxRuntimeEngine
from hpddrnet_trt.engines.torch import TorchEngine
from hpddrnet_trt.export.onnx import ExportOptions, trace
from hpddrnet_trt.graph.model import save_model
from hpddrnet_trt.graph.scores import with_scores
from hpddrnet_trt.inference.runner import scores_of_file
from hpddrnet_trt.models.checkpoints import save_checkpoint
from tests.tiny_export import frames, write_fp16, write_fp32, write_int8
from tests.tiny_network import lively, tiny_manifest, tiny_network
from tests.toy import manifest, write_toy_onnx

pytestmark = pytest.mark.usefixtures("one_thread")


def _scores_file(path: Path) -> Path:
    target = path.with_name(f"scores.{path.name}")
    model = with_scores(onnx.load(str(path)), read_manifest(path))
    assert model is not None
    onnx.save(model, str(target))
    return target


# Two classes are exported as one margin, up to 8 as phases of a convolution, more with a resize.
@pytest.mark.parametrize(("classes", "detail"), [(2, False), (3, True), (9, False)])
def test_scores_are_the_networks_logits(tmp_path: Path, classes: int, detail: bool) -> None:
    network = lively(tiny_network(num_classes=classes, detail=detail))
    options = ExportOptions(batch=2, height=64, width=96, confidence=classes == 3)  # dynamic sizes take 10 s
    description = tiny_manifest(
        network, input=options.input_contract, output=options.output_contract, precision="fp32"
    )
    path = save_model(trace(network, description, options), tmp_path / "m.onnx", description)
    images = frames(2, 64, 96)
    checkpoint = save_checkpoint(tmp_path / "m.safetensors", network, description)
    with TorchEngine(checkpoint, device="cpu") as reference:
        expected = reference.infer(images).logits
    with OnnxRuntimeEngine(_scores_file(path), threads=1) as engine:
        assert engine.manifest == description.replace(output=engine.manifest.output)
        found = engine.infer(images)
    assert expected is not None
    assert found.logits is not None
    assert found.logits.shape == (2, classes, 64, 96)
    if classes == 2:  # only the difference counts
        expected, got = expected[:, 1] - expected[:, 0], found.logits[:, 1] - found.logits[:, 0]
    else:
        got = found.logits
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()
    with OnnxRuntimeEngine(path, threads=1) as engine:
        assert (engine.infer(images).labels == found.labels).mean() > 0.999


@pytest.mark.parametrize("write", [write_fp32, write_fp16, write_int8])
def test_dynamic_sizes_and_lower_precision(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    path, images = write(tmp_path / "m.onnx"), frames(1, 72, 96)
    with OnnxRuntimeEngine(path, threads=1) as plain, OnnxRuntimeEngine(_scores_file(path), threads=1) as engine:
        found = engine.infer(images)
        assert found.logits is not None
        assert found.logits.dtype == np.float32
        assert (plain.infer(images).labels == found.labels).mean() > 0.99
        assert engine.manifest.precision == plain.manifest.precision


def test_files_that_end_in_another_way(tmp_path: Path) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest("labels"))
    assert with_scores(onnx.load(str(path)), read_manifest(path)) is None
    model = scores_of_file(path, read_manifest(path), OnnxRuntimeEngine)
    assert model.engine() is None
    model.close()


def test_the_scores_model_opens_once_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = write_fp32(tmp_path / "m.onnx")
    opened: list[Path] = []

    def open_engine(file: Path) -> OnnxRuntimeEngine:
        opened.append(file)
        return OnnxRuntimeEngine(file, threads=1)

    model = scores_of_file(path, read_manifest(path), open_engine)
    assert list(tmp_path.iterdir()) == [path]  # nothing yet
    with ThreadPoolExecutor(4) as pool:
        engines = {id(engine) for engine in pool.map(lambda _: model.engine(), range(8))}
    assert len(engines) == len(opened) == 1
    assert opened[0].is_file()
    model.close()
    model.close()
    assert list(tmp_path.iterdir()) == [path]
