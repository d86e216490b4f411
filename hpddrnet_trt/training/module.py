"""The network under training: one step, one validation."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.manifest import IGNORE_INDEX, Normalization
from hpddrnet_trt.core.metrics import LabelComparison, Scores
from hpddrnet_trt.models.network import HPDDRNet, resize
from hpddrnet_trt.training.config import OptimisationConfig
from hpddrnet_trt.training.losses import CrossEntropy, SegmentationLoss
from hpddrnet_trt.training.order import network_seed
from hpddrnet_trt.training.qat import FakeQuantisation
from hpddrnet_trt.training.schedule import build_optimiser, build_scheduler, learning_rate

Batch = tuple[Tensor, Tensor]  # grey images uint8 [N, 1, H, W], masks uint8 [N, H, W]


class SegmentationModule(pl.LightningModule):
    """HPDDRNet with its losses, optimiser and validation.

    After each validation ``scores`` holds the metrics over all images and ranks, ``val_loss`` the
    mean cross-entropy per labelled pixel; ``losses`` the main and auxiliary loss of the last pass.
    With ``quantisation``, validation and every second step see the network as its INT8 form. The steps
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
        optimisation: OptimisationConfig,
        seed: int,
        quantisation: FakeQuantisation | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.quantisation = quantisation
        self.loss = loss
        self.optimisation = optimisation
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
        if self.optimisation.freeze_norm:
            for module in self.network.modules():
                if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                    module.eval()
        return self

    def logits(self, images: Tensor, *, rounded: bool) -> Tensor | tuple[Tensor, Tensor]:
        """The network's output for its normalised input ``[N, 3, H, W]``; ``rounded`` with ``quantisation``."""
        logits: Tensor | tuple[Tensor, Tensor]
        if self.quantisation is None or not rounded:
            logits = self.network(images)
        else:
            logits = self.quantisation(self.network, images)
        return logits

    def normalise(self, images: Tensor) -> Tensor:
        """Grey uint8 ``[N, 1, H, W]`` to the network's input ``[N, 3, H, W]``."""
        return ((images.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def configure_optimizers(self) -> Any:
        optimiser = build_optimiser(self.optimisation, self.network)
        scheduler = build_scheduler(self.optimisation, optimiser)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["hpddrnet_trt"] = self.stored

    # ------------------------------------------------------------------ training

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed(network_seed(self.seed, batch_idx, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, masks = batch
        logits = self.logits(self.normalise(images), rounded=self.global_step % 2 == 0)
        with torch.autocast(images.device.type, enabled=False):
            main, auxiliary = self.loss(logits, masks)
        self.losses = (main.item(), auxiliary.item())
        if not all(map(math.isfinite, self.losses)):
            lr = learning_rate(self.optimisation, self.global_step)
            raise UserError(
                f"the loss became {sum(self.losses)} at step {self.global_step} (learning rate {lr:.3g}); "
                "lower optimisation.lr, set optimisation.clip_norm, or train in another run.precision"
            )
        return main + auxiliary

    # ---------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        self._confusion = LabelComparison(self.network.config.num_classes)
        self._val_sums = [0.0, 0.0]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, masks = batch
        coarse = self.logits(self.normalise(images), rounded=True)
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
