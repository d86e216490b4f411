"""What a mosaic costs at every stage, measured here, and what follows for 1,000 GPUs and 10^12 pixels, simulated.

    python benchmarks/scaling.py WORKPLACE [--page docs/scaling.md]
    python benchmarks/scaling.py --inputs docs/results/scaling-2026-11.json [--price 2.5] [--page docs/scaling.md]

The first measures (under 4 minutes on an idle machine; 100 MB in the empty folder WORKPLACE), runs a mosaic with 1, 2
and 4 workers to hold the simulation against, and writes the JSON; the second reads it. Both simulate, print the tables,
put them between the markers of the page, and draw its figure.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from hpddrnet_trt import __version__
from hpddrnet_trt.core.text import duration, number, percent
from hpddrnet_trt.data.simulate import simulate as picture_of
from hpddrnet_trt.inference.tiling import plan_tiles
from hpddrnet_trt.mosaic.block import segment_block
from hpddrnet_trt.mosaic.cluster import ClusterSettings, Workers, default_workers, open_client
from hpddrnet_trt.mosaic.create import create_store
from hpddrnet_trt.mosaic.layout import CELL, SHARD, BlockResult, Box, Layout
from hpddrnet_trt.mosaic.pixels import read_box, read_pixels, tiles_of
from hpddrnet_trt.mosaic.prepare import MosaicOptions, Prepared, examine, prepare
from hpddrnet_trt.mosaic.regions import BLOCK as REGIONS
from hpddrnet_trt.mosaic.regions import RegionTask, regions_of_block
from hpddrnet_trt.mosaic.run import segment_mosaic
from hpddrnet_trt.mosaic.store import open_store
from hpddrnet_trt.mosaic.summary import summarize
from hpddrnet_trt.mosaic.work import MosaicWork, open_model

ROOT = Path(__file__).parents[1]
JSON, FIGURE = ROOT / "docs/results/scaling-2026-11.json", ROOT / "docs/pictures/scaling.png"
MODEL, HEIGHT, WIDTH, BLOCK, RUNS = "nasa-super1", 4096, 8192, 2048, (1, 2, 4)  # what is run here
SIZES, WORKERS, BLOCKS = (1e9, 1e10, 1e11, 1e12), (1, 10, 100, 1000), (4096, 8192, 16384, 32768)
MOST_BLOCKS = 30_000  # that are simulated
STORAGES = (1e9, 1e10, 1e11)  # bytes a second of a shared file system
# What no script could measure here, where there is no GPU and no shared storage. Tiles of 1024 x 1024 a second:
GPUS = {
    "published": (149.0, "DDRNet-23-slim at 101.6 frames of 2048 x 1024 a second on an RTX 2080 Ti (Hong et al. 2021), "
                         "times the work of its network over ours, 18.12 / 24.70 GMAC"),
    "assumed": (1000.0, "49 TFLOPS, a twentieth of the dense FP16 peak in the data sheet of an H100 SXM"),
}  # fmt: skip
PER_CLIENT, HOST_CORES = 1e9, 8.0  # bytes a second that one worker gets of the storage; cores that decode for a GPU


@dataclass(frozen=True)
class Inputs:
    """Seconds of one core for 10^6 pixels, where not said otherwise.

    ``raw``: bytes from the page cache; ``decode``: into pixels; ``copy``: into 8 bits by the grey window. ``tile``:
    seconds a tile; ``spread``: its standard deviation from block to block, a share; ``crowded``: how many times longer
    it takes with all cores at work; ``join``: of a tile's seconds those that are not the engine's, which a GPU leaves
    to the host. ``pyramid``: of its own pixels. ``bytes_read``, ``bytes_written``: a pixel.
    ``task``: seconds of scheduler and client for a task; ``block_end``: of the client for a block, after the last.
    ``start``: seconds until a worker has the model.
    """

    raw: float
    decode: float
    copy: float
    write: float
    pyramid: float
    regions: float
    bytes_read: float
    bytes_written: float
    tile: float
    join: float
    crowded: float
    start: float
    task: float
    block_end: float
    spread: float


UNITS = {"tile": "s a tile", "join": "s a tile", "task": "s a task", "block_end": "s a block", "start": "s",
         "crowded": "times", "spread": "of a tile's time",
         "bytes_read": "bytes a pixel", "bytes_written": "bytes a pixel"}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """Millions of pixels read and labelled, and tiles computed."""

    read: float
    labels: float
    tiles: int


@dataclass(frozen=True)
class Task:
    """Seconds of a worker's processor and of its engine, bytes from and to the storage."""

    host: float
    compute: float
    read: float
    written: float


