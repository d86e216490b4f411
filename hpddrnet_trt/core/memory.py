"""The memory of this process."""

from __future__ import annotations

import sys
from pathlib import Path

from hpddrnet_trt.core.errors import require

_MIB = 1 << 20


def peak_memory_mib() -> float:
    """Highest resident memory of this process so far.

    Not ``getrusage`` on Linux: its figure survives ``exec``, so a child would report its parent's.
    """
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return float(status.partition("VmHWM:")[2].split()[0]) / 1024
    psutil = require("psutil", "benchmark", "measure memory")
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return float(memory.peak_wset) / _MIB
    import resource  # not on Windows

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / _MIB  # bytes on macOS


def resident_memory_mib() -> float:
    """Resident memory of this process now."""
    psutil = require("psutil", "benchmark", "measure memory")
    return float(psutil.Process().memory_info().rss) / _MIB
