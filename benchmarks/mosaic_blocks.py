"""What blocks of a mosaic cost, and that they change nothing: one mosaic, cut into blocks of several sizes.

    python benchmarks/mosaic_blocks.py FOLDER MODEL [--size 4096] [--blocks 1024,2048,4096] [--tile 512]

Micrographs of FOLDER, mirrored into each other without a border, fill a mosaic, which is written as a tiled TIFF and
read from there. For each size of blocks, one thread: SHA-256 of all labels, tiles computed and how many more than the
mosaic has, seconds by stage, the share of the time in which the engine computes.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

from hpddrnet_trt.data.micrograph import read_micrograph
from hpddrnet_trt.inference import Segmenter, load_segmenter
from hpddrnet_trt.inference.runner import Tile
from hpddrnet_trt.mosaic.block import segment_block
from hpddrnet_trt.mosaic.choices import chosen_window, grid_for
from hpddrnet_trt.mosaic.layout import Layout, MosaicSettings
from hpddrnet_trt.mosaic.sources import open_source


def mirrored(folder: Path, size: int) -> npt.NDArray[np.uint8]:
    """Micrographs of ``folder`` side by side, each the other way round, ``[size, size]``."""
    pictures = [read_micrograph(path).pixels for path in sorted(folder.iterdir())]
    height, width = (min(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    mosaic = np.empty((size, size), np.uint8)
    for row, top in enumerate(range(0, size, height)):
        for column, left in enumerate(range(0, size, width)):
            picture = pictures[(row + column) % len(pictures)][:height, :width]
            picture = picture[:: -1 if row % 2 else 1, :: -1 if column % 2 else 1]
            here = mosaic[top : top + height, left : left + width]
            here[...] = picture[: here.shape[0], : here.shape[1]]
    return mosaic


class Watched:
    """Time that an engine's ``infer_many`` computes or is waited for."""

    def __init__(self, segmenter: Segmenter) -> None:
        self.seconds, self._given = 0.0, segmenter.engine.infer_many
        segmenter.engine.infer_many = self._infer_many  # type: ignore[method-assign]

    def _infer_many(self, batches: Iterable[Any]) -> Iterator[Any]:
        feeding = 0.0

        def fed() -> Iterator[Any]:
            nonlocal feeding
            source = iter(batches)
            while True:
                begun = perf_counter()
                batch = next(source, None)
                feeding += perf_counter() - begun
                if batch is None:
                    return
                yield batch

        predictions = iter(self._given(fed()))
        while True:
            begun, before = perf_counter(), feeding
            prediction = next(predictions, None)
            self.seconds += perf_counter() - begun - (feeding - before)
            if prediction is None:
                return
            yield prediction


def main() -> None:
    """Measure, and fail where labels differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("model")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--blocks", default="1024,2048,4096")
    parser.add_argument("--tile", type=int)
    options = parser.parse_args()
    tile: Tile = options.tile or "auto"
    checksums = set()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mosaic.tif"
        tifffile.imwrite(path, mirrored(options.folder, options.size), tile=(256, 256))
        source = open_source(path)
        with load_segmenter(options.model, threads=1, confidence=True) as segmenter:
            engine = Watched(segmenter)
            window, _ = chosen_window(source, segmenter.manifest)
            grid = grid_for(segmenter.manifest, source.shape, 1.0, tile)
            print(f"{segmenter.engine.runtime}, {len(grid.whole)} tiles of {grid.tile[0]} x {grid.tile[1]}")
            print("block  tiles  more   read  compute  engine  SHA-256 of labels")
            for block in map(int, options.blocks.split(",")):
                how = MosaicSettings(options.model, "", "auto", "auto", 1, None, window, 1.0, tile, block)
                labels = np.empty(source.shape, np.uint8)
                records = []
                engine.seconds = 0.0
                for box in Layout(source.shape, block):
                    result = segment_block(segmenter, source, grid, how, box)
                    labels[box.z, box.rows, box.columns] = result.labels
                    records.append(result.record)
                tiles = sum(record.tiles for record in records)
                read, compute = (sum(record.seconds[stage] for record in records) for stage in ("read", "compute"))
                checksums.add(checksum := hashlib.sha256(labels.data).hexdigest())
                more, share = tiles / len(grid.whole) - 1, engine.seconds / (read + compute)
                print(f"{block:5}  {tiles:5}  {more:4.0%}  {read:5.2f}  {compute:7.2f}  {share:6.1%}  {checksum[:16]}")
    if len(checksums) > 1:
        sys.exit("labels differ between blocks of different sizes")


if __name__ == "__main__":
    main()
