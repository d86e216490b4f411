"""The timing loop: fair orders, honest statistics, failures and interrupts kept apart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpddrnet_trt.benchmark.timing import (
    BURST_S,
    MAX_WARMUP,
    MAX_WARMUP_S,
    MOST_COUNTED,
    Burst,
    Loop,
    Ratio,
    WarmUp,
    is_steady,
    on_host,
    ratio_of_medians,
    round_orders,
    time_interleaved,
    turn,
)
from hpddrnet_trt.core.errors import ContractError, UsageError

FRAMES = [np.full((1, 8, 8), value, dtype=np.uint8) for value in (10, 20, 30)]
latencies = st.lists(st.floats(0.001, 1000), min_size=1, max_size=60)


def ends(ratio: Ratio) -> tuple[float, float]:
    assert ratio.low is not None
    assert ratio.high is not None
    return ratio.low, ratio.high


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 10), st.floats(0.01, 10)), min_size=5, max_size=40), st.integers(0, 9))
def test_the_interval_inverts_with_the_ratio(pairs: list[tuple[float, float]], seed: int) -> None:
    first, second = zip(*pairs, strict=True)
    found, swapped = ratio_of_medians(first, second, seed=seed), ratio_of_medians(second, first, seed=seed)
    assert (found.paired, swapped.value) == (True, pytest.approx(1 / found.value))
    # Resampled medians invert exactly; interpolation between two of 2000 resamples does not, hence the tolerance.
    assert ends(swapped)[0] <= 1 / ends(found)[0]


@settings(max_examples=25, deadline=None)
@given(latencies, latencies, st.booleans(), st.integers(1, 3), st.integers(0, 9))
def test_the_interval_holds_the_ratio_and_few_rounds_give_none(
    first: list[float], second: list[float], paired: bool, runs: int, seed: int
) -> None:
    if paired:
        first, second = (samples[: min(len(first), len(second))] for samples in (first, second))
    # A round of several equal runs is a round of one.
    found = ratio_of_medians([[value] * runs for value in first], second, paired=paired, seed=seed)
    assert found.value == pytest.approx(np.median(first) / np.median(second))
    if min(len(first), len(second)) < 5:
        assert (found.low, found.high) == (None, None)
    else:
        low, high = ends(found)
        assert low <= found.value <= high
        assert found == ratio_of_medians(first, second, paired=paired, seed=seed)


def test_what_was_not_measured_is_refused() -> None:
    for first, second, paired in (([1.0, 2.0], [1.0], True), ([1.0], [], False), ([], [1.0], False)):
        with pytest.raises(UsageError, match="the same rounds of both"):
            ratio_of_medians(first, second, paired=paired)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(60):
        reference, samples = 4 * rng.lognormal(0, 0.1, 41), 2 * rng.lognormal(0, 0.1, 41)
        low, high = ends(ratio_of_medians(reference, samples, seed=trial))
        inside += low <= 2 <= high
    # 95 % of 60 is 57; a correct interval falls below 49 less than once in 10000.
    assert inside >= 49


def test_what_disturbs_both_widens_only_what_is_not_paired() -> None:
    rng = np.random.default_rng(1)
    weather = rng.uniform(1, 3, 40)  # the machine is up to three times slower in some rounds
    slow, fast = 4 * weather, 2 * weather
    assert ends(ratio_of_medians(slow, fast)) == (pytest.approx(2), pytest.approx(2))
    low, high = ends(ratio_of_medians(slow, 2 * rng.permutation(weather)))
    assert high - low > 0.2
    assert ends(ratio_of_medians(slow, fast, paired=False))[0] < 1.9  # the order of separate runs means nothing
    # Runs of a round share its weather: many of them do not make an interval narrower than the rounds allow.
    many = np.repeat(slow[:, None], 20, axis=1)
    assert ends(ratio_of_medians(many, fast, paired=False)) == ends(ratio_of_medians(slow, fast, paired=False))


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


class Machine:
    """A clock, and engines that only move it on: the k-th run of one takes ``seconds(k)``; the log has who ran."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[tuple[str, Any]] = []

    def clock(self) -> float:
        return self.now

    def engine(self, seconds: Callable[[int], float], name: str = "a", fail_at: int | None = None) -> Burst[Any]:
        calls = itertools.count(1)

        def run(given: Any) -> None:
            call = next(calls)
            if call == fail_at:
                raise ContractError("the engine gave up")
            self.log.append((name, given))
            self.now += seconds(call - 1)

        return on_host(run, self.clock)


