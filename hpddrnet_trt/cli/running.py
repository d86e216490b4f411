"""Commands that run model files on micrographs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpddrnet_trt.cli.arguments import Engine, Mode, Split
from hpddrnet_trt.cli.program import app
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
