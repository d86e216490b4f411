"""What a stream hands out: its states, its results and its figures."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from hpddrnet_trt.inference.result import Segmentation

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
    are of the most recent frames (:data:`~hpddrnet_trt.stream.accounting.WINDOW`), ``worst_ms`` of
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

    def as_dict(self) -> dict[str, Any]:
        """The same as plain numbers and strings, for JSON."""
        stages = {name: dict(vars(times)) for name, times in self.stages.items()}
        counts = {"dropped_because": dict(self.dropped_because), "undelivered_because": dict(self.undelivered_because)}
        return {**vars(self), "state": self.state.value, **counts, "stages": stages}
