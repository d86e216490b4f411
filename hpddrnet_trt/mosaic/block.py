"""One block of a mosaic through the engine.

A block is made of every tile of the mosaic's grid that has a say in it, with the weights that the tiles have in the
mosaic, added in the grid's order. So its labels, its maps and its share of each figure are the same however the
mosaic is cut into blocks, and whoever computes them. At factor 1, where nothing is empty, they are those of
:meth:`~hpddrnet_trt.inference.segmenter.Segmenter.segment` of the whole mosaic with this tile, if it is of several. (A
single tile it runs by :meth:`~hpddrnet_trt.engines.base.Engine.infer`, and this module every one by ``infer_many``, for
which OpenVINO rounds otherwise.)

A tile is left out if all that it sees lies in empty cells. Its say reaches no further, and empty cells get no label
whatever is said of them, so nothing depends on it.

Memory is that of the pixels that are read, in 8 bits, and of the labels, both of the block's area, of a band of the
source's pixels, and of class scores as high as a tile and as wide as the block; the mosaic's size does not matter.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.domain import Domain, domain_of
from hpddrnet_trt.core.memory import peak_memory_mib
from hpddrnet_trt.core.uncertainty import STEP
from hpddrnet_trt.data.intensity import level_counts
from hpddrnet_trt.inference.segmenter import Segmenter
from hpddrnet_trt.inference.tiled import Plane, segment_tiled
from hpddrnet_trt.inference.tiling import TilePart, TilePlan, cuts, own_parts
from hpddrnet_trt.mosaic.layout import (
    CELL,
    NO_DATA,
    BlockRecord,
    BlockResult,
    Box,
    MosaicSettings,
    Source,
)
from hpddrnet_trt.mosaic.pixels import Pixels, read_box, read_pixels, tiles_of

Real = npt.NDArray[np.float32]


def segment_block(
    segmenter: Segmenter, source: Source, grid: TilePlan, settings: MosaicSettings, box: Box
) -> BlockResult:
    """Read ``box`` of ``source`` with the margin that its tiles need, and segment it.

    ``grid``: that of the mosaic, :func:`~hpddrnet_trt.mosaic.choices.grid_for`. The box begins at multiples of
    :data:`~hpddrnet_trt.mosaic.layout.CELL`. The record has no time for writing.

    Raises what the engine raises; what cannot be read of the source is in the record.
    """
    begun = perf_counter()
    signature = source.signature(read_box(grid, source.shape, box))
    pixels = read_pixels(source, grid, settings.window, box, skip_empty=settings.skip_empty)
    read = perf_counter()

    shape, part = source.shape[1:], tiles_of(grid, source.shape, box)
    rows, columns = (range(of.start, of.stop) for of in (box.rows, box.columns))
    labels = Plane(np.full((box.height, box.width), NO_DATA, np.uint8), grid, shape, rows, columns)
    looked_at = rows[::STEP], columns[::STEP]
    sure = np.full((len(looked_at[0]), len(looked_at[1])), np.nan, np.float32)
    left_out = list[bool]()

    def pictures() -> Any:
        for place in part:
            picture = pixels.picture(place)
            left_out.append(picture is None)
            yield picture

    tiled = segment_tiled(segmenter.of_tiles(), part, pictures(), labels, Plane(sure, grid, shape, *looked_at))
    known = [domain_of([features], segmenter.manifest.domain) for features in tiled.features]
    unreadable = _without_data(labels.values, pixels, box)
    classes = segmenter.manifest.network.num_classes
    counts = level_counts(labels.values)
    record = BlockRecord(
        block=box,
        pixels=tuple(counts[:classes].tolist()),
        foreign_pixels=tuple(_foreign(labels, part, known, classes).tolist()),
        empty=int(counts[NO_DATA]) - unreadable,
        unreadable=unreadable,
        problems=tuple(dict.fromkeys(why for where, why in pixels.unreadable if all(where.common(box)[3:]))),
        tiles=left_out.count(False),
        own_tiles=dict(
            Counter(
                domain.state
                for number, domain, out in zip(part.numbers, known, left_out, strict=True)
                if part.owns(*number) and not out
            )
        ),
        seam_pixels=(tiled.seams.compared, tiled.seams.different),
        signature=signature,
        checksum=hashlib.sha256(labels.values.data).hexdigest(),
        seconds={"read": read - begun, "compute": perf_counter() - read},
        bytes_read=pixels.bytes_read,
        peak_bytes=int(peak_memory_mib() * (1 << 20)),
    )
    here = labels.values[::STEP, ::STEP] != NO_DATA
    confidence, labelled = _cell_means(sure, here)
    distance = np.where(labelled, _distances(labels, part, known), np.float32(np.nan))
    return BlockResult(labels.values, confidence, distance, record)


def _without_data(labels: npt.NDArray[np.uint8], pixels: Pixels, box: Box) -> int:
    """Take the labels from empty cells, from what belongs to them in cells that touch them, and from what is
    unreadable; the number of unreadable pixels."""
    empty = pixels.cells_of(box.rows, box.columns)
    for row in np.flatnonzero(empty.any(axis=1)):
        columns = np.repeat(empty[row], CELL)[: box.width]
        labels[row * CELL : (row + 1) * CELL, columns] = NO_DATA
    for rows, across, edge in pixels.edges_of_empty(box):
        labels[rows, across][edge] = NO_DATA
    if not pixels.unreadable:
        return 0
    damaged = np.zeros(labels.shape, np.bool_)
    for where, _ in pixels.unreadable:
        damaged[where.common(box).within(box)] = True
    labels[damaged] = NO_DATA
    return int(np.count_nonzero(damaged))


def _foreign(labels: Plane, part: TilePart, known: list[Domain], classes: int) -> npt.NDArray[np.int64]:
    """Pixels of each class that tiles foreign to the model decide."""
    total = np.zeros(classes, np.int64)
    for (here, _), domain in zip(own_parts(part), known, strict=True):
        if domain.state == "foreign":
            total += level_counts(labels.values[labels.where(here)])[:classes]
    return total


def _cell_means(values: Real, known: npt.NDArray[np.bool_]) -> tuple[Real, npt.NDArray[np.bool_]]:
    """Mean over the ``known`` values of each cell, every :data:`STEP`-th pixel, and whether there is any.

    The sums are exact in 64 bits, so it does not matter in what order they are taken.
    """
    corners = [np.arange(0, size, CELL // STEP) for size in values.shape]

    def sums(of: npt.NDArray[Any], kind: type) -> npt.NDArray[Any]:
        high: npt.NDArray[Any] = np.add.reduceat(of, corners[0], axis=0, dtype=kind)
        wide: npt.NDArray[Any] = np.add.reduceat(high, corners[1], axis=1)
        return wide

    counts = sums(known, np.int64)
    means = sums(np.where(known, values, 0), np.float64) / np.where(counts > 0, counts, np.nan)
    return means.astype(np.float32), counts > 0


def _distances(labels: Plane, part: TilePart, known: list[Domain]) -> Real:
    """The distance of the tile that decides the middle of each cell; NaN where it is not known."""
    plan = part.plan
    of_tiles = np.array([np.nan if domain.distance is None else domain.distance for domain in known], np.float32)
    tiles = []
    for seen, starts, chosen, tile, size in (
        (labels.seen[0], plan.rows, part.down, plan.tile[0], plan.height),
        (labels.seen[1], plan.columns, part.across, plan.tile[1], plan.width),
    ):
        begins = np.arange(0, len(seen), CELL)
        middles = seen[(begins + np.minimum(begins + CELL, len(seen))) // 2]
        tiles.append(np.searchsorted(cuts(starts, tile, size), middles, side="right") - 1 - chosen[0])
    return of_tiles.reshape(len(part.down), len(part.across))[np.ix_(*tiles)]
