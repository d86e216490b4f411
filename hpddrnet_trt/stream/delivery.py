"""The thread that calls callbacks, so that a slow one costs no inference."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from hpddrnet_trt.stream.queue import Board, StateChange
from hpddrnet_trt.stream.records import State, StreamResult
from hpddrnet_trt.stream.sentences import SparseLog, describe

log = logging.getLogger(__name__)


class Delivery(threading.Thread):
    """Calls ``on_result`` and ``on_state``, one at a time, until the stream has ended."""

    def __init__(
        self,
        board: Board,
        on_result: Callable[[StreamResult], object] | None,
        on_state: Callable[[State, str | None], object] | None,
        name: str,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._board, self._on_result, self._on_state = board, on_result, on_state
        self._warnings = SparseLog(log)

    def run(self) -> None:
        try:
            while (told := self._board.next_push()) is not None:
                self._tell(told)
                del told  # an idle stream holds on to no result
        except BaseException as exc:  # an exception injected into this thread: it does not end silently
            self._board.fail(f"the thread of the callbacks ended: {describe(exc)}; close the stream and open another")
        finally:
            self._board.delivery_ended()

    def _tell(self, told: StreamResult | StateChange) -> None:
        try:
            if isinstance(told, StreamResult):
                if self._on_result is not None:
                    self._on_result(told)
            elif self._on_state is not None:
                self._on_state(told.state, told.reason)
        except BaseException as exc:  # also SystemExit: it is the caller's code, not this thread's end
            name = "on_result" if isinstance(told, StreamResult) else "on_state"
            self._board.callback_failed(f"{name} raised {describe(exc)}")
            self._warnings.warning("%s raised %s; the stream goes on", name, describe(exc), exc_info=exc)
