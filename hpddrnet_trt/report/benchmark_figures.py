"""The figures of a benchmark: a name, a caption and a drawing each; left out where a result has nothing to draw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hpddrnet_trt.benchmark.result import (
    BenchmarkResult,
    Row,
    Shape,
    Timing,
    at,
    main_shape,
    one_batch,
    shared_shape,
    timed_shapes,
)
from hpddrnet_trt.benchmark.timing import ratio_of_medians
from hpddrnet_trt.core.text import number
from hpddrnet_trt.engines import ENGINES
from hpddrnet_trt.graph.layers import GROUPS
from hpddrnet_trt.report.style import (
    AMBER,
    BLACK,
    BLUE,
    GREEN,
    GREY,
    INDIGO,
    NARROW,
    OCHRE,
    ORANGE,
    PALE,
    PINK,
    SKY,
    WIDTH,
    YELLOW,
    Named,
    is_narrow,
    label_axes,
    legend_below,
    logarithmic,
    name_bars,
    name_points,
    new_figure,
    panels,
    patch_legend,
    plain_numbers,
    put_title,
    style,
    value_right,
)

SPEED, TIME, SCALING = "Speed and accuracy", "Where the time goes", "Scaling and memory"  # sections of the page
FAR_APART = 20  # a slowest entry this many times the fastest leaves no room for the fastest on a linear axis
FAR = "(entries are too far apart for one axis of ms)"


class Drawn(NamedTuple):
    """``name`` is the file's, ``section`` the page's; ``caption`` says what is seen.

    Two matplotlib figures of the same: ``figure``, and ``narrow`` with its panels below each other for a telephone.
    """

    name: str
    section: str
    caption: str
    figure: Any
    narrow: Any


def draw_figures(result: BenchmarkResult) -> list[Drawn]:
    """Every figure that this result has data for. Raises :class:`MissingDependency` without matplotlib."""
    with style():
        drawn = [
            Drawn(name, section, caption, figure, draw(result, True))
            for name, section, draw, caption in _FIGURES
            if (figure := draw(result, False)) is not None
        ]
        sizes: dict[tuple[int, int], Shape] = {}
        for shape in timed_shapes(result):  # of each size the smallest batch: larger ones scatter much the same
            sizes.setdefault(shape[:2], shape)
        drawn += [
            Drawn(f"latency-{shape.height}x{shape.width}", TIME, _LATENCY.format(shape=shape),
                  latency_figure(result, shape), latency_figure(result, shape, narrow=True))
            for shape in sizes.values()
        ]  # fmt: skip
    return drawn


# -- how an entry looks ----------------------------------------------------------------------------

# Colour by engine, so that a runtime is found again in every figure.
_ENGINE_COLORS = {"torch": GREY, "onnxruntime": BLUE, "openvino": PINK, "tensorrt": GREEN, "tensorrt-rtx": ORANGE}
_COMPILED = AMBER  # PyTorch entries with "compile" in their label
_OTHERS = (OCHRE, BLACK, INDIGO)
# Marker, line and hatch by precision.
_PRECISIONS: dict[str, tuple[str, Any, str | None]] = {
    "FP32": ("o", "-", None), "FP16": ("s", "--", "//"), "BF16": ("D", "-.", "\\\\"), "INT8": ("^", ":", ".."),
    "FP8": ("v", (0, (1, 2, 4, 2)), "xx"),
}  # fmt: skip
_FILLINGS = ("full", "none", "left", "top", "right", "bottom")  # further entries of the same runtime and precision


class EntryStyle(NamedTuple):
    """Colour, matplotlib marker, line style, marker filling and hatch."""

    color: str
    marker: str
    line: Any
    filling: str
    hatch: str | None

    def point(self) -> dict[str, Any]:
        """Arguments of ``plot`` for markers that stand on each other and still show."""
        return {
            "color": self.color, "marker": self.marker, "fillstyle": self.filling, "markerfacecoloralt": "white",
            "markeredgecolor": self.color,
        }  # fmt: skip


def entry_styles(result: BenchmarkResult) -> dict[str, EntryStyle]:
    """By label; two are the same only when a runtime and precision has more than six entries."""
    styles: dict[str, EntryStyle] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for place, row in enumerate(result.rows):
        color = _color(row.label, place)
        marker, line, hatch = _PRECISIONS.get(row.precision or "", ("P", "-", None))
        filling = _FILLINGS[seen[color, marker] % len(_FILLINGS)]
        seen[color, marker] += 1
        styles[row.label] = EntryStyle(color, marker, line, filling, hatch)
    return styles


def _color(label: str, place: int) -> str:
    """Of the engine whose name the label begins with, the longest one counts."""
    engines = [name for name, kind in ENGINES.items() if label.startswith(kind.label) and name in _ENGINE_COLORS]
    if not engines:
        return _OTHERS[place % len(_OTHERS)]
    engine = max(engines, key=lambda name: len(ENGINES[name].label))
    return _COMPILED if engine == "torch" and "compile" in label else _ENGINE_COLORS[engine]


# -- speed and accuracy ----------------------------------------------------------------------------

_RANGE = 8  # speeds farther apart than this are drawn on a logarithmic axis


class Point(NamedTuple):
    """An entry in the plane of speed (images/s) and accuracy (%)."""

    row: Row
    speed: float
    accuracy: float


def speed_figure(result: BenchmarkResult, narrow: bool = False) -> Any | None:
    """Left: images per second. Right, where it was measured: mIoU, or agreement without masks, against them."""
    shape = main_shape(result)
    if shape is None:
        return None
    timed = [(row, timing) for row in result.measured if (timing := at(row.end_to_end, shape)) is not None]
    by_miou = any(row.accuracy is not None and row.accuracy.miou is not None for row in result.measured)
    points = [
        Point(row, timing.images_per_s, 100 * value)
        for row, timing in timed
        if row.accuracy and (value := row.accuracy.miou if by_miou else row.accuracy.agreement) is not None
    ]
    bars = max(2.6, 1.2 + 0.42 * len(timed))
    if not points:
        figure = new_figure(NARROW if narrow else WIDTH, bars)
        axes = [figure.subplots()]
    elif narrow:
        figure = new_figure(NARROW, bars + 4.6)
        axes = figure.subplots(2, 1, height_ratios=(bars, 4.6))
    else:
        figure = new_figure(13.6, max(4.8, bars))
        axes = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _draw_bars(axes[0], timed, result)
    put_title(axes[0], f"Speed, end to end, {shape}")
    if points:
        kind = "mIoU" if by_miou else "agreement with the reference"
        label_axes(axes[1], f"Accuracy against speed, {shape}", "images/s, one at a time (right is better)",
                   f"{kind}, % (up is better)")  # fmt: skip
        _draw_plane(axes[1], points, entry_styles(result))
    return figure


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in one measure without losing in the other, slowest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (-point.speed, -point.accuracy)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    return best[::-1]


def _draw_bars(axes: Any, timed: Sequence[tuple[Row, Timing]], result: BenchmarkResult) -> None:
    styles = entry_styles(result)
    for place, (row, timing) in enumerate(timed):
        axes.barh(place, timing.images_per_s, color=styles[row.label].color, edgecolor="white", height=0.72,
                  hatch=styles[row.label].hatch)  # fmt: skip
        ratio = "  reference" if row.label == result.reference else ""
        if timing.ratio is not None and row.label != result.reference:
            ratio = f"  {number(timing.ratio.value)}×{' (wide)' if timing.ratio.wide else ''}"
        value_right(axes, timing.images_per_s, place, f"{number(timing.images_per_s)}{ratio}")
    name_bars(axes, [row.label for row, _ in timed])
    room = 1.75 if is_narrow(axes) else 1.32
    axes.set_xlim(0, room * max(timing.images_per_s for _, timing in timed))
    axes.set_xlabel("images/s, one at a time (right is better)")


def _draw_plane(axes: Any, points: Sequence[Point], styles: Mapping[str, EntryStyle]) -> None:
    speeds, values = [point.speed for point in points], [point.accuracy for point in points]
    middle, half = (max(values) + min(values)) / 2, max(0.25, 0.75 * (max(values) - min(values)))
    axes.set_ylim(middle - half, middle + half)
    if max(speeds) > _RANGE * min(speeds):
        axes.set_xlim(min(speeds) / 1.6, max(speeds) * 1.6)
        logarithmic(axes)
    else:
        axes.set_xlim(0, 1.15 * max(speeds))
    best = frontier(points)
    line = [(axes.get_xlim()[0], best[0].accuracy)]
    for point in best:
        line += [(line[-1][0], point.accuracy), (point.speed, point.accuracy)]
    line.append((best[-1].speed, middle - half))
    axes.plot(*zip(*line, strict=True), color=PALE, linewidth=1.4, zorder=1.5)
    for point in points:
        axes.plot(point.speed, point.accuracy, linestyle="none", markersize=9, zorder=4,
                  **styles[point.row.label].point())  # fmt: skip
    named = [Named(speed, accuracy, row.label, styles[row.label].color) for row, speed, accuracy in points]
    name_points(axes, named, line)


# -- where the time goes ---------------------------------------------------------------------------

# Neighbours far apart; hatched in the second turn.
_PART_COLORS = (INDIGO, SKY, BLUE, YELLOW, GREEN, ORANGE, PINK, AMBER)
_HATCHED = {"facecolor": "white", "hatch": "////"}


def time_figure(result: BenchmarkResult, narrow: bool = False) -> Any | None:
    """Median end-to-end latency, split into inference and everything around it, with the roofline bound as a mark."""
    shape = shared_shape([row.inference for row in result.measured])
    rows = [
        (row, alone.p50_ms, _around(whole, alone, result.settings.seed))
        for row in result.measured
        if shape is not None
        and (alone := at(row.inference, shape)) is not None
        and (whole := at(row.end_to_end, shape)) is not None
    ]
    if shape is None or not rows:
        return None
    styles, totals = entry_styles(result), [inference + around for _, inference, around in rows]
    shares, bounded = far_apart(totals), False
    figure = _bar_figure(len(rows), 1.7, narrow)
    axes = figure.subplots()
    for place, ((row, inference, around), total) in enumerate(zip(rows, totals, strict=True)):
        scale, color = 100 / total if shares else 1.0, styles[row.label].color
        axes.barh(place, scale * inference, color=color, height=0.7)
        axes.barh(place, scale * around, left=scale * inference, height=0.7, edgecolor=color, **_HATCHED)
        share = "" if narrow else f" ({share_text(around / total)})"
        both = f"{number(inference)} + {number(around)} ms{share}"
        text = both if around else f"{number(inference)} ms"
        bound, end = at(row.bounds, shape), scale * total
        if bound is not None:
            bounded, mark = True, scale * bound.milliseconds
            axes.plot([mark, mark], [place - 0.4, place + 0.4], color="white", linewidth=4.5, solid_capstyle="butt")
            axes.plot([mark, mark], [place - 0.4, place + 0.4], color=BLACK, linewidth=2.2, solid_capstyle="butt")
            text += f", bound {share_text(bound.milliseconds / inference)}"
            end = max(end, mark)
        value_right(axes, end, place, text)
    _finish_bars(axes, [row for row, *_ in rows], shares, totals, room=1.95 if bounded else 1.55)
    put_title(axes, f"Inference, and what is around it, {shape}")
    patch_legend(figure, [
        ("inference", {"facecolor": GREY}),
        ("copies, pre- and post-processing, Python", {**_HATCHED, "edgecolor": GREY}),
        *([("roofline bound, and its share of the inference", {"facecolor": BLACK})] if bounded else []),
    ])  # fmt: skip
    return figure


def groups_figure(result: BenchmarkResult, narrow: bool = False) -> Any | None:
    """Time by part of the network from each runtime's profiler, one stacked bar per entry, in the network's order."""
    shape = shared_shape([row.layers for row in result.measured])
    rows = [
        (row, times.groups)
        for row in result.measured
        if shape is not None and (times := at(row.layers, shape)) is not None and sum(times.groups.values()) > 0
    ]
    if not rows:
        return None
    order = in_order(name for _, groups in rows for name in groups)
    parts = {name: _part_style(name) for name in order}
    totals = [sum(groups.values()) for _, groups in rows]
    shares = far_apart(totals)
    figure = _bar_figure(len(rows), 1.7 + 0.22 * (len(order) / (2 if narrow else 3)), narrow)
    axes = figure.subplots()
    for place, ((_, groups), total) in enumerate(zip(rows, totals, strict=True)):
        left, scale = 0.0, 100 / total if shares else 1.0
        for name in order:
            width = scale * groups.get(name, 0.0)
            axes.barh(place, width, left=left, height=0.7, linewidth=0.6, **parts[name])
            left += width
        value_right(axes, left, place, f"{number(total)} ms")
    _finish_bars(axes, [row for row, _ in rows], shares, totals)
    put_title(axes, f"Time by part of the network, {shape}")
    patch_legend(figure, parts.items())
    return figure


def in_order(names: Iterable[str]) -> list[str]:
    """Parts in the network's order; names that are no parts come last."""
    known = set(names)
    return [*(name for name in GROUPS if name in known), *sorted(known - set(GROUPS))]


