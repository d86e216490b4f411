"""ONNX file -> TensorRT engine file with its description and the proof of its precision."""

from __future__ import annotations

import hashlib
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError
from hpddrnet_trt.core.files import atomic_path, existing_file
from hpddrnet_trt.core.manifest import (
    EngineRecord,
    InputContract,
    Manifest,
    ValidationRecord,
    read_manifest,
    sidecar_path,
)
from hpddrnet_trt.core.precisions import PRECISIONS, Half, LowPrecision, Precision
from hpddrnet_trt.core.progress import progress_bar
from hpddrnet_trt.core.text import megabytes
from hpddrnet_trt.data.datasets import find_images
from hpddrnet_trt.engines.cuda import Gpu, current_device, find_gpu, gpu_or_none
from hpddrnet_trt.engines.profiles import Profile, default_profiles, is_static, narrowed, parse_shapes
from hpddrnet_trt.engines.tensorrt_library import (
    INPUT,
    PORTABLE,
    TensorRT,
    choose_tensorrt,
    progress_monitor,
    readable,
    run_cancellable,
)
from hpddrnet_trt.export.build_settings import BuildSettings
from hpddrnet_trt.export.layer_precision import (
    check_report,
    check_sizes,
    reformats_from_inspector,
    report_from_inspector,
    report_from_network,
    summary,
)
from hpddrnet_trt.graph.attention import in_type, uses_bf16
from hpddrnet_trt.graph.check import check_onnx
from hpddrnet_trt.graph.model import load_model, save_model
from hpddrnet_trt.graph.nodes import fold_constants

if TYPE_CHECKING:
    import tensorrt as trt

logger = logging.getLogger(__name__)

# Runs a candidate (an engine, or the ONNX file it was built from) and returns what it found, or raises
# UserError: then nothing is written.
Accept = Callable[[Path], ValidationRecord]


DEFAULTS = BuildSettings()


def build_engine(
    source_onnx: str | Path,
    target: str | Path,
    *,
    precision: Precision,
    runtime: str = "auto",
    shapes: str | None = None,
    calibration_images: str | Path | Sequence[Path] | None = None,
    settings: BuildSettings = DEFAULTS,
    accept: Accept | None = None,
) -> Manifest:
    """Build ``target`` (ending ``.engine``) and the description beside it (``.engine.json``).

    ``precision`` lives in the ONNX file: ``fp32`` takes an FP32 file; ``fp16`` and ``bf16`` a file typed
    so, or an FP32 file, which is converted first; ``int8`` and ``fp8`` a file calibrated for TensorRT,
    or an FP32 file with ``calibration_images`` (dataset, folder or files; with ``fp16`` its ranges are
    checked on them). ``runtime``: ``auto``, ``tensorrt`` (needs the GPU it builds for) or ``tensorrt-rtx``
    (builds without one). ``shapes``: see :mod:`hpddrnet_trt.engines.profiles`; needless for a static ONNX
    file. ``accept`` judges the result (:mod:`hpddrnet_trt.accuracy.acceptance`): the engine where this
    machine's GPU runs it, else the very ONNX file it was built from.

    The engine must prove its precision (:mod:`hpddrnet_trt.export.layer_precision`). Both files are written at
    the end, whole or not at all. Returns the engine's :class:`Manifest`. Raises :class:`UsageError`,
    :class:`BadInputFile`, :class:`NoGpu`, :class:`MissingDependency` or :class:`UserError`.
    """
    source, target = Path(source_onnx), Path(target)
    manifest = check_build(source, target, precision, calibration_images)
    api = choose_tensorrt(runtime)
    settings.check(api)
    gpu = gpu_or_none(settings.device) if api.is_rtx else find_gpu(settings.device)
    profiles = _profiles(source, manifest, shapes)
    lacks_bf16 = _lacks_bf16(settings, api, gpu)
    with typed_file(source, manifest, precision, calibration_images, lacks_bf16=lacks_bf16) as (path, ready):
        job = _Job(api, path, source, ready, profiles, settings, gpu, accept)
        return job.build(target, precision)


