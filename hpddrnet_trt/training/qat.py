"""Fake quantization: a float network in training that computes what its INT8 form will compute.

Weights and activations are rounded to the levels of TensorRT's explicit quantization (NVIDIA's guide,
"Working with quantized types"): symmetric INT8, one scale per output channel for weights, one per
tensor for activations. They are placed as :mod:`hpddrnet_trt.graph.qdq` places the pairs of the
exported graph, whose rules are explained there; a test holds the two to each other. The rounding is
PyTorch's own (``fake_quantize``); its gradient is that of the identity within the range and zero beyond
(straight-through estimator; Jacob et al., CVPR 2018; arXiv:1712.05877).

Three convolutions are rounded in the form they are deployed in:

* Those before a normalisation layer carry its factor afterwards. With one scale per output channel
  that changes nothing: rounding the unfolded weight and multiplying is rounding the product.
* The first one reads one grey channel, see ``export.reformulate.GreyStem``.
* The last one of a network of two classes gives one margin, see ``export.reformulate.two_class_margin``.

The network's class, its weights and its state dict stay as they are. The ranges of the activations are
found once, before training, and fixed: after a few hundred small steps they still fit, what falls outside
is clipped in training too, and a continued run has nothing to repeat.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.manifest import Normalization
from hpddrnet_trt.models.network import BasicBlock, Bottleneck, HPDDRNet

WEIGHT_LEVELS = 127  # to either side of zero
_BRANCHES = ("context", "spatial")
LOWEST, HIGHEST = -128, 127  # activations: QuantizeLinear saturates at the ends of int8
FIRST = "backbone.stem.0.conv"
CLASSIFIER = "decode_head.conv_seg"
_TINY = 1e-12  # range of an activation, or of an output channel's weights, that is always zero


class Site(NamedTuple):
    """Where an activation is rounded: everything that reads it reads it rounded.

    ``end`` is the ``input`` or ``output`` of ``module``, or the result of a resize in its forward pass,
    of which ``number`` counts all in the network's forward pass.
    """

    module: str
    end: Literal["input", "output", "resized"]
    number: int = 0


@dataclass(frozen=True)
class FakeQuantSites:
    """What is rounded in a network."""

    inputs: dict[str, Site]  # convolution to the site that its input comes from
    others: tuple[Site, ...]  # further sites
    shared: tuple[tuple[Site, Site], ...]  # sites on one scale

    @property
    def all(self) -> tuple[Site, ...]:
        return tuple(dict.fromkeys([*self.inputs.values(), *self.others]))


def fake_quant_sites(network: HPDDRNet) -> FakeQuantSites:
    """The convolutions and activations of ``network`` that are INT8 once it is deployed.

    In floating point stay channel attention, the products of position attention, the inside of the
    pyramid pooling with the convolution of the global mean (a 1x1 map), and the auxiliary head, which
    is not deployed.
    """
    config, spp = network.config, network.backbone.spp
    left_out = ("decode_head.aux_", f"backbone.spp.scales.{len(spp.scales) - 1}.")
    inputs = {
        name: Site(name, "input")
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and not name.startswith(left_out)
    }
    others: list[Site] = []
    shared: list[tuple[Site, Site]] = []
    for name, module in network.named_modules():
        if isinstance(module, (BasicBlock, Bottleneck)):
            # One rounding for the main path and the shortcut, identity or projection.
            inputs[f"{name}.conv1.conv"] = block = Site(name, "input")
            if module.downsample is not None:
                inputs[f"{name}.downsample.0"] = block
                others.append(Site(f"{name}.downsample", "output"))
    # What the sum at the end of a stage writes, where more than a ReLU reads it.
    others += [Site(f"backbone.{branch}_branch_layers.{i}", "output") for branch in _BRANCHES for i in range(3)]
    for stage, down in enumerate(("down_1.conv", "down_2.0.conv")):
        context, spatial = (Site(f"backbone.{branch}_branch_layers.{stage}", "output") for branch in _BRANCHES)
        if config.eca == "context":
            context = Site(f"backbone.ecas.{stage}", "output")
        if config.pam == "context":
            inputs[f"backbone.sps.{stage}.cnn"] = context
            others.append(Site(f"backbone.sps.{stage}", "output"))
        elif config.pam == "none":  # then a convolution takes the fusion's sum into its kernel
            others.append(context)
        if context in {*inputs.values(), *others}:
            shared.append((context, inputs[f"backbone.compression_{stage + 1}.conv"]))
        if config.eca != "spatial":
            others.append(Site("backbone", "resized", stage))
            shared.append((spatial, inputs[f"backbone.{down}"]))
    pooled = [Site(f"backbone.spp.scales.{i + 1}.0", "output") for i in range(len(spp.pools))]
    pyramid, enlarged = Site("backbone.spp", "output"), Site("backbone", "resized", 2 + len(spp.processes))
    others += [Site("backbone.spp.shortcut", "output"), *pooled, pyramid, enlarged]
    shared.append((pyramid, enlarged))
    if config.detail:
        others.append(Site("decode_head.detail", "resized", enlarged.number + 1))
    return FakeQuantSites(inputs, tuple(others), tuple(shared))


def round_weight(weight: Tensor) -> Tensor:
    """``[outputs, ...]`` float32 on 255 levels, one scale for each output."""
    largest = weight.detach().abs().flatten(1).amax(dim=1)
    scale = largest.clamp(min=_TINY) / WEIGHT_LEVELS
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -WEIGHT_LEVELS, WEIGHT_LEVELS)


def round_activation(values: Tensor, largest: Tensor) -> Tensor:
    """Any shape, float32, on the 256 levels of a range that is symmetric about zero."""
    scale = largest.clamp(min=_TINY) / HIGHEST
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_tensor_affine(values, scale, zero, LOWEST, HIGHEST)


class FakeQuantization(nn.Module):
    """``fake(network, image)``: the logits of ``network`` as its INT8 form would give them.

    ``network`` is the one it was made for (or its copy, copied together with this module); it gets hooks,
    which do nothing unless it is called through here. ``normalization`` is what its input went
    through; ``percentile`` is the share of each activation's values, in percent and for each batch,
    that :meth:`observe` leaves inside the range. The only state is ``ranges``, float32 ``[sites]``: the
    largest magnitude at each site of ``sites``.
    """

    ranges: Tensor
    channel_gain: Tensor
    channel_shift: Tensor

    def __init__(self, network: HPDDRNet, normalization: Normalization, percentile: float = 100.0) -> None:
        super().__init__()
        self.sites = fake_quant_sites(network)
        self.percentile = percentile
        self._mode: Literal["off", "observe", "round"] = "off"
        self.register_buffer("ranges", torch.zeros(len(self.sites.all)))
        self._prepare_grey(normalization)
        self._resized: dict[int, int] = {}  # number of a resize to its site's index
        for index, site in enumerate(self.sites.all):
            module = network.get_submodule(site.module)
            if site.end == "resized":
                self._resized[site.number] = index
            elif site.end == "output":
                module.register_forward_hook(functools.partial(self._after, index))
            elif site.module == FIRST:
                module.register_forward_pre_hook(functools.partial(self._before_first, index))
            else:
                module.register_forward_pre_hook(functools.partial(self._before, index))

    def forward(self, network: HPDDRNet, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        with self._as("round"):
            logits: Tensor | tuple[Tensor, Tensor] = functional_call(network, self.weights(network), (image,))
        return logits

    @torch.no_grad()
    def observe(self, network: HPDDRNet, images: Iterable[Tensor]) -> None:
        """Set the ranges to the largest over ``images`` (normalised, ``[N, 3, H, W]``) of the float network.

        Raises :class:`UserError` when an activation is not finite.
        """
        was_training = network.training
        network.eval()
        self.ranges.zero_()
        for image in images:
            with self._as("observe"):
                network(image)
        network.train(was_training)
        index = {site: number for number, site in enumerate(self.sites.all)}
        for pair in self.sites.shared:
            both = [index[site] for site in pair]
            self.ranges[both] = self.ranges[both].max()
        if not bool(self.ranges.isfinite().all()):
            site = self.sites.all[int((~self.ranges.isfinite()).nonzero()[0])]
            raise UserError(
                f"an activation is not finite ({site.end} of {site.module}); check the weights training starts from"
            )

    def weights(self, network: HPDDRNet) -> dict[str, Tensor]:
        """The rounded weights of the network's convolutions, by their names in its state dict."""
        rounded = {}
        for name in self.sites.inputs:
            weight = network.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            if name == FIRST:
                rounded[f"{name}.weight"] = round_weight(self._grey_weight(weight))
            elif name == CLASSIFIER and len(weight) == 2:
                # Loss and labels depend on the difference of the two logits only.
                margin = round_weight(weight[1:] - weight[:1]) / 2
                rounded[f"{name}.weight"] = torch.cat([-margin, margin])
            else:
                rounded[f"{name}.weight"] = round_weight(weight)
        return rounded

    @contextmanager
    def _as(self, mode: Literal["observe", "round"]) -> Iterator[None]:
        self._mode = mode
        try:
            with _Resizes(self._after_resize):
                yield
        finally:
            self._mode = "off"

    # ------------------------------------------------------------------ activations

    def _before(self, index: int, _: nn.Module, arguments: tuple[Any, ...]) -> Any:
        return None if self._mode == "off" else self._at(index, arguments[0])

    def _after(self, index: int, _: nn.Module, arguments: Any, output: Tensor) -> Any:
        return None if self._mode == "off" else self._at(index, output)

    def _after_resize(self, number: int, values: Tensor) -> Tensor:
        index = self._resized.get(number)
        return values if index is None else self._at(index, values)

    def _at(self, index: int, values: Tensor) -> Tensor:
        if self._mode == "round":
            return round_activation(values, self.ranges[index])
        self.ranges[index] = torch.maximum(self.ranges[index], self._largest(values))
        return values

    def _largest(self, values: Tensor) -> Tensor:
        magnitudes = values.abs().flatten()
        outside = int(magnitudes.numel() * (100 - self.percentile) / 100)
        return magnitudes.topk(outside + 1).values[-1] if outside else magnitudes.max()

    # ------------------------------------------------------------ the first convolution

    def _prepare_grey(self, normalization: Normalization) -> None:
        """``x = (g - m) / s`` and, where the channels' means differ, ones: see ``GreyStem``."""
        means, stds = normalization.mean, normalization.std
        self._one_mean = len(set(means)) == 1
        centre = means[0] if self._one_mean else float(round(sum(means) / 3))
        width = 2.0 ** round(math.log2(sum(stds) / 3))
        mean, std = torch.tensor(means, dtype=torch.float64), torch.tensor(stds, dtype=torch.float64)
        self.register_buffer("channel_gain", (width / std).float().view(1, 3, 1, 1), persistent=False)
        self.register_buffer("channel_shift", ((centre - mean) / std).float().view(1, 3, 1, 1), persistent=False)

    def _grey_weight(self, weight: Tensor) -> Tensor:
        grey = (weight * self.channel_gain).sum(dim=1, keepdim=True)
        ones = (weight * self.channel_shift).sum(dim=1, keepdim=True)
        return torch.cat([grey, ones, torch.zeros_like(grey)], dim=1)

    def _before_first(self, index: int, _: nn.Module, arguments: tuple[Any, ...]) -> Any:
        if self._mode == "off":
            return None
        image: Tensor = arguments[0]
        grey = (image[:, :1] - self.channel_shift[:, :1]) / self.channel_gain[:, :1]
        ones = torch.zeros_like(grey) if self._one_mean else torch.ones_like(grey)
        rounded = self._at(index, torch.cat([grey, ones, torch.zeros_like(grey)], dim=1))
        return rounded if self._mode == "round" else image


class _Resizes(TorchFunctionMode):
    """Hands every result of ``F.interpolate``, which is no module and has no hooks, to ``then`` with its number."""

    def __init__(self, then: Callable[[int, Tensor], Tensor]) -> None:
        super().__init__()
        self._then = then
        self._number = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not F.interpolate:
            return result
        self._number += 1
        return self._then(self._number - 1, result)
