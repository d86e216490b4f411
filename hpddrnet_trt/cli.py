"""The command line: `hpddrnet-trt <command>`. A command is one documented function.

The recipes (`train/train.py`, `export/build_engine.py`, ...) run these same functions. Errors the
package raises on purpose are printed as one sentence; exit codes: 0 done, 1 failed, 2 usage.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from hpddrnet_trt import __version__
from hpddrnet_trt.errors import UserError, require
from hpddrnet_trt.manifest import Manifest
from hpddrnet_trt.weights import DEFAULT, locate

if TYPE_CHECKING:
    from hpddrnet_trt.data.datasets import FolderDataset

INTERRUPTED = 130  # exit code after Ctrl-C: 128 + SIGINT
app = typer.Typer(
    name="hpddrnet-trt",
    help="Semantic segmentation of SEM micrographs: train, export, calibrate, build, run and measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

datasets_app = typer.Typer(
    name="datasets", help="Public SEM segmentation sets: list, show, get, convert.", rich_markup_mode=None
)
app.add_typer(datasets_app)

ModelFile = Annotated[
    Path, typer.Argument(help="Model file (.safetensors, .onnx, .engine), or a shipped model's name.")
]
Checkpoint = Annotated[Path, typer.Argument(help="Checkpoint (.safetensors), or a shipped model's name.")]
OnnxFile = Annotated[Path, typer.Argument(help="ONNX file written by export.")]
Engine = Annotated[
    Literal["auto", "torch", "onnxruntime", "openvino", "tensorrt"],
    typer.Option(help="Runtime; auto chooses by the file's ending."),
]
Mode = Annotated[
    Literal["single", "flip", "multiscale"],
    typer.Option(help="One view, with mirrored view, or six scales with mirrored views (the last two need logits)."),
]
Data = Annotated[Path, typer.Option(help="Dataset folder (images|masks/{train,val,test} or {split}/{imgs,labels}).")]
Split = Annotated[str, typer.Option(help="Split of the dataset.")]
DatasetName = Annotated[str, typer.Argument(help="Name in the catalog, e.g. nasa-super1.")]
NewFolder = Annotated[Path, typer.Argument(help="Dataset folder to write; new or empty.")]


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="YAML file, e.g. train/configs/demo.yaml.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override settings.")] = None,
) -> None:
    """Train a network; an interrupted run continues where it stopped when called again."""
    for module in ("torch", "lightning", "tensorboard", "safetensors"):
        require(module, "train", "train a network")
    from hpddrnet_trt.training.config import load_config
    from hpddrnet_trt.training.run import train as run_training

    logging.getLogger("hpddrnet_trt.training").setLevel(logging.INFO)  # says what it continues from
    result = run_training(load_config(config, settings or []))
    typer.echo(f"best mIoU {result.metrics['val/miou']:.4f} at step {result.metrics['step']:.0f}: {result.checkpoint}")


@app.command()
def measure_training(
    config: Annotated[Path, typer.Option(help="YAML file, e.g. train/configs/demo.yaml.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override settings.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps.")] = 50,
) -> None:
    """Measure whether loading and augmenting limit the training of a configuration; keeps nothing."""
    for module in ("torch", "lightning"):
        require(module, "train", "measure training")
    from hpddrnet_trt.training.config import load_config
    from hpddrnet_trt.training.throughput import measure_throughput

    typer.echo(measure_throughput(load_config(config, settings or []), steps=steps).text())


@app.command()
def evaluate(
    model: ModelFile,
    data: Data,
    split: Split = "test",
    mode: Mode = "single",
    engine: Engine = "auto",
    report: Annotated[
        Path | None,
        typer.Option(help="Write a page (.html): confusion, area fractions, worst images, learning curves."),
    ] = None,
    robustness: Annotated[
        bool,
        typer.Option("--robustness", help="Also score the images under changed contrast, noise, magnification, ..."),
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Report mIoU, per-class IoU, pixel and mean accuracy of a checkpoint or any model file.

    With --report also as a page with pictures, and beside it a table of all images (.csv). Learning
    curves are in it when metrics.csv of the training run lies beside the model.
    """
    import json

    from hpddrnet_trt.assessment import assess, check_target, curves_beside, measure_robustness, write_report
    from hpddrnet_trt.data.datasets import FolderDataset
    from hpddrnet_trt.files import write_text
    from hpddrnet_trt.segmenter import load_segmenter

    if report is not None:
        check_target(report)
    file = locate(model, ".safetensors" if engine == "torch" else ".onnx")
    dataset = FolderDataset.open(data)
    with load_segmenter(file, engine=engine, mode=mode) as segmenter:
        found = assess(segmenter, dataset, split, model_file=file)
        robust = measure_robustness(segmenter, dataset, split) if robustness else None
        typer.echo(f"{model} on {dataset.name}/{split}, mode {mode}, {segmenter.engine.runtime}")
    typer.echo(found.scores.table(found.class_names))
    if robust is not None:
        typer.echo(f"\n{robust.table()}")
    if report is not None:
        for path in write_report(found, report, curves=curves_beside(file), robustness=robust):
            if path is not None:
                typer.echo(f"written: {path}")
    if json_file is not None:
        record = found.record() | ({} if robust is None else {"robustness": robust.record()})
        write_text(json_file, json.dumps(record, indent=1, allow_nan=False) + "\n")
        typer.echo(f"written: {json_file}")


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


