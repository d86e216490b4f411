"""The caller's CUDA streams and output arrays on the GPU, and threads, with the TensorRT engine on simulated CUDA.

None of this has run on a real GPU yet.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpddrnet_trt.core.errors import ContractError
from hpddrnet_trt.engines.cuda import LEGACY_STREAM, stream_handle
from tests.engines.conftest import Bench, noise
from tests.engines.simulated_cuda import ForeignArray, read

Start = Callable[..., Bench]
THEIRS = 77


def _pointer(array: Any) -> int:
    return int(array.__cuda_array_interface__["data"][0])


def _fill(job: Bench, stream: int, array: ForeignArray, values: npt.NDArray[Any]) -> None:
    """Queue a copy of values into an array "on the GPU"."""
    job.cuda.queue(stream, lambda: ctypes.memmove(_pointer(array), values.ctypes.data, values.nbytes))


# --- streams


@pytest.mark.skipif(importlib.util.find_spec("cuda.bindings") is None, reason="cuda-python is not installed")
def test_streams_of_every_library() -> None:
    from cuda.bindings import driver, runtime

    for stream in (
        5, np.int64(5), driver.CUstream(5), runtime.cudaStream_t(5),
        SimpleNamespace(cuda_stream=5), SimpleNamespace(ptr=5), SimpleNamespace(handle=driver.CUstream(5)),
        SimpleNamespace(__cuda_stream__=lambda: (0, 5), handle=9), SimpleNamespace(__cuda_stream__=(0, 5)),
    ):  # fmt: skip
        assert stream_handle(stream) == 5
    assert stream_handle(0) == stream_handle(SimpleNamespace(ptr=0)) == LEGACY_STREAM
    for wrong in (None, "5", True, 5.0, [5], SimpleNamespace()):
        with pytest.raises(ContractError, match=r"a \w+ is no CUDA stream; give its number"):
            stream_handle(wrong)


def test_work_is_ordered_with_the_callers_stream(bench: Start) -> None:
    """Made on the stream, read on the stream, overwritten on the stream: nobody waits on the host."""
    job = bench(graphs=False)
    frames = [noise(1, 1, 64, 64, seed=seed) for seed in range(6)]
    job.engine.infer(frames[0])  # the first frame of a shape waits
    source = job.cuda.array(np.zeros_like(frames[0]))
    found: list[npt.NDArray[Any]] = []
    job.cuda.log.clear()
    for number, images in enumerate(frames):
        _fill(job, THEIRS, source, images)
        labels = job.engine.infer_device(source, stream=(THEIRS, SimpleNamespace(cuda_stream=THEIRS))[number % 2])[
            "labels"
        ]
        assert labels.__cuda_array_interface__["stream"] == THEIRS
        job.cuda.queue(THEIRS, lambda: found.append(read(labels).copy()))  # noqa: B023  # always the same buffer
    assert job.count("synchronize") == 0
    assert found == []
    job.cuda.finish(THEIRS)
    for images, labels_found in zip(frames, found, strict=True):
        job.check(images, labels_found)


# --- output arrays


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("kind", ["labels", "logits"])
def test_results_are_written_where_the_caller_wants_them(bench: Start, kind: str, offset: int) -> None:
    job = bench(kind)
    for seed, size in enumerate((64, 128, 64)):
        images = noise(1, 1, size, size, seed=seed)
        truth = job.truth(images)
        out = job.cuda.array(np.zeros_like(truth), offset=offset * truth.itemsize)
        for given_ in (out, {kind: out}):
            for source in (images, job.cuda.array(images)):
                found = job.engine.infer_device(source, out=given_)
                assert next(iter(found)) == kind  # the logits have a guard's features with them
                assert _pointer(found[kind]) == _pointer(out)
                np.testing.assert_array_equal(read(out), truth)
                ctypes.memset(_pointer(out), 0xEE, truth.nbytes)
        in_place = job.library.contexts[0].addresses[kind] == _pointer(out)
        assert in_place == (offset == 0)
    # What is written there stays when the engine goes on, and goes.
    job.engine.infer_device(images, out=out)
    job.engine.infer_device(255 - images)
    job.engine.infer(255 - images)
    np.testing.assert_array_equal(read(out), truth)
    job.engine.close()
    np.testing.assert_array_equal(read(found[kind]), truth)


def test_output_arrays_that_do_not_fit(bench: Start) -> None:
    job = bench()
    images = noise(1, 1, 64, 64)
    labels = np.zeros((1, 64, 64), np.uint8)
    good = job.cuda.array(labels)
    for bad, says in (
        (job.cuda.array(labels[0]), r"the output labels must be uint8 \(1, 64, 64\), got uint8 \(64, 64\)"),
        (job.cuda.array(labels.astype(np.int32)), "got int32"),
        (ForeignArray(_pointer(good), labels, data=(_pointer(good), True)), "read-only"),
        (ForeignArray(_pointer(good), labels, strides=(4096, 1, 64)), "not C-contiguous"),
        ({"logits": good}, "has no output 'logits'; it has: labels"),
        (labels, "is on DLPack device 1:0, the engine on GPU 0"),
    ):
        for source in (images, job.cuda.array(images)):
            with pytest.raises(ContractError, match=says):
                job.engine.infer_device(source, out=bad)
    job.check(images, read(job.engine.infer_device(images, out=good)["labels"]))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([64, 72, 80, 88, 96, 104]),
            st.sampled_from(["host", "device"]),
            st.sampled_from(["host", "own", "out", "odd out"]),
            st.sampled_from([None, 0, THEIRS]),
        ),
        max_size=40,
    )
)
def test_any_mixture_is_right(bench: Start, calls: list[tuple[int, str, str, int | None]]) -> None:
    """With CUDA graphs, which are recorded with the engine's own buffers, in between."""
    job = bench(version="10.13.3")
    with job.engine as engine:
        for seed, (size, place, target, stream) in enumerate(calls):
            images = noise(1, 1, size, size, seed=seed)
            source = images if place == "host" else job.cuda.array(images)
            if target == "host":
                found = engine.infer(source, stream=stream).labels
            else:
                offset = {"own": None, "out": 0, "odd out": 5}[target]
                out = None if offset is None else job.cuda.array(np.zeros((1, size, size), np.uint8), offset)
                result = engine.infer_device(source, out=out, stream=stream)["labels"]
                if stream is not None:
                    job.cuda.finish(stream or LEGACY_STREAM)
                found = read(result)
            job.check(images, found)


# --- threads
