"""Exceptions as sentences, and log lines that do not flood."""

from __future__ import annotations

import logging
import time

from hpddrnet_trt.core import errors
from hpddrnet_trt.core.errors import UserError, one_line


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