def check_build(
    source: Path, target: Path, precision: Precision, images: str | Path | Sequence[Path] | None = None
) -> Manifest:
    """The description of ``source``, where an engine of this precision can be made of it; else raises as the build."""
    existing_file(source, "ONNX file")
    if source.suffix.lower() != ".onnx":
        raise UsageError(f"{source} is not an ONNX file; engines are built from the .onnx file of the export")
    if target.suffix != ".engine":
        raise UsageError(f"the engine file {target} must end with .engine; write {target.with_suffix('.engine')}")
    if precision not in get_args(Precision):
        raise UsageError(f"precision {precision!r} is unknown; choose {', '.join(get_args(Precision))}")
    manifest = read_manifest(source)
    check_onnx(source, "types")
    if manifest.input is None or manifest.output is None or manifest.precision is None:
        raise BadInputFile(f"{source} does not describe its input, output and precision; export it again")
    _check_precision(source, manifest, precision, images)
    return manifest


def _contract(manifest: Manifest) -> InputContract:
    assert manifest.input is not None  # check_build has looked
    return manifest.input


def _profiles(source: Path, manifest: Manifest, shapes: str | None) -> list[Profile]:
    contract = _contract(manifest)
    if shapes is not None:
        return parse_shapes(shapes, contract)
    profiles = default_profiles(contract)
    if not is_static(contract):
        logger.warning("%s has a dynamic input and no --shapes was given: building for %s", source.name, profiles[0])
    return profiles


@contextmanager
def typed_file(
    source: Path,
    manifest: Manifest,
    precision: Precision,
    images: str | Path | Sequence[Path] | None,
    *,
    lacks_bf16: bool,
) -> Iterator[tuple[Path, Manifest]]:
    """The file that the parser reads, and its description: ``source`` in ``precision``, attention as the GPU has it."""
    with ExitStack() as stack:
        path, ready = stack.enter_context(_in_precision(source, manifest, precision, images))
        if lacks_bf16:
            path = stack.enter_context(_with_fp32_scores(path, ready))
        yield path, ready


@contextmanager
def _in_precision(
    source: Path, manifest: Manifest, precision: Precision, images: str | Path | Sequence[Path] | None
) -> Iterator[tuple[Path, Manifest]]:
    """The ONNX file in the precision asked for, converted or calibrated into a temporary file if need be."""
    if manifest.precision == precision:
        with _without_stored_casts(source, manifest) as path:
            yield path, manifest
        return
    micrographs = [] if images is None else find_images(images)
    with tempfile.TemporaryDirectory(prefix="hpddrnet-trt-") as folder:
        path = Path(folder) / f"{source.stem}.{precision}.onnx"
        if precision in get_args(Half):
            from hpddrnet_trt.export.convert import convert_precision

            yield path, convert_precision(source, path, cast(Half, precision), images=micrographs)
        else:
            from hpddrnet_trt.export.calibrate import CalibrationSettings, calibrate

            low = cast(LowPrecision, precision)  # FP32 files are taken as they are
            yield path, calibrate(source, path, micrographs, CalibrationSettings(precision=low))


@contextmanager
def _without_stored_casts(source: Path, manifest: Manifest) -> Iterator[Path]:
    """The file itself, or, if it stores weights in FP16 behind casts to FP32, a temporary one that stores FP32.

    A kernel behind a cast is no constant for TensorRT's parser but a second input of its convolution.
    """
    model, _ = load_model(source)
    stored = {entry.name for entry in model.graph.initializer}
    if not any(node.op_type == "Cast" and node.input[0] in stored for node in model.graph.node):
        yield source
        return
    fold_constants(model.graph)
    with tempfile.TemporaryDirectory(prefix="hpddrnet-trt-") as folder:
        yield save_model(model, Path(folder) / source.name, manifest)


def _lacks_bf16(settings: BuildSettings, api: TensorRT, gpu: Gpu | None) -> bool:
    """Whether one of the GPUs that the engine is for does not compute in BF16."""
    targets = settings.compute_capabilities or ()
    if not api.is_rtx and gpu is not None:
        targets = [gpu.compute_capability]
    return without_bf16(targets)


