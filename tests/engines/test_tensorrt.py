"""The TensorRT engine without a GPU: refusals, array interop, and the control flow on simulated CUDA."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hpddrnet_trt.core.errors import BadInputFile, ContractError, EngineDoesNotFit, NoGpu, UsageError, UserError
from hpddrnet_trt.core.manifest import EngineRecord, read_manifest, sidecar_path
from hpddrnet_trt.engines import cuda as cuda_memory
from hpddrnet_trt.engines import load_engine, tensorrt_library
from hpddrnet_trt.engines import tensorrt as engine_module
from hpddrnet_trt.engines.cuda import (
    find_gpu,
    gpu_or_none,
)
from hpddrnet_trt.engines.engine_file import check_gpu, check_version
from hpddrnet_trt.engines.profiles import Profile
from hpddrnet_trt.engines.tensorrt import (
    TensorRTEngine,
    write_layer_times,
)
from tests.engines.conftest import Bench, noise
from tests.engines.simulated_cuda import read

StridedMemoryView = pytest.importorskip("cuda.core.utils", reason="cuda-core is not installed").StridedMemoryView
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec(name) is None, reason=f"{name}, which this test uses without a GPU, is missing"
    )
    for name in ("tensorrt_rtx", "cuda.bindings")
]
without_gpu = pytest.mark.skipif(gpu_or_none() is not None, reason="shows what happens without a GPU; here is one")


@pytest.fixture
def copied(models: dict[str, Path], tmp_path: Path) -> Path:
    """An engine and its description that a test may damage."""
    target = tmp_path / "m.engine"
    target.write_bytes(models["labels"].read_bytes())
    sidecar_path(target).write_text(sidecar_path(models["labels"]).read_text())
    return target


# --- refusals


@without_gpu
def test_without_a_gpu_one_sentence(copied: Path) -> None:
    with pytest.raises(NoGpu, match=r"no NVIDIA GPU can be used here .*CPU engine"):
        TensorRTEngine(copied)


def test_damaged_files_are_refused_before_any_gpu_is_touched(copied: Path, models: dict[str, Path]) -> None:
    content = copied.read_bytes()
    copied.write_bytes(content[:-100])
    with pytest.raises(BadInputFile, match=rf"truncated \({len(content) - 100} of {len(content)} bytes\); copy it"):
        TensorRTEngine(copied)
    for changed in (content + b"\0", content[:500] + bytes([content[500] ^ 1]) + content[501:]):
        copied.write_bytes(changed)
        with pytest.raises(BadInputFile, match=r"is not the engine that m\.engine\.json describes"):
            TensorRTEngine(copied)
    sidecar_path(copied).unlink()
    with pytest.raises(BadInputFile, match=r"m\.engine\.json is missing; keep it beside"):
        TensorRTEngine(copied)


def _changed(path: Path, **record: Any) -> Path:
    """The engine with other fields in its record."""
    fields = json.loads(sidecar_path(path).read_text())
    fields["engine"].update(record)
    sidecar_path(path).write_text(json.dumps(fields))
    return path


def test_descriptions_that_do_not_fit(copied: Path) -> None:
    for box in ([0, 1, 64, 64], [-1, 1, 64, 64], [2, 1, 64, 64], [1, 1, 10**30, 64]):
        _changed(copied, profiles=[{"min": box, "opt": [1, 1, 64, 64], "max": [1, 1, 64, 64]}])
        with pytest.raises(ContractError, match="in rising order; build the engine again"):
            Profile.from_record(read_manifest(copied).engine.profiles[0])  # type: ignore[union-attr]
    with pytest.raises(BadInputFile, match=r"built with tensorrt-rtx 1\.2\.3\.4, installed is "):
        TensorRTEngine(_changed(copied, version="1.2.3.4"))
    with pytest.raises(BadInputFile, match="not that of an engine"):
        TensorRTEngine(_changed(copied, profiles=[]))
    fields = json.loads(sidecar_path(copied).read_text())
    del fields["engine"]
    for content, says in ((json.dumps(fields), "not that of an engine"), ("{", "is not valid")):
        sidecar_path(copied).write_text(content)
        with pytest.raises(BadInputFile, match=says):
            TensorRTEngine(copied)


def _record(**changes: Any) -> EngineRecord:
    fields: dict[str, Any] = {
        "runtime": "tensorrt", "version": "10.9.0.34", "compute_capabilities": ["8.9"], "gpu": "RTX 4000",
        "profiles": [], "sha256": "", "bytes": 0, "layer_precision": {}, "build_seconds": 1.0,
    }  # fmt: skip
    return EngineRecord(**{**fields, **changes})


@pytest.mark.parametrize(
    ("targets", "here", "says"),
    [
        (["8.9"], "8.9", None),
        (["8.9", "12.0"], "12.0", None),
        (["8.9", "12.0"], "8.6", "compute capability 8.9, 12.0, A has compute capability 8.6; build the engine again"),
        (["portable"], "8.0", None),
        (["portable"], "12.1", None),
        (["portable"], "7.5", "8.0 and later, A has compute capability 7.5; build"),
    ],
)
def test_gpu_rules(targets: list[str], here: str, says: str | None) -> None:
    record, gpu = _record(compute_capabilities=targets), cuda_memory.Gpu(0, "A", here)
    if says is None:
        check_gpu(Path("m.engine"), record, gpu)
    else:
        with pytest.raises(BadInputFile) as caught:
            check_gpu(Path("m.engine"), record, gpu)
        assert says in str(caught.value)


def test_another_gpu(caplog: pytest.LogCaptureFixture, bench: Callable[..., Bench], models: dict[str, Path]) -> None:
    with caplog.at_level(logging.WARNING):  # of the same kind
        check_gpu(Path("m.engine"), _record(), cuda_memory.Gpu(0, "RTX 4090", "8.9"))
    assert "was built on RTX 4000 and may be slower on RTX 4090" in caplog.text
    bench()
    with pytest.raises(NoGpu, match="GPU 5 does not exist, this machine has 2; choose 0 to 1"):
        find_gpu(5)
    for device in ("0", 1.0, True, None):
        with pytest.raises(UsageError, match="device is a GPU's number from 0 on"):
            TensorRTEngine(models["labels"], device=device)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("built", "installed", "compatible", "runs"),
    [
        ("10.9.0.34", "10.9.0.34", False, True),
        ("10.9.0.34", "10.9.0.35", False, False),
        ("10.9.0.34", "10.10.0.1", False, False),
        ("10.9.0.34", "10.10.0.1", True, True),  # compared as numbers, not as text
        ("10.9.0.34", "11.4.0.106", True, True),
        ("10.9.0.34", "10.8.0.99", True, False),
        *((version, "10.9.0.34", False, False) for version in ("²", "1.²", "", "1..2", "one")),
        ("9" * 90, "10.9.0.34", True, False),
    ],
)
def test_version_rules(built: str, installed: str, compatible: bool, runs: bool) -> None:
    api: Any = SimpleNamespace(version=installed)
    record = _record(version=built, version_compatible=compatible)
    if runs:
        check_version(Path("m.engine"), record, api)
    else:
        with pytest.raises(
            BadInputFile, match=rf"was built with tensorrt .*, installed is.*tensorrt=={re.escape(built)}"
        ):
            check_version(Path("m.engine"), record, api)


# --- the lean runtime


def test_which_library_runs_an_engine(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT where it is; its lean runtime where only that is, or when it is asked for, and only what that runs."""
    job = bench(version="10.13.3.9")
    asked, there = list[str](), {"tensorrt_lean"}
    monkeypatch.setattr(engine_module, "load_tensorrt", lambda name: asked.append(name) or job.library.api)
    monkeypatch.setattr(tensorrt_library.importlib.util, "find_spec", lambda name: name in there or None)
    for engine in ("auto", "tensorrt-lean"):
        with pytest.raises(UsageError, match=r"needs all of TensorRT.*--version-compatible, or: pip install"):
            load_engine(job.path, engine)
    _changed(job.path, version_compatible=True)
    load_engine(job.path).close()
    there.add("tensorrt")
    for engine in ("auto", "tensorrt-lean"):
        with load_engine(job.path, engine) as loaded:
            np.testing.assert_array_equal(loaded.infer(noise(1, 1, 64, 64)).labels, job.truth(noise(1, 1, 64, 64)))
    assert asked == ["tensorrt-lean", "tensorrt", "tensorrt-lean"]
    _changed(job.path, runtime="tensorrt-rtx")
    with pytest.raises(UsageError, match="was built for tensorrt-rtx, which the lean runtime does not run"):
        load_engine(job.path, "tensorrt-lean")


