"""Commands that run model files on micrographs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from hpddrnet_trt.cli.options import RUNNABLE, EngineOptions, SegmentOptions, Split, parse_length
from hpddrnet_trt.cli.program import INTERRUPTED, command
from hpddrnet_trt.core.text import plain
from hpddrnet_trt.weights import DEFAULT


@command("Segment micrographs", "segment micrographs/*.tif --output labels --write png,rois")
def segment(
    inputs: Annotated[list[Path], typer.Argument(metavar="IN...", help="Micrographs, folders, globs, or a dataset.")],
    options: SegmentOptions,
    engine: EngineOptions,
    split: Split = "test",
    stack: Annotated[
        bool | None,
        typer.Option("--stack/--no-stack", help="Files of a folder are slices of a stack, too; or none are: of a "
                                                "TIFF with several pages the first is taken. Default: such TIFFs are."),
    ] = None,
    z_spacing: Annotated[
        float | None,
        typer.Option(metavar="LENGTH", parser=parse_length, help="From one slice to the next with its unit (10nm), "
                                                                 "instead of what the files say."),
    ] = None,
    specimen: Annotated[
        str | None,
        typer.Option(metavar="auto|all|REGEX", help="Pictures of one specimen, as folders or names tell, all of them, "
                                                    "or by a part of the path: also mean fractions, specimens.csv."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="What came of it as one JSON document.")] = False,
) -> None:  # fmt: skip
    """Segment micrographs of any size: label maps, overlays, regions, area fractions.

    Without --model the model that comes with the package is used: nickel-base superalloys (matrix,
    secondary and tertiary precipitates). On other materials train your own.

    Lengths and areas are in micrometres where the pixel size is known, from the file's metadata or --pixel-size, and
    in pixels only where it is not. OME-Zarr, rois and regions need pip install 'hpddrnet-trt[results]'. A bad file
    does not stop the others. Pictures that are unlike those of the training are told, and with --refuse-foreign they
    fail. The pages of a TIFF are slices of a stack, whose labels become one TIFF, OME-TIFF or
    OME-Zarr beside a folder with a PNG of each slice. Ctrl-C or SIGTERM keeps what is done; the same command continues.
    """
    from hpddrnet_trt.inference.folder import segment_paths

    with options.open_segmenter(engine) as segmenter:
        settings = replace(options.settings(), stack=stack, spacing_m=z_spacing, specimen=specimen)
        summary = segment_paths(segmenter, inputs, options.output, settings, split=split)
    if as_json:
        typer.echo(json.dumps(plain({"output": str(options.output), **summary.record()}), allow_nan=False))
    else:
        typer.echo(f"{summary}\nwritten to {options.output}" if summary.files else str(summary))
    if summary.interrupted:
        raise typer.Exit(INTERRUPTED)
    if summary.failed:
        raise typer.Exit(summary.exit_code)


@command("Segment micrographs", "watch /data/session --output labels --recursive")
def watch(
    folder: Annotated[Path, typer.Argument(help="Folder in which micrographs appear.")],
    options: SegmentOptions,
    engine: EngineOptions,
    settle: Annotated[float, typer.Option(help="Seconds without a change after which a file is complete; "
                                               "0 for writers that rename whole files into place.")] = 2.0,
    patience: Annotated[float, typer.Option(help="Seconds after which an unreadable file counts as failed.")] = 60.0,
    poll: Annotated[float, typer.Option(help="Seconds from one look at the folder to the next.")] = 1.0,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Also watch sub-folders.")] = False,
    stop_after: Annotated[float | None, typer.Option(help="End when nothing came for so many seconds; 0: do what is "
                                                          "there and end. Default: until Ctrl-C.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each event.")] = False,
) -> None:  # fmt: skip
    """Segment micrographs as they appear in a folder, one line each, until Ctrl-C.

    Writes what `segment` writes. A file is taken when nobody writes to it any more and it can be decoded; files
    that change are segmented again. Ctrl-C ends the watch after the micrograph under way, and the next watch (or
    `segment`) continues there. Exit code 1 when micrographs failed.
    """
    from hpddrnet_trt.inference.watch import Happened, WatchEvent, WatchSettings, stop_on_signal, watch_folder

    def tell(event: WatchEvent) -> None:
        if as_json:
            typer.echo(json.dumps(plain(event.record()), allow_nan=False))
            return
        if event.happened is Happened.ALREADY_DONE:
            return  # a folder of thousands after a restart
        name = event.path.relative_to(root) if event.path != root else root
        if event.fractions is not None:
            said = ", ".join(f"{label} {fraction:.1%}" for label, fraction in event.fractions.items())
            if event.domain is not None and event.domain.notice is not None:
                said += f"  ({event.domain.notice})"
        else:
            said = event.happened.value + (f": {event.reason}" if event.reason else "")
        typer.echo(f"{name}  {said}")

    root = folder.resolve()
    settings = WatchSettings(settle, patience, poll, recursive, stop_after)
    with options.open_segmenter(engine) as segmenter, stop_on_signal() as stop:
        typer.echo(f"watching {folder}; results go to {options.output}; Ctrl-C ends", err=as_json)
        summary = watch_folder(
            segmenter, folder, options.output, options.settings(), settings, on_event=tell, stop=stop
        )
    typer.echo(str(summary), err=as_json)
    if summary.failed:
        raise typer.Exit(summary.exit_code)


@command("Segment micrographs", "rank new/ --model model.onnx --labeled mine --output ranking.csv")
def rank(
    inputs: Annotated[list[Path], typer.Argument(metavar="IN...", help="Micrographs without labels, folders, globs.")],
    engine: EngineOptions,
    model: Annotated[Path, typer.Option(help=RUNNABLE)] = Path(DEFAULT),
    labeled: Annotated[
        Path | None, typer.Option(metavar="DATASET", help="Pictures that have labels: others like these come late.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="CSV file for the order.")] = Path("ranking.csv"),
) -> None:
    """Order micrographs by what labelling them would teach the model, those that teach most first.

    First come pictures of which the model is unsure and that look unlike those before them. The napari widget opens
    them in this order (docs/correct.md).
    """
    from hpddrnet_trt.inference import load_segmenter
    from hpddrnet_trt.inference.rank import rank_pictures

    with load_segmenter(model, **engine.arguments(), confidence=True) as segmenter:
        ranking = rank_pictures(segmenter, inputs, labeled=labeled)
    ranking.write(output)
    typer.echo(f"{ranking}\nwritten to {output}")
    if ranking.failed:
        raise typer.Exit(1)
