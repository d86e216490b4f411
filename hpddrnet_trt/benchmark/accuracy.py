"""How well each entry labels whole images, and how far it agrees with the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hpddrnet_trt.benchmark.images import Grey8
from hpddrnet_trt.benchmark.result import Accuracy
from hpddrnet_trt.core.metrics import ConfusionMatrix


class Scores:
    """Confusion matrices and agreement counts of all entries over the images seen so far.

    ``labels``: the entries' labels; ``reference``: the one that agreement refers to, or None;
    ``classes``: their number.
    """

    def __init__(self, labels: Sequence[str], reference: str | None, classes: int) -> None:
        self.entries, self.reference = list(labels), reference
        self._matrices = {label: ConfusionMatrix(classes) for label in labels}
        self._equal = dict.fromkeys(labels, 0)
        self._pixels = dict.fromkeys(labels, 0)
        self._images = dict.fromkeys(labels, 0)

    def add(self, found: Mapping[str, Grey8], mask: Grey8 | None) -> None:
        """One image; an entry without labels for it is not scored from here on."""
        self.entries = [label for label in self.entries if label in found]
        reference = found.get(self.reference) if self.reference is not None else None
        for label, labels in found.items():
            self._images[label] += 1
            if mask is not None:
                self._matrices[label].update(labels, mask)
            if reference is not None:
                self._equal[label] += int(np.count_nonzero(labels == reference))
                self._pixels[label] += labels.size

    def accuracy(self, label: str) -> Accuracy | None:
        """Figures of an entry that labelled every image seen, else None."""
        if label not in self.entries or not self._images[label]:
            return None
        matrix = self._matrices[label]
        scores = matrix.scores() if matrix.images else None
        return Accuracy(
            images=self._images[label],
            agreement=self._equal[label] / self._pixels[label] if self._pixels[label] else None,
            masked_images=matrix.images,
            miou=_number(scores.miou) if scores else None,
            pixel_accuracy=_number(scores.pixel_accuracy) if scores else None,
            iou=[_number(value) for value in scores.iou] if scores else [],
        )


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value