def frame_of(given: npt.NDArray[np.uint8]) -> int:
    return int(given[0, 0, 0])


def test_in_each_round_everybody_has_a_turn_on_the_same_frame() -> None:
    machine, steps = Machine(), list[int]()
    engines = {name: machine.engine(lambda _: 0.05, name) for name in "abc"}
    samples = time_interleaved(
        engines, FRAMES, Loop(7, 2, settle=False, burst_s=0.1), on_step=lambda: steps.append(1), clock=machine.clock
    )
    timed = [(name, frame_of(given)) for name, given in machine.log[3 * 2 :]]
    turns = [(key, len(list(runs))) for key, runs in itertools.groupby(timed)]
    assert len(turns) == 7 * 3
    assert {runs for _, runs in turns} == {4}  # two that are not counted and two that are
    for number in range(7):
        names, frames = zip(*(key for key, _ in turns[3 * number : 3 * number + 3]), strict=True)
        assert sorted(names) == ["a", "b", "c"]
        assert set(frames) == {10 * (number % 3 + 1)}
    assert samples.rounds == 7
    assert samples.uncounted == dict.fromkeys("abc", 2)
    assert all(samples.seconds[name] == [pytest.approx([0.05, 0.05])] * 7 for name in "abc")
    assert len(steps) == 3 * (2 + 7)


@pytest.mark.parametrize(
    ("seconds", "burst_s", "expected"),
    [
        (0.001, BURST_S, (2, MOST_COUNTED)),
        (0.01, 0.1, (2, 10)),
        (0.08, BURST_S, (2, 3)),
        (3.0, BURST_S, (1, 1)),
        (0.01, 0, (0, 1)),
    ],
)
def test_the_length_of_a_turn(seconds: float, burst_s: float, expected: tuple[int, int]) -> None:
    assert turn(seconds, burst_s) == expected


def test_what_others_left_in_the_caches_is_a_figure_of_its_own() -> None:
    """Twelve engines, of which each finds its caches cold after another one: 30 ms twice, then 10 ms."""
    machine, last = Machine(), [""]

    def cached(name: str) -> Burst[Any]:
        recent = 0

        def run(_: object) -> None:
            nonlocal recent
            recent = recent + 1 if last[0] == name else 1
            last[0] = name
            machine.now += 0.03 if recent <= 2 else 0.01

        return on_host(run, machine.clock)

    engines = {name: cached(name) for name in "abcdefghijkl"}
    samples = time_interleaved(engines, [None], Loop(5, 3), clock=machine.clock)
    for label, rounds in samples.seconds.items():
        assert np.median(rounds) == pytest.approx(0.01)
        assert samples.cold[label] == pytest.approx([0.03] * 5)


def test_one_failure_does_not_stop_the_others() -> None:
    machine = Machine()
    engines = {"good": machine.engine(lambda _: 1.0, "good"), "bad": machine.engine(lambda _: 1.0, "bad", fail_at=4)}
    samples = time_interleaved(engines, FRAMES, Loop(6, 1, settle=False), clock=machine.clock)
    assert samples.failures == {"bad": "the engine gave up"}
    assert {label: len(rounds) for label, rounds in samples.seconds.items()} == {"good": 6}
    assert [name for name, _ in machine.log].count("bad") == 3  # not asked again


