"""What a recipe leaves open (``auto``), from the pictures to train on and the machine to train with.

The same dataset gives the same plan on the same kind of machine, so that the same command continues a run.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.core.files import existing_file
from hpddrnet_trt.core.manifest import read_manifest
from hpddrnet_trt.data.datasets import FolderDataset, missing_splits
from hpddrnet_trt.data.labels import read_mask
from hpddrnet_trt.training.callbacks import LAST, read_training_checkpoint
from hpddrnet_trt.training.config import SIMULATED, TrainConfig, apply_override, checked, read_settings
from hpddrnet_trt.training.data import RARE, parted, unfit
from hpddrnet_trt.weights import CHECKPOINT, locate

AUTO = "auto"
# Settings that pictures decide, where a recipe leaves them open.
PICTURES_DECIDE = (
    "augmentation.crop", "augmentation.class_balance", "optimization.batch_size", "optimization.max_steps",
    "optimization.warmup_steps", "optimization.lr", "run.val_every", "loss.class_weights",
)  # fmt: skip
_LOOKED_AT = 32  # masks at most
_COARSE = 128  # pixels: regions that reach further look alike in crops of 256
_MOST_CORES = 16
_LARGE_GPU = 12e9  # bytes
_STEPS, _MOST_STEPS = 600, 40_000  # of a CPU for few pictures: under half an hour of two cores
_FEW_PIXELS = 1e7
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pictures:
    """The training pictures, as far as a plan depends on them."""

    count: int
    pixels: int  # of all of them
    side: int  # pixels: the median of the shorter sides
    reach: float  # pixels: how far a region extends along rows and columns, median over the labelled pixels
    rarest: float  # share of the rarest class that occurs
    class_names: list[str]

    @classmethod
    def of(cls, dataset: FolderDataset, split: str) -> Pictures:
        """From at most 32 masks of a split."""
        samples = dataset.split(split)
        step = math.ceil(len(samples) / _LOOKED_AT)
        masks = [read_mask(sample.mask, colors=dataset.colors) for sample in samples[::step]]
        histograms = np.array([np.bincount(mask.ravel(), minlength=256) for mask in masks])
        counts = histograms.sum(axis=0)[: len(dataset.classes)]
        runs = np.sort(np.concatenate([run_lengths(turned) for mask in masks for turned in (mask, mask.T)]))
        middle = np.searchsorted(np.cumsum(runs), runs.sum() / 2)
        return cls(
            len(samples),
            round(sum(mask.size for mask in masks) / len(masks) * len(samples)),
            int(np.median([min(mask.shape) for mask in masks])),
            float(runs[middle]),
            float(min(counts[counts > 0], default=0) / max(1, counts.sum())),
            dataset.class_names,
        )


def run_lengths(mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Lengths of the stretches of one label along the rows of ``[H, W]``."""
    ends = np.ones(mask.shape, dtype=bool)
    ends[:, :-1] = mask[:, 1:] != mask[:, :-1]
    return np.diff(np.flatnonzero(ends.ravel()), prepend=-1)


@dataclass(frozen=True)
class Machine:
    """What there is to train with."""

    cores: int
    gpu_bytes: int = 0  # memory of the GPU; 0 without one

    @classmethod
    def here(cls) -> Machine:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cls(cores, torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0)


