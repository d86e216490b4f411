"""The machine a result was measured on, as far as it explains the figures, and what it says of itself meanwhile.

No host or user names. Everything about GPUs is asked of their driver through NVML (package ``nvidia-ml-py``,
module ``pynvml``). What is not supported by a GPU is None: a benchmark must not fail over a thermometer.

Source: NVIDIA, NVML API reference, device queries and ``nvmlClocksEventReasons``.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from hpddrnet_trt.core.errors import require
from hpddrnet_trt.engines import library_versions

BUSY_SHARE = 0.15  # share of the processor used by others above which a warning is due
PERIOD_S = 0.1  # between two looks at the GPU
THROTTLED_SHARE = 0.01  # of the looks, below which a reason for slowing down is not worth a warning
IDLE_SHARE = 0.1  # of the looks, above which a GPU has not been kept busy
_MIB = 1 << 20
# nvmlClocksEventReason bits. Bit 0 is no slowing down: nothing runs, and the clocks drop.
_IDLE = 0x001
_THROTTLE_REASONS = {
    0x002: "application clocks",
    0x004: "power limit",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "temperature (software)",
    0x040: "temperature (hardware)",
    0x080: "power brake",
    0x100: "display clocks",
}
_Value = TypeVar("_Value")


class Gpu(BaseModel):
    """One NVIDIA GPU as its driver describes it."""

    model_config = ConfigDict(frozen=True)

    name: str
    driver: str
    memory_mib: int


class GpuState(BaseModel):
    """Clocks, power and temperature read while engines on this GPU were timed.

    ``throttled``: the driver's reasons for slowing down; ``idle_share``: of the looks that found nothing running.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    sm_clock_mhz: tuple[float, float, float]  # lowest, median, highest
    power_w: float | None  # median
    temperature_c: float | None  # highest
    throttled: list[str]
    sm_clock_limit_mhz: float | None = None
    idle_share: float | None = None


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
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    return Machine(
        system=f"{platform.system()} {platform.release()} ({platform.machine()})",
        python=platform.python_version(),
        cpu=_cpu_name(),
        cores_physical=psutil.cpu_count(logical=False),
        cores_usable=os.cpu_count() or 1 if affinity is None else len(affinity),
        memory_gib=round(psutil.virtual_memory().total / (1 << 30), 1),
        gpus=[gpu for gpu, _ in find_gpus()],
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


def device_memory_mib() -> float | None:
    """Memory in use on all NVIDIA GPUs together, by all processes; None without a driver."""
    used = [mib for _, mib in find_gpus()]
    return sum(used) if used else None


def find_gpus() -> list[tuple[Gpu, float]]:
    """Each NVIDIA GPU that tells its memory, in the driver's order, and how much of it is in use, MiB."""
    nvml, gpus = _nvml(), list[tuple[Gpu, float]]()
    for index in range(0 if nvml is None else nvml.nvmlDeviceGetCount()):
        with suppress(nvml.NVMLError):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            name, memory = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetMemoryInfo(handle)
            gpu = Gpu(name=name, driver=nvml.nvmlSystemGetDriverVersion(), memory_mib=memory.total >> 20)
            gpus.append((gpu, memory.used / _MIB))
    return gpus


def _nvml() -> Any:
    """The started library, None without a driver; raises :class:`MissingDependency` without its package."""
    nvml: Any = require("pynvml", "benchmark", "ask the GPU's driver")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


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


class GpuSensor:
    """The GPU that engines run on, seen through NVML; every reading is None where it is not supported."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self.name: str = nvml.nvmlDeviceGetName(handle)

    @classmethod
    def open(cls) -> GpuSensor | None:
        """The first GPU of ``CUDA_VISIBLE_DEVICES``, else the first of the driver; None without one.

        NVML counts in PCI order; where several kinds of GPU are mixed, CUDA does so only with
        ``CUDA_DEVICE_ORDER=PCI_BUS_ID``.
        """
        nvml = _nvml()
        if nvml is None:
            return None
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
        try:
            if chosen.isdigit():
                return cls(nvml, nvml.nvmlDeviceGetHandleByIndex(int(chosen)))
            return cls(nvml, nvml.nvmlDeviceGetHandleByUUID(chosen)) if chosen.startswith(("GPU-", "MIG-")) else None
        except nvml.NVMLError:
            return None  # no such GPU

    def sm_clock_mhz(self) -> float | None:
        return self._read(lambda: float(self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM)))

    def power_w(self) -> float | None:
        return self._read(lambda: self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000)

    def temperature_c(self) -> float | None:
        sensor = self._nvml.NVML_TEMPERATURE_GPU
        return self._read(lambda: float(self._nvml.nvmlDeviceGetTemperature(self._handle, sensor)))

    def sm_clock_limit_mhz(self) -> float | None:
        return self._read(lambda: float(self._nvml.nvmlDeviceGetMaxClockInfo(self._handle, self._nvml.NVML_CLOCK_SM)))

    def clock_reasons(self) -> int:
        """The driver's bits for what decides the clocks at this moment."""
        return self._read(lambda: int(self._nvml.nvmlDeviceGetCurrentClocksEventReasons(self._handle))) or 0

    def joules(self) -> float | None:
        """Energy of the whole board since the driver was loaded (Volta and newer)."""
        return self._read(lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000)

    def process_mib(self, pid: int) -> float | None:
        """GPU memory of one process, None when the driver does not tell (Windows, foreign process numbers)."""
        processes = self._read(lambda: self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)) or []
        used = [process.usedGpuMemory for process in processes if process.pid == pid]
        return used[0] / _MIB if used and used[0] is not None else None

    def _read(self, ask: Callable[[], _Value]) -> _Value | None:
        try:
            return ask()
        except self._nvml.NVMLError:
            return None


