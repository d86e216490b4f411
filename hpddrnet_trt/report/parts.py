"""Where the time goes: around the network, along it, and above what the machine could do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hpddrnet_trt.benchmark.result import BenchmarkResult, Row, Timing
from hpddrnet_trt.benchmark.shapes import Shape, at, shared_shape
from hpddrnet_trt.benchmark.timing import ratio_of_medians
from hpddrnet_trt.core.text import number
from hpddrnet_trt.graph.layers import GROUPS
from hpddrnet_trt.report.bars import FAR, bar_figure, far_apart, name_bars, share_text, value_right
from hpddrnet_trt.report.looks import looks
from hpddrnet_trt.report.style import logarithmic, style

# Okabe and Ito's colours with Tol's indigo instead of black, neighbours far apart; hatched in the second turn.
_COLOURS = ("#332288", "#56B4E9", "#0072B2", "#F0E442", "#009E73", "#D55E00", "#CC79A7", "#E69F00")
_LIMIT = "#111111"


def overhead_figure(result: BenchmarkResult) -> Any | None:
    """Median latency from frame to labels, split into the network and everything around it."""
    shape = shared_shape([row.network for row in result.measured])
    rows = [
        (row, alone.p50_ms, _around(whole, alone, result.settings.seed))
        for row in result.measured
        if shape is not None
        and (alone := at(row.network, shape)) is not None
        and (whole := at(row.timings, shape)) is not None
    ]
    if not rows:
        return None
    look = looks(result)
    shares = far_apart([network + around for _, network, around in rows])
    with style():
        figure = bar_figure(len(rows), 1.7)
        axes = figure.subplots()
        for place, (row, network, around) in enumerate(rows):
            scale = 100 / (network + around) if shares else 1.0
            axes.barh(place, scale * network, color=look[row.label].colour, height=0.7)
            axes.barh(place, scale * around, left=scale * network, facecolor="white", height=0.7,
                      edgecolor=look[row.label].colour, hatch="////")  # fmt: skip
            share = share_text(around / (network + around))
            text = f"{number(network)} + {number(around)} ms ({share})" if around else f"{number(network)} ms"
            value_right(axes, scale * (network + around), place, text)
        _finish(axes, [row for row, _, _ in rows], shares, [network + around for _, network, around in rows])
        axes.set_title(f"Network only, and what is around it, {shape}")
        _legend(figure, [
            ("network only", {"facecolor": "#6b7580"}),
            ("copies, pre- and post-processing, Python",
             {"facecolor": "white", "edgecolor": "#6b7580", "hatch": "////"}),
        ])  # fmt: skip
    return figure


def groups_figure(result: BenchmarkResult) -> Any | None:
    """Time by part of the network from each runtime's profiler, one stacked bar per entry, in the network's order."""
    shape = shared_shape([row.layers for row in result.measured])
    rows = [
        (row, found.groups)
        for row in result.measured
        if shape is not None and (found := at(row.layers, shape)) is not None and sum(found.groups.values()) > 0
    ]
    if not rows:
        return None
    order = in_order(name for _, groups in rows for name in groups)
    looks_of = {name: _part_look(name) for name in order}
    sums = [sum(groups.values()) for _, groups in rows]
    shares = far_apart(sums)
    with style():
        figure = bar_figure(len(rows), 1.7 + 0.22 * (len(order) / 3))
        axes = figure.subplots()
        for place, ((_, groups), total) in enumerate(zip(rows, sums, strict=True)):
            left, scale = 0.0, 100 / total if shares else 1.0
            for name in order:
                width = scale * groups.get(name, 0.0)
                axes.barh(place, width, left=left, height=0.7, linewidth=0.6, **looks_of[name])
                left += width
            value_right(axes, left, place, f"{number(total)} ms")
        _finish(axes, [row for row, _ in rows], shares, sums)
        axes.set_title(f"Time by part of the network, {shape}")
        _legend(figure, [(name, looks_of[name]) for name in order])
    return figure


def limit_figure(result: BenchmarkResult) -> Any | None:
    """Measured time of the network as bars, the least time that this machine can need as a mark on them."""
    shape = shared_shape([row.roofs for row in result.measured])
    rows = [
        (row, measured, roof.floor_ms, of_network)
        for row in result.measured
        if shape is not None
        and (roof := at(row.roofs, shape)) is not None
        and (time := _network_time(row, shape)) is not None
        for measured, of_network in [time]
    ]
    if not rows:
        return None
    look = looks(result)
    values = [value for _, measured, floor, _ in rows for value in (measured, floor)]
    with style():
        figure = bar_figure(len(rows), 1.6)
        axes = figure.subplots()
        if far_apart(values):
            left = min(values) / 2
            axes.set_xlim(left, max(values) * (max(values) / left) ** 0.5)  # a third of the width for the texts
            logarithmic(axes)
        else:
            axes.set_xlim(0, 1.35 * max(values))
        for place, (row, measured, floor, of_network) in enumerate(rows):
            axes.barh(place, measured, color=look[row.label].colour, height=0.62)
            axes.plot([floor, floor], [place - 0.4, place + 0.4], color="white", linewidth=4.5, solid_capstyle="butt")
            axes.plot([floor, floor], [place - 0.4, place + 0.4], color=_LIMIT, linewidth=2.2, solid_capstyle="butt")
            mark = "" if of_network else ", frame to labels"
            value_right(axes, max(measured, floor), place,
                        f"{share_text(floor / measured)} ({number(floor)} of {number(measured)} ms{mark})")  # fmt: skip
        name_bars(axes, [row.label for row, *_ in rows])
        axes.set_xlabel("ms")
        axes.set_title(f"Network only, and the limit of this machine, {shape}")
        _legend(figure, [("measured, network only", {"facecolor": "#6b7580"}),
                         ("limit of this machine, and its share of the time", {"facecolor": _LIMIT})])  # fmt: skip
    return figure


def in_order(names: Iterable[str]) -> list[str]:
    """Parts in the network's order; names that are no parts come last."""
    found = set(names)
    return [*(name for name in GROUPS if name in found), *sorted(found - set(GROUPS))]


