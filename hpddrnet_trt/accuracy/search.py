"""From a budget to a file: the fastest precision of an FP32 export that keeps the accuracy asked for.

INT8 (or FP8) throughout where that holds; otherwise with some layers in FP16, found by sensitivity
analysis (one part quantised at a time, everything else in FP32) and search; otherwise FP16 throughout.
The result is an ONNX file, so it is the same on every TensorRT.

Parts are ranked by fidelity (mean IoU of the labels against those of FP32) and not by mIoU against the masks:
on few micrographs a wrong label may hit the mask by chance, and pixel agreement does not see a class that
covers 2 % of the area. The search is greedy over that ranking: layers return to floating point in the order of harm
removed for time added, until the budget holds; then each of them is tried in low precision once more. Harm is not
additive, so every point is measured, none is extrapolated.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from hpddrnet_trt.accuracy.acceptance import Budget
from hpddrnet_trt.accuracy.candidates import CandidateCache
from hpddrnet_trt.accuracy.cost import Cost
from hpddrnet_trt.accuracy.evaluator import Accuracy
from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.manifest import CalibrationRecord, Manifest, MixedPrecisionRecord
from hpddrnet_trt.core.progress import progress_bar
from hpddrnet_trt.graph.layers import block_of, short
from hpddrnet_trt.graph.lint import analyze as analyze_pairs
from hpddrnet_trt.graph.model import save_model

if TYPE_CHECKING:
    import onnx

By = Literal["layer", "block"]
_STEPS = (0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89)  # points of the frontier: layers in floating point
_RETURNED = 12  # at most this many layers are tried again one by one
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """One layer or block, quantised alone."""

    name: str
    layers: tuple[str, ...]
    accuracy: Accuracy
    operations: float  # share of the network's multiply-accumulates, 0..1

    @property
    def harm(self) -> float:
        """What is lost of the labels' mean IoU against FP32, 0..1."""
        return 1 - self.accuracy.fidelity


@dataclass(frozen=True)
class Sensitivity:
    """All parts, the most harmful first, and everything quantised at once."""

    precision: str
    by: By
    source: str  # dataset and split
    parts: tuple[Part, ...]
    together: Accuracy

    def text(self) -> str:
        """A table, one part a row."""
        width = max(len(self.by), *(len(short(part.name)) for part in self.parts), len("all of them"))
        lines = [
            f"{self.precision.upper()} in one {self.by} at a time, on {self.source} "
            f"({self.together.images} images, FP32 masked mIoU {100 * self.together.reference_masked_miou:.2f} %)",
            f"{'':>3}  {self.by:<{width}}  {'MACs':>6}  {'masked':>7}  {self.together.headings()}",
        ]
        for rank, part in enumerate(self.parts, start=1):
            lines.append(f"{rank:>3}  {_row(short(part.name), width, part.accuracy, part.operations)}")
        total = sum(part.operations for part in self.parts)
        lines.append(f"     {_row('all of them', width, self.together, total)}")
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """The same as JSON."""
        return asdict(self)


def _row(name: str, width: int, accuracy: Accuracy, operations: float) -> str:
    return f"{name:<{width}}  {operations:>6.1%}  {accuracy.cells()}"


def analyze(
    cache: CandidateCache, *, by: By = "layer", operations: Mapping[str, float] | None = None, progress: bool = True
) -> Sensitivity:
    """Measure every layer, or every block, quantised alone.

    ``operations``: share of the multiply-accumulates by layer, for the table. Continues an
    interrupted analysis where the cache keeps a journal.
    """
    parts = parts_of(cache.config.layers, by)
    shares = operations or {}
    measured = []
    for name, layers in progress_bar(parts.items(), desc=f"sensitivity by {by}", unit=by, show=progress):
        share = sum(shares.get(layer, 0.0) for layer in layers)
        measured.append(Part(name, layers, cache.measure(layers), share))
    return Sensitivity(
        precision=cache.config.precision,
        by=by,
        source=cache.evaluator.source,
        parts=tuple(sorted(measured, key=lambda part: -part.harm)),
        together=cache.measure(cache.config.layers),
    )


def parts_of(layers: tuple[str, ...], by: By) -> dict[str, tuple[str, ...]]:
    """Part name to its layers, in the network's order."""
    if by == "layer":
        return {layer: (layer,) for layer in layers}
    parts: dict[str, tuple[str, ...]] = {}
    for layer in layers:
        block = block_of(layer)
        parts[block] = (*parts.get(block, ()), layer)
    return parts


