"""Mixed precision: the fastest choice of quantised layers that keeps an accuracy budget.

Greedy over the sensitivity ranking: layers return to floating point in the order of harm removed for
time added, until the budget holds; then each of them is tried in low precision once more. Harm is
not additive, so every point is measured, none is extrapolated.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from hpddrnet_trt.accuracy.budget import Budget
from hpddrnet_trt.accuracy.cost import Cost
from hpddrnet_trt.accuracy.judge import Accuracy
from hpddrnet_trt.accuracy.sensitivity import Sensitivity
from hpddrnet_trt.accuracy.trials import Trials
from hpddrnet_trt.graph.layers import short

_STEPS = (0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89)  # points of the frontier: layers in floating point
_RETURNED = 12  # at most this many layers are tried again one by one


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
            f"{'float layers':>12}  {'time':>9}  {'masked':>7}  {'labels equal':>12}  budget",
        ]
        for point in self.points:
            found = point.accuracy
            mark = "  <- chosen" if point is self.chosen else ""
            lines.append(
                f"{len(point.floating):>12}  {point.milliseconds:>6.3f} ms  {-found.drop:>+7.2f}  "
                f"{100 * found.agreement:>11.3f}%  {'kept' if self.budget.kept_by(found) else 'missed'}{mark}"
            )
        if self.chosen is not None and self.chosen.floating:
            lines.append(f"in FP16: {', '.join(short(name) for name in self.chosen.floating)}")
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """The same as JSON."""
        return asdict(self)


def search(
    trials: Trials, ranking: Sensitivity, budget: Budget, cost: Cost, *, progress: bool = True
) -> Frontier:
    """Find the fastest measured choice that keeps ``budget``.

    ``ranking``: an analysis by layer of the same trials. Candidates are measured as they will be
    deployed: what is not quantised is FP16, rounded as such.
    """
    finder = _Finder(trials, budget, cost, progress=progress)
    order = _order(ranking, trials.recipe.layers, cost)
    counts = sorted({min(step, len(order)) for step in (*_STEPS, len(order))})
    with finder:
        kept = [count for count in counts if budget.kept_by(finder.measure(order[:count]).accuracy)]
        if kept:
            _refine(finder, order, counts, min(kept))
    points = tuple(sorted(finder.points.values(), key=lambda point: (point.milliseconds, len(point.floating))))
    return Frontier(
        precision=trials.recipe.precision,
        budget=budget,
        source=trials.judge.source,
        layers=len(trials.recipe.layers),
        points=points,
        chosen=next((point for point in points if budget.kept_by(point.accuracy)), None),
        cost_source=cost.source,
    )


def _order(ranking: Sensitivity, layers: Sequence[str], cost: Cost) -> list[str]:
    """Layers in the order in which they return to floating point: most harm removed per time added first."""
    everything = set(layers)
    fastest = cost(everything)

    def value(layer: str, harm: float) -> float:
        return harm / max(cost(everything - {layer}) - fastest, 1e-6)

    harms = {layer: part.harm for part in ranking.parts for layer in part.layers}
    return sorted(layers, key=lambda layer: -value(layer, harms[layer]))


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
    """Measures choices by their floating-point layers, with a progress bar."""

    def __init__(self, trials: Trials, budget: Budget, cost: Cost, *, progress: bool) -> None:
        self._trials, self._budget, self._cost = trials, budget, cost
        self.points: dict[frozenset[str], Point] = {}
        self._bar = tqdm(desc="mixed precision", unit="choice", disable=not progress)

    def measure(self, floating: Collection[str]) -> Point:
        key = frozenset(floating)
        if key not in self.points:
            layers = self._trials.recipe.layers
            low = [name for name in layers if name not in key]
            point = Point(
                floating=tuple(name for name in layers if name in key),
                accuracy=self._trials.measure(low, half=True),
                milliseconds=self._cost(low),
            )
            self.points[key] = point
            self._bar.update()
        return self.points[key]

    def keeps(self, floating: Collection[str]) -> bool:
        return self._budget.kept_by(self.measure(floating).accuracy)

    def __enter__(self) -> _Finder:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
