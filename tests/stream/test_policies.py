"""What happens to a frame that comes when others wait, and to frames that are none."""

from __future__ import annotations

import threading
import time
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.manifest import DataRecord
from hpddrnet_trt.data.micrograph import Micrograph
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.stream import Policy, State, Stream, StreamResult
from tests.stream.fakes import NO_FRAMES, PATIENCE_S, Bench, Immediate, check_ended, frame, number_of, until
from tests.toy import ToyEngine, grey_image, manifest


def test_latest_keeps_only_the_newest_waiting_frame() -> None:
    bench, seen = Bench(), list[StreamResult]()
    with Stream(bench.open, policy="latest", on_result=seen.append) as stream:
        assert stream.submit(frame(1), "first") == 1
        assert bench.wait_begun() == 1
        assert [stream.submit(frame(number), f"tag {number}") for number in (2, 3, 4)] == [2, 3, 4]
        now = stream.statistics()
        assert (now.dropped_because, now.pending) == ({"replaced": 2}, 2)
        bench.end(1)
        until(lambda: len(seen) == 1)
        bench.release()
    assert [(result.frame_id, result.tag, number_of(result.segmentation)) for result in seen] == [
        (1, "first", 1), (4, "tag 4", 4),
    ]  # fmt: skip
    assert seen[0].submitted_s <= seen[0].started_s <= seen[0].finished_s
    assert seen[0].latency_s == seen[0].finished_s - seen[0].submitted_s <= seen[0].age_s()
    check_ended(stream)


def test_block_waits_for_room_and_loses_nothing() -> None:
    bench, seen, entered = Bench(), list[StreamResult](), list[int | None]()

    def produce() -> None:
        entered.extend(stream.submit(frame(number)) for number in range(1, 6))

    with Stream(bench.open, policy="block", capacity=1, on_result=seen.append) as stream:
        producer = threading.Thread(target=produce)
        producer.start()
        bench.wait_begun()
        until(lambda: stream.statistics().pending == 2)
        producer.join(0.05)
        assert producer.is_alive()
        assert stream.statistics().submitted == 2  # a call that waits for room is not counted yet
        bench.release()
        producer.join()
    assert entered == [1, 2, 3, 4, 5]
    assert [number_of(result.segmentation) for result in seen] == [1, 2, 3, 4, 5]
    assert stream.statistics().dropped == 0


@pytest.mark.parametrize("drain", [True, False])
def test_a_producer_that_waits_is_woken_by_closing(drain: bool) -> None:
    bench, entered = Bench(), list[int | None]()
    stream = Stream(bench.open, policy="block", capacity=1)
    stream.submit(frame(1))
    bench.wait_begun()
    stream.submit(frame(2))
    producers = [threading.Thread(target=lambda: entered.append(stream.submit(frame(3)))) for _ in range(3)]
    for producer in producers:
        producer.start()
    closer = threading.Thread(target=lambda: entered.append(stream.close(drain=drain)))
    closer.start()
    for producer in producers:  # before there is room
        producer.join()
    assert entered == [None, None, None]
    bench.release()
    closer.join()
    assert entered[3] is True
    assert stream.statistics().dropped_because == {"closed": 3 if drain else 4}
    check_ended(stream)


@pytest.mark.parametrize("policy", ["latest", "block", "reject"])
def test_a_closed_stream_counts_what_it_turns_away(policy: Policy) -> None:
    stream = Stream(Immediate, policy=policy)
    assert stream.close()
    assert [stream.submit(frame(1)), stream.submit("no frame")] == [None, None]
    end = stream.statistics()
    assert (end.submitted, end.dropped_because) == (2, {"closed": 2})


@pytest.mark.parametrize("policy", ["latest", "block", "reject"])
def test_submitting_from_the_callback_waits_for_nothing(policy: Policy) -> None:
    """With ``block`` it would wait for room that only this thread can make."""
    taken = list[int | None]()

    def again(result: StreamResult) -> None:
        if len(taken) < 30:
            taken.extend(stream.submit(frame(number), copy=False) for number in (1, 2, 3))

    stream = Stream(Immediate, policy=policy, capacity=1, on_result=again)
    with stream:
        stream.submit(frame(1))
        until(lambda: len(taken) >= 30)
    end = stream.statistics()
    assert set(end.dropped_because) <= {"replaced", "rejected"}
    assert (policy == "latest") or taken.count(None) == end.dropped_because["rejected"]
    check_ended(stream)


