"""CUDA graphs, several batches in flight and bound batches of the TensorRT engine, on simulated CUDA."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpddrnet_trt.core.errors import ContractError, UsageError, UserError
from hpddrnet_trt.engines.cuda import CaptureError, CudaGraph, Stream
from hpddrnet_trt.engines.tensorrt_context import GRAPHS, REPLACE, WARM_UP
from tests.engines.conftest import Bench

Start = Callable[..., Bench]
# One version of each interface; None is TensorRT-RTX.
VERSIONS = [None, "10.13.3", "11.1.0.32"]
SIZES = (64, 72, 80, 88, 96, 104)


def _images(*shape: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _frames(count: int, size: int = 64) -> list[npt.NDArray[np.uint8]]:
    return [_images(1, 1, size, size, seed=seed) for seed in range(count)]


# --- one frame


@pytest.mark.parametrize("version", VERSIONS)
def test_a_steady_frame_is_one_launch_one_wait_and_no_allocation(bench: Start, version: str | None) -> None:
    job = bench(version=version)
    frames = _frames(8)
    for images in frames[:WARM_UP]:
        np.testing.assert_array_equal(job.engine.infer(images).labels, job.truth(images))
    assert len(job.cuda.graphs) == 1
    job.cuda.log.clear()
    allocations = job.cuda.allocations
    for images in frames[WARM_UP:]:
        job.cuda.log.clear()
        np.testing.assert_array_equal(job.engine.infer(images).labels, job.truth(images))
        assert [name for name, *_ in job.cuda.log if name != "copy"] == ["launch", "synchronize"]
    assert job.cuda.allocations == allocations
    assert len(job.library.contexts) == 1
    assert job.library.contexts[0].runs == WARM_UP + 1  # and once recorded


def test_without_graphs_nothing_is_recorded(bench: Start) -> None:
    job = bench(graphs=False)
    allocations = None
    for images in _frames(5):
        np.testing.assert_array_equal(job.engine.infer(images).labels, job.truth(images))
        assert allocations in (None, job.cuda.allocations)
        allocations = job.cuda.allocations
    assert not job.cuda.graphs
    assert job.count("launch") == 0


@pytest.mark.parametrize("version", [None, "10.13.3"])
def test_what_cannot_be_recorded_runs_plainly_and_says_so_once(
    bench: Start, version: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    job = bench(version=version)
    job.library.capturable = False
    with caplog.at_level(logging.WARNING):
        for images in _frames(6):
            np.testing.assert_array_equal(job.engine.infer(images).labels, job.truth(images))
    assert caplog.text.count("no CUDA graph can be made of this engine") == 1
    says = "allocates memory" if version is None else "failed on an input of 1x1x64x64"
    assert says in caplog.text
    assert not job.cuda.graphs
    assert not job.cuda.recording


def test_graphs_are_kept_for_a_few_shapes(bench: Start) -> None:
    job = bench()

    def run(size: int, times: int) -> int:
        """Frames of one size; returns how many of them came from a graph."""
        job.cuda.log.clear()
        for images in _frames(times, size):
            np.testing.assert_array_equal(job.engine.infer(images).labels, job.truth(images))
        return job.count("launch")

    for size in SIZES[:GRAPHS]:
        assert run(size, WARM_UP + 2) == 2
    assert run(SIZES[0], 3) == 3  # recently used: the second is now the oldest
    rare = SIZES[GRAPHS]
    assert run(rare, REPLACE - 1) == 0  # too rare to take the place of another
    assert len(job.cuda.graphs) == GRAPHS
    assert run(rare, 4) == 3
    assert len(job.cuda.graphs) == GRAPHS
    assert run(SIZES[0], 2) == 2
    assert run(SIZES[1], 2) == 0
    # Contexts share scratch memory; those of other shapes went with their graphs.
    scratch = [size for _, size in job.cuda.memory.values() if size == job.library.SCRATCH]
    assert len(scratch) >= 1
    job.engine.close()
    assert not job.cuda.memory
    assert not job.cuda.graphs


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(SIZES), st.sampled_from(["host", "device", "stay"])), max_size=40))
def test_any_order_of_shapes_and_places_is_right(bench: Start, calls: list[tuple[int, str]]) -> None:
    job = bench()
    with job.engine as engine:
        for seed, (size, place) in enumerate(calls):
            images = _images(1, 1, size, size, seed=seed)
            if place == "stay":
                view = engine.infer_device(images)["labels"]
                found = np.ctypeslib.as_array(
                    (np.ctypeslib.ctypes.c_uint8 * view.nbytes).from_address(view.pointer)
                ).reshape(view.shape)
            else:
                found = engine.infer(images if place == "host" else job.cuda.array(images)).labels
            np.testing.assert_array_equal(found, job.truth(images))


def test_labels_are_written_where_the_caller_wants_them(bench: Start) -> None:
    for kind in ("labels", "logits"):
        job = bench(kind)
        out = np.zeros((1, 64, 64), np.uint8)
        for images in _frames(4):
            result = job.engine.infer(images, out=out)
            assert result.labels is out
            truth = job.truth(images)
            np.testing.assert_array_equal(out, truth if kind == "labels" else truth.argmax(1))
        borrowed = job.cuda.array(_frames(1)[0])
        assert job.engine.infer(borrowed, out=out).labels is out
        read_only = np.zeros((1, 64, 64), np.uint8)
        read_only.flags.writeable = False
        for bad in (np.zeros((64, 64), np.uint8), np.zeros((1, 64, 64), np.int32), read_only, [[0]]):
            with pytest.raises(ContractError, match=r"out must be a writable uint8 array of shape \(1, 64, 64\)"):
                job.engine.infer(_frames(1)[0], out=bad)


def test_a_result_on_the_gpu_that_nobody_waited_for_delays_the_next_frame(bench: Start) -> None:
    job = bench()
    first, second = _frames(2)
    view = job.engine.infer_device(first, synchronize=False)["labels"]
    assert job.cuda.queues[job.engine.stream]
    np.testing.assert_array_equal(job.engine.infer(second).labels, job.truth(second))
    assert view.shape == (1, 64, 64)


# --- many


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("graphs", [True, False])
def test_many_batches_are_in_flight_and_come_in_order(bench: Start, version: str | None, graphs: bool) -> None:
    job = bench(version=version, slots=3, graphs=graphs)
    frames = _frames(20)
    contexts = len(job.library.contexts)
    memory = job.engine.device_memory
    results = job.engine.infer_many(iter(frames))
    assert len(job.library.contexts) == contexts  # taken at the first use
    for images, result in zip(frames, results, strict=True):
        np.testing.assert_array_equal(result.labels, job.truth(images))
    assert job.cuda.most_in_flight == 3
    assert len(job.library.contexts) == contexts + 3
    assert job.engine.device_memory >= memory + 3 * job.library.SCRATCH
    assert len(job.cuda.graphs) == (3 if graphs else 0)
    allocations = job.cuda.allocations
    again = [result.labels for result in job.engine.infer_many(frames)]
    assert job.cuda.allocations == allocations
    for images, labels in zip(frames, again, strict=True):  # results belong to the caller
        np.testing.assert_array_equal(labels, job.truth(images))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(SIZES), max_size=30), st.integers(1, 4))
def test_many_equals_one_by_one(bench: Start, sizes: list[int], slots: int) -> None:
    job = bench(slots=slots)
    frames = [_images(1, 1, size, size, seed=seed) for seed, size in enumerate(sizes)]
    with job.engine as engine:
        for images, result in itertools.zip_longest(frames, engine.infer_many(frames)):
            np.testing.assert_array_equal(result.labels, job.truth(images))


def test_arrays_on_the_gpu_may_be_among_them(bench: Start) -> None:
    job = bench()
    frames = _frames(6)
    given_ = [job.cuda.array(images, offset=index) if index % 2 else images for index, images in enumerate(frames)]
    for images, result in zip(frames, job.engine.infer_many(given_), strict=True):
        np.testing.assert_array_equal(result.labels, job.truth(images))


def test_a_failed_row_gives_its_slots_back(bench: Start) -> None:
    job = bench()
    frames = _frames(6)
    list(job.engine.infer_many(frames))
    job.library.fails = True
    with pytest.raises(UserError, match="failed on an input of 1x1x72x72"):
        list(job.engine.infer_many(_frames(3, 72)))
    job.library.fails = False
    contexts = len(job.library.contexts)
    for images, result in zip(frames, job.engine.infer_many(frames), strict=True):
        np.testing.assert_array_equal(result.labels, job.truth(images))
    assert len(job.library.contexts) == contexts  # the slots came back


def test_a_row_left_early_gives_its_slots_back(bench: Start) -> None:
    job = bench()
    frames = _frames(6)
    assert len(list(zip(job.engine.infer_many(frames), job.engine.infer_many(frames), strict=True))) == 6
    row = job.engine.infer_many(frames)
    next(row)
    row.close()  # type: ignore[attr-defined]  # it is a generator
    assert not any(job.cuda.queues.values())
    contexts = len(job.library.contexts)
    assert len(list(job.engine.infer_many(frames))) == 6
    assert len(job.library.contexts) == contexts


def test_closing_ends_a_row(bench: Start) -> None:
    job = bench()
    row = job.engine.infer_many(_frames(4))
    next(row)
    job.engine.close()
    assert not job.cuda.memory
    with pytest.raises(ContractError, match="was closed"):
        next(row)


def test_too_little_memory_for_more_slots_leaves_the_engine_usable(bench: Start) -> None:
    job = bench()
    images = _frames(1)[0]
    job.library.memory = False
    with pytest.raises(UserError, match="too little free memory for another execution"):
        list(job.engine.infer_many([images]))
    np.testing.assert_array_equal(job.engine.infer(images).labels, job.truth(images))
    job.library.memory = True
    assert len(list(job.engine.infer_many([images]))) == 1


def test_slots_are_counted_from_one(bench: Start) -> None:
    with pytest.raises(UsageError, match="at least 1; got 0"):
        bench(slots=0)


# --- bound


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("graphs", [True, False])
def test_a_bound_batch_moves_no_data(bench: Start, version: str | None, graphs: bool) -> None:
    job = bench(version=version, graphs=graphs)
    images = _images(2, 1, 64, 128)
    small = job.engine.bind(_frames(1)[0])
    run = job.engine.bind(images)
    job.cuda.log.clear()
    for _ in range(3):
        run()
    small()
    names = [name for name, *_ in job.cuda.log]
    assert names == ["launch", "synchronize"] * 4 if graphs else ["synchronize"] * 4
    np.testing.assert_array_equal(job.engine.infer(images).labels, job.truth(images))
    run()
    job.engine.close()
    assert not job.cuda.memory
    with pytest.raises(ContractError, match="was closed"):
        run()


def test_bound_from_the_gpu_wherever_it_lies(bench: Start) -> None:
    job = bench()
    images = _frames(1)[0]
    run = job.engine.bind(job.cuda.array(images, offset=3))
    context = job.library.contexts[-1]
    run()
    labels = (np.ctypeslib.ctypes.c_uint8 * (64 * 64)).from_address(context.addresses["labels"])
    np.testing.assert_array_equal(np.ctypeslib.as_array(labels).reshape(1, 64, 64), job.truth(images))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_bound_batch_runs_also_where_nothing_can_be_recorded(bench: Start, version: str | None) -> None:
    job = bench(version=version)
    job.library.capturable = False
    run = job.engine.bind(_images(1, 1, 64, 64))
    before = job.count("launch")
    run()
    run()
    assert job.count("launch") == before
    assert not job.cuda.graphs


def test_a_batch_that_does_not_fit_is_not_bound(bench: Start) -> None:
    job = bench()
    memory = len(job.cuda.memory)
    for images in (_images(1, 1, 64, 68), _images(1, 1, 512, 512)):
        with pytest.raises(ContractError):
            job.engine.bind(images)
    assert len(job.cuda.memory) == memory


@pytest.mark.parametrize("version", VERSIONS)
def test_device_memory_is_what_was_taken(bench: Start, version: str | None) -> None:
    job = bench(version=version)
    job.engine.infer(_images(2, 1, 128, 128))
    assert job.engine.device_memory == job.library.WEIGHTS + job.library.SCRATCH + 2 * (2 * 128 * 128)


# --- a graph by itself


def test_a_graph_that_cannot_be_recorded_leaves_the_stream_usable(bench: Start) -> None:
    job = bench()
    job.cuda.contexts.append(0)
    stream = Stream()

    def fails() -> None:
        job.cuda.broken.add(stream.handle)

    with pytest.raises(CaptureError, match="cudaErrorStreamCaptureInvalidated while recording"):
        CudaGraph(stream, fails)
    done: list[int] = []
    graph = CudaGraph(stream, lambda: job.cuda.queue(stream.handle, lambda: done.append(1)))
    assert done == []
    graph.launch()
    graph.launch()
    stream.synchronize()
    assert done == [1, 1]
    graph.close()
    assert not job.cuda.graphs
