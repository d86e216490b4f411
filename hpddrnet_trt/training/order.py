"""Which image, and which augmentation, goes into training sample number ``k``.

Both are pure functions of (seed, k). There is no sampler state and no generator to save: a run
that resumes at step s simply continues with sample number ``s * batch_size``, and neither the
number of worker processes nor the number of devices changes what a step sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

_SHUFFLE, _AUGMENT, _NETWORK = range(3)  # independent random streams of one seed


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
