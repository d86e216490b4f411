"""How well each entry labels whole images, and how far it agrees with the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hpddrnet_trt.benchmark.images import Grey8
from hpddrnet_trt.benchmark.result import Accuracy
from hpddrnet_trt.core.metrics import LabelComparison


class Scores:
    """Labels of all entries against the masks, and against the reference's, over the images seen so far.

    ``labels``: the entries' labels; ``reference``: the one that agreement refers to, or None;
    ``classes``: their number.
    """

    def __init__(self, labels: Sequence[str], reference: str | None, classes: int) -> None:
        self.entries, self.reference = list(labels), reference
        self._against_masks = {label: LabelComparison(classes) for label in labels}
        self._against_reference = {label: LabelComparison(classes) for label in labels}
        self._images = dict.fromkeys(labels, 0)

    def add(self, found: Mapping[str, Grey8], mask: Grey8 | None) -> None:
        """One image; an entry without labels for it is not scored from here on."""
        self.entries = [label for label in self.entries if label in found]
        reference = found.get(self.reference) if self.reference is not None else None
        for label, labels in found.items():
            self._images[label] += 1
            if mask is not None:
                self._against_masks[label].update(labels, mask)
            if reference is not None:
                self._against_reference[label].update(labels, reference)

    def accuracy(self, label: str) -> Accuracy | None:
        """Figures of an entry that labelled every image seen, else None."""
        if label not in self.entries or not self._images[label]:
            return None
        comparison = self._against_masks[label]
        scores = comparison.scores()
        return Accuracy(
            images=self._images[label],
            agreement=_number(self._against_reference[label].agreement),
            masked_images=comparison.images,
            miou=_number(scores.miou),
            masked_miou=_number(scores.masked_miou),
            pixel_accuracy=_number(scores.pixel_accuracy),
            iou=[_number(value) for value in scores.iou] if comparison.images else [],
        )


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value
