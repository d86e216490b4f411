"""What does a trained network's position attention do? Its labels with less of it, judged by masks.

    python benchmarks/attention.py MODEL.safetensors --data DATASET [--split val] [--fold 1/3] [--within 128]

Four readings of the same weights: as trained; each position attending to all alike, which leaves the mean of the
picture and nothing of where things are; attending only to what lies within so many pixels; and attention's flow shut
off. The network has not been trained so: a loss shows that something was relied on, not that training without it would
lose as much, which `hpddrnet-trt train FOLDER --folds 3` with another network tells. No loss shows that it was not
needed. Also printed: how far attention looks, the mean distance in pixels weighted by it, of that weighted by nothing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from hpddrnet_trt.accuracy.evaluate import assess
from hpddrnet_trt.core.manifest import NetworkConfig, read_manifest
from hpddrnet_trt.core.text import aligned
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.inference import load_segmenter
from hpddrnet_trt.models.network import PositionAttention
from hpddrnet_trt.weights import CHECKPOINT, locate

READINGS = ("as trained", "all alike", "within", "shut off")


class Reading:
    """Position attention read in one way; notes how far it looks."""

    def __init__(self, kind: str, channels: int, within: float) -> None:
        self.kind = kind
        self.channels = channels  # of the network
        self.within = within  # pixels
        self.distances: list[tuple[float, float]] = []  # pixels: mean weighted by attention, and by nothing

    def forward(self, module: PositionAttention, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` in and out, as the module's own."""
        y, attention = module.cnn(x), module.pa
        if self.kind == "shut off":
            return torch.zeros_like(y)
        tokens = y.flatten(2).transpose(1, 2)
        cell = 4 * tokens.shape[-1] // self.channels  # pixels: 16 where there are 4C channels, 32 where 8C
        distances = cell * between_cells(y.shape[2], y.shape[3])
        scores = attention.fc_q(tokens) @ attention.fc_k(tokens).transpose(1, 2) / math.sqrt(tokens.shape[-1])
        if self.kind == "all alike":
            scores = torch.zeros_like(scores)
        elif self.kind == "within":
            scores = scores.masked_fill(distances > self.within, -torch.inf)
        weights = torch.softmax(scores, dim=-1)
        self.distances.append((float((weights * distances).sum(-1).mean()), float(distances.mean())))
        return attention.fc_o(weights @ attention.fc_v(tokens)).transpose(1, 2).reshape(y.shape)


def between_cells(height: int, width: int) -> Tensor:
    """Distances between the cells of a grid, ``[H W, H W]``."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=1).float()
    return torch.cdist(places, places)


def in_place_of_forward(reading: Reading) -> Callable[[PositionAttention, Tensor], Tensor]:
    return lambda module, x: reading.forward(module, x)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint (.safetensors), or a shipped model's name")
    parser.add_argument("--data", type=Path, required=True, help="dataset folder")
    parser.add_argument("--split", default="val")
    parser.add_argument("--fold", help="NUMBER/COUNT: judge what training with data.fold left out of train and val")
    parser.add_argument("--within", type=float, default=128, help="pixels")
    given = parser.parse_args(arguments)
    path = locate(given.model, CHECKPOINT)
    dataset = FolderDataset.open(given.data)
    if given.fold:
        number, count = map(int, given.fold.split("/"))
        dataset = dataset.fold(number, count, ["train", "val"], train="train", held_out=given.split)
    network = read_manifest(path).network
    if not isinstance(network, NetworkConfig) or network.pam == "none":
        raise SystemExit(f"{path} has no position attention")
    segmenter = load_segmenter(path, precision="fp32")
    lines = [["%", "mIoU", *(f"IoU {name}" for name in dataset.class_names), "attention looks, pixels"]]
    for kind in READINGS:
        reading = Reading(kind, network.channels, given.within)
        with mock.patch.object(PositionAttention, "forward", in_place_of_forward(reading)):
            scores = assess(segmenter, dataset, given.split, worst=0, progress=False).scores
        name = f"within {given.within:.0f} pixels" if kind == "within" else kind
        looked = "{:.0f} of {:.0f}".format(*np.mean(reading.distances, axis=0)) if reading.distances else "-"
        lines.append([name, *(f"{100 * value:.1f}" for value in [scores.miou, *scores.iou]), looked])
    print("\n".join(aligned(lines, left={0})))


if __name__ == "__main__":
    main()
