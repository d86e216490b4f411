"""The machine a result was measured on, as far as it explains the figures. No host or user names."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from hpddrnet_trt.core.errors import require
from hpddrnet_trt.engines import library_versions

BUSY_SHARE = 0.15  # share of the processor used by others above which a warning is due
_MIB = 1 << 20


class Gpu(BaseModel):
    """One NVIDIA GPU as its driver describes it."""

    model_config = ConfigDict(frozen=True)

    name: str
    driver: str
    memory_mib: int


class Machine(BaseModel):
    """Processor, memory, GPUs, versions, and how busy the machine was before the run."""

    model_config = ConfigDict(frozen=True)

    system: str
    python: str
    cpu: str
    cores_physical: int | None
    cores_usable: int
    memory_gib: float
    gpus: list[Gpu]
    libraries: dict[str, str]
    load_average: float | None  # of the last minute, processes
    busy_share: float  # of all cores, just before the run, 0..1
    warnings: list[str]


def describe_machine() -> Machine:
    """Look at this machine; takes half a second, during which the caller should be idle."""
    psutil = require("psutil", "benchmark", "describe the machine and measure memory")
    busy = psutil.cpu_percent(interval=0.5) / 100
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    cores = usable_cores()
    return Machine(
        system=f"{platform.system()} {platform.release()} ({platform.machine()})",
        python=platform.python_version(),
        cpu=_cpu_name(),
        cores_physical=psutil.cpu_count(logical=False),
        cores_usable=cores,
        memory_gib=round(psutil.virtual_memory().total / (1 << 30), 1),
        gpus=find_gpus(),
        libraries=library_versions(),
        load_average=load,
        busy_share=busy,
        warnings=busy_warnings(busy, "before the run"),
    )


def busy_warnings(share: float, when: str) -> list[str]:
    """A sentence when other processes used more than :data:`BUSY_SHARE` of the processor."""
    if share <= BUSY_SHARE:
        return []
    return [
        # Interleaving does not cure this: an OpenMP runtime with a core taken away waits at every barrier
        # and has been seen to slow down tenfold while another runtime only doubled.
        f"other processes used {share:.0%} of the processor {when}: latencies are too long and ratios distorted, since "
        "engines do not suffer alike; repeat the run on an idle machine"
    ]


def usable_cores() -> int:
    """Logical cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def find_gpus() -> list[Gpu]:
    """NVIDIA GPUs by ``nvidia-smi``, in its order; empty without a driver."""
    rows = _nvidia_smi("name,driver_version,memory.total")
    return [Gpu(name=row[0], driver=row[1], memory_mib=int(float(row[2]))) for row in rows if len(row) == 3]


def device_memory_mib() -> float | None:
    """Memory in use on all NVIDIA GPUs together, by all processes; None without a driver."""
    rows = _nvidia_smi("memory.used")
    return sum(float(row[0]) for row in rows) if rows else None


def _nvidia_smi(query: str) -> list[list[str]]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []  # installed without a working driver
    rows = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return [row for row in rows if row[-1].replace(".", "", 1).isdigit()]


def _cpu_name() -> str:
    if sys.platform == "darwin":
        done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        return done.stdout.strip() or platform.processor()
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class CpuMeter:
    """How much of the machine's processor other processes used since the meter was started."""

    def __init__(self) -> None:
        self._psutil = require("psutil", "benchmark", "measure how busy the machine is")
        self._own = self._own_seconds()
        self._total, self._idle = self._system()

    def others(self) -> float:
        """Share of all cores, 0..1."""
        own = self._own_seconds() - self._own
        total, idle = (now - then for now, then in zip(self._system(), (self._total, self._idle), strict=True))
        return min(1.0, max(0.0, (total - idle - own) / total)) if total > 0 else 0.0

    def _own_seconds(self) -> float:
        times: Any = self._psutil.Process().cpu_times()
        return float(times.user + times.system)

    def _system(self) -> tuple[float, float]:
        times: Any = self._psutil.cpu_times()
        # Guest time is already part of user time.
        total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        return float(total), float(times.idle + getattr(times, "iowait", 0.0))


def peak_memory_mib() -> float:
    """Highest resident memory of this process so far.

    Not ``getrusage`` on Linux: its figure survives ``exec``, so a child would report its parent's.
    """
    if sys.platform == "linux":
        return _status_mib("VmHWM")
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


def _status_mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{key}:"):
            return float(line.split()[1]) / 1024
    raise KeyError(key)
