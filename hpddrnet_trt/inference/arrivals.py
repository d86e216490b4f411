"""Which files of a folder are complete: the watched folder's eyes.

Polling with ``os.scandir``, and no library that waits for change notifications: microscopes save to network shares,
where the kernel reports only what this computer itself writes, and a notification would not say either when the
writer is done.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hpddrnet_trt.data.decode import IMAGE_SUFFIXES

SIDECAR_SUFFIXES = (".txt", ".hdr")  # Hitachi and JEOL; TESCAN
RECHECKED = 500  # finished files whose size and time are looked at again, per poll
_FIRST_RETRY_S = 0.5

Signature = tuple[tuple[int, int], ...]  # size and modification time of the image and of its sidecars


@dataclass(frozen=True)
class Arrival:
    """A file that is complete as far as one can see from outside. ``again``: it was taken before and has changed."""

    path: Path
    again: bool


@dataclass(slots=True)
class _File:
    folder: str
    sidecars: tuple[str, ...]
    signature: Signature
    since: float  # when this signature was first seen
    due: float | None  # when it is to be taken; None: not until it changes
    taken: bool = False


class Arrivals:
    """Finds micrographs in ``folder`` that nobody is writing any more.

    A file is due when its size and modification time, and those of its sidecars (same name, ``.txt`` or ``.hdr``),
    have not changed for ``settle_s`` seconds of this computer's clock (a file server's clock may be off). A writer
    that renames a whole file into place needs no such wait: ``settle_s=0``. Whether it can be decoded, the caller
    finds out, and says :meth:`unreadable` if not: it is due again at growing intervals until ``patience_s`` seconds
    have passed without a change. A file that changes after it was taken, or whose sidecar arrives, is due once more.

    Left out: hidden names (they start with ``.``), names with other endings (``x.tif.part``), sub-folders unless
    ``recursive``, links to folders, and everything in ``leave_out`` (our results).

    One poll reads each folder once and asks for size and time only of files that are new or waiting, and of 500
    finished ones in turn: 100,000 finished files cost little more than listing them. Folders that cannot be read are in
    ``lost`` with the reason, and are tried again at each poll; what was found in them stays known.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        settle_s: float = 2.0,
        patience_s: float = 60.0,
        recursive: bool = False,
        leave_out: str | Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = os.path.abspath(folder)
        self._settle_s, self._patience_s, self._recursive, self._clock = settle_s, patience_s, recursive, clock
        self._leave_out = None if leave_out is None else os.path.realpath(leave_out)
        self._files: dict[str, _File] = {}
        self._resting: OrderedDict[str, None] = OrderedDict()  # files that are not due, in the order of rechecking
        self.lost: dict[Path, str] = {}

    @property
    def waiting(self) -> int:
        """How many files are still being written, or due. Those of folders that cannot be read do not count."""
        lost = {str(folder): reason for folder, reason in self.lost.items()}
        return sum(file.due is not None and not _within(file.folder, lost) for file in self._files.values())

    def poll(self) -> list[Arrival]:
        """The files that are due now, the oldest first. One stays due until it is said to be taken or unreadable."""
        found, lost = self._scan()
        self.lost = {Path(folder): reason for folder, reason in lost.items()}
        for path in set(self._files).difference(found):
            if not _within(self._files[path].folder, lost):
                del self._files[path]
                self._resting.pop(path, None)
        rechecked = set(itertools.islice(self._resting, RECHECKED))
        for path in rechecked:
            self._resting.move_to_end(path)
        now = self._clock()
        due = []
        for path, (folder, sidecars) in found.items():
            file = self._files.get(path)
            if file is not None and file.due is None and file.sidecars == sidecars and path not in rechecked:
                continue
            signature = _signature(path, sidecars)
            if signature is None:  # gone since, or locked: the next poll will tell
                continue
            if file is None or file.signature != signature:
                again = file is not None and file.taken
                file = _File(folder, sidecars, signature, now, now + self._settle_s, again)
                self._files[path] = file
                self._resting.pop(path, None)
            if file.due is not None and file.due <= now:
                due.append((file.signature[0][1], path, file.taken))
        return [Arrival(Path(path), again) for _, path, again in sorted(due)]

    def taken(self, arrival: Arrival) -> None:
        """It was dealt with, well or not: not due again unless it changes, also if it changed meanwhile."""
        file = self._files.get(str(arrival.path))
        if file is None:
            return
        file.taken = True
        if not self._moved_on(file, str(arrival.path)):
            self._rest(file, str(arrival.path))

    def unreadable(self, arrival: Arrival) -> bool:
        """It could not be decoded: True when that is final (until it changes), False when it is due again later."""
        file = self._files.get(str(arrival.path))
        if file is None or self._moved_on(file, str(arrival.path)):
            return False
        waited = self._clock() - file.since
        if waited >= self._patience_s:
            self._rest(file, str(arrival.path))
            return True
        file.due = file.since + min(max(2 * waited, waited + _FIRST_RETRY_S), self._patience_s)
        return False

    def _rest(self, file: _File, path: str) -> None:
        file.due = None
        self._resting[path] = None

    def _moved_on(self, file: _File, path: str) -> bool:
        """Whether the file changed since the poll that found it; then it has to settle anew."""
        signature = _signature(path, file.sidecars)
        if signature is None or signature == file.signature:
            return False
        file.signature, file.since = signature, self._clock()
        file.due = file.since + self._settle_s
        return True

    def _scan(self) -> tuple[dict[str, tuple[str, tuple[str, ...]]], dict[str, str]]:
        """Images with their folder and sidecars; folders that could not be read, with the reason."""
        found: dict[str, tuple[str, tuple[str, ...]]] = {}
        lost: dict[str, str] = {}
        folders = [self._root]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(folder) as listing:
                    entries = [(entry.path, entry) for entry in listing]
            except OSError as exc:
                if folder == self._root or not isinstance(exc, FileNotFoundError):  # a deleted sub-folder is no loss
                    lost[folder] = exc.strerror or type(exc).__name__
                continue
            images, others = [], []
            for path, entry in entries:
                if path in self._files or _is_image(entry):
                    images.append(path)
                elif not entry.name.startswith("."):
                    others.append(entry)
            sidecars = _sidecars(others)
            for path in images:
                found[path] = (folder, _belonging(path, sidecars) if sidecars else ())
            if self._recursive:
                folders += [entry.path for entry in others if self._is_folder(entry)]
        return found, lost

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