def share_text(share: float) -> str:
    """Percent of a fraction, with a decimal below ten."""
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.1f} %"


def far_apart(values: Sequence[float]) -> bool:
    """Whether the smallest of these bars would vanish on a linear axis."""
    return max(values) > FAR_APART * max(min(values), 1e-9)


def _around(whole: Timing, alone: Timing, seed: int) -> float:
    """Milliseconds around the network; 0 where the two medians, which are of different rounds, do not differ."""
    ratio = ratio_of_medians(whole.by_round, alone.by_round, paired=False, seed=seed)
    differ = ratio.low is None or ratio.low > 1
    return max(0.0, whole.p50_ms - alone.p50_ms) if differ else 0.0


def _part_style(name: str) -> dict[str, Any]:
    """The same in every report: by the place in the network; grey for what is no part."""
    if name not in GROUPS[:-2]:
        return {"facecolor": PALE if name == GROUPS[-2] else GREY, "edgecolor": "white"}
    turn, index = divmod(GROUPS.index(name), len(_PART_COLORS))
    return {"facecolor": _PART_COLORS[index], "edgecolor": "white", "hatch": "///" if turn else None}


def _bar_figure(entries: int, extra: float, narrow: bool) -> Any:
    """A figure with a bar's height for each entry; ``extra``: inches for title, axis and legend."""
    return new_figure(NARROW if narrow else WIDTH, max(2.6, extra + 0.4 * entries))


