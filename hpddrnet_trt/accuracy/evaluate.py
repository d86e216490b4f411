"""Accuracy of a segmenter on a dataset with masks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from hpddrnet_trt.core.errors import ContractError, UsageError
from hpddrnet_trt.core.metrics import LabelComparison, Scores
from hpddrnet_trt.data.datasets import FolderDataset, Sample
from hpddrnet_trt.data.preprocess import Mode
from hpddrnet_trt.inference import Segmenter

Grey8 = npt.NDArray[np.uint8]


def evaluate(
    segmenter: Segmenter,
    dataset: FolderDataset,
    split: str,
    mode: Mode | None = None,
    *,
    progress: bool = True,
) -> Scores:
    """Scores of ``segmenter`` on one split; ``mode`` overrides the segmenter's own.

    Images are brought to 8 bits by the dataset, as in training, and keep their own size, as in
    mmsegmentation's test loop; areas are summed over the split (see :mod:`hpddrnet_trt.core.metrics`).

    Raises :class:`ContractError` when the dataset's classes are not the model's,
    :class:`UsageError` for an unknown split or a segmenter with a grey window of its own, and
    :class:`BadInputFile` for a mask that does not fit its image or the classes.
    """
    segmenter = fitting(segmenter, dataset, mode)
    comparison = LabelComparison(len(segmenter.manifest.classes))
    for _, image, mask in samples_of(dataset, split, f"evaluate {split}", progress=progress):
        comparison.update(segmenter.segment(image).labels, mask)
    return comparison.scores()


def fitting(segmenter: Segmenter, dataset: FolderDataset, mode: Mode | None = None) -> Segmenter:
    """The segmenter, in ``mode`` where one is given, if model and dataset name the same classes in the same order.

    Raises :class:`ContractError` or :class:`UsageError` as :func:`evaluate` does.
    """
    if segmenter.window is not None:
        raise UsageError(
            "a dataset gives 8-bit images, which a second grey window would change; "
            "evaluate with a segmenter without window"
        )
    model, data = segmenter.manifest.class_names, dataset.class_names
    if model != data:
        raise ContractError(
            f"model {segmenter.manifest.name!r} knows the classes {', '.join(model)}, but dataset {dataset.name!r} "
            f"is labelled with {', '.join(data)}; use a dataset with the model's classes in the same order"
        )
    return segmenter if mode is None else segmenter.with_mode(mode)


def samples_of(
    dataset: FolderDataset, split: str, title: str, *, progress: bool = True
) -> Iterator[tuple[Sample, Grey8, Grey8]]:
    """Every sample of a split with its 8-bit image and its mask, one at a time, under a progress bar."""
    for sample in tqdm(dataset.split(split), desc=title, unit="image", disable=not progress):
        yield sample, *dataset.load(sample)
