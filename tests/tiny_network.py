"""Small random networks for tests that need no reference data."""

from __future__ import annotations

from typing import Any

import torch

from hpddrnet_trt.core.manifest import ClassInfo, Manifest, NetworkConfig, default_palette
from hpddrnet_trt.models.network import HPDDRNet
from tests import traces  # noqa: F401 - from now on PyTorch traces a network once for all tests


def tiny_network(seed: int = 0, **changes: Any) -> HPDDRNet:
    """A network of 4 channels with random weights and lively batch-norm statistics, evaluation mode."""
    config = NetworkConfig.model_validate(
        {"channels": 4, "ppm_channels": 8, "head_channels": 8, "num_classes": 3, **changes}
    )
    torch.manual_seed(seed)
    network = HPDDRNet(config)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def lively(network: HPDDRNet) -> HPDDRNet:
    """The network with attention projections large enough to matter (they start almost closed)."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.25)
            torch.nn.init.normal_(module.bias, std=0.2)
    return network


def tiny_manifest(network: HPDDRNet, **changes: Any) -> Manifest:
    colours = default_palette(network.config.num_classes)
    classes = [ClassInfo(name=f"phase {i}", color=colour) for i, colour in enumerate(colours)]
    return Manifest(network=network.config, classes=classes, **changes)
