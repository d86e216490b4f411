"""Whole runs of a tiny network: what they leave behind, and that stopping them changes nothing."""

from __future__ import annotations

import csv
import errno
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hpddrnet_trt.core.errors import NoGpu, UsageError, UserError
from hpddrnet_trt.core.manifest import Manifest, read_manifest
from hpddrnet_trt.core.metrics import LabelComparison
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.engines.onnxruntime import OnnxRuntimeEngine
from hpddrnet_trt.export.onnx import ExportOptions, export_onnx
from hpddrnet_trt.models.checkpoints import load_checkpoint
from hpddrnet_trt.models.network import HPDDRNet, resize
from hpddrnet_trt.training import callbacks
from hpddrnet_trt.training.callbacks import TrainingInterrupted
from hpddrnet_trt.training.config import TrainConfig
from hpddrnet_trt.training.data import TrainingSamples
from hpddrnet_trt.training.module import SegmentationModule
from hpddrnet_trt.training.qat import FakeQuantization
from hpddrnet_trt.training.run import TrainResult, train
from tests.interrupts import deliver
from tests.training.conftest import REPOSITORY, in_a_process

Tiny = Callable[..., TrainConfig]


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def differences(first: Any, second: Any, place: str = "") -> list[str]:
    """Places where two training checkpoints differ by as much as a bit; the run's name and place may."""
    if place.endswith(("/run/name", "/run/folder")):
        return []
    if isinstance(first, torch.Tensor):
        return [] if isinstance(second, torch.Tensor) and torch.equal(first, second) else [place]
    if isinstance(first, dict):
        if not isinstance(second, dict) or first.keys() != second.keys():
            return [f"{place}: keys"]
        return [found for key in first for found in differences(first[key], second[key], f"{place}/{key}")]
    if isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return [f"{place}: length"]
        pairs = enumerate(zip(first, second, strict=True))
        return [found for i, (one, other) in pairs for found in differences(one, other, f"{place}/{i}")]
    return [] if first == second else [place]