@dataclass(frozen=True)
class Point:
    """One measured choice."""

    floating: tuple[str, ...]  # layers left in floating point, of those that could be quantised
    accuracy: Accuracy
    milliseconds: float


@dataclass(frozen=True)
class Frontier:
    """Every choice measured, from fast to accurate, and the one taken (None: no choice keeps the budget)."""

    precision: str
    budget: Budget
    source: str
    layers: int
    points: tuple[Point, ...]
    chosen: Point | None
    cost_source: str  # where the milliseconds come from

    def text(self) -> str:
        """A table, one choice a row, for people."""
        lines = [
            f"{self.precision.upper()} with some of {self.layers} layers in FP16, on {self.source}",
            f"budget: {self.budget}",
            f"time: {self.cost_source}",
            f"{'float layers':>12}  {'time':>9}  {'masked':>7}  {self.points[0].accuracy.headings()}  budget",
        ]
        for point in self.points:
            accuracy = point.accuracy
            mark = "  <- chosen" if point is self.chosen else ""
            lines.append(
                f"{len(point.floating):>12}  {point.milliseconds:>6.3f} ms  {accuracy.cells()}  "
                f"{'kept' if self.budget.kept_by(accuracy) else 'missed'}{mark}"
            )
        if self.chosen is not None and self.chosen.floating:
            lines.append(f"in FP16: {', '.join(short(name) for name in self.chosen.floating)}")
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """The same as JSON."""
        return asdict(self)


def search(
    cache: CandidateCache, ranking: Sensitivity, budget: Budget, cost: Cost, *, progress: bool = True
) -> Frontier:
    """Find the fastest measured choice that keeps ``budget``.

    ``ranking``: an analysis by layer of the same candidates. Candidates are measured as they will be
    deployed: what is not quantised is FP16, rounded as such.
    """
    order = _order(ranking, cache.config.layers, cost)
    counts = sorted({min(step, len(order)) for step in (*_STEPS, len(order))})
    with progress_bar(desc="mixed precision", unit="choice", show=progress) as bar:
        finder = _Finder(cache, budget, cost, bar)
        kept = [count for count in counts if budget.kept_by(finder.measure(order[:count]).accuracy)]
        if kept:
            _refine(finder, order, counts, min(kept))
    points = tuple(sorted(finder.points.values(), key=lambda point: (point.milliseconds, len(point.floating))))
    return Frontier(
        precision=cache.config.precision,
        budget=budget,
        source=cache.evaluator.source,
        layers=len(cache.config.layers),
        points=points,
        chosen=next((point for point in points if budget.kept_by(point.accuracy)), None),
        cost_source=cost.source,
    )


def _order(ranking: Sensitivity, layers: Sequence[str], cost: Cost) -> list[str]:
    """Layers in the order in which they return to floating point: most harm removed per time added first."""
    everything = set(layers)
    fastest = cost(everything)
    harms = {layer: part.harm for part in ranking.parts for layer in part.layers}
    added = {layer: max(cost(everything - {layer}) - fastest, 1e-6) for layer in layers}
    return sorted(layers, key=lambda layer: -harms[layer] / added[layer])


def _refine(finder: _Finder, order: list[str], counts: list[int], enough: int) -> None:
    """Fewer layers than the first step that keeps the budget: between the steps, then one by one."""
    below = max((count for count in counts if count < enough), default=-1)
    while enough - below > 1:
        middle = (below + enough) // 2
        if finder.keeps(order[:middle]):
            enough = middle
        else:
            below = middle
    floating = order[:enough]
    for layer in reversed(floating[-_RETURNED:]):  # the least valuable first
        fewer = [name for name in floating if name != layer]
        if finder.keeps(fewer):
            floating = fewer


