"""Batch-norm statistics from pictures without masks: what is mixed, what is written, and when it is doubted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hpddrnet_trt import load_segmenter
from hpddrnet_trt.core.errors import BadInputFile, UsageError
from hpddrnet_trt.core.files import sha256_of
from hpddrnet_trt.core.manifest import DataRecord, Manifest, read_manifest
from hpddrnet_trt.export.calibrate import CalibrationSettings, calibrate
from hpddrnet_trt.export.domain import describe_domain
from hpddrnet_trt.export.images import plan_crops, read_grey
from hpddrnet_trt.export.onnx import export_onnx
from hpddrnet_trt.models.checkpoints import load_checkpoint, save_checkpoint
from hpddrnet_trt.training.adapt import MIXES, Adaptation, Look, adapt, measured, mixed
from tests.tiny_network import tiny_manifest, tiny_network

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def few_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpddrnet_trt.training.adapt.CROPS", 16)


def micrographs(folder: Path, count: int = 3, faded: float = 1.0) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        noise = np.random.default_rng(number).normal(120, 50, (20, 24))
        grey = np.kron(noise, np.ones((6, 6))) * faded
        Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micrographs(tmp_path_factory.mktemp("home") / "pictures")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Path:
    """A tiny network that has the statistics of its pictures, batch norm's and the guard's."""
    network = tiny_network()
    manifest = tiny_manifest(network, metrics={"val/miou": 0.8}, temperature=1.5)
    crops = plan_crops(sorted(home.iterdir()), 96, 96, 12)
    network.load_state_dict(measured(network, manifest, crops, (96, 96)), strict=False)
    path = save_checkpoint(tmp_path_factory.mktemp("model") / "m.safetensors", network, manifest)
    describe_domain(path, home)
    return path


def buffers(path: Path) -> dict[str, torch.Tensor]:
    network, _ = load_checkpoint(path)
    return dict(network.named_buffers())


def test_statistics_move_by_the_mixture_and_weights_do_not(tmp_path: Path, model: Path, home: Path) -> None:
    other = micrographs(tmp_path / "faded", faded=0.3)
    before = model.read_bytes()
    for mix in (0.5, 1.0):
        adapt(model, other, tmp_path / f"{mix}.safetensors", mix=mix)
    assert model.read_bytes() == before
    old, half, new = (buffers(path) for path in (model, tmp_path / "0.5.safetensors", tmp_path / "1.0.safetensors"))
    moved = [name for name in old if not torch.equal(old[name], new[name])]
    assert any("running_mean" in name for name in moved)
    assert any("running_var" in name for name in moved)
    for name in moved:
        torch.testing.assert_close(half[name], (old[name] + new[name]) / 2)
    assert not any(name.startswith("auxiliary") for name in moved)
    networks = [load_checkpoint(path)[0] for path in (model, tmp_path / "1.0.safetensors")]
    for one, two in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(one, two)
    assert adapt(model, other, tmp_path / "again.safetensors", mix=0.5).changed > 0
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "0.5.safetensors").read_bytes()


def test_faded_pictures_come_nearer_and_the_model_says_what_it_no_longer_knows(tmp_path: Path, model: Path) -> None:
    other = micrographs(tmp_path / "faded", faded=0.3)
    result = adapt(model, other, tmp_path / "a.safetensors")
    assert result.before.distance is not None
    assert result.after.distance is not None
    assert result.after.distance < result.before.distance
    written = read_manifest(tmp_path / "a.safetensors")
    known = read_manifest(model)
    assert (written.metrics, written.temperature, written.fraction_errors) == ({}, None, None)
    for kept in ("domain", "classes", "normalization", "network"):
        assert getattr(written, kept) == getattr(known, kept)
    assert f"{result.mix:.0%} those of 3 pictures without masks (faded)" in written.remarks[-1]
    assert result.pictures == 3


def test_the_mixture_is_that_of_the_best_agreement(tmp_path: Path, model: Path) -> None:
    other = micrographs(tmp_path / "faded", faded=0.3)
    chosen = adapt(model, other, tmp_path / "chosen.safetensors")
    fixed = {mix: adapt(model, other, tmp_path / f"{mix}.safetensors", mix=mix) for mix in MIXES}
    assert chosen.after.agreement == max(result.after.agreement for result in fixed.values())
    assert chosen == fixed[chosen.mix]
    assert len({result.after.agreement for result in fixed.values()}) == len(MIXES)
    written = [tmp_path / f"{name}.safetensors" for name in ("chosen", chosen.mix)]
    assert written[0].read_bytes() == written[1].read_bytes()


def test_measuring_leaves_the_network_as_it_was(model: Path, home: Path) -> None:
    network, manifest = load_checkpoint(model)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    momenta = {module.momentum for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)}
    seen = measured(network, manifest, plan_crops(sorted(home.iterdir()), 64, 64, 12), (64, 64))
    assert not network.training
    assert {module.momentum for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)} == momenta
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert mixed(before, seen, 1.0).keys() == seen.keys()
    assert not any("num_batches_tracked" in name or "auxiliary" in name or "aux_" in name for name in seen)


def test_what_became_worse_is_said() -> None:
    def doubts(before: Look, after: Look) -> list[str]:
        return Adaptation(Manifest.model_construct(), 1, 0.6, before, after, 0.0).doubts

    assert doubts(Look(2.0, 0.9), Look(1.5, 0.95)) == []
    assert doubts(Look(None, 0.9), Look(None, 0.9)) == []
    assert "farther" in doubts(Look(1.0, 0.9), Look(1.5, 0.95))[0]
    assert "agrees less" in doubts(Look(1.5, 0.9), Look(1.0, 0.85))[0]
    assert len(doubts(Look(1.0, 0.9), Look(1.5, 0.85))) == 2


@pytest.mark.parametrize("mix", [0.0, -1, 1.5])
def test_senseless_requests_write_nothing(tmp_path: Path, model: Path, home: Path, mix: float) -> None:
    target = tmp_path / "a.safetensors"
    with pytest.raises(UsageError, match="above 0 and at most 1"):
        adapt(model, home, target, mix=mix)
    with pytest.raises(BadInputFile, match="nowhere"):
        adapt(model, tmp_path / "nowhere", target)
    Image.fromarray(np.full((64, 64), 90, np.uint8)).save(tmp_path / "flat.png")
    with pytest.raises(UsageError, match="shows next to nothing"):
        adapt(model, tmp_path / "flat.png", target)
    (tmp_path / "steady").mkdir()
    (tmp_path / "flat.png").rename(tmp_path / "steady" / "one.png")
    with pytest.raises(UsageError, match="shows next to nothing"):
        adapt(model, tmp_path / "steady", target)
    assert not target.exists()


def test_models_without_statistics_and_targets_that_are_the_model_are_refused(
    tmp_path: Path, model: Path, home: Path
) -> None:
    before = model.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(model)
    for target in (model, tmp_path / "link.safetensors"):
        with pytest.raises(UsageError, match="would overwrite the model"):
            adapt(model, home, target)
    assert model.read_bytes() == before
    for name in ("nasa-super1.onnx", "int8.ONNX"):
        with pytest.raises(UsageError, match=r"give the checkpoint \(.safetensors\)"):
            adapt(tmp_path / name, home, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=r"ends in .safetensors"):
        adapt(model, home, tmp_path / "a.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.safetensors"]


def test_pictures_that_are_not_brought_to_the_pixel_size_are_told(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network, manifest = load_checkpoint(model)
    sized = manifest.replace(data=DataRecord(name="sized", pixel_size_m=(1e-8, 1e-8)))
    source = save_checkpoint(tmp_path / "sized.safetensors", network, sized)
    pictures = micrographs(tmp_path / "far" / "images" / "train")
    adapt(source, pictures, tmp_path / "a.safetensors")
    assert "3 of 3 pictures come without a pixel size" in caplog.text
    caplog.clear()
    sizes = {"name": "far", "files": [{"split": "train", "name": str(k), "pixel_size_m": 1e-5} for k in range(2)]}
    (tmp_path / "far" / "dataset.json").write_text(json.dumps(sizes))
    adapt(source, tmp_path / "far", tmp_path / "a.safetensors")
    assert "1 of 3 pictures come without" in caplog.text
    assert "too far apart" in caplog.text
    assert "1 more are like it" in caplog.text


def test_the_result_is_a_checkpoint_like_any_other(tmp_path: Path, model: Path) -> None:
    other = micrographs(tmp_path / "faded", faded=0.3)
    adapted = tmp_path / "a.safetensors"
    adapt(model, other, adapted)
    exported, quantized = tmp_path / "a.onnx", tmp_path / "a.int8.onnx"
    assert export_onnx(adapted, exported).checkpoint_sha256 == sha256_of(adapted)
    loose = CalibrationSettings("onnxruntime", size=(120, 144), min_agreement=0, cache=None)
    calibrate(exported, quantized, [other / "0.png"], loose)
    picture = read_grey(other / "0.png")
    was, labels, exact, rounded = (
        load_segmenter(path, threads=1, precision="file").segment(picture).labels
        for path in (model, adapted, exported, quantized)
    )
    assert np.mean(labels == exact) > 0.999
    assert np.mean(labels == rounded) > 0.8
    assert np.mean(labels == was) < 0.95  # so the comparison would notice the former statistics
