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
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError, one_line, require
from hpddrnet_trt.core.files import atomic_folder, write_text
from hpddrnet_trt.core.manifest import Manifest
from hpddrnet_trt.core.text import plain
from hpddrnet_trt.mosaic.layout import (
    CELL,
    CHUNK,
    NO_DATA,
    SHARD,
    BlockRecord,
    BlockResult,
    Box,
    Layout,
    MosaicSettings,
    Source,
)
from hpddrnet_trt.mosaic.ome_zarr import MARKS, OmeZarr, image_in
from hpddrnet_trt.mosaic.summary import MosaicSummary
from hpddrnet_trt.results.ome import (
    LABELS,
    OWN,
    ZARR_VERSION,
    Placement,
    describe_labels,
    describe_pyramid,
    own_attributes,
    reductions,
)

MAPS = {"confidence": "confidence", "distance": "domain distance"}  # groups of the coarse maps, and their names
_RUN, _RAW, _RECORDS, _SMOOTHED = "0/run", "0/run/raw", "records", "smoothed"
_PURPOSE = "write the labels of a mosaic"


@dataclass(frozen=True)
class MosaicStore:
    """The labels of one mosaic; made by :func:`create_store` and :func:`open_store`, can be pickled.

    ``folder``: the group of the labels. ``layout``: the blocks. ``factors``: of each level of the pyramid, how many
    pixels of the mosaic along each side are one of its. ``classes``: how many. ``foreign``: the domain distance from
    which on cells are foreign to the model, None where it does not know. ``smooth``: slices that vote, 1 for none.
    ``settings``: what the labels depend on, as :meth:`MosaicSettings.as_dict` says it.
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
        for kind in (_SMOOTHED, _RECORDS):
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
        first = _RAW if self.smooth > 1 else "0"
        if not (self.folder / first).is_dir():
            raise UserError(
                f"the slices in {self.folder} are smoothed, and the labels from before are gone, so no block can be "
                "done again; do all with --restart"
            )
        cells = _cells(box)
        with self._writing():
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
                side = factor * _shard(self.layout.block)
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
        raw, labels = self._array(_RAW, "r"), np.empty((box.height, box.width), np.uint8)
        for part in Layout((1, box.height, box.width), _shard(self.layout.block)):
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
        with self._writing():
            self._array("0")[self._at(box)] = labels
            self._note(_SMOOTHED, record)
        return record

    def _count(self, labels: npt.NDArray[np.uint8]) -> tuple[int, ...]:
        return tuple(np.bincount(labels.ravel(), minlength=256)[: self.classes].tolist())

    # The pyramid

    def pyramid_parts(self, level: int) -> list[Box]:
        """The parts of ``level`` (1 to ``len(factors) - 1``) that are still to be written, in its own pixels; after
        all of the level before. A part that is all :data:`NO_DATA` has no file, and is done anew each time."""
        layout = Layout((self.layout.shape[0], *self._sides(level)), _shard(self.layout.block))
        return [part for part in layout if not self._shard_file(level, part).is_file()]

    def write_pyramid_part(self, level: int, part: Box) -> None:
        """Raises :class:`UserError` where the disk is full or does not take it."""
        step = self.factors[level] // self.factors[level - 1]
        rows, columns = (slice(span.start * step, span.stop * step, step) for span in (part.rows, part.columns))
        finer = self._array(str(level - 1), "r")[(part.z, rows, columns)[-len(self._at(part)) :]]
        with self._writing():
            self._array(str(level))[self._at(part)] = finer

    # The end

    def finish(self, summary: MosaicSummary, provenance: Mapping[str, Any] | None = None) -> None:
        """Put the figures, and what ``provenance`` adds (times), into the attributes; remove what only the run needed.

        Call it again after a run that did more.
        """
        zarr = require("zarr", "mosaic", _PURPOSE)
        with self._writing():
            group = zarr.open_group(str(self.folder), mode="r+", use_consolidated=False)
            own = dict(group.attrs[OWN])
            whole = summary.blocks == len(self.layout)
            own["mosaic"] = {**own["mosaic"], "complete": whole, "summary": plain(summary.as_dict())}
            own["provenance"] = {**own["provenance"], **(provenance or {})}
            group.attrs[OWN] = own
            if whole and not self.smooth_parts():
                shutil.rmtree(self.folder / _RAW, ignore_errors=True)
            if self.root != self.folder:
                _renew_consolidated(self.root)

    # Files

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise UserError(
                f"cannot write into {self.folder}: {exc.strerror or exc}; free some space, or see to its permissions, "
                "and run the same command again: what is done stays done"
            ) from exc

    def _array(self, name: str, mode: str = "r+") -> Any:
        return require("zarr", "mosaic", _PURPOSE).open_array(str(self.folder / name), mode=mode)

    def _at(self, box: Box) -> tuple[int | slice, ...]:
        return (box.rows, box.columns) if self.layout.shape[0] == 1 else (box.z, box.rows, box.columns)

    def _sides(self, level: int) -> tuple[int, int]:
        _, height, width = self.layout.shape
        return -(-height // self.factors[level]), -(-width // self.factors[level])

    def _file(self, kind: str, box: Box) -> Path:
        return self.folder / _RUN / kind / f"{box.name}.json"

    def _note(self, kind: str, record: BlockRecord) -> None:
        write_text(self._file(kind, record.block), json.dumps(record.as_dict()))

    def _shard_file(self, level: int, part: Box) -> Path:
        shard = _shard(self.layout.block)
        place = (part.z, part.top // shard, part.left // shard)[-len(self._at(part)) :]
        return self.folder.joinpath(str(level), "c", *map(str, place))


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


def _shard(block: int) -> int:
    return SHARD if block % SHARD == 0 else block


def _cells(box: Box) -> Box:
    """``box`` in the coarse maps."""
    bottom, right = -(-(box.top + box.height) // CELL), -(-(box.left + box.width) // CELL)
    top, left = box.top // CELL, box.left // CELL
    return Box(box.z, top, left, bottom - top, right - left)


def create_store(
    target: Path | None,
    name: str,
    source: Source,
    layout: Layout,
    settings: MosaicSettings,
    manifest: Manifest,
    provenance: Mapping[str, Any],
    *,
    smooth: int = 1,
    overwrite: bool = False,
) -> MosaicStore:
    """Make the store of a mosaic, or open the one that is there, so that the run goes on.

    ``target``: an OME-Zarr 0.5 image, whose ``labels/<name>`` it becomes, or a new folder, which becomes the label
    image itself; None for the image that ``source`` is. ``smooth``: slices that vote, odd. ``overwrite``: begin anew.
    Call it while no other client writes there.

    Raises :class:`UsageError` where labels cannot be there, where others than ours are, and where ours were made with
    other settings: it says which; :class:`UserError` when the disk does not take it.
    """
    require("zarr", "mosaic", _PURPOSE)
    if smooth < 1 or smooth % 2 == 0:
        raise UsageError(f"an odd number of slices votes, such as 3 or 5, not {smooth}")
    if smooth > 1 and layout.shape[0] == 1:
        raise UsageError(f"{source.path} has one slice, and several are needed to smooth them; leave that away")
    if layout.block % CELL:
        raise UsageError(f"the sides of blocks are multiples of {CELL} pixels, not {layout.block}")
    folder, image = labels_folder(target, name, source)
    asked = _comparable(source, layout, settings, smooth)
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        store = open_store(folder)
        there = _attributes(folder)["mosaic"]["made_with"]
        differences = [f"{key} {there.get(key)}, not {asked[key]}" for key in asked if there.get(key) != asked[key]]
        if differences:
            raise UsageError(
                f"the labels in {folder} were made with other settings ({'; '.join(differences)}); take the same, "
                "write elsewhere with --to or --name, or begin anew with --restart"
            )
        for torn in folder.rglob("*.partial"):  # of writers that were killed
            torn.unlink(missing_ok=True)
    else:
        if folder.is_dir() and any(folder.iterdir()):
            _attributes(folder)  # refuses labels of others
        store = _create(folder, image, source, layout, settings, manifest, provenance, smooth, asked)
    if image is not None:
        _list_labels(image, name)
        _renew_consolidated(image)
    return store


def open_store(folder: Path) -> MosaicStore:
    """The store in ``folder``, the group of the labels; :class:`UsageError` when it is not one of ours."""
    own = _attributes(folder)
    about = own["mosaic"]
    return MosaicStore(
        folder.absolute(),
        Layout(tuple(about["shape"]), about["block"]),
        tuple(about["factors"]),
        len(own["classes"]),
        about["foreign"],
        about["smooth"],
        about["settings"],
    )


def labels_folder(target: Path | None, name: str, source: Source) -> tuple[Path, Path | None]:
    """Where the labels go: the folder of their group, and that of the OME-Zarr image which it lies in, if any.

    Raises :class:`UsageError` as :func:`create_store` does.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UsageError(f"labels are called with letters, digits, '.', '_' and '-', not {name!r}; take another --name")
    itself = target is None or target.absolute() == source.path.absolute()
    place = source.path if target is None else target
    if itself and isinstance(source, OmeZarr):
        place = source.folder
    place = place.absolute()
    elsewhere = "write elsewhere with --to" if itself else "take another place for --to"
    if any((place / mark).is_file() for mark in MARKS if mark != "zarr.json"):
        raise UsageError(
            f"{place} is no OME-Zarr of version {ZARR_VERSION}, and older ones cannot hold its labels; {elsewhere}"
        )
    if not (place / "zarr.json").is_file():
        if itself or place.is_file() or (place.is_dir() and any(place.iterdir())):
            raise UsageError(f"{place} is no OME-Zarr {ZARR_VERSION}, so no labels can be in it; {elsewhere}")
        return place, None
    if OWN in _open(place).attrs and "mosaic" in _open(place).attrs[OWN]:
        return place, None
    image, about = image_in(place, place, None)
    full = _open(image)[about["datasets"][0]["path"]]
    if tuple(full.shape[-2:]) != source.shape[1:]:
        raise UsageError(
            f"the image in {place} has {full.shape[-1]} x {full.shape[-2]} pixels, and the mosaic "
            f"{source.shape[2]} x {source.shape[1]}, so that labels of it cannot be there; {elsewhere}"
        )
    return image / "labels" / name, image


