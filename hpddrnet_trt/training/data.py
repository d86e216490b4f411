"""Feeds the trainer: augmented crops in a fixed order, and whole validation images.

Which image, and which augmentation, goes into training sample number ``k`` are pure functions of (seed, k).
There is no sampler state and no generator to save: a run that resumes at step s simply continues with sample
number ``s * batch_size``, and neither the number of worker processes nor the number of devices changes what a
step sees. Processes that load images import this module: Lightning, which takes seconds, is not in it.
"""

from __future__ import annotations

import logging
import signal
import statistics
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.magnification import TOLERANCE, PixelSizes, in_words
from hpddrnet_trt.core.manifest import IGNORE_INDEX, SIZE_MULTIPLE, IntensityRecord, Manifest
from hpddrnet_trt.core.progress import progress_bar
from hpddrnet_trt.data.augment import Augmentation
from hpddrnet_trt.data.datasets import (
    FolderDataset,
    Sample,
    SplitStatistics,
    missing_splits,
    passed_over,
    training_problems,
)
from hpddrnet_trt.data.intensity import range_of, training_range
from hpddrnet_trt.data.micrograph import read_micrograph
from hpddrnet_trt.data.preprocess import pad
from hpddrnet_trt.data.simulate import write_dataset
from hpddrnet_trt.training.config import SIMULATED, DataSection

_SHUFFLE, _AUGMENT, _NETWORK, _CROP, _PASTE = range(5)  # independent random streams of one seed
RARE = 0.05  # of the labelled pixels: a class with less is rare
log = logging.getLogger(__name__)
Pair = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]  # grey image and mask, both [H, W]


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def augmentation_rng(seed: int, number: int) -> np.random.Generator:
    """Random generator for the augmentation of training sample ``number``."""
    return _generator(seed, _AUGMENT, number)


def network_seed(seed: int, batch: int, rank: int) -> int:
    """63-bit seed of the network's own randomness (dropout) in one forward pass."""
    return int(_generator(seed, _NETWORK, batch, rank).integers(2**63))


