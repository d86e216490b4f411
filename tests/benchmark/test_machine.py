"""What the report says about the machine, and its meters."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hpddrnet_trt.benchmark import machine
from hpddrnet_trt.benchmark.machine import (
    CpuMeter,
    busy_warnings,
    describe_machine,
    device_memory_mib,
    find_gpus,
    peak_memory_mib,
    resident_memory_mib,
)


def test_the_description_is_complete() -> None:
    found = describe_machine()
    assert found.cores_usable >= 1
    assert found.memory_gib > 0.1
    assert found.cpu
    assert found.libraries["numpy"] == np.__version__
    assert 0 <= found.busy_share <= 1


def test_a_busy_machine_gives_a_warning() -> None:
    assert busy_warnings(0.05, "while timing") == []
    assert "60% of the processor while timing" in busy_warnings(0.6, "while timing")[0]


def test_peak_memory_is_this_process_only() -> None:
    block = np.ones(64 << 20, dtype=np.uint8)  # 64 MiB, resident in the parent
    root = str(Path(machine.__file__).resolve().parents[2])
    code = "from hpddrnet_trt.benchmark.machine import *; print(resident_memory_mib(), peak_memory_mib())"
    child = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, check=True
    )
    resident, peak = map(float, child.stdout.split())
    assert resident <= peak < resident + 40
    resident = resident_memory_mib()
    assert peak_memory_mib() >= resident > block.nbytes >> 20


def test_others_are_what_this_process_is_not() -> None:
    meter = CpuMeter()
    total = 0
    while meter._own_seconds() - meter._own < 0.3:
        total += sum(range(1000))
    assert total
    assert 0 <= meter.others() <= 1


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands for nvidia-smi")
def test_gpus_are_read_from_the_drivers_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"

    def answer(text: str, code: int = 0) -> None:
        tool.write_text(f"#!/bin/sh\ncase \"$1\" in *memory.used*) echo 812;; *) printf '{text}';; esac\nexit {code}\n")
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)

    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    answer("NVIDIA L4, 580.10, 23034\\n")
    assert [(gpu.name, gpu.driver, gpu.memory_mib) for gpu in find_gpus()] == [("NVIDIA L4", "580.10", 23034)]
    assert device_memory_mib() == 812
    answer("NVIDIA-SMI has failed\\n", code=9)
    assert find_gpus() == []
    answer("No devices were found\\n")
    assert find_gpus() == []
