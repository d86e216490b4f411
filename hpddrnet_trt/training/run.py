"""From a configuration to a trained model: what ``train/train.py`` and ``hpddrnet-trt train`` call."""

from __future__ import annotations

import errno
import json
import logging
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn

import hpddrnet_trt
from hpddrnet_trt.core.errors import NoGpu, UsageError, UserError
from hpddrnet_trt.core.manifest import DataRecord, Manifest, Normalization, read_manifest
from hpddrnet_trt.core.quiet import quiet
from hpddrnet_trt.data.augment import Augmentation
from hpddrnet_trt.data.datasets import FolderDataset, Sample, SplitStatistics
from hpddrnet_trt.export.domain import DomainPictures, describe_checkpoint
from hpddrnet_trt.export.uncertainty import describe_uncertainty
from hpddrnet_trt.models.checkpoints import load_backbone_weights, load_checkpoint, with_classes
from hpddrnet_trt.models.network import HPDDRNet
from hpddrnet_trt.training.callbacks import (
    LAST,
    AtomicCheckpointIO,
    Checkpoints,
    MovingAverage,
    Progress,
    Records,
    StopRequest,
    read_training_checkpoint,
)
from hpddrnet_trt.training.config import (
    LossSection,
    RunSection,
    TrainConfig,
)
from hpddrnet_trt.training.data import RARE, ImageStore, TrainingData, TrainingSamples, open_data
from hpddrnet_trt.training.losses import (
    CenterlineDice,
    CrossEntropy,
    LovaszSoftmax,
    OhemCrossEntropy,
    SegmentationLoss,
    SoftDice,
    WithOverlap,
    balanced_class_weights,
)
from hpddrnet_trt.training.module import SegmentationData, SegmentationModule
from hpddrnet_trt.training.qat import FakeQuantization
from hpddrnet_trt.weights import CHECKPOINT, locate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves behind."""

    checkpoint: Path  # best model, .safetensors with its description
    last: Path  # training checkpoint of the last step
    metrics: dict[str, float]  # validation metrics of the best model, fractions, and its "step"
    dataset: FolderDataset  # as it was trained and validated on


def train(config: TrainConfig, later_steps: int = 0) -> TrainResult:
    """Train, or continue a run that was stopped, and return the best model.

    Everything is written to ``<run.folder>/<run.name>``: ``last.ckpt`` (resume), ``metrics.csv``,
    ``tensorboard/``, the simulated data if asked for, and ``<run.name>.safetensors``, the model of
    the best validation mIoU. Raises :class:`UserError` with one sentence for everything a user can
    mend; :class:`~hpddrnet_trt.training.callbacks.TrainingInterrupted` after Ctrl-C.

    ``later_steps``: how many more like its own will follow in other runs, for the estimate of the time.
    With ``run.workers`` processes are spawned, which import the calling script: it needs the usual
    ``if __name__ == "__main__":``.
    """
    device = _Device.of(config)
    folder = config.run.path
    data = open_data(config.data, folder, None if config.network.initial is None else read_manifest(_initial(config)))
    first_step, stored = _find_start(config, folder, data)
    if first_step >= config.optimization.max_steps:
        _describe_domain(config, data)  # where the run was stopped before it came to that
        return _result(config, stored, data)

    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    stop = StopRequest()
    module, manifest = _build(config, data)
    trainer = _trainer(config, device, _callbacks(config, data, manifest, stop, later_steps))
    datamodule = _datamodule(config, data, device, first_step)
    if not first_step:
        _observe(config, module, datamodule)
    resume_from = folder / LAST if first_step else None
    log.info("%s", _in_words(config, data))
    with stop.listening(), _readable_failures(folder), _quiet_lightning():
        trainer.fit(module, datamodule=datamodule, ckpt_path=resume_from, weights_only=True)
    if trainer.is_global_zero:
        _describe_domain(config, data)
    return _result(config, read_training_checkpoint(folder / LAST), data)


def _in_words(config: TrainConfig, data: TrainingData) -> str:
    step, (height, width), threads = config.optimization, config.augmentation.crop, config.run.threads
    return (
        f"{data.training_images} pictures, {len(data.dataset.classes)} classes: {step.max_steps} steps of "
        f"{step.batch_size} crops of {height}x{width}, learning rate {step.lr:.2g}, "
        f"{threads or torch.get_num_threads()} threads, in {config.run.path}"
    )


# ------------------------------------------------------------------------- devices


@dataclass(frozen=True)
class _Device:
    accelerator: str
    devices: int
    ranks: int
    images_per_pass: int  # per rank
    precision: str

    @classmethod
    def of(cls, config: TrainConfig) -> _Device:
        run, optimization = config.run, config.optimization
        gpus = torch.cuda.device_count()
        accelerator = run.accelerator if run.accelerator != "auto" else "gpu" if gpus else "cpu"
        if accelerator == "gpu" and not gpus:
            raise NoGpu("run.accelerator=gpu but no NVIDIA GPU can be used; use run.accelerator=cpu")
        devices = run.devices if run.devices != "all" else max(1, gpus) if accelerator == "gpu" else 1
        if devices < 1 or (accelerator == "gpu" and devices > gpus):
            raise UsageError(f"run.devices={run.devices} but this machine has {gpus or 'no'} GPUs; choose 1..{gpus}")
        ranks = devices * run.num_nodes
        images, rest = divmod(optimization.batch_size, ranks * optimization.accumulate)
        if rest or not images:
            raise UsageError(
                f"optimization.batch_size={optimization.batch_size} cannot be shared evenly by {ranks} device(s) "
                f"and optimization.accumulate={optimization.accumulate} passes; choose a multiple of "
                f"{ranks * optimization.accumulate}"
            )
        if images * ranks < 2:
            raise UsageError(
                "one image per forward pass cannot be trained, since batch normalisation after global pooling needs "
                "at least two values; raise optimization.batch_size or lower optimization.accumulate"
            )
        return cls(accelerator, devices, ranks, images, _precision(run, accelerator))


def _precision(run: RunSection, accelerator: str) -> str:
    if run.precision == "16-mixed" and accelerator == "cpu":
        raise UsageError("run.precision=16-mixed needs a GPU; use 32 or bf16-mixed on a CPU")
    return "32-true" if run.precision == "32" else run.precision


# --------------------------------------------------------------------------- start


def _find_start(config: TrainConfig, folder: Path, data: TrainingData) -> tuple[int, dict[str, Any]]:
    """The step to start with and, when that is not 0, the training checkpoint."""
    last = folder / LAST
    if not last.exists():
        return 0, {}
    if config.run.resume == "never":
        raise UsageError(f"{folder} holds a run already; choose another run.name, or continue it with run.resume=auto")
    checkpoint = read_training_checkpoint(last)
    stored = checkpoint.get("hpddrnet_trt", {})
    if differences := config.differences(stored.get("config", {})):
        raise UsageError(
            f"the run in {folder} was started with other settings ({'; '.join(differences)}); "
            "give the same settings to continue it, or choose another run.name"
        )
    if stored.get("data_sha256") != data.sha256:
        raise UsageError(
            f"the images or masks in {data.dataset.root} changed since the run in {folder} was started; "
            "restore them to continue it, or choose another run.name"
        )
    step = int(checkpoint["global_step"])
    if step < config.optimization.max_steps:
        log.info("continuing %s after step %d", folder, step)
    return step, checkpoint


@dataclass(frozen=True)
class _Start:
    """A network before its first step."""

    network: HPDDRNet
    normalization: Normalization
    remarks: list[str]  # for the description of the model


def _starting_point(config: TrainConfig, data: TrainingData) -> _Start:
    """Random weights, a pretrained backbone, or a whole trained network, for the classes of ``data``.

    The training split gives the normalisation, unless ``network.initial`` does. Seeds PyTorch with
    ``run.seed``. Raises :class:`UsageError` when the checkpoint does not fit the settings or the data,
    :class:`~hpddrnet_trt.core.errors.BadInputFile` when it cannot be read.
    """
    torch.manual_seed(config.run.seed)
    if config.network.initial is not None:
        return _whole(config, _initial(config), data)
    if config.quantization.enabled:
        raise UsageError(
            "quantization.enabled fine-tunes a trained network; give its checkpoint with "
            "network.initial=runs/x/x.safetensors"
        )
    network = HPDDRNet(config.network.resolve(len(data.dataset.classes)))
    return _Start(network, _normalization(config, data.statistics), _pretrain(network, config.network.pretrained))


def _initial(config: TrainConfig) -> Path:
    return locate(str(config.network.initial), CHECKPOINT)


def _whole(config: TrainConfig, path: Path, data: TrainingData) -> _Start:
    network, manifest = load_checkpoint(path)
    _check_settings(config, path, manifest)
    remarks = [*manifest.remarks, f"training started from {path.name} (SHA-256 {str(manifest.checkpoint_sha256)[:12]})"]
    names = [entry.name for entry in data.dataset.classes]
    if manifest.class_names == names:
        if manifest.data is not None and manifest.data.sha256 not in (None, data.sha256):
            log.warning(
                "%s was trained on other images or masks (%s); what it has seen may be in the validation split",
                path, manifest.data.name,
            )  # fmt: skip
        return _Start(network.train(), manifest.normalization, remarks)
    if config.quantization.enabled:
        raise UsageError(
            f"{path} tells apart {', '.join(manifest.class_names)}, but the classes of {data.dataset.root} are "
            f"{', '.join(names)}; quantization.enabled fine-tunes a network for its own classes in their order"
        )
    known = [manifest.class_names.index(name) if name in manifest.class_names else None for name in names]
    fresh = [name for name, index in zip(names, known, strict=True) if index is None]
    remark = f"new to it: {', '.join(fresh) or 'no class'}; the rest of the network is kept"
    log.info("starting from %s, which tells apart %s; %s", path.name, ", ".join(manifest.class_names), remark)
    # Other classes mean other micrographs: what is black, white and usual is theirs.
    normalization = _normalization(config, data.statistics)
    return _Start(with_classes(network, known).train(), normalization, [*remarks, remark])


def _check_settings(config: TrainConfig, path: Path, manifest: Manifest) -> None:
    """Settings that were given must not contradict the file; those left out are the file's."""
    section, stored = config.network, dict(manifest.network)
    given = {key for key in section.model_fields_set if getattr(section, key) is not None}
    asked = dict(section.resolve(manifest.network.num_classes))
    compared = set(asked) & (set(asked) if "variant" in given else given)
    wrong = [f"{key} is {stored[key]}, not {asked[key]}" for key in sorted(compared) if asked[key] != stored[key]]
    if wrong:
        own = {key: stored[key] for key in ("detail", "pool_border")} | {
            key: getattr(section, key) for key in sorted(given - {"initial"})
        }
        anew = ", ".join(f"{key}: {json.dumps(value)}" for key, value in own.items())
        raise UsageError(
            f"{path} holds {manifest.network.name} ({'; '.join(wrong)}); leave out the network.* settings, which "
            f"the file brings along, or train another network from random weights: 'network={{{anew}}}'"
        )
    if "normalization" in config.data.model_fields_set:
        imagenet = manifest.normalization == Normalization()
        if imagenet != (config.data.normalization == "imagenet"):
            raise UsageError(
                f"{path} was trained with {'ImageNet' if imagenet else 'its data set'}'s normalisation, not "
                f"data.normalization={config.data.normalization}; leave the setting out"
            )


