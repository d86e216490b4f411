"""The order of the samples: a pure function, complete, independent of devices and of restarts."""

from __future__ import annotations

from itertools import islice

from hypothesis import given, settings
from hypothesis import strategies as st

from hpddrnet_trt.training.order import BatchNumbers, SampleOrder, augmentation_rng, network_seed


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**40), st.integers(0, 30))
def test_each_pass_shows_every_image_once(size: int, seed: int, turn: int) -> None:
    order = SampleOrder(size, seed)
    assert sorted(order[turn * size + i] for i in range(size)) == list(range(size))


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(0, 1000), st.lists(st.integers(0, 500), min_size=1, max_size=20))
def test_order_does_not_depend_on_what_was_asked_before(size: int, seed: int, numbers: list[int]) -> None:
    order = SampleOrder(size, seed)
    assert [order[number] for number in numbers] == [SampleOrder(size, seed)[number] for number in numbers]


def test_passes_and_seeds_differ() -> None:
    def one_pass(seed: int, turn: int) -> list[int]:
        order = SampleOrder(20, seed)
        return [order[20 * turn + i] for i in range(20)]

    assert one_pass(0, 0) != one_pass(0, 1)
    assert one_pass(0, 0) != one_pass(1, 0)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 20), st.integers(1, 5))
def test_ranks_share_the_numbers_one_device_would_take(size: int, ranks: int, first: int, passes: int) -> None:
    shared = [
        list(islice(BatchNumbers(size, first=first, rank=rank, ranks=ranks), passes)) for rank in range(ranks)
    ]
    alone = list(islice(BatchNumbers(size * ranks, first=first), passes))
    for i in range(passes):
        assert sorted(number for rank in shared for number in rank[i]) == alone[i]


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(0, 50))
def test_a_later_start_continues_the_same_sequence(size: int, first: int) -> None:
    assert list(islice(BatchNumbers(size), first, first + 3)) == list(islice(BatchNumbers(size, first=first), 3))


def test_random_streams_repeat_and_differ() -> None:
    assert augmentation_rng(1, 2).random() == augmentation_rng(1, 2).random()
    draws = {augmentation_rng(seed, number).random() for seed in range(3) for number in range(50)}
    assert len(draws) == 150
    seeds = {network_seed(seed, batch, rank) for seed in range(3) for batch in range(20) for rank in range(2)}
    assert len(seeds) == 120
    assert all(0 <= value < 2**63 for value in seeds)
