"""HPDDRNet and DDRNet: one network, variants by data.

The layout follows the authors' published code, which every checkpoint comes from: ECA after the
first two stages of the low-resolution (context) branch, PAM on what flows from the high-resolution
(spatial) to the context branch. The paper's abstract describes another placement (ECA in the
spatial branch, PAM in the context branch); it is available as ``eca="spatial"``, ``pam="context"``
and is untested against any reference, since none was published.

With ``C = channels``: stem at 1/8 of the input (2C channels); context branch at 1/16 (4C), 1/32 (8C)
and 1/64 (16C); spatial branch at 1/8 (2C, 2C, 4C); logits at 1/8, or at 1/4 with our detail step.

The file reads from the bottom of the network to its top: configuration, blocks of convolutions
(Pan et al., "Deep Dual-Resolution Networks for Real-Time and Accurate Semantic Segmentation of Traffic
Scenes", IEEE T-ITS 2023; arXiv:2101.06085), the two attentions, pyramid pooling, backbone, heads.
Parameter names follow mmsegmentation's layout (``conv``, ``bn``, ``downsample.0`` ...), so that its
checkpoints load without renaming. All tensors are ``[N, C, H, W]``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpddrnet_trt.core.errors import ContractError, UsageError
from hpddrnet_trt.core.manifest import SIZE_MULTIPLE, NetworkConfig

BN_MOMENTUM = 0.1
_SLIM: dict[str, Any] = {"channels": 32, "ppm_channels": 128, "head_channels": 64}
_FULL: dict[str, Any] = {"channels": 64, "ppm_channels": 128, "head_channels": 128}
VARIANTS: dict[str, dict[str, Any]] = {
    "hpddrnet-23-slim": _SLIM,
    "hpddrnet-23-slim-no-eca": {**_SLIM, "eca": "none"},
    "hpddrnet-23-slim-no-pam": {**_SLIM, "pam": "none"},
    "hpddrnet-23-slim-spatial-eca-context-pam": {**_SLIM, "eca": "spatial", "pam": "context"},
    "ddrnet-23-slim": {**_SLIM, "eca": "none", "pam": "none"},
    "hpddrnet-23": _FULL,
    "hpddrnet-23-no-eca": {**_FULL, "eca": "none"},
    "hpddrnet-23-no-pam": {**_FULL, "pam": "none"},
    "ddrnet-23": {**_FULL, "eca": "none", "pam": "none"},
}


def network_config(variant: str, num_classes: int) -> NetworkConfig:
    """The configuration of a named variant; raises :class:`UsageError` for an unknown name."""
    if variant not in VARIANTS:
        raise UsageError(f"unknown network {variant!r}; choose one of: {', '.join(VARIANTS)}")
    return NetworkConfig(num_classes=num_classes, **VARIANTS[variant])


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear resize of ``[N, C, h, w]`` with pixel centres aligned (``align_corners=False``)."""
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)


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
    """Single-head self-attention over tokens ``[N, T, C]`` with biased projections.

    Trained in FP32 also under autocast: scores reach 1e5 and more, and those of a rounded product point the gradients
    of everything before it elsewhere.
    """

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.fc_q = nn.Linear(channels, channels)
        self.fc_k = nn.Linear(channels, channels)
        self.fc_v = nn.Linear(channels, channels)
        self.fc_o = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        device = tokens.device.type
        if self.training and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._attend(tokens.float())
        return self._attend(tokens)

    def _attend(self, tokens: Tensor) -> Tensor:
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


class Features(NamedTuple):
    """What the heads read."""

    main: Tensor  # both branches, [N, 4C, H/8, W/8]
    auxiliary: Tensor  # spatial branch after the first fusion, [N, 2C, H/8, W/8]
    fine: Tensor  # from within the stem, [N, C, H/4, W/4]


class Backbone(nn.Module):
    """Image ``[N, 3, H, W]`` to :class:`Features`."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        c = config.channels
        self.config = config
        self.stem = nn.Sequential(
            ConvNormAct(3, c, 3, stride=2),
            ConvNormAct(c, c, 3, stride=2),
            basic_stage(c, c),
            nn.ReLU(),
            basic_stage(c, 2 * c, stride=2),
            nn.ReLU(),
        )
        self.context_branch_layers = nn.ModuleList(
            [
                basic_stage(2 * c, 4 * c, stride=2),
                basic_stage(4 * c, 8 * c, stride=2),
                nn.Sequential(Bottleneck(8 * c, 8 * c, stride=2)),
            ]
        )
        self.spatial_branch_layers = nn.ModuleList(
            [basic_stage(2 * c, 2 * c), basic_stage(2 * c, 2 * c), nn.Sequential(Bottleneck(2 * c, 2 * c))]
        )
        self.compression_1 = ConvNormAct(4 * c, 2 * c, 1, act=False)
        self.compression_2 = ConvNormAct(8 * c, 2 * c, 1, act=False)
        self.down_1 = ConvNormAct(2 * c, 4 * c, 3, stride=2, act=False)
        self.down_2 = nn.Sequential(
            ConvNormAct(2 * c, 4 * c, 3, stride=2), ConvNormAct(4 * c, 8 * c, 3, stride=2, act=False)
        )
        if config.eca != "none":
            self.ecas = nn.ModuleList([ECA(), ECA()])
        if config.pam != "none":
            self.sps = nn.ModuleList([PositionAttention(4 * c), PositionAttention(8 * c)])
        self.spp = DAPPM(16 * c, config.ppm_channels, 4 * c, count_border=config.pool_border == "zeros")

    def forward(self, x: Tensor) -> Features:
        height, width = x.shape[-2] // 8, x.shape[-1] // 8
        fine = self.stem[:4](x)
        x = self.stem[4:](fine)

        context = self._attend_channels(0, self.context_branch_layers[0](x), "context")
        spatial = self._attend_channels(0, self.spatial_branch_layers[0](x), "spatial")
        context, spatial = self._fuse(0, context, spatial, height, width)
        after_first_fusion = spatial

        context = self._attend_channels(1, self.context_branch_layers[1](F.relu(context)), "context")
        spatial = self._attend_channels(1, self.spatial_branch_layers[1](F.relu(spatial)), "spatial")
        context, spatial = self._fuse(1, context, spatial, height, width)

        spatial = self.spatial_branch_layers[2](F.relu(spatial))
        context = self.spp(self.context_branch_layers[2](F.relu(context)))
        return Features(spatial + resize(context, height, width), after_first_fusion, fine)

    def _fuse(self, stage: int, context: Tensor, spatial: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Bilateral fusion: each branch receives the other, both read before either changes."""
        down, compression = ((self.down_1, self.compression_1), (self.down_2, self.compression_2))[stage]
        flow_down, flow_up = down(F.relu(spatial)), compression(F.relu(context))
        if self.config.pam == "fusion":
            flow_down = self.sps[stage](flow_down)
        elif self.config.pam == "context":
            context = self.sps[stage](context)
        return context + flow_down, spatial + resize(flow_up, height, width)

    def _attend_channels(self, stage: int, x: Tensor, branch: str) -> Tensor:
        return self.ecas[stage](x) if self.config.eca == branch else x


