"""Tiles: they cover, weights add up, and blending is what its definition says."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.inference.tiling import Seams, TilePlan, blend, blending_weights, own_parts, plan_tiles

Labels = npt.NDArray[np.uint8]


@st.composite
def plans(draw: st.DrawFn, longest: int = 90) -> TilePlan:
    tile = draw(st.integers(4, 40)), draw(st.integers(4, 40))
    overlap = draw(st.none() | st.integers(2, min(tile) // 2))
    return plan_tiles(draw(st.integers(1, longest)), draw(st.integers(1, longest)), tile, overlap)


@given(plan=plans())
def test_tiles_cover_the_image_and_lie_inside_it(plan: TilePlan) -> None:
    seen = np.zeros((plan.height, plan.width), int)
    boxes = list(plan)
    for rows, columns in boxes:
        part = seen[rows, columns]
        assert part.shape == plan.tile  # all equal, none beyond the border
        part += 1
    assert seen.min() == 1
    assert len(boxes) == plan.tiles
    for starts, tile in ((plan.rows, plan.tile[0]), (plan.columns, plan.tile[1])):
        for before, after in pairwise(starts):
            assert before + tile - after >= plan.overlap
        # One tile less would not do.
        assert len(starts) == 1 or (len(starts) - 1) * (tile - plan.overlap) + plan.overlap < starts[-1] + tile


@given(plan=plans())
def test_weights_add_up_to_one_and_the_outermost_pixels_do_not_count(plan: TilePlan) -> None:
    for starts, tile, size in (
        (plan.rows, plan.tile[0], plan.height),
        (plan.columns, plan.tile[1], plan.width),
    ):
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
    assert np.abs(np.diff(first)).max() < 0.2
    assert np.array_equal(first, second[::-1])
    assert (np.diff(first) <= 0).all()
    assert np.count_nonzero(first[48:] == 0) == 4  # the outer quarter of 16


@given(plan=plans(longest=60), seed=st.integers(0, 9))
def test_blending_is_the_weighted_sum(plan: TilePlan, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tiles = [rng.normal(size=(2, *plan.tile)).astype(np.float32) for _ in range(plan.tiles)]
    expected = np.zeros((2, plan.height, plan.width))
    down = blending_weights(plan.rows, plan.tile[0], plan.height, plan.overlap)
    across = blending_weights(plan.columns, plan.tile[1], plan.width, plan.overlap)
    for (rows, columns), tile, (row, column) in zip(
        plan, tiles, np.ndindex(len(plan.rows), len(plan.columns)), strict=True
    ):
        expected[:, rows, columns] += tile * np.outer(down[row], across[column])
    found = np.full_like(expected, np.nan)
    row = 0
    for rows, scores in blend(plan, tiles):
        assert rows.start == row  # from top to bottom without gaps
        found[:, rows], row = scores, rows.stop
    assert row == plan.height
    assert np.abs(found - expected).max() < 1e-5


@given(plan=plans(longest=60))
def test_own_parts_cut_the_image_without_rest(plan: TilePlan) -> None:
    picture = np.arange(plan.height * plan.width).reshape(plan.height, plan.width)
    found = np.full_like(picture, -1)
    for (rows, columns), (here, inside) in zip(plan, own_parts(plan), strict=True):
        assert (found[here] == -1).all()  # nobody else's
        found[here] = picture[rows, columns][inside]
    assert np.array_equal(found, picture)


@given(plan=plans(longest=60), seed=st.integers(0, 9))
def test_seam_disagreement_is_what_the_report_says(plan: TilePlan, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tiles = [rng.integers(0, 3, plan.tile, dtype=np.uint8) for _ in range(plan.tiles)]
    whole: list[Labels] = []
    for (rows, columns), tile in zip(plan, tiles, strict=True):
        whole.append(np.full((plan.height, plan.width), 255, np.uint8))
        whole[-1][rows, columns] = tile
    across = len(plan.columns)
    pairs = [(number, number + 1) for number in range(plan.tiles) if (number + 1) % across]
    pairs += [(number, number + across) for number in range(plan.tiles - across)]
    different = shared = 0
    for first, second in pairs:
        both = (whole[first] != 255) & (whole[second] != 255)
        shared += np.count_nonzero(both)
        different += np.count_nonzero(both & (whole[first] != whole[second]))
    seams = Seams(plan)
    for tile in tiles:
        seams.add(tile)
    assert seams.disagreement == (different / shared if shared else 0.0)
    report = plan.report("cut labels", seams)
    assert json.loads(json.dumps(report.as_dict())) == {
        "tile": list(plan.tile), "overlap": plan.overlap, "tiles": plan.tiles, "method": "cut labels",
        "seam_disagreement": seams.disagreement,
    }  # fmt: skip


def test_small_images_are_one_tile() -> None:
    assert plan_tiles(20, 30, (64, 64)) == TilePlan(20, 30, (20, 30), 16, (0,), (0,))
    assert plan_tiles(20, 100, (64, 64)).tile == (20, 64)
    assert plan_tiles(20, 100, (64, 64)).columns == (0, 36)
    assert plan_tiles(1, 1, (8, 8)).tiles == 1


@pytest.mark.parametrize(
    ("tile", "overlap", "words"),
    [((8, 8), 5, "choose 2 to 4"), ((8, 8), 1, "cannot overlap by 1"), ((8, 16), 8, "8"), ((0, 8), None, "0x8")],
)
def test_impossible_plans(tile: tuple[int, int], overlap: int | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan_tiles(100, 100, tile, overlap)