def assert_same_run(first: Path, second: Path) -> None:
    """Weights, averages, buffers, optimizer, schedule, loop counters, rows and best model are equal."""
    one, other = (torch.load(folder / "last.ckpt", weights_only=True) for folder in (first, second))
    assert {"state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "loops"} <= one.keys()
    assert differences(one, other) == []
    assert read_rows(first) == read_rows(second)
    networks = [load_checkpoint(folder / f"{folder.name}.safetensors") for folder in (first, second)]
    assert differences(networks[0][0].state_dict(), networks[1][0].state_dict()) == []
    assert networks[0][1].metrics == networks[1][1].metrics


def val_miou(
    network: HPDDRNet, manifest: Manifest, dataset: FolderDataset, fake: FakeQuantization | None = None
) -> float:
    """Of the network, or of its rounded form."""
    confusion = LabelComparison(len(dataset.classes))
    mean, std = manifest.normalization.mean[0], manifest.normalization.std[0]
    for sample in dataset.split("val"):
        grey, mask = dataset.load(sample)
        image = ((torch.tensor(grey).float() - mean) / std).expand(1, 3, *grey.shape)
        with torch.no_grad():
            coarse = network(image) if fake is None else fake(network, image)
            confusion.update(resize(coarse, *grey.shape).argmax(1)[0].numpy(), mask)
    return confusion.scores().miou


def test_run_leaves_model_records_and_checkpoint(whole: TrainConfig, finished: TrainResult) -> None:
    result = train(whole)  # a finished run has nothing left to do
    assert result.metrics == finished.metrics
    folder = whole.run.path
    assert result.last.read_bytes() == finished.last.read_bytes()
    assert result.checkpoint == folder / "whole.safetensors"
    assert result.last == folder / "last.ckpt"
    rows = read_rows(folder)
    assert [row["step"] for row in rows if row["train/loss"]] == ["2", "4", "6", "8", "10", "12"]
    assert [row["step"] for row in rows if row["val/miou"]] == ["5", "10", "12"]  # the last step always
    assert list((folder / "tensorboard").glob("events.*"))
    assert torch.load(result.last, weights_only=True)["global_step"] == 12

    _, manifest = load_checkpoint(result.checkpoint)
    dataset = FolderDataset.open(folder / "data")
    assert manifest.data is not None
    assert manifest.data.sha256 == dataset.checksum()
    assert (manifest.data.license, manifest.data.train_images) == (dataset.license, 5)
    assert manifest.data.crop == (64, 64)
    assert manifest.data.read_at_m == pytest.approx((10e-9, 10e-9))
    assert manifest.class_names == dataset.class_names
    assert manifest.palette == dataset.palette
    grey = dataset.statistics("train")
    assert manifest.normalization.mean == pytest.approx([grey.grey_mean] * 3)
    assert manifest.normalization.std == pytest.approx([grey.grey_std] * 3)
    assert {"hpddrnet-trt", "torch", "lightning"} <= manifest.versions.keys()
    best = max(float(row["val/miou"]) for row in rows if row["val/miou"])
    assert manifest.metrics["val/miou"] == pytest.approx(best)
    # The exported weights are the ones that were validated (the averaged ones).
    assert val_miou(*load_checkpoint(result.checkpoint), dataset) == pytest.approx(best)


KILLER = """
import os, signal, sys
from hpddrnet_trt.training.config import load_config
from hpddrnet_trt.training.data import Loader
from hpddrnet_trt.training.module import SegmentationModule
from hpddrnet_trt.training.run import train

where, at, number, *overrides = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with SIGINT ignored
def die():
    os.killpg(0, int(number))  # all of them, as a terminal does
if where == "save":
    os.fsync = lambda _: die()
elif where == "start of workers":
    start = Loader.__iter__
    Loader.__iter__ = lambda self: (start(self), die())[0]
else:
    method = getattr(SegmentationModule, where)
    def deadly(self, *args):
        if self.global_step == int(at):
            die()
        return method(self, *args)
    setattr(SegmentationModule, where, deadly)
train(load_config(None, overrides))
"""


def _run_and_signal(where: str, at: int, number: signal.Signals, config: TrainConfig) -> tuple[int, str]:
    """Train in a process that sends itself a signal; its exit code and what it wrote to stderr."""
    done = in_a_process(config, "-c", KILLER, where, str(at), str(int(number)), start_new_session=True)
    return done.returncode, done.stderr


def _run_and_die(where: str, at: int, config: TrainConfig) -> None:
    code, err = _run_and_signal(where, at, signal.SIGKILL, config)
    assert code == -signal.SIGKILL, err


def test_killed_run_continues_to_the_same_bits(tiny: Tiny, finished: TrainResult) -> None:
    killed = tiny("run.name=b")
    folder = killed.run.path
    # In the middle of a step, with two steps done since the checkpoint of step 6.
    _run_and_die("training_step", 8, killed)
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 6
    assert read_rows(folder)[-1]["step"] == "8"  # a row the resumed run must not repeat
    # While a checkpoint is being written: the one before stays whole.
    _run_and_die("save", 0, killed)
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 6
    assert list(folder.glob(".last*"))
    # In the validation of step 10, before its checkpoint.
    _run_and_die("validation_step", 10, killed)
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 9
    train(killed)
    assert_same_run(finished.last.parent, folder)
    assert not list(folder.glob(".*"))


def test_a_real_ctrl_c_ends_the_process_with_everything_saved(tiny: Tiny) -> None:
    """It reaches the whole group of processes, also those that load images and are still starting."""
    stopped = tiny("run.name=a", "run.workers=1")
    code, err = _run_and_signal("start of workers", 0, signal.SIGINT, stopped)
    assert code == 1, err
    assert "stopped after step 1; " in err
    assert "DataLoader worker" not in err
    assert torch.load(stopped.run.path / "last.ckpt", weights_only=True)["global_step"] == 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ctrl_c_finishes_the_step_and_resumes_exactly(
    tiny: Tiny, finished: TrainResult, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    """After an ordinary step (4), and after one that a validation follows (5)."""
    options = [] if accumulate == 1 else ["optimization.accumulate=2", "optimization.max_steps=8"]
    uninterrupted = (finished if accumulate == 1 else train(tiny("run.name=a", *options))).last.parent
    original, handler = SegmentationModule.training_step, signal.getsignal(signal.SIGINT)
    for step in (4, 5):
        stopped = tiny(f"run.name=stopped-{step}", *options)

        def interrupted(self: SegmentationModule, batch: Any, batch_idx: int, step: int = step) -> torch.Tensor:
            if batch_idx == (step - 1) * accumulate:
                deliver(signal.SIGINT)
            return original(self, batch, batch_idx)

        with monkeypatch.context() as patch:
            patch.setattr(SegmentationModule, "training_step", interrupted)
            with pytest.raises(TrainingInterrupted, match=rf"stopped after step {step}; .*same command again"):
                train(stopped)
        assert signal.getsignal(signal.SIGINT) is handler
        assert torch.load(stopped.run.path / "last.ckpt", weights_only=True)["global_step"] == step
        train(stopped)
        assert_same_run(uninterrupted, stopped.run.path)


def test_second_ctrl_c_stops_at_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def impatient(self: SegmentationModule, batch: Any, batch_idx: int) -> torch.Tensor:
        deliver(signal.SIGINT)
        deliver(signal.SIGINT)
        raise AssertionError("the second signal ends the step")

    monkeypatch.setattr(SegmentationModule, "training_step", impatient)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(UserError, match="stopped at once; nothing was saved yet"):
        train(tiny())
    assert signal.getsignal(signal.SIGINT) is handler


class Deadly(TrainingSamples):
    """Ends the process that loads it."""

    def __getitem__(self, number: int) -> Any:
        assert torch.utils.data.get_worker_info() is not None  # or the tests' own process would die
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("channels", [8, 16])
def test_narrow_networks_train(tiny: Tiny, channels: int) -> None:
    """In channels last PyTorch's gradient of their strided 1x1 convolutions destroys the memory of the process."""
    sizes = ["augmentation.crop=[256, 256]", "data.simulated.size=256", "optimization.max_steps=3"]
    done = in_a_process(tiny(f"network.channels={channels}", *sizes), "-c", TRAIN)
    assert done.returncode == 0, done.stderr


TRAIN = """
import sys
from hpddrnet_trt.training import run
from hpddrnet_trt.training.config import load_config

run.train(load_config(None, sys.argv[1:]))
"""

DEADLY = """
import sys
from hpddrnet_trt.training import run
from hpddrnet_trt.training.config import load_config
from tests.training.test_run import Deadly

run.TrainingSamples = Deadly
run.train(load_config(None, sys.argv[1:]))
"""


def test_death_of_a_worker_is_told(tiny: Tiny) -> None:
    """In a process of its own, since PyTorch answers such a death in a signal handler."""
    done = in_a_process(tiny("run.workers=1"), "-c", DEADLY)
    assert done.returncode == 1, done.stderr
    assert re.search(r"UserError: a process that loads images died.*lower run\.workers", done.stderr), done.stderr


def trained_in_a_process(config: TrainConfig) -> Path:
    """The folder of the run, which the command trained."""
    empty = config.run.folder.parent / "empty.yaml"
    empty.write_text("")
    done = in_a_process(config, str(REPOSITORY / "train" / "train.py"), "--config", str(empty))
    assert done.returncode == 0, done.stderr
    return config.run.path


def test_number_of_workers_changes_nothing(tiny: Tiny, finished: TrainResult) -> None:
    """In a process of its own: one that ran a thousand tests with other libraries before died here without a trace."""
    helped = trained_in_a_process(tiny("run.name=b", "run.workers=2"))
    stored = [torch.load(folder / "last.ckpt", weights_only=True) for folder in (finished.last.parent, helped)]
    assert differences(stored[0]["current_model_state"], stored[1]["current_model_state"]) == []
    assert read_rows(finished.last.parent) == read_rows(helped)


def test_two_processes_train_together(tiny: Tiny) -> None:
    config = tiny("run.name=two", "run.devices=2", "run.strategy=ddp", "data.simulated.val=3")
    trained_in_a_process(config)
    rows = read_rows(config.run.path)
    assert [row["step"] for row in rows if row["val/miou"]] == ["5", "10", "12"]
    # Three validation images on two ranks: each counted once.
    dataset = FolderDataset.open(config.run.path / "data")
    best = max(float(row["val/miou"]) for row in rows if row["val/miou"])
    assert val_miou(*load_checkpoint(config.run.path / "two.safetensors"), dataset) == pytest.approx(best)


def test_bfloat16_and_clipping_and_no_average(tiny: Tiny) -> None:
    others = ["optimization.clip_norm=1", "optimization.ema_decay=null", "network.detail=false"]
    result = train(tiny("run.precision=bf16-mixed", *others))
    assert np.isfinite(result.metrics["val/loss"])


def test_training_starts_from_a_pretrained_backbone(tiny: Tiny, finished: TrainResult) -> None:
    source = finished.checkpoint
    barely = ["optimization.lr=1e-12", "optimization.ema_decay=null", "optimization.max_steps=1"]
    tuned = train(tiny("run.name=tuned", f"network.pretrained={source}", *barely)).checkpoint
    (before, _), (after, manifest) = load_checkpoint(source), load_checkpoint(tuned)
    assert torch.allclose(after.backbone.stem[0].conv.weight, before.backbone.stem[0].conv.weight, atol=1e-6)
    assert "whole.safetensors" in manifest.remarks[0]


# ------------------------------------------------------------------------- errors


def test_other_settings_other_data_and_damaged_checkpoints_are_refused(tiny: Tiny, whole: TrainConfig) -> None:
    with pytest.raises(UsageError, match=r"optimization\.lr: 0\.001 -> 0\.5.*choose another run\.name"):
        train(tiny("run.name=whole", "optimization.lr=0.5"))
    with pytest.raises(UsageError, match=r"holds a run already.*run\.resume=auto"):
        train(tiny("run.name=whole", "run.resume=never"))
    data, last = whole.run.path / "data", whole.run.path / "last.ckpt"
    first, *others = (data / "masks" / "train").iterdir()
    Image.fromarray(np.zeros((96, 96), dtype=np.uint8)).save(first)
    with pytest.raises(UsageError, match=r"images or masks in .* changed"):
        train(whole)
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"last\.ckpt is not a readable training checkpoint.*delete it"):
        train(whole)
    torch.save({"weights": 1}, last)
    with pytest.raises(UserError, match=r"last\.ckpt is not a training checkpoint"):
        train(whole)
    for mask in others:
        Image.fromarray(np.zeros((96, 96), dtype=np.uint8)).save(mask)
    with pytest.raises(UserError, match="only the class 'grain'"):
        train(tiny("run.name=other", f"data.path={data}"))


def test_diverging_loss_stops_with_step_and_rate(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"the loss became (nan|inf) at step \d+ \(learning rate \S+\).*clip_norm"):
        train(tiny("optimization.optimizer=sgd", "optimization.lr=1e30", "optimization.schedule=poly"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimization.batch_size=1"], "one image per forward pass"),
        (["optimization.accumulate=4"], "one image per forward pass"),
        (["run.devices=3"], r"batch_size=4 cannot be shared evenly by 3 device.*multiple of 3"),
        (["run.precision=16-mixed"], "16-mixed needs a GPU"),
        (["loss.class_weights=[1, 2]"], r"2 values but the data has 3 classes \(grain"),
        (["data.val_split=validation"], r"there is no validation split \(there are: train, val, test\)"),
        (["data.path=/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_impossible_requests_are_told_before_training(tiny: Tiny, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(tiny(*overrides))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu_is_told(tiny: Tiny) -> None:
    with pytest.raises(NoGpu, match=r"run\.accelerator=cpu"):
        train(tiny("run.accelerator=gpu"))


def test_full_disk_keeps_the_last_checkpoint(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny()
    written: list[int] = []
    flush = os.fsync

    def full(handle: int) -> None:
        written.append(handle)
        if len(written) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(handle)

    monkeypatch.setattr(callbacks.os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*last\.ckpt: No space left.*free some space"):
        train(config)
    assert torch.load(config.run.path / "last.ckpt", weights_only=True)["global_step"] == 3
    assert not list(config.run.path.glob(".*"))


def test_the_model_knows_its_pictures_and_its_export_gives_features(finished: TrainResult, tmp_path: Path) -> None:
    trained = read_manifest(finished.checkpoint)
    domain = trained.domain
    assert domain is not None
    assert trained.temperature is not None
    assert trained.fraction_errors is not None
    assert (domain.pictures, len(domain.mean)) == (5, 8)
    described = export_onnx(finished.checkpoint, tmp_path / "m.onnx", ExportOptions(1, 64, 64), verify=False)
    assert described.domain == domain
    assert (described.temperature, described.fraction_errors) == (trained.temperature, trained.fraction_errors)
    with OnnxRuntimeEngine(tmp_path / "m.onnx", threads=1) as engine:
        assert engine.infer(np.zeros((1, 1, 64, 64), np.uint8)).domain_features.shape == (1, 8, 1, 1)