def _create(
    folder: Path, image: Path | None, source: Source, layout: Layout, settings: MosaicSettings, manifest: Manifest,
    provenance: Mapping[str, Any], smooth: int, asked: Mapping[str, Any],
) -> MosaicStore:  # fmt: skip
    zarr = require("zarr", "mosaic", _PURPOSE)
    described = image or (source.folder if isinstance(source, OmeZarr) else None)
    placement = _placement(described, source, volume=layout.shape[0] > 1)
    factors = _factors(image, layout)
    foreign = None if manifest.domain is None else manifest.domain.foreign

    with atomic_folder(folder) as fresh:
        group = zarr.open_group(str(fresh), mode="w", zarr_format=3)
        for level, factor in enumerate(factors):
            _add_array(group, str(level), layout, placement, factor)
        if smooth > 1:
            _add_array(zarr.open_group(str(fresh / _RUN), mode="w", zarr_format=3), "raw", layout, placement, 1)
        describe_pyramid(group, folder.name if image is not None else LABELS, placement, factors)
        source_image = None if image is None else {"image": "../../"}
        describe_labels(group, manifest.classes, source_image, NO_DATA)
        for name, words in MAPS.items():
            of_cells = replace(
                placement,
                scale=(*placement.scale[:-2], *(size * CELL for size in placement.scale[-2:])),
                translation=(
                    *placement.translation[:-2],
                    *(start + size * (CELL - 1) / 2 for start, size in
                      zip(placement.translation[-2:], placement.scale[-2:], strict=True)),
                ),
            )  # fmt: skip
            coarse = group.create_group(name)
            _add_array(coarse, "0", layout, placement, CELL)
            describe_pyramid(coarse, words, of_cells, [1])
        group.attrs[OWN] = {
            **own_attributes(manifest.classes, source.pixel_size_m, {**provenance, "source": str(source.path)}),
            "mosaic": {
                "complete": False, "shape": list(layout.shape), "block": layout.block, "factors": factors,
                "smooth": smooth, "foreign": foreign, "settings": settings.as_dict(), "made_with": asked,
            },
        }  # fmt: skip
    return open_store(folder)