@dataclass(frozen=True)
class Outcome:
    """``shares``: of the time of all workers. ``storage``, ``scheduler``: which share of the time each was at work."""

    seconds: float
    efficiency: float
    shares: dict[str, float]
    storage: float
    scheduler: float

    @property
    def bottleneck(self) -> str:
        busy = {"storage": self.storage, "scheduler": self.scheduler}
        return next((name for name in busy if busy[name] > 0.75), max(self.shares, key=self.shares.__getitem__))


class Cluster:
    """``workers``, each with a task in hand and one more that the scheduler has given it; one scheduler and one storage
    of ``bandwidth``, which serve request after request."""

    def __init__(self, workers: int, bandwidth: float, seconds_of_task: float) -> None:
        self.workers, self.bandwidth, self.of_task = workers, bandwidth, seconds_of_task
        self.now = self.storage = self.scheduler = 0.0  # time, and for how long each was at work
        self.spent = dict.fromkeys(("compute", "host", "storage", "scheduler"), 0.0)

    def run(self, tasks: Sequence[Task]) -> None:
        """Until all are done."""
        free = {"storage": self.now, "scheduler": self.now}
        left, coming = iter(tasks), [list[tuple[float, Task]]() for _ in range(self.workers)]
        events: list[tuple[float, int, str, Task]] = []

        def transfer(at: float, size: float) -> float:
            if math.isinf(self.bandwidth):
                return at
            free["storage"] = max(free["storage"], at) + size / self.bandwidth
            self.storage += size / self.bandwidth
            there = max(free["storage"], at + size / min(PER_CLIENT, self.bandwidth))
            self.spent["storage"] += there - at
            return there

        def give(at: float, worker: int) -> None:
            if (task := next(left, None)) is not None:
                free["scheduler"] = max(free["scheduler"], at) + self.of_task
                self.scheduler += self.of_task
                coming[worker].append((free["scheduler"], task))

        def begin(at: float, worker: int) -> None:
            if coming[worker]:
                there, task = coming[worker].pop(0)
                self.spent["scheduler"] += max(0.0, there - at)
                heapq.heappush(events, (max(at, there), worker, "read", task))

        for worker in (*range(self.workers), *range(self.workers)):
            give(self.now, worker)
        for worker in range(self.workers):
            begin(self.now, worker)
        while events:
            at, worker, what, task = heapq.heappop(events)
            if what == "read":
                self.spent["host"] += task.host
                self.spent["compute"] += task.compute
                heapq.heappush(events, (transfer(at, task.read) + task.host + task.compute, worker, "write", task))
            elif what == "write":
                heapq.heappush(events, (transfer(at, task.written), worker, "written", task))
            else:
                self.now = max(self.now, at)
                give(at, worker)
                begin(at, worker)


def simulate(
    inputs: Inputs, blocks: Sequence[Block], workers: int, bandwidth: float = math.inf, cores: float = math.inf
) -> Outcome:
    """A mosaic from the start of its workers to the last level of its pyramid. ``cores``: that the workers share."""
    slower = max(1.0, workers / cores) * (inputs.crowded if workers >= cores else 1.0)
    noise = np.random.default_rng(0).lognormal(-(inputs.spread**2) / 2, inputs.spread, len(blocks)).tolist()
    host = inputs.raw + inputs.decode + inputs.copy
    joined = max(0.0, inputs.join - inputs.tile)  # of one tile while the engine is at the next ones
    tasks = [
        Task(slower * (block.read * host + block.labels * inputs.write + block.tiles * joined),
             slower * block.tiles * inputs.tile * factor,
             1e6 * block.read * inputs.bytes_read, 1e6 * block.labels * inputs.bytes_written)
        for block, factor in zip(blocks, noise, strict=True)
    ]  # fmt: skip
    cluster = Cluster(workers, bandwidth, inputs.task)
    cluster.run(tasks)
    pixels = 1e6 * sum(block.labels for block in blocks)
    while (pixels := pixels / 4) > 256**2:
        parts = max(1, round(pixels / SHARD**2))
        size = pixels / parts * inputs.bytes_written
        cluster.run([Task(slower * pixels / parts / 1e6 * inputs.pyramid, 0.0, 4 * size, size)] * parts)
    end = inputs.block_end * len(blocks)
    seconds = inputs.start + cluster.now + end
    shares = {part: spent / workers / seconds for part, spent in cluster.spent.items()}
    shares["start, tail, end"] = max(0.0, 1 - sum(shares.values()))
    alone = sum(task.host + task.compute + (task.read + task.written) / min(PER_CLIENT, bandwidth) for task in tasks)
    busy = cluster.storage / seconds, (cluster.scheduler + end) / seconds
    return Outcome(seconds, alone / slower / workers / seconds, shares, *busy)


