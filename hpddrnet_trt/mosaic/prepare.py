"""What is chosen once for a mosaic, before its first block: source, model, grey window, magnification, tiles."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hpddrnet_trt import __version__
from hpddrnet_trt.core.manifest import Manifest
from hpddrnet_trt.core.provenance import command_line
from hpddrnet_trt.data.intensity import IntensityRange
from hpddrnet_trt.engines import ENGINES, Arithmetic, opening_of
from hpddrnet_trt.engines.cuda import gpu_count
from hpddrnet_trt.inference.result import Provenance
from hpddrnet_trt.inference.runner import Tile
from hpddrnet_trt.inference.segmenter import load_segmenter
from hpddrnet_trt.inference.tiling import TilePlan
from hpddrnet_trt.mosaic.choices import chosen_factor, chosen_window, grid_for
from hpddrnet_trt.mosaic.cluster import Client, ClusterSettings, default_workers, on_a_worker, open_client
from hpddrnet_trt.mosaic.layout import BLOCK, BlockRecord, Box, Layout, MosaicSettings, Source
from hpddrnet_trt.mosaic.pixels import read_box
from hpddrnet_trt.mosaic.regions import RegionTask
from hpddrnet_trt.mosaic.sources import open_source

LOOKING = 16  # threads that ask for times and sizes of files


@dataclass(frozen=True)
class MosaicOptions:
    """How a mosaic is read, segmented and written.

    Written to ``output`` (None: the OME-Zarr that is read) as labels called ``name``, from the beginning with
    ``restart``. ``regions``: a table of them (``.parquet`` or ``.csv``), without those of the classes ``background``
    and those of less than ``smallest`` pixels. ``smooth_slices``: so many slices of a volume vote on each pixel, 1:
    none. ``image``, ``channel``, ``positions``, ``pixel_size_m``, ``spacing_m``: as
    :func:`~hpddrnet_trt.mosaic.sources.open_source` takes them. ``engine``, ``precision``, ``device``, ``rescale``,
    ``tile``, ``window``: as :func:`~hpddrnet_trt.load_segmenter` takes them; ``threads``: of one worker, 1 unless
    given. ``block``: pixels along each side of what a worker does at a time; more of them need less work at borders,
    and more memory. ``skip_empty``: cells of nothing but the source's fill value were never acquired, and get no label.
    """

    output: Path | None = None
    name: str = "classes"
    restart: bool = False
    regions: Path | None = None
    background: Sequence[str] = ()
    smallest: int = 1
    smooth_slices: int = 1
    image: str | None = None
    channel: int | None = None
    positions: Path | None = None
    pixel_size_m: float | None = None
    spacing_m: float | None = None
    engine: str = "auto"
    precision: Arithmetic = "auto"
    threads: int | None = None
    device: str | None = None
    window: IntensityRange = None
    rescale: bool = True
    tile: Tile = "auto"
    block: int = BLOCK
    skip_empty: bool = True

    def open_source(self, path: str | Path) -> Source:
        """What is read."""
        return open_source(
            path, image=self.image, positions=self.positions, channel=self.channel, pixel_size=self.pixel_size_m,
            spacing=self.spacing_m,
        )  # fmt: skip


@dataclass(frozen=True)
class Examined:
    """What a machine that runs a model says of it: ``settings`` as far as the model decides them, ``gpus`` of this
    machine that it can run on."""

    manifest: Manifest
    engine: str
    sha256: str
    runtime: str
    precision: str | None
    threads: int | None
    gpus: int


def examine(model: str, options: MosaicOptions) -> Examined:
    """Open the model as a worker will, and say what it is."""
    asked = {"threads": options.threads, "device": options.device}
    engine = opening_of(model, options.engine, options.precision, asked).engine
    takes_threads = "threads" in inspect.signature(ENGINES[engine].load_class()).parameters
    threads = options.threads or (1 if takes_threads else None)
    with load_segmenter(
        model, engine=engine, precision=options.precision, threads=threads, device=options.device
    ) as segmenter:
        return Examined(
            segmenter.manifest, engine, segmenter.model_sha256 or "", segmenter.engine.runtime,
            segmenter.engine.arithmetic, threads, gpu_count() if ENGINES[engine].gpu else 0,
        )  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """What is chosen once for a mosaic."""

    source: Source
    settings: MosaicSettings
    manifest: Manifest
    grid: TilePlan
    layout: Layout
    provenance: dict[str, Any]
    remarks: tuple[str, ...]
    gpus: int

    def workers(self, cluster: ClusterSettings) -> int:
        """How many are started on this machine."""
        return cluster.workers or default_workers(self.gpus if self.settings.device is None else min(self.gpus, 1))

    def regions(self, options: MosaicOptions) -> RegionTask | None:
        """Which are asked for, of labels that are not there yet; raises :class:`UsageError` for what cannot be."""
        if options.regions is None:
            return None
        return RegionTask(
            options.regions, self.source.shape, "", tuple(self.manifest.classes), self.source.pixel_size_m,
            options.background, smallest=options.smallest,
        )  # fmt: skip

    def done(self, records: Iterable[BlockRecord]) -> set[Box]:
        """The blocks of ``records`` that need not be done again: their pixels are still those that were read."""
        records = list(records)
        return {record.block for record in records} - set(self.changed(records))

    def changed(self, records: Iterable[BlockRecord]) -> list[Box]:
        """The blocks of which other pixels are there now than those that were read."""

        def other(record: BlockRecord) -> bool:
            return record.signature != self.source.signature(read_box(self.grid, self.source.shape, record.block))

        records = list(records)
        with ThreadPoolExecutor(LOOKING) as looking:
            found = looking.map(other, records)
            return [record.block for record, differs in zip(records, found, strict=True) if differs]


def prepare(source: Source, model: str, examined: Examined, options: MosaicOptions) -> Prepared:
    """Choose tiles, grey window and magnification; raises what these raise (:mod:`.choices`)."""
    scale = chosen_factor(source, examined.manifest, options.rescale)
    factor = scale.factor or 1.0
    grid = grid_for(examined.manifest, source.shape, factor, options.tile)
    window, remarks = chosen_window(source, examined.manifest, options.window)
    settings = MosaicSettings(
        model, examined.sha256, examined.engine, options.precision, examined.threads, options.device, window, factor,
        options.tile, options.block, examined.runtime, options.skip_empty,
    )  # fmt: skip
    made_by = Provenance(
        examined.manifest.name, examined.sha256, examined.manifest.checkpoint_sha256, examined.runtime,
        examined.precision, __version__, "single", window, datetime.now(UTC).isoformat(timespec="milliseconds"),
    )  # fmt: skip
    return Prepared(
        source, settings, examined.manifest, grid, Layout(source.shape, options.block),
        {**made_by.as_dict(), "command": command_line()},
        remarks if scale.remark is None else (*remarks, scale.remark), examined.gpus,
    )  # fmt: skip


def prepare_on(
    at_work: ExitStack, source: Source, model: str | Path, options: MosaicOptions, cluster: ClusterSettings
) -> tuple[Client | None, Prepared]:
    """The choices for a mosaic, and the client of a scheduler that is there already, open as long as ``at_work``.

    The model is looked at where it will run: by a worker of that scheduler, or else in this process.
    """
    name = str(Path(model).absolute()) if Path(model).is_file() else str(model)
    if cluster.scheduler is None:
        return None, prepare(source, name, examine(name, options), options)
    client = at_work.enter_context(open_client(cluster, 0))
    return client, prepare(source, name, on_a_worker(client, cluster.patience, examine, name, options), options)
