"""States: what makes a stream stall or fail, and what it survives."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hpddrnet_trt.core.errors import BadInputFile, ContractError, UserError
from hpddrnet_trt.stream import State, Stream, StreamResult, worker
from tests.stream.fakes import Bench, Immediate, Scripted, check_ended, frame, result_of, until


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "BACK_OFF_S", 0.001)
    monkeypatch.setattr(worker, "MAX_BACK_OFF_S", 0.004)


def run(segmenter: Scripted, frames: int, **options: Any) -> tuple[Stream, list[StreamResult], list[State]]:
    """A stream that was fed frame after frame, and closed."""
    seen, states = list[StreamResult](), list[State]()
    stream = Stream(
        segmenter.open, policy="block", on_result=seen.append, on_state=lambda state, _: states.append(state), **options
    )
    with stream:
        stream.wait_ready()
        for number in range(1, frames + 1):
            stream.submit(frame(number))
    check_ended(stream)
    assert segmenter.opened == segmenter.closed
    assert len(segmenter.threads) <= 1  # opened, run and closed by the worker
    return stream, seen, states


def test_a_segmenter_that_cannot_be_opened_fails_the_stream(caplog: pytest.LogCaptureFixture) -> None:
    told = list[tuple[State, str | None]]()

    def no_model() -> Scripted:
        raise BadInputFile("model.onnx is truncated; export it again")

    with caplog.at_level(logging.WARNING), \
            Stream(no_model, on_state=lambda *change: told.append(change)) as stream:  # fmt: skip
        assert stream.wait_ready() is State.FAILED
        now = stream.statistics()
        assert now.reason == "the segmenter could not be opened: model.onnx is truncated; export it again"
        assert stream.submit(frame(1)) is None
        assert list(stream.results()) == []
        until(lambda: len(told) == 1)
    assert told == [(State.FAILED, now.reason), (State.CLOSED, now.reason)]
    (entry,) = caplog.records
    assert entry.getMessage() == "a segmenter could not be opened: model.onnx is truncated; export it again"
    assert entry.exc_info is None  # a sentence for people, with no traceback beneath it
    assert stream.statistics().dropped_because == {"stream failed": 1}
    check_ended(stream)


def test_one_of_two_workers_that_cannot_open_and_a_warm_up_that_fails() -> None:
    second = Scripted([None], [None, UserError("out of device memory")])
    cold = Scripted([ContractError("height 7 is outside this model's range")])
    cold.warm_ups_count = True
    for segmenter, options, reason in (
        (second, {"workers": 2}, "out of device memory"),
        (cold, {"warm_up": [(1, 2)]}, "height 7 is outside this model's range"),
    ):
        with Stream(segmenter.open, **options) as stream:  # type: ignore[arg-type]
            assert stream.wait_ready() is State.FAILED
        assert stream.statistics().reason == f"the segmenter could not be opened: {reason}"
        assert segmenter.opened == segmenter.closed == 1


def test_frames_that_wait_when_the_stream_fails_are_dropped() -> None:
    go_on = threading.Event()

    def late() -> Scripted:
        go_on.wait()
        raise RuntimeError("driver not found")

    with Stream(late, policy="block", capacity=2) as stream:
        assert stream.state is State.STARTING
        assert stream.wait_ready(0.01) is State.STARTING
        producer = threading.Thread(target=lambda: [stream.submit(frame(number)) for number in (1, 2, 3)])
        producer.start()
        until(lambda: stream.statistics().pending == 2)
        go_on.set()
        producer.join()
        assert stream.wait_ready() is State.FAILED
    assert stream.statistics().dropped_because == {"stream failed": 3}


def test_a_frame_that_hangs_stalls_the_stream_until_it_ends() -> None:
    bench, told, times = Bench(), list[tuple[State, str | None]](), list[float]()

    def note(state: State, reason: str | None) -> None:
        times.append(time.monotonic())
        told.append((state, reason))

    with Stream(bench.open, stall_after_s=0.05, on_state=note) as stream:
        until(lambda: len(told) == 1)
        submitted_s = time.monotonic()
        stream.submit(frame(1))
        bench.wait_begun()
        until(lambda: len(told) == 2)  # told by itself, though no other thread does anything
        assert times[1] >= submitted_s + 0.05
        now = stream.statistics()
        assert now.state is State.STALLED
        assert now.reason is not None
        assert now.reason.startswith("frame 1 has been in inference for ")
        assert stream.submit(frame(2)) == 2  # waits, as ever
        assert stream.latest() is None  # nothing old is shown meanwhile
        bench.end(2)
        bench.end(1)
        until(lambda: len(told) == 3)
    assert [state for state, _ in told] == [State.READY, State.STALLED, State.READY, State.CLOSED]
    assert stream.statistics().reason is None


def test_single_engine_errors_cost_one_frame_each(caplog: pytest.LogCaptureFixture) -> None:
    wrong = RuntimeError("CUDA error 700")
    with caplog.at_level(logging.WARNING):
        stream, seen, states = run(Scripted([wrong, None, wrong, wrong, None]), 6, errors_before_restart=3)
    assert [result.error for result in seen] == [
        None if number in (2, 5, 6) else "RuntimeError: CUDA error 700" for number in range(1, 7)
    ]
    end = stream.statistics()
    assert (end.processed, end.failed, end.restarts) == (3, 3, 0)
    assert end.last_error == "frame 4: RuntimeError: CUDA error 700"
    assert end.stages["inference"].count == 3
    assert states == [State.READY, State.CLOSED]
    assert len(caplog.records) == 1  # the first; the others within a minute are only counted


@pytest.mark.parametrize(
    ("fault", "of_a_round", "reason"),
    [
        (RuntimeError("dead"), 2, "2 frames in a row failed: RuntimeError: dead"),
        (SystemExit(), 1, "the worker died in inference: SystemExit: no message"),
    ],
)
def test_an_engine_that_keeps_failing_fails_the_stream(fault: BaseException, of_a_round: int, reason: str) -> None:
    segmenter = Scripted([fault])
    stream, seen, states = run(segmenter, 30, errors_before_restart=2, max_restarts=3)
    end = stream.statistics()
    assert (segmenter.opened, segmenter.closed) == (4, 4)
    assert (end.failed, end.processed, end.restarts) == (4 * of_a_round, 0, 3)
    assert end.reason == f"{reason}; 3 restarts did not help"
    assert end.dropped_because == {"stream failed": 30 - 4 * of_a_round}
    assert len(seen) == 4 * of_a_round
    assert states[-2:] == [State.FAILED, State.CLOSED]


def test_a_frame_that_succeeds_makes_restarts_count_from_zero() -> None:
    wrong = RuntimeError("flaky")
    segmenter = Scripted([wrong, None, wrong, None, wrong, None])
    stream, _, _ = run(segmenter, 8, errors_before_restart=1, max_restarts=1)
    end = stream.statistics()
    assert (end.processed, end.failed, end.restarts) == (5, 3, 3)


@pytest.mark.parametrize("death", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_a_worker_that_dies_is_replaced(death: BaseException) -> None:
    segmenter = Scripted([None, death, None])
    stream, seen, _ = run(segmenter, 4)
    end = stream.statistics()
    assert (end.processed, end.failed, end.restarts) == (3, 1, 1)
    assert seen[1].error is not None
    assert seen[1].error.startswith(f"the worker died in inference: {type(death).__name__}")
    assert (segmenter.opened, segmenter.closed) == (2, 2)


def test_restarting_is_a_stall_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "BACK_OFF_S", 60.0)
    monkeypatch.setattr(worker, "MAX_BACK_OFF_S", 60.0)
    stream = Stream(Scripted([SystemExit(), None]).open)
    stream.wait_ready()
    stream.submit(frame(1))
    until(lambda: stream.state is State.STALLED)
    now = stream.statistics()
    assert now.reason == "a worker is being restarted: the worker died in inference: SystemExit: no message"
    assert (now.restarts, now.failed) == (1, 1)
    assert stream.close(timeout_s=20)  # nothing waits: no reason to sit the pause out
    check_ended(stream)


def test_openings_are_tried_again_after_a_restart() -> None:
    lost = RuntimeError("device lost")
    segmenter = Scripted([None, SystemExit(), None], [None, lost, lost, None])
    stream, _, _ = run(segmenter, 4, max_restarts=3)
    end = stream.statistics()
    assert (segmenter.attempts, segmenter.opened) == (4, 2)
    assert (end.processed, end.failed, end.restarts) == (3, 1, 3)
    segmenter = Scripted([None, SystemExit(), None], [None, lost])
    stream, _, states = run(segmenter, 4, max_restarts=2)
    assert stream.statistics().reason == (
        "the segmenter could not be opened: RuntimeError: device lost; 2 restarts did not help"
    )
    assert states[-2] is State.FAILED


def test_want_of_memory_fails_frames_and_never_the_stream() -> None:
    segmenter = Scripted([*[MemoryError("Unable to allocate 8.00 TiB")] * 12, None])
    stream, seen, states = run(segmenter, 14, errors_before_restart=2, max_restarts=1)
    end = stream.statistics()
    assert (end.processed, end.failed) == (2, 12)
    assert end.restarts == 6  # opening again gives back what the runtime held
    assert seen[0].error is not None
    assert seen[0].error.startswith("not enough memory (Unable to allocate 8.00 TiB); use smaller frames")
    assert State.FAILED not in states


def test_closing_a_broken_segmenter_may_raise() -> None:
    class Broken(Scripted):
        def close(self) -> None:
            super().close()
            raise RuntimeError("already destroyed")

    stream, _, _ = run(Broken([SystemExit(), None]), 3)
    assert (stream.statistics().processed, stream.statistics().restarts) == (2, 1)


def test_given_sizes_are_run_before_ready() -> None:
    sizes = list[tuple[int, ...]]()

    class Sized(Immediate):
        def segment(self, image: Any, /) -> Any:
            sizes.append(image.shape)
            return result_of(frame(1))

    with Stream(Sized, warm_up=[(8, 16), (4, 4)], policy="block") as stream:
        assert stream.wait_ready() is State.READY
        assert sizes == [(8, 16)] * worker.WARM_UP_RUNS + [(4, 4)] * worker.WARM_UP_RUNS
        stream.submit(frame(1))
    assert stream.statistics().stages["inference"].count == 1  # a warm-up is no frame


def test_without_sizes_a_waiting_frame_gives_one() -> None:
    sizes, go_on = list[tuple[int, ...]](), threading.Event()

    class Sized(Immediate):
        def segment(self, image: Any, /) -> Any:
            sizes.append((*image.shape, int(image.max())))
            return result_of(frame(1))

    def late() -> Sized:
        go_on.wait()
        return Sized()

    with Stream(late, policy="block") as stream:
        stream.submit(np.full((5, 7), 9, np.uint8))
        go_on.set()
    assert sizes == [(5, 7, 0), (5, 7, 9)]


@pytest.mark.parametrize("first", [np.zeros((3, 3, 3, 3), np.uint8), None, np.zeros((2, 0))])
def test_a_first_frame_that_is_none_does_not_spoil_the_start(first: Any) -> None:
    go_on = threading.Event()

    def late() -> Immediate:
        go_on.wait()
        return Immediate()

    with Stream(late, policy="block") as stream:
        stream.submit(first)
        go_on.set()
        assert stream.wait_ready() is State.READY
    assert stream.statistics().failed == 1


def _niceness(of_thread: Callable[[], int]) -> int:
    return os.getpriority(os.PRIO_PROCESS, of_thread())


@pytest.mark.skipif(sys.platform != "linux", reason="niceness belongs to threads on Linux only")
@pytest.mark.parametrize("nice", [0, 3, 19])
def test_workers_and_their_runtimes_step_back(nice: int) -> None:
    mine = _niceness(threading.get_native_id)
    found = list[int]()

    def opening() -> Immediate:
        found.append(_niceness(threading.get_native_id))
        child = threading.Thread(target=lambda: found.append(_niceness(threading.get_native_id)))
        child.start()
        child.join()
        return Immediate()

    with Stream(opening, nice=nice, on_result=lambda _: found.append(_niceness(threading.get_native_id))) as stream:
        stream.submit(frame(1))
    expected = min(mine + nice, 19)
    assert found == [expected, expected, mine]  # callbacks are the caller's own work
    assert _niceness(threading.get_native_id) == mine


def test_a_system_that_forbids_niceness_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: int) -> None:
        raise PermissionError("seccomp")

    monkeypatch.setattr(os, "setpriority", forbidden)
    with Stream(Immediate, nice=5) as stream:
        assert stream.wait_ready() is State.READY