@without_gpu
def test_the_real_lean_runtime_loads(copied: Path) -> None:
    """And then says that there is no GPU, before it would crash."""
    pytest.importorskip("tensorrt_lean", reason="the extra tensorrt-lean is not installed")
    api = tensorrt_library.load_tensorrt("tensorrt-lean")
    assert api.label.startswith("TensorRT lean runtime 1")
    for name in ("Runtime", "TensorIOMode", "IProfiler", "nptype"):
        assert hasattr(api.module, name)
    assert hasattr(api.module.ExecutionContextAllocationStrategy, "USER_MANAGED")
    _changed(copied, runtime="tensorrt", version=api.version, version_compatible=True)
    for engine in ("auto", "tensorrt-lean"):
        with pytest.raises(NoGpu, match=r"no NVIDIA GPU can be used here"):
            load_engine(copied, engine)


# --- control flow on simulated CUDA


def test_profiles_change_and_failures_are_not_the_end(bench: Callable[..., Bench]) -> None:
    job = bench()
    assert job.engine.runtime == f"{job.library.api.label} (Simulated 0, fp32)"
    for shape, profile in (((4, 1, 512, 512), 1), ((1, 1, 64, 64), 0), ((2, 1, 256, 128), 0)):
        job.check_infer(noise(*shape))
        assert job.library.contexts[0].active_optimization_profile == profile
    good = noise(1, 1, 72, 72)
    for bad in (
        noise(1, 1, 32, 64), noise(1, 1, 512, 512),  # inside the hull of the profiles, but in none of them
        job.cuda.array(good.astype(np.float32)),
    ):  # fmt: skip
        with pytest.raises(ContractError):
            job.engine.infer(bad)
    job.library.fails = True
    with pytest.raises(UserError, match="failed on an input of 1x1x72x72"):
        job.engine.infer(good)
    job.library.fails = False
    for method in ("set_optimization_profile_async", "infer_shapes"):
        job.library.raises = method
        with pytest.raises(ContractError, match=f"refuses an input of 4x1x512x512: {method} failed"):
            job.engine.infer(noise(4, 1, 512, 512))
    job.library.raises = ""
    job.check_infer(good)


