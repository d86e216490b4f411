"""Soak of the live runner: thousands of frames at jittering rates and sizes, with faults on purpose.

    python -m pytest -m slow tests/stream/test_soak.py

ONNX Runtime runs a tiny real model, and every label map is compared with that of its own frame. A run is a sequence of
episodes of some frames, each with one fault or one kind of load, on a sequence of streams of changing policy and number
of workers; each ends in one of ``ENDINGS``. Throughout, another thread reads the accounts at random instants. A
deadlock ends the process with the stacks of all threads.
"""

from __future__ import annotations

import faulthandler
import logging
import random
import statistics
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("onnxruntime")
from hpddrnet_trt import load_segmenter
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.stream import Policy, State, Stream, StreamResult, StreamStatistics
from tests.stream.fakes import NO_FRAMES, until
from tests.toy import grey_image, manifest, write_toy_onnx

# Frame number n shows picture n modulo 19: sizes change from frame to frame, large ones come most often.
SIZES = [(128, 128)] * 10 + [(96, 160)] * 5 + [(61, 201)] * 2 + [(33, 47), (1, 40)]
STALL_AFTER_S = 0.2
HANG_S = 30.0  # at most: the soak ends a hang when it has seen what it looks for
ERRORS_BEFORE_RESTART = 5
DEADLOCK_S = 120.0  # without an episode that ends
# MiB of resident memory, from the first to the last quarter: some 400 openings of ONNX Runtime leave 30 behind; a frame
# kept each time would be 200.
FLAT_MIB = 64.0
FAULTS: dict[str, Callable[[], BaseException]] = {
    "engine error": lambda: RuntimeError("injected engine error"),
    "worker death": lambda: SystemExit("injected worker death"),
    "out of memory": lambda: MemoryError("injected want of memory"),
}


@pytest.fixture(autouse=True)
def no_log_of_thousands_of_faults(caplog: pytest.LogCaptureFixture) -> None:
    """pytest keeps every line of it, with its traceback and what that holds."""
    caplog.set_level(logging.CRITICAL, "hpddrnet_trt")


