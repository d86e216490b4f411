"""Ceilings of this machine: what is computed is what is counted, and the best of all ways is kept."""

from __future__ import annotations

import importlib.util
import sys
import time
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from hpddrnet_trt.benchmark import ceilings
from hpddrnet_trt.benchmark.ceilings import Candidate, fastest, measure_ceilings, product_model
from hpddrnet_trt.core.errors import NoGpu, UsageError
from hpddrnet_trt.graph.work import typed_work


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of no size: which ways there are, not how fast they are."""
    for name, value in {"_SIDE": 32, "_CHANNELS": 16, "_IMAGE": 8, "BUDGET_S": 0.0, "ROUNDS": 1}.items():
        monkeypatch.setattr(ceilings, name, value)
    monkeypatch.setattr(ceilings, "_last_cache", lambda: 1 << 20)
    monkeypatch.setattr(ceilings, "_GIB", 1 << 24)


@pytest.mark.parametrize("kind", ["matrix product", "3x3 convolution"])
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.usefixtures("small")
def test_what_is_computed_is_what_is_counted(kind: Any, quantised: bool) -> None:
    model = product_model(kind, quantised)
    shape = ceilings._input_shape(kind)
    work = typed_work(model, shape)
    products = [entry for entry in work.values() if entry.precision is not None]
    assert {entry.precision for entry in products} == {"int8" if quantised else "fp32"}
    assert len(products) == ceilings.CHAINS[kind]
    assert sum(entry.macs for entry in products) == ceilings._macs(kind)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": ceilings._input(kind)})
    assert result.shape == tuple(shape)
    assert 0.1 < float(np.std(result)) < 10  # neither overflows nor dies away


def test_the_best_way_of_each_precision_is_kept() -> None:
    calls: list[str] = []

    def way(precision: str, how: str, macs: int, seconds: float) -> Candidate:
        return Candidate(precision, how, macs, lambda: calls.append(how), lambda run: (run(), seconds)[1])

    ways = [way("fp32", "slow", 10**9, 2.0), way("fp32", "fast", 10**9, 0.5), way("int8", "whole", 10**10, 1.0)]
    assert fastest(ways, budget_s=0) == {"fp32": (2.0, "fast"), "int8": (10.0, "whole")}
    # One untimed run of each, then in turns.
    assert calls == ["slow", "fast", "whole"] * (1 + ceilings.ROUNDS)


def test_disturbed_runs_do_not_count() -> None:
    seconds = iter([9.0, 0.25, 7.0])
    way = Candidate("fp32", "disturbed", 10**9, lambda: None, lambda _: next(seconds))
    assert fastest([way], budget_s=0) == {"fp32": (4.0, "disturbed")}


def test_the_hosts_clock() -> None:
    assert 0.01 < Candidate("fp32", "sleep", 1, lambda: time.sleep(0.01)).seconds() < 1


@pytest.mark.usefixtures("small")
def test_every_library_has_its_ways() -> None:
    with ExitStack() as stack:
        found = ceilings._cpu_candidates(1, stack)
        assert {entry.how.split()[0] for entry in found} >= {"ONNX", "PyTorch"}
        for entry in found:
            entry.run()
    assert {entry.precision for entry in found if entry.how.startswith("ONNX Runtime")} == {"fp32", "int8"}
    assert {entry.precision for entry in found} <= {"fp32", "bf16", "fp16", "int8"}
    assert not any(entry.how.startswith("NumPy") for entry in found)  # its threads cannot be chosen


@pytest.mark.usefixtures("small")
def test_a_pc_without_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    present = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else present(name))
    monkeypatch.setitem(sys.modules, "torch", None)
    with ExitStack() as stack:
        found = ceilings._cpu_candidates(None, stack)
    assert {entry.how.split()[0] for entry in found} <= {"ONNX", "OpenVINO", "NumPy"}
    measured = measure_ceilings()
    assert measured.gmacs_per_s["fp32"] > 0


@pytest.mark.usefixtures("small")
def test_measuring_leaves_pytorch_as_it_was() -> None:
    before = torch.get_num_threads()
    measured = measure_ceilings(before + 1)
    assert torch.get_num_threads() == before
    assert measured.device.endswith(f", {before + 1} threads")
    assert set(measured.gmacs_per_s) >= {"fp32", "int8"}
    assert min(measured.gmacs_per_s.values()) > 0
    assert measured.gigabytes_per_s > 0
    assert "fp32 " in measured.how
    assert "GiB" in measured.how


def test_ceilings_of_this_machine_are_plausible() -> None:
    """Loose on purpose: other work may run here. No processor is outside of this."""
    measured = measure_ceilings(1)
    assert 1 < measured.gmacs_per_s["fp32"] < 5_000
    assert 0.1 < measured.gigabytes_per_s < 2_000


@pytest.mark.parametrize(
    ("threads", "device", "message"), [(0, "cpu", "at least 1, got 0"), (1, "tpu", "not on 'tpu'")]
)
def test_questions_without_an_answer(threads: int, device: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        measure_ceilings(threads, device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu() -> None:
    with pytest.raises(NoGpu, match="PyTorch sees no NVIDIA GPU"):
        measure_ceilings(device="cuda")


class FakeCuda:
    """PyTorch on the CPU with the little of ``torch.cuda`` that the measurement uses; each run takes 1 ms."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            pass

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, _: Any) -> float:
            return 5.0  # milliseconds of the five runs between two events

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability

    def is_available(self) -> bool:
        return True

    def is_bf16_supported(self, including_emulation: bool) -> bool:
        assert not including_emulation
        return self.capability >= (8, 0)

    def get_device_capability(self, _: str) -> tuple[int, int]:
        return self.capability

    def get_device_name(self, _: str) -> str:
        return "NVIDIA Simulated"

    def get_device_properties(self, _: str) -> Any:
        return SimpleNamespace(total_memory=1)

    def mem_get_info(self, _: str) -> tuple[int, int]:
        return 1 << 20, 1 << 21

    def synchronize(self, _: str) -> None:
        pass

    def device(self, _: str) -> Any:
        return ExitStack()