def test_layer_times_are_medians_over_the_runs(bench: Callable[..., Bench], tmp_path: Path) -> None:
    job = bench()
    images = noise(1, 1, 64, 64)
    assert job.engine.layer_times(images, runs=5) == {"stem + relu": 0.5, "head": 0.125}  # 0.5 0.25 0.5 0.25 0.5
    profiled = job.library.contexts[-1]
    assert profiled.runs == 1 + 5 + 5  # to bind, to warm up, to count
    job.check_infer(images)
    assert profiled.runs == 11  # what follows runs undisturbed
    job.engine.close()
    written = json.loads(write_layer_times(job.path, tmp_path / "times.json", (64, 128), runs=4).read_text())
    assert written["shape"] == [1, 1, 64, 128]
    assert set(written["milliseconds"]) == {"stem + relu", "head"}


def test_device_arrays_are_used_in_place(bench: Callable[..., Bench]) -> None:
    job = bench()
    images = noise(1, 1, 128, 128)
    borrowed = job.cuda.array(images)
    results = job.engine.infer_device(borrowed)
    assert job.library.contexts[0].addresses["image"] == borrowed.__cuda_array_interface__["data"][0]
    assert not [entry for entry in job.cuda.log if entry[0] == "copy"]
    np.testing.assert_array_equal(read(results["labels"]), job.truth(images))
    assert results["labels"].__cuda_array_interface__["stream"] is None
    for offset in (0, 3):  # copied where it is not aligned
        job.check(images, job.engine.infer(job.cuda.array(images, offset=offset)).labels)


