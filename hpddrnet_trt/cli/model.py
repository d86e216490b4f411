"""Commands from a checkpoint to an engine file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from hpddrnet_trt.cli.options import Checkpoint, ModelFile, OnnxFile, Split
from hpddrnet_trt.cli.program import app
from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.manifest import Manifest
from hpddrnet_trt.core.precisions import PRECISIONS, Half, LowPrecision, Precision
from hpddrnet_trt.core.text import megabytes
from hpddrnet_trt.weights import locate


@app.command()
def convert_checkpoint(
    source: Annotated[Path, typer.Argument(help="Checkpoint of HPDDRNet or mmsegmentation (.pth).")],
    target: Annotated[Path, typer.Argument(help="Checkpoint to write (.safetensors).")],
    classes: Annotated[
        str | None, typer.Option(help="Comma-separated class names; default: as stored in the checkpoint.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the training data.")] = None,
) -> None:
    """Turn a checkpoint of the HPDDRNet / mmsegmentation world into ours; executes nothing from the file."""
    from hpddrnet_trt.models.checkpoints import convert_checkpoint as run_conversion

    names = [part.strip() for part in classes.split(",")] if classes else None
    manifest = run_conversion(source, target, name=name, classes=names, license=licence)
    for remark in manifest.remarks:
        typer.echo(f"remark: {remark}")
    typer.echo(f"written: {target} ({manifest.network.name}, classes: {', '.join(manifest.class_names)})")


@app.command()
def export(
    checkpoint: Checkpoint,
    target: Annotated[Path, typer.Argument(help="ONNX file to write.")],
    batch: Annotated[int | None, typer.Option(help="Fixed batch size; dynamic when left out.")] = None,
    height: Annotated[int | None, typer.Option(help="Fixed height in pixels; dynamic when left out.")] = None,
    width: Annotated[int | None, typer.Option(help="Fixed width in pixels; dynamic when left out.")] = None,
    attention: Annotated[
        Literal["matmul", "attention-op", "function"],
        typer.Option(help="Form of position attention; matmul runs everywhere, function waits for a plugin."),
    ] = "matmul",
    output: Annotated[
        Literal["labels", "logits"], typer.Option(help="Class indices, or scores (for flip and multi-scale).")
    ] = "labels",
    confidence: Annotated[bool, typer.Option(help="Add a map of the winning class's probability.")] = False,
    grey_input: Annotated[
        bool, typer.Option(help="One-channel uint8 input; --no-grey-input takes three normalised float channels.")
    ] = True,
    precision: Annotated[
        Literal["fp32", Half], typer.Option(help="fp16, bf16: typed so, with attention scores in FP32.")
    ] = "fp32",
    data: Annotated[
        Path | None, typer.Option(help="Micrographs or dataset (test split) to compare on; simulated when left out.")
    ] = None,
) -> None:
    """Export a checkpoint to one self-describing ONNX file and compare it with PyTorch."""
    from hpddrnet_trt.data.datasets import find_images
    from hpddrnet_trt.export.convert import convert_precision
    from hpddrnet_trt.export.onnx import export_onnx

    checkpoint = locate(checkpoint, ".safetensors")
    images = find_images(data, "test") if data else []
    with tempfile.TemporaryDirectory(prefix="hpddrnet-trt-") as folder:
        exported = target if precision == "fp32" else Path(folder) / target.name
        manifest = export_onnx(
            checkpoint, exported, batch=batch, height=height, width=width, attention=attention, output=output,
            confidence=confidence, grey_input=grey_input, images=images,
        )  # fmt: skip
        if precision != "fp32":
            echo_evidence(manifest)
            manifest = convert_precision(exported, target, precision, images=images)
    echo_evidence(manifest)
    typer.echo(f"written: {target}")


@app.command()
def calibrate(
    model: OnnxFile,
    target: Annotated[Path, typer.Argument(help="INT8 ONNX file to write.")],
    data: Annotated[Path, typer.Option(help="Dataset folder, folder of micrographs, or one micrograph.")],
    split: Split = "train",
    form: Annotated[
        Literal["tensorrt", "onnxruntime"],
        typer.Option(help="tensorrt: explicit symmetric Q/DQ with FP16 around it; onnxruntime: the CPU's fast form."),
    ] = "tensorrt",
    precision: Annotated[
        LowPrecision, typer.Option(help="fp8: E4M3, for TensorRT on Ada, Hopper, Blackwell.")
    ] = "int8",
    method: Annotated[
        Literal["max", "percentile", "entropy", "mse", "auto"],
        typer.Option(help="How ranges are taken from the values seen; auto: the one closest to FP32."),
    ] = "max",
    max_images: Annotated[int, typer.Option(min=1, help="Micrographs to measure ranges on.")] = 64,
    min_agreement: Annotated[
        float, typer.Option(min=0, max=1, help="Refuse a result that agrees with FP32 on fewer pixels than this.")
    ] = 0.9,
    cache: Annotated[bool, typer.Option(help="Keep what was measured, so that an interrupted run goes on.")] = True,
) -> None:
    """Measure activation ranges on micrographs and write an INT8 (or FP8) model."""
    from hpddrnet_trt.data.datasets import find_images
    from hpddrnet_trt.export.calibrate import calibrate as run_calibration

    manifest = run_calibration(
        locate(model, ".onnx"), target, find_images(data, split), form=form, precision=precision, method=method,
        max_images=max_images, min_agreement=min_agreement, cache="user" if cache else None,
    )  # fmt: skip
    if manifest.calibration is not None:
        typer.echo(f"calibrated on {manifest.calibration.images} images ({manifest.calibration.method})")
    echo_evidence(manifest)
    typer.echo(f"written: {target}")


@app.command()
def build(
    model: OnnxFile,
    precision: Annotated[
        Literal[Precision, "auto"],
        typer.Option(help="Precision of the engine; auto: the fastest that keeps the budget, from an FP32 file."),
    ] = "fp16",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Engine to write; default MODEL.PRECISION.engine.")
    ] = None,
    verify: Annotated[
        Path | None, typer.Option(help="Dataset: refuse the engine unless it keeps the budget on it.")
    ] = None,
    max_miou_drop: Annotated[
        float | None, typer.Option(help="Budget for --verify: points of mIoU that may be lost against FP32.")
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option(help="Budget for --verify: smallest share of pixels labelled as FP32, 0..1.")
    ] = None,
    verify_split: Annotated[str, typer.Option(help="Split that --verify judges on.")] = "test",
    reference: Annotated[
        Path | None, typer.Option(help="Checkpoint or FP32 ONNX file for --verify; default: found beside MODEL.")
    ] = None,
    flavour: Annotated[
        Literal["auto", "tensorrt", "tensorrt-rtx"],
        typer.Option(help="auto: TensorRT where it and a GPU are, else TensorRT-RTX (builds without a GPU)."),
    ] = "auto",
    shapes: Annotated[
        str | None,
        typer.Option(help="Optimisation profiles MIN:OPT:MAX, e.g. 1x1x512x512:4x1x1024x1024:8x1x2048x2048."),
    ] = None,
    calibration_data: Annotated[
        Path | None, typer.Option("--calib", help="For int8, fp8 from an FP32 file: micrographs to calibrate on.")
    ] = None,
    timing_cache: Annotated[Path | None, typer.Option(help="File that keeps tactic timings between builds.")] = None,
    compute_capability: Annotated[
        list[str] | None, typer.Option(help="Target GPU, e.g. 8.9; repeat for several (TensorRT-RTX).")
    ] = None,
    workspace_mib: Annotated[int | None, typer.Option(min=1, help="Memory limit of tactics, in MiB.")] = None,
    optimisation_level: Annotated[int | None, typer.Option(min=0, max=5, help="Builder effort.")] = None,
    tiling: Annotated[
        Literal["none", "fast", "moderate", "full"] | None, typer.Option(help="How hard to search for tiled kernels.")
    ] = None,
    sparsity: Annotated[
        bool, typer.Option("--sparsity", help="Use kernels for 2:4 sparse weights where the weights are.")
    ] = False,
    version_compatible: Annotated[bool, typer.Option(help="Let other TensorRT versions run the engine.")] = False,
) -> None:
    """Build a TensorRT engine, prove its precision and write it with its description.

    With --verify it is written only if it keeps the accuracy asked for; where no GPU runs it, the
    very ONNX file it was built from is judged on the CPU instead, and the description says so.
    """
    from hpddrnet_trt.accuracy.budget import Budget
    from hpddrnet_trt.accuracy.engine import build_verified
    from hpddrnet_trt.accuracy.gate import WHAT, Gate
    from hpddrnet_trt.export.proof import summary

    if verify is None and (max_miou_drop is not None or min_agreement is not None):
        raise UsageError("a budget is checked on a dataset: give --verify DATA with --max-miou-drop or --min-agreement")
    gate = None if verify is None else Gate(verify, Budget(max_miou_drop, min_agreement), verify_split, reference)
    target = output or model.with_name(f"{_plain_stem(model)}.{precision}.engine")
    manifest = build_verified(
        locate(model, ".onnx"), target, precision=precision, gate=gate, calibration_images=calibration_data,
        flavour=flavour, shapes=shapes, timing_cache=timing_cache, compute_capabilities=compute_capability,
        workspace_mib=workspace_mib, optimisation_level=optimisation_level, tiling=tiling, sparsity=sparsity,
        version_compatible=version_compatible,
    )  # fmt: skip
    if manifest.engine is not None:
        typer.echo(summary(manifest.engine.precision_proof))
        if manifest.evidence and manifest.evidence[-1].what == WHAT:
            echo_evidence(manifest)
        typer.echo(f"written: {target} ({megabytes(manifest.engine.bytes)}, {manifest.engine.build_seconds:.1f} s)")


def _plain_stem(model: Path) -> str:
    """A file's name without ending and precision: ``model.int8.onnx`` -> ``model``."""
    stem, _, last = model.stem.rpartition(".")
    return stem if stem and last in PRECISIONS else model.stem


