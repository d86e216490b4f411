"""Regions of a whole mosaic: measured block by block, joined over the blocks' borders, written as one table.

:func:`regions_of_block` measures the labels of one block by themselves, in any order and any process. What lies
inside is final; of what reaches an inner border it keeps the sums of :mod:`hpddrnet_trt.results.parts`, and which part
each pixel along the border belongs to. :func:`write_table` joins these parts and lets all others pass by in the order
of their first pixel, so that its memory grows with the regions along borders and in one row of blocks, not with all.
Numbers and figures are those of one whole picture, whatever the blocks.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from hpddrnet_trt import __version__
from hpddrnet_trt.core.errors import BadInputFile, UsageError, require
from hpddrnet_trt.core.files import atomic_path, write_text
from hpddrnet_trt.core.manifest import ClassInfo
from hpddrnet_trt.data.labels import check_labels
from hpddrnet_trt.mosaic.layout import NO_DATA, Box, Layout
from hpddrnet_trt.results.parts import Integers, Parts, concatenated, figures, joined, parts_of
from hpddrnet_trt.results.regions import RegionTable, at_border, check_choices, numbered, of_classes, weights
from hpddrnet_trt.results.separate import touching
from hpddrnet_trt.results.tables import REGIONS, region_columns, region_rows, write_rows

COLUMNS = ("slice", *REGIONS)
BLOCK = 1024  # pixels along each side that are measured at a time: larger ones leave the processor's caches
_ROWS = 100_000  # of the table, about, that are in memory and in one row group
# A measured region; names are those of RegionTable.
_REGION = np.dtype([
    ("first_column", "i8"), ("class_index", "u1"), ("touches_border", "?"), ("neighbors", "i8"), ("area_px", "i8"),
    ("equivalent_diameter_px", "f8"), ("centroid_px", "f8", 2), ("axes_px", "f8", 2), ("orientation_deg", "f8"),
    ("box_px", "i8", 4), ("perimeter_px", "f8"), ("circularity", "f8"), ("solidity", "f8"), ("feret_px", "f8", 2),
])  # fmt: skip
_PARTS = tuple(entry.name for entry in dataclasses.fields(Parts))
_Table = npt.NDArray[np.void]


@dataclass(frozen=True)
class RegionTask:
    """Which regions of which mosaic are written where. Can be pickled.

    ``table``: the file, Parquet or CSV by its ending. ``shape``: (slices, height, width) of the labels; regions do not
    reach from slice to slice. ``labels``: a name of the labels' content, such as a checksum: what was measured of other
    labels is not taken up again. The rest as :func:`hpddrnet_trt.results.regions.regions` takes it.

    Raises :class:`UsageError` for what that refuses, and for another ending.
    """

    table: Path
    shape: tuple[int, int, int]
    labels: str
    classes: tuple[ClassInfo, ...]
    pixel_size_m: float | None = None
    background: Collection[str] = ()
    connectivity: Literal[1, 2] = 2
    smallest: int = 1
    block: int = BLOCK

    def __post_init__(self) -> None:
        _ = self.wanted
        if self.table.suffix not in (".parquet", ".csv"):
            raise UsageError(f"regions of a mosaic are written as .parquet or .csv, not as {self.table.name!r}")
        if self.table.suffix == ".parquet":
            require("pyarrow.parquet", "mosaic", "write regions as Parquet")

    @property
    def wanted(self) -> list[int]:
        """Indices of the classes that are taken apart."""
        return check_choices(self.classes, self.pixel_size_m, self.background, self.connectivity, self.smallest)

    @property
    def folder(self) -> Path:
        """Where the blocks' regions wait for the table; workers write there, and it goes when the table is whole."""
        return self.table.with_name(f".{self.table.name}.parts")

    def remaining(self) -> list[Box]:
        """The blocks that are not measured yet. What other labels or choices have left in the folder goes."""
        choices = (__version__, self.labels, self.shape, self.block, self.wanted, self.connectivity, self.smallest)
        said = json.dumps(choices)
        kept = self.folder / "choices.json"
        if not kept.is_file() or kept.read_text(encoding="utf-8") != said:
            shutil.rmtree(self.folder, ignore_errors=True)
            write_text(kept, said)
        return [box for box in Layout(self.shape, self.block) if not self.file_of(box, "npz").is_file()]

    def file_of(self, box: Box, kind: str) -> Path:
        """A block's file: ``npz``, or ``regions``, the whole ones as :data:`_REGION` in the order of first pixels."""
        return self.folder / f"{box.name}.{kind}"

    @contextmanager
    def known(self, box: Box) -> Iterator[Any]:
        """The arrays that :func:`regions_of_block` keeps beside the whole regions."""
        path = self.file_of(box, "npz")
        try:
            with np.load(path) as arrays:
                if self.file_of(box, "regions").stat().st_size != len(arrays["rows"]) * _REGION.itemsize:
                    raise ValueError("regions are missing")
                yield arrays
        except (ValueError, EOFError, BadZipFile, FileNotFoundError) as exc:  # the machine lost power
            raise BadInputFile(f"{path} is damaged ({exc}); remove its folder and run again") from exc


