"""The accounts of any history: against a model, step by step, and against many threads at once."""

from __future__ import annotations

import time
from collections import Counter
from unittest import mock

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hpddrnet_trt.core.errors import ContractError
from hpddrnet_trt.inference.result import Segmentation
from hpddrnet_trt.stream import Policy, Stream, StreamResult, worker
from hpddrnet_trt.stream.queue import FrameQueue, Job
from tests.stream.fakes import MANIFEST, Bench, check_balance, check_ended, frame, number_of, until

POLICIES = st.sampled_from(["latest", "block", "reject"])
ENDS: dict[str, BaseException | None] = {
    "well": None,
    "frame": ContractError("not this one"),
    "engine": RuntimeError("lost"),
    "memory": MemoryError("none"),
    "death": SystemExit(),
}


class OneWorker(RuleBasedStateMachine):
    """A stream whose inferences end when the test says so, beside a model of what it should count."""

    @initialize(policy=POLICIES, capacity=st.integers(1, 3))
    def open(self, policy: Policy, capacity: int) -> None:
        self.patch = mock.patch.object(worker, "BACK_OFF_S", 0.0)
        self.patch.start()
        self.bench, self.policy, self.capacity = Bench(), policy, capacity
        self.stream = Stream(
            self.bench.open, policy=policy, capacity=capacity, errors_before_restart=3, max_restarts=10**6, nice=0
        )
        self.stream.wait_ready()
        self.waiting: list[tuple[int, bool]] = []  # frame id, whether it is a frame
        self.busy: int | None = None
        self.results: list[int] = []
        self.count: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.in_a_row = 0

    def follow(self) -> None:
        """What the worker does by itself."""
        while self.busy is None and self.waiting:
            if self.policy != "latest" and len(self.results) >= self.capacity + 1:
                return
            frame_id, good = self.waiting.pop(0)
            if good:
                assert self.bench.wait_begun() == frame_id
                self.busy = frame_id
            else:
                self.count["failed"] += 1
                self.put_out(frame_id)

    def put_out(self, frame_id: int) -> None:
        if self.policy == "latest":
            self.count["superseded"] += len(self.results)
            self.results.clear()
        self.results.append(frame_id)

    @precondition(lambda self: self.policy != "block" or len(self.waiting) < self.capacity)
    @rule(good=st.booleans())
    def submit(self, good: bool) -> None:
        frame_id = self.count["submitted"] = self.count["submitted"] + 1
        expected: int | None = frame_id
        if len(self.waiting) == self.capacity:
            if self.policy == "reject":
                expected = None
                self.dropped["rejected"] += 1
            else:
                self.waiting.pop(0)
                self.dropped["replaced"] += 1
        assert self.stream.submit(frame(frame_id) if good else "nothing", frame_id) == expected
        if expected is not None:
            self.waiting.append((frame_id, good))
        self.follow()

    @precondition(lambda self: self.busy is not None)
    @rule(how=st.sampled_from(list(ENDS)))
    def end(self, how: str) -> None:
        assert self.busy is not None
        frame_id, self.busy = self.busy, None
        self.count["processed" if how == "well" else "failed"] += 1
        self.in_a_row = 0 if how == "well" else self.in_a_row + (how in ("engine", "memory"))
        if how == "death" or (how in ("engine", "memory") and self.in_a_row == 3):
            self.count["restarts"] += 1
            self.in_a_row = 0
        self.put_out(frame_id)
        self.bench.end(frame_id, ENDS[how])
        self.follow()

    @rule()
    def pull_latest(self) -> None:
        self.settle()
        result = self.stream.latest()
        assert (result.frame_id if result else None) == (self.results[-1] if self.results else None)
        self.count["superseded"] += max(len(self.results) - 1, 0)
        self.handed_over(result, len(self.results))

    @rule()
    def pull_next(self) -> None:
        self.settle()
        result = next(iter(self.stream.results(timeout_s=0)), None)
        assert (result.frame_id if result else None) == (self.results[0] if self.results else None)
        self.handed_over(result, 1)

    def handed_over(self, result: StreamResult | None, gone: int) -> None:
        if result is not None:
            assert result.tag == result.frame_id
            assert result.error is not None or number_of(result.segmentation) == result.frame_id
            del self.results[:gone]
            self.count["delivered"] += 1
        self.follow()

    def settle(self) -> None:
        done = self.count["processed"] + self.count["failed"]
        until(lambda: (now := self.stream.statistics()).processed + now.failed == done)

    @invariant()
    def accounts_agree(self) -> None:
        if not hasattr(self, "stream"):
            return
        check_balance(self.stream)
        self.settle()
        until(lambda: self.stream.statistics().restarts == self.count["restarts"])
        now = self.stream.statistics()
        for name in ("submitted", "processed", "failed", "delivered"):
            assert getattr(now, name) == self.count[name], name
        assert now.dropped_because == {name: count for name, count in self.dropped.items() if count}
        assert now.undelivered_because.get("superseded", 0) == self.count["superseded"]
        assert now.pending == len(self.waiting) + (self.busy is not None)

    def teardown(self) -> None:
        if hasattr(self, "stream"):
            self.bench.release()
            assert self.stream.close()
            check_ended(self.stream)
            assert self.bench.opened == self.bench.closed
            self.patch.stop()