def _pretrain(network: HPDDRNet, path: Path | None) -> list[str]:
    if path is None:
        return []
    remarks = load_backbone_weights(network, path)
    for remark in remarks:
        log.info("%s: %s", path, remark)
    return [f"training started from the backbone in {path.name}"]


def _normalization(config: TrainConfig, statistics: SplitStatistics) -> Normalization:
    if config.data.normalization == "imagenet":
        return Normalization()
    mean, std = statistics.grey_mean, max(statistics.grey_std, 1.0)
    return Normalization(mean=(mean, mean, mean), std=(std, std, std))


# ------------------------------------------------------------------------ building


def _build(config: TrainConfig, data: TrainingData) -> tuple[SegmentationModule, Manifest]:
    start = _starting_point(config, data)
    network = start.network
    manifest = Manifest(
        name=config.run.name,
        network=network.config,
        classes=list(data.dataset.classes),
        normalization=start.normalization,
        intensity=data.intensity,
        data=DataRecord(
            name=data.dataset.name,
            sha256=data.sha256,
            license=data.dataset.license,
            train_images=data.training_images,
            grey_mean=data.statistics.grey_mean,
            grey_std=data.statistics.grey_std,
            crop=config.augmentation.crop,
            pixel_size_m=data.pixel_size_m,
            common_pixel_size_m=data.dataset.common_pixel_size_m,
        ),
        remarks=start.remarks,
        versions=_versions(),
    )
    loss = SegmentationLoss(_criterion(config.loss, data), config.loss.auxiliary_weight)
    quantization = (
        FakeQuantization(network, start.normalization, config.quantization.percentile)
        if config.quantization.enabled
        else None
    )
    module = SegmentationModule(
        network, loss, start.normalization, config.optimization, config.run.seed, quantization
    )
    module.stored = {"config": config.model_dump(mode="json"), "data_sha256": data.sha256, "versions": _versions()}
    return module, manifest


