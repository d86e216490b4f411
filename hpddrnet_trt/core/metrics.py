"""Segmentation metrics from one confusion matrix: mIoU, per-class IoU, accuracies, agreement.

Definitions follow mmsegmentation's ``IoUMetric`` (pixels labelled 255 are ignored, areas are
summed over all images before dividing, a class absent from labels and predictions is NaN and is
left out of the mean), so figures compare with published ones. Values are fractions, 0..1.

Published figures for SEM images often average over images instead. ``mean_image_micro_iou`` is the
one of Stuckner, Harder and Smith (npj Comput. Mater. 8, 200, 2022): with truth and prediction as
one-hot channels, each image gives ``sum TP / sum (TP + FP + FN)``, sums over its classes, and the
figure is the plain mean over the images. A wrong pixel counts twice in the denominator (missed in
one channel, false in another), so an image with pixel accuracy a has a / (2 - a). Images without a
labelled pixel have no such figure and are left out; without any other image the mean is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import ContractError
from hpddrnet_trt.core.manifest import IGNORE_INDEX


@dataclass(frozen=True)
class Scores:
    """All figures of one evaluation; per-class lists follow the class order, NaN where absent."""

    miou: float
    mean_accuracy: float
    pixel_accuracy: float
    mean_dice: float
    iou: list[float]
    accuracy: list[float]
    precision: list[float]  # NaN where a class is never predicted
    dice: list[float]
    micro_iou: float  # intersection over union summed over classes, over the whole set
    mean_image_micro_iou: float  # the same figure of each image, averaged over the images
    images: int

    def table(self, class_names: Sequence[str]) -> str:
        """A plain-text table, one class a row."""
        width = max(len(name) for name in [*class_names, "mean image micro IoU"])
        lines = [f"{'class':<{width}}  {'IoU':>7}  {'acc':>7}  {'Dice':>7}"]
        for name, iou, acc, dice in zip(class_names, self.iou, self.accuracy, self.dice, strict=True):
            lines.append(f"{name:<{width}}  {iou:7.4f}  {acc:7.4f}  {dice:7.4f}")
        lines.append(f"{'mean':<{width}}  {self.miou:7.4f}  {self.mean_accuracy:7.4f}  {self.mean_dice:7.4f}")
        lines.append(f"{'pixel accuracy':<{width}}  {self.pixel_accuracy:7.4f}   ({self.images} images)")
        lines.append(f"{'micro IoU':<{width}}  {self.micro_iou:7.4f}   (over the set)")
        lines.append(f"{'mean image micro IoU':<{width}}  {self.mean_image_micro_iou:7.4f}   (averaged per image)")
        return "\n".join(lines)


@dataclass
class ConfusionMatrix:
    """Counts of (true class, predicted class) over images; one extra column holds predictions
    outside the classes, which count as errors of their true class."""

    num_classes: int
    ignore_index: int = IGNORE_INDEX
    images: int = 0
    counts: npt.NDArray[np.int64] = field(init=False)
    image_micro_ious: list[float] = field(init=False, default_factory=list)  # of the images with labelled pixels

    def __post_init__(self) -> None:
        self.counts = np.zeros((self.num_classes, self.num_classes + 1), dtype=np.int64)

    def update(self, predicted: npt.NDArray[np.integer], labels: npt.NDArray[np.integer]) -> None:
        """Add one image: two integer arrays of equal shape ``[..., height, width]``."""
        if predicted.shape != labels.shape:
            raise ContractError(
                f"prediction of shape {predicted.shape} cannot be compared with labels of shape {labels.shape}"
            )
        valid = labels != self.ignore_index
        truth = labels[valid].astype(np.int64)
        if truth.size and (truth.max() >= self.num_classes or truth.min() < 0):
            bad = int(truth.max() if truth.max() >= self.num_classes else truth.min())
            raise ContractError(
                f"label value {bad} is outside the {self.num_classes} classes and is not {self.ignore_index} (ignore)"
            )
        guess = predicted[valid].astype(np.int64)
        guess[(guess < 0) | (guess >= self.num_classes)] = self.num_classes
        columns = self.num_classes + 1
        counts = np.bincount(truth * columns + guess, minlength=self.counts.size).reshape(self.counts.shape)
        self.counts += counts
        self.images += 1
        if truth.size:
            hit, label, guessed = _areas(counts)
            self.image_micro_ious.append(float(hit.sum() / (label + guessed - hit).sum()))

    def add(self, other: ConfusionMatrix) -> None:
        """Add everything that was added to ``other``, a matrix of the same classes."""
        self.counts += other.counts
        self.images += other.images
        self.image_micro_ious += other.image_micro_ious

    def scores(self) -> Scores:
        """Metrics of everything added so far; NaN where nothing was labelled."""
        hit, label, predicted = _areas(self.counts)
        union = label + predicted - hit
        iou, acc = _divide(hit, union), _divide(hit, label)
        dice = _divide(2 * hit, label + predicted)
        return Scores(
            miou=_nanmean(iou),
            mean_accuracy=_nanmean(acc),
            pixel_accuracy=float(_divide(hit.sum(), label.sum())),
            mean_dice=_nanmean(dice),
            iou=iou.tolist(),
            accuracy=acc.tolist(),
            precision=_divide(hit, predicted).tolist(),
            dice=dice.tolist(),
            micro_iou=float(_divide(hit.sum(), union.sum())),
            mean_image_micro_iou=_nanmean(np.asarray(self.image_micro_ious, dtype=np.float64)),
            images=self.images,
        )


def agreement(first: npt.NDArray[np.integer], second: npt.NDArray[np.integer]) -> float:
    """Share of pixels with equal labels in two label maps of equal shape."""
    if first.shape != second.shape:
        raise ContractError(f"label maps of shapes {first.shape} and {second.shape} cannot be compared")
    return float(np.mean(first == second)) if first.size else float("nan")


def _areas(counts: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float64], ...]:
    """Pixels of each class: right ones, true ones and predicted ones."""
    square = counts[:, : len(counts)]
    return tuple(area.astype(np.float64) for area in (np.diag(square), counts.sum(axis=1), square.sum(axis=0)))


def _divide(top: npt.ArrayLike, bottom: npt.ArrayLike) -> npt.NDArray[np.float64]:
    bottom = np.asarray(bottom, dtype=np.float64)
    return np.divide(top, bottom, out=np.full(bottom.shape, np.nan), where=bottom > 0)


def _nanmean(values: npt.NDArray[np.float64]) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else float("nan")
