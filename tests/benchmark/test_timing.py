"""The timing loop: fair orders, honest statistics, failures and interrupts kept apart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpddrnet_trt.benchmark.timing import (
    MAX_WARMUP,
    MAX_WARMUP_S,
    Loop,
    Ratio,
    WarmUp,
    is_steady,
    ratio_of_medians,
    round_orders,
    time_interleaved,
)
from hpddrnet_trt.core.errors import ContractError, UsageError

FRAMES = [np.full((1, 8, 8), value, dtype=np.uint8) for value in (10, 20, 30)]
latencies = st.lists(st.floats(0.001, 1000), min_size=1, max_size=60)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 10), st.floats(0.01, 10)), min_size=5, max_size=40), st.integers(0, 9))
def test_the_interval_inverts_with_the_ratio(pairs: list[tuple[float, float]], seed: int) -> None:
    first, second = zip(*pairs, strict=True)
    found, swapped = ratio_of_medians(first, second, seed=seed), ratio_of_medians(second, first, seed=seed)
    assert (found.paired, swapped.value) == (True, pytest.approx(1 / found.value))
    # Resampled medians invert exactly; interpolation between two of 2000 resamples does not, hence the tolerance.
    assert ends(swapped)[0] <= 1 / ends(found)[0]


@settings(max_examples=25, deadline=None)
@given(latencies, latencies, st.booleans(), st.integers(0, 9))
def test_the_interval_holds_the_ratio_and_few_rounds_give_none(
    first: list[float], second: list[float], paired: bool, seed: int
) -> None:
    if paired:
        first, second = (samples[: min(len(first), len(second))] for samples in (first, second))
    found = ratio_of_medians(first, second, paired=paired, seed=seed)
    assert found.value == pytest.approx(np.median(first) / np.median(second))
    if min(len(first), len(second)) < 5:
        assert (found.low, found.high) == (None, None)
    else:
        low, high = ends(found)
        assert low <= found.value <= high


def ends(ratio: Ratio) -> tuple[float, float]:
    assert ratio.low is not None
    assert ratio.high is not None
    return ratio.low, ratio.high


def test_what_was_not_measured_is_refused() -> None:
    for first, second, paired in (([1.0, 2.0], [1.0], True), ([1.0], [], False), ([], [1.0], False)):
        with pytest.raises(UsageError, match="one latency per round"):
            ratio_of_medians(first, second, paired=paired)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(60):
        reference, samples = 4 * rng.lognormal(0, 0.1, 41), 2 * rng.lognormal(0, 0.1, 41)
        found = ratio_of_medians(reference.tolist(), samples.tolist(), seed=trial)
        low, high = ends(found)
        inside += low <= 2 <= high
    # 95 % of 60 is 57; a correct interval falls below 49 less than once in 10000.
    assert inside >= 49


def test_what_disturbs_both_widens_only_what_is_not_paired() -> None:
    rng = np.random.default_rng(1)
    weather = rng.uniform(1, 3, 40)  # the machine is up to three times slower in some rounds
    slow, fast = (4 * weather).tolist(), (2 * weather).tolist()
    assert ends(ratio_of_medians(slow, fast)) == (pytest.approx(2), pytest.approx(2))
    low, high = ends(ratio_of_medians(slow, (2 * rng.permutation(weather)).tolist()))
    assert high - low > 0.2
    assert ends(ratio_of_medians(slow, fast, paired=False))[0] < 1.9  # the order of separate runs means nothing


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 1000))
def test_every_round_is_a_permutation_and_positions_are_shared_fairly(entries: int, rounds: int, seed: int) -> None:
    orders = round_orders(entries, rounds, seed)
    assert len(orders) == rounds
    assert all(sorted(order) == list(range(entries)) for order in orders)
    whole = np.array(orders[: rounds - rounds % entries], dtype=int).reshape(-1, entries)
    for position in range(entries):
        counts = np.bincount(whole[:, position], minlength=entries)
        assert counts.min(initial=10**9) == counts.max(initial=0) or not len(whole)
    assert orders == round_orders(entries, rounds, seed)


def test_neighbours_change_between_blocks() -> None:
    orders = round_orders(5, 50, seed=0)
    followers = {(order[index], order[index + 1]) for order in orders for index in range(4)}
    assert len(followers) > 10  # one fixed cycle would have 5


class Recorder:
    """A runner that notes what it saw, with a shared log of the order of calls."""

    def __init__(self, name: str, log: list[tuple[str, int]], fail_at: int | None = None) -> None:
        self.name, self.log, self.fail_at, self.calls = name, log, fail_at, 0

    def __call__(self, frames: npt.NDArray[np.uint8]) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            raise ContractError("the engine gave up")
        self.log.append((self.name, int(frames[0, 0, 0])))


def test_in_each_round_everybody_runs_once_on_the_same_frame() -> None:
    log: list[tuple[str, int]] = []
    steps: list[int] = []
    runners = {name: Recorder(name, log) for name in "abc"}
    samples = time_interleaved(runners, FRAMES, Loop(7, 2), on_step=lambda: steps.append(1))
    timed = log[-7 * 3 :]
    for number in range(7):
        names, frames = zip(*timed[3 * number : 3 * number + 3], strict=True)
        assert sorted(names) == ["a", "b", "c"]
        assert set(frames) == {10 * (number % 3 + 1)}
    assert samples.rounds == 7
    assert all(len(samples.seconds[name]) == 7 and min(samples.seconds[name]) > 0 for name in "abc")
    assert len(steps) == 3 * (2 + 7)  # further warm-up runs are not announced
    assert all(2 <= samples.warmups[name].runs <= 60 for name in "abc")


def test_one_failure_does_not_stop_the_others() -> None:
    log: list[tuple[str, int]] = []
    runners = {"good": Recorder("good", log), "bad": Recorder("bad", log, fail_at=4)}
    samples = time_interleaved(runners, FRAMES, Loop(6, 1, settle=False))
    assert samples.failures == {"bad": "the engine gave up"}
    assert {label: len(values) for label, values in samples.seconds.items()} == {"good": 6}
    assert runners["bad"].calls == 4


def test_an_interrupt_keeps_the_finished_rounds_only() -> None:
    log: list[tuple[str, int]] = []

    def interrupted(frames: npt.NDArray[np.uint8]) -> None:
        log.append(("b", 0))
        if sum(name == "b" for name, _ in log) == 4:  # one warm-up, two rounds, then Ctrl-C
            raise KeyboardInterrupt

    samples = time_interleaved({"a": Recorder("a", log), "b": interrupted}, FRAMES, Loop(9, 1, settle=False))
    assert samples.interrupted
    assert {label: len(values) for label, values in samples.seconds.items()} == {"a": 2, "b": 2}


class Simulated:
    """A clock, and runners that only move it on: the k-th call of one takes ``seconds(k)``."""

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def runner(self, seconds: Callable[[int], float]) -> Callable[[object], None]:
        calls = itertools.count()

        def run(_: object) -> None:
            self.now += seconds(next(calls))

        return run


def noisy_engine(rng: np.random.Generator) -> Callable[[int], float]:
    """10 ms with 10 % of noise, on a machine that is up to 50 % slower at times."""
    weather = 1 + 0.5 * rng.random(400)
    return lambda call: 0.01 * float(weather[call]) * float(rng.lognormal(0, 0.1))


def test_an_engine_against_itself_is_a_ratio_of_one() -> None:
    inside = 0
    for trial in range(40):
        machine = Simulated()
        seconds = noisy_engine(np.random.default_rng(trial))
        runners = {name: machine.runner(seconds) for name in ("one", "other")}
        samples = time_interleaved(runners, [None], Loop(30, 3, seed=trial), clock=machine.clock)
        found = ratio_of_medians(samples.seconds["one"], samples.seconds["other"], seed=trial)
        low, high = ends(found)
        inside += low <= 1 <= high
    # 95 % of 40 is 38; a correct interval falls below 32 less than once in 1000.
    assert inside >= 32


def test_warm_up_goes_on_until_times_are_steady() -> None:
    machine = Simulated()
    runner = machine.runner(lambda call: 0.01 * (1 + 5 * 0.7**call))
    samples = time_interleaved({"a": runner}, [None], Loop(3, 2), clock=machine.clock)
    warm = samples.warmups["a"]
    assert warm.steady
    assert 10 < warm.runs < 30
    assert samples.seconds["a"] == pytest.approx([0.01] * 3, rel=0.05)
    assert is_steady([1.0] * 9) is None


def test_warm_up_ends_where_times_never_are_steady() -> None:
    machine = Simulated()
    growing = time_interleaved(
        {"a": machine.runner(lambda call: 0.001 * 1.1**call)}, [None], Loop(1, 2), clock=machine.clock
    )
    assert growing.warmups["a"] == WarmUp(MAX_WARMUP, False)
    # A first run that compiles for a minute does not use up the time for warming up; a slow engine does.
    slow = time_interleaved(
        {"a": machine.runner(lambda call: 2.5 if call else 60.0)}, [None], Loop(1, 1), clock=machine.clock
    )
    assert slow.warmups["a"] == WarmUp(1 + math.ceil(MAX_WARMUP_S / 2.5), None)
    many = time_interleaved(
        {"a": machine.runner(lambda call: 1.0)}, [None], Loop(1, 80, settle=False), clock=machine.clock
    )
    assert many.warmups["a"] == WarmUp(80, True)


def test_only_rounds_are_watched_and_only_timed_calls_have_something_around() -> None:
    log: list[str] = []

    @contextmanager
    def noting(name: str) -> Iterator[None]:
        log.append(f"+{name}")
        yield
        log.append(f"-{name}")

    machine = Simulated()
    run = machine.runner(lambda call: 1.0)
    time_interleaved(
        {"a": lambda given: log.append("a"), "b": run}, [None], Loop(2, 1, settle=False), clock=machine.clock,
        around=noting, watch=noting("watch"),
    )  # fmt: skip
    assert log[:2] == ["a", "+watch"]
    assert log[-1] == "-watch"
    inside = "".join(log[2:-1])
    assert inside.count("+aa-a") == 2
    assert inside.count("+b-b") == 2
