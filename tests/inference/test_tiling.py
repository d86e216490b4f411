"""Tiles: they cover, weights add up, and blending is what its definition says."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hpddrnet_trt.inference.tiling import Seams, TilePart, TilePlan, blend, blending_weights, own_parts, plan_tiles


@st.composite
def plans(draw: st.DrawFn, longest: int = 60) -> TilePlan:
    tile = draw(st.integers(4, 40)), draw(st.integers(4, 40))
    return plan_tiles(draw(st.integers(1, longest)), draw(st.integers(1, longest)), tile)


def directions(plan: TilePlan) -> tuple[tuple[tuple[int, ...], int, int], ...]:
    """Starts, tile and image in both directions."""
    return (plan.rows, plan.tile[0], plan.height), (plan.columns, plan.tile[1], plan.width)


@given(plan=plans(longest=90))
def test_as_few_equal_tiles_as_possible_cover_the_image_and_lie_inside_it(plan: TilePlan) -> None:
    seen = np.zeros((plan.height, plan.width), int)
    for place in plan.whole:
        assert seen[place].shape == plan.tile
        seen[place] += 1
    assert seen.min() == 1
    assert len(list(plan.whole)) == len(plan.whole)
    for starts, tile, size in directions(plan):
        assert all(before + tile - after >= plan.overlap for before, after in pairwise(starts))
        assert len(starts) == 1 or (len(starts) - 1) * (tile - plan.overlap) + plan.overlap < size


def test_plans_by_hand() -> None:
    assert plan_tiles(20, 30, (64, 64)) == TilePlan(20, 30, (20, 30), 16, (0,), (0,))
    assert plan_tiles(20, 100, (64, 64)) == TilePlan(20, 100, (20, 64), 16, (0,), (0, 36))


@given(plan=plans(longest=90))
def test_weights_add_up_to_one_and_the_outermost_pixels_do_not_count(plan: TilePlan) -> None:
    for starts, tile, size in directions(plan):
        weights = blending_weights(starts, tile, size, plan.overlap)
        total, covering = np.zeros(size), np.zeros(size, int)
        for start, window in zip(starts, weights, strict=True):
            total[start : start + tile] += window
            covering[start : start + tile] += 1
        for number, (start, window) in enumerate(zip(starts, weights, strict=True)):
            assert window.min() >= 0
            assert (window[covering[start : start + tile] == 1] == 1).all()  # alone: exactly its own scores
            assert number == 0 or window[0] == 0
            assert number == len(starts) - 1 or window[-1] == 0
        assert np.abs(total - 1).max() < 1e-6


def test_the_window_is_smooth() -> None:
    first, second = blending_weights((0, 48), 64, 112, 16)
    assert np.array_equal(first, second[::-1])
    assert ((np.diff(first) <= 0) & (np.diff(first) > -0.2)).all()
    assert np.count_nonzero(first[48:] == 0) == 4  # the outer quarter of 16


@given(plan=plans(), seed=st.integers(0, 9))
def test_blending_is_the_weighted_sum(plan: TilePlan, seed: int) -> None:
    tiles = np.random.default_rng(seed).normal(size=(len(plan.whole), 2, *plan.tile)).astype(np.float32)
    down, across = (blending_weights(*direction, plan.overlap) for direction in directions(plan))
    weights = [np.outer(high, wide) for high in down for wide in across]
    expected = np.zeros((2, plan.height, plan.width))
    for (rows, columns), tile, weight in zip(plan.whole, tiles, weights, strict=True):
        expected[:, rows, columns] += tile * weight
    found, row = np.full_like(expected, np.nan), 0
    for rows, scores in blend(plan.whole, tiles):
        assert rows.start == row  # from top to bottom without gaps
        found[:, rows], row = scores, rows.stop
    assert row == plan.height
    assert np.abs(found - expected).max() < 1e-5


@st.composite
def cut_up(draw: st.DrawFn) -> tuple[TilePlan, list[TilePart]]:
    """A plan, and parts of it that cover its image, in any order."""
    plan = draw(plans())
    edges = [
        sorted({0, size, *draw(st.lists(st.integers(1, size), max_size=3))}) for size in (plan.height, plan.width)
    ]
    places = [(slice(*rows), slice(*columns)) for rows in pairwise(edges[0]) for columns in pairwise(edges[1])]
    return plan, [plan.part(*place) for place in draw(st.permutations(places))]


@given(cut_up(), st.integers(0, 9), st.floats(0, 0.6))
def test_each_part_of_a_plan_makes_its_pixels_of_the_image_bit_for_bit(
    drawn: tuple[TilePlan, list[TilePart]], seed: int, gaps: float
) -> None:
    plan, parts = drawn
    rng = np.random.default_rng(seed)
    numbers = list(plan.whole.numbers)
    scores = {number: rng.normal(size=(2, *plan.tile)).astype(np.float32) for number in numbers}
    labels = {number: rng.integers(0, 3, plan.tile, dtype=np.uint8) for number in numbers}
    given_out = {number: rng.random() >= gaps for number in numbers}

    def made(part: TilePart) -> tuple[Any, Any, list[int]]:
        blended = np.zeros((2, plan.height, plan.width), np.float32)
        decided = np.full((plan.height, plan.width), -1)
        seams = Seams(part)
        chosen = [scores[number] if given_out[number] else None for number in part.numbers]
        for rows, values in blend(part, chosen):
            blended[:, rows, part.columns] = values
        for number, (here, inside) in zip(part.numbers, own_parts(part), strict=True):
            seams.add(labels[number] if given_out[number] else None)
            assert (decided[here] == -1).all()
            decided[here] = labels[number][inside]
        return blended, decided, [seams.different, seams.compared, sum(part.owns(*number) for number in part.numbers)]

    whole, decided, counted = made(plan.whole)
    found = [made(part) for part in parts]
    for part, (own_blended, own_decided, _) in zip(parts, found, strict=True):
        here = part.rows, part.columns
        assert np.array_equal(own_blended[:, *here], whole[:, *here])
        assert np.array_equal(own_decided[here], decided[here])
        assert np.count_nonzero(own_decided != -1) == decided[here].size
    assert np.sum([counts for *_, counts in found], axis=0).tolist() == counted
    assert counted[2] == len(numbers)


def test_the_tiles_of_a_part_are_those_with_a_weight_in_it() -> None:
    plan = plan_tiles(16, 112, (16, 16))  # every 12 pixels, with the outermost pixel of each without a say
    tiles = [(start, start + 16) for start in plan.columns]
    for left in range(111):
        part = plan.part(slice(0, 16), slice(left, left + 1))
        inside = [n for n, (start, end) in enumerate(tiles) if start + (n > 0) <= left < end - (n < len(tiles) - 1)]
        assert list(part.across) == inside
        assert list(part.own_across) == [n for n in inside if tiles[n][0] + (n > 0) == left]


@given(plan=plans())
def test_own_parts_cut_the_image_without_rest(plan: TilePlan) -> None:
    picture = np.arange(plan.height * plan.width).reshape(plan.height, plan.width)
    found = np.full_like(picture, -1)
    for place, (here, inside) in zip(plan.whole, own_parts(plan.whole), strict=True):
        assert (found[here] == -1).all()  # nobody else's
        found[here] = picture[place][inside]
    assert np.array_equal(found, picture)


@given(plan=plans(), seed=st.integers(0, 9))
def test_seam_disagreement_is_what_the_report_says(plan: TilePlan, seed: int) -> None:
    tiles = np.random.default_rng(seed).integers(0, 3, (len(plan.whole), *plan.tile), dtype=np.uint8)
    whole, seams = np.full((len(plan.whole), plan.height, plan.width), 255, np.uint8), Seams(plan.whole)
    for picture, place, tile in zip(whole, plan.whole, tiles, strict=True):
        picture[place] = tile
        seams.add(tile)
    across = len(plan.columns)
    pairs = [(number, number + 1) for number in range(len(plan.whole)) if (number + 1) % across]
    pairs += [(number, number + across) for number in range(len(plan.whole) - across)]
    different = shared = 0
    for first, second in pairs:
        both = (whole[first] != 255) & (whole[second] != 255)
        shared += np.count_nonzero(both)
        different += np.count_nonzero(both & (whole[first] != whole[second]))
    assert json.loads(json.dumps(plan.report("cut labels", seams).as_dict())) == {
        "tile": list(plan.tile), "overlap": plan.overlap, "tiles": len(plan.whole), "method": "cut labels",
        "seam_disagreement": different / shared if shared else 0.0,
    }  # fmt: skip
