"""The end: from anywhere, at any time, as often as anyone likes."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from hpddrnet_trt.stream import Policy, State, Stream, StreamResult
from tests.stream.fakes import PATIENCE_S, Bench, Immediate, check_balance, check_ended, frame, until
from tests.threads import in_threads

POLICIES = pytest.mark.parametrize("policy", ["latest", "block", "reject"])
DRAIN = pytest.mark.parametrize("drain", [True, False])


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    until(lambda: threading.active_count() <= before, "the end of all threads")


def submit(stream: Stream, *numbers: int) -> None:
    for number in numbers:
        stream.submit(frame(number))


def ends_at_last(stream: Stream) -> None:
    """What was left behind has ended by itself, and the accounts are whole."""
    until(lambda: stream.close(timeout_s=0))
    assert stream.statistics().reason is None
    check_ended(stream)


@POLICIES
@pytest.mark.parametrize("workers", [1, 3])
def test_draining_finishes_what_waits_however_often_it_is_closed(policy: Policy, workers: int) -> None:
    seen, closed = list[int](), list[bool]()
    stream = Stream(
        lambda: Immediate(0.002), policy=policy, workers=workers, capacity=5,
        on_result=lambda result: seen.append(result.frame_id),
    )  # fmt: skip
    submit(stream, 1, 2, 3, 4, 5)
    assert in_threads(*[lambda: closed.append(stream.close(drain=True))] * 3, timeout_s=PATIENCE_S) == []
    assert [*closed, stream.close(drain=False, timeout_s=0)] == [True] * 4
    end = stream.statistics()
    assert (end.processed, end.dropped) == (5, 0)
    assert seen == sorted(seen)
    assert seen[-1] == 5
    assert end.delivered + sum(end.undelivered_because.values()) == 5
    check_ended(stream)


def test_not_draining_drops_what_waits_and_what_is_undelivered() -> None:
    bench, seen, closed, go_on = Bench(), list[int](), list[bool](), threading.Event()

    def consume(result: StreamResult) -> None:
        seen.append(result.frame_id)
        go_on.wait()

    stream = Stream(bench.open, policy="block", capacity=3, on_result=consume)
    for number in (1, 2, 3):
        submit(stream, number)
        bench.wait_begun()
        bench.end(number) if number < 3 else None
    until(lambda: seen == [1] and stream.statistics().processed == 2)
    submit(stream, 4)
    closing = threading.Thread(target=lambda: closed.append(stream.close(drain=False)))
    closing.start()
    until(lambda: stream.statistics().dropped == 1)
    bench.release()
    go_on.set()
    closing.join()
    assert (closed, seen) == ([True], [1])
    end = stream.statistics()
    assert (end.processed, end.dropped_because, end.delivered) == (3, {"closed": 1}, 1)
    assert end.undelivered_because == {"discarded": 2}
    assert list(stream.results()) == []
    check_ended(stream)


def test_a_second_call_can_only_make_it_end_sooner() -> None:
    bench = Bench()
    stream = Stream(bench.open, policy="block", capacity=3)
    submit(stream, 1)
    bench.wait_begun()
    submit(stream, 2)
    first = threading.Thread(target=stream.close)
    first.start()
    until(lambda: stream.state is State.CLOSED)
    assert stream.statistics().pending == 2
    threading.Timer(0.05, bench.end, [1]).start()
    assert stream.close(drain=False)
    first.join()
    assert stream.statistics().dropped_because == {"closed": 1}
    check_ended(stream)


@DRAIN
@POLICIES
def test_closing_from_the_callback(policy: Policy, drain: bool) -> None:
    answers, seen = list[bool](), list[int]()

    def consume(result: StreamResult) -> None:
        seen.append(result.frame_id)
        if len(seen) == 1:
            answers.append(stream.close(drain=drain))

    stream = Stream(lambda: Immediate(0.001), policy=policy, capacity=1, on_result=consume)
    number = 0
    while stream.state is not State.CLOSED:
        submit(stream, number := number + 1)
    assert stream.close(timeout_s=PATIENCE_S)
    assert answers == [False]  # asked for, not waited for
    assert drain or len(seen) == 1
    check_ended(stream)


def test_closing_from_the_state_callback_and_from_the_worker() -> None:
    answers, created, streams = list[bool](), threading.Event(), list[Stream]()

    def told(*_: object) -> None:
        created.wait()
        answers.append(stream.close())

    stream = Stream(Immediate, on_state=told)
    created.set()
    until(lambda: len(answers) == 2)  # told READY, then CLOSED
    assert stream.close()

    def opening() -> Immediate:
        until(lambda: bool(streams))
        answers.append(streams[0].close())
        assert streams[0].wait_ready() is State.CLOSED
        return Immediate()

    streams.append(Stream(opening))
    assert streams[0].close()
    assert answers == [False] * 3


@DRAIN
def test_closing_while_the_segmenter_is_opened(drain: bool) -> None:
    go_on, bench = threading.Event(), Bench()
    bench.release()

    def late() -> Bench:
        go_on.wait()
        return bench.open()

    stream = Stream(late, warm_up=[(1, 2)])
    submit(stream, 1)
    started = time.monotonic()
    assert not stream.close(drain=drain, timeout_s=0.05)
    assert time.monotonic() - started < PATIENCE_S
    assert stream.statistics().reason == "closed, but a segmenter is still being opened or closed"
    go_on.set()
    ends_at_last(stream)
    assert (bench.opened, bench.closed) == (1, 1)
    assert stream.statistics().dropped_because == {"closed": 1}
    go_on.clear()
    stream = Stream(late)
    submit(stream, 2)
    threading.Timer(0.05, go_on.set).start()  # in time: what waits is still processed
    assert stream.close(drain=drain)
    assert stream.statistics().processed == drain


def test_closing_while_it_warms_up() -> None:
    sizes, go_on = list[tuple[int, ...]](), threading.Event()

    class Slow(Immediate):
        def segment(self, image: Any, /) -> Any:
            sizes.append(image.shape)
            go_on.wait()

    stream = Stream(Slow, warm_up=[(8, 8), (16, 16)])
    until(lambda: len(sizes) == 1)
    threading.Timer(0.05, go_on.set).start()
    assert stream.close()
    assert sizes == [(8, 8)]


@DRAIN
def test_a_hanging_inference_does_not_hang_close(drain: bool) -> None:
    bench, seen = Bench(), list[int]()
    stream = Stream(bench.open, policy="block", on_result=lambda result: seen.append(result.frame_id))
    submit(stream, 1, 2, 3)
    bench.wait_begun()
    started = time.monotonic()
    assert not stream.close(drain=drain, timeout_s=0.1)
    assert 0.1 <= time.monotonic() - started < PATIENCE_S
    now = stream.statistics()
    assert (now.state, now.pending, now.dropped_because) == (State.CLOSED, 1, {"closed": 2})
    assert str(now.reason).startswith("closed, but frame 1 has been in inference for ")
    check_balance(stream)
    assert list(stream.results()) == []
    bench.release()
    ends_at_last(stream)
    end = stream.statistics()
    assert (end.processed, end.undelivered_because) == (1, {"discarded": 1})
    assert seen == []  # what comes after the end is shown to nobody
    assert bench.closed == 1


def test_a_hanging_frame_does_not_hide_results_that_are_ready() -> None:
    bench = Bench()
    stream = Stream(bench.open, policy="block", workers=2)
    for number in (1, 2):
        submit(stream, number)
        bench.wait_begun()
    bench.end(2)
    until(lambda: stream.statistics().processed == 1)
    assert not stream.close(timeout_s=0.05)
    assert [result.frame_id for result in stream.results()] == [2]
    bench.release()


def test_a_hanging_callback_does_not_hang_close() -> None:
    go_on = threading.Event()
    stream = Stream(Immediate, policy="block", on_result=lambda _: go_on.wait())
    submit(stream, 1, 2, 3)
    until(lambda: stream.statistics().processed == 3 and stream.statistics().delivered == 1)
    assert not stream.close(timeout_s=0.05)
    now = stream.statistics()
    assert str(now.reason).startswith("closed, but a callback has been running for ")
    assert (now.delivered, now.undelivered_because) == (1, {"discarded": 2})
    go_on.set()
    ends_at_last(stream)


def test_the_time_of_a_close_from_a_callback_runs_out_by_itself() -> None:
    """Nobody waits for it, and the only worker hangs: what waits is dropped all the same."""
    bench, second_hangs, told = Bench(), threading.Event(), list[State]()

    def consume(result: StreamResult) -> None:
        second_hangs.wait(PATIENCE_S)
        stream.close(timeout_s=0.05)

    stream = Stream(bench.open, policy="block", on_result=consume, on_state=lambda state, _: told.append(state))
    bench.end(1)
    submit(stream, 1, 2, 3)
    assert [bench.wait_begun(), bench.wait_begun()] == [1, 2]
    second_hangs.set()
    until(lambda: State.CLOSED in told)
    end = stream.statistics()
    assert (end.dropped_because, end.pending) == ({"closed": 1}, 1)
    bench.release()
    assert stream.close()
    check_ended(stream)


def test_a_slow_worker_stops_when_the_time_is_over_and_the_callback_hangs() -> None:
    """The shorter of two times counts, and no other thread looks at the clock."""
    go_on = threading.Event()

    def consume(result: StreamResult) -> None:
        until(lambda: stream.state is State.CLOSED)
        stream.close(timeout_s=0.05)
        go_on.wait()

    stream = Stream(lambda: Immediate(0.1), policy="block", capacity=50, on_result=consume)
    submit(stream, *range(1, 51))
    main = threading.Thread(target=stream.close)
    main.start()
    until(lambda: not any(thread.name.startswith("hpddrnet-worker") for thread in threading.enumerate()))
    go_on.set()
    main.join()
    assert stream.statistics().dropped_because["closed"] > 0
    check_ended(stream)


def test_an_exception_in_the_block_drops_what_waits() -> None:
    bench = Bench()
    stream = Stream(bench.open, policy="block")

    def work() -> None:
        with stream:
            submit(stream, 1)
            bench.wait_begun()
            submit(stream, 2)
            threading.Timer(0.05, bench.end, [1]).start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert stream.statistics().dropped_because == {"closed": 1}


def test_a_forgotten_stream_finishes_and_ends_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpddrnet_trt.stream.stream.AT_EXIT_S", PATIENCE_S)
    bench, seen = Bench(), list[int]()
    stream = Stream(bench.open, policy="block", on_result=lambda result: seen.append(result.frame_id))
    stream.wait_ready()
    submit(stream, 1, 2)
    gone = weakref.ref(stream)
    del stream
    gc.collect()
    assert gone() is None
    bench.release()
    until(lambda: seen == [1, 2])  # on a thread of its own, which may be later than the worker's end
    until(lambda: bench.closed == 1)


@pytest.mark.parametrize(
    ("pause_s", "frames"), [(0.0, 0), (0.3, 3), (3600.0, 3)], ids=["idle", "in inference", "hanging"]
)
def test_the_interpreter_ends_with_an_open_stream(pause_s: float, frames: int) -> None:
    script = f"""
        import threading
        from hpddrnet_trt.stream import Stream
        from tests.stream.fakes import Immediate, frame

        begun = threading.Event()

        class Model(Immediate):
            def segment(self, image):
                begun.set()
                return super().segment(image)

            def close(self):
                print("closed")

        stream = Stream(lambda: Model({pause_s}), policy="block", on_result=lambda result: None, warm_up=[])
        stream.wait_ready()
        for number in range(1, {frames} + 1):
            stream.submit(frame(number))
            begun.wait()
        print("done")
    """
    started = time.monotonic()
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60, check=False
    )
    # An inference that ends soon is waited for, so that no runtime is cut off in the middle of it.
    expected = "done\n" if pause_s > 10 else "done\nclosed\n"
    assert (child.returncode, child.stdout, child.stderr) == (0, expected, "")
    assert time.monotonic() - started < 30
