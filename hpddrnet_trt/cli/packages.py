"""Models in the packages of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from hpddrnet_trt.cli.model import PANEL
from hpddrnet_trt.cli.options import OnnxFile, parse_size
from hpddrnet_trt.cli.program import command
from hpddrnet_trt.core.text import megabytes
from hpddrnet_trt.weights import locate

PackageForm = Literal["bioimageio", "czann"]  # FORMATS of packages/__init__.py


@command(PANEL, "package nasa-super1 --format czann --output super1.czann")
def package(
    model: OnnxFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: .zip for bioimageio, .czann.")],
    form: Annotated[
        PackageForm, typer.Option("--format", help="bioimageio: Fiji, ilastik, QuPath, napari; czann: ZEN, arivis.")
    ] = "bioimageio",
    author: Annotated[list[str] | None, typer.Option(help="Name of an author; may be repeated.")] = None,
    license: Annotated[
        str | None, typer.Option(help="Licence, e.g. CC-BY-4.0; default: that of the training data.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Size of the test picture, or of ZEN's tiles, e.g. 512x512.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Checkpoint to add to a bioimageio package.")] = None,
) -> None:
    """Write an ONNX file as a package for other programs: bioimage.io, or CZANN for ZEN and arivis."""
    from hpddrnet_trt.packages import PackageSettings, package_model

    settings = PackageSettings(
        None if size is None else parse_size(size), tuple(author or ()), license,
        None if checkpoint is None else locate(checkpoint, ".safetensors"),
    )  # fmt: skip
    written = package_model(locate(model), output, form, settings)
    typer.echo(f"written: {written} ({megabytes(written.stat().st_size)})")
