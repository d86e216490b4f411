"""``datasets check``: everything that is wrong or odd in a folder dataset, in one report."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from hpddrnet_trt.core.errors import BadInputFile
from hpddrnet_trt.core.files import atomic_path
from hpddrnet_trt.core.manifest import IGNORE_INDEX, ClassInfo, default_palette
from hpddrnet_trt.core.progress import progress_bar
from hpddrnet_trt.core.text import length
from hpddrnet_trt.data.datasets import (
    SPLITS,
    Layout,
    Sample,
    SplitFiles,
    detect_layout,
    infer_classes,
    passed_over,
    read_pair,
    scan_split,
    summarise,
    training_problems,
    unknown_values,
    without_bar,
)
from hpddrnet_trt.data.description import FILE_NAME, DatasetDescription, description_of
from hpddrnet_trt.data.intensity import bit_depth, to_grey8
from hpddrnet_trt.data.labels import MaskColors, overlay, read_mask
from hpddrnet_trt.data.micrograph import read_micrograph

_LISTED = 5  # file names that the text shows of a longer list; the JSON has all


@dataclass
class SplitReport:
    """One split. Paths are strings relative to the dataset; figures are over readable, matching pairs."""

    images: int = 0
    sizes: dict[str, int] = field(default_factory=dict)  # "width x height" -> count
    pixel_types: dict[str, int] = field(default_factory=dict)  # "8-bit" -> count
    grey_mean: float | None = None
    grey_std: float | None = None
    class_fractions: list[float] = field(default_factory=list)
    class_images: list[int] = field(default_factory=list)  # images in which the class occurs
    ignored_fraction: float = 0.0
    images_without_mask: list[str] = field(default_factory=list)
    masks_without_image: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)  # the sentence about each
    mismatched_sizes: list[str] = field(default_factory=list)
    unknown_values: dict[int, list[str]] = field(default_factory=dict)  # label value -> masks
    remarks: list[str] = field(default_factory=list)


@dataclass
class DatasetReport:
    """What :func:`check_dataset` found. ``problems`` stand in the way of training, ``warnings`` do not."""

    root: str
    name: str
    layout: str
    license: str | None
    classes: list[ClassInfo]
    splits: dict[str, SplitReport]
    leaks: list[list[str]]  # identical pictures in different splits
    duplicates: list[list[str]]  # identical pictures within one split
    shared_groups: dict[str, list[str]]  # group -> splits it occurs in
    problems: list[str]
    warnings: list[str]
    contact_sheet: str | None = None

    @property
    def ok(self) -> bool:
        """True when nothing stands in the way of training."""
        return not self.problems

    def to_json(self) -> str:
        """The whole report as JSON; figures that could not be had are null."""
        content: dict[str, Any] = {"ok": self.ok, **asdict(self)}
        content["classes"] = [entry.model_dump() for entry in self.classes]
        return json.dumps(content, indent=1)

    def text(self) -> str:
        """The report for people."""
        lines = [
            f"dataset {self.name} ({self.root}), layout {self.layout}",
            f"classes: {', '.join(entry.name for entry in self.classes) or 'unknown'}"
            f"    license: {self.license or 'not stated'}",
        ]
        for name, split in self.splits.items():
            lines += ["", *_split_lines(name, split, self.classes)]
        for title, entries in (("PROBLEMS", self.problems), ("warnings", self.warnings)):
            if entries:
                lines += ["", f"{title}:", *(f"  - {entry}" for entry in entries)]
        if self.contact_sheet:
            lines += ["", f"contact sheet: {self.contact_sheet}"]
        count = len(self.problems)
        unfit = f"not fit for training: {count} problem{'' if count == 1 else 's'}"
        return "\n".join([*lines, "", "fit for training" if self.ok else unfit])


def check_dataset(
    folder: str | Path,
    contact_sheet: str | Path | None = None,
    *,
    layout: Layout | None = None,
    progress: bool = True,
) -> DatasetReport:
    """Read every file of a dataset and report; optionally draw a contact sheet (PNG).

    Looks at counts, sizes, grey statistics, class fractions, unknown label values, unpaired and
    unreadable files, mismatched sizes, pictures that occur twice (across splits: a leak), and
    groups (specimens) that are spread over splits. Faults of single files become entries of the
    report; only a folder that is no dataset at all raises :class:`BadInputFile`.
    """
    root = Path(folder)
    layout = detect_layout(root, layout)
    description = description_of(root)
    files = {split: scan_split(root, layout, split, description) for split in SPLITS}
    if not any(entry.samples or entry.images_without_mask or entry.masks_without_image for entry in files.values()):
        raise BadInputFile(f"dataset {root} is empty: no image in any of {', '.join(SPLITS)}")
    scan = _Scan(root, description)
    jobs = [(split, sample) for split in SPLITS for sample in files[split].samples]
    for split, sample in progress_bar(jobs, desc="checking", unit="image", show=progress):
        scan.add(split, sample)
    report = scan.report(layout, files)
    if contact_sheet is not None:
        readable = {split: list(scan.labels[split]) for split in SPLITS}
        draw_contact_sheet(contact_sheet, report.name, report.classes, readable)
        report.contact_sheet = str(contact_sheet)
    return report


class _Scan:
    """Gathers what is known of each file, then writes the report."""

    def __init__(self, root: Path, description: DatasetDescription) -> None:
        self.root = root
        self.description = description
        self.splits: dict[str, SplitReport] = defaultdict(SplitReport)
        self.grey_levels: dict[str, npt.NDArray[np.int64]] = defaultdict(lambda: np.zeros(256, np.int64))
        self.labels: dict[str, dict[Sample, npt.NDArray[np.int64]]] = defaultdict(dict)
        self.same_pixels: dict[str, list[tuple[str, str]]] = defaultdict(list)  # hash -> (split, file)
        self.pixel_sizes: set[float | None] = set()
        self.groups: dict[str, set[str]] = defaultdict(set)
        self.colors = MaskColors()

    def add(self, split: str, sample: Sample) -> None:
        """Read one sample and note everything about it."""
        report = self.splits[split]
        if sample.group is not None:
            self.groups[sample.group].add(split)
        try:
            micrograph = read_micrograph(sample.image)
            mask = without_bar(read_mask(sample.mask, colors=self.colors), micrograph)
        except BadInputFile as exc:
            report.unreadable.append(str(exc))
            return
        pixels = micrograph.pixels
        self.pixel_sizes.add(micrograph.pixel_size_m)
        report.remarks += [f"{self._name(sample.image)}: {remark}" for remark in micrograph.remarks]
        header = f"{pixels.dtype} {pixels.shape} ".encode()
        digest = hashlib.sha256(header + pixels.tobytes()).hexdigest()
        self.same_pixels[digest].append((split, self._name(sample.image)))
        size, kind = f"{pixels.shape[1]} x {pixels.shape[0]}", _kind(pixels)
        report.sizes[size] = report.sizes.get(size, 0) + 1
        report.pixel_types[kind] = report.pixel_types.get(kind, 0) + 1
        if mask.shape != pixels.shape:
            report.mismatched_sizes.append(
                f"{self._name(sample.image)} is {pixels.shape[1]} x {pixels.shape[0]}, "
                f"{self._name(sample.mask)} is {mask.shape[1]} x {mask.shape[0]}"
            )
            return
        grey = to_grey8(pixels)
        report.remarks += [f"{self._name(sample.image)}: {remark}" for remark in grey.remarks]
        self.grey_levels[split] += np.bincount(grey.pixels.ravel(), minlength=256)
        self.labels[split][sample] = np.bincount(mask.ravel(), minlength=256)

    def report(self, layout: Layout, files: dict[str, SplitFiles]) -> DatasetReport:
        """Put the findings together."""
        problems: list[str] = []
        warnings: list[str] = []
        classes = self._class_table(problems, warnings)
        for split, entry in files.items():
            if entry.samples or entry.images_without_mask or entry.masks_without_image:
                self._finish_split(split, entry, classes)
        splits = {name: self.splits[name] for name in SPLITS if name in self.splits}
        same = list(self.same_pixels.values())
        leaks = [[name for _, name in group] for group in same if len({split for split, _ in group}) > 1]
        duplicates = [
            [name for _, name in group] for group in same if len(group) > 1 and len({split for split, _ in group}) == 1
        ]
        shared = {group: sorted(where, key=SPLITS.index) for group, where in self.groups.items() if len(where) > 1}
        for name, split_report in splits.items():
            problems += _split_problems(name, split_report)
            warnings += _split_warnings(name, split_report, classes)
        problems += [f"the same picture is in different splits (a leak): {_join(group)}" for group in leaks]
        read = {name: entry for name, entry in splits.items() if entry.images}
        labels = {name: (entry.class_fractions, entry.ignored_fraction) for name, entry in read.items()}
        problems += training_problems(classes, labels)
        warnings += [f"the same picture occurs twice: {_join(group)}" for group in duplicates]
        warnings += [
            f"images of group {group!r} (one specimen or article) occur in {', '.join(where)}: "
            "scores there may be too good"
            for group, where in sorted(shared.items())
        ]
        kinds = sorted({kind for split_report in splits.values() for kind in split_report.pixel_types})
        if len(kinds) > 1:
            warnings.append(f"pictures of different depth are mixed ({', '.join(kinds)}); see the remarks of each")
        if len(self.pixel_sizes) > 1:
            known = [length(size) for size in sorted(size for size in self.pixel_sizes if size is not None)]
            unknown = ", unknown of others" if None in self.pixel_sizes else ""
            warnings.append(f"pixels of different size are mixed ({', '.join(known)}{unknown}); see docs/training.md")
        if "test" not in splits:
            warnings.append("there is no test split")
        if others := passed_over(self.root, layout):
            warnings.append(others)
        if self.description.license is None:
            warnings.append(f"no license is stated; write one into {FILE_NAME}")
        return DatasetReport(
            root=str(self.root),
            name=self.description.name or self.root.resolve().name,
            layout=layout,
            license=self.description.license,
            classes=classes,
            splits=splits,
            leaks=leaks,
            duplicates=duplicates,
            shared_groups=dict(sorted(shared.items())),
            problems=problems,
            warnings=warnings,
        )

    def _class_table(self, problems: list[str], warnings: list[str]) -> list[ClassInfo]:
        listed = self.description.class_table()
        if listed is not None:
            return listed
        total = self._label_counts(*self.labels)
        try:
            table, remark = infer_classes(total, self.root)
        except BadInputFile as exc:
            problems.append(str(exc))
            # For the figures only: one nameless class for every value that occurs.
            count = max((int(value) + 1 for value in np.flatnonzero(total[:IGNORE_INDEX])), default=0)
            colors = default_palette(count)
            return [ClassInfo(name=f"value {value}", color=colors[value]) for value in range(count)]
        warnings.append(remark)
        return table

    def _label_counts(self, *splits: str) -> npt.NDArray[np.int64]:
        total = np.zeros(256, dtype=np.int64)
        for split in splits:
            for counts in self.labels[split].values():
                total += counts
        return total

    def _finish_split(self, split: str, files: SplitFiles, classes: list[ClassInfo]) -> None:
        report = self.splits[split]
        report.images = len(files.samples) + len(files.images_without_mask)
        report.images_without_mask = [self._name(path) for path in files.images_without_mask]
        report.masks_without_image = [self._name(path) for path in files.masks_without_image]
        histograms = self.labels[split]
        for sample, counts in histograms.items():
            for value in unknown_values(counts, len(classes)):
                report.unknown_values.setdefault(value, []).append(self._name(sample.mask))
        statistics = summarise(len(histograms), self.grey_levels[split], self._label_counts(split), len(classes))
        report.grey_mean = None if math.isnan(statistics.grey_mean) else round(statistics.grey_mean, 3)
        report.grey_std = None if math.isnan(statistics.grey_std) else round(statistics.grey_std, 3)
        report.class_fractions = [round(share, 6) for share in statistics.class_fractions]
        report.ignored_fraction = round(statistics.ignored_fraction, 6)
        report.class_images = [
            sum(1 for counts in histograms.values() if counts[index]) for index in range(len(classes))
        ]

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def _split_problems(name: str, report: SplitReport) -> Iterator[str]:
    yield from (
        f"{name}: {title}: {_join(entries)}"
        for title, entries in (
            ("images without a mask", report.images_without_mask),
            ("masks without an image", report.masks_without_image),
            ("image and mask differ in size", report.mismatched_sizes),
        )
        if entries
    )
    yield from (f"{name}: {sentence}" for sentence in report.unreadable)
    for value, masks in sorted(report.unknown_values.items()):
        yield f"{name}: label value {value} is neither a class nor {IGNORE_INDEX} (ignore), in {_join(masks)}"


def _kind(pixels: npt.NDArray[Any]) -> str:
    depth = bit_depth(pixels)
    return "float" if depth is None else f"{depth}-bit"


def _split_warnings(name: str, report: SplitReport, classes: list[ClassInfo]) -> Iterator[str]:
    if report.remarks:
        yield f"{name}: {_join(report.remarks)}"
    absent = [entry.name for entry, count in zip(classes, report.class_images, strict=True) if not count]
    if absent and report.images:
        yield f"{name}: no pixel of {', '.join(absent)}"


def _split_lines(name: str, report: SplitReport, classes: list[ClassInfo]) -> Iterator[str]:
    sizes = ", ".join(f"{count} of {size}" for size, count in sorted(report.sizes.items()))
    types = ", ".join(f"{count} {kind}" for kind, count in sorted(report.pixel_types.items()))
    yield f"{name}: {report.images} images ({sizes or 'none readable'} pixels; {types or '-'})"
    if report.grey_mean is not None and report.grey_std is not None:
        yield f"  grey (0 to 255): mean {report.grey_mean:.1f}, standard deviation {report.grey_std:.1f}"
    width = max((len(entry.name) for entry in classes), default=0)
    for entry, share, images in zip(classes, report.class_fractions, report.class_images, strict=True):
        yield f"  {entry.name:<{width}}  {100 * share:7.3f} %  in {images} images"
    if report.ignored_fraction:
        yield f"  {'(ignored)':<{width}}  {100 * report.ignored_fraction:7.3f} %  of all pixels"


def _join(entries: list[str]) -> str:
    more = f" and {len(entries) - _LISTED} more" if len(entries) > _LISTED else ""
    return ", ".join(entries[:_LISTED]) + more



_TILE = 240  # edge of the square a picture is fitted into, pixels
_GAP = 12
_CAPTION = 20
_PAIRS_PER_ROW = 3
_PER_SPLIT = 9
_INK, _PAPER, _FAINT = (20, 20, 20), (250, 250, 250), (110, 110, 110)
_ALPHA = 0.45


def draw_contact_sheet(
    target: str | Path,
    title: str,
    classes: Sequence[ClassInfo],
    splits: Mapping[str, Sequence[Sample]],
) -> None:
    """Write a PNG with up to nine evenly chosen samples of each split: picture, overlay, name.

    Label values outside ``classes`` are magenta, ignored pixels (255) stay grey. Samples must be
    readable and of matching size.
    """
    chosen = {
        name: [samples[round(place)] for place in np.linspace(0, len(samples) - 1, min(len(samples), _PER_SPLIT))]
        for name, samples in splits.items() if samples
    }  # fmt: skip
    width = _GAP + _PAIRS_PER_ROW * (2 * _TILE + 2 * _GAP)
    heading, text, small = (ImageFont.load_default(size) for size in (22, 16, 12))
    legend_rows = _legend_layout(classes, text, width)
    top = 44 + 26 * len(legend_rows)
    rows = sum(-(-len(samples) // _PAIRS_PER_ROW) for samples in chosen.values())
    height = top + len(chosen) * 34 + rows * (_TILE + _CAPTION + _GAP) + _GAP
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, 10), title, fill=_INK, font=heading)
    for row, entries in enumerate(legend_rows):
        for x, entry in entries:
            y = 44 + 26 * row
            pen.rectangle((x, y, x + 18, y + 18), fill=entry.color, outline=_INK)
            pen.text((x + 26, y - 1), entry.name, fill=_INK, font=text)
    y = top
    for name, samples in chosen.items():
        total = len(splits[name])
        shown = f"{total} images" if len(samples) == total else f"{len(samples)} of {total} images"
        pen.text((_GAP, y + 6), f"{name}: {shown}", fill=_INK, font=text)
        y += 34
        for place, sample in enumerate(samples):
            column = place % _PAIRS_PER_ROW
            if place and column == 0:
                y += _TILE + _CAPTION + _GAP
            _draw_pair(sheet, pen, (_GAP + column * (2 * _TILE + 2 * _GAP), y), sample, classes, small)
        y += _TILE + _CAPTION + _GAP
    with atomic_path(target) as temporary:
        sheet.save(temporary, format="PNG")


def _draw_pair(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    sample: Sample,
    classes: Sequence[ClassInfo],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    micrograph, mask = read_pair(sample)
    grey = micrograph.pixels
    drawn = overlay(grey, mask, [entry.color for entry in classes], alpha=_ALPHA)
    x, y = corner
    sheet.paste(Image.fromarray(_fit(np.stack([grey] * 3, axis=2))), (x, y))
    sheet.paste(Image.fromarray(_fit(drawn)), (x + _TILE + 2, y))
    size = f"  {grey.shape[1]} x {grey.shape[0]}"
    space = 2 * _TILE + 2 - pen.textlength(size, font=font)
    name = _shorten(sample.name, space, pen, font)
    pen.text((x, y + _TILE + 3), name, fill=_INK, font=font)
    pen.text((x + pen.textlength(name, font=font), y + _TILE + 3), size, fill=_FAINT, font=font)


def _fit(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Scale to fit the tile; large pictures are averaged, so that thin features stay visible."""
    height, width = picture.shape[:2]
    scale = _TILE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    return np.asarray(cv2.resize(picture, size, interpolation=way), dtype=np.uint8)


def _legend_layout(
    classes: Sequence[ClassInfo], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[list[tuple[int, ClassInfo]]]:
    rows: list[list[tuple[int, ClassInfo]]] = [[]]
    x = _GAP
    for entry in classes:
        needed = 26 + round(font.getlength(entry.name)) + 24
        if rows[-1] and x + needed > width:
            rows.append([])
            x = _GAP
        rows[-1].append((x, entry))
        x += needed
    return rows


def _shorten(
    text: str, space: float, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> str:
    if pen.textlength(text, font=font) <= space:
        return text
    while text and pen.textlength(text + "...", font=font) > space:
        text = text[:-1]
    return text + "..."
