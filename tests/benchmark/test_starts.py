"""Starts without masks: which pictures they see, and that training takes what they write."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.data.augment import AugmentConfig
from hpddrnet_trt.data.simulate import write_dataset


@pytest.fixture(scope="module")
def starts() -> Any:
    path = Path(__file__).parents[2] / "benchmarks/starts.py"
    spec = importlib.util.spec_from_file_location("starts_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_crops_are_shown_otherwise_but_not_moved(starts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starts, "SIZE", 64)
    dark, bright = (np.random.default_rng(0).integers(low, low + 60, (90, 80), dtype=np.uint8) for low in (0, 190))
    settings = AugmentConfig(
        noise_probability=0, defocus_probability=0, brightness=(-20, -20), contrast=(1, 1), gamma=(1, 1)
    )
    seen, plain = next(starts.batches([dark], [bright], settings, 4, np.random.default_rng(1)))
    assert seen.shape == plain.shape == (4, 1, 64, 64)
    assert [bool(crop.mean() > 128) for crop in plain] == [False, True, False, True]
    assert len({crop.tobytes() for crop in plain}) == 4
    assert np.array_equal(seen, np.clip(plain.astype(int) - 20, 0, 255))


def test_a_start_is_a_backbone_and_sees_nothing_of_the_fold_held_out(
    starts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpddrnet_trt.models.checkpoints import load_backbone_weights
    from hpddrnet_trt.models.network import HPDDRNet, network_config

    monkeypatch.setattr(starts, "SIZE", 64)
    data, other = (
        write_dataset(tmp_path / name, train=2, val=1, test=1, size=64, seed=1, progress=False)
        for name in ("data", "other")
    )
    held_out = data.fold(1, 3, ["train", "val"], train="train", held_out="val").split("val")
    for sample in (*data.split("test"), *other.split("test")):
        sample.image.write_bytes(b"no picture")
    pictures: list[list[Any]] = []
    batches = starts.batches
    monkeypatch.setattr(starts, "batches", lambda *given: (pictures.extend(given[:2]), batches(*given))[1])
    target = tmp_path / "start.safetensors"
    arguments = [str(target), str(data.root), "--fold", "1/3", "--others", str(other.root), "--steps", "1"]
    starts.main(["masked", *arguments])
    assert [len(seen) for seen in pictures] == [2, 3]
    assert not any(np.array_equal(picture, data.load(held_out[0])[0]) for picture in pictures[0])
    network = HPDDRNet(network_config("hpddrnet-23-slim", 2))
    before = network.backbone.stem[0].conv.weight.clone()
    assert load_backbone_weights(network, target) == []
    assert not before.equal(network.backbone.stem[0].conv.weight)

    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match=r"efficientnet_lite_pytorch is missing; .* how to install it"):
        starts.main(["distilled", *arguments])
