"""What has been done to which file: one JSON line for each picture that is segmented."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.data.stack import Stack

JOURNAL = "segmentations.jsonl"


class Journal:
    """One JSON line per finished image, appended; of several lines with one ``name`` the last counts.

    ``job``: what results depend on beside the image (model, mode, window ...). A result counts as done when it was
    made by the same job from the same, unchanged file, and is still there. A last line torn by a crash is ignored, and
    goes before the next is written.
    """

    def __init__(self, path: Path, job: Mapping[str, Any]) -> None:
        self._path = path
        self._job = json.loads(json.dumps(job))  # as it is read back
        self._entries: dict[str, dict[str, Any]] = {}
        self._names: dict[str, str] = {}  # by source
        self._stacks: dict[str, str] = {}  # source by name, of stacks of which slices are done
        content = path.read_bytes() if path.is_file() else b""
        self._tail = content[content.rfind(b"\n") + 1 :]  # what stands behind the last whole line
        for entry in map(_parsed, content.decode("utf-8", "replace").splitlines()):
            if isinstance(entry.get("name"), str) and isinstance(entry.get("outputs"), dict):
                self._keep(entry)

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        """The last line of ``name``; KeyError when there is none."""
        return self._entries[name]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """The lines of images of which something is still there, in the order of their first line."""
        return (entry for name, entry in self._entries.items() if self.source_of(name) is not None)

    def source_of(self, name: str) -> str | None:
        """The image or stack that the files called ``name`` belong to, as far as recorded and still there."""
        if name in self._stacks and (self._path.parent / name).is_dir():
            return self._stacks[name]
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
        if task.slice is not None:
            stack = {"name": task.slice.name, "source": str(task.slice.stack.source), "slice": task.slice.number + 1}
            about |= {"stack": stack}
        line = {**about, **entry}
        self._keep(line)
        try:
            whole = bool(_parsed(self._tail.decode("utf-8", "replace")))  # but for its end
            if self._tail and not whole:
                os.truncate(self._path, self._path.stat().st_size - len(self._tail))
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(("\n" if whole else "") + json.dumps(line) + "\n")
            self._tail = b""
        except OSError as exc:
            raise UserError(f"cannot write {self._path}: {exc.strerror}; free some space and run again") from exc

    def _keep(self, entry: dict[str, Any]) -> None:
        self._entries[entry["name"]] = entry
        stack = entry.get("stack")
        if isinstance(stack, dict):
            self._stacks[str(stack.get("name"))] = str(stack.get("source"))
            self._names[str(stack.get("source"))] = str(stack.get("name"))
        else:
            self._names[str(entry.get("source"))] = entry["name"]


def modified(path: Path) -> int | None:
    """Time of the last change in nanoseconds, None for a file that is gone."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None


@dataclass(frozen=True)
class SliceOf:
    """Which slice of a stack, counted from 0. ``name``: of the stack's results."""

    stack: Stack
    name: str
    number: int

    @property
    def own_name(self) -> str:
        """Of the results of this slice, in the folder that is called like the stack."""
        return self._name(self.number)

    @property
    def names(self) -> list[str]:
        """:attr:`own_name` of all slices."""
        return [self._name(number) for number in range(len(self.stack.slices))]

    def _name(self, number: int) -> str:
        return f"{self.name}/{number + 1:0{max(4, len(str(len(self.stack.slices))))}d}"


@dataclass(frozen=True)
class Task:
    """One image and what of its results there is: ``made``, by kind the file in the folder and the settings that this
    kind depends on in addition (None for most), and the kinds that are ``missing``. ``modified_ns``: of ``source``,
    before it is read: what it becomes later is not done. ``slice``: where the image is one of a stack."""

    source: Path
    name: str
    modified_ns: int | None
    made: Mapping[str, tuple[str, Any]]
    missing: Sequence[str]
    slice: SliceOf | None = None


def _parsed(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}
