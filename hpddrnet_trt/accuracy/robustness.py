"""How far the microscope's settings may move before a model fails: scores against one shift at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from hpddrnet_trt.accuracy.evaluate import Grey8, samples_of
from hpddrnet_trt.core.errors import ContractError
from hpddrnet_trt.core.metrics import LabelComparison, Scores
from hpddrnet_trt.core.progress import progress_bar
from hpddrnet_trt.core.text import percent
from hpddrnet_trt.data.augment import SHIFTS, Shift
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.data.micrograph import Micrograph
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.inference.matched import matched

TOLERANCE = 0.05  # of mIoU: what a working range may lose


@dataclass(frozen=True)
class Point:
    """Scores at one value of a shift; None, with the reason, where the model could not be run."""

    value: float
    scores: Scores | None
    reason: str | None = None

    @property
    def miou(self) -> float:
        return math.nan if self.scores is None else self.scores.miou


@dataclass(frozen=True)
class Sweep:
    """One shift over its values, which rise."""

    shift: Shift
    points: list[Point]

    @property
    def unchanged(self) -> Point:
        return next(point for point in self.points if point.value == self.shift.neutral)

    @property
    def worst(self) -> Point:
        """The point of lowest mIoU among those measured."""
        measured = [point for point in self.points if not math.isnan(point.miou)]
        return min(measured, key=lambda point: point.miou, default=self.unchanged)

    def working_range(self, tolerance: float = TOLERANCE) -> tuple[float, float] | None:
        """The first and last tested value around the unchanged one between which no tested value loses
        more than ``tolerance`` of mIoU; None when the unchanged images have no mIoU."""
        limit = self.unchanged.miou - tolerance
        if math.isnan(limit):
            return None
        place = self.points.index(self.unchanged)
        low = high = place
        while low > 0 and self.points[low - 1].miou >= limit:
            low -= 1
        while high + 1 < len(self.points) and self.points[high + 1].miou >= limit:
            high += 1
        return self.points[low].value, self.points[high].value

    def working_range_text(self) -> str:
        """E.g. ``0.6 to 1.6``; an end that the sweep did not find is told as ``≥ 4``."""
        span = self.working_range()
        if span is None:
            return "–"
        low, high = span
        values, neutral = self.shift.values, self.shift.neutral
        if low == high:
            return "only unchanged"
        below = f"≤ {tested(low)}" if low == values[0] != neutral else tested(low)
        if math.isinf(high):
            return f"{below} or more"
        above = f"≥ {tested(high)}" if high == values[-1] != neutral else tested(high)
        return f"{below} to {above}"


@dataclass(frozen=True)
class Robustness:
    """All sweeps of one model on one split; ``seed`` fixes the noise."""

    data: str  # name of the dataset
    split: str
    class_names: list[str]
    sweeps: list[Sweep]
    seed: int

    def table(self) -> str:
        """Working ranges as plain text for a terminal."""
        lines = [f"{'shift':<14} {'working range':<16} {'unchanged':>9} {'lowest mIoU':>12}  at"]
        for sweep in self.sweeps:
            lowest, where = percent(sweep.worst.miou, 1), tested(sweep.worst.value)
            unchanged = percent(sweep.unchanged.miou, 1)
            lines.append(
                f"{sweep.shift.name:<14} {sweep.working_range_text():<16} {unchanged:>9} {lowest:>12}  {where}"
            )
        lines.append(f"working range: mIoU within {100 * TOLERANCE:.0f} points of that of the unchanged micrographs")
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """All figures; an infinite value stands for no noise added, NaN for a figure that does not exist."""
        return {
            "seed": self.seed,
            "tolerance": TOLERANCE,
            "sweeps": [_sweep_record(sweep) for sweep in self.sweeps],
        }


def measure_robustness(
    segmenter: Segmenter,
    dataset: FolderDataset,
    split: str,
    *,
    shifts: Sequence[Shift] = SHIFTS,
    seed: int = 0,
    progress: bool = True,
) -> Robustness:
    """Scores on one split for every value of every shift, the other knobs left alone.

    The generator is started anew for each image and value from ``seed`` and the image's place, so
    all models see the same noise. Magnified images run as any image of their size does: where the model does not
    take it in one piece, in tiles, or with ``tile="whole"`` not at all, which gives a point without scores, with
    the reason.

    Raises as :func:`~hpddrnet_trt.accuracy.evaluate.assess` does.
    """
    segmenter, dataset = matched(segmenter, dataset)
    dataset.split(split)  # an unknown split is told before all files are read
    runs = [[_Run(shift, value, len(dataset.classes)) for value in shift.values] for shift in shifts]
    flat = [run for sweep in runs for run in sweep]
    total = len(flat) * len(dataset.split(split))
    with progress_bar(total=total, desc=f"robustness on {split}", unit="image", show=progress) as bar:
        for index, (_, image, mask) in enumerate(samples_of(dataset, split, "", progress=False)):
            unchanged = segmenter.segment(image).labels
            for run in flat:
                if run.value == run.shift.neutral:
                    run.matrix.update(unchanged, mask)
                else:
                    run.add(segmenter, image, mask, np.random.default_rng([seed, index]))
                bar.update()
    sweeps = [Sweep(shift, [run.point() for run in sweep]) for shift, sweep in zip(shifts, runs, strict=True)]
    return Robustness(dataset.name, split, dataset.class_names, sweeps, seed)


class _Run:
    """One shift at one value, over all images."""

    def __init__(self, shift: Shift, value: float, num_classes: int) -> None:
        self.shift, self.value = shift, value
        self.matrix = LabelComparison(num_classes)
        self.reason: str | None = None

    def add(self, segmenter: Segmenter, image: Micrograph, mask: Grey8, rng: np.random.Generator) -> None:
        if self.reason is not None:
            return
        shifted, labels = self.shift(image.pixels, mask, self.value, rng)
        try:  # also a magnified image states its pixel size as before: the model is to be led astray
            self.matrix.update(segmenter.segment(replace(image, pixels=shifted)).labels, labels)
        except ContractError as exc:
            if not self.shift.resizes:
                raise
            self.reason = str(exc)

    def point(self) -> Point:
        return Point(self.value, None if self.reason else self.matrix.scores(), self.reason)


def tested(value: float) -> str:
    """A value of a sweep; an infinite one leaves the micrograph as it is."""
    return f"{value:g}".replace("-", "−") if math.isfinite(value) else "as is"


def _sweep_record(sweep: Sweep) -> dict[str, Any]:
    return {
        "shift": sweep.shift.name,
        "axis": sweep.shift.axis,
        "neutral": sweep.shift.neutral,
        "working_range": sweep.working_range(),
        "points": [{**asdict(point), "miou": point.miou} for point in sweep.points],
    }
