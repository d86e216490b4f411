"""Segment files and folders of micrographs: what ``hpddrnet-trt segment`` does, and what it remembers of it."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.core.files import check_writable, printable
from hpddrnet_trt.core.progress import progress_bar
from hpddrnet_trt.data.datasets import find_images
from hpddrnet_trt.data.intensity import FullScale, Percentiles, to_grey8
from hpddrnet_trt.data.micrograph import InfoBar, Micrograph, check_info_bar, read_micrograph
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.inference.overlap import Held, ReadAhead, WriteBehind
from hpddrnet_trt.inference.result import Segmentation
from hpddrnet_trt.inference.tiling import TilingReport
from hpddrnet_trt.results import FORMATS, KINDS, Contents, check_kinds
from hpddrnet_trt.results.regions import AreaFraction, check_background, check_pixel_size
from hpddrnet_trt.results.tables import FRACTIONS, fraction_row, number, write_rows

LOG = logging.getLogger(__name__)
JOURNAL = "segmentations.jsonl"
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
    - ``background``: classes that rois and regions leave out; ``smallest``: least pixels of a region.
    - ``pixel_size_m``: metres, instead of what the files say.
    - ``info_bar``: what is cut off below the picture, as of :func:`~hpddrnet_trt.data.micrograph.read_micrograph`.
    - ``resume``: leave what the same model file has made with the same settings from the same, unchanged file.
    """

    write: Collection[str] = ("png",)
    overlay: bool = True
    background: Collection[str] = ()
    smallest: int = 1
    pixel_size_m: float | None = None
    info_bar: InfoBar = "auto"
    resume: bool = True

    def check(self, segmenter: Segmenter) -> None:
        """Raise :class:`UsageError` or :class:`MissingDependency` for what cannot be written or given."""
        if isinstance(self.write, str):
            raise UsageError(f"write is a list of kinds, got the text {self.write!r}; write [{self.write!r}]")
        check_kinds(self.write)
        if not self.write and not self.overlay:
            raise UsageError(f"nothing is to be written; choose at least one of: {', '.join(KINDS)}")
        check_background(self.background, segmenter.manifest.classes)
        check_info_bar(self.info_bar)
        if self.smallest < 1:
            raise UsageError(f"the smallest region has at least 1 pixel, got {self.smallest}")
        if self.pixel_size_m is not None:
            check_pixel_size(self.pixel_size_m)
        if "confidence" in self.write and not segmenter.confidence:
            raise UsageError("the segmenter gives no confidence; open it with confidence=True")


class Journal:
    """One JSON line per finished image, appended; of several lines with one ``name`` the last counts.

    ``job``: what results depend on beside the image (model, mode, window ...). A result counts as done when it was
    made by the same job from the same, unchanged file, and is still there. A line torn by a crash is ignored.
    """

    def __init__(self, path: Path, job: Mapping[str, Any]) -> None:
        self._path = path
        self._job = json.loads(json.dumps(job))  # as it is read back
        self._entries: dict[str, dict[str, Any]] = {}
        self._names: dict[str, str] = {}  # by source
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        self._torn = bool(text) and not text.endswith("\n")
        for entry in map(_parsed, text.splitlines()):
            if isinstance(entry.get("name"), str) and isinstance(entry.get("outputs"), dict):
                self._keep(entry)

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        """The last line of ``name``; KeyError when there is none."""
        return self._entries[name]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """The lines of images of which something is still there, in the order of their first line."""
        return (entry for name, entry in self._entries.items() if self.source_of(name) is not None)

    def source_of(self, name: str) -> str | None:
        """The image that the files called ``name`` belong to, as far as recorded and still there."""
        entry = self._entries.get(name)
        if entry is None or not any((self._path.parent / str(file)).exists() for file in entry["outputs"].values()):
            return None
        return str(entry.get("source"))

    def name_of(self, source: Path) -> str | None:
        """What the results of this image are called, as far as recorded and still there."""
        name = self._names.get(str(source))
        return name if name is not None and self.source_of(name) == str(source) else None

    def made(self, name: str, source: Path, modified_ns: int | None) -> dict[str, tuple[str, Any]]:
        """Outputs of ``name`` that this job has made from ``source`` as it is now: see :class:`Task`."""
        entry = self._entries.get(name)
        if entry is None or entry.get("job") != self._job or entry.get("source") != str(source):
            return {}
        if entry.get("source_mtime_ns") != modified_ns:
            return {}
        return {
            kind: (str(file), entry.get("settings", {}).get(kind))
            for kind, file in entry["outputs"].items()
            if (self._path.parent / str(file)).exists()
        }

    def add(self, task: Task, entry: Mapping[str, Any]) -> None:
        """Append a line; raises :class:`UserError` when the disk does not take it."""
        about = {"name": task.name, "source": str(task.source), "source_mtime_ns": task.modified_ns, "job": self._job}
        line = {**about, **entry}
        self._keep(line)
        try:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(("\n" if self._torn else "") + json.dumps(line) + "\n")
            self._torn = False
        except OSError as exc:
            raise UserError(f"cannot write {self._path}: {exc.strerror}; free some space and run again") from exc

    def _keep(self, entry: dict[str, Any]) -> None:
        self._entries[entry["name"]] = entry
        self._names[str(entry.get("source"))] = entry["name"]


