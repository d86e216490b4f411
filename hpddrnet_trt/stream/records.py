"""What a stream hands out: its states, its results, its figures and how they are counted; sentences and log lines."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import numpy as np

from hpddrnet_trt.core import errors
from hpddrnet_trt.core.errors import UserError, one_line
from hpddrnet_trt.inference.result import Segmentation

WINDOW = 1024  # recent frames behind the percentiles
Policy = Literal["latest", "block", "reject"]


class State(StrEnum):
    """What a stream is doing; ``StreamStatistics.reason`` says why in a sentence.

    - ``STARTING``: workers open their segmenters and warm them up. Frames are already taken.
    - ``READY``: every worker has a segmenter.
    - ``STALLED``: a frame has been in inference for too long, or a worker is being restarted.
      Returns to ``READY`` by itself when that is over.
    - ``FAILED``: no way to go on (no segmenter could be opened, or restarts did not help). Final.
    - ``CLOSED``: :meth:`Stream.close` was called. Final.
    """

    STARTING = "starting"
    READY = "ready"
    STALLED = "stalled"
    FAILED = "failed"
    CLOSED = "closed"


@dataclass(frozen=True)
class StreamResult:
    """One processed or failed frame. Dropped frames have no result.

    ``frame_id``: what ``submit`` returned. ``tag``: what ``submit`` was given. ``segmentation``: the
    result, None when the frame failed; then ``error`` says why in a sentence. Times are
    ``time.monotonic()`` in seconds: ``submitted_s`` when ``submit`` was called, ``started_s`` and
    ``finished_s`` of the inference.
    """

    frame_id: int
    tag: Any
    segmentation: Segmentation | None
    error: str | None
    submitted_s: float
    started_s: float
    finished_s: float

    @property
    def latency_s(self) -> float:
        """Seconds from ``submit`` to the end of the inference."""
        return self.finished_s - self.submitted_s

    def age_s(self) -> float:
        """Seconds since ``submit``: how old what this result shows is now."""
        return time.monotonic() - self.submitted_s


@dataclass(frozen=True)
class StageTimes:
    """Milliseconds of one stage.

    ``count``: frames since the stream was opened. ``p50_ms``, ``p95_ms``, ``p99_ms`` and ``max_ms``
    are of the most recent frames (:data:`WINDOW`), ``worst_ms`` of
    all. All 0.0 while ``count`` is 0.
    """

    count: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float
    worst_ms: float


@dataclass(frozen=True)
class StreamStatistics:
    """A stream at one instant; ``submitted == processed + dropped + failed + pending``, always.

    - ``state`` and ``reason``: why it is STALLED or FAILED, or what :meth:`Stream.close` had to leave
      behind; None otherwise.
    - ``submitted``: calls of ``submit``; with policy ``block``, those that have found room.
    - ``processed``, ``failed``: frames with a segmentation, with an error. ``pending``: waiting or
      in inference.
    - ``dropped`` and ``dropped_because``: ``replaced`` by a newer frame, ``rejected`` for want of
      room, ``closed``, or ``stream failed``.
    - ``delivered``: results handed to ``on_result``, or without one to ``latest`` and ``results``.
    - ``undelivered_because``: results that were ``superseded`` by a newer one before anyone took
      them, ``overtaken`` (an older frame that finished after a newer one, with several workers), or
      ``discarded`` at closing.
    - ``restarts``: segmenters opened again. ``callback_errors``: exceptions that ``on_result`` or
      ``on_state`` raised. ``last_error``: the newest error of a frame, a worker or a callback.
    - ``domains``: processed frames by the state of their domain: ``familiar``, ``unusual``, ``foreign``, ``not known``
      (:class:`~hpddrnet_trt.core.domain.Domain`).
    - ``stages``: times of processed frames: ``queue`` (submit to start), ``inference``, ``total``
      (submit to end), and ``delivery`` (end to hand-over, of delivered results).
    """

    state: State
    reason: str | None
    submitted: int
    processed: int
    dropped: int
    failed: int
    pending: int
    dropped_because: Mapping[str, int]
    delivered: int
    undelivered_because: Mapping[str, int]
    restarts: int
    callback_errors: int
    last_error: str | None
    stages: Mapping[str, StageTimes]
    domains: Mapping[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain numbers and strings, for JSON."""
        stages = {name: dict(vars(times)) for name, times in self.stages.items()}
        counts = {
            name: dict(getattr(self, name)) for name in ("dropped_because", "undelivered_because", "domains")
        }
        return {**vars(self), "state": self.state.value, **counts, "stages": stages}


