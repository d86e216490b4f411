"""The simulation of mosaics on many workers, where the answer is known."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("distributed")

PLAIN = {"tile": 0.5, "crowded": 1.0, "decode": 0.1}  # seconds


@pytest.fixture(scope="module")
def scaling() -> Any:
    path = Path(__file__).parents[2] / "benchmarks/scaling.py"
    spec = importlib.util.spec_from_file_location("scaling_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _inputs(scaling: Any, **values: float) -> Any:
    names = scaling.Inputs.__dataclass_fields__
    return scaling.Inputs(**{**dict.fromkeys(names, 0.0), **PLAIN, **values})


def test_workers_share_the_blocks(scaling: Any) -> None:
    inputs, blocks = _inputs(scaling, start=3.0), [scaling.Block(1.0, 1.0, 2)] * 10
    for workers, rounds in ((1, 10), (2, 5), (4, 3), (10, 1), (100, 1)):
        outcome = scaling.simulate(inputs, blocks, workers)
        assert outcome.seconds == pytest.approx(3 + 1.1 * rounds)
        assert outcome.efficiency == pytest.approx(11 / workers / outcome.seconds)
        assert sum(outcome.shares.values()) == pytest.approx(1)
    assert outcome.bottleneck == "start, tail, end"
    assert scaling.simulate(inputs, blocks, 4, cores=2).seconds == pytest.approx(3 + 2 * 1.1 * 3)


def test_storage_and_scheduler_bound_all_workers_together(scaling: Any) -> None:
    blocks = [scaling.Block(1.0, 1.0, 1)] * 3000
    stored = scaling.simulate(_inputs(scaling, bytes_read=1.0), blocks, 1000, bandwidth=1e8)
    assert stored.seconds == pytest.approx(3000 * 1e6 / 1e8, rel=0.05)
    assert stored.bottleneck == "storage"
    scheduled = scaling.simulate(_inputs(scaling, task=0.01), blocks, 1000)
    assert scheduled.seconds == pytest.approx(3000 * 0.01, rel=0.1)
    assert scheduled.bottleneck == "scheduler"
    assert scaling.simulate(_inputs(scaling, task=0.01), blocks, 10).bottleneck == "compute"


def test_blocks_of_a_large_mosaic(scaling: Any) -> None:
    for block in scaling.BLOCKS:
        blocks = scaling.large(1e10, block)
        assert len(blocks) == max(1, round(1e10 / block**2))
        assert blocks[0].labels * 1e6 == block**2
        assert 1 < blocks[0].read / blocks[0].labels < 1.6
        assert math.isqrt(blocks[0].tiles) ** 2 == blocks[0].tiles
