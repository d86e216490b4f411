"""Ctrl-C inside the tests' own process.

A real signal would do more than the test asks for: it also wakes what other libraries have left behind in this process
(a wake-up file descriptor, for one), and a test worker died of it. Real signals go to processes of their own.
"""

from __future__ import annotations

import signal


def deliver(number: signal.Signals = signal.SIGINT) -> None:
    """Call the handler that Python would call now; without one the test fails."""
    handler = signal.getsignal(number)
    assert callable(handler), f"nobody listens to {number.name}"
    handler(number, None)
