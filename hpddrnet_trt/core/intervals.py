"""How far a figure of some pictures may lie from that of all pictures of their kind: 95 % intervals.

What is independent is a **unit**: a picture or, where several pictures show one specimen, the specimen. Every figure
here follows from sums over units (pixels of a class, errors and their number), so a resample of units is a weighted
sum, and :func:`bootstrap` makes thousands of them at once.

The interval is Student's, ``value ± t(n - 1) SE``, with the standard error of the resamples (Efron 1979), times
``sqrt(n / (n - 1))`` because a resample of n units varies too little by that factor (Hesterberg, The American
Statistician 69, 371, 2015). The plain percentile interval is too narrow for the handful of pictures that a test split
has: docs/results/measurements-2026-11.md has how often each covers. Fractions are taken on the logit scale, where
they have no ends, so that an interval stays between 0 and 1.

Fewer than :data:`LEAST_UNITS` units give no interval: it would have to be believed that they vary as all others do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
LEAST_UNITS = 5
DRAWS = 2000  # resamples: the standard error is then known to about 2 %

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval. ``units``: how many pictures or specimens it rests on; ``of``: which of both.

    ``value`` is NaN where the figure does not exist; ``low`` and ``high`` are None where no interval can be trusted,
    and ``remark`` then says why.
    """

    value: float
    low: float | None
    high: float | None
    units: int
    remark: str | None = None
    of: str = "pictures"

    def text(self, digits: int = 2, factor: float = 1.0, *, sign: bool = False) -> str:
        """E.g. ``[0.71, 0.93]``, all times ``factor``; with ``sign`` ``[-0.20, +0.71]``; empty without an interval."""
        if self.low is None or self.high is None:
            return ""
        form = f"{'+' if sign else ''}.{digits}f"
        return f"[{factor * self.low:{form}}, {factor * self.high:{form}}]"


def bootstrap(
    totals: npt.ArrayLike,
    statistic: Callable[[Numbers], Numbers],
    *,
    fraction: bool = False,
    of: str = "pictures",
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Interval of ``statistic`` over units.

    ``totals``: ``[units, ...]``, what each unit adds to the sums that the figure is made of. ``statistic``: from sums
    ``[n, ...]`` to n figures, NaN for one that does not exist. ``fraction``: the figure lies between 0 and 1.
    ``of``: what the units are called. Units that add nothing (all zero, a class that is not in them) do not count.
    """
    sums = np.asarray(totals, dtype=np.float64)
    sums = sums[sums.reshape(len(sums), -1).any(axis=1)] if sums.size else sums[:0]
    units = len(sums)
    value = float(statistic(sums.sum(axis=0)[np.newaxis])[0]) if units else math.nan
    if units < LEAST_UNITS or math.isnan(value):
        return Interval(value, None, None, units, too_few(units, of), of)
    found = statistic(np.tensordot(resamples(units, draws, seed), sums, axes=1))
    found = found[~np.isnan(found)]
    error = float(found.std()) * math.sqrt(units / (units - 1)) if found.size else math.nan
    return _student(value, error, units, of, fraction=fraction)


@lru_cache(maxsize=2)
def resamples(units: int, draws: int = DRAWS, seed: int = 0) -> Numbers:
    """How often each unit is in each resample, ``[draws, units]``; the same for every figure of the same units."""
    counts = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), draws).astype(np.float64)
    counts.flags.writeable = False
    return counts


def t_interval(values: npt.ArrayLike, *, of: str = "pictures", least: int = LEAST_UNITS) -> Interval:
    """Interval of the mean of one value a unit, exact for values from a normal distribution (Student 1908).

    It is the one that :func:`bootstrap` tends to for a mean. ``least``: units below which there is no interval, not
    under 2. NaN values do not count.
    """
    numbers = np.asarray(values, dtype=np.float64)
    numbers = numbers[~np.isnan(numbers)]
    units = len(numbers)
    value = float(numbers.mean()) if units else math.nan
    if units < max(2, least):
        return Interval(value, None, None, units, too_few(units, of, max(2, least)), of)
    return _student(value, float(numbers.std(ddof=1)) / math.sqrt(units), units, of)


def by_unit(totals: npt.ArrayLike, groups: Sequence[str | None]) -> Numbers:
    """Sums of the pictures of each specimen, ``[units, ...]`` of ``[pictures, ...]``; a picture without one stands
    for itself."""
    parts = np.asarray(totals, dtype=np.float64)
    names = [("picture", str(place)) if group is None else ("group", group) for place, group in enumerate(groups)]
    order = {name: unit for unit, name in enumerate(dict.fromkeys(names))}
    sums = np.zeros((len(order), *parts.shape[1:]))
    np.add.at(sums, [order[name] for name in names], parts)
    return sums


def unit_name(groups: Sequence[str | None]) -> str:
    """What the units of these pictures are called."""
    return "pictures" if all(group is None for group in groups) else "specimens"


def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Half width, in standard errors, of the two-sided Student interval with so many degrees of freedom, at least 1.

    Exact for one and two; above, the expansion of Cornish and Fisher (Abramowitz and Stegun 26.7.5), which for 95 % is
    right to 0.15 %.
    """
    if degrees == 1:
        return math.tan(math.pi * confidence / 2)
    if degrees == 2:
        return confidence * math.sqrt(2 / (1 - confidence**2))
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, 1))


def too_few(units: int, of: str, least: int = LEAST_UNITS) -> str:
    """Why there is no interval, for people."""
    count = f"1 {of.removesuffix('s')}" if units == 1 else f"{units or 'no'} {of}"
    return f"no interval: {count}, and fewer than {least} do not tell how others vary"


def _student(value: float, error: float, units: int, of: str, *, fraction: bool = False) -> Interval:
    """``value`` and its interval for a standard error."""
    half = t_quantile(units - 1) * error
    if not fraction or half == 0 or not 0 < value < 1:
        return Interval(value, value - half, value + half, units, of=of)
    logit, half = math.log(value / (1 - value)), half / (value * (1 - value))
    low, high = (_expit(logit + side * half) for side in (-1, 1))
    return Interval(value, low, high, units, of=of)


def _expit(logit: float) -> float:
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else 1 - 1 / (1 + math.exp(logit))