class _Finder:
    """Measures choices by their floating-point layers, each once."""

    def __init__(self, cache: CandidateCache, budget: Budget, cost: Cost, bar: tqdm[Any]) -> None:
        self._cache, self._budget, self._cost, self._bar = cache, budget, cost, bar
        self.points: dict[frozenset[str], Point] = {}

    def measure(self, floating: Collection[str]) -> Point:
        key = frozenset(floating)
        if key not in self.points:
            layers = self._cache.config.layers
            low = [name for name in layers if name not in key]
            point = Point(
                floating=tuple(name for name in layers if name in key),
                accuracy=self._cache.measure(low, half=True),
                milliseconds=self._cost(low),
            )
            self.points[key] = point
            self._bar.update()
        return self.points[key]

    def keeps(self, floating: Collection[str]) -> bool:
        return self._budget.kept_by(self.measure(floating).accuracy)


@dataclass(frozen=True)
class Choice:
    """What was written, and how it was found."""

    manifest: Manifest
    accuracy: Accuracy
    frontier: Frontier | None  # None: quantised throughout, no search was needed

    def text(self) -> str:
        """For people."""
        parts = [] if self.frontier is None else [self.frontier.text()]
        return "\n".join([*parts, f"{str(self.manifest.precision).upper()}: {self.accuracy.text()}"])


def choose_precision(
    cache: CandidateCache,
    target: str | Path,
    budget: Budget,
    cost: Cost,
    *,
    calibration: CalibrationRecord,
    always_search: bool = False,
    progress: bool = True,
) -> Choice:
    """Write ``target``, the fastest ONNX file that keeps ``budget`` on the evaluator's split.

    ``always_search``: measure the frontier even where quantising everything keeps the budget. Raises
    :class:`UserError` when not even FP16 keeps it; then nothing is written.
    """
    config = cache.config
    everything = cache.measure(config.layers, half=True)
    logger.info("%s throughout: %s", config.precision.upper(), everything.text())
    frontier = None
    floating: tuple[str, ...] = ()
    accuracy = everything
    if always_search or not budget.kept_by(everything):
        ranking = analyze(cache, by="layer", progress=progress)
        frontier = search(cache, ranking, budget, cost, progress=progress)
        if frontier.chosen is None:
            raise UserError(_none_holds(frontier, target))
        floating, accuracy = frontier.chosen.floating, frontier.chosen.accuracy
    layers = [name for name in config.layers if name not in set(floating)]
    graph = config.graph(layers, half=True)
    manifest = _described(cache, graph, layers, frontier, calibration, accuracy)
    save_model(graph, target, manifest)
    return Choice(manifest, accuracy, frontier)


def _described(
    cache: CandidateCache,
    graph: onnx.ModelProto,
    layers: list[str],
    frontier: Frontier | None,
    calibration: CalibrationRecord,
    accuracy: Accuracy,
) -> Manifest:
    manifest = cache.config.described(layers, half=True)
    evidence = accuracy.evidence(f"choice of precision for {cache.evaluator.source}", cache.evaluator.source)
    manifest = manifest.replace(validation=[*manifest.validation, evidence])
    if not layers:
        return manifest
    mixed = None if frontier is None or frontier.chosen is None else _mixed(frontier, frontier.chosen.floating)
    floating = () if mixed is None else tuple(mixed.floating)
    report = analyze_pairs(graph, kept=floating).record()
    return manifest.replace(calibration=calibration, mixed=mixed, qdq_report=report)


def _mixed(frontier: Frontier, floating: tuple[str, ...]) -> MixedPrecisionRecord:
    return MixedPrecisionRecord(
        budget=str(frontier.budget),
        floating=list(floating),
        layers=frontier.layers,
        searched_on=frontier.source,
        candidates=[
            {
                "floating": float(len(point.floating)),
                "milliseconds": point.milliseconds,
                "masked_miou_drop_percentage_points": point.accuracy.drop,
                "agreement": point.accuracy.agreement,
            }
            for point in frontier.points
        ],
        cost_source=frontier.cost_source,
    )


def _none_holds(frontier: Frontier, target: str | Path) -> str:
    def badness(point: Point) -> tuple[int, float]:
        accuracy, limited = point.accuracy, frontier.budget.max_miou_drop is not None
        return len(frontier.budget.breaches(accuracy)), accuracy.drop if limited else -accuracy.least_agreement

    best = min(frontier.points, key=badness)
    return (
        f"no choice of layers keeps the budget ({frontier.budget}) on {frontier.source}: the best, with "
        f"{len(best.floating)} of {frontier.layers} layers in FP16, has {best.accuracy.text()}; {target} was not "
        "written: allow more, use FP32, or fine-tune with quantisation (train/README.md)"
    )
