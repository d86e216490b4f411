"""The labels of a mosaic on disk: an OME-Zarr 0.5 label image that many workers write at once, and what of it is done.

In the group of the labels:

- ``0``, ``1`` ...: uint8 ``[H, W]``, or ``[Z, H, W]`` for several slices, in chunks and shards, compressed; each level
  has single pixels of the one before, so that no class appears that is not there;
- ``confidence`` and ``distance``: coarse maps, OME-Zarr images of their own, float32, a pixel for each
  :data:`~hpddrnet_trt.mosaic.layout.CELL`;
- ``0/run``: what is done. It lies inside an array because Zarr readers warn of unknown files in a group and never look
  into an array's folder. ``records/z0-y0-x0.json``: one :class:`~hpddrnet_trt.mosaic.layout.BlockRecord` a block,
  written by the worker, so that it outlives the client. ``smoothed``, ``raw``: :meth:`MosaicStore.write_smoothed`.

A block is done when its record is there. The record goes before any label of the block is written, and comes back,
whole, after the last: whatever is killed in between, the block is done again. Two processes that write the same block
(an old worker whose client died) write the same bytes.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError, one_line, require
from hpddrnet_trt.core.files import write_text
from hpddrnet_trt.core.text import plain
from hpddrnet_trt.mosaic.layout import CELL, NO_DATA, SHARD, BlockRecord, BlockResult, Box, Layout
from hpddrnet_trt.mosaic.summary import MosaicSummary
from hpddrnet_trt.results.ome import OWN

MAPS = {"confidence": "confidence", "distance": "domain distance"}  # groups of the coarse maps, and their names
RUN, RAW, _RECORDS, _SMOOTHED = "0/run", "raw", "records", "smoothed"
PURPOSE = "write the labels of a mosaic"


@dataclass(frozen=True)
class MosaicStore:
    """The labels of one mosaic, made by :func:`~hpddrnet_trt.mosaic.create.create_store`; can be pickled.

    ``folder``: the group of the labels. ``layout``: the blocks. ``factors``: of each level of the pyramid, how many
    pixels of the mosaic along each side are one of its. ``classes``: how many. ``foreign``: the domain distance from
    which on cells are foreign to the model, None where it does not know. ``smooth``: slices that vote, 1 for none.
    ``settings``: what the labels depend on: :class:`~hpddrnet_trt.mosaic.layout.MosaicSettings` and the mosaic's size.
    """

    folder: Path
    layout: Layout
    factors: tuple[int, ...]
    classes: int
    foreign: float | None
    smooth: int
    settings: dict[str, Any]

    @property
    def root(self) -> Path:
        """The OME-Zarr as people name it: the image that the labels belong to, or the labels alone."""
        inside = self.folder.parent.name == "labels" and (self.folder.parent / "zarr.json").is_file()
        return self.folder.parents[1] if inside else self.folder

    def beside(self, ending: str) -> Path:
        """A file next to the OME-Zarr, called like it: ``mosaic.classes.areas.csv`` for ``.areas.csv``."""
        stem = re.sub(r"(\.ome)?\.zarr$", "", self.root.name)
        name = stem if self.root == self.folder else f"{stem}.{self.folder.name}"
        return self.root.with_name(name + ending)

    def read(self, box: Box) -> npt.NDArray[np.uint8]:
        """Labels ``[h, w]`` of ``box``, as far as they are written; :data:`NO_DATA` elsewhere."""
        return self._array("0", "r")[self._at(box)]

    # What is done

    def record(self, box: Box) -> BlockRecord | None:
        """Of a block that is done; None for one that is not."""
        for kind in (_SMOOTHED, _RECORDS)[self.smooth == 1 :]:
            try:
                return BlockRecord.from_dict(json.loads(self._file(kind, box).read_text("utf-8")))
            except FileNotFoundError:
                continue
            except (ValueError, KeyError, TypeError):  # torn when the machine lost power
                continue
        return None

    def done(self, box: Box) -> bool:
        return self.record(box) is not None

    def records(self) -> Iterator[BlockRecord]:
        """Of all blocks that are done, one by one, in the layout's order."""
        return (record for record in map(self.record, self.layout) if record is not None)

    # The blocks

    def write(self, result: BlockResult) -> BlockRecord:
        """Write a block; returns its record as it stands there, with the seconds of writing.

        Raises :class:`UserError` where the disk is full or does not take it, and where the store is smoothed already
        and its labels before that are gone.
        """
        began, box = perf_counter(), result.record.block
        first = f"{RUN}/{RAW}" if self.smooth > 1 else "0"
        if not (self.folder / first).is_dir():
            raise UserError(
                f"the slices in {self.folder} are smoothed, and the labels from before are gone, so no block can be "
                "done again; do all with --restart"
            )
        cells = _cells(box)
        with writing(self.folder):
            self._forget(box)
            self._array(first)[self._at(box)] = result.labels
            for name in MAPS:
                self._array(f"{name}/0")[self._at(cells)] = getattr(result, name)
            seconds = {**result.record.seconds, "write": perf_counter() - began}
            record = replace(result.record, seconds=seconds)
            self._note(_RECORDS, record)
        return record

    def _forget(self, box: Box) -> None:
        """What is known of ``box``, and what was made of its labels: smoothed slices and the pyramid."""
        self._file(_RECORDS, box).unlink(missing_ok=True)
        reach = self.smooth // 2
        for z in range(max(0, box.z - reach), min(self.layout.shape[0], box.z + reach + 1)):
            changed = box._replace(z=z)
            self._file(_SMOOTHED, changed).unlink(missing_ok=True)
            for level, factor in enumerate(self.factors):
                side = factor * shard_side(self.layout.block)
                for top in range(box.top - box.top % side, box.top + box.height, side):
                    for left in range(box.left - box.left % side, box.left + box.width, side):
                        part = Box(z, top // factor, left // factor, 0, 0)
                        self._shard_file(level, part).unlink(missing_ok=True)

    # The vote of slices

    def smooth_parts(self) -> list[Box]:
        """The blocks whose slices are still to be smoothed; none where nothing votes. After all blocks are written."""
        if self.smooth == 1:
            return []
        return [box for box in self.layout if not self._file(_SMOOTHED, box).is_file()]

    def write_smoothed(self, box: Box) -> BlockRecord:
        """Give each pixel the majority of the labels of the slices around it: :func:`majority`.

        Until all is smoothed the labels before it are in ``0/run/raw``; :meth:`finish` removes them. The record counts
        the new labels; which of them are foreign to the model is known for whole cells of the coarse map. Raises what
        :meth:`write` does.
        """
        began, reach = perf_counter(), self.smooth // 2
        first, last = max(0, box.z - reach), min(self.layout.shape[0], box.z + reach + 1)
        old = self.record(box)
        if old is None:
            raise UserError(f"block {box.name} of {self.folder} is not done, so its slices cannot vote; run again")
        raw, labels = self._array(f"{RUN}/{RAW}", "r"), np.empty((box.height, box.width), np.uint8)
        for part in Layout((1, box.height, box.width), shard_side(self.layout.block)):
            there = np.s_[first:last, box.top + part.top : box.top + part.top + part.height,
                          box.left + part.left : box.left + part.left + part.width]  # fmt: skip
            labels[part.rows, part.columns] = majority(raw[there], box.z - first)
        foreign = np.zeros(labels.shape, bool)
        if self.foreign is not None:
            far = self._array("distance/0", "r")[self._at(_cells(box))] >= self.foreign
            foreign = far.repeat(CELL, 0).repeat(CELL, 1)[: box.height, : box.width]
        record = replace(
            old, pixels=self._count(labels), foreign_pixels=self._count(labels[foreign]),
            checksum=sha256(labels.tobytes()).hexdigest(), seconds={**old.seconds, "smooth": perf_counter() - began},
        )  # fmt: skip
        with writing(self.folder):
            self._array("0")[self._at(box)] = labels
            self._note(_SMOOTHED, record)
        return record

    def _count(self, labels: npt.NDArray[np.uint8]) -> tuple[int, ...]:
        return tuple(np.bincount(labels.ravel(), minlength=256)[: self.classes].tolist())

    # The pyramid

    def pyramid_parts(self, level: int) -> list[Box]:
        """The parts of ``level`` (1 to ``len(factors) - 1``) that are still to be written, in its own pixels; after
        all of the level before. A part that is all :data:`NO_DATA` has no file, and is done anew each time."""
        layout = Layout((self.layout.shape[0], *self._sides(level)), shard_side(self.layout.block))
        return [part for part in layout if not self._shard_file(level, part).is_file()]

    def write_pyramid_part(self, level: int, part: Box) -> None:
        """Raises :class:`UserError` where the disk is full or does not take it."""
        step = self.factors[level] // self.factors[level - 1]
        rows, columns = (slice(span.start * step, span.stop * step, step) for span in (part.rows, part.columns))
        finer = self._array(str(level - 1), "r")[(part.z, rows, columns)[-len(self._at(part)) :]]
        with writing(self.folder):
            self._array(str(level))[self._at(part)] = finer

    # The end

    def finish(self, summary: MosaicSummary, provenance: Mapping[str, Any] | None = None) -> None:
        """Put the figures, and what ``provenance`` adds (times), into the attributes; remove what only the run needed.

        Call it again after a run that did more.
        """
        zarr = require("zarr", "mosaic", PURPOSE)
        with writing(self.folder):
            group = zarr.open_group(str(self.folder), mode="r+", use_consolidated=False)
            own = dict(group.attrs[OWN])
            whole = summary.blocks == len(self.layout)
            own["mosaic"] = {**own["mosaic"], "complete": whole, "summary": plain(summary.as_dict())}
            own["provenance"] = {**own["provenance"], **(provenance or {})}
            group.attrs[OWN] = own
            if whole and not self.smooth_parts():
                shutil.rmtree(self.folder / RUN / RAW, ignore_errors=True)
            if self.root != self.folder:
                renew_consolidated(self.root)

    # Files

    def _array(self, name: str, mode: str = "r+") -> Any:
        return require("zarr", "mosaic", PURPOSE).open_array(str(self.folder / name), mode=mode)

    def _at(self, box: Box) -> tuple[int | slice, ...]:
        return (box.rows, box.columns) if self.layout.shape[0] == 1 else (box.z, box.rows, box.columns)

    def _sides(self, level: int) -> tuple[int, int]:
        _, height, width = self.layout.shape
        return -(-height // self.factors[level]), -(-width // self.factors[level])

    def _file(self, kind: str, box: Box) -> Path:
        return self.folder / RUN / kind / f"{box.name}.json"

    def _note(self, kind: str, record: BlockRecord) -> None:
        write_text(self._file(kind, record.block), json.dumps(record.as_dict()))

    def _shard_file(self, level: int, part: Box) -> Path:
        shard = shard_side(self.layout.block)
        place = (part.z, part.top // shard, part.left // shard)[-len(self._at(part)) :]
        return self.folder.joinpath(str(level), "c", *map(str, place))


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What the system refuses becomes a :class:`UserError`."""
    try:
        yield
    except OSError as exc:
        raise UserError(
            f"cannot write into {folder}: {exc.strerror or exc}; free some space, or see to its permissions, and run "
            "the same command again: what is done stays done"
        ) from exc


def majority(slices: npt.NDArray[np.uint8], middle: int) -> npt.NDArray[np.uint8]:
    """The most frequent label of each pixel in ``slices`` ``[N, h, w]``.

    Where two are as frequent the label of slice ``middle`` stays. :data:`NO_DATA` does not vote, and stays.
    """
    own = slices[middle]
    labels, most, tied = own.copy(), np.zeros(own.shape, np.uint16), np.zeros(own.shape, bool)
    for value in np.flatnonzero(np.bincount(slices.ravel(), minlength=256)[:NO_DATA]):
        votes = (slices == value).sum(axis=0, dtype=np.uint16)
        tied = np.where(votes == most, True, tied & (votes < most))
        labels[votes > most] = value
        most = np.maximum(most, votes)
    keep = tied | (own == NO_DATA)
    labels[keep] = own[keep]
    return labels


def shard_side(block: int) -> int:
    return SHARD if block % SHARD == 0 else block


def _cells(box: Box) -> Box:
    """``box`` in the coarse maps."""
    bottom, right = -(-(box.top + box.height) // CELL), -(-(box.left + box.width) // CELL)
    top, left = box.top // CELL, box.left // CELL
    return Box(box.z, top, left, bottom - top, right - left)


def open_store(folder: Path) -> MosaicStore:
    """The store in ``folder``, the group of the labels; :class:`UsageError` when it is not one of ours."""
    own = own_attributes_of(folder)
    about, settings = own["mosaic"], own["mosaic"]["settings"]
    layout = Layout(tuple(settings["shape"]), settings["block"])
    smooth, factors = settings["smooth_slices"], tuple(about["factors"])
    return MosaicStore(folder.absolute(), layout, factors, len(own["classes"]), about["foreign"], smooth, settings)


def open_group(folder: Path) -> Any:
    zarr = require("zarr", "mosaic", PURPOSE)
    try:
        return zarr.open_group(str(folder), mode="r", use_consolidated=False)
    except Exception as exc:
        raise BadInputFile(f"{folder} is no Zarr group that can be read ({one_line(exc)}); check the path") from exc


def own_attributes_of(folder: Path) -> dict[str, Any]:
    """Our own of a store of ours; :class:`UsageError` for another."""
    own = open_group(folder).attrs.get(OWN)
    if not isinstance(own, dict) or "mosaic" not in own:
        raise UsageError(f"the labels in {folder} were not written by this command, and stay; take another --name")
    return own


def renew_consolidated(image: Path) -> None:
    """Some programs write the metadata of all groups into the first file as well, where readers look first."""
    zarr = require("zarr", "mosaic", PURPOSE)
    if json.loads((image / "zarr.json").read_text("utf-8")).get("consolidated_metadata"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is not in the standard yet, and unknown files of others
            zarr.consolidate_metadata(str(image))
