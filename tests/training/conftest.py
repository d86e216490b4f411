"""A training small enough for tests: a tiny network on tiny simulated micrographs, run to its end once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from hpddrnet_trt.training.config import TrainConfig, load_config
from hpddrnet_trt.training.run import TrainResult, train

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = [
    "network.channels=4",
    "network.ppm_channels=8",
    "network.head_channels=8",
    "network.detail=true",
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


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A run of ``TINY`` that nothing interrupted, named ``whole``; to be read only."""
    return train(load_config(None, [*TINY, f"run.folder={tmp_path_factory.mktemp('finished')}", "run.name=whole"]))


@pytest.fixture
def whole(finished: TrainResult, tiny: Callable[..., TrainConfig]) -> TrainConfig:
    """The configuration of a copy of ``finished``."""
    config = tiny("run.name=whole")
    shutil.copytree(finished.last.parent, config.run.path)
    return config


def in_a_process(config: TrainConfig, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python with ``command``, then every setting of ``config`` as an override."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command, *_flat(config.model_dump(mode="json"))],
        env=environment, capture_output=True, text=True, timeout=180, check=False, **options,
    )  # fmt: skip


def _flat(content: Mapping[str, Any], prefix: str = "") -> list[str]:
    flat: list[str] = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat.append(f"{prefix}{key}={value}")
    return flat
