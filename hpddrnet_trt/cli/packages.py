"""Models of other programs, and models for other programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import ValidationError

from hpddrnet_trt.cli.model import PANEL, echo_evidence
from hpddrnet_trt.cli.options import EngineName, OnnxFile, parse_length, parse_size
from hpddrnet_trt.cli.program import command
from hpddrnet_trt.core.errors import UsageError, first_problem
from hpddrnet_trt.core.manifest import DataRecord
from hpddrnet_trt.core.text import megabytes
from hpddrnet_trt.engines import Arithmetic
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
    size: Annotated[str | None, typer.Option(help="Size of the test picture, or of ZEN's tiles, e.g. 512x512.")] = None,
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


@dataclass(frozen=True)
class AdoptOptions:
    """What a stranger's file does not say."""

    classes: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...", help="Its classes in their order, with a colour if you like: matrix,pore=#d55e00."
        ),
    ] = None
    normalization: Annotated[
        str | None,
        typer.Option(
            metavar="imagenet|half|unit|none|MEAN/STD",
            help="Of its training: ImageNet's means; grey levels as -1..1; as 0..1; as they are; or the numbers.",
        ),
    ] = None
    channel_order: Annotated[
        Literal["rgb", "bgr"] | None,
        typer.Option(help="Which channel it takes first, rgb if left out; numbers above begin with red."),
    ] = None
    scores: Annotated[str | None, typer.Option(metavar="OUTPUT", help="Which output to take, of several.")] = None
    align_corners: Annotated[
        bool, typer.Option("--align-corners", help="Enlarge scores of lower resolution corner to corner.")
    ] = False
    multiple: Annotated[
        int | None,
        typer.Option(min=1, help="Of which height and width are multiples where they are dynamic; 32 if left out."),
    ] = None
    output: Annotated[
        Literal["labels", "logits"] | None, typer.Option(help="Class indices, as if left out, or scores.")
    ] = None
    confidence: Annotated[bool, typer.Option("--confidence", help="Add a map of the winning class's probability.")] = (
        False
    )
    tile: Annotated[str | None, typer.Option(help="Size of its training crops, e.g. 512x512: that of tiles.")] = None
    pixel_size: Annotated[
        float | None,
        typer.Option(metavar="LENGTH", parser=parse_length, help="Pixel size of its training pictures, e.g. 5nm."),
    ] = None
    name: Annotated[str | None, typer.Option(help="Name of the model; default: the file's.")] = None
    trained_on: Annotated[str | None, typer.Option(help="Name of its training data.")] = None
    license: Annotated[str | None, typer.Option(help="Licence of its training data.")] = None

    def given(self) -> dict[str, Any]:
        """Fields of AdoptSettings that were given; :class:`UsageError` for what is not understood."""
        from hpddrnet_trt.export.adopt_settings import parse_classes, parse_normalization

        about = {
            "name": self.trained_on, "license": self.license,
            "crop": None if self.tile is None else parse_size(self.tile),
            "pixel_size_m": None if self.pixel_size is None else (self.pixel_size, self.pixel_size),
        }  # fmt: skip
        known = {key: value for key, value in about.items() if value is not None}
        try:
            data = DataRecord.model_validate({"name": "not stated", **known}) if known else None
        except ValidationError as exc:
            raise UsageError(f"the training data cannot be so: {first_problem(exc, 'they')}") from exc
        fields = {
            "classes": None if self.classes is None else parse_classes(self.classes),
            "normalization": None if self.normalization is None else parse_normalization(self.normalization),
            "channel_order": self.channel_order, "scores": self.scores, "align_corners": self.align_corners or None,
            "multiple": self.multiple, "output": self.output, "confidence": self.confidence or None,
            "name": self.name, "data": data,
        }  # fmt: skip
        return {key: value for key, value in fields.items() if value is not None}


