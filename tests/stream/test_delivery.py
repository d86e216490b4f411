"""Who gets which result, in which order, and what consumers can do to the stream."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpddrnet_trt.stream import Policy, Stream, StreamResult
from hpddrnet_trt.stream.records import WINDOW, Stage
from tests.stream.fakes import Bench, Immediate, check_ended, frame, number_of, until


@given(st.lists(st.floats(0, 10), max_size=3 * WINDOW // 2))
def test_times_of_a_stage(seconds: list[float]) -> None:
    stage = Stage()
    for value in seconds:
        stage.add(value)
    found, recent = stage.times(), np.asarray(seconds[-WINDOW:]) * 1000
    assert found.count == len(seconds)
    if seconds:
        assert [found.p50_ms, found.p95_ms, found.p99_ms] == pytest.approx(np.percentile(recent, [50, 95, 99]).tolist())
        assert (found.max_ms, found.worst_ms) == pytest.approx((recent.max(), 1000 * max(seconds)))
    else:
        assert (found.p50_ms, found.p99_ms, found.max_ms, found.worst_ms) == (0, 0, 0, 0)


def test_a_slow_consumer_of_live_results_misses_some_and_stalls_nothing() -> None:
    seen, go_on = list[int](), threading.Event()

    def consume(result: StreamResult) -> None:
        seen.append(result.frame_id)
        go_on.wait()

    with Stream(Immediate, policy="latest", on_result=consume) as stream:
        for number in range(1, 6):
            stream.submit(frame(number))
            until(lambda: stream.statistics().processed == number)  # noqa: B023
            if number == 1:
                until(lambda: seen == [1])
        assert seen == [1]
        go_on.set()
    assert seen == [1, 5]
    end = stream.statistics()
    assert (end.delivered, end.undelivered_because) == (2, {"superseded": 3})
    assert end.stages["delivery"].count == 2
    assert end.stages["total"].count == 5
    check_ended(stream)


@pytest.mark.parametrize("policy", ["block", "reject"])
def test_otherwise_frames_wait_for_a_slow_consumer(policy: Policy) -> None:
    """One result with the callback, capacity + workers after it, then nothing more is begun."""
    seen, go_on = list[int](), threading.Event()

    def consume(result: StreamResult) -> None:
        seen.append(result.frame_id)
        go_on.wait()

    with Stream(Immediate, policy=policy, capacity=2, on_result=consume) as stream:
        for number in range(1, 7):  # 1 with the callback, 2 to 4 undelivered, 5 and 6 waiting
            until(lambda: stream.statistics().processed == min(number - 1, 4))  # noqa: B023
            assert stream.submit(frame(number)) == number
        now = stream.statistics()
        assert (now.processed, now.pending) == (4, 2)
        if policy == "reject":
            assert stream.submit(frame(7)) is None
        go_on.set()
    assert seen == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("exception", [ValueError("broken display"), SystemExit(1), KeyboardInterrupt()])
def test_a_callback_that_raises_is_counted_and_logged_once(
    exception: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    seen = list[int]()

    def consume(result: StreamResult) -> None:
        seen.append(result.frame_id)
        raise exception

    with caplog.at_level(logging.WARNING), Stream(Immediate, policy="block", on_result=consume) as stream:
        for number in range(1, 21):
            stream.submit(frame(number))
    assert seen == list(range(1, 21))
    end = stream.statistics()
    assert (end.callback_errors, end.delivered) == (20, 20)
    assert end.last_error is not None
    assert end.last_error.startswith(f"on_result raised {type(exception).__name__}")
    assert len([entry for entry in caplog.records if "on_result raised" in entry.getMessage()]) == 1


def test_latest_beside_a_callback() -> None:
    seen = list[StreamResult]()
    with Stream(Immediate, policy="block", on_result=seen.append) as stream:
        for number in range(1, 10):
            stream.submit(frame(number))
    result = stream.latest()
    assert result is seen[-1]
    assert stream.latest() is None
    assert len(seen) == stream.statistics().delivered == 9
    assert stream.statistics().undelivered_because == {}


@pytest.mark.parametrize("consumers", [1, 3])
def test_every_result_goes_to_one_consumer_and_they_end_with_the_stream(consumers: int) -> None:
    found = list[int]()
    stream = Stream(Immediate, policy="block", workers=2)

    def consume() -> None:
        found.extend(number_of(result.segmentation) for result in stream.results())

    threads = [threading.Thread(target=consume) for _ in range(consumers)]
    for thread in threads:
        thread.start()
    for number in range(1, 101):
        stream.submit(frame(number))
    assert stream.close()
    for thread in threads:
        thread.join()
    assert (found if consumers == 1 else sorted(found)) == list(range(1, 101))
    assert list(stream.results()) == []
    check_ended(stream)


def test_results_give_up_after_the_time_out_and_can_be_pulled_after_closing() -> None:
    stream = Stream(Immediate, policy="block", capacity=3)
    stream.submit(frame(1))
    until(lambda: stream.statistics().processed == 1)
    started = time.monotonic()
    assert len(list(stream.results(timeout_s=0.05))) == 1
    assert 0.05 <= time.monotonic() - started < 20
    assert list(stream.results(timeout_s=0)) == []
    for number in (2, 3):
        stream.submit(frame(number))
    assert stream.close(drain=True)
    assert [number_of(result.segmentation) for result in stream.results()] == [2, 3]


def test_live_results_never_go_back_in_time() -> None:
    bench, seen = Bench(), list[int]()
    with Stream(bench.open, workers=2, on_result=lambda result: seen.append(result.frame_id)) as stream:
        for number in (1, 2):
            stream.submit(frame(number))
            assert bench.wait_begun() == number
        bench.end(2)
        until(lambda: seen == [2])
        bench.end(1)
        until(lambda: stream.statistics().processed == 2)
        stream.submit(frame(3))
        bench.end(3)
    assert seen == [2, 3]
    assert stream.statistics().undelivered_because == {"overtaken": 1}
    check_ended(stream)


def test_one_hanging_frame_holds_back_a_bounded_number_of_others() -> None:
    bench = Bench()
    with Stream(bench.open, policy="block", workers=2, capacity=2) as stream:
        stream.submit(frame(1))
        bench.wait_begun()
        for number in (2, 3, 4):  # the fourth place is that of frame 1
            stream.submit(frame(number))
            assert bench.wait_begun() == number
            bench.end(number)
        until(lambda: stream.statistics().processed == 3)
        stream.submit(frame(5))
        stream.submit(frame(6))
        time.sleep(0.05)
        assert bench.begun.empty()
        bench.release()
        assert [result.frame_id for result in islice(stream.results(), 6)] == [1, 2, 3, 4, 5, 6]


def test_an_idle_stream_holds_on_to_no_frame_and_no_delivered_result() -> None:
    tags = list[weakref.ref[object]]()
    seen = list[int]()

    class Tag:
        pass

    with Stream(Immediate, policy="block", on_result=lambda result: seen.append(result.frame_id)) as stream:
        for number in range(1, 4):
            tag = Tag()
            tags.append(weakref.ref(tag))
            stream.submit(frame(number), tag)
            del tag
        until(lambda: len(seen) == 3)
        assert stream.latest() is not None
        until(lambda: all(tag() is None for tag in tags))
