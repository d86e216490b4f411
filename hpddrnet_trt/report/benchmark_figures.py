"""The report's figures: a name, a sentence and a drawing each; left out where a result has nothing to draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from hpddrnet_trt.benchmark.result import BenchmarkResult
from hpddrnet_trt.benchmark.shapes import Shape, timed_shapes
from hpddrnet_trt.report.latency import latency_figure
from hpddrnet_trt.report.parts import groups_figure, limit_figure, overhead_figure
from hpddrnet_trt.report.scaling import batch_figure, memory_figure, size_figure
from hpddrnet_trt.report.speed import main_figure, pareto_figure, speed_figure
from hpddrnet_trt.report.style import png

SPEED, TIME, SCATTER, SCALING = "speed", "time", "scatter", "scaling"  # sections of the page


class Drawn(NamedTuple):
    """``name`` is the file's, ``section`` the page's; ``caption`` says what is seen; a matplotlib figure."""

    name: str
    section: str
    caption: str
    figure: Any


_LINEAR = "Along the dashed lines it grows linearly with the pixels."
_DRAWERS: tuple[tuple[str, str, Callable[[BenchmarkResult], Any | None], str], ...] = (
    ("speed", SPEED, speed_figure, "Images per second of every entry, with the speed-up over the reference."),
    ("pareto", SPEED, pareto_figure,
     "Accuracy against speed. Nobody is right of or above the line: entries on it are worth choosing from, the others "
     "are beaten."),
    ("overhead", TIME, overhead_figure,
     "What lies around the network: the median from frame to labels minus the median of the network only, left out "
     "where the two do not differ. They were timed in different rounds, so a few per cent may be drift."),
    ("groups", TIME, groups_figure,
     "Time by part of the network, from each runtime's own profiler; layers are timed one by one, so sums are more "
     "than an undisturbed run."),
    ("limit", TIME, limit_figure,
     "How far each entry is from what this machine could do with its graph. What stays in a cache is moved less "
     "than the limit counts, so a share above 100 % is possible."),
    ("size", SCALING, size_figure, f"Latency against pixels. {_LINEAR}"),
    ("batch", SCALING, batch_figure, "Images per second against frames per batch, one batch at a time."),
    ("memory-host", SCALING, lambda result: memory_figure(result, device=False),
     f"Highest host memory of a fresh process that ran one size only. {_LINEAR}"),
    ("memory-gpu", SCALING, lambda result: memory_figure(result, device=True),
     f"Highest GPU memory of a fresh process that ran one size only. {_LINEAR}"),
)  # fmt: skip
_LATENCY = (
    "Latencies at {shape}. Boxes: quartiles; whiskers: 5 to 95 %; dots: the rest. Below: the share of rounds that took "
    "no longer, in the same colours."
)


def draw_figures(result: BenchmarkResult) -> list[Drawn]:
    """Every figure that this result has data for. Raises :class:`MissingDependency` without matplotlib."""
    found = [Drawn(name, section, caption, draw(result)) for name, section, draw, caption in _DRAWERS]
    for shape in _smallest_batch(result):
        name, caption = f"latency-{shape.height}x{shape.width}", _LATENCY.format(shape=shape)
        found.append(Drawn(name, SCATTER, caption, latency_figure(result, shape)))
    return [drawn for drawn in found if drawn.figure is not None]


def main_png(result: BenchmarkResult) -> bytes | None:
    """Speed, and accuracy against it, in one PNG; None when nothing was timed."""
    figure = main_figure(result)
    return None if figure is None else png(figure)


def _smallest_batch(result: BenchmarkResult) -> list[Shape]:
    """One shape for each size: how latencies scatter is much the same for larger batches."""
    shapes: dict[tuple[int, int], Shape] = {}
    for shape in timed_shapes(result):
        shapes.setdefault(shape[:2], shape)
    return list(shapes.values())