def _within(folder: str, lost: Mapping[str, str]) -> bool:
    return any(folder == above or folder.startswith(above + os.sep) for above in lost)


def _signature(path: str, sidecars: tuple[str, ...]) -> Signature | None:
    # os.stat, not DirEntry.stat: Windows fills the listing's sizes only when the writer closes the file.
    try:
        states = [os.stat(name) for name in (path, *sidecars)]
    except OSError:
        return None
    return tuple((state.st_size, state.st_mtime_ns) for state in states)


def _sidecars(entries: list[os.DirEntry[str]]) -> Mapping[str, list[str]]:
    """Paths of sidecars by the lower-case name they have in common with their image."""
    found: dict[str, list[str]] = {}
    for entry in entries:
        stem, suffix = _stem_and_suffix(entry.name)
        if suffix in SIDECAR_SUFFIXES:
            found.setdefault(stem, []).append(entry.path)
    return found


def _belonging(path: str, sidecars: Mapping[str, list[str]]) -> tuple[str, ...]:
    """Of image ``a.tif``: ``a.txt``, ``a.hdr``, and ``a-tif.hdr`` as TESCAN names it."""
    stem, suffix = _stem_and_suffix(os.path.basename(path))
    return tuple(sorted([*sidecars.get(stem, ()), *sidecars.get(f"{stem}-{suffix[1:]}", ())]))


def _stem_and_suffix(name: str) -> tuple[str, str]:
    stem, suffix = os.path.splitext(name.lower())
    return stem, suffix
