"""Histograms of activations that merge exactly, in any order.

The bins of a histogram are aligned at zero and its half-width is a power of two. A larger value
doubles the half-width, and bins merge in pairs without splitting a count: histograms of the same
values are equal however the values were grouped. The extremes beside them are exact.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

BINS = 4096  # on each side of zero
_SMALLEST = -100  # exponent of the half-width of an activation that is zero everywhere
_DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True, eq=False)
class Histogram:
    """Values of one tensor.

    Bin ``k >= 0`` holds the values in ``[k, k + 1)`` widths, bin ``~k`` those in ``(-k - 1, -k]``; a width is
    ``2**exponent / BINS``. Zeros are in no bin: they are exact in any quantised range.
    """

    low: float  # of all values, also those that were not sampled
    high: float
    exponent: int  # every value is smaller than 2**exponent in magnitude
    zeros: int
    bins: npt.NDArray[np.int16]  # the occupied ones, rising
    counts: npt.NDArray[np.int64]  # their sizes

    @property
    def width(self) -> float:
        """Width of a bin."""
        return float(np.ldexp(1.0 / BINS, self.exponent))


Statistics = Mapping[str, Histogram]  # by tensor name


def histogram(values: npt.NDArray[np.floating[Any]], extremes: tuple[float, float] | None = None) -> Histogram:
    """The histogram of finite ``values`` (any shape); ``extremes`` of the tensor they are a sample of."""
    flat = values.astype(np.float64).ravel()  # scaling by a power of two is exact here
    low, high = extremes or (float(flat.min()), float(flat.max()))
    largest = max(abs(low), abs(high))
    exponent = max(int(np.frexp(largest)[1]), _SMALLEST) if largest else _SMALLEST
    flat = flat[flat != 0]
    magnitude = (np.abs(flat) * np.ldexp(float(BINS), -exponent)).astype(np.int64)
    dense = np.bincount(np.where(flat < 0, ~magnitude, magnitude) + BINS, minlength=2 * BINS)
    return _sparse(dense, low, high, exponent, values.size - flat.size)


def _sparse(dense: npt.NDArray[np.int64], low: float, high: float, exponent: int, zeros: int) -> Histogram:
    occupied = np.flatnonzero(dense)
    return Histogram(low, high, exponent, zeros, (occupied - BINS).astype(np.int16), dense[occupied])


def merge(first: Statistics, second: Statistics) -> dict[str, Histogram]:
    """The statistics of both together; they are of the same tensors."""
    return {name: _merge(entry, second[name]) for name, entry in first.items()}


def _merge(first: Histogram, second: Histogram) -> Histogram:
    exponent = max(first.exponent, second.exponent)
    dense = np.zeros(2 * BINS, np.int64)
    for part in (first, second):
        # An arithmetic shift halves k for bins k and ~k alike. Shifted by more than 12, all are 0 or ~0.
        shift = min(exponent - part.exponent, 15)
        np.add.at(dense, (part.bins >> shift).astype(np.int64) + BINS, part.counts)
    low, high = min(first.low, second.low), max(first.high, second.high)
    return _sparse(dense, low, high, exponent, first.zeros + second.zeros)


# ------------------------------------------------------------------------------- as bytes


def to_bytes(statistics: Statistics) -> bytes:
    """A compressed ``npz`` without pickles, its SHA-256 behind it; about 2 bytes per occupied bin."""
    parts = list(statistics.values())
    counts = np.concatenate([part.counts for part in parts])
    stream = io.BytesIO()
    np.savez_compressed(
        stream,
        tensors=np.frombuffer(json.dumps(list(statistics)).encode(), np.uint8),
        extremes=np.array([(part.low, part.high) for part in parts]),
        exponents=np.array([part.exponent for part in parts], np.int16),
        zeros=np.array([part.zeros for part in parts], np.int64),
        occupied=np.array([part.bins.size for part in parts], np.int64),
        bins=np.concatenate([part.bins for part in parts]),
        counts=counts.astype(np.min_scalar_type(int(counts.max(initial=0)))),
    )
    content = stream.getvalue()
    return content + hashlib.sha256(content).digest()


def from_bytes(content: bytes, tensors: Sequence[str]) -> dict[str, Histogram]:
    """What :func:`to_bytes` wrote for these tensors; raises ``ValueError`` for anything else."""
    payload = content[:-_DIGEST_BYTES]
    if hashlib.sha256(payload).digest() != content[-_DIGEST_BYTES:]:
        raise ValueError("the checksum does not match")
    with np.load(io.BytesIO(payload), allow_pickle=False) as stored:
        arrays = dict(stored)
    if json.loads(arrays["tensors"].tobytes()) != list(tensors):
        raise ValueError("these are the statistics of other tensors")
    ends = np.cumsum(arrays["occupied"])[:-1]
    columns = zip(
        arrays["extremes"].tolist(),
        arrays["exponents"].tolist(),
        arrays["zeros"].tolist(),
        np.split(arrays["bins"], ends),
        np.split(arrays["counts"].astype(np.int64), ends),
        strict=True,
    )
    return {
        name: Histogram(low, high, exponent, zeros, bins, counts)
        for name, ((low, high), exponent, zeros, bins, counts) in zip(tensors, columns, strict=True)
    }
