"""Other weights for a built engine, on a simulated library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.core.manifest import Manifest, NetworkConfig, read_manifest, sidecar_path
from hpddrnet_trt.export.build_settings import BuildSettings
from hpddrnet_trt.export.refit import refit_engine
from hpddrnet_trt.export.tensorrt import build_engine
from hpddrnet_trt.graph.nodes import store
from tests.export.simulated_tensorrt import WEIGHTS, SimulatedBuilder, simulated_builder
from tests.tiny_onnx import tiny_model

SHAPES = "1x1x64x64:1x1x64x64:2x1x128x128"


@pytest.fixture
def library() -> SimulatedBuilder:
    return SimulatedBuilder()


def built(folder: Path, library: SimulatedBuilder, **options: Any) -> tuple[Path, Manifest]:
    target = folder / "m.engine"
    with simulated_builder(library):
        return target, build_engine(
            tiny_model(folder / "m.onnx"), target, precision="fp16", shapes=SHAPES,
            settings=BuildSettings(progress=False, **options),
        )  # fmt: skip


def test_weights_left_out_come_back(tmp_path: Path, library: SimulatedBuilder) -> None:
    engine, _ = built(tmp_path, library, stripped=True)
    other = tiny_model(tmp_path / "other.onnx")
    model = onnx.load(str(other))
    store(model.graph.initializer[0], 2 * numpy_helper.to_array(model.graph.initializer[0]))
    onnx.save(model, str(other))
    with simulated_builder(library):
        with pytest.raises(UsageError, match=r"only the weights that it was built with, .*other\.onnx has others"):
            refit_engine(engine, other, tmp_path / "new.engine")
        manifest = refit_engine(engine, tmp_path / "m.onnx", tmp_path / "new.engine")
    assert manifest.engine is not None
    assert (manifest.engine.stripped, manifest.engine.refittable) == (False, False)


@pytest.mark.parametrize("stripped", [False, True])
def test_retrained_weights(tmp_path: Path, library: SimulatedBuilder, stripped: bool) -> None:
    engine, before = built(tmp_path, library, refittable=True, stripped=stripped)
    retrained = tiny_model(tmp_path / "new.onnx", name="retrained", checkpoint_sha256="5" * 64)
    target = tmp_path / "new.engine"
    with simulated_builder(library):
        manifest = refit_engine(engine, retrained, target)
    assert target.read_bytes() == engine.read_bytes() + WEIGHTS + b"new.fp16.onnx"  # converted as a build would
    assert read_manifest(target) == manifest
    assert manifest.engine is not None
    assert before.engine is not None
    assert (manifest.name, manifest.checkpoint_sha256) == ("retrained", "5" * 64)
    assert (manifest.input, manifest.precision) == (before.input, "fp16")
    assert (manifest.engine.stripped, manifest.engine.refittable) == (False, True)
    assert manifest.engine.bytes == target.stat().st_size
    assert [entry.what for entry in manifest.validation] == ["conversion to FP16"]  # nothing of the old weights
    with simulated_builder(library):
        refit_engine(target, retrained, engine)  # again, over the old one


def test_what_does_not_fit(tmp_path: Path, library: SimulatedBuilder) -> None:
    plain, _ = built(tmp_path, library)
    model, target = tmp_path / "m.onnx", tmp_path / "new.engine"
    with simulated_builder(library), pytest.raises(UsageError, match="takes no other weights; build it with --refit"):
        refit_engine(plain, model, target)
    engine, _ = built(tmp_path, library, refittable=True)
    others: list[tuple[dict[str, Any], str]] = [
        ({"network": NetworkConfig(num_classes=3, channels=64)}, r"of another form .*\(network\)"),
        ({"output": "logits"}, r"of another form .*\(output\)"),
        ({"typing": "int8"}, "is INT8, FP16 was asked for"),
    ]
    with simulated_builder(library):
        for changes, says in others:
            other = tiny_model(tmp_path / "other.onnx", **changes)
            with pytest.raises(UsageError, match=says):
                refit_engine(engine, other, target)
        library.missing = ["first_weights"]
        with pytest.raises(UserError, match=r"weights of .*m\.onnx into .* no weights for first_weights"):
            refit_engine(engine, model, target)
    assert not target.exists()
    assert not sidecar_path(target).exists()
