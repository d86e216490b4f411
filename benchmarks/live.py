"""Segmentation beside a live acquisition: `python benchmarks/live.py --source openfibsem --frames FOLDER --output FILE`

A simulated microscope acquires as fast as it can, in windows with and without our stream attached; the two
windows of a pair follow each other at once and their order alternates, so that a drift of the machine does
not look like an effect. Says what became of every frame (submitted, processed, dropped, failed), how long
each stage took, how old the labels are that a display polling 20 times a second holds, and what the stream
costs the acquisition: the ratio of the frame rates with and without it.

The simulated microscope is Python on the processor, in this very process: the worst neighbour that an engine
on the processor can have. On a PC with two cores leave it one and come second: `--engine openvino --threads 1
--nice 19 --opencv-threads 1` (the simulation filters its pictures with OpenCV, which by default takes all
cores for it without becoming faster).

Micro-Manager's frames come from a simulated camera whose exposure of 13 ms is what no scanning microscope
undercuts at 512 x 512 (262,144 pixels at a dwell time of 50 ns, without fly-back): about 70 frames/s, each of
which takes 0.7 to 0.9 ms of Python in pymmcore-plus 0.18.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from hpddrnet_trt import load_segmenter
from hpddrnet_trt.benchmark.machine import CpuMeter, Machine, busy_warnings, describe_machine
from hpddrnet_trt.benchmark.timing import median_interval
from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.core.files import write_text
from hpddrnet_trt.core.provenance import command_line
from hpddrnet_trt.data.datasets import image_files
from hpddrnet_trt.data.intensity import to_grey8
from hpddrnet_trt.data.micrograph import read_micrograph
from hpddrnet_trt.integrations.fibsem import LiveSegmentation, replay_microscope
from hpddrnet_trt.integrations.micromanager import MicroManagerFeed, on_emitting_thread, replay_core
from hpddrnet_trt.stream import State, Stream

POLLS_PER_S = 20.0  # of a display
ALLOWED_LOSS = 0.02  # of the acquisition's rate
PERCENTILES = (50, 95, 99, 100)
FRAMES = 20  # different pictures, shown in turn
RESAMPLES = 10_000
FIRST_FRAME_S = 30.0  # within which a source must give one
OPENING_S = 300.0  # within which the model must be ready


class Source(Protocol):
    """Something that acquires."""

    name: str

    def acquire(self, seconds: float, stream: Stream | None) -> tuple[int, float]:
        """Acquire at the top rate, each frame into ``stream`` where one is given.

        Returns the frames, and the seconds in which they came: a little more than asked for, and just
        when the processor is busy, so taking the nominal ones would flatter the busy windows.
        """
        ...

    def close(self) -> None: ...


class OpenFibsemSource:
    """OpenFIBSEM's simulated microscope without its delays, replaying micrographs of one size."""

    def __init__(self, folder: Path, *, copy: bool = True) -> None:
        """``copy``: of each frame, by the stream; needless here, where every frame is an array of its own."""
        pictures = [to_grey8(read_micrograph(path).pixels)[0] for path in image_files(folder)[:FRAMES]]
        self._folder = tempfile.TemporaryDirectory()
        os.environ["FIBSEM_SIM_NO_DELAY"] = "1"
        try:
            self._microscope = replay_microscope(pictures, self._folder.name)
        except UserError:
            self._folder.cleanup()
            raise
        from fibsem.structures import BeamType

        self._beam = BeamType.ELECTRON
        self._microscope.sem_acquisition_signal.connect(self._count)
        self._frames, self._first, self._copy = 0, threading.Event(), copy
        height, width = pictures[0].shape
        self.name = f"OpenFIBSEM DemoMicroscope, {width}x{height}, {len(pictures)} micrographs"

    def _count(self, image: Any) -> None:
        self._frames += 1
        self._first.set()

    def acquire(self, seconds: float, stream: Stream | None) -> tuple[int, float]:
        live = None if stream is None else LiveSegmentation(stream, self._microscope, copy=self._copy)
        if live is not None:
            live.connect()
        self._first.clear()
        self._microscope.start_acquisition(self._beam)
        try:
            if not self._first.wait(FIRST_FRAME_S):
                raise UserError(f"{self.name} gave no frame within {FIRST_FRAME_S:.0f} s; see its log")
            began, before = time.monotonic(), self._frames
            time.sleep(seconds)
            frames, lasted = self._frames - before, time.monotonic() - began
        finally:
            self._microscope.stop_acquisition()
            if live is not None:
                live.disconnect()
        return frames, lasted

    def close(self) -> None:
        self._microscope.sem_acquisition_signal.disconnect(self._count)
        self._microscope.disconnect()
        self._folder.cleanup()


