"""Acquisition first: worker threads step back for everything else on the PC."""

from __future__ import annotations

import os
import sys
import threading


def lower_priority(nice: int) -> None:
    """Add ``nice`` (0 to 19) to the niceness of the calling thread, and so of the threads that it starts later.

    On Linux niceness belongs to a thread (setpriority(2), "C library/kernel differences"). Does
    nothing on other systems.
    """
    if sys.platform != "linux" or nice <= 0:
        return
    thread = threading.get_native_id()
    try:
        os.setpriority(os.PRIO_PROCESS, thread, min(os.getpriority(os.PRIO_PROCESS, thread) + nice, 19))
    except OSError:  # a sandbox may forbid it; segmenting matters more
        return