@app.command()
def segment(
    inputs: Annotated[list[Path], typer.Argument(metavar="IN...", help="Micrographs, folders, globs, or a dataset.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for labels and overlays.")] = Path("labels"),
    model: Annotated[Path, typer.Option(help="Model file, or the name of a shipped model.")] = Path(DEFAULT),
    engine: Engine = "auto",
    mode: Mode = "single",
    split: Split = "test",
    overlay: Annotated[bool, typer.Option(help="Also write a picture of the labels over the micrograph.")] = True,
    tiff: Annotated[bool, typer.Option(help="Write label maps as TIFF instead of palette PNG.")] = False,
    resume: Annotated[bool, typer.Option(help="Skip micrographs that this model has segmented before.")] = True,
) -> None:
    """Segment micrographs of any size: label PNG or TIFF, and an overlay.

    Without --model the model that comes with the package is used: nickel-base superalloys (matrix,
    secondary and tertiary precipitates). On other materials train your own.
    """
    from hpddrnet_trt.data.datasets import find_images
    from hpddrnet_trt.segment_files import segment_paths
    from hpddrnet_trt.segmenter import load_segmenter

    sources = [image for item in inputs for image in find_images(item, split)]
    with load_segmenter(model, engine=engine, mode=mode) as segmenter:
        summary = segment_paths(
            segmenter, sources, output, overlay=overlay, suffix=".tif" if tiff else ".png", resume=resume
        )
    typer.echo(f"{summary}\nwritten to {output}")
    if summary.failed:
        raise typer.Exit(summary.exit_code)


@app.command()
def benchmark(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="Model files, or a folder that holds them.")],
    data: Data,
    split: Split = "test",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report.")] = Path("report"),
    size: Annotated[
        list[str] | None, typer.Option(help="Timed frame, e.g. 1024x1024; repeat for several; default: as the images.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Frames per inference.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; each runs every engine once.")] = 30,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads per engine.")] = None,
    publish: Annotated[
        Path | None, typer.Option(help="Also copy the report there, named after the machine's GPU or CPU and the day.")
    ] = None,
) -> None:
    """Compare every engine and precision with the PyTorch reference in one interleaved run."""
    from hpddrnet_trt.benchmark.folders import model_files, publish_report
    from hpddrnet_trt.benchmark.images import load_images, parse_size
    from hpddrnet_trt.benchmark.report import format_table, write_report
    from hpddrnet_trt.benchmark.result import make_settings
    from hpddrnet_trt.benchmark.suite import entries_for, run_benchmark

    settings = make_settings(
        sizes=tuple(parse_size(text) for text in size or ()), batch=batch, rounds=rounds, threads=threads
    )
    result = run_benchmark(entries_for(model_files(models)), load_images(data, split), settings)
    written = write_report(result, output)
    typer.echo(format_table(result))
    if publish is not None:
        typer.echo(f"published: {publish_report(written, result, publish)}")
    typer.echo(f"report: {written.html}")
    if not result.complete:
        raise typer.Exit(INTERRUPTED)


@datasets_app.callback(invoke_without_command=True)
def datasets(context: typer.Context) -> None:
    """List the catalog of public SEM segmentation sets; see also `show`, `get` and `convert`."""
    from hpddrnet_trt.data.catalog.describe import overview
    from hpddrnet_trt.data.catalog.entries import ENTRIES

    if context.invoked_subcommand is None:
        typer.echo(overview(ENTRIES.values()))


@datasets_app.command("show")
def show_dataset(name: DatasetName) -> None:
    """Print all that is known of one dataset: addresses, checksums, licence, citation, what was verified."""
    from hpddrnet_trt.data.catalog.describe import details
    from hpddrnet_trt.data.catalog.entries import find_entry

    typer.echo(details(find_entry(name)))


