"""What has been segmented into a folder, and how: one JSON line an image."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hpddrnet_trt.core.errors import UserError


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

    def made(self, name: str, source: Path) -> dict[str, tuple[str, Any]]:
        """Outputs of ``name`` that this job has made from ``source`` as it is now: by kind the file, and the settings
        that this kind of output depends on in addition (None for most)."""
        entry = self._entries.get(name)
        if entry is None or entry.get("job") != self._job or entry.get("source") != str(source):
            return {}
        if entry.get("source_mtime_ns") != modified(source):
            return {}
        return {
            kind: (str(file), entry.get("settings", {}).get(kind))
            for kind, file in entry["outputs"].items()
            if (self._path.parent / str(file)).exists()
        }

    def add(self, name: str, source: Path, source_mtime_ns: int | None, entry: Mapping[str, Any]) -> None:
        """Append a line; raises :class:`UserError` when the disk does not take it.

        ``source_mtime_ns``: :func:`modified` as it was before ``source`` was read: what it became since is not done.
        """
        line = {"name": name, "source": str(source), "source_mtime_ns": source_mtime_ns, "job": self._job, **entry}
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


def _parsed(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}