def regions_of_block(task: RegionTask, read: Callable[[Box], npt.NDArray[np.uint8]], box: Box) -> None:
    """Measure the regions of one block and keep them in the task's folder.

    ``read``: gives the labels of a box, uint8 ``[h, w]``, :data:`NO_DATA` where there are none; such as
    :meth:`~hpddrnet_trt.mosaic.store.MosaicStore.read`.
    """
    _, height, width = task.shape
    block = read(box)
    check_labels(block)
    kept = of_classes(block, task.wanted)
    numbers, count = numbered(kept, task.connectivity)
    parts = parts_of(numbers, count, box.left, box.top)
    class_index = kept[parts.box[:, 1] - box.top, parts.first_column - box.left]
    cut = at_border(parts.box, (height, width))
    nothing = block == NO_DATA
    cut[_beside(numbers, nothing) - 1] = True
    left, top, right, bottom = parts.box.T
    is_open = ((left == box.left) & (left > 0)) | ((top == box.top) & (top > 0))
    is_open |= ((right == box.left + box.width) & (right < width)) | (
        (bottom == box.top + box.height) & (bottom < height)
    )
    whole, open_ = np.flatnonzero(~is_open & (parts.area >= task.smallest)), np.flatnonzero(is_open)
    # What each number is called from here on: whole regions and open parts each from 0; -1 for the other kind.
    whole_name, open_name = np.full(count + 1, -1), np.full(count + 1, -1)
    whole_name[whole + 1], open_name[open_ + 1] = np.arange(len(whole)), np.arange(len(open_))
    pairs, _ = touching(numbers, task.connectivity)
    as_whole, as_open = whole_name[pairs], open_name[pairs]
    among_whole, among_open = (as_whole >= 0).all(axis=1), (as_open >= 0).all(axis=1)
    mixed = (as_whole.max(axis=1) >= 0) & (as_open.max(axis=1) >= 0)
    neighbors = np.bincount(as_whole[among_whole].ravel(), minlength=len(whole))
    corners = np.zeros((0, 3), np.int64)
    if task.connectivity == 1:  # pixels of a class that meet at a corner only may be of one region, joined elsewhere
        corners = np.concatenate([
            _contacts(open_name[numbers[:-1, :-1]], open_name[numbers[1:, 1:]]),
            _contacts(open_name[numbers[:-1, 1:]], open_name[numbers[1:, :-1]]),
        ])
        corners = corners[class_index[open_][corners[:, 0]] == class_index[open_][corners[:, 1]]]
    names = np.where(nothing, -2, open_name[numbers])
    records = _records(parts.take(whole), class_index[whole], cut[whole], neighbors)
    with atomic_path(task.file_of(box, "regions")) as temporary:
        temporary.write_bytes(records.tobytes())  # numpy's own writer does not say that a disk is full
    opened = parts.take(open_)
    with atomic_path(task.file_of(box, "npz")) as temporary:
        np.savez(
            temporary,
            **{name: getattr(opened, name) for name in _PARTS},
            class_index=class_index[open_],
            cut=cut[open_],
            rows=records["box_px"][:, 1].astype(np.int32),
            of_class=np.bincount(class_index[whole], minlength=len(task.classes)),
            mixed=np.stack([as_whole.max(axis=1), as_open.max(axis=1)], axis=1)[mixed].astype(np.int32),
            among=as_open[among_open],
            corners=corners,
            top_edge=names[0],
            bottom_edge=names[-1],
            left_edge=names[:, 0],
            right_edge=names[:, -1],
        )


