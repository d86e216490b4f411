"""Segment many files: what ``hpddrnet-trt segment`` does."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.core.files import check_writable, printable
from hpddrnet_trt.core.progress import progress_bar
from hpddrnet_trt.data.datasets import find_images
from hpddrnet_trt.data.micrograph import Micrograph
from hpddrnet_trt.data.stack import Stack, stack_in_file, stacks_in_folders
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.inference.files import NAMINGS, TABLE, FileSegmenter, ResultSettings, Written
from hpddrnet_trt.inference.journal import JOURNAL, SliceOf, Task
from hpddrnet_trt.inference.overlap import Held, ReadAhead, WriteBehind
from hpddrnet_trt.inference.result import Segmentation
from hpddrnet_trt.inference.specimens import (
    SPECIMENS,
    SpecimenFraction,
    specimen_fractions,
    specimens_in_words,
    specimens_of,
    write_specimens,
)

LOG = logging.getLogger(__name__)
MOST_LISTED = 5  # names in one line of the summary


@dataclass
class SegmentSummary:
    """What became of each input.

    ``written``: the first file of each segmented image; ``skipped``: inputs that were done before; ``failed``: inputs,
    each with a sentence that names it and says why. ``seconds``: from the first reading to the last writing.
    ``fractions``: over the whole area of all images that are done, ``weighed_by`` "area" when all pixel sizes are
    known, "pixels" otherwise. ``tiled``: how many images were cut into tiles, ``seam_disagreement``: the largest of
    theirs (:class:`~hpddrnet_trt.inference.tiling.TilingReport`). ``rescaled``: how many images were read at another
    pixel size than their own. ``interrupted``: Ctrl-C ended the run.
    ``files``: what there is for each image, and its place in the folder. ``unusual``, ``foreign``: names of images that
    are unlike the training's, of those that are done (:class:`~hpddrnet_trt.core.domain.Domain`). ``no_interval``:
    names of images whose fractions have no interval though these were asked for, by the reason. ``specimens``: the
    means of each specimen, where these were asked for, and ``specimens_told``: how specimens were told apart.
    """

    written: list[Path] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)
    failed: list[tuple[Path, str]] = field(default_factory=list)
    seconds: float = 0.0
    fractions: dict[str, float] = field(default_factory=dict)
    weighed_by: Literal["area", "pixels"] = "pixels"
    tiled: int = 0
    seam_disagreement: float = 0.0
    rescaled: int = 0
    interrupted: bool = False
    files: dict[str, str] = field(default_factory=dict)
    unusual: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    no_interval: dict[str, list[str]] = field(default_factory=dict)
    specimens: list[SpecimenFraction] = field(default_factory=list)
    specimens_told: str | None = None

    @property
    def exit_code(self) -> int:
        return 1 if self.failed else 0

    def record(self) -> dict[str, Any]:
        """JSON-able: the fields by their names, ``failed`` as a list of ``file`` and ``reason``."""
        paths = {name: [printable(path) for path in getattr(self, name)] for name in ("written", "skipped")}
        failed = [{"file": printable(path), "reason": reason} for path, reason in self.failed]
        rest = {entry.name: getattr(self, entry.name) for entry in fields(self)[3:]}
        rest["specimens"] = [entry.as_dict() for entry in self.specimens]
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
        if self.rescaled:
            lines.append(
                f"{self.rescaled} brought to the pixel size that the model was trained at, and the labels back "
                "(--no-rescale: read as they are)"
            )
        for reason, names in self.no_interval.items():
            lines.append(f"no interval of the fractions of {len(names)} ({_listed(names)}): {reason}")
        if self.specimens_told is not None:
            lines += [f"specimens: {self.specimens_told}", *specimens_in_words(self.specimens)]
        if self.foreign or self.unusual:
            lines.append(self._unlike_the_training())
        if self.fractions:
            shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in self.fractions.items())
            lines.append(f"overall, by {self.weighed_by}: {shares}")
        widest = max(map(len, self.files), default=0)
        lines += [f"  {what:<{widest}}  {where}" for what, where in self.files.items()]
        return "\n".join(lines)

    def _unlike_the_training(self) -> str:
        kinds = (("foreign to the model", self.foreign), ("unusual for it", self.unusual))
        counted = [f"{len(names)} {what} ({_listed(names)})" for what, names in kinds if names]
        return f"unlike the pictures of the training: {', '.join(counted)}; look at their overlays before their figures"


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
    what :class:`FileSegmenter` says, ``fractions.csv`` with one row for each class of each image, and where specimens
    are asked for ``specimens.csv`` with one for each class of each specimen. Inputs that share a name keep their
    ending or folder in the results' name; results that are there keep theirs.

    A bad image does not stop the others: it is reported in the summary. Ctrl-C ends the run; what is done stays, and
    the summary says so. Raises :class:`UsageError` when nothing can be started (no images, a result that would
    overwrite an input or another image's results), :class:`UserError` when nothing can be written to the folder.
    """
    entries = [inputs] if isinstance(inputs, (str, Path)) else inputs
    # Absolute, but links stay what the user called them.
    sources = list(dict.fromkeys(path.absolute() for entry in entries for path in find_images(entry, split)))
    stacks: dict[Path, Stack] = {}
    if settings.stack:
        sources, stacks = _in_stacks(sources)
    work = FileSegmenter(segmenter, output_folder, settings)
    names = _result_names(sources, work)
    groups, told = None, None
    if settings.specimen is not None:
        groups, told = specimens_of(sources, settings.specimen)
    check_writable(work.folder)
    with logging_redirect_tqdm(), progress_bar(total=len(sources), desc="segment", unit="image", show=progress) as bar:
        run = _Run(work, names, bar)
        summary = run.summary
        summary.specimens_told = told
        try:
            run.segment([(source, stacks.get(source)) for source in sources])
            run.write_stacks()
        except KeyboardInterrupt:
            summary.interrupted = True
    if run.finished:
        summary.fractions, summary.weighed_by = work.overall(run.finished)
        summary.unusual, summary.foreign = (
            work.in_state(state, run.finished) for state in ("unusual", "foreign")
        )
        summary.files = {**run.files, "fractions": TABLE, "journal": JOURNAL}
        done = [work.journal[name] for name in run.finished]
        for line in done:
            if (reason := line.get("no_interval")) is not None:
                summary.no_interval.setdefault(reason, []).append(line["name"])
        if groups is not None:
            summary.specimens = specimen_fractions(done, groups)
            if summary.specimens:
                summary.files["specimens"] = SPECIMENS
        try:
            work.write_table()
            if summary.specimens:
                write_specimens(work.folder / SPECIMENS, summary.specimens)
        except (UserError, OSError) as exc:  # a spreadsheet program locks the table that it shows
            LOG.warning("the table of area fractions could not be written: %s", exc)
    return summary


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MOST_LISTED
    return ", ".join(map(printable, names[:MOST_LISTED])) + (f" and {more} more" if more > 0 else "")


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
        self.files: dict[str, str] = {}  # for the summary
        self._work, self._names, self._bar = work, names, bar
        self._opened: deque[_Opened] = deque()  # read, and not written yet
        self._stacks: list[SliceOf] = []  # the first slice of each
        self._written: set[str] = set()  # names of what this run has segmented

    def segment(self, sources: Sequence[tuple[Path, Stack | None]]) -> None:
        """Segment all that is not done; after Ctrl-C what is segmented is still written."""
        begin, held = time.perf_counter(), Held()
        try:
            reading = ReadAhead(self._open, self._pictures(sources), held)
            with reading as opened, WriteBehind(self._settle, held) as behind:
                images = self._images(opened)
                with closing(self._work.segmenter.segment_many(images, progress=self._show)) as results:
                    for result in results:
                        self._write_done(behind)
                        one = self._opened.popleft()
                        behind.put(partial(self._write, one, result), one.pixels)
                self._write_done(behind)
        finally:
            self.summary.seconds = time.perf_counter() - begin

    def write_stacks(self) -> None:
        """Write the files that hold whole stacks, of those whose slices are all there."""
        finished = set(self.finished)
        for part in self._stacks:
            source, names = part.stack.source, part.names
            outputs = self._work.outputs("NAME", "stack")
            self.files.update({f"{kind} of a stack": file for kind, file in outputs.items()})
            missing = len(names) - len(finished.intersection(names))
            if missing:
                reason = (
                    f"{source}: {missing} of its {len(names)} slices failed, so the stack of labels is not written; "
                    "correct them and run again"
                )
                self.summary.failed.append((source, reason))
                continue
            task = self._work.stack_task(part, anew=not self._written.isdisjoint(names))
            try:
                if task.missing:
                    self._work.write_stack(task, part)
            except (UserError, OSError, MemoryError) as exc:
                self._failed(source, exc)

    def _pictures(self, sources: Sequence[tuple[Path, Stack | None]]) -> Iterator[Path | SliceOf]:
        """Images, and the slices of stacks. In the thread that reads: stacks are found by opening the files."""
        for source, stack in sources:
            if stack is None and self._work.settings.stack is not False:
                stack = stack_in_file(source)
            if stack is None:
                yield source
                continue
            parts = [SliceOf(stack, self._names[source], number) for number in range(len(stack.slices))]
            if self._work.settings.stack is None:
                told = "%s: its %d pages are segmented as a stack (--no-stack: only the first)"
                LOG.warning(told, source, len(parts))
            self._stacks.append(parts[0])
            self._bar.total = (self._bar.total or 0) + len(parts) - 1
            yield from parts

    def _open(self, picture: Path | SliceOf) -> tuple[_Opened, int]:
        work, begin = self._work, time.perf_counter()
        task = work.slice_task(picture) if isinstance(picture, SliceOf) else work.task(picture, self._names[picture])
        if not task.missing:
            return _Opened(task, begin), 0
        try:
            one = _Opened(task, begin, work.read(task))
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
            self._failed(task.source, exc)
            return
        self.finished.append(task.name)
        if task.slice is None:
            self.files.update(self._work.outputs("NAME"))
            outputs = self._work.outputs(task.name)
        else:
            slices = self._work.outputs("NAME/0001", "slice")
            self.files.update({f"{kind} of a slice": file for kind, file in slices.items()})
            outputs = self._work.outputs(task.name, "slice")
        if not task.missing:
            summary.skipped.append(task.source)
            return
        self._written.add(task.name)
        summary.written.append(self._work.folder / next(iter(outputs.values())))
        if written.entry is not None and written.entry["rescale"] not in (None, 1.0):
            summary.rescaled += 1
        if written.tiling is not None:
            summary.tiled += 1
            summary.seam_disagreement = max(summary.seam_disagreement, written.tiling.seam_disagreement)

    def _failed(self, source: Path, exc: BaseException) -> None:
        reason = str(exc) or type(exc).__name__
        if str(source) not in reason:
            reason = f"{source}: {reason}"
        LOG.warning("%s", reason)
        self.summary.failed.append((source, reason))

    def _show(self, done: int, of: int) -> None:
        self._bar.set_postfix_str(f"tile {done} of {of}" if of > 1 else "")


def _in_stacks(paths: Sequence[Path]) -> tuple[list[Path], dict[Path, Stack]]:
    """Files and folders to segment, with the stacks among them: TIFFs with pages, and all other files of a folder."""
    pages = {path: stack for path in paths if (stack := stack_in_file(path)) is not None}
    folders = stacks_in_folders(path for path in paths if path not in pages)
    single = [path for stack in folders if len(stack.slices) == 1 for path, _ in stack.slices]
    stacks = pages | {stack.source: stack for stack in folders if len(stack.slices) > 1}
    return [*stacks, *single], stacks


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
