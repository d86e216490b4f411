"""A small segmenter of another kind than ours, exported as its author would: what ``adopt`` is tested on.

Two branches like PIDNet's: detail at 1/4, context at 1/8 with a global mean, added and classified at 1/4.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpddrnet_trt.core.quiet import quiet

Ending = Literal["low", "full", "softmax", "argmax", "binary", "sigmoid", "aux", "nan"]


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Stranger(nn.Module):
    """``[N, channels, H, W]`` normalised; what comes out is the ``ending``'s."""

    def __init__(self, classes: int = 3, channels: int = 3, ending: Ending = "low") -> None:
        super().__init__()
        self.ending = ending
        self.stem = nn.Sequential(_block(channels, 8, 2), _block(8, 16, 2))
        self.detail, self.context = _block(16, 16, 1), _block(16, 16, 2)
        self.squeeze = nn.Conv2d(16, 16, 1)
        self.classify = nn.Conv2d(16, 1 if ending in ("binary", "sigmoid") else classes, 1)
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


def write_stranger(
    path: Path,
    ending: Ending = "low",
    *,
    size: tuple[int, int, int] | None = None,
    old: bool = False,
    channels: int = 3,
    **options: Any,
) -> Path:
    """``size``: batch, height and width where they are fixed. ``old``: by PyTorch's older exporter, at opset 11."""
    torch.manual_seed(2)
    network = Stranger(channels=channels, ending=ending)
    batch, height, width = size or (2, 64, 96)
    example = torch.zeros(batch, channels, height, width)
    if old:
        axes = None if size else {"input": {0: "n", 2: "h", 3: "w"}}
        options = {"dynamo": False, "opset_version": 11, "dynamic_axes": axes, **options}
    else:
        dim = torch.export.Dim.DYNAMIC
        options = {"dynamic_shapes": None if size else ({0: dim, 2: dim, 3: dim},), "verbose": False, **options}
    with quiet("torch.onnx", "onnxscript", "onnx_ir", hints=[".*"]), torch.no_grad():
        torch.onnx.export(network, (example,), str(path), input_names=["input"], **options)
    return path
