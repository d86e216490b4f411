"""Arguments and options that several commands share."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.files import write_text
from hpddrnet_trt.core.text import METRES, plain
from hpddrnet_trt.engines import ENGINES, Arithmetic
from hpddrnet_trt.results import ALWAYS_POSSIBLE, FORMATS, KINDS
from hpddrnet_trt.weights import DEFAULT

if TYPE_CHECKING:
    from hpddrnet_trt.inference import Segmenter
    from hpddrnet_trt.inference.files import ResultSettings

    EngineName = str
else:
    EngineName = Literal[("auto", *ENGINES)]

ModelFile = Annotated[
    Path, typer.Argument(help="Model file (.safetensors, .onnx, .engine), or a shipped model's name.")
]
RUNNABLE = "Model file, a shipped model's name, or triton://host:8001/model."
Checkpoint = Annotated[Path, typer.Argument(help="Checkpoint (.safetensors), or a shipped model's name.")]
OnnxFile = Annotated[Path, typer.Argument(help="ONNX file written by export, or a shipped model's name.")]
Mode = Annotated[
    Literal["single", "flip", "multiscale"],
    typer.Option(help="One view, its mirror image too, or both at six scales (TensorRT engines need logits for it)."),
]
Method = Annotated[
    Literal["max", "percentile", "entropy", "mse"], typer.Option(help="How ranges are taken from the values seen.")
]
Data = Annotated[Path, typer.Option(help="Dataset folder (images|masks/{train,val,test} or {split}/{imgs,labels}).")]
Split = Annotated[str, typer.Option(help="Split of the dataset.")]


def parse_length(text: str) -> float:
    """Metres of ``5nm``, ``0.25 um``, ``5e-9 m``; :class:`UsageError` without a unit or for what is not positive."""
    parts = re.fullmatch(r"\s*([0-9.]+(?:[eE][-+]?[0-9]+)?)\s*([a-zµμ]+)\s*", text)
    try:
        metres = float(parts[1]) * METRES[parts[2]] if parts else 0.0
    except (ValueError, KeyError):
        metres = 0.0
    if not 0 < metres < 1:
        raise UsageError(f"{text!r} is no length; give a number and its unit (nm, um, mm), such as 5nm")
    return metres


def parse_size(text: str) -> tuple[int, int]:
    """``"1024"`` or ``"768x1024"`` (height x width) as (height, width)."""
    match = re.fullmatch(r"\s*(\d+)\s*(?:[x×]\s*(\d+)\s*)?", text)
    if match is None:
        raise UsageError(f"size {text!r} is not understood; write 1024 or 768x1024 (height x width)")
    return int(match[1]), int(match[2] or match[1])


def parse_kinds(text: str) -> list[str]:
    """Kinds of file of ``png,rois``; ``all`` stands for every one but confidence, which needs class scores."""
    named = {kind.strip() for kind in text.split(",") if kind.strip()}
    for kind in sorted(named.difference(KINDS, {"all"})):
        raise UsageError(f"--write takes {', '.join(KINDS)} or all, not {kind!r}")
    if "all" in named:
        named |= set(ALWAYS_POSSIBLE)
    return [kind for kind in KINDS if kind in named]


def write_json(target: Path | None, record: dict[str, Any]) -> None:
    """What ``--json`` asks for: the figures of a command as a file (null where one does not exist), and a line
    that says so."""
    if target is not None:
        write_text(target, json.dumps(plain(record), indent=1, allow_nan=False) + "\n")
        typer.echo(f"written: {target}")


def word_or_number(option: str, words: tuple[str, ...], number: str) -> Any:
    """Typer's parser of an option that takes one of ``words`` or a number."""

    def parse(text: str) -> str | int:
        if text in words:
            return text
        if not (text.isascii() and text.isdigit()):
            raise UsageError(f"{option} takes {', '.join(words)} or {number}, not {text!r}")
        return int(text)

    return parse


_KINDS_IN_WORDS = ", ".join(f"{kind} ({FORMATS[kind].description})" for kind in ALWAYS_POSSIBLE)


@dataclass(frozen=True)
class EngineOptions:
    """What runs a model."""

    engine: Annotated[EngineName, typer.Option(help="Runtime; auto: the fastest there is for the file.")] = "auto"
    precision: Annotated[
        Arithmetic | None,
        typer.Option(
            help="What labels are computed in; auto: the fastest that keeps them on this processor; file: what the "
            "file is in. Default: auto; of evaluate: file."
        ),
    ] = None
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of one inference.")] = None
    device: Annotated[str | None, typer.Option(metavar="cpu|cuda|cuda:1", help="Processor, or which GPU.")] = None

    def arguments(self, precision: Arithmetic = "auto") -> dict[str, Any]:
        """The same for :func:`~hpddrnet_trt.load_segmenter`; ``precision``: where none is given."""
        return {**asdict(self), "precision": self.precision or precision}


