"""The threads of a stream.

A worker opens its own segmenter, segments frame after frame, and opens it again after a fault. The delivery thread
calls callbacks, so that a slow one costs no inference.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from hpddrnet_trt.core.errors import ContractError
from hpddrnet_trt.inference.result import Segmentation
from hpddrnet_trt.stream.queue import FrameQueue, StateChange
from hpddrnet_trt.stream.records import SparseLog, State, StreamResult, describe, traceback_of

log = logging.getLogger(__name__)

WARM_UP_RUNS = 3  # of each size: TensorRT's runner records its CUDA graph in the third
BACK_OFF_S = 0.1  # before the first restart; doubled for each one that did not help
MAX_BACK_OFF_S = 5.0


class LiveSegmenter(Protocol):
    """What a stream needs of a :class:`~hpddrnet_trt.inference.Segmenter`."""

    def segment(self, image: Any, /) -> Segmentation: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Plan:
    """How workers behave: see :class:`~hpddrnet_trt.stream.Stream`."""

    open_segmenter: Callable[[], LiveSegmenter]
    warm_up: Sequence[tuple[int, int]]
    errors_before_restart: int
    max_restarts: int
    nice: int


@dataclass(frozen=True)
class _Fault:
    """Why a segmenter is to be opened again. ``of_memory``: smaller frames may work, so never final."""

    reason: str
    of_memory: bool = False


class Worker(threading.Thread):
    """``number`` is its place in the queue's list of workers."""

    def __init__(self, queue: FrameQueue, number: int, plan: Plan) -> None:
        super().__init__(name=f"hpddrnet-worker-{number}", daemon=True)
        self._queue, self._number, self._plan = queue, number, plan
        self._helped = False  # a frame succeeded since the segmenter was opened
        self._warnings = SparseLog(log)

    def run(self) -> None:
        try:
            lower_priority(self._plan.nice)
            self._live()
        except BaseException as exc:  # nothing that ends this thread may end it silently
            log.error("a worker of the stream ended: %s", describe(exc), exc_info=exc)
            if self._queue.has_job(self._number):
                self._queue.finish(self._number, None, f"the worker ended: {describe(exc)}")
            self._queue.fail(f"a worker ended: {describe(exc)}; close the stream and open another")
        finally:
            self._queue.worker_ended(self._number)

    def _live(self) -> None:
        restarts = 0  # without one frame that succeeded
        while True:
            segmenter, problem = self._open()
            if segmenter is None:
                fault = _Fault(f"the segmenter could not be opened: {problem}")
                if not restarts:
                    self._queue.fail(fault.reason)
                    return
            else:
                self._queue.opened(self._number)
                self._helped = False
                ended_by = self._serve(segmenter)
                self._close(segmenter)
                segmenter = None
                if ended_by is None:
                    return
                fault = ended_by
                restarts = 0 if self._helped else restarts
            restarts += 1
            if restarts > self._plan.max_restarts and not fault.of_memory:
                self._queue.fail(f"{fault.reason}; {self._plan.max_restarts} restarts did not help")
                return
            self._warnings.warning("a segmenter is opened again: %s", fault.reason)
            self._queue.restarting(self._number, fault.reason)
            if not self._queue.pause(min(BACK_OFF_S * 2 ** min(restarts - 1, 16), MAX_BACK_OFF_S)):
                return

    def _open(self) -> tuple[LiveSegmenter | None, str]:
        """A warm segmenter, or None and why there is none."""
        segmenter: LiveSegmenter | None = None
        try:
            segmenter = self._plan.open_segmenter()
            self._warm_up(segmenter)
        except BaseException as exc:
            log.warning("a segmenter could not be opened: %s", describe(exc), exc_info=traceback_of(exc))
            if segmenter is not None:
                self._close(segmenter)
            return None, describe(exc)
        return segmenter, ""

    def _warm_up(self, segmenter: LiveSegmenter) -> None:
        for height, width in self._plan.warm_up:
            for _ in range(WARM_UP_RUNS):
                if self._queue.ending():
                    return
                segmenter.segment(np.zeros((height, width), np.uint8))
        if not self._plan.warm_up and (shape := self._queue.first_shape()) is not None:
            try:
                segmenter.segment(np.zeros(shape, np.uint8))
            except ContractError:  # the frame itself will say so
                return

    def _serve(self, segmenter: LiveSegmenter) -> _Fault | None:
        """Segment until the stream ends (None) or the segmenter is to be opened again."""
        in_a_row = 0
        while (job := self._queue.take(self._number)) is not None:
            segmentation: Segmentation | None = None
            error, fault, died = job.error, None, False
            if error is None:
                try:
                    segmentation = segmenter.segment(job.image)
                except ContractError as exc:  # the frame's own fault
                    error = describe(exc)
                except Exception as exc:
                    error, fault = describe(exc), _Fault(describe(exc), isinstance(exc, MemoryError))
                    self._warnings.warning("frame %d failed: %s", job.frame_id, error, exc_info=traceback_of(exc))
                except BaseException as exc:
                    error = f"the worker died in inference: {describe(exc)}"
                    fault, died = _Fault(error), True
            if segmentation is not None:
                in_a_row, self._helped = 0, True
            elif fault is not None:
                in_a_row += 1
            self._queue.finish(self._number, segmentation, error)
            del job, segmentation  # an idle stream holds on to no frame
            if fault is not None and (died or in_a_row >= self._plan.errors_before_restart):
                return fault if died else _Fault(f"{in_a_row} frames in a row failed: {fault.reason}", fault.of_memory)
        return None

    def _close(self, segmenter: LiveSegmenter) -> None:
        try:
            segmenter.close()
        except BaseException as exc:  # what is broken may break once more
            self._warnings.warning("closing a segmenter: %s", describe(exc), exc_info=exc)


