"""Cross-validation over specimens: a recipe judged on every labelled picture, each by a model that never saw its
specimen.

Two validation pictures cannot tell whether a change of a recipe helps; the spread of the folds says what can be told.
Every fold is a training as any other (``data.fold``), in a folder of its own below that of the run, and is continued or
taken as it is when the same command is given again. The last step is judged: a step chosen by the pictures that are
held out would flatter. Asked for, the pictures are scored under shifts of the instrument's settings as well.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpddrnet_trt.accuracy.evaluate import Assessment, Grey8, assess
from hpddrnet_trt.accuracy.robustness import measure_robustness
from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.core.files import write_text
from hpddrnet_trt.core.text import aligned, plain
from hpddrnet_trt.data.augment import SHIFTS, Pair, Shift
from hpddrnet_trt.data.datasets import FolderDataset, missing_splits
from hpddrnet_trt.export.images import Crop, at_setting
from hpddrnet_trt.inference import load_segmenter

if TYPE_CHECKING:
    from hpddrnet_trt.training.config import DataSection, TrainConfig

log = logging.getLogger(__name__)
RECORD = "folds.json"


@dataclass(frozen=True)
class Fold:
    """One fold, judged. ``figures``: fractions by name, NaN for a class that its pictures do not hold."""

    specimens: list[str]
    pictures: list[str]
    figures: dict[str, float]


@dataclass(frozen=True)
class CrossValidation:
    """All folds of a recipe on a dataset; ``file`` holds the same as JSON."""

    folds: list[Fold]
    file: Path

    def summary(self) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation of each figure over the folds that have it; NaN of fewer than one, or two."""
        return {name: _mean_and_spread([fold.figures[name] for fold in self.folds]) for name in self.folds[0].figures}

    def table(self) -> str:
        """Figures by row in percent: mean, spread, and each fold."""
        lines = [["%", "mean", "spread", *(f"fold {place}" for place in range(1, len(self.folds) + 1))]]
        for name, both in self.summary().items():
            lines.append([name, *(_percent(value) for value in [*both, *(fold.figures[name] for fold in self.folds)])])
        held_out = [f"fold {place} held out: {', '.join(fold.specimens)}" for place, fold in enumerate(self.folds, 1)]
        return "\n".join([*aligned(lines, left={0}), "", *held_out])


def shifts_at(settings: Iterable[tuple[str, float]]) -> list[Shift]:
    """The shifts of :data:`~hpddrnet_trt.data.augment.SHIFTS` that ``settings`` name, each with the values given there.

    Of enlarged pictures the middle part is shown, so that they keep their size. Raises :class:`UsageError` for an
    unknown name.
    """
    values: dict[str, set[float]] = defaultdict(set)
    for name, value in settings:
        values[name].add(value)
    known = {shift.name: shift for shift in SHIFTS}
    if unknown := sorted(values.keys() - known.keys()):
        raise UsageError(f"there is no shift {unknown[0]!r}; choose of {', '.join(known)}")
    chosen = [replace(known[name], values=tuple(sorted({known[name].neutral, *values[name]}))) for name in values]
    return [replace(shift, apply=_magnified) if shift.resizes else shift for shift in chosen]


def _magnified(image: Grey8, mask: Grey8, factor: float, rng: np.random.Generator) -> Pair:
    return at_setting(image, mask, Crop(Path(), 0, 0, shift=("magnification", factor)), *image.shape)


def cross_validate(config: TrainConfig, folds: int | None, shifts: Sequence[Shift] = ()) -> CrossValidation:
    """Train and judge every fold of ``config``; ``folds``: how many, None: one for each specimen.

    Pictures are those of ``data.fold_splits``; the others are not looked at. With ``shifts`` (:func:`shifts_at`)
    figures include mIoU at each of their values. Where ``network.initial`` is the folder of another cross-validation,
    each fold goes on from the model of that fold. The runs and ``folds.json`` lie in ``<run.folder>/<run.name>-folds``.
    Raises what training does, and :class:`UsageError` for more folds than specimens.
    """
    folds = _checked(config.data, folds)
    steps = config.optimization.max_steps
    first = fold_config(config, 1, folds)
    log.info("%d trainings of %d steps, one after the other, in %s", folds, steps, first.run.folder)
    judged = []
    for number in range(1, folds + 1):
        log.info("fold %d of %d", number, folds)
        judged.append(_fold(fold_config(config, number, folds), (folds - number) * steps, shifts))
    result = CrossValidation(judged, first.run.folder / RECORD)
    write_text(result.file, json.dumps(plain(_record(config, result)), indent=1) + "\n")
    return result


