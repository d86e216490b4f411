"""The figures: what is drawn, what is left out, and that no names lie on top of each other."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Text

from hpddrnet_trt.benchmark.result import BenchmarkResult
from hpddrnet_trt.report.bars import far_apart, share_text
from hpddrnet_trt.report.benchmark_figures import draw_figures, main_png
from hpddrnet_trt.report.figure_labels import Named, _spread, name_points
from hpddrnet_trt.report.looks import looks
from hpddrnet_trt.report.parts import in_order, limit_figure, overhead_figure
from hpddrnet_trt.report.scaling import memory_figure, size_figure
from hpddrnet_trt.report.speed import Point, frontier
from hpddrnet_trt.report.style import new_figure, style
from tests.benchmark import constructed

EVERYTHING = [
    "speed", "pareto", "overhead", "groups", "limit", "size", "batch", "memory-host", "memory-gpu",
    "latency-512x512", "latency-1024x1024", "latency-2048x2048",
]  # fmt: skip


def without(result: BenchmarkResult, **fields: Any) -> BenchmarkResult:
    return result.model_copy(update={"rows": [row.model_copy(update=fields) for row in result.rows]})


def texts_of(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_a_figure_for_everything_that_was_measured() -> None:
    assert [drawn.name for drawn in draw_figures(constructed.result())] == EVERYTHING


@pytest.mark.parametrize(
    ("fields", "gone"),
    [
        ({"accuracy": None}, {"pareto"}),
        ({"network": []}, {"overhead"}),
        ({"layers": []}, {"groups"}),
        ({"roofs": []}, {"limit"}),
        ({"memory": []}, {"memory-host", "memory-gpu"}),
        ({"timings": []}, {"speed", "pareto", "overhead", "size", "batch", *(name for name in EVERYTHING if "-" in name
                                                                            and name.startswith("latency"))}),
    ],
)  # fmt: skip
def test_what_was_not_measured_leaves_no_empty_frame(fields: dict[str, Any], gone: set[str]) -> None:
    drawn = draw_figures(without(constructed.result(constructed.KINDS[:3] + constructed.KINDS[-1:]), **fields))
    assert [found.name for found in drawn] == [name for name in EVERYTHING if name not in gone]


def test_nothing_scales_from_a_single_size() -> None:
    made = constructed.result()
    row = made.rows[0]
    single = without(made, timings=row.timings[:1], memory=row.memory[:1])
    assert {"size", "batch", "memory-host", "memory-gpu"}.isdisjoint(drawn.name for drawn in draw_figures(single))
    assert main_png(without(made, timings=[])) is None


@pytest.mark.parametrize("kinds", [constructed.KINDS, constructed.MANY], ids=["few", "many"])
def test_no_texts_overlap_and_none_is_cut_off(kinds: tuple[constructed.Kind, ...]) -> None:
    for drawn in draw_figures(constructed.result(kinds)):
        figure = drawn.figure
        figure.draw_without_rendering()
        whole = figure.bbox.padded(2)
        for axes in figure.axes:
            ticks = axes.get_yticklabels() + axes.get_xticklabels()
            shown = [text for text in [*axes.texts, *ticks, axes.title, axes.xaxis.label, axes.yaxis.label]
                     if text.get_text() and text.get_visible()]  # fmt: skip
            boxes = [(text.get_text(), extent(text)) for text in shown if in_view(axes, text)]
            for text, box in boxes:
                assert whole.contains(box.x0, box.y0), (drawn.name, text)
                assert whole.contains(box.x1, box.y1), (drawn.name, text)
            for (text, box), (other, second) in combinations(boxes, 2):
                assert not box.overlaps(second), (drawn.name, text, other)


def extent(text: Any) -> Any:
    """Of the letters, without the line that an annotation has to its point."""
    return Text.get_window_extent(text).padded(-1)


def in_view(axes: Any, text: Any) -> bool:
    """Not a label of a tick outside the axes' limits, which is not drawn."""
    for part, axis in enumerate((axes.xaxis, axes.yaxis)):
        if text in axis.get_ticklabels():
            low, high = sorted(axis.get_view_interval())
            return bool(low <= text.get_position()[part] <= high)
    return True


