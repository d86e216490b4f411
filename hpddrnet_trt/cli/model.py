"""Commands from a checkpoint to an engine file, and what a file says about itself."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hpddrnet_trt.cli.options import Data, Method, ModelFile, OnnxFile, Split, parse_length, parse_size, write_json
from hpddrnet_trt.cli.program import command
from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.files import check_writable
from hpddrnet_trt.core.manifest import Manifest
from hpddrnet_trt.core.precisions import PRECISIONS, Half, LowPrecision, Precision
from hpddrnet_trt.core.text import megabytes
from hpddrnet_trt.weights import locate

if TYPE_CHECKING:
    from hpddrnet_trt.accuracy.acceptance import AcceptanceCheck, Budget
    from hpddrnet_trt.accuracy.candidates import StudySettings
    from hpddrnet_trt.export.build_settings import BuildSettings
    from hpddrnet_trt.export.onnx import ExportOptions

PANEL = "Make model files"
EngineTarget = Annotated[
    Path | None, typer.Option("--output", "-o", help="Engine to write; default MODEL.PRECISION.engine.")
]
CalibrationData = Annotated[
    Path | None, typer.Option("--calib", help="For int8, fp8 from an FP32 file: micrographs to calibrate on.")
]


@command(PANEL, "convert-checkpoint their.pth ours.safetensors --classes grain,pore,clay")
def convert_checkpoint(
    source: Annotated[Path, typer.Argument(help="Checkpoint of HPDDRNet, DDRNet, mmsegmentation or PaddleSeg.")],
    target: Annotated[Path, typer.Argument(help="Checkpoint to write (.safetensors).")],
    classes: Annotated[
        str | None, typer.Option(help="Comma-separated class names; default: as stored in the checkpoint.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence of the training data.")] = None,
) -> None:
    """Turn a checkpoint of HPDDRNet, DDRNet, mmsegmentation or PaddleSeg into ours; executes nothing from the file."""
    from hpddrnet_trt.models.checkpoints import convert_checkpoint as run_conversion

    names = [part.strip() for part in classes.split(",")] if classes else None
    manifest = run_conversion(source, target, name=name, classes=names, license=license)
    for remark in manifest.remarks:
        typer.echo(f"remark: {remark}")
    typer.echo(f"written: {target} ({manifest.network.name}, classes: {', '.join(manifest.class_names)})")


@command(PANEL, "describe-domain model.onnx --data DATASET")
def describe_domain(
    model: Annotated[Path, typer.Argument(help="Checkpoint (.safetensors) or ONNX file.")],
    data: Annotated[
        Path | None, typer.Option(help="Dataset or folder of the micrographs that the model was trained on.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the dataset that it was trained on.")] = "train",
    like: Annotated[
        Path | None, typer.Option(help="In place of --data: file of the same model to take the statistics from.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; default: the model itself.")] = None,
) -> None:
    """Let a model tell foreign pictures from its own: statistics of its training pictures go into its file.

    Where the dataset has masks of a val split, the file also learns how sure its class scores are and how far its area
    fractions are off, for the intervals of `segment`.
    """
    from hpddrnet_trt.export.domain import describe_domain as run_description

    manifest = run_description(model, data, out, split=split, like=like)
    record, errors = manifest.domain, manifest.fraction_errors
    assert record is not None
    typer.echo(
        f"written: {out or model} ({record.crops} crops of {record.pictures} pictures; unusual from distance "
        f"{record.unusual:.2g}, foreign from {record.foreign:.2g})"
    )
    if errors is not None:
        typer.echo(
            f"intervals of fractions from {errors.pictures} pictures of {errors.source}, class scores at the "
            f"temperature {manifest.temperature:.2f}"
        )


@dataclass(frozen=True)
class GraphOptions:
    """What the exported graph looks like."""

    batch: Annotated[int | None, typer.Option(help="Fixed batch size; dynamic when left out.")] = None
    height: Annotated[int | None, typer.Option(help="Fixed height in pixels; dynamic when left out.")] = None
    width: Annotated[int | None, typer.Option(help="Fixed width in pixels; dynamic when left out.")] = None
    attention: Annotated[
        Literal["matmul", "attention-op", "function"],
        typer.Option(help="Form of position attention; matmul runs everywhere, function waits for a plugin."),
    ] = "matmul"
    output: Annotated[
        Literal["labels", "logits"], typer.Option(help="Class indices, or scores (for flip and multi-scale).")
    ] = "labels"
    confidence: Annotated[bool, typer.Option(help="Add a map of the winning class's probability.")] = False
    grey_input: Annotated[
        bool, typer.Option(help="One-channel uint8 input; --no-grey-input takes three normalised float channels.")
    ] = True

    pixel_size: Annotated[
        float | None,
        typer.Option(
            metavar="LENGTH", parser=parse_length, help="Pixel size of the training pictures (5nm), where the "
            "checkpoint does not say it: pictures of another are then read at it.",
        ),
    ] = None

    def settings(self) -> ExportOptions:
        """The same for the export."""
        from hpddrnet_trt.export.onnx import ExportOptions

        return ExportOptions(
            self.batch, self.height, self.width, self.attention, self.output, self.confidence, self.grey_input,
            pixel_size_m=self.pixel_size,
        )  # fmt: skip


@command(PANEL, "export nasa-super1 model.onnx --precision fp16 --data micrographs/")
def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Checkpoint (.safetensors), or a shipped model's name. With --precision fp16 or bf16 also an FP32 "
                 "ONNX file."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="ONNX file to write.")],
    graph: GraphOptions,
    precision: Annotated[
        Literal["fp32", Half],
        typer.Option(
            help="fp16, bf16: typed so; attention scores and what would overflow or lose too much on the micrographs "
                 "keep a wider type."
        ),
    ] = "fp32",
    half_weights: Annotated[
        bool,
        typer.Option(
            "--half-weights",
            help="The form models are shared in: weights stored in FP16, computed in FP32, and the checkpoint beside "
                 "the ONNX file, both named as that.",
        ),
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="Micrographs or dataset (test split) to compare on; simulated when left out.")
    ] = None,
) -> None:  # fmt: skip
    """Export a checkpoint to one self-describing ONNX file and compare it with PyTorch."""
    from hpddrnet_trt.data.datasets import find_images
    from hpddrnet_trt.export.convert import convert_precision
    from hpddrnet_trt.export.onnx import export_onnx, ship

    from_onnx = checkpoint.suffix.lower() == ".onnx"
    if from_onnx and (precision == "fp32" or graph != GraphOptions()):
        raise UsageError(f"{checkpoint} is exported already; give its checkpoint, or only --precision fp16 or bf16")
    if half_weights and (from_onnx or precision != "fp32" or graph != GraphOptions()):
        raise UsageError("--half-weights is a form of its own, of a checkpoint; leave the other options out")
    if target.suffix.lower() != ".onnx":
        raise UsageError(f"the ONNX file {target} must end with .onnx; write {target.with_suffix('.onnx')}")
    if from_onnx:
        _check_target(checkpoint, target)
    else:
        checkpoint = locate(checkpoint, ".safetensors")
    images = find_images(data, "test") if data else []
    if half_weights:
        for path in ship(checkpoint, target.parent, name=target.stem, images=images):
            typer.echo(f"written: {path} ({megabytes(path.stat().st_size)})")
        return
    with tempfile.TemporaryDirectory(prefix="hpddrnet-trt-") as folder:
        exported = checkpoint
        if not from_onnx:
            exported = target if precision == "fp32" else Path(folder) / target.name
            manifest = export_onnx(checkpoint, exported, graph.settings(), images=images)
            echo_evidence(manifest)
        if precision != "fp32":
            manifest = convert_precision(exported, target, precision, images=images)
            for remark in manifest.remarks:
                typer.echo(f"remark: {remark}")
            echo_evidence(manifest)
    typer.echo(f"written: {target}")


@command(PANEL, "calibrate model.onnx model.int8.onnx --data DATASET --method entropy")
def calibrate(
    model: OnnxFile,
    target: Annotated[Path, typer.Argument(help="INT8 ONNX file to write.")],
    data: Annotated[Path, typer.Option(help="Dataset folder, folder of micrographs, or one micrograph.")],
    split: Split = "train",
    runtime: Annotated[
        Literal["tensorrt", "onnxruntime"],
        typer.Option(help="tensorrt: symmetric Q/DQ with FP16 around it; onnxruntime: what its CPU kernels run fast."),
    ] = "tensorrt",
    precision: Annotated[
        LowPrecision, typer.Option(help="fp8: E4M3, for TensorRT on Ada, Hopper, Blackwell.")
    ] = "int8",
    method: Annotated[
        Literal["max", "percentile", "entropy", "mse", "auto"],
        typer.Option(help="How ranges are taken from the values seen; auto: the one closest to FP32."),
    ] = "max",
    max_images: Annotated[int, typer.Option(min=1, help="Micrographs to measure ranges on.")] = 64,
    min_agreement: Annotated[
        float, typer.Option(min=0, max=1, help="Refuse a result that agrees with FP32 on fewer pixels than this.")
    ] = 0.9,
    under_shift: Annotated[
        bool, typer.Option(help="Measure and judge also at other contrast, brightness, gamma, dose and magnification.")
    ] = True,
    cache: Annotated[bool, typer.Option(help="Keep what was measured, so that an interrupted run goes on.")] = True,
) -> None:
    """Measure activation ranges on micrographs and write an INT8 (or FP8) model."""
    from hpddrnet_trt.data.datasets import find_images
    from hpddrnet_trt.export.calibrate import CalibrationSettings
    from hpddrnet_trt.export.calibrate import calibrate as run_calibration

    settings = CalibrationSettings(
        runtime, precision, method, max_images=max_images, min_agreement=min_agreement, under_shift=under_shift,
        cache="user" if cache else None,
    )  # fmt: skip
    manifest = run_calibration(locate(model, ".onnx"), target, find_images(data, split), settings)
    if manifest.calibration is not None:
        typer.echo(f"calibrated on {manifest.calibration.images} images ({manifest.calibration.method})")
    echo_evidence(manifest)
    typer.echo(f"written: {target}")


@dataclass(frozen=True)
class StudyOptions:
    """What candidates are calibrated and judged on."""

    data: Data
    split: Annotated[str, typer.Option(help="Split of the dataset that candidates are judged on.")] = "val"
    precision: Annotated[LowPrecision, typer.Option(help="The low precision.")] = "int8"
    calibration_data: Annotated[
        Path | None, typer.Option("--calib", help="Micrographs to calibrate on; default: the dataset's training split.")
    ] = None
    method: Method = "max"
    max_images: Annotated[int, typer.Option(min=1, help="Micrographs to calibrate on.")] = 64
    size: Annotated[str | None, typer.Option(help="Calibration crops, e.g. 512x512; default: as the images.")] = None
    reference: Annotated[
        Path | None, typer.Option(help="Checkpoint or FP32 ONNX file to compare with; default: found beside MODEL.")
    ] = None
    resume: Annotated[bool, typer.Option(help="Go on from what an interrupted run has measured.")] = True

    def settings(self, under_shift: bool, frame: str | None = None) -> StudySettings:
        """The same for the study; ``frame``: height and width that operations are counted for."""
        from hpddrnet_trt.accuracy.candidates import StudySettings
        from hpddrnet_trt.data.datasets import find_images

        calibration = self.calibration_data
        return StudySettings(
            self.data, self.split, self.precision, None if calibration is None else find_images(calibration, "train"),
            self.method, self.max_images, size=None if self.size is None else parse_size(self.size),
            frame=None if frame is None else parse_size(frame), reference=self.reference, resume=self.resume,
            under_shift=under_shift,
        )  # fmt: skip


@dataclass(frozen=True)
class CostOptions:
    """What the time of layers is estimated from."""

    device: Annotated[
        str, typer.Option(help="Whose data sheet layer times are estimated from: l4, agx-orin, h200.")
    ] = "l4"
    frame: Annotated[
        str | None, typer.Option(help="Frame that times are estimated for, e.g. 1024x1024; default: as the crops.")
    ] = None
    layer_times: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Layer times measured on a GPU instead: of the INT8 and of the FP16 engine (`inspect`)."),
    ] = None


@dataclass(frozen=True)
class BudgetOptions:
    """Limits on what a precision may cost."""

    max_miou_drop: Annotated[
        float | None, typer.Option(help="Budget: percentage points of masked mIoU that may be lost against FP32.")
    ] = None
    min_agreement: Annotated[
        float | None, typer.Option(help="Budget: smallest share of pixels labelled as FP32, 0..1.")
    ] = None
    under_shift: Annotated[
        bool,
        typer.Option(
            "--under-shift", help="Ask --min-agreement also at other contrast, brightness, gamma, dose, magnification."
        ),
    ] = False

    def budget(self) -> Budget:
        """Both limits; :class:`UsageError` where there is none."""
        from hpddrnet_trt.accuracy.acceptance import Budget

        if self.under_shift and self.min_agreement is None:
            raise UsageError("--under-shift asks for agreement with FP32; say how much with --min-agreement")
        return Budget(self.max_miou_drop, self.min_agreement)


@command(PANEL, "choose-precision model.onnx mixed.onnx --data DATASET --max-miou-drop 0.1")
def choose_precision(
    model: Annotated[Path, typer.Argument(help="FP32 ONNX file written by export, or a shipped model's name.")],
    options: StudyOptions,
    budget: BudgetOptions,
    cost: CostOptions,
    target: Annotated[Path | None, typer.Argument(help="ONNX file to write; left out with --study.")] = None,
    study: Annotated[
        bool,
        typer.Option(
            "--study",
            help="Write no file: print what every precision does to the accuracy, and which layers lose most.",
        ),
    ] = False,
    by: Annotated[Literal["layer", "block"], typer.Option(help="With --study: what is quantised at a time.")] = "layer",
    frontier: Annotated[bool, typer.Option(help="Measure the frontier even where quantising everything does.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw the frontier or study to this file (.png).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Write the fastest INT8 (or FP8) file, with layers in FP16 where needed, that keeps an accuracy budget."""
    _check_outputs(plot, json_file)
    if study:
        if target is not None:
            raise UsageError(f"--study writes no file; leave {target} or --study out")
        _study(model, options.settings(budget.under_shift), by, plot, json_file)
    elif target is None:
        raise UsageError("nothing says where to write; name an ONNX file, or give --study to look only")
    else:
        settings = options.settings(budget.under_shift, cost.frame)
        _choose(model, target, settings, budget.budget(), cost, frontier, plot, json_file)


