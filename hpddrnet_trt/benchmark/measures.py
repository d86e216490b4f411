"""What is measured of every engine at one size and batch; times are taken in interleaved rounds.

End-to-end latency is what a microscope waits for; inference latency is the network alone, on a GPU by its own events
(what trtexec calls GPU Compute Time); throughput is what a folder of images gets. They are never mixed.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.accuracy.cost import DEVICES, Device
from hpddrnet_trt.benchmark.images import Grey8
from hpddrnet_trt.benchmark.machine import EnergyUse, GpuSensor, GpuWatch
from hpddrnet_trt.benchmark.result import (
    MEASURES,
    LayerGroups,
    Measure,
    RooflineBound,
    Settings,
    Shape,
    Timing,
)
from hpddrnet_trt.benchmark.timing import (
    FAILURES,
    Burst,
    Frames,
    Loop,
    Samples,
    on_host,
    ratio_of_medians,
    time_interleaved,
)
from hpddrnet_trt.core.errors import describe, require
from hpddrnet_trt.core.precisions import PRECISIONS
from hpddrnet_trt.core.progress import progress_bar
from hpddrnet_trt.data.preprocess import network_input
from hpddrnet_trt.engines.base import Bound, Engine, input_contract

_Made = TypeVar("_Made")

ROUND_S = 0.3  # least duration of a throughput round: long beside filling and emptying the pipeline
LEAST_BATCHES = 4  # of a round
SLOW_S = 1.0  # per batch: engines slower than this get half as many
MOST_BATCHES = 5000
MOST_ROUNDS = 10  # of throughput: a sample is already the mean of many batches
PROFILE_S = 5.0  # about how long layers are profiled, per entry, size and batch
PROFILE_RUNS = (3, 20)  # fewest and most


@dataclass(frozen=True)
class BenchmarkCase:
    """One size and batch, with the frames ``[batch, height, width]`` that are timed."""

    shape: Shape
    frames: Sequence[Grey8]


# -- what is timed ---------------------------------------------------------------------------------


def prepared(engine: Engine, frames: Frames) -> npt.NDArray[Any]:
    """Grey frames ``[N, H, W]`` as the batch that ``engine`` takes: padded and, for float models, normalised."""
    return network_input(list(frames), input_contract(engine.manifest), engine.manifest.normalization)


def end_to_end(engine: Engine) -> Callable[[Frames], Frames]:
    """A function from host uint8 grey frames ``[N, H, W]`` to host uint8 labels ``[N, H, W]``.

    Everything between is included: padding and, for three-channel float models, normalisation on
    the host; copies to and from a device; inference; resizing and arg-max.
    """

    def run(frames: Frames) -> Frames:
        height, width = frames.shape[1:]
        return engine.infer(prepared(engine, frames)).labels[:, :height, :width]

    return run


def end_to_end_stream(engine: Engine) -> Callable[[Iterable[Frames]], Iterator[Frames]]:
    """:func:`end_to_end` for a stream of batches, as many in flight as suits the engine; order is kept."""

    def run(stream: Iterable[Frames]) -> Iterator[Frames]:
        sizes: deque[tuple[int, int]] = deque()

        def batches() -> Iterator[npt.NDArray[Any]]:
            for frames in stream:
                sizes.append((frames.shape[1], frames.shape[2]))
                yield prepared(engine, frames)

        for prediction in engine.infer_many(batches()):
            height, width = sizes.popleft()
            yield prediction.labels[:, :height, :width]

    return run


def inference_only(engine: Engine, frames: Frames) -> tuple[Burst[object], bool]:
    """The network alone on ``frames``, which are placed where it computes once, here; whether the GPU times it.

    By CUDA events where the engine has them (:class:`~hpddrnet_trt.engines.base.Bound`), else by the host's clock.
    Raises :class:`NotImplementedError` when the engine has no such measure.
    """
    bind = getattr(engine, "bind", None)
    if bind is None:
        raise NotImplementedError("this engine cannot run the network alone")
    run = bind(prepared(engine, frames))
    if isinstance(run, Bound):
        return (lambda _, runs: run.burst(runs)), True
    return on_host(lambda _: run()), False


# -- the three times -------------------------------------------------------------------------------


@dataclass
class Measured:
    """What one measure gave for one case: samples, who was timed by the GPU, and joules of one image where counted."""

    measure: Measure
    case: BenchmarkCase
    samples: Samples
    by_events: set[str] = field(default_factory=set)
    joules: dict[str, float] = field(default_factory=dict)

    @property
    def unsteady(self) -> list[str]:
        """Labels whose times still changed when warm-up had to end."""
        return [label for label, warmup in self.samples.warmups.items() if warmup.steady is False]

    def timing(self, label: str, reference: tuple[Measured, str] | None, seed: int) -> Timing:
        """Samples, quantiles and the ratio to a reference's same measure, paired if it was timed in these rounds."""
        samples, shape = self.samples, self.case.shape
        by_round, warmup, cold = samples.seconds[label], samples.warmups.get(label), samples.cold.get(label)
        seconds = [value for one in by_round for value in one]
        p50, p95, p99 = (float(value) for value in np.percentile(seconds, [50, 95, 99]))
        ratio = None
        if reference is not None:
            other = reference[0].samples.seconds[reference[1]]
            ratio = ratio_of_medians(other, by_round, paired=reference[0] is self, seed=seed)
        return Timing(
            **shape._asdict(), samples_ms=[round(1000 * value, 4) for value in seconds], ratio=ratio,
            p50_ms=1000 * p50, p95_ms=1000 * p95, p99_ms=1000 * p99, max_ms=1000 * max(seconds),
            images_per_s=shape.batch / p50, warmup=warmup.runs if warmup else None,
            steady=warmup.steady if warmup else None, joules_per_image=self.joules.get(label),
            burst=len(by_round[0]), uncounted=samples.uncounted[label], by_events=label in self.by_events,
            cold_ms=1000 * float(np.median(cold)) if cold and samples.uncounted[label] else None,
        )  # fmt: skip


