"""The two attention modules of HPDDRNet, in the form they are trained in."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class ECA(nn.Module):
    """Efficient channel attention (Wang et al., CVPR 2020; arXiv:1910.03151).

    A 1-D convolution of kernel 3 over the channels' global means gives one weight in 0..1 per
    channel. ``[N, C, H, W] -> [N, C, H, W]``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, kernel_size=3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean(dim=(2, 3)).unsqueeze(1)  # [N, 1, C]
        weights = torch.sigmoid(self.conv(means)).transpose(1, 2).unsqueeze(-1)  # [N, C, 1, 1]
        return x * weights


class ScaledDotProduct(nn.Module):
    """Single-head self-attention over tokens ``[N, T, C]`` with biased projections."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.fc_q = nn.Linear(channels, channels)
        self.fc_k = nn.Linear(channels, channels)
        self.fc_v = nn.Linear(channels, channels)
        self.fc_o = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        scores = self.fc_q(tokens) @ self.fc_k(tokens).transpose(1, 2) / math.sqrt(tokens.shape[-1])
        return self.fc_o(self.dropout(torch.softmax(scores, dim=-1)) @ self.fc_v(tokens))


class PositionAttention(nn.Module):
    """Position attention (after Fu et al., "Dual Attention Network", CVPR 2019; arXiv:1809.02983).

    A 3x3 convolution, then self-attention between all positions. ``[N, C, H, W]`` in and out; the
    score matrix holds ``(H W)^2`` values per image.
    """

    def __init__(self, channels: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.cnn = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.pa = ScaledDotProduct(channels, dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cnn(x)
        tokens = self.pa(y.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).reshape(y.shape)