class MicroManagerSource:
    """Micro-Manager's acquisition engine on a simulated camera, replaying micrographs of one size."""

    name = "Micro-Manager"

    def __init__(self, folder: Path, *, exposure_ms: float = 13.0) -> None:
        pictures = [read_micrograph(path).pixels for path in image_files(folder)[:FRAMES]]
        self._core = replay_core(pictures, exposure_ms=exposure_ms, pixel_size_m=None)

    def acquire(self, seconds: float, stream: Stream | None) -> tuple[int, float]:
        """An MDA without interval; the count starts with its first frame, so starting it is not part of the rate."""
        count, first = 0, threading.Event()

        def counted(image: Any, event: Any, metadata: Any) -> None:
            nonlocal count
            count += 1
            first.set()

        feed = None if stream is None else MicroManagerFeed(self._core, stream).connect()
        on_emitting_thread(self._core.mda.events.frameReady, counted)  # also where a Qt program runs
        try:
            # An iterator has no length: frames come until the cancel, each commanded on its own.
            acquisition = self._core.run_mda(_events())
            if not first.wait(FIRST_FRAME_S):
                raise UserError(f"{self.name} gave no frame within {FIRST_FRAME_S:.0f} s; see its log")
            began, before = time.monotonic(), count
            time.sleep(seconds)
            frames, lasted = count - before, time.monotonic() - began
            self._core.mda.cancel()
            acquisition.join()
        finally:
            self._core.mda.events.frameReady.disconnect(counted)
            if feed is not None:
                feed.disconnect()
        if feed is not None and feed.errors:
            raise UserError(f"{feed.errors} frames of {self.name} could not be handed over: {feed.last_error}")
        return frames, lasted

    def close(self) -> None:
        self._core.unloadAllDevices()
        # Its event thread ends with the core; a core that outlives the interpreter can abort the program.
        del self._core


def _events() -> Iterator[Any]:
    from useq import MDAEvent

    event: Any = MDAEvent
    return (event(index={"t": step}) for step in itertools.count())


class Display:
    """Polls a stream's newest result like a viewer and notes how old what it shows is, while in its block."""

    def __init__(self, stream: Stream, polls_per_s: float = POLLS_PER_S) -> None:
        self._stream, self._pause = stream, 1 / polls_per_s
        self._end, self._thread = threading.Event(), threading.Thread(target=self._poll, daemon=True)
        self.ages_s: list[float] = []
        self.shown = 0
        self.runtime: str | None = None

    def _poll(self) -> None:
        submitted_s: float | None = None
        while not self._end.wait(self._pause):
            newest = self._stream.latest()
            if newest is not None and newest.segmentation is not None:
                submitted_s = newest.submitted_s
                self.shown += 1
                made_by = newest.segmentation.provenance
                self.runtime = None if made_by is None else made_by.engine
            if submitted_s is not None:
                self.ages_s.append(time.monotonic() - submitted_s)

    def __enter__(self) -> Display:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()


class Window(BaseModel):
    """One stretch of acquisition."""

    attached: bool
    seconds: float
    frames: int

    @property
    def rate(self) -> float:
        return self.frames / self.seconds


class RateRatio(BaseModel):
    """Frames per second with and without the stream: medians of windows, and the paired ratio with its interval."""

    with_stream: float
    without_stream: float
    ratio: float  # median over pairs of neighbouring windows
    interval_95: tuple[float, float]  # bootstrap of that median over the pairs
    allowed: float = 1 - ALLOWED_LOSS
    held: bool  # the ratio is not below what is allowed


