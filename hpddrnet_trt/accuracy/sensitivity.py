"""Which layers suffer from low precision: one part quantised at a time, everything else in FP32.

Ranked by fidelity (mean IoU of the labels against those of FP32) and not by mIoU against the masks:
on few micrographs a wrong label may hit the mask by chance, and pixel agreement does not see a class
that covers 2 % of the area.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tqdm import tqdm

from hpddrnet_trt.accuracy.judge import Accuracy
from hpddrnet_trt.accuracy.trials import Trials
from hpddrnet_trt.graph.layers import block_of, short

By = Literal["layer", "block"]


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

    def text(self, most: int | None = None) -> str:
        """A table, one part a row; ``most``: only the first ones."""
        rows = self.parts[:most]
        width = max(len(self.by), *(len(short(part.name)) for part in rows), len("all of them"))
        lines = [
            f"{self.precision.upper()} in one {self.by} at a time, on {self.source} "
            f"({self.together.images} images, FP32 masked mIoU {100 * self.together.reference_masked_miou:.2f} %)",
            f"{'':>3}  {self.by:<{width}}  {'MACs':>6}  {'masked':>7}  {'labels equal':>12}  {'IoU to FP32':>11}",
        ]
        for rank, part in enumerate(rows, start=1):
            lines.append(f"{rank:>3}  {_row(short(part.name), width, part.accuracy, part.operations)}")
        if len(rows) < len(self.parts):
            lines.append(f"     ... and {len(self.parts) - len(rows)} less sensitive ones")
        total = sum(part.operations for part in self.parts)
        lines.append(f"     {_row('all of them', width, self.together, total)}")
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """The same as JSON."""
        return asdict(self)


def _row(name: str, width: int, found: Accuracy, operations: float) -> str:
    return f"{name:<{width}}  {operations:>6.1%}  {found.cells()}"


def analyse(
    trials: Trials, *, by: By = "layer", operations: Mapping[str, float] | None = None, progress: bool = True
) -> Sensitivity:
    """Measure every layer, or every block, quantised alone.

    ``operations``: share of the multiply-accumulates by layer, for the table. Continues an
    interrupted analysis where the trials keep a journal.
    """
    parts = parts_of(trials.recipe.layers, by)
    shares = operations or {}
    found = []
    for name, layers in tqdm(parts.items(), desc=f"sensitivity by {by}", unit=by, disable=not progress):
        share = sum(shares.get(layer, 0.0) for layer in layers)
        found.append(Part(name, layers, trials.measure(layers), share))
    return Sensitivity(
        precision=trials.recipe.precision,
        by=by,
        source=trials.judge.source,
        parts=tuple(sorted(found, key=lambda part: -part.harm)),
        together=trials.measure(trials.recipe.layers),
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
