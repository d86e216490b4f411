"""The order of the samples, a pure function; validation images whole and once; training samples by number alone."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpddrnet_trt.core.manifest import IGNORE_INDEX
from hpddrnet_trt.data.augment import Augmentation, AugmentConfig
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.data.simulate import write_dataset
from hpddrnet_trt.training.config import DataSection
from hpddrnet_trt.training.data import (
    BatchNumbers,
    ImageStore,
    SampleOrder,
    TrainingSamples,
    ValidationImages,
    augmentation_rng,
    network_seed,
    open_data,
)
from hpddrnet_trt.training.module import SegmentationData


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> FolderDataset:
    folder = tmp_path_factory.mktemp("odd") / "data"
    return write_dataset(folder, train=3, val=5, test=1, size=(45, 70), seed=1, progress=False)


def _store(dataset: FolderDataset, split: str, budget: int = 1 << 20) -> ImageStore:
    return ImageStore(dataset, dataset.split(split), budget)


def test_validation_images_are_padded_and_cropped_back_exactly(dataset: FolderDataset) -> None:
    images = ValidationImages(_store(dataset, "val"))
    assert len(images) == 5
    for index, sample in enumerate(dataset.split("val")):
        grey, mask = dataset.load(sample)
        image, labels = images[index]
        assert image.shape == (1, 48, 72)
        assert labels.shape == (48, 72)
        assert np.array_equal(image[0, :45, :70], grey)
        assert np.array_equal(labels[:45, :70], mask)
        assert torch.all(labels[45:] == IGNORE_INDEX)
        assert torch.all(labels[:, 70:] == IGNORE_INDEX)
        assert torch.equal(image[0, 45], image[0, 43])  # reflected about the last row


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_ranks_validate_each_image_once_and_equally_often(dataset: FolderDataset, ranks: int) -> None:
    store = _store(dataset, "val")
    shares = [ValidationImages(store, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    counted = [
        image[0, :45, :70].numpy().tobytes()
        for share in shares
        for image, labels in (share[i] for i in range(len(share)))
        if torch.any(labels != IGNORE_INDEX)
    ]
    assert sorted(counted) == sorted(store[i][0].tobytes() for i in range(5))


def test_training_sample_depends_on_its_number_alone(dataset: FolderDataset) -> None:
    augmentation = Augmentation(AugmentConfig(crop=(32, 40)))
    first, second = (TrainingSamples(_store(dataset, "train"), augmentation, seed=3) for _ in range(2))
    second[17]
    for number in (7, 0, 1000):
        image, labels = first[number]
        assert image.shape == (1, 32, 40)
        assert image.dtype == labels.dtype == torch.uint8
        assert all(torch.equal(a, b) for a, b in zip((image, labels), second[number], strict=True))
    other = TrainingSamples(_store(dataset, "train"), augmentation, seed=4)
    assert not torch.equal(first[7][0], other[7][0])


def test_a_batch_shares_the_size_of_its_crops_and_all_sizes_occur(dataset: FolderDataset) -> None:
    augmentation = Augmentation(AugmentConfig(crop=(32, 32), crops=((32, 32), (64, 32), (64, 64))))
    samples = TrainingSamples(_store(dataset, "train"), augmentation, seed=1, batch=3)
    shapes = [samples[number][0].shape[1:] for number in range(60)]
    assert all(len(set(shapes[first : first + 3])) == 1 for first in range(0, 60, 3))
    assert set(shapes) == {(32, 32), (64, 32), (64, 64)}


def test_samples_get_regions_of_a_rare_class_from_other_pictures() -> None:
    mask = np.zeros((96, 96), np.uint8)
    mask[::24, ::24] = 2
    pairs: Any = [(mask + np.uint8(100), mask), (mask + np.uint8(50), np.zeros_like(mask))]
    plain, pasted, none_rare = (
        TrainingSamples(pairs, Augmentation(AugmentConfig(crop=(64, 64), paste_probability=share)), 1, rare=rare)
        for share, rare in ((0, [2]), (1, [2]), (1, []))
    )
    gained = 0
    for number in range(12):
        before, after = plain[number][1], pasted[number][1]
        assert torch.equal(before, none_rare[number][1])
        assert torch.all(after[before != after] == 2)
        assert torch.equal(after, pasted[number][1])
        gained += int((before != after).sum())
    assert gained > 12


def test_store_keeps_what_fits_its_budget(dataset: FolderDataset) -> None:
    store = _store(dataset, "train", budget=2 * 45 * 70)  # one pair
    kept, read = store[0], store[1]
    assert store[0][0] is kept[0]
    assert store[1][0] is not read[0]
    assert np.array_equal(store[1][0], read[0])


def test_loader_starts_at_the_pass_it_is_told(dataset: FolderDataset) -> None:
    samples = TrainingSamples(_store(dataset, "train"), Augmentation(AugmentConfig(crop=(32, 32))), seed=0)

    def batches(first: int) -> list[torch.Tensor]:
        data = SegmentationData(samples, _store(dataset, "val"), images_per_pass=2, first_pass=first)
        return [batch[0] for batch, _ in zip(data.train_dataloader(), range(4), strict=False)]

    for late, early in zip(batches(2)[:2], batches(0)[2:], strict=True):
        assert torch.equal(late, early)


def test_workers_receive_the_store_without_the_images_in_memory(dataset: FolderDataset) -> None:
    """They are spawned: everything reaches them by pickling, and each keeps images of its own."""
    store = _store(dataset, "val")
    content = pickle.dumps(store)
    image, _ = store[0]
    assert pickle.dumps(store) == content
    assert np.array_equal(pickle.loads(content)[0][0], image)


def test_workers_do_not_import_lightning() -> None:
    """It takes seconds, in each of them."""
    code = "import sys, hpddrnet_trt.training.data; print('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.split() == [b"False"]


# --- the order


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


def _described(dataset: FolderDataset, sizes: list[float | None]) -> str:
    """A copy of the description in which the training pictures have these pixel sizes."""
    path = dataset.root / "dataset.json"
    content = json.loads(path.read_text()) | {"pixel_size_m": None}
    names = [sample.name for sample in dataset.split("train")]
    content["files"] = [
        {"split": "train", "name": name, "pixel_size_m": size} for name, size in zip(names, sizes, strict=True)
    ]
    path.write_text(json.dumps(content))
    return str(dataset.root)


@pytest.mark.parametrize(
    ("sizes", "settings", "known", "common"),
    [
        ([5e-9, 10e-9, 20e-9], {}, (5e-9, 20e-9), 10e-9),
        ([5e-9, 10e-9, 20e-9], {"common_pixel_size": "own"}, (5e-9, 20e-9), None),
        ([5e-9, 10e-9, 20e-9], {"common_pixel_size": 20e-9}, (5e-9, 20e-9), 20e-9),
        ([5e-9, 5.1e-9, 5e-9], {}, (5e-9, 5.1e-9), None),
        ([5e-9, None, 20e-9], {}, None, None),
        ([None, None, None], {}, None, None),
        ([None, None, None], {"pixel_size_m": 5e-9}, (5e-9, 5e-9), None),
    ],
)
def test_pictures_of_several_pixel_sizes_are_brought_to_their_median(
    tmp_path: Path, sizes: list[float | None], settings: dict[str, Any], known: Any, common: float | None
) -> None:
    written = write_dataset(tmp_path / "data", train=3, val=1, test=1, size=(40, 64), seed=1, progress=False)
    data = open_data(DataSection(path=_described(written, sizes), **settings), tmp_path)
    assert data.pixel_size_m == known
    assert data.dataset.common_pixel_size_m == common
    shapes = [data.dataset.load(sample)[0].shape for sample in data.dataset.split("train")]
    if common is None:
        assert shapes == [(40, 64)] * 3
    else:
        factors = [size / common for size in sizes if size is not None]
        assert shapes == [(round(40 * factor), round(64 * factor)) for factor in factors]
