"""Everything the threads of a stream share, under one lock: the queue, the results, the counts, the state.

No thread is started here and no foreign code is called, so nothing can hold the lock for long. The
lock is re-entrant: a signal handler may close a stream while its thread is inside one of these calls.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from hpddrnet_trt.data.micrograph import Micrograph
from hpddrnet_trt.inference.result import Segmentation
from hpddrnet_trt.stream.records import Accounts, Policy, State, StreamResult, StreamStatistics

LONGEST_WAIT_S = 1e6  # waiting for longer overflows the system's clock, and an error would end the thread


def bounded(seconds: float | None) -> float | None:
    """``seconds`` as the system can wait for; also infinity, which is what "never" looks like."""
    return None if seconds is None else min(seconds, LONGEST_WAIT_S)


@dataclass
class Job:
    """One frame on its way; ``error`` when it could not even be taken in."""

    image: Any
    error: str | None
    tag: Any
    submitted_s: float
    frame_id: int = 0
    started_s: float = 0.0


@dataclass(frozen=True)
class StateChange:
    state: State
    reason: str | None


@dataclass
class _WorkerState:
    """``open``: has had a segmenter. ``restarting``: why it is being restarted. ``job``: the frame in inference."""

    open: bool = False
    restarting: str | None = None
    job: Job | None = None
    ended: bool = False


@dataclass
class _Closing:
    """``drain``: what waits is still processed and delivered, until ``deadline_s``. ``over``: that has passed."""

    drain: bool
    deadline_s: float
    over: bool = False


class FrameQueue:
    """The shared state of one stream.

    ``pushed``: results go to a callback; otherwise somebody pulls them. ``callbacks``: there is a thread that
    calls callbacks. ``spacing_s``: seconds from the start of one inference to that of the next, at least.
    """

    def __init__(
        self, policy: Policy, capacity: int, workers: int, stall_after_s: float, *, pushed: bool, callbacks: bool,
        spacing_s: float = 0.0,
    ) -> None:  # fmt: skip
        self._policy, self._capacity, self._stall_after_s = policy, capacity, stall_after_s
        self._spacing_s, self._next_start_s = spacing_s, 0.0
        self._pushed = pushed
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)  # workers: a frame, room for its result, or the end
        self._pace = threading.Condition(self._lock)  # workers with a frame that is to wait: only for the end
        self._room = threading.Condition(self._lock)  # blocked producers: room in the queue, or the end
        self._changed = threading.Condition(self._lock)  # everybody else: a result, a state, the end
        self._accounts = Accounts()
        self._workers = [_WorkerState() for _ in range(workers)]
        self._waiting: deque[Job] = deque()
        # Finished before an older frame, which is to be handed out first; a heap by frame id.
        self._held: list[tuple[int, StreamResult]] = []
        self._newest = 0  # frame id of the newest result that went out
        self._to_push: deque[StreamResult] = deque()
        self._to_pull: deque[StreamResult] = deque()
        # As many results may wait as frames, and each worker may add the one it has begun.
        self._result_limit = capacity + workers
        self._callback_since: float | None = None
        self._delivery_ended = not callbacks
        self._failure: str | None = None
        self._closing: _Closing | None = None
        self._announced = State.STARTING

    # -- producers -------------------------------------------------------------------------------

    def rejects(self, may_wait: bool) -> bool:
        """Count and refuse a frame that there is no place for; asked before anything is spent on copying it."""
        with self._lock:
            reason = self._refusal(may_wait)
            if reason is None:
                return False
            self._accounts.submitted += 1
            self._accounts.dropped[reason] += 1
            return True

    def enter(self, job: Job, may_wait: bool) -> int | None:
        """Put a frame into the queue: its id, or None when it was dropped instead."""
        with self._lock:
            while self._policy == "block" and may_wait and self._is_open() and self._is_full():
                self._room.wait()
            if self.rejects(may_wait):
                return None
            if self._is_full():
                self._waiting.popleft()
                self._accounts.dropped["replaced"] += 1
            self._accounts.submitted += 1
            job.frame_id = self._accounts.submitted
            self._waiting.append(job)
            self._work.notify_all()
            return job.frame_id

    def _refusal(self, may_wait: bool) -> str | None:
        """Why a new frame is dropped, if it is."""
        if self._failure is not None:
            return "stream failed"
        if self._closing is not None:
            return "closed"
        if self._policy == "reject" or (self._policy == "block" and not may_wait):
            return "rejected" if self._is_full() else None
        return None

    def _is_open(self) -> bool:
        return self._failure is None and self._closing is None

    def _is_full(self) -> bool:
        return len(self._waiting) >= self._capacity

    # -- workers ---------------------------------------------------------------------------------

    def take(self, worker: int) -> Job | None:
        """The next frame for this worker; waits for one. None: the stream ends."""
        with self._lock:
            while not self.ending():
                if self._waiting and (self._closing is not None or self._has_outlet()):
                    now = time.monotonic()
                    if self._closing is None and now < self._next_start_s:
                        # Not woken by every frame that comes meanwhile.
                        self._pace.wait(bounded(self._next_start_s - now))
                        continue
                    job = self._waiting.popleft()
                    job.started_s = now
                    self._next_start_s = now + self._spacing_s
                    self._workers[worker].job = job
                    self._room.notify_all()
                    self._changed.notify_all()  # the time of a possible stall is known now
                    return job
                self._work.wait()
            return None

    def ending(self) -> bool:
        """Whether a worker without a frame shall end."""
        with self._lock:
            self._tick(time.monotonic())
            return self._failure is not None or (self._closing is not None and not self._waiting)

    def pause(self, seconds: float) -> bool:
        """Wait before a restart; False when the stream ends meanwhile."""
        until = time.monotonic() + seconds
        with self._lock:
            while not self.ending():
                left = until - time.monotonic()
                if left <= 0:
                    return True
                self._work.wait(left)
            return False

    def first_shape(self) -> tuple[int, int] | None:
        """Height and width of the frame that waits first, if there is one of grey levels."""
        with self._lock:
            image = self._waiting[0].image if self._waiting else None
        pixels = image.pixels if isinstance(image, Micrograph) else image
        if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or not pixels.size:
            return None
        return pixels.shape[0], pixels.shape[1]

    def finish(self, worker: int, segmentation: Segmentation | None, error: str | None) -> None:
        """The worker's frame is done: with a segmentation, or with an error."""
        with self._lock:
            job = self._workers[worker].job
            assert job is not None  # a worker finishes what it took
            result = StreamResult(
                job.frame_id, job.tag, segmentation, error, job.submitted_s, job.started_s, time.monotonic()
            )
            self._workers[worker].job = None
            self._accounts.finished(result)
            self._put_out(result)
            self._work.notify_all()
            self._changed.notify_all()

    def opened(self, worker: int) -> None:
        """The worker has a warm segmenter."""
        with self._lock:
            self._workers[worker].open = True
            self._workers[worker].restarting = None
            self._changed.notify_all()

    def restarting(self, worker: int, reason: str) -> None:
        """The worker is about to open its segmenter again."""
        with self._lock:
            self._accounts.restarts += 1
            self._accounts.last_error = self._workers[worker].restarting = reason
            self._changed.notify_all()

    def worker_ended(self, worker: int) -> None:
        with self._lock:
            self._workers[worker].ended = True

    def fail(self, reason: str) -> None:
        """The stream cannot go on. The first reason stays."""
        with self._lock:
            if self._failure is None:
                self._failure = self._accounts.last_error = reason
            self._drop_waiting("stream failed")
            self._wake_all()

    def has_job(self, worker: int) -> bool:
        with self._lock:
            return self._workers[worker].job is not None

    def _has_outlet(self) -> bool:
        """Whether a result of one more frame has a place: never full with ``latest``."""
        if self._policy == "latest":
            return True
        begun = sum(state.job is not None for state in self._workers)
        return len(self._outbox()) + len(self._held) + begun < self._result_limit

    def _outbox(self) -> deque[StreamResult]:
        return self._to_push if self._pushed else self._to_pull

    # -- results ---------------------------------------------------------------------------------

    def _put_out(self, result: StreamResult) -> None:
        """Make a result available, in the order of frames."""
        closing = self._closing
        if closing is not None and (closing.over or not closing.drain):
            self._undelivered("discarded", 1)
        elif self._policy == "latest":
            if result.frame_id < self._newest:
                self._undelivered("overtaken", 1)
                return
            self._newest = result.frame_id
            self._undelivered("superseded", len(self._outbox()))
            self._outbox().clear()
            self._make_available(result)
        else:
            heapq.heappush(self._held, (result.frame_id, result))
            begun = [state.job.frame_id for state in self._workers if state.job is not None]
            while self._held and all(self._held[0][0] < frame_id for frame_id in begun):
                self._make_available(heapq.heappop(self._held)[1])

    def _make_available(self, result: StreamResult) -> None:
        self._outbox().append(result)
        if self._pushed:  # whoever looks besides the callback sees the newest
            self._to_pull.clear()
            self._to_pull.append(result)

    def _undelivered(self, reason: str, count: int) -> None:
        if count:
            self._accounts.undelivered[reason] += count

    def next_push(self) -> StreamResult | StateChange | None:
        """What the delivery thread shall report next; waits for it. None: the stream has ended."""
        with self._lock:
            self._callback_since = None
            while True:
                now = time.monotonic()
                self._tick(now)
                over = self._closing is not None and self._all_done() and not self._to_push
                change = self._news(now, over)
                if change is not None:
                    self._announced = change.state
                    self._callback_since = now
                    return change
                if self._to_push:
                    self._callback_since = now
                    return self._handed_over(self._to_push.popleft(), now)
                if over:
                    return None
                self._changed.wait(bounded(self._next_deadline(now)))

    def _news(self, now: float, over: bool) -> StateChange | None:
        """The state that is to be reported, if it is another than the last one reported."""
        state, reason = self._state(now)
        if self._failure is not None and self._announced not in (State.FAILED, State.CLOSED):
            return StateChange(State.FAILED, self._failure)  # never left out, also when it is closed at once
        if state is self._announced or (state is State.CLOSED and not over):  # CLOSED is the last word
            return None
        return StateChange(state, reason)

    def delivery_ended(self) -> None:
        with self._lock:
            self._delivery_ended = True

    def pull_newest(self) -> StreamResult | None:
        """The newest result that was not handed out; older ones are given up."""
        with self._lock:
            if not self._to_pull:
                return None
            result = self._to_pull.pop()
            if self._pushed:
                return result
            self._undelivered("superseded", len(self._to_pull))
            self._to_pull.clear()
            return self._handed_over(result, time.monotonic())

    def pull_next(self, timeout_s: float | None) -> StreamResult | None:
        """The next result in order; waits for it. None: none came in time, or none will come any more."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            while not self._to_pull:
                left = None if until is None else until - time.monotonic()
                over = not self._is_open() and self._all_done()
                if over or (left is not None and left <= 0):
                    return None
                self._changed.wait(bounded(left))
            result = self._to_pull.popleft()
            return result if self._pushed else self._handed_over(result, time.monotonic())

    def callback_failed(self, reason: str) -> None:
        with self._lock:
            self._accounts.callback_errors += 1
            self._accounts.last_error = reason

    def _handed_over(self, result: StreamResult, now: float) -> StreamResult:
        self._accounts.handed_over(result, now)
        self._work.notify_all()  # there is room for one more result
        return result

    def _all_done(self) -> bool:
        """Whether no result will come any more."""
        if self._closing is not None and self._closing.over:
            return True
        return not self._waiting and all(state.job is None for state in self._workers)

    # -- state -----------------------------------------------------------------------------------

    def statistics(self) -> StreamStatistics:
        with self._lock:
            now = time.monotonic()
            self._tick(now)
            state, reason = self._state(now)
            accounts = self._accounts
            stages = {name: stage.copy() for name, stage in accounts.stages.items()}
            at_this_instant = partial(
                StreamStatistics,
                state=state,
                reason=reason,
                submitted=accounts.submitted,
                processed=accounts.processed,
                dropped=sum(accounts.dropped.values()),
                failed=accounts.failed,
                pending=len(self._waiting) + sum(worker.job is not None for worker in self._workers),
                dropped_because=dict(accounts.dropped),
                delivered=accounts.delivered,
                undelivered_because=dict(accounts.undelivered),
                restarts=accounts.restarts,
                callback_errors=accounts.callback_errors,
                last_error=accounts.last_error,
                domains=dict(accounts.domains),
            )
        # Percentiles take longer than everything else here: without the lock.
        return at_this_instant(stages={name: stage.times() for name, stage in stages.items()})

    def state(self) -> State:
        with self._lock:
            return self._state(time.monotonic())[0]

    def wait_started(self, timeout_s: float | None) -> State:
        """The state once it is no longer STARTING, or after ``timeout_s``."""
        with self._lock:
            self._changed.wait_for(lambda: self.state() is not State.STARTING, bounded(timeout_s))
            return self.state()

    def _state(self, now: float) -> tuple[State, str | None]:
        if self._closing is not None:
            return State.CLOSED, (self._left_behind(now) if self._closing.over else None) or self._failure
        if self._failure is not None:
            return State.FAILED, self._failure
        for worker in self._workers:
            if worker.restarting is not None:
                return State.STALLED, f"a worker is being restarted: {worker.restarting}"
        job = self._oldest_job()
        if job is not None and now >= job.started_s + self._stall_after_s:
            return State.STALLED, f"frame {job.frame_id} has been in inference for {now - job.started_s:.1f} s"
        return (State.READY if all(worker.open for worker in self._workers) else State.STARTING), None

    def _oldest_job(self) -> Job | None:
        jobs = [worker.job for worker in self._workers if worker.job is not None]
        return min(jobs, key=lambda job: job.started_s, default=None)

    def _next_deadline(self, now: float) -> float | None:
        """Seconds until the state may change with no thread doing anything; None when it cannot."""
        job = self._oldest_job()
        times = [] if job is None else [job.started_s + self._stall_after_s]
        if self._closing is not None and not self._closing.over:
            times.append(self._closing.deadline_s)
        return min((moment - now for moment in times if moment > now), default=None)

    # -- the end ---------------------------------------------------------------------------------

    def request_close(self, drain: bool, timeout_s: float) -> None:
        """Take no more frames. A later request can only make it end sooner."""
        with self._lock:
            deadline = time.monotonic() + timeout_s
            if self._closing is None:
                self._closing = _Closing(drain, deadline)
            self._closing.drain &= drain
            self._closing.deadline_s = min(self._closing.deadline_s, deadline)
            if not drain:
                self._drop_waiting("closed")
                self._discard(self._to_push, self._to_pull)
            self._wake_all()

    def give_up(self) -> None:
        """The time given to close is over: drop what waits, leave behind what hangs."""
        with self._lock:
            if self._closing is None or self._closing.over:
                return
            self._closing.over = True
            self._drop_waiting("closed")
            if not self._pushed:  # what was ready can still be pulled, though an older frame hangs
                self._to_pull.extend(result for _, result in sorted(self._held))
                self._held.clear()
            self._discard(self._to_push)
            self._wake_all()

    def _tick(self, now: float) -> None:
        """What is due by the clock alone: nobody waits for a close that was asked for from a callback."""
        if self._closing is not None and now >= self._closing.deadline_s:
            self.give_up()

    def _left_behind(self, now: float) -> str | None:
        """What has not ended, if anything."""
        job = self._oldest_job()
        if job is not None:
            return f"closed, but frame {job.frame_id} has been in inference for {now - job.started_s:.1f} s"
        if not all(worker.ended for worker in self._workers):
            return "closed, but a segmenter is still being opened or closed"
        if not self._delivery_ended and self._callback_since is not None:
            return f"closed, but a callback has been running for {now - self._callback_since:.1f} s"
        return None

    def _drop_waiting(self, reason: str) -> None:
        if self._waiting:
            self._accounts.dropped[reason] += len(self._waiting)
            self._waiting.clear()
            self._wake_all()

    def _discard(self, *outboxes: deque[StreamResult]) -> None:
        self._undelivered("discarded", len(self._held))
        self._held.clear()
        for outbox in outboxes:
            if outbox is self._outbox():
                self._undelivered("discarded", len(outbox))
            outbox.clear()

    def _wake_all(self) -> None:
        for condition in (self._work, self._pace, self._room, self._changed):
            condition.notify_all()
