"""Ranges from statistics: what each method keeps, in the symmetric form and the other one."""

from __future__ import annotations

import itertools
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.export.histograms import histogram, merge
from hpddrnet_trt.export.ranges import METHODS, _divergence, _Sides, ranges_of
from hpddrnet_trt.graph.qdq import Range

FORMS = pytest.mark.parametrize("symmetric", [True, False])
Values = npt.NDArray[np.floating[Any]]


def range_of(values: Values, method: str, symmetric: bool = True) -> Range:
    return ranges_of({"x": histogram(values)}, method, symmetric)["x"]


def quantized(values: Values, span: Range, symmetric: bool) -> Values:
    """Values after 8-bit rounding, computed the way a runtime does."""
    low, high = span
    step = high / 127 if symmetric else (high - low) / 255
    zero = 0 if symmetric else np.rint(-low / step)
    lowest, highest = (-127, 127) if symmetric else (0, 255)
    return (np.clip(np.rint(values / step) + zero, lowest, highest) - zero) * step


@FORMS
@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    tail=st.floats(0.5, 5),  # exponent of the distribution: from a few huge values to nearly uniform
    scale=st.floats(1e-6, 1e6),
    shift=st.floats(-1, 1),
)
def test_every_method_stays_within_the_extremes_and_holds_zero(
    symmetric: bool, seed: int, tail: float, scale: float, shift: float
) -> None:
    values = (np.random.default_rng(seed).pareto(tail, 300) + shift).astype(np.float32) * np.float32(scale)
    widest = range_of(values, "max", symmetric)
    largest = float(np.abs(values).max())
    expected = (-largest, largest) if symmetric else (min(float(values.min()), 0), max(float(values.max()), 0))
    assert widest == expected
    for method in METHODS:
        low, high = range_of(values, method, symmetric)
        assert widest[0] <= low <= 0 <= high <= widest[1]
        assert low < high
        assert not symmetric or low == -high


@FORMS
@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_of_one_value(symmetric: bool, method: str) -> None:
    """Zero, of either sign, once or often, and one that the sample missed; the last bin's width is the tolerance."""
    assert range_of(np.zeros(100), method, symmetric) == (0, 0)
    assert ranges_of({"x": histogram(np.zeros(100), (0.0, 8.0))}, method, symmetric)["x"][1] == 8
    for value, count in itertools.product([5.0, -5.0, 2.0, -1e-30, 1e30], [1, 1000]):
        low, high = range_of(np.full(count, value, np.float32), method, symmetric)
        assert max(-low, high) == pytest.approx(abs(value), rel=1e-3)
        assert symmetric or (low == 0 if value > 0 else high == 0)


@FORMS
def test_percentile_of_almost_nothing_but_zeros_has_a_scale(symmetric: bool) -> None:
    values = np.zeros(100_000)
    values[:5] = [1, 2, 3, 4, 6]
    low, high = range_of(values, "percentile", symmetric)
    assert (low, high) == ((-6, 6) if symmetric else (0, 6))


def test_an_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'minmax'.*max, percentile, entropy, mse"):
        ranges_of({}, "minmax", True)


def test_percentile_leaves_out_one_in_ten_thousand() -> None:
    values = np.linspace(0, 1, 100_001)
    low, high = range_of(np.concatenate([values, -values]), "percentile")
    assert high == pytest.approx(0.9999, abs=1e-3)
    low, high = range_of(np.concatenate([values, -values * 3]), "percentile", symmetric=False)
    assert (low, high) == pytest.approx((-2.9994, 0.9998), abs=3e-3)
    for count, reach in ((8, 9), (4, 1)):  # half of 10 values on either side
        lonely = np.repeat([-9.0, 9.0], count)
        spread = range_of(np.concatenate([values, -values[:1], lonely]), "percentile", symmetric=False)
        assert spread[1] == pytest.approx(reach, abs=5e-3)


def test_zeros_count_for_percentile_and_not_for_the_others() -> None:
    values = np.random.default_rng(0).normal(0, 1, 20_000)
    with_zeros = np.concatenate([values, np.zeros(200_000)])
    for method in ("entropy", "mse"):
        assert range_of(with_zeros, method) == range_of(values, method)
    assert range_of(with_zeros, "percentile")[1] < range_of(values, "percentile")[1]


