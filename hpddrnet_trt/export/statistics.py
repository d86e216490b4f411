"""What values a network's activations take over real images, in one streaming pass.

ONNX Runtime's own calibrators for percentile and entropy keep every activation of every image, so
their memory grows with the number of images. Here the graph itself reduces each activation to its
extremes and a sample, and one crop is held at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core import runtimes
from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.core.manifest import Manifest
from hpddrnet_trt.core.progress import progress_bar
from hpddrnet_trt.engines.base import input_contract
from hpddrnet_trt.export.histograms import BINS, Statistics, histogram, merge
from hpddrnet_trt.export.images import Crop, inputs
from hpddrnet_trt.export.statistics_cache import Cache, StatisticsCache
from hpddrnet_trt.graph.nodes import copied

SAMPLES = 65_536  # values per tensor and crop that enter its histogram
_FORMAT = 1  # of kept statistics: raise it when the same input would give others
_REDUCTIONS = ("ReduceMin", "ReduceMax", "ReduceSum")  # the sum shows NaN, which the other two pass over


def measure(
    model: Any,
    manifest: Manifest,
    tensors: Sequence[str],
    crops: Sequence[Crop],
    size: tuple[int, int],
    *,
    cache: Cache = "user",
) -> Iterator[tuple[Path, Statistics]]:
    """Statistics of the named tensors of an FP32 ``ModelProto``, one micrograph at a time.

    ``crops``: what :func:`~hpddrnet_trt.export.images.plan_crops` gives for crops of ``size``
    (height, width); those of one micrograph follow each other. ``cache``: where the
    statistics of crops are kept (:mod:`hpddrnet_trt.export.statistics_cache`), ``None`` for
    nowhere; crops that are there already are not computed again, whichever run or interrupted run left them.

    To compare numbers of micrographs, give the crops of the longest choice and the same number
    from every image: ``itertools.accumulate((entry for _, entry in measure(...)), merge)`` is the
    statistics of 1, 2, 3... micrographs. Raises :class:`UserError` when an activation is not finite.
    """
    contract = input_contract(manifest)
    kept = StatisticsCache(cache, _graph_digest(model, tensors), tensors)
    probe: _Probe | None = None
    feed = inputs(crops, *size, contract, manifest.normalization)
    with progress_bar(feed, total=len(crops), desc="calibrating", unit="crop") as progress:
        for image, group in groupby(progress, key=lambda entry: entry[0].image):
            parts: list[Statistics] = []
            for _, batch in group:
                key = _input_digest(batch)
                of_crop = kept.load(key)
                if of_crop is None:
                    probe = probe or _Probe(model, tensors, sampled=True)
                    of_crop = probe.statistics(batch)
                    kept.store(key, of_crop)
                parts.append(of_crop)
            yield image, reduce(merge, parts)
    kept.prune()


def extremes(
    model: Any, tensors: Sequence[str], batches: Iterable[npt.NDArray[Any]]
) -> dict[str, tuple[float, float]]:
    """(lowest, highest) value of each named float32 tensor of a ``ModelProto`` over all batches.

    Raises :class:`UsageError` without a batch, :class:`UserError` when an activation is not finite.
    """
    probe = _Probe(model, tensors, sampled=False)
    limits = [(np.inf, -np.inf)] * len(tensors)
    for batch in batches:
        limits = [
            (min(low, float(new_low)), max(high, float(new_high)))
            for (low, high), (new_low, new_high) in zip(limits, probe.extremes(batch), strict=True)
        ]
    if limits and limits[0][0] > limits[0][1]:
        raise UsageError("there is no image to measure activations on; give at least one micrograph")
    return dict(zip(tensors, limits, strict=True))


def _graph_digest(model: Any, tensors: Sequence[str]) -> str:
    """Of all that turns an input into statistics. ONNX Runtime's kernels round differently by version."""
    onnxruntime = runtimes.load_onnxruntime("calibrate models")
    digest = hashlib.sha256()
    about = [_FORMAT, BINS, SAMPLES, onnxruntime.__version__, list(tensors)]
    about += [[entry.domain, entry.version] for entry in model.opset_import]
    digest.update(json.dumps(about).encode())
    digest.update(model.graph.SerializeToString(deterministic=True))
    return digest.hexdigest()[:32]


def _input_digest(batch: npt.NDArray[Any]) -> str:
    # Of what the network sees, not of the file: crop window, grey window and normalisation are in it.
    digest = hashlib.sha256(f"{batch.dtype} {batch.shape}".encode())
    digest.update(np.ascontiguousarray(batch).data)
    return digest.hexdigest()


