"""CUDA graphs, several batches in flight and bound batches of the TensorRT engine, on simulated CUDA."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from hpddrnet_trt.core.errors import BadInputFile, ContractError, UsageError, UserError
from hpddrnet_trt.engines.cuda import CaptureError, CudaGraph, Stream
from hpddrnet_trt.engines.tensorrt import TensorRTEngine
from hpddrnet_trt.engines.tensorrt_context import CAPTURES, COMPILE, GRAPHS, REPLACE, WARM_UP
from tests.engines.conftest import Bench, noise

Start = Callable[..., Bench]
VERSIONS = [None, "10.13.3"]  # one of each interface; None is TensorRT-RTX
SIZES = (64, 72, 80, 88, 96, 104)


def _frames(count: int, size: int = 64) -> list[npt.NDArray[np.uint8]]:
    return [noise(1, 1, size, size, seed=seed) for seed in range(count)]


def _scratch(job: Bench) -> list[int]:
    """Sizes of the scratch memory that is allocated."""
    return [size for _, size, _ in job.cuda.memory.values() if size in job.library.SCRATCH]


# --- one frame


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("graphs", [True, False])
def test_a_steady_frame_is_one_launch_one_wait_and_no_allocation(
    bench: Start, version: str | None, graphs: bool
) -> None:
    job = bench(version=version, graphs=graphs)
    warm_up = WARM_UP if version else COMPILE
    frames = _frames(warm_up + 6)
    for images in frames[:warm_up]:
        job.check_infer(images)
    assert len(job.cuda.graphs) == graphs
    allocations = job.cuda.allocations
    for images in frames[warm_up:]:
        job.cuda.log.clear()
        job.check_infer(images)
        steps = [name for name, *_ in job.cuda.log if name != "copy"]
        assert steps == ["launch", "synchronize"] if graphs else ["synchronize"]
    assert job.cuda.allocations == allocations
    # TensorRT-RTX records another context than the one that ran first, with kernels for this very shape.
    specialized = graphs and version is None
    assert [context.specialized for context in job.library.contexts] == [False, True][: 1 + specialized]
    if graphs:
        assert job.library.contexts[-1].runs == (1 if specialized else WARM_UP) + 1  # and once recorded


@pytest.mark.parametrize("version", [None, "10.13.3"])
def test_what_cannot_be_recorded_runs_plainly_and_says_so_once(
    bench: Start, version: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    job = bench(version=version)
    job.library.capturable = False
    with caplog.at_level(logging.WARNING):
        for images in _frames(4 * REPLACE):
            job.check_infer(images)
    assert caplog.text.count("no CUDA graph can be made of this engine") == 1
    assert job.library.refused == (CAPTURES if version else 1)  # what the library itself says is not asked again
    assert version is not None or job.library.contexts[-1].runs > REPLACE  # with kernels of its own all the same
    says = "allocates memory" if version is None else "failed on an input of 1x1x64x64"
    assert says in caplog.text
    assert not job.cuda.graphs
    assert not job.cuda.recording


def test_a_recording_that_failed_is_tried_again(bench: Start, caplog: pytest.LogCaptureFixture) -> None:
    """For a while: memory may have been short, or another thread in the way."""
    job = bench(version="10.13.3")
    job.library.capturable = False
    for images in _frames(WARM_UP + 1):
        job.check_infer(images)
    job.library.capturable = True
    for images in _frames(REPLACE + WARM_UP + 1):
        job.check_infer(images)
    assert len(job.cuda.graphs) == 1
    job.library.capturable = False
    for images in _frames(2 * CAPTURES * REPLACE, 72):
        job.check_infer(images)
    assert caplog.text.count("no CUDA graph can be made") == 1
    assert job.library.refused == 1 + CAPTURES - 1  # then no more
    assert job.count("launch") > 0


def test_scratch_memory_is_that_of_the_profile_in_use(bench: Start) -> None:
    job = bench()
    small, large = job.library.SCRATCH
    assert _scratch(job) == []
    job.check_infer(noise(1, 1, 64, 64))
    assert _scratch(job) == [small]
    for shape in ((4, 1, 512, 512), (1, 1, 64, 64)):
        job.check_infer(noise(*shape))
        assert _scratch(job) == [large]


def test_sizes_that_come_once_wait_for_no_compiler(bench: Start, caplog: pytest.LogCaptureFixture) -> None:
    """TensorRT-RTX compiles for a size that comes often, once on this machine, and for a batch that is measured."""
    job = bench()
    for size in SIZES:
        job.check_infer(_frames(1, size)[0])
    assert job.library.compiled == []
    for images in _frames(COMPILE - 2):
        job.check_infer(images)
    assert job.library.compiled == []
    for images in _frames(COMPILE):
        job.check_infer(images)
    job.engine.bind(_frames(1, 72)[0])()
    assert job.library.compiled == [(1, 1, 64, 64), (1, 1, 72, 72)]
    assert len(job.library.configurations) == 1
    job.engine.close()
    kernels = job.path.with_name(f"{job.path.name}.kernels")
    assert sorted(path.name for path in kernels.parent.iterdir()) == [
        "labels.engine", "labels.engine.json", "labels.engine.kernels"
    ]  # fmt: skip
    content = kernels.read_bytes()
    for stored, again in ((content, 0), (b"\0damaged", 1), (content.replace(b"1.7", b"1.6"), 1)):
        kernels.write_bytes(stored)
        with TensorRTEngine(job.path) as engine:
            before = len(job.library.compiled)
            for images in _frames(COMPILE):
                job.check(images, engine.infer(images).labels)
            assert len(job.library.compiled) == before + again
    kernels.unlink()
    kernels.mkdir()  # nothing can be written there
    with caplog.at_level(logging.INFO), TensorRTEngine(job.path) as engine:
        for images in _frames(COMPILE):
            job.check(images, engine.infer(images).labels)
    assert "compiled kernels are not kept" in caplog.text


def test_without_memory_for_kernels_of_its_own_a_size_runs_in_the_shared_context(bench: Start) -> None:
    job = bench()
    job.library.memory = False
    for images in _frames(COMPILE):
        job.check_infer(images)
    assert (len(job.cuda.graphs), len(job.library.contexts)) == (1, 1)


def test_graphs_are_kept_for_a_few_shapes(bench: Start) -> None:
    job = bench(version="10.13.3")

    def run(size: int, times: int) -> int:
        """Frames of one size; returns how many of them came from a graph."""
        job.cuda.log.clear()
        for images in _frames(times, size):
            job.check_infer(images)
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
    assert _scratch(job) == [job.library.SCRATCH[0]]
    job.engine.close()
    assert not job.cuda.memory
    assert not job.cuda.graphs


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


# --- many


def test_a_row_that_ends_early_gives_its_slots_back(bench: Start) -> None:
    """Left by its caller, failed, without memory for a second slot, among others; and closed at last."""
    with pytest.raises(UsageError, match="at least 1; got 0"):
        bench(slots=0)
    job = bench()
    frames = _frames(6)
    job.library.memory = False
    for images, result in zip(frames, job.engine.infer_many(frames), strict=True):  # one at a time
        job.check(images, result.labels)
    rows = zip(job.engine.infer_many(frames), job.engine.infer_many(frames), strict=True)
    with pytest.raises(UserError, match="too little free memory for another execution"):
        next(rows)
    del rows
    job.library.memory = True
    assert len(list(zip(job.engine.infer_many(frames), job.engine.infer_many(frames), strict=True))) == 6
    row = job.engine.infer_many(frames)
    next(row)
    next(row)
    row.close()  # type: ignore[attr-defined]  # it is a generator
    assert not any(job.cuda.queues.values())
    assert not job.engine._slot.waits  # for a row that has gone
    row = job.engine.infer_many(frames)
    next(row)
    next(row)
    job.library.lies = 1  # in the slot that a single batch now needs: the row hears of it, the batch does not
    job.check_infer(frames[5])
    with pytest.raises(BadInputFile, match="gave the label"):
        list(row)
    job.library.fails = True
    with pytest.raises(UserError, match="failed on an input of 1x1x72x72"):
        list(job.engine.infer_many(_frames(3, 72)))
    job.library.fails = False
    on_the_gpu = [job.cuda.array(images, offset=index) if index % 2 else images for index, images in enumerate(frames)]
    for images, result in zip(frames, job.engine.infer_many(on_the_gpu), strict=True):
        job.check(images, result.labels)
    row = job.engine.infer_many(frames)
    next(row)
    job.engine.close()
    assert len(job.cuda.memory) == 3  # the caller's own
    with pytest.raises(ContractError, match="was closed"):
        next(row)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("graphs", [True, False])
def test_many_batches_are_in_flight_and_come_in_order(bench: Start, version: str | None, graphs: bool) -> None:
    """The first slot is that of single batches, the others are there while the row runs, and only if it is long."""
    job = bench(version=version, slots=3, graphs=graphs)
    frames = _frames(20)
    job.check_infer(frames[0])
    list(job.engine.infer_many(frames[:1]))
    assert len(job.library.contexts) == 1
    row = iter(job.engine.infer_many(frames))
    found = [next(row)]
    assert _scratch(job) == [job.library.SCRATCH[0]] * 3
    found += list(row)
    assert job.cuda.most_in_flight == 3
    assert _scratch(job) == [job.library.SCRATCH[0]]
    assert len(job.cuda.graphs) == graphs
    job.engine.close()
    assert not job.cuda.memory
    for images, result in zip(frames, found, strict=True):  # results belong to the caller
        job.check(images, result.labels)


# --- bound


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("graphs", [True, False])
def test_a_bound_batch_moves_no_data(bench: Start, version: str | None, graphs: bool) -> None:
    job = bench(version=version, graphs=graphs)
    images = noise(2, 1, 64, 128)
    small = job.engine.bind(_frames(1)[0])
    run = job.engine.bind(images)
    job.cuda.log.clear()
    for _ in range(3):
        run()
    small()
    names = [name for name, *_ in job.cuda.log]
    assert names == ["launch", "synchronize"] * 4 if graphs else ["synchronize"] * 4
    # A burst is timed by the GPU, each inference between two events and queued while the one before runs.
    job.cuda.log.clear()
    began = time.perf_counter()
    seconds = run.burst(3)
    assert len(seconds) == 3
    assert min(seconds) > 0
    assert sum(seconds) <= time.perf_counter() - began
    one = ["record", *["launch"] * graphs, "record"]
    names = [name for name, *_ in job.cuda.log if name != "destroy"]
    assert names == [*one, *one, "event", *one, "event", "synchronize"]
    assert all(queued for name, queued in job.cuda.log if name == "event")  # one ahead: the GPU need not wait
    assert not job.cuda.timing  # no event is left
    job.check_infer(images)
    run()
    job.engine.close()
    assert not job.cuda.memory
    with pytest.raises(ContractError, match="was closed"):
        run()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_bound_batch_from_the_gpu_where_nothing_can_be_recorded(bench: Start, version: str | None) -> None:
    job = bench(version=version)
    memory = len(job.cuda.memory)
    for unfit in (noise(1, 1, 64, 68), noise(1, 1, 512, 512)):
        with pytest.raises(ContractError):
            job.engine.bind(unfit)
    assert len(job.cuda.memory) == memory
    job.library.capturable = False
    images = _frames(1)[0]
    run = job.engine.bind(job.cuda.array(images, offset=3))
    context, before = job.library.contexts[-1], job.count("launch")
    run()
    labels = (np.ctypeslib.ctypes.c_uint8 * (64 * 64)).from_address(context.addresses["labels"])
    job.check(images, np.ctypeslib.as_array(labels).reshape(1, 64, 64))
    assert job.count("launch") == before
    assert not job.cuda.graphs


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
