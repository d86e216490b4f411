"""Optimisers and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from hpddrnet_trt.training.config import OptimisationConfig


def learning_rate(config: OptimisationConfig, step: int) -> float:
    """Learning rate of optimiser step ``step`` (0-based).

    Linear warm-up over ``warmup_steps``, then ``poly`` ``(1 - t)^power`` or ``cosine``
    ``(1 + cos(pi t)) / 2`` from ``lr`` down to ``final_lr``, with t the share of the remaining
    steps that is done. Without warm-up, ``poly`` is mmengine's ``PolyLR``.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    span = max(1, config.max_steps - config.warmup_steps)
    done = min(1.0, (step - config.warmup_steps) / span)
    fall = (1 - done) ** config.power if config.schedule == "poly" else (1 + math.cos(math.pi * done)) / 2
    return config.final_lr + (config.lr - config.final_lr) * fall


def build_optimiser(config: OptimisationConfig, network: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum (weight decay on everything, as the authors train) or AdamW (no decay of
    biases and of batch-norm's scales, which have one axis only)."""
    named = list(network.named_parameters())
    if config.optimiser == "sgd":
        parameters = [parameter for _, parameter in named]
        return torch.optim.SGD(
            parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    groups = [
        {"params": _by_axes(named, many=True), "weight_decay": config.weight_decay},
        {"params": _by_axes(named, many=False), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr)


def build_scheduler(config: OptimisationConfig, optimiser: torch.optim.Optimizer) -> LambdaLR:
    """Per-step scheduler following :func:`learning_rate`; its only state is the step."""
    return LambdaLR(optimiser, lambda step: learning_rate(config, step) / config.lr)


def _by_axes(named: Iterable[tuple[str, nn.Parameter]], many: bool) -> list[nn.Parameter]:
    return [parameter for _, parameter in named if (parameter.ndim > 1) == many]
