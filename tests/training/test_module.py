"""The learning rate against PyTorch's own schedulers, the optimizers' parameter groups."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, PolynomialLR, SequentialLR

from hpddrnet_trt.training.config import OptimizationSection
from hpddrnet_trt.training.module import build_optimizer, build_scheduler, learning_rate


def _rates(scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def _sgd() -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)


def test_poly_equals_pytorch_and_the_authors_formula() -> None:
    config = OptimizationSection(optimizer="sgd", lr=0.01, schedule="poly", power=0.9, max_steps=50)
    ours = [learning_rate(config, step) for step in range(50)]
    assert ours == pytest.approx(_rates(PolynomialLR(_sgd(), 50, 0.9), 50), rel=1e-9)
    assert learning_rate(config.model_copy(update={"max_steps": 120_000}), 60_000) == pytest.approx(0.01 * 0.5**0.9)


def test_cosine_with_warm_up_equals_pytorch() -> None:
    config = OptimizationSection(lr=0.01, final_lr=1e-4, schedule="cosine", warmup_steps=9, max_steps=60)
    optimizer = _sgd()
    warm_up = LinearLR(optimizer, start_factor=0.1, total_iters=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR's own use of a deprecated argument
        reference = SequentialLR(optimizer, [warm_up, CosineAnnealingLR(optimizer, 51, 1e-4)], [9])
        expected = _rates(reference, 60)
    assert [learning_rate(config, step) for step in range(60)] == pytest.approx(expected, rel=1e-6)


@settings(deadline=None)
@given(
    st.sampled_from(["poly", "cosine"]),
    st.integers(0, 40),
    st.integers(41, 200),
    st.floats(0, 1e-3),
    st.integers(0, 300),
)
def test_rate_stays_within_its_bounds(kind: str, warmup: int, steps: int, final: float, step: int) -> None:
    config = OptimizationSection.model_validate(
        {"lr": 1e-3, "final_lr": final, "schedule": kind, "warmup_steps": warmup, "max_steps": steps}
    )
    rate = learning_rate(config, step)
    assert 0 <= rate <= 1e-3 * (1 + 1e-12)
    if step >= warmup:
        assert rate >= final * (1 - 1e-9)
    if step >= steps:
        assert math.isclose(rate, final, abs_tol=1e-12)


def test_scheduler_steps_the_optimizer() -> None:
    config = OptimizationSection(optimizer="sgd", lr=0.01, schedule="poly", max_steps=10)
    optimizer = build_optimizer(config, nn.Linear(2, 2))
    expected = [learning_rate(config, step) for step in range(10)]
    assert _rates(build_scheduler(config, optimizer), 10) == pytest.approx(expected)


def test_adamw_spares_biases_and_norms_and_sgd_decays_everything() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    decayed, spared = build_optimizer(OptimizationSection(optimizer="adamw"), network).param_groups
    assert [tuple(parameter.shape) for parameter in decayed["params"]] == [(2, 1, 3, 3)]
    assert len(spared["params"]) == 3
    assert spared["weight_decay"] == 0
    (group,) = build_optimizer(OptimizationSection(optimizer="sgd"), network).param_groups
    assert len(group["params"]) == 4
    assert group["weight_decay"] == 5e-4
