"""Feeds the trainer: augmented crops in a fixed order, and whole validation images."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Any

import cv2
import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hpddrnet_trt.core.manifest import IGNORE_INDEX, SIZE_MULTIPLE
from hpddrnet_trt.data.augment import Augmentation
from hpddrnet_trt.data.datasets import FolderDataset, Sample
from hpddrnet_trt.data.preprocess import pad
from hpddrnet_trt.training.order import BatchNumbers, SampleOrder, augmentation_rng

Pair = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]  # grey image and mask, both [H, W]


class ImageStore:
    """Loads image and mask pairs and keeps them in memory up to a budget."""

    def __init__(self, dataset: FolderDataset, samples: Sequence[Sample], budget_bytes: int) -> None:
        self.dataset = dataset
        self.samples = samples
        self.free = budget_bytes
        self._kept: dict[int, Pair] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Pair:
        if index in self._kept:
            return self._kept[index]
        pair = self.dataset.load(self.samples[index])
        size = pair[0].nbytes + pair[1].nbytes
        if size <= self.free:
            self._kept[index] = pair
            self.free -= size
        return pair


class TrainingSamples(Dataset[tuple[Tensor, Tensor]]):
    """Training sample ``number`` (any non-negative integer): image uint8 ``[1, h, w]``, mask uint8 ``[h, w]``."""

    def __init__(self, images: ImageStore, augmentation: Augmentation, seed: int) -> None:
        self.images = images
        self.augmentation = augmentation
        self.seed = seed
        self.order = SampleOrder(len(images), seed)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        image, mask = self.images[self.order[number]]
        image, mask = self.augmentation(image, mask, augmentation_rng(self.seed, number))
        return torch.from_numpy(np.ascontiguousarray(image))[None], torch.from_numpy(np.ascontiguousarray(mask))


class ValidationImages(Dataset[tuple[Tensor, Tensor]]):
    """Whole images of one rank, padded at the bottom and right to a multiple of 8.

    Images are padded by reflection, masks by the ignore label. Every rank gets equally many
    items, because the ranks meet in each forward pass; surplus ones are wholly ignored.
    """

    def __init__(self, images: ImageStore, rank: int = 0, ranks: int = 1) -> None:
        self.images = images
        self.rank = rank
        self.ranks = ranks

    def __len__(self) -> int:
        return -(-len(self.images) // self.ranks)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = index * self.ranks + self.rank
        image, mask = self.images[min(number, len(self.images) - 1)]
        if number >= len(self.images):
            mask = np.full_like(mask, IGNORE_INDEX)
        height, width = (size + -size % SIZE_MULTIPLE for size in image.shape)
        image = np.array(pad(image, height, width))  # a copy: kept images are read-only, which PyTorch does not take
        mask = np.array(pad(mask, height, width, fill=IGNORE_INDEX))
        return torch.from_numpy(image)[None], torch.from_numpy(mask)


class SegmentationData(pl.LightningDataModule):
    """Training and validation loaders; see :mod:`hpddrnet_trt.training.order` for the order."""

    def __init__(
        self,
        training: TrainingSamples,
        validation: ImageStore,
        *,
        images_per_pass: int,
        first_pass: int = 0,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self.training = training
        self.validation = validation
        self.images_per_pass = images_per_pass
        self.first_pass = first_pass
        self.workers = workers

    def train_dataloader(self) -> DataLoader[Any]:
        rank, ranks = self._place()
        numbers = BatchNumbers(self.images_per_pass, first=self.first_pass, rank=rank, ranks=ranks)
        return self._loader(self.training, batch_sampler=numbers)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(ValidationImages(self.validation, *self._place()), batch_size=1)

    def _loader(self, dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_prepare_worker,
            **options,
        )

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)


def _prepare_worker(_: int) -> None:
    # Ctrl-C reaches the whole process group: the main process decides when to stop. One thread
    # each, since there are as many workers as the user wants to spend cores.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(0)
