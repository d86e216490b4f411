"""``dataset import``: pictures with labels, as whatever program left them, become a dataset folder.

:data:`FORMATS` is the list of what is read. Nothing of the source is changed; the folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError
from hpddrnet_trt.core.files import atomic_folder, printable, write_text
from hpddrnet_trt.core.progress import progress_bar
from hpddrnet_trt.core.quiet import quiet
from hpddrnet_trt.data.annotation_formats import (
    holds_cvat,
    holds_json,
    holds_rois,
    read_coco,
    read_cvat,
    read_labelme,
    read_qupath,
    read_rois,
)
from hpddrnet_trt.data.annotations import FAULTS, UNLABELED, Annotated, Found, Labels, Tree, reason, split_of
from hpddrnet_trt.data.check import draw_contact_sheet
from hpddrnet_trt.data.class_names import ClassTable, Rule, class_table
from hpddrnet_trt.data.convert import as_folder, require_new
from hpddrnet_trt.data.converters import plain_name
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.data.description import FILE_NAME, DatasetDescription, DescribedClass
from hpddrnet_trt.data.intensity import to_grey8
from hpddrnet_trt.data.labels import write_pair
from hpddrnet_trt.data.mask_pairs import read_masks
from hpddrnet_trt.data.micrograph import Micrograph, read_micrograph
from hpddrnet_trt.data.specimens import specimens, split_pictures

CONTACT_SHEET = "contact-sheet.png"


@dataclass(frozen=True)
class ImportSettings:
    """How a source is understood where it does not tell itself.

    ``rules``: names of classes (:class:`~hpddrnet_trt.data.class_names.Rule`). ``specimen``: see
    :func:`~hpddrnet_trt.data.specimens.specimens`. ``images``: where the pictures lie if not in the source.
    ``mask_mark``: what the names of masks end in. ``nearest``: colours and values without a name become the nearest
    class, and JPEG masks are taken. ``keep_empty``: pictures on which nothing is drawn are all background.
    """

    rules: tuple[Rule, ...] = ()
    specimen: str | None = None
    images: Path | None = None
    mask_mark: str = ""
    nearest: bool = False
    keep_empty: bool = False


class Format(NamedTuple):
    """``recognise``: whether a source is of this kind; ``read``: what it holds."""

    description: str
    recognise: Callable[[Tree], bool]
    read: Callable[[Tree, ImportSettings], Found]


def _masks(tree: Tree, settings: ImportSettings) -> Found:
    by_color = any(rule.what.startswith("#") for rule in settings.rules)
    return read_masks(tree, mark=settings.mask_mark, by_color=by_color, lossy=settings.nearest)


FORMATS: dict[str, Format] = {
    "labelme": Format("labelme JSON", partial(holds_json, kind="labelme"), lambda tree, _: read_labelme(tree)),
    "cvat": Format("CVAT for images 1.1", holds_cvat, lambda tree, _: read_cvat(tree)),
    "coco": Format("COCO JSON", partial(holds_json, kind="coco"), lambda tree, _: read_coco(tree)),
    "qupath": Format("QuPath GeoJSON", partial(holds_json, kind="qupath"), lambda tree, _: read_qupath(tree)),
    "imagej": Format("ImageJ ROIs", holds_rois, lambda tree, _: read_rois(tree)),
    "masks": Format("pictures with masks", lambda tree: False, _masks),  # what is left
}


@dataclass
class ImportReport:
    """What became of every file.

    ``split``: how it was found. ``left_out``: files with the reason; ``without_labels``: pictures for which there are
    none; ``notes``: what the classes are, and what had to be assumed.
    """

    format: str
    split: str
    imported: int
    left_out: dict[str, str] = field(default_factory=dict)
    without_labels: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The report for people."""
        lines = [f"read as: {FORMATS[self.format].description}", *self.notes, f"split: {self.split}"]
        lines += [f"left out: {name}: {reason}" for name, reason in self.left_out.items()]
        lines += [f"without labels: {name}" for name in self.without_labels]
        counts = f"{self.imported} imported, {len(self.left_out)} left out, {len(self.without_labels)} without labels"
        return printable("\n".join([*lines, counts]))


