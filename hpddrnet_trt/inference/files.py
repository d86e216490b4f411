"""Segment files and folders of micrographs: what ``hpddrnet-trt segment`` does."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from hpddrnet_trt.core.errors import UsageError, UserError, require
from hpddrnet_trt.core.files import check_writable
from hpddrnet_trt.data.datasets import image_files
from hpddrnet_trt.data.micrograph import InfoBar, Micrograph, Percentiles, check_info_bar, read_micrograph, to_grey8
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.inference.journal import Journal, modified
from hpddrnet_trt.inference.result import Segmentation
from hpddrnet_trt.results.confidence import write_confidence
from hpddrnet_trt.results.imagej import write_rois
from hpddrnet_trt.results.regions import Regions, check_background, check_pixel_size
from hpddrnet_trt.results.tables import FRACTIONS, number, write_regions, write_rows

LOG = logging.getLogger(__name__)
JOURNAL = "segmentations.jsonl"
TABLE = "fractions.csv"
OVERLAYS = "overlays"

Kind = Literal["png", "tiff", "ome-tiff", "ome-zarr", "rois", "regions", "confidence"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ENDINGS: dict[str, str] = {
    "png": ".png",
    "tiff": ".tif",
    "ome-tiff": ".ome.tif",
    "ome-zarr": ".ome.zarr",
    "rois": ".rois.zip",
    "regions": ".regions.csv",
    "confidence": ".confidence.tif",
}
_NEEDED = {  # of the extra "results"
    "ome-zarr": ("zarr", "ome_zarr.writer"),
    "rois": ("skimage.measure", "roifile"),
    "regions": ("skimage.measure",),
}
_OF_REGIONS = ("rois", "regions")


@dataclass
class SegmentSummary:
    """What became of each input.

    ``written``: the first file of each segmented image; ``skipped``: inputs that were done before; ``failed``: inputs,
    each with a sentence that names it and says why. ``seconds``: spent on the segmented ones, reading and writing
    included. ``fractions``: over the whole area of all images that are done, ``weighed_by`` "area" when all pixel
    sizes are known, "pixels" otherwise. ``tiled``: how many images were cut into tiles, ``seam_disagreement``: the
    largest of theirs (:class:`~hpddrnet_trt.inference.tiling.TilingReport`). ``interrupted``: Ctrl-C ended the run.
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


