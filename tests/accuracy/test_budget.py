"""Budgets: what keeps them, what breaks them, and which make no sense."""

from __future__ import annotations

import pytest

from hpddrnet_trt.accuracy.acceptance import Budget
from hpddrnet_trt.core.errors import UsageError
from tests.accuracy.fakes import accuracy


def test_a_budget_says_what_is_over_it() -> None:
    budget = Budget(max_miou_drop=0.3, min_agreement=0.995)
    assert budget.kept_by(accuracy(0.002))
    over = budget.breaches(accuracy(0.01))
    assert over == [
        "masked mIoU falls by 1.00 points, 0.3 are allowed",
        "labels are equal on 99.00 % of the pixels, 99.5 % are needed",
    ]
    assert str(budget) == "at most 0.3 points of masked mIoU lost and labels equal on at least 99.5 % of the pixels"


def test_a_better_candidate_keeps_any_budget_and_nan_none() -> None:
    assert Budget(max_miou_drop=0).kept_by(accuracy(-0.01))
    assert not Budget(max_miou_drop=100).kept_by(accuracy(float("nan")))
    assert not Budget(min_agreement=0).kept_by(accuracy(float("nan")))


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({}, "needs a limit"),
        ({"max_miou_drop": -1.0}, "between 0 and 100, got -1"),
        ({"min_agreement": 99.0}, "between 0 and 1, got 99"),
    ],
)
def test_senseless_budgets(limits: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Budget(**limits)
