"""Label maps compared with each other, and class scores turned into labels.

One class, :class:`LabelComparison`, answers every "how do these labels compare with those?": predictions against
masks, a candidate's labels against the reference's. Definitions follow mmsegmentation's ``IoUMetric`` (pixels
labelled 255 are ignored, areas are summed over all images before dividing, a class absent from labels and
predictions is NaN and is left out of the mean), so figures compare with published ones. Values are fractions, 0..1.

There are two means of the classes' IoU. ``miou`` is the field's: a class counts if it occurs in the truth or in the
prediction, so one pixel predicted of an absent class weighs as much as a whole class. ``masked_miou``, the mIoU of
the classes in the masks, leaves such classes out; what one file is allowed to lose against another is decided by it.

Published figures for SEM images often average over images instead. ``mean_image_micro_iou`` is the
one of Stuckner, Harder and Smith (npj Comput. Mater. 8, 200, 2022): with truth and prediction as
one-hot channels, each image gives ``sum TP / sum (TP + FP + FN)``, sums over its classes, and the
figure is the plain mean over the images. A wrong pixel counts twice in the denominator (missed in
one channel, false in another), so an image with pixel accuracy a has a / (2 - a). Images without a
labelled pixel have no such figure and are left out; without any other image the mean is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import ContractError
from hpddrnet_trt.core.intervals import Interval, bootstrap, by_unit, unit_name
from hpddrnet_trt.core.manifest import IGNORE_INDEX


@dataclass(frozen=True)
class Scores:
    """All figures of one comparison; per-class lists follow the class order, NaN where absent."""

    miou: float  # of the classes that occur in the truth or in the prediction
    masked_miou: float  # of the classes that occur in the truth
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


@dataclass
class LabelComparison:
    """Label maps against a reference (masks, or the labels of another model), added up over images.

    ``counts``: pixels, int64 ``[classes, classes + 1]`` of (class in the reference, class in the labels); the extra
    column holds labels outside the classes, which are wrong. Pixels whose reference is ``ignore_index`` do not count.
    """

    num_classes: int
    ignore_index: int = IGNORE_INDEX
    images: int = 0
    counts: npt.NDArray[np.int64] = field(init=False)
    image_agreements: list[float] = field(init=False, default_factory=list)  # of the images with labelled pixels
    image_micro_ious: list[float] = field(init=False, default_factory=list)  # of the same

    def __post_init__(self) -> None:
        self.counts = np.zeros((self.num_classes, self.num_classes + 1), dtype=np.int64)

    def update(self, labels: npt.NDArray[np.integer], reference: npt.NDArray[np.integer]) -> None:
        """Add one image: two integer arrays of equal shape ``[..., height, width]``.

        Raises :class:`ContractError` for arrays of different shapes, and for a reference outside the classes.
        """
        if labels.shape != reference.shape:
            raise ContractError(f"labels of shape {labels.shape} cannot be compared with ones of {reference.shape}")
        valid = reference != self.ignore_index
        truth = reference[valid].astype(np.int64)
        if truth.size and (truth.max() >= self.num_classes or truth.min() < 0):
            bad = int(truth.max() if truth.max() >= self.num_classes else truth.min())
            raise ContractError(
                f"label value {bad} is outside the {self.num_classes} classes and is not {self.ignore_index} (ignore)"
            )
        guess = labels[valid].astype(np.int64)
        guess[(guess < 0) | (guess >= self.num_classes)] = self.num_classes
        columns = self.num_classes + 1
        counts = np.bincount(truth * columns + guess, minlength=self.counts.size).reshape(self.counts.shape)
        self.counts += counts
        self.images += 1
        if truth.size:
            hit, label, guessed = areas(counts)
            self.image_agreements.append(float(hit.sum() / label.sum()))
            self.image_micro_ious.append(float(hit.sum() / (label + guessed - hit).sum()))

    def add(self, other: LabelComparison) -> None:
        """Add everything that was added to ``other``, a comparison of the same classes."""
        self.counts += other.counts
        self.images += other.images
        self.image_agreements += other.image_agreements
        self.image_micro_ious += other.image_micro_ious

    @property
    def agreement(self) -> float:
        """Share of pixels with the reference's label; NaN where nothing was labelled."""
        hit, label, _ = areas(self.counts)
        return float(_divide(hit.sum(), label.sum()))

    @property
    def worst_agreement(self) -> float:
        """The same of the image where it is least."""
        return min(self.image_agreements, default=float("nan"))

    def class_ious(self, class_names: Sequence[str]) -> dict[str, float]:
        """IoU by class, of those that occur in the labels or in the reference."""
        pairs = zip(class_names, self.scores().iou, strict=True)
        return {name: iou for name, iou in pairs if not np.isnan(iou)}

    def scores(self) -> Scores:
        """Metrics of everything added so far; NaN where nothing was labelled."""
        hit, label, predicted = areas(self.counts)
        union = label + predicted - hit
        iou, acc = _divide(hit, union), _divide(hit, label)
        dice = _divide(2 * hit, label + predicted)
        return Scores(
            miou=_nanmean(iou),
            masked_miou=_nanmean(iou[label > 0]),
            mean_accuracy=_nanmean(acc),
            pixel_accuracy=self.agreement,
            mean_dice=_nanmean(dice),
            iou=iou.tolist(),
            accuracy=acc.tolist(),
            precision=_divide(hit, predicted).tolist(),
            dice=dice.tolist(),
            micro_iou=float(_divide(hit.sum(), union.sum())),
            mean_image_micro_iou=_nanmean(np.asarray(self.image_micro_ious, dtype=np.float64)),
            images=self.images,
        )