def _study(
    model: Path, settings: StudySettings, by: Literal["layer", "block"], plot: Path | None, json_file: Path | None
) -> None:
    from hpddrnet_trt.accuracy.candidates import open_study, precision_table
    from hpddrnet_trt.accuracy.search import analyze
    from hpddrnet_trt.report.precision import draw_sensitivity

    with open_study(locate(model, ".onnx"), settings) as opened:
        table = precision_table(opened)
        typer.echo(table.text())
        sensitivities = analyze(opened.cache, by=by, operations=opened.shares)
    typer.echo(f"\n{sensitivities.text()}")
    if plot is not None:
        typer.echo(f"written: {draw_sensitivity(sensitivities, plot)}")
    write_json(json_file, {"precisions": table.record(), "sensitivity": sensitivities.record()})


def _choose(
    model: Path, target: Path, settings: StudySettings, budget: Budget, cost: CostOptions, frontier: bool,
    plot: Path | None, json_file: Path | None,
) -> None:  # fmt: skip
    from hpddrnet_trt.accuracy.candidates import open_study
    from hpddrnet_trt.accuracy.cost import check_device, cost_model
    from hpddrnet_trt.accuracy.search import choose_precision
    from hpddrnet_trt.report.precision import draw_frontier

    check_device(cost.device, settings.precision)
    _check_target(model, target)
    with open_study(locate(model, ".onnx"), settings) as study:
        costs = cost_model(study.cache.config, study.operations, device=cost.device, layer_times=cost.layer_times)
        choice = choose_precision(
            study.cache, target, budget, costs, calibration=study.calibration, always_search=frontier
        )
    typer.echo(choice.text())
    if choice.frontier is not None:
        if plot is not None:
            typer.echo(f"written: {draw_frontier(choice.frontier, plot)}")
        write_json(json_file, choice.frontier.record())
    elif plot is not None or json_file is not None:
        typer.echo("no picture and no figures: everything in low precision keeps the budget; --frontier measures more")
    typer.echo(f"written: {target}")