def large(pixels: float, block: int) -> list[Block]:
    """The blocks of a square mosaic; those at its border are taken to cost what those inside do."""
    grid, shape = plan_tiles(1 << 20, 1 << 20, (1024, 1024)), (1, 1 << 20, 1 << 20)
    box = Box(0, 8 * block, 8 * block, block, block)
    area = read_box(grid, shape, box)
    one = Block(area.height * area.width / 1e6, block**2 / 1e6, len(tiles_of(grid, shape, box)))
    return [one] * max(1, round(pixels / block**2))


def best(gpu: Inputs, pixels: float, workers: int, bandwidth: float) -> tuple[int, Outcome]:
    """The size of blocks that is done first, and how."""
    sizes = [block for block in BLOCKS if pixels / block**2 < MOST_BLOCKS]
    found = [(block, simulate(gpu, large(pixels, block), workers, bandwidth)) for block in sizes]
    return min(found, key=lambda entry: entry[1].seconds)


def on_gpus(inputs: Inputs, rate: float) -> Inputs:
    return replace(inputs, tile=1 / rate, crowded=1.0, decode=inputs.decode / HOST_CORES)


# The measurements


def measure(place: Path) -> dict[str, Any]:
    """All inputs and runs, JSON-able."""
    _write_mosaic(place / "mosaic.zarr")
    runs, records = [], []
    for workers in RUNS:
        options = MosaicOptions(output=place / f"labels{workers}.zarr", block=BLOCK)
        run = segment_mosaic(place / "mosaic.zarr", MODEL, options, ClusterSettings(workers=workers), progress=False)
        runs.append({"workers": workers, "seconds": run.seconds})
        records.append({entry.block: entry for entry in open_store(run.store).records()})
    checksums = [{box: entry.checksum for box, entry in done.items()} for done in records]
    if any(of_run != checksums[0] for of_run in checksums):
        raise SystemExit("labels differ with the number of workers: nothing of this can be used")
    tiles = [entry.seconds["compute"] / entry.tiles for entry in records[0].values()]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # limited to one core, as the others are to come
        stages = pool.submit(_stages, place).result()
    inputs = Inputs(**stages, **_tiles(place), **_overheads(place), spread=float(np.std(tiles) / np.mean(tiles)))
    blocks = [Block(of.bytes_read / 1e6, box.height * box.width / 1e6, of.tiles) for box, of in records[0].items()]
    return {
        "machine": platform.processor() or platform.machine(), "cores": default_workers(0), "version": __version__,
        "python": platform.python_version(), "command": f"python {' '.join(sys.argv)}", "inputs": asdict(inputs),
        "mosaic": [WIDTH, HEIGHT], "runs": runs, "blocks": [asdict(block) for block in blocks],
    }  # fmt: skip


def _write_mosaic(target: Path) -> None:
    import zarr

    tile, _ = picture_of(1024, 1024, 5)
    four = np.block([[tile, tile[:, ::-1]], [tile[::-1], tile[::-1, ::-1]]])
    group = zarr.open_group(str(target), mode="w", zarr_format=3)
    level = group.create_array("0", shape=(HEIGHT, WIDTH), dtype="u1", chunks=(1024, 1024), shards=(2048, 2048))
    level[...] = np.tile(four, (HEIGHT // 2048, WIDTH // 2048))
    axes: Any = [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "yx"]
    scaled: Any = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [10.0, 10.0]}]}
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [scaled]}]}


def _prepared(place: Path) -> Prepared:
    options = MosaicOptions(block=BLOCK)
    return prepare(options.open_source(place / "mosaic.zarr"), MODEL, examine(MODEL, options), options)


def _quickest(call: Callable[[], object], pixels: int = 1_000_000) -> float:
    """Seconds for 10^6 ``pixels``, of the quickest of five calls."""
    taken = []
    for _ in range(5):
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
    return min(taken) * 1e6 / pixels


