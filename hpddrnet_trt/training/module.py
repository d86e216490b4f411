"""The network under training: learning rate and optimizer, one step, one validation, and its loaders."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.manifest import IGNORE_INDEX, Normalization
from hpddrnet_trt.core.metrics import LabelComparison, Scores
from hpddrnet_trt.models.network import HPDDRNet, resize
from hpddrnet_trt.training.config import OptimizationSection
from hpddrnet_trt.training.data import (
    BatchNumbers,
    ImageStore,
    Loader,
    TrainingSamples,
    ValidationImages,
    network_seed,
)
from hpddrnet_trt.training.losses import CrossEntropy, SegmentationLoss
from hpddrnet_trt.training.qat import FakeQuantization

Batch = tuple[Tensor, Tensor]  # grey images uint8 [N, 1, H, W], masks uint8 [N, H, W]
_NARROWEST = 16  # channels: a vector of AVX-512


def memory_format(network: nn.Module) -> torch.memory_format:
    """Channels last, a quarter faster on a CPU and what tensor cores want, except for narrow networks.

    In channels last, oneDNN (of PyTorch 2.13, with AVX-512) writes beyond its buffer for the weight's gradient of a
    strided 1x1 convolution of fewer than 16 channels: the process dies, at once or anywhere later.
    """
    narrow = any(
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels < _NARROWEST
        for module in network.modules()
    )
    return torch.contiguous_format if narrow else torch.channels_last


def learning_rate(config: OptimizationSection, step: int) -> float:
    """Learning rate of optimizer step ``step`` (0-based).

    Linear warm-up over ``warmup_steps``, then ``poly`` ``(1 - t)^power`` or ``cosine``
    ``(1 + cos(pi t)) / 2`` from ``lr`` down to ``final_lr``, with t the share of the remaining
    steps that is done. Without warm-up, ``poly`` is mmengine's ``PolyLR``.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    span = max(1, config.max_steps - config.warmup_steps)
    done = min(1.0, (step - config.warmup_steps) / span)
    fall = (1 - done) ** config.power if config.schedule == "poly" else (1 + math.cos(math.pi * done)) / 2
    return config.final_lr + (config.lr - config.final_lr) * fall


