"""From an FP32 ONNX file to an FP16 or BF16 one: what its ranges and labels on micrographs ask to keep in FP32.

:func:`~hpddrnet_trt.graph.precision.to_half` types the graph; this module decides what else stays in
FP32, compares the labels, and writes the file with the evidence.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core import runtimes
from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.core.manifest import Manifest, ValidationRecord
from hpddrnet_trt.core.metrics import LabelComparison
from hpddrnet_trt.core.precisions import Half
from hpddrnet_trt.data.intensity import range_of
from hpddrnet_trt.engines.base import input_contract
from hpddrnet_trt.export.images import batches, crop_size, plan_crops
from hpddrnet_trt.export.statistics import extremes
from hpddrnet_trt.export.verify import feed_of, runtime_name, sample_batches, source_name
from hpddrnet_trt.graph.layers import block_of
from hpddrnet_trt.graph.model import load_model, save_model
from hpddrnet_trt.graph.nodes import fold_constants, name_nodes, producers, tensor_types
from hpddrnet_trt.graph.precision import large_nodes, to_half
from hpddrnet_trt.graph.rounding import RUNTIME_REMARK, simulate_rounding, uses_half

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)

# Mean IoU of labels against FP32 labels below which blocks are left in FP32. FP16 and BF16 of a trained
# network keep 0.9997 and 0.9989 (nasa-super1, all 14 images).
FAITHFUL_IOU = 0.99
LOWEST_AGREEMENT = 0.95  # of the labels of two graphs in different precision
_PURPOSE = "compare graphs"


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
    _check_labels(compared)
    validation = [*manifest.validation, compared.record]
    manifest = manifest.replace(precision=precision, remarks=remarks, validation=validation)
    save_model(half, target, manifest)
    return manifest


class GraphComparison(NamedTuple):
    """One comparison of labels; ``finite``: no floating-point output held infinity or NaN."""

    record: ValidationRecord
    finite: bool

    @property
    def iou(self) -> float:
        """Mean IoU against the reference's labels, 0..1."""
        return self.record.values["miou_against_fp32"]


class LabelReference:
    """Labels of an FP32 graph on a few inputs, kept to compare other graphs of its contract with.

    ``manifest`` describes the graphs; ``images`` are micrographs, cut or mirrored to sizes that the graph
    takes; without any, simulated ones are used. ONNX Runtime runs everything, on a CPU.
    """

    def __init__(self, reference: onnx.ModelProto, manifest: Manifest, images: Sequence[Path] = ()) -> None:
        self._manifest = manifest
        batches = list(sample_batches(manifest, images))
        self._source = source_name(images[: sum(map(len, batches))])
        self._feeds = [feed_of(batch, manifest) for batch in batches]
        self._labels = [self._run(runtimes.session(reference, _PURPOSE), feed)[0] for feed in self._feeds]

    def compare(self, model: onnx.ModelProto, what: str) -> GraphComparison:
        """Agreement with the reference's labels, and mean IoU against them; ``what`` names the comparison.

        A graph in FP16, BF16 or FP8 runs with that rounding (:mod:`hpddrnet_trt.graph.rounding`).
        """
        rounded = uses_half(model)
        session = runtimes.session(simulate_rounding(model) if rounded else model, _PURPOSE)
        comparison = LabelComparison(self._manifest.network.num_classes)
        finite = True
        for feed, expected in zip(self._feeds, self._labels, strict=True):
            labels, sound = self._run(session, feed)
            finite = finite and sound
            for got, wanted in zip(labels, expected, strict=True):
                comparison.update(got, wanted)
        record = ValidationRecord(
            what=what,
            runtime=f"{runtime_name()}, {RUNTIME_REMARK}" if rounded else runtime_name(),
            values={"agreement": comparison.agreement, "miou_against_fp32": comparison.scores().miou},
            images=comparison.images,
            source=self._source,
        )
        return GraphComparison(record, finite)

    def _run(self, session: Any, feed: dict[str, npt.NDArray[Any]]) -> tuple[npt.NDArray[Any], bool]:
        """Labels ``[N, H, W]``, and whether every output is finite."""
        outputs = session.run(None, feed)
        logits = self._manifest.output is not None and self._manifest.output.kind == "logits"
        labels = outputs[0].argmax(axis=1) if logits else outputs[0]
        return labels, all(bool(np.isfinite(values).all()) for values in outputs)


def _check_labels(compared: GraphComparison) -> None:
    """Report a comparison of labels; raise :class:`UserError` when it shows a broken graph.

    That is one with an output that is not finite, or whose labels agree on less than ``LOWEST_AGREEMENT``.
    """
    record = compared.record
    agreement, what = record.values["agreement"], record.what
    if not compared.finite:
        raise UserError(f"{what}: the new graph gives values that are not finite; keep more nodes in FP32")
    if agreement < LOWEST_AGREEMENT:
        raise UserError(
            f"{what}: labels agree on only {agreement:.2%} of the pixels ({LOWEST_AGREEMENT:.0%} needed); "
            "no file was written: keep more nodes in FP32"
        )
    logger.info(
        "%s: labels agree on %.4f %% of the pixels of %d images, mean IoU against FP32 %.4f (%s)",
        what, 100 * agreement, record.images, compared.iou, record.runtime,
    )  # fmt: skip


def _is_faithful(compared: GraphComparison, least_iou: float) -> bool:
    return compared.finite and compared.iou >= least_iou


def _rank(compared: GraphComparison) -> tuple[bool, float]:
    """Larger is better: labels of a graph that overflows are worth nothing, however many are right."""
    return compared.finite, compared.iou


def _keep_blocks(
    model: onnx.ModelProto,
    keep: set[str],
    kind: Half,
    comparison: LabelReference,
    before: GraphComparison,
    least_iou: float,
) -> tuple[onnx.ModelProto, GraphComparison, list[str]]:
    """Leave blocks in FP32 until the labels are faithful: the graph, its comparison, a remark for each block.

    Each block is first tried alone; then they are kept in the order of what each gained, those that
    still help, until mean IoU against FP32 reaches ``least_iou``. ``model``: its nodes get names.
    """
    what = before.record.what
    fold_constants(model.graph)
    name_nodes(model)  # as in to_half, so that every node can be kept
    blocks: dict[str, set[str]] = {}
    for node in model.graph.node:
        blocks.setdefault(block_of(node.name), set()).add(node.name)
    logger.info("%s: mean IoU against FP32 is %.4f; trying %d blocks in FP32", what, before.iou, len(blocks))

    def attempt(names: set[str]) -> tuple[onnx.ModelProto, GraphComparison]:
        half = to_half(model, keep | names, kind)
        return half, comparison.compare(half, what)

    alone = {block: _rank(attempt(names)[1]) for block, names in blocks.items()}
    best, now, remarks = to_half(model, keep, kind), before, []
    kept: set[str] = set()
    for block in sorted(blocks, key=lambda name: alone[name], reverse=True):
        half, compared = attempt(kept | blocks[block])
        if _rank(compared) <= _rank(now):
            continue
        remarks.append(
            f"{block} stays in FP32: rounding it costs labels (IoU against FP32 {now.iou:.4f}, now {compared.iou:.4f})"
        )
        best, now = half, compared
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
    levels = range_of(manifest.intensity)
    crops = plan_crops(images, height, width, intensity_range=levels, read_at_m=manifest.read_at_m)
    ranges = extremes(model, tensors, batches(crops, height, width, contract, manifest.normalization))
    return {name: max(abs(low), abs(high)) for name, (low, high) in ranges.items()}
