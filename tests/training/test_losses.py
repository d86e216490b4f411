"""Losses against mmsegmentation's and the authors' own numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hpddrnet_trt.core.manifest import IGNORE_INDEX, NetworkConfig
from hpddrnet_trt.models.network import HPDDRNet
from hpddrnet_trt.training.losses import (
    CenterlineDice,
    CrossEntropy,
    LovaszSoftmax,
    OhemCrossEntropy,
    SegmentationLoss,
    SoftDice,
    WithOverlap,
    balanced_class_weights,
    boundary,
)


def test_ohem_equals_mmsegmentation_in_every_golden_case(golden: Path) -> None:
    arrays = np.load(golden / "losses" / "ohem_cases.npz")
    cases = json.loads((golden / "losses" / "ohem_expected.json").read_text())
    assert len(cases) >= 18
    for case in cases:
        logits = torch.from_numpy(arrays[case["logits"]].astype(np.float32)).requires_grad_()
        labels = torch.from_numpy(arrays[case["label"]])
        criterion = OhemCrossEntropy(case["thres"], case["min_kept"], case["class_weight"])
        loss = case["loss_weight"] * criterion(logits, labels)
        loss.backward()
        assert logits.grad is not None
        assert loss.item() == pytest.approx(case["loss_f64"], rel=1e-6, abs=1e-9), case
        assert logits.grad.norm().item() == pytest.approx(case["grad_l2"] or 0.0, rel=1e-5), case


def _golden_network(folder: Path, info: dict[str, Any]) -> HPDDRNet:
    stored = torch.load(folder / "checkpoint.pth", weights_only=True)["state_dict"]
    kinds = {"hpddrnet": {}, "ddrnet23slim": {"eca": "none", "pam": "none"}}
    network = HPDDRNet(NetworkConfig(num_classes=info["num_classes"], **kinds[folder.name]))
    wanted = network.state_dict()
    network.load_state_dict({name: stored[name].to(wanted[name].dtype) for name in wanted})
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # as the reference was computed
    return network.train()


@pytest.mark.parametrize("name", ["hpddrnet", "ddrnet23slim"])
@pytest.mark.parametrize("case", ["4x256x256", "2x128x192"])
def test_training_losses_and_first_sgd_steps_equal_the_authors(golden: Path, name: str, case: str) -> None:
    info = json.loads((golden / name / "info.json").read_text())
    train = info["train"][case]
    with np.load(golden / "inputs.npz") as inputs:
        images = torch.from_numpy(inputs[train["input_key"]].astype(np.float32))
        labels = torch.from_numpy(inputs[train["label_key"]])
    main, auxiliary = train["loss_decode"]
    criterion = OhemCrossEntropy(main["thres"], main["min_kept"], main["class_weight"])
    loss = SegmentationLoss(criterion, auxiliary["loss_weight"])
    network = _golden_network(golden / name, info)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    trajectory = train["sgd_f64"]
    for step, tolerance in ((0, 1e-5), (1, 1e-3)):
        losses = loss(network(images), labels)
        assert [one.item() for one in losses] == pytest.approx(trajectory[step], rel=tolerance)
        optimizer.zero_grad()
        sum(losses, torch.zeros(())).backward()
        optimizer.step()


def _reference_ohem(logits: Tensor, labels: Tensor, threshold: float, min_kept: int) -> float:
    """Slow and plain: sort the labelled pixels, keep the hard ones, take their mean."""
    table = torch.log_softmax(logits.double(), dim=1).permute(0, 2, 3, 1).reshape(-1, logits.shape[1])
    chances = sorted(
        math.exp(table[i, label].item()) for i, label in enumerate(labels.flatten().tolist()) if label != IGNORE_INDEX
    )
    limit = max(chances[min(min_kept, len(chances) - 1)], threshold)
    kept = [-math.log(chance) for chance in chances if chance < limit]
    return sum(kept) / len(kept) if kept else 0.0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), threshold=st.floats(0.05, 0.99), min_kept=st.integers(0, 300))
def test_ohem_equals_a_plain_reference(seed: int, threshold: float, min_kept: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, 8, 9, generator=generator, dtype=torch.float32) * 3
    labels = torch.randint(0, 4, (2, 8, 9), generator=generator).to(torch.uint8)
    labels[labels == 3] = IGNORE_INDEX
    expected = _reference_ohem(logits, labels, threshold, min_kept)
    assert OhemCrossEntropy(threshold, min_kept)(logits, labels).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


CRITERIA = [CrossEntropy(), CrossEntropy([1.0, 2.0]), OhemCrossEntropy(), SoftDice(), LovaszSoftmax(), CenterlineDice()]


@pytest.mark.parametrize("criterion", [*CRITERIA, WithOverlap(CrossEntropy(), SoftDice(), 1.0)])
def test_unlabelled_batch_gives_zero_loss_and_zero_gradient(criterion: nn.Module) -> None:
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    loss = criterion(logits, torch.full((1, 4, 4), IGNORE_INDEX, dtype=torch.uint8))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert torch.all(logits.grad == 0)


def test_ohem_of_certain_predictions_is_zero_and_not_nan() -> None:
    logits = torch.zeros(1, 2, 4, 4)
    logits[:, 0] = 200.0
    assert OhemCrossEntropy()(logits, torch.zeros(1, 4, 4, dtype=torch.uint8)).item() == 0


def test_class_weights_multiply_the_pixels_of_their_class() -> None:
    logits = torch.zeros(1, 2, 1, 4)
    labels = torch.tensor([[[0, 1, 1, 1]]], dtype=torch.uint8)
    assert CrossEntropy([1.0, 3.0])(logits, labels).item() == pytest.approx(math.log(2) * (1 + 9) / 4)


def test_centerline_dice_sees_a_gap_and_forgives_a_wider_line() -> None:
    line = torch.zeros(1, 40, 60, dtype=torch.uint8)
    line[:, 18:21, 5:55] = 1
    wider, broken = line.clone(), line.clone()
    wider[:, 17:22, 5:55] = 1
    broken[:, :, 28:32] = 0

    def loss(labels: torch.Tensor) -> tuple[float, float]:
        logits = 30.0 * torch.nn.functional.one_hot(labels.long(), 2).movedim(-1, 1)
        whole, dice = (criterion(logits, line).item() for criterion in (CenterlineDice(), SoftDice()))
        return whole, 2 * whole - dice  # the part of the centerlines

    assert loss(line)[0] == pytest.approx(0, abs=1e-3)
    assert loss(wider)[1] < loss(broken)[1]
    assert SoftDice()(30.0 * torch.nn.functional.one_hot(wider.long(), 2).movedim(-1, 1), line) > 0.1
    ignored = line.clone()
    ignored[:, :, 26:34] = IGNORE_INDEX
    logits = torch.randn(1, 2, 40, 60, requires_grad=True)
    CenterlineDice()(logits, ignored).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[:, :, :, 26:34].any()


def test_pixels_beside_another_class_count_by_the_boundary_weight() -> None:
    labels = torch.zeros(1, 5, 7, dtype=torch.uint8)
    labels[:, :, 3:] = 1
    labels[:, :, 5:] = IGNORE_INDEX  # no boundary
    labels[0, 0, 2] = IGNORE_INDEX
    beside = torch.zeros(1, 5, 7)
    beside[:, :, 2:4] = 1
    beside[0, 0, 2] = 0
    assert torch.equal(boundary(labels), beside)
    logits = torch.zeros(1, 2, 5, 7)
    for weight in (0.0, 1.0, 4.0):
        expected = math.log(2) * (1 + (weight - 1) * 9 / 24)
        assert CrossEntropy(boundary_weight=weight)(logits, labels).item() == pytest.approx(expected)
        assert OhemCrossEntropy(boundary_weight=weight)(logits, labels).item() == pytest.approx(expected)


@settings(deadline=None)
@given(st.lists(st.floats(1e-4, 1.0), min_size=2, max_size=6))
def test_balanced_weights_have_mean_one_and_favour_rare_classes(counts: list[float]) -> None:
    fractions = [count / sum(counts) for count in counts]
    weights = balanced_class_weights(fractions)
    assert sum(f * w for f, w in zip(fractions, weights, strict=True)) == pytest.approx(1.0)
    assert [w for _, w in sorted(zip(fractions, weights, strict=True))] == sorted(weights, reverse=True)


def test_balanced_weight_of_an_absent_class_is_finite() -> None:
    weights = balanced_class_weights([0.9, 0.1, 0.0])
    assert weights[2] == weights[1] > weights[0]


def _hard(labels: Tensor, classes: int) -> Tensor:
    """Logits that predict ``labels`` with certainty."""
    return torch.nn.functional.one_hot(labels.long(), classes).movedim(-1, 1).float() * 200


def _overlaps(predicted: Tensor, labels: Tensor, classes: int) -> list[tuple[float, float, float]]:
    """(intersection, predicted area, true area) of the classes present in the labels, by counting."""
    pairs = [(p, t) for p, t in zip(predicted.flatten().tolist(), labels.flatten().tolist(), strict=True)
             if t != IGNORE_INDEX]  # fmt: skip
    return [
        (sum(p == t == k for p, t in pairs), sum(p == k for p, _ in pairs), sum(t == k for _, t in pairs))
        for k in range(classes) if any(t == k for _, t in pairs)
    ]  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_overlap_losses_of_certain_predictions_are_the_metrics(seed: int) -> None:
    """Dice is exact there; Lovasz-softmax equals one minus the mean IoU (its defining property)."""
    generator = torch.Generator().manual_seed(seed)
    predicted = torch.randint(0, 3, (2, 5, 6), generator=generator)
    labels = torch.randint(0, 4, (2, 5, 6), generator=generator).to(torch.uint8)
    labels[labels == 3] = IGNORE_INDEX
    logits, counts = _hard(predicted, 3), _overlaps(predicted, labels, 3)
    dice = [2 * both / (one + other) for both, one, other in counts]
    iou = [both / (one + other - both) for both, one, other in counts]
    assert SoftDice()(logits, labels).item() == pytest.approx(1 - sum(dice) / len(dice), abs=1e-5)
    assert LovaszSoftmax()(logits, labels).item() == pytest.approx(1 - sum(iou) / len(iou), abs=1e-5)


@pytest.mark.parametrize("criterion", [SoftDice(), LovaszSoftmax()])
def test_overlap_losses_learn_a_rare_class(criterion: nn.Module) -> None:
    labels = torch.zeros(1, 10, 10, dtype=torch.uint8)
    labels[0, 4, 4:6] = 1
    logits = torch.zeros(1, 2, 10, 10, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.5)
    for _ in range(40):
        optimizer.zero_grad()
        criterion(logits, labels).backward()
        optimizer.step()
    assert torch.equal(logits.argmax(1), labels.long())


def test_mixture_is_the_weighted_sum() -> None:
    logits, labels = torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4), dtype=torch.uint8)
    parts = CrossEntropy()(logits, labels) + 0.5 * SoftDice()(logits, labels)
    assert WithOverlap(CrossEntropy(), SoftDice(), 0.5)(logits, labels) == parts
