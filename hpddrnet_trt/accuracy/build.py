"""Engines behind the gate: built in the precision asked for, or in the fastest one that keeps the budget."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Literal

from hpddrnet_trt.accuracy.acceptance import AcceptanceCheck
from hpddrnet_trt.accuracy.candidates import StudySettings, open_study, warn_of_overlap
from hpddrnet_trt.accuracy.cost import cost_model
from hpddrnet_trt.accuracy.search import Choice, choose_precision
from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.manifest import Manifest, read_manifest
from hpddrnet_trt.core.precisions import Precision
from hpddrnet_trt.data.datasets import find_images
from hpddrnet_trt.export.tensorrt import build_engine, check_build


def build_verified(
    source: str | Path,
    target: str | Path,
    *,
    precision: Precision | Literal["auto"],
    acceptance: AcceptanceCheck | None,
    calibration_images: str | Path | None = None,
    **options: Any,
) -> Manifest:
    """Build ``target`` and let ``acceptance`` accept or refuse it; nothing is written that it refuses.

    ``precision="auto"`` takes an FP32 file and finds the fastest precision within the gate's budget: it
    chooses on the validation split of the gate's dataset, calibrated on ``calibration_images`` (default: the
    dataset's training split), and the acceptance check judges the result on its own split. ``options`` go to
    :func:`~hpddrnet_trt.export.tensorrt.build_engine`, whose errors are raised as well.
    """
    source, target = Path(source), Path(target)
    accept = None if acceptance is None else partial(acceptance.verify, source=source, target=target)
    if precision != "auto":
        check_build(source, target, precision, calibration_images)
    if acceptance is not None:
        acceptance.check(source)
        if calibration_images is not None:
            warn_of_overlap(
                find_images(calibration_images), find_images(acceptance.data, acceptance.split), acceptance.split
            )
    if precision != "auto":
        return build_engine(
            source, target, precision=precision, calibration_images=calibration_images, accept=accept, **options
        )
    if acceptance is None:
        raise UsageError("--precision auto needs a budget: give --verify DATA with --max-miou-drop or --min-agreement")
    with tempfile.TemporaryDirectory(prefix="hpddrnet-trt-") as folder:
        chosen = Path(folder) / f"{source.stem}.onnx"
        fastest = _choose(source, chosen, acceptance, calibration_images).manifest.precision
        assert fastest is not None  # the choice has just described it
        return build_engine(chosen, target, precision=fastest, accept=accept, **options)


def _choose(source: Path, chosen: Path, acceptance: AcceptanceCheck, calibration: str | Path | None) -> Choice:
    if read_manifest(source).precision != "fp32":
        raise UsageError(f"{source} is not FP32; --precision auto starts from the FP32 file that export wrote")
    images = None if calibration is None else find_images(calibration, "train")
    settings = StudySettings(
        acceptance.data, calibration_images=images, reference=acceptance.reference, under_shift=acceptance.under_shift
    )
    with open_study(source, settings) as study:
        cost = cost_model(study.cache.config, study.operations)
        return choose_precision(study.cache, chosen, acceptance.budget, cost, calibration=study.calibration)
