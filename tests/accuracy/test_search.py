"""Ranking and search on a network whose accuracy and cost are known by formula; then their pictures and texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hpddrnet_trt.accuracy.acceptance import Budget
from hpddrnet_trt.accuracy.search import Frontier, analyze, search
from hpddrnet_trt.report.precision import draw_frontier, draw_sensitivity
from tests.accuracy.fakes import FakeCache, FakeCost

Layers = dict[str, tuple[float, float]]  # harm, milliseconds more in floating point
layers = st.dictionaries(
    st.sampled_from([f"backbone.stem.{index}.conv/Conv" for index in range(16)]),
    st.tuples(st.floats(0, 0.02), st.floats(0.01, 1.0)),
    min_size=1,
)


def find(found: Layers, budget: Budget, rounding: float = 0.0) -> tuple[Frontier, FakeCache]:
    cache = FakeCache({name: harm for name, (harm, _) in found.items()}, rounding)
    cost = FakeCost({name: slower for name, (_, slower) in found.items()})
    ranking = analyze(cache, progress=False)  # type: ignore[arg-type]
    return search(cache, ranking, budget, cost, progress=False), cache  # type: ignore[arg-type]


@given(layers, st.floats(0, 30))
def test_the_budget_holds_and_nothing_measured_is_faster(found: Layers, drop: float) -> None:
    budget = Budget(max_miou_drop=drop)
    frontier, _ = find(found, budget)
    assert frontier.chosen is not None  # everything in floating point loses nothing
    assert budget.kept_by(frontier.chosen.accuracy)
    for point in frontier.points:
        if budget.kept_by(point.accuracy):
            assert frontier.chosen.milliseconds <= point.milliseconds
    assert [point.milliseconds for point in frontier.points] == sorted(p.milliseconds for p in frontier.points)


@given(layers, st.floats(0, 30))
def test_no_single_layer_more_can_be_quantised(found: Layers, drop: float) -> None:
    """Local optimum: of the last dozen layers left in floating point each is needed for the budget."""
    budget = Budget(max_miou_drop=drop)
    frontier, cache = find(found, budget)
    assert frontier.chosen is not None
    if len(frontier.chosen.floating) <= 12:
        for name in frontier.chosen.floating:
            low = [layer for layer in found if layer not in frontier.chosen.floating or layer == name]
            assert not budget.kept_by(cache.measure(low, half=True))


@pytest.mark.parametrize(
    ("found", "budget", "rounding", "floating"),
    [
        # Of two equally harmful layers the one that is cheap in floating point returns first.
        ({"dear": (0.01, 1.0), "cheap": (0.01, 0.1), "harmless": (0.0, 0.5)}, Budget(1.2), 0, ("cheap",)),
        ({"a": (0.004, 0.1), "b": (0.001, 0.1)}, Budget(min_agreement=0.998), 0, ("a",)),
        ({"a": (0.01, 0.1), "b": (0.01, 0.1)}, Budget(0.5), 0.006, None),  # rounding to FP16 alone is too much
        ({**{f"layer{index}": (0.0001, 0.1) for index in range(60)}, "bad": (0.05, 0.1)}, Budget(1.0), 0, ("bad",)),
    ],
)
def test_what_is_chosen(found: Layers, budget: Budget, rounding: float, floating: tuple[str, ...] | None) -> None:
    frontier, cache = find(found, budget, rounding)
    assert (None if frontier.chosen is None else frontier.chosen.floating) == floating
    assert ("<- chosen" in frontier.text()) == (floating is not None)
    assert len(cache.measured) < len(found) + 1 + 20  # the ranking, everything, the search


@pytest.fixture(scope="module")
def example() -> tuple[Frontier, FakeCache]:
    found = {f"backbone.stem.{index}.conv1.conv/Conv": (0.0004 * index**2, 0.1 + 0.02 * index) for index in range(12)}
    return find(found, Budget(max_miou_drop=3.0))


def test_texts_and_records(example: tuple[Frontier, FakeCache]) -> None:
    frontier, cache = example
    text = frontier.text()
    assert text.count("<- chosen") == 1
    assert "at most 3 points of masked mIoU lost" in text
    assert frontier.chosen is not None
    assert f"in FP16: {', '.join(f'stem.{n.split(chr(46))[2]}.conv1' for n in frontier.chosen.floating)}" in text
    assert json.loads(json.dumps(frontier.record()))["layers"] == 12
    ranking = analyze(cache, progress=False)  # type: ignore[arg-type]
    rows = ranking.text().splitlines()
    assert [row.split()[1] for row in rows[2:5]] == ["stem.11.conv1", "stem.10.conv1", "stem.9.conv1"]
    assert json.loads(json.dumps(ranking.record()))["parts"][0]["layers"] == ["backbone.stem.11.conv1.conv/Conv"]


def test_pictures(example: tuple[Frontier, FakeCache], tmp_path: Path) -> None:
    frontier, cache = example
    ranking = analyze(cache, operations=dict.fromkeys(cache.harms, 1 / 12), progress=False)  # type: ignore[arg-type]
    for path in (draw_frontier(frontier, tmp_path / "f.png"), draw_sensitivity(ranking, tmp_path / "s.png")):
        with Image.open(path) as picture:
            assert picture.width > 800
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 20  # something is drawn


def test_blocks_are_ranked_as_one() -> None:
    harms = {f"backbone.stem.2.{block}.conv{conv}.conv/Conv": 0.001 * block for block in (0, 1) for conv in (1, 2)}
    cache = FakeCache(harms)
    ranking = analyze(cache, by="block", progress=False)  # type: ignore[arg-type]
    assert [part.name for part in ranking.parts] == ["backbone.stem.2.1", "backbone.stem.2.0"]
    assert len(cache.measured) == 2 + 1
