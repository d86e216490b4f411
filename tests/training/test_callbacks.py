"""Weight averaging, records, checkpoint files."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from hpddrnet_trt.core.errors import BadInputFile
from hpddrnet_trt.training.callbacks import (
    AtomicCheckpointIO,
    MovingAverage,
    _keep_rows_until,
    read_training_checkpoint,
    remove_leftovers,
)


def test_average_follows_its_formula_and_leaves_constants_alone() -> None:
    callback = MovingAverage(0.5)
    network = nn.BatchNorm1d(3)
    network.register_buffer("constant", torch.tensor([0.1, 0.2, 0.3]))
    average = AveragedModel(network, use_buffers=True, **callback._kwargs)
    expected = math.nan
    for n, value in enumerate([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0]):
        nn.init.constant_(network.weight, value)
        network.num_batches_tracked.fill_(n)
        average.update_parameters(network)
        kept = min(0.5, (1 + n) / (10 + n))
        expected = value if n == 0 else kept * expected + (1 - kept) * value
    assert average.module.weight.tolist() == pytest.approx([expected] * 3, rel=1e-5)
    assert torch.equal(average.module.constant, network.constant)  # to the bit
    assert average.module.num_batches_tracked == 11


def test_rows_after_the_checkpoint_and_torn_rows_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n2,0.5\n4,0.4\n6,0.3\n7")
    _keep_rows_until(path, ["step", "loss"], 4)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert rows == [{"step": "2", "loss": "0.5"}, {"step": "4", "loss": "0.4"}]
    _keep_rows_until(path, ["step", "loss"], 0)
    assert path.read_text().split() == ["step,loss"]


def test_checkpoint_survives_a_failing_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"loops": {}, "value": torch.ones(3)}, path)

    def cut(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hpddrnet_trt.training.callbacks.os.fsync", cut)
    with pytest.raises(KeyboardInterrupt):
        writer.save_checkpoint({"loops": {}, "value": torch.zeros(3)}, path)
    assert read_training_checkpoint(path)["value"].tolist() == [1, 1, 1]
    assert [item.name for item in tmp_path.iterdir()] == ["last.ckpt"]


def test_checkpoint_with_code_in_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"loops": {}, "run": print}, path)
    with pytest.raises(BadInputFile, match="not a readable training checkpoint"):
        read_training_checkpoint(path)


def test_leftovers_of_a_killed_write_are_removed(tmp_path: Path) -> None:
    for name in (".last.abc.tmp.ckpt", ".demo.xyz.tmp.safetensors", "last.ckpt", ".keep"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(item.name for item in tmp_path.iterdir()) == [".keep", "last.ckpt"]
