"""Stopping on request: the step under way is finished and saved, then the run ends."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from hpddrnet_trt.core.errors import UserError

log = logging.getLogger(__name__)


class TrainingInterrupted(UserError):
    """Training was stopped on request; the message says where it stands and how to continue."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(
            f"stopped after step {step}; everything is saved in {checkpoint}: "
            "give the same command again to continue from there"
        )
        self.step = step


class StopRequest:
    """Set by the first Ctrl-C or SIGTERM; a second one ends the program at once.

    Stopping between steps keeps the saved weights, optimiser state and averages consistent, which
    an exception in the middle of a weight update would not.
    """

    def __init__(self) -> None:
        self.requested = False

    def _handle(self, signum: int, _: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        log.warning("finishing this step and saving (%s); again to stop at once", signal.Signals(signum).name)

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Catch the two signals within the block (only possible in the main thread)."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {signum: signal.signal(signum, self._handle) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
