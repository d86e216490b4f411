"""Counting frames and times, in memory that does not grow."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np

from hpddrnet_trt.stream.records import StageTimes, StreamResult

WINDOW = 1024  # recent frames behind the percentiles


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
        self.stages["queue"].add(result.started_s - result.submitted_s)
        self.stages["inference"].add(result.finished_s - result.started_s)
        self.stages["total"].add(result.latency_s)

    def handed_over(self, result: StreamResult, now: float) -> None:
        self.delivered += 1
        if result.error is None:
            self.stages["delivery"].add(now - result.finished_s)