@dataclass(frozen=True)
class AcceptanceOptions(BudgetOptions):
    """Whether the engine is written at all."""

    verify: Annotated[
        Path | None, typer.Option(help="Dataset: refuse the engine unless it keeps the budget on it.")
    ] = None
    verify_split: Annotated[str, typer.Option(help="Split that --verify judges on.")] = "test"
    reference: Annotated[
        Path | None, typer.Option(help="Checkpoint or FP32 ONNX file for --verify; default: found beside MODEL.")
    ] = None

    def check(self, device: int) -> AcceptanceCheck | None:
        """None without --verify; :class:`UsageError` for one without the other. ``device``: GPU that runs engines."""
        from hpddrnet_trt.accuracy.acceptance import AcceptanceCheck

        if self.verify is not None:
            return AcceptanceCheck(
                self.verify, self.budget(), self.verify_split, self.reference, device, self.under_shift
            )
        if self.max_miou_drop is not None or self.min_agreement is not None or self.under_shift:
            raise UsageError(
                "a budget is checked on a dataset: give --verify DATA with --max-miou-drop or --min-agreement"
            )
        return None


@dataclass(frozen=True)
class BuilderOptions:
    """What TensorRT's builder is told."""

    timing_cache: Annotated[
        Path | None,
        typer.Option(help="File that keeps kernel timings between builds (default: in your cache folder), or none."),
    ] = None
    compute_capabilities: Annotated[
        list[str] | None,
        typer.Option("--compute-capability", help="Target GPU, e.g. 8.9; repeat for several (TensorRT-RTX)."),
    ] = None
    workspace_mib: Annotated[int | None, typer.Option(min=1, help="Memory limit of tactics, in MiB.")] = None
    optimization_level: Annotated[int | None, typer.Option(min=0, max=5, help="Builder effort.")] = None
    tiling: Annotated[
        Literal["none", "fast", "moderate", "full"] | None, typer.Option(help="How hard to search for tiled kernels.")
    ] = None
    sparsity: Annotated[
        bool, typer.Option("--sparsity", help="Use kernels for 2:4 sparse weights where the weights are.")
    ] = False
    max_aux_streams: Annotated[
        int | None, typer.Option(min=0, help="CUDA streams for branches beside the engine's own.")
    ] = None
    version_compatible: Annotated[
        bool, typer.Option(help="Let later TensorRT versions, and its lean runtime, run the engine.")
    ] = False
    hardware_compatible: Annotated[
        Literal["ampere-plus", "same-compute-capability"] | None,
        typer.Option(help="Let other GPUs run it: of compute capability 8.0 and later, or of this one's (TensorRT)."),
    ] = None
    for_windows: Annotated[bool, typer.Option("--for-windows", help="For TensorRT on Windows, built on Linux.")] = False
    refittable: Annotated[bool, typer.Option("--refittable", help="Let `refit` give it other weights.")] = False
    stripped: Annotated[bool, typer.Option("--stripped", help="Write it without weights; `refit` adds them.")] = False
    device: Annotated[int, typer.Option(min=0, help="Number of the GPU to build on.")] = 0
    tf32: Annotated[
        bool, typer.Option("--tf32", help="Let FP32 layers round to TF32: position attention loses labels by it.")
    ] = False

    def settings(self) -> BuildSettings:
        """The same for the builder."""
        from hpddrnet_trt.export.build_settings import BuildSettings
        from hpddrnet_trt.export.statistics_cache import Cache

        timings: Cache = self.timing_cache or "user"
        if timings == Path("none"):
            timings = None
        return BuildSettings(**{**asdict(self), "timing_cache": timings})


