"""From an FP32 export and micrographs to everything that a study of its precision needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

from hpddrnet_trt.data.datasets import FolderDataset, find_images
from hpddrnet_trt.deploy import calibration_data, qdq
from hpddrnet_trt.deploy.fp8 import fp8_layers
from hpddrnet_trt.deploy.histograms import Statistics, merge
from hpddrnet_trt.deploy.operations import Work, macs_and_bytes
from hpddrnet_trt.deploy.quantize import MAX_IMAGES, calibration_record, float_model
from hpddrnet_trt.deploy.ranges import Method, ranges_of
from hpddrnet_trt.deploy.statistics import measure
from hpddrnet_trt.deploy.statistics_cache import Cache, cache_folder
from hpddrnet_trt.engines.base import input_contract
from hpddrnet_trt.manifest import CalibrationRecord
from hpddrnet_trt.precision.accuracy import Judge
from hpddrnet_trt.precision.gate import find_reference
from hpddrnet_trt.precision.trials import Quantised, Recipe, Trials
from hpddrnet_trt.segmenter import load_segmenter


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
    precision: Quantised = "int8",
    reference: Path | None = None,
    cache: Cache = "user",
    resume: bool = True,
) -> Iterator[Study]:
    """Calibrate the FP32 export ``source`` and open a judge on ``split`` of the dataset ``data``.

    ``calibration_images``: default is the dataset's training split. ``reference``: what candidates are
    compared with, default as :func:`~hpddrnet_trt.precision.gate.find_reference`. ``size``: of the
    calibration crops; ``frame``: the height and width that operations are counted for, default ``size``.
    ``cache``: see :mod:`hpddrnet_trt.deploy.statistics_cache`; with ``resume`` what an earlier run has
    measured is used.
    """
    model, manifest = float_model(source)
    qdq.name_nodes(model)
    plan = qdq.plan(model, "tensorrt")
    if precision == "fp8":
        plan = qdq.subset(model, "tensorrt", fp8_layers(model))
    contract = input_contract(manifest)
    images = find_images(data, "train") if calibration_images is None else list(calibration_images)
    height, width = calibration_data.crop_size(contract, size, images)
    chosen = calibration_data.choose_images(images, max_images)
    crops = calibration_data.plan_crops(chosen, height, width)
    measured = measure(model, manifest, plan.tensors, crops, (height, width), cache=cache)
    statistics = tuple(found for _, found in measured)
    ranges = ranges_of(reduce(merge, statistics), method, symmetric=True)
    recipe = Recipe(model, manifest, plan, ranges, precision)
    dataset = FolderDataset.open(data)
    with (
        load_segmenter(reference or find_reference(source, manifest)) as fp32,
        Judge(dataset, split, fp32) as judge,
    ):
        yield Study(
            judge=judge,
            trials=Trials(recipe, judge, journal=_journal(recipe, judge, cache) if resume else None),
            method=method,
            calibration=calibration_record(chosen, crops, (height, width), method),
            statistics=statistics,
            operations=macs_and_bytes(
                model, (contract.batch.minimum, contract.channels, *(frame or (height, width)))
            ),
        )


def _journal(recipe: Recipe, judge: Judge, cache: Cache) -> Path | None:
    if cache is None:
        return None
    folder = cache_folder() if cache == "user" else cache
    return folder / "trials" / f"{recipe.digest()[:24]}.{judge.digest[:24]}.json"