def test_the_frame_is_copied_before_submit_returns() -> None:
    bench, seen = Bench(), list[StreamResult]()
    with Stream(bench.open, policy="block", on_result=seen.append) as stream:
        buffer = frame(7)
        stream.submit(frame(1))
        bench.wait_begun()
        stream.submit(buffer)
        stream.submit(Micrograph(buffer, pixel_size_m=1e-9))
        stream.submit(buffer, copy=False)
        buffer[:] = 0
        bench.release()
    assert [number_of(result.segmentation) for result in seen] == [1, 7, 7, 0]


GOOD = grey_image(8, 12)


@pytest.mark.parametrize("name", NO_FRAMES)
def test_what_is_no_frame_fails_readably(name: str) -> None:
    given, words = NO_FRAMES[name]
    with Stream(lambda: Segmenter(ToyEngine()), policy="block") as stream:
        assert stream.submit(given, name) == 1
        assert stream.submit(GOOD) == 2
        bad, good = islice(stream.results(), 2)
    assert (bad.tag, bad.segmentation) == (name, None)
    assert bad.error is not None
    assert words in bad.error
    assert "Traceback" not in bad.error
    assert good.error is None
    end = stream.statistics()
    assert (end.processed, end.failed, end.restarts) == (1, 1, 0)


def _read_only() -> Any:
    pixels = GOOD.copy()
    pixels.flags.writeable = False
    return pixels


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize(
    "given",
    [
        pytest.param(_read_only(), id="read-only"),
        pytest.param(np.repeat(GOOD, 2, axis=1)[:, ::2], id="strided"),
        pytest.param(np.asfortranarray(GOOD), id="column-major"),
        pytest.param(GOOD[::-1][::-1], id="negative strides"),
        pytest.param(Micrograph(GOOD, pixel_size_m=2e-9), id="micrograph"),
        *(pytest.param(GOOD.astype(dtype), id=dtype) for dtype in (">u2", ">f4", "<f8")),
    ],
)
def test_any_layout_and_byte_order_of_pixels_is_a_frame(given: Any, copy: bool) -> None:
    with Segmenter(ToyEngine(), window=(0, 255)) as plain:
        expected = plain.segment(GOOD).labels
    with Stream(lambda: Segmenter(ToyEngine(), window=(0, 255)), policy="block") as stream:
        stream.submit(given, copy=copy)
        (result,) = islice(stream.results(), 1)
    assert result.segmentation is not None
    np.testing.assert_array_equal(result.segmentation.labels, expected)
    assert result.segmentation.pixel_size_m == getattr(given, "pixel_size_m", None)


def test_frames_of_another_pixel_size_are_read_at_the_models() -> None:
    toy = ToyEngine(manifest(data=DataRecord(name="steel", pixel_size_m=(10e-9, 10e-9))))
    with Stream(lambda: Segmenter(toy), policy="block", warm_up=[(8, 12)]) as stream:
        for size in (10e-9, 20e-9):
            stream.submit(Micrograph(grey_image(8, 12), pixel_size_m=size))
        found = [result.segmentation for result in islice(stream.results(), 2)]
    assert [None if one is None else (one.rescale, one.labels.shape) for one in found] == [
        (1.0, (8, 12)), (2.0, (8, 12)),
    ]  # fmt: skip


class Tensor:
    """An array of another library that copies itself, as torch and cupy do."""

    def __init__(self, pixels: Any) -> None:
        self.pixels = pixels

    def __dlpack__(self) -> Any:
        raise NotImplementedError

    def clone(self) -> Any:
        return self.pixels.copy()


