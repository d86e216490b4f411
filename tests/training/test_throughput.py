"""Rates of loading and training."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.data.augment import Augmentation
from hpddrnet_trt.training.config import TrainConfig
from hpddrnet_trt.training.throughput import measure_throughput

Tiny = Callable[..., TrainConfig]


def test_rates_and_nothing_left_behind(tiny: Tiny) -> None:
    config = tiny()
    found = measure_throughput(config, steps=3, warmup=1)
    assert found.input_rate > 0
    assert found.network_rate == pytest.approx(4 / found.step_seconds)
    assert 0 <= found.wait_share < 1
    assert "waiting for data" in found.text()
    left = {path.name for path in Path(config.run.path).iterdir()} if config.run.path.exists() else set()
    assert left <= {"data"}


def test_a_slow_input_shows(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = Augmentation.__call__

    def slow(self: Augmentation, *arguments: Any) -> Any:
        time.sleep(0.25)
        return quick(self, *arguments)

    monkeypatch.setattr(Augmentation, "__call__", slow)
    found = measure_throughput(tiny("optimisation.batch_size=2"), steps=2, warmup=1)
    assert found.input_rate < 4.0  # a quarter of a second per crop and more
    assert found.wait_share > 0.5


def test_impossible_requests(tiny: Tiny) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        measure_throughput(tiny(), steps=0)
    with pytest.raises(UsageError, match="accumulate"):
        measure_throughput(tiny("optimisation.accumulate=2"))
