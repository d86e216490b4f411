"""Cross-entropy, online hard example mining, overlap losses, and the two-headed loss of DDRNet.

Everything is computed in 32-bit floats whatever the network's precision: the threshold of the hard
example mining compares probabilities close to one, which 16-bit floats cannot tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpddrnet_trt.core.manifest import IGNORE_INDEX
from hpddrnet_trt.models.network import resize


class CrossEntropy(nn.Module):
    """Mean over the labelled pixels of the (class-weighted) cross-entropy.

    ``forward(logits [N, K, H, W] float, labels [N, H, W] integer) -> scalar``; zero, with zero
    gradients, when every pixel is ignored. The mean divides by the number of pixels and not by
    the sum of their weights, so a weight of two counts a pixel twice. ``boundary_weight`` is another one, of pixels
    that have one of another class among their eight neighbours.
    """

    class_weights: Tensor | None

    def __init__(self, class_weights: Sequence[float] | None = None, boundary_weight: float = 1.0) -> None:
        super().__init__()
        self.boundary_weight = boundary_weight
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def pixel_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Weighted cross-entropy of each pixel ``[N, H, W]``, zero where ignored."""
        losses = F.cross_entropy(logits, labels, self.class_weights, ignore_index=IGNORE_INDEX, reduction="none")
        return losses if self.boundary_weight == 1 else losses * (1 + (self.boundary_weight - 1) * boundary(labels))

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
        self,
        threshold: float = 0.9,
        min_kept: int = 131072,
        class_weights: Sequence[float] | None = None,
        boundary_weight: float = 1.0,
    ) -> None:
        super().__init__(class_weights, boundary_weight)
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


def boundary(labels: Tensor) -> Tensor:
    """1 for pixels that have one of another class among their eight neighbours, else 0: float ``[N, H, W]`` of integer
    labels of that shape. Ignored pixels are of no class and, as the image's edge, no boundary."""
    values = labels.float()[:, None]
    ignored = values == IGNORE_INDEX
    largest = F.max_pool2d(values.masked_fill(ignored, -1), 3, 1, 1)
    least = -F.max_pool2d(-values, 3, 1, 1)  # of the labels; ignored ones are above all
    return ((largest > least) & ~ignored)[:, 0].float()


def _mean_of(losses: Tensor, kept: Tensor) -> Tensor:
    # An empty selection gives 0, not NaN: a crop may be unlabelled, or every pixel may be certain.
    return (losses * kept).sum() / kept.sum().clamp(min=1)


class SoftDice(nn.Module):
    """One minus the mean over classes of the soft Dice coefficient (Milletari et al., "V-Net", 3DV 2016;
    arXiv:1606.04797), summed over the batch.

    ``forward(logits [N, K, H, W] float, labels [N, H, W] integer) -> scalar`` in 0..1. A class counts
    whatever its share of the pixels; classes without a labelled pixel in the batch are left out.
    """

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        probability, truth = _labelled_pixels(logits, labels)
        present = truth.sum(0) > 0
        shared = (probability * truth).sum(0)
        dice = 2 * shared / (probability.sum(0) + truth.sum(0)).clamp(min=1)
        return (1 - dice)[present].sum() / present.sum().clamp(min=1)


class LovaszSoftmax(nn.Module):
    """Convex surrogate of one minus the mean IoU of the classes present (Berman et al., CVPR 2018;
    arXiv:1705.08790, equation 11), over all labelled pixels of the batch.

    ``forward(logits [N, K, H, W] float, labels [N, H, W] integer) -> scalar`` in 0..1.
    """

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        probability, truth = _labelled_pixels(logits, labels)
        if not len(truth):
            return probability.sum()
        errors, order = (truth - probability).abs().sort(dim=0, descending=True)
        truth = truth.gather(0, order)
        # IoU loss when the worst 1, 2, ... pixels are wrong; its growth is each pixel's weight.
        missed = truth.cumsum(0)
        total = missed[-1]
        jaccard = 1 - (total - missed) / (total + (1 - truth).cumsum(0)).clamp(min=1)
        weights = torch.cat([jaccard[:1], jaccard.diff(dim=0)])
        present = total > 0
        return (errors * weights).sum(0)[present].mean()


