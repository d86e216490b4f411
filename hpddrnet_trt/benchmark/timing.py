"""The timing loop and its statistics.

Engines are compared in interleaved rounds: in every round each engine runs once on the same
frame, so that a machine that slows down or is disturbed slows all of them alike. Samples of one
round belong together, which is why intervals of ratios come from resampling whole rounds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.errors import UsageError, UserError

logger = logging.getLogger(__name__)

Frames = npt.NDArray[np.uint8]  # [N, H, W] grey
Runner = Callable[[Frames], Any]

MIN_ROUNDS_FOR_INTERVAL = 5  # below this a bootstrap interval of a median says nothing
RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Latency:
    """Quantiles of one engine's latencies, in the unit of the samples (linear interpolation)."""

    p50: float
    p95: float
    p99: float
    maximum: float
    mean: float


def latency_of(samples: Sequence[float]) -> Latency:
    """Quantiles of at least one sample."""
    if not len(samples):
        raise UsageError("no latency was measured; run at least one round")
    values = np.asarray(samples, dtype=np.float64)
    p50, p95, p99 = (float(value) for value in np.percentile(values, [50, 95, 99]))
    return Latency(p50, p95, p99, float(values.max()), float(values.mean()))


@dataclass(frozen=True)
class RatioEstimate:
    """A ratio of medians and its bootstrap interval; ``low`` and ``high`` are None with too few rounds."""

    value: float
    low: float | None
    high: float | None


def ratio_of_medians(reference: Sequence[float], samples: Sequence[float], *, seed: int = 0) -> RatioEstimate:
    """``median(reference) / median(samples)`` with its 95 % percentile bootstrap interval.

    Above 1 means faster than the reference. Both sequences hold one latency per round, in the same
    order; rounds are resampled as pairs, so what disturbed both does not widen the interval
    (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13).
    """
    if len(reference) != len(samples) or not len(samples):
        raise UsageError(
            f"a ratio needs one latency per round of both engines, got {len(reference)} and {len(samples)}"
        )
    first, second = np.asarray(reference, dtype=np.float64), np.asarray(samples, dtype=np.float64)
    value = float(np.median(first) / np.median(second))
    if len(first) < MIN_ROUNDS_FOR_INTERVAL:
        return RatioEstimate(value, None, None)
    rng = np.random.default_rng(seed)
    block = max(1, 1_000_000 // len(first))  # bounds the memory of many rounds
    ratios: list[npt.NDArray[np.float64]] = []
    for start in range(0, RESAMPLES, block):
        picks = rng.integers(0, len(first), (min(block, RESAMPLES - start), len(first)))
        ratios.append(np.median(first[picks], axis=1) / np.median(second[picks], axis=1))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.concatenate(ratios), [tail, 100 - tail])
    # With few distinct latencies the percentile interval can just miss the estimate itself.
    return RatioEstimate(value, min(float(low), value), max(float(high), value))


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


@dataclass
class Laps:
    """What the loop measured: seconds per finished round, and who failed with which reason."""

    samples: dict[str, list[float]]
    failures: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def rounds(self) -> int:
        """Finished rounds."""
        return max((len(values) for values in self.samples.values()), default=0)


def time_interleaved(
    runners: Mapping[str, Runner],
    frames: Sequence[Frames],
    *,
    rounds: int,
    warmup: int,
    seed: int = 0,
    pause_s: float = 0.0,
    on_step: Callable[[], object] = lambda: None,
) -> Laps:
    """Run every runner ``warmup`` times untimed, then once per round on the same frame, in turn.

    ``pause_s`` is slept before each timed call: thread pools of the engine that ran before keep
    spinning for a moment and would be charged to the next one. ``on_step`` is called after each
    call. A runner that raises leaves the comparison, its reason is kept. Ctrl-C ends the loop; the
    finished rounds stay, the unfinished one is dropped.
    """
    laps = Laps({label: [] for label in runners})
    try:
        for label in runners:
            for index in range(warmup):
                _step(laps, runners, label, frames[index % len(frames)])
                on_step()
        for number, order in enumerate(round_orders(len(runners), rounds, seed)):
            frame, labels = frames[number % len(frames)], list(runners)
            done: dict[str, float] = {}
            for index in order:
                time.sleep(pause_s)
                elapsed = _step(laps, runners, labels[index], frame)
                if elapsed is not None:
                    done[labels[index]] = elapsed
                on_step()
            for label, elapsed in done.items():
                laps.samples[label].append(elapsed)
    except KeyboardInterrupt:
        laps.interrupted = True
    for label in laps.failures:
        laps.samples.pop(label, None)
    return laps


def _step(laps: Laps, runners: Mapping[str, Runner], label: str, frame: Frames) -> float | None:
    """Seconds of one call, or None when this runner fails or has failed."""
    if label in laps.failures:
        return None
    start = time.perf_counter()
    try:
        runners[label](frame)
    except (UserError, RuntimeError, MemoryError, ValueError) as exc:
        # One engine's failure is a row of the report; the others go on.
        logger.warning("%s failed while being timed: %s", label, exc)
        laps.failures[label] = describe(exc)
        return None
    return time.perf_counter() - start


def describe(exc: BaseException) -> str:
    """One line about an exception: our own sentences as they are, others with their type."""
    text = " ".join(str(exc).split()) or "no message"
    return text if isinstance(exc, UserError) else f"{type(exc).__name__}: {text[:300]}"
