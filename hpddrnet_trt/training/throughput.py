"""Does loading limit training? Rates of the input pipeline and of the network in the real training loop."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from tqdm import tqdm

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.training.config import TrainConfig
from hpddrnet_trt.training.run import rehearse


@dataclass(frozen=True)
class Throughput:
    """What :func:`measure_throughput` found."""

    device: str
    workers: int  # processes that load and augment
    threads: int  # of PyTorch
    batch_size: int
    crop: tuple[int, int]
    input_rate: float  # crops per second of the input pipeline alone
    step_seconds: float  # median of one training step, its batch being there
    wait_share: float  # of the time of training, spent waiting for batches

    @property
    def network_rate(self) -> float:
        """Crops per second of the network alone."""
        return self.batch_size / self.step_seconds

    def text(self) -> str:
        """The figures in lines for people."""
        height, width = self.crop
        return "\n".join(
            [
                f"{self.device}, {self.workers} loading processes, {self.threads} threads, "
                f"batches of {self.batch_size} crops of {height}x{width}",
                f"input alone    {self.input_rate:9.1f} crops/s",
                f"network alone  {self.network_rate:9.1f} crops/s ({1000 * self.step_seconds:.1f} ms per step)",
                f"together       {100 * self.wait_share:9.1f} % of the time is waiting for data",
            ]
        )


def measure_throughput(config: TrainConfig, *, steps: int = 50, warmup: int = 5) -> Throughput:
    """Time ``steps`` batches of the input pipeline alone, then as many steps of training.

    The training loop is the real one, on the device it would run on, without validation and
    checkpoints; its weights are thrown away. Times are wall time, the device synchronised after
    each step. Raises :class:`UserError` as :func:`~hpddrnet_trt.training.run.train` does.
    """
    if steps < 1 or warmup < 1:
        raise UsageError(f"steps ({steps}) and warmup ({warmup}) must be at least 1")
    if config.optimisation.accumulate > 1:
        raise UsageError("measure with optimisation.accumulate=1 and the batch of one pass")
    watch = _Watch(steps, warmup, config.run.progress)
    rehearse(config, steps + warmup, watch)
    return Throughput(
        device=watch.device,
        workers=config.run.workers,
        threads=torch.get_num_threads(),
        batch_size=config.optimisation.batch_size,
        crop=config.augmentation.crop,
        input_rate=config.optimisation.batch_size * steps / watch.input_seconds,
        step_seconds=median(watch.busy),
        wait_share=sum(watch.waiting) / (sum(watch.waiting) + sum(watch.busy)),
    )


class _Watch(pl.Callback):
    """Times the loader before the first step, then each step and the wait before it."""

    def __init__(self, steps: int, warmup: int, progress: bool) -> None:
        self.steps, self.warmup, self.progress = steps, warmup, progress
        self.device = ""
        self.input_seconds = 0.0
        self.waiting: list[float] = []
        self.busy: list[float] = []
        self._since = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        gpu = pl_module.device.type == "cuda"
        self.device = torch.cuda.get_device_name(pl_module.device) if gpu else "CPU"
        loader: Any = trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        batches = iter(tqdm(islice(loader, self.warmup + self.steps), "input", disable=not self.progress))
        for _ in islice(batches, self.warmup):
            pass
        start = time.perf_counter()
        for _ in batches:
            pass
        self.input_seconds = time.perf_counter() - start
        self._since = time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._lap(self.waiting, batch_idx)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self._lap(self.busy, batch_idx)

    def _lap(self, record: list[float], step: int) -> None:
        now = time.perf_counter()
        if step >= self.warmup:
            record.append(now - self._since)
        self._since = now
