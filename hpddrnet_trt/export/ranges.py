"""From statistics of activations to the ranges that an 8-bit type spans.

``max``: all values seen. ``percentile``: all but 0.01 % of them (all, where so few are not zero).
``mse``: the range with the smallest mean squared error of clipping and rounding. ``entropy``: the
range whose quantised distribution has the smallest Kullback-Leibler divergence from the original one
(Migacz, "8-bit Inference with TensorRT", GTC 2017), which has nothing to go by where a tensor takes so
few values that 8 bits number them all: there it is the range of ``max``. (Measured on nasa-super1: the
network's own 8-bit input, 256 spikes in the histogram, was cut to half its range, which cost 0.05 of
mean IoU.)

The symmetric form (TensorRT) gives (-T, T); the other one (ONNX Runtime) ranges that hold zero, with
both ends drawn in by the same factor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.export.histograms import Histogram, Statistics
from hpddrnet_trt.graph.qdq import Range

Method = Literal["max", "percentile", "entropy", "mse"]
METHODS: tuple[str, ...] = get_args(Method)

PERCENTILE = 99.99  # share of values inside the range, in percent
_FACTORS = np.linspace(1.0, 0.05, 191)  # what "mse" and "entropy" try, of the range of "max"

_Counts = npt.NDArray[np.int64]


def ranges_of(statistics: Statistics, method: str, symmetric: bool) -> dict[str, Range]:
    """(lowest, highest) value to represent, by tensor; raises :class:`UsageError` for an unknown method."""
    if method not in METHODS:
        raise UsageError(f"unknown calibration method {method!r}; choose one of: {', '.join(METHODS)}")
    return {name: _range(entry, method, symmetric) for name, entry in statistics.items()}


def _range(entry: Histogram, method: str, symmetric: bool) -> Range:
    sides = _Sides(entry, symmetric)
    discrete = np.count_nonzero(sides.counts) <= 256
    if method == "max" or not entry.counts.size or (method == "entropy" and discrete):
        return sides.range(len(sides.below), len(sides.above))
    if method == "percentile":
        return _percentile(sides)
    return _search(sides, _divergence if method == "entropy" else _squared_error)


class _Sides:
    """Counts per bin from zero outwards, as far as the extremes reach; one side only when symmetric."""

    def __init__(self, entry: Histogram, symmetric: bool) -> None:
        self.width, self.zeros, self.symmetric = entry.width, entry.zeros, symmetric
        self.low, self.high = min(entry.low, 0.0), max(entry.high, 0.0)
        negative = entry.bins < 0
        if symmetric:
            self.low, self.high = 0.0, max(-self.low, self.high)
            negative[:] = False
        magnitudes = np.where(entry.bins < 0, ~entry.bins, entry.bins)
        self.below = self._dense(magnitudes[negative], entry.counts[negative], -self.low)
        self.above = self._dense(magnitudes[~negative], entry.counts[~negative], self.high)

    def _dense(self, bins: npt.NDArray[np.int16], counts: _Counts, extreme: float) -> _Counts:
        reach = int(extreme / self.width) + 1 if extreme > 0 else 0
        dense = np.zeros(reach, np.int64)
        np.add.at(dense, bins, counts)
        return dense

    @property
    def counts(self) -> _Counts:
        """From the lowest bin to the highest."""
        return np.concatenate([self.below[::-1], self.above])

    def range(self, below: int, above: int) -> Range:
        """The range of so many bins on either side, no wider than the extremes."""
        low, high = max(-below * self.width, self.low), min(above * self.width, self.high)
        return (-high, high) if self.symmetric else (low, high)


def _percentile(sides: _Sides) -> Range:
    beyond = (sides.counts.sum() + sides.zeros) * (1 - PERCENTILE / 100)
    if not sides.symmetric:
        beyond /= 2  # half on either side
    reach = _reach(sides.below, beyond), _reach(sides.above, beyond)
    if not any(reach):  # a range of nothing but zero has no scale
        reach = len(sides.below), len(sides.above)
    return sides.range(*reach)


def _reach(counts: _Counts, beyond: float) -> int:
    """The smallest number of bins from zero outwards that leaves at most ``beyond`` values out."""
    return int(np.count_nonzero(np.cumsum(counts[::-1]) > beyond))


def _search(sides: _Sides, loss: Callable[[_Sides, int, int], float]) -> Range:
    """The range with the smallest loss; of equal ones the widest."""
    best, smallest = (len(sides.below), len(sides.above)), np.inf
    for factor in _FACTORS:
        reach = int(np.ceil(factor * len(sides.below))), int(np.ceil(factor * len(sides.above)))
        value = loss(sides, *reach)
        if value < smallest:
            best, smallest = reach, value
    return sides.range(*best)


def _divergence(sides: _Sides, below: int, above: int) -> float:
    """Kullback-Leibler divergence of the quantised distribution, in nats.

    Zeros are left out: half of the values behind a ReLU are zero, exact in any range, and would hide
    the rest. What is cut off counts at the edge of the original distribution and nowhere in the quantised
    one, which is what makes clipping cost something.
    """
    levels, size = 128 if sides.symmetric else 256, below + above
    if size < levels:
        return np.inf
    counts, start = sides.counts, len(sides.below) - below
    inside = counts[start : start + size].astype(np.float64)
    original = inside.copy()
    original[0] += counts[:start].sum()
    original[-1] += counts[start + size :].sum()
    occupied = original > 0
    # Every level spreads its values evenly over those of its bins that hold any.
    first = np.arange(levels) * size // levels
    per_bin = np.add.reduceat(inside, first) / np.maximum(np.add.reduceat(occupied, first, dtype=np.int64), 1)
    quantized = np.repeat(per_bin, np.diff(first, append=size))[occupied]
    if not quantized.all():  # values cut off next to an empty level
        return np.inf
    original = original[occupied] / original.sum()
    return float((original * np.log(original / (quantized / quantized.sum()))).sum())


def _squared_error(sides: _Sides, below: int, above: int) -> float:
    """Sum of squared differences to the clipped and rounded values, zeros left out (they are exact)."""
    counts = sides.counts
    occupied = np.flatnonzero(counts)
    values = occupied - len(sides.below) + 0.5  # in widths of a bin
    step = above / 127 if sides.symmetric else (below + above) / 255
    rounded = np.rint(np.clip(values, -below, above) / step) * step
    return float((counts[occupied] * (values - rounded) ** 2).sum())
