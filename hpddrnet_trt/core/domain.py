"""Is a picture like those that the model was trained on?

The network pools its own features over each cell of a picture (:mod:`hpddrnet_trt.graph.domain`); the model's
description says how they are spread over its training pictures. A cell's distance is that of Mahalanobis, with the
spread outside a few principal components taken as equal in all directions; a picture's is the median of its cells'.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.manifest import DomainRecord

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
    cells = tuple(distances(tile, record) for tile in tiles if tile is not None)
    if not cells:
        return NOT_KNOWN
    distance = float(np.median(np.concatenate([tile.ravel() for tile in cells])))
    if not distance < record.unusual:  # also where it is not a number
        return Domain("unusual" if distance < record.foreign else "foreign", distance, cells)
    return Domain("familiar", distance, cells)
