"""The three measures of every engine at one size and batch, each taken in interleaved rounds.

Frame-to-labels latency is what a microscope waits for; the network alone is what others quote
(trtexec's GPU time, say); throughput is what a folder of images gets. They are never mixed.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tqdm import tqdm

from hpddrnet_trt.benchmark.frame import frame_to_labels, frames_to_labels, network_only
from hpddrnet_trt.benchmark.images import Grey8
from hpddrnet_trt.benchmark.result import MEASURES, Measure, Ratio, Settings, Timing, size_text
from hpddrnet_trt.benchmark.telemetry import EnergyUse, Gpu, GpuWatch
from hpddrnet_trt.benchmark.timing import (
    FAILURES,
    Frames,
    Laps,
    latency_of,
    ratio_of_medians,
    time_interleaved,
)
from hpddrnet_trt.core.errors import describe
from hpddrnet_trt.engines.base import Engine

_Made = TypeVar("_Made")

ROUND_S = 0.3  # least duration of a throughput round: long beside filling and emptying the pipeline
LEAST_BATCHES = 4  # of a round
SLOW_S = 1.0  # per batch: engines slower than this get half as many
MOST_BATCHES = 5000
MOST_ROUNDS = 10  # of throughput: a sample is already the mean of many batches


@dataclass(frozen=True)
class Case:
    """One size and batch, with the frames ``[batch, height, width]`` that are timed."""

    height: int
    width: int
    batch: int
    frames: Sequence[Grey8]

    @property
    def size(self) -> str:
        return size_text(self.height, self.width, self.batch)


@dataclass
class Measured:
    """What one measure found at one case: laps, and joules of one image where they were counted."""

    measure: Measure
    case: Case
    laps: Laps
    joules: dict[str, float] = field(default_factory=dict)

    @property
    def unsteady(self) -> list[str]:
        """Labels whose times still changed when warm-up had to end."""
        return [label for label, found in self.laps.warmups.items() if found.steady is False]

    def timing(self, label: str, reference: str | None, seed: int) -> Timing:
        """Samples, quantiles and the ratio to the reference's own same measure."""
        samples, case = self.laps.samples[label], self.case
        latency, warmup = latency_of(samples), self.laps.warmups.get(label)
        ratio = None
        if reference in self.laps.samples:
            found = ratio_of_medians(self.laps.samples[reference], samples, seed=seed)
            ratio = Ratio(value=found.value, low=found.low, high=found.high)
        return Timing(
            height=case.height, width=case.width, batch=case.batch,
            samples_ms=[round(1000 * value, 4) for value in samples],
            p50_ms=1000 * latency.p50, p95_ms=1000 * latency.p95, p99_ms=1000 * latency.p99,
            max_ms=1000 * latency.maximum, images_per_s=case.batch / latency.p50, ratio=ratio,
            warmup=warmup.runs if warmup else None, steady=warmup.steady if warmup else None,
            joules_per_image=self.joules.get(label),
        )  # fmt: skip