def _add_array(group: Any, name: str, layout: Layout, placement: Placement, factor: int) -> None:
    """Labels in shards, or, for a ``factor`` of :data:`CELL`, a coarse map in chunks of a block."""
    slices, *sides = layout.shape
    shape = (slices, *(-(-side // factor) for side in sides))[-len(placement.axes) :]
    one = (1,) * (len(shape) - 2)
    shard = _shard(layout.block)
    chunk = CHUNK if shard % CHUNK == 0 else shard
    options: dict[str, Any] = {"chunks": (*one, chunk, chunk), "shards": (*one, shard, shard), "fill_value": NO_DATA}
    if factor == CELL:
        options = {"chunks": (*one, *(layout.block // CELL,) * 2), "fill_value": float("nan")}
    dtype = "float32" if factor == CELL else "uint8"
    group.create_array(name, shape=shape, dtype=dtype, dimension_names=placement.axes, **options)


def _comparable(source: Source, layout: Layout, settings: MosaicSettings, smooth: int) -> dict[str, Any]:
    """What two runs must share to write into one store; the model's checksum counts, not where it lies."""
    asked = {"pixel_size_m": source.pixel_size_m, "spacing_m": source.spacing_m, "shape": layout.shape,
             "block": layout.block, "smooth_slices": smooth, **settings.as_dict()}  # fmt: skip
    del asked["model"]
    return json.loads(json.dumps(asked))  # as it is read back


def _open(folder: Path) -> Any:
    zarr = require("zarr", "mosaic", _PURPOSE)
    try:
        return zarr.open_group(str(folder), mode="r", use_consolidated=False)
    except Exception as exc:
        raise BadInputFile(f"{folder} is no Zarr group that can be read ({one_line(exc)}); check the path") from exc


def _attributes(folder: Path) -> dict[str, Any]:
    """Our own of a store of ours; :class:`UsageError` for another."""
    own = _open(folder).attrs.get(OWN)
    if not isinstance(own, dict) or "mosaic" not in own:
        raise UsageError(f"the labels in {folder} were not written by this command, and stay; take another --name")
    return own


def _factors(image: Path | None, layout: Layout) -> list[int]:
    """Of each level. The standard wants as many of labels as of the image that they belong to."""
    if image is None:
        return [2**level for level in range(reductions(layout.shape[1:]) + 1)]
    group, factors = _open(image), [1]
    widths = [group[level["path"]].shape[-1] for level in image_in(image, image, None)[1]["datasets"]]
    for before, width in pairwise(widths):
        factors.append(factors[-1] * max(1, round(before / width)))
    return factors


def _placement(image: Path | None, source: Source, *, volume: bool) -> Placement:
    """That of an OME-Zarr image, so that labels lie over it whatever it says; else by the pixel size."""
    if image is None:
        return Placement.of(source.pixel_size_m, source.spacing_m, volume=volume)
    about = image_in(image, image, None)[1]
    axes = {axis["name"]: number for number, axis in enumerate(about["axes"])}
    scale, translation = np.ones(len(axes)), np.zeros(len(axes))
    for step in (*about["datasets"][0]["coordinateTransformations"], *about.get("coordinateTransformations", [])):
        if step["type"] == "scale":
            scale, translation = scale * step["scale"], translation * step["scale"]
        elif step["type"] == "translation":
            translation = translation + step["translation"]
    own = ("z", "y", "x") if volume else ("y", "x")
    units = {name: about["axes"][axes[name]].get("unit") for name in own}
    return Placement(
        own,
        tuple(float(scale[axes[name]]) for name in own),
        tuple(float(translation[axes[name]]) for name in own),
        {name: unit for name, unit in units.items() if unit is not None},
    )


def _list_labels(image: Path, name: str) -> None:
    """Name the labels in the image's list of them."""
    zarr = require("zarr", "mosaic", _PURPOSE)
    group = zarr.open_group(str(image / "labels"), mode="a", zarr_format=3, use_consolidated=False)
    listed = group.attrs.get("ome", {})
    if name not in listed.get("labels", []):
        group.attrs["ome"] = {"version": ZARR_VERSION, **listed, "labels": [*listed.get("labels", []), name]}


def _renew_consolidated(image: Path) -> None:
    """Some programs write the metadata of all groups into the first file as well, where readers look first."""
    zarr = require("zarr", "mosaic", _PURPOSE)
    if "consolidated_metadata" in json.loads((image / "zarr.json").read_text("utf-8")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is not in the standard yet, and unknown files of others
            zarr.consolidate_metadata(str(image))

