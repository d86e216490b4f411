"""Soak of the live runner: thousands of frames at jittering rates and sizes, with faults on purpose.

    python benchmarks/soak.py --frames 20000 --output soak.json
    python benchmarks/soak.py --frames 20000 --model nasa-super1 --engine openvino

Without ``--model`` ONNX Runtime runs a tiny real model with an exact oracle, and every frame carries its number
in its pixels, so that each label map is checked, pixel by pixel, to belong to its frame. With a model, frames come
from a few pictures whose labels are known from before.

The run is a sequence of episodes of some frames, each with one fault or one kind of load (see ``EPISODES``), on a
sequence of streams of changing policy and number of workers; each stream is closed in the middle of a burst of
several threads. Throughout, another thread reads the accounts at random instants. Ends with a report (also as JSON)
and exit code 1 if anything was wrong. A deadlock ends the process with the stacks of all threads. Needs psutil.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import random
import statistics
import sys
import tempfile
import threading
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from hpddrnet_trt import load_segmenter
from hpddrnet_trt.core.errors import UserError, require
from hpddrnet_trt.core.files import write_text
from hpddrnet_trt.core.manifest import (
    METADATA_KEY,
    AxisRange,
    ClassInfo,
    InputContract,
    Manifest,
    NetworkConfig,
    OutputContract,
)
from hpddrnet_trt.core.provenance import command_line
from hpddrnet_trt.data.micrograph import Micrograph
from hpddrnet_trt.engines import library_versions
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.stream import Policy, State, Stream, StreamResult, StreamStatistics

Grey = npt.NDArray[np.uint8]

# Height, width, and how many of 32 frames: some runtimes compile for a size, and keep a few of them.
SIZES = ((128, 128, 18), (96, 160, 8), (61, 201, 4), (33, 47, 1), (1, 40, 1))
WARM_UP = tuple((height, width) for height, width, _ in SIZES[:3])
PICTURES = 5  # of each size
STAMP = 32  # pixels that carry a frame's number, one bit each
STALL_AFTER_S = 0.2
HANG_S = 30.0  # at most: the soak ends a hang when it has seen what it looks for
ERRORS_BEFORE_RESTART = 5
DEADLOCK_S = 120.0  # without an episode that ends
MAX_PROBLEMS = 50
# Of the resident memory, from the first to the last quarter of a run.
FLAT_MIB, FLAT_SHARE = 16.0, 0.05
FRAMES_TO_JUDGE_MEMORY = 5000


# -- scenes: frames and what must come of them -----------------------------------------------------


class Scene(Protocol):
    def open(self) -> Segmenter: ...

    def frame(self, number: int) -> Grey:
        """The frame of this number: always the same."""
        ...

    def wrong(self, number: int, labels: Grey) -> str | None:
        """Why these cannot be the labels of that frame."""
        ...


def _picture(height: int, width: int, seed: int) -> Grey:
    """Smooth grey structures over the whole range."""
    noise = np.random.default_rng(seed).uniform(-300, 555, (height, width)).astype(np.float32)
    return np.clip(cv2.blur(noise, (5, 5)).reshape(height, width), 0, 255).astype(np.uint8)


PATTERNS = [[_picture(*size[:2], 100 * n + k) for k in range(PICTURES)] for n, size in enumerate(SIZES)]
_SIZE_OF = [n for n, (_, _, share) in enumerate(SIZES) for _ in range(share)]


def _pattern(number: int) -> tuple[int, int]:
    """Which picture a frame shows: sizes change from frame to frame without a period."""
    value = number * 2654435761 % (1 << 32) >> 8
    return _SIZE_OF[value % len(_SIZE_OF)], value // len(_SIZE_OF) % PICTURES


class ThresholdScene:
    """Dark, middle and bright by two thresholds: an ONNX file that a line of numpy predicts exactly."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "thresholds.onnx"
        _write_thresholds(self._path)

    def open(self) -> Segmenter:
        return load_segmenter(self._path, engine="onnxruntime", threads=1, window=(0, 255))

    def frame(self, number: int) -> Grey:
        size, picture = _pattern(number)
        pixels = PATTERNS[size][picture].copy()
        bits = np.frombuffer(np.uint32(number).tobytes(), np.uint8)
        pixels.reshape(-1)[:STAMP] = np.unpackbits(bits) * np.uint8(255)
        return pixels

    def wrong(self, number: int, labels: Grey) -> str | None:
        pixels = self.frame(number)
        expected = (pixels >= 85).astype(np.uint8) + (pixels >= 170)
        if np.array_equal(labels, expected):
            return None
        found = np.packbits(labels.reshape(-1)[:STAMP] > 0).tobytes() if labels.size >= STAMP else b""
        return f"labels of shape {labels.shape}, of frame {int.from_bytes(found, sys.byteorder)}"


