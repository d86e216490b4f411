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


def test_harm_is_weighed_against_time() -> None:
    """Of two equally harmful layers the one that is cheap in floating point returns first."""
    found = {"dear/Conv": (0.01, 1.0), "cheap/Conv": (0.01, 0.1), "harmless/Conv": (0.0, 0.5)}
    frontier, _ = find(found, Budget(max_miou_drop=1.2))
    assert frontier.chosen is not None
    assert frontier.chosen.floating == ("cheap/Conv",)


def test_one_bad_layer_of_many_is_found_with_few_measurements() -> None:
    found = {f"layer{index}/Conv": (0.0001, 0.1) for index in range(60)} | {"bad/Conv": (0.05, 0.1)}
    frontier, cache = find(found, Budget(max_miou_drop=1.0))
    assert frontier.chosen is not None
    assert frontier.chosen.floating == ("bad/Conv",)
    assert len(cache.measured) < 61 + 1 + 20  # the ranking, everything, the search


def test_no_choice_when_rounding_alone_is_too_much() -> None:
    frontier, _ = find({"a/Conv": (0.01, 0.1), "b/Conv": (0.01, 0.1)}, Budget(max_miou_drop=0.5), rounding=0.006)
    assert frontier.chosen is None
    assert "<- chosen" not in frontier.text()


def test_agreement_is_a_budget_too() -> None:
    found = {"a/Conv": (0.004, 0.1), "b/Conv": (0.001, 0.1)}
    frontier, _ = find(found, Budget(min_agreement=0.998))
    assert frontier.chosen is not None
    assert frontier.chosen.floating == ("a/Conv",)


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
    rows = ranking.text(most=3).splitlines()
    assert [row.split()[1] for row in rows[2:5]] == ["stem.11.conv1", "stem.10.conv1", "stem.9.conv1"]
    assert "and 9 less sensitive ones" in rows[5]
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
