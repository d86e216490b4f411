"""Cross-entropy, online hard example mining, and the two-headed loss of DDRNet.

Everything is computed in 32-bit floats whatever the network's precision: the threshold of the hard
example mining compares probabilities close to one, which 16-bit floats cannot tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpddrnet_trt.manifest import IGNORE_INDEX
from hpddrnet_trt.models.network import resize


class CrossEntropy(nn.Module):
    """Mean over the labelled pixels of the (class-weighted) cross-entropy.

    ``forward(logits [N, K, H, W] float, labels [N, H, W] integer) -> scalar``; zero, with zero
    gradients, when every pixel is ignored. The mean divides by the number of pixels and not by
    the sum of their weights, so a weight of two counts a pixel twice.
    """

    class_weights: Tensor | None

    def __init__(self, class_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def pixel_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Weighted cross-entropy of each pixel ``[N, H, W]``, zero where ignored."""
        return F.cross_entropy(logits, labels, self.class_weights, ignore_index=IGNORE_INDEX, reduction="none")

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        labels = labels.long()
        kept = labels != IGNORE_INDEX
        return _mean_of(self.pixel_losses(logits.float(), labels), kept)


class OhemCrossEntropy(CrossEntropy):
    """Cross-entropy over the hard pixels only, as in mmsegmentation's ``OhemCrossEntropy``.

    A pixel is hard when the probability of its true class is below ``threshold``; when fewer than
    ``min_kept`` pixels of the whole batch are, the threshold rises to the probability of the
    ``min_kept``-th hardest pixel (Shrivastava et al., "Training Region-based Object Detectors with
    Online Hard Example Mining", CVPR 2016; arXiv:1604.03540).
    """

    def __init__(
        self, threshold: float = 0.9, min_kept: int = 131072, class_weights: Sequence[float] | None = None
    ) -> None:
        super().__init__(class_weights)
        self.threshold = threshold
        self.min_kept = min_kept

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits, labels = logits.float(), labels.long()
        valid = labels != IGNORE_INDEX
        losses = self.pixel_losses(logits, labels)
        count = int(valid.sum())
        if count == 0:
            return _mean_of(losses, valid)
        with torch.no_grad():
            true_class = labels.masked_fill(~valid, 0).unsqueeze(1)
            probability = torch.softmax(logits, dim=1).gather(1, true_class).squeeze(1)
            rank = min(self.min_kept, count - 1) + 1
            hardest = torch.kthvalue(probability[valid], rank).values
            kept = valid & (probability < hardest.clamp(min=self.threshold))
        return _mean_of(losses, kept)


def _mean_of(losses: Tensor, kept: Tensor) -> Tensor:
    # An empty selection gives 0, not NaN: a crop may be unlabelled, or every pixel may be certain.
    return (losses * kept).sum() / kept.sum().clamp(min=1)


class SegmentationLoss(nn.Module):
    """Loss of the main and of the auxiliary head, each compared at the labels' resolution.

    ``forward((main, auxiliary) logits [N, K, h, w], labels [N, H, W]) -> (main, auxiliary)``, the
    auxiliary one already multiplied by ``auxiliary_weight`` (0.6 in HPDDRNet, 0.4 in DDRNet).
    """

    def __init__(self, criterion: CrossEntropy, auxiliary_weight: float) -> None:
        super().__init__()
        self.criterion = criterion
        self.auxiliary_weight = auxiliary_weight

    def forward(self, logits: tuple[Tensor, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        height, width = labels.shape[-2:]
        main, auxiliary = (self.criterion(resize(one.float(), height, width), labels) for one in logits)
        return main, auxiliary * self.auxiliary_weight


def balanced_class_weights(fractions: Sequence[float]) -> list[float]:
    """Class weights from the share of labelled training pixels of each class.

    ``w = f ** -0.5`` scaled so that the mean weight over all pixels is one, which leaves the
    learning rate its meaning. Weighting by the full inverse frequency ("class balancing" of Eigen
    and Fergus, ICCV 2015; arXiv:1411.4734) makes classes of a few permille of the pixels, such as
    cracks, spill over their surroundings; its square root is a compromise in common use. A class
    that never occurs gets the weight of the rarest class that does.
    """
    present = [fraction for fraction in fractions if fraction > 0]
    rarest = min(present)
    raw = [max(fraction, rarest) ** -0.5 for fraction in fractions]
    scale = sum(fraction * weight for fraction, weight in zip(fractions, raw, strict=True)) / sum(present)
    return [weight / scale for weight in raw]