def _stages(place: Path) -> dict[str, float]:
    """Each stage of one block by itself, on one core; its labels are there from the first run."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    prepared = _prepared(place)
    source, store = prepared.source, open_store(place / "labels1.zarr")
    box = Box(0, BLOCK, BLOCK, BLOCK, BLOCK)
    area = read_box(prepared.grid, source.shape, box)
    files = [path for path in (place / "mosaic.zarr/0/c").rglob("*") if path.is_file()]
    raw = _quickest(lambda: [path.read_bytes() for path in files], HEIGHT * WIDTH)
    read = _quickest(lambda: source.read(area), area.height * area.width)
    window = prepared.settings.window
    grey = _quickest(lambda: read_pixels(source, prepared.grid, window, box), area.height * area.width)
    labels, record = store.read(box), store.record(box)
    assert record is not None
    maps = np.full((BLOCK // CELL, BLOCK // CELL), 0.5, np.float32)
    chosen = prepared.layout, prepared.settings, prepared.manifest
    fresh = create_store(place / "written.zarr", "classes", source, *chosen, {})
    task = RegionTask(place / "regions.csv", prepared.layout.shape, "scaling", tuple(prepared.manifest.classes))
    task.remaining()
    packed, written = (
        sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / (HEIGHT * WIDTH)
        for folder in (place / "mosaic.zarr/0/c", store.folder / "0/c")
    )
    level, piece = Box(0, 0, 0, BLOCK, BLOCK), Box(0, 0, 0, REGIONS, REGIONS)
    return {
        "raw": raw, "decode": max(0.0, read - raw), "copy": max(0.0, grey - read),
        "bytes_read": packed, "bytes_written": written,
        "write": _quickest(lambda: fresh.write(BlockResult(labels, maps, maps, record)), BLOCK**2),
        "pyramid": _quickest(lambda: store.write_pyramid_part(1, level), BLOCK**2),
        "regions": _quickest(lambda: regions_of_block(task, store.read, piece), REGIONS**2),
    }  # fmt: skip


def _seconds_of_a_tile(place: Path) -> tuple[float, float]:
    """Of a block's, and what of it the engine takes for itself."""
    prepared = _prepared(place)
    with open_model(prepared.settings) as segmenter:
        for box in (Box(0, 0, 0, 512, 512), Box(0, BLOCK, BLOCK, BLOCK, BLOCK)):  # the first makes the engine ready
            record = segment_block(segmenter, prepared.source, prepared.grid, prepared.settings, box).record
        engine, picture = segmenter.of_tiles().engine, picture_of(1024, 1024, 5)[0][np.newaxis, np.newaxis]
        begun = time.perf_counter()
        for _ in engine.infer_many(picture for _ in range(record.tiles)):
            pass
        alone = (time.perf_counter() - begun) / record.tiles
    return record.seconds["compute"] / record.tiles, alone


def _tiles(place: Path) -> dict[str, float]:
    """In one process alone, then in one for each core at once."""
    means = []
    for processes in (1, default_workers(0)):
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            means.append(np.mean(list(pool.map(_seconds_of_a_tile, [place] * processes)), axis=0).tolist())
    (tile, alone), (crowded, _) = means
    return {"tile": tile, "join": max(0.0, tile - alone), "crowded": max(1.0, crowded / tile)}


class Nothing:
    """Work for workers that takes no time."""

    name = "nothing"

    def place(self, worker: object) -> None: ...
    def check(self) -> None: ...
    def close(self) -> None: ...
    def do(self, task: str, box: Box, about: Any) -> int:
        return 0


def _overheads(place: Path) -> dict[str, float]:
    """``task`` in processor time of this process, which has both scheduler and client."""
    prepared, settings, store = _prepared(place), ClusterSettings(workers=1), open_store(place / "labels1.zarr")
    begun, boxes = time.perf_counter(), list(Layout((1, 2048, 2048), CELL))
    with open_client(settings, 1) as client:
        with Workers(client, MosaicWork(prepared, store, spread=False), settings.patience):
            start = time.perf_counter() - begun
        with Workers(client, Nothing(), settings.patience) as workers:
            begun = time.process_time()
            workers.do("nothing", boxes, lambda box, outcome: None)
            task = (time.process_time() - begun) / len(boxes)
    end = _quickest(lambda: summarize(store.records(), prepared.manifest.classes, None, len(prepared.layout)))
    end += _quickest(lambda: prepared.changed(store.records()))
    return {"start": start, "task": task, "block_end": end / len(prepared.layout)}