class Delivery(threading.Thread):
    """Calls ``on_result`` and ``on_state``, one at a time, until the stream has ended."""

    def __init__(
        self,
        queue: FrameQueue,
        on_result: Callable[[StreamResult], object] | None,
        on_state: Callable[[State, str | None], object] | None,
    ) -> None:
        super().__init__(name="hpddrnet-delivery", daemon=True)
        self._queue, self._on_result, self._on_state = queue, on_result, on_state
        self._warnings = SparseLog(log)

    def run(self) -> None:
        try:
            while (news := self._queue.next_push()) is not None:
                self._report(news)
                del news  # an idle stream holds on to no result
        except BaseException as exc:  # an exception injected into this thread: it does not end silently
            self._queue.fail(f"the thread of the callbacks ended: {describe(exc)}; close the stream and open another")
        finally:
            self._queue.delivery_ended()

    def _report(self, news: StreamResult | StateChange) -> None:
        try:
            if isinstance(news, StreamResult):
                if self._on_result is not None:
                    self._on_result(news)
            elif self._on_state is not None:
                self._on_state(news.state, news.reason)
        except BaseException as exc:  # also SystemExit: it is the caller's code, not this thread's end
            name = "on_result" if isinstance(news, StreamResult) else "on_state"
            self._queue.callback_failed(f"{name} raised {describe(exc)}")
            self._warnings.warning("%s raised %s; the stream goes on", name, describe(exc), exc_info=exc)


def lower_priority(nice: int) -> None:
    """Add ``nice`` (0 to 19) to the niceness of the calling thread, and so of the threads that it starts later.

    Acquisition comes first. On Linux niceness belongs to a thread (setpriority(2), "C library/kernel
    differences"). Does nothing on other systems.
    """
    if sys.platform != "linux" or nice <= 0:
        return
    thread = threading.get_native_id()
    try:
        os.setpriority(os.PRIO_PROCESS, thread, min(os.getpriority(os.PRIO_PROCESS, thread) + nice, 19))
    except OSError:  # a sandbox may forbid it; segmenting matters more
        return
