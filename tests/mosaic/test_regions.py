"""Regions of a mosaic are those of one whole label image, however it is cut into blocks."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hpddrnet_trt.core.errors import BadInputFile, ContractError, UsageError, UserError
from hpddrnet_trt.mosaic import regions as mosaic_regions
from hpddrnet_trt.mosaic.layout import Box
from hpddrnet_trt.mosaic.regions import COLUMNS, RegionTask, regions_of_block, write_table
from hpddrnet_trt.results.regions import regions, weights
from hpddrnet_trt.results.tables import region_columns, write_regions
from tests.toy import CLASSES

pytest.importorskip("skimage")
pq = pytest.importorskip("pyarrow.parquet")


def _reader(volume: np.ndarray) -> Callable[[Box], np.ndarray]:
    return lambda box: volume[box.z, box.rows, box.columns]


def _measured(labels: np.ndarray, folder: Path, block: int, name: str = "table.parquet", **choices: Any) -> RegionTask:
    """All blocks measured, the last one first."""
    volume = labels if labels.ndim == 3 else labels[np.newaxis]
    task = RegionTask(folder / name, volume.shape, "labels", tuple(CLASSES), block=block, **choices)
    for box in reversed(task.remaining()):
        regions_of_block(task, _reader(volume), box)
    return task


def _table(task: RegionTask) -> dict[str, np.ndarray]:
    count = write_table(task)
    assert not task.folder.exists()
    table = pq.read_table(task.table)
    assert table.column_names == list(COLUMNS)
    assert table.num_rows == count
    return {name: np.array(table[name].to_pylist()) for name in COLUMNS}


def _check(found: dict[str, np.ndarray], slices: list[np.ndarray], **choices: Any) -> None:
    """What scikit-image numbers in each slice, and what we measure of a whole picture."""
    expected: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
    for z, labels in enumerate(slices):
        whole = regions(labels, CLASSES, **choices)
        beside_nothing = cv2.dilate((labels == 255).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        cut = whole.touches_border.copy()
        cut[np.setdiff1d(whole.numbers[beside_nothing], [0]) - 1] = True
        columns = region_columns(whole)
        columns |= {"touches_border": cut.astype(int), "weight": weights(whole.box_px, cut, labels.shape)}
        for name, column in columns.items():
            expected[name].append(column)
        expected["slice"].append(np.full(len(whole), z))
    assert found["region"].tolist() == list(range(1, len(found["region"]) + 1))
    for name in set(COLUMNS) - {"region"}:
        values = np.concatenate(expected[name])
        assert len(found[name]) == len(values), name
        if values.dtype.kind == "f":
            measured = np.array([np.nan if value is None else value for value in found[name]], np.float64)
            np.testing.assert_allclose(measured, values, rtol=1e-9, atol=1e-9, err_msg=name)
        else:
            assert found[name].tolist() == values.tolist(), name


SHAPES = st.tuples(st.integers(1, 2), st.integers(1, 14), st.integers(1, 14))
MAPS = hnp.arrays(np.uint8, SHAPES, elements=st.sampled_from([0, 0, 1, 1, 2, 255]))


@settings(max_examples=30, deadline=None)
@given(MAPS, st.integers(2, 9), st.sampled_from([1, 2]), st.sampled_from([1, 1, 3]), st.sampled_from([(), ("grain",)]))
def test_any_labels_and_blocks(
    tmp_path_factory: pytest.TempPathFactory, labels: np.ndarray, block: int, connectivity: Any, smallest: int,
    background: tuple[str, ...],
) -> None:  # fmt: skip
    choices = {"connectivity": connectivity, "smallest": smallest, "background": background}
    task = _measured(labels, tmp_path_factory.mktemp("regions"), block, **choices)
    _check(_table(task), list(labels), **choices)


def _spiral(side: int) -> np.ndarray:
    """One path one pixel wide from the border to the middle, with one pixel between its windings."""
    picture = np.zeros((side, side), np.uint8)
    row, column, down, right = 0, 0, 0, 1
    picture[0, 0] = 1
    for length in [side - 1, *np.repeat(np.arange(side - 1, 0, -2), 2).tolist()]:
        for _ in range(length):
            row, column = row + down, column + right
            picture[row, column] = 1
        down, right = right, -down
    return picture


def _comb(side: int) -> np.ndarray:
    picture = np.zeros((side, side), np.uint8)
    picture[:, ::2] = picture[-1] = 1
    return picture


PICTURES = {
    "spiral": _spiral(41),
    "comb": _comb(40),
    "one region": np.ones((37, 41), np.uint8),
    "checkerboard": np.indices((24, 31)).sum(axis=0).astype(np.uint8) % 2,
    "nothing": np.full((20, 20), 255, np.uint8),
    "one pixel": np.ones((1, 1), np.uint8),
    "one row": np.arange(50, dtype=np.uint8)[np.newaxis] // 7 % 3,
    "diagonal": np.eye(50, dtype=np.uint8),
    "rings": (np.hypot(*np.indices((60, 60)) - 29.5) // 5 % 3).astype(np.uint8),
}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("connectivity", [1, 2])
def test_pictures_that_cross_many_borders(tmp_path: Path, name: str, connectivity: Any) -> None:
    labels = PICTURES[name]
    task = _measured(labels, tmp_path, 8, connectivity=connectivity)
    _check(_table(task), [labels], connectivity=connectivity)


def test_grains_in_row_groups_and_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as need several groups of rows; and the text of a table is that of a whole picture's."""
    noise = cv2.GaussianBlur(np.random.default_rng(0).standard_normal((200, 300)), (0, 0), 2)
    labels = np.digitize(noise, [-0.05, 0.05]).astype(np.uint8)
    monkeypatch.setattr(mosaic_regions, "_ROWS", 50)
    task = _measured(labels, tmp_path, 64, pixel_size_m=2e-9)
    found = _table(task)
    _check(found, [labels], pixel_size_m=2e-9)
    assert pq.ParquetFile(task.table).num_row_groups > 5
    assert write_table(_measured(labels, tmp_path, 50, "table.csv", pixel_size_m=2e-9)) == len(found["region"])
    write_regions(tmp_path / "whole.csv", regions(labels, CLASSES, 2e-9))
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert lines[0].startswith("slice,region,")
    assert [line.partition(",")[2] for line in lines] == (tmp_path / "whole.csv").read_text().splitlines()