# What is shown


def _tables(known: dict[str, Any], price: float) -> Iterator[str]:
    inputs, blocks, cores = Inputs(**known["inputs"]), [Block(**block) for block in known["blocks"]], known["cores"]
    yield f"Measured by `{known['command']}` on {cores} cores ({known['machine']}), version {known['version']}:\n"
    yield "| input | value | |\n|---|---|---|"
    for name, value in known["inputs"].items():
        yield f"| {name} | {value:.3g} | {UNITS.get(name, 's for 10^6 pixels')} |"
    width, height = known["mosaic"]
    yield f"\nA mosaic of {width} x {height} pixels in {len(blocks)} blocks, run and simulated from these inputs:\n"
    yield "| workers | run, s | simulated, s | difference |\n|---|---|---|---|"
    for run in known["runs"]:
        told = simulate(inputs, blocks, run["workers"], cores=cores).seconds
        yield f"| {run['workers']} | {run['seconds']:.1f} | {told:.1f} | {percent(told / run['seconds'] - 1, 0)} |"
    columns = ("pixels", "GPUs", "block", "time", "efficiency", "bottleneck", "compute", "host", "storage", "scheduler",
               "start, tail, end", "cost of 10^9 pixels")  # fmt: skip
    for name, (rate, source) in GPUS.items():
        yield f"\n**{rate:.0f} tiles a second** ({name}: {source}), storage of 10 GB/s, {price:g} an hour for a GPU:\n"
        yield f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"
        for pixels in SIZES:
            for workers in WORKERS:
                block, out = best(on_gpus(inputs, rate), pixels, workers, 1e10)
                shares = " | ".join(percent(share, 0) for share in out.shares.values())
                cost = number(workers * out.seconds / 3600 * price / pixels * 1e9)
                yield (f"| 10^{math.log10(pixels):.0f} | {workers} | {block} | {duration(out.seconds)} | "
                       f"{percent(out.efficiency, 0)} | {out.bottleneck} | {shares} | {cost} |")  # fmt: skip


def _figure(known: dict[str, Any], target: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    gpu, counts = on_gpus(Inputs(**known["inputs"]), GPUS["assumed"][0]), (1, 3, 10, 30, 100, 200, 300, 500, 1000)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for bandwidth in STORAGES:
        found = [best(gpu, 1e12, workers, bandwidth)[1] for workers in counts]
        rates = [1e3 / out.seconds for out in found]
        left.plot(counts, rates, marker="o", markersize=3, label=f"storage of {bandwidth / 1e9:.0f} GB/s")
        if bandwidth == STORAGES[1]:
            right.stackplot(counts, *zip(*(out.shares.values() for out in found), strict=True), labels=found[0].shares)
    left.plot(counts, [rates[0] * workers for workers in counts], color="0.6", linestyle=":", label="without loss")
    left.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="10$^9$ pixels a second", title="10$^{12}$ pixels")
    right.set(xscale="log", xlabel="GPUs", ylabel="share of the workers' time", title="storage of 10 GB/s", ylim=(0, 1))
    left.legend()
    right.legend(loc="lower left")
    figure.savefig(target, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workplace", type=Path, nargs="?", help="an empty folder, to measure in")
    parser.add_argument("--inputs", type=Path, help="JSON of an earlier measurement")
    parser.add_argument("--price", type=float, default=2.5, help="of one GPU for an hour, in any currency")
    parser.add_argument("--page", type=Path, help="gets the tables")
    parser.add_argument("--output", type=Path, default=JSON)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args()
    if (options.workplace is None) == (options.inputs is None):
        parser.error("give a folder to measure in, or --inputs")
    if options.workplace is not None:
        known = measure(options.workplace)
        options.output.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    else:
        known = json.loads(options.inputs.read_text(encoding="utf-8"))
    tables = "\n".join(_tables(known, options.price))
    print(tables)
    if options.page is not None:
        before, _, rest = options.page.read_text(encoding="utf-8").partition("<!-- tables -->\n")
        after = rest.partition("<!-- end of tables -->\n")[2]
        text = f"{before}<!-- tables -->\n\n{tables}\n\n<!-- end of tables -->\n{after}"
        options.page.write_text(text, encoding="utf-8")
    _figure(known, options.figure)


if __name__ == "__main__":
    main()