@FORMS
def test_mse_is_the_best_of_many_ranges(symmetric: bool) -> None:
    rng = np.random.default_rng(1)
    for values in (rng.laplace(0, 1, 50_000), rng.exponential(1, 50_000), rng.normal(1, 2, 50_000)):
        low, high = range_of(values, "mse", symmetric)
        widest = range_of(values, "max", symmetric)
        errors = {
            factor: float(np.mean((values - quantized(values, span, symmetric)) ** 2))
            for factor in np.linspace(0.1, 1, 46)
            for span in [(widest[0] * factor, widest[1] * factor)]
        }
        error = float(np.mean((values - quantized(values, (low, high), symmetric)) ** 2))
        assert error <= min(errors.values()) * 1.02
        assert error < errors[1.0]


def test_a_lonely_outlier_is_cut_and_a_uniform_range_kept() -> None:
    uniform = np.linspace(-1, 1, 200_001)
    for method in ("entropy", "mse"):
        assert range_of(uniform, method)[1] == pytest.approx(1, abs=0.02)
    spiked = np.append(uniform, 10)
    assert range_of(spiked, "entropy")[1] == pytest.approx(1, abs=0.05)
    # Rounding costs n (T / 127)^2 / 12, clipping (10 - T)^2: the sum is smallest at this T.
    best = 10 / (1 + uniform.size / (12 * 127**2))
    assert range_of(spiked, "mse")[1] == pytest.approx(best, rel=0.03)


def reference_divergence(counts: list[int], size: int, levels: int) -> float:
    """The published procedure, written out bin by bin."""
    p = [float(count) for count in counts[:size]]
    p[-1] += sum(counts[size:])
    q = [0.0] * size
    groups: dict[int, list[int]] = {}
    for level in range(levels):
        for index in range(level * size // levels, (level + 1) * size // levels):
            groups.setdefault(level, []).append(index)
    for members in groups.values():
        holding = [index for index in members if p[index] > 0]
        for index in holding:
            q[index] = sum(counts[other] for other in members) / len(holding)
    total_p, total_q = sum(p), sum(q)
    if any(a > 0 and b == 0 for a, b in zip(p, q, strict=True)):
        return float("inf")
    return sum(a / total_p * np.log(a / total_p * total_q / b) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.mark.parametrize("size", [128, 200, 1000, 2049])
@pytest.mark.parametrize("spread", [0.05, 0.3])
def test_divergence_as_published(size: int, spread: float) -> None:
    values = np.abs(np.random.default_rng(2).normal(0, spread, 30_000)).clip(0, 1)
    sides = _Sides(histogram(values, (0.0, 1.0)), symmetric=True)
    expected = reference_divergence(sides.counts.tolist(), size, 128)
    assert _divergence(sides, 0, size) == pytest.approx(expected, rel=1e-9)
    assert expected >= 0


@FORMS
def test_entropy_keeps_the_whole_range_of_an_8_bit_image(symmetric: bool) -> None:
    grey = np.random.default_rng(4).normal(100, 40, 100_000).clip(0, 255).astype(np.uint8)
    values = (grey.astype(np.float32) - 104) / 37
    assert range_of(values, "entropy", symmetric) == range_of(values, "max", symmetric)


def test_entropy_lies_between_the_bulk_and_the_extremes_of_a_heavy_tail() -> None:
    values = np.abs(np.random.default_rng(3).standard_t(3, 500_000))
    low, high = range_of(values, "entropy", symmetric=False)
    assert low == 0
    assert np.quantile(values, 0.9) < high < values.max() / 2


@FORMS
@settings(max_examples=25)
@given(seed=st.integers(0, 1000), parts=st.integers(1, 5))
def test_ranges_do_not_depend_on_how_values_were_grouped(symmetric: bool, seed: int, parts: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(0, rng.choice([1e-3, 1, 1e3], 400)).astype(np.float32)
    together = reduce(merge, ({"x": histogram(part)} for part in np.array_split(rng.permutation(values), parts)))
    for method in METHODS:
        assert ranges_of(together, method, symmetric)["x"] == range_of(values, method, symmetric)
