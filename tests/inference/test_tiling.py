"""Tiles: they cover, weights add up, and blending is what its definition says."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hpddrnet_trt.inference.tiling import Seams, TilePlan, blend, blending_weights, own_parts, plan_tiles


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
    for place in plan:
        assert seen[place].shape == plan.tile
        seen[place] += 1
    assert seen.min() == 1
    assert len(list(plan)) == plan.tiles
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
    tiles = np.random.default_rng(seed).normal(size=(plan.tiles, 2, *plan.tile)).astype(np.float32)
    down, across = (blending_weights(*direction, plan.overlap) for direction in directions(plan))
    weights = [np.outer(high, wide) for high in down for wide in across]
    expected = np.zeros((2, plan.height, plan.width))
    for (rows, columns), tile, weight in zip(plan, tiles, weights, strict=True):
        expected[:, rows, columns] += tile * weight
    found, row = np.full_like(expected, np.nan), 0
    for rows, scores in blend(plan, tiles):
        assert rows.start == row  # from top to bottom without gaps
        found[:, rows], row = scores, rows.stop
    assert row == plan.height
    assert np.abs(found - expected).max() < 1e-5


@given(plan=plans())
def test_own_parts_cut_the_image_without_rest(plan: TilePlan) -> None:
    picture = np.arange(plan.height * plan.width).reshape(plan.height, plan.width)
    found = np.full_like(picture, -1)
    for place, (here, inside) in zip(plan, own_parts(plan), strict=True):
        assert (found[here] == -1).all()  # nobody else's
        found[here] = picture[place][inside]
    assert np.array_equal(found, picture)


@given(plan=plans(), seed=st.integers(0, 9))
def test_seam_disagreement_is_what_the_report_says(plan: TilePlan, seed: int) -> None:
    tiles = np.random.default_rng(seed).integers(0, 3, (plan.tiles, *plan.tile), dtype=np.uint8)
    whole, seams = np.full((plan.tiles, plan.height, plan.width), 255, np.uint8), Seams(plan)
    for picture, place, tile in zip(whole, plan, tiles, strict=True):
        picture[place] = tile
        seams.add(tile)
    across = len(plan.columns)
    pairs = [(number, number + 1) for number in range(plan.tiles) if (number + 1) % across]
    pairs += [(number, number + across) for number in range(plan.tiles - across)]
    different = shared = 0
    for first, second in pairs:
        both = (whole[first] != 255) & (whole[second] != 255)
        shared += np.count_nonzero(both)
        different += np.count_nonzero(both & (whole[first] != whole[second]))
    assert json.loads(json.dumps(plan.report("cut labels", seams).as_dict())) == {
        "tile": list(plan.tile), "overlap": plan.overlap, "tiles": plan.tiles, "method": "cut labels",
        "seam_disagreement": different / shared if shared else 0.0,
    }  # fmt: skip
