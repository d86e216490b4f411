"""From a budget to a file: the fastest precision of an FP32 export that keeps the accuracy asked for.

INT8 (or FP8) throughout where that holds; otherwise with some layers in FP16, found by sensitivity
analysis and search; otherwise FP16 throughout. The result is an ONNX file, so it is the same on every TensorRT.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpddrnet_trt.accuracy.budget import Budget
from hpddrnet_trt.accuracy.cost import Cost
from hpddrnet_trt.accuracy.judge import Accuracy
from hpddrnet_trt.accuracy.search import Frontier, Point, search
from hpddrnet_trt.accuracy.sensitivity import Sensitivity, analyse
from hpddrnet_trt.accuracy.trials import Trials
from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.manifest import CalibrationRecord, Manifest, MixedPrecisionRecord
from hpddrnet_trt.graph.lint import analyze as analyze_pairs
from hpddrnet_trt.graph.model import save_model

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """What was written, and how it was found."""

    manifest: Manifest
    accuracy: Accuracy
    frontier: Frontier | None  # None: quantised throughout, no search was needed
    sensitivity: Sensitivity | None

    def text(self) -> str:
        """For people."""
        parts = [] if self.frontier is None else [self.frontier.text()]
        return "\n".join([*parts, f"{str(self.manifest.precision).upper()}: {self.accuracy.text()}"])


def choose_precision(
    trials: Trials,
    target: str | Path,
    budget: Budget,
    cost: Cost,
    *,
    calibration: CalibrationRecord,
    always_search: bool = False,
    progress: bool = True,
) -> Choice:
    """Write ``target``, the fastest ONNX file that keeps ``budget`` on the judge's split.

    ``always_search``: measure the frontier even where quantising everything keeps the budget. Raises
    :class:`UserError` when not even FP16 keeps it; then nothing is written.
    """
    recipe = trials.recipe
    everything = trials.measure(recipe.layers, half=True)
    logger.info("%s throughout: %s", recipe.precision.upper(), everything.text())
    frontier = ranking = None
    floating: tuple[str, ...] = ()
    accuracy = everything
    if always_search or not budget.kept_by(everything):
        ranking = analyse(trials, by="layer", progress=progress)
        frontier = search(trials, ranking, budget, cost, progress=progress)
        if frontier.chosen is None:
            raise UserError(_none_holds(frontier, target))
        floating, accuracy = frontier.chosen.floating, frontier.chosen.accuracy
    layers = [name for name in recipe.layers if name not in set(floating)]
    graph = recipe.graph(layers, half=True)
    manifest = _described(trials, graph, layers, frontier, calibration, accuracy)
    save_model(graph, target, manifest)
    return Choice(manifest, accuracy, frontier, ranking)


def _described(
    trials: Trials,
    graph: onnx.ModelProto,
    layers: list[str],
    frontier: Frontier | None,
    calibration: CalibrationRecord,
    accuracy: Accuracy,
) -> Manifest:
    manifest = trials.recipe.described(layers, half=True)
    evidence = accuracy.evidence(f"choice of precision for {trials.judge.source}", trials.judge.source)
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
        found, limited = point.accuracy, frontier.budget.max_miou_drop is not None
        return len(frontier.budget.breaches(found)), found.drop if limited else -found.agreement

    best = min(frontier.points, key=badness)
    return (
        f"no choice of layers keeps the budget ({frontier.budget}) on {frontier.source}: the best, with "
        f"{len(best.floating)} of {frontier.layers} layers in FP16, has {best.accuracy.text()}; {target} was not "
        "written: allow more, use FP32, or fine-tune with quantisation (train/README.md)"
    )