class Timer:
    """Takes the measures as ``settings`` say, watching the GPU during timed rounds."""

    def __init__(self, settings: Settings, watch: GpuWatch, quiet: bool = False) -> None:
        self._settings, self._watch, self._quiet = settings, watch, quiet

    def end_to_end(self, engines: Mapping[str, Engine], case: BenchmarkCase) -> Measured:
        """From host frame to host labels, one batch at a time."""
        bursts = {label: on_host(end_to_end(engine)) for label, engine in engines.items()}
        return Measured("end_to_end", case, self._rounds("end_to_end", case, engines, bursts, case.frames))

    def inference(self, engines: Mapping[str, Engine], case: BenchmarkCase) -> Measured:
        """The network alone, on data that lie where it computes. Engines without it are failures."""
        bursts: dict[str, Burst[object]] = {}
        reasons: dict[str, str] = {}
        by_events: set[str] = set()
        for label, engine in engines.items():
            made = _or_reason(inference_only, engine, case.frames[0])
            if isinstance(made, str):
                reasons[label] = made
            else:
                bursts[label], on_gpu = made
                by_events |= {label} if on_gpu else set()
        samples = self._rounds("inference", case, engines, bursts, [None])
        samples.failures |= reasons
        return Measured("inference", case, samples, by_events)

    def throughput(
        self, engines: Mapping[str, Engine], case: BenchmarkCase, gpus: Mapping[str, GpuSensor | None]
    ) -> Measured:
        """From host frames to host labels with many batches in flight, a round of them per sample.

        Each engine's round lasts at least :data:`ROUND_S`; there are at most :data:`MOST_ROUNDS`.
        ``gpus``: by label the GPU that an engine computes on, where its energy can be read.
        """
        bursts: dict[str, Burst[object]] = {}
        counts: dict[str, int] = {}
        reasons: dict[str, str] = {}
        for label, engine in engines.items():
            many = _round_runner(engine, case.frames)
            count = _or_reason(batches_per_round, many)
            if isinstance(count, str):
                reasons[label] = count
            else:
                counts[label], bursts[label] = count, on_host(partial(many, count))
        use = {label: EnergyUse(gpus.get(label)) for label in bursts}
        samples = self._rounds("throughput", case, engines, bursts, [None], around=lambda label: use[label].counted())
        for label, rounds in samples.seconds.items():
            samples.seconds[label] = [[value / counts[label] for value in one] for one in rounds]
        samples.failures |= reasons
        joules = {}
        for label, used in use.items():
            if label in samples.seconds and used.joules and not samples.interrupted:
                joules[label] = used.joules / (samples.rounds * counts[label] * case.shape.batch)
        return Measured("throughput", case, samples, joules=joules)

    def _rounds(
        self, measure: Measure, case: BenchmarkCase, engines: Mapping[str, Engine], bursts: Mapping[str, Burst[Any]],
        inputs: Sequence[Any], around: Callable[[str], AbstractContextManager[object]] = lambda _: nullcontext(),
    ) -> Samples:  # fmt: skip
        plan = self._settings
        if measure == "throughput":  # choosing the number of batches has warmed up already, and a round is long
            loop = Loop(min(plan.rounds, MOST_ROUNDS), 0, settle=False, burst_s=0, seed=plan.seed)
        else:
            loop = Loop(plan.rounds, plan.warmup, burst_s=plan.burst_ms / 1000, seed=plan.seed)
        if any(map(runs_on_cpu, engines.values())):  # a GPU that rests slows down
            loop = replace(loop, pause_s=plan.pause_ms / 1000)
        title, steps = f"{MEASURES[measure]} {case.shape}", (loop.rounds + loop.warmup) * len(bursts)
        with progress_bar(total=steps, desc=title, unit="turn", show=not self._quiet) as bar:
            watch = None if all(map(runs_on_cpu, engines.values())) else self._watch.watching()
            samples = time_interleaved(bursts, inputs, loop, on_step=bar.update, around=around, watch=watch)
        if measure == "throughput":
            samples.warmups.clear()
        return samples