@datasets_app.command("get")
def get_dataset(
    name: DatasetName,
    folder: NewFolder,
    downloads: Annotated[
        Path | None, typer.Option(help="Where downloads are kept and continued; `downloads` beside FOLDER if left out.")
    ] = None,
    accept_unclear_licence: Annotated[
        bool, typer.Option("--accept-unclear-licence", help="Download although its licence is not clear.")
    ] = False,
) -> None:
    """Download a dataset (continuing an interrupted download), verify it and convert it."""
    from hpddrnet_trt.data.catalog.entries import find_entry
    from hpddrnet_trt.data.catalog.get import get_dataset as get

    _echo_dataset(
        get(find_entry(name), folder, downloads=downloads, accept_unclear_licence=accept_unclear_licence)
    )


@datasets_app.command("convert")
def convert_dataset(
    name: DatasetName,
    source: Annotated[Path, typer.Argument(help="Folder or archive (ZIP, TAR) as the authors publish it.")],
    folder: NewFolder,
) -> None:
    """Convert files that are already here to this package's dataset layout."""
    from hpddrnet_trt.data.catalog.entries import find_entry
    from hpddrnet_trt.data.catalog.get import convert_dataset as convert

    _echo_dataset(convert(find_entry(name), source, folder))


def _echo_dataset(dataset: FolderDataset) -> None:
    counts = ", ".join(f"{len(dataset.split(split))} {split}" for split in dataset.splits)
    typer.echo(f"written: {dataset.root} ({counts}); look at it with: hpddrnet-trt check-dataset {dataset.root}")


@app.command()
def check_dataset(
    folder: Annotated[Path, typer.Argument(help="Dataset folder.")],
    contact_sheet: Annotated[Path | None, typer.Option(help="Write a PNG of images with their masks.")] = None,
) -> None:
    """Report counts, sizes, class fractions and every fault of a dataset; exit code 1 if it has any."""
    from hpddrnet_trt.data.check import check_dataset as run_check

    report = run_check(folder, contact_sheet=contact_sheet)
    typer.echo(report.text())
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def simulate(
    folder: Annotated[Path, typer.Argument(help="Folder to write the dataset to.")],
    train_images: Annotated[int, typer.Option("--train", min=1)] = 48,
    val_images: Annotated[int, typer.Option("--val", min=1)] = 4,
    test_images: Annotated[int, typer.Option("--test", min=1)] = 4,
    size: Annotated[int, typer.Option(min=64, help="Edge length in pixels.")] = 512,
    magnification: Annotated[float, typer.Option(min=0.1, max=10, help="1: 20 nm per pixel; 2: 10 nm.")] = 2.0,
    seed: int = 0,
) -> None:
    """Write a dataset of simulated SEM images (grains, pores, clay) with exact masks."""
    from hpddrnet_trt.data.simulate import write_dataset

    dataset = write_dataset(
        folder, train=train_images, val=val_images, test=test_images, size=size, magnification=magnification, seed=seed
    )
    typer.echo(f"written: {dataset.root}")


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
def engines() -> None:
    """List the runtimes of this machine: version, or the reason why one is missing."""
    from hpddrnet_trt.engines import available_engines

    for name, state in available_engines().items():
        typer.echo(f"{name:<14} {state}")


def _echo_evidence(manifest: Manifest) -> None:
    """Print the last comparison with the reference."""
    if manifest.evidence:
        last = manifest.evidence[-1]
        typer.echo(f"{last.what}, {last.images} images ({last.source}; {last.runtime}):")
        for name, value in last.values.items():
            typer.echo(f"  {name:<28} {value:.6g}")


def _version(show: bool) -> None:
    if show:
        typer.echo(f"hpddrnet-trt {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="More messages, and tracebacks of errors.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s: %(message)s")
    if verbose:
        os.environ["HPDDRNET_DEBUG"] = "1"


def run(command: Callable[..., Any] | typer.Typer) -> NoReturn:
    """Run one command function (as the recipes do) or the whole app, and exit with its code."""
    if not isinstance(command, typer.Typer):
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        single.command()(command)
        command = single
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        command()
    except UserError as exc:
        if os.environ.get("HPDDRNET_DEBUG"):
            raise
        sys.exit(_fail(str(exc), exc.exit_code))
    except SystemExit as exc:
        if exc.code == INTERRUPTED:  # typer turns Ctrl-C into this exit, without a word
            _fail("interrupted", INTERRUPTED)
        raise
    except OSError as exc:
        if exc.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}:
            raise
        sys.exit(_fail(f"{exc.strerror}: {exc.filename or 'output'}; free some space or choose another path", 1))
    sys.exit(0)


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def main() -> NoReturn:
    """Entry point of the installed program."""
    run(app)

