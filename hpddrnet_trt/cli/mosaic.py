"""The command for mosaics and volumes that are too large for one picture."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from hpddrnet_trt.cli.options import EngineOptions, GreyOptions, parse_length, word_or_number
from hpddrnet_trt.cli.program import INTERRUPTED, command
from hpddrnet_trt.core.text import plain
from hpddrnet_trt.weights import DEFAULT


@dataclass(frozen=True)
class SourceOptions:
    """What is read of a store, where it holds several things."""

    image: Annotated[
        str | None, typer.Option(metavar="PATH", help="Which image of an OME-Zarr that holds several.")
    ] = None
    channel: Annotated[int | None, typer.Option(min=0, help="Which channel, counted from 0.")] = None
    positions: Annotated[
        Path | None, typer.Option(metavar="CSV|PATTERN|slices", help="Where tiles of a folder lie (docs/mosaics.md).")
    ] = None
    z_spacing: Annotated[
        float | None,
        typer.Option(metavar="LENGTH", parser=parse_length, help="From one slice to the next with its unit (10nm)."),
    ] = None
    skip_empty: Annotated[
        bool,
        typer.Option(help="Leave out cells of 64x64 pixels of nothing but the fill value; else they are black pixels."),
    ] = True


@dataclass(frozen=True)
class OutputOptions:
    """Where labels go, and what is made of them."""

    to: Annotated[
        Path | None, typer.Option(help="OME-Zarr for the labels; default: beside the pixels, in the same one.")
    ] = None
    name: Annotated[str, typer.Option(help="What the labels are called there.")] = "classes"
    regions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also a table of all regions, .parquet or .csv.")
    ] = None
    background: Annotated[
        list[str] | None, typer.Option(metavar="CLASS", help="Class that it leaves out; may be repeated.")
    ] = None
    smallest: Annotated[int, typer.Option(min=1, metavar="PIXELS", help="Least size of a region in it.")] = 1
    smooth_slices: Annotated[
        int, typer.Option(min=1, metavar="N", help="Slices of a volume that vote on each pixel, odd; 1: none.")
    ] = 1
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew, instead of going on with what is there.")
    ] = False


@dataclass(frozen=True)
class WorkerOptions:
    """What computes a mosaic."""

    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes on this machine; default: one for each core, or GPU of the model."),
    ] = None
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Dask scheduler whose workers compute, tcp://host:8786.")
    ] = None
    patience: Annotated[
        float, typer.Option(min=1, help="Seconds without any worker after which the run ends; it can be continued.")
    ] = 300.0


@command("Segment micrographs", "mosaic specimen.ome.zarr --model model.onnx --dry-run")
def mosaic(
    store: Annotated[Path, typer.Argument(help="OME-Zarr, pyramid or stack as TIFF, or folder of tiles.")],
    source: SourceOptions,
    grey: GreyOptions,
    output: OutputOptions,
    engine: EngineOptions,
    worker: WorkerOptions,
    model: Annotated[Path, typer.Option(help="Model file, or the name of a shipped model.")] = Path(DEFAULT),
    tile: Annotated[
        Any,
        typer.Option(
            metavar="auto|PIXELS", parser=word_or_number("--tile", ("auto",), "a number of pixels"),
            help="Side of the tiles that the network sees; auto: as it was trained.",
        ),
    ] = "auto",
    block: Annotated[
        int | None,
        typer.Option(min=64, metavar="PIXELS", help="Side of what a worker does at a time; smaller needs less memory. "
                                                    "Default: 8192."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it takes: tiles, bytes, time, room; some tiles are timed.")
    ] = False,
    cost_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Of one worker, in any currency, for --dry-run.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="What came of it as one JSON document.")] = False,
) -> None:  # fmt: skip
    """Segment a mosaic or volume of any size, block by block, on all cores or GPUs, or on a Dask cluster.

    Labels become an OME-Zarr 0.5 label image with its pyramid, in the same OME-Zarr or in another (--to). They are the
    same, bit for bit, for any number of workers. The same command continues a run that was ended, by whatever. Exit
    code 1 when parts could not be read or computed, or have changed meanwhile: they are named, and the next run does
    them again.
    """
    from hpddrnet_trt.mosaic.cluster import ClusterSettings
    from hpddrnet_trt.mosaic.layout import BLOCK
    from hpddrnet_trt.mosaic.plan import plan_mosaic
    from hpddrnet_trt.mosaic.prepare import MosaicOptions
    from hpddrnet_trt.mosaic.run import segment_mosaic

    if logging.getLogger().isEnabledFor(logging.WARNING):  # not --quiet
        logging.getLogger("hpddrnet_trt.mosaic").setLevel(logging.INFO)
    options = MosaicOptions(
        output=output.to, name=output.name, restart=output.restart, smooth_slices=output.smooth_slices,
        regions=output.regions, background=output.background or (), smallest=output.smallest,
        image=source.image, channel=source.channel, positions=source.positions, pixel_size_m=grey.pixel_size,
        spacing_m=source.z_spacing, skip_empty=source.skip_empty, **engine.arguments(), window=grey.window(),
        rescale=grey.rescale, tile=tile, block=block or BLOCK,
    )  # fmt: skip
    cluster = ClusterSettings(worker.scheduler, worker.workers, worker.patience)
    if dry_run:
        plan = plan_mosaic(store, model, options, cluster, cost_per_hour=cost_per_hour)
        typer.echo(json.dumps(plain(plan.record()), allow_nan=False) if as_json else str(plan))
        return
    run = segment_mosaic(store, model, options, cluster)
    typer.echo(json.dumps(plain(run.record()), allow_nan=False) if as_json else f"{run}\nwritten to {run.store}")
    if run.interrupted:
        raise typer.Exit(INTERRUPTED)
    if run.exit_code:
        raise typer.Exit(run.exit_code)