class Shown(BaseModel):
    """What a display saw: results, and milliseconds since the frame of the shown one was submitted, at each poll."""

    results: int
    age_ms: dict[str, float]
    runtime: str | None  # of the newest result


class LiveResult(BaseModel):
    """What a run gave."""

    command: str
    source: str
    model: str
    policy: str
    nice: int
    max_rate: float | None
    copied: bool  # frames, by the stream
    opencv_threads: int
    machine: Machine
    warnings: list[str]
    acquisition: RateRatio
    display: Shown
    balanced: bool
    stream: dict[str, Any]  # the stream's own statistics at its end; percentiles are of its most recent frames
    windows: list[Window]


def rate_ratio(windows: Sequence[Window], seed: int = 0) -> RateRatio:
    """Compare neighbouring windows: ``windows`` come in pairs, one attached and one not, in any order.

    The interval is the percentile bootstrap (Efron 1979) of the median over pairs.
    """
    pairs = list(zip(windows[::2], windows[1::2], strict=True))
    if not pairs or any(first.attached == second.attached for first, second in pairs):
        raise UsageError("windows must come in pairs, one with and one without the stream")
    attached = np.asarray([next(window.rate for window in pair if window.attached) for pair in pairs])
    alone = np.asarray([next(window.rate for window in pair if not window.attached) for pair in pairs])
    if not alone.all():
        raise UserError("the source gave no frames in a window; make the windows longer")
    ratios = attached / alone
    ratio = float(np.median(ratios))
    return RateRatio(
        with_stream=float(np.median(attached)), without_stream=float(np.median(alone)), ratio=ratio,
        interval_95=median_interval(ratios, resamples=RESAMPLES, seed=seed), held=ratio >= 1 - ALLOWED_LOSS,
    )  # fmt: skip


def measure(
    source: Source, stream: Stream, *, pairs: int, seconds: float, warm_up_s: float
) -> tuple[list[Window], Shown]:
    """Windows with and without the stream by turns."""
    source.acquire(warm_up_s, stream)
    settle(stream)
    windows: list[Window] = []
    displays: list[Display] = []
    for pair in range(pairs):
        for attached in (True, False) if pair % 2 else (False, True):
            if attached:
                with Display(stream) as display:
                    frames, lasted = source.acquire(seconds, stream)
                displays.append(display)
                settle(stream)  # or its last inference would run into the window without
            else:
                frames, lasted = source.acquire(seconds, None)
            windows.append(Window(attached=attached, seconds=lasted, frames=frames))
    ages = [age for display in displays for age in display.ages_s]
    shown = sum(display.shown for display in displays)
    return windows, Shown(results=shown, age_ms=milliseconds(ages), runtime=displays[-1].runtime)


def settle(stream: Stream, timeout_s: float = 30.0) -> None:
    """Wait until the stream holds no frame, and forget its newest result."""
    end = time.monotonic() + timeout_s
    while stream.statistics().pending:
        if time.monotonic() > end:
            raise UserError(f"the stream still holds frames after {timeout_s:.0f} s: {stream.statistics()}")
        time.sleep(0.01)
    stream.latest()


def milliseconds(ages_s: Sequence[float]) -> dict[str, float]:
    """Percentiles of ages, NaN without any."""
    values: npt.NDArray[np.float64] = np.asarray(ages_s or [float("nan")]) * 1000
    return {"max" if share == 100 else f"p{share}": float(np.percentile(values, share)) for share in PERCENTILES}


def open_source(name: str, folder: Path, *, copy: bool = True) -> Source:
    if name == "openfibsem":
        return OpenFibsemSource(folder, copy=copy)
    if not copy:
        raise UsageError("--no-copy is for OpenFIBSEM: the frames of other sources are buffers that are used again")
    return MicroManagerSource(folder)