def _observe(config: TrainConfig, module: SegmentationModule, data: SegmentationData) -> None:
    """Ranges for fake quantization, from the first training samples: the same on every rank."""
    if module.quantization is None:
        return
    count, size = config.quantization.images, data.images_per_pass
    batches = (
        torch.stack([data.training[number][0] for number in range(first, min(first + size, count))])
        for first in range(0, count, size)
    )
    module.quantization.observe(module.network, map(module.normalize, batches))
    module.train()


def _criterion(section: LossSection, data: TrainingData) -> nn.Module:
    pixels = _pixel_criterion(section, data)
    if section.overlap == "none":
        return pixels
    overlap = {"dice": SoftDice, "lovasz": LovaszSoftmax, "cldice": CenterlineDice}[section.overlap]
    return WithOverlap(pixels, overlap(), section.overlap_weight)


def _pixel_criterion(section: LossSection, data: TrainingData) -> CrossEntropy:
    weights: list[float] | None
    boundary = section.boundary_weight
    if isinstance(section.class_weights, list):
        weights = section.class_weights
        if len(weights) != len(data.dataset.classes):
            names = ", ".join(entry.name for entry in data.dataset.classes)
            raise UsageError(
                f"loss.class_weights has {len(weights)} values but the data has {len(data.dataset.classes)} "
                f"classes ({names}); give one weight per class"
            )
    else:
        balanced = section.class_weights == "balanced"
        weights = balanced_class_weights(data.statistics.class_fractions) if balanced else None
    if section.kind == "cross-entropy":
        return CrossEntropy(weights, boundary)
    return OhemCrossEntropy(section.ohem_threshold, section.ohem_min_kept, weights, boundary)


