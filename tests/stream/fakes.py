"""Segmenters whose every inference is under the test's control."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import ContractError
from hpddrnet_trt.data.micrograph import Micrograph
from hpddrnet_trt.inference.result import Segmentation
from hpddrnet_trt.stream import State, Stream
from tests.toy import manifest

MANIFEST = manifest()
PATIENCE_S = 20.0  # for what happens at once on an idle machine


def frame(number: int) -> npt.NDArray[np.uint8]:
    """A tiny frame that carries its number (1 to 65535; the frames of a warm-up are black: number 0)."""
    return np.asarray([[number >> 8, number & 255]], np.uint8)


def number_of(segmentation: Segmentation | None) -> int:
    """The number of the frame that a fake's result belongs to."""
    assert segmentation is not None
    high, low = segmentation.labels[0].tolist()
    return high << 8 | low


def result_of(image: Any) -> Segmentation:
    """What the fakes find: the pixels themselves as labels."""
    pixels = image.pixels if isinstance(image, Micrograph) else image
    if not isinstance(pixels, np.ndarray) or pixels.shape != (1, 2):
        raise ContractError("not a frame of these tests")
    return Segmentation(pixels.copy(), MANIFEST)


class Immediate:
    """Segments at once, after ``pause_s``."""

    def __init__(self, pause_s: float = 0.0) -> None:
        self.pause_s = pause_s

    def segment(self, image: Any, /) -> Segmentation:
        time.sleep(self.pause_s)
        return result_of(image)

    def close(self) -> None:
        pass


class Scripted:
    """Each inference ends as the next entry says: None, or an exception to raise; the last entry repeats.

    ``open`` counts as an entry of its own script in the same way.
    """

    def __init__(self, inferences: list[BaseException | None], openings: list[BaseException | None] | None = None):
        self._inferences, self._openings = list(inferences), list(openings or [None])
        self.warm_ups_count = False  # whether inferences of a warm-up follow the script, too
        self.attempts = self.opened = self.closed = 0  # an opening that raises is an attempt only
        self.threads: set[int] = set()

    def open(self) -> Scripted:
        self.threads.add(threading.get_ident())
        self.attempts += 1
        _follow(self._openings)
        self.opened += 1
        return self

    def segment(self, image: Any, /) -> Segmentation:
        self.threads.add(threading.get_ident())
        found = result_of(image)
        if number_of(found) or self.warm_ups_count:
            _follow(self._inferences)
        return found

    def close(self) -> None:
        self.threads.add(threading.get_ident())
        self.closed += 1


def _follow(script: list[BaseException | None]) -> None:
    outcome = script.pop(0) if len(script) > 1 else script[0]
    if outcome is not None:
        raise outcome


class Bench:
    """Segmenters whose inferences wait for :meth:`end` of their own frame. Warm-ups end at once."""

    def __init__(self) -> None:
        self._ends: dict[int, queue.SimpleQueue[BaseException | None]] = {}
        self._lock = threading.Lock()
        self._free = False
        self.begun: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.opened = self.closed = 0

    def open(self) -> Bench:
        with self._lock:
            self.opened += 1
        return self

    def close(self) -> None:
        with self._lock:
            self.closed += 1

    def segment(self, image: Any, /) -> Segmentation:
        found = result_of(image)
        if not number_of(found):
            return found
        with self._lock:
            ends = self._ends.setdefault(number_of(found), queue.SimpleQueue())
            if self._free:
                ends.put(None)
        self.begun.put(number_of(found))
        outcome = ends.get()
        if outcome is not None:
            raise outcome
        return found

    def wait_begun(self) -> int:
        """Number of the frame whose inference began next."""
        return self.begun.get(timeout=PATIENCE_S)

    def end(self, number: int, outcome: BaseException | None = None) -> None:
        """Let the inference of frame ``number`` end."""
        with self._lock:
            self._ends.setdefault(number, queue.SimpleQueue()).put(outcome)

    def release(self) -> None:
        """Let every inference end at once from now on."""
        with self._lock:
            self._free = True
            for ends in self._ends.values():
                ends.put(None)


class Hostile:
    """Looks like an array until somebody looks."""

    @property
    def shape(self) -> tuple[int, int]:
        raise RuntimeError("no shape for you")

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name} for you")


class OnDevice:
    """An array of another library, which cannot be copied."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (8, 8), "typestr": "|u1", "data": (0, False), "version": 3}


# What somebody may hand in as a frame, and what the sentence about it says.
NO_FRAMES: dict[str, tuple[Any, str]] = {
    "nothing": (None, "NoneType"),
    "text": ("frame.tif", "str"),
    "list": ([[1, 2], [3, 4]], "list"),
    "colour": (np.zeros((8, 8, 3), np.uint8), "grey image"),
    "a line": (np.zeros(8, np.uint8), "grey image"),
    "empty": (np.zeros((0, 8), np.uint8), "empty"),
    "NaN": (np.full((8, 8), np.nan, np.float32), "no finite value"),
    "infinite": (np.full((8, 8), np.inf), "no finite value"),
    "complex": (np.zeros((8, 8), np.complex64), "complex64"),
    "signed": (np.zeros((8, 8), np.int16), "int16"),
    "objects": (np.asarray([[object()]]), "object"),
    "a record": (np.zeros((8, 8), [("a", "u1")]), "expected pixels"),
    "masked": (np.ma.masked_equal(np.zeros((8, 8), np.uint8), 0), "masked array"),
    "bomb": (np.broadcast_to(np.uint8(0), (1 << 20, 1 << 20)), "too large"),
    "wide bomb": (np.broadcast_to(np.zeros((), "V1000000"), (1 << 10, 1 << 10)), "too large"),
    "micrograph of nothing": (Micrograph(None, None), "NoneType"),  # type: ignore[arg-type]
    "hostile": (Hostile(), "no "),
    "device array": (OnDevice(), "copy=False"),
}


def until(condition: Callable[[], bool], what: str = "") -> None:
    """Wait for a condition that other threads bring about."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what or condition}"
        time.sleep(0.001)


def check_balance(stream: Stream) -> None:
    """The accounts of any instant."""
    now = stream.statistics()
    assert now.submitted == now.processed + now.dropped + now.failed + now.pending, now
    assert now.dropped == sum(now.dropped_because.values())
    assert now.delivered + sum(now.undelivered_because.values()) <= now.processed + now.failed, now


def check_ended(stream: Stream) -> None:
    """The accounts of a stream that was closed in time: nothing is pending, every result is accounted for."""
    check_balance(stream)
    end = stream.statistics()
    assert end.pending == 0
    assert end.state is State.CLOSED
