"""Segment files of micrographs into a folder: what is written for each, and what is remembered of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from hpddrnet_trt.core.domain import NOT_KNOWN, DomainState
from hpddrnet_trt.core.errors import BadInputFile, ContractError, UsageError
from hpddrnet_trt.core.files import printable
from hpddrnet_trt.data.intensity import FullScale, Percentiles, to_grey8
from hpddrnet_trt.data.labels import read_mask
from hpddrnet_trt.data.micrograph import InfoBar, Micrograph, check_info_bar, read_micrograph
from hpddrnet_trt.data.stack import Stack
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.inference.journal import JOURNAL, Journal, SliceOf, Task, modified
from hpddrnet_trt.inference.result import Segmentation
from hpddrnet_trt.inference.tiling import TilingReport
from hpddrnet_trt.results import FORMATS, KINDS, Contents, check_kinds
from hpddrnet_trt.results.regions import AreaFraction, check_background, check_pixel_size, check_separate
from hpddrnet_trt.results.stacks import LabelStack
from hpddrnet_trt.results.tables import FRACTIONS, INTERVAL, fraction_row, number, write_rows

LOG = logging.getLogger(__name__)
TABLE = "fractions.csv"
OVERLAYS = "overlays"
# What the results of an image are called, as far as it is free: its name without ending (``.ome.tif`` is one), its
# file name, its folder's and its file name.
NAMINGS: tuple[Callable[[Path], str], ...] = (
    lambda path: path.stem.removesuffix(".ome") or path.stem,
    lambda path: path.name,
    lambda path: f"{path.parent.name}_{path.name}",
)


@dataclass(frozen=True)
class ResultSettings:
    """What is written for each micrograph, and how its file is read.

    - ``write``: kinds of file, of :data:`hpddrnet_trt.results.KINDS`; ``overlay``: also a picture of the labels over
      the micrograph.
    - ``background``: classes that rois and regions leave out; ``smallest``: least pixels of a region;
      ``separate``: classes whose touching objects are taken apart.
    - ``pixel_size_m``: metres, instead of what the files say.
    - ``info_bar``: what is cut off below the picture, as of :func:`~hpddrnet_trt.data.micrograph.read_micrograph`.
      Of the slices of a stack as many rows are kept as of the first.
    - ``stack``: which pictures are slices of a stack (:mod:`hpddrnet_trt.data.stack`), whose labels become one file:
      the pages of a TIFF (None), those and the files of each folder (True), none (False: a TIFF's first page).
    - ``spacing_m``: metres from one slice to the next, instead of what the files say.
    - ``resume``: leave what the same model file has made with the same settings from the same, unchanged file.
    - ``specimen``: which pictures show one specimen, for ``specimens.csv``: None (no such table), ``auto`` (as folders
      or names tell), ``all`` (one specimen), or a regular expression (:mod:`hpddrnet_trt.inference.specimens`).
    - ``refuse_foreign``: a picture that is foreign to the model has failed, and nothing is written of it.
    """

    write: Collection[str] = ("png",)
    overlay: bool = True
    background: Collection[str] = ()
    smallest: int = 1
    separate: Collection[str] = ()
    pixel_size_m: float | None = None
    info_bar: InfoBar = "auto"
    stack: bool | None = None
    spacing_m: float | None = None
    resume: bool = True
    refuse_foreign: bool = False
    specimen: str | None = None

    def check(self, segmenter: Segmenter) -> None:
        """Raise :class:`UsageError` or :class:`MissingDependency` for what cannot be written or given."""
        if isinstance(self.write, str):
            raise UsageError(f"write is a list of kinds, got the text {self.write!r}; write [{self.write!r}]")
        check_kinds(self.write)
        if not self.write and not self.overlay:
            raise UsageError(f"nothing is to be written; choose at least one of: {', '.join(KINDS)}")
        check_background(self.background, segmenter.manifest.classes)
        check_separate(self.separate, self.background, segmenter.manifest.classes)
        check_info_bar(self.info_bar)
        if self.smallest < 1:
            raise UsageError(f"the smallest region has at least 1 pixel, got {self.smallest}")
        if self.pixel_size_m is not None:
            check_pixel_size(self.pixel_size_m)
        if self.spacing_m is not None and not self.spacing_m > 0:
            raise UsageError(f"the distance of slices is positive, got {self.spacing_m}")
        if self.refuse_foreign and not segmenter.knows_its_domain:
            raise UsageError(
                f"model {segmenter.manifest.name!r} does not know which pictures are foreign to it; give it the "
                "statistics of its training pictures with hpddrnet-trt describe-domain, or leave out --refuse-foreign"
            )
        if "confidence" in self.write and not segmenter.confidence:
            raise UsageError("the segmenter gives no confidence; open it with confidence=True")


class Written(NamedTuple):
    """What :meth:`FileSegmenter.write` did: the journal's line, None for nothing, and what ended it early."""

    task: Task
    entry: Mapping[str, Any] | None
    error: BaseException | None
    tiling: TilingReport | None


class FileSegmenter:
    """Segments micrograph files into a folder, one at a time, and remembers what is done.

    Written for an image that is called ``NAME``, as ``settings`` say: NAME with the ending of each kind of file
    (:data:`hpddrnet_trt.results.FORMATS`), the overlay as ``overlays/NAME.png``, and one line of
    ``segmentations.jsonl``. The slices of a stack are called ``NAME/0001`` and so on; kinds of file that hold a stack
    are written once, by :meth:`write_stack`, from the slices' label maps (PNG, always written). TIFF if none is asked
    for.

    Raises :class:`UsageError` or :class:`~hpddrnet_trt.core.errors.MissingDependency` for what cannot be written.
    """

    def __init__(
        self, segmenter: Segmenter, output_folder: str | Path, settings: ResultSettings = ResultSettings()
    ) -> None:
        settings.check(segmenter)
        self.segmenter, self.folder, self.settings = segmenter, Path(output_folder), settings
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"output {self.folder} is a file; give a folder")
        self._kinds = [kind for kind in KINDS if kind in settings.write] + ["overlay"] * settings.overlay
        self._stack_kinds = [kind for kind in KINDS if kind in settings.write and FORMATS[kind].write_stack] or ["tiff"]
        others = [kind for kind in self._kinds if kind not in self._stack_kinds]
        self._slice_kinds = list(dict.fromkeys(["png", *others]))
        self._first_slices: dict[Path, tuple[int, int]] = {}  # height and width of the first of each stack
        self._regions: dict[str, Any] = {"background": sorted(settings.background), "smallest": settings.smallest}
        if settings.separate:
            self._regions["separate"] = sorted(settings.separate)
        self.journal = Journal(self.folder / JOURNAL, self._job())

    def _job(self) -> dict[str, Any]:
        """What all results depend on beside the image."""
        segmenter, settings = self.segmenter, self.settings
        window: Any = segmenter.window
        return {
            "model": segmenter.manifest.name,
            "model_sha256": segmenter.model_sha256,  # one checkpoint may have become several INT8 files
            "checkpoint_sha256": segmenter.manifest.checkpoint_sha256,
            "precision": segmenter.engine.arithmetic,
            "mode": segmenter.mode,
            "resize": segmenter.resize,
            "tile": segmenter.tile,
            "given_window": asdict(window) if isinstance(window, Percentiles | FullScale) else window,
            "given_pixel_size_m": settings.pixel_size_m,
            "info_bar": settings.info_bar,
            # Not of models that know no pixel size: their results are the same without it, as before there was one.
            **({"intervals": True} if segmenter.intervals else {}),
            **({"rescale": segmenter.rescale} if segmenter.manifest.read_at_m is not None else {}),
        }

    def outputs(self, name: str, of: Literal["image", "slice", "stack"] = "image") -> dict[str, str]:
        """The files in the folder that an image called ``name`` gets, by kind."""
        kinds = {"image": self._kinds, "slice": self._slice_kinds, "stack": self._stack_kinds}[of]
        return {
            kind: f"{OVERLAYS}/{name}.png" if kind == "overlay" else name + FORMATS[kind].ending for kind in kinds
        }

    def name_of(self, source: Path) -> str:
        """A name for an image that comes alone: that of its results, where there are some; else the first of
        :data:`NAMINGS` that no other image's results have."""
        known = self.journal.name_of(source)
        if known is not None:
            return known
        for naming in NAMINGS:
            if self.journal.source_of(naming(source)) in (None, str(source)):
                return naming(source)
        raise UsageError(f"{self.folder} holds results of other images like {source}; choose another output folder")

    def task(self, source: Path, name: str, *, anew: bool = False) -> Task:
        """What there is to do for ``source``: what is missing, or everything if ``anew`` or without ``resume``."""
        return self._task(Task(source, name, modified(source), {}, self._kinds), anew)

    def slice_task(self, part: SliceOf) -> Task:
        """:meth:`task` of a slice."""
        source, _ = part.stack.slices[part.number]
        return self._task(Task(source, part.own_name, modified(source), {}, self._slice_kinds, part), False)

    def stack_task(self, part: SliceOf, *, anew: bool) -> Task:
        """:meth:`task` of the files that hold the whole stack of ``part``."""
        times = [modified(path) for path in {path for path, _ in part.stack.slices}]
        latest = max((time for time in times if time is not None), default=None)
        return self._task(Task(part.stack.source, part.name, latest, {}, self._stack_kinds), anew, part)

    def _task(self, task: Task, anew: bool, stack: SliceOf | None = None) -> Task:
        made = self.journal.made(task.name, task.source, task.modified_ns)
        foreign = self.settings.refuse_foreign and made and self._state_of(task.name) == "foreign"
        if anew or foreign or not self.settings.resume:
            missing = task.missing
        else:
            missing = [
                kind for kind in task.missing if kind not in made or made[kind][1] != self._settings_of(kind, stack)
            ]
        return replace(task, made={kind: made[kind] for kind in made if kind not in missing}, missing=missing)

    def segment(self, task: Task, *, progress: Callable[[int, int], None] | None = None) -> Segmentation:
        """Segment an image and write what is missing, and a line of the journal.

        ``progress(done, of)``: called after each tile of a large image.

        Raises :class:`UserError` when the file cannot be read or segmented, or not all of its results written; what
        was written stays.
        """
        begin = time.perf_counter()
        micrograph = self.read(task)
        result = self.segmenter.segment(micrograph, progress=progress)
        self.record(self.write(task, micrograph, result, begin))
        return result

    def read(self, task: Task) -> Micrograph:
        """The image; raises :class:`BadInputFile` for one that cannot be read, or is of another size than its stack."""
        part = task.slice
        if part is None:
            micrograph = read_micrograph(task.source, info_bar=self.settings.info_bar)
        else:
            micrograph = self._read_slice(part.stack, part.number)
        if self.settings.pixel_size_m is not None:
            size = float(self.settings.pixel_size_m)
            micrograph = replace(micrograph, pixel_size_m=size, pixel_size_source="given")
        return micrograph

    def _read_slice(self, stack: Stack, number: int) -> Micrograph:
        """A slice without as many rows of information bar as the first: a bar is not found in every picture."""
        path, page = stack.slices[number]
        if number == 0:
            micrograph = read_micrograph(path, page=page, info_bar=self.settings.info_bar)
            height, width = micrograph.pixels.shape
            self._first_slices[stack.source] = height, width
            return micrograph
        if stack.source not in self._first_slices:
            self._read_slice(stack, 0)
        height, width = self._first_slices[stack.source]
        micrograph = read_micrograph(path, page=page, info_bar="none")
        rows, columns = micrograph.pixels.shape
        if columns != width or rows < height:
            raise BadInputFile(
                f"slice {number + 1} of {stack.source} has {columns} x {rows} pixels and the first {width} x {height}; "
                "segment them without --stack, or save them in one size"
            )
        bar = (height, rows) if rows > height else None
        return replace(micrograph, pixels=np.ascontiguousarray(micrograph.pixels[:height]), info_bar_rows=bar)

    def write(self, task: Task, micrograph: Micrograph, result: Segmentation, begin: float) -> Written:
        """Write what is missing, as far as it goes; :meth:`record` is to be told. ``begin``: seconds, of reading it."""
        for remark in result.remarks:
            LOG.warning("%s: %s", task.source, remark)
        made, regions = dict(task.made), None
        files = self.outputs(task.name, "image" if task.slice is None else "slice")
        error: BaseException | None = None
        if self.settings.refuse_foreign and result.domain.state == "foreign":
            reason = f"{task.source} is {result.domain.notice}, and nothing is written of it"
            return Written(task, None, ContractError(f"{reason}; without --refuse-foreign it is"), result.tiling)
        try:
            for kind in task.missing:
                path = self.folder / files[kind]
                if kind == "overlay":
                    result.save_overlay(path, to_grey8(micrograph.pixels, result.window)[0])
                else:
                    form = FORMATS[kind]
                    if form.holds == "regions" and regions is None:
                        regions = result.regions(**self._regions)
                    form.write(path, Contents(result, regions, micrograph.pixels))
                made[kind] = files[kind], self._settings_of(kind)
        except BaseException as exc:
            error = exc
        entry = self._entry(result, micrograph, made, time.perf_counter() - begin) if made else None
        return Written(task, entry, error, result.tiling)

    def record(self, written: Written) -> None:
        """Remember in the journal what was written; raises what kept the rest from it."""
        if written.entry is not None:
            self.journal.add(written.task, written.entry)
        if written.error is not None:
            raise written.error

    def write_stack(self, task: Task, part: SliceOf) -> None:
        """Write what is missing of :meth:`stack_task` from the labels of its slices, and a line of the journal.

        Raises :class:`UserError` when the disk does not take it.
        """
        entries = [self.journal[name] for name in part.names]
        first, files, made = entries[0], self.outputs(part.name, "stack"), dict(task.made)
        sizes = {entry["pixel_size_m"] for entry in entries}
        paths = [self.folder / str(entry["outputs"]["png"]) for entry in entries]
        record = {
            "source": printable(part.stack.source.name),
            "classes": [entry.name for entry in self.segmenter.manifest.classes],
            "pixel_size_m": first["pixel_size_m"],
            **(first["provenance"] or {"model": self.segmenter.manifest.name}),
        }
        labels = LabelStack(
            (len(entries), *first["size"]),
            lambda number: read_mask(paths[number]),
            self.segmenter.manifest.classes,
            first["pixel_size_m"] if len(sizes) == 1 else None,
            self._spacing(part),
            record,
        )
        try:
            for kind in task.missing:
                write = FORMATS[kind].write_stack
                assert write is not None  # of a kind that holds stacks
                write(self.folder / files[kind], labels)
                made[kind] = files[kind], self._settings_of(kind, part)
        finally:
            if made:
                outputs = {kind: file for kind, (file, _) in made.items()}
                settings = {kind: settings for kind, (_, settings) in made.items()}
                self.journal.add(task, {"outputs": outputs, "settings": settings, "slices": len(entries)})

    def _spacing(self, part: SliceOf) -> float | None:
        given = self.settings.spacing_m
        return part.stack.spacing_m if given is None else float(given)

    def _settings_of(self, kind: str, stack: SliceOf | None = None) -> dict[str, Any] | None:
        """What this kind of result depends on beside the job."""
        if stack is not None:
            return {"spacing_m": self._spacing(stack), "slices": len(stack.stack.slices)}
        return self._regions if kind != "overlay" and FORMATS[kind].holds == "regions" else None

    def _entry(
        self, result: Segmentation, micrograph: Micrograph, made: dict[str, tuple[str, Any]], seconds: float
    ) -> dict[str, Any]:
        bar, shares = micrograph.info_bar_rows, result.area_fractions()
        return {
            "outputs": {kind: file for kind, (file, _) in made.items()},
            "settings": {kind: settings for kind, (_, settings) in made.items() if settings is not None},
            "size": list(result.labels.shape),
            "fractions": {entry.name: entry.fraction for entry in shares},
            "mean_confidence": None if result.confidence is None else float(result.confidence.mean(dtype=np.float64)),
            "window": list(result.window),
            "pixel_size_m": result.pixel_size_m,
            "pixel_size_source": micrograph.pixel_size_source,
            "vendor": micrograph.vendor,
            "info_bar_rows": None if bar is None else list(bar),
            "rescale": result.rescale,
            "remarks": [*micrograph.remarks, *result.remarks],
            "tiling": None if result.tiling is None else result.tiling.as_dict(),
            "provenance": None if result.provenance is None else result.provenance.as_dict(),
            "seconds": round(seconds, 3),
            "domain": result.domain.as_dict(),
            "intervals": _intervals(shares, result.half_widths()),
            "no_interval": result.no_interval if self.segmenter.intervals else None,
        }

    def write_table(self) -> Path:
        """Write ``fractions.csv``: one row for each class of each image, or slice, whose results are in the folder."""
        header = (
            "image", *FRACTIONS, "pixel_size_nm", "model", "source", "slice", "rescale", "domain", "domain_distance",
            *INTERVAL,
        )  # fmt: skip
        return write_rows(self.folder / TABLE, header, (row for entry in self.journal for row in _table_rows(entry)))

    def _state_of(self, name: str) -> str:
        """Of the domain of an image that is done, "not known" where the model or an older version did not know."""
        return str((self.journal[name].get("domain") or NOT_KNOWN.as_dict())["state"])

    def in_state(self, state: DomainState, names: Iterable[str]) -> list[str]:
        """Which of these images are."""
        return [name for name in names if self._state_of(name) == state]

    def overall(self, names: Iterable[str]) -> tuple[dict[str, float], Literal["area", "pixels"]]:
        """Area fractions over all of these images, weighed by area, or by pixels where a pixel size is unknown."""
        entries = [self.journal[name] for name in names]
        by_area = bool(entries) and all(entry["pixel_size_m"] for entry in entries)
        weights = [_pixels(entry) * (entry["pixel_size_m"] ** 2 if by_area else 1.0) for entry in entries]
        classes = entries[0]["fractions"] if entries else {}
        shares = {
            name: sum(weight * entry["fractions"][name] for weight, entry in zip(weights, entries, strict=True))
            for name in classes
        }
        return {name: share / sum(weights) for name, share in shares.items()}, "area" if by_area else "pixels"


