"""Batch-norm statistics from pictures without masks: what is mixed, what is written, and when it is doubted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hpddrnet_trt.core.errors import BadInputFile, UsageError
from hpddrnet_trt.core.manifest import Manifest, read_manifest
from hpddrnet_trt.export.domain import describe_domain
from hpddrnet_trt.export.images import plan_crops
from hpddrnet_trt.models.checkpoints import load_checkpoint, save_checkpoint
from hpddrnet_trt.training.adapt import Adaptation, Look, adapt, remeasure
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
    remeasure(network, manifest, crops, (96, 96), 1)
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
    assert "60% those of 3 pictures without masks (faded)" in written.remarks[-1]
    assert result.pictures == 3


def test_what_became_worse_is_said() -> None:
    def doubts(before: Look, after: Look) -> list[str]:
        return Adaptation(Manifest.model_construct(), 1, before, after, 0.0).doubts

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
    assert not target.exists()
