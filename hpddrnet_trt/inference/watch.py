"""A watched folder: micrographs that appear in it are segmented, as ``hpddrnet-trt segment`` would.

For microscopes whose software cannot be talked to: it saves files, and results appear beside them.

Polling with ``os.scandir``, and no library that waits for change notifications: microscopes save to network shares,
where the kernel reports only what this computer itself writes, and a notification would not say either when the
writer is done.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Any

from hpddrnet_trt.core.domain import Domain
from hpddrnet_trt.core.errors import BadInputFile, ContractError, MissingDependency, UsageError, UserError, describe
from hpddrnet_trt.core.files import printable
from hpddrnet_trt.data.decode import IMAGE_SUFFIXES
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.inference.files import FileSegmenter, ResultSettings
from hpddrnet_trt.inference.result import Segmentation

LOG = logging.getLogger(__name__)
SIDECAR_SUFFIXES = (".txt", ".hdr")  # Hitachi and JEOL; TESCAN
RECHECKED = 500  # finished files whose size and time are looked at again, per poll
_FIRST_RETRY_S = 0.5

Signature = tuple[tuple[int, int], ...]  # size and modification time of the image and of its sidecars
PATIENT = 10  # what grows with the number of files is done for a tenth of the time at most


class Happened(StrEnum):
    """What a :class:`WatchEvent` tells."""

    SEGMENTED = "segmented"
    ALREADY_DONE = "already done"
    WAITING = "waiting"  # cannot be read yet; tried again
    FAILED = "failed"  # not tried again unless the file changes
    FOLDER_LOST = "folder lost"  # cannot be read; tried again at each poll
    FOLDER_BACK = "folder back"


@dataclass(frozen=True)
class WatchEvent:
    """``path``: the micrograph or folder. ``reason``: why it waits, failed or is lost. ``fractions``: area fraction
    of each class by name, and ``domain``: whether it is like the training's pictures, of a segmented one."""

    happened: Happened
    path: Path
    reason: str | None = None
    fractions: Mapping[str, float] | None = None
    domain: Domain | None = None

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        fractions = None if self.fractions is None else dict(self.fractions)
        return {
            "event": self.happened.value, "file": printable(self.path), "reason": self.reason, "fractions": fractions,
            "domain": None if self.domain is None else self.domain.as_dict(),
        }  # fmt: skip


