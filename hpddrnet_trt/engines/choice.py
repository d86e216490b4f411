"""What ``auto`` takes for an ONNX file: the fastest way that keeps the labels on this processor.

Which ways there are follows from the file, from what is installed and from the processor alone, so the same file gets
the same one on the same machine, whatever pictures come:

1. an ONNX file quantized for ONNX Runtime, a GPU as device, no OpenVINO, another processor than x86: ONNX Runtime;
2. else OpenVINO, in BF16 where the processor has AMX (without it BF16 is slower than FP32, see
   :func:`hpddrnet_trt.engines.openvino.fast_bf16`), or in FP32;
3. but for INT8 and FP8 files, each way of OpenVINO is tried once, the fastest first: its labels on eight fixed pictures
   (:func:`check_pictures`) must be those of ONNX Runtime on :data:`MIN_AGREEMENT` of the pixels, for BF16 with at
   least two classes among them; otherwise the next way, at last ONNX Runtime.

The verdict is kept in the user's cache folder, by the file's checksum, the versions and the processor.

The limit comes from three models on 29 real micrographs (OpenVINO 2026.4 with AMX): BF16 gave the labels of FP32 on
99.85 to 100 % of the pixels of micrographs like those that a model was trained on, 98.4 to 100 % on strange ones, and
99.86 to 99.98 % on the check pictures. OpenVINO in FP32 gave 99.9999 % or more (Super-1).
INT8 files (99.86 %) are taken when they are asked for, never in place of another file.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import MissingDependency, UsageError, UserError
from hpddrnet_trt.core.files import sha256_of
from hpddrnet_trt.core.manifest import Manifest, read_manifest
from hpddrnet_trt.core.precisions import is_calibrated
from hpddrnet_trt.core.runtimes import load_openvino
from hpddrnet_trt.data.simulate import simulate
from hpddrnet_trt.engines.base import input_contract
from hpddrnet_trt.weights import FOLDER as SHIPPED

logger = logging.getLogger(__name__)

FOLDER = "choices"  # in the user's cache folder
CHECK_VERSION = 2  # raise it when the check changes
CHECK_SIZE = 128  # pixels, height and width of a check picture, where the model admits it
MIN_AGREEMENT = {"bf16": 0.99, "fp32": 0.999}
MIN_SECOND_CLASS = 0.005  # least share of the pixels for BF16 to be judged by: no border, nothing to lose

# What OpenVINO computes floating point in, None for ONNX Runtime; the share of labels kept, None where not compared.
Way = tuple[str | None, float | None]


@dataclass(frozen=True)
class Choice:
    """An engine, the options that it gets in addition, and for people: what was taken, why, and what is faster."""

    engine: Literal["onnxruntime", "openvino"]
    options: dict[str, str]
    why: str


def fastest(path: Path, *, on_gpu: bool = False, only_fp32: bool = False) -> Choice:
    """The way that this page describes for ``path``, an ONNX file.

    ``on_gpu``: a GPU was asked for; ``only_fp32``: FP32 was.

    Raises :class:`BadInputFile` for a file that is missing or no model of ours.
    """
    manifest = read_manifest(path)
    own = (manifest.precision or "fp32").upper()
    if on_gpu:
        return Choice("onnxruntime", {}, f"ONNX Runtime in {own}; a TensorRT engine built from it is faster on a GPU")
    if manifest.quantized_for == "onnxruntime":
        return Choice("onnxruntime", {}, f"ONNX Runtime in {own}; calibrated for tensorrt, OpenVINO runs it faster")
    try:
        load_openvino()
    except MissingDependency:
        return Choice("onnxruntime", {}, f"ONNX Runtime in {own}; OpenVINO is faster: pip install openvino")
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return Choice("onnxruntime", {}, f"ONNX Runtime in {own}; not measured on this processor: --engine openvino")
    precision, share = _checked_way(path, manifest, only_fp32)
    if precision is None:
        return Choice("onnxruntime", {}, f"ONNX Runtime in {own}, as OpenVINO's labels of a check were others")
    floats = precision.upper()
    if is_calibrated(manifest.precision):
        shown, faster = f"{own} and {floats}", ""
    else:
        by = "--precision int8" if path.parent == SHIPPED else "hpddrnet-trt calibrate"
        shown, faster = floats, f"; faster, with some other labels: INT8 by {by}"
    kept = "" if share is None else f", {share:.2%} of a check's labels"
    return Choice("openvino", {"precision": precision}, f"OpenVINO in {shown}{kept}{faster}")


def _checked_way(path: Path, manifest: Manifest, only_fp32: bool) -> Way:
    """The first way of OpenVINO that keeps the labels; looked up where it is known."""
    from hpddrnet_trt.engines.compiled import cache_key, remembered
    from hpddrnet_trt.engines.openvino import fast_bf16

    floats: list[Literal["bf16", "fp32"]] = ["fp32"] if only_fp32 or not fast_bf16() else ["bf16", "fp32"]
    if is_calibrated(manifest.precision):  # its labels are others already, and ONNX Runtime would take seconds
        return floats[0], None
    known = remembered(
        FOLDER,
        cache_key("choice", CHECK_VERSION, sha256_of(path), floats),
        lambda: dict(zip(("precision", "share"), _try(path, manifest, floats), strict=True)),
        lambda known: _is_verdict(known, floats),
    )
    return known["precision"], known["share"]


def _is_verdict(known: Any, floats: Sequence[str]) -> bool:
    return (
        isinstance(known, dict)
        and known.keys() == {"precision", "share"}
        and known["precision"] in (None, *floats)
        and isinstance(known["share"], float | int | None)
    )


def _try(path: Path, manifest: Manifest, floats: Sequence[Literal["bf16", "fp32"]]) -> Way:
    from hpddrnet_trt.engines.onnxruntime import OnnxRuntimeEngine
    from hpddrnet_trt.engines.openvino import OpenVINOEngine

    pictures = check_pictures(manifest)
    share: float | None = None
    try:
        with OnnxRuntimeEngine(path) as engine:
            wanted = [engine.infer(picture).labels for picture in pictures]
    except MissingDependency:  # nothing to compare with
        return "fp32", None
    except UsageError:  # BF16 files, for which it has no kernels: no other way either
        return floats[0], None
    pixels = np.bincount(np.concatenate([labels.ravel() for labels in wanted]), minlength=2)
    classes_meet = np.sort(pixels)[-2] >= MIN_SECOND_CLASS * pixels.sum()
    for precision in floats:
        if precision == "bf16" and not classes_meet:
            continue
        try:
            with OpenVINOEngine(path, precision=precision, keep=False) as engine:
                found = [engine.infer(picture).labels for picture in pictures]
        except UserError as exc:
            logger.info("OpenVINO does not run %s (%s)", path, exc)
            continue
        share = float(np.mean([np.mean(a == b) for a, b in zip(wanted, found, strict=True)]))
        if share >= MIN_AGREEMENT[precision]:
            return precision, share
    return None, share


def check_pictures(manifest: Manifest) -> list[npt.NDArray[Any]]:
    """Simulated micrographs, the same everywhere, as batches that the model takes.

    Four as they are, and where the model knows them with the mean and deviation of the grey levels in its training: to
    some models all of the former are one class.
    """
    contract = input_contract(manifest)
    step = contract.multiple
    height, width = (
        axis.fixed or max(axis.minimum, min(CHECK_SIZE, axis.maximum or CHECK_SIZE) // step * step)
        for axis in (contract.height, contract.width)
    )
    pictures = [simulate(height, width, seed=seed)[0] for seed in range(4)]
    data = manifest.data
    if data is not None and data.grey_mean is not None and data.grey_std is not None:
        centered = [(grey - grey.mean()) / max(grey.std(), 1) for grey in pictures]
        pictures += [np.clip(each * data.grey_std + data.grey_mean, 0, 255).astype(np.uint8) for each in centered]
    batches = []
    for grey in pictures:
        image = np.repeat(grey[None, None], contract.channels, axis=1)
        if contract.dtype != "uint8":
            mean, std = (
                np.array(each, np.float32)[: contract.channels, None, None]
                for each in (manifest.normalization.mean, manifest.normalization.std)
            )
            image = ((image - mean) / std).astype(np.float32)
        batches.append(np.repeat(image, contract.batch.minimum, axis=0))
    return batches
