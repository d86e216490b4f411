"""The figures: what is drawn, what is left out, and that no names lie on top of each other."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Text

from hpddrnet_trt.benchmark.result import BenchmarkResult
from hpddrnet_trt.core.precisions import PRECISIONS
from hpddrnet_trt.engines import ENGINES
from hpddrnet_trt.report.benchmark_figures import (
    _ENGINE_COLORS,
    _PRECISIONS,
    Point,
    _color,
    draw_figures,
    entry_styles,
    far_apart,
    frontier,
    in_order,
    scaling_figure,
    share_text,
    speed_figure,
    time_figure,
)
from hpddrnet_trt.report.style import Named, name_points, new_figure, style
from tests.benchmark import constructed

EVERYTHING = [
    "speed", "time", "groups", "scaling", "latency-512x512", "latency-1024x1024", "latency-2048x2048",
]  # fmt: skip


def without(result: BenchmarkResult, **fields: Any) -> BenchmarkResult:
    return result.model_copy(update={"rows": [row.model_copy(update=fields) for row in result.rows]})


@pytest.mark.parametrize(
    ("fields", "gone"),
    [
        ({}, set()),
        ({"inference": []}, {"time"}),
        ({"layers": []}, {"groups"}),
        ({"end_to_end": [], "memory": []}, {"speed", "time", "scaling", *EVERYTHING[4:]}),
    ],
)
def test_what_was_not_measured_leaves_no_empty_frame(fields: dict[str, Any], gone: set[str]) -> None:
    drawn = draw_figures(without(constructed.result(constructed.KINDS[:3] + constructed.KINDS[-1:]), **fields))
    assert [figure.name for figure in drawn] == [name for name in EVERYTHING if name not in gone]


def test_panels_without_data_are_left_out() -> None:
    made = constructed.result(constructed.KINDS[:2])
    assert len(speed_figure(made).axes) == 2
    assert len(speed_figure(without(made, accuracy=None)).axes) == 1
    assert len(scaling_figure(made).axes) == 3  # no GPU memory
    assert len(scaling_figure(without(made, memory=[])).axes) == 2
    assert len(scaling_figure(without(made, end_to_end=[])).axes) == 1
    row = made.rows[0]  # nothing scales from a single size
    assert scaling_figure(without(made, end_to_end=row.end_to_end[:1], memory=row.memory[:1])) is None


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


@settings(deadline=None)
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


def test_entries_look_different() -> None:
    made = constructed.result(constructed.MANY)
    styles = entry_styles(made)
    seen = [(entry.color, entry.marker, entry.filling) for entry in styles.values()]
    assert len(set(seen)) == len(seen)
    assert styles["TensorRT-RTX BF16"].color != styles["TensorRT FP16 attention form 0 with CUDA graphs"].color
    assert styles["PyTorch FP32 compiled"].color != styles["PyTorch FP32"].color


def test_every_engine_and_precision_has_a_look_of_its_own() -> None:
    assert set(_ENGINE_COLORS) <= set(ENGINES)  # an engine that is not there is drawn in one of the other colours
    colors = [_color(f"{label} FP32", 0) for label in (*(ENGINES[name].label for name in _ENGINE_COLORS), "New")]
    assert len(set(colors)) == len(colors)
    assert {name.upper() for name in PRECISIONS} <= set(_PRECISIONS)
    assert len({marker for marker, *_ in _PRECISIONS.values()}) == len(_PRECISIONS)


def test_the_part_around_the_network_is_what_is_left_and_the_bound_a_mark() -> None:
    made = constructed.result(constructed.KINDS[:2])
    row = made.rows[0]
    network, whole = row.inference[2].p50_ms, row.end_to_end[2].p50_ms
    axes, plain = time_figure(made).axes[0], time_figure(without(made, bounds=[])).axes[0]
    (text, *_), (short, *_) = ([text.get_text() for text in one.texts] for one in (axes, plain))
    assert short.startswith(f"{network:.0f} + ")
    assert short.endswith(f"({share_text((whole - network) / whole)})")
    assert text == f"{short}, bound {share_text(88 / network)}"
    assert {tuple(line.get_xdata()) for line in axes.lines} == {(88.0, 88.0)}
    assert len(plain.lines) == 0


def test_scaling_lines_go_through_the_measured_values() -> None:
    made = constructed.result(constructed.KINDS[:2])
    axes = scaling_figure(made).axes[0]
    lines = [line for line in axes.lines if line.get_marker() not in ("None", "")]
    assert [list(line.get_xdata()) for line in lines] == [[512**2, 1024**2, 2048**2]] * 2
    expected = [timing.p50_ms for timing in made.rows[0].end_to_end if timing.batch == 1]
    assert list(lines[0].get_ydata()) == expected
    batches = [list(line.get_xdata()) for line in scaling_figure(made).axes[1].lines]
    assert batches == [[1, 4]] * 2


def test_shares_keep_a_decimal_when_small_and_parts_stand_in_the_networks_order() -> None:
    assert [share_text(value) for value in (0.0014, 0.051, 0.0996, 0.124, 1.3)] == [
        "0.1 %", "5.1 %", "10 %", "12 %", "130 %",
    ]  # fmt: skip
    assert (far_apart([1, 21]), far_apart([1, 19])) == (True, False)
    assert in_order(["other", "head", "mine", "stem", "head"]) == ["stem", "head", "other", "mine"]
