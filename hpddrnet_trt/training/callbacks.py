"""What happens around the steps: stopping on request, weight averaging, records, checkpoints, progress.

All of it is exact across a resume. A training checkpoint is only ever taken when everything that
belongs to its step is done (weights updated, average updated, rows written, validation run), so a
continued run repeats nothing and skips nothing. Lightning's own CSVLogger and ModelCheckpoint do not serve
that: the one deletes the rows of the run it continues, the other saves before a validation of the same step.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from hpddrnet_trt.core.errors import BadInputFile, UserError, one_line
from hpddrnet_trt.core.files import atomic_path
from hpddrnet_trt.core.manifest import Manifest
from hpddrnet_trt.core.progress import QUIET, progress_bar
from hpddrnet_trt.core.text import duration
from hpddrnet_trt.models.checkpoints import save_checkpoint
from hpddrnet_trt.models.network import HPDDRNet
from hpddrnet_trt.training.module import SegmentationModule, learning_rate

LAST = "last.ckpt"
_SLOW_STEPS, _TIMED_STEPS = 2, 4  # the first of a process are slower; an estimate is made from the next
log = logging.getLogger(__name__)


class TrainingInterrupted(UserError):
    """Training was stopped on request; the message says where it stands and how to continue."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(
            f"stopped after step {step}; everything is saved in {checkpoint}: "
            "give the same command again to continue from there"
        )
        self.step = step