class Stage:
    """Seconds of one stage: the most recent ones, how many there were, and the longest ever."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._count, self._worst = 0, 0.0

    def add(self, seconds: float) -> None:
        self._recent.append(seconds)
        self._count += 1
        self._worst = max(self._worst, seconds)

    def copy(self) -> Stage:
        other = Stage()
        other._recent, other._count, other._worst = self._recent.copy(), self._count, self._worst
        return other

    def times(self) -> StageTimes:
        values = np.asarray(self._recent) * 1000
        if not values.size:
            return StageTimes(0, 0.0, 0.0, 0.0, 0.0, 0.0)
        p50, p95, p99 = (float(value) for value in np.percentile(values, [50, 95, 99]))
        return StageTimes(self._count, p50, p95, p99, float(values.max()), self._worst * 1000)


@dataclass
class Accounts:
    """The counts behind :class:`StreamStatistics`; the caller holds the stream's lock."""

    submitted: int = 0
    processed: int = 0
    failed: int = 0
    delivered: int = 0
    restarts: int = 0
    callback_errors: int = 0
    last_error: str | None = None
    dropped: Counter[str] = field(default_factory=Counter)
    undelivered: Counter[str] = field(default_factory=Counter)
    domains: Counter[str] = field(default_factory=Counter)
    stages: dict[str, Stage] = field(
        default_factory=lambda: {name: Stage() for name in ("queue", "inference", "total", "delivery")}
    )

    def finished(self, result: StreamResult) -> None:
        """A frame that was in inference has a result; the times of failed ones would say nothing."""
        if result.error is not None:
            self.failed += 1
            self.last_error = f"frame {result.frame_id}: {result.error}"
            return
        self.processed += 1
        if result.segmentation is not None:
            self.domains[result.segmentation.domain.state] += 1
        self.stages["queue"].add(result.started_s - result.submitted_s)
        self.stages["inference"].add(result.finished_s - result.started_s)
        self.stages["total"].add(result.latency_s)

    def handed_over(self, result: StreamResult, now: float) -> None:
        self.delivered += 1
        if result.error is None:
            self.stages["delivery"].add(now - result.finished_s)


def describe(exc: BaseException) -> str:
    """One line about an exception; see :func:`hpddrnet_trt.core.errors.describe`."""
    if isinstance(exc, MemoryError):
        return f"not enough memory ({one_line(exc)}); use smaller frames, fewer workers, or smaller tiles"
    return errors.describe(exc)


def traceback_of(exc: BaseException) -> BaseException | None:
    """What a log line shows beneath it: nothing for our own sentences, which say all."""
    return None if isinstance(exc, UserError) else exc


class SparseLog:
    """Warnings of one kind: the first at once, then one per ``interval_s`` with the number left out."""

    def __init__(self, log: logging.Logger, interval_s: float = 60.0) -> None:
        self._log, self._interval_s = log, interval_s
        self._next_s, self._left_out = 0.0, 0

    def warning(self, message: str, *arguments: object, exc_info: BaseException | None = None) -> None:
        now = time.monotonic()
        if now < self._next_s:
            self._left_out += 1
            return
        if self._left_out:
            message, arguments = message + " (and %d more like it)", (*arguments, self._left_out)
        self._log.warning(message, *arguments, exc_info=exc_info)
        self._next_s, self._left_out = now + self._interval_s, 0
