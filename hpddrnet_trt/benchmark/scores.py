"""Labels of all entries on whole images, beside the masks and beside the reference's."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.benchmark.images import Grey8, Image
from hpddrnet_trt.benchmark.result import Accuracy
from hpddrnet_trt.core.intervals import Interval
from hpddrnet_trt.core.metrics import LabelComparison, score_intervals


class Scores:
    """Labels of the entries on whole images, kept compressed, against the masks and against the reference's."""

    def __init__(self, images: Sequence[Image]) -> None:
        self._images = images
        self._kept: dict[str, list[bytes]] = {}
        self._found: dict[tuple[str, str | None], Accuracy] = {}

    def add(self, label: str, planes: Sequence[Grey8]) -> None:
        """An entry's labels of all images."""
        self._kept[label] = [zlib.compress(np.ascontiguousarray(plane).data, 1) for plane in planes]

    def labels(self, index: int) -> dict[str, Grey8]:
        """Everybody's labels of an image."""
        return {label: self._plane(label, index) for label in self._kept}

    def accuracy(self, label: str, reference: str | None, classes: int) -> Accuracy | None:
        """Figures of an entry, None for one that has not labelled every image."""
        reference = reference if reference in self._kept else None
        if label not in self._kept:
            return None
        if (label, reference) not in self._found:
            masks, equal = LabelComparison(classes), LabelComparison(classes)
            counts, groups = [], []
            for index, image in enumerate(self._images):
                plane = self._plane(label, index)
                if image.mask is not None:
                    before = masks.counts.copy()
                    masks.update(plane, image.mask)
                    counts.append(masks.counts - before)
                    groups.append(image.group)
                if reference is not None:
                    equal.update(plane, self._plane(reference, index))
            scores = masks.scores()
            self._found[label, reference] = Accuracy(
                images=len(self._images),
                agreement=_number(equal.agreement),
                masked_images=masks.images,
                miou=_number(scores.miou),
                miou_interval=_interval(counts, groups),
                masked_miou=_number(scores.masked_miou),
                pixel_accuracy=_number(scores.pixel_accuracy),
                iou=[_number(value) for value in scores.iou] if masks.images else [],
            )
        return self._found[label, reference]

    def _plane(self, label: str, index: int) -> Grey8:
        shape = self._images[index].grey.shape
        return np.frombuffer(zlib.decompress(self._kept[label][index]), np.uint8).reshape(shape)


def _interval(counts: Sequence[npt.NDArray[np.int64]], groups: Sequence[str | None]) -> Interval | None:
    """Of the mIoU; None where there is none."""
    found = score_intervals(counts, groups).miou if counts else None
    return None if found is None or np.isnan(found.value) else found


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value