def import_folder(
    source: str | Path,
    folder: str | Path,
    *,
    form: str | None = None,
    settings: ImportSettings | None = None,
    confirm: Callable[[str], bool] = lambda question: False,
) -> tuple[FolderDataset, ImportReport]:
    """Write the pictures and labels of ``source``, a folder or archive, as a dataset to ``folder``, new or empty.

    ``form``: a name of :data:`FORMATS`, recognised when left out. ``confirm``: asked, with what was found, whether
    colours and values without names are to be classes.

    Raises :class:`UsageError` when ``folder`` is there already, when the format is not told, or for classes that are
    not, and :class:`BadInputFile` when no picture has labels.
    """
    source, folder, settings = Path(source), Path(folder), settings or ImportSettings()
    require_new(folder)
    if form is not None and form not in FORMATS:
        raise UsageError(f"unknown format {form!r}; choose one of {', '.join(FORMATS)}")
    for place in (source, settings.images):
        if place is not None and not place.exists():
            raise BadInputFile(f"{place} does not exist; give a folder or archive of pictures with their labels")
    if source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"{folder} lies within {source}, which is not changed; choose a folder elsewhere")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with as_folder(source, folder) as root, tempfile.TemporaryDirectory() as scratch:
        tree = Tree(root if source.is_dir() else root / source.stem, Path(scratch), settings.images)
        form = form or _recognised(tree, source)
        found = FORMATS[form].read(tree, settings)
        survey = _Survey(tree, found, settings.keep_empty)
        if not survey.kept:
            raise BadInputFile(f"{source} holds no picture with labels, read as {form}{_first(survey, found)}")
        table = class_table(survey.counts, found, settings.rules, nearest=settings.nearest, confirm=confirm)
        groups, how = specimens(list(survey.kept), settings.specimen)
        splits, how = _splits(survey.kept, groups, how)
        report = ImportReport(
            form, how, len(survey.kept), found.left_out, survey.without_labels,
            [*found.notes, *survey.notes(), *table.notes],
        )  # fmt: skip
        with atomic_folder(folder) as temporary:
            _write(temporary, source, survey.kept, splits, groups, table, report)
    return FolderDataset.open(folder), report


def _recognised(tree: Tree, source: Path) -> str:
    kinds = [name for name, form in FORMATS.items() if form.recognise(tree)]
    if len(kinds) > 1:
        raise UsageError(f"{source} holds {' and '.join(kinds)}; say with --format which of them is meant")
    return kinds[0] if kinds else "masks"


def _first(survey: _Survey, found: Found) -> str:
    reasons = [f"{name}: {reason}" for name, reason in found.left_out.items()]
    reasons += [f"{name} has no labels" for name in survey.without_labels]
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    hint = "" if found.pictures else "; masks are told by folder (masks/) or name (NAME_mask.png, --mask-mark)"
    return f" ({reasons[0]}{more}){hint if found.values else ''}" if reasons else "; give pictures with their masks"


class _Survey:
    """A first look at every picture and its labels: which are taken (by their path), and what the labels are called."""

    def __init__(self, tree: Tree, found: Found, keep_empty: bool) -> None:
        self.found = found
        self.kept: dict[str, Annotated] = {}
        self.counts: Counter[str] = Counter()  # pixels of each label
        self.contested = 0
        self.without_labels: list[str] = []
        seen: dict[str, str] = {}
        for entry in progress_bar(found.pictures, desc="looking through", unit="image"):
            name = tree.name(entry.picture)
            try:
                micrograph, labels = read_annotated(entry)
                digest = hashlib.sha256(str(micrograph.pixels.shape).encode() + micrograph.pixels.tobytes()).hexdigest()
                if digest in seen:
                    raise BadInputFile(f"the same picture is imported with {seen[digest]}")
                if name in self.kept:
                    raise BadInputFile(f"another picture is imported under the same path, {self.kept[name].picture}")
            except (UserError, OSError, MemoryError, *FAULTS) as exc:
                found.left_out[entry.source] = reason(exc)
                continue
            counts = np.bincount(labels.values.ravel(), minlength=len(labels.names)).tolist()
            present = {label: count for label, count in zip(labels.names, counts, strict=True) if count}
            if not found.values and set(present) == {UNLABELED} and not keep_empty:
                self.without_labels.append(f"{name} (nothing is drawn on it; --keep-empty takes it as background)")
                continue
            seen[digest] = entry.source
            self.counts.update(present)
            self.contested += labels.contested
            self.kept[name] = entry
        self.without_labels += found.unmentioned(tree)

    def notes(self) -> Iterator[str]:
        """What was left of the shapes."""
        if self.found.passed_over:
            each = ", ".join(f"{count} x {kind}" for kind, count in self.found.passed_over.items())
            yield f"not drawn, as no area of a class: {each}"
        if self.contested:
            yield f"{self.contested} pixels are covered by shapes of two classes: the upper one counts"


