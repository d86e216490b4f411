"""Commands that run model files: segment, benchmark, and what this machine can run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpddrnet_trt.cli.arguments import Data, Engine, Mode, Split
from hpddrnet_trt.cli.program import INTERRUPTED, app
from hpddrnet_trt.weights import DEFAULT


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


@app.command()
def profile(
    engine: Annotated[Path, typer.Argument(help="Engine file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write.")] = Path("layer-times.json"),
    size: Annotated[str, typer.Option(help="Frame, e.g. 1024x1024.")] = "1024x1024",
    runs: Annotated[int, typer.Option(min=1, help="Timed runs.")] = 50,
) -> None:
    """Time each layer of an engine on this GPU; choose-precision takes the result with --layer-times."""
    from hpddrnet_trt.benchmark.images import parse_size
    from hpddrnet_trt.engines.layer_times import write_layer_times

    typer.echo(f"written: {write_layer_times(engine, output, parse_size(size), runs=runs)}")


@app.command()
def engines() -> None:
    """List the runtimes of this machine: version, or the reason why one is missing."""
    from hpddrnet_trt.engines import available_engines

    for name, state in available_engines().items():
        typer.echo(f"{name:<14} {state}")