def test_far_from_the_corner_nothing_is_lost(tmp_path: Path) -> None:
    """A slanted needle over 10^6 pixels: sums beyond 64 bits, and a minor axis that floating point would lose."""
    height, width, start, block = 8, 1 << 20, 7 << 17, 1 << 15
    length = width - start

    def needle(box: Box) -> np.ndarray:
        step = (box.left + np.arange(box.width) - start) * height // length
        return (step[np.newaxis] == np.arange(height)[:, np.newaxis]).astype(np.uint8)

    task = RegionTask(tmp_path / "t.parquet", (1, height, width), "", tuple(CLASSES), background=["grain"], block=block)
    for box in task.remaining():
        regions_of_block(task, needle, box)
    found = _table(task)
    assert found["area_px"].tolist() == found["width_px"].tolist() == [length]
    assert found["centroid_x_px"][0] == start + (length - 1) / 2
    assert found["centroid_y_px"][0] == (height - 1) / 2
    x = np.arange(length, dtype=object)
    y = x * height // length
    xx, yy, xy = (int(length * (p * q).sum() - p.sum() * q.sum()) for p, q in ((x, x), (y, y), (x, y)))
    assert xx > 1 << 63
    large = ((xx + yy) + float((xx - yy) ** 2 + 4 * xy**2) ** 0.5) / 2 / length**2
    assert found["major_axis_px"][0] == pytest.approx(4 * large**0.5, rel=1e-12)
    assert found["minor_axis_px"][0] == pytest.approx(4 * float((xx * yy - xy**2) / large / length**4) ** 0.5, rel=1e-9)