def _around(whole: Timing, alone: Timing, seed: int) -> float:
    """Milliseconds around the network; 0 where the two medians, which are of different rounds, do not differ."""
    found = ratio_of_medians(whole.samples_ms, alone.samples_ms, paired=False, seed=seed)
    differ = found.low is None or found.low > 1
    return max(0.0, whole.p50_ms - alone.p50_ms) if differ else 0.0


def _network_time(row: Row, shape: Shape) -> tuple[float, bool] | None:
    """Median ms of the network alone, else from frame to labels; the flag says which."""
    for timings, of_network in ((row.network, True), (row.timings, False)):
        found = at(timings, shape)
        if found is not None:
            return found.p50_ms, of_network
    return None


def _part_look(name: str) -> dict[str, Any]:
    """The same in every report: by the place in the network; grey for what is no part."""
    if name not in GROUPS[:-2]:
        return {"facecolor": "#c9ced4" if name == GROUPS[-2] else "#7d8791", "edgecolor": "white"}
    turn, index = divmod(GROUPS.index(name), len(_COLOURS))
    return {"facecolor": _COLOURS[index], "edgecolor": "white", "hatch": "///" if turn else None}


def _finish(axes: Any, rows: Sequence[Row], shares: bool, totals: Sequence[float]) -> None:
    name_bars(axes, [row.label for row in rows])
    axes.set_xlim(0, 1.45 * (100 if shares else max(totals)))
    axes.set_xlabel(f"% of the entry's own time {FAR}" if shares else "ms")
    if shares:
        axes.set_xticks(range(0, 101, 20))


def _legend(figure: Any, entries: Sequence[tuple[str, dict[str, Any]]]) -> None:
    from matplotlib.patches import Patch

    figure.legend(handles=[Patch(label=name, **look) for name, look in entries], loc="outside lower center",
                  ncols=min(3, len(entries)), fontsize=9)  # fmt: skip