@command(PANEL, "build model.int8.onnx --precision int8 --verify DATASET --max-miou-drop 0.3")
def build(
    model: OnnxFile,
    acceptance: AcceptanceOptions,
    builder: BuilderOptions,
    precision: Annotated[
        Literal[Precision, "auto"],
        typer.Option(help="Precision of the engine; auto: the fastest that keeps the budget, from an FP32 file."),
    ] = "fp16",
    runtime: Annotated[
        Literal["auto", "tensorrt", "tensorrt-rtx"],
        typer.Option(help="auto: TensorRT where it and a GPU are, else TensorRT-RTX (builds without a GPU)."),
    ] = "auto",
    shapes: Annotated[
        str | None,
        typer.Option(help="Optimization profiles MIN:OPT:MAX, e.g. 1x1x512x512:4x1x1024x1024:8x1x2048x2048."),
    ] = None,
    output: EngineTarget = None,
    calibration_data: CalibrationData = None,
) -> None:
    """Build a TensorRT engine, prove its precision and write it with its description.

    With --verify it is written only if it keeps the accuracy asked for; where no GPU runs it, the
    very ONNX file it was built from is judged on the CPU instead, and the description says so.
    """
    from hpddrnet_trt.accuracy.acceptance import WHAT
    from hpddrnet_trt.accuracy.build import build_verified
    from hpddrnet_trt.export.layer_precision import summary

    check = acceptance.check(builder.device)
    target = output or model.with_name(f"{_plain_stem(model)}.{precision}.engine")
    manifest = build_verified(
        locate(model, ".onnx"), target, precision=precision, acceptance=check, calibration_images=calibration_data,
        runtime=runtime, shapes=shapes, settings=builder.settings(),
    )  # fmt: skip
    if manifest.engine is not None:
        typer.echo(summary(manifest.engine.layer_precision))
        if manifest.validation and manifest.validation[-1].what == WHAT:
            echo_evidence(manifest)
        typer.echo(f"written: {target} ({megabytes(manifest.engine.bytes)}, {manifest.engine.build_seconds:.1f} s)")


