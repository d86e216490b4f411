"""Commands from a checkpoint to an engine file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from hpddrnet_trt.cli.arguments import Checkpoint, ModelFile, OnnxFile, Split
from hpddrnet_trt.cli.program import app
from hpddrnet_trt.manifest import Manifest
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
    manifest = run_conversion(source, target, name=name, classes=names, licence=licence)
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
        Literal["matmul", "attention-op"], typer.Option(help="Form of position attention; matmul runs everywhere.")
    ] = "matmul",
    output: Annotated[
        Literal["labels", "logits"], typer.Option(help="Class indices, or scores (for flip and multi-scale).")
    ] = "labels",
    confidence: Annotated[bool, typer.Option(help="Add a map of the winning class's probability.")] = False,
    grey_input: Annotated[
        bool, typer.Option(help="One-channel uint8 input; --no-grey-input takes three normalised float channels.")
    ] = True,
    precision: Annotated[
        Literal["fp32", "fp16"], typer.Option(help="fp16: typed FP16 with attention scores in FP32.")
    ] = "fp32",
    data: Annotated[
        Path | None, typer.Option(help="Micrographs or dataset (test split) to compare on; simulated when left out.")
    ] = None,
) -> None:
    """Export a checkpoint to one self-describing ONNX file and compare it with PyTorch."""
    from hpddrnet_trt.data.datasets import find_images
    from hpddrnet_trt.deploy.onnx_export import export_onnx
    from hpddrnet_trt.deploy.precision import convert_precision

    checkpoint = locate(checkpoint, ".safetensors")
    images = find_images(data, "test") if data else []
    with tempfile.TemporaryDirectory(prefix="hpddrnet-trt-") as folder:
        exported = target if precision == "fp32" else Path(folder) / target.name
        manifest = export_onnx(
            checkpoint, exported, batch=batch, height=height, width=width, attention=attention, output=output,
            confidence=confidence, grey_input=grey_input, images=images,
        )  # fmt: skip
        if precision == "fp16":
            _echo_evidence(manifest)
            manifest = convert_precision(exported, target, "fp16", images=images)
    _echo_evidence(manifest)
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
    method: Annotated[
        Literal["minmax", "percentile", "mse"], typer.Option(help="How a range is taken from the values seen.")
    ] = "minmax",
    max_images: Annotated[int, typer.Option(min=1, help="Micrographs to measure ranges on.")] = 64,
    min_agreement: Annotated[
        float, typer.Option(min=0, max=1, help="Refuse a result that agrees with FP32 on fewer pixels than this.")
    ] = 0.9,
) -> None:
    """Measure activation ranges on micrographs and write an INT8 model."""
    from hpddrnet_trt.data.datasets import find_images
    from hpddrnet_trt.deploy.quantize import calibrate as run_calibration

    manifest = run_calibration(
        model, target, find_images(data, split), form=form, method=method, max_images=max_images,
        min_agreement=min_agreement,
    )  # fmt: skip
    if manifest.calibration is not None:
        typer.echo(f"calibrated on {manifest.calibration.images} images ({manifest.calibration.method})")
    _echo_evidence(manifest)
    typer.echo(f"written: {target}")


@app.command()
def build(
    model: OnnxFile,
    precision: Annotated[Literal["fp32", "fp16", "int8"], typer.Option(help="Precision of the engine.")] = "fp16",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Engine to write; default MODEL.PRECISION.engine.")
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
        Path | None, typer.Option("--calib", help="For int8 from an FP32 file: micrographs to calibrate on.")
    ] = None,
    timing_cache: Annotated[Path | None, typer.Option(help="File that keeps tactic timings between builds.")] = None,
    compute_capability: Annotated[
        list[str] | None, typer.Option(help="Target GPU, e.g. 8.9; repeat for several (TensorRT-RTX).")
    ] = None,
    workspace_mib: Annotated[int | None, typer.Option(min=1, help="Memory limit of tactics, in MiB.")] = None,
    optimisation_level: Annotated[int | None, typer.Option(min=0, max=5, help="Builder effort.")] = None,
    version_compatible: Annotated[bool, typer.Option(help="Let other TensorRT versions run the engine.")] = False,
) -> None:
    """Build a TensorRT engine, prove its precision and write it with its description."""
    from hpddrnet_trt.deploy.build import build_engine
    from hpddrnet_trt.deploy.proof import summary

    stem = model.stem.removesuffix(".int8").removesuffix(".fp16")
    target = output or model.with_name(f"{stem}.{precision}.engine")
    manifest = build_engine(
        model, target, precision=precision, flavour=flavour, shapes=shapes,
        calibration_images=calibration_data, timing_cache=timing_cache, compute_capabilities=compute_capability,
        workspace_mib=workspace_mib,
        optimisation_level=optimisation_level, version_compatible=version_compatible,
    )  # fmt: skip
    if manifest.engine is not None:
        typer.echo(summary(manifest.engine.precision_proof))
        typer.echo(f"written: {target} ({manifest.engine.bytes / 1e6:.1f} MB, {manifest.engine.build_seconds:.1f} s)")


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
    from hpddrnet_trt.deploy.shipping import ship as run_ship

    written = run_ship(
        locate(checkpoint, ".safetensors"), folder, name=name, images=find_images(data, "test") if data else []
    )
    for path in written:
        typer.echo(f"written: {path} ({path.stat().st_size / 1e6:.1f} MB)")


@app.command()
def inspect(model: ModelFile) -> None:
    """Print what a model file says about itself, as JSON."""
    from hpddrnet_trt.manifest import read_manifest

    typer.echo(read_manifest(locate(model)).to_json())


def _echo_evidence(manifest: Manifest) -> None:
    """Print the last comparison with the reference."""
    if manifest.evidence:
        last = manifest.evidence[-1]
        typer.echo(f"{last.what}, {last.images} images ({last.source}; {last.runtime}):")
        for name, value in last.values.items():
            typer.echo(f"  {name:<28} {value:.6g}")