@dataclass
class WatchSummary:
    """``failed``: micrographs that failed and did not succeed later, with the reason."""

    segmented: int = 0
    already_done: int = 0
    failed: dict[Path, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        return 1 if self.failed else 0

    def __str__(self) -> str:
        lines = [f"{self.segmented} segmented, {self.already_done} already done, {len(self.failed)} failed"]
        for source, reason in self.failed.items():
            lines.append(f"  {reason}" if str(source) in reason else f"  {source}: {reason}")
        return "\n".join(lines)


@dataclass(frozen=True)
class WatchSettings:
    """When a file is taken, and when the watch ends.

    ``settle_s``: seconds without a change after which a file is complete; ``patience_s``: after which one that cannot
    be read has failed; ``recursive``: also in sub-folders. ``poll_s``: from one look at the folder to the next, longer
    where listing it takes more than a tenth of that. ``stop_after_s``: ends the watch when nothing has come for so
    long and nothing waits; 0 deals with what is there and ends; None: never.
    """

    settle_s: float = 2.0
    patience_s: float = 60.0
    poll_s: float = 1.0
    recursive: bool = False
    stop_after_s: float | None = None


def watch_folder(
    segmenter: Segmenter,
    folder: str | Path,
    output_folder: str | Path,
    results: ResultSettings = ResultSettings(),
    settings: WatchSettings = WatchSettings(),
    *,
    on_event: Callable[[WatchEvent], None] | None = None,
    stop: threading.Event | None = None,
) -> WatchSummary:
    """Segment the micrographs in ``folder`` and those that appear in it, until told to stop.

    Which files, and when one is complete: :class:`Arrivals`. A sidecar
    (``.txt``, ``.hdr``) that comes within the settling time is read with its micrograph; one that comes later lets the
    micrograph be segmented once more, now with its pixel size.

    What is written to ``output_folder``: what :class:`~hpddrnet_trt.inference.files.FileSegmenter` says of ``results``,
    and ``fractions.csv``. After a restart, files that the same model has done are left alone.

    ``on_event``: called with each :class:`WatchEvent`, on this thread. ``stop``: ends the watch once set, after the
    micrograph under way.

    A bad file, a full disk or a folder that vanishes does not end it: see the events. What could not be written
    within ``patience_s`` is done by the next watch. Raises :class:`UsageError` for settings that make no sense and
    :class:`BadInputFile` when ``folder`` is not there at the start.
    """
    root, output = Path(folder), Path(output_folder)
    if not root.is_dir():
        raise BadInputFile(f"{root} is not a folder that can be watched; check the path, or create it first")
    root = root.resolve()
    if output.resolve() == root:
        raise UsageError(f"results cannot go to the watched folder {root} itself; choose another output folder")
    if min(settings.settle_s, settings.patience_s) < 0 or settings.poll_s <= 0:
        raise UsageError("settle_s and patience_s must not be negative, and poll_s must be positive")
    arrivals = Arrivals(root, settings, leave_out=output)
    watch = _Watch(arrivals, FileSegmenter(segmenter, output, results), on_event)
    stop = stop or threading.Event()
    busy_s = time.monotonic()
    while not stop.is_set():
        polled_s = time.monotonic()
        due = watch.poll()
        next_poll_s = polled_s + max(settings.poll_s, PATIENT * (time.monotonic() - polled_s))
        for arrival in due:
            watch.deal_with(arrival)
            if stop.is_set() or time.monotonic() > next_poll_s:
                break  # and look again: there may be older ones by now, and these may be gone
        if due or arrivals.waiting:
            busy_s = time.monotonic()
        elif settings.stop_after_s is not None and time.monotonic() - busy_s >= settings.stop_after_s:
            break
        watch.refresh_table()
        stop.wait(max(next_poll_s - time.monotonic(), 0.0))
    watch.write_table()
    return watch.summary


class _Watch:
    """One run: what became of each arrival, and telling it."""

    def __init__(self, arrivals: Arrivals, work: FileSegmenter, on_event: Callable[[WatchEvent], None] | None) -> None:
        self._arrivals, self._work, self._on_event = arrivals, work, on_event
        self._told_waiting: set[Path] = set()
        self._table_is_old = False
        self._next_table_s = 0.0
        self.summary = WatchSummary()

    def poll(self) -> list[Arrival]:
        """What is due; folders that are lost or back are told."""
        before = dict(self._arrivals.lost)
        due = self._arrivals.poll()
        for folder, reason in self._arrivals.lost.items():
            if folder not in before:
                LOG.warning("%s cannot be read (%s); tried again until it can", folder, reason)
                self._tell(WatchEvent(Happened.FOLDER_LOST, folder, reason))
        for folder in before:
            if folder not in self._arrivals.lost:
                self._tell(WatchEvent(Happened.FOLDER_BACK, folder))
        return due

    def deal_with(self, arrival: Arrival) -> None:
        """Segment one micrograph; whatever goes wrong with it is told, and nothing is raised."""
        try:
            result = self._segment(arrival)
        except (ContractError, UsageError, MissingDependency) as exc:  # waiting does not help
            self._failed(arrival, str(exc))
        except (UserError, OSError) as exc:  # still being written, or locked, or no room for the results
            self._try_again(arrival, str(exc))
        except Exception as exc:  # one image must not end a watch that runs overnight
            LOG.exception("%s", arrival.path)
            self._failed(arrival, describe(exc))
        else:
            self._succeeded(arrival, result)

    def refresh_table(self) -> None:
        """Write the table, but not all the time: it lists every image of the folder."""
        begin = time.monotonic()
        if begin >= self._next_table_s:
            self.write_table()
            now = time.monotonic()
            self._next_table_s = now + PATIENT * (now - begin)

    def write_table(self) -> None:
        """Write ``fractions.csv`` if it lacks something."""
        if not self._table_is_old:
            return
        try:
            self._work.write_table()
            self._table_is_old = False
        except (UserError, OSError) as exc:  # a spreadsheet program locks the table that it shows
            LOG.warning("the table of area fractions could not be written: %s", exc)

    def _segment(self, arrival: Arrival) -> Segmentation | None:
        """None when it was done before."""
        # Anew where it has changed: the journal knows a file by its time, which says nothing of its sidecar.
        task = self._work.task(arrival.path, self._work.name_of(arrival.path), anew=arrival.again)
        return self._work.segment(task) if task.missing else None

    def _succeeded(self, arrival: Arrival, result: Segmentation | None) -> None:
        self._settled(arrival)
        self.summary.failed.pop(arrival.path, None)
        if result is None:
            self.summary.already_done += 1
            self._tell(WatchEvent(Happened.ALREADY_DONE, arrival.path))
        else:
            self._table_is_old = True
            self.summary.segmented += 1
            event = WatchEvent(
                Happened.SEGMENTED, arrival.path, fractions=result.fractions(), domain=result.domain
            )
            self._tell(event)

    def _try_again(self, arrival: Arrival, reason: str) -> None:
        if not arrival.path.exists():  # it left before its turn, or its folder did
            self._told_waiting.discard(arrival.path)
        elif self._arrivals.unreadable(arrival):
            self._failed(arrival, reason)
        elif arrival.path not in self._told_waiting:
            self._told_waiting.add(arrival.path)
            self._tell(WatchEvent(Happened.WAITING, arrival.path, reason))

    def _failed(self, arrival: Arrival, reason: str) -> None:
        self._settled(arrival)
        self.summary.failed[arrival.path] = reason
        self._tell(WatchEvent(Happened.FAILED, arrival.path, reason))

    def _settled(self, arrival: Arrival) -> None:
        self._arrivals.taken(arrival)
        self._told_waiting.discard(arrival.path)

    def _tell(self, event: WatchEvent) -> None:
        if self._on_event is not None:
            self._on_event(event)


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Within the block the first Ctrl-C or SIGTERM sets the event, for :func:`watch_folder`; a second one is a
    KeyboardInterrupt. In other threads than the main one signals are left alone: set the event yourself."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------ which files are complete


@dataclass(frozen=True)
class Arrival:
    """A file that is complete as far as one can see from outside. ``again``: it was taken before and has changed."""

    path: Path
    again: bool


@dataclass(slots=True)
class _File:
    sidecars: tuple[str, ...]
    signature: Signature
    since: float  # when this signature was first seen
    due: float | None  # when it is to be taken; None: not until it changes
    taken: bool = False


class Arrivals:
    """Finds micrographs in ``folder`` that nobody is writing any more.

    A file is due when its size and modification time, and those of its sidecars (same name, ``.txt`` or ``.hdr``),
    have not changed for ``settings.settle_s`` seconds of this computer's clock (a file server's clock may be off). A
    writer that renames a whole file into place needs no such wait: 0. Whether it can be decoded, the caller finds out,
    and says :meth:`unreadable` if not: it is due again at growing intervals until ``settings.patience_s`` seconds have
    passed without a change. A file that changes after it was taken, or whose sidecar arrives, is due once more.

    Left out: hidden names (they start with ``.``), names with other endings (``x.tif.part``), sub-folders unless
    ``settings.recursive``, links to folders, and everything in ``leave_out`` (our results).

    One poll reads each folder once and asks for size and time only of files that are new or waiting, and of 500
    finished ones in turn: 100,000 finished files cost little more than listing them. Folders that cannot be read are in
    ``lost`` with the reason, and are tried again at each poll; what was found in them stays known.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: WatchSettings,
        *,
        leave_out: str | Path | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._root, self._settings = os.path.abspath(folder), settings
        self._clock = clock or time.monotonic
        self._leave_out = None if leave_out is None else os.path.realpath(leave_out)
        self._files: dict[str, _File] = {}
        self._recheck: Iterator[str] = iter(())  # the rest of the round over the files that are not due
        self.lost: dict[Path, str] = {}

    @property
    def waiting(self) -> int:
        """How many files are still being written, or due. Those of folders that cannot be read do not count."""
        return sum(file.due is not None and not self._is_lost(path) for path, file in self._files.items())

    def poll(self) -> list[Arrival]:
        """The files that are due now, the oldest first. One stays due until it is said to be taken or unreadable."""
        images = self._scan()
        for path in set(self._files).difference(images):
            if not self._is_lost(path):
                del self._files[path]
        rechecked = set(itertools.islice(self._recheck, RECHECKED))
        if len(rechecked) < RECHECKED:
            self._recheck = iter([path for path, file in self._files.items() if file.due is None])
            rechecked.update(itertools.islice(self._recheck, RECHECKED - len(rechecked)))
        now = self._clock()
        due = []
        for path, sidecars in images.items():
            file = self._files.get(path)
            if file is not None and file.due is None and file.sidecars == sidecars and path not in rechecked:
                continue
            signature = _signature(path, sidecars)
            if signature is None:  # gone since, or locked: the next poll will tell
                continue
            if file is None or file.signature != signature:
                again = file is not None and file.taken
                file = _File(sidecars, signature, now, now + self._settings.settle_s, again)
                self._files[path] = file
            if file.due is not None and file.due <= now:
                due.append((file.signature[0][1], path, file.taken))
        return [Arrival(Path(path), again) for _, path, again in sorted(due)]

    def taken(self, arrival: Arrival) -> None:
        """It was dealt with, well or not: not due again unless it changes, also if it changed meanwhile."""
        file = self._files.get(str(arrival.path))
        if file is not None:
            file.taken = True
            if not self._moved_on(file, str(arrival.path)):
                file.due = None

    def unreadable(self, arrival: Arrival) -> bool:
        """It could not be decoded: True when that is final (until it changes), False when it is due again later."""
        file = self._files.get(str(arrival.path))
        if file is None or self._moved_on(file, str(arrival.path)):
            return False
        waited = self._clock() - file.since
        patience_s = self._settings.patience_s
        file.due = file.since + min(max(2 * waited, waited + _FIRST_RETRY_S), patience_s)
        if waited >= patience_s:
            file.due = None
        return file.due is None

    def _moved_on(self, file: _File, path: str) -> bool:
        """Whether the file changed since the poll that found it; then it has to settle anew."""
        signature = _signature(path, file.sidecars)
        if signature is None or signature == file.signature:
            return False
        file.signature, file.since = signature, self._clock()
        file.due = file.since + self._settings.settle_s
        return True

    def _is_lost(self, path: str) -> bool:
        return any(path.startswith(f"{folder}{os.sep}") for folder in self.lost)

    def _scan(self) -> dict[str, tuple[str, ...]]:
        """Images with their sidecars; folders that could not be read go to ``lost``."""
        images: dict[str, tuple[str, ...]] = {}
        self.lost = {}
        folders = [self._root]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(folder) as listing:
                    entries = [(entry.path, entry) for entry in listing]
            except OSError as exc:
                if folder == self._root or not isinstance(exc, FileNotFoundError):  # a deleted sub-folder is no loss
                    self.lost[Path(folder)] = exc.strerror or type(exc).__name__
                continue
            here, others = [], []
            for path, entry in entries:
                if path in self._files or _is_image(entry):
                    here.append(path)
                elif not entry.name.startswith("."):
                    others.append(entry)
            sidecars = _sidecars(others)
            images |= {path: _belonging(path, sidecars) if sidecars else () for path in here}
            if self._settings.recursive:
                folders += [entry.path for entry in others if self._is_folder(entry)]
        return images

    def _is_folder(self, entry: os.DirEntry[str]) -> bool:
        try:
            return entry.is_dir(follow_symlinks=False) and os.path.realpath(entry.path) != self._leave_out
        except OSError:
            return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    try:
        ending = os.path.splitext(entry.name)[1].lower()
        return ending in IMAGE_SUFFIXES and not entry.name.startswith(".") and entry.is_file()
    except OSError:
        return False


def _signature(path: str, sidecars: tuple[str, ...]) -> Signature | None:
    # os.stat, not DirEntry.stat: Windows fills the listing's sizes only when the writer closes the file.
    try:
        states = [os.stat(name) for name in (path, *sidecars)]
    except OSError:
        return None
    return tuple((state.st_size, state.st_mtime_ns) for state in states)


def _sidecars(entries: list[os.DirEntry[str]]) -> Mapping[str, list[str]]:
    """Paths of sidecars by the lower-case name they have in common with their image."""
    sidecars: dict[str, list[str]] = {}
    for entry in entries:
        stem, suffix = os.path.splitext(entry.name.lower())
        if suffix in SIDECAR_SUFFIXES:
            sidecars.setdefault(stem, []).append(entry.path)
    return sidecars


def _belonging(path: str, sidecars: Mapping[str, list[str]]) -> tuple[str, ...]:
    """Of image ``a.tif``: ``a.txt``, ``a.hdr``, and ``a-tif.hdr`` as TESCAN names it."""
    stem, suffix = os.path.splitext(os.path.basename(path).lower())
    return tuple(sorted([*sidecars.get(stem, ()), *sidecars.get(f"{stem}-{suffix[1:]}", ())]))
