"""One press of *Run*: open the model, segment the chosen planes, with progress and cancellation.

Runs in a thread of its own and touches no layer and no widget; what it finds is shown by
:mod:`hpddrnet_trt.integrations.napari_results` in the GUI's thread.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.data.preprocess import Mode
from hpddrnet_trt.inference import Segmenter, load_segmenter
from hpddrnet_trt.inference.result import Segmentation
from hpddrnet_trt.inference.runner import Tile
from hpddrnet_trt.integrations.napari_layers import LayerPlanes
from hpddrnet_trt.weights import locate


@dataclass(frozen=True)
class Request:
    """What to segment with.

    ``model``: a file, or the name of a model that comes with the package. ``window``: grey values that become black
    and white in every plane; None: 8-bit planes as they are, others by their own percentiles. The other fields are
    those of :class:`~hpddrnet_trt.inference.Segmenter` and :func:`~hpddrnet_trt.inference.load_segmenter`.
    """

    model: str
    engine: str = "auto"
    mode: Mode = "single"
    tile: Tile = "auto"
    confidence: bool = False
    window: tuple[float, float] | None = None


@dataclass(frozen=True)
class PlaneResult:
    """One plane that is done; ``index`` into the stack's axes."""

    index: tuple[int, ...]
    segmentation: Segmentation


class Cancelled(Exception):
    """The job was cancelled; raised where it stops."""


class Progress:
    """How far a job is: written by its thread, read by the GUI's; :meth:`cancel` goes the other way.

    ``fraction``: 0 to 1, None while that cannot be known (a model that opens, a picture that runs whole).
    """

    def __init__(self) -> None:
        self.text = "waiting"
        self.fraction: float | None = None
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Stop at the next tile or plane; an inference that has begun is not interrupted, its result is dropped."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def report(self, text: str, fraction: float | None) -> None:
        """Say how far it is; raises :class:`Cancelled` when that was asked for."""
        if self.cancelled:
            raise Cancelled
        self.text, self.fraction = text, fraction


class OpenModel:
    """Keeps the last used segmenter open from run to run; other options or a changed file open it again."""

    def __init__(self) -> None:
        self._segmenter: Segmenter | None = None
        self._key: object = None
        self._busy = threading.Lock()
        self._closing = False

    def __enter__(self) -> OpenModel:
        """Taken for one job; a second one waits."""
        self._busy.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._busy.release()
        if self._closing:
            self.close()

    def segmenter(self, request: Request) -> Segmenter:
        """The segmenter for a request; raises what :func:`~hpddrnet_trt.inference.load_segmenter` does."""
        path = locate(request.model)
        state = path.stat() if path.is_file() else None
        key = (request, None if state is None else (state.st_mtime_ns, state.st_size))
        if self._segmenter is None or key != self._key:
            self._drop()
            self._segmenter = load_segmenter(
                request.model, engine=request.engine, mode=request.mode, tile=request.tile,
                confidence=request.confidence, window=request.window,
            )  # fmt: skip
            self._key = key
        return self._segmenter

    def close(self) -> None:
        """Close it: now, or when the job that uses it ends."""
        self._closing = True
        if self._busy.acquire(blocking=False):
            self._drop()
            self._busy.release()

    def _drop(self) -> None:
        if self._segmenter is not None:
            self._segmenter.close()
        self._segmenter = self._key = None


def segment_planes(
    planes: LayerPlanes, request: Request, opened: OpenModel, progress: Progress
) -> Iterator[PlaneResult]:
    """Segment the planes one after the other, reading each when its turn comes.

    Raises :class:`Cancelled`, and :class:`~hpddrnet_trt.core.errors.UserError` for what a person can put right.
    """
    with opened:
        progress.report(f"opening {Path(request.model).name}", None)
        segmenter = opened.segmenter(request)
        count = len(planes.indices)
        for number, index in enumerate(planes.indices):
            text = "segmenting" if count == 1 else f"plane {number + 1} of {count}"
            fraction = None if count == 1 else number / count
            progress.report(text, fraction)
            picture = planes.read(index)
            progress.report(text, fraction)

            def tile_done(done: int, tiles: int, number: int = number, text: str = text) -> None:
                text = text if tiles == 1 else f"{text}, tile {done} of {tiles}"
                progress.report(text, (number + done / tiles) / count)

            yield PlaneResult(index, segmenter.segment(picture, progress=tile_done))


@dataclass(frozen=True)
class End:
    """How a job ended: ``text`` for people; ``error`` when it is one of theirs, ``bug`` when it is one of ours."""

    text: str
    error: bool = False
    bug: Exception | None = None


class Job:
    """:func:`segment_planes` in a thread of its own, for a GUI that polls.

    Polling, not Qt's signals: napari's worker drops its ``finished`` signal after a RuntimeError, which is what
    runtimes raise, and a poll needs no Qt here. Poll as in ``end = job.end; results = job.take()``: in this order no
    result is missed.
    """

    def __init__(self, planes: LayerPlanes, request: Request, opened: OpenModel) -> None:
        self.planes, self.progress = planes, Progress()
        self.end: End | None = None
        self._done: queue.SimpleQueue[PlaneResult] = queue.SimpleQueue()
        # Not a daemon: a thread that Python freezes inside a runtime's C++ at exit ends the process with a crash.
        self._thread = threading.Thread(target=self._run, args=(request, opened), name="hpddrnet-trt segment")

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def take(self) -> list[PlaneResult]:
        """The planes that are done and were not taken yet; none after :meth:`Progress.cancel`."""
        found: list[PlaneResult] = []
        while not (self._done.empty() or self.progress.cancelled):
            found.append(self._done.get())
        return found

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it has ended; True when it has."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self, request: Request, opened: OpenModel) -> None:
        started, last = time.monotonic(), None
        try:
            for result in segment_planes(self.planes, request, opened, self.progress):
                last = result.segmentation
                self._done.put(result)
        except Cancelled:
            self.end = End("cancelled")
        except UserError as exc:
            self.end = End(str(exc), error=True)
        except MemoryError:
            self.end = End("there is not enough memory for this; choose smaller tiles", error=True)
        except Exception as exc:  # a thread must not end without a word
            self.end = End(f"unexpected {type(exc).__name__}: {exc}", error=True, bug=exc)
        else:
            self.end = End(_summary(len(self.planes.indices), last, time.monotonic() - started))


def _summary(count: int, last: Segmentation | None, seconds: float) -> str:
    text = f"{'1 picture' if count == 1 else f'{count} planes'} in {seconds:.1f} s"
    if last is not None and last.provenance is not None:
        text += f" with {last.provenance.engine}"
    if last is not None and last.tiling is not None:
        text += f"; {last.tiling.tiles} tiles, which disagree on {last.tiling.seam_disagreement:.1%} of their overlaps"
    return text