def without_bf16(compute_capabilities: Iterable[str]) -> bool:
    """Whether one of these GPUs does not compute in BF16."""
    return any(_older(written, PRECISIONS["bf16"].least_compute_capability) for written in compute_capabilities)


def _older(capability: str, least: str) -> bool:
    return float(capability) < float(least)


@contextmanager
def _with_fp32_scores(path: Path, manifest: Manifest) -> Iterator[Path]:
    """The file itself, or, if its position attention is BF16, a temporary one where scores are FP32."""
    model, _ = load_model(path)
    if manifest.precision == "bf16" or not uses_bf16(model):
        yield path  # a BF16 file is BF16 throughout: the builder says so
        return
    logger.warning(
        "position attention is built with FP32 scores, because a GPU older than compute capability %s has no BF16: "
        "its memory grows with the square of the number of pixels there", PRECISIONS["bf16"].least_compute_capability,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="hpddrnet-trt-") as folder:
        yield save_model(in_type(model, "fp32"), Path(folder) / path.name, manifest)


def _check_precision(
    source: Path, manifest: Manifest, precision: Precision, images: str | Path | Sequence[Path] | None
) -> None:
    has = manifest.precision
    if manifest.quantized_for == "onnxruntime":
        raise UsageError(
            f"{source} was quantised for ONNX Runtime on a CPU, which TensorRT does not run; calibrate the FP32 file "
            "for TensorRT: hpddrnet-trt calibrate MODEL.onnx MODEL.int8.onnx --data FOLDER --runtime tensorrt"
        )
    if PRECISIONS[precision].calibrated and has == "fp32" and images is None:
        raise UsageError(
            f"{source} is FP32 and {precision.upper()} needs calibration on micrographs; run: hpddrnet-trt calibrate "
            f"{source.name} {source.stem}.{precision}.onnx --data FOLDER, or give the micrographs here"
        )
    if images is not None and (has != "fp32" or precision == "fp32"):
        raise UsageError(
            f"calibration images turn an FP32 file into a lower precision, but {source} is {str(has).upper()} and "
            f"{precision.upper()} was asked for; leave the images out"
        )
    if has not in ("fp32", precision):
        raise UsageError(
            f"{source} is {str(has).upper()}, {precision.upper()} was asked for; "
            f"give the FP32 file or choose --precision {has}"
        )


