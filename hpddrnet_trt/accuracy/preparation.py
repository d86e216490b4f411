"""From an FP32 export and micrographs to everything that a study of its precision needs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

from hpddrnet_trt.accuracy.gate import reference_for
from hpddrnet_trt.accuracy.judge import Judge
from hpddrnet_trt.accuracy.trials import Recipe, Trials
from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.manifest import CalibrationRecord, InputContract
from hpddrnet_trt.core.precisions import LowPrecision
from hpddrnet_trt.data.datasets import FolderDataset, find_images
from hpddrnet_trt.engines.base import input_contract
from hpddrnet_trt.export import images as micrographs
from hpddrnet_trt.export.calibrate import MAX_IMAGES, calibration_record, float_model
from hpddrnet_trt.export.histograms import Statistics, merge
from hpddrnet_trt.export.ranges import Method, ranges_of
from hpddrnet_trt.export.statistics import measure
from hpddrnet_trt.export.statistics_cache import Cache, cache_folder
from hpddrnet_trt.graph import qdq
from hpddrnet_trt.graph.fp8 import fp8_plan
from hpddrnet_trt.graph.nodes import name_nodes
from hpddrnet_trt.graph.work import Work, macs_and_bytes
from hpddrnet_trt.inference import load_segmenter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Study:
    """An open judge, the recipe it judges, and what the calibration saw."""

    judge: Judge
    trials: Trials
    method: Method
    calibration: CalibrationRecord
    statistics: tuple[Statistics, ...]  # by micrograph, in the order that covers the grey levels early
    operations: dict[str, Work]  # of one frame

    @property
    def shares(self) -> dict[str, float]:
        """Share of the multiply-accumulates by node."""
        total = sum(work.macs for work in self.operations.values())
        return {name: work.macs / total for name, work in self.operations.items()}


@contextmanager
def open_study(
    source: Path,
    data: Path,
    *,
    split: str = "val",
    calibration_images: Sequence[Path] | None = None,
    method: Method = "max",
    max_images: int = MAX_IMAGES,
    size: tuple[int, int] | None = None,
    frame: tuple[int, int] | None = None,
    precision: LowPrecision = "int8",
    reference: Path | None = None,
    cache: Cache = "user",
    resume: bool = True,
) -> Iterator[Study]:
    """Calibrate the FP32 export ``source`` and open a judge on ``split`` of the dataset ``data``.

    ``calibration_images``: default is the dataset's training split. ``reference``: what candidates are
    compared with, default as :func:`~hpddrnet_trt.accuracy.gate.reference_for`. ``size``: of the
    calibration crops; ``frame``: the height and width that operations are counted for, default ``size``.
    ``cache``: see :mod:`hpddrnet_trt.export.statistics_cache`; with ``resume`` what an earlier run has
    measured is used. Raises :class:`UsageError` before anything is measured for a split, a frame or a
    reference that does not do.
    """
    model, manifest = float_model(source)
    name_nodes(model)
    plan = fp8_plan(model) if precision == "fp8" else qdq.plan(model, "tensorrt")
    contract = input_contract(manifest)
    dataset = FolderDataset.open(data)
    judged = [sample.image for sample in dataset.split(split)]
    if calibration_images is None and "train" not in dataset.splits:
        raise UsageError(f"dataset {data} has no training split to calibrate on; name micrographs with --calib")
    compared_with = reference_for(reference, source, manifest)
    images = find_images(data, "train") if calibration_images is None else list(calibration_images)
    height, width = micrographs.crop_size(contract, size, images)
    chosen = micrographs.choose_images(images, max_images)
    warn_of_overlap(chosen, judged, f"{dataset.name}/{split}")
    crops = micrographs.plan_crops(chosen, height, width)
    shown = (height, width) if frame is None else _checked_frame(frame, contract)
    operations = macs_and_bytes(model, (contract.batch.minimum, contract.channels, *shown))
    measured = measure(model, manifest, plan.tensors, crops, (height, width), cache=cache)
    statistics = tuple(found for _, found in measured)
    ranges = ranges_of(reduce(merge, statistics), method, symmetric=True)
    recipe = Recipe(model, manifest, plan, ranges, precision)
    with (
        load_segmenter(compared_with) as fp32,
        Judge(dataset, split, fp32) as judge,
    ):
        yield Study(
            judge=judge,
            trials=Trials(recipe, judge, journal=_journal(recipe, judge, cache) if resume else None),
            method=method,
            calibration=calibration_record(chosen, crops, (height, width), method),
            statistics=statistics,
            operations=operations,
        )


def warn_of_overlap(calibrated: Sequence[Path], judged: Sequence[Path], where: str) -> None:
    """Warn where micrographs that give the figures gave the ranges too."""
    both = {path.resolve() for path in calibrated} & {path.resolve() for path in judged}
    if both:
        logger.warning(
            "%d of the %d micrographs of %s that accuracy is measured on gave the ranges as well: it flatters",
            len(both), len(judged), where,
        )  # fmt: skip


def _checked_frame(frame: tuple[int, int], contract: InputContract) -> tuple[int, int]:
    for name, value, axis in zip(("height", "width"), frame, (contract.height, contract.width), strict=True):
        if value < 1 or value % contract.multiple or not axis.admits(value):
            raise UsageError(
                f"times cannot be estimated for a frame of {frame[0]}x{frame[1]}: the model's {name} is a multiple of "
                f"{contract.multiple} within {axis}"
            )
    return frame


def _journal(recipe: Recipe, judge: Judge, cache: Cache) -> Path | None:
    if cache is None:
        return None
    folder = cache_folder() if cache == "user" else cache
    return folder / "trials" / f"{recipe.digest()[:24]}.{judge.digest[:24]}.json"