def _finish_bars(axes: Any, rows: Sequence[Row], shares: bool, totals: Sequence[float], room: float = 1.45) -> None:
    """``room``: width of the axes over that of the longest bar, for the texts beside them."""
    name_bars(axes, [row.label for row in rows])
    room *= 1.4 if is_narrow(axes) else 1
    axes.set_xlim(0, room * (100 if shares else max(totals)))
    axes.set_xlabel(f"% of the entry's own time {FAR}" if shares else "ms")
    if shares:
        axes.set_xticks(range(0, 101, 20))


# -- latencies -------------------------------------------------------------------------------------

_LATENCY = (
    "Latencies at {shape}. Boxes: quartiles; whiskers: 5 to 95 %; dots: the rest. Below: the share of rounds that took "
    "no longer, in the same colours."
)
_LATENCY_RANGE = 4  # latencies farther apart than this are drawn on a logarithmic axis


def latency_figure(result: BenchmarkResult, shape: Shape, narrow: bool = False) -> Any:
    """Above: box plots of the end-to-end latencies. Below: their cumulative distribution, same colours and axis.

    Latencies too far apart for one axis are drawn relative to each entry's own median.
    """
    timed = [(row.label, timing) for row in result.measured if (timing := at(row.end_to_end, shape)) is not None]
    medians, styles = [timing.p50_ms for _, timing in timed], entry_styles(result)
    relative = far_apart(medians)
    samples = [np.asarray(timing.samples_ms) * (100 / timing.p50_ms if relative else 1) for _, timing in timed]
    boxes = 0.5 + 0.36 * len(timed)
    figure = new_figure(NARROW if narrow else WIDTH, boxes + 2.9)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(boxes, 2.1))
    parts = above.boxplot(
        samples, positions=range(len(timed)), orientation="horizontal", whis=(5, 95), patch_artist=True, widths=0.62,
        medianprops={"color": BLACK, "linewidth": 1.8},
        flierprops={"marker": ".", "markersize": 4, "markerfacecolor": GREY, "markeredgecolor": "none"},
    )  # fmt: skip
    for (label, _), values, box in zip(timed, map(np.sort, samples), parts["boxes"], strict=True):
        color = styles[label].color
        box.set(facecolor=color, edgecolor=color)
        below.step(np.concatenate([values[:1], values]), np.linspace(0, 100, len(values) + 1), where="post",
                   linewidth=1.7, color=color, linestyle=styles[label].line)  # fmt: skip
    name_bars(above, [label for label, _ in timed])
    put_title(above, f"End-to-end latency, {shape}")
    if not relative and max(medians) > _LATENCY_RANGE * min(medians):
        logarithmic(below)
    below.set_ylabel("rounds at or below, %")
    below.set_ylim(0, 103)
    unit = "ms per frame" if shape.batch == 1 else f"ms per batch of {shape.batch}"
    below.set_xlabel(f"% of the entry's own median {FAR}" if relative else unit)
    return figure


