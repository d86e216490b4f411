"""The timing loop and its statistics.

Engines are compared in interleaved rounds: in every round each engine has one turn on the same
frame, so that a machine that slows down or is disturbed slows all of them alike. A turn is a burst of
runs without a pause, of which the first are not counted: they find the caches, and a GPU the clocks,
that the engine before has left. Samples of one round belong together, which is why intervals of ratios
come from resampling whole rounds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from hpddrnet_trt.core.errors import UsageError, UserError, describe

logger = logging.getLogger(__name__)

Frames = npt.NDArray[np.uint8]  # [N, H, W] grey
Input = TypeVar("Input")
Burst = Callable[[Input, int], Sequence[float]]  # seconds of each of so many runs on one input, without a pause
# What an engine may raise when it cannot do what it was asked; NotImplementedError is a RuntimeError.
FAILURES = (UserError, RuntimeError, MemoryError, ValueError)

# Warm-up goes on until the median of the last runs differs by less than this from that of the runs before.
STEADY_SHARE = 0.03
STEADY_RUNS = 5  # runs behind each of the two medians
MAX_WARMUP = 60  # runs
MAX_WARMUP_S = 10.0  # beyond the least number of runs: the first ones may compile
MIN_ROUNDS_FOR_INTERVAL = 5  # below this a bootstrap interval of a median says nothing
RESAMPLES = 2000
CONFIDENCE = 0.95
BURST_S = 0.25  # about how long the counted runs of a turn take: several even of engines that need 80 ms
MOST_COUNTED = 50  # runs of a turn
UNCOUNTED = 2  # first runs of a turn that are not counted, or as many as are, where those are fewer
WIDE = 0.2  # an interval wider than this share of its ratio is called wide wherever it is shown


class Ratio(BaseModel):
    """Median latency of the reference over another's: above 1 is faster. 95 % bootstrap interval, None with too few
    rounds.

    ``paired``: both were timed in the same interleaved rounds; False for rows of another run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float
    low: float | None = None
    high: float | None = None
    paired: bool = True

    @property
    def wide(self) -> bool:
        """Whether the interval is too wide, or missing, for the ratio to be quoted alone."""
        return self.low is None or self.high is None or (self.high - self.low) > WIDE * self.value


def ratio_of_medians(
    reference: npt.ArrayLike, samples: npt.ArrayLike, *, paired: bool = True, seed: int = 0
) -> Ratio:
    """``median(reference) / median(samples)`` with its 95 % percentile bootstrap interval.

    Both are latencies by round: ``[rounds]``, or ``[rounds, runs]`` where a round has several, as many of each
    engine as it likes. Above 1 means faster than the reference. ``paired``: both hold the same rounds, in the
    same order; rounds are resampled as pairs, so what disturbed both does not widen the interval. Otherwise the
    two come from different rounds and each is resampled by itself (Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, chapters 8 and 13).
    """
    first, second = (np.asarray(one, dtype=np.float64) for one in (reference, samples))
    if not first.size or not second.size or (paired and len(first) != len(second)):
        raise UsageError(f"a ratio needs the same rounds of both engines, got {len(first)} and {len(second)}")
    first, second = first.reshape(len(first), -1), second.reshape(len(second), -1)
    value = float(np.median(first) / np.median(second))
    if min(len(first), len(second)) < MIN_ROUNDS_FOR_INTERVAL:
        return Ratio(value=value, paired=paired)
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(first), (RESAMPLES, len(first)))
    others = picks if paired else rng.integers(0, len(second), (RESAMPLES, len(second)))
    low, high = _central(np.median(first[picks], axis=(1, 2)) / np.median(second[others], axis=(1, 2)))
    # With few distinct latencies the percentile interval can just miss the estimate itself.
    return Ratio(value=value, low=min(low, value), high=max(high, value), paired=paired)


