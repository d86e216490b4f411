"""An engine's tiles put together to maps of an image, or of a rectangle of it; their geometry: :mod:`.tiling`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.metrics import arg_max, softmax
from hpddrnet_trt.core.uncertainty import STEP, calibrated
from hpddrnet_trt.data.preprocess import TtaTransform, magnified
from hpddrnet_trt.inference.runner import Grey8, Inference, InferenceOutput, Progress, Real
from hpddrnet_trt.inference.tiling import Method, Seams, TilePart, TilePlan, blend, own_parts


class Tiled(NamedTuple):
    """What is known of tiles after :func:`segment_tiled`: their ``seams``, the domain ``features`` of each, None where
    it has none, and :attr:`InferenceOutput.sampled` of what the tiles see."""

    method: Method
    seams: Seams
    features: list[Real | None]
    sampled: Real | None


def segment_tiled(
    inference: Inference,
    part: TilePart,
    pictures: Iterable[Grey8 | None],
    labels: Plane,
    confidence: Plane | None,
    progress: Progress | None = None,
) -> Tiled:
    """Fill ``labels`` uint8 and, where given, ``confidence`` float32, band by band.

    ``pictures``: what the network sees of each tile of ``part``, in its order; None for one that is left out. Where
    no tile is, ``labels`` and ``confidence`` may stay as they are.
    """
    seams, features, sampled = Seams(part), list[Real | None](), list[Real]()
    with closing(_tiles(inference, part, pictures, seams, progress, features)) as tiles:
        if inference.gives_logits:
            temperature = inference.manifest.temperature
            for rows, scores in blend(part, map(_scores, tiles)):
                labels.put((rows, part.columns), scores, lambda some: arg_max(some[None])[0])
                if inference.sampling:
                    taken = scores[:, -rows.start % STEP :: STEP, ::STEP]
                    sampled.append(_probabilities(inference, taken, None))
                if confidence is not None:
                    confidence.put(
                        (rows, part.columns), scores,
                        lambda some: _probabilities(inference, some, temperature).max(axis=0),
                    )  # fmt: skip
            return Tiled("blended scores", seams, features, np.concatenate(sampled, axis=1) if sampled else None)
        for (here, inside), tile in zip(own_parts(part), tiles, strict=True):
            if tile is not None:
                labels.put(here, tile.labels[inside])
                if confidence is not None and tile.confidence is not None:
                    confidence.put(here, tile.confidence[inside])
        return Tiled("cut labels", seams, features, None)


class Plane:
    """A map of an image, or of some ``rows`` and ``columns`` of it, that takes what tiles of ``plan`` say there.

    ``values`` ``[len(rows), len(columns)]``. ``shape``: height and width of the image, which the tiles may see enlarged
    or shrunk: each of its pixels takes the nearest one of theirs.
    """

    def __init__(
        self,
        values: npt.NDArray[Any],
        plan: TilePlan,
        shape: tuple[int, ...],
        rows: range | None = None,
        columns: range | None = None,
    ) -> None:
        self.values = values
        own = (range(shape[0]) if rows is None else rows, range(shape[1]) if columns is None else columns)
        self._thinned = any(of.step > 1 for of in own)
        self._same = tuple(shape) == (plan.height, plan.width)
        # The pixel that the tiles see of each row and column.
        self.seen = tuple(
            seen_from(np.asarray(of), size, seen)
            for of, size, seen in zip(own, shape, (plan.height, plan.width), strict=True)
        )

    def where(self, place: tuple[slice, slice]) -> tuple[slice, slice]:
        """The part of ``values`` that shows these rows and columns of what the tiles see."""
        bounds = [np.searchsorted(of, (at.start, at.stop)) for of, at in zip(self.seen, place, strict=True)]
        rows, columns = (slice(int(begin), int(end)) for begin, end in bounds)
        return rows, columns

    def put(
        self,
        place: tuple[slice, slice],
        given: npt.NDArray[Any],
        then: Callable[[npt.NDArray[Any]], npt.NDArray[Any]] | None = None,
    ) -> None:
        """Take what is given ``[..., h, w]`` for these rows and columns, as the tiles see them.

        ``then``: makes values of it, pixel by pixel.
        """
        where = self.where(place)
        rows, columns = (of[at] - within.start for of, at, within in zip(self.seen, where, place, strict=True))
        if not rows.size or not columns.size:
            return
        if then is not None and not self._thinned:
            given, then = then(given), None
        given = given[..., _regular(rows), _regular(columns)] if self._same else given[..., *np.ix_(rows, columns)]
        self.values[where] = given if then is None else then(given)


def seen_from(rows: npt.NDArray[np.integer], size: int, seen: int) -> npt.NDArray[np.intp]:
    """Which of ``seen`` pixels along a direction is nearest to each of these ``rows`` of ``size``."""
    return ((rows + 0.5) * (seen / size)).astype(np.intp)


def _regular(numbers: npt.NDArray[np.integer]) -> slice:
    """Equally spaced numbers as a slice."""
    return slice(int(numbers[0]), int(numbers[-1]) + 1, int(numbers[1] - numbers[0]) if numbers.size > 1 else 1)


def tile_pictures(pixels: Grey8, plan: TilePlan) -> Iterator[Grey8]:
    """What each tile sees of an image in memory."""
    if pixels.shape[:2] != (plan.height, plan.width):
        pixels = magnified(pixels, plan.height, plan.width)
    return (pixels[place] for place in plan.whole)


def scores_tiled(
    inference: Inference, pixels: npt.NDArray[np.uint8], plan: TilePlan, progress: Progress | None
) -> npt.NDArray[np.float32]:
    """Class probabilities ``[C, H, W]``, all in memory, as large as ``pixels``."""
    probabilities = np.empty((inference.manifest.network.num_classes, plan.height, plan.width), dtype=np.float32)
    part = plan.whole
    with closing(_tiles(inference, part, tile_pictures(pixels, plan), Seams(part), progress, [])) as tiles:
        for rows, scores in blend(part, map(_scores, tiles)):
            probabilities[:, rows] = _probabilities(inference, scores, inference.manifest.temperature)
    return TtaTransform(plan.height, plan.width).restore_scores(probabilities, *pixels.shape[:2])


def _tiles(
    inference: Inference,
    part: TilePart,
    pictures: Iterable[Grey8 | None],
    seams: Seams,
    progress: Progress | None,
    features: list[Real | None],
) -> Generator[InferenceOutput | None]:
    """The tiles in order, None for one that is left out; ``seams`` and ``features`` are told of each."""
    with closing(_each_or_none(inference, pictures)) as tiles:
        for done, tile in enumerate(tiles, 1):
            if tile is not None and tile.scores is not None:
                inference.checked(tile.scores)
            seams.add(None if tile is None else tile.labels)
            features.append(None if tile is None else tile.domain_features)
            if progress is not None:
                progress(done, len(part))
            yield tile


def _each_or_none(inference: Inference, pictures: Iterable[Grey8 | None]) -> Generator[InferenceOutput | None]:
    """:meth:`Inference.each` of those that are pictures, None in the place of others."""
    missing: deque[bool] = deque()

    def given() -> Iterator[Grey8]:
        for picture in pictures:
            missing.append(picture is None)
            if picture is not None:
                yield picture

    with closing(inference.each(given())) as outputs:
        for output in outputs:
            while missing.popleft():
                yield None
            yield output
        yield from (None for _ in missing)


def _scores(tile: InferenceOutput | None) -> Real | None:
    """Of a tile of a model with logits; None of one that is left out."""
    return None if tile is None else tile.scores


def _probabilities(inference: Inference, scores: Real, temperature: float | None) -> Real:
    """What was blended ``[C, H, W]``, as probabilities: a single view gives logits."""
    return calibrated(softmax(scores[None]) if inference.mode == "single" else scores[None], temperature)[0]
