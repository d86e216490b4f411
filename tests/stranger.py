"""A small segmenter of another kind than ours, exported as its author would: what ``adopt`` is tested on.

Two branches like PIDNet's: detail at 1/4, context at 1/8 with a global mean, added and classified at 1/4.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpddrnet_trt.core.quiet import quiet
from hpddrnet_trt.data.simulate import simulate

Ending = Literal["low", "full", "softmax", "argmax", "binary", "sigmoid", "aux", "nan"]


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Stranger(nn.Module):
    """``[N, channels, H, W]`` normalised; what comes out is the ``ending``'s."""

    ending: Ending = "low"

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(_block(channels, 8, 2), _block(8, 16, 2))
        self.detail, self.context = _block(16, 16, 1), _block(16, 16, 2)
        self.squeeze = nn.Conv2d(16, 16, 1)
        self.classify = nn.Conv2d(16, 3, 1)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
                nn.init.uniform_(module.weight, 0.5, 2.0)
        self.eval()

    def forward(self, image: Tensor) -> Any:
        stem = self.stem(image)
        context = self.context(stem)
        context = context * torch.sigmoid(self.squeeze(context.mean((2, 3), keepdim=True)))
        features = self.detail(stem) + F.interpolate(context, size=stem.shape[2:], mode="bilinear")
        scores = self.classify(features)
        if self.ending in ("low", "binary"):
            return scores
        if self.ending == "aux":
            return {"out": scores, "aux": scores[:, :, ::2, ::2], "edges": features[:, :1]}
        if self.ending == "nan":
            return scores / 0 * 0
        full = F.interpolate(scores, size=image.shape[2:], mode="bilinear", align_corners=True)
        if self.ending == "softmax":
            return full.softmax(1)
        if self.ending == "sigmoid":
            return full.sigmoid()
        return full.argmax(1, keepdim=True) if self.ending == "argmax" else full


MEAN, STD = 0.45, 0.22  # of grey levels 0..1, in every channel


@cache
def stranger(ending: Ending = "low", channels: int = 3) -> Stranger:
    """One whose classes all occur in simulated micrographs."""
    torch.manual_seed(2)
    network = Stranger(channels=channels)
    with torch.no_grad():
        scores = network(normalized(simulate(96, 128, 0)[0][None], channels))
        network.classify.weight /= scores.std((0, 2, 3))[:, None, None, None]
        scores = network(normalized(simulate(96, 128, 0)[0][None], channels))
        assert network.classify.bias is not None
        network.classify.bias -= scores.mean((0, 2, 3))
    network.ending = ending
    if ending in ("binary", "sigmoid"):
        one = nn.Conv2d(16, 1, 1)
        one.load_state_dict({"weight": network.classify.weight[:1], "bias": network.classify.bias[:1]})
        network.classify = one
    return network.requires_grad_(False)


def normalized(grey: npt.NDArray[np.uint8], channels: int = 3) -> Tensor:
    """``[N, H, W]`` as the network takes it."""
    return ((torch.from_numpy(grey)[:, None].float() / 255 - MEAN) / STD).expand(-1, channels, -1, -1)


def write_stranger(
    path: Path,
    ending: Ending = "low",
    *,
    size: tuple[int, int, int] | None = None,
    old: bool = True,
    channels: int = 3,
) -> Path:
    """``size``: batch, height and width where they are fixed. ``old``: by PyTorch's older exporter, at opset 11; the
    other one writes the weights into a file beside it."""
    batch, height, width = size or (2, 64, 96)
    options: dict[str, Any] = {"dynamo": False, "opset_version": 11}
    if old and size is None:
        options["dynamic_axes"] = {"input": {0: "n", 2: "h", 3: "w"}}
    elif not old:
        free = torch.export.Dim.DYNAMIC
        options = {"dynamic_shapes": None if size else ({0: free, 2: free, 3: free},), "verbose": False}
    names = ["out", "aux", "edges"] if ending == "aux" else ["result"]
    with quiet("torch.onnx", "onnxscript", "onnx_ir", hints=[".*"]), torch.no_grad():
        torch.onnx.export(
            stranger(ending, channels), (torch.zeros(batch, channels, height, width),), str(path),
            input_names=["input"], output_names=names, **options,
        )  # fmt: skip
    return path
