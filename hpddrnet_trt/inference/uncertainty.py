"""How sure a model is of its classes and how far its area fractions are off, measured on pictures with masks."""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import ContractError
from hpddrnet_trt.core.manifest import Manifest
from hpddrnet_trt.core.progress import progress_bar
from hpddrnet_trt.core.uncertainty import STEP, ScoredPicture, fit_fraction_errors, fit_temperature
from hpddrnet_trt.data.datasets import FolderDataset, Sample, evenly
from hpddrnet_trt.inference.matched import check_classes, matched
from hpddrnet_trt.inference.result import Segmentation
from hpddrnet_trt.inference.segmenter import Segmenter

MOST_PICTURES = 100  # that are kept in memory at once


def with_uncertainty(
    manifest: Manifest, segmenter: Segmenter, dataset: FolderDataset, split: str = "val", *, progress: bool = True
) -> Manifest:
    """``manifest`` with the temperature of the class scores and the errors of area fractions on a held-out split.

    ``segmenter``: the model, with class scores (a checkpoint, or an ONNX file by ``load_segmenter``
    with ``intervals=True``); what its own description says of both does not matter. Of more than
    :data:`MOST_PICTURES` pictures as many are taken, evenly spread. A split without pictures or labels leaves
    ``manifest`` as it is.

    Raises :class:`ContractError` for a model without class scores, for one whose file computes a confidence itself, and
    for a dataset with other classes.
    """
    output = manifest.output
    if output is not None and output.kind == "labels" and output.confidence:
        raise ContractError(
            f"the file of {manifest.name!r} computes its confidence itself, at the temperature it was exported with; "
            "describe its checkpoint and export that again"
        )
    check_classes(manifest, dataset)
    samples = evenly(dataset.split(split), MOST_PICTURES) if split in dataset.splits else []
    pictures = list(scored(segmenter, dataset, progress_bar(samples, desc="errors", unit="image", show=progress)))
    temperature = fit_temperature(pictures) if pictures else None
    errors = fit_fraction_errors(pictures, temperature, f"{dataset.name}/{split}")
    if errors is None:
        return manifest
    assert temperature is not None  # there are pictures
    return manifest.replace(temperature=round(temperature, 4), fraction_errors=errors)


def scored(segmenter: Segmenter, dataset: FolderDataset, samples: Iterable[Sample]) -> Iterable[ScoredPicture]:
    """Class scores, labels and masks of pictures, one at a time, read as for the model's training."""
    segmenter, dataset = matched(segmenter, dataset)
    segmenter = segmenter.with_intervals()
    for sample in samples:
        micrograph, truth = dataset.read(sample)
        yield scored_picture(segmenter.segment(micrograph), truth)


def scored_picture(result: Segmentation, truth: npt.NDArray[np.uint8]) -> ScoredPicture:
    """A result with ``sampled_scores`` beside its mask ``[H, W]``; scores of a rescaled picture are brought back."""
    assert result.sampled_scores is not None  # of a segmenter with intervals
    scores, (height, width) = result.sampled_scores, (-(-side // STEP) for side in truth.shape)
    if scores.shape[1:] != (height, width):
        scores = np.stack([cv2.resize(plane, (width, height)) for plane in scores]).astype(np.float32)
    return ScoredPicture(scores, result.labels, truth)
