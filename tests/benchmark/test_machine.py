"""What the report says about the machine, its meters, and what is read from a GPU's driver (a stand-in)."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hpddrnet_trt.benchmark import machine
from hpddrnet_trt.benchmark.machine import (
    CpuMeter,
    EnergyUse,
    GpuSensor,
    GpuWatch,
    busy_warnings,
    describe_machine,
    device_memory_mib,
    find_gpus,
)
from hpddrnet_trt.core.errors import MissingDependency
from hpddrnet_trt.core.memory import peak_memory_mib, resident_memory_mib


def test_the_description_is_complete_and_a_busy_machine_gives_a_warning() -> None:
    found = describe_machine()
    assert found.cores_usable >= 1
    assert found.memory_gib > 0.1
    assert found.cpu
    assert found.libraries["numpy"] == np.__version__
    assert 0 <= found.busy_share <= 1
    assert busy_warnings(0.05, "while timing") == []
    assert "60% of the processor while timing" in busy_warnings(0.6, "while timing")[0]
    meter, total = CpuMeter(), 0
    while meter._own_seconds() - meter._own < 0.3:
        total += sum(range(1000))
    assert total
    assert 0 <= meter.others() <= 1  # what this process does not use


def test_peak_memory_is_this_process_only() -> None:
    block = np.ones(64 << 20, dtype=np.uint8)  # 64 MiB, resident in the parent
    root = str(Path(machine.__file__).resolve().parents[2])
    code = "from hpddrnet_trt.core.memory import *; print(resident_memory_mib(), peak_memory_mib())"
    child = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, check=True
    )
    resident, peak = map(float, child.stdout.split())
    assert resident <= peak < resident + 40
    resident = resident_memory_mib()
    assert peak_memory_mib() >= resident > block.nbytes >> 20


class FakeNvmlError(Exception):
    """Stands for pynvml.NVMLError."""


class FakeNvml:
    """As much of pynvml as is used: a GPU that slows down in the second half of what is read."""

    NVMLError = FakeNvmlError
    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0

    def __init__(self) -> None:
        self.driver, self.supported = True, True
        self.looks, self.energy_mj, self.threads = 0, 5_000, set[str]()
        self.chosen: Any = None

    def nvmlInit(self) -> None:
        if not self.driver:
            raise FakeNvmlError("driver not loaded")

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.10"

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:
        return SimpleNamespace(total=self._value(23034 << 20), used=812 << 20)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        if index > 3:
            raise FakeNvmlError("invalid argument")
        self.chosen = index
        return self

    def nvmlDeviceGetHandleByUUID(self, name: str) -> Any:
        self.chosen = name
        return self

    def nvmlDeviceGetName(self, handle: Any) -> str:
        return "NVIDIA Stand-in"

    def nvmlDeviceGetClockInfo(self, handle: Any, kind: int) -> int:
        self.looks += 1
        self.threads.add(threading.current_thread().name)
        return 1980 if self.looks <= 5 else 1200

    def nvmlDeviceGetMaxClockInfo(self, handle: Any, kind: int) -> int:
        return self._value(1980)

    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int:
        return self._value(650_500)

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int) -> int:
        return 40 + self.looks

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int:
        self.energy_mj += 1_500
        return self._value(self.energy_mj)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[Any]:
        return [SimpleNamespace(pid=1, usedGpuMemory=None), SimpleNamespace(pid=os.getpid(), usedGpuMemory=300 << 20)]

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: Any) -> int:
        return 0x1 if self.looks <= 5 else 0x4 | 0x40

    def _value(self, value: int) -> int:
        if not self.supported:
            raise FakeNvmlError("not supported")
        return value


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)  # type: ignore[arg-type]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def test_the_gpu_is_the_first_one_that_engines_see(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = GpuSensor.open()
    assert gpu is not None
    assert (gpu.name, nvml.chosen) == ("NVIDIA Stand-in", 0)
    for visible, chosen in (("2,0", 2), ("GPU-8c,GPU-1", "GPU-8c"), (" MIG-7 ", "MIG-7")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert GpuSensor.open() is not None
        assert nvml.chosen == chosen
    for visible in ("", "-1", "9"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert GpuSensor.open() is None


def test_gpus_are_what_the_driver_says(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(gpu.name, gpu.driver, gpu.memory_mib) for gpu, _ in find_gpus()]
    assert found == 2 * [("NVIDIA Stand-in", "580.10", 23034)]
    assert device_memory_mib() == 2 * 812
    nvml.supported = False
    assert (find_gpus(), device_memory_mib()) == ([], None)
    nvml.supported, nvml.driver = True, False
    assert (find_gpus(), device_memory_mib(), GpuSensor.open()) == ([], None, None)
    watch = GpuWatch(None)
    with watch.watching():
        pass
    assert watch.states() == []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(MissingDependency, match="pynvml"):
        find_gpus()


def test_readings_and_what_is_not_supported(nvml: FakeNvml) -> None:
    gpu = GpuSensor.open()
    assert gpu is not None
    assert gpu.power_w() == 650.5
    assert gpu.process_mib(os.getpid()) == 300
    assert gpu.process_mib(1) is None  # the driver lists it without a figure
    assert gpu.process_mib(2) is None
    nvml.supported = False
    assert gpu.power_w() is None
    assert gpu.joules() is None


def test_the_watch_looks_from_its_own_thread_only_while_entered(nvml: FakeNvml) -> None:
    watch = GpuWatch(GpuSensor.open(), period_s=0.001)
    assert watch.states() == []
    for looks in (5, 10):
        with watch.watching():
            deadline = time.monotonic() + 20
            while nvml.looks < looks and time.monotonic() < deadline:
                time.sleep(0.001)
        seen = nvml.looks
        time.sleep(0.02)
        assert nvml.looks == seen >= looks
    assert nvml.threads == {"gpu-watch"}
    (state,) = watch.states()
    assert state.sm_clock_mhz[0] == 1200
    assert state.sm_clock_mhz[2] == 1980
    assert (state.power_w, state.temperature_c) == (650.5, 40 + nvml.looks)
    share = f"({(nvml.looks - 5) / nvml.looks:.0%} of the time)"
    assert state.throttled == [f"power limit {share}", f"temperature (hardware) {share}"]
    assert state.sm_clock_limit_mhz == 1980
    assert state.idle_share == pytest.approx(5 / nvml.looks)


def test_energy_is_that_between_entering_and_leaving(nvml: FakeNvml) -> None:
    use = EnergyUse(GpuSensor.open())
    for supported, joules in ((True, 1.5), (True, 3.0), (False, None), (True, None)):
        nvml.supported = supported
        with use.counted():
            pass
        # The stand-in uses 1.5 J between two readings; no figure is better than one of which a part is missing.
        assert use.joules == joules
    nothing = EnergyUse(None)
    with nothing.counted():
        pass
    assert nothing.joules is None