def _intervals(
    shares: Sequence[AreaFraction], widths: Sequence[float] | None
) -> dict[str, dict[str, float | None]] | None:
    """By class: the interval of its fraction, and half of it before it is cut at 0 and 1."""
    if widths is None:
        return None
    pairs = zip(shares, widths, strict=True)
    return {entry.name: {"low": entry.low, "high": entry.high, "half": half} for entry, half in pairs}


def _pixels(entry: Any) -> int:
    return int(entry["size"][0] * entry["size"][1])


def _table_rows(entry: Any) -> Iterator[list[str | int]]:
    size, stack = entry.get("pixel_size_m"), entry.get("stack") or {}
    domain, intervals = entry.get("domain") or NOT_KNOWN.as_dict(), entry.get("intervals") or {}
    for name, fraction in entry.get("fractions", {}).items():  # a stack itself has none
        pixels = round(fraction * _pixels(entry))
        area = None if size is None else pixels * size**2
        row, interval = fraction_row(AreaFraction(name, pixels, fraction, area)), intervals.get(name, {})
        yield [
            stack.get("name", entry["name"]), *row, number(size, 1e9), entry["job"]["model"], entry["source"],
            stack.get("slice", ""), number(entry.get("rescale")), domain["state"], number(domain["distance"]),
            number(interval.get("low")), number(interval.get("high")),
        ]  # fmt: skip