def _beside(numbers: npt.NDArray[np.int32], nothing: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """The numbers above 0 of pixels with one of ``nothing`` around them."""
    if not nothing.any():
        return np.zeros(0, np.int32)
    near = np.pad(nothing, 1)
    near = near[:-2] | near[1:-1] | near[2:]
    near = near[:, :-2] | near[:, 1:-1] | near[:, 2:]
    found = np.unique(numbers[near])
    return found[found > 0]


def _contacts(one: Integers, other: Integers) -> Integers:
    """Pairs of different names from 0 of pixels side by side, and how often: ``[n, 3]``."""
    meet = (one != other) & (one >= 0) & (other >= 0)
    pairs, counts = np.unique(np.sort(np.stack([one[meet], other[meet]], axis=1)), axis=0, return_counts=True)
    return np.column_stack([pairs, counts])


def _records(
    parts: Parts, class_index: npt.NDArray[np.uint8], cut: npt.NDArray[np.bool_], neighbors: Integers
) -> _Table:
    records = np.zeros(len(parts), _REGION)
    of_each = figures(parts) | {
        "first_column": parts.first_column, "class_index": class_index, "touches_border": cut, "neighbors": neighbors,
    }  # fmt: skip
    for name, column in of_each.items():
        records[name] = column
    return records


def write_table(task: RegionTask) -> int:
    """Write the table of a task whose blocks are all measured, remove its folder, and return how many regions it has.

    Columns :data:`COLUMNS`; regions are numbered from 1, slice by slice, in the order of their first pixel, row by row.
    ``touches_border`` also tells regions beside pixels without a label. In CSV as
    :func:`~hpddrnet_trt.results.tables.write_regions` writes it; in Parquet with numbers in full, and null where that
    leaves a cell empty.
    """
    missing = task.remaining()
    if missing:
        raise BadInputFile(
            f"{len(missing)} blocks of {task.table.name} are not measured, the first is {missing[0].name}; run again"
        )
    written = 0

    def tables() -> Iterator[tuple[int, int, RegionTable]]:
        """Slice, first number, and figures of some 100,000 regions at a time."""
        nonlocal written
        for z in range(task.shape[0]):
            for table in _Slice(task, z).tables():
                yield z, written + 1, table
                written += len(table)

    if task.table.suffix == ".csv":
        rows = ([z, *row] for z, first, table in tables() for row in region_rows(table, first))
        write_rows(task.table, COLUMNS, rows)
    else:
        _write_parquet(task.table, tables())
    shutil.rmtree(task.folder)
    return written


def _write_parquet(path: Path, tables: Iterable[tuple[int, int, RegionTable]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    integers = {"slice", "region", "area_px", "left_px", "top_px", "width_px", "height_px", "neighbors"}
    types = {"class": pa.string(), "touches_border": pa.int8(), **dict.fromkeys(integers, pa.int64())}
    schema = pa.schema([(name, types.get(name, pa.float64())) for name in COLUMNS])
    with atomic_path(path) as temporary, temporary.open("wb") as stream, pq.ParquetWriter(stream, schema) as writer:
        for z, first, table in tables:
            columns = {
                "slice": np.full(len(table), z), "region": np.arange(first, first + len(table)), **region_columns(table)
            }  # fmt: skip
            arrays = [pa.array(columns[entry.name], entry.type, from_pandas=True) for entry in schema]
            writer.write_table(pa.table(arrays, schema=schema))


class _Slice:
    """The regions of one slice, whose open parts are joined at once."""

    def __init__(self, task: RegionTask, z: int) -> None:
        self.task = task
        self.boxes = [box for box in Layout(task.shape, task.block) if box.z == z]
        parts, classes, cuts, corners, among, self.first, of_class = [], [], [], [], [], [0], []
        for box in self.boxes:
            with task.known(box) as known:
                parts.append(Parts(**{name: known[name] for name in _PARTS}))
                classes.append(known["class_index"])
                cuts.append(known["cut"])
                of_class.append(known["of_class"])
                before = self.first[-1]
                corners.append(known["corners"] + np.array([before, before, 0]))
                among.append(known["among"] + before)
            self.first.append(before + len(parts[-1]))
        self.of_class = np.stack(of_class)
        self.large = self._join(
            concatenated(parts), np.concatenate(classes), np.concatenate(cuts), np.concatenate(corners),
            np.concatenate(among),
        )  # fmt: skip
        self.tree = lru_cache(maxsize=32)(self._tree)
        self.nearest_large = self._nearest_large()

    def _join(
        self, parts: Parts, class_index: npt.NDArray[np.uint8], cut: npt.NDArray[np.bool_], corners: Integers,
        among: Integers,
    ) -> _Table:  # fmt: skip
        """The joined regions, in the order of their first pixel; ``self.region``: which of them each open part is."""
        sparse = require("scipy.sparse", "results", "join regions")
        csgraph = require("scipy.sparse.csgraph", "results", "join regions")
        eight = self.task.connectivity == 2
        edges, seam_corners = self._seams(cut)
        corners = np.concatenate([corners, seam_corners])
        bonds = np.concatenate([edges, corners]) if eight else edges
        bonds = bonds[class_index[bonds[:, 0]] == class_index[bonds[:, 1]]]
        links = sparse.coo_array((np.ones(len(bonds), np.int8), (bonds[:, 0], bonds[:, 1])), (len(parts), len(parts)))
        count, region = csgraph.connected_components(links, directed=False)
        together = joined(parts, region)
        for column, contacts in enumerate((edges, corners)):
            same = contacts[region[contacts[:, 0]] == region[contacts[:, 1]]]
            np.add.at(together.pairs, (region[same[:, 0]], column), same[:, 2])
        order = np.lexsort((together.first_column, together.box[:, 1]))
        order = order[together.area[order] >= self.task.smallest]
        new = np.full(count, -1)
        new[order] = np.arange(len(order))
        self.region = new[region]
        class_of, cut_of = np.zeros(count, np.uint8), np.zeros(count, np.bool_)
        class_of[region] = class_index
        cut_of[region[cut]] = True
        touch = [among, edges[:, :2], corners[:, :2]] if eight else [among, edges[:, :2]]
        pairs = self._distinct(self.region[np.concatenate(touch)])
        neighbors = np.bincount(pairs.ravel(), minlength=len(order))
        for index in range(len(self.boxes)):
            neighbors += np.bincount(self._mixed(index)[:, 1], minlength=len(order))
        return _records(together.take(order), class_of[order], cut_of[order], neighbors)

    def _seams(self, cut: npt.NDArray[np.bool_]) -> tuple[Integers, Integers]:
        """Contacts of open parts over the blocks' borders, at edges and corners of pixels; marks those that are ``cut``
        by pixels without labels there."""
        edges, corners = [np.zeros((0, 3), np.int64)], [np.zeros((0, 3), np.int64)]

        def meet(one: Integers, other: Integers) -> None:
            for a, b, into in ((one, other, edges), (one[:-1], other[1:], corners), (one[1:], other[:-1], corners)):
                into.append(_contacts(a, b))
                cut[a[(b == -2) & (a >= 0)]] = cut[b[(a == -2) & (b >= 0)]] = True

        bottom: Integers | None = None
        for row in self._rows():
            lines: dict[str, list[Integers]] = {"top": [], "bottom": [], "left": [], "right": []}
            for index in row:
                with self.task.known(self.boxes[index]) as known:
                    for side, found in lines.items():
                        names = known[f"{side}_edge"]
                        found.append(np.where(names >= 0, names + self.first[index], names))
            for right, left in zip(lines["right"][:-1], lines["left"][1:], strict=True):
                meet(right, left)
            if bottom is not None:
                meet(bottom, np.concatenate(lines["top"]))
            bottom = np.concatenate(lines["bottom"])
        return np.concatenate(edges), np.concatenate(corners)

    def _rows(self) -> Iterator[range]:
        """Indices of the blocks of each row."""
        across = -(-self.task.shape[2] // self.task.block)
        return (range(start, start + across) for start in range(0, len(self.boxes), across))

    @staticmethod
    def _distinct(pairs: Integers) -> Integers:
        """Different pairs of different regions that are kept."""
        pairs = pairs[(pairs >= 0).all(axis=1) & (pairs[:, 0] != pairs[:, 1])]
        return np.unique(np.sort(pairs, axis=1), axis=0)

    def _mixed(self, index: int) -> Integers:
        """Pairs of a whole region of this block and a joined one that touch."""
        with self.task.known(self.boxes[index]) as known:
            mixed = known["mixed"].astype(np.int64)
        mixed[:, 1] = self.region[mixed[:, 1] + self.first[index]]
        return np.unique(mixed[mixed[:, 1] >= 0], axis=0)

    def _read(self, index: int, start: int = 0, stop: int | None = None) -> _Table:
        """Whole regions ``start`` to ``stop`` of a block."""
        count = -1 if stop is None else stop - start
        path = self.task.file_of(self.boxes[index], "regions")
        return np.fromfile(path, _REGION, count, offset=start * _REGION.itemsize)

    def tables(self) -> Iterator[RegionTable]:
        """All regions in the order of their first pixel, some at a time."""
        for row in self._rows():
            rows, neighbors, nearest = [], [], []
            for index in row:
                with self.task.known(self.boxes[index]) as known:
                    rows.append(known["rows"])
                neighbors.append(np.bincount(self._mixed(index)[:, 0], minlength=len(rows[-1])))
                nearest.append(self._nearest(self._read(index), index))
            box = self.boxes[row.start]
            of_large = self.large["box_px"][:, 1]
            here = slice(*np.searchsorted(of_large, [box.top, box.top + box.height]))
            starting = np.sort(np.concatenate([*rows, of_large[here]]))
            for low, high in pairwise(np.unique([box.top, *starting[_ROWS::_ROWS], box.top + box.height])):
                a, b = np.searchsorted(of_large, [low, high])
                found, near = [self.large[a:b]], [self.nearest_large[a:b]]
                for place, index in enumerate(row):
                    a, b = np.searchsorted(rows[place], [low, high])
                    some = self._read(index, a, b)
                    some["neighbors"] += neighbors[place][a:b]
                    found.append(some)
                    near.append(nearest[place][a:b])
                records, nearest_px = np.concatenate(found), np.concatenate(near)
                order = np.lexsort((records["first_column"], records["box_px"][:, 1]))
                if len(order):
                    yield self._table(records[order], nearest_px[order])

    def _table(self, records: _Table, nearest_px: npt.NDArray[np.float64]) -> RegionTable:
        columns = {name: records[name] for name in _REGION.names or () if name != "first_column"}
        weight = weights(records["box_px"], records["touches_border"], self.task.shape[1:])
        return RegionTable(
            **columns, nearest_px=nearest_px, weight=weight, classes=self.task.classes,
            pixel_size_m=self.task.pixel_size_m,
        )  # fmt: skip

    def _tree(self, index: int | None, class_index: int) -> Any:
        """Centroids of the whole regions of a block, or of the joined ones, and of a class."""
        spatial = require("scipy.spatial", "results", "find the neighbors of regions")
        records = self.large if index is None else self._read(index)
        return spatial.cKDTree(records["centroid_px"][records["class_index"] == class_index])

    def _nearest(self, records: _Table, block: int | None) -> npt.NDArray[np.float64]:
        """Distances as :attr:`RegionTable.nearest_px` of the whole regions of a ``block``, or of some joined ones."""
        found = np.full(len(records), np.nan)
        edges = np.array([[box.left, box.top, box.left + box.width, box.top + box.height] for box in self.boxes])
        edges[:, 2:] -= 1
        for class_index in np.unique(records["class_index"]):
            chosen = records["class_index"] == class_index
            points = records["centroid_px"][chosen]
            best = self._distance(points, None, class_index, itself=block is None)
            # Blocks from the nearest one on, until none can hold a nearer centroid.
            low, high = points.min(axis=0), points.max(axis=0)
            gaps = np.linalg.norm(np.maximum(0, np.maximum(edges[:, :2] - high, low - edges[:, 2:])), axis=1)
            others = np.flatnonzero(self.of_class[:, class_index])
            for index in others[np.argsort(gaps[others], kind="stable")]:
                if gaps[index] >= best.max():
                    break
                left_top, right_bottom = edges[index, :2], edges[index, 2:]
                away = np.maximum(0, np.maximum(left_top - points, points - right_bottom))
                near = np.linalg.norm(away, axis=1) < best
                distance = self._distance(points[near], int(index), class_index, itself=index == block)
                best[near] = np.minimum(best[near], distance)
            found[chosen] = np.where(np.isfinite(best), best, np.nan)
        return found

    def _distance(
        self, points: npt.NDArray[np.float64], index: int | None, class_index: int, *, itself: bool
    ) -> npt.NDArray[np.float64]:
        """From each point to the nearest centroid of a block, infinite without one; ``itself``: points are of it."""
        if not len(points):
            return np.zeros(0)
        distances, _ = self.tree(index, int(class_index)).query(points, k=[1 + itself])
        return np.asarray(distances[:, 0])

    def _nearest_large(self) -> npt.NDArray[np.float64]:
        """Nearest ones of the joined regions, those with centroids in the same block at a time."""
        nearest = np.full(len(self.large), np.nan)
        column, row = (self.large["centroid_px"] // self.task.block).T.astype(np.int64)
        place = row * -(-self.task.shape[2] // self.task.block) + column
        order = np.argsort(place, kind="stable")
        for chosen in np.split(order, np.flatnonzero(np.diff(place[order])) + 1):
            nearest[chosen] = self._nearest(self.large[chosen], None)
        return nearest