class CenterlineDice(nn.Module):
    """Half soft Dice, half one minus clDice (Shit et al., CVPR 2021; arXiv:2003.07311), the harmonic mean of the share
    of the predicted centerlines that lies in the truth and of the true ones that lies in the prediction.

    ``forward(logits [N, K, H, W] float, labels [N, H, W] integer) -> scalar`` in 0..1. A line that is broken loses, one
    that is a pixel too wide does not. Centerlines are those of things up to :data:`THINNED` pixels from the middle to
    the edge; of thicker ones only what juts out counts. Classes without a true centerline in the batch are left out.
    """

    THINNED = 3

    def __init__(self) -> None:
        super().__init__()
        self.dice = SoftDice()

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        labelled = (labels != IGNORE_INDEX)[:, None]
        probability = torch.softmax(logits.float(), dim=1) * labelled
        classes = labels.long().masked_fill(~labelled[:, 0], 0)
        truth = F.one_hot(classes, logits.shape[1]).movedim(-1, 1).float() * labelled
        predicted, true = (_centerlines(each, self.THINNED) for each in (probability, truth))
        axes = (0, 2, 3)
        precise = (predicted * truth).sum(axes) / predicted.sum(axes).clamp(min=1e-6)
        found = (true * probability).sum(axes) / true.sum(axes).clamp(min=1e-6)
        lines = 2 * precise * found / (precise + found).clamp(min=1e-6)
        present = true.sum(axes) > 0
        missed = (1 - lines)[present].sum() / present.sum().clamp(min=1)
        total: Tensor = (self.dice(logits, labels) + missed) / 2
        return total


def _centerlines(values: Tensor, thinned: int) -> Tensor:
    """Soft skeletons of ``[N, K, H, W]``, values 0..1: what opening takes away, at every depth of erosion."""
    lines = F.relu(values - _opened(values))
    for _ in range(thinned):
        values = _eroded(values)
        more = F.relu(values - _opened(values))
        lines = lines + F.relu(more - lines * more)
    return lines


def _eroded(values: Tensor) -> Tensor:
    """The least of a cross of five pixels."""
    return -torch.maximum(F.max_pool2d(-values, (3, 1), 1, (1, 0)), F.max_pool2d(-values, (1, 3), 1, (0, 1)))


def _opened(values: Tensor) -> Tensor:
    return F.max_pool2d(_eroded(values), 3, 1, 1)


class WithOverlap(nn.Module):
    """``criterion + weight * overlap``: pixels and areas together."""

    def __init__(self, criterion: nn.Module, overlap: nn.Module, weight: float) -> None:
        super().__init__()
        self.criterion, self.overlap, self.weight = criterion, overlap, weight

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        total: Tensor = self.criterion(logits, labels) + self.weight * self.overlap(logits, labels)
        return total


def _labelled_pixels(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and one-hot labels of the labelled pixels, both float ``[pixels, classes]``."""
    classes = logits.shape[1]
    valid = labels != IGNORE_INDEX
    probability = torch.softmax(logits.float(), dim=1).movedim(1, -1)[valid]
    return probability, F.one_hot(labels[valid].long(), classes).to(probability.dtype)


class SegmentationLoss(nn.Module):
    """Loss of the main and of the auxiliary head, each compared at the labels' resolution.

    ``forward((main, auxiliary) logits [N, K, h, w], labels [N, H, W]) -> (main, auxiliary)``, the
    auxiliary one already multiplied by ``auxiliary_weight`` (0.6 in HPDDRNet, 0.4 in DDRNet).
    """

    def __init__(self, criterion: nn.Module, auxiliary_weight: float) -> None:
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
