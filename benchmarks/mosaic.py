"""Whole mosaics: the same labels from 1, 2 and 4 workers and in any order, time, memory, and what faults leave behind.

    python benchmarks/mosaic.py [--folder WHERE] [--model nasa-super1] [--precision int8] [--micrographs FOLDER]
                                [--size 16384] [--block 4096] [--only workers,sizes,faults]

- ``workers``: a simulated mosaic of ``size`` and one of real micrographs, mirrored into each other, of half of it; with
  1, 2 and 4 workers, and with 2 in random order. Efficiency: of n workers against one, for as many as there are cores.
- ``sizes``: half, once and twice ``size`` with 2 workers: time per tile and memory of a worker, which stay the same.
- ``faults``, on half of ``size``: a worker is killed, the client is killed, the disk is full (a small tmpfs, for which
  it must be allowed to mount; without, a limit on the size of files); each continued to the same labels.

Ends with exit code 1 when a checksum is not that of the others. Mosaics are made in ``folder`` and removed.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import zarr

from hpddrnet_trt import ClusterSettings, MosaicOptions, MosaicRun, segment_mosaic
from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.data.micrograph import read_micrograph
from hpddrnet_trt.data.simulate import simulate
from hpddrnet_trt.mosaic.layout import CHUNK, SHARD
from hpddrnet_trt.results.ome import Placement, describe_pyramid

Grey = npt.NDArray[np.uint8]
PATCHES = 4  # simulated pictures of CHUNK pixels along each side


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where there is room for the mosaics")
    parser.add_argument("--model", default="nasa-super1")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--micrographs", type=Path, help="a folder of real ones")
    parser.add_argument("--size", type=int, default=16384)
    parser.add_argument("--block", type=int, default=4096)
    parser.add_argument("--only", default="workers,sizes,faults")
    given = parser.parse_args()
    wanted = given.only.split(",")
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        bench = Bench(Path(folder), given.model, MosaicOptions(precision=given.precision, block=given.block))
        patches = [simulate(CHUNK, CHUNK, seed)[0] for seed in range(PATCHES)]
        print("mosaic      workers  order   seconds  ms/tile  efficiency  peak MB/worker  checksum")
        if "workers" in wanted:
            mosaics = {f"simulated {given.size}": (patches, given.size)}
            if given.micrographs is not None:
                pictures = [read_micrograph(path).pixels for path in sorted(given.micrographs.iterdir())]
                mosaics[f"real {given.size // 2}"] = (pictures, given.size // 2)
            for name, (pictures, size) in mosaics.items():
                with bench.source(pictures, size) as source:
                    alone = bench.run(name, source, 1)
                    for workers, seed in ((2, None), (4, None), (2, 7)):
                        bench.run(name, source, workers, seed, alone)
        if "sizes" in wanted:
            for size in (given.size // 2, given.size, given.size * 2):
                with bench.source(patches, size) as source:
                    bench.run(f"simulated {size}", source, 2)
        if "faults" in wanted:
            with bench.source(patches, given.size // 2) as source:
                bench.faults(f"simulated {given.size // 2}", source)
    return 1 if bench.differ else 0


class Bench:
    """Runs of mosaics in ``folder``, whose checksums are compared by the name of the mosaic."""

    def __init__(self, folder: Path, model: str, options: MosaicOptions) -> None:
        self.folder, self.model, self.options = folder, model, options
        self.checksums: dict[str, str] = {}
        self.bytes: dict[str, int] = {}  # that the labels take on a disk
        self.differ = False

    @contextmanager
    def source(self, pictures: list[Grey], size: int) -> Iterator[Path]:
        """An OME-Zarr of ``pictures`` side by side, each the other way round."""
        path = self.folder / "source.zarr"
        height, width = (min(picture.shape[axis] for picture in pictures) for axis in (0, 1))
        group = zarr.open_group(str(path), mode="w", zarr_format=3)
        array = group.create_array(
            "0", shape=(size, size), chunks=(CHUNK, CHUNK), shards=(SHARD, SHARD), dtype="uint8", fill_value=0,
            dimension_names=("y", "x"),
        )  # fmt: skip
        describe_pyramid(group, "mosaic", Placement.of(30e-9, volume=False), [1])
        for top in range(0, size, SHARD):
            rows = np.arange(top, min(top + SHARD, size))
            for left in range(0, size, SHARD):
                columns = np.arange(left, min(left + SHARD, size))
                array[top : top + SHARD, left : left + SHARD] = _mirrored(pictures, height, width, rows, columns)
        try:
            yield path
        finally:
            shutil.rmtree(path)

    def run(
        self, name: str, source: Path, workers: int, seed: int | None = None, alone: MosaicRun | None = None
    ) -> MosaicRun:
        """One run from the beginning; prints a line of figures."""
        store = self.folder / "labels.zarr"
        run = segment_mosaic(
            source, self.model, replace(self.options, output=store), ClusterSettings(workers=workers, shuffle=seed)
        )
        self.bytes[name] = sum(-(-file.stat().st_size // 4096) * 4096 for file in store.rglob("*") if file.is_file())
        shutil.rmtree(store)
        summary = run.summary
        assert summary is not None
        cores = min(workers, psutil.cpu_count(logical=False) or 1)
        share = "–" if alone is None else f"{alone.seconds / run.seconds / cores:.0%}"
        per_tile, memory = 1000 * run.seconds * cores / summary.tiles_computed, summary.peak_bytes / 1e6
        order = "rows" if seed is None else "random"
        print(
            f"{name:<16}{workers:>3}  {order:<6}{run.seconds:>9.1f}{per_tile:>9.1f}{share:>12}{memory:>16.0f}  "
            f"{summary.checksum[:16]}{self._compared(name, summary.checksum)}",
            flush=True,
        )
        return run

    def _compared(self, name: str, checksum: str) -> str:
        if self.checksums.setdefault(name, checksum) == checksum:
            return ""
        self.differ = True
        return "  DIFFERS"

    def faults(self, name: str, source: Path) -> None:
        """What ends a run, and what the next one makes of it."""
        if name not in self.checksums:
            self.run(name, source, 2)
        store = self.folder / "labels.zarr"
        killer = threading.Thread(target=_kill_a_worker, args=(store,))
        killer.start()
        self._go_on(name, source, store, "a worker was killed")
        killer.join()
        command = [sys.executable, "-m", "hpddrnet_trt", "mosaic", str(source), "--model", self.model, "--to",
                   str(store), "--precision", self.options.precision, "--block", str(self.options.block)]  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as client:
            _wait_for_blocks(store, 2)
            workers = psutil.Process(client.pid).children(recursive=True)
            client.kill()
        _, left = psutil.wait_procs(workers, timeout=30)
        self._go_on(name, source, store, f"the client was killed, {len(left)} of {len(workers)} processes were left")
        self.differ |= bool(left)
        small = self.folder / "small"
        small.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={self.bytes[name] // 2}", "tmpfs", str(small)]
        mounted = subprocess.run(mount, check=False).returncode == 0
        command[command.index("--to") + 1] = str(small / "labels.zarr")
        try:
            limit = None if mounted else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
            ended = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)
            shutil.copytree(small / "labels.zarr", store)
        finally:
            if mounted:
                subprocess.run(["umount", small], check=True)
        said = (ended.stderr.strip() or "nothing").splitlines()[-1]
        self.differ |= ended.returncode != 1
        self._go_on(name, source, store, f"the disk was full (exit code {ended.returncode}: {said})")

    def _go_on(self, name: str, source: Path, store: Path, what: str) -> None:
        try:
            run = segment_mosaic(
                source, self.model, replace(self.options, output=store), ClusterSettings(workers=2), progress=False
            )
        except UserError as exc:
            print(f"{what}: {exc}")
            self.differ = True
            return
        assert run.summary is not None
        told = self._compared(name, run.summary.checksum) or "the same labels"
        print(f"{what}; then {run.kept} blocks kept, {run.computed} computed, {len(run.failed)} failed: {told}")
        shutil.rmtree(store)


def _mirrored(
    pictures: list[Grey], height: int, width: int, rows: npt.NDArray[Any], columns: npt.NDArray[Any]
) -> Grey:
    """The pixels of these rows and columns of ``pictures`` laid side by side without a border."""
    mosaic = np.empty((len(rows), len(columns)), np.uint8)
    for down in np.unique(rows // height):
        for across in np.unique(columns // width):
            here_rows, here_columns = rows // height == down, columns // width == across
            inside, along = rows[here_rows] % height, columns[here_columns] % width
            picture = pictures[(down + across) % len(pictures)]
            at = np.ix_(height - 1 - inside if down % 2 else inside, width - 1 - along if across % 2 else along)
            mosaic[np.ix_(here_rows, here_columns)] = picture[at]
    return np.maximum(mosaic, 1)  # 0 is what was never acquired


def _wait_for_blocks(store: Path, count: int) -> None:
    while len(list(store.glob("0/run/records/*.json"))) < count:
        time.sleep(0.05)


def _kill_a_worker(store: Path) -> None:
    _wait_for_blocks(store, 1)
    workers = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
    os.kill(workers[0].pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
