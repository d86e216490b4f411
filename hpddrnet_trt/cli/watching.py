"""The command that waits for micrographs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpddrnet_trt.cli.options import Engine, Mode
from hpddrnet_trt.cli.program import app
from hpddrnet_trt.cli.run import (
    Background,
    Confidence,
    GreyPercentiles,
    GreyWindow,
    InfoBarText,
    Overlay,
    PixelSize,
    Resume,
    Smallest,
    TileText,
    Write,
    parse_info_bar,
    parse_kinds,
    parse_length,
    parse_tile,
    parse_window,
)
from hpddrnet_trt.weights import DEFAULT


@app.command()
def watch(
    folder: Annotated[Path, typer.Argument(help="Folder in which micrographs appear.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("labels"),
    model: Annotated[Path, typer.Option(help="Model file, or the name of a shipped model.")] = Path(DEFAULT),
    engine: Engine = "auto",
    mode: Mode = "single",
    settle: Annotated[float, typer.Option(help="Seconds without a change after which a file is complete; "
                                               "0 for writers that rename whole files into place.")] = 2.0,
    patience: Annotated[float, typer.Option(help="Seconds after which an unreadable file counts as failed.")] = 60.0,
    poll: Annotated[float, typer.Option(help="Seconds from one look at the folder to the next.")] = 1.0,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Also watch sub-folders.")] = False,
    stop_after: Annotated[float | None, typer.Option(help="End when nothing came for so many seconds; 0: do what is "
                                                          "there and end. Default: until Ctrl-C.")] = None,
    write: Write = "png",
    overlay: Overlay = True,
    confidence: Confidence = False,
    background: Background = [],  # noqa: B006  (typer copies it)
    smallest: Smallest = 1,
    tile: TileText = "auto",
    window: GreyWindow = None,
    percentiles: GreyPercentiles = None,
    pixel_size: PixelSize = None,
    info_bar: InfoBarText = "auto",
    resume: Resume = True,
) -> None:  # fmt: skip
    """Segment micrographs as they appear in a folder, one line each, until Ctrl-C.

    Writes what `segment` writes. A file is taken when nobody writes to it any more and it can be decoded; files
    that change are segmented again. Ctrl-C ends the watch after the micrograph under way, and the next watch (or
    `segment`) continues there. Exit code 1 when micrographs failed.
    """
    from hpddrnet_trt.inference import load_segmenter
    from hpddrnet_trt.inference.watch import Happened, WatchEvent, stop_on_signal, watch_folder

    def tell(event: WatchEvent) -> None:
        if event.happened is Happened.ALREADY_DONE:
            return  # a folder of thousands after a restart
        name = event.path.relative_to(root) if event.path != root else root
        if event.fractions is not None:
            said = ", ".join(f"{label} {fraction:.1%}" for label, fraction in event.fractions.items())
        else:
            said = event.happened.value + (f": {event.reason}" if event.reason else "")
        typer.echo(f"{name}  {said}")

    kinds = parse_kinds(write, confidence)
    size = None if pixel_size is None else parse_length(pixel_size)
    bar, tiles, grey = parse_info_bar(info_bar), parse_tile(tile), parse_window(window, percentiles)
    root = folder.resolve()
    with load_segmenter(
        model, engine=engine, mode=mode, confidence="confidence" in kinds, window=grey, tile=tiles
    ) as segmenter, stop_on_signal() as stop:
        typer.echo(f"watching {folder}; results go to {output}; Ctrl-C ends")
        summary = watch_folder(
            segmenter, folder, output, settle_s=settle, patience_s=patience, poll_s=poll, recursive=recursive,
            on_event=tell, stop=stop, stop_after_s=stop_after,
            write=kinds, overlay=overlay, background=background, smallest=smallest, pixel_size_m=size, info_bar=bar,
            resume=resume,
        )  # fmt: skip
    typer.echo(str(summary))
    if summary.failed:
        raise typer.Exit(summary.exit_code)
