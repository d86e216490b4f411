"""How sure a model is of its classes, and how far the area fractions that it gives may be off.

**Temperature.** Class scores become probabilities with ``softmax(logits / T)``, where T makes the masks of held-out
pictures most likely (C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On calibration of modern neural networks", ICML
2017). The order of the classes, and so every label, stays.

**Error of a fraction.** Were pixels independent, a fraction of a million would be known to a thousandth. They are
not: a boundary that is drawn too far out is so all around, and a patch taken for another class is wrong as a whole. So
the errors that were made on held-out pictures are measured, in units of the *uncertain share* of a class, the mean of
p (1 - p) over the picture: twice as much boundary, twice the error. Their variance has a part that a whole picture
shares and one that averages out over patches,

    error = share x r,   mean of r^2 = shared^2 + patch^2 / pixels,

both found from crops of several sizes. The interval of a new picture is ``± t(pictures) sqrt(mean of r^2) share``, with
Student's t for as many degrees of freedom as there were held-out pictures, because crops and classes of one picture
are not independent. It rests on the new picture being like those: docs/uncertainty.md has how often that held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.intervals import t_quantile
from hpddrnet_trt.core.manifest import IGNORE_INDEX, MAX_TEMPERATURE, FractionErrorRecord
from hpddrnet_trt.core.metrics import arg_max

STEP = 4  # class scores are looked at in every so many pixels of each direction: the network's are no finer
BINS = 15  # of a reliability diagram, as usual
CROPS = (128, 256)  # edges, in pixels, of the crops whose fractions are measured beside those of whole pictures
_LEAST_LABELLED = 0.5  # of a crop
_LEAST_SHARE = 1e-3  # of the area: a class that the model sees nothing of may be there all the same
_SAMPLE = 200_000  # pixels that the temperature is fitted on
_TINY = np.float32(1e-30)  # the least probability, so that it has a logarithm
_GOLDEN = (math.sqrt(5) - 1) / 2

Real = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.float64]
Grey8 = npt.NDArray[np.uint8]


class ScoredPicture(NamedTuple):
    """A picture with a mask: ``probabilities`` float32 ``[C, h, w]``, not calibrated, of every :data:`STEP`-th pixel;
    ``labels`` and ``truth`` uint8 ``[H, W]`` of all."""

    probabilities: Real
    labels: Grey8
    truth: Grey8


def calibrated(probabilities: Real, temperature: float | None) -> Real:
    """Probabilities over axis 1 of ``[N, C, ...]`` at ``temperature``: what softmax gives of logits divided by it."""
    if temperature is None or temperature == 1:
        return probabilities
    powers = np.power(probabilities, np.float32(1 / temperature))
    powers /= powers.sum(axis=1, keepdims=True)
    return powers


def uncertain_shares(probabilities: Real, temperature: float | None) -> Numbers:
    """Mean of p (1 - p) of each class ``[C]``, of probabilities ``[C, ...]`` that are not calibrated."""
    chance = calibrated(probabilities[np.newaxis], temperature)[0].reshape(len(probabilities), -1)
    shares: Numbers = (chance * (1 - chance)).mean(axis=1, dtype=np.float64)
    return shares


def fit_temperature(pictures: Sequence[ScoredPicture], seed: int = 0) -> float:
    """The temperature under which the masks are most likely, to 0.1 %; 1 where no pixel is labelled.

    Of more than 200,000 labelled pixels a random part is taken.
    """
    pairs = [_labelled(picture) for picture in pictures]
    chance = np.concatenate([values for values, _ in pairs], axis=1)
    truth = np.concatenate([values for _, values in pairs])
    if not truth.size:
        return 1.0
    if truth.size > _SAMPLE:
        taken = np.random.default_rng(seed).choice(truth.size, _SAMPLE, replace=False)
        chance, truth = chance[:, taken], truth[taken]
    logits = np.log(np.maximum(chance, _TINY))
    logits -= logits.max(axis=0)
    right = np.take_along_axis(logits, truth[np.newaxis].astype(np.intp), axis=0)[0]

    def loss(power: float) -> float:
        scale = np.float32(math.exp(-power))
        return float((np.log(np.exp(scale * logits).sum(axis=0)) - scale * right).mean(dtype=np.float64))

    return math.exp(_lowest(loss, -math.log(MAX_TEMPERATURE), math.log(MAX_TEMPERATURE)))


def _labelled(picture: ScoredPicture) -> tuple[Real, Grey8]:
    """Probabilities ``[C, n]`` and classes ``[n]`` of the labelled pixels that were looked at."""
    truth = picture.truth[::STEP, ::STEP]
    known = truth != IGNORE_INDEX
    return picture.probabilities[:, known], truth[known]


def _lowest(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function with one valley is lowest: golden section (J. Kiefer, Proc. Am. Math. Soc. 4, 502, 1953)."""
    inner = [high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)]
    values = [function(place) for place in inner]
    while high - low > 1e-3:
        if values[0] < values[1]:
            high, inner, values = inner[1], [inner[1] - _GOLDEN * (inner[1] - low), inner[0]], [math.nan, values[0]]
            values[0] = function(inner[0])
        else:
            low, inner, values = inner[0], [inner[1], inner[0] + _GOLDEN * (high - inner[0])], [values[1], math.nan]
            values[1] = function(inner[1])
    return (low + high) / 2


