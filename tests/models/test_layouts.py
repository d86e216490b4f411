"""DDRNet as other public implementations name and compute it: a small one of each kind, written from their definitions.

github.com/ydhongHIT/DDRNet (segmentation/DDRNet_23.py, DDRNet_23_slim.py, DDRNet_39.py) and
github.com/PaddlePaddle/PaddleSeg (paddleseg/models/ddrnet.py as released in 2.8, and as it was before).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from hpddrnet_trt.core.errors import BadInputFile
from hpddrnet_trt.core.manifest import Normalization
from hpddrnet_trt.models.checkpoints import (
    convert_checkpoint,
    load_any_checkpoint,
    load_backbone_weights,
    load_checkpoint,
    save_checkpoint,
)
from hpddrnet_trt.models.foreign import read_foreign
from hpddrnet_trt.models.network import HPDDRNet
from tests.tiny_network import tiny_manifest, tiny_network

CLASSES = 5


class PublicDDRNet:
    """Their network; its weights come into being, by their names, when it first runs.

    ``kind``: ``official``, ``paddle`` (2.8) or ``old paddle``. ``same``: PaddleSeg 2.8's padding of down3.
    """

    def __init__(self, kind: str, planes: int = 4, *, auxiliary: bool = True, same: bool = False) -> None:
        self.kind, self.planes, self.auxiliary, self.same = kind, planes, auxiliary, same
        self.weights: dict[str, Tensor] = {}
        self.random = torch.Generator().manual_seed(3)
        self(torch.rand(1, 3, 64, 64))

    def _weight(self, name: str, *shape: int, low: float = -0.3, high: float = 0.3) -> Tensor:
        if name not in self.weights:
            self.weights[name] = torch.rand(shape, generator=self.random) * (high - low) + low
        return self.weights[name]

    def conv(self, name: str, x: Tensor, outputs: int, kernel: int, stride: int = 1, bias: bool = False,
             padding: int | None = None) -> Tensor:  # fmt: skip
        weight = self._weight(f"{name}.weight", outputs, x.shape[1], kernel, kernel)
        offset = self._weight(f"{name}.bias", outputs) if bias else None
        return F.conv2d(x, weight, offset, stride, kernel // 2 if padding is None else padding)

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean, variance = ("running_mean", "running_var") if self.kind == "official" else ("_mean", "_variance")
        size = x.shape[1]
        weight, bias = self._weight(f"{name}.weight", size, low=0.5, high=1.5), self._weight(f"{name}.bias", size)
        at = self._weight(f"{name}.{mean}", size), self._weight(f"{name}.{variance}", size, low=0.5, high=1.5)
        if self.kind == "official":
            self.weights[f"{name}.num_batches_tracked"] = torch.tensor(7)
        return F.batch_norm(x, *at, weight, bias, eps=1e-5)

    def conv_norm(self, name: str, x: Tensor, outputs: int, kernel: int, stride: int = 1, at: int = 0,
                  **options: Any) -> Tensor:  # fmt: skip
        """``at``: the number of the convolution in their sequence; PaddleSeg 2.8 numbers the pairs."""
        conv, norm = f"{name}.{at}", f"{name}.{at + 1}"
        if self.kind == "paddle":
            pair = name if name not in ("conv1", "down4") else f"{name}.{at // 3}"
            conv, norm = f"{pair}._conv", f"{pair}._batch_norm"
        return self.norm(norm, self.conv(conv, x, outputs, kernel, stride, **options))

    def block(self, name: str, x: Tensor, width: int, stride: int = 1, *, act: bool = True,
              bottleneck: bool = False) -> Tensor:  # fmt: skip
        outputs, y = width * (2 if bottleneck else 1), x
        steps = [(3, width, stride), (3, width, 1)]
        if bottleneck:
            steps = [(1, width, 1), (3, width, stride), (1, outputs, 1)]
        for number, (kernel, channels, step) in enumerate(steps, 1):
            conv, norm = f"{name}.conv{number}", f"{name}.bn{number}"
            if self.kind == "paddle":
                pair = f"conv_bn_relu{number if bottleneck else ''}" if number < len(steps) else "conv_bn"
                conv, norm = f"{name}.{pair}._conv", f"{name}.{pair}._batch_norm"
            y = self.norm(norm, self.conv(conv, y, channels, kernel, step))
            y = F.relu(y) if number < len(steps) else y
        if stride != 1 or x.shape[1] != outputs:
            x = self.norm(f"{name}.downsample.1", self.conv(f"{name}.downsample.0", x, outputs, 1, stride))
        return F.relu(x + y) if act else x + y

    def stage(self, name: str, x: Tensor, width: int, stride: int = 1) -> Tensor:
        return self.block(f"{name}.1", self.block(f"{name}.0", x, width, stride), width, act=False)

    def norm_conv(self, name: str, x: Tensor, outputs: int, kernel: int, at: int = 0) -> Tensor:
        return self.conv(f"{name}.{at + 2}", F.relu(self.norm(f"{name}.{at}", x)), outputs, kernel)

    def pyramid(self, x: Tensor, width: int, outputs: int) -> Tensor:
        features = [self.norm_conv("spp.scale0", x, width, 1)]
        for number, kernel in enumerate((5, 9, 17, 0), 1):
            pooled = x.mean((2, 3), True)
            if kernel:
                border = self.kind == "official"  # Paddle's AvgPool2D leaves it out unless told otherwise
                pooled = F.avg_pool2d(x, kernel, kernel // 2, kernel // 2, count_include_pad=border)
            scale = self.norm_conv(f"spp.scale{number}", pooled, width, 1, at=1)
            scale = F.interpolate(scale, x.shape[2:], mode="bilinear")
            features.append(self.norm_conv(f"spp.process{number}", scale + features[-1], width, 3))
        fused = self.norm_conv("spp.compression", torch.cat(features, 1), outputs, 1)
        return fused + self.norm_conv("spp.shortcut", x, outputs, 1)

    def head(self, name: str, x: Tensor, width: int) -> Tensor:
        conv1, norm2, conv2 = "conv1", "bn2", "conv2"
        if self.kind == "paddle":
            name = {"final_layer": "head", "seghead_extra": "aux_head"}[name]
            conv1, norm2, conv2 = "conv_bn_relu._conv", "conv_bn_relu._batch_norm", "conv"
        x = self.conv(f"{name}.{conv1}", F.relu(self.norm(f"{name}.bn1", x)), width, 3)
        return self.conv(f"{name}.{conv2}", F.relu(self.norm(f"{name}.{norm2}", x)), CLASSES, 1, bias=True)

    def __call__(self, image: Tensor) -> Tensor:
        """Logits at 1/8."""
        p, size = self.planes, (image.shape[2] // 8, image.shape[3] // 8)

        def enlarged(x: Tensor) -> Tensor:
            return F.interpolate(x, size, mode="bilinear")

        x = F.relu(self.conv_norm("conv1", image, p, 3, 2, bias=True))
        x = self.stage("layer1", F.relu(self.conv_norm("conv1", x, p, 3, 2, at=3, bias=True)), p)
        x = F.relu(self.stage("layer2", F.relu(x), 2 * p, 2))
        low, high = self.stage("layer3", x, 4 * p, 2), self.stage("layer3_", x, 2 * p)
        down = F.relu(high)
        down = F.pad(down, (0, 1, 0, 1)) if self.same else down  # one zero below and on the right
        down = self.conv_norm("down3", down, 4 * p, 3, 2, padding=0 if self.same else None)
        low, high = low + down, high + enlarged(self.conv_norm("compression3", F.relu(low), 2 * p, 1))
        if self.auxiliary:
            self.head("seghead_extra", high, 2 * p)
        low, high = self.stage("layer4", F.relu(low), 8 * p, 2), self.stage("layer4_", F.relu(high), 2 * p)
        down = F.relu(self.conv_norm("down4", F.relu(high), 4 * p, 3, 2))
        down = self.conv_norm("down4", down, 8 * p, 3, 2, at=3)
        low, high = low + down, high + enlarged(self.conv_norm("compression4", F.relu(low), 2 * p, 1))
        high = self.block("layer5_.0", F.relu(high), 2 * p, act=False, bottleneck=True)
        low = self.block("layer5.0", F.relu(low), 8 * p, 2, act=False, bottleneck=True)
        return self.head("final_layer", high + enlarged(self.pyramid(low, 2 * p, 4 * p)), 2 * p)


@pytest.fixture
def image() -> Tensor:
    return torch.rand(1, 3, 128, 192, generator=torch.Generator().manual_seed(0))


def as_torch(path: Path, weights: dict[str, Tensor], prefix: str = "", **beside: Any) -> Path:
    torch.save({"state_dict": {prefix + name: value for name, value in weights.items()} | beside, "epoch": 3}, path)
    return path


def as_arrays(path: Path, weights: dict[str, Tensor]) -> Path:
    np.savez(path, **{name: value.numpy() for name, value in weights.items()})
    return path


def same(network: HPDDRNet, public: PublicDDRNet, image: Tensor) -> bool:
    with torch.inference_mode():
        return torch.allclose(network(image), public(image), rtol=0, atol=1e-3)  # of logits of 50


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
def test_the_official_layout(tmp_path: Path, image: Tensor, prefix: str) -> None:
    """Also behind wrappers, and behind the one that keeps the loss and its weights of classes."""
    public = PublicDDRNet("official")
    beside = {f"{prefix.removesuffix('model.')}loss.criterion.weight": torch.ones(CLASSES)} if "model" in prefix else {}
    network, manifest = load_any_checkpoint(as_torch(tmp_path / "a.pth.tar", public.weights, prefix, **beside))
    assert same(network, public, image)
    assert (manifest.network.eca, manifest.network.pam, manifest.network.pool_border) == ("none", "none", "zeros")
    assert (manifest.network.channels, manifest.network.num_classes) == (4, CLASSES)
    assert manifest.normalization == Normalization()
    assert "named as in the DDRNet repository: DDRNet, without the attention of HPDDRNet" in manifest.remarks[0]


@pytest.mark.parametrize("kind", ["paddle", "old paddle"])
@pytest.mark.parametrize("container", ["npz", "safetensors"])
def test_the_layouts_of_paddleseg(tmp_path: Path, image: Tensor, kind: str, container: str) -> None:
    public, path = PublicDDRNet(kind), tmp_path / f"a.{container}"
    if container == "npz":
        as_arrays(path, public.weights)
    else:
        save_file(public.weights, path)
    manifest = convert_checkpoint(path, tmp_path / "ours.safetensors")
    assert same(load_checkpoint(tmp_path / "ours.safetensors")[0], public, image)
    assert manifest.network.pool_border == "ignored"
    assert manifest.normalization == Normalization(mean=(127.5,) * 3, std=(127.5,) * 3)
    assert "its average pooling leaves out what lies beyond the border" in manifest.remarks[0]
    # PaddleSeg 2.8 samples one convolution one pixel beside; the names tell which.
    assert ("down3" in manifest.remarks[0]) == (kind == "paddle")
    assert not same(load_checkpoint(tmp_path / "ours.safetensors")[0], PublicDDRNet(kind, same=True), image)


@pytest.mark.parametrize(("planes", "name"), [(32, "ddrnet-23-slim"), (64, "ddrnet-23")])
def test_width_and_classes_come_from_shapes(tmp_path: Path, planes: int, name: str) -> None:
    manifest = load_any_checkpoint(as_torch(tmp_path / "a.pth", PublicDDRNet("official", planes).weights))[1]
    assert manifest.network.name == name
    assert manifest.network.num_classes == CLASSES


@pytest.mark.parametrize("kind", ["official", "paddle", "old paddle"])
def test_our_weights_in_their_layout_give_identical_logits(tmp_path: Path, image: Tensor, kind: str) -> None:
    border = "zeros" if kind == "official" else "ignored"
    network = tiny_network(eca="none", pam="none", num_classes=CLASSES, pool_border=border)
    biases = {"conv1.0.bias", "conv1.3.bias", "conv1.0._conv.bias", "conv1.1._conv.bias"}
    theirs = [name for name in PublicDDRNet(kind).weights if name not in biases]
    numbers = {name: torch.tensor(float(number)) for number, name in enumerate(theirs)}
    numbered = read_foreign(as_torch(tmp_path / "numbers.pth", numbers)).state_dict
    weights = {theirs[int(number)]: network.state_dict()[name] for name, number in numbered.items()}
    weights |= {name: torch.zeros(4) for name in PublicDDRNet(kind).weights if name in biases}
    loaded, _ = load_any_checkpoint(as_arrays(tmp_path / "a.npz", weights))
    with torch.inference_mode():
        assert torch.equal(loaded(image), network(image))


def test_a_file_without_auxiliary_classifier(tmp_path: Path, image: Tensor) -> None:
    public = PublicDDRNet("official", auxiliary=False)
    path = as_torch(tmp_path / "a.pth", public.weights)
    state = torch.random.get_rng_state()
    network, manifest = load_any_checkpoint(path)
    assert torch.equal(state, torch.random.get_rng_state())
    assert same(network, public, image)
    assert any("no auxiliary classifier, which only training uses" in remark for remark in manifest.remarks)
    again, _ = load_any_checkpoint(path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in network.state_dict().items())
    assert network.decode_head.aux_head[0].conv.weight.std() > 0


@pytest.mark.parametrize("deeper", ["layer3_1.0.conv1.weight", "layer1.2.conv1.weight"])  # DDRNet-39 in either layout
def test_deeper_networks_are_refused(tmp_path: Path, deeper: str) -> None:
    weights = PublicDDRNet("official").weights | {deeper: torch.zeros(4, 4, 3, 3)}
    with pytest.raises(BadInputFile, match=r"a\.pth holds a deeper network, such as DDRNet-39, but this package has"):
        convert_checkpoint(as_torch(tmp_path / "a.pth", weights), tmp_path / "ours.safetensors")
    assert not (tmp_path / "ours.safetensors").exists()


def test_other_networks_of_this_family_are_refused(tmp_path: Path) -> None:
    """Such as PIDNet, which shares most names."""
    weights = {name: value for name, value in PublicDDRNet("official").weights.items() if not name.startswith("down")}
    weights |= {"pag3.f_x.0.weight": torch.zeros(4, 8, 1, 1)}
    with pytest.raises(BadInputFile, match=r"do not fit .*missing: backbone\.down_1.*1 unknown: pag3\.f_x\.0\.weight"):
        load_any_checkpoint(as_torch(tmp_path / "a.pth", weights))


def test_a_pretrained_backbone_in_their_layout(tmp_path: Path) -> None:
    public, network = PublicDDRNet("official"), tiny_network(seed=5)
    segmentation = ("spp", "final", "seghead")
    weights = {name: value for name, value in public.weights.items() if not name.startswith(segmentation)}
    weights |= {"linear.weight": torch.zeros(10, 8), "down5.0.weight": torch.zeros(1)}
    remarks = load_backbone_weights(network, as_torch(tmp_path / "a.pth", weights))
    assert torch.equal(network.backbone.stem[0].conv.weight, weights["conv1.0.weight"])
    assert any("trained from their initial values: spp, ecas, sps" in remark for remark in remarks)


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    (tmp_path / "a.pdparams").write_bytes(b"\x80\x04\x95")
    np.savez_compressed(tmp_path / "packed.npz", a=np.zeros(3))
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "objects.npz").read_bytes()[:-40])
    network = tiny_network()
    save_checkpoint(tmp_path / "ours.safetensors", network, tiny_manifest(network))
    for name, message in {
        "a.pdparams": r"Paddle's own format; where Paddle is installed, save its arrays: python -c .*savez",
        "packed.npz": "compressed records",
        "objects.npz": "damaged or no archive of NumPy's arrays",
        "cut.npz": "damaged or no archive of NumPy's arrays",
        "ours.safetensors": "is a checkpoint of this package already",
    }.items():
        with pytest.raises(BadInputFile, match=message):
            convert_checkpoint(tmp_path / name, tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()
