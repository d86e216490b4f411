"""Commands that run model files on micrographs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpddrnet_trt.cli.options import Engine, Mode, Split
from hpddrnet_trt.cli.program import INTERRUPTED, app
from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.weights import DEFAULT

if TYPE_CHECKING:
    from hpddrnet_trt.data.micrograph import InfoBar
    from hpddrnet_trt.inference.tiled import Tile

# Options of every command that writes results.
Write = Annotated[
    str,
    typer.Option(
        "--write", "-w", metavar="KIND,...",
        help="What to write for each image: png, tiff, ome-tiff, ome-zarr, rois (ImageJ), regions (CSV), or all.",
    ),
]
Overlay = Annotated[
    bool, typer.Option(help="Also write a picture of the labels over the micrograph, with scale bar and legend.")
]
Confidence = Annotated[bool, typer.Option(help="Also write the probability of the chosen class as TIFF.")]
Background = Annotated[
    list[str], typer.Option(metavar="CLASS", help="Class that rois and regions leave out; may be repeated.")
]
Smallest = Annotated[int, typer.Option(metavar="PIXELS", help="Least size of a region in rois and regions.")]
TileText = Annotated[
    str, typer.Option(metavar="auto|whole|PIXELS", help="Large images in tiles: when needed, never, of this size.")
]
GreyWindow = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="BLACK WHITE", help="Grey values that become black and white, the same for all images."),
]
GreyPercentiles = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="LOW HIGH", help="Percent of each image's pixels that become black and stay below white."),
]
PixelSize = Annotated[
    str | None, typer.Option(metavar="LENGTH", help="Size of a pixel with its unit (5nm), instead of the files'.")
]
InfoBarText = Annotated[
    str,
    typer.Option(
        metavar="auto|metadata|none|ROWS",
        help="Cut off the bar below a picture as found, as its metadata say, not at all, or after so many rows.",
    ),
]
Resume = Annotated[bool, typer.Option(help="Leave what this model has written before with these options.")]
_METRES = {"m": 1.0, "mm": 1e-3, "um": 1e-6, "µm": 1e-6, "μm": 1e-6, "nm": 1e-9, "pm": 1e-12}


@app.command()
def segment(
    inputs: Annotated[list[Path], typer.Argument(metavar="IN...", help="Micrographs, folders, globs, or a dataset.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("labels"),
    model: Annotated[Path, typer.Option(help="Model file, or the name of a shipped model.")] = Path(DEFAULT),
    engine: Engine = "auto",
    mode: Mode = "single",
    split: Split = "test",
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
) -> None:
    """Segment micrographs of any size: label maps, overlays, regions, area fractions.

    Without --model the model that comes with the package is used: nickel-base superalloys (matrix,
    secondary and tertiary precipitates). On other materials train your own.

    Lengths and areas are in micrometres where the pixel size is known, from the file's metadata or --pixel-size, and
    in pixels only where it is not. OME-Zarr, rois and regions need pip install 'hpddrnet-trt[results]'. A bad file
    does not stop the others. Ctrl-C keeps what is done; the same command continues.
    """
    from hpddrnet_trt.data.datasets import find_images
    from hpddrnet_trt.inference import load_segmenter
    from hpddrnet_trt.inference.files import segment_paths

    kinds = parse_kinds(write, confidence)
    size = None if pixel_size is None else parse_length(pixel_size)
    bar, tiles, grey = parse_info_bar(info_bar), parse_tile(tile), parse_window(window, percentiles)
    sources = [image for item in inputs for image in find_images(item, split)]
    with load_segmenter(
        model, engine=engine, mode=mode, confidence="confidence" in kinds, window=grey, tile=tiles
    ) as segmenter:
        summary = segment_paths(
            segmenter, sources, output, write=kinds, overlay=overlay, background=background, smallest=smallest,
            pixel_size_m=size, info_bar=bar, resume=resume,
        )  # fmt: skip
    typer.echo(f"{summary}\nwritten to {output}" if summary.files else str(summary))
    if summary.interrupted:
        raise typer.Exit(INTERRUPTED)
    if summary.failed:
        raise typer.Exit(summary.exit_code)


def parse_length(text: str) -> float:
    """Metres of ``5nm``, ``0.25 um``, ``5e-9 m``; :class:`UsageError` without a unit or for what is not positive."""
    found = re.fullmatch(r"\s*([0-9.]+(?:[eE][-+]?[0-9]+)?)\s*([a-zµμ]+)\s*", text)
    try:
        metres = float(found[1]) * _METRES[found[2]] if found else 0.0
    except (ValueError, KeyError):
        metres = 0.0
    if not 0 < metres < 1:
        raise UsageError(f"{text!r} is no length; give a number and its unit (nm, um, mm), such as 5nm")
    return metres


def parse_kinds(text: str, confidence: bool) -> list[str]:
    """Kinds of file of ``png,rois``; ``all`` stands for every one but confidence, which needs class scores."""
    from hpddrnet_trt.inference.files import KINDS

    named = {kind.strip() for kind in text.split(",") if kind.strip()}
    for kind in sorted(named.difference(KINDS, {"all"})):
        raise UsageError(f"--write takes {', '.join(KINDS)} or all, not {kind!r}")
    if "all" in named:
        named |= {kind for kind in KINDS if kind != "confidence"}
    if confidence:
        named.add("confidence")
    return [kind for kind in KINDS if kind in named]


def parse_window(window: tuple[float, float] | None, percentiles: tuple[float, float] | None) -> Any:
    """The segmenter's ``window``, of which at most one way is given."""
    from hpddrnet_trt.data.micrograph import Percentiles

    if window is not None and percentiles is not None:
        raise UsageError("give either --window or --percentiles, not both")
    if window is not None and not window[0] < window[1]:
        raise UsageError(f"--window takes black < white, not {window[0]:g} {window[1]:g}")
    return window if percentiles is None else Percentiles(*percentiles)


def parse_info_bar(text: str) -> InfoBar:
    """A word, or how many rows are kept."""
    words: dict[str, InfoBar] = {"auto": "auto", "metadata": "metadata", "none": "none"}
    return words[text] if text in words else _number(text, "--info-bar takes auto, metadata, none or rows to keep")


def parse_tile(text: str) -> Tile:
    """A word, or a tile's edge in pixels."""
    words: dict[str, Tile] = {"auto": "auto", "whole": "whole"}
    return words[text] if text in words else _number(text, "--tile takes auto, whole or a number of pixels")


def _number(text: str, usage: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"{usage}, not {text!r}")
    return int(text)