class StopRequest:
    """Set by the first Ctrl-C or SIGTERM; a second one ends the program at once.

    Stopping between steps keeps the saved weights, optimizer state and averages consistent, which
    an exception in the middle of a weight update would not.
    """

    def __init__(self) -> None:
        self.requested = False

    def _handle(self, signum: int, _: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        log.warning("finishing this step and saving (%s); again to stop at once", signal.Signals(signum).name)

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Catch the two signals within the block (only possible in the main thread)."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {signum: signal.signal(signum, self._handle) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk, renames.

    Lightning's own writer goes through the system's temporary folder; when that is another file
    system the final move is a copy, which a kill can cut in half.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        buffer = io.BytesIO()  # torch.save straight to a file reports a full disk as a RuntimeError
        torch.save(checkpoint, buffer)
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            stream.write(buffer.getbuffer())
            stream.flush()
            os.fsync(stream.fileno())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_training_checkpoint(Path(path), mmap=False)


def read_training_checkpoint(path: Path, mmap: bool = True) -> dict[str, Any]:
    """Load a training checkpoint to the CPU; only tensors and plain values are admitted.

    ``mmap``: leave the tensors in the file, for who looks at the rest. Names of the first version are
    replaced by today's. Raises :class:`BadInputFile` when it is truncated, foreign, or holds anything else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as exc:
        raise BadInputFile(
            f"{path} is not a readable training checkpoint ({one_line(exc, 'first')}); "
            "delete it to start the run again"
        ) from exc
    if not isinstance(content, dict) or "loops" not in content:
        raise BadInputFile(f"{path} is not a training checkpoint; delete it to start the run again")
    for key in {"state_dict", "current_model_state"} & content.keys():
        content[key] = {name.replace("quantisation.", "quantization."): value for name, value in content[key].items()}
    return content


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files a killed run left in ``folder``."""
    for leftover in folder.glob(".*.tmp*"):
        if leftover.is_file():
            leftover.unlink(missing_ok=True)


def step_done(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether this forward pass completed an optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class MovingAverage(WeightAveraging):
    """Exponential moving average of the weights and of batch-norm's statistics.

    Lightning's callback with a decay that warms up, ``min(decay, (1 + n) / (10 + n))`` after n
    updates (as TensorFlow's ExponentialMovingAverage offers), so that short runs are not averaged
    with their random start. Validation and the exported model use the average.
    """

    def __init__(self, decay: float) -> None:
        def average(averaged: list[Tensor], current: list[Tensor], updates: Tensor | int) -> None:
            n = int(updates)
            share = 1 - min(decay, (1 + n) / (10 + n))
            for old, new in zip(averaged, current, strict=True):
                if old.is_floating_point():
                    old.lerp_(new, share)  # leaves constants exactly as they are
                else:
                    old.copy_(new)

        super().__init__(use_buffers=True, multi_avg_fn=average)

    def network(self) -> HPDDRNet:
        """The network with averaged weights."""
        assert self._average_model is not None
        network = self._average_model.module.network
        assert isinstance(network, HPDDRNet)
        return network


class Records(pl.Callback):
    """Writes ``metrics.csv`` and TensorBoard events, one row per report or validation.

    ``train/*`` are means over the steps since the row before. On a resume, rows that are younger
    than the checkpoint are dropped, so the file continues without gaps or duplicates.
    """

    def __init__(self, folder: Path, class_names: Sequence[str], *, every: int, images: int, batch_size: int) -> None:
        self.folder = folder
        self.every = every
        self.passes_per_step = batch_size / images
        self.class_names = class_names
        self.columns = ["step", "epoch", "lr", "train/loss", "train/loss_main", "train/loss_auxiliary"]
        self.columns += ["val/loss", "val/miou", "val/mean_accuracy", "val/pixel_accuracy"]
        self.columns += [f"val/iou/{name}" for name in class_names]
        self._sums = [0.0, 0.0, 0.0]  # main loss, auxiliary loss, passes
        self._events: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"sums": list(self._sums)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sums = list(state_dict["sums"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        from torch.utils.tensorboard import SummaryWriter

        _keep_rows_until(self.folder / "metrics.csv", self.columns, trainer.global_step)
        self._events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=trainer.global_step + 1)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, SegmentationModule)
        for i, value in enumerate((*pl_module.losses, 1.0)):
            self._sums[i] += value
        step = trainer.global_step
        if not step_done(trainer, batch_idx) or step % self.every:
            return
        main, auxiliary, passes = _summed_over_ranks(trainer, self._sums)
        self._sums = [0.0, 0.0, 0.0]
        row = {"lr": learning_rate(pl_module.optimization, step - 1), "train/loss": (main + auxiliary) / passes}
        row |= {"train/loss_main": main / passes, "train/loss_auxiliary": auxiliary / passes}
        self._write(trainer, row)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, SegmentationModule)
        self._write(trainer, validation_metrics(pl_module, self.class_names))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _write(self, trainer: pl.Trainer, row: dict[str, float]) -> None:
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        row = {"step": step, "epoch": round(step * self.passes_per_step, 4), **row}
        with (self.folder / "metrics.csv").open("a", newline="", encoding="utf-8") as stream:
            csv.DictWriter(stream, self.columns).writerow(row)
        for name, value in row.items():
            if name not in ("step", "epoch"):
                self._events.add_scalar(name, value, step)

    def _close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None


class Checkpoints(pl.Callback):
    """Keeps ``last.ckpt``, from which training resumes, and the best model as ``.safetensors``.

    The best model is the one with the highest validation mIoU; it holds the averaged weights when
    averaging is on. Also ends the run: at ``max_steps``, after a last validation, or at the end of
    the step in which a stop was requested.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, stop: StopRequest, *, max_steps: int, val_every: int, every: int
    ) -> None:
        self.last = folder / LAST
        self.best = folder / f"{manifest.name}.safetensors"
        self.manifest = manifest
        self.stop = stop
        self.max_steps = max_steps
        self.val_every = val_every
        self.every = every
        self.best_metrics: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"best_metrics": dict(self.best_metrics)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_metrics = dict(state_dict["best_metrics"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            remove_leftovers(self.last.parent)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not step_done(trainer, batch_idx):
            return
        step = trainer.global_step
        if step == self.max_steps:
            trainer.should_stop = True  # makes Lightning validate now, whatever val_every is
        if step == self.max_steps or step % self.val_every == 0:
            return  # on_validation_end follows and completes this step
        stopping = self._stop_requested(trainer)
        if stopping or step % self.every == 0:
            trainer.save_checkpoint(self.last)
        if stopping:
            raise TrainingInterrupted(step, self.last)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, SegmentationModule)
        metrics = validation_metrics(pl_module, self.manifest.class_names)
        if self._improves(metrics["val/miou"]):
            self.best_metrics = {"step": float(trainer.global_step), **metrics}
            if trainer.is_global_zero:
                save_checkpoint(self.best, _network_to_keep(trainer, pl_module), self._best_manifest())
        trainer.save_checkpoint(self.last)
        if trainer.global_step < self.max_steps and self._stop_requested(trainer):
            raise TrainingInterrupted(trainer.global_step, self.last)

    def _improves(self, miou: float) -> bool:
        best = self.best_metrics.get("val/miou", math.nan)
        return math.isnan(best) or miou > best

    def _best_manifest(self) -> Manifest:
        known = {name: value for name, value in self.best_metrics.items() if math.isfinite(value)}
        return self.manifest.replace(metrics=known)

    def _stop_requested(self, trainer: pl.Trainer) -> bool:
        # All ranks must leave in the same step, or those left behind wait for ever.
        return trainer.strategy.reduce_boolean_decision(self.stop.requested, all=False)


class Progress(pl.Callback):
    """A bar with step, loss and validation mIoU on a terminal; and, anywhere, lines that say how long it will take:
    measured on the first steps, and after each validation. ``later_steps`` are those of the runs that follow."""

    def __init__(self, name: str, max_steps: int, later_steps: int = 0) -> None:
        self.name = name
        self.max_steps = max_steps
        self.later_steps = later_steps
        self._bar: Any = None
        self._loss = math.nan
        self._began: tuple[int, float] | None = None  # step and time, once the first steps of this process are done

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first = trainer.global_step
        self._bar = progress_bar(
            show=trainer.is_global_zero, total=self.max_steps, initial=trainer.global_step, desc=self.name,
            unit="step", mininterval=0.5,
        )  # fmt: skip

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, SegmentationModule)
        loss = sum(pl_module.losses)
        self._loss = loss if math.isnan(self._loss) else 0.95 * self._loss + 0.05 * loss
        if not step_done(trainer, batch_idx):
            return
        self._bar.set_postfix(self._figures(pl_module), refresh=False)
        self._bar.update()
        done = trainer.global_step - self._first
        if done == _SLOW_STEPS:
            self._began = (trainer.global_step, time.monotonic())
        elif done == _SLOW_STEPS + _TIMED_STEPS and trainer.global_step < self.max_steps:
            self._say(trainer, f"{self._second_per_step(trainer):.2f} s a step, about {self._left(trainer)} left")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._bar is None or not isinstance(pl_module, SegmentationModule):
            return
        figures = ", ".join(f"{name} {value}" for name, value in self._figures(pl_module).items())
        left = f"; {self._left(trainer)} left" if self._began and trainer.global_step < self.max_steps else ""
        self._say(trainer, f"step {trainer.global_step} of {self.max_steps}: {figures}{left}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _figures(self, module: SegmentationModule) -> dict[str, str]:
        shown = {"loss": f"{self._loss:.3f}"}
        if module.scores is not None:
            shown["mIoU"] = f"{module.scores.miou:.3f}"
        return shown

    def _second_per_step(self, trainer: pl.Trainer) -> float:
        assert self._began is not None
        step, begin = self._began
        return (time.monotonic() - begin) / max(1, trainer.global_step - step)

    def _left(self, trainer: pl.Trainer) -> str:
        second, steps = self._second_per_step(trainer), self.max_steps - trainer.global_step
        own, whole = (duration(second * count) for count in (steps, steps + self.later_steps))
        return f"{own} ({whole} with the runs that follow)" if self.later_steps else own

    def _say(self, trainer: pl.Trainer, text: str) -> None:
        if trainer.is_global_zero and not os.environ.get(QUIET):
            self._bar.write(f"{self.name}: {text}", file=sys.stderr)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def validation_metrics(module: SegmentationModule, class_names: Sequence[str]) -> dict[str, float]:
    """The last validation as a flat table, fractions; NaN where a class occurs nowhere."""
    scores = module.scores
    assert scores is not None
    metrics = {
        "val/loss": module.val_loss,
        "val/miou": scores.miou,
        "val/mean_accuracy": scores.mean_accuracy,
        "val/pixel_accuracy": scores.pixel_accuracy,
    }
    return metrics | {f"val/iou/{name}": iou for name, iou in zip(class_names, scores.iou, strict=True)}


def _network_to_keep(trainer: pl.Trainer, module: SegmentationModule) -> HPDDRNet:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, MovingAverage):
            return callback.network()
    return module.network


def _summed_over_ranks(trainer: pl.Trainer, values: Sequence[float]) -> list[float]:
    if trainer.world_size == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=trainer.strategy.root_device)
    reduced = trainer.strategy.reduce(total, reduce_op="sum")
    assert isinstance(reduced, Tensor)
    return reduced.tolist()


def _keep_rows_until(path: Path, columns: Sequence[str], step: int) -> None:
    rows: list[dict[str, str]] = []
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as stream:
            # A kill may have cut the last line: only whole rows count.
            rows = [row for row in csv.DictReader(stream) if None not in row.values() and int(row["step"]) <= step]
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)
