"""Is a picture like those that the model was trained on?

The network pools its own features over each cell of a picture (:mod:`hpddrnet_trt.graph.domain`); the model's
description says how they are spread over its training pictures. A cell's distance is that of Mahalanobis, with the
spread outside a few principal components taken as equal in all directions; a picture's is the median of its cells'.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.manifest import DomainRecord

OUTPUT = "domain_features"  # of an ONNX file or an engine
FINE = 4  # pixels of the image from one feature to the next, where they are taken
CELL = 256  # pixels of the image: the sides of a cell
KNEE = 0.1  # of a feature's root mean square: where the difference of two features becomes their ratio
COMPONENTS = 16
MARGIN = 1.25
FOREIGN = 1.5
DomainState = Literal["familiar", "unusual", "foreign", "not known"]


@dataclass(frozen=True)
class Domain:
    """How near a picture is to the training pictures of the model.

    ``distance``: 1 is as far as a training picture usually is from the others; None where the model has no statistics
    (``not known``). ``cells``: the distance of each cell of the picture, float32, one array ``[rows, columns]`` for
    each tile, in the order of the tiles.
    """

    state: DomainState = "not known"
    distance: float | None = None
    cells: tuple[npt.NDArray[np.float32], ...] = field(default=(), compare=False, repr=False)

    @property
    def notice(self) -> str | None:
        """What people should know: ``foreign to the model, at distance 7.1``; None where there is nothing to say."""
        words = {"foreign": "foreign to", "unusual": "unusual for"}.get(self.state)
        return None if words is None else f"{words} the model, at distance {self.distance:.2g}"

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: ``state`` and ``distance``, None where there is none."""
        known = self.distance is not None and isfinite(self.distance)
        return {"state": self.state, "distance": self.distance if known else None}


NOT_KNOWN = Domain()


def distances(features: npt.NDArray[np.float32], record: DomainRecord) -> npt.NDArray[np.float32]:
    """Distance of each cell: ``domain_features`` float32 ``[..., F, rows, columns]`` to ``[..., rows, columns]``."""
    cells = np.moveaxis(np.asarray(features, dtype=np.float64), -3, -1)
    with np.errstate(over="ignore", invalid="ignore"):  # features of a network that overflowed, or a stranger's record
        if record.unit:
            cells = np.arcsinh(cells / np.array(record.unit))
        scaled = (cells - np.array(record.mean)) / np.array(record.scale)
        squares = (scaled**2).sum(-1) / record.residual
        if record.components:
            along = (scaled @ np.array(record.components).T) ** 2
            squares += (along * (1 / np.array(record.variances) - 1 / record.residual)).sum(-1)
        distance: npt.NDArray[np.float32] = np.sqrt(np.maximum(squares, 0) / len(record.mean)).astype(np.float32)
    return distance


def domain_of(tiles: Iterable[npt.NDArray[np.float32] | None], record: DomainRecord | None) -> Domain:
    """The state of a picture from the ``domain_features`` ``[F, rows, columns]`` of its tiles.

    "not known" where the model has no statistics, or its engine gave no features.
    """
    if record is None:
        return NOT_KNOWN
    features = [tile for tile in tiles if tile is not None]
    if not features:
        return NOT_KNOWN
    flat = distances(np.concatenate([tile.reshape(len(tile), -1, 1) for tile in features], axis=1), record).ravel()
    ends = np.cumsum([tile[0].size for tile in features])[:-1]
    cells = tuple(part.reshape(tile.shape[1:]) for part, tile in zip(np.split(flat, ends), features, strict=True))
    distance = float(np.median(flat))
    if not distance < record.unusual:  # also where it is not a number
        return Domain("unusual" if distance < record.foreign else "foreign", distance, cells)
    return Domain("familiar", distance, cells)


Cells = npt.NDArray[np.floating]  # features of some cells, [cells, F]


def fit_domain(
    pictures: Sequence[tuple[Cells, Cells]], held_out: Sequence[Cells] = (), *, crops: int, source: str
) -> DomainRecord:
    """The statistics of training pictures, and from which distances on others are unusual and foreign.

    ``pictures``: of each picture the cells of its crops, from which the statistics come, and those of the whole
    picture, whose distance from statistics without it is measured; ``held_out``: the cells of whole pictures that
    the model was not trained on. Distances are divided by the median of the former. ``unusual`` begins :data:`MARGIN`
    beyond all but the farthest hundredth of both, ``foreign`` :data:`FOREIGN` times there.

    Of one picture alone, its crops take the place of pictures. Raises :class:`UserError` where the features tell
    nothing, being the same everywhere or not finite.
    """
    if len(pictures) == 1:
        parts = np.array_split(pictures[0][0], 4)
        pictures = [(part, part) for part in parts if len(part)]
    parts = [np.asarray(cells, dtype=np.float64) for cells, _ in pictures]
    together = np.concatenate(parts)
    unit = KNEE * np.sqrt((together**2).mean(axis=0))
    if not np.isfinite(unit).all() or not (together.std(axis=0) > 0).any():
        raise UserError(f"the features of {source} are the same everywhere or not finite; check pictures and model")
    unit = np.maximum(unit, 1e-12)
    compressed = [np.arcsinh(part / unit) for part in parts]

    def record(chosen: Sequence[Cells], size: float = 1.0, unusual: float = 1.0) -> DomainRecord:
        return DomainRecord.model_validate(
            {**_gaussian(np.concatenate(chosen), size**2), "unit": _written(unit), "unusual": _written(unusual),
             "foreign": _written(FOREIGN * unusual), "crops": crops, "pictures": len(pictures), "source": source[:1000]}
        )  # fmt: skip

    def distance(cells: Cells, known: DomainRecord) -> float:
        return float(np.median(distances(np.asarray(cells).T[:, :, None], known)))

    without_itself = [
        distance(whole, record(compressed[:place] + compressed[place + 1 :]))
        for place, (_, whole) in enumerate(pictures)
    ]
    everything = record(compressed)
    others = [distance(cells, everything) for cells in held_out]
    size = float(np.median(without_itself))
    return record(compressed, size, MARGIN * float(np.quantile([*without_itself, *others], 0.99)) / size)


def _gaussian(cells: Cells, size: float) -> dict[str, Any]:
    """Mean, scale and principal components with their variances times ``size``."""
    mean, scale = cells.mean(axis=0), cells.std(axis=0)
    scale = np.maximum(scale, 1e-3 * scale.mean())
    variances, directions = np.linalg.eigh(np.cov((cells - mean) / scale, rowvar=False))
    kept = min(COMPONENTS, len(cells) // 3, len(mean) - 1)
    residual = max(float(variances[: len(mean) - kept].mean()), 1e-4)
    largest = slice(len(mean) - kept, None)
    return {
        "mean": _written(mean), "scale": _written(scale), "components": _written(directions.T[largest][::-1]),
        "variances": _written(np.maximum(variances[largest][::-1], residual) * size),
        "residual": _written(residual * size),
    }  # fmt: skip


def _written(values: Any) -> Any:
    """Six significant digits are enough."""
    return np.vectorize(lambda value: float(f"{value:.6g}"), otypes=[float])(values).tolist()
