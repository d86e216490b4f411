"""Segment files and folders of micrographs: what ``hpddrnet-trt segment`` does."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hpddrnet_trt.data.datasets import image_files
from hpddrnet_trt.data.micrograph import read_micrograph, to_grey8
from hpddrnet_trt.errors import UsageError, UserError
from hpddrnet_trt.segmentation import Segmentation
from hpddrnet_trt.segmenter import Segmenter

LOG = logging.getLogger(__name__)
JOURNAL = "segmentations.jsonl"
OVERLAYS = "overlays"
SUFFIXES = (".png", ".tif", ".tiff")


@dataclass
class SegmentSummary:
    """What became of each input: label files written, inputs skipped, inputs that failed and why."""

    written: list[Path] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)
    failed: list[tuple[Path, str]] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return 1 if self.failed else 0

    def __str__(self) -> str:
        lines = [f"{len(self.written)} segmented, {len(self.skipped)} already done, {len(self.failed)} failed"]
        lines += [f"  {source}: {reason}" for source, reason in self.failed]
        return "\n".join(lines)


def segment_paths(
    segmenter: Segmenter,
    inputs: str | Path | Sequence[str | Path],
    output_folder: str | Path,
    *,
    overlay: bool = True,
    suffix: str = ".png",
    resume: bool = True,
    progress: bool = True,
) -> SegmentSummary:
    """Segment micrographs and write label images.

    ``inputs``: files, folders or globs. Written to ``output_folder``: ``NAME.png`` (palette image
    of class indices, or ``suffix`` ``.tif``), ``overlays/NAME.png``, and one line of
    ``segmentations.jsonl`` per image with source, model, area fractions, grey window and pixel size.
    Inputs that share a name keep their ending or folder in the output's name.

    ``resume``: leave images whose labels were already written by the same model in the same mode
    and that did not change since. A bad image does not stop the others: it is reported in the
    summary. Raises :class:`UsageError` when nothing can be started (no images, an output that would
    overwrite an input or another image's labels).
    """
    if suffix not in SUFFIXES:
        raise UsageError(f"labels are written as {', '.join(SUFFIXES)}, not {suffix!r}")
    folder = Path(output_folder)
    sources = _collect([inputs] if isinstance(inputs, (str, Path)) else inputs)
    targets = {source: folder / f"{name}{suffix}" for source, name in _output_names(sources).items()}
    journal = _Journal(folder / JOURNAL, segmenter)
    _refuse_overwriting(sources, targets, folder, journal)
    summary = SegmentSummary()
    for source in tqdm(sources, desc="segment", unit="image", disable=not progress):
        target = targets[source]
        drawing = folder / OVERLAYS / f"{target.stem}.png" if overlay else None
        if resume and journal.is_done(source, target, drawing):
            summary.skipped.append(source)
            continue
        try:
            journal.add(source, target, _segment_file(segmenter, source, target, drawing))
        except UserError as exc:
            LOG.warning("%s", exc)
            summary.failed.append((source, str(exc)))
        else:
            summary.written.append(target)
    return summary


def _segment_file(segmenter: Segmenter, source: Path, target: Path, drawing: Path | None) -> Segmentation:
    micrograph = read_micrograph(source)
    result = segmenter.segment(micrograph)
    if drawing is not None:
        result.save_overlay(drawing, to_grey8(micrograph.pixels, result.window)[0])
    result.save_labels(target)
    return result


def _collect(inputs: Iterable[str | Path]) -> list[Path]:
    """All micrographs of all inputs, each once, in order."""
    return list(dict.fromkeys(path.resolve() for entry in inputs for path in image_files(entry)))


def _output_names(sources: Sequence[Path]) -> dict[Path, str]:
    """An output name for each input: its stem; where inputs share one, file name, then folder and file name, then
    the path below their common folder. Independent of the order, so that a resumed run finds its own files."""
    names: dict[Path, str] = {}
    waiting = list(sources)
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
    return path.stem


def _file_name(path: Path) -> str:
    return path.name


def _folder_and_name(path: Path) -> str:
    return f"{path.parent.name}_{path.name}"


def _refuse_overwriting(sources: Sequence[Path], targets: dict[Path, Path], folder: Path, journal: _Journal) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output {folder} is a file; give a folder")
    if folder.resolve() in {source.parent for source in sources}:
        raise UsageError(f"{folder} holds the images to segment; choose another output folder")
    for source in sources:
        owner = journal.source_of(targets[source])
        if owner is not None and owner != str(source):
            raise UsageError(
                f"{targets[source]} holds the labels of {owner}; choose another output folder for {source}"
            )


class _Journal:
    """One JSON line per finished image, appended; a line torn by a crash is ignored."""

    def __init__(self, path: Path, segmenter: Segmenter) -> None:
        self._path = path
        self._job = {
            "model": segmenter.manifest.name,
            "checkpoint_sha256": segmenter.manifest.checkpoint_sha256,
            "precision": segmenter.manifest.precision,
            "mode": segmenter.mode,
            "resize": None if segmenter.resize is None else list(segmenter.resize),
            "fixed_window": None if segmenter.window is None else list(segmenter.window),
        }
        self._entries: dict[str, dict[str, Any]] = {}
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        self._torn = bool(text) and not text.endswith("\n")
        for entry in map(_parsed, text.splitlines()):
            if "labels" in entry:
                self._entries[str(entry["labels"])] = entry

    def source_of(self, target: Path) -> str | None:
        """The input whose labels ``target`` holds, as far as recorded and still there."""
        entry = self._entries.get(target.name)
        return str(entry.get("source")) if entry and target.is_file() else None

    def is_done(self, source: Path, target: Path, drawing: Path | None) -> bool:
        entry = self._entries.get(target.name)
        if entry is None or any(entry.get(key) != value for key, value in self._job.items()):
            return False
        outputs = [path for path in (target, drawing) if path is not None]
        return entry.get("source_mtime_ns") == _mtime(source) and all(path.is_file() for path in outputs)

    def add(self, source: Path, target: Path, result: Segmentation) -> None:
        entry = {
            "labels": target.name,
            "source": str(source),
            "source_mtime_ns": _mtime(source),
            **self._job,
            "fractions": result.fractions(),
            "window": list(result.window),
            "pixel_size_m": result.pixel_size_m,
        }
        self._entries[target.name] = entry
        try:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(("\n" if self._torn else "") + json.dumps(entry) + "\n")
            self._torn = False
        except OSError as exc:
            raise UserError(f"cannot write {self._path}: {exc.strerror}; free some space and run again") from exc


def _parsed(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def _mtime(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