class SampleOrder:
    """Shuffles ``size`` images without replacement, anew in each pass over them."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self._pass = -1
        self._permutation: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __getitem__(self, number: int) -> int:
        """Index of the image behind training sample ``number`` (any non-negative integer)."""
        turn, position = divmod(number, self.size)
        if turn != self._pass:
            self._permutation = _generator(self.seed, _SHUFFLE, turn).permutation(self.size)
            self._pass = turn
        return int(self._permutation[position])


class BatchNumbers(Sampler[list[int]]):
    """Endless lists of sample numbers, one list per forward pass of this rank.

    Forward pass ``j`` of all ranks together takes the next ``size * ranks`` sample numbers;
    rank r takes every ``ranks``-th of them. ``first`` is the forward pass to start with.
    """

    def __init__(self, size: int, *, first: int = 0, rank: int = 0, ranks: int = 1) -> None:
        self.size = size
        self.first = first
        self.rank = rank
        self.ranks = ranks

    def __iter__(self) -> Iterator[list[int]]:
        for batch in count(self.first):
            start = batch * self.size * self.ranks + self.rank
            yield [start + self.ranks * i for i in range(self.size)]


@dataclass(frozen=True)
class TrainingData:
    """The dataset of a run, as it was opened."""

    dataset: FolderDataset
    statistics: SplitStatistics  # of the training split
    intensity: IntensityRecord  # of the training split, or of the model that training starts from
    sha256: str
    training_images: int
    pixel_size_m: PixelSizes | None = None  # least and greatest of the training split, where all are known


def open_data(section: DataSection, folder: Path, start: Manifest | None = None) -> TrainingData:
    """The dataset that ``section`` names; simulated data are written to ``folder``.

    ``start``: the model that training goes on from. Where it tells apart the same classes, pictures are brought to its
    intensity range, otherwise to what suits those of the training split.
    Raises :class:`UserError` when a split is missing, and what opening and counting it raises.
    """
    if section.path == SIMULATED:  # written once
        dataset = write_dataset(folder / "data", **section.simulated.model_dump())
    else:
        dataset = FolderDataset.open(section.path, section.layout)
    wanted = (section.train_split, section.val_split)
    dataset = parted(dataset, section)
    if shared := dataset.shared_groups(section.train_split):
        log.warning(
            "groups in split %r and in others: %s; scores will flatter, see data.separate_groups",
            section.train_split, ", ".join(shared),
        )  # fmt: skip
    if section.pixel_size_m is not None:
        dataset = replace(dataset, pixel_size_m=section.pixel_size_m)
    sizes: list[float | None] = []
    samples = progress_bar(dataset.split(section.train_split), desc="intensity range", unit="image", delay=5)
    pictures = _pixels(dataset, samples, sizes)
    intensity = None if start is None or start.class_names != dataset.class_names else start.intensity
    if intensity is None:
        intensity, remarks = training_range(pictures)
        for remark in remarks:
            log.warning("%s", remark)
    else:
        deque(pictures, maxlen=0)  # for their pixel sizes alone
    known = [size for size in sizes if size is not None]
    pixel_sizes = (min(known), max(known)) if known and len(known) == len(sizes) else None
    common = _common(section.common_pixel_size, known, pixel_sizes)
    dataset = replace(dataset, intensity_range=range_of(intensity), common_pixel_size_m=common)
    figures = {split: dataset.statistics(split) for split in dict.fromkeys(wanted)}
    labels = {split: (entry.class_fractions, entry.ignored_fraction) for split, entry in figures.items()}
    if problems := training_problems(dataset.classes, labels, *wanted):
        raise UserError(unfit(dataset, problems))
    of_training = figures[section.train_split]
    absent = [name for name, part in zip(dataset.class_names, of_training.class_fractions, strict=True) if not part]
    if absent:
        log.warning("no pixel of split %r is labelled %s: it is not learned", section.train_split, ", ".join(absent))
    count = len(dataset.split(section.train_split))
    return TrainingData(dataset, of_training, intensity, dataset.checksum(), count, pixel_sizes)


def parted(dataset: FolderDataset, section: DataSection) -> FolderDataset:
    """The pictures of ``dataset`` that ``section`` trains and validates on: those of a fold, without shared groups.

    Raises :class:`UserError` when a split is missing, and for more folds than specimens.
    """
    wanted = (section.train_split, section.val_split)
    if missing := missing_splits(dataset.splits, *(wanted if section.fold_place is None else section.fold_splits)):
        raise UserError(unfit(dataset, missing))
    if section.fold_place is not None:
        dataset = dataset.fold(*section.fold_place, section.fold_splits, train=wanted[0], held_out=wanted[1])
    return dataset.without_shared_groups(section.train_split) if section.separate_groups else dataset


def _pixels(
    dataset: FolderDataset, samples: Iterable[Sample], sizes: list[float | None]
) -> Iterator[npt.NDArray[Any]]:
    """The pictures of ``samples``; ``sizes`` is told of the pixels of each, in metres."""
    for sample in samples:
        micrograph = read_micrograph(sample.image)
        sizes.append(micrograph.pixel_size_m or dataset.pixel_size_m)
        yield micrograph.pixels


def _common(wanted: float | str, known: list[float], pixel_sizes: PixelSizes | None) -> float | None:
    """The pixel size that pictures are brought to, where they are; says so."""
    if pixel_sizes is None:
        if known or isinstance(wanted, float):
            log.warning(
                "the pixel size of %s is not known: all are trained on as they are; data.pixel_size_m states that of "
                "pictures that say nothing", "some training pictures" if known else "the training pictures",
            )  # fmt: skip
        return None
    least, greatest = pixel_sizes
    if wanted == "own" or (wanted == "median" and greatest <= TOLERANCE * least):
        return None
    common = wanted if isinstance(wanted, float) else statistics.median(known)
    log.info(
        "pictures of %s are brought to %s (data.common_pixel_size)", in_words(pixel_sizes), in_words((common, common))
    )
    return common


def unfit(dataset: FolderDataset, problems: Sequence[str]) -> str:
    """The sentence that refuses a dataset."""
    others = passed_over(dataset.root, dataset.layout)
    return (
        f"the dataset {dataset.root} cannot be trained on: {'; '.join(problems)}{f' ({others})' if others else ''}; "
        "mend it, or name other splits with data.train_split and data.val_split"
    )


class ImageStore:
    """Loads image and mask pairs and keeps them in memory up to a budget."""

    def __init__(self, dataset: FolderDataset, samples: Sequence[Sample], budget_bytes: int) -> None:
        self.dataset = dataset
        self.samples = samples
        self.budget = self.free = budget_bytes
        self._cache: dict[int, Pair] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "free": self.budget, "_cache": {}}  # each worker process fills its own

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Pair:
        if index in self._cache:
            return self._cache[index]
        pair = self.dataset.load(self.samples[index])
        size = pair[0].nbytes + pair[1].nbytes
        if size <= self.free:
            self._cache[index] = pair
            self.free -= size
        return pair


class TrainingSamples(Dataset[tuple[Tensor, Tensor]]):
    """Training sample ``number`` (any non-negative integer): image uint8 ``[1, h, w]``, mask uint8 ``[h, w]``.

    ``batch``: samples of a forward pass over all devices, which share a crop size where ``augmentation.crops`` gives
    several. ``rare``: the labels that ``augmentation.paste_probability`` is about.
    """

    def __init__(
        self, images: ImageStore, augmentation: Augmentation, seed: int, *, batch: int = 1, rare: Sequence[int] = ()
    ) -> None:
        self.images = images
        self.augmentation = augmentation
        self.seed = seed
        self.batch = batch
        self.rare = rare
        self.order = SampleOrder(len(images), seed)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        config = self.augmentation.config
        size = None
        if config.crops:
            size = config.crops[_generator(self.seed, _CROP, number // self.batch).integers(len(config.crops))]
        image, mask = self.images[self.order[number]]
        rng = augmentation_rng(self.seed, number)
        image, mask = self.augmentation(image, mask, rng, size=size, donor=self._donor(number))
        return torch.from_numpy(np.ascontiguousarray(image))[None], torch.from_numpy(np.ascontiguousarray(mask))

    def _donor(self, number: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], int] | None:
        """A picture with regions of a rare class, and its label, for the share of samples that gets some."""
        probability = self.augmentation.config.paste_probability
        if not (self.rare and probability):
            return None
        rng = _generator(self.seed, _PASTE, number)
        if rng.random() >= probability:
            return None
        image, mask = self.images[int(rng.integers(len(self.images)))]
        return image, mask, int(rng.choice(self.rare))


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
        image = np.array(pad(image, height, width))  # a copy: images may be read-only, which PyTorch does not take
        mask = np.array(pad(mask, height, width, fill=IGNORE_INDEX))
        return torch.from_numpy(image)[None], torch.from_numpy(mask)


class Loader(DataLoader[Any]):
    """Batches of a dataset, made by ``workers`` processes beside this one, or in it when there are none.

    The processes are spawned, not forked: a copy of this process inherits the locks of threads that it does not have
    (of OpenMP, OpenCV, Lightning, a test worker), and waits for them for ever, or dies. They start deaf to Ctrl-C,
    which reaches the whole process group: the main process decides when to stop.
    """

    def __init__(self, dataset: Dataset[Any], workers: int, **options: Any) -> None:
        super().__init__(
            dataset,
            num_workers=workers,
            multiprocessing_context="spawn" if workers else None,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_prepare_worker,
            **options,
        )

    def __iter__(self) -> Any:
        if not self.num_workers or not hasattr(signal, "pthread_sigmask"):
            return super().__iter__()
        resource_tracker.ensure_running()  # when started by the first worker it would unblock the signal
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited; kept waiting for this process
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _prepare_worker(_: int) -> None:
    # For Windows, where signals are not blocked. One thread each, since there are as many workers as the user wants to
    # spend cores.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(0)
