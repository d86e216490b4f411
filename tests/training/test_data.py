"""What the loaders hand out: validation images whole and once, training samples by number alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hpddrnet_trt.core.manifest import IGNORE_INDEX
from hpddrnet_trt.data.augment import Augmentation, AugmentConfig
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.data.simulate import write_dataset
from hpddrnet_trt.training.datamodule import ImageStore, SegmentationData, TrainingSamples, ValidationImages


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


def test_paths_are_not_needed_after_opening(dataset: FolderDataset, tmp_path: Path) -> None:
    # Workers receive the store by pickling where processes are spawned, not forked.
    import pickle

    store = _store(dataset, "val")
    copy = pickle.loads(pickle.dumps(store))
    assert np.array_equal(copy[0][0], store[0][0])