class _Probe:
    """A session that reduces each named tensor to its extremes and, on request, an even sample."""

    def __init__(self, model: Any, tensors: Sequence[str], *, sampled: bool) -> None:
        self._tensors = tensors
        graph = copied(model)
        self._input: str = graph.graph.input[0].name
        _reduce_tensors(graph.graph, tensors)
        if sampled:
            _sample_tensors(graph.graph, tensors)
        # By default the reductions run late, and the activations wait for them in memory.
        order = {"execution_order": "PRIORITY_BASED"}
        self._session: Any = runtimes.session(graph, "calibrate models", settings=order)
        self._shape: tuple[int, ...] | None = None
        self._steps: dict[str, npt.NDArray[np.int64]] = {}

    def extremes(self, batch: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """``[tensors, 2]``: lowest and highest values."""
        return self._checked(self._run(batch, _REDUCTIONS))

    def statistics(self, batch: npt.NDArray[Any]) -> Statistics:
        """Histograms of the tensors, of at most about :data:`SAMPLES` values each."""
        if batch.shape != self._shape:
            self._learn_steps(batch)
        values = self._run(batch, (*_REDUCTIONS, "Sample"))
        count = len(_REDUCTIONS) * len(self._tensors)
        bounds = self._checked(values[:count]).tolist()
        return {
            name: histogram(sample, (low, high))
            for name, sample, (low, high) in zip(self._tensors, values[count:], bounds, strict=True)
        }

    def _learn_steps(self, batch: npt.NDArray[Any]) -> None:
        self._steps = {_name("Step", index): np.array([2**60]) for index in range(len(self._tensors))}
        sizes = self._run(batch, ("Size",))
        for index, size in enumerate(sizes):
            # A prime step, so that the sample does not fall on the same columns of every row.
            self._steps[_name("Step", index)] = np.array([_next_prime(-(-int(size) // SAMPLES))])
        self._shape = batch.shape

    def _run(self, batch: npt.NDArray[Any], kinds: Iterable[str]) -> list[Any]:
        wanted = [_name(kind, index) for kind in kinds for index in range(len(self._tensors))]
        return list(self._session.run(wanted, {self._input: batch, **self._steps}))

    def _checked(self, values: Sequence[Any]) -> npt.NDArray[np.float64]:
        low, high, total = np.array(values, dtype=np.float64).reshape(len(_REDUCTIONS), -1)
        finite = np.isfinite(low) & np.isfinite(high) & ~np.isnan(total)
        if not finite.all():
            bad = self._tensors[int(np.flatnonzero(~finite)[0])]
            raise UserError(f"activation {bad!r} is not finite on a calibration image; check the checkpoint's weights")
        return np.stack([low, high], axis=1)


def _name(kind: str, index: int) -> str:
    return f"calibration.{kind}.{index}"


def _reduce_tensors(graph: Any, tensors: Sequence[str]) -> None:
    """Make the reductions of the named tensors the graph's only outputs."""
    from onnx import TensorProto, helper

    del graph.output[:]
    for kind in _REDUCTIONS:
        for index, tensor in enumerate(tensors):
            name = _name(kind, index)
            graph.node.append(helper.make_node(kind, [tensor], [name], name=name, keepdims=0))
            graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))


def _sample_tensors(graph: Any, tensors: Sequence[str]) -> None:
    """Add an input "Step" per named tensor, and outputs "Size" and "Sample": every so manieth value."""
    from onnx import TensorProto, helper, numpy_helper

    flat, start, end = (_name(what, 0) for what in ("Flat", "Start", "End"))
    for name, value in ((flat, -1), (start, 0), (end, 2**62)):
        graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), name))
    for index, tensor in enumerate(tensors):
        step, size, row, sample = (_name(kind, index) for kind in ("Step", "Size", "Row", "Sample"))
        graph.input.append(helper.make_tensor_value_info(step, TensorProto.INT64, [1]))
        graph.node.extend(
            [
                helper.make_node("Size", [tensor], [size], name=size),
                helper.make_node("Reshape", [tensor, flat], [row], name=row),
                helper.make_node("Slice", [row, start, end, start, step], [sample], name=sample),
            ]
        )
        graph.output.append(helper.make_tensor_value_info(size, TensorProto.INT64, []))
        graph.output.append(helper.make_tensor_value_info(sample, TensorProto.FLOAT, [None]))


def _next_prime(value: int) -> int:
    if value <= 1:
        return 1
    while any(value % factor == 0 for factor in range(2, int(value**0.5) + 1)):
        value += 1
    return value
