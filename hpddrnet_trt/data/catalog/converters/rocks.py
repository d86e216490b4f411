"""Mudrocks and shales: MudrockNet and the Duvernay mosaic."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import BadInputFile
from hpddrnet_trt.core.manifest import IGNORE_INDEX
from hpddrnet_trt.data.catalog.labelled import (
    Labelled,
    find_folder,
    images_in,
    pair,
    read_image,
    split_by_group,
)
from hpddrnet_trt.data.catalog.masks import classes_of_values, read_values
from hpddrnet_trt.data.datasets import SPLITS

log = logging.getLogger(__name__)

MUDROCK_VALUES = {0: 0, 1: 1, 2: 2}
SHALE_VALUES = {255: 0, 0: 1}

Position = tuple[int, int]  # top row, left column
_TILE, _STRIDE = 256, 128
_ROWS = 46  # of tiles in the mosaic's strip: 6016 pixels
_WIDE_ROWS = 9  # the upper rows of tiles have a third column
_WIDE_END = 1024  # blocks of 512 pixels above, of 384 below


def mudrocknet(source: Path) -> Iterator[Labelled]:
    """``JPEGImages/*.jpg``, ``SegmentationClassRaw/*.png`` and the lists in ``ImageSets``.

    Without the lists the split is by group. Group: the first number of ``11_10_a``.
    """
    image_folder = find_folder(source, "JPEGImages")
    masks = images_in(find_folder(source, "SegmentationClassRaw"))
    pairs = pair(images_in(image_folder), masks, image_folder)
    splits = _listed(image_folder.parent / "ImageSets")
    if splits is None:
        log.warning("%s: the authors' lists are missing, so the split is made by group", source)
        by_group = split_by_group(stem.split("_")[0] for stem, _, _ in pairs)
        splits = {stem: by_group[stem.split("_")[0]] for stem, _, _ in pairs}
    for stem, image, mask in pairs:
        if stem in splits:
            labels = classes_of_values(read_values(mask), MUDROCK_VALUES, mask)
            group = stem.split("_")[0]
            yield Labelled(read_image(image), labels, splits[stem], stem, group, f"{image.name}, {mask.name}")


def _listed(folder: Path) -> dict[str, str] | None:
    lists = {split: folder / f"{split}.txt" for split in SPLITS}
    if not all(path.is_file() for path in lists.values()):
        return None
    return {name.strip(): split for split, path in lists.items() for name in path.read_text().split() if name.strip()}


def shale_duvernay(source: Path) -> Iterator[Labelled]:
    """``Images/*_NNNN.tif`` and ``Masks/*_MASK_NNNN.tif``: overlapping tiles of one mosaic strip.

    The tiles overlap by half, so a split of tiles would test on what was trained on. They are
    put together again, and the strip is cut into blocks without overlap; the upper 60 % are
    train, then val and test.
    """
    images = images_in(find_folder(source, "TrainData/Images"))
    masks = images_in(find_folder(source, "TrainData/Masks"))
    pairs = pair(images, {stem.replace("_MASK", ""): path for stem, path in masks.items()}, source)
    positions = _positions(pairs, source)
    strip = _stitch([read_image(image) for _, image, _ in pairs], positions)
    tiles = [classes_of_values(read_values(mask), SHALE_VALUES, mask) for _, _, mask in pairs]
    labels = _stitch(tiles, positions)
    if strip is None or labels is None:
        raise BadInputFile(f"the tiles in {source} do not fit together; give the folder that the authors publish")
    labels = _without_border_artefact(labels)
    blocks = _blocks(strip.shape[0])
    for place, (top, size) in enumerate(blocks):
        split = "train" if place < 0.6 * len(blocks) else "val" if place < 0.8 * len(blocks) else "test"
        window = (slice(top, top + size), slice(0, size))
        name = f"p7_y{top:04d}_x0000_{size}"
        yield Labelled(strip[window], labels[window], split, name, "P7 r1-c1", f"rows {top} to {top + size - 1}")


def _without_border_artefact(labels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The first row and the two leftmost columns are clay where grain begins right beside them: 255 there."""
    grain, clay = SHALE_VALUES[255], SHALE_VALUES[0]
    result = labels.copy()
    result[:, :2][(labels[:, :2] == clay) & (labels[:, 2:3] == grain)] = IGNORE_INDEX
    result[0][(labels[0] == clay) & (labels[1] == grain)] = IGNORE_INDEX
    return result


def _positions(pairs: Sequence[tuple[str, Path, Path]], source: Path) -> list[Position]:
    """Where the tiles lie, in the order of their numbers: the authors say neither rows nor columns
    first, so the order whose overlaps agree is taken."""
    by_rows = [(row, column) for row in range(_ROWS) for column in range(3 if row < _WIDE_ROWS else 2)]
    by_columns = sorted(by_rows, key=lambda place: (place[1], place[0]))
    if len(pairs) != len(by_rows):
        raise BadInputFile(f"{source} holds {len(pairs)} tiles with masks; the published set has {len(by_rows)}")
    tiles = [read_image(image) for _, image, _ in pairs]
    for order in (by_rows, by_columns):
        positions = [(row * _STRIDE, column * _STRIDE) for row, column in order]
        if _stitch(tiles, positions) is not None:
            return positions
    raise BadInputFile(f"the tiles in {source} do not fit together; give the folder that the authors publish")


def _stitch(tiles: Sequence[npt.NDArray[np.uint8]], positions: Sequence[Position]) -> npt.NDArray[np.uint8] | None:
    """Put tiles side by side; None when two of them disagree about a pixel."""
    height = max(top for top, _ in positions) + _TILE
    width = max(left for _, left in positions) + _TILE
    strip = np.zeros((height, width), dtype=tiles[0].dtype)
    done = np.zeros((height, width), dtype=bool)
    for tile, (top, left) in zip(tiles, positions, strict=True):
        if tile.shape != (_TILE, _TILE):
            return None
        window = (slice(top, top + _TILE), slice(left, left + _TILE))
        if np.any((strip[window] != tile) & done[window]):
            return None
        strip[window] = tile
        done[window] = True
    return strip


def _blocks(height: int) -> list[tuple[int, int]]:
    """``(top row, size)`` of the square blocks."""
    wide, narrow = _TILE + 2 * _STRIDE, _TILE + _STRIDE
    upper = [(top, wide) for top in range(0, _WIDE_END, wide)]
    return upper + [(top, narrow) for top in range(_WIDE_END, height - narrow + 1, narrow)]