# ------------------------------------------------------------------------------- fractions


@dataclass(frozen=True)
class FractionErrors:
    """Crops of equal size: ``errors`` ``[n, C]``, label fraction less true one; ``shares`` ``[n, C]``, the uncertain
    ones; ``pixels``: labelled ones, on average."""

    errors: Numbers
    shares: Numbers
    pixels: float


def fraction_errors(
    pictures: Sequence[ScoredPicture], temperature: float | None, crop: int | None = None
) -> FractionErrors | None:
    """What area fractions are off by in crops of ``crop`` x ``crop`` pixels, or in whole pictures; None without one
    that is half labelled at least."""
    found = [each for picture in pictures for each in _crop_errors(picture, temperature, crop)]
    if not found:
        return None
    errors, shares, pixels = zip(*found, strict=True)
    return FractionErrors(np.stack(errors), np.stack(shares), float(np.mean(pixels)))


def _crop_errors(
    picture: ScoredPicture, temperature: float | None, crop: int | None
) -> Iterator[tuple[Numbers, Numbers, int]]:
    height, width = picture.truth.shape
    high, wide = (height, width) if crop is None else (crop, crop)
    classes = len(picture.probabilities)
    for top in range(0, height - high + 1, high):
        for left in range(0, width - wide + 1, wide):
            here = np.s_[top : top + high, left : left + wide]
            looked = np.s_[:, -(-top // STEP) : -(-(top + high) // STEP), -(-left // STEP) : -(-(left + wide) // STEP)]
            truth, known = picture.truth[here], picture.truth[here] != IGNORE_INDEX
            pixels = int(known.sum())
            seen = picture.truth[::STEP, ::STEP][looked[1:]] != IGNORE_INDEX
            if pixels < _LEAST_LABELLED * truth.size or not seen.any():
                continue
            counts = [np.bincount(each[here][known], minlength=classes) for each in (picture.labels, picture.truth)]
            shares = uncertain_shares(picture.probabilities[looked][:, seen], temperature)
            yield (counts[0] - counts[1]) / pixels, shares, pixels


def fit_fraction_errors(
    pictures: Sequence[ScoredPicture], temperature: float | None, source: str = ""
) -> FractionErrorRecord | None:
    """The errors of fractions on pictures with masks, for a model's description; None where none is half labelled."""
    measured = [fraction_errors(pictures, temperature, crop) for crop in (*CROPS, None)]
    whole = measured[-1]
    if whole is None:
        return None
    squares, inverse = [], []
    for sizes in measured:
        if sizes is not None:
            squares.append(max(float(((sizes.errors / _bounded(sizes.shares)) ** 2).mean()), 1e-12))
            inverse.append(1 / sizes.pixels)
    shared, patch = _non_negative(np.array(inverse), np.array(squares))
    return FractionErrorRecord(
        shared=math.sqrt(shared), patch=math.sqrt(patch), pixels=round(whole.pixels), pictures=len(whole.errors),
        source=source,
    )  # fmt: skip


def _non_negative(inverse: Numbers, squares: Numbers) -> tuple[float, float]:
    """Not negative a and b with a + b ``inverse`` near ``squares``, in relation to these."""
    columns = [1 / squares, inverse / squares]
    tried = [(float(column.sum() / (column**2).sum()), column) for column in columns]
    fits = [(tried[0][0], 0.0), (0.0, tried[1][0])]
    if len(squares) > 1:
        both = np.linalg.lstsq(np.stack(columns, axis=1), np.ones(len(squares)), rcond=None)[0]
        fits += [(float(both[0]), float(both[1]))] if both.min() >= 0 else []
    return min(fits, key=lambda fit: float(((fit[0] * columns[0] + fit[1] * columns[1] - 1) ** 2).sum()))


def half_widths(shares: Numbers, pixels: int, record: FractionErrorRecord) -> Numbers:
    """Half the 95 % interval of each class's fraction.

    ``shares``: :func:`uncertain_shares`. A picture larger than those that were measured gets no narrower interval.
    """
    patches = record.patch**2 / max(1, min(pixels, record.pixels))
    widths: Numbers = t_quantile(record.pictures) * math.sqrt(record.shared**2 + patches) * _bounded(shares)
    return widths


def _bounded(shares: Numbers) -> Numbers:
    return np.hypot(shares, _LEAST_SHARE)


MOST_PICTURES = 10_000  # of a specimen that are thought of


@dataclass(frozen=True)
class MeanFraction:
    """Mean area fraction of a specimen over fields of view that are picked at random and equally large.

    ``value`` with its 95 % interval ``low`` to ``high`` (None for a single picture): Student's interval of the
    pictures' mean, as ASTM E562 has it for volume fractions, and in quadrature ``shared``, half the interval of the
    model's own error, which may be alike in all of them (None where it is not known): held-out pictures are too few to
    tell what of it is not. ``deviation``: between the pictures.
    ``more``: how many more pictures would halve the interval; None where none would, because of the model's own error.
    """

    pictures: int
    value: float
    low: float | None
    high: float | None
    deviation: float | None
    shared: float | None
    more: int | None

    @property
    def relative_accuracy(self) -> float | None:
        """Half the interval in percent of the mean, what ASTM E562 calls so."""
        if self.low is None or self.high is None or not self.value:
            return None
        return 100 * max(self.value - self.low, self.high - self.value) / self.value


def mean_fraction(fractions: Sequence[float], shared: float | None = None) -> MeanFraction:
    """The mean of the pictures of one specimen, one picture at least; ``shared``: see :class:`MeanFraction`."""
    count, value = len(fractions), float(np.mean(fractions))
    if count < 2:
        return MeanFraction(count, value, None, None, None, shared, None)
    deviation, known = float(np.std(fractions, ddof=1)), shared or 0.0
    half = math.hypot(_of_mean(deviation, count), known)
    more = None
    if half / 2 > known:
        wanted = math.sqrt((half / 2) ** 2 - known**2)
        enough = (n for n in range(count, MOST_PICTURES) if _of_mean(deviation, n) <= wanted)
        more = next((n - count for n in enough), None)
    return MeanFraction(count, value, max(0.0, value - half), min(1.0, value + half), deviation, shared, more)


def _of_mean(deviation: float, count: int) -> float:
    return t_quantile(count - 1) * deviation / math.sqrt(count)


# ------------------------------------------------------------------------------- reliability


@dataclass(frozen=True)
class Reliability:
    """How often labels are right that the model is so sure of: ``sums`` ``[3, BINS]`` over labelled pixels, by the
    probability of their label in equal bins from 0 to 1: their number, their probabilities, and how many are right.
    """

    sums: Numbers

    @classmethod
    def of(cls, pictures: Iterable[ScoredPicture], temperature: float | None) -> Reliability:
        sums = np.zeros((3, BINS))
        for picture in pictures:
            chance, truth = _labelled(picture)
            chance = calibrated(chance[np.newaxis], temperature)
            sure, right = chance.max(axis=1)[0], arg_max(chance)[0] == truth
            bins = np.minimum((sure * BINS).astype(np.intp), BINS - 1)
            sums += [np.bincount(bins, weights, BINS) for weights in (np.ones(bins.size), sure, right)]
        return cls(sums)

    def __add__(self, other: Reliability) -> Reliability:
        return Reliability(self.sums + other.sums)

    @property
    def confidence(self) -> Numbers:
        """Mean probability in each bin, NaN in empty ones."""
        return self.sums[1] / np.where(self.sums[0] > 0, self.sums[0], np.nan)

    @property
    def accuracy(self) -> Numbers:
        """Share of right labels in each bin, NaN in empty ones."""
        return self.sums[2] / np.where(self.sums[0] > 0, self.sums[0], np.nan)

    @property
    def expected_calibration_error(self) -> float:
        """Mean distance of probability and share of right labels, by pixels (ECE); NaN without a pixel."""
        total = self.sums[0].sum()
        return float(np.abs(self.sums[1] - self.sums[2]).sum() / total) if total else math.nan