def test_interrupted_measured_again_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = PICTURES["rings"][np.newaxis]
    read = _reader(labels)
    task = RegionTask(tmp_path / "rings.parquet", labels.shape, "first", tuple(CLASSES), block=16)
    boxes = task.remaining()
    assert len(boxes) == 16
    for box in boxes[:10]:
        regions_of_block(task, read, box)
    with pytest.raises(BadInputFile, match=r"6 blocks of rings.parquet are not measured, the first is z0-y32-x32"):
        write_table(task)
    assert task.remaining() == boxes[10:]
    for box in task.remaining():
        regions_of_block(task, read, box)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", full)
        with pytest.raises(UserError, match=r"cannot write .*rings.parquet: No space left"):
            write_table(task)
    assert [path.name for path in tmp_path.iterdir()] == [task.folder.name]
    _check(_table(task), list(labels))  # nothing is measured again
    assert [path.name for path in tmp_path.iterdir()] == ["rings.parquet"]
    assert task.remaining() == boxes
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match="No space left on device; free some space"):
            regions_of_block(task, read, boxes[0])
    regions_of_block(task, read, boxes[0])
    assert len(task.remaining()) == 15
    for ending in ("npz", "regions"):
        for box in task.remaining():
            regions_of_block(task, read, box)
        task.file_of(boxes[3], ending).write_bytes(b"")
        with pytest.raises(BadInputFile, match=r"z0-y0-x48.npz is damaged .*; remove its folder and run again"):
            write_table(task)
        task.file_of(boxes[3], "npz").unlink()
    other = RegionTask(task.table, labels.shape, "second", tuple(CLASSES), block=16)
    assert len(other.remaining()) == 16, "what was measured of other labels is not taken up"
    with pytest.raises(UsageError, match=r"as \.parquet or \.csv, not as 'table\.xls'"):
        RegionTask(tmp_path / "table.xls", labels.shape, "", tuple(CLASSES))
    with pytest.raises(UsageError, match="'mortar' is no class of this model"):
        RegionTask(tmp_path / "t.csv", labels.shape, "", tuple(CLASSES), background=["mortar"])
    with pytest.raises(ContractError, match="two-dimensional uint8"):
        regions_of_block(task, _reader(labels.astype(np.int64)), boxes[0])


MANY = """
import sys
from pathlib import Path
import numpy as np
from hpddrnet_trt.core.memory import peak_memory_mib
from hpddrnet_trt.mosaic.regions import RegionTask, regions_of_block, write_table
from tests.toy import CLASSES

side, block, path = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])

def cells(box):
    # Cells of 3 x 3 pixels in two classes, and one matrix around all of them.
    row, column = np.mgrid[box.rows, box.columns]
    return np.where((row % 4 == 3) | (column % 4 == 3), 0, 1 + (row // 4 + column // 4) % 2).astype(np.uint8)

task = RegionTask(path, (1, side, side), "", tuple(CLASSES), block=block)
for box in task.remaining():
    regions_of_block(task, cells, box)
measured = peak_memory_mib()
count = write_table(task)
print(count, int(measured), int(peak_memory_mib()))
"""


@pytest.mark.parametrize("side", [1536, pytest.param(4096, marks=pytest.mark.slow)])
def test_many_regions_in_little_memory(tmp_path: Path, side: int) -> None:
    """A million as arrays would be 300 MB; their table takes hardly more memory than one of a tenth of them."""
    arguments = [str(side), "512", str(tmp_path / "cells.parquet")]
    done = subprocess.run([sys.executable, "-c", MANY, *arguments], check=True, capture_output=True, text=True)
    count, measured, peak = map(int, done.stdout.split())
    assert count == (side // 4) ** 2 + 1
    assert peak < measured + 180, (measured, peak)
    assert peak < 400
