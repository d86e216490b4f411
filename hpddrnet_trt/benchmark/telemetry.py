"""What the hardware says about itself while engines are timed: clocks, power, temperature, energy, memory.

Read through NVML (package ``nvidia-ml-py``, module ``pynvml``; optional). Whatever is not there, or not
supported by a GPU, is None: a benchmark must not fail over a thermometer.

Source: NVIDIA, NVML API reference, device queries and ``nvmlClocksEventReasons``.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable
from statistics import median
from types import TracebackType
from typing import Any, TypeVar

from hpddrnet_trt.benchmark.result import GpuState

PERIOD_S = 0.1  # between two looks at the GPU
THROTTLED_SHARE = 0.01  # of the looks, below which a reason for slowing down is not worth a warning
_MIB = 1 << 20
# nvmlClocksEventReason bits. Bit 0 (idle) is left out: it is no slowing down.
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


class Gpu:
    """The GPU that engines run on, seen through NVML; every reading is None where it is not supported."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        name = nvml.nvmlDeviceGetName(handle)
        self.name: str = name.decode() if isinstance(name, bytes) else str(name)

    @classmethod
    def open(cls) -> Gpu | None:
        """The first GPU of ``CUDA_VISIBLE_DEVICES``, else the first of the driver; None without one.

        NVML counts in PCI order; where several kinds of GPU are mixed, CUDA does so only with
        ``CUDA_DEVICE_ORDER=PCI_BUS_ID``.
        """
        try:
            nvml: Any = importlib.import_module("pynvml")
        except ImportError:
            return None
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
        try:
            nvml.nvmlInit()
            if chosen.isdigit():
                return cls(nvml, nvml.nvmlDeviceGetHandleByIndex(int(chosen)))
            return cls(nvml, nvml.nvmlDeviceGetHandleByUUID(chosen)) if chosen.startswith(("GPU-", "MIG-")) else None
        except nvml.NVMLError:
            return None  # no driver, or no such GPU

    def sm_clock_mhz(self) -> float | None:
        return self._read(lambda: float(self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM)))

    def power_w(self) -> float | None:
        return self._read(lambda: self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000)

    def temperature_c(self) -> float | None:
        sensor = self._nvml.NVML_TEMPERATURE_GPU
        return self._read(lambda: float(self._nvml.nvmlDeviceGetTemperature(self._handle, sensor)))

    def throttled(self) -> list[str]:
        """Why the driver holds clocks down at this moment."""
        nvml = self._nvml
        # Renamed in 2023; old drivers' Python packages know the first name only.
        ask = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        ask = ask or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
        bits = self._read(lambda: int(ask(self._handle))) or 0
        return [text for bit, text in _THROTTLE_REASONS.items() if bits & bit]

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
    """Looks at a GPU every :data:`PERIOD_S` from a thread of its own while entered; may be entered again.

    A look is four short calls into the driver that do not hold Python's lock.
    """

    def __init__(self, gpu: Gpu | None, period_s: float = PERIOD_S) -> None:
        self._gpu, self._period_s = gpu, period_s
        self._clocks: list[float] = []
        self._powers: list[float] = []
        self._temperatures: list[float] = []
        self._reasons: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> GpuWatch:
        if self._gpu is not None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._watch, args=(self._gpu,), name="gpu-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def states(self) -> list[GpuState]:
        """What was seen so far; empty without a GPU, or when nothing was timed long enough for a look."""
        if self._gpu is None or not self._clocks:
            return []
        clocks, looks = (min(self._clocks), median(self._clocks), max(self._clocks)), len(self._clocks)
        return [
            GpuState(
                name=self._gpu.name,
                sm_clock_mhz=clocks,
                power_w=median(self._powers) if self._powers else None,
                temperature_c=max(self._temperatures, default=None),
                throttled=[
                    f"{why} ({count / looks:.0%} of the time)"
                    for why, count in self._reasons.items()
                    if count >= THROTTLED_SHARE * looks
                ],
            )
        ]

    def _watch(self, gpu: Gpu) -> None:
        while not self._stop.wait(self._period_s):
            self._look(gpu)

    def _look(self, gpu: Gpu) -> None:
        clock, power, temperature = gpu.sm_clock_mhz(), gpu.power_w(), gpu.temperature_c()
        if clock is None:
            return
        self._clocks.append(clock)
        self._powers += [] if power is None else [power]
        self._temperatures += [] if temperature is None else [temperature]
        for reason in gpu.throttled():
            self._reasons[reason] = self._reasons.get(reason, 0) + 1


class EnergyUse:
    """Joules between entering and leaving, added up over all uses; None once a reading was missing."""

    def __init__(self, gpu: Gpu | None) -> None:
        self._gpu = gpu
        self._start: float | None = None
        self.joules: float | None = None if gpu is None else 0.0

    def __enter__(self) -> EnergyUse:
        self._start = None if self._gpu is None else self._gpu.joules()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = None if self._gpu is None else self._gpu.joules()
        if self._start is None or end is None or self.joules is None:
            self.joules = None
        else:
            self.joules += end - self._start