def _write_thresholds(path: Path) -> None:
    onnx: Any = require("onnx", "export", "write the soak's model")
    helper, types = onnx.helper, onnx.TensorProto
    description = Manifest(
        name="thresholds", network=NetworkConfig(num_classes=3), precision="fp32",
        classes=[ClassInfo(name=name, color=(value, value, value)) for name, value in
                 (("dark", 0), ("middle", 128), ("bright", 255))],
        input=InputContract(height=AxisRange(minimum=8), width=AxisRange(minimum=8)), output=OutputContract(),
    )  # fmt: skip
    grey = np.asarray([85, 170], np.float32).reshape(1, 2, 1, 1)
    nodes = [
        helper.make_node("Cast", ["image"], ["grey"], to=types.FLOAT),
        helper.make_node("GreaterOrEqual", ["grey", "thresholds"], ["above"]),
        helper.make_node("Cast", ["above"], ["ones"], to=types.FLOAT),
        helper.make_node("ReduceSum", ["ones", "channels"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["labels"], to=types.UINT8),
    ]
    graph = helper.make_graph(
        nodes, "thresholds",
        [helper.make_tensor_value_info("image", types.UINT8, ["N", 1, "H", "W"])],
        [helper.make_tensor_value_info("labels", types.UINT8, ["N", "H", "W"])],
        [onnx.numpy_helper.from_array(grey, "thresholds"),
         onnx.numpy_helper.from_array(np.asarray([1], np.int64), "channels")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {METADATA_KEY: description.to_json()})
    onnx.save(model, str(path))


class ModelScene:
    """A real model on a few pictures, whose labels are found before."""

    def __init__(self, open_segmenter: Callable[[], Segmenter]) -> None:
        self.open = open_segmenter
        with open_segmenter() as segmenter:
            self._labels = [[segmenter.segment(picture).labels for picture in pictures] for pictures in PATTERNS]

    def frame(self, number: int) -> Grey:
        size, picture = _pattern(number)
        return PATTERNS[size][picture].copy()

    def wrong(self, number: int, labels: Grey) -> str | None:
        size, picture = _pattern(number)
        expected = self._labels[size][picture]
        if labels.shape != expected.shape:
            return f"labels of shape {labels.shape} for a frame of {expected.shape}"
        agreement = float((labels == expected).mean())
        return None if agreement > 0.999 else f"{agreement:.1%} of the labels are those of its picture"


# -- faults ----------------------------------------------------------------------------------------


class Faults:
    """What the next inferences shall do instead of their work."""

    KINDS: dict[str, Callable[[], BaseException]] = {  # noqa: RUF012
        "engine error": lambda: RuntimeError("injected engine error"),
        "worker death": lambda: SystemExit("injected worker death"),
        "out of memory": lambda: MemoryError("injected want of memory"),
    }

    def __init__(self) -> None:
        self._armed: deque[str] = deque()
        self._lock = threading.Lock()
        self.struck: Counter[str] = Counter()
        self.mended = threading.Event()  # ends a hang early

    def arm(self, kind: str, count: int = 1) -> None:
        with self._lock:
            self._armed.extend([kind] * count)

    def clear(self) -> None:
        with self._lock:
            self._armed.clear()

    @property
    def armed(self) -> int:
        return len(self._armed)

    def strike(self) -> None:
        """Called at the start of each inference of a frame."""
        with self._lock:
            if not self._armed:
                return
            kind = self._armed.popleft()
            self.struck[kind] += 1
        if kind == "hang":
            self.mended.wait(HANG_S)
            return
        raise self.KINDS[kind]()


class Faulty:
    """A segmenter whose inferences of frames (warm-ups are black) may be struck by a fault."""

    def __init__(self, segmenter: Segmenter, faults: Faults) -> None:
        self._segmenter, self._faults = segmenter, faults

    def segment(self, image: Any, /) -> Any:
        if not (isinstance(image, np.ndarray) and image.size and image.dtype == np.uint8 and not image.any()):
            self._faults.strike()
        return self._segmenter.segment(image)

    def close(self) -> None:
        self._segmenter.close()


CORRUPT: dict[str, Callable[[Grey], Any]] = {
    "NaN": lambda pixels: np.where(pixels > 0, pixels, np.nan).astype(np.float32) * np.float32(np.nan),
    "empty": lambda pixels: pixels[:0],
    "complex": lambda pixels: pixels.astype(np.complex64),
    "three channels": lambda pixels: np.stack([pixels] * 3, axis=2).astype(np.uint16),
    "no array": lambda pixels: pixels.tolist(),
    "nothing": lambda _: None,
    "declared size": lambda pixels: np.broadcast_to(pixels[0, 0], (1 << 20, 1 << 20)),
}


def _read_only(pixels: Grey) -> Grey:
    pixels.flags.writeable = False
    return pixels


UNUSUAL: dict[str, Callable[[Grey], Any]] = {
    "as it is": lambda pixels: pixels,
    "read-only": _read_only,
    "big-endian": lambda pixels: pixels.astype(">u2"),
    "column-major": np.asfortranarray,
    "strided": lambda pixels: np.repeat(pixels, 2, axis=1)[:, ::2],
    "micrograph": lambda pixels: Micrograph(pixels, pixel_size_m=2e-9),
}


# -- the two ends of a stream ----------------------------------------------------------------------


@dataclass
class Report:
    """What happened. ``problems``: everything that should not have."""

    frames: int = 0
    seconds: float = 0.0
    streams: int = 0
    episodes: dict[str, int] = field(default_factory=dict)
    faults_struck: dict[str, int] = field(default_factory=dict)
    corrupt_submitted: dict[str, int] = field(default_factory=dict)
    unusual_submitted: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)  # of all streams together
    dropped_because: dict[str, int] = field(default_factory=dict)
    undelivered_because: dict[str, int] = field(default_factory=dict)
    results_checked: int = 0
    accounts_checked: int = 0
    states_told: dict[str, int] = field(default_factory=dict)
    states_seen: dict[str, int] = field(default_factory=dict)
    milliseconds: dict[str, dict[str, float]] = field(default_factory=dict)
    rss_mib: dict[str, float | bool | None] = field(default_factory=dict)
    threads_left: int = 0
    problems: list[str] = field(default_factory=list)

    def problem(self, text: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(text)


class Consumer:
    """Checks every result of one stream; slow or raising on demand."""

    def __init__(self, scene: Scene, report: Report, times: dict[str, array[float]]) -> None:
        self._scene, self._report, self._times = scene, report, times
        self._newest = 0
        self.received = 0
        self.pause_s = 0.0
        self.raises = self.raised = 0

    def __call__(self, result: StreamResult) -> None:
        self.received += 1
        if result.frame_id <= self._newest:
            self._report.problem(f"result {result.frame_id} came after {self._newest}")
        self._newest = result.frame_id
        number, good = result.tag
        if result.segmentation is not None:
            wrong = self._scene.wrong(number, result.segmentation.labels)
            if wrong is not None or not good:
                self._report.problem(f"the result of frame {number} ({'good' if good else 'corrupt'}) has {wrong}")
            self._report.results_checked += 1
            for name, seconds in (
                ("queue", result.started_s - result.submitted_s),
                ("inference", result.finished_s - result.started_s),
                ("total", result.latency_s),
                ("age when delivered", result.age_s()),
            ):
                self._times[name].append(seconds)
        elif good and result.error is not None and "injected" not in result.error:
            self._report.problem(f"frame {number} failed: {result.error}")
        if self.pause_s:
            time.sleep(self.pause_s)
        if self.raises > 0:
            self.raises -= 1
            self.raised += 1
            raise ValueError("injected callback error")


class Watcher(threading.Thread):
    """Reads the accounts of the stream at random instants."""

    def __init__(self, report: Report, seed: int) -> None:
        super().__init__(daemon=True, name="soak-watcher")
        self._report, self._rng = report, random.Random(seed)
        self._states: Counter[str] = Counter()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._stream: Stream | None = None
        self._before: StreamStatistics | None = None

    def look_at(self, stream: Stream | None) -> None:
        with self._lock:
            self._stream, self._before = stream, None

    def run(self) -> None:
        while not self._over.wait(self._rng.choice((0.0002, 0.001, 0.004, 0.016))):
            with self._lock:
                if self._stream is not None:
                    self._check(self._stream.statistics())

    def end(self) -> dict[str, int]:
        self._over.set()
        self.join()
        return dict(self._states)

    def _check(self, now: StreamStatistics) -> None:
        self._report.accounts_checked += 1
        self._states[now.state.value] += 1
        if now.submitted != now.processed + now.dropped + now.failed + now.pending:
            self._report.problem(f"the accounts do not balance: {now}")
        before = self._before
        for name in ("submitted", "processed", "dropped", "failed", "delivered", "restarts", "callback_errors"):
            if before is not None and getattr(now, name) < getattr(before, name):
                self._report.problem(f"{name} went back from {getattr(before, name)} to {getattr(now, name)}")
        self._before = now


# -- one stream after the other --------------------------------------------------------------------


@dataclass
class Session:
    """A stream under test and what was done to it."""

    scene: Scene
    report: Report
    rng: random.Random
    faults: Faults
    consumer: Consumer
    stream: Stream
    policy: Policy
    pace_s: float  # of one inference, about
    told: Counter[str]
    numbers: Callable[[], int]
    calls: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def submit(self, change: Callable[[Grey], Any] | None = None, *, good: bool = True) -> None:
        number = self.numbers()
        pixels = self.scene.frame(number)
        self.stream.submit(pixels if change is None else change(pixels), (number, good))
        if change is None:
            pixels[:] = 7  # the camera's buffer is used again
        with self.lock:
            self.calls["submitted"] += 1

    def pause(self, factor: float = 1.0) -> None:
        time.sleep(min(self.rng.expovariate(1 / (factor * self.pace_s)), 0.05))

    def settle(self, limit_s: float = 30.0) -> StreamStatistics:
        """Wait until nothing is pending."""
        deadline = time.monotonic() + limit_s
        while (now := self.stream.statistics()).pending and now.state is not State.FAILED:
            if time.monotonic() > deadline:
                self.report.problem(f"frames are pending for {limit_s} s: {now}")
                break
            time.sleep(0.001)
        return now

    def wait_for(self, state: State, reason: str = "") -> None:
        """Wait until the stream has this state, for a reason with these words."""
        deadline = time.monotonic() + 10
        while (now := self.stream.statistics()).state is not state or reason not in (now.reason or ""):
            if time.monotonic() > deadline:
                self.report.problem(f"not {state.value} {reason} in 10 s: {now}")
                return
            time.sleep(0.001)

    def strike(self, kind: str, count: int, frames: int) -> None:
        """At least ``frames`` frames, and more one by one until ``count`` faults have struck."""
        self.faults.arm(kind, count)
        for _ in range(frames):
            self.submit()
            self.pause()
        for _ in range(10 * count):
            if not self.faults.armed:
                break
            self.submit()
            self.settle()
        else:
            self.report.problem(f"no inference was struck by {kind!r}: {self.stream.statistics()}")
        for _ in range(5):  # every worker has a frame that succeeds: restarts count from zero again
            self.submit()
            self.settle()


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
        if number % 10 == 9:
            time.sleep(0.02)


def engine_error(session: Session, frames: int) -> None:
    session.strike("engine error", session.rng.choice((1, 2, ERRORS_BEFORE_RESTART + 1)), frames)


def worker_death(session: Session, frames: int) -> None:
    session.strike("worker death", 1, frames)


def out_of_memory(session: Session, frames: int) -> None:
    session.strike("out of memory", session.rng.choice((1, ERRORS_BEFORE_RESTART)), frames)


def hang(session: Session, frames: int) -> None:
    """An inference that hangs is a state, and its end ends the state."""
    session.settle()  # or "block" would make us wait behind frames of the last episode for the hang to end
    session.wait_for(State.READY)  # a worker may still be restarting
    session.faults.mended.clear()
    session.faults.arm("hang")
    for _ in range(frames if session.policy != "block" else min(frames, 3)):  # more would wait for the hang to end
        session.submit()
        session.pause()
    session.wait_for(State.STALLED, "has been in inference for")
    session.faults.mended.set()
    session.settle()
    session.wait_for(State.READY)


def slow_consumer(session: Session, frames: int) -> None:
    session.consumer.pause_s = min(3 * session.pace_s, 0.02)
    jitter(session, frames)
    session.consumer.pause_s = 0.0


def callback_that_raises(session: Session, frames: int) -> None:
    session.consumer.raises = 3
    jitter(session, frames)
    session.settle()
    session.consumer.raises = 0


def corrupt_frames(session: Session, frames: int) -> None:
    for number in range(frames):
        if number % 3:
            session.submit()
        else:
            name = session.rng.choice(list(CORRUPT))
            session.calls[f"corrupt: {name}"] += 1
            session.submit(CORRUPT[name], good=False)
        session.pause()


def unusual_frames(session: Session, frames: int) -> None:
    """Read-only, big-endian, strided... frames are frames."""
    for _ in range(frames):
        name = session.rng.choice(list(UNUSUAL))
        session.calls[f"unusual: {name}"] += 1
        session.submit(UNUSUAL[name])
        session.pause()


Episode = Callable[[Session, int], None]
EPISODES: tuple[Episode, ...] = (
    jitter, burst, quiet, engine_error, worker_death, out_of_memory, hang, slow_consumer, callback_that_raises,
    corrupt_frames, unusual_frames,
)  # fmt: skip


def shutdown_mid_burst(session: Session, frames: int) -> None:
    """Three threads submit without a pause when the stream is closed."""
    producers = [threading.Thread(target=burst, args=[session, -(-frames // 3)]) for _ in range(3)]
    for producer in producers:
        producer.start()
    time.sleep(session.rng.random() * 0.01)
    if not session.stream.close(drain=session.rng.random() < 0.5, timeout_s=30):
        session.report.problem(f"the stream did not close in 30 s: {session.stream.statistics()}")
    for producer in producers:
        producer.join()


def shutdown_while_hanging(session: Session, frames: int) -> None:
    """close returns in its time, says what it left behind, and what was left behind ends by itself."""
    session.settle()
    session.faults.mended.clear()
    session.faults.arm("hang")
    session.submit()
    while session.faults.armed:
        time.sleep(0.0005)
    started = time.monotonic()
    in_time = session.stream.close(timeout_s=0.05)
    reason = session.stream.statistics().reason
    if in_time or reason is None or time.monotonic() - started > HANG_S / 2:
        session.report.problem(f"closing during a hang: {in_time}, {reason}, {time.monotonic() - started:.2f} s")
    burst(session, frames)
    session.faults.mended.set()
    if not session.stream.close(timeout_s=30):
        session.report.problem(f"what hung did not end: {session.stream.statistics()}")


def engine_lost(session: Session, frames: int) -> None:
    """An engine that never works again is a state, not a silence."""
    session.faults.arm(session.rng.choice(("engine error", "worker death")), 10_000)
    deadline = time.monotonic() + 60
    while session.stream.state is not State.FAILED:
        session.submit()
        session.settle()
        if time.monotonic() > deadline:
            session.report.problem(f"an engine that is lost did not fail the stream: {session.stream.statistics()}")
            break
    burst(session, frames)
    session.faults.clear()
    if not session.stream.close(timeout_s=30):
        session.report.problem(f"a failed stream did not close: {session.stream.statistics()}")


ENDINGS: tuple[Episode, ...] = (
    shutdown_mid_burst, shutdown_while_hanging, shutdown_mid_burst, engine_lost,
)  # fmt: skip
STREAMS: tuple[tuple[Policy, int], ...] = (
    ("latest", 1), ("block", 1), ("latest", 2), ("reject", 1), ("block", 2), ("reject", 2),
)  # fmt: skip


def soak(
    scene: Scene, frames: int, *, seed: int = 0, episode_frames: int = 50, deadlock_s: float = DEADLOCK_S,
    tell: Callable[[str], object] = lambda text: None,
) -> Report:  # fmt: skip
    """At least ``frames`` frames through a sequence of streams, all episodes and endings; see the module's docstring.

    Raises :class:`MissingDependency` without psutil, :class:`UserError` when the engine does not work at all.
    """
    process = require("psutil", "benchmark", "watch memory").Process()
    report, rng = Report(), random.Random(seed)
    times = {name: array("d") for name in ("queue", "inference", "total", "age when delivered")}
    totals: Counter[str] = Counter()
    told: Counter[str] = Counter()
    counter, lock = iter(range(1, 1 << 31)), threading.Lock()

    def numbers() -> int:
        with lock:
            return next(counter)

    pace_s = _pace(scene)
    watcher = Watcher(report, seed)
    watcher.start()
    threads = threading.active_count()
    started, memory, peak = time.monotonic(), list[tuple[int, float]](), 0.0
    episodes = _endless(EPISODES, rng)
    try:
        while totals["submitted"] < frames or report.streams < len(ENDINGS):
            number = report.streams
            policy, workers = STREAMS[number % len(STREAMS)]
            session = _open(scene, report, rng, times, policy, workers, pace_s, told, numbers)
            watcher.look_at(session.stream)
            steps = [*(next(episodes) for _ in range(len(EPISODES) // 2)), ENDINGS[number % len(ENDINGS)]]
            for step in steps:
                faulthandler.dump_traceback_later(deadlock_s, exit=True, file=sys.__stderr__ or sys.stderr)
                step(session, episode_frames)
                totals[f"episode: {step.__name__.replace('_', ' ')}"] += 1
                peak = max(peak, process.memory_info().rss / 2**20)
            watcher.look_at(None)
            _settle_accounts(session, workers)
            totals.update(session.calls)
            totals.update({f"struck: {kind}": count for kind, count in session.faults.struck.items()})
            _add(totals, session.stream.statistics())
            report.streams += 1
            memory.append((totals["submitted"], process.memory_info().rss / 2**20))
            tell(f"{totals['submitted']} of {frames} frames, {report.streams} streams, {len(report.problems)} problems")
    finally:  # it would end whatever this process does later
        faulthandler.cancel_dump_traceback_later()
    report.states_seen = watcher.end()
    report.states_told = dict(told)
    report.threads_left = max(threading.active_count() - threads + 1, 0)
    if report.threads_left:
        report.problem(f"threads are left: {threading.enumerate()}")
    report.frames, report.seconds = totals["submitted"], time.monotonic() - started
    _fill(report, totals, times)
    _judge_memory(report, memory, peak)
    for state in ("ready", "stalled", "failed", "closed"):
        if not report.states_told.get(state):
            report.problem(f"state {state} was never told")
    return report


def _open(
    scene: Scene, report: Report, rng: random.Random, times: dict[str, array[float]], policy: Policy, workers: int,
    pace_s: float, told: Counter[str], numbers: Callable[[], int],
) -> Session:  # fmt: skip
    faults, consumer = Faults(), Consumer(scene, report, times)

    def note(state: State, reason: str | None) -> None:
        told[state.value] += 1

    stream = Stream(
        lambda: Faulty(scene.open(), faults), policy=policy, workers=workers, on_result=consumer, on_state=note,
        stall_after_s=STALL_AFTER_S, errors_before_restart=ERRORS_BEFORE_RESTART,
        warm_up=WARM_UP if rng.random() < 0.5 else (),
    )  # fmt: skip
    if stream.wait_ready(60) is not State.READY:
        raise UserError(f"the stream does not start: {stream.statistics().reason}")
    return Session(scene, report, rng, faults, consumer, stream, policy, pace_s, told, numbers)


def _endless(episodes: Sequence[Episode], rng: random.Random) -> Iterator[Episode]:
    """All episodes in a random order, again and again."""
    while True:
        yield from rng.sample(episodes, len(episodes))


def _pace(scene: Scene) -> float:
    """Seconds of an inference, about."""
    with scene.open() as segmenter:
        for number in range(1, 30):
            segmenter.segment(scene.frame(number))
        seconds = []
        for number in range(1, 30):
            started = time.perf_counter()
            segmenter.segment(scene.frame(number))
            seconds.append(time.perf_counter() - started)
    return max(statistics.median(seconds), 0.0005)


def _settle_accounts(session: Session, workers: int) -> None:
    """The accounts of a stream that has ended, against what was done to it."""
    end, struck = session.stream.statistics(), session.faults.struck
    problem = partial(_explain, session.report, f"{session.policy}, {workers} workers: {end}")
    errors = sum(struck[kind] for kind in Faults.KINDS)
    corrupt = sum(count for name, count in session.calls.items() if name.startswith("corrupt"))
    if end.pending or end.state is not State.CLOSED:
        problem("it has not ended")
    if end.submitted != session.calls["submitted"]:
        problem(f"{session.calls['submitted']} frames were submitted")
    if not errors <= end.failed <= errors + corrupt:
        problem(f"{errors} errors were injected and {corrupt} corrupt frames submitted")
    if end.delivered != session.consumer.received:
        problem(f"{session.consumer.received} results were received")
    if end.delivered + sum(end.undelivered_because.values()) != end.processed + end.failed:
        problem("results are not accounted for")
    if end.callback_errors != session.consumer.raised:
        problem(f"{session.consumer.raised} callbacks raised")
    most = struck["worker death"] + (struck["engine error"] + struck["out of memory"]) // ERRORS_BEFORE_RESTART
    least = struck["worker death"] - workers  # the death that is one too many restarts nothing
    if not max(least, 0) <= end.restarts <= most:
        problem(f"{struck} struck")
    if session.policy == "block" and end.dropped_because.keys() - {"closed", "stream failed"}:
        problem("frames were dropped while the producer waits")
    if session.policy != "latest" and end.undelivered_because.keys() - {"discarded"}:
        problem("results were left out")


def _explain(report: Report, context: str, text: str) -> None:
    report.problem(f"{text}; {context}")


def _add(totals: Counter[str], end: StreamStatistics) -> None:
    for name in ("processed", "dropped", "failed", "pending", "delivered", "restarts", "callback_errors"):
        totals[f"count: {name}"] += getattr(end, name)
    totals.update({f"dropped: {reason}": count for reason, count in end.dropped_because.items()})
    totals.update({f"undelivered: {reason}": count for reason, count in end.undelivered_because.items()})


def _fill(report: Report, totals: Counter[str], times: dict[str, array[float]]) -> None:
    def part(prefix: str) -> dict[str, int]:
        return {name.removeprefix(prefix): count for name, count in sorted(totals.items()) if name.startswith(prefix)}

    report.episodes = part("episode: ")
    report.faults_struck = part("struck: ")
    report.corrupt_submitted = part("corrupt: ")
    report.unusual_submitted = part("unusual: ")
    report.counts = {"submitted": totals["submitted"], **part("count: ")}
    report.dropped_because = part("dropped: ")
    report.undelivered_because = part("undelivered: ")
    for name, seconds in times.items():
        values = np.asarray(seconds) * 1000
        if values.size:
            p50, p95, p99 = (float(value) for value in np.percentile(values, [50, 95, 99]))
            report.milliseconds[name] = {"p50": p50, "p95": p95, "p99": p99, "max": float(values.max())}


def _judge_memory(report: Report, memory: list[tuple[int, float]], peak: float) -> None:
    """Resident memory after each stream, all of them closed: medians of quarters, slope over the last three."""
    quarter = report.frames / 4
    first = [mib for done, mib in memory if done <= quarter] or [memory[0][1]]
    last = [mib for done, mib in memory if done >= 3 * quarter]
    growth = statistics.median(last) - statistics.median(first)
    later = [(done, mib) for done, mib in memory if done >= quarter]
    slope = statistics.linear_regression(*zip(*later, strict=True)).slope * 1000 if len(later) > 1 else 0.0
    judged = report.frames >= FRAMES_TO_JUDGE_MEMORY
    flat = growth <= max(FLAT_MIB, FLAT_SHARE * statistics.median(first))
    report.rss_mib = {
        "first quarter": statistics.median(first), "last quarter": statistics.median(last),
        "peak in a stream": peak, "per 1000 frames after the first quarter": slope,
        "flat": flat if judged else None,
    }  # fmt: skip
    if judged and not flat:
        report.problem(f"memory grew by {growth:.0f} MiB")


def as_text(report: Report) -> str:
    """The report for people."""
    lines = [f"{report.frames} frames, {report.streams} streams, {report.seconds:.0f} s"]
    for name in ("counts", "dropped_because", "undelivered_because", "episodes", "faults_struck", "corrupt_submitted",
                 "unusual_submitted", "states_told", "states_seen", "rss_mib"):  # fmt: skip
        entries = ", ".join(
            f"{key} {value:.1f}" if type(value) is float else f"{key} {value}"
            for key, value in getattr(report, name).items()
        )
        lines.append(f"{name.replace('_', ' ')}: {entries}")
    for name, figures in report.milliseconds.items():
        lines.append(f"{name}: " + ", ".join(f"{key} {value:.2f} ms" for key, value in figures.items()))
    lines.append(f"checked: {report.results_checked} results, {report.accounts_checked} accounts")
    lines += [f"PROBLEM: {problem}" for problem in report.problems] or ["no problem found"]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=20_000)
    parser.add_argument("--model", help="a model file, or the name of one that comes with the package")
    parser.add_argument("--engine", default="auto", help="engine of the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("soak.json"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.CRITICAL)  # thousands of injected faults
    try:
        with tempfile.TemporaryDirectory() as folder:
            scene: Scene = (
                ThresholdScene(Path(folder))
                if arguments.model is None
                else ModelScene(partial(load_segmenter, arguments.model, engine=arguments.engine, window=(0, 255)))
            )
            report = soak(
                scene, arguments.frames, seed=arguments.seed,
                tell=lambda text: print(f"\r{text}", end="", file=sys.stderr, flush=True),
            )  # fmt: skip
    except UserError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code
    print(file=sys.stderr)
    print(as_text(report))
    run = {"command": command_line(), "versions": library_versions(), "model": arguments.model or "thresholds",
           "engine": arguments.engine if arguments.model else "onnxruntime", "seed": arguments.seed}  # fmt: skip
    write_text(arguments.output, json.dumps({**run, **asdict(report)}, indent=2) + "\n")
    print(f"written: {arguments.output}")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
