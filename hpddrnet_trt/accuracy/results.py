"""What an assessment found: figures of the split and of every image, and where they come from."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.files import sha256_of
from hpddrnet_trt.core.manifest import ClassInfo
from hpddrnet_trt.core.metrics import Scores
from hpddrnet_trt.core.provenance import command_line
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.engines import library_versions
from hpddrnet_trt.inference import Segmenter

Grey8 = npt.NDArray[np.uint8]


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
    licence: str | None
    split: str
    mode: str
    runtime: str
    versions: dict[str, str]


def origin_of(
    segmenter: Segmenter, dataset: FolderDataset, split: str, model_file: str | Path | None = None
) -> Origin:
    """Look at what is about to be measured; reads all files of the dataset for its checksum."""
    manifest = segmenter.manifest
    step = manifest.metrics.get("step")
    return Origin(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command_line(),
        model=manifest.name,
        file=None if model_file is None else str(model_file),
        sha256=None if model_file is None else sha256_of(model_file),
        network=manifest.network.name,
        precision=manifest.precision,
        trained_on=None if manifest.data is None else manifest.data.name,
        best_step=None if step is None else int(step),
        data=dataset.name,
        data_sha256=dataset.checksum(),
        licence=dataset.license,
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
    """One pass over a split. ``pictures``: the worst images, worst first, and at the end the best one."""

    origin: Origin
    classes: list[ClassInfo]
    images: list[ImageResult]
    counts: npt.NDArray[np.int64]
    scores: Scores
    pictures: list[Picture]

    @property
    def class_names(self) -> list[str]:
        return [entry.name for entry in self.classes]

    @property
    def ignored_fraction(self) -> float:
        """Share of all pixels that are not labelled."""
        return sum(image.ignored for image in self.images) / sum(image.height * image.width for image in self.images)

    def record(self) -> dict[str, Any]:
        """All figures for JSON; None where a figure does not exist (a class that does not occur)."""
        return {
            "model": self.origin.file or self.origin.model,
            "data": self.origin.data,
            "split": self.origin.split,
            "mode": self.origin.mode,
            "classes": self.class_names,
            **plain(asdict(self.scores)),
            "confusion": self.counts.tolist(),
            "ignored_fraction": self.ignored_fraction,
            "per_image": [_image_record(image) for image in self.images],
            "origin": asdict(self.origin),
        }

    def to_csv(self) -> str:
        """One row per image; fractions 0..1, empty where a figure does not exist."""
        per_class = [f"{kind}_{name}" for kind in ("iou", "truth", "predicted") for name in self.class_names]
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*_CSV_COLUMNS, *per_class])
        for image in self.images:
            record = _image_record(image)
            values = [record[column] for column in _CSV_COLUMNS]
            writer.writerow([*values, *record["iou"], *record["truth_fractions"], *record["predicted_fractions"]])
        return stream.getvalue()


_CSV_COLUMNS = ["name", "group", "height", "width", "ignored_pixels", "miou", "pixel_accuracy", "micro_iou"]


def fractions(counts: npt.NDArray[np.int64]) -> tuple[list[float], list[float]]:
    """Area fractions of each class in truth and in prediction, both of the labelled pixels; NaN without any."""
    total = counts.sum()
    if not total:
        return [math.nan] * len(counts), [math.nan] * len(counts)
    predicted = counts[:, : len(counts)].sum(axis=0)
    return (counts.sum(axis=1) / total).tolist(), (predicted / total).tolist()


def plain(value: Any) -> Any:
    """``value`` with None for every NaN and infinity in it, which JSON does not know."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _image_record(image: ImageResult) -> dict[str, Any]:
    truth, predicted = fractions(image.counts)
    scores = image.scores
    found: dict[str, Any] = plain(
        {
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
        }
    )
    return found