def test_streams_are_ordered(bench: Callable[..., Bench]) -> None:
    job = bench()
    borrowed = job.cuda.array(noise(1, 1, 64, 64))
    borrowed.__cuda_array_interface__["stream"] = 77
    job.engine.infer_device(borrowed)
    job.cuda.log.clear()
    results = job.engine.infer_device(borrowed, synchronize=False)
    assert job.cuda.log == [("record", 77), ("wait", job.engine.stream)]
    assert results["labels"].__cuda_array_interface__["stream"] == job.engine.stream
    job.engine.infer_device(borrowed)
    with pytest.warns(DeprecationWarning, match="is called synchronize"):
        job.engine.infer_device(borrowed, synchronise=False)
    assert job.cuda.queues[job.engine.stream]  # nobody has waited
    job.engine.infer_device(job.cuda.array(noise(1, 1, 72, 72)))  # before another size, the engine does


def test_arrays_of_another_gpu_are_refused(bench: Callable[..., Bench]) -> None:
    job = bench(device=1)
    borrowed = job.cuda.array(noise(1, 1, 64, 64))
    with pytest.raises(ContractError, match="on GPU 0, the engine on GPU 1; move it there"):
        job.engine.infer(borrowed)
    elsewhere = SimpleNamespace(__dlpack_device__=lambda: (2, 0), __dlpack__=None)
    with pytest.raises(ContractError, match="DLPack device 2:0, the engine on GPU 1"):
        job.engine.infer(elsewhere)


@pytest.mark.parametrize("before", [[], [0], [None], [1, None]])
def test_the_current_context_stays_what_it_was(bench: Callable[..., Bench], before: list[int | None]) -> None:
    """None at all, another GPU's, one of the host application's own; and no context appears on another GPU."""
    job = bench(device=1)
    job.cuda.contexts[:] = before
    images = noise(1, 1, 64, 64)
    with job.engine as engine:
        for _ in range(4):  # also from a graph
            np.testing.assert_array_equal(engine.infer(images).labels, job.truth(images))
        assert len(list(engine.infer_many([images] * 3))) == 3
        run = engine.bind(images)
        run()
        engine.infer_device(images)
        with pytest.raises(ContractError):
            engine.infer(noise(1, 1, 64, 68))
        assert job.cuda.contexts == before
    assert job.cuda.contexts == before
    assert job.cuda.primary == {1}


def test_an_engine_that_does_not_load_is_explained(bench: Callable[..., Bench], models: dict[str, Path]) -> None:
    job = bench()
    job.library.loads = False
    with pytest.raises(BadInputFile, match=r"cannot load .*labels\.engine on Simulated 0.*build the engine again"):
        TensorRTEngine(models["labels"])
    job.library.loads, job.library.memory = True, False
    with pytest.raises(UserError, match="too little free memory"):
        TensorRTEngine(models["labels"])
    job.library.memory = True
    job.library.host_code = True  # is allowed only where the description says so
    with pytest.raises(EngineDoesNotFit, match="cannot load"):
        TensorRTEngine(job.path)
    TensorRTEngine(_changed(job.path, version_compatible=True)).close()
