"""Building blocks of DDRNet (Pan et al., "Deep Dual-Resolution Networks for Real-Time and Accurate
Semantic Segmentation of Traffic Scenes", IEEE T-ITS 2023; arXiv:2101.06085).

Parameter names follow mmsegmentation's layout (``conv``, ``bn``, ``downsample.0`` ...), so that its
checkpoints load without renaming. All tensors are ``[N, C, H, W]``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BN_MOMENTUM = 0.1


class ConvNormAct(nn.Module):
    """Convolution without bias, batch normalisation and optional ReLU, in that order."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs, momentum=BN_MOMENTUM)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return F.relu(x, inplace=True) if self.act else x


class NormActConv(nn.Module):
    """Batch normalisation, ReLU and convolution without bias: the order of DAPPM and the heads."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(inputs, momentum=BN_MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.bn(x), inplace=True))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs, momentum=BN_MOMENTUM)
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a residual sum; ``act`` says whether a ReLU follows the sum."""

    def __init__(self, inputs: int, width: int, stride: int = 1, act: bool = True) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(inputs, width, 3, stride)
        self.conv2 = ConvNormAct(width, width, 3, act=False)
        self.downsample = _shortcut(inputs, width, stride)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.conv2(self.conv1(x)) + shortcut
        return F.relu(y) if self.act else y


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions (the last doubles the width) and a residual sum without ReLU."""

    expansion = 2

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(inputs, width, 1)
        self.conv2 = ConvNormAct(width, width, 3, stride)
        self.conv3 = ConvNormAct(width, width * self.expansion, 1, act=False)
        self.downsample = _shortcut(inputs, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.conv3(self.conv2(self.conv1(x))) + shortcut


def basic_stage(inputs: int, width: int, stride: int = 1) -> nn.Sequential:
    """Two basic blocks; the second ends without ReLU."""
    return nn.Sequential(BasicBlock(inputs, width, stride), BasicBlock(width, width, act=False))


class DAPPM(nn.Module):
    """Deep aggregation pyramid pooling (arXiv:2101.06085, section 3.3).

    Five scales: the input itself, average pools of kernel 5/9/17 with stride 2/4/8, and the global
    mean; each is fused with the scale before it. ``count_border`` says whether what lies beyond the
    border counts as zeros, as it does in the published networks. The largest pool then covers 1088
    pixels of image, so its means shrink with the input: four-fold from 512 to 256 pixels.
    """

    pools = ((5, 2), (9, 4), (17, 8))

    def __init__(self, inputs: int, width: int, outputs: int, count_border: bool = True) -> None:
        super().__init__()
        self.scales = nn.ModuleList([NormActConv(inputs, width, 1)])
        for kernel, stride in self.pools:
            pool = nn.AvgPool2d(kernel, stride, kernel // 2, count_include_pad=count_border)
            self.scales.append(nn.Sequential(pool, NormActConv(inputs, width, 1)))
        self.scales.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), NormActConv(inputs, width, 1)))
        self.processes = nn.ModuleList(NormActConv(width, width, 3) for _ in range(len(self.scales) - 1))
        self.compression = NormActConv(width * len(self.scales), outputs, 1)
        self.shortcut = NormActConv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.scales[0](x)]
        for scale, process in zip(list(self.scales)[1:], self.processes, strict=True):
            pooled = F.interpolate(scale(x), size=x.shape[2:], mode="bilinear", align_corners=False)
            features.append(process(pooled + features[-1]))
        return self.compression(torch.cat(features, dim=1)) + self.shortcut(x)