@settings(max_examples=5, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=14))
def test_names_of_points_anywhere_never_overlap(places: list[tuple[float, float]]) -> None:
    with style():
        figure = new_figure(7.6, 5.4)
        axes = figure.subplots()
        named = [Named(x, y, f"a rather long name of entry {index}", "black") for index, (x, y) in enumerate(places)]
        boxes = [extent(text) for text in name_points(axes, named, places[:2])]
    assert not any(first.overlaps(second) for first, second in combinations(boxes, 2))
    assert all(axes.get_window_extent().padded(1).contains(box.x0, box.y1) for box in boxes)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 0.06)), min_size=1, max_size=14))
def test_a_column_of_names_keeps_its_order_and_stays_inside(wanted: list[tuple[float, float]]) -> None:
    wanted.sort(reverse=True)
    heights = np.array([height for _, height in wanted])
    middles = _spread(np.array([place for place, _ in wanted]), heights)
    tops, bottoms = middles + heights / 2, middles - heights / 2
    assert np.all(bottoms[:-1] >= tops[1:] - 1e-9)
    assert tops[0] <= 1 + 1e-9
    assert bottoms[-1] >= -1e-9
    if np.all(np.diff(np.array([place for place, _ in wanted])) < -0.06) and 0.03 < wanted[-1][0] < wanted[0][0] < 0.97:
        assert middles == pytest.approx([place for place, _ in wanted])  # nobody in the way: nobody moves


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=12))
def test_the_frontier_is_what_nobody_beats(values: list[tuple[int, int]]) -> None:
    row = constructed.result(constructed.KINDS[:1]).rows[0]
    points = [Point(row, speed, accuracy) for speed, accuracy in values]
    best = frontier(points)
    assert [point.speed for point in best] == sorted({point.speed for point in best})
    for point in points:
        beaten = any(
            other.speed >= point.speed and other.accuracy >= point.accuracy and other[1:] != point[1:]
            for other in points
        )
        assert (point[1:] in [found[1:] for found in best]) != beaten


def test_parts_stand_in_the_networks_order() -> None:
    assert in_order(["other", "head", "mine", "stem", "head"]) == ["stem", "head", "other", "mine"]


def test_entries_look_different() -> None:
    made = constructed.result(constructed.MANY)
    look = looks(made)
    found = [(entry.colour, entry.marker, entry.filling) for entry in look.values()]
    assert len(set(found)) == len(found)
    assert look["TensorRT-RTX BF16"].colour != look["TensorRT FP16 attention form 0 with CUDA graphs"].colour
    assert look["PyTorch FP32 compiled"].colour != look["PyTorch FP32"].colour


def test_the_part_around_the_network_is_what_is_left() -> None:
    made = constructed.result(constructed.KINDS[:2])
    row = made.rows[0]
    network, whole = row.network[2].p50_ms, row.timings[2].p50_ms
    texts = texts_of(overhead_figure(made).axes[0])
    assert texts[0].startswith(f"{network:.0f} + ")
    assert texts[0].endswith(f"({share_text((whole - network) / whole)})")


def test_the_limit_is_a_share_of_the_time_of_the_network_or_says_of_what() -> None:
    made = constructed.result(constructed.KINDS[:2])
    measured = made.rows[0].network[2].p50_ms
    assert texts_of(limit_figure(made).axes[0])[0] == f"{8800 / measured:.0f} % (88.0 of {measured:.0f} ms)"
    assert "frame to labels" in texts_of(limit_figure(without(made, network=[])).axes[0])[0]


def test_scaling_lines_go_through_the_measured_values() -> None:
    made = constructed.result(constructed.KINDS[:2])
    lines = [line for line in size_figure(made).axes[0].lines if line.get_marker() not in ("None", "")]
    assert [list(line.get_xdata()) for line in lines] == [[512**2, 1024**2, 2048**2]] * 2
    expected = [timing.p50_ms for timing in made.rows[0].timings if timing.batch == 1]
    assert list(lines[0].get_ydata()) == expected
    assert memory_figure(made, device=True) is None


def test_shares_keep_a_decimal_when_small() -> None:
    assert [share_text(value) for value in (0.0014, 0.051, 0.0996, 0.124, 1.3)] == [
        "0.1 %", "5.1 %", "10 %", "12 %", "130 %",
    ]  # fmt: skip
    assert far_apart([1, 21])
    assert not far_apart([1, 19])