# -- scaling ---------------------------------------------------------------------------------------


class Curves(NamedTuple):
    """A panel: a line per entry, on logarithmic axes. ``ticks``: by place on the x axis what is written there."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    ticks: Mapping[float, str]
    slope: bool = True  # faint lines along which it grows linearly with the pixels


def scaling_figure(result: BenchmarkResult, narrow: bool = False) -> Any | None:
    """How latency, rate and memory grow with the frame and with the batch; None with one size and batch."""
    drawn = [panel for panel in scaling_curves(result) if max(map(len, panel.lines.values()), default=0) > 1]
    if not drawn:
        return None
    styles, columns = entry_styles(result), 1 if narrow else min(2, len(drawn))
    legend = (0.25 if narrow else 0.12) * len(result.measured) / -(-len(drawn) // columns)
    figure, grid = panels(len(drawn), NARROW if narrow else WIDTH if columns == 1 else 6.8, 3.7 + legend,
                          columns=columns)  # fmt: skip
    for axes, panel in zip(grid, drawn, strict=True):
        for label, line in panel.lines.items():
            axes.plot(*zip(*line, strict=True), linestyle=styles[label].line, linewidth=1.5, markersize=6, label=label,
                      **styles[label].point())  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
        places = sorted(panel.ticks)
        axes.set_xticks(places, [panel.ticks[place] for place in places], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_xlim(places[0] / 1.15, places[-1] * 1.15)
        if panel.slope:
            _draw_slopes(axes)
        label_axes(axes, panel.title, panel.x, panel.y)
    legend_below(figure, *grid, columns=1 if narrow else 2 * columns)
    return figure


def scaling_curves(result: BenchmarkResult) -> list[Curves]:
    """The panels, also those with too little to draw."""
    curves: list[Curves] = []
    shape, of_memory = main_shape(result), shared_shape([row.memory for row in result.measured])
    rows = result.measured
    if shape is not None:
        unit = "ms per frame" if shape.batch == 1 else f"ms per batch of {shape.batch}"
        timed = {row.label: one_batch(row.end_to_end, shape.batch) for row in rows}
        curves.append(_by_size("End-to-end latency", unit, timed, lambda timing: timing.p50_ms))
        batches = {
            row.label: sorted((float(timing.batch), timing.images_per_s) for timing in row.end_to_end
                              if timing.shape[:2] == shape[:2])
            for row in rows
        }  # fmt: skip
        ticks = {place: f"{place:g}" for line in batches.values() for place, _ in line}
        curves.append(Curves(f"Images/s, end to end, {shape.size}", "frames per batch", "images/s, one batch at a time",
                             {label: line for label, line in batches.items() if line}, ticks, slope=False))  # fmt: skip
    if of_memory is not None:
        records = {row.label: one_batch(row.memory, of_memory.batch) for row in rows}
        curves.append(_by_size("Peak host memory", "MiB", records, lambda record: record.host_peak_mib))
        curves.append(_by_size("Peak GPU memory", "MiB", records, lambda record: record.device_mib))
    return curves


def _by_size(
    title: str, unit: str, records: Mapping[str, Sequence[Any]], value: Callable[[Any], float | None]
) -> Curves:
    """Against the pixels of a frame; what a logarithmic axis cannot show is left out."""
    lines: dict[str, list[tuple[float, float]]] = {}
    ticks: dict[float, str] = {}
    for label, sizes in records.items():
        for record in sizes:
            measured = value(record)
            if measured is not None and measured > 0:
                place = float(record.shape.pixels)
                lines.setdefault(label, []).append((place, measured))
                ticks[place] = record.shape.size
    return Curves(f"{title} against image size", "size of a frame", unit, lines, ticks)


def _draw_slopes(axes: Any) -> None:
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    starts: Sequence[float] = np.geomspace(low * left / right, high, 8).tolist()
    for place, start in enumerate(starts):
        axes.plot([left, right], [start, start * right / left], color=PALE, linewidth=0.9, linestyle=(0, (6, 4)),
                  zorder=1, label="slope 1: grows linearly with the pixels" if place == 0 else None)  # fmt: skip
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)


_FIGURES: tuple[tuple[str, str, Callable[[BenchmarkResult, bool], Any | None], str], ...] = (
    ("speed", SPEED, speed_figure,
     "Images per second with the speed-up over the reference, and accuracy against them. Nobody is right of or above "
     "the line: entries on it are worth choosing from, the others are beaten."),
    ("time", TIME, time_figure,
     "What lies around the network: the median end-to-end latency minus the median inference latency, left out "
     "where the two do not differ. They were timed in different rounds, so a few per cent may be drift."),
    ("groups", TIME, groups_figure,
     "Time by part of the network, from each runtime's own profiler; layers are timed one by one, so sums are more "
     "than an undisturbed run."),
    ("scaling", SCALING, scaling_figure,
     "Latency and peak memory of a fresh process against the size of a frame, and rate against the batch. Along the "
     "dashed lines they grow linearly with the pixels."),
)  # fmt: skip
