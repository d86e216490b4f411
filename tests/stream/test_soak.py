"""Soak of the live runner: thousands of frames at jittering rates and sizes, with faults on purpose.

    python -m pytest -m slow tests/stream/test_soak.py

ONNX Runtime runs a tiny real model with an exact oracle, and every frame carries its number in its pixels, so that
each label map is checked, pixel by pixel, to belong to its frame. A run is a sequence of episodes of some frames, each
with one fault or one kind of load (see ``EPISODES``), on a sequence of streams of changing policy and number of
workers; each ends in one of ``ENDINGS``. Throughout, another thread reads the accounts at random instants. A deadlock
ends the process with the stacks of all threads.
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
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

pytest.importorskip("onnxruntime")
from hpddrnet_trt import load_segmenter
from hpddrnet_trt.core.manifest import METADATA_KEY
from hpddrnet_trt.data.micrograph import Micrograph
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.stream import Policy, State, Stream, StreamResult, StreamStatistics
from tests.stream.fakes import until
from tests.toy import grey_image, manifest

Grey = npt.NDArray[np.uint8]
Change = Callable[[Grey], Any]

# Height, width, and how many of 32 frames: some runtimes compile for a size, and keep a few of them.
SIZES = ((128, 128, 18), (96, 160, 8), (61, 201, 4), (33, 47, 1), (1, 40, 1))
WARM_UP = tuple((height, width) for height, width, _ in SIZES[:3])
PICTURES = 5  # of each size
STAMP = 32  # pixels that carry a frame's number, one bit each
STALL_AFTER_S = 0.2
HANG_S = 30.0  # at most: the soak ends a hang when it has seen what it looks for
ERRORS_BEFORE_RESTART = 5
DEADLOCK_S = 120.0  # without an episode that ends
FLAT_MIB, FLAT_SHARE = 16.0, 0.05  # of the resident memory, from the first to the last quarter of a run
FAULTS: dict[str, Callable[[], BaseException]] = {
    "engine error": lambda: RuntimeError("injected engine error"),
    "worker death": lambda: SystemExit("injected worker death"),
    "out of memory": lambda: MemoryError("injected want of memory"),
}
CORRUPT: dict[str, Change] = {
    "NaN": lambda pixels: np.where(pixels > 0, pixels, np.nan).astype(np.float32) * np.float32(np.nan),
    "empty": lambda pixels: pixels[:0],
    "complex": lambda pixels: pixels.astype(np.complex64),
    "three channels": lambda pixels: np.stack([pixels] * 3, axis=2).astype(np.uint16),
    "no array": lambda pixels: pixels.tolist(),
    "nothing": lambda _: None,
    "declared size": lambda pixels: np.broadcast_to(pixels[0, 0], (1 << 20, 1 << 20)),
}


def read_only(pixels: Grey) -> Grey:
    pixels.flags.writeable = False
    return pixels


UNUSUAL: dict[str, Change] = {
    "read-only": read_only,
    "big-endian": lambda pixels: pixels.astype(">u2"),
    "column-major": np.asfortranarray,
    "strided": lambda pixels: np.repeat(pixels, 2, axis=1)[:, ::2],
    "micrograph": lambda pixels: Micrograph(pixels, pixel_size_m=2e-9),
}


@pytest.fixture(autouse=True)
def no_log_of_thousands_of_faults(caplog: pytest.LogCaptureFixture) -> None:
    """pytest keeps every line of it, with its traceback and what that holds."""
    caplog.set_level(logging.CRITICAL, "hpddrnet_trt")


# --- frames and what must come of them


PATTERNS = [[grey_image(*size[:2], 100 * n + k) for k in range(PICTURES)] for n, size in enumerate(SIZES)]
SIZE_OF = [n for n, (_, _, share) in enumerate(SIZES) for _ in range(share)]


class ThresholdScene:
    """Dark, middle and bright by two thresholds: an ONNX file that a line of numpy predicts exactly."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "thresholds.onnx"
        helper, types = onnx.helper, onnx.TensorProto
        grey = np.asarray([85, 170], np.float32).reshape(1, 2, 1, 1)
        graph = helper.make_graph(
            [
                helper.make_node("Cast", ["image"], ["grey"], to=types.FLOAT),
                helper.make_node("GreaterOrEqual", ["grey", "thresholds"], ["above"]),
                helper.make_node("Cast", ["above"], ["ones"], to=types.FLOAT),
                helper.make_node("ReduceSum", ["ones", "channels"], ["sum"], keepdims=0),
                helper.make_node("Cast", ["sum"], ["labels"], to=types.UINT8),
            ],
            "thresholds",
            [helper.make_tensor_value_info("image", types.UINT8, ["N", 1, "H", "W"])],
            [helper.make_tensor_value_info("labels", types.UINT8, ["N", "H", "W"])],
            [onnx.numpy_helper.from_array(grey, "thresholds"),
             onnx.numpy_helper.from_array(np.asarray([1], np.int64), "channels")],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        helper.set_model_props(model, {METADATA_KEY: manifest().to_json()})
        onnx.save(model, str(self.path))

    def open(self) -> Segmenter:
        return load_segmenter(self.path, engine="onnxruntime", threads=1, window=(0, 255))

    def frame(self, number: int) -> Grey:
        """The frame of this number, always the same; sizes change from frame to frame without a period."""
        value = number * 2654435761 % (1 << 32) >> 8
        pixels = PATTERNS[SIZE_OF[value % len(SIZE_OF)]][value // len(SIZE_OF) % PICTURES].copy()
        bits = np.frombuffer(np.uint32(number).tobytes(), np.uint8)
        pixels.reshape(-1)[:STAMP] = np.unpackbits(bits) * np.uint8(255)
        return pixels

    def wrong(self, number: int, labels: Grey) -> str | None:
        """Why these cannot be the labels of that frame."""
        pixels = self.frame(number)
        if np.array_equal(labels, (pixels >= 85).astype(np.uint8) + (pixels >= 170)):
            return None
        stamp = np.packbits(labels.reshape(-1)[:STAMP] > 0).tobytes() if labels.size >= STAMP else b""
        return f"labels of shape {labels.shape}, of frame {int.from_bytes(stamp, sys.byteorder)}"


class Soak:
    """One run: what was done to all its streams, and ``problems``, everything that should not have happened."""

    def __init__(self, scene: ThresholdScene, seed: int = 0) -> None:
        self.scene, self.rng = scene, random.Random(seed)
        self.totals: Counter[str] = Counter()
        self.problems: list[str] = []
        self.memory: list[tuple[int, float]] = []  # frames submitted and MiB resident, after each stream
        self._number, self._lock = 0, threading.Lock()
        with scene.open() as segmenter:
            seconds = [self._timed(segmenter, number) for number in range(1, 40)]
        self.pace_s = max(statistics.median(seconds[10:]), 0.0005)  # of an inference, about

    def _timed(self, segmenter: Segmenter, number: int) -> float:
        started = time.perf_counter()
        segmenter.segment(self.scene.frame(number))
        return time.perf_counter() - started

    def next_number(self) -> int:
        with self._lock:
            self._number += 1
            return self._number

    def count(self, name: str, number: int = 1) -> None:
        with self._lock:
            self.totals[name] += number


class Session:
    """A stream under test, the segmenter and the consumer at its ends, and what was done to it."""

    def __init__(self, soak: Soak, policy: Policy, workers: int) -> None:
        self.soak, self.scene, self.rng, self.policy, self.workers = soak, soak.scene, soak.rng, policy, workers
        self.calls: Counter[str] = Counter()
        self.struck: Counter[str] = Counter()
        self.armed: deque[str] = deque()  # what the next inferences do instead of their work
        self.mended = threading.Event()  # ends a hang early
        self.received = self.newest = self.raises = self.raised = 0
        self.consumer_pause_s = 0.0
        self.lock = threading.Lock()
        self.stream = Stream(
            self.open, policy=policy, workers=workers, on_result=self.consume,
            on_state=lambda state, _: soak.count(f"told: {state.value}"),
            stall_after_s=STALL_AFTER_S, errors_before_restart=ERRORS_BEFORE_RESTART,
            warm_up=WARM_UP if self.rng.random() < 0.5 else (),
        )  # fmt: skip
        assert self.stream.wait_ready(60) is State.READY, self.stream.statistics()

    def problem(self, text: str) -> None:
        self.soak.problems.append(f"{text}; {self.policy}, {self.workers} workers: {self.stream.statistics()}")

    # the segmenter

    def open(self) -> Any:
        segmenter, session = self.scene.open(), self

        class Faulty:
            def segment(self, image: Any, /) -> Any:
                black = isinstance(image, np.ndarray) and image.size and image.dtype == np.uint8 and not image.any()
                if not black:  # warm-ups are
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

    # the consumer

    def consume(self, result: StreamResult) -> None:
        self.received += 1
        if result.frame_id <= self.newest:
            self.problem(f"result {result.frame_id} came after {self.newest}")
        self.newest = result.frame_id
        number, good = result.tag
        if result.segmentation is not None:
            self.soak.count("results checked")
            if (wrong := self.scene.wrong(number, result.segmentation.labels)) is not None or not good:
                self.problem(f"the result of frame {number} ({'good' if good else 'corrupt'}) has {wrong}")
        elif good and "injected" not in (result.error or ""):
            self.problem(f"frame {number} failed: {result.error}")
        time.sleep(self.consumer_pause_s)
        if self.raises > 0:
            self.raises -= 1
            self.raised += 1
            raise ValueError("injected callback error")

    # the producer

    def submit(self, change: Change | None = None, *, good: bool = True) -> None:
        number = self.soak.next_number()
        pixels = self.scene.frame(number)
        self.stream.submit(pixels if change is None else change(pixels), (number, good))
        if change is None:
            pixels[:] = 7  # the camera's buffer is used again
        with self.lock:
            self.calls["submitted"] += 1
            self.calls["corrupt"] += not good

    def pause(self, factor: float = 1.0) -> None:
        time.sleep(min(self.rng.expovariate(1 / (factor * self.soak.pace_s)), 0.05))

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


# --- episodes


def jitter(session: Session, frames: int) -> None:
    """Frames now faster, now slower than the engine."""
    factor = session.rng.choice((0.3, 1.0, 2.0))
    for _ in range(frames):
        session.submit()
        session.pause(factor)


def burst(session: Session, frames: int) -> None:
    """A producer faster than the engine: no pause at all."""
    for _ in range(frames):
        session.submit()


def quiet(session: Session, frames: int) -> None:
    """Bursts and silence."""
    for number in range(frames):
        session.submit()
        time.sleep(0.02 if number % 10 == 9 else 0)


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
    burst(session, min(frames, 3) if session.policy == "block" else frames)  # more would wait for the hang to end
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
    for number in range(frames):
        change = session.rng.choice(list(CORRUPT.values())) if number % 3 == 0 else None
        session.submit(change, good=change is None)
        session.pause()


def unusual_frames(session: Session, frames: int) -> None:
    """Read-only, big-endian, strided... frames are frames."""
    for _ in range(frames):
        session.submit(session.rng.choice(list(UNUSUAL.values())))
        session.pause()


def shutdown_mid_burst(session: Session, frames: int) -> None:
    """Three threads submit without a pause when the stream is closed."""
    producers = [threading.Thread(target=burst, args=[session, -(-frames // 3)]) for _ in range(3)]
    for producer in producers:
        producer.start()
    time.sleep(session.rng.random() * 0.01)
    session.close(drain=session.rng.random() < 0.5)
    for producer in producers:
        producer.join()


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
    burst(session, frames)
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
    burst(session, frames)
    with session.lock:
        session.armed.clear()
    session.close()


Episode = Callable[[Session, int], None]
EPISODES: tuple[Episode, ...] = (
    jitter, burst, quiet, engine_error, worker_death, out_of_memory, hang, slow_consumer, callback_that_raises,
    corrupt_frames, unusual_frames,
)  # fmt: skip
ENDINGS: tuple[Episode, ...] = (shutdown_mid_burst, shutdown_while_hanging, engine_lost)
STREAMS: tuple[tuple[Policy, int], ...] = (
    ("latest", 1), ("block", 1), ("latest", 2), ("reject", 1), ("block", 2), ("reject", 2),
)  # fmt: skip


# --- the run


def watch(session: Session, over: threading.Event) -> None:
    """Read the accounts at random instants until ``over``: they balance, and no count goes back."""
    before, rng = session.stream.statistics(), random.Random(session.newest)
    while not over.wait(rng.choice((0.0002, 0.001, 0.004, 0.016))):
        now = session.stream.statistics()
        session.soak.count("accounts checked")
        if now.submitted != now.processed + now.dropped + now.failed + now.pending:
            session.problem(f"the accounts do not balance: {now}")
        for name in ("submitted", "processed", "dropped", "failed", "delivered", "restarts", "callback_errors"):
            if getattr(now, name) < getattr(before, name):
                session.problem(f"{name} went back from {getattr(before, name)} to {getattr(now, name)}")
        before = now


def settle_accounts(session: Session) -> None:
    """The accounts of a stream that has ended, against what was done to it."""
    end, struck = session.stream.statistics(), session.struck
    errors, deaths = sum(struck[kind] for kind in FAULTS), struck["worker death"]
    most = deaths + (struck["engine error"] + struck["out of memory"]) // ERRORS_BEFORE_RESTART
    least = max(deaths - session.workers, 0)  # the death that is one too many restarts nothing
    allowed = {
        "it has not ended": end.state is State.CLOSED and not end.pending,
        "another number was submitted": end.submitted == session.calls["submitted"],
        "another number failed": errors <= end.failed <= errors + session.calls["corrupt"],
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
    for name in ("submitted", "processed", "failed", "restarts", "callback_errors"):
        session.soak.totals[name] += getattr(end, name)
    session.soak.totals.update({f"struck: {kind}": count for kind, count in struck.items()})


def endless(episodes: tuple[Episode, ...], rng: random.Random) -> Iterator[Episode]:
    """All episodes in a random order, again and again."""
    while True:
        yield from rng.sample(episodes, len(episodes))


def run(scene: ThresholdScene, frames: int, episode_frames: int, deadlock_s: float = DEADLOCK_S) -> Soak:
    """At least ``frames`` frames and one of each episode and ending."""
    psutil = pytest.importorskip("psutil")
    soak, streams, threads = Soak(scene), 0, threading.active_count()
    episodes = endless(EPISODES, soak.rng)
    try:
        while soak.totals["submitted"] < frames or streams < len(ENDINGS):
            session, over = Session(soak, *STREAMS[streams % len(STREAMS)]), threading.Event()
            watcher = threading.Thread(target=watch, args=[session, over])
            watcher.start()
            steps = [*(next(episodes) for _ in range(len(EPISODES) // 2)), ENDINGS[streams % len(ENDINGS)]]
            for step in steps:
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
    return soak


def check(soak: Soak) -> None:
    """No problem, and everything that can happen has happened."""
    assert soak.problems == []
    for step in (*EPISODES, *ENDINGS):
        assert soak.totals[f"episode: {step.__name__}"], step
    for name in (*(f"struck: {kind}" for kind in (*FAULTS, "hang")), "restarts", "callback_errors"):
        assert soak.totals[name], name
    for state in ("ready", "stalled", "failed", "closed"):
        assert soak.totals[f"told: {state}"], state
    assert min(soak.totals["results checked"], soak.totals["accounts checked"]) > 50


def test_every_fault_on_a_real_engine(tmp_path: Path) -> None:
    """The long run in short."""
    check(run(ThresholdScene(tmp_path), 300, episode_frames=12, deadlock_s=100))


@pytest.mark.slow
def test_twenty_thousand_frames_and_flat_memory(tmp_path: Path) -> None:
    soak = run(ThresholdScene(tmp_path), 20_000, episode_frames=50)
    check(soak)
    first = statistics.median(mib for done, mib in soak.memory if done <= 5000)
    last = statistics.median(mib for done, mib in soak.memory if done >= 15_000)
    assert last - first <= max(FLAT_MIB, FLAT_SHARE * first), soak.memory
    print(f"{dict(sorted(soak.totals.items()))}; resident memory: {first:.0f}, {last:.0f} MiB")


class Mixed(ThresholdScene):
    """Expects the frame after the one that was asked for: what a mixed-up buffer looks like."""

    def wrong(self, number: int, labels: Grey) -> str | None:
        return super().wrong(number + 1, labels)


def test_the_soak_sees_results_of_another_frame(tmp_path: Path) -> None:
    scene = Mixed(tmp_path)
    with scene.open() as segmenter:
        labels = segmenter.segment(scene.frame(41)).labels
    assert "of frame 41" in str(scene.wrong(41, labels))
    assert ThresholdScene(tmp_path).wrong(41, labels) is None
    session = Session(Soak(scene), "block", 1)
    burst(session, 3)
    session.close()
    assert len(session.soak.problems) == 3
    session.calls["submitted"] += 1  # a frame that the stream lost
    settle_accounts(session)
    assert session.soak.problems[3].startswith("another number was submitted")


def test_frames_are_the_same_every_time_and_differ_from_each_other(tmp_path: Path) -> None:
    scene = ThresholdScene(tmp_path)
    np.testing.assert_array_equal(scene.frame(65536), scene.frame(65536))
    frames = [scene.frame(number) for number in range(1, 500)]
    assert {frame.shape for frame in frames} == {size[:2] for size in SIZES}
    assert len({frame.tobytes() for frame in frames}) == 499