def modified(path: Path) -> int | None:
    """Time of the last change in nanoseconds, None for a file that is gone."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None


@dataclass(frozen=True)
class Task:
    """One image and what of its results there is: ``made``, by kind the file in the folder and the settings that this
    kind depends on in addition (None for most), and the kinds that are ``missing``. ``modified_ns``: of ``source``,
    before it is read: what it becomes later is not done."""

    source: Path
    name: str
    modified_ns: int | None
    made: Mapping[str, tuple[str, Any]]
    missing: Sequence[str]


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
    ``segmentations.jsonl``.

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
        self._regions: dict[str, Any] = {"background": sorted(settings.background), "smallest": settings.smallest}
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
        }

    def outputs(self, name: str) -> dict[str, str]:
        """The files in the folder that an image called ``name`` gets, by kind."""
        return {
            kind: f"{OVERLAYS}/{name}.png" if kind == "overlay" else name + FORMATS[kind].ending
            for kind in self._kinds
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
        modified_ns = modified(source)
        made = self.journal.made(name, source, modified_ns)
        if anew or not self.settings.resume:
            missing = self._kinds
        else:
            missing = [kind for kind in self._kinds if kind not in made or made[kind][1] != self._settings_of(kind)]
        return Task(source, name, modified_ns, {kind: made[kind] for kind in made if kind not in missing}, missing)

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
        """The image; raises :class:`BadInputFile` for one that cannot be read."""
        micrograph = read_micrograph(task.source, info_bar=self.settings.info_bar)
        if self.settings.pixel_size_m is not None:
            size = float(self.settings.pixel_size_m)
            micrograph = replace(micrograph, pixel_size_m=size, pixel_size_source="given")
        return micrograph

    def write(self, task: Task, micrograph: Micrograph, result: Segmentation, begin: float) -> Written:
        """Write what is missing, as far as it goes; :meth:`record` is to be told. ``begin``: seconds, of reading it."""
        for remark in result.remarks:
            LOG.warning("%s: %s", task.source, remark)
        made, files, regions = dict(task.made), self.outputs(task.name), None
        error: BaseException | None = None
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

    def _settings_of(self, kind: str) -> dict[str, Any] | None:
        """What this kind of result depends on beside the job."""
        return self._regions if kind != "overlay" and FORMATS[kind].holds == "regions" else None

    def _entry(
        self, result: Segmentation, micrograph: Micrograph, made: dict[str, tuple[str, Any]], seconds: float
    ) -> dict[str, Any]:
        bar = micrograph.info_bar_rows
        return {
            "outputs": {kind: file for kind, (file, _) in made.items()},
            "settings": {kind: settings for kind, (_, settings) in made.items() if settings is not None},
            "size": list(result.labels.shape),
            "fractions": result.fractions(),
            "mean_confidence": None if result.confidence is None else float(result.confidence.mean(dtype=np.float64)),
            "window": list(result.window),
            "pixel_size_m": result.pixel_size_m,
            "pixel_size_source": micrograph.pixel_size_source,
            "vendor": micrograph.vendor,
            "info_bar_rows": None if bar is None else list(bar),
            "remarks": [*micrograph.remarks, *result.remarks],
            "tiling": None if result.tiling is None else result.tiling.as_dict(),
            "provenance": None if result.provenance is None else result.provenance.as_dict(),
            "seconds": round(seconds, 3),
        }

    def write_table(self) -> Path:
        """Write ``fractions.csv``: one row for each class of each image whose results are in the folder."""
        header = ("image", *FRACTIONS, "pixel_size_nm", "model", "source")
        return write_rows(self.folder / TABLE, header, (row for entry in self.journal for row in _table_rows(entry)))

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


@dataclass
class SegmentSummary:
    """What became of each input.

    ``written``: the first file of each segmented image; ``skipped``: inputs that were done before; ``failed``: inputs,
    each with a sentence that names it and says why. ``seconds``: from the first reading to the last writing.
    ``fractions``: over the whole area of all images that are done, ``weighed_by`` "area" when all pixel sizes are
    known, "pixels" otherwise. ``tiled``: how many images were cut into tiles, ``seam_disagreement``: the largest of
    theirs (:class:`~hpddrnet_trt.inference.tiling.TilingReport`). ``interrupted``: Ctrl-C ended the run.
    ``files``: what there is for each image, and its place in the folder.
    """

    written: list[Path] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)
    failed: list[tuple[Path, str]] = field(default_factory=list)
    seconds: float = 0.0
    fractions: dict[str, float] = field(default_factory=dict)
    weighed_by: Literal["area", "pixels"] = "pixels"
    tiled: int = 0
    seam_disagreement: float = 0.0
    interrupted: bool = False
    files: dict[str, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        return 1 if self.failed else 0

    def record(self) -> dict[str, Any]:
        """JSON-able: the fields by their names, ``failed`` as a list of ``file`` and ``reason``."""
        paths = {name: [printable(path) for path in getattr(self, name)] for name in ("written", "skipped")}
        failed = [{"file": printable(path), "reason": reason} for path, reason in self.failed]
        rest = {entry.name: getattr(self, entry.name) for entry in fields(self)[3:]}
        return {**paths, "failed": failed, **rest}

    def __str__(self) -> str:
        lines = [f"{len(self.written)} segmented, {len(self.skipped)} already done, {len(self.failed)} failed"]
        if self.interrupted:
            lines[0] += ", interrupted: run again to continue"
        lines += [f"  {reason}" for _, reason in self.failed]
        if self.written:
            lines.append(f"{self.seconds / len(self.written):.2f} s an image")
        if self.tiled:
            lines.append(
                f"{self.tiled} in tiles, which disagree about {100 * self.seam_disagreement:.2g} % of the pixels that "
                "two of them see, at most"
            )
        if self.fractions:
            shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in self.fractions.items())
            lines.append(f"overall, by {self.weighed_by}: {shares}")
        widest = max(map(len, self.files), default=0)
        lines += [f"  {what:<{widest}}  {where}" for what, where in self.files.items()]
        return "\n".join(lines)


def segment_paths(
    segmenter: Segmenter,
    inputs: str | Path | Sequence[str | Path],
    output_folder: str | Path,
    settings: ResultSettings = ResultSettings(),
    *,
    split: str = "test",
    progress: bool = True,
) -> SegmentSummary:
    """Segment micrographs and write their results.

    ``inputs``: files, folders, patterns, or datasets, of which one ``split`` is taken. Written to ``output_folder``:
    what :class:`FileSegmenter` says, and ``fractions.csv`` with one row for each class of each image. Inputs that
    share a name keep their ending or folder in the results' name; results that are there keep theirs.

    A bad image does not stop the others: it is reported in the summary. Ctrl-C ends the run; what is done stays, and
    the summary says so. Raises :class:`UsageError` when nothing can be started (no images, a result that would
    overwrite an input or another image's results), :class:`UserError` when nothing can be written to the folder.
    """
    entries = [inputs] if isinstance(inputs, (str, Path)) else inputs
    # Absolute, but links stay what the user called them.
    sources = list(dict.fromkeys(path.absolute() for entry in entries for path in find_images(entry, split)))
    work = FileSegmenter(segmenter, output_folder, settings)
    names = _result_names(sources, work)
    check_writable(work.folder)
    with logging_redirect_tqdm(), progress_bar(total=len(sources), desc="segment", unit="image", show=progress) as bar:
        run = _Run(work, names, bar)
        summary = run.summary
        try:
            run.segment(sources)
        except KeyboardInterrupt:
            summary.interrupted = True
    if run.finished:
        summary.fractions, summary.weighed_by = work.overall(run.finished)
        summary.files = {**work.outputs("NAME"), "fractions": TABLE, "journal": JOURNAL}
        try:
            work.write_table()
        except (UserError, OSError) as exc:  # a spreadsheet program locks the table that it shows
            LOG.warning("the table of area fractions could not be written: %s", exc)
    return summary


class _Opened(NamedTuple):
    """An input as it comes from reading: with its ``micrograph``, unless it is done already or has an ``error``.

    ``begin``: seconds, when its reading began."""

    task: Task
    begin: float
    micrograph: Micrograph | None = None
    error: BaseException | None = None

    @property
    def pixels(self) -> int:
        return 0 if self.micrograph is None else int(self.micrograph.pixels.size)


class _Run:
    """One run over many files: reading, inference and writing at the same time; what became of each, in their order."""

    def __init__(self, work: FileSegmenter, names: Mapping[Path, str], bar: tqdm[Any]) -> None:
        self.summary = SegmentSummary()
        self.finished: list[str] = []  # names of what there is now
        self._work, self._names, self._bar = work, names, bar
        self._opened: deque[_Opened] = deque()  # read, and not written yet

    def segment(self, sources: Sequence[Path]) -> None:
        """Segment all that is not done; after Ctrl-C what is segmented is still written."""
        begin, held = time.perf_counter(), Held()
        try:
            with ReadAhead(self._open, sources, held) as opened, WriteBehind(self._settle, held) as behind:
                images = self._images(opened)
                with closing(self._work.segmenter.segment_many(images, progress=self._show)) as results:
                    for result in results:
                        self._write_done(behind)
                        one = self._opened.popleft()
                        behind.put(partial(self._write, one, result), one.pixels)
                self._write_done(behind)
        finally:
            self.summary.seconds = time.perf_counter() - begin

    def _open(self, source: Path) -> tuple[_Opened, int]:
        task, begin = self._work.task(source, self._names[source]), time.perf_counter()
        if not task.missing:
            return _Opened(task, begin), 0
        try:
            one = _Opened(task, begin, self._work.read(task))
        except (UserError, OSError, MemoryError) as exc:
            return _Opened(task, begin, error=exc), 0
        return one, one.pixels

    def _images(self, opened: Iterable[_Opened]) -> Iterator[Micrograph]:
        for one in opened:
            self._opened.append(one)
            if one.micrograph is not None:
                yield one.micrograph

    def _write_done(self, behind: WriteBehind[Written]) -> None:
        """Pass on what comes next and needs no inference."""
        while self._opened and self._opened[0].micrograph is None:
            behind.put(partial(self._write, self._opened.popleft(), None), 0)

    def _write(self, one: _Opened, result: Segmentation | Exception | None) -> Written:
        if one.micrograph is not None and isinstance(result, Segmentation):
            return self._work.write(one.task, one.micrograph, result, one.begin)
        return Written(one.task, None, result if isinstance(result, Exception) else one.error, None)

    def _settle(self, written: Written) -> None:
        task, summary = written.task, self.summary
        self._bar.update()
        try:
            self._work.record(written)
        except (UserError, OSError, MemoryError) as exc:
            reason = str(exc) or type(exc).__name__
            if str(task.source) not in reason:
                reason = f"{task.source}: {reason}"
            LOG.warning("%s", reason)
            summary.failed.append((task.source, reason))
            return
        self.finished.append(task.name)
        if not task.missing:
            summary.skipped.append(task.source)
            return
        summary.written.append(self._work.folder / next(iter(self._work.outputs(task.name).values())))
        if written.tiling is not None:
            summary.tiled += 1
            summary.seam_disagreement = max(summary.seam_disagreement, written.tiling.seam_disagreement)

    def _show(self, done: int, of: int) -> None:
        self._bar.set_postfix_str(f"tile {done} of {of}" if of > 1 else "")


def _pixels(entry: Any) -> int:
    return int(entry["size"][0] * entry["size"][1])


def _table_rows(entry: Any) -> Iterator[list[str | int]]:
    size = entry["pixel_size_m"]
    for name, fraction in entry["fractions"].items():
        pixels = round(fraction * _pixels(entry))
        area = None if size is None else pixels * size**2
        row = fraction_row(AreaFraction(name, pixels, fraction, area))
        yield [entry["name"], *row, number(size, 1e9), entry["job"]["model"], entry["source"]]


def _result_names(sources: Sequence[Path], work: FileSegmenter) -> dict[Path, str]:
    """A name for the results of each input: the one they have; else its stem; where inputs share one, file name, then
    folder and file name, then the path below their common folder. Independent of the order of the inputs.

    Raises :class:`UsageError` where this would overwrite an input or another image's results.
    """
    if work.folder.resolve() in {source.parent.resolve() for source in sources}:
        raise UsageError(f"{work.folder} holds the images to segment; choose another output folder")
    known = {path: work.journal.name_of(path) for path in sources}
    names = {path: name for path, name in known.items() if name is not None}
    new = waiting = [path for path in sources if path not in names]
    root = Path(os.path.commonpath([path.parent for path in sources]))
    namings: tuple[Callable[[Path], str], ...] = (*NAMINGS, lambda path: "_".join(path.relative_to(root).parts))
    for naming in namings:
        counts = Counter(naming(path).lower() for path in waiting)  # some file systems ignore case
        taken = {name.lower() for name in names.values()}
        unique = [path for path in waiting if counts[naming(path).lower()] == 1 and naming(path).lower() not in taken]
        names.update({path: naming(path) for path in unique})
        waiting = [path for path in waiting if path not in names]
    if waiting:
        raise UsageError(f"{waiting[0]} and another input would be written to the same name; segment them separately")
    for source in new:
        owner = work.journal.source_of(names[source])
        if owner is not None and owner != str(source):
            raise UsageError(
                f"{work.folder / names[source]} holds the labels of {owner}; choose another output folder for {source}"
            )
    return names


def _parsed(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}
