"""From an FP32 ONNX file to an FP16 or BF16 one: what its ranges and labels on micrographs ask to keep in FP32.

:func:`~hpddrnet_trt.graph.precision.to_half` types the graph; this module decides what else stays in
FP32, compares the labels, and writes the file with the evidence.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.manifest import Manifest
from hpddrnet_trt.core.precisions import Half
from hpddrnet_trt.engines.base import input_contract
from hpddrnet_trt.export.images import batches, crop_size, plan_crops
from hpddrnet_trt.export.statistics import extremes
from hpddrnet_trt.export.verify import ComparedLabels, LabelReference, check_labels
from hpddrnet_trt.graph.layers import block_of
from hpddrnet_trt.graph.model import load_model, save_model
from hpddrnet_trt.graph.nodes import fold_constants, name_nodes, producers, tensor_types
from hpddrnet_trt.graph.precision import large_nodes, to_half

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)

# Mean IoU of labels against FP32 labels below which blocks are left in FP32. FP16 and BF16 of a trained
# network keep 0.9997 and 0.9989 (nasa-super1, all 14 images).
FAITHFUL_IOU = 0.99


def convert_precision(
    source: str | Path,
    target: str | Path,
    precision: Literal["fp16", "bf16", "fp32"] = "fp16",
    *,
    keep_fp32: Iterable[str] = (),
    images: Sequence[Path] = (),
    least_iou: float = FAITHFUL_IOU,
) -> Manifest:
    """Write ``source`` (an FP32 file of this package) to ``target`` in ``precision``.

    ``keep_fp32`` names further nodes to leave in FP32. With ``images`` (micrographs) more nodes may
    stay in FP32, each with a remark in the description: in FP16 those whose values come near its end,
    and, where the labels' mean IoU against those of ``source`` is below ``least_iou``, the blocks of the
    network whose rounding costs most. The labels are compared with rounding simulated on ONNX Runtime
    (:mod:`hpddrnet_trt.graph.rounding`); this is the evidence in the description. Raises
    :class:`UsageError` for a source that is not FP32 or an unknown node name, :class:`UserError` when
    the converted graph gives other labels.
    """
    if precision not in ("fp32", *get_args(Half)):
        raise UsageError(
            f"unknown precision {precision!r}; choose fp16, bf16 or fp32 (INT8 and FP8 come from calibration)"
        )
    model, manifest = load_model(source)
    if manifest.precision != "fp32":
        raise UsageError(f"{source} is {manifest.precision}, conversion needs an FP32 file; give the exported one")
    if precision == "fp32":
        save_model(model, target, manifest)
        return manifest
    keep = set(keep_fp32)
    if unknown := keep - {node.name for node in model.graph.node}:
        raise UsageError(f"{source} has no node called {', '.join(sorted(unknown))}; nodes to keep must exist")
    remarks = list(manifest.remarks)
    if images and precision == "fp16":
        report = fp16_range_report(model, manifest, images)
        for name, peak in large_nodes(model.graph, report).items():
            keep.add(name)
            remarks.append(f"{name} stays in FP32: its values reach {peak:.3g}")
    what = f"conversion to {precision.upper()}"
    comparison = LabelReference(model, manifest, images)
    half = to_half(model, keep, precision)
    compared = comparison.compare(half, what)
    # Simulated micrographs prove the graph, but what a network does with them is no ground for choices.
    if images and not _is_faithful(compared, least_iou):
        half, compared, kept = _keep_blocks(model, keep, precision, comparison, compared, least_iou)
        remarks += kept
    check_labels(compared)
    evidence = [*manifest.validation, compared.evidence]
    manifest = manifest.replace(precision=precision, remarks=remarks, validation=evidence)
    save_model(half, target, manifest)
    return manifest


def _is_faithful(compared: ComparedLabels, least_iou: float) -> bool:
    return compared.finite and compared.iou >= least_iou


def _rank(compared: ComparedLabels) -> tuple[bool, float]:
    """Larger is better: labels of a graph that overflows are worth nothing, however many are right."""
    return compared.finite, compared.iou


def _keep_blocks(
    model: onnx.ModelProto,
    keep: set[str],
    kind: Half,
    comparison: LabelReference,
    before: ComparedLabels,
    least_iou: float,
) -> tuple[onnx.ModelProto, ComparedLabels, list[str]]:
    """Leave blocks in FP32 until the labels are faithful: the graph, its comparison, a remark for each block.

    Each block is first tried alone; then they are kept in the order of what each gained, those that
    still help, until mean IoU against FP32 reaches ``least_iou``. ``model``: its nodes get names.
    """
    what = before.evidence.what
    fold_constants(model.graph)
    name_nodes(model)  # as in to_half, so that every node can be kept
    blocks: dict[str, set[str]] = {}
    for node in model.graph.node:
        blocks.setdefault(block_of(node.name), set()).add(node.name)
    logger.info("%s: mean IoU against FP32 is %.4f; trying %d blocks in FP32", what, before.iou, len(blocks))

    def attempt(names: set[str]) -> tuple[onnx.ModelProto, ComparedLabels]:
        half = to_half(model, keep | names, kind)
        return half, comparison.compare(half, what)

    alone = {block: _rank(attempt(names)[1]) for block, names in blocks.items()}
    best, now, remarks = to_half(model, keep, kind), before, []
    kept: set[str] = set()
    for block in sorted(blocks, key=lambda name: alone[name], reverse=True):
        half, found = attempt(kept | blocks[block])
        if _rank(found) <= _rank(now):
            continue
        remarks.append(
            f"{block} stays in FP32: rounding it costs labels (IoU against FP32 {now.iou:.4f}, now {found.iou:.4f})"
        )
        best, now = half, found
        kept |= blocks[block]
        if _is_faithful(now, least_iou):
            break
    else:
        logger.warning("%s: no choice of blocks in FP32 brings the labels' mean IoU against FP32 to %g (%.4f)",
                       what, least_iou, now.iou)  # fmt: skip
    return best, now, remarks


def fp16_range_report(model: onnx.ModelProto, manifest: Manifest, images: Sequence[Path]) -> dict[str, float]:
    """Largest absolute value of every floating-point activation of an FP32 graph over micrographs.

    The images are run at the model's own size, or in crops of their usual size where it is dynamic
    (:func:`~hpddrnet_trt.export.images.crop_size`). Raises :class:`UsageError` without images,
    :class:`UserError` when an activation is not finite.
    """
    from onnx import TensorProto

    contract = input_contract(manifest)
    types = tensor_types(model)
    tensors = [name for name in producers(model.graph) if types.get(name) == TensorProto.FLOAT]
    height, width = crop_size(contract, None, images)
    crops = plan_crops(images, height, width)
    ranges = extremes(model, tensors, batches(crops, height, width, contract, manifest.normalization))
    return {name: max(abs(low), abs(high)) for name, (low, high) in ranges.items()}