@dataclass(frozen=True)
class _Job:
    """One build: ``path`` is parsed, ``source`` is what the user named."""

    api: TensorRT
    path: Path
    source: Path
    manifest: Manifest
    profiles: list[Profile]
    settings: BuildSettings
    gpu: Gpu | None
    accept: Accept | None = None

    def build(self, target: Path, precision: Precision) -> Manifest:
        """Parse, prove, build, prove again where a GPU is, write both files."""
        self.api.log.clear()
        with self.on_gpu:
            builder = self.api.module.Builder(self.api.log)
        network = self._parse(builder)
        label = f"the engine of {self.source.name}"
        try:
            report = report_from_network(self.api.module, network, self.profiles[0].optimum)
            for profile in self.profiles:
                check_sizes(self.api.module, network, profile.maximum)
        except RuntimeError as exc:  # a shape that the library asks for only now, and does not find
            reason = self.api.log.explain(str(exc))
            raise BadInputFile(f"{self.api.label} cannot read {self.source}: {reason}; export the model again") from exc
        check_report(report, precision, label)
        config = self._configure(builder)
        started = time.perf_counter()
        plan = memoryview(self._run(builder, network, config))
        seconds = time.perf_counter() - started
        self.settings.keep_timings(self.api, config)
        activations = self._activation_bytes()  # before the log is cleared
        runs_here = False
        if self.gpu is not None and self.settings.runs_here:
            with self.on_gpu:
                runs_here, report = self._inspected(plan, report)
            check_report(report, precision, label)
        described = self._describe(plan, report, seconds, precision, activations)
        manifest = self._accepted(plan, described, runs_here=runs_here)
        write_engine(target, plan, manifest)
        logger.info("%s: %s in %.1f s; %s", target, megabytes(plan.nbytes), seconds, summary(report))
        return manifest

    def _parse(self, builder: trt.Builder) -> trt.INetworkDefinition:
        trt = self.api.module
        # TensorRT 10 needs to be told to type strongly; later libraries always do and ignore the flag.
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self.api.log)
        if not parser.parse_from_file(str(self.path)):
            reason = parser_reason(self.api, parser)
            raise BadInputFile(f"{self.api.label} cannot read {self.source}: {reason}; export the model again")
        if network.num_inputs != 1 or network.get_input(0).name != INPUT:
            names = [network.get_input(index).name for index in range(network.num_inputs)]
            raise BadInputFile(f"{self.source} has the inputs {names} instead of [{INPUT!r}]; export the model again")
        return network

    def _configure(self, builder: trt.Builder) -> trt.IBuilderConfig:
        config = builder.create_builder_config()
        self.settings.apply(self.api, config)
        for profile in self.profiles:
            entry = builder.create_optimization_profile()
            entry.set_shape(INPUT, profile.minimum, profile.optimum, profile.maximum)
            if config.add_optimization_profile(entry) < 0:
                reason = self.api.log.explain("no reason given")
                raise UserError(f"{self.api.label} refuses the profile {profile}: {reason}")
        return config

    def _run(
        self, builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig
    ) -> trt.IHostMemory:
        """Build with a progress bar; Ctrl-C ends the build at its next step."""
        cancel = threading.Event()

        def work() -> trt.IHostMemory | None:
            with self.on_gpu:  # of this thread
                return builder.build_serialized_network(network, config)

        with progress_bar(desc=f"building {self.source.stem}", unit="step", show=self.settings.progress) as bar:
            monitor = progress_monitor(self.api.module, bar, cancel.is_set)
            config.progress_monitor = monitor
            plan = run_cancellable(work, cancel)
            config.progress_monitor = None
        if plan is None:
            raise UserError(
                f"{self.api.label} could not build {self.source}: {self.api.log.explain('no reason given')}"
                f"{self._build_advice()}"
            )
        return plan

    def _build_advice(self) -> str:
        if self.manifest.attention == "attention-op":
            return "; export the model again with attention as MatMul, which every TensorRT builds"
        precision = str(self.manifest.precision)
        least = PRECISIONS[precision].least_compute_capability
        if any(_older(written, least) for written in self.settings.compute_capabilities or ()):
            kind = precision.upper()
            return f"; {kind} runs on compute capability {least} and later: leave older out, or choose INT8 or FP16"
        if self.api.is_rtx and _lacks_bf16(self.settings, self.api, self.gpu):
            return (
                "; TensorRT-RTX has no FP32 matrix products for GPUs older than compute capability 8.0, which position "
                "attention needs there: build with TensorRT 10 on that GPU"
            )
        if self.settings.workspace_mib is not None:
            return f"; the workspace limit of {self.settings.workspace_mib} MiB may be too small"
        return ""

    def _inspected(self, plan: memoryview, parsed: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
        """Whether this GPU runs the engine, and proof from the inspector (the parsed one, with a remark, if not)."""
        trt = self.api.module
        self.api.log.clear()
        engine = self.api.runtime(host_code=self.settings.version_compatible).deserialize_cuda_engine(plan)
        context = self.api.create_context(engine) if engine is not None else None
        if engine is None or context is None:
            reason = self.api.log.explain("no reason given")
            if not self.api.is_rtx:  # built for this very GPU
                raise UserError(f"{self.api.label} cannot load the engine it has just built: {reason}")
            return False, {**parsed, "remark": f"the engine cannot be loaded on this GPU: {reason}"}
        context.set_input_shape(INPUT, self.profiles[0].optimum)
        inspector = engine.create_engine_inspector()
        inspector.execution_context = context  # types depend on the shape where it is dynamic
        information = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        return True, {
            **report_from_inspector(information, parsed), "reformats": reformats_from_inspector(information)
        }  # fmt: skip

    @property
    def on_gpu(self) -> AbstractContextManager[None]:
        """Within, the GPU to build on is the current one of the thread."""
        return nullcontext() if self.gpu is None else current_device(self.gpu.index)

    def _accepted(self, plan: memoryview, manifest: Manifest, *, runs_here: bool) -> Manifest:
        """The description with the evidence of whoever accepts the result."""
        if self.accept is None:
            return manifest
        if not runs_here:
            evidence = self._accepted_as_onnx(self.accept, manifest)
            logger.warning(
                "no GPU here runs this engine: its accuracy was verified on the ONNX file it was built from (%s)",
                evidence.runtime,
            )
        else:
            with tempfile.TemporaryDirectory(prefix="hpddrnet-trt-") as folder:
                candidate = Path(folder) / f"{self.path.stem}.engine"
                candidate.write_bytes(plan)
                sidecar_path(candidate).write_text(manifest.to_json(), encoding="utf-8")
                evidence = self.accept(candidate)
        return manifest.replace(validation=[*manifest.validation, evidence])

    def _accepted_as_onnx(self, accept: Accept, manifest: Manifest) -> ValidationRecord:
        """Whoever accepts sees the ONNX file with the engine's contract: what the engine cannot take, it cannot."""
        model, described = load_model(self.path)
        with tempfile.TemporaryDirectory(prefix="hpddrnet-trt-") as folder:
            candidate = Path(folder) / self.path.name
            save_model(model, candidate, described.replace(input=manifest.input))
            return accept(candidate)

    def _activation_bytes(self) -> int | None:
        """What the builder's log says, where it can be believed: with one fixed shape (see :class:`EngineRecord`)."""
        static = len(self.profiles) == 1 and self.profiles[0].minimum == self.profiles[0].maximum
        return self.api.log.activation_bytes if static else None

    def _describe(
        self, plan: memoryview, report: dict[str, Any], seconds: float, precision: Precision, activations: int | None
    ) -> Manifest:
        api = self.api
        if api.is_rtx or self.settings.hardware_compatible == "ampere-plus":
            targets = list(dict.fromkeys(self.settings.compute_capabilities or [PORTABLE]))
        else:
            targets = [self.gpu.compute_capability] if self.gpu is not None else []
        record = EngineRecord(
            runtime=api.name,
            version=api.version,
            compute_capabilities=targets,
            gpu=self.gpu.name if self.gpu is not None else None,
            profiles=[profile.as_record() for profile in self.profiles],
            sha256=hashlib.sha256(plan).hexdigest(),
            bytes=plan.nbytes,
            layer_precision=report,
            build_seconds=round(seconds, 3),
            version_compatible=self.settings.version_compatible,
            refittable=self.settings.refittable,
            stripped=self.settings.stripped,
            weights_sha256=weights_checksum(self.path) if self.settings.stripped else None,
            platform="windows" if self.settings.for_windows else None,
            source=self.source.name,
            settings=self.settings.record(),
            activation_bytes=activations,
        )
        return self.manifest.replace(
            input=narrowed(_contract(self.manifest), self.profiles),
            precision=precision,
            engine=record,
            versions={**self.manifest.versions, api.name: api.version},
        )


def weights_checksum(path: Path) -> str:
    """SHA-256 of an ONNX file's constants with their names, whatever else the file says."""
    digest = hashlib.sha256()
    for entry in sorted(load_model(path)[0].graph.initializer, key=lambda entry: str(entry.name)):
        digest.update(entry.SerializeToString(deterministic=True))
    return digest.hexdigest()


def write_engine(target: Path, plan: memoryview, manifest: Manifest) -> None:
    """The engine and its description, both whole or neither."""
    with atomic_path(target) as engine_file, atomic_path(sidecar_path(target)) as description:
        engine_file.write_bytes(plan)
        description.write_text(manifest.to_json(), encoding="utf-8")


def parser_reason(api: TensorRT, parser: trt.OnnxParser | trt.OnnxParserRefitter) -> str:
    """Why an ONNX parser, or a refitter's, has given up."""
    errors = [parser.get_error(index) for index in range(min(parser.num_errors, 3))]
    return "; ".join(_parser_message(error) for error in errors) or api.log.explain("no reason given")


def _parser_message(error: trt.ParserError) -> str:
    says = readable(error.desc()).rstrip(".")[:400]
    where = f" in {error.node_operator()} {error.node_name()[:100]}" if error.node_operator() else ""
    return f"{says}{where}"