def _versions() -> dict[str, str]:
    return {
        "hpddrnet-trt": hpddrnet_trt.__version__,
        "torch": str(torch.__version__),
        "lightning": str(lightning.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _callbacks(
    config: TrainConfig, data: TrainingData, manifest: Manifest, stop: StopRequest, later_steps: int
) -> list[pl.Callback]:
    optimization, run = config.optimization, config.run
    # In this order: the average is up to date before rows are written, rows before the checkpoint.
    callbacks: list[pl.Callback] = []
    if optimization.ema_decay is not None:
        callbacks.append(MovingAverage(optimization.ema_decay))
    callbacks.append(
        Records(
            run.path,
            manifest.class_names,
            every=run.log_every,
            images=data.training_images,
            batch_size=optimization.batch_size,
        )
    )
    if run.progress:
        callbacks.append(Progress(run.name, optimization.max_steps, later_steps))
    callbacks.append(
        Checkpoints(
            run.path,
            manifest,
            stop,
            max_steps=optimization.max_steps,
            val_every=run.val_every,
            every=run.checkpoint_every,
        )
    )
    return callbacks


def _trainer(
    config: TrainConfig, device: _Device, callbacks: list[pl.Callback]
) -> pl.Trainer:
    run, optimization = config.run, config.optimization
    with _quiet_lightning():
        return pl.Trainer(
            accelerator=device.accelerator,
            devices=device.devices,
            num_nodes=run.num_nodes,
            strategy=run.strategy,
            precision=device.precision,  # type: ignore[arg-type]
            sync_batchnorm=device.accelerator == "gpu" and device.ranks > 1,
            deterministic="warn" if run.deterministic else None,
            max_steps=optimization.max_steps,
            accumulate_grad_batches=optimization.accumulate,
            gradient_clip_val=optimization.clip_norm,
            val_check_interval=run.val_every * optimization.accumulate,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=run.path,
        )


def _datamodule(config: TrainConfig, data: TrainingData, device: _Device, first_step: int) -> SegmentationData:
    section = config.data
    budget = section.cache_megabytes * 2**20
    training, validation = (
        ImageStore(data.dataset, data.dataset.split(split), budget)
        for split in (section.train_split, section.val_split)
    )
    return SegmentationData(
        TrainingSamples(
            training,
            Augmentation(config.augmentation),
            config.run.seed,
            batch=device.images_per_pass * device.ranks,
            rare=[label for label, share in enumerate(data.statistics.class_fractions) if 0 < share < RARE],
        ),
        validation,
        images_per_pass=device.images_per_pass,
        first_pass=first_step * config.optimization.accumulate,
        workers=config.run.workers,
    )


# --------------------------------------------------------------------------- ending


def _describe_domain(config: TrainConfig, data: TrainingData) -> None:
    """Give the best model the statistics of its pictures, and its errors on those held out, unless it has them."""
    best = _best(config)
    if not best.is_file() or read_manifest(best).domain is not None:
        return
    training, held_out = (
        [partial(_picture, data.dataset, sample) for sample in data.dataset.split(split)]
        for split in (config.data.train_split, config.data.val_split)
    )
    pictures = DomainPictures(
        training, held_out, f"{data.dataset.name} ({config.data.train_split})", config.augmentation
    )
    try:
        describe_checkpoint(best, best, pictures)
    except UserError as exc:
        log.warning("the model cannot tell foreign pictures: %s", exc)
    describe_uncertainty(best, data.dataset, config.data.val_split)


def _picture(dataset: FolderDataset, sample: Sample) -> npt.NDArray[np.uint8]:
    return dataset.load(sample)[0]


def _best(config: TrainConfig) -> Path:
    return config.run.path / f"{config.run.name}.safetensors"


def _result(config: TrainConfig, checkpoint: dict[str, Any], data: TrainingData) -> TrainResult:
    folder, best = config.run.path, _best(config)
    if not best.is_file():
        raise UserError(f"the run in {folder} is finished but {best} is missing; choose another run.name")
    metrics = next(
        state["best_metrics"] for state in checkpoint["callbacks"].values() if "best_metrics" in state
    )
    read_manifest(best)  # raises when the file was damaged since
    return TrainResult(best, folder / LAST, dict(metrics), data.dataset)


@contextmanager
def _readable_failures(folder: Path) -> Iterator[None]:
    """Turn the ways a run can be cut short into errors for people."""
    try:
        yield
    except (SIGTERMException, SystemExit, KeyboardInterrupt) as exc:
        raise UserError(f"stopped at once; {_saved(folder)}; give the same command again to continue") from exc
    except torch.cuda.OutOfMemoryError as exc:
        raise UserError(
            f"the GPU's memory is exhausted ({_saved(folder)}); lower augmentation.crop, or raise "
            "optimization.accumulate to spread a batch over more passes"
        ) from exc
    except RuntimeError as exc:
        if "DataLoader worker" not in str(exc):
            raise
        raise UserError(
            f"a process that loads images died, usually for want of memory ({_saved(folder)}); lower run.workers or "
            "data.cache_megabytes and give the same command again to continue"
        ) from exc
    except OSError as exc:
        if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise UserError(f"the disk of {folder} is full; free some space and give the same command again") from exc
        raise


def _saved(folder: Path) -> str:
    last = folder / LAST
    return f"the last complete checkpoint is {last}" if last.exists() else "nothing was saved yet"


def _quiet_lightning() -> AbstractContextManager[None]:
    """Without Lightning's banners, and without hints that do not apply to this loop."""
    # Modules in evaluation mode are batch-norm's, frozen on purpose.
    hints = (".*does not have many workers.*", ".*LeafSpec.* is deprecated.*", ".*in eval mode at the start.*")
    return quiet("lightning.pytorch", "lightning.fabric", hints=hints)
