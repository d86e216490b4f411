"""Micro-Manager as a source of live frames, for measuring what a listener costs the acquisition.

What limits its rate: each frame of an MDA without interval is one exposure (here a sleep of the simulated camera),
0.7 to 0.9 ms of Python in pymmcore-plus 0.18 (event, snap on a pool thread, metadata, signal; 512 x 512 frames, one
core of a server of 2026) and two copies of the frame.

The exposure of 13 ms is what no scanning microscope undercuts at 512 x 512: 262,144 pixels at a dwell time of 50 ns,
without fly-back. That gives about 70 frames/s. `exposure_ms=1` (400 to 570 frames/s) shows the core's own limit:
there the acquisition is Python that shares interpreter and processor with everything else in the process.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpddrnet_trt.data.datasets import image_files
from hpddrnet_trt.data.micrograph import read_micrograph
from hpddrnet_trt.integrations.micromanager import MicroManagerFeed, on_emitting_thread, replay_core

if TYPE_CHECKING:
    from hpddrnet_trt.stream import Stream

FRAMES = 20  # different pictures, shown in turn


class MicroManagerSource:
    """Replays the micrographs of a folder (of one size) through Micro-Manager's acquisition engine."""

    name = "Micro-Manager"

    def __init__(self, micrographs: Path | Sequence[Path], *, exposure_ms: float = 13.0) -> None:
        paths = image_files(micrographs) if isinstance(micrographs, Path) else list(micrographs)
        pictures = [read_micrograph(path).pixels for path in paths[:FRAMES]]
        self._core = replay_core(pictures, exposure_ms=exposure_ms, pixel_size_m=None)

    def acquire(self, seconds: float, stream: Stream | None) -> tuple[int, float]:
        """Run an MDA without interval for so long; the frames that it delivered, and the seconds in which it did.

        Frames are counted by a listener of one line, with a ``stream`` and without; the count starts with the first
        frame, so that starting the MDA is not part of the rate.
        """
        count, began = 0, threading.Event()

        def counted(image: Any, event: Any, metadata: Any) -> None:
            nonlocal count
            count += 1
            began.set()

        feed = None if stream is None else MicroManagerFeed(self._core, stream).connect()
        on_emitting_thread(self._core.mda.events.frameReady, counted)  # also where a Qt program runs
        try:
            # An iterator has no length: frames come until the cancel, each commanded on its own.
            acquisition = self._core.run_mda(_events())
            if not began.wait(10):
                raise RuntimeError("the MDA gave no frame within 10 s")
            start, before = time.monotonic(), count
            time.sleep(seconds)
            delivered, lasted = count - before, time.monotonic() - start
            self._core.mda.cancel()
            acquisition.join()
        finally:
            self._core.mda.events.frameReady.disconnect(counted)
            if feed is not None:
                feed.disconnect()
        if feed is not None and feed.errors:
            raise RuntimeError(f"{feed.errors} frames could not be handed over: {feed.last_error}")
        return delivered, lasted

    def close(self) -> None:
        self._core.unloadAllDevices()
        # Its event thread ends with the core; a core that outlives the interpreter can abort the program.
        del self._core


def _events() -> Iterator[Any]:
    from useq import MDAEvent

    event: Any = MDAEvent
    return (event(index={"t": step}) for step in itertools.count())