def run(options: argparse.Namespace) -> LiveResult:
    """One measurement, from opening the source to the result."""
    if options.opencv_threads:
        cv2.setNumThreads(options.opencv_threads)
    machine, meter = describe_machine(), CpuMeter()
    given = {"threads": options.threads, "precision": options.precision}
    own = {name: value for name, value in given.items() if value is not None}
    opener = partial(load_segmenter, options.model, engine=options.engine, **own)
    with (
        closing(open_source(options.source, options.frames, copy=options.copy)) as source,
        Stream(opener, policy=options.policy, nice=options.nice, max_rate=options.max_rate) as stream,
    ):
        stream.wait_ready(OPENING_S)
        _require_ready(stream)
        pairs = max(1, round(options.seconds / options.window))
        windows, display = measure(source, stream, pairs=pairs, seconds=options.window, warm_up_s=options.warm_up)
        _require_ready(stream)
        stream.close()
        counts, name = stream.statistics(), source.name
    return LiveResult(
        command=command_line(), source=name, model=options.model, policy=options.policy, nice=options.nice,
        max_rate=options.max_rate, copied=options.copy, opencv_threads=cv2.getNumThreads(), machine=machine,
        warnings=[*machine.warnings, *busy_warnings(meter.others(), "during the run")],
        acquisition=rate_ratio(windows), display=display,
        balanced=counts.submitted == counts.processed + counts.dropped + counts.failed + counts.pending,
        stream=counts.as_dict(), windows=windows,
    )  # fmt: skip


def _require_ready(stream: Stream) -> None:
    statistics = stream.statistics()
    if statistics.state is not State.READY:
        raise UserError(f"the stream is {statistics.state.value}: {statistics.reason}")


def summary(result: LiveResult) -> str:
    """The result in a few lines."""
    rates, stream = result.acquisition, result.stream
    low, high = rates.interval_95
    counts = ", ".join(f"{stream[name]} {name}" for name in ("submitted", "processed", "dropped", "failed", "pending"))
    stages = {name: {part: times[f"{part}_ms"] for part in ("p50", "p95", "p99")}
              for name, times in stream["stages"].items()}
    lines = [
        f"{result.source}; {result.model} on {result.display.runtime}; {len(result.windows)} windows",
        f"frames: {counts} ({'balanced' if result.balanced else 'NOT BALANCED'})",
        *(
            f"{name}: p50 {times['p50']:.1f}, p95 {times['p95']:.1f}, p99 {times['p99']:.1f} ms"
            for name, times in {**stages, "age on display": result.display.age_ms}.items()
        ),
        f"acquisition: {rates.with_stream:.1f} frames/s with, {rates.without_stream:.1f} without; "
        f"ratio {rates.ratio:.4f} [{low:.4f}, {high:.4f}], {'held' if rates.held else 'MISSED'} ({rates.allowed:.2f})",
        *(f"warning: {warning}" for warning in result.warnings),
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=("openfibsem", "micromanager"), required=True)
    parser.add_argument("--frames", type=Path, required=True, help="folder of micrographs of one size, to be replayed")
    parser.add_argument("--model", default="nasa-super1", help="model file, or the name of a shipped model")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--threads", type=int, help="of the engine")
    parser.add_argument("--precision", help="of the OpenVINO engine's floating-point layers: f32, bf16")
    parser.add_argument("--max-rate", type=float, help="frames segmented per second, at most")
    parser.add_argument("--nice", type=int, default=5, help="added to the niceness of the engine's threads (Linux)")
    parser.add_argument("--opencv-threads", type=int, help="of OpenCV in this process, so also of the simulation")
    parser.add_argument("--no-copy", dest="copy", action="store_false", help="take OpenFIBSEM's own arrays as frames")
    parser.add_argument("--policy", choices=("latest", "reject"), default="latest")
    parser.add_argument("--seconds", type=float, default=120, help="with the stream attached; as long again without")
    parser.add_argument("--window", type=float, default=10, help="seconds per window")
    parser.add_argument("--warm-up", type=float, default=2, help="seconds before the first window")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the result")
    options = parser.parse_args(arguments)
    try:
        result = run(options)
    except UserError as exc:
        parser.exit(exc.exit_code, f"error: {exc}\n")
    write_text(options.output, result.model_dump_json(indent=1) + "\n")
    print(summary(result))


if __name__ == "__main__":
    main()