@command(PANEL, "refit model.int8.engine retrained.int8.onnx")
def refit(
    engine: Annotated[Path, typer.Argument(help="Engine built with --refittable, or --stripped.")],
    model: OnnxFile,
    output: EngineTarget = None,
    calibration_data: CalibrationData = None,
    device: Annotated[int, typer.Option(min=0, help="Number of the GPU.")] = 0,
) -> None:
    """Write an engine with the weights of another ONNX file of the same network: retrained, or left out before.

    An engine that is stripped and not refittable takes back only the weights that it was built with.
    Kernels stay as they were chosen; nothing is built. Its accuracy is another network's: judge it with `evaluate`.
    """
    from hpddrnet_trt.core.manifest import read_manifest
    from hpddrnet_trt.export.refit import refit_engine

    target = output or model.with_name(f"{_plain_stem(model)}.{read_manifest(engine).precision}.engine")
    refit_engine(engine, locate(model, ".onnx"), target, calibration_images=calibration_data, device=device)
    typer.echo(f"written: {target}")


def _plain_stem(model: Path) -> str:
    """A file's name without ending and precision: ``model.int8.onnx`` -> ``model``."""
    stem, _, last = model.stem.rpartition(".")
    return stem if stem and last in PRECISIONS else model.stem


@command(PANEL, "inspect model.int8.engine --layers")
def inspect(
    model: ModelFile,
    layers: Annotated[
        bool, typer.Option("--layers", help="Also every convolution, and every layer of an engine, conversions marked.")
    ] = False,
    graph: Annotated[Path | None, typer.Option(help="Draw an engine's layers into this file, .svg.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole description as JSON.")] = False,
    layer_times: Annotated[
        Path | None,
        typer.Option(help="Instead time each layer of an engine on this GPU, into this file, for choose-precision."),
    ] = None,
    size: Annotated[str, typer.Option(help="Frame for --layer-times, e.g. 1024x1024.")] = "1024x1024",
) -> None:
    """Print what a model file says about itself: contract, precision by layer, calibration, evidence."""
    from hpddrnet_trt.core.manifest import read_manifest
    from hpddrnet_trt.engines.engine_file import engine_record, verified_content
    from hpddrnet_trt.engines.tensorrt import write_layer_times
    from hpddrnet_trt.export.describe import describe

    file = locate(model)
    if layer_times is not None:
        typer.echo(f"written: {write_layer_times(file, layer_times, parse_size(size))}")
        return
    manifest = read_manifest(file)
    if manifest.engine is not None:
        verified_content(file, manifest.engine)  # a damaged file is not what its description says
    if graph is not None:
        from hpddrnet_trt.report.engine_graph import draw_graph

        typer.echo(f"written: {draw_graph(engine_record(file, manifest), graph, file.name)}")
        return
    typer.echo(manifest.to_json() if as_json else describe(manifest, file, layers=layers))


def echo_evidence(manifest: Manifest) -> None:
    """Print the last comparison with the reference."""
    if manifest.validation:
        last = manifest.validation[-1]
        typer.echo(f"{last.what}, {last.images} images ({last.source}; {last.runtime}):")
        for name, value in last.values.items():
            typer.echo(f"  {name:<28} {value:.6g}")


def _check_outputs(plot: Path | None, json_file: Path | None) -> None:
    """Before minutes are spent on what they shall hold."""
    if plot is not None and plot.suffix.lower() != ".png":
        raise UsageError(f"the picture {plot} must end with .png; write {plot.with_suffix('.png')}")
    for path in (plot, json_file):
        if path is not None:
            _check_place(path)


def _check_place(path: Path) -> None:
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name the file to write in it")
    check_writable(path.parent)


def _check_target(model: Path, target: Path) -> None:
    """The same for the ONNX file; the FP32 file itself stays."""
    from hpddrnet_trt.graph.model import check_target

    _check_place(target)
    check_target(locate(model, ".onnx"), target)
