"""How many calibration micrographs are enough: accuracy against their number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any

from tqdm import tqdm

from hpddrnet_trt.accuracy.judge import Accuracy, Judge
from hpddrnet_trt.accuracy.trials import Recipe, Trials
from hpddrnet_trt.export.histograms import Statistics, merge
from hpddrnet_trt.export.ranges import ranges_of

# Fidelity may lie this far below that of all micrographs and still count as enough.
_TOLERANCE = 0.001


@dataclass(frozen=True)
class CurvePoint:
    images: int
    accuracy: Accuracy


@dataclass(frozen=True)
class CalibrationCurve:
    """Accuracy of the fully quantised network, ranges from the first N micrographs of the coverage order."""

    precision: str
    method: str
    source: str  # dataset and split judged on
    points: tuple[CurvePoint, ...]

    @property
    def enough(self) -> int:
        """The smallest number from which on more micrographs change fidelity by less than 0.1 %."""
        last = self.points[-1].accuracy.fidelity
        enough = self.points[-1].images
        for point in reversed(self.points):
            if abs(point.accuracy.fidelity - last) > _TOLERANCE:
                break
            enough = point.images
        return enough

    def text(self) -> str:
        """A table, one number of micrographs a row."""
        lines = [
            f"{self.precision.upper()}, method {self.method}, on {self.source} "
            f"(FP32 mIoU {100 * self.points[0].accuracy.reference_miou:.2f} %)",
            f"{'micrographs':>11}  {'mIoU':>7}  {'change':>7}  {'labels equal':>12}  {'IoU to FP32':>11}",
        ]
        for point in self.points:
            found = point.accuracy
            lines.append(f"{point.images:>11}  {100 * found.miou:>6.2f}%  {found.cells()}")
        lines.append(f"enough: {self.enough} (from there on the labels' IoU stays within {100 * _TOLERANCE:g} points)")
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """The same as JSON."""
        return {**asdict(self), "enough": self.enough}


def counts_up_to(most: int) -> list[int]:
    """1, 2, 4, ... and ``most`` itself."""
    counts = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    return [*counts, most]


def measure_curve(
    recipe: Recipe, judge: Judge, statistics: Sequence[Statistics], method: str, *, progress: bool = True
) -> CalibrationCurve:
    """Quantise with the ranges of the first 1, 2, 4, ... micrographs and score each.

    ``statistics``: of each micrograph, in the order of
    :func:`~hpddrnet_trt.export.images.choose_images`, which covers the grey levels as early as
    it can. The ranges of ``recipe`` itself are not used.
    """
    merged = list(accumulate(statistics, merge))
    points = []
    for count in tqdm(counts_up_to(len(merged)), desc="calibration curve", unit="point", disable=not progress):
        ranges = ranges_of(merged[count - 1], method, symmetric=True)
        accuracy = Trials(replace(recipe, ranges=ranges), judge).measure(recipe.layers)
        points.append(CurvePoint(count, accuracy))
    return CalibrationCurve(recipe.precision, method, judge.source, tuple(points))