class Detail(nn.Module):
    """Features at 1/8 to 1/4 with the help of the stem's: for dots and cracks of a few pixels.

    Not of the papers. ``relu(up2(coarse) + bn(conv1x1(fine)))``, then a 3x3 convolution:
    ``[N, K, H/8, W/8]`` and ``[N, C, H/4, W/4]`` to ``[N, K, H/4, W/4]``. It adds 2.55 GMAC (10 %) to
    HPDDRNet-23-slim at 1024x1024.
    """

    def __init__(self, fine: int, width: int) -> None:
        super().__init__()
        self.skip = ConvNormAct(fine, width, 1, act=False)
        self.mix = ConvNormAct(width, width, 3)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        coarse = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
        mixed: Tensor = self.mix(F.relu(coarse + self.skip(fine)))
        return mixed


class Head(nn.Module):
    """Main and, in training mode, auxiliary classifier: features in, logits out."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        c, width = config.channels, config.head_channels
        self.head = self._hidden(4 * c, width)
        self.detail = Detail(c, width) if config.detail else None
        self.conv_seg = nn.Conv2d(width, config.num_classes, 1)
        self.aux_head = self._hidden(2 * c, width)
        self.aux_cls_seg = nn.Conv2d(width, config.num_classes, 1)

    @staticmethod
    def _hidden(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            NormActConv(inputs, outputs, 3), nn.BatchNorm2d(outputs, momentum=BN_MOMENTUM), nn.ReLU(inplace=True)
        )

    def forward(self, features: Features) -> Tensor | tuple[Tensor, Tensor]:
        main = self.head(features.main)
        if self.detail is not None:
            main = self.detail(main, features.fine)
        logits: Tensor = self.conv_seg(main)
        return (logits, self.aux_cls_seg(self.aux_head(features.auxiliary))) if self.training else logits


class HPDDRNet(nn.Module):
    """The complete network.

    Input: normalised RGB ``[N, 3, H, W]`` with H and W multiples of 8. Output: logits
    ``[N, classes, H/8, W/8]`` (H/4, W/4 with ``detail``); in training mode the pair (main, auxiliary),
    the latter always at 1/8. Raises
    :class:`ContractError` for any other input, and for a single image in training mode (the global
    mean of the pyramid pooling gives batch normalisation one value per channel and image).
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.decode_head = Head(config)
        self._initialize()

    def _initialize(self) -> None:
        # He initialisation as in mmsegmentation's DDRNet; the classifiers start near zero.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                # Attention starts almost closed: its flow into the context branch grows from zero.
                nn.init.normal_(module.weight, std=0.001)
                nn.init.zeros_(module.bias)
        for classifier in (self.decode_head.conv_seg, self.decode_head.aux_cls_seg):
            nn.init.normal_(classifier.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        # An exported graph has its own contract: sizes are symbols there, not numbers to compare.
        if not (torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()):
            self._check_input(x)
        return self.decode_head(self.backbone(x))

    def _check_input(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point():
            raise ContractError(
                f"the network takes normalised RGB images, float [batch, 3, height, width], not {x.dtype} "
                f"{list(x.shape)}"
            )
        height, width = x.shape[2:]
        if 0 in x.shape or height % SIZE_MULTIPLE or width % SIZE_MULTIPLE:
            raise ContractError(
                f"the network takes heights and widths that are multiples of {SIZE_MULTIPLE}, not {height}x{width} "
                f"(batch {x.shape[0]}); pad or resize the image, or use Segmenter, which takes any size"
            )
        if self.training and x.shape[0] < 2:
            raise ContractError("training needs at least two images per batch on each device; raise the batch size")

    def predict_logits(self, x: Tensor) -> Tensor:
        """Logits at the input's own resolution, ``[N, classes, H, W]`` (evaluation mode)."""
        logits = self(x)
        if isinstance(logits, tuple):
            raise UsageError("predict_logits needs evaluation mode; call network.eval() first")
        return resize(logits, x.shape[-2], x.shape[-1])
