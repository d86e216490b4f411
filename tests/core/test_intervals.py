"""Intervals: what must hold for any data, and known answers."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from hpddrnet_trt.core.intervals import LEAST_UNITS, bootstrap, by_unit, t_interval, t_quantile, unit_name

Numbers = npt.NDArray[np.float64]
values = hnp.arrays(np.float64, st.integers(LEAST_UNITS, 30), elements=st.floats(-1e3, 1e3).map(lambda x: round(x, 3)))


def mean(sums: Numbers) -> Numbers:
    return np.asarray(sums[:, 0] / sums[:, 1])


def counted(numbers: Numbers) -> Numbers:
    return np.stack([numbers, np.ones_like(numbers)], axis=1)


@settings(deadline=None, max_examples=40)
@given(values)
def test_an_interval_holds_its_figure_and_is_near_students_for_a_mean(numbers: Numbers) -> None:
    found, exact = bootstrap(counted(numbers), mean), t_interval(numbers)
    assert found.low is not None
    assert found.high is not None
    assert exact.low is not None
    assert exact.high is not None
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(numbers.mean(), abs=1e-9)
    assert exact.high - exact.low == pytest.approx(found.high - found.low, rel=0.12, abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(hnp.arrays(np.float64, st.integers(LEAST_UNITS, 30), elements=st.floats(0, 1)))
def test_the_interval_of_a_fraction_stays_between_0_and_1(shares: Numbers) -> None:
    found = bootstrap(counted(shares), mean, fraction=True)
    assert found.low is not None
    assert found.high is not None
    assert -1e-12 <= found.low <= found.value + 1e-12
    assert found.value - 1e-12 <= found.high <= 1 + 1e-12


@settings(deadline=None, max_examples=20)
@given(st.floats(0, 1), st.integers(LEAST_UNITS, 20))
def test_equal_units_give_an_interval_without_width(value: float, units: int) -> None:
    found = bootstrap(counted(np.full(units, value)), mean, fraction=True)
    assert found.low == pytest.approx(value, abs=1e-9)
    assert found.high == pytest.approx(value, abs=1e-9)


@settings(deadline=None, max_examples=20)
@given(values)
def test_a_picture_a_specimen_is_as_without_specimens(numbers: Numbers) -> None:
    totals = counted(numbers)
    assert bootstrap(by_unit(totals, list(map(str, range(len(totals))))), mean) == bootstrap(totals, mean)


def test_few_units_have_no_interval_and_say_so() -> None:
    for units in range(LEAST_UNITS):
        for found in (bootstrap(np.ones((units, 2)), mean, of="specimens"), t_interval(np.ones(units), of="specimens")):
            assert (found.low, found.high, found.units) == (None, None, units)
            assert found.remark is not None
            assert found.remark.startswith("no interval: ")
    assert "no interval: 1 specimen, and" in str(bootstrap(np.ones((1, 2)), mean, of="specimens").remark)
    assert math.isnan(bootstrap(np.zeros((0, 2)), mean).value)
    assert t_interval([1, 2, 3], least=3).low is not None


def test_units_in_which_a_class_is_not_do_not_count() -> None:
    totals = np.array([[1, 2], [1, 3], [0, 0], [1, 4], [2, 4], [0, 0]])
    assert bootstrap(totals, mean).units == 4
    assert bootstrap(totals, mean).low is None


def test_sums_by_specimen() -> None:
    np.testing.assert_array_equal(by_unit([[1], [2], [4], [8]], ["a", None, "a", None]), [[5], [2], [8]])
    assert (unit_name([None, None]), unit_name(["a", None])) == ("pictures", "specimens")


def test_specimens_that_differ_make_the_interval_wider() -> None:
    rng = np.random.default_rng(3)
    numbers = np.repeat(rng.normal(size=8), 6) + 0.1 * rng.normal(size=48)
    by_picture = bootstrap(counted(numbers), mean)
    by_specimen = bootstrap(by_unit(counted(numbers), [str(place // 6) for place in range(48)]), mean)
    assert by_specimen.units == 8
    assert by_specimen.value == pytest.approx(by_picture.value)
    widths = [float(found.high or 0) - float(found.low or 0) for found in (by_picture, by_specimen)]
    assert widths[1] > 2 * widths[0]


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 19, 100])
def test_students_quantile(degrees: int) -> None:
    assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=2e-3)


def test_a_figure_is_the_same_every_time_and_has_a_text() -> None:
    numbers = counted(np.arange(10.0))
    found = bootstrap(numbers, mean)
    assert found == bootstrap(numbers, mean)
    assert t_interval([-1.0, 0, 1, 0, 0]).text(1, 100, sign=True) == "[-87.8, +87.8]"
    assert t_interval([1.0, 2]).text() == ""
