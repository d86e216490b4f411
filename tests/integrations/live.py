"""What the tests of live microscopes share: the toy model, and waiting."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.stream import Stream
from tests.toy import ToyEngine


def toy_segmenter() -> Segmenter:
    return Segmenter(ToyEngine())


def open_stream(**options: Any) -> Stream:
    """A stream of the toy model that is ready and drops nothing."""
    stream = Stream(toy_segmenter, **{"policy": "block", "nice": 0, **options})
    stream.wait_ready(10)
    return stream


def toy_labels(picture: Any) -> Any:
    return toy_segmenter().segment(picture).labels


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)