def settle_for_pictures(content: dict[str, Any], pictures: Pictures, machine: Machine, start: Path | None) -> None:
    """Fill in what ``content`` leaves open because of the pictures; what it states counts for the rest.

    ``start``: the trained network that training goes on from, which takes half the steps at half the rate, and without
    class weights where it knows the classes: what brought it to rare ones makes these too large in the end
    (docs/results/shift-2026-11.md).
    """
    continued = start is not None
    known = start is not None and read_manifest(locate(start, CHECKPOINT)).class_names == pictures.class_names
    _settle(content, "loss.class_weights", "none" if known else "balanced")
    # Large enough for the regions to be told apart, and no larger than the pictures.
    wanted = 512 if pictures.reach > _COARSE or machine.gpu_bytes else 256
    side = max(64, min(wanted, pictures.side // 32 * 32))
    crop = _settle(content, "augmentation.crop", [side, side])
    _settle(content, "augmentation.class_balance", 0.25 if pictures.rarest < RARE else 0.0)
    images = 16 if machine.gpu_bytes > _LARGE_GPU else 4 if crop[0] > 256 and not machine.gpu_bytes else 8
    batch_size = _settle(content, "optimization.batch_size", images)
    # More pictures, more steps, but far from in proportion. A GPU has time for more.
    steps = _STEPS * max(1.0, pictures.pixels / _FEW_PIXELS) ** 0.5
    steps *= (5 if machine.gpu_bytes else 1) * (0.5 if continued else 1)
    max_steps = _settle(content, "optimization.max_steps", min(_MOST_STEPS, round(steps / 100) * 100))
    _settle(content, "optimization.warmup_steps", max_steps // 10)
    _settle(content, "run.val_every", max(10, max_steps // 10))
    _settle(content, "optimization.lr", (1e-3 if continued else 2e-3) * (batch_size / 8) ** 0.5)


def about_attention(pictures: Pictures) -> str:
    """Whether position attention is worth a comparison on such pictures; measured in docs/results/shift-2026-11.md."""
    worth = (
        "was not needed (and once misled the network)"
        if pictures.reach <= _COARSE
        else "was used, but not missed where a network went on without it"
    )
    return (
        f"regions reach {pictures.reach:.0f} pixels in pictures of {pictures.side}: position attention {worth} at such "
        "sizes; to compare, judge with --folds 3 as it is and, from random weights both, with 'network={variant: "
        "hpddrnet-23-slim-no-pam, detail: true, pool_border: ignored}' and hpddrnet-23-slim there"
    )


def settle_for_machine(content: dict[str, Any], machine: Machine) -> None:
    """Fill in what ``content`` leaves open because of the machine."""
    _settle(content, "run.threads", min(machine.cores, _MOST_CORES))
    _settle(content, "run.workers", min(8, machine.cores - 1) if machine.gpu_bytes else 0)


def _settle(content: dict[str, Any], key: str, value: Any) -> Any:
    """The value of ``section.key``: ``value`` where it is left open; also for the rest where it is no good."""
    given = _given(content, key)
    if given == AUTO:
        section, name = key.split(".")
        content[section][name] = value
    return given if isinstance(given, type(value)) and given else value


def _given(content: Mapping[str, Any], key: str) -> Any:
    section, name = key.split(".")
    values = content.get(section)
    return values.get(name) if isinstance(values, dict) else None


def plan_run(
    source: Path,
    folder: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    start: Path | None = None,
    machine: Machine | None = None,
    first: Callable[[TrainConfig], TrainConfig] | None = None,
) -> TrainConfig:
    """The configuration of a run: a recipe's settings, with what it leaves open filled in.

    ``source``: the recipe or another configuration file. ``folder``: the dataset, which also names the run; None: what
    the settings say. ``overrides``: ``section.key=value``. ``start``: a checkpoint, or a shipped model's name, that
    training goes on from: network and normalisation are then its own. ``machine``: None: this one.

    A run that ``folder`` names is continued when it was started so; otherwise the new one gets a number (``name-2``).
    ``first``: where it is several trainings (folds), the settings of the one that is started first.

    Raises :class:`UsageError` for wrong settings and where no dataset is named, and what opening the dataset raises.
    """
    content = read_settings(source)
    if start is not None:
        content["network"] = {"initial": _checkpoint(start)}
        content.setdefault("data", {}).pop("normalization", None)
    if folder is not None:
        apply_override(content, f"data.path={json.dumps(str(folder))}")
        apply_override(content, f"run.name={run_name(folder)}")
    for override in overrides:
        apply_override(content, override)
    if "path" not in content.get("data", {}):
        raise UsageError("nothing says what to train on; give a dataset folder: hpddrnet-trt train FOLDER")
    machine = machine or Machine.here()
    settle_for_machine(content, machine)
    if any(_given(content, key) == AUTO for key in PICTURES_DECIDE):
        pictures = _pictures(content)
        settle_for_pictures(content, pictures, machine, start)
        if start is None and {"variant", "pam"}.isdisjoint(content.get("network") or {}):
            log.info("%s", about_attention(pictures))
    config = checked(content, source)
    named = any(text.partition("=")[0].strip() == "run.name" for text in overrides)
    return config if folder is None or named else _under_free_name(config, first or (lambda run: run))


def _pictures(content: Mapping[str, Any]) -> Pictures:
    section = content["data"]
    if section["path"] == SIMULATED:
        raise UsageError(f"settings that are {AUTO} come from pictures; give a dataset folder, or --recipe demo")
    split = section.get("train_split", "train")
    dataset = FolderDataset.open(section["path"], section.get("layout"))
    if missing := missing_splits(dataset.splits, split):
        raise UserError(unfit(dataset, missing))
    return Pictures.of(dataset, split)


def run_name(folder: Path) -> str:
    """A name of a run for a dataset's folder: its own, as far as names of runs may hold its letters."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("._-") or "run"


def _under_free_name(config: TrainConfig, first: Callable[[TrainConfig], TrainConfig]) -> TrainConfig:
    """The same under the first name that is free, or whose run was started so and on the same files."""
    data_sha256 = ""
    for number in count(1):
        name = config.run.name if number == 1 else f"{config.run.name}-{number}"
        named = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
        run = first(named)
        last = run.run.path / LAST
        if not last.exists():
            break
        stored = read_training_checkpoint(last).get("hpddrnet_trt", {})
        data_sha256 = data_sha256 or parted(FolderDataset.open(run.data.path, run.data.layout), run.data).checksum()
        if run.differences(stored.get("config", {})) == [] and stored.get("data_sha256") == data_sha256:
            break
    if number > 1:
        log.info("other runs of this name have other settings or data: this one is %s", run.run.path)
    return named


def _checkpoint(model: Path) -> str:
    """What ``--from`` names, a path or a shipped model's name, if it is a checkpoint."""
    path = locate(model, CHECKPOINT)
    if path.suffix.lower() in {".onnx", ".engine"}:
        raise UsageError(f"{path} can be run but not trained; give the checkpoint (.safetensors) that it was made from")
    existing_file(path, "checkpoint")
    return str(model)
