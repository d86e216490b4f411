"""One table of what every precision does to a network: FP16, BF16, INT8 by each calibration method, FP8."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import reduce
from typing import Any

from tqdm import tqdm

from hpddrnet_trt.accuracy.judge import Accuracy
from hpddrnet_trt.accuracy.preparation import Study
from hpddrnet_trt.accuracy.trials import Trials
from hpddrnet_trt.export.histograms import merge
from hpddrnet_trt.export.ranges import METHODS, ranges_of
from hpddrnet_trt.graph import qdq
from hpddrnet_trt.graph.fp8 import fp8_plan
from hpddrnet_trt.graph.precision import to_half
from hpddrnet_trt.graph.qdq import count_convolutions


@dataclass(frozen=True)
class Row:
    """One precision; ``layers``: convolutions in 8 bits."""

    name: str
    layers: int
    accuracy: Accuracy


@dataclass(frozen=True)
class Survey:
    source: str  # dataset and split judged on
    convolutions: int
    rows: tuple[Row, ...]

    def text(self) -> str:
        """A table for people."""
        first = self.rows[0].accuracy
        width = max(len(row.name) for row in self.rows)
        lines = [
            f"{self.source}, {first.images} images, FP32 masked mIoU {100 * first.reference_masked_miou:.2f} %",
            f"{'precision':<{width}}  {'8-bit convolutions':>18}  {'masked':>7}  {'change':>7}  {'labels equal':>12}  "
            f"{'IoU to FP32':>11}",
        ]
        for row in self.rows:
            found = row.accuracy
            lines.append(
                f"{row.name:<{width}}  {row.layers:>12} of {self.convolutions:<2}  {100 * found.masked_miou:>6.2f}%  "
                f"{found.cells()}"
            )
        lines.append("rounding of FP16, BF16 and FP8 is simulated, sums are accumulated in FP32")
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """The same as JSON."""
        return asdict(self)


def survey(study: Study, *, progress: bool = True) -> Survey:
    """Score every precision on the study's split, the quantised ones with FP16 around them."""
    _, convolutions = count_convolutions(study.trials.recipe.model)
    rows = tuple(tqdm(_rows(study), desc="precisions", total=3 + len(METHODS), unit="", disable=not progress))
    return Survey(study.judge.source, convolutions, rows)


def _rows(study: Study) -> Iterator[Row]:
    recipe, judge = study.trials.recipe, study.judge
    model, manifest = recipe.model, recipe.manifest
    yield Row("FP16", 0, judge.score_graph(to_half(model), manifest.replace(precision="fp16")))
    yield Row("BF16", 0, judge.score_graph(to_half(model, kind="bf16"), manifest.replace(precision="bf16")))
    statistics = reduce(merge, study.statistics)
    int8 = replace(recipe, plan=qdq.plan(model, "tensorrt"), precision="int8")
    for method in METHODS:
        trials = Trials(replace(int8, ranges=ranges_of(statistics, method, symmetric=True)), judge)
        yield Row(f"INT8 {method}", len(int8.layers), trials.measure(int8.layers, half=True))
    ranges = ranges_of(statistics, "max", symmetric=True)
    fp8 = replace(recipe, plan=fp8_plan(model), ranges=ranges, precision="fp8")
    yield Row("FP8 max", len(fp8.layers), Trials(fp8, judge).measure(fp8.layers, half=True))