@command(PANEL, "adopt theirs.onnx ours.onnx --classes matrix,pore --normalization imagenet --data micrographs/")
def adopt(
    source: Annotated[Path, typer.Argument(help="ONNX file or bioimage.io package (.zip) of another program.")],
    target: Annotated[Path, typer.Argument(help="ONNX file to write.")],
    options: AdoptOptions,
    data: Annotated[
        Path | None, typer.Option(help="Micrographs or dataset (test split) to compare on; simulated when left out.")
    ] = None,
) -> None:
    """Give an ONNX segmenter of another program our input, output and description, so that every command takes it.

    The result is compared with the file itself. How good it is, `evaluate` says. A package says itself what the
    options say.
    """
    from hpddrnet_trt.data.datasets import find_images
    from hpddrnet_trt.export.adopt import adopt as run_adoption
    from hpddrnet_trt.export.adopt_settings import AdoptSettings
    from hpddrnet_trt.packages import adopt_package

    given, images = options.given(), find_images(data, "test") if data else []
    if source.suffix.lower() == ".zip":
        manifest = adopt_package(source, target, given, images=images)
    else:
        for name in ("classes", "normalization"):
            if name not in given:
                raise UsageError(f"an ONNX file does not say what it was trained on; give --{name}, see `adopt --help`")
        manifest = run_adoption(source, target, AdoptSettings(**given), images=images)
    for remark in manifest.remarks:
        typer.echo(f"remark: {remark}")
    echo_evidence(manifest)
    typer.echo(f"written: {target}")


@dataclass(frozen=True)
class ServiceOptions:
    """What a model's description does not say of a service."""

    name: Annotated[str | None, typer.Option(help="Name of the model on the server; default: the file's.")] = None
    backend: Annotated[
        Literal["auto", "tensorrt_plan", "onnxruntime", "python"],  # Backend of packages/triton.py
        typer.Option(help="What runs it; python: our own engines; auto: tensorrt_plan for .engine, else onnxruntime."),
    ] = "auto"
    scores: Annotated[bool, typer.Option(help="Also write NAME-scores, by which clients blend tiles.")] = True
    batch: Annotated[int, typer.Option(min=1, help="Pictures that the server puts together at most.")] = 8
    wait_us: Annotated[int, typer.Option(min=0, help="Microseconds that it waits for more of them.")] = 500
    queue: Annotated[int, typer.Option(min=1, help="Requests that wait at most; more are refused.")] = 256
    instances: Annotated[int, typer.Option(min=1, help="Instances of the model, on each GPU where it has any.")] = 1
    versions: Annotated[int, typer.Option(min=1, help="How many of the newest versions are served at once.")] = 2
    largest_pixels: Annotated[int, typer.Option(min=1, help="Of one picture; python backend.")] = 4096 * 4096
    engine: Annotated[EngineName, typer.Option(help="Engine of the python backend.")] = "auto"
    precision: Annotated[Arithmetic, typer.Option(help="What it computes in; auto: as segment does.")] = "auto"
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of one inference; python backend.")] = None
    gpu: Annotated[bool, typer.Option("--gpu", help="One instance on each GPU; python backend.")] = False


@command(PANEL, "export-triton nasa-super1 /srv/models --backend python")
def export_triton(
    model: Annotated[Path, typer.Argument(help="ONNX or engine file, or a shipped model's name.")],
    repository: Annotated[Path, typer.Argument(help="Folder of the server's models; the model gets its next version.")],
    options: ServiceOptions,
) -> None:
    """Write a model, or its next version, into a model repository of NVIDIA Triton Inference Server."""
    from hpddrnet_trt.packages.triton import TritonSettings
    from hpddrnet_trt.packages.triton import export_triton as run_export

    exported = run_export(locate(model), repository, TritonSettings(**vars(options)))
    for remark in exported.remarks:
        typer.echo(f"remark: {remark}")
    for folder in exported.models.values():
        typer.echo(f"written: {folder / str(exported.version)}")