def _checked(section: DataSection, folds: int | None) -> int:
    """How many folds, one for each specimen if None; refused before anything is announced."""
    from hpddrnet_trt.training.config import SIMULATED
    from hpddrnet_trt.training.data import unfit

    if section.path == SIMULATED:
        if folds is None:
            raise UserError("simulated pictures are of no specimens; say how many folds, for example --folds 3")
        return folds
    dataset = FolderDataset.open(section.path, section.layout)
    if missing := missing_splits(dataset.splits, *section.fold_splits):
        raise UserError(unfit(dataset, missing))
    count = len({sample.group for sample in dataset.pooled(section.fold_splits)}) if folds is None else folds
    dataset.fold(1, count, section.fold_splits, train=section.train_split, held_out=section.val_split)
    return count


def fold_config(config: TrainConfig, number: int, folds: int | None) -> TrainConfig:
    """The settings of one fold (from 1) of a run; ``folds`` as in :func:`cross_validate`, which refuses too many."""
    folds = _checked(config.data, None) if folds is None else folds
    folder, name = config.run.folder / f"{config.run.name}-folds", f"fold-{number}-of-{folds}"
    run = {"folder": folder, "name": name, "val_every": config.optimization.max_steps}
    network, start = config.network, config.network.initial
    if start is not None and (start / RECORD).is_file():
        network = network.model_copy(update={"initial": start / name / f"{name}.safetensors"})
    return config.model_copy(
        update={
            "network": network,
            "data": config.data.model_copy(update={"fold": f"{number}/{folds}"}),
            "run": config.run.model_copy(update=run),
        }
    )


def _fold(config: TrainConfig, later_steps: int, shifts: Sequence[Shift]) -> Fold:
    from hpddrnet_trt.training.run import train

    trained, split = train(config, later_steps), config.data.val_split
    segmenter = load_segmenter(trained.checkpoint, threads=config.run.threads, precision="fp32")
    assessment = assess(segmenter, trained.dataset, split, worst=0, progress=False)
    names = [image.name for image in assessment.images]
    figures = _figures(assessment)
    if shifts:
        for sweep in measure_robustness(segmenter, trained.dataset, split, shifts=shifts, progress=False).sweeps:
            points = [point for point in sweep.points if point.value != sweep.shift.neutral]
            figures |= {f"mIoU, {sweep.shift.name} {point.value:g}": point.miou for point in points}
    return Fold(sorted({str(group) for group in assessment.groups}), names, figures)


def _figures(assessment: Assessment) -> dict[str, float]:
    names, scores = assessment.class_names, assessment.scores
    boundary = [interval.value for interval in assessment.boundary_scores]
    centerline = [interval.value for interval in assessment.centerline_scores]
    area = [errors[0].size.value for errors in assessment.errors]
    return {
        "mIoU": scores.miou,
        "micro IoU, per picture": scores.mean_image_micro_iou,
        **{f"IoU {name}": value for name, value in zip(names, scores.iou, strict=True)},
        **{f"boundary F {name}": value for name, value in zip(names, boundary, strict=True)},
        **{f"centerline F {name}": value for name, value in zip(names, centerline, strict=True)},
        **{f"area error {name}": value for name, value in zip(names, area, strict=True)},
    }


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    present = np.array([value for value in values if not np.isnan(value)])
    mean = float(present.mean()) if present.size else float("nan")
    return mean, float(present.std(ddof=1)) if present.size > 1 else float("nan")


def _percent(value: float) -> str:
    return "–" if np.isnan(value) else f"{100 * value:.1f}"


def _record(config: TrainConfig, result: CrossValidation) -> dict[str, Any]:
    summary = {name: {"mean": mean, "spread": spread} for name, (mean, spread) in result.summary().items()}
    folds = [vars(fold) for fold in result.folds]
    return {"config": config.model_dump(mode="json"), "summary": summary, "folds": folds}