@dataclass(frozen=True)
class GreyOptions:
    """How the grey values and the pixel size of micrographs are read."""

    intensity_range: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="BLACK WHITE", help="Grey values of black and white; default: as the model was trained."),
    ] = None
    percentiles: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="LOW HIGH", help="Percent of each image's pixels that become black and stay below white."
        ),
    ] = None
    pixel_size: Annotated[
        float | None,
        typer.Option(
            metavar="LENGTH", parser=parse_length, help="Size of a pixel with its unit (5nm), instead of the files'."
        ),
    ] = None
    rescale: Annotated[
        bool,
        typer.Option(help="Read images at the pixel size that the model was trained at, where both are known."),
    ] = True

    def window(self) -> Any:
        """The segmenter's ``window``, of which at most one way is given."""
        from hpddrnet_trt.data.intensity import Percentiles

        if self.intensity_range is not None and self.percentiles is not None:
            raise UsageError("give either --intensity-range or --percentiles, not both")
        if self.intensity_range is not None and not self.intensity_range[0] < self.intensity_range[1]:
            black, white = self.intensity_range
            raise UsageError(f"--intensity-range takes black < white, not {black:g} {white:g}")
        return self.intensity_range if self.percentiles is None else Percentiles(*self.percentiles)


@dataclass(frozen=True)
class SegmentOptions(GreyOptions):
    """What every command has that segments micrographs into a folder: which model runs, and what is written."""

    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("labels")
    model: Annotated[Path, typer.Option(help=RUNNABLE)] = Path(DEFAULT)
    mode: Mode = "single"
    write: Annotated[
        Any,
        typer.Option(
            "--write", "-w", metavar="KIND,...", parser=parse_kinds,
            help=f"What to write for each image: {_KINDS_IN_WORDS}, or all.",
        ),
    ] = "png"
    overlay: Annotated[
        bool, typer.Option(help="Also write a picture of the labels over the micrograph, with scale bar and legend.")
    ] = True
    confidence: Annotated[bool, typer.Option(help="Also write the probability of the chosen class as TIFF.")] = False
    background: Annotated[
        list[str] | None,
        typer.Option(metavar="CLASS", help="Class that rois and regions leave out; may be repeated."),
    ] = None
    smallest: Annotated[
        int, typer.Option(metavar="PIXELS", help="Least size of a region in rois and regions.")
    ] = 1
    separate: Annotated[
        list[str] | None,
        typer.Option(metavar="CLASS", help="Class whose touching objects rois, regions and grains take apart; may be "
                                           "repeated."),
    ] = None
    tile: Annotated[
        Any,
        typer.Option(
            metavar="auto|whole|PIXELS", parser=word_or_number("--tile", ("auto", "whole"), "a number of pixels"),
            help="Large images in tiles: when needed, never, of this size.",
        ),
    ] = "auto"
    info_bar: Annotated[
        Any,
        typer.Option(
            metavar="auto|metadata|none|ROWS",
            parser=word_or_number("--info-bar", ("auto", "metadata", "none"), "rows to keep"),
            help="Cut off the bar below a picture as found, as its metadata say, not at all, or after so many rows.",
        ),
    ] = "auto"
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Build an engine that does not fit this machine again from its ONNX file.")
    ] = False
    resume: Annotated[bool, typer.Option(help="Leave what this model has written before with these options.")] = True
    refuse_foreign: Annotated[
        bool,
        typer.Option("--refuse-foreign", help="Pictures that are foreign to the model have failed: nothing of them is "
                                              "written."),
    ] = False

    intervals: Annotated[
        bool | None,
        typer.Option(
            "--intervals/--no-intervals",
            help="How far area fractions may be off, 95 %, from class scores, which takes a sixth longer; default: "
                 "where the model knows its errors.",
        ),
    ] = None

    def settings(self) -> ResultSettings:
        """What is written, and how files are read."""
        from hpddrnet_trt.inference.files import ResultSettings

        return ResultSettings(
            write=self.write + ["confidence"] * self.confidence, overlay=self.overlay,
            background=self.background or [], smallest=self.smallest, separate=self.separate or [],
            pixel_size_m=self.pixel_size,
            info_bar=self.info_bar, resume=self.resume, refuse_foreign=self.refuse_foreign,
        )  # fmt: skip

    def open_segmenter(self, engine: EngineOptions) -> Segmenter:
        """The model, opened as these options say; a line says what ``auto`` took."""
        from hpddrnet_trt.inference import load_segmenter

        if logging.getLogger().isEnabledFor(logging.WARNING):  # not --quiet
            logging.getLogger("hpddrnet_trt.engines").setLevel(logging.INFO)
        return load_segmenter(
            self.model, **engine.arguments(), mode=self.mode,
            confidence=self.confidence or "confidence" in self.write, window=self.window(), tile=self.tile,
            rebuild=self.rebuild, rescale=self.rescale,
            intervals=self.intervals,
        )  # fmt: skip