def arg_max(scores: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """Index of the highest score over axis 1: ``[N, C, ...]`` to uint8 ``[N, ...]``, first one on ties.

    The same answer as ``numpy.argmax(scores, axis=1)`` for scores that are numbers, some hundred times
    faster for a few classes, because whole planes are compared and nothing is selected: a later class has
    a larger index, so the largest index of a class that was better than all before it is the answer.
    """
    best = scores[:, 0]
    labels = np.zeros(best.shape, dtype=np.uint8)
    for index in range(1, scores.shape[1]):
        plane = scores[:, index]
        better = (plane > best).view(np.uint8)
        np.maximum(labels, np.multiply(better, np.uint8(index), out=better), out=labels)
        best = np.maximum(best, plane)
    return labels


def softmax(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """Probabilities over axis 1 of ``[N, C, ...]``, float32."""
    shifted = logits.astype(np.float32) - logits.max(axis=1, keepdims=True)
    np.exp(shifted, out=shifted)
    shifted /= shifted.sum(axis=1, keepdims=True)
    return shifted


def areas(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Pixels of each class, right ones, true ones and predicted ones: ``[..., 3, classes]`` of counts
    ``[..., classes, classes + 1]`` as :class:`LabelComparison` has them."""
    square = counts[..., : counts.shape[-2]]
    kinds = (np.diagonal(square, axis1=-2, axis2=-1), counts.sum(axis=-1), square.sum(axis=-2))
    return np.stack(kinds, axis=-2).astype(np.float64)


def class_iou(areas: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """IoU ``[..., classes]`` of areas ``[..., 3, classes]``; NaN for a class in neither truth nor prediction."""
    hit, label, predicted = np.moveaxis(areas, -2, 0)
    return _divide(hit, label + predicted - hit)


def mean_iou(areas: npt.NDArray[np.float64], *, masked: bool = False) -> npt.NDArray[np.float64]:
    """mIoU ``[...]`` of areas ``[..., 3, classes]``, with ``masked`` of the classes in the truth."""
    iou = class_iou(areas)
    counted = ~np.isnan(iou) & (areas[..., 1, :] > 0) if masked else ~np.isnan(iou)
    return _divide(np.where(counted, iou, 0).sum(axis=-1), counted.sum(axis=-1))


@dataclass(frozen=True)
class ScoreIntervals:
    """The figures of a split, each with its interval over pictures or specimens."""

    miou: Interval
    masked_miou: Interval
    pixel_accuracy: Interval
    iou: list[Interval]

    @property
    def rare(self) -> list[int]:
        """Classes in too few pictures or specimens for an interval, though there are enough of these: a resample of
        them knows little of how such a class varies, and so does the interval of the mean."""
        if self.miou.low is None:
            return []
        return [place for place, found in enumerate(self.iou) if found.units and found.low is None]


def score_intervals(
    counts: Sequence[npt.NDArray[np.int64]], groups: Sequence[str | None], *, seed: int = 0
) -> ScoreIntervals:
    """Intervals of what :meth:`LabelComparison.scores` says of these pictures together.

    ``counts``: of each picture, see :class:`LabelComparison`; ``groups``: its specimen, or None.
    """
    of = unit_name(groups)
    units = by_unit(areas(np.stack(counts)), groups)

    def interval(totals: npt.NDArray[np.float64], statistic: Callable[..., npt.NDArray[np.float64]]) -> Interval:
        return bootstrap(totals, statistic, fraction=True, of=of, seed=seed)

    return ScoreIntervals(
        miou=interval(units, mean_iou),
        masked_miou=interval(units, lambda sums: mean_iou(sums, masked=True)),
        pixel_accuracy=interval(units, lambda sums: _divide(sums[:, 0].sum(axis=-1), sums[:, 1].sum(axis=-1))),
        iou=[interval(units[..., place : place + 1], mean_iou) for place in range(units.shape[-1])],
    )


def _divide(top: npt.ArrayLike, bottom: npt.ArrayLike) -> npt.NDArray[np.float64]:
    bottom = np.asarray(bottom, dtype=np.float64)
    return np.divide(top, bottom, out=np.full(bottom.shape, np.nan), where=bottom > 0)


def _nanmean(values: npt.NDArray[np.float64]) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else float("nan")
