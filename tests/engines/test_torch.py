"""The PyTorch reference engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hpddrnet_trt.engines import load_engine
from hpddrnet_trt.engines.base import Engine
from hpddrnet_trt.engines.torch import TorchEngine
from hpddrnet_trt.errors import BadInputFile, ContractError, NoGpu, UsageError, UserError
from hpddrnet_trt.manifest import Manifest, NetworkConfig
from hpddrnet_trt.models.checkpoints import save_checkpoint
from hpddrnet_trt.models.network import HPDDRNet
from tests.toy import CLASSES, grey_image

CONFIG = NetworkConfig(channels=4, ppm_channels=8, head_channels=8, num_classes=3)


@pytest.fixture(scope="module")
def network() -> HPDDRNet:
    torch.manual_seed(0)
    return HPDDRNet(CONFIG).eval()


@pytest.fixture(scope="module")
def description() -> Manifest:
    return Manifest(name="tiny", network=CONFIG, classes=CLASSES)


def test_grey_input_equals_the_network_on_normalised_rgb(network: HPDDRNet, description: Manifest) -> None:
    images = np.stack([grey_image(40, 64, seed) for seed in range(2)])[:, None]
    mean = torch.tensor(description.normalisation.mean).view(1, 3, 1, 1)
    std = torch.tensor(description.normalisation.std).view(1, 3, 1, 1)
    rgb = (torch.from_numpy(images).float().expand(-1, 3, -1, -1) - mean) / std
    with torch.inference_mode():
        expected = network.predict_logits(rgb).numpy()
    grey = TorchEngine.from_network(network, description, device="cpu")
    assert isinstance(grey, Engine)
    found = grey.infer(images)
    assert found.logits is not None
    assert found.logits.shape == (2, 3, 40, 64)
    assert np.abs(found.logits - expected).max() < 1e-5
    assert np.array_equal(found.labels, found.logits.argmax(axis=1))
    normalised = TorchEngine.from_network(network, description, device="cpu", input_dtype="float32")
    frozen = np.ascontiguousarray(rgb.numpy())
    frozen.flags.writeable = False
    assert np.abs(normalised.infer(frozen).logits - expected).max() < 1e-5


def test_file_options_and_status(tmp_path: Path, network: HPDDRNet, description: Manifest) -> None:
    path = save_checkpoint(tmp_path / "tiny.safetensors", network, description)
    images = grey_image(24, 32)[None, None]
    with load_engine(path, device="cpu") as engine:
        assert engine.runtime.startswith("torch ")
        assert "FP32" in engine.runtime
        expected = engine.infer(images).logits
    for options in ({"channels_last": True}, {"autocast": "bf16"}):
        with TorchEngine(path, device="cpu", **options) as other:  # type: ignore[arg-type]
            found = other.infer(images).logits
            assert found.dtype == np.float32
            assert np.abs(found - expected).max() < 0.05
            assert ("channels last" in other.runtime) == ("channels_last" in options)
    with pytest.raises(UserError, match="closed"):
        engine.infer(images)


def test_weights_are_not_changed_by_inference(network: HPDDRNet, description: Manifest) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()  # the engine must switch batch norm to its running statistics
    engine = TorchEngine.from_network(network, description, device="cpu")
    first = engine.infer(grey_image(16, 16)[None, None]).logits
    assert np.array_equal(first, engine.infer(grey_image(16, 16)[None, None]).logits)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_refusals(tmp_path: Path, network: HPDDRNet, description: Manifest) -> None:
    engine = TorchEngine.from_network(network, description, device="cpu")
    with pytest.raises(ContractError, match="dtype uint8"):
        engine.infer(np.zeros((1, 1, 16, 16), np.float32))
    with pytest.raises(ContractError, match="multiples of 8"):
        engine.infer(np.zeros((1, 1, 16, 17), np.uint8))
    path = save_checkpoint(tmp_path / "tiny.safetensors", network, description)
    for options, words in (
        ({"device": "gpu9"}, "unknown device 'gpu9'"),
        ({"autocast": "int4"}, "autocast one of off, fp16, bf16"),
        ({"input_dtype": "int8"}, "input_dtype is uint8 or float32"),
        ({"threads": 0}, "threads must be at least 1"),
    ):
        with pytest.raises(UsageError, match=words):
            TorchEngine(path, **options)  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(NoGpu, match="finds no GPU 'cuda'"):
            TorchEngine(path, device="cuda")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(BadInputFile, match=r"tiny\.safetensors"):
        TorchEngine(path)


@pytest.mark.parametrize("size", ["1x136x200", "2x128x192"])
def test_golden_logits(golden: Path, size: str) -> None:
    images = np.load(golden / "inputs.npz")[f"x_{size}"].astype(np.float32)
    expected = np.load(golden / "hpddrnet" / f"eval_{size}.npz")["logits_full"]
    with TorchEngine(golden / "hpddrnet" / "checkpoint.pth", device="cpu", input_dtype="float32") as engine:
        assert engine.manifest.class_names == ["grains", "pores", "clay"]
        assert np.abs(engine.infer(images).logits - expected).max() < 5e-4


def test_labels_only_output_gives_the_same_labels_and_no_logits(
    network: HPDDRNet, description: Manifest, tmp_path: Path
) -> None:
    checkpoint = save_checkpoint(tmp_path / "tiny.safetensors", network, description)
    image = np.random.default_rng(3).integers(0, 256, (2, 1, 32, 40), dtype=np.uint8)
    with TorchEngine(checkpoint) as full, TorchEngine(checkpoint, output="labels") as labels_only:
        expected, found = full.infer(image), labels_only.infer(image)
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert found.logits is None
    assert expected.logits is not None
    with pytest.raises(UsageError, match="output"):
        TorchEngine(checkpoint, output="scores")  # type: ignore[arg-type]
