"""Which unlabeled pictures to label next: an order by what labelling them would teach a model."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.domain import NOT_KNOWN, Domain
from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError
from hpddrnet_trt.core.files import decoded_text, read_file
from hpddrnet_trt.core.progress import progress_bar
from hpddrnet_trt.data.datasets import find_images
from hpddrnet_trt.data.intensity import to_grey8
from hpddrnet_trt.data.micrograph import read_micrograph
from hpddrnet_trt.inference.segmenter import Segmenter
from hpddrnet_trt.results.tables import number, write_rows

LOG = logging.getLogger(__name__)
Vector = npt.NDArray[np.float64]
RANKING = ("rank", "image", "expected_error", "novelty", "domain", "domain_distance")
_SHOWN = 10
_BANDS = 5  # octaves of detail, from 1 pixel to 16


@dataclass(frozen=True)
class Ranked:
    """A picture in the order: ``expected_error``: the share of its pixels, 0 to 1, that the model expects to have wrong
    (one minus the mean probability of the chosen class); ``novelty``: how far its looks are from the nearest picture
    that stands before it or is labeled, in standard deviations; infinite for the first of all; ``domain``: whether it
    is like the model's training pictures."""

    image: Path
    expected_error: float
    novelty: float
    domain: Domain = NOT_KNOWN

    @property
    def worth(self) -> float:
        """The expected error, times the distance to the training pictures where that is known and more than theirs:
        far from them a model is sure of what is wrong."""
        return self.expected_error * max(1.0, self.domain.distance or 0.0)


@dataclass(frozen=True)
class Ranking:
    """``order``: the pictures, those that teach most first. ``failed``: those that cannot be read, with the reason."""

    order: list[Ranked]
    failed: list[tuple[Path, str]]

    def __str__(self) -> str:
        """The first ten, for people."""
        lines = [f"{len(self.order)} ranked, {len(self.failed)} failed", *(f"  {reason}" for _, reason in self.failed)]
        for place, one in enumerate(self.order[:_SHOWN], start=1):
            lines.append(f"  {place:2d}. {one.image.name}: {one.expected_error:.1%} of its pixels expected to be wrong"
                         + (f", {one.domain.state}" if one.domain.distance is not None else ""))
        return "\n".join(lines)

    def write(self, path: str | Path) -> Path:
        """Write a CSV file: columns :data:`RANKING`, images with their whole paths; :func:`read_ranking` reads it."""
        return write_rows(
            path, RANKING,
            ([place, str(one.image.absolute()), number(one.expected_error), number(one.novelty), one.domain.state,
              number(one.domain.distance)] for place, one in enumerate(self.order, start=1)),
        )  # fmt: skip


def rank_pictures(
    segmenter: Segmenter,
    inputs: str | Path | Sequence[str | Path],
    *,
    labeled: str | Path | Sequence[str | Path] | None = None,
    split: str = "train",
    progress: bool = True,
) -> Ranking:
    """Order unlabeled micrographs by what labelling them would teach the model of ``segmenter``.

    Each picture is segmented once. The next in the order is the one with the largest product of its worth
    (:attr:`Ranked.worth`; uncertainty sampling: Lewis and Gale 1994) and the distance to the nearest picture before it
    (farthest-first traversal, the greedy k-center of Gonzalez 1985; for networks Sener and Savarese 2018): pictures
    that the model is unsure of, but not one like the other. Distances are between :func:`looks`, each of its
    numbers in standard deviations over all pictures, divided by the root of how many numbers there are.

    ``inputs``: files, a folder, a pattern, or a dataset, of which one ``split`` is taken. ``labeled``: the same of
    pictures that have labels; they stand before all others and are not in the order.

    Raises :class:`UsageError` for a segmenter without confidence and when there is nothing to rank.
    """
    if not segmenter.confidence:
        raise UsageError("pictures are ranked by confidence, which this segmenter lacks; open it with confidence=True")
    before = [] if labeled is None else find_images(labeled, split)
    known = {path.resolve() for path in before}
    paths = [path for path in find_images(inputs, split) if path.resolve() not in known]
    if not paths:
        raise UsageError(f"all pictures of {inputs} are in {labeled} already; give some that are not labeled")
    failed: list[tuple[Path, str]] = []
    read: list[Ranked] = []
    features: list[Vector] = []
    for path in progress_bar([*before, *paths], desc="rank", unit="image", show=progress):
        try:
            micrograph = read_micrograph(path)
            result = segmenter.segment(micrograph)
        except (UserError, OSError, MemoryError) as exc:
            reason = str(exc) or type(exc).__name__
            failed.append((path, reason if str(path) in reason else f"{path}: {reason}"))
            LOG.warning("%s", failed[-1][1])
            continue
        assert result.confidence is not None
        expected = 1 - float(result.confidence.mean(dtype=np.float64))
        read.append(Ranked(path, expected, np.inf, result.domain))
        features.append(looks(to_grey8(micrograph.pixels, result.window)[0], list(result.fractions().values())))
    first = sum(one.image.resolve() in known for one in read)
    if len(read) == first:
        raise BadInputFile(f"none of the pictures could be read; {failed[0][1]}")
    order = farthest_first(np.asarray([one.worth for one in read]), np.stack(features), first)
    return Ranking([replace(read[index], novelty=novelty) for index, novelty in order], failed)


def looks(grey: npt.NDArray[np.uint8], fractions: Sequence[float]) -> Vector:
    """What a picture looks like, in few numbers: the fractions of the classes in it, mean and standard deviation of its
    grey values, and the logarithm of how much detail it has in each octave (of a Laplacian pyramid)."""
    level = grey.astype(np.float32)
    numbers = [*fractions, float(level.mean()), float(level.std())]
    for _ in range(_BANDS):
        smaller = cv2.pyrDown(level)
        detail = level - cv2.pyrUp(smaller, dstsize=(level.shape[1], level.shape[0]))
        numbers.append(float(np.log1p(detail.std())))
        level = np.asarray(smaller, np.float32)
    return np.asarray(numbers)


def farthest_first(worth: Vector, features: npt.NDArray[np.float64], before: int = 0) -> list[tuple[int, float]]:
    """Indices of all but the first ``before`` entries, and each one's distance to the nearest before it.

    ``worth`` ``[N]``, not negative; ``features`` ``[N, F]``, brought to one scale here. The next is the entry of the
    largest worth times distance; equal ones go by worth, then by index.
    """
    spread = features.std(axis=0)
    scaled = (features - features.mean(axis=0)) / np.where(spread > 0, spread, 1) / np.sqrt(features.shape[1])
    nearest = np.full(len(worth), np.inf)
    for index in range(before):
        nearest = np.minimum(nearest, np.linalg.norm(scaled - scaled[index], axis=1))
    left = list(range(before, len(worth)))
    order = []
    while left:
        products = worth if np.isinf(nearest).all() else worth * nearest
        place = max(left, key=lambda index: (float(products[index]), float(worth[index]), -index))
        order.append((place, float(nearest[place])))
        left.remove(place)
        nearest = np.minimum(nearest, np.linalg.norm(scaled - scaled[place], axis=1))
    return order


def read_ranking(path: str | Path) -> list[Path]:
    """The pictures of a file that :meth:`Ranking.write` wrote, in order; :class:`BadInputFile` for any other file."""
    try:
        rows = csv.DictReader(decoded_text(read_file(path, "ranking")).splitlines())
        images = [Path(row["image"]) for row in rows]
    except (ValueError, KeyError, TypeError, csv.Error) as exc:
        raise BadInputFile(f"{path} is no order of pictures; make one with `hpddrnet-trt rank`") from exc
    return images
