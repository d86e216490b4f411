"""One pass of a model over a split: figures of every image, pictures of the worst."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np

from hpddrnet_trt.accuracy.evaluate import fitting, samples_of
from hpddrnet_trt.accuracy.results import Assessment, Grey8, ImageResult, Picture, origin_of
from hpddrnet_trt.core.metrics import LabelComparison
from hpddrnet_trt.data.datasets import FolderDataset, Sample
from hpddrnet_trt.data.preprocess import Mode
from hpddrnet_trt.inference import Segmenter

WORST = 6  # images shown
EDGE = 1024  # pixels: larger images are shown reduced


def assess(
    segmenter: Segmenter,
    dataset: FolderDataset,
    split: str,
    mode: Mode | None = None,
    *,
    worst: int = WORST,
    model_file: str | Path | None = None,
    progress: bool = True,
) -> Assessment:
    """Scores as :func:`~hpddrnet_trt.accuracy.evaluate.evaluate` gives them, and those of every image.

    Images are ranked by their own mIoU (over the classes in their truth or prediction; equal ones by
    name). Pictures of the ``worst`` and of the best are kept, reduced to :data:`EDGE` pixels at most:
    memory does not grow with the split. ``model_file`` is named in the result, with its checksum.

    Raises as :func:`~hpddrnet_trt.accuracy.evaluate.evaluate` does.
    """
    segmenter = fitting(segmenter, dataset, mode)
    dataset.split(split)  # an unknown split is told before all files are read
    origin = origin_of(segmenter, dataset, split, model_file)
    total = LabelComparison(len(dataset.classes))
    images: list[ImageResult] = []
    ranking = _Ranking(worst)
    for sample, grey, mask in samples_of(dataset, split, f"evaluate {split}", progress=progress):
        labels = segmenter.segment(grey).labels
        matrix = LabelComparison(len(dataset.classes))
        matrix.update(labels, mask)
        total.add(matrix)
        images.append(_result(sample, mask, matrix))
        ranking.offer(images[-1], grey, mask, labels)
    return Assessment(origin, dataset.classes, images, total.counts, total.scores(), ranking.pictures)


def _result(sample: Sample, mask: Grey8, matrix: LabelComparison) -> ImageResult:
    height, width = mask.shape
    return ImageResult(sample.name, sample.group, height, width, matrix.counts, matrix.scores())


class _Ranking:
    """Keeps the pictures of the worst images, and of the best after them."""

    def __init__(self, worst: int) -> None:
        self.worst = worst
        self.pictures: list[Picture] = []

    def offer(self, result: ImageResult, grey: Grey8, truth: Grey8, predicted: Grey8) -> None:
        """Take an image if it belongs to them; one without labelled pixels has no rank."""
        if not self.worst or math.isnan(result.scores.miou):
            return
        ranks = [_rank(entry.result) for entry in self.pictures]
        if len(ranks) > self.worst and ranks[-2] < _rank(result) < ranks[-1]:
            return
        self.pictures.append(picture(result, grey, truth, predicted))
        self.pictures.sort(key=lambda entry: _rank(entry.result))
        if len(self.pictures) > self.worst + 1:
            del self.pictures[self.worst]


def _rank(result: ImageResult) -> tuple[float, str]:
    return result.scores.miou, result.name


def picture(result: ImageResult, grey: Grey8, truth: Grey8, predicted: Grey8, edge: int = EDGE) -> Picture:
    """The image within ``edge`` pixels: grey levels averaged, of the labels every step-th pixel."""
    step = -(-max(grey.shape) // edge)
    if step == 1:
        return Picture(result, grey, truth, predicted)
    middle = slice(step // 2, None, step)
    truth, predicted = (np.ascontiguousarray(labels[middle, middle]) for labels in (truth, predicted))
    reduced = np.asarray(cv2.resize(grey, truth.shape[::-1], interpolation=cv2.INTER_AREA), dtype=np.uint8)
    return Picture(result, reduced.reshape(truth.shape), truth, predicted, step)