def runs_on_cpu(engine: Engine) -> bool:
    """Every engine names its device in brackets, a processor as CPU (see :attr:`Engine.runtime`)."""
    return "(CPU" in engine.runtime


def batches_per_round(run: Callable[[int], object], clock: Callable[[], float] = time.perf_counter) -> int:
    """How many batches make a throughput round, found by running some (which also warms up).

    ``run(count)`` runs that many. At least :data:`LEAST_BATCHES`, or half as many where one takes longer
    than :data:`SLOW_S`, and enough for :data:`ROUND_S`.
    """
    count = LEAST_BATCHES
    run(count // 2)  # the first one may still set up what keeps several batches in flight
    for _ in range(3):
        start = clock()
        run(count)
        elapsed = clock() - start
        if elapsed >= ROUND_S or count >= MOST_BATCHES:
            break
        count = min(MOST_BATCHES, math.ceil(count * min(100.0, 1.1 * ROUND_S / max(elapsed, 1e-6))))
    return LEAST_BATCHES // 2 if elapsed / count > SLOW_S else count


def _round_runner(engine: Engine, frames: Sequence[Frames]) -> Callable[..., object]:
    """Runs so many batches; a second argument is ignored."""
    many = end_to_end_stream(engine)

    def run(count: int, _: object = None) -> None:
        for _ in many(itertools.islice(itertools.cycle(frames), count)):
            pass

    return run


def _or_reason(make: Callable[..., _Made], *given: Any) -> _Made | str:
    """What ``make`` gives, or why an engine cannot do it."""
    try:
        return make(*given)
    except NotImplementedError as exc:
        return str(exc) or "this engine does not offer it"
    except FAILURES as exc:
        return describe(exc)


# -- where the time goes ---------------------------------------------------------------------------


def layer_groups(engine: Engine, path: Path, case: BenchmarkCase, latency_s: float) -> LayerGroups | None:
    """Time by part of the network, None for a runtime without a profiler.

    ``latency_s``: about how long one inference takes. Raises what the engine raises.
    """
    from hpddrnet_trt.graph.layers import group_times, tensor_owners

    runs = min(PROFILE_RUNS[1], max(PROFILE_RUNS[0], math.ceil(PROFILE_S / latency_s)))
    times = engine.layer_times(prepared(engine, case.frames[0]), runs)
    if not times:
        return None
    return LayerGroups(**case.shape._asdict(), groups=group_times(times, tensor_owners(path)))


def known_device(gpu: str) -> Device | None:
    """The data sheet of a GPU by the name that its driver gives, e.g. ``NVIDIA H200``; None where none is known."""
    return next((device for device in DEVICES.values() if f"{gpu} ".startswith(f"{device.name} ")), None)


def roofline_bounds(graph: Path, precision: str, shapes: Sequence[Shape], device: Device) -> list[RooflineBound]:
    """The least time of a network on ``device`` for each of ``shapes``; empty where it has no such precision.

    ``graph``: an ONNX file of the network in any precision; ``precision``: of the file that runs, e.g. ``fp16``. A
    product takes as long as its operations at that precision's peak rate or, one with weights, as long as reading
    and writing each tensor once. What lies between products counts nothing, as if all of it were fused.
    Raises :class:`UserError` for a size that the graph does not take.
    """
    from hpddrnet_trt.graph.work import macs_and_bytes

    if precision not in device.tera_operations:
        return []
    onnx = require("onnx", "export", "count a network's operations")
    model, size = onnx.load(str(graph)), PRECISIONS[precision].bytes
    channels = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    bounds = []
    for shape in shapes:
        seconds = 0.0
        for work in macs_and_bytes(model, (shape.batch, channels, shape.height, shape.width)).values():
            moved = work.bytes(size, size, size) if work.macs and work.weights else 0.0
            seconds += device.seconds(work.macs, moved, precision)
        bounds.append(RooflineBound(**shape._asdict(), milliseconds=1000 * seconds))
    return bounds