def build_optimizer(config: OptimizationSection, network: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum (weight decay on everything, as the authors train) or AdamW (no decay of
    biases and of batch-norm's scales, which have one axis only)."""
    named = list(network.named_parameters())
    if config.optimizer == "sgd":
        parameters = [parameter for _, parameter in named]
        return torch.optim.SGD(
            parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    groups = [
        {"params": _by_axes(named, many=True), "weight_decay": config.weight_decay},
        {"params": _by_axes(named, many=False), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr)


def build_scheduler(config: OptimizationSection, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """Per-step scheduler following :func:`learning_rate`; its only state is the step."""
    return LambdaLR(optimizer, lambda step: learning_rate(config, step) / config.lr)


def _by_axes(named: Iterable[tuple[str, nn.Parameter]], many: bool) -> list[nn.Parameter]:
    return [parameter for _, parameter in named if (parameter.ndim > 1) == many]


class SegmentationModule(pl.LightningModule):
    """HPDDRNet with its losses, optimizer and validation.

    After each validation ``scores`` holds the metrics over all images and ranks, ``val_loss`` the
    mean cross-entropy per labelled pixel; ``losses`` the main and auxiliary loss of the last pass.
    With ``quantization``, validation and every second step see the network as its INT8 form. The steps
    between keep it a network that works in floating point, too: otherwise its weights come to rely on the
    rounding, and FP16, mixed precision and the comparison with FP32 have nothing to stand on.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: HPDDRNet,
        loss: SegmentationLoss,
        normalization: Normalization,
        optimization: OptimizationSection,
        seed: int,
        quantization: FakeQuantization | None = None,
    ) -> None:
        super().__init__()
        self.memory_format = memory_format(network)
        self.network = network.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.quantization = quantization
        self.loss = loss
        self.optimization = optimization
        self.seed = seed
        self.stored: dict[str, Any] = {}  # goes into every training checkpoint
        self.losses: tuple[float, float] = (math.nan, math.nan)
        self.scores: Scores | None = None
        self.val_loss = math.nan
        self._plain_loss = CrossEntropy()
        self._confusion = LabelComparison(network.config.num_classes)
        self._val_sums = [0.0, 0.0]  # summed loss, labelled pixels
        for name, values in (("mean", normalization.mean), ("std", normalization.std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        self.train()

    def train(self, mode: bool = True) -> SegmentationModule:
        super().train(mode)
        if self.optimization.freeze_norm:
            for module in self.network.modules():
                if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                    module.eval()
        return self

    def logits(self, images: Tensor, *, rounded: bool) -> Tensor | tuple[Tensor, Tensor]:
        """The network's output for its normalised input ``[N, 3, H, W]``; ``rounded`` with ``quantization``."""
        logits: Tensor | tuple[Tensor, Tensor]
        fake = self.quantization if rounded else None
        logits = self.network(images) if fake is None else fake(self.network, images)
        return logits

    def normalize(self, images: Tensor) -> Tensor:
        """Grey uint8 ``[N, 1, H, W]`` to the network's input ``[N, 3, H, W]``."""
        return ((images.float() - self.mean) / self.std).contiguous(memory_format=self.memory_format)

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.optimization, self.network)
        scheduler = build_scheduler(self.optimization, optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["hpddrnet_trt"] = self.stored

    # ------------------------------------------------------------------ training

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed(network_seed(self.seed, batch_idx, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, masks = batch
        logits = self.logits(self.normalize(images), rounded=self.global_step % 2 == 0)
        with torch.autocast(images.device.type, enabled=False):
            main, auxiliary = self.loss(logits, masks)
        self.losses = (main.item(), auxiliary.item())
        if not all(map(math.isfinite, self.losses)):
            lr = learning_rate(self.optimization, self.global_step)
            raise UserError(
                f"the loss became {sum(self.losses)} at step {self.global_step} (learning rate {lr:.3g}); "
                "lower optimization.lr, set optimization.clip_norm, or train in another run.precision"
            )
        return main + auxiliary

    # ---------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        self._confusion = LabelComparison(self.network.config.num_classes)
        self._val_sums = [0.0, 0.0]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, masks = batch
        with torch.autocast(images.device.type, enabled=False):  # as the checkpoint will be used
            coarse = self.logits(self.normalize(images), rounded=True)
        assert isinstance(coarse, Tensor)
        logits = resize(coarse.float(), images.shape[-2], images.shape[-1])
        labelled = float((masks != IGNORE_INDEX).sum())
        self._val_sums[0] += float(self._plain_loss(logits, masks)) * labelled
        self._val_sums[1] += labelled
        labels = logits.argmax(dim=1).to(torch.uint8).cpu().numpy()
        for predicted, truth in zip(labels, masks.cpu().numpy(), strict=True):
            self._confusion.update(predicted, truth)

    def on_validation_epoch_end(self) -> None:
        counts = self._confusion.counts
        self._confusion.counts = self._sum_over_ranks(torch.from_numpy(counts)).numpy()
        loss, labelled = self._sum_over_ranks(torch.tensor(self._val_sums, dtype=torch.float64)).tolist()
        self.scores = self._confusion.scores()
        self.val_loss = loss / labelled if labelled else math.nan

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return values
        total = self.trainer.strategy.reduce(values.to(self.device), reduce_op="sum")
        assert isinstance(total, Tensor)
        return total.cpu()


class SegmentationData(pl.LightningDataModule):
    """Training and validation loaders."""

    def __init__(
        self,
        training: TrainingSamples,
        validation: ImageStore,
        *,
        images_per_pass: int,
        first_pass: int = 0,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self.training = training
        self.validation = validation
        self.images_per_pass = images_per_pass
        self.first_pass = first_pass
        self.workers = workers

    def train_dataloader(self) -> Loader:
        rank, ranks = self._place()
        numbers = BatchNumbers(self.images_per_pass, first=self.first_pass, rank=rank, ranks=ranks)
        return Loader(self.training, self.workers, batch_sampler=numbers)

    def val_dataloader(self) -> Loader:
        return Loader(ValidationImages(self.validation, *self._place()), self.workers, batch_size=1)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
