"""One worker thread: opens its own segmenter, segments frame after frame, opens it again after a fault."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from hpddrnet_trt.core.errors import ContractError
from hpddrnet_trt.inference.result import Segmentation
from hpddrnet_trt.stream.priority import lower_priority
from hpddrnet_trt.stream.queue import Board
from hpddrnet_trt.stream.sentences import SparseLog, describe, traceback_of

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
    """``number`` is its place on the board."""

    def __init__(self, board: Board, number: int, plan: Plan, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._board, self._number, self._plan = board, number, plan
        self._helped = False  # a frame succeeded since the segmenter was opened
        self._warnings = SparseLog(log)

    def run(self) -> None:
        try:
            lower_priority(self._plan.nice)
            self._live()
        except BaseException as exc:  # nothing that ends this thread may end it silently
            log.error("a worker of the stream ended: %s", describe(exc), exc_info=exc)
            if self._board.has_job(self._number):
                self._board.finish(self._number, None, f"the worker ended: {describe(exc)}")
            self._board.fail(f"a worker ended: {describe(exc)}; close the stream and open another")
        finally:
            self._board.worker_ended(self._number)

    def _live(self) -> None:
        restarts = 0  # without one frame that succeeded
        while True:
            segmenter, problem = self._open()
            if segmenter is None:
                fault = _Fault(f"the segmenter could not be opened: {problem}")
                if not restarts:
                    self._board.fail(fault.reason)
                    return
            else:
                self._board.opened(self._number)
                self._helped = False
                found = self._serve(segmenter)
                self._close(segmenter)
                segmenter = None
                if found is None:
                    return
                fault = found
                restarts = 0 if self._helped else restarts
            restarts += 1
            if restarts > self._plan.max_restarts and not fault.of_memory:
                self._board.fail(f"{fault.reason}; {self._plan.max_restarts} restarts did not help")
                return
            self._warnings.warning("a segmenter is opened again: %s", fault.reason)
            self._board.restarting(self._number, fault.reason)
            if not self._board.pause(min(BACK_OFF_S * 2 ** min(restarts - 1, 16), MAX_BACK_OFF_S)):
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
                if self._board.ending():
                    return
                segmenter.segment(np.zeros((height, width), np.uint8))
        if not self._plan.warm_up and (shape := self._board.first_shape()) is not None:
            try:
                segmenter.segment(np.zeros(shape, np.uint8))
            except ContractError:  # the frame itself will say so
                return

    def _serve(self, segmenter: LiveSegmenter) -> _Fault | None:
        """Segment until the stream ends (None) or the segmenter is to be opened again."""
        in_a_row = 0
        while (job := self._board.take(self._number)) is not None:
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
            self._board.finish(self._number, segmentation, error)
            del job, segmentation  # an idle stream holds on to no frame
            if fault is not None and (died or in_a_row >= self._plan.errors_before_restart):
                return fault if died else _Fault(f"{in_a_row} frames in a row failed: {fault.reason}", fault.of_memory)
        return None

    def _close(self, segmenter: LiveSegmenter) -> None:
        try:
            segmenter.close()
        except BaseException as exc:  # what is broken may break once more
            self._warnings.warning("closing a segmenter: %s", describe(exc), exc_info=exc)
