"""A training small enough for tests: a tiny network on tiny simulated micrographs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hpddrnet_trt.training.config import TrainConfig, load_config

TINY = [
    "network.channels=4",
    "network.ppm_channels=8",
    "network.head_channels=8",
    "augmentation.crop=[64, 64]",
    "data.simulated.size=96",
    "data.simulated.train=5",
    "data.simulated.val=2",
    "data.simulated.test=1",
    "optimization.max_steps=12",
    "optimization.batch_size=4",
    "optimization.ema_decay=0.99",
    "run.accelerator=cpu",
    "run.threads=1",
    "run.val_every=5",
    "run.checkpoint_every=3",
    "run.log_every=2",
    "run.progress=false",
]


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., TrainConfig]:
    """``tiny("section.key=value", ...)``: the configuration of a tiny run below ``tmp_path``."""

    def configure(*overrides: str) -> TrainConfig:
        return load_config(None, [*TINY, f"run.folder={tmp_path / 'runs'}", *overrides])

    return configure