def read_annotated(entry: Annotated) -> tuple[Micrograph, Labels]:
    """A picture without its information bar, and its labels likewise; :class:`BadInputFile` if their sizes differ."""
    micrograph = read_micrograph(entry.picture)
    (rows, width), bar = micrograph.pixels.shape, micrograph.info_bar_rows
    height = rows if bar is None else bar[1]
    if entry.size not in (None, (width, rows), (width, height)):
        raise BadInputFile(
            f"it was drawn on a picture of {entry.size[0]} x {entry.size[1]} pixels, this one has {width} x {height}; "
            "give the picture that was annotated"
        )
    labels = entry.labels(height if entry.size is None else entry.size[1], width)
    if labels.values.shape not in ((rows, width), (height, width)):
        mask_height, mask_width = labels.values.shape
        raise BadInputFile(f"the mask has {mask_width} x {mask_height} pixels, the picture {width} x {height}")
    return micrograph, Labels(labels.values[:rows], labels.names, labels.contested)


def _splits(entries: Mapping[str, Annotated], groups: Mapping[str, str], how: str) -> tuple[dict[str, str], str]:
    """The split that the source has, where it gives every picture one and some to validate on; else a new one."""
    found = {name: entry.split or split_of(*name.split("/")[:-1]) for name, entry in entries.items()}
    given = {name: split for name, split in found.items() if split is not None}
    if len(given) == len(entries) and {"train", "val"} <= set(given.values()):
        return given, "as the source has it"
    if given:
        how += "; the source's own split is not used, as it is not of all pictures into train and val"
    splits = split_pictures({name: groups.get(name, name) for name in entries})
    counts = Counter(splits.values())
    return splits, f"{how}; " + ", ".join(f"{counts[split]} {split}" for split in ("train", "val", "test"))


def _write(
    root: Path,
    source: Path,
    entries: Mapping[str, Annotated],
    splits: Mapping[str, str],
    groups: Mapping[str, str],
    table: ClassTable,
    report: ImportReport,
) -> None:
    palette = [entry.color for entry in table.classes]
    files, sizes = [], set()
    steps = progress_bar(list(entries.items()), desc="importing", unit="image")
    for (path, entry), name in zip(steps, _names(entries), strict=True):
        with quiet("hpddrnet_trt.data.micrograph"):  # its remarks have been made
            micrograph, labels = read_annotated(entry)
        pixels = micrograph.pixels
        indices = np.array([table.indices.get(label, 0) for label in labels.names], np.uint8)
        image = pixels if pixels.dtype in (np.uint8, np.uint16) else to_grey8(pixels).pixels
        write_pair(root, splits[path], name, image, indices[labels.values], palette)
        file = {"split": splits[path], "name": name, "group": groups.get(path), "source": printable(entry.source)}
        files.append({**file, "pixel_size_m": micrograph.pixel_size_m})
        sizes.add(micrograph.pixel_size_m)
    described = DatasetDescription(
        name=plain_name(source.stem) or None,
        classes=[
            DescribedClass(name=each.name, index=place, color=each.color) for place, each in enumerate(table.classes)
        ],
        pixel_size_m=sizes.pop() if len(sizes) == 1 else None,
    )
    content = described.model_dump(exclude_none=True, exclude={"files"}) | {
        "files": [{key: value for key, value in file.items() if value is not None} for file in files],
        "imported": {"format": report.format, "split": report.split, "notes": report.notes,
                     "left_out": report.left_out, "without_labels": report.without_labels},
    }  # fmt: skip
    write_text(root / FILE_NAME, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    dataset = FolderDataset.open(root)
    draw_contact_sheet(root / CONTACT_SHEET, dataset.name, dataset.classes, dataset.samples)


def _names(paths: Sequence[str] | Mapping[str, Annotated]) -> list[str]:
    """A name in the dataset for each picture: its own, with its folders where two have one name, numbered at last."""
    stems = [path.rsplit("/", 1)[-1].rsplit(".", 1)[0] for path in paths]
    own = [plain_name(stem) for stem in stems]
    often = Counter(name.casefold() for name in own)
    names: list[str] = []
    taken: set[str] = set()
    for path, name in zip(paths, own, strict=True):
        if often[name.casefold()] > 1 or not name:
            name = plain_name(path.rsplit(".", 1)[0].replace("/", "-")) or "picture"
        number, unique = 1, name
        while unique.casefold() in taken:
            number += 1
            unique = f"{name}-{number}"
        taken.add(unique.casefold())
        names.append(unique)
    return names