def median_interval(
    values: npt.NDArray[np.float64], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile bootstrap interval (Efron 1979) of the median of ``values``."""
    picks = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    return _central(np.median(values[picks], axis=1))


def _central(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The interval that holds :data:`CONFIDENCE` of the values."""
    low, high = np.percentile(values, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return float(low), float(high)


def round_orders(entries: int, rounds: int, seed: int) -> list[list[int]]:
    """The order in which ``entries`` run in each round.

    Every round is a permutation. Rounds come in blocks of ``entries``; within a block a random
    order is rotated, so each entry has every position equally often, and each block draws anew, so
    nobody always follows the same neighbour.
    """
    rng = np.random.default_rng(seed)
    orders: list[list[int]] = []
    while len(orders) < rounds:
        base = rng.permutation(entries)
        orders.extend(np.roll(base, int(shift)).tolist() for shift in rng.permutation(entries))
        if not entries:
            return [[] for _ in range(rounds)]
    return orders[:rounds]


class WarmUp(NamedTuple):
    """Untimed runs of one engine; ``steady`` is None when too few were made to tell."""

    runs: int
    steady: bool | None


@dataclass
class Samples:
    """What the loop measured: seconds of the counted runs of each finished round by label, those of the first run of
    each turn (``cold``), how many more were not counted, and who failed with which reason."""

    seconds: dict[str, list[list[float]]]
    cold: dict[str, list[float]] = field(default_factory=dict)
    uncounted: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    warmups: dict[str, WarmUp] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def rounds(self) -> int:
        """Finished rounds."""
        return max((len(values) for values in self.seconds.values()), default=0)


@dataclass(frozen=True)
class Loop:
    """How runners are timed.

    Warm-up is at least ``warmup`` runs of each and, with ``settle``, as many more as it takes until times are steady
    (:data:`STEADY_SHARE`), at most :data:`MAX_WARMUP` runs or :data:`MAX_WARMUP_S` more seconds. ``pause_s`` is slept
    before each turn: thread pools of the engine that ran before keep spinning for a moment and would be charged to
    the next one. ``burst_s``: about how long the counted runs of a turn take (:func:`turn`); 0 is one run, and none
    that is not counted. ``seed``: of the order in each round.
    """

    rounds: int
    warmup: int
    settle: bool = True
    pause_s: float = 0.0
    burst_s: float = BURST_S
    seed: int = 0


def turn(seconds: float, burst_s: float) -> tuple[int, int]:
    """How many runs of about ``seconds`` a turn has that are not counted, and how many that are."""
    counted = max(1, min(MOST_COUNTED, round(burst_s / max(seconds, 1e-9))))
    return (min(UNCOUNTED, counted) if burst_s else 0), counted


def on_host(run: Callable[[Input], object], clock: Callable[[], float] = time.perf_counter) -> Burst[Input]:
    """Runs timed by the host's clock, one after the other."""

    def burst(given: Input, runs: int) -> list[float]:
        seconds = []
        for _ in range(runs):
            start = clock()
            run(given)
            seconds.append(clock() - start)
        return seconds

    return burst


def time_interleaved(
    bursts: Mapping[str, Burst[Input]],
    inputs: Sequence[Input],
    loop: Loop,
    *,
    on_step: Callable[[], object] = lambda: None,
    around: Callable[[str], AbstractContextManager[object]] = lambda _: nullcontext(),
    watch: AbstractContextManager[object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Samples:
    """Warm everybody up, then give each a turn per round on the same input.

    ``on_step`` is called after each turn and each of the first ``warmup`` runs. ``around(label)`` is entered before a
    turn and left after it; ``watch`` is entered around all rounds. ``clock``: for the end of warm-up.

    An engine that raises leaves the comparison, its reason is kept. Ctrl-C ends the loop; the finished
    rounds stay, the unfinished one is dropped.
    """
    samples = Samples({label: [] for label in bursts})

    def step(label: str, given: Input, runs: int) -> Sequence[float] | None:
        """Seconds of each run, or None when this engine fails or has failed."""
        if label in samples.failures:
            return None
        try:
            return bursts[label](given, runs)
        except FAILURES as exc:
            # One engine's failure is a row of the report; the others go on.
            logger.warning("%s failed while being timed: %s", label, exc)
            samples.failures[label] = describe(exc)
            return None

    def warm_up(label: str) -> None:
        times: list[float] = []
        start = clock()
        while len(times) < loop.warmup or (loop.settle and not _enough(times, clock() - start)):
            elapsed = step(label, inputs[len(times) % len(inputs)], 1)
            if elapsed is None:
                return
            times += elapsed
            if len(times) <= loop.warmup:
                on_step()
                start = clock()
        samples.warmups[label] = WarmUp(len(times), is_steady(times))
        turns[label] = turn(float(np.median(times[-STEADY_RUNS:] or [0.0])), loop.burst_s)

    turns: dict[str, tuple[int, int]] = {}
    try:
        for label in bursts:
            warm_up(label)
        with watch or nullcontext():
            for number, order in enumerate(round_orders(len(bursts), loop.rounds, loop.seed)):
                labels, done = list(bursts), dict[str, Sequence[float]]()
                for label in (labels[index] for index in order):
                    time.sleep(loop.pause_s)
                    with around(label):
                        elapsed = step(label, inputs[number % len(inputs)], sum(turns.get(label, (0, 0))))
                    if elapsed is not None:
                        done[label] = elapsed
                    on_step()
                for label, elapsed in done.items():
                    samples.seconds[label].append(list(elapsed[turns[label][0] :]))
                    samples.cold.setdefault(label, []).append(elapsed[0])
    except KeyboardInterrupt:
        samples.interrupted = True
    for label in samples.failures:
        samples.seconds.pop(label, None)
    samples.uncounted = {label: uncounted for label, (uncounted, _) in turns.items()}
    return samples


def _enough(times: Sequence[float], seconds: float) -> bool:
    return bool(is_steady(times)) or len(times) >= MAX_WARMUP or seconds >= MAX_WARMUP_S


def is_steady(times: Sequence[float]) -> bool | None:
    """Whether the medians of the last and of the preceding :data:`STEADY_RUNS` agree; None with fewer runs."""
    if len(times) < 2 * STEADY_RUNS:
        return None
    last = float(np.median(times[-STEADY_RUNS:]))
    before = float(np.median(times[-2 * STEADY_RUNS : -STEADY_RUNS]))
    return abs(last - before) <= STEADY_SHARE * before