@app.command()
def ship(
    checkpoint: Checkpoint,
    folder: Annotated[Path, typer.Argument(help="Folder to write to.")],
    name: Annotated[str | None, typer.Option(help="Name of the model; default: the checkpoint's.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Micrographs or dataset (test split) to compare on; simulated when left out.")
    ] = None,
) -> None:
    """Write a checkpoint in the form models are shared in: FP16 weights, as .safetensors and as .onnx."""
    from hpddrnet_trt.data.datasets import find_images
    from hpddrnet_trt.export.shipping import ship as run_ship

    written = run_ship(
        locate(checkpoint, ".safetensors"), folder, name=name, images=find_images(data, "test") if data else []
    )
    for path in written:
        typer.echo(f"written: {path} ({megabytes(path.stat().st_size)})")


@app.command()
def inspect(
    model: ModelFile,
    layers: Annotated[bool, typer.Option("--layers", help="Also every convolution with its precision.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The whole description as JSON.")] = False,
) -> None:
    """Print what a model file says about itself: contract, precision by layer, calibration, evidence."""
    from hpddrnet_trt.core.manifest import read_manifest
    from hpddrnet_trt.export.describe import describe

    file = locate(model)
    manifest = read_manifest(file)
    typer.echo(manifest.to_json() if as_json else describe(manifest, file, layers=layers))


def echo_evidence(manifest: Manifest) -> None:
    """Print the last comparison with the reference."""
    if manifest.evidence:
        last = manifest.evidence[-1]
        typer.echo(f"{last.what}, {last.images} images ({last.source}; {last.runtime}):")
        for name, value in last.values.items():
            typer.echo(f"  {name:<28} {value:.6g}")