def test_a_foreign_array_is_copied_by_its_own_library() -> None:
    class Huge(Tensor):
        def clone(self) -> Any:
            raise MemoryError("Unable to allocate 1.00 TiB")

    with Stream(Immediate, policy="block") as stream:
        assert [stream.submit(Tensor(frame(5))), stream.submit(Huge(None))] == [1, 2]
        copied, too_large = islice(stream.results(), 2)
    assert number_of(copied.segmentation) == 5
    assert too_large.error is not None
    assert too_large.error.startswith("not enough memory (Unable to allocate 1.00 TiB)")
    assert stream.statistics().restarts == 0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"policy": "fastest"}, "latest, block, reject"),
        ({"workers": 0}, "workers"),
        ({"capacity": 0}, "capacity"),
        ({"errors_before_restart": 0}, "errors_before_restart"),
        ({"max_restarts": -1}, "max_restarts"),
        ({"nice": 20}, "nice"),
        ({"stall_after_s": 0}, "stall_after_s"),
        ({"stall_after_s": float("nan")}, "stall_after_s"),
        ({"warm_up": [(0, 8)]}, "warm_up"),
        ({"warm_up": (512, 512)}, "warm_up must be a list"),
        ({"warm_up": [(512,)]}, "warm_up must be a list"),
        ({"max_rate": 0}, "max_rate"),
        ({"max_rate": float("inf")}, "max_rate"),
        ({"max_rate": float("nan")}, "max_rate"),
    ],
)
def test_parameters_that_make_no_sense(wrong: dict[str, Any], words: str) -> None:
    before = threading.active_count()
    with pytest.raises(UsageError, match=words):
        Stream(Immediate, **wrong)
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [1, 2])
def test_a_rate_limit_spaces_inferences_and_takes_the_newest_frame(workers: int) -> None:
    spacing = 0.05
    returned, found, rounds = [0.0], list[StreamResult](), 0  # when each submit had returned, by frame id
    with Stream(Immediate, max_rate=1 / spacing, workers=workers) as stream:
        stream.wait_ready(PATIENCE_S)
        stop = time.monotonic() + PATIENCE_S
        while len(found) < 5 and time.monotonic() < stop:
            rounds += 1
            for _ in range(3):
                stream.submit(frame(len(returned)))
                returned.append(time.monotonic())
            time.sleep(0.002)
            if (newest := stream.latest()) is not None:
                found.append(newest)
        stream.close(drain=False)
        counts = stream.statistics()
    starts = [result.started_s for result in found]
    assert len(starts) == 5
    assert min(later - earlier for earlier, later in pairwise(starts)) > spacing - 1e-6
    # Of three frames at once, those are replaced that no inference began with.
    assert counts.dropped_because["replaced"] >= 2 * rounds - counts.processed - 1
    # The frame after it came later than its inference began: it was the newest, whatever the machine was busy with.
    assert all(result.started_s <= returned[result.frame_id + 1] for result in found[:-1])


def test_never_and_for_ever_are_times_that_threads_can_wait() -> None:
    """Infinity, and what the system's clock cannot count to."""
    seen, bench = list[StreamResult](), Bench()
    forever = float("inf")
    stream = Stream(bench.open, policy="block", capacity=2, stall_after_s=forever, max_rate=1e-12,
                    on_result=seen.append)  # fmt: skip
    assert stream.wait_ready(forever) is State.READY
    threading.Timer(0.05, bench.end, [1]).start()
    stream.submit(frame(1))
    assert next(stream.results(forever)).frame_id == 1
    stream.submit(frame(2))  # waits for its turn: 30,000 years
    bench.end(2)
    until(lambda: len(seen) == 1)
    assert stream.state is State.READY
    assert stream.close(timeout_s=forever)
    assert [result.frame_id for result in seen] == [1, 2]
    assert stream.statistics().last_error is None


@pytest.mark.parametrize("drain", [True, False])
def test_closing_does_not_wait_for_the_rate_limit(drain: bool) -> None:
    stream = Stream(Immediate, policy="block", capacity=3, max_rate=0.001)
    stream.wait_ready(PATIENCE_S)
    for number in (1, 2, 3):
        stream.submit(frame(number))
    assert stream.close(drain=drain, timeout_s=PATIENCE_S)
    counts = stream.statistics()
    assert (counts.processed == 3) if drain else (counts.processed <= 1 and counts.dropped >= 2)