class Soak:
    """One run: what was done to all its streams, and ``problems``, everything that should not have happened."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.path = write_toy_onnx(folder / "toy.onnx", manifest())
        self.rng = random.Random(seed)
        self.totals: Counter[str] = Counter()
        self.problems: list[str] = []
        self.memory: list[tuple[int, float]] = []  # frames submitted and MiB resident, after each stream
        self.pictures = [grey_image(*size, seed) for seed, size in enumerate(SIZES)]
        with self.open() as segmenter:
            begin = time.perf_counter()
            self.expected = [segmenter.segment(picture).labels for picture in self.pictures]
            self.pace_s = (time.perf_counter() - begin) / len(SIZES)  # of an inference, about

    def open(self) -> Segmenter:
        return load_segmenter(self.path, engine="onnxruntime", threads=1)

    def labels(self, number: int) -> npt.NDArray[np.uint8]:
        """What must come of frame ``number``."""
        return self.expected[number % len(SIZES)]


class Session:
    """A stream under test, the segmenter and the consumer at its ends, and what was done to it."""

    def __init__(self, soak: Soak, policy: Policy, workers: int) -> None:
        self.soak, self.rng, self.policy, self.workers = soak, soak.rng, policy, workers
        self.calls: Counter[str] = Counter()
        self.struck: Counter[str] = Counter()
        self.armed: deque[str] = deque()  # what the next inferences do instead of their work
        self.mended = threading.Event()  # ends a hang early
        self.received = self.newest = self.raises = self.raised = 0
        self.consumer_pause_s = 0.0
        self.lock = threading.Lock()
        self.stream = Stream(
            self.open, policy=policy, workers=workers, on_result=self.consume,
            on_state=lambda state, _: soak.totals.update([f"told: {state.value}"]),
            stall_after_s=STALL_AFTER_S, errors_before_restart=ERRORS_BEFORE_RESTART,
            warm_up=SIZES[9:16:3] if self.rng.random() < 0.5 else (),
        )  # fmt: skip
        assert self.stream.wait_ready(60) is State.READY, self.stream.statistics()

    def problem(self, text: str) -> None:
        self.soak.problems.append(f"{text}; {self.policy}, {self.workers} workers: {self.stream.statistics()}")

    def open(self) -> Any:
        segmenter, session = self.soak.open(), self

        class Faulty:
            def segment(self, image: Any, /) -> Any:
                if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.any():  # warm-ups are black
                    session.strike_now()
                return segmenter.segment(image)

            def close(self) -> None:
                segmenter.close()

        return Faulty()

    def strike_now(self) -> None:
        with self.lock:
            if not self.armed:
                return
            kind = self.armed.popleft()
            self.struck[kind] += 1
        if kind != "hang":
            raise FAULTS[kind]()
        self.mended.wait(HANG_S)

    def arm(self, kind: str, count: int = 1) -> None:
        with self.lock:
            self.armed.extend([kind] * count)

    def consume(self, result: StreamResult) -> None:
        self.received += 1
        if result.frame_id <= self.newest:
            self.problem(f"result {result.frame_id} came after {self.newest}")
        self.newest = result.frame_id
        number, good = result.tag
        if result.segmentation is not None:
            self.soak.totals["results checked"] += 1
            if not good or not np.array_equal(result.segmentation.labels, self.soak.labels(number)):
                self.problem(f"frame {number} ({'good' if good else 'none'}) has the labels of another")
        elif good and "injected" not in (result.error or ""):
            self.problem(f"frame {number} failed: {result.error}")
        time.sleep(self.consumer_pause_s)
        if self.raises > 0:
            self.raises -= 1
            self.raised += 1
            raise ValueError("injected callback error")

    def submit(self, frames: int = 1, pause: float = 0.0, no_frames: int = 0) -> None:
        """So many frames with random pauses of ``pause`` inferences; every ``no_frames``-th is none."""
        for place in range(frames):
            with self.lock:
                number = self.calls["submitted"] = self.calls["submitted"] + 1
                good = not no_frames or place % no_frames > 0
                self.calls["no frames"] += not good
            if good:
                pixels = self.soak.pictures[number % len(SIZES)].copy()
                self.stream.submit(pixels, (number, True))
                pixels[:] = 7  # the camera's buffer is used again
            else:
                self.stream.submit(self.rng.choice(list(NO_FRAMES.values()))[0], (number, False))
            if pause:
                time.sleep(min(self.rng.expovariate(1 / (pause * self.soak.pace_s)), 0.05))

    def wait_for(self, what: str, condition: Callable[[StreamStatistics], bool], limit_s: float = 30.0) -> None:
        deadline = time.monotonic() + limit_s
        while not condition(self.stream.statistics()):
            if time.monotonic() > deadline:
                self.problem(f"not {what} in {limit_s:.0f} s")
                return
            time.sleep(0.001)

    def settle(self) -> None:
        self.wait_for("settled", lambda now: not now.pending or now.state is State.FAILED)

    def strike(self, kind: str, count: int, frames: int) -> None:
        """At least ``frames`` frames, and more one by one until ``count`` faults have struck."""
        self.arm(kind, count)
        jitter(self, frames)
        for _ in range(10 * count):
            if not self.armed:
                break
            self.submit()
            self.settle()
        else:
            self.problem(f"no inference was struck by {kind!r}")
        for _ in range(5):  # every worker has a frame that succeeds: restarts count from zero again
            self.submit()
            self.settle()

    def close(self, drain: bool = True) -> None:
        if not self.stream.close(drain=drain, timeout_s=30):
            self.problem("it did not close in 30 s")


def jitter(session: Session, frames: int) -> None:
    """Frames now faster, now slower than the engine."""
    session.submit(frames, pause=session.rng.choice((0.3, 1.0, 2.0)))


def burst(session: Session, frames: int) -> None:
    """Three producers at once, without a pause."""
    join(producers(session, frames))


def producers(session: Session, frames: int) -> list[threading.Thread]:
    threads = [threading.Thread(target=session.submit, args=[-(-frames // 3)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    return threads


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join()


def engine_error(session: Session, frames: int) -> None:
    session.strike("engine error", session.rng.choice((1, 2, ERRORS_BEFORE_RESTART + 1)), frames)


def worker_death(session: Session, frames: int) -> None:
    session.strike("worker death", 1, frames)


def out_of_memory(session: Session, frames: int) -> None:
    session.strike("out of memory", session.rng.choice((1, ERRORS_BEFORE_RESTART)), frames)


def hang(session: Session, frames: int) -> None:
    """An inference that hangs is a state, and its end ends the state."""
    session.settle()  # or "block" would make us wait behind frames of the last episode for the hang to end
    session.wait_for("ready", lambda now: now.state is State.READY)  # a worker may still be restarting
    session.mended.clear()
    session.arm("hang")
    session.submit(min(frames, 3) if session.policy == "block" else frames)  # more would wait for the hang to end
    session.wait_for("stalled", lambda now: "has been in inference for" in (now.reason or ""))
    session.mended.set()
    session.settle()
    session.wait_for("ready again", lambda now: now.state is State.READY)


def slow_consumer(session: Session, frames: int) -> None:
    session.consumer_pause_s = min(3 * session.soak.pace_s, 0.02)
    jitter(session, frames)
    session.consumer_pause_s = 0.0


def callback_that_raises(session: Session, frames: int) -> None:
    session.raises = 3
    jitter(session, frames)
    session.settle()
    session.raises = 0


def corrupt_frames(session: Session, frames: int) -> None:
    session.submit(frames, pause=1.0, no_frames=3)


def shutdown_mid_burst(session: Session, frames: int) -> None:
    """Three threads submit without a pause when the stream is closed."""
    threads = producers(session, frames)
    time.sleep(session.rng.random() * 0.01)
    session.close(drain=session.rng.random() < 0.5)
    join(threads)


def shutdown_while_hanging(session: Session, frames: int) -> None:
    """close returns in its time, says what it left behind, and what was left behind ends by itself."""
    session.settle()
    session.mended.clear()
    session.arm("hang")
    session.submit()
    until(lambda: not session.armed, "the hang")
    started = time.monotonic()
    in_time = session.stream.close(timeout_s=0.05)
    if in_time or session.stream.statistics().reason is None or time.monotonic() - started > HANG_S / 2:
        session.problem(f"closing during a hang: {in_time}, {time.monotonic() - started:.2f} s")
    session.submit(frames)
    session.mended.set()
    session.close()


def engine_lost(session: Session, frames: int) -> None:
    """An engine that never works again is a state, not a silence."""
    session.arm(session.rng.choice(("engine error", "worker death")), 10_000)
    deadline = time.monotonic() + 60
    while session.stream.state is not State.FAILED and time.monotonic() < deadline:
        session.submit()
        session.settle()
    if session.stream.state is not State.FAILED:
        session.problem("an engine that is lost did not fail the stream")
    session.submit(frames)
    with session.lock:
        session.armed.clear()
    session.close()


Episode = Callable[[Session, int], None]
EPISODES: tuple[Episode, ...] = (
    jitter, burst, engine_error, worker_death, out_of_memory, hang, slow_consumer, callback_that_raises, corrupt_frames
)  # fmt: skip
ENDINGS: tuple[Episode, ...] = (shutdown_mid_burst, shutdown_while_hanging, engine_lost)
STREAMS: tuple[tuple[Policy, int], ...] = (
    ("latest", 1), ("block", 1), ("latest", 3), ("reject", 1), ("block", 3), ("reject", 2),
)  # fmt: skip
COUNTS = ("submitted", "processed", "dropped", "failed", "delivered", "restarts", "callback_errors")


def watch(session: Session, over: threading.Event) -> None:
    """Read the accounts at random instants until ``over``: they balance, and no count goes back."""
    before, rng = session.stream.statistics(), random.Random(session.newest)
    while not over.wait(rng.choice((0.0002, 0.001, 0.004, 0.016))):
        now = session.stream.statistics()
        session.soak.totals["accounts checked"] += 1
        if now.submitted != now.processed + now.dropped + now.failed + now.pending:
            session.problem(f"the accounts do not balance: {now}")
        if any(getattr(now, name) < getattr(before, name) for name in COUNTS):
            session.problem(f"a count went back from {before}")
        before = now


def settle_accounts(session: Session) -> None:
    """The accounts of a stream that has ended, against what was done to it."""
    end, struck = session.stream.statistics(), session.struck
    errors, deaths = sum(struck[kind] for kind in FAULTS), struck["worker death"]
    most = deaths + (errors - deaths) // ERRORS_BEFORE_RESTART
    least = max(deaths - session.workers, 0)  # the death that is one too many restarts nothing
    allowed = {
        "it has not ended": end.state is State.CLOSED and not end.pending,
        "another number was submitted": end.submitted == session.calls["submitted"],
        "another number failed": errors <= end.failed <= errors + session.calls["no frames"],
        "another number was received": end.delivered == session.received,
        "results are not accounted for": end.delivered + sum(end.undelivered_because.values())
        == end.processed + end.failed,
        "another number of callbacks raised": end.callback_errors == session.raised,
        "another number of restarts": least <= end.restarts <= most,
        "frames were dropped while the producer waits": session.policy != "block"
        or end.dropped_because.keys() <= {"closed", "stream failed"},
        "results were left out": session.policy == "latest" or end.undelivered_because.keys() <= {"discarded"},
    }
    for text, right in allowed.items():
        if not right:
            session.problem(f"{text}: {dict(session.calls)}, {dict(struck)}")
    session.soak.totals.update({name: getattr(end, name) for name in COUNTS})
    session.soak.totals.update({f"struck: {kind}": count for kind, count in struck.items()})


def endless(rng: random.Random) -> Iterator[Episode]:
    """All episodes in a random order, again and again."""
    while True:
        yield from rng.sample(EPISODES, len(EPISODES))


def run(folder: Path, frames: int, episode_frames: int, deadlock_s: float = DEADLOCK_S) -> Soak:
    """At least ``frames`` frames and one of each episode and ending, without a problem."""
    psutil = pytest.importorskip("psutil")
    soak, streams, threads = Soak(folder), 0, threading.active_count()
    episodes = endless(soak.rng)
    try:
        while soak.totals["submitted"] < frames or streams < len(ENDINGS):
            session, over = Session(soak, *STREAMS[streams % len(STREAMS)]), threading.Event()
            watcher = threading.Thread(target=watch, args=[session, over])
            watcher.start()
            for step in (*(next(episodes) for _ in range(len(EPISODES) // 2)), ENDINGS[streams % len(ENDINGS)]):
                faulthandler.dump_traceback_later(deadlock_s, exit=True, file=sys.__stderr__ or sys.stderr)
                step(session, episode_frames)
                soak.totals[f"episode: {step.__name__}"] += 1
            over.set()
            watcher.join()
            settle_accounts(session)
            streams += 1
            soak.memory.append((soak.totals["submitted"], psutil.Process().memory_info().rss / 2**20))
    finally:  # it would end whatever this process does later
        faulthandler.cancel_dump_traceback_later()
    until(lambda: threading.active_count() <= threads, "the end of all threads")
    assert soak.problems == []
    happened = {name for name, count in soak.totals.items() if count}
    assert happened >= {f"episode: {step.__name__}" for step in (*EPISODES, *ENDINGS)}
    assert happened >= {f"struck: {kind}" for kind in (*FAULTS, "hang")} | {"restarts", "callback_errors"}
    assert happened >= {f"told: {state}" for state in ("ready", "stalled", "failed", "closed")}
    assert min(soak.totals["results checked"], soak.totals["accounts checked"]) > 50
    return soak


def test_every_fault_on_a_real_engine(tmp_path: Path) -> None:
    run(tmp_path, 300, episode_frames=12, deadlock_s=100)


@pytest.mark.slow
def test_twenty_thousand_frames_and_flat_memory(tmp_path: Path) -> None:
    soak = run(tmp_path, 20_000, episode_frames=50)
    first = statistics.median(mib for done, mib in soak.memory if done <= 5000)
    last = statistics.median(mib for done, mib in soak.memory if done >= 15_000)
    assert last - first <= FLAT_MIB, soak.memory
    print(f"{dict(sorted(soak.totals.items()))}; resident memory: {first:.0f}, {last:.0f} MiB")


def test_the_soak_sees_what_is_wrong(tmp_path: Path) -> None:
    soak = Soak(tmp_path)
    assert all(first.tobytes() != second.tobytes() for first, second in pairwise(soak.expected))
    soak.expected = [*soak.expected[1:], soak.expected[0]]  # a frame too late: what a mixed-up buffer looks like
    session = Session(soak, "block", 1)
    session.submit(3)
    session.close()
    assert len(soak.problems) == 3
    session.calls["submitted"] += 1  # a frame that the stream lost
    settle_accounts(session)
    assert soak.problems[3].startswith("another number was submitted")
