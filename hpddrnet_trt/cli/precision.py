"""Commands about precision: convert, analyse, choose within a budget, compare."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hpddrnet_trt.cli.options import Data
from hpddrnet_trt.cli.program import app
from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.precisions import Half, LowPrecision
from hpddrnet_trt.weights import locate

Fp32File = Annotated[Path, typer.Argument(help="FP32 ONNX file written by export, or a shipped model's name.")]
JudgeSplit = Annotated[str, typer.Option(help="Split of the dataset that candidates are judged on.")]
Calibration = Annotated[
    Path | None, typer.Option("--calib", help="Micrographs to calibrate on; default: the dataset's training split.")
]
Method = Annotated[
    Literal["max", "percentile", "entropy", "mse"], typer.Option(help="How ranges are taken from the values seen.")
]
MaxImages = Annotated[int, typer.Option(min=1, help="Micrographs to calibrate on.")]
Low = Annotated[LowPrecision, typer.Option(help="The low precision.")]
Reference = Annotated[
    Path | None, typer.Option(help="Checkpoint or FP32 ONNX file to compare with; default: found beside MODEL.")
]
Size = Annotated[str | None, typer.Option(help="Calibration crops, e.g. 512x512; default: as the images.")]
Plot = Annotated[Path | None, typer.Option(help="Also draw it to this file (.png).")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")]
Resume = Annotated[bool, typer.Option(help="Go on from what an interrupted run has measured.")]


@app.command()
def convert_precision(
    model: Fp32File,
    target: Annotated[Path, typer.Argument(help="ONNX file to write.")],
    precision: Annotated[Half, typer.Option(help="Type of everything that survives it.")] = "fp16",
    data: Annotated[
        Path | None, typer.Option(help="Micrographs or dataset (test split): checks ranges, compares labels.")
    ] = None,
) -> None:
    """Type an FP32 export FP16 or BF16; what would overflow or lose too much on the micrographs stays FP32."""
    from hpddrnet_trt.cli.model import echo_evidence
    from hpddrnet_trt.data.datasets import find_images
    from hpddrnet_trt.export.convert import convert_precision as convert

    _check_target(model, target)
    manifest = convert(locate(model, ".onnx"), target, precision, images=find_images(data, "test") if data else [])
    for remark in manifest.remarks:
        typer.echo(f"remark: {remark}")
    echo_evidence(manifest)
    typer.echo(f"written: {target}")


@app.command()
def compare_precisions(
    model: Fp32File,
    data: Data,
    split: JudgeSplit = "test",
    calibration_data: Calibration = None,
    max_images: MaxImages = 64,
    size: Size = None,
    reference: Reference = None,
    json_file: JsonFile = None,
) -> None:
    """One table of accuracy: FP16, BF16, INT8 by every calibration method, and FP8 against FP32."""
    from hpddrnet_trt.accuracy.survey import survey

    _check_outputs(None, json_file)
    with _study(model, data, split, "int8", calibration_data, "max", max_images, size, reference, True) as study:
        found = survey(study)
    typer.echo(found.text())
    _write_json(json_file, found.record())


@app.command()
def sensitivity(
    model: Fp32File,
    data: Data,
    split: JudgeSplit = "val",
    precision: Low = "int8",
    by: Annotated[Literal["layer", "block"], typer.Option(help="What is quantised at a time.")] = "layer",
    calibration_data: Calibration = None,
    method: Method = "max",
    max_images: MaxImages = 64,
    size: Size = None,
    reference: Reference = None,
    plot: Plot = None,
    json_file: JsonFile = None,
    resume: Resume = True,
) -> None:
    """Rank layers or blocks by what their low precision alone does to mIoU and to the labels."""
    from hpddrnet_trt.accuracy.sensitivity import analyse
    from hpddrnet_trt.report.precision import draw_sensitivity

    _check_outputs(plot, json_file)
    with _study(model, data, split, precision, calibration_data, method, max_images, size, reference, resume) as study:
        found = analyse(study.trials, by=by, operations=study.shares)
    typer.echo(found.text())
    _write_found(found, draw_sensitivity, plot, json_file)


@app.command()
def choose_precision(
    model: Fp32File,
    target: Annotated[Path, typer.Argument(help="ONNX file to write.")],
    data: Data,
    max_miou_drop: Annotated[float | None, typer.Option(help="Points of mIoU that may be lost.")] = None,
    min_agreement: Annotated[float | None, typer.Option(help="Smallest share of equal labels, 0..1.")] = None,
    split: JudgeSplit = "val",
    precision: Low = "int8",
    calibration_data: Calibration = None,
    method: Method = "max",
    max_images: MaxImages = 64,
    size: Size = None,
    reference: Reference = None,
    device: Annotated[
        str, typer.Option(help="Whose data sheet layer times are estimated from: l4, agx-orin, h200.")
    ] = "l4",
    frame: Annotated[
        str | None, typer.Option(help="Frame that times are estimated for, e.g. 1024x1024; default: as the crops.")
    ] = None,
    layer_times: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Layer times measured on a GPU instead: of the INT8 and of the FP16 engine (`profile`)."),
    ] = None,
    frontier: Annotated[bool, typer.Option(help="Measure the frontier even where quantising everything does.")] = False,
    plot: Plot = None,
    json_file: JsonFile = None,
    resume: Resume = True,
) -> None:
    """Write the fastest INT8 (or FP8) file, with layers in FP16 where needed, that keeps an accuracy budget."""
    from hpddrnet_trt.accuracy.budget import Budget
    from hpddrnet_trt.accuracy.choose import choose_precision as choose
    from hpddrnet_trt.accuracy.cost import check_device, cost_model
    from hpddrnet_trt.report.precision import draw_frontier

    check_device(device, precision)
    budget = Budget(max_miou_drop, min_agreement)
    _check_outputs(plot, json_file)
    _check_target(model, target)
    with _study(
        model, data, split, precision, calibration_data, method, max_images, size, reference, resume, _size(frame)
    ) as study:
        cost = cost_model(study.trials.recipe, study.operations, device=device, layer_times=layer_times)
        choice = choose(
            study.trials, target, budget, cost, calibration=study.calibration, always_search=frontier
        )
    typer.echo(choice.text())
    if choice.frontier is not None:
        _write_found(choice.frontier, draw_frontier, plot, json_file)
    elif plot is not None or json_file is not None:
        typer.echo("no picture and no figures: everything in low precision keeps the budget; --frontier measures more")
    typer.echo(f"written: {target}")


@app.command()
def calibration_curve(
    model: Fp32File,
    data: Data,
    split: JudgeSplit = "val",
    precision: Low = "int8",
    calibration_data: Calibration = None,
    method: Method = "max",
    max_images: MaxImages = 64,
    size: Size = None,
    reference: Reference = None,
    plot: Plot = None,
    json_file: JsonFile = None,
) -> None:
    """Accuracy against the number of calibration micrographs: how many are enough."""
    from hpddrnet_trt.accuracy.curve import measure_curve
    from hpddrnet_trt.report.precision import draw_curve

    _check_outputs(plot, json_file)
    with _study(model, data, split, precision, calibration_data, method, max_images, size, reference, True) as study:
        found = measure_curve(study.trials.recipe, study.judge, study.statistics, study.method)
    typer.echo(found.text())
    _write_found(found, draw_curve, plot, json_file)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="The reference: ONNX file, checkpoint, engine, or a shipped model's name.")],
    b: Annotated[Path, typer.Argument(help="The file in question.")],
    images: Annotated[Path, typer.Option(help="Micrographs, a folder, or a dataset.")],
    split: Annotated[str, typer.Option(help="Split, where the micrographs are a dataset.")] = "val",
    limit: Annotated[
        float, typer.Option(help="Error that a layer may make by itself, as a fraction of its values' RMS.")
    ] = 0.1,
    max_images: Annotated[int, typer.Option(min=1, help="Micrographs to use.")] = 8,
    size: Annotated[str | None, typer.Option(help="Crops, e.g. 512x512; best the size the model is run at.")] = None,
    labels_only: Annotated[bool, typer.Option("--labels-only", help="Compare labels, not layers.")] = False,
    plot: Plot = None,
    json_file: JsonFile = None,
) -> None:
    """Compare two model files layer by layer: where the error is made, how it grows, what becomes of the labels."""
    from hpddrnet_trt.accuracy.compare import compare as run_comparison
    from hpddrnet_trt.accuracy.comparison_figures import save_figure
    from hpddrnet_trt.data.datasets import find_images

    _check_outputs(plot, json_file)
    found = run_comparison(
        a, b, find_images(images, split), limit=limit, max_images=max_images, size=_size(size), layers=not labels_only
    )
    typer.echo(found.text())
    _write_found(found, save_figure, plot, json_file)


def _size(text: str | None) -> tuple[int, int] | None:
    from hpddrnet_trt.benchmark.images import parse_size

    return None if text is None else parse_size(text)


def _study(
    model: Path, data: Path, split: str, precision: Any, calibration: Path | None, method: Any, max_images: int,
    size: str | None, reference: Path | None, resume: bool, frame: tuple[int, int] | None = None,
) -> Any:  # fmt: skip
    from hpddrnet_trt.accuracy.preparation import open_study
    from hpddrnet_trt.data.datasets import find_images

    return open_study(
        locate(model, ".onnx"), data, split=split, precision=precision, method=method, max_images=max_images,
        calibration_images=None if calibration is None else find_images(calibration, "train"),
        size=_size(size), frame=frame, reference=reference, resume=resume,
    )  # fmt: skip


def _check_outputs(plot: Path | None, json_file: Path | None) -> None:
    """Before minutes are spent on what they shall hold."""
    if plot is not None and plot.suffix.lower() != ".png":
        raise UsageError(f"the picture {plot} must end with .png; write {plot.with_suffix('.png')}")
    for path in (plot, json_file):
        if path is not None:
            _check_place(path)


def _check_place(path: Path) -> None:
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name the file to write in it")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise UsageError(f"cannot write {path}: {above} is no folder that may be written to; choose another path")


def _check_target(model: Path, target: Path) -> None:
    """The same for the ONNX file; the FP32 file itself stays."""
    from hpddrnet_trt.graph.model import check_target

    _check_place(target)
    check_target(locate(model, ".onnx"), target)


def _write_found(
    found: Any, draw: Callable[[Any, Path], Path], plot: Path | None, json_file: Path | None
) -> None:
    """The picture and the figures of a result, where they were asked for."""
    if plot is not None:
        typer.echo(f"written: {draw(found, plot)}")
    _write_json(json_file, found.record())


def _write_json(target: Path | None, record: dict[str, Any]) -> None:
    from hpddrnet_trt.core.files import write_text

    if target is not None:
        write_text(target, json.dumps(record, indent=1) + "\n")
        typer.echo(f"written: {target}")
