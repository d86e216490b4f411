"""Statistics of a model's own pictures, in checkpoints and ONNX files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("torch", reason="makes the networks")

from hpddrnet_trt.core.domain import domain_of
from hpddrnet_trt.core.errors import BadInputFile, UsageError
from hpddrnet_trt.core.manifest import read_manifest
from hpddrnet_trt.engines.onnxruntime import OnnxRuntimeEngine
from hpddrnet_trt.export.calibrate import CalibrationSettings, calibrate
from hpddrnet_trt.export.domain import describe_domain
from hpddrnet_trt.graph.lint import analyze
from hpddrnet_trt.models.checkpoints import load_checkpoint, save_checkpoint
from tests.tiny_export import frames, pictures, write_fp16, write_fp32
from tests.tiny_network import lively, tiny_manifest, tiny_network

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    for split, count in (("train", 4), ("val", 2)):
        pictures(folder / "images" / split, count)
    return folder


def test_an_onnx_file_tells_its_own_pictures_from_others(tmp_path: Path, home: Path) -> None:
    source, target = write_fp32(tmp_path / "m.onnx"), tmp_path / "known.onnx"
    before = source.read_bytes()
    manifest = describe_domain(source, home, target)
    assert (source.read_bytes(), read_manifest(target)) == (before, manifest)
    assert manifest.domain is not None
    assert (manifest.domain.pictures, manifest.domain.source) == (4, f"{home.name} (train)")
    assert len(manifest.domain.model_dump_json()) < 20_000
    stripes = np.arange(96) // 4 % 2 * np.full((1, 1, 64, 96), 255)
    own, other = frames(1, 64, 96, seed=9), stripes.astype(np.uint8)
    with OnnxRuntimeEngine(source, threads=1) as plain, OnnxRuntimeEngine(target, threads=1) as engine:
        found = [engine.infer(image) for image in (own, other)]
        assert (found[0].labels == plain.infer(own).labels).all()
    near, far = (domain_of([each.domain_features[0]], manifest.domain) for each in found)
    assert (near.state, far.state) == ("familiar", "foreign")
    assert near.distance < far.distance / 2
    # A file of another precision takes them over.
    half = describe_domain(write_fp16(tmp_path / "half.onnx"), None, like=target)
    assert (half.domain, half.precision, half.output) == (manifest.domain, "fp16", manifest.output)
    with pytest.raises(UsageError, match="has no statistics"):
        describe_domain(tmp_path / "half.onnx", None, like=source)
    # Calibration takes them along: the same features but for the rounding, and no pair that TensorRT cannot fuse.
    settings = CalibrationSettings(min_agreement=0.5, cache=None)
    assert (
        calibrate(target, tmp_path / "int8.onnx", sorted(home.rglob("*.png"))[:2], settings).domain == manifest.domain
    )
    assert analyze(onnx.load(tmp_path / "int8.onnx")).all_violations == ()
    with OnnxRuntimeEngine(tmp_path / "int8.onnx", threads=1) as engine:
        rounded = domain_of([engine.infer(own).domain_features[0]], manifest.domain)
    assert (rounded.state, rounded.distance) == (near.state, pytest.approx(near.distance, rel=0.3))
    # Again, in place: the same statistics, and one output of them.
    assert describe_domain(target, home).domain == manifest.domain
    assert [entry.name for entry in onnx.load(target).graph.output] == ["labels", "domain_features"]


def test_a_checkpoint_and_its_onnx_file_get_the_same(tmp_path: Path, home: Path) -> None:
    network = lively(tiny_network())
    checkpoint = save_checkpoint(tmp_path / "m.safetensors", network, tiny_manifest(network))
    described = describe_domain(checkpoint, home).domain
    assert described == read_manifest(checkpoint).domain
    for name, values in load_checkpoint(checkpoint)[0].state_dict().items():
        assert (values == network.state_dict()[name]).all()
    other = describe_domain(write_fp16(tmp_path / "m.onnx"), home).domain  # FP16 is computed in FP32 here
    assert other.mean == pytest.approx(described.mean, rel=0.01, abs=0.01)
    assert other.unusual == pytest.approx(described.unusual, rel=0.05)


def test_what_cannot_be_described_is_left_alone(tmp_path: Path, home: Path) -> None:
    model = write_fp32(tmp_path / "m.onnx")
    before = model.read_bytes()
    for arguments, error, words in (
        ((model, tmp_path / "none"), BadInputFile, "does not exist"),
        ((model, home, tmp_path / "x.safetensors"), UsageError, r"end with \.onnx"),
    ):
        with pytest.raises(error, match=words):
            describe_domain(*arguments)
    assert model.read_bytes() == before
    (tmp_path / "m.engine").touch()
    (tmp_path / "m.engine.json").write_text(read_manifest(model).to_json())
    with pytest.raises(UsageError, match="build the engine from it"):
        describe_domain(tmp_path / "m.engine", home)