class SeveralWorkers(RuleBasedStateMachine):
    """The queue alone, with three workers that end in any order: what goes out, and how much is kept."""

    @initialize(policy=POLICIES, capacity=st.integers(1, 4))
    def open(self, policy: Policy, capacity: int) -> None:
        self.policy, self.capacity = policy, capacity
        self.queue = FrameQueue(policy, capacity, 3, 10.0, pushed=False, callbacks=False)
        self.busy: dict[int, int] = {}
        self.waiting = 0
        self.finished: list[int] = []
        self.out: list[int] = []

    @rule()
    def enter(self) -> None:
        before = self.queue.statistics().dropped
        taken = self.queue.enter(Job(None, None, None, time.monotonic()), may_wait=False)
        lost = self.queue.statistics().dropped - before
        self.waiting += (taken is not None) - (lost if taken is not None else 0)
        assert (taken is None) == (lost == 1 and self.policy != "latest")
        assert 0 <= self.waiting <= self.capacity

    @precondition(lambda self: self.waiting and len(self.busy) < 3)
    @rule()
    def take(self) -> None:
        kept = len(self.finished) - len(self.out) + len(self.busy)
        if self.policy != "latest" and kept >= self.capacity + 3:
            return  # it would wait
        free = min({0, 1, 2} - set(self.busy))
        job = self.queue.take(free)
        assert job is not None
        self.busy[free] = job.frame_id
        self.waiting -= 1

    @precondition(lambda self: self.busy)
    @rule(which=st.integers(0, 2), error=st.sampled_from([None, "lost"]))
    def finish(self, which: int, error: str | None) -> None:
        number = sorted(self.busy)[which % len(self.busy)]
        labels = None if error else Segmentation(frame(self.busy[number] & 0xFFFF), MANIFEST)
        self.queue.finish(number, labels, error)
        self.finished.append(self.busy.pop(number))

    @rule(newest=st.booleans())
    def pull(self, newest: bool) -> None:
        newest = newest and self.policy == "latest"
        result = self.queue.pull_newest() if newest else self.queue.pull_next(0)
        if result is None:
            return
        assert not self.out or result.frame_id > self.out[-1]
        self.out.append(result.frame_id)
        if self.policy != "latest":  # all of them, and none before an older one
            assert self.out == sorted(self.finished)[: len(self.out)]
            assert all(result.frame_id < frame_id for frame_id in self.busy.values())

    @invariant()
    def accounts_balance(self) -> None:
        if hasattr(self, "queue"):
            now = self.queue.statistics()
            assert now.submitted == now.processed + now.dropped + now.failed + now.pending
            assert now.pending == self.waiting + len(self.busy)
            assert now.processed + now.failed == len(self.finished)

    def teardown(self) -> None:
        if not hasattr(self, "queue"):
            return
        while self.busy:
            self.finish(2, None)
        while (result := self.queue.pull_next(0)) is not None:
            self.out.append(result.frame_id)
        now = self.queue.statistics()
        assert now.delivered == len(self.out)
        assert now.delivered + sum(now.undelivered_because.values()) == len(self.finished)
        assert self.out == sorted(self.out)
        if self.policy != "latest":
            assert self.out == sorted(self.finished)


class TestOneWorker(OneWorker.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=40, stateful_step_count=40, deadline=None,
                        suppress_health_check=[HealthCheck.too_slow])  # fmt: skip


class TestSeveralWorkers(SeveralWorkers.TestCase):  # type: ignore[name-defined,misc]
    settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
