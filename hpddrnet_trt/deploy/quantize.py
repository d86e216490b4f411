"""INT8: calibrate an exported FP32 model on micrographs and write a quantised ONNX file.

Two forms, because two runtimes want different graphs (:mod:`hpddrnet_trt.deploy.qdq`):

* ``tensorrt``: explicit symmetric INT8 around every convolution, the rest typed FP16;
* ``onnxruntime``: uint8 activations and int8 weights for the CPU kernels, the rest FP32.

The file is run and compared with the FP32 one on images that were not calibrated on, before it is
written.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from tqdm import tqdm

from hpddrnet_trt.deploy import calibration_data, qdq
from hpddrnet_trt.deploy.onnx_graph import load_model, save_model
from hpddrnet_trt.deploy.ranges import METHODS, Method, observe
from hpddrnet_trt.engines.base import Engine, input_contract
from hpddrnet_trt.engines.onnxruntime import OnnxRuntimeEngine
from hpddrnet_trt.errors import UsageError, UserError, require
from hpddrnet_trt.manifest import CalibrationRecord, Evidence, InputContract, Manifest
from hpddrnet_trt.metrics import ConfusionMatrix

logger = logging.getLogger(__name__)

MAX_IMAGES = 64
MIN_AGREEMENT = 0.9  # a sound calibration of a trained network reaches 0.99; a broken one falls far below
_HELD_OUT_CROPS = 16
_CLASS_IOU = "iou_against_fp32/"  # evidence: this and the class name
_WORRYING_IOU = 0.8  # a class that loses this much to INT8 is worth a warning, however few its pixels


@dataclass(frozen=True)
class _Data:
    """The crops of one calibration: those that give ranges, and those it is judged on."""

    images: list[Path]
    crops: list[calibration_data.Crop]
    held_out: list[Path]
    held_out_crops: list[calibration_data.Crop]
    independent: bool  # no held-out image was calibrated on
    height: int
    width: int


def calibrate(
    source_onnx: str | Path,
    target_onnx: str | Path,
    images: Sequence[Path],
    *,
    form: qdq.Form = "tensorrt",
    method: Method = "minmax",
    max_images: int = MAX_IMAGES,
    size: tuple[int, int] | None = None,
    half: bool = True,
    held_out: Sequence[Path] | None = None,
    min_agreement: float = MIN_AGREEMENT,
    min_class_iou: float = 0.0,
) -> Manifest:
    """Write ``target_onnx``, the INT8 form of the FP32 export ``source_onnx``, and return its manifest.

    ``images``: micrographs (see :func:`~hpddrnet_trt.data.datasets.find_images` for datasets
    and folders); at most ``max_images`` of them, chosen to span the grey levels, give the ranges.
    ``method``: see :func:`~hpddrnet_trt.deploy.ranges.observe`. ``size``: height and width in pixels of
    the calibration crops where the model is dynamic (512 by default). ``half``: type what is not
    quantised FP16 (form ``tensorrt`` only). ``held_out``: images for the comparison with the FP32 file;
    without them every fourth of ``images`` is set aside. ``min_agreement``: the smallest share of
    pixels with equal labels that is accepted; ``min_class_iou``: the smallest intersection over union of
    INT8 and FP32 labels in any class, which notices a rare class that agreement overlooks (off by
    default; below 0.8 there is a warning).

    The same files give the same result. Raises :class:`UsageError` for a request that makes no
    sense, :class:`BadInputFile` for an unreadable file, :class:`UserError` when the quantised model
    disagrees; then nothing is written.
    """
    require("onnxruntime", "export", "calibrate INT8 models")
    _check_request(source_onnx, target_onnx, form, method, max_images)
    for what, least in ("agreement", min_agreement), ("IoU per class", min_class_iou):
        if not 0 <= least <= 1:
            raise UsageError(f"the smallest {what} is a fraction between 0 and 1, got {least}")
    model, manifest = _float_model(Path(source_onnx))
    contract = input_contract(manifest)
    data = _gather(images, held_out, max_images, contract, size)

    qdq.name_nodes(model)
    chosen = qdq.plan(model, form)
    if not chosen.nodes:
        raise UsageError(f"{source_onnx} holds no convolution that could be quantised; give an exported network")

    def batches() -> Any:
        feed = calibration_data.batches(data.crops, data.height, data.width, contract, manifest.normalisation)
        total = -(-len(data.crops) // contract.batch.minimum)
        return tqdm(feed, total=total, desc=f"calibrating ({method})", unit="batch")

    quantised = qdq.quantise(model, form, chosen, observe(model, chosen.tensors, batches, method))
    if form == "tensorrt" and half:
        from hpddrnet_trt.deploy.precision import to_half

        quantised = to_half(quantised)
    finished = manifest.replace(
        precision="int8",
        quantised_for=form,
        calibration=_record(data, method),
        versions={**manifest.versions, "onnxruntime": _runtime_version()},
    )
    evidence = _evidence(Path(source_onnx), quantised, finished, data)
    _judge(evidence, min_agreement, min_class_iou, target_onnx)
    finished = finished.replace(evidence=[*manifest.evidence, evidence])
    save_model(quantised, target_onnx, finished)
    return finished


def _check_request(source: str | Path, target: str | Path, form: str, method: str, max_images: int) -> None:
    if form not in get_args(qdq.Form):
        raise UsageError(f"unknown form {form!r}; choose one of: {', '.join(get_args(qdq.Form))}")
    if method not in METHODS:
        raise UsageError(f"unknown calibration method {method!r}; choose one of: {', '.join(METHODS)}")
    if max_images < 1:
        raise UsageError(f"at least one calibration image is needed, {max_images} were asked for")
    if Path(target).suffix.lower() != ".onnx":
        raise UsageError(f"the quantised model {target} must end with .onnx; write {Path(target).with_suffix('.onnx')}")
    if Path(source).resolve() == Path(target).resolve():
        raise UsageError(f"{target} would overwrite the FP32 model it is made from; choose another output path")


def _float_model(path: Path) -> tuple[Any, Manifest]:
    """The FP32 graph, or a :class:`UsageError` that says which file to give instead."""
    if path.suffix.lower() != ".onnx":
        raise UsageError(f"{path} is not an ONNX file; calibration starts from the .onnx file of the export")
    model, manifest = load_model(path)
    again = "give the FP32 file that the export wrote"
    if manifest.quantised_for is not None or any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        raise UsageError(f"{path} is quantised already; {again}")
    half = model.graph.initializer and any(entry.data_type in _half_types() for entry in model.graph.initializer)
    if manifest.precision not in (None, "fp32") or half:
        raise UsageError(f"{path} is typed {(manifest.precision or 'fp16').upper()}, calibration needs FP32; {again}")
    return model, manifest


def _half_types() -> tuple[int, int]:
    from onnx import TensorProto

    return TensorProto.FLOAT16, TensorProto.BFLOAT16


# ------------------------------------------------------------------------------------ data


def _gather(
    images: Sequence[Path],
    held_out: Sequence[Path] | None,
    max_images: int,
    contract: InputContract,
    size: tuple[int, int] | None,
) -> _Data:
    if not images:
        raise UsageError("no calibration image was given; give a dataset, a folder or files of micrographs")
    height, width = calibration_data.crop_size(contract, size)
    images = sorted({path.resolve() for path in images})
    if held_out:
        judges = sorted({path.resolve() for path in held_out})
        pool = [path for path in images if path not in judges]
    else:
        pool, judges = calibration_data.split_held_out(images)
    independent = bool(pool and judges)
    pool = pool or images
    chosen = calibration_data.choose_images(pool, max_images)
    judges = calibration_data.choose_images(judges or chosen, _HELD_OUT_CROPS)
    return _Data(
        images=chosen,
        crops=calibration_data.plan_crops(chosen, height, width),
        held_out=judges,
        held_out_crops=calibration_data.plan_crops(judges, height, width, _HELD_OUT_CROPS)[:_HELD_OUT_CROPS],
        independent=independent,
        height=height,
        width=width,
    )


def _record(data: _Data, method: str) -> CalibrationRecord:
    folders = sorted({path.parent for path in data.images})
    named = ", ".join("/".join(folder.parts[-3:]).lstrip("/") for folder in folders[:3])
    return CalibrationRecord(
        method=method,
        images=len(data.images),
        images_sha256=calibration_data.checksum(data.images),
        source=f"{named}{' ...' if len(folders) > 3 else ''}: {len(data.crops)} crops of {data.height}x{data.width}",
        tool=f"onnxruntime {_runtime_version()}",
    )


def _runtime_version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


# -------------------------------------------------------------------------------- evidence


def _evidence(source: Path, quantised: Any, manifest: Manifest, data: _Data) -> Evidence:
    """Run the quantised graph, as a file and through the engine that users run, beside its source."""
    with tempfile.TemporaryDirectory(prefix="hpddrnet-trt-") as folder:
        candidate = save_model(quantised, Path(folder) / "int8.onnx", manifest)
        with OnnxRuntimeEngine(source) as reference, OnnxRuntimeEngine(candidate) as engine:
            return _compare(reference, engine, qdq.count_convolutions(quantised), data)


def _compare(reference: Engine, quantised: Engine, counts: tuple[int, int], data: _Data) -> Evidence:
    """Labels of both files on the held-out crops."""
    manifest = reference.manifest
    contract = input_contract(manifest)
    feed = calibration_data.batches(data.held_out_crops, data.height, data.width, contract, manifest.normalisation)
    total = -(-len(data.held_out_crops) // contract.batch.minimum)
    matrix = ConfusionMatrix(manifest.network.num_classes)
    worst = 1.0
    for batch in tqdm(feed, total=total, desc="comparing with FP32", unit="batch"):
        expected, got = reference.infer(batch).labels, quantised.infer(batch).labels
        matrix.update(got, expected)
        worst = min(worst, float((got == expected).mean(axis=(1, 2)).min()))
    scores = matrix.scores()
    whose = "images not calibrated on" if data.independent else "the calibration images themselves"
    return Evidence(
        what="INT8 labels against the FP32 ONNX file",
        runtime=quantised.runtime,
        values={
            "agreement": scores.pixel_accuracy,
            "worst_crop_agreement": worst,
            "miou_against_fp32": scores.miou,
            **{
                f"{_CLASS_IOU}{name}": iou
                for name, iou in zip(manifest.class_names, scores.iou, strict=True)
                if not np.isnan(iou)  # in neither label map
            },
            "int8_convolutions": float(counts[0]),
            "convolutions": float(counts[1]),
        },
        images=len(data.held_out),
        source=f"{whose}: {len(data.held_out_crops)} crops of {data.height}x{data.width}",
    )


def _judge(evidence: Evidence, min_agreement: float, min_class_iou: float, target: str | Path) -> None:
    """Report the comparison; raise :class:`UserError` when it falls short."""
    values = evidence.values
    per_class = {key.removeprefix(_CLASS_IOU): iou for key, iou in values.items() if key.startswith(_CLASS_IOU)}
    worst = min(per_class, key=lambda name: per_class[name])
    summary = (
        f"INT8 labels equal FP32 on {values['agreement']:.4f} of the pixels (worst crop "
        f"{values['worst_crop_agreement']:.4f}; IoU against FP32 {values['miou_against_fp32']:.4f} on average, "
        f"{per_class[worst]:.4f} for the worst class, {worst!r}); {values['int8_convolutions']:.0f} of "
        f"{values['convolutions']:.0f} convolutions are INT8"
    )
    advice = f"calibrate on more and more varied micrographs, try another method ({', '.join(METHODS)}), or use FP16"
    for value, least, what in (
        (values["agreement"], min_agreement, "agreement"),
        (per_class[worst], min_class_iou, "IoU per class"),
    ):
        if not value >= least:
            raise UserError(
                f"{summary}; that is below the {what} of {least} asked for, so {target} was not written: {advice}"
            )
    logger.info("%s (%s)", summary, evidence.source)
    if per_class[worst] < _WORRYING_IOU:
        logger.warning("INT8 changes class %r a lot (IoU against FP32 %.3f): %s", worst, per_class[worst], advice)
