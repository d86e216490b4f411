"""Is a model better when all pictures are brought to one pixel size? Each specimen of a dataset is left out in turn.

    python benchmarks/magnification.py DATASET --work FOLDER

The dataset states the pixel size of each picture (``dataset.json``). Of every picture left out a small network is
trained on the others, as they are and brought to one pixel size, with the same seed, steps and augmentation, and reads
the picture so, too. A line of JSON for each goes to ``FOLDER/magnification.jsonl``; what is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hpddrnet_trt.core.magnification import in_words, rescaling
from hpddrnet_trt.core.metrics import LabelComparison
from hpddrnet_trt.data.augment import Augmentation, AugmentConfig
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.data.preprocess import magnified, nearest, pad, scaled_size
from hpddrnet_trt.models.checkpoints import load_checkpoint, with_classes
from hpddrnet_trt.models.network import HPDDRNet, resize
from hpddrnet_trt.training.losses import OhemCrossEntropy, SegmentationLoss
from hpddrnet_trt.weights import CHECKPOINT, locate

Grey8 = npt.NDArray[np.uint8]
Pair = tuple[Grey8, Grey8]
CROP, BATCH, STEPS, RATE, TILE = 160, 4, 80, 1e-3, 512


class Trained(NamedTuple):
    """A network, and the mean and deviation of the grey levels it was trained on."""

    network: HPDDRNet
    mean: float
    std: float


def brought(image: Grey8, mask: Grey8, factor: float) -> Pair:
    """Picture and mask as they are with ``factor`` times as many pixels along each side."""
    size = scaled_size(image.shape[0], image.shape[1], factor)
    return (image, mask) if size == image.shape else (magnified(image, *size), nearest(mask, *size))


def normalised(images: Sequence[Grey8], mean: float, std: float) -> Tensor:
    return ((torch.from_numpy(np.stack(images)).float() - mean) / std)[:, None].expand(-1, 3, -1, -1)


def trained(pairs: Sequence[Pair], classes: int, seed: int) -> Trained:
    """After ``STEPS`` steps from the shipped model."""
    torch.manual_seed(seed)
    network, _ = load_checkpoint(locate("nasa-super1", CHECKPOINT))
    network = with_classes(network, [None] * classes).train()
    grey = np.concatenate([image.ravel() for image, _ in pairs])
    mean, std = float(grey.mean()), float(grey.std())
    augment = Augmentation(AugmentConfig(
        crop=(CROP, CROP), rotation_probability=0.25, scale_probability=0.6, scale=(0.7, 1.5), class_balance=0.0,
        noise_probability=0.3, dose=(60, 600), defocus_probability=0.2, defocus=(0.3, 1.2),
    ))  # fmt: skip
    loss = SegmentationLoss(OhemCrossEntropy(0.9, 131072, None), 0.4)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        rngs = [np.random.default_rng([seed, step, place]) for place in range(BATCH)]
        crops = [augment(*pairs[(step * BATCH + place) % len(pairs)], rng) for place, rng in enumerate(rngs)]
        images = normalised([image for image, _ in crops], mean, std)
        main, auxiliary = loss(network(images), torch.from_numpy(np.stack([mask for _, mask in crops])).long())
        optimizer.zero_grad()
        (main + auxiliary).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    return Trained(network.eval(), mean, std)


@torch.no_grad()
def labels_of(trained: Trained, image: Grey8) -> Grey8:
    """Labels of an image, in tiles that share nothing."""
    network, mean, std = trained
    labels = np.empty(image.shape, np.uint8)
    for top in range(0, image.shape[0], TILE):
        for left in range(0, image.shape[1], TILE):
            tile = image[top : top + TILE, left : left + TILE]
            height, width = (-(-edge // 64) * 64 for edge in tile.shape)
            logits = network(normalised([pad(tile, height, width)], mean, std))
            found = resize(logits, height, width).argmax(dim=1)[0].numpy()
            labels[top : top + TILE, left : left + TILE] = found[: tile.shape[0], : tile.shape[1]]
    return labels


def miou(trained: Trained, image: Grey8, mask: Grey8, factor: float, classes: int) -> float:
    """Against the mask in the picture's own pixels, which labels come back to."""
    seen, _ = brought(image, mask, factor)
    comparison = LabelComparison(classes)
    comparison.update(nearest(labels_of(trained, seen), *image.shape), mask)
    return comparison.scores().miou


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sizes", nargs="+", default=["none", "median"], choices=["none", "median", "greatest"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = FolderDataset.open(options.dataset)
    stated = {entry["name"]: entry["pixel_size_m"] for entry in json.loads(
        (options.dataset / "dataset.json").read_text())["files"]}  # fmt: skip
    pictures = {sample.name: dataset.load(sample) for split in dataset.splits for sample in dataset.split(split)}
    options.work.mkdir(parents=True, exist_ok=True)
    file = options.work / "magnification.jsonl"
    done = {tuple(json.loads(line)["key"]) for line in file.read_text().splitlines()} if file.exists() else set()
    classes = len(dataset.classes)
    for seed in options.seeds:
        for size in options.sizes:
            for left_out, (image, mask) in pictures.items():
                key = [left_out, size, seed]
                if tuple(key) in done:
                    continue
                begin = time.process_time()
                others = {name: stated[name] for name in pictures if name != left_out}
                sizes = list(others.values())
                target = {"none": None, "median": float(np.median(sizes)), "greatest": max(sizes)}[size]
                pairs = [brought(*pictures[name], own / target if target else 1.0) for name, own in others.items()]
                network = trained([(np.ascontiguousarray(one), other) for one, other in pairs], classes, seed)
                range_m = (target, target) if target else (min(sizes), max(sizes))
                factor = rescaling(stated[left_out], range_m, image.shape).factor
                line = {
                    "key": key, "own_nm": stated[left_out] * 1e9, "trained_at": in_words(range_m), "factor": factor,
                    "as_it_is": miou(network, image, mask, 1.0, classes),
                    "rescaled": miou(network, image, mask, factor or 1.0, classes),
                    "core_seconds": round(time.process_time() - begin),
                }  # fmt: skip
                with file.open("a") as stream:
                    stream.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
