"""Time and memory of the regions of a mosaic: measured block by block, then joined and written as a table.

    python benchmarks/mosaic_regions.py FOLDER [--regions 10000000] [--cell 8] [--block 1024]

Labels are computed where they are read: grains of three classes, CELL pixels apart and a little less wide, of three
shapes, in one matrix. Prints what docs/results/scaling-2026-11.md shows.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.manifest import ClassInfo
from hpddrnet_trt.core.memory import peak_memory_mib
from hpddrnet_trt.mosaic.layout import Box
from hpddrnet_trt.mosaic.regions import BLOCK, RegionTask, regions_of_block, write_table

CLASSES = tuple(ClassInfo(name=name, color=(grey,) * 3) for grey, name in enumerate(("matrix", "a", "b", "c")))
COLUMNS = ("regions", "mosaic", "measured, s", "MB", "joined and written, s", "MB", "parts, MB", "table, MB")


class Grains:
    """Labels of boxes of a mosaic of grains ``cell`` pixels apart."""

    def __init__(self, cell: int) -> None:
        self.cell = cell

    def read(self, box: Box) -> npt.NDArray[np.uint8]:
        row, column = np.arange(box.top, box.top + box.height), np.arange(box.left, box.left + box.width)
        kind = (row[:, np.newaxis] // self.cell * 7 + column // self.cell * 3) % 11
        y, x = row[:, np.newaxis] % self.cell - self.cell / 2, column % self.cell - self.cell / 2
        radius = (0.3 + 0.02 * (kind % 5)) * self.cell
        inside = np.where(kind % 2, np.hypot(x, y) < radius, abs(x) + abs(y) * (1 + kind % 3) < radius)
        return np.where(inside, 1 + kind % 3, 0).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--regions", type=int, default=10_000_000)
    parser.add_argument("--cell", type=int, default=8)
    parser.add_argument("--block", type=int, default=BLOCK)
    options = parser.parse_args()
    side = math.isqrt(options.regions) * options.cell
    table = options.folder / "regions.parquet"
    task = RegionTask(table, (1, side, side), "simulated", CLASSES, 1e-9, block=options.block)
    grains = Grains(options.cell)
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    reading = 0.0
    start = time.process_time()
    for box in task.remaining():
        begin = time.process_time()
        labels = {box: grains.read(box)}
        reading += time.process_time() - begin
        regions_of_block(task, labels.__getitem__, box)
    measured, before = time.process_time() - start - reading, peak_memory_mib()
    parts = sum(path.stat().st_size for path in task.folder.iterdir()) / 1e6
    start = time.process_time()
    count = write_table(task)
    joined = time.process_time() - start
    print(f"| {count:,} | {side} x {side} | {measured:.0f} | {before:.0f} | {joined:.0f} "
          f"| {peak_memory_mib():.0f} | {parts:.0f} | {table.stat().st_size / 1e6:.0f} |")  # fmt: skip


if __name__ == "__main__":
    main()