class GpuWatch:
    """Looks at a GPU every :data:`PERIOD_S` from a thread of its own inside :meth:`watching`.

    A look is four short calls into the driver that do not hold Python's lock.
    """

    def __init__(self, gpu: GpuSensor | None, period_s: float = PERIOD_S) -> None:
        self._gpu, self._period_s = gpu, period_s
        self._clocks: list[float] = []
        self._powers: list[float] = []
        self._temperatures: list[float] = []
        self._reasons: list[int] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look while in this context; may be entered again."""
        if self._gpu is None:
            yield
            return
        stop = threading.Event()
        thread = threading.Thread(target=self._watch, args=(self._gpu, stop), name="gpu-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def states(self) -> list[GpuState]:
        """What was seen so far; empty without a GPU, or when nothing was timed long enough for a look."""
        if self._gpu is None or not self._clocks:
            return []
        clocks = min(self._clocks), median(self._clocks), max(self._clocks)
        return [
            GpuState(
                name=self._gpu.name,
                sm_clock_mhz=clocks,
                power_w=median(self._powers) if self._powers else None,
                temperature_c=max(self._temperatures, default=None),
                throttled=[
                    f"{why} ({share:.0%} of the time)"
                    for bit, why in _THROTTLE_REASONS.items()
                    if (share := self._share(bit)) >= THROTTLED_SHARE
                ],
                sm_clock_limit_mhz=self._gpu.sm_clock_limit_mhz(),
                idle_share=self._share(_IDLE),
            )
        ]

    def _share(self, bit: int) -> float:
        return sum(bool(reasons & bit) for reasons in self._reasons) / len(self._reasons)

    def _watch(self, gpu: GpuSensor, stop: threading.Event) -> None:
        while not stop.wait(self._period_s):
            self._look(gpu)

    def _look(self, gpu: GpuSensor) -> None:
        clock, power, temperature = gpu.sm_clock_mhz(), gpu.power_w(), gpu.temperature_c()
        if clock is None:
            return
        self._clocks.append(clock)
        self._powers += [] if power is None else [power]
        self._temperatures += [] if temperature is None else [temperature]
        self._reasons.append(gpu.clock_reasons())


class EnergyUse:
    """Joules used inside :meth:`counted`, added up over all uses; None once a reading was missing."""

    def __init__(self, gpu: GpuSensor | None) -> None:
        self._gpu = gpu
        self.joules: float | None = None if gpu is None else 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        start = None if self._gpu is None else self._gpu.joules()
        yield
        end = None if self._gpu is None else self._gpu.joules()
        if start is None or end is None or self.joules is None:
            self.joules = None
        else:
            self.joules += end - start