class FileSegmenter:
    """Segments micrograph files into a folder, one at a time, and remembers what is done.

    Written for an image that is called ``NAME``, as ``write`` says: ``png`` NAME.png and ``tiff`` NAME.tif (class
    indices with the classes' colours as palette), ``ome-tiff`` NAME.ome.tif, ``ome-zarr`` NAME.ome.zarr, ``rois``
    NAME.rois.zip (ImageJ), ``regions`` NAME.regions.csv, ``confidence`` NAME.confidence.tif; with ``overlay``
    overlays/NAME.png; and one line of ``segmentations.jsonl``.

    - ``background``: classes that rois and regions leave out; ``smallest``: least pixels of a region.
    - ``pixel_size_m``: metres, instead of what the files say.
    - ``info_bar``: what is cut off below the picture, as of :func:`~hpddrnet_trt.data.micrograph.read_micrograph`.
    - ``resume``: leave what the same model file has made with the same settings from the same, unchanged file.

    Raises :class:`UsageError` or :class:`~hpddrnet_trt.core.errors.MissingDependency` for what cannot be written.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        output_folder: str | Path,
        *,
        write: Collection[str] = ("png",),
        overlay: bool = True,
        background: Collection[str] = (),
        smallest: int = 1,
        pixel_size_m: float | None = None,
        info_bar: InfoBar = "auto",
        resume: bool = True,
    ) -> None:
        self.segmenter, self.folder, self.resume = segmenter, Path(output_folder), resume
        self.pixel_size_m = None if pixel_size_m is None else check_pixel_size(pixel_size_m)
        self.info_bar = info_bar
        self._kinds = [kind for kind in KINDS if kind in write] + ["overlay"] * overlay
        self._region_settings = {"background": sorted(background), "smallest": smallest}
        self._check(write, background, smallest)
        self.journal = Journal(self.folder / JOURNAL, self._job())

    def _check(self, write: Collection[str], background: Collection[str], smallest: int) -> None:
        if isinstance(write, str):
            raise UsageError(f"write is a list of kinds, got the text {write!r}; write [{write!r}]")
        for kind in write:
            if kind not in KINDS:
                raise UsageError(f"results are written as {', '.join(KINDS)}, not {kind!r}")
        if not self._kinds:
            raise UsageError(f"nothing is to be written; choose at least one of: {', '.join(KINDS)}")
        check_background(background, self.segmenter.manifest.classes)
        check_info_bar(self.info_bar)
        if smallest < 1:
            raise UsageError(f"the smallest region has at least 1 pixel, got {smallest}")
        if "confidence" in write and not self.segmenter.confidence:
            raise UsageError("the segmenter gives no confidence; open it with confidence=True")
        for kind in self._kinds:
            for module in _NEEDED.get(kind, ()):
                require(module, "results", f"write {kind}")
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"output {self.folder} is a file; give a folder")

    def _job(self) -> dict[str, Any]:
        segmenter = self.segmenter
        window: Any = segmenter.window
        return {
            "model": segmenter.manifest.name,
            "model_sha256": segmenter.model_sha256,  # one checkpoint may have become several INT8 files
            "checkpoint_sha256": segmenter.manifest.checkpoint_sha256,
            "precision": segmenter.manifest.precision,
            "mode": segmenter.mode,
            "resize": segmenter.resize,
            "tile": segmenter.tile,
            "given_window": asdict(window) if isinstance(window, Percentiles) else window,
            "given_pixel_size_m": self.pixel_size_m,
            "info_bar": self.info_bar,
        }

    def outputs(self, name: str) -> dict[str, Path]:
        """The files that an image called ``name`` gets, by kind."""
        return {
            kind: self.folder / OVERLAYS / f"{name}.png" if kind == "overlay" else self.folder / (name + ENDINGS[kind])
            for kind in self._kinds
        }

    def name_of(self, source: Path) -> str:
        """A name for an image that comes alone: that of its results, where there are some; its stem; or, where another
        image's results are called that, its file name, or its folder's and its file name."""
        known = self.journal.name_of(source)
        if known is not None:
            return known
        for naming in (_stem, _file_name, _folder_and_name):
            if self.journal.source_of(naming(source)) in (None, str(source)):
                return naming(source)
        raise UsageError(f"{self.folder} holds results of other images like {source}; choose another output folder")

    def is_done(self, source: Path, name: str) -> bool:
        """Whether ``resume`` leaves this image alone."""
        return self.resume and not self._missing(source, name)

    def segment(
        self, source: Path, name: str, *, progress: Callable[[int, int], None] | None = None
    ) -> Segmentation:
        """Segment ``source`` and write what is not there yet, and a line of the journal.

        ``progress(done, of)``: called after each tile of a large image.

        Raises :class:`UserError` when the file cannot be read or segmented, or not all of its results written; what
        was written stays.
        """
        begin = time.perf_counter()
        missing = self._missing(source, name) if self.resume else self._kinds
        read_ns = modified(source)
        micrograph = self._read(source)
        result = self.segmenter.segment(micrograph, progress=progress)
        made = {kind: old for kind, old in self.journal.made(name, source).items() if kind not in missing}
        try:
            for kind, path in self._write(result, micrograph, name, missing):
                made[kind] = path.relative_to(self.folder).as_posix(), self._settings(kind)
        finally:
            if made:
                seconds = time.perf_counter() - begin
                self.journal.add(name, source, read_ns, self._entry(result, micrograph, made, seconds))
        return result

    def _settings(self, kind: str) -> dict[str, Any] | None:
        """What this kind of result depends on beside the job."""
        return self._region_settings if kind in _OF_REGIONS else None

    def _missing(self, source: Path, name: str) -> list[str]:
        made = self.journal.made(name, source)
        return [kind for kind in self._kinds if kind not in made or made[kind][1] != self._settings(kind)]

    def _read(self, source: Path) -> Micrograph:
        micrograph = read_micrograph(source, info_bar=self.info_bar)
        if self.pixel_size_m is None:
            return micrograph
        return replace(micrograph, pixel_size_m=self.pixel_size_m, pixel_size_source="given")

    def _write(
        self, result: Segmentation, micrograph: Micrograph, name: str, kinds: Iterable[str]
    ) -> Iterator[tuple[str, Path]]:
        """Write the results one after the other; each pair comes when its file is there."""
        files, found = self.outputs(name), _Regions(result, self._region_settings)
        for kind in kinds:
            path = files[kind]
            if kind == "overlay":
                result.save_overlay(path, to_grey8(micrograph.pixels, result.window)[0])
            elif kind == "rois":
                write_rois(path, found.get())
            elif kind == "regions":
                write_regions(path, found.get())
            elif kind == "confidence":
                assert result.confidence is not None  # checked when the work was set up
                write_confidence(
                    path, result.confidence, pixel_size_m=result.pixel_size_m, provenance=result.record()
                )
            else:
                result.save(path, image=micrograph.pixels if kind == "ome-zarr" else None)
            yield kind, path

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
            "remarks": list(micrograph.remarks),
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


class _Regions:
    """The regions of one result, found when first needed."""

    def __init__(self, result: Segmentation, settings: dict[str, Any]) -> None:
        self._result, self._settings = result, settings
        self._found: Regions | None = None

    def get(self) -> Regions:
        if self._found is None:
            self._found = self._result.regions(**self._settings)
        return self._found


def segment_paths(
    segmenter: Segmenter,
    inputs: str | Path | Sequence[str | Path],
    output_folder: str | Path,
    *,
    progress: bool = True,
    **options: Any,
) -> SegmentSummary:
    """Segment micrographs and write their results.

    ``inputs``: files, folders or globs. Written to ``output_folder``: what :class:`FileSegmenter` says, which takes
    all further ``options``, and ``fractions.csv`` with one row for each class of each image. Inputs that share a
    name keep their ending or folder in the results' name; results that are there keep theirs.

    A bad image does not stop the others: it is reported in the summary. Ctrl-C ends the run; what is done stays, and
    the summary says so. Raises :class:`UsageError` when nothing can be started (no images, a result that would
    overwrite an input or another image's results), :class:`UserError` when nothing can be written to the folder.
    """
    sources = _collect([inputs] if isinstance(inputs, (str, Path)) else inputs)
    work = FileSegmenter(segmenter, output_folder, **options)
    names = _result_names(sources, work.journal)
    _refuse_overwriting(names, work)
    check_writable(work.folder)
    summary = SegmentSummary()
    finished: list[str] = []
    try:
        with logging_redirect_tqdm():
            bar = tqdm(sources, desc="segment", unit="image", disable=not progress)
            for source in bar:
                if work.is_done(source, names[source]):
                    summary.skipped.append(source)
                    finished.append(names[source])
                elif _segmented(work, source, names[source], summary, bar):
                    finished.append(names[source])
    except KeyboardInterrupt:
        summary.interrupted = True
    if finished:
        summary.fractions, summary.weighed_by = work.overall(finished)
        summary.files = _where(work)
        try:
            work.write_table()
        except (UserError, OSError) as exc:  # a spreadsheet program locks the table that it shows
            LOG.warning("the table of area fractions could not be written: %s", exc)
    return summary


def _segmented(work: FileSegmenter, source: Path, name: str, summary: SegmentSummary, bar: tqdm[Path]) -> bool:
    begin = time.perf_counter()

    def show(done: int, of: int) -> None:
        bar.set_postfix_str(f"tile {done} of {of}" if of > 1 else "")

    try:
        result = work.segment(source, name, progress=show)
    except (UserError, OSError, MemoryError) as exc:
        reason = str(exc) or type(exc).__name__
        if str(source) not in reason:
            reason = f"{source}: {reason}"
        LOG.warning("%s", reason)
        summary.failed.append((source, reason))
        return False
    if result.tiling is not None:
        summary.tiled += 1
        summary.seam_disagreement = max(summary.seam_disagreement, result.tiling.seam_disagreement)
    summary.seconds += time.perf_counter() - begin
    summary.written.append(next(iter(work.outputs(name).values())))
    return True


def _where(work: FileSegmenter) -> dict[str, str]:
    files = {kind: path.relative_to(work.folder).as_posix() for kind, path in work.outputs("NAME").items()}
    return {**files, "fractions": TABLE, "journal": JOURNAL}


def _pixels(entry: Any) -> int:
    return int(entry["size"][0] * entry["size"][1])


def _table_rows(entry: Any) -> Iterator[list[str | int]]:
    size = entry["pixel_size_m"]
    for name, fraction in entry["fractions"].items():
        pixels = round(fraction * _pixels(entry))
        area = None if size is None else pixels * size**2
        yield [
            entry["name"], name, pixels, number(fraction), number(area, 1e12), number(size, 1e9),
            entry["job"]["model"], entry["source"],
        ]  # fmt: skip


def _collect(inputs: Iterable[str | Path]) -> list[Path]:
    """All micrographs of all inputs, each once, in order."""
    return list(dict.fromkeys(path.resolve() for entry in inputs for path in image_files(entry)))


def _result_names(sources: Sequence[Path], journal: Journal) -> dict[Path, str]:
    """A name for the results of each input: the one they have; else its stem; where inputs share one, file name, then
    folder and file name, then the path below their common folder. Independent of the order of the inputs."""
    known = {path: journal.name_of(path) for path in sources}
    names = {path: name for path, name in known.items() if name is not None}
    waiting = [path for path in sources if path not in names]
    root = Path(os.path.commonpath([path.parent for path in sources]))
    for naming in (_stem, _file_name, _folder_and_name, lambda path: "_".join(path.relative_to(root).parts)):
        counts = Counter(naming(path).lower() for path in waiting)  # some file systems ignore case
        taken = {name.lower() for name in names.values()}
        unique = [path for path in waiting if counts[naming(path).lower()] == 1 and naming(path).lower() not in taken]
        names.update({path: naming(path) for path in unique})
        waiting = [path for path in waiting if path not in names]
    if waiting:
        raise UsageError(f"{waiting[0]} and another input would be written to the same name; segment them separately")
    return names


def _stem(path: Path) -> str:
    """The name without its ending; ``.ome.tif`` is one, also among the results."""
    return path.stem.removesuffix(".ome") or path.stem


def _file_name(path: Path) -> str:
    return path.name


def _folder_and_name(path: Path) -> str:
    return f"{path.parent.name}_{path.name}"


def _refuse_overwriting(names: dict[Path, str], work: FileSegmenter) -> None:
    if work.folder.resolve() in {source.parent for source in names}:
        raise UsageError(f"{work.folder} holds the images to segment; choose another output folder")
    for source, name in names.items():
        owner = work.journal.source_of(name)
        if owner is not None and owner != str(source):
            raise UsageError(
                f"{work.folder / name} holds the labels of {owner}; choose another output folder for {source}"
            )