def test_an_interrupt_keeps_the_finished_rounds_only() -> None:
    machine, calls = Machine(), itertools.count()

    def interrupted(_: object, runs: int) -> list[float]:
        if next(calls) == 3:  # one warm-up, two rounds, then Ctrl-C
            raise KeyboardInterrupt
        return [1.0] * runs

    engines = {"a": machine.engine(lambda _: 1.0), "b": interrupted}
    samples = time_interleaved(engines, FRAMES, Loop(9, 1, settle=False), clock=machine.clock)
    assert (samples.interrupted, samples.rounds) == (True, 2)
    assert {label: len(rounds) for label, rounds in samples.seconds.items()} == {"a": 2, "b": 2}


def noisy_engine(rng: np.random.Generator) -> Callable[[int], float]:
    """10 ms with 10 % of noise, on a machine that is up to 50 % slower at times."""
    weather = 1 + 0.5 * rng.random(2000)
    return lambda call: 0.01 * float(weather[call]) * float(rng.lognormal(0, 0.1))


def test_an_engine_against_itself_is_a_ratio_of_one() -> None:
    inside = 0
    for trial in range(40):
        machine = Machine()
        seconds = noisy_engine(np.random.default_rng(trial))
        engines = {name: machine.engine(seconds) for name in ("one", "other")}
        loop = Loop(30, 3, burst_s=0.05, seed=trial)
        samples = time_interleaved(engines, [None], loop, clock=machine.clock)
        low, high = ends(ratio_of_medians(samples.seconds["one"], samples.seconds["other"], seed=trial))
        inside += low <= 1 <= high
    # 95 % of 40 is 38; a correct interval falls below 32 less than once in 1000.
    assert inside >= 32


@pytest.mark.parametrize(
    ("seconds", "loop", "warmup"),
    [
        (lambda call: 0.001 * 1.1**call, Loop(1, 2), WarmUp(MAX_WARMUP, False)),
        # A first run that compiles for a minute does not use up the time for warming up; a slow engine does.
        (lambda call: 2.5 if call else 60.0, Loop(1, 1), WarmUp(1 + math.ceil(MAX_WARMUP_S / 2.5), None)),
        (lambda _: 1.0, Loop(1, 80, settle=False), WarmUp(80, True)),
    ],
)
def test_warm_up_ends_where_times_never_are_steady(
    seconds: Callable[[int], float], loop: Loop, warmup: WarmUp
) -> None:
    machine = Machine()
    samples = time_interleaved({"a": machine.engine(seconds)}, [None], loop, clock=machine.clock)
    assert samples.warmups["a"] == warmup


def test_warm_up_goes_on_until_times_are_steady() -> None:
    machine = Machine()
    engine = machine.engine(lambda call: 0.01 * (1 + 5 * 0.7**call))
    samples = time_interleaved({"a": engine}, [None], Loop(3, 2), clock=machine.clock)
    assert samples.warmups["a"].steady
    assert 10 < samples.warmups["a"].runs < 30
    assert np.asarray(samples.seconds["a"]) == pytest.approx(0.01, rel=0.05)
    assert is_steady([1.0] * 9) is None


def test_only_rounds_are_watched_and_only_turns_have_something_around() -> None:
    machine = Machine()

    @contextmanager
    def noting(name: str) -> Iterator[None]:
        machine.log.append(("+", name))
        yield
        machine.log.append(("-", name))

    engines = {name: machine.engine(lambda _: 1.0, name) for name in "ab"}
    loop = Loop(2, 1, settle=False, burst_s=0)
    time_interleaved(engines, [None], loop, clock=machine.clock, around=noting, watch=noting("watch"))
    assert machine.log[:3] == [("a", None), ("b", None), ("+", "watch")]
    assert machine.log[-1] == ("-", "watch")
    inside = machine.log[3:-1]
    for name in "ab":
        places = [place for place, entry in enumerate(inside) if entry == (name, None)]
        assert [inside[place - 1 : place + 2] for place in places] == [[("+", name), (name, None), ("-", name)]] * 2
