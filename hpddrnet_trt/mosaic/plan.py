"""What a mosaic will take, before it is begun: tiles, bytes, time, cost, room on the disk."""

from __future__ import annotations

import shutil
import zlib
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.text import duration, megabytes, percent, scaled
from hpddrnet_trt.mosaic.block import segment_block
from hpddrnet_trt.mosaic.cluster import ClusterSettings, on_a_worker
from hpddrnet_trt.mosaic.create import labels_folder
from hpddrnet_trt.mosaic.layout import CELL, Box
from hpddrnet_trt.mosaic.pixels import read_box, tiles_of
from hpddrnet_trt.mosaic.prepare import MosaicOptions, Prepared, prepare_on
from hpddrnet_trt.mosaic.store import open_store
from hpddrnet_trt.mosaic.work import open_model
from hpddrnet_trt.weights import DEFAULT

PLACES = (0.5, 0.25, 0.75)  # of the mosaic's sides: what is timed there; the first makes the engine ready, too
TIMED = 2048  # pixels along each side of what is timed, at most
PYRAMID = 4 / 3  # pixels of all levels for one of the first


class Timed(NamedTuple):
    """``tiles`` took ``seconds``, without writing; their labels shrank to a share ``packed`` of their pixels."""

    tiles: int
    seconds: float
    packed: float


@dataclass(frozen=True)
class MosaicPlan:
    """What :func:`~hpddrnet_trt.segment_mosaic` would do with the same arguments.

    ``done`` of ``blocks`` are in ``store`` already; the rest is of the others. ``tiles``: to be computed; ``overhead``:
    share of those of the mosaic that are computed in addition, since blocks compute what lies at their borders each for
    itself. ``bytes_read``: of pixels, without compression. ``bytes_written``: as labels at the timed places could be
    packed; ``bytes_at_most``: without compression. ``bytes_free``: on the disk. ``timed_tiles``: by how many tiles
    ``seconds`` were found, for all ``workers`` together if each is as fast as the one that was timed; None where there
    was nothing to time. ``cost``: of these.
    """

    store: Path
    shape: tuple[int, int, int]
    remarks: tuple[str, ...]
    blocks: int
    done: int
    tiles: int
    overhead: float
    bytes_read: int
    bytes_written: int
    bytes_at_most: int
    bytes_free: int
    workers: int
    timed_tiles: int
    seconds: float | None
    cost: float | None

    def record(self) -> dict[str, Any]:
        """JSON-able: the fields by their names."""
        return {**asdict(self), "store": str(self.store)}

    def __str__(self) -> str:
        slices, height, width = self.shape
        lines = [
            f"{width} x {height}{f' in {slices} slices' * (slices > 1)}, {scaled(slices * height * width)} pixels: "
            f"{self.blocks} block{'s' * (self.blocks > 1)}, of which {self.done} are done; labels in {self.store}",
            f"{self.tiles} tiles to compute, {percent(self.overhead, 0)} more than the mosaic has, at blocks' borders",
            f"to read {megabytes(self.bytes_read)}, to write about {megabytes(self.bytes_written)} (at most "
            f"{megabytes(self.bytes_at_most)}), free {megabytes(self.bytes_free)}",
        ]
        if self.seconds is not None:
            cost = "" if self.cost is None else f", at a cost of {self.cost:.2f}"
            lines.append(
                f"about {duration(self.seconds)} with {self.workers} worker{'s' * (self.workers > 1)}{cost}, by "
                f"{self.timed_tiles} tiles that were timed; empty parts take less"
            )
        if self.bytes_written > self.bytes_free:
            lines.append("the disk has too little room; free some, or write elsewhere with --to")
        return "\n".join([*lines, *(f"note: {remark}" for remark in self.remarks)])


def plan_mosaic(
    path: str | Path,
    model: str | Path = DEFAULT,
    options: MosaicOptions = MosaicOptions(),
    cluster: ClusterSettings = ClusterSettings(),
    *,
    cost_per_hour: float | None = None,
) -> MosaicPlan:
    """Say what :func:`~hpddrnet_trt.segment_mosaic` would do; nothing is written. Some tiles are computed and timed.

    ``cost_per_hour``: of one worker. Raises what that raises for what it would not begin with.
    """
    source = options.open_source(path)
    folder, _ = labels_folder(options.output, options.name, source)
    with ExitStack() as at_work:
        client, prepared = prepare_on(at_work, source, model, options, cluster)
        done = set[Box]()
        if folder.is_dir() and any(folder.iterdir()) and not options.restart:
            done = prepared.done(open_store(folder).records())
        todo = [box for box in prepared.layout if box not in done]
        if client is None:
            workers = prepared.workers(cluster)
            timed = time_tiles(prepared)
        else:
            workers = len(client.nthreads())
            timed = on_a_worker(client, cluster.patience, time_tiles, prepared)
    tiles_in = {box: len(tiles_of(prepared.grid, source.shape, box)) for box in prepared.layout}
    tiles = sum(tiles_in[box] for box in todo)
    pixels = sum(box.height * box.width for box in todo)
    reads = (read_box(prepared.grid, source.shape, box) for box in todo)
    workers = min(workers, max(1, len(todo)))
    seconds = timed.seconds / timed.tiles * tiles / workers if timed.tiles else None
    cost = None if seconds is None or cost_per_hour is None else seconds / 3600 * cost_per_hour * workers
    maps = 2 * 4 * pixels // CELL**2
    return MosaicPlan(
        folder, source.shape, prepared.remarks, len(prepared.layout), len(done),
        tiles, sum(tiles_in.values()) / (source.shape[0] * len(prepared.grid.whole)) - 1,
        sum(box.height * box.width for box in reads) * source.dtype.itemsize,
        int(pixels * timed.packed * PYRAMID) + maps, int(pixels * PYRAMID) + maps, _free(folder), workers, timed.tiles,
        seconds, cost,
    )  # fmt: skip


def time_tiles(prepared: Prepared) -> Timed:
    """Segment some places of the mosaic, and say how long that took."""
    slices, height, width = prepared.layout.shape
    tiles, seconds, packed, pixels = 0, 0.0, 0, 0
    with open_model(prepared.settings) as segmenter:
        for number, part in enumerate(PLACES):
            side = min(TIMED, prepared.settings.block)
            top, left = (max(0, int(part * size) - side) // CELL * CELL for size in (height, width))
            box = Box(slices // 2, top, left, min(side, height - top), min(side, width - left))
            result = segment_block(segmenter, prepared.source, prepared.grid, prepared.settings, box)
            if number or min(height, width) <= side:
                tiles, seconds = tiles + result.record.tiles, seconds + sum(result.record.seconds.values())
            packed, pixels = packed + len(zlib.compress(result.labels.tobytes(), 1)), pixels + result.labels.size
    return Timed(tiles, seconds, packed / pixels)


def _free(folder: Path) -> int:
    place = folder
    while not place.exists():
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError as exc:
        raise UserError(f"cannot look at {place}: {exc.strerror}; choose another place with --to") from exc