class FakeTorch:
    """``torch`` with matrices on the CPU, of a side of 32."""

    def __init__(self, capability: tuple[int, int], missing: tuple[str, ...] = ()) -> None:
        self.cuda = FakeCuda(capability)
        self.missing = missing
        self.precisions: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name in self.missing:
            raise AttributeError(name)
        if name in ("randn", "randint", "ones"):
            return lambda *args, device, **options: getattr(torch, name)(*self._small(args), **options)
        return getattr(torch, name)

    @staticmethod
    def _small(args: tuple[Any, ...]) -> tuple[Any, ...]:
        def shrink(value: Any) -> Any:
            return tuple(map(shrink, value)) if isinstance(value, tuple) else 32 if value == 4096 else value

        return tuple(map(shrink, args))

    def _scaled_mm(self, a: Any, b: Any, scale_a: Any, scale_b: Any, out_dtype: Any) -> Any:
        assert a.dtype == b.dtype == torch.float8_e4m3fn
        assert b.stride() == (1, 32)
        return (a.float() @ b.float() * scale_a * scale_b).to(out_dtype)

    def get_float32_matmul_precision(self) -> str:
        return "high"

    def set_float32_matmul_precision(self, name: str) -> None:
        self.precisions.append(name)


@pytest.mark.parametrize(
    ("fake", "precisions"),
    [
        (FakeTorch((9, 0)), {"fp32", "fp16", "bf16", "int8", "fp8"}),
        (FakeTorch((8, 6)), {"fp32", "fp16", "bf16", "int8"}),
        (FakeTorch((7, 5), missing=("_int_mm",)), {"fp32", "fp16"}),
    ],
    ids=["hopper", "ampere", "turing with an old pytorch"],
)
def test_a_simulated_gpu(monkeypatch: pytest.MonkeyPatch, fake: FakeTorch, precisions: set[str]) -> None:
    """The calls and the arithmetic on the figures; no GPU was there to measure."""
    monkeypatch.setattr(ceilings, "require", lambda *_: fake)
    monkeypatch.setattr(ceilings, "BUDGET_S", 0.0)
    measured = measure_ceilings(device="cuda")
    assert measured.device == "NVIDIA Simulated"
    assert measured.gmacs_per_s == dict.fromkeys(measured.gmacs_per_s, pytest.approx(4096**3 / 1e-3 / 1e9))
    assert set(measured.gmacs_per_s) == precisions
    assert measured.gigabytes_per_s == pytest.approx(2 * (1 << 17) / 1e-3 / 1e9)
    assert fake.precisions == ["highest", "high"]  # without TF32, and back