class Stopwatch:
    """Takes the measures as ``settings`` say, watching the GPU during timed rounds."""

    def __init__(self, settings: Settings, watch: GpuWatch, quiet: bool = False) -> None:
        self._settings, self._watch, self._quiet = settings, watch, quiet

    def latency(self, engines: Mapping[str, Engine], case: Case) -> Measured:
        """From host frame to host labels, one batch at a time."""
        runners = {label: frame_to_labels(engine) for label, engine in engines.items()}
        return Measured("timings", case, self._rounds("timings", case, runners, case.frames))

    def network(self, engines: Mapping[str, Engine], case: Case) -> Measured:
        """The network alone, on data that lie where it computes. Engines without it are failures."""
        runners: dict[str, Callable[[object], None]] = {}
        reasons: dict[str, str] = {}
        for label, engine in engines.items():
            found = _or_reason(network_only, engine, case.frames[0])
            if isinstance(found, str):
                reasons[label] = found
            else:
                runners[label] = found
        laps = self._rounds("network", case, runners, [None])
        laps.failures |= reasons
        return Measured("network", case, laps)

    def throughput(
        self, engines: Mapping[str, Engine], case: Case, counters: Mapping[str, Gpu | None]
    ) -> Measured:
        """From host frames to host labels with many batches in flight, a round of them per sample.

        Each engine's round lasts at least :data:`ROUND_S`; there are at most :data:`MOST_ROUNDS`.
        ``counters``: by label the GPU that an engine computes on, where its energy can be read.
        """
        runners: dict[str, Callable[[object], object]] = {}
        counts: dict[str, int] = {}
        reasons: dict[str, str] = {}
        for label, engine in engines.items():
            many = _round_runner(engine, case.frames)
            found = _or_reason(batches_per_round, many)
            if isinstance(found, str):
                reasons[label] = found
            else:
                counts[label], runners[label] = found, _with_count(many, found)
        use = {label: EnergyUse(counters.get(label)) for label in runners}
        laps = self._rounds("throughput", case, runners, [None], around=use.__getitem__)
        for label, samples in laps.samples.items():
            laps.samples[label] = [value / counts[label] for value in samples]
        laps.failures |= reasons
        joules = {}
        for label, used in use.items():
            if label in laps.samples and used.joules and not laps.interrupted:
                joules[label] = used.joules / (laps.rounds * counts[label] * case.batch)
        return Measured("throughput", case, laps, joules)

    def _rounds(
        self, measure: Measure, case: Case, runners: Mapping[str, Callable[[Any], object]], inputs: Sequence[Any],
        around: Callable[[str], AbstractContextManager[object]] | None = None,
    ) -> Laps:  # fmt: skip
        plan = self._settings
        settle = measure != "throughput"  # choosing the number of batches has warmed up already
        warmup, rounds = (plan.warmup, plan.rounds) if settle else (0, min(plan.rounds, MOST_ROUNDS))
        title = f"{MEASURES[measure]} {case.size}"
        with tqdm(total=(rounds + warmup) * len(runners), desc=title, unit="run", disable=self._quiet) as bar:
            laps = time_interleaved(
                runners, inputs, rounds=rounds, warmup=warmup, settle=settle, seed=plan.seed,
                pause_s=plan.pause_ms / 1000, on_step=bar.update, around=around, watch=self._watch,
            )  # fmt: skip
        if not settle:
            laps.warmups.clear()
        return laps


def runs_on_cpu(engine: Engine) -> bool:
    """Every engine names its device in brackets, a processor as CPU (see :attr:`Engine.runtime`)."""
    return "(CPU" in engine.runtime


def batches_per_round(run: Callable[[int], object], clock: Callable[[], float] = time.perf_counter) -> int:
    """How many batches make a throughput round, found by running some (which also warms up).

    ``run(count)`` runs that many. At least :data:`LEAST_BATCHES`, or half as many where one takes longer
    than :data:`SLOW_S`, and enough for :data:`ROUND_S`.
    """
    count = LEAST_BATCHES
    run(count // 2)  # the first one may still set up what keeps several batches in flight
    for _ in range(3):
        start = clock()
        run(count)
        elapsed = clock() - start
        if elapsed >= ROUND_S or count >= MOST_BATCHES:
            break
        count = min(MOST_BATCHES, math.ceil(count * min(100.0, 1.1 * ROUND_S / max(elapsed, 1e-6))))
    return LEAST_BATCHES // 2 if elapsed / count > SLOW_S else count


def _round_runner(engine: Engine, frames: Sequence[Frames]) -> Callable[[int], object]:
    many = frames_to_labels(engine)

    def run(count: int) -> None:
        for _ in many(itertools.islice(itertools.cycle(frames), count)):
            pass

    return run


def _with_count(run: Callable[[int], object], count: int) -> Callable[[object], object]:
    return lambda _: run(count)


def _or_reason(make: Callable[..., _Made], *given: Any) -> _Made | str:
    """What ``make`` gives, or why an engine cannot do it."""
    try:
        return make(*given)
    except NotImplementedError as exc:
        return str(exc) or "this engine does not offer it"
    except FAILURES as exc:
        return describe(exc)
