"""INT8 and FP8: calibrate an exported FP32 model on micrographs and write a quantised ONNX file.

Two forms, because two runtimes want different graphs (:mod:`hpddrnet_trt.graph.qdq`):

* ``tensorrt``: explicit symmetric INT8 (or FP8) around convolutions, the rest typed FP16;
* ``onnxruntime``: uint8 activations and int8 weights for the CPU kernels, the rest FP32.

The file is run and compared with the FP32 one on images that were not calibrated on, before it is
written.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.core.manifest import CalibrationRecord, Manifest, ValidationRecord
from hpddrnet_trt.core.metrics import LabelComparison
from hpddrnet_trt.core.precisions import PRECISIONS, LowPrecision
from hpddrnet_trt.core.progress import progress_bar
from hpddrnet_trt.core.runtimes import load_onnxruntime
from hpddrnet_trt.data.intensity import range_of
from hpddrnet_trt.engines.base import input_contract
from hpddrnet_trt.engines.onnxruntime import OnnxRuntimeEngine
from hpddrnet_trt.export import images as micrographs
from hpddrnet_trt.export.histograms import merge
from hpddrnet_trt.export.ranges import METHODS, Method, ranges_of
from hpddrnet_trt.export.statistics import measure
from hpddrnet_trt.export.statistics_cache import Cache
from hpddrnet_trt.graph import qdq
from hpddrnet_trt.graph.lint import analyze
from hpddrnet_trt.graph.model import check_target, load_model, save_model
from hpddrnet_trt.graph.nodes import fold_constants, name_nodes
from hpddrnet_trt.graph.precision import to_half

logger = logging.getLogger(__name__)

MAX_IMAGES = 64
MIN_AGREEMENT = 0.9  # a sound calibration of a trained network reaches 0.99; a broken one falls far below
METHODS_TRIED = "calibration methods: mean IoU of their labels against the FP32 ONNX file"
_HELD_OUT_CROPS = 16
_CLASS_IOU = "iou_against_fp32/"  # evidence: this and the class name
_WORRYING_IOU = 0.8  # a class that loses this much to quantisation is worth a warning, however few its pixels


@dataclass(frozen=True)
class _Data:
    """The crops of one calibration: those that give ranges, and those it is judged on."""

    images: list[Path]
    crops: list[micrographs.Crop]
    held_out: list[Path]
    held_out_crops: list[micrographs.Crop]
    shifted_crops: list[micrographs.Crop]  # the same at other settings of the microscope, where that is asked for
    independent: bool  # no held-out image was calibrated on
    height: int
    width: int


@dataclass(frozen=True)
class CalibrationSettings:
    """What the quantized file is to be, and what is asked of it.

    ``runtime``: the target runtime. ``precision``: ``int8``, or ``fp8`` (runtime ``tensorrt``; see
    :mod:`hpddrnet_trt.graph.fp8`). ``method``: see :mod:`hpddrnet_trt.export.ranges`; ``auto`` tries all and
    keeps the one with the highest IoU against FP32 labels, averaged over classes. ``half``: type what is not
    quantized FP16 (runtime ``tensorrt`` only). At most ``max_images`` micrographs, chosen to span the grey
    levels, give the ranges. ``size``: height and width in pixels of the calibration crops where the model is
    dynamic (the images' own by default, 1024 at most). ``min_agreement``: the smallest share of pixels with
    equal labels that is accepted; ``min_class_iou``: the smallest intersection over union of the labels with
    the FP32 ones in any class, which notices a rare class that agreement overlooks (off by default; below 0.8
    there is a warning). ``under_shift``: ranges come from every crop as it is and at another contrast,
    brightness, gamma, dose or magnification, and ``min_agreement`` is asked of held-out crops shown so, too; without it
    of crops as they are alone, which fit no other day.
    ``cache``: where what was measured on each crop is kept, ``None`` for nowhere, see
    :mod:`hpddrnet_trt.export.statistics_cache`; an interrupted calibration continues from there.
    """

    runtime: qdq.Runtime = "tensorrt"
    precision: LowPrecision = "int8"
    method: Method | Literal["auto"] = "max"
    half: bool = True
    max_images: int = MAX_IMAGES
    size: tuple[int, int] | None = None
    min_agreement: float = MIN_AGREEMENT
    min_class_iou: float = 0.0
    under_shift: bool = True
    cache: Cache = "user"

    @property
    def methods(self) -> tuple[str, ...]:
        """The calibration methods to try."""
        return METHODS if self.method == "auto" else (self.method,)

    def check(self) -> None:
        """Raise :class:`UsageError` for what is unknown or does not go together."""
        for what, value, known in (
            ("target runtime", self.runtime, get_args(qdq.Runtime)),
            ("precision", self.precision, get_args(LowPrecision)),
            ("calibration method", self.method, (*METHODS, "auto")),
        ):
            if value not in known:
                raise UsageError(f"unknown {what} {value!r}; choose one of: {', '.join(known)}")
        if self.runtime != "tensorrt" and not PRECISIONS[self.precision].cpu_kernels:
            raise UsageError(
                f"ONNX Runtime's CPU kernels have no {self.precision.upper()}; choose the target runtime tensorrt, or "
                "the precision int8"
            )
        if self.max_images < 1:
            raise UsageError(f"at least one calibration image is needed, {self.max_images} were asked for")
        for what, least in ("agreement", self.min_agreement), ("IoU per class", self.min_class_iou):
            if not 0 <= least <= 1:
                raise UsageError(f"the smallest {what} is a fraction between 0 and 1, got {least}")


DEFAULTS = CalibrationSettings()


def calibrate(
    source_onnx: str | Path,
    target_onnx: str | Path,
    images: Sequence[Path],
    settings: CalibrationSettings = DEFAULTS,
    *,
    held_out: Sequence[Path] | None = None,
) -> Manifest:
    """Write ``target_onnx``, the quantized form of the FP32 export ``source_onnx``, and return its manifest.

    ``images``: micrographs (see :func:`~hpddrnet_trt.data.datasets.find_images` for datasets and folders).
    ``held_out``: images for the comparison with the FP32 file (and for the choice of ``auto``); without
    them every fourth of ``images`` is set aside.

    The same files give the same result. Raises :class:`UsageError` for a request that makes no
    sense, :class:`BadInputFile` for an unreadable file, :class:`UserError` when the quantized model
    disagrees; then nothing is written.
    """
    load_onnxruntime("calibrate models")
    settings.check()
    check_target(source_onnx, target_onnx)
    model, manifest = float_model(source_onnx)
    data = _gather(images, held_out, settings, manifest)
    name_nodes(model)
    plan = qdq.plan(model, settings.runtime, settings.precision)
    if not plan.nodes:
        raise UsageError(
            f"{source_onnx} holds no convolution that could be quantised to {settings.precision.upper()}; "
            "give an exported network, or choose another precision"
        )

    reference = _Reference(Path(source_onnx), data)
    candidates = []
    for name, quantized in _quantized(model, manifest, plan, settings, data):
        shown = f"{name} (auto)" if settings.method == "auto" else name
        finished = manifest.replace(
            precision=settings.precision,
            quantized_for=settings.runtime,
            calibration=calibration_record(data.images, data.crops, (data.height, data.width), shown),
            qdq_report=analyze(quantized).record() if settings.runtime == "tensorrt" else None,
            versions={**manifest.versions, "onnxruntime": _runtime_version()},
        )
        candidates.append((name, quantized, finished, reference.compare(quantized, finished)))
    _, quantized, finished, record = max(candidates, key=lambda entry: _closeness(entry[3]))
    _judge(record, settings, target_onnx)
    tried = [_methods_tried({name: other for name, _, _, other in candidates})] if settings.method == "auto" else []
    finished = finished.replace(validation=[*manifest.validation, *tried, record])
    save_model(quantized, target_onnx, finished)
    return finished


def _quantized(
    model: Any, manifest: Manifest, plan: qdq.Plan, settings: CalibrationSettings, data: _Data
) -> Iterator[tuple[str, Any]]:
    """Every method asked for, and the graph it gives."""
    size, tensorrt = (data.height, data.width), settings.runtime == "tensorrt"
    measured = measure(model, manifest, plan.tensors, data.crops, size, cache=settings.cache)
    statistics = reduce(merge, (entry for _, entry in measured))
    for method in settings.methods:
        ranges = ranges_of(statistics, method, tensorrt)
        result = qdq.quantize(model, settings.runtime, plan, ranges, settings.precision)
        yield method, to_half(result) if tensorrt and settings.half else result


def float_model(source: str | Path) -> tuple[Any, Manifest]:
    """The FP32 graph of a file and its description, weights stored in FP16 widened (shipped models).

    Raises :class:`UsageError` for a file in another precision; it says which one to give instead.
    """
    path = Path(source)
    if path.suffix.lower() != ".onnx":
        raise UsageError(f"{path} is not an ONNX file; calibration starts from the .onnx file of the export")
    model, manifest = load_model(path)
    again = "give the FP32 file that the export wrote"
    if manifest.quantized_for is not None or any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        raise UsageError(f"{path} is quantised already; {again}")
    fold_constants(model.graph)
    half = any(entry.data_type in _half_types() for entry in model.graph.initializer)
    if manifest.precision not in (None, "fp32") or half:
        named = "FP16" if manifest.precision in (None, "fp32") else manifest.precision.upper()
        raise UsageError(f"{path} is typed {named}, calibration needs FP32; {again}")
    return model, manifest


def _half_types() -> tuple[int, int]:
    from onnx import TensorProto

    return TensorProto.FLOAT16, TensorProto.BFLOAT16


# ------------------------------------------------------------------------------------ data


def _gather(
    images: Sequence[Path],
    held_out: Sequence[Path] | None,
    settings: CalibrationSettings,
    manifest: Manifest,
) -> _Data:
    if not images:
        raise UsageError("no calibration image was given; give a dataset, a folder or files of micrographs")
    height, width = micrographs.crop_size(input_contract(manifest), settings.size, images)
    images = sorted({path.resolve() for path in images})
    if held_out:
        judges = sorted({path.resolve() for path in held_out})
        pool = [path for path in images if path not in judges]
    else:
        pool, judges = micrographs.split_held_out(images)
    independent = bool(pool and judges)
    pool = pool or images
    chosen = micrographs.choose_images(pool, settings.max_images)
    judges = micrographs.choose_images(judges or chosen, _HELD_OUT_CROPS)
    plan = partial(
        micrographs.plan_crops, height=height, width=width, intensity_range=range_of(manifest.intensity),
        read_at_m=manifest.read_at_m,
    )  # fmt: skip
    crops, spread = micrographs.with_content(planned := plan(chosen), height, width)
    if not crops:
        raise UsageError(
            f"the micrographs to calibrate on hold no content: their grey levels spread by {spread:.1f} of 255 at "
            f"most, and need {micrographs.FLAT:g} (blanked beam, out of focus?); give pictures like those to segment"
        )
    if len(crops) < len(planned):
        logger.warning("%d of %d calibration crops are flat and left out", len(planned) - len(crops), len(planned))
    judged, _ = micrographs.with_content(plan(judges, minimum=_HELD_OUT_CROPS)[:_HELD_OUT_CROPS], height, width)
    independent = independent and bool(judged)
    judged = judged or crops[:_HELD_OUT_CROPS]
    return _Data(
        images=chosen,
        crops=micrographs.also_shifted(crops) if settings.under_shift else crops,
        held_out=judges,
        held_out_crops=judged,
        shifted_crops=[crop for crop in micrographs.also_shifted(judged) if crop.shift] if settings.under_shift else [],
        independent=independent,
        height=height,
        width=width,
    )


def calibration_record(
    images: Sequence[Path],
    crops: Sequence[micrographs.Crop],
    size: tuple[int, int],
    method: str,
) -> CalibrationRecord:
    """What a manifest says about ranges from these images, cut into crops of ``size`` (height, width)."""
    folders = sorted({path.parent for path in images})
    named = ", ".join("/".join(folder.parts[-3:]).lstrip("/") for folder in folders[:3])
    return CalibrationRecord(
        method=method,
        images=len(images),
        images_sha256=micrographs.checksum(images),
        source=f"{named}{' ...' if len(folders) > 3 else ''}: {len(crops)} crops of {size[0]}x{size[1]}",
        tool=f"onnxruntime {_runtime_version()}",
    )


def _runtime_version() -> str:
    return str(load_onnxruntime().__version__)


# -------------------------------------------------------------------------------- evidence


class _Reference:
    """Labels of the FP32 file on the held-out crops, to compare quantised graphs with."""

    def __init__(self, source: Path, data: _Data) -> None:
        self._data = data
        with OnnxRuntimeEngine(source) as engine:
            self._manifest = engine.manifest
            self._labels = self._run(engine, "labels of the FP32 file")

    def compare(self, quantized: Any, manifest: Manifest) -> ValidationRecord:
        """Run a graph, as a file and through the engine that users run, on the same crops."""
        with tempfile.TemporaryDirectory(prefix="hpddrnet-trt-") as folder:
            candidate = save_model(quantized, Path(folder) / "quantized.onnx", manifest)
            with OnnxRuntimeEngine(candidate) as engine:
                runtime = engine.runtime
                labels = self._run(engine, "comparing with FP32")
        return self._record(labels, runtime, str(manifest.precision), qdq.count_convolutions(quantized))

    def _run(self, engine: OnnxRuntimeEngine, purpose: str) -> list[list[npt.NDArray[np.uint8]]]:
        """Labels by batch of the held-out crops as they are, and of the shifted ones."""
        data, contract = self._data, input_contract(self._manifest)
        return [
            [
                engine.infer(batch).labels
                for batch in progress_bar(
                    micrographs.batches(crops, data.height, data.width, contract, self._manifest.normalization),
                    total=-(-len(crops) // contract.batch.minimum), desc=purpose, unit="batch",
                )
            ]
            for crops in (data.held_out_crops, data.shifted_crops)
        ]  # fmt: skip

    def _record(
        self, labels: list[list[npt.NDArray[np.uint8]]], runtime: str, precision: str, counts: tuple[int, int]
    ) -> ValidationRecord:
        data = self._data
        comparison, under_shift = (
            self._compared(*both) for both in zip(labels, self._labels, strict=True)
        )
        shifted = {
            "agreement_under_shift": under_shift.agreement,
            "worst_crop_agreement_under_shift": under_shift.worst_agreement,
            "miou_against_fp32_under_shift": under_shift.scores().miou,
        }
        return ValidationRecord(
            what=f"{precision.upper()} labels against the FP32 ONNX file",
            runtime=runtime,
            values={
                "agreement": comparison.agreement,
                "worst_crop_agreement": comparison.worst_agreement,
                **(shifted if data.shifted_crops else {}),
                "miou_against_fp32": comparison.scores().miou,
                **{
                    f"{_CLASS_IOU}{name}": iou
                    for name, iou in comparison.class_ious(self._manifest.class_names).items()
                },
                f"{precision}_convolutions": float(counts[0]),
                "convolutions": float(counts[1]),
            },
            images=len(data.held_out),
            source=_judged_on(data),
        )

    def _compared(
        self, labels: list[npt.NDArray[np.uint8]], reference: list[npt.NDArray[np.uint8]]
    ) -> LabelComparison:
        comparison = LabelComparison(self._manifest.network.num_classes)
        for batches in zip(labels, reference, strict=True):
            for got, expected in zip(*batches, strict=True):
                comparison.update(got, expected)
        return comparison


def _judged_on(data: _Data) -> str:
    whose = "images not calibrated on" if data.independent else "the calibration images themselves"
    return f"{whose}: {len(data.held_out_crops)} crops of {data.height}x{data.width}"


def _closeness(record: ValidationRecord) -> float:
    """IoU of the labels against FP32 averaged over classes, over crops as they are and, where judged, under shift."""
    home = record.values["miou_against_fp32"]
    return (home + record.values.get("miou_against_fp32_under_shift", home)) / 2


def _methods_tried(evidence: Mapping[str, ValidationRecord]) -> ValidationRecord:
    """What "auto" chose from: IoU against FP32 averaged over classes, by method."""
    scores = {method: _closeness(entry) for method, entry in evidence.items()}
    logger.info("IoU against FP32 by method: %s", ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
    return next(iter(evidence.values())).model_copy(update={"what": METHODS_TRIED, "values": scores})


def _shift_in_words(values: Mapping[str, float]) -> str:
    if "agreement_under_shift" not in values:
        return ""
    shift, worst = values["agreement_under_shift"], values["worst_crop_agreement_under_shift"]
    return f", and on {shift:.4f} at other settings of the microscope (worst crop {worst:.4f})"


def _judge(record: ValidationRecord, settings: CalibrationSettings, target: str | Path) -> None:
    """Report the comparison; raise :class:`UserError` when it falls short."""
    values = record.values
    per_class = {key.removeprefix(_CLASS_IOU): iou for key, iou in values.items() if key.startswith(_CLASS_IOU)}
    worst = min(per_class, key=lambda name: per_class[name])
    named = settings.precision.upper()
    summary = (
        f"{named} labels equal FP32 on {values['agreement']:.4f} of the pixels (worst crop "
        f"{values['worst_crop_agreement']:.4f}; IoU against FP32 {values['miou_against_fp32']:.4f} on average, "
        f"{per_class[worst]:.4f} for the worst class, {worst!r}){_shift_in_words(values)}; "
        f"{values[f'{settings.precision}_convolutions']:.0f} of {values['convolutions']:.0f} convolutions are {named}"
    )
    others = ", ".join([*METHODS, "auto"])
    advice = f"calibrate on more and more varied micrographs, try another method ({others}), or use FP16"
    for value, least, what in (
        (values["agreement"], settings.min_agreement, "agreement"),
        (values.get("agreement_under_shift", 1.0), settings.min_agreement, "agreement"),
        (per_class[worst], settings.min_class_iou, "IoU per class"),
    ):
        if not value >= least:
            raise UserError(
                f"{summary}; that is below the {what} of {least} asked for, so {target} was not written: {advice}"
            )
    logger.info("%s (%s)", summary, record.source)
    if per_class[worst] < _WORRYING_IOU:
        logger.warning("%s changes class %r a lot (IoU against FP32 %.3f): %s", named, worst, per_class[worst], advice)
