"""Ranges of a network's activations over real images, in one or two streaming passes.

ONNX Runtime's own calibrators for percentile and entropy keep every activation of every image, so
their memory grows with the number of images. Here a pass holds one batch at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.errors import UsageError, UserError

Method = Literal["minmax", "percentile", "mse"]
METHODS: tuple[str, ...] = get_args(Method)
Range = tuple[float, float]
Batches = Callable[[], Iterable[npt.NDArray[Any]]]  # called once per pass

BINS = 2048
PERCENTILE = 99.99  # share of values inside the range, in percent
LEVELS = 255  # steps of an 8-bit range, for the error that "mse" minimises
_SAMPLES = 200_000  # values per tensor and batch that enter its histogram


def observe(model: Any, tensors: Sequence[str], batches: Batches, method: str) -> dict[str, Range]:
    """(lowest, highest) of each named tensor of an ONNX ``ModelProto``, float32 activations.

    ``minmax`` takes the extremes. ``percentile`` leaves out 0.01 % of the values, half on each
    side. ``mse`` shrinks the range by the factor that minimises the mean squared error of clipping
    plus rounding (rounding error: step^2 / 12), searched over the histogram. The last two need a
    second pass. Raises :class:`UsageError` for another method, :class:`UserError` when an
    activation is not finite.
    """
    if method not in METHODS:
        raise UsageError(f"unknown calibration method {method!r}; choose one of: {', '.join(METHODS)}")
    extremes = _extremes(model, tensors, batches())
    if method == "minmax":
        return extremes
    histograms = _histograms(model, extremes, batches())
    shrink = _percentile_range if method == "percentile" else _mse_range
    return {name: shrink(histograms[name], extremes[name]) for name in tensors}


def _session(model: Any, outputs: Sequence[Any], nodes: Sequence[Any] = ()) -> Any:
    import onnx
    import onnxruntime

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.node.extend(nodes)
    del probe.graph.output[:]
    probe.graph.output.extend(outputs)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _extremes(model: Any, tensors: Sequence[str], batches: Iterable[npt.NDArray[Any]]) -> dict[str, Range]:
    from onnx import TensorProto, helper

    # Reductions inside the graph: only two numbers per tensor leave the runtime, and each
    # activation is freed as soon as its consumers have run.
    nodes, outputs = [], []
    for index, name in enumerate(tensors):
        for kind in ("ReduceMin", "ReduceMax"):
            result = f"calibration_{kind}_{index}"
            nodes.append(helper.make_node(kind, [name], [result], name=result, keepdims=0))
            outputs.append(helper.make_tensor_value_info(result, TensorProto.FLOAT, []))
    session = _session(model, outputs, nodes)
    low = np.full(len(tensors), np.inf)
    high = np.full(len(tensors), -np.inf)
    for batch in batches:
        values = np.array(session.run(None, {session.get_inputs()[0].name: batch}), dtype=np.float64).reshape(-1, 2)
        if not np.isfinite(values).all():
            bad = tensors[int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])]
            raise UserError(f"activation {bad!r} is not finite on a calibration image; check the checkpoint's weights")
        low, high = np.minimum(low, values[:, 0]), np.maximum(high, values[:, 1])
    return {name: (float(low[index]), float(high[index])) for index, name in enumerate(tensors)}


def _histograms(
    model: Any, extremes: Mapping[str, Range], batches: Iterable[npt.NDArray[Any]]
) -> dict[str, npt.NDArray[np.int64]]:
    from onnx import TensorProto, helper

    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in extremes]
    session = _session(model, outputs)
    counts = {name: np.zeros(BINS, np.int64) for name in extremes}
    for batch in batches:
        results = session.run(list(extremes), {session.get_inputs()[0].name: batch})
        for name, values in zip(extremes, results, strict=True):
            flat = values.ravel()
            # A prime stride, so that the sample does not fall on the same columns of every row.
            flat = flat[:: _next_prime(flat.size // _SAMPLES)]
            counts[name] += np.histogram(flat, bins=BINS, range=_open(extremes[name]))[0]
    return counts


def _next_prime(value: int) -> int:
    if value <= 1:
        return 1
    while any(value % factor == 0 for factor in range(2, int(value**0.5) + 1)):
        value += 1
    return value


def _open(extremes: Range) -> Range:
    """A range of non-zero width (a constant activation has none)."""
    low, high = extremes
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _percentile_range(counts: npt.NDArray[np.int64], extremes: Range) -> Range:
    edges = np.linspace(*_open(extremes), BINS + 1)
    share = np.cumsum(counts) / max(counts.sum(), 1)
    tail = (1 - PERCENTILE / 100) / 2
    first = int(np.searchsorted(share, tail, side="right"))
    last = min(int(np.searchsorted(share, 1 - tail)), BINS - 1)
    return max(float(edges[first]), extremes[0]), min(float(edges[last + 1]), extremes[1])


def _mse_range(counts: npt.NDArray[np.int64], extremes: Range) -> Range:
    edges = np.linspace(*_open(extremes), BINS + 1)
    centres = (edges[:-1] + edges[1:]) / 2
    low, high = min(extremes[0], 0.0), max(extremes[1], 0.0)  # a quantised range always holds zero
    best, best_error = extremes, np.inf
    for factor in np.linspace(1.0, 0.2, 81):
        clipped = centres - np.clip(centres, factor * low, factor * high)
        inside = clipped == 0
        step = factor * (high - low) / LEVELS
        error = float((counts * clipped**2).sum() + counts[inside].sum() * step**2 / 12)
        if error < best_error:
            best, best_error = (factor * low, factor * high), error
    return best
