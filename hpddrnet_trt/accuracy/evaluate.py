"""Accuracy of a segmenter on a dataset with masks: of the split, of every image, and where the figures come from."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from hpddrnet_trt.accuracy.measurements import (
    FIGURES,
    ClassErrors,
    Measured,
    class_errors,
    mean_boundary_f,
    mean_centerline_f,
    mean_distance,
    measure,
)
from hpddrnet_trt.core.files import sha256_of
from hpddrnet_trt.core.intervals import Interval, unit_name
from hpddrnet_trt.core.manifest import ClassInfo
from hpddrnet_trt.core.metrics import LabelComparison, ScoreIntervals, Scores, score_intervals
from hpddrnet_trt.core.progress import progress_bar
from hpddrnet_trt.core.provenance import command_line
from hpddrnet_trt.core.text import plain
from hpddrnet_trt.core.uncertainty import Reliability
from hpddrnet_trt.data.datasets import FolderDataset, Sample
from hpddrnet_trt.data.micrograph import Micrograph
from hpddrnet_trt.engines import is_address, library_versions
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.inference.matched import matched
from hpddrnet_trt.inference.uncertainty import scored_picture

Grey8 = npt.NDArray[np.uint8]
WORST = 6  # images shown
EDGE = 1024  # pixels: larger images are shown reduced


@dataclass(frozen=True)
class Origin:
    """Model, data and program behind the figures: what is needed to get them again."""

    created: str  # ISO 8601, UTC
    command: str
    model: str
    file: str | None
    sha256: str | None  # of the model file
    network: str
    precision: str | None
    trained_on: str | None  # name of the dataset
    best_step: int | None  # of training, where the checkpoint says so
    data: str
    data_sha256: str  # of all images and masks, see FolderDataset.checksum
    license: str | None
    split: str
    mode: str
    runtime: str
    versions: dict[str, str]


def origin_of(segmenter: Segmenter, dataset: FolderDataset, split: str, model_file: str | Path | None = None) -> Origin:
    """Look at what is about to be measured; reads all files of the dataset for its checksum."""
    manifest = segmenter.manifest
    step = manifest.metrics.get("step")
    checksum = None
    if model_file is not None:
        checksum = segmenter.model_sha256 if is_address(model_file) else sha256_of(model_file)
    return Origin(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command_line(),
        model=manifest.name,
        file=None if model_file is None else str(model_file),
        sha256=checksum,
        network=manifest.network.name,
        precision=segmenter.engine.arithmetic,
        trained_on=None if manifest.data is None else manifest.data.name,
        best_step=None if step is None else int(step),
        data=dataset.name,
        data_sha256=dataset.checksum(),
        license=dataset.license,
        split=split,
        mode=segmenter.mode,
        runtime=segmenter.engine.runtime,
        versions=library_versions(),
    )


@dataclass(frozen=True)
class ImageResult:
    """One image: ``counts`` int64 ``[classes, classes + 1]`` of (true, predicted) pixels, see ``LabelComparison``."""

    name: str
    group: str | None
    height: int
    width: int
    counts: npt.NDArray[np.int64]
    scores: Scores
    measured: Measured

    @property
    def ignored(self) -> int:
        """Pixels that are not labelled."""
        return self.height * self.width - int(self.counts.sum())


@dataclass(frozen=True)
class Picture:
    """One image to look at: micrograph, truth and prediction, uint8 ``[h, w]``, every ``step``-th pixel."""

    result: ImageResult
    grey: Grey8
    truth: Grey8
    predicted: Grey8
    step: int = 1


@dataclass(frozen=True)
class Assessment:
    """One pass over a split. ``pictures``: the worst images, worst first, and at the end the best one.
    ``reliability``: of class scores where the engine gives them, by temperature: None (as they are) and the model's.
    """

    origin: Origin
    classes: list[ClassInfo]
    images: list[ImageResult]
    counts: npt.NDArray[np.int64]
    scores: Scores
    pictures: list[Picture]
    reliability: dict[float | None, Reliability] = field(default_factory=dict)

    @property
    def class_names(self) -> list[str]:
        return [entry.name for entry in self.classes]

    @property
    def ignored_fraction(self) -> float:
        """Share of all pixels that are not labelled."""
        return sum(image.ignored for image in self.images) / sum(image.height * image.width for image in self.images)

    @property
    def groups(self) -> list[str | None]:
        """The specimen of each image."""
        return [image.group for image in self.images]

    @cached_property
    def intervals(self) -> ScoreIntervals:
        """IoU and accuracy over images or, where they are known, specimens."""
        return score_intervals([image.counts for image in self.images], self.groups)

    @cached_property
    def errors(self) -> list[list[ClassErrors]]:
        """Errors of area, objects, sizes and boundaries: of each class one entry a figure."""
        measured = [image.measured for image in self.images]
        return [class_errors(measured, self.groups, index) for index in range(len(self.classes))]

    @cached_property
    def distances(self) -> list[Interval]:
        """Mean Hausdorff distance (95 %) of each class, in pixels."""
        measured = [image.measured for image in self.images]
        return [mean_distance(measured, self.groups, index) for index in range(len(self.classes))]

    @cached_property
    def boundary_scores(self) -> list[Interval]:
        """Mean boundary F-score of each class, within one pixel."""
        measured = [image.measured for image in self.images]
        return [mean_boundary_f(measured, self.groups, index) for index in range(len(self.classes))]

    @cached_property
    def centerline_scores(self) -> list[Interval]:
        """Mean clDice of each class: what a network of lines keeps of its course."""
        measured = [image.measured for image in self.images]
        return [mean_centerline_f(measured, self.groups, index) for index in range(len(self.classes))]

    @property
    def remarks(self) -> list[str]:
        """What must be known of the intervals, in sentences."""
        miou, of = self.intervals.miou, unit_name(self.groups)
        if miou.remark is not None:
            return [miou.remark]
        count = f"{miou.units} {of}" + (f" ({len(self.images)} pictures)" if of == "specimens" else "")
        rare = [f"{self.class_names[index]} ({self.intervals.iou[index].units})" for index in self.intervals.rare]
        sentences = [f"intervals are over {count}, 95 %; they hold for more {of} like these"]
        if rare:
            sentences.append(
                f"in too few {of} for an interval: {', '.join(rare)}; that of the mIoU does not know how such a class "
                "varies"
            )
        return sentences

    def record(self) -> dict[str, Any]:
        """All figures; NaN where one does not exist (a class that does not occur)."""
        return {
            "model": self.origin.file or self.origin.model,
            "data": self.origin.data,
            "split": self.origin.split,
            "mode": self.origin.mode,
            "classes": self.class_names,
            **asdict(self.scores),
            "confusion": self.counts.tolist(),
            "ignored_fraction": self.ignored_fraction,
            "intervals": asdict(self.intervals),
            "measurements": {
                name: {
                    **{entry.figure.key: _error_record(entry) for entry in self.errors[index]},
                    "hausdorff95_px": asdict(self.distances[index]),
                    "boundary_f": asdict(self.boundary_scores[index]),
                    "centerline_f": asdict(self.centerline_scores[index]),
                }
                for index, name in enumerate(self.class_names)
            },
            "calibration": [
                {"temperature": temperature, "expected_calibration_error": found.expected_calibration_error}
                for temperature, found in self.reliability.items()
            ],
            "remarks": self.remarks,
            "per_image": [_image_record(image) for image in self.images],
            "origin": asdict(self.origin),
        }

    def to_csv(self) -> str:
        """One row per image; fractions 0..1, lengths in pixels, empty where a figure does not exist."""
        kinds = [*_CSV_OF_CLASS]
        kinds += [f"{figure.key}_{side}" for figure in FIGURES if figure.relative for side in _SIDES]
        per_class = [f"{kind}_{name}" for kind in kinds for name in self.class_names]
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*_CSV_COLUMNS, *per_class])
        for image in self.images:
            record = plain(_image_record(image))
            values = [record[column] for column in _CSV_COLUMNS]
            of_class = [record[key] for key in _CSV_OF_CLASS.values()]
            of_class += [record[figure.key][side] for figure in FIGURES if figure.relative for side in _SIDES]
            writer.writerow([*values, *(value for row in of_class for value in row)])
        return stream.getvalue()


_CSV_COLUMNS = ["name", "group", "height", "width", "pixel_size_m", "ignored_pixels", "miou", "pixel_accuracy",
                "micro_iou"]  # fmt: skip
# Columns of each class, and where the record has them.
_CSV_OF_CLASS = {"iou": "iou", "truth": "truth_fractions", "predicted": "predicted_fractions",
                 "hausdorff95_px": "hausdorff95_px", "boundary_f": "boundary_f",
                 "centerline_f": "centerline_f"}  # fmt: skip
_SIDES = ("truth", "predicted")


def fractions(counts: npt.NDArray[np.int64]) -> tuple[list[float], list[float]]:
    """Area fractions of each class in truth and in prediction, both of the labelled pixels; NaN without any."""
    total = counts.sum()
    if not total:
        return [math.nan] * len(counts), [math.nan] * len(counts)
    predicted = counts[:, : len(counts)].sum(axis=0)
    return (counts.sum(axis=1) / total).tolist(), (predicted / total).tolist()


def _image_record(image: ImageResult) -> dict[str, Any]:
    truth, predicted = fractions(image.counts)
    scores = image.scores
    return {
        "name": image.name,
        "group": image.group,
        "height": image.height,
        "width": image.width,
        "ignored_pixels": image.ignored,
        "miou": scores.miou,
        "pixel_accuracy": scores.pixel_accuracy,
        "micro_iou": scores.micro_iou,
        "iou": scores.iou,
        "truth_fractions": truth,
        "predicted_fractions": predicted,
        "pixel_size_m": image.measured.pixel_size_m,
        **_measured_record(image.measured),
    }


def _measured_record(measured: Measured) -> dict[str, Any]:
    """Objects, sizes and boundaries of each class, and Hausdorff distances; these in metres too, where possible."""
    record: dict[str, Any] = {
        figure.key: {side: getattr(measured, side)[place].tolist() for side in _SIDES}
        for place, figure in enumerate(FIGURES)
        if figure.relative
    }
    record["hausdorff95_px"] = measured.hausdorff_px.tolist()
    record["boundary_f"] = measured.boundary_f.tolist()
    record["centerline_f"] = measured.centerline_f.tolist()
    if measured.pixel_size_m is not None:
        record["hausdorff95_m"] = (measured.hausdorff_px * measured.pixel_size_m).tolist()
    return record


def _error_record(errors: ClassErrors) -> dict[str, Any]:
    """Means of truth and prediction; ``error`` and ``size`` are fractions of the picture (area) or of the truth."""
    return {
        "truth": errors.truth,
        "predicted": errors.predicted,
        "error": asdict(errors.error),
        "absolute_error": asdict(errors.size),
    }


def samples_of(
    dataset: FolderDataset, split: str, title: str, *, progress: bool = True
) -> Iterator[tuple[Sample, Micrograph, Grey8]]:
    """Every sample of a split with its image in 8 bits and its mask, one at a time, under a progress bar."""
    for sample in progress_bar(dataset.split(split), desc=title, unit="image", show=progress):
        yield sample, *dataset.read(sample)


def assess(
    segmenter: Segmenter,
    dataset: FolderDataset,
    split: str,
    *,
    worst: int = WORST,
    model_file: str | Path | None = None,
    progress: bool = True,
) -> Assessment:
    """Scores of ``segmenter`` on one split, and those of every image.

    Images are brought to 8 bits by the dataset, as in training, and by the segmenter to the pixel size of the training,
    where both are known. Labels are compared at the images' own size, as in mmsegmentation's test loop, and areas
    summed over the split (see :mod:`hpddrnet_trt.core.metrics`).

    Area, objects, sizes and boundaries of each image are measured in truth and prediction alike
    (:mod:`hpddrnet_trt.accuracy.measurements`).

    Images are ranked by their own mIoU (over the classes in their truth or prediction; equal ones by
    name). Pictures of the ``worst`` and of the best are kept, reduced to :data:`EDGE` pixels at most:
    memory does not grow with the split. ``model_file`` is named in the result, with its checksum.

    Raises :class:`ContractError` when the dataset's classes are not the model's, :class:`UsageError` for an
    unknown split or a segmenter with a grey window of its own, and :class:`BadInputFile` for a mask that does
    not fit its image or the classes.
    """
    segmenter, dataset = matched(segmenter, dataset)
    dataset.split(split)  # an unknown split is told before all files are read
    origin = origin_of(segmenter, dataset, split, model_file)
    total = LabelComparison(len(dataset.classes))
    images: list[ImageResult] = []
    ranking = _Ranking(worst)
    scored = segmenter.gives_scores
    segmenter = segmenter.with_intervals() if scored else segmenter
    temperatures = dict.fromkeys((None, segmenter.manifest.temperature)) if scored else {}
    reliability = {temperature: Reliability.of([], temperature) for temperature in temperatures}
    for sample, image, mask in samples_of(dataset, split, f"evaluate {split}", progress=progress):
        result = segmenter.segment(image)
        labels = result.labels
        seen = [scored_picture(result, mask)] if scored else []
        for temperature in reliability:
            reliability[temperature] += Reliability.of(seen, temperature)
        matrix = LabelComparison(len(dataset.classes))
        matrix.update(labels, mask)
        total.add(matrix)
        height, width = mask.shape
        measured = measure(mask, labels, len(dataset.classes), image.pixel_size_m)
        images.append(ImageResult(sample.name, sample.group, height, width, matrix.counts, matrix.scores(), measured))
        ranking.offer(images[-1], image.pixels, mask, labels)
    return Assessment(origin, dataset.classes, images, total.counts, total.scores(), ranking.pictures, reliability)


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
