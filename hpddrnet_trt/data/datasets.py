"""Folder datasets: micrographs with masks, in splits, with the class table of their ``dataset.json``."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import BadInputFile, UsageError
from hpddrnet_trt.core.files import sha256_of
from hpddrnet_trt.core.magnification import PixelSizes
from hpddrnet_trt.core.manifest import IGNORE_INDEX, ClassInfo, default_palette
from hpddrnet_trt.core.progress import progress_bar
from hpddrnet_trt.data.decode import IMAGE_SUFFIXES
from hpddrnet_trt.data.description import FILE_NAME, DatasetDescription, description_of
from hpddrnet_trt.data.intensity import IntensityRange, to_grey8
from hpddrnet_trt.data.labels import MaskColors, read_mask
from hpddrnet_trt.data.micrograph import Micrograph, read_micrograph
from hpddrnet_trt.data.preprocess import at_pixel_size, nearest
from hpddrnet_trt.data.specimens import deal, some, specimens

log = logging.getLogger(__name__)

Layout = Literal["folders", "cityscapes"]
_Item = TypeVar("_Item")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Sample:
    """One micrograph with its mask. ``name`` is unique in its split and knows no file ending."""

    image: Path
    mask: Path
    name: str
    group: str | None = None


@dataclass(frozen=True)
class SplitFiles:
    """One split as found: pairs, and what could not be paired."""

    samples: list[Sample]
    images_without_mask: list[Path] = field(default_factory=list)
    masks_without_image: list[Path] = field(default_factory=list)


# Where each layout keeps images and masks, and what is appended to the name that pairs them.
_LAYOUTS = {
    "folders": (("images/{}", ""), ("masks/{}", "")),
    "cityscapes": (("{}/imgs", "_leftImg8bit"), ("{}/labels", "_gtFine_labelTrainIds")),
}


def detect_layout(root: str | Path, layout: str | None = None) -> Layout:
    """The layout of the dataset in ``root``, or ``layout`` itself when it is one of the two.

    Raises :class:`BadInputFile` when the folder is missing or looks like neither.
    """
    root = Path(root)
    if layout is not None and layout not in _LAYOUTS:
        raise UsageError(f"unknown dataset layout {layout!r}; choose one of {', '.join(_LAYOUTS)}")
    if not root.is_dir():
        raise BadInputFile(f"dataset folder {root} does not exist or is not a folder; check the path")
    for name in _LAYOUTS if layout is None else (layout,):
        if any((root / place.format(split)).is_dir() for split in SPLITS for place, _ in _LAYOUTS[name]):
            return "folders" if name == "folders" else "cityscapes"
    expected = (
        "images/SPLIT + masks/SPLIT, or SPLIT/imgs/*_leftImg8bit.* + SPLIT/labels/*_gtFine_labelTrainIds.png"
        if layout is None
        else " + ".join(place.format("SPLIT") for place, _ in _LAYOUTS[layout])
    )
    raise BadInputFile(
        f"{root} holds no dataset; expected {expected}, SPLIT being one of {', '.join(SPLITS)}; "
        "`hpddrnet-trt dataset import` makes one of other layouts"
    )


def scan_split(root: Path, layout: Layout, split: str, description: DatasetDescription) -> SplitFiles:
    """Pair the files of one split by name, sorted, with the groups that ``description`` names for them.

    A split without folders is empty.

    Raises :class:`BadInputFile` when two images or two masks share a name (``a.png``, ``a.tif``).
    """
    images, masks = (_keyed(root / place.format(split), mark) for place, mark in _LAYOUTS[layout])
    groups = {entry.name: entry.group for entry in description.files if entry.split == split}
    return SplitFiles(
        [Sample(images[key], masks[key], key, groups.get(key)) for key in sorted(images.keys() & masks.keys())],
        [images[key] for key in sorted(images.keys() - masks.keys())],
        [masks[key] for key in sorted(masks.keys() - images.keys())],
    )


def _files_below(folder: Path) -> Iterator[Path]:
    """All files, of linked folders too, each real folder once."""
    entered: set[str] = set()
    for place, names, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:
            names.clear()  # a link back, or two links to one folder
            continue
        entered.add(real)
        yield from (Path(place, name) for name in files)


def _keyed(folder: Path, mark: str) -> dict[str, Path]:
    keyed: dict[str, Path] = {}
    for path in sorted(_files_below(folder)):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or path.suffix.lower() not in IMAGE_SUFFIXES or not path.stem.endswith(mark) or not path.is_file():
            continue
        stem = path.stem.removesuffix(mark)
        if not stem:
            continue
        key = relative.with_name(stem).as_posix()
        if key in keyed:
            raise BadInputFile(f"{keyed[key]} and {path} have the same name; keep one of them")
        keyed[key] = path
    return keyed


@dataclass(frozen=True)
class SplitStatistics:
    """Figures of one split. Grey values are of the 8-bit pictures (0..255); fractions sum to one
    over the labelled pixels, ``ignored_fraction`` is of all pixels."""

    images: int
    pixels: int
    grey_mean: float
    grey_std: float
    class_fractions: list[float]
    ignored_fraction: float


def with_mask_at(
    micrograph: Micrograph, mask: npt.NDArray[np.uint8], read_at_m: PixelSizes | None
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """An 8-bit micrograph and its mask, both uint8 ``[H, W]``, at the nearest of the pixel sizes ``read_at_m``, metres.

    As they are where that is None or the micrograph's own is not known.
    """
    if read_at_m is None:
        return micrograph.pixels, mask
    grey = at_pixel_size(micrograph.pixels, micrograph.pixel_size_m, read_at_m)
    return grey, mask if grey.shape == mask.shape else nearest(mask, *grey.shape)


@dataclass(frozen=True)
class FolderDataset:
    """Micrographs and masks of one folder; open it with :meth:`open`.

    ``remarks`` holds what had to be assumed (class names, for example). ``intensity_range``: which grey values are
    black and white in the 8-bit pictures that :meth:`load` gives, those of the model that they are for
    (``replace(dataset, intensity_range=range_of(manifest.intensity))``). ``pixel_size_m``: metres, of pictures that
    state none of their own. ``common_pixel_size_m``: pictures that :meth:`load` gives are brought to it, and masks too,
    where their own is known and differs by more than :data:`~hpddrnet_trt.core.magnification.TOLERANCE`.
    """

    root: Path
    layout: Layout
    name: str
    classes: list[ClassInfo]
    license: str | None
    samples: dict[str, list[Sample]]
    pixel_size_m: float | None = None
    remarks: tuple[str, ...] = ()
    intensity_range: IntensityRange = None
    common_pixel_size_m: float | None = None
    colors: MaskColors = field(default_factory=MaskColors, compare=False, repr=False)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        layout: Layout | None = None,
        *,
        classes: Sequence[ClassInfo | str] | None = None,
    ) -> FolderDataset:
        """Open ``folder`` in one of the two layouts (told by its sub-folders when not given).

        ``folders``: ``images|masks/{train,val,test}/NAME``; ``cityscapes``:
        ``{train,val,test}/{imgs,labels}`` with ``*_leftImg8bit.*`` and
        ``*_gtFine_labelTrainIds.*``. Classes come from ``classes``, else from ``dataset.json``,
        else from the mask values, with a remark.

        Raises :class:`BadInputFile` for missing folders, no pairs, unpaired files, a broken
        ``dataset.json``, or masks no class table can be read from.
        """
        root = Path(folder)
        layout = detect_layout(root, layout)
        description = description_of(root)
        samples = _paired_samples(root, layout, description)
        remarks: tuple[str, ...] = ()
        table = description.class_table() if classes is None else _given_classes(classes)
        if table is None:
            table, remark = _inferred_from_files(root, samples)
            remarks = (remark,)
        return cls(
            root=root,
            layout=layout,
            name=description.name or root.resolve().name,
            classes=table,
            license=description.license,
            samples=samples,
            pixel_size_m=description.pixel_size_m,
            remarks=remarks,
        )

    @property
    def splits(self) -> list[str]:
        """Names of the splits that hold images, in the order train, val, test."""
        return list(self.samples)

    @property
    def class_names(self) -> list[str]:
        return [entry.name for entry in self.classes]

    @property
    def palette(self) -> list[tuple[int, int, int]]:
        return [entry.color for entry in self.classes]

    def split(self, name: str) -> list[Sample]:
        """Samples of one split, sorted by name; :class:`UsageError` when there is no such split."""
        if name not in self.samples:
            raise UsageError(f"dataset {self.root} has no split {name!r}; it has {', '.join(self.splits)}")
        return self.samples[name]

    def shared_groups(self, split: str) -> list[str]:
        """Groups (specimens, articles) of a split that occur in another split as well."""
        elsewhere = {sample.group for name, samples in self.samples.items() if name != split for sample in samples}
        return sorted({sample.group for sample in self.split(split) if sample.group} & elsewhere)

    def without_shared_groups(self, split: str) -> FolderDataset:
        """The dataset with those images left out of ``split`` whose group occurs in another split.

        Raises :class:`UsageError` when none would be left.
        """
        shared = self.shared_groups(split)
        kept = [sample for sample in self.split(split) if sample.group not in shared]
        if not kept:
            raise UsageError(
                f"every image in split {split!r} of {self.root} is of a group that other splits hold as well "
                f"({', '.join(shared)}); split by group is not possible with these splits"
            )
        return replace(self, samples={**self.samples, split: kept})

    def pooled(self, splits: Sequence[str]) -> list[Sample]:
        """The samples of several splits together, ``split/name`` each, and each with a group.

        Where no sample has one, :func:`~hpddrnet_trt.data.specimens.specimens` tells them by the names; a picture
        without any is a group by itself.
        """
        samples = [(split, sample) for split in splits for sample in self.split(split)]
        told = any(sample.group for _, sample in samples)
        found = {} if told else specimens([sample.name for _, sample in samples])[0]
        return [
            replace(sample, name=f"{split}/{sample.name}", group=sample.group or found.get(sample.name) or sample.name)
            for split, sample in samples
        ]

    def fold(self, number: int, count: int, splits: Sequence[str], *, train: str, held_out: str) -> FolderDataset:
        """The dataset of fold ``number`` of ``count`` (from 1): of the samples of ``splits`` together, the groups of
        this fold are split ``held_out`` and the others split ``train``. There are no other splits.

        Raises :class:`UsageError` for more folds than groups.
        """
        samples = self.pooled(splits)
        groups = {sample.name: str(sample.group) for sample in samples}
        if not 2 <= count <= len(set(groups.values())):
            raise UsageError(
                f"{count} folds of whole specimens cannot be made of {self.root}: {', '.join(splits)} hold "
                f"{some(groups)}; choose fewer folds or, if these are not the specimens, write that of each picture "
                "as `group` into dataset.json"
            )
        folds = deal(groups, count)
        kept, within = (
            [sample for sample in samples if (folds[sample.name] == number - 1) == inside] for inside in (False, True)
        )
        return replace(self, samples={train: kept, held_out: within})

    def load(self, sample: Sample) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """Read one sample: grey picture and mask, both uint8 ``[H, W]``, at the common pixel size.

        Raises as :meth:`read` does.
        """
        common = self.common_pixel_size_m
        return with_mask_at(*self.read(sample), None if common is None else (common, common))

    def read(self, sample: Sample) -> tuple[Micrograph, npt.NDArray[np.uint8]]:
        """Read one sample as it is: the micrograph in 8 bits, and its mask, both uint8 ``[H, W]``.

        A mask drawn over the whole file loses the rows of the information bar as the picture does.
        Raises :class:`BadInputFile` for sizes that differ or values outside the classes.
        """
        micrograph, mask = read_pair(sample, self.intensity_range, self.colors)
        unknown = unknown_values(np.bincount(mask.ravel(), minlength=256), len(self.classes))
        if unknown:
            raise BadInputFile(
                f"mask {sample.mask} holds the value {unknown[0]}, which is not one of the {len(self.classes)} "
                f"classes (0 to {len(self.classes) - 1}) nor {IGNORE_INDEX} (ignore); correct the mask or the classes"
            )
        if micrograph.pixel_size_m is None:
            micrograph = replace(micrograph, pixel_size_m=self.pixel_size_m)
        return micrograph, mask

    def checksum(self) -> str:
        """SHA-256 over splits, names and file contents of all images and masks.

        It does not depend on the folder's place, its layout or the order of its files.
        """
        digest = hashlib.sha256()
        for split in sorted(self.samples):
            for sample in sorted(self.samples[split], key=lambda sample: sample.name):
                for kind, path in (("image", sample.image), ("mask", sample.mask)):
                    digest.update(f"{split}\n{kind}\n{sample.name}\n{sha256_of(path)}\n".encode())
        return digest.hexdigest()

    def statistics(self, split: str) -> SplitStatistics:
        """Grey mean and standard deviation and class fractions of one split; reads every file."""
        grey_levels = np.zeros(256, dtype=np.int64)
        labels = np.zeros(256, dtype=np.int64)
        samples = self.split(split)
        for sample in samples:
            grey, mask = self.load(sample)
            grey_levels += np.bincount(grey.ravel(), minlength=256)
            labels += np.bincount(mask.ravel(), minlength=256)
        return summarise(len(samples), grey_levels, labels, len(self.classes))


def without_bar(mask: npt.NDArray[np.uint8], micrograph: Micrograph) -> npt.NDArray[np.uint8]:
    """A mask drawn over the whole file loses the rows of the information bar, as its picture did."""
    bar = micrograph.info_bar_rows
    return mask[: bar[0]] if bar is not None and mask.shape[0] == bar[1] else mask


def read_pair(
    sample: Sample, intensity_range: IntensityRange = None, colors: MaskColors | None = None
) -> tuple[Micrograph, npt.NDArray[np.uint8]]:
    """Read picture (in 8 bits) and mask of one sample and see that their sizes, and the ``colors``, agree."""
    micrograph = read_micrograph(sample.image)
    grey = to_grey8(micrograph.pixels, intensity_range).pixels
    mask = without_bar(read_mask(sample.mask, colors=colors), micrograph)
    if grey.shape != mask.shape:
        raise BadInputFile(
            f"{sample.image} is {grey.shape[1]} x {grey.shape[0]} pixels but its mask {sample.mask} is "
            f"{mask.shape[1]} x {mask.shape[0]}; a mask has the size of its image"
        )
    return replace(micrograph, pixels=grey), mask


def missing_splits(present: Collection[str], *wanted: str) -> list[str]:
    """A sentence for each of the ``wanted`` splits that is not among those ``present``."""
    there = f"(there are: {', '.join(present) or 'none'})"
    return [f"there is no {split} split {there}" for split in wanted if split not in present]


def training_problems(
    classes: Sequence[ClassInfo],
    labels: Mapping[str, tuple[Sequence[float], float]],
    train: str = "train",
    val: str = "val",
) -> list[str]:
    """Why nothing can be trained on a dataset, for its check and for training alike; empty when it can.

    ``labels``: of each split with images, the classes' fractions of its labelled pixels and the fraction of pixels that
    are ignored.
    """
    problems = missing_splits(labels, train, val)
    for split in (split for split in (train, val) if split in labels):
        fractions, ignored = labels[split]
        present = [entry.name for entry, share in zip(classes, fractions, strict=True) if share > 0]
        share = f"{ignored:.0%} are {IGNORE_INDEX}, ignore"
        hint = f" ({share}: if that means a class here, rewrite it as 1)" if ignored else ""
        if not present:
            problems.append(f"{split}: no pixel is labelled{hint}")
        elif split == train and len(present) == 1:
            problems.append(
                f"{split}: only the class {present[0]!r} occurs; training needs masks with at least two classes{hint}"
            )
    return problems


def passed_over(root: Path, layout: Layout) -> str | None:
    """A sentence about folders beside the splits that no split is made of, such as ``images/valid``."""
    above, name = ("images", "*") if layout == "folders" else (".", "*/imgs")
    folders = (path if layout == "folders" else path.parent for path in sorted((root / above).glob(name)))
    names = [path.relative_to(root).as_posix() for path in folders if path.is_dir() and path.name not in SPLITS]
    return f"{', '.join(names)} passed over: splits are called {', '.join(SPLITS)}" if names else None


def unknown_values(label_counts: npt.NDArray[np.integer], num_classes: int) -> list[int]:
    """Label values that are neither a class nor 255, from a histogram of 256 counts."""
    return [int(value) for value in np.flatnonzero(label_counts[:IGNORE_INDEX]) if value >= num_classes]


def summarise(
    images: int, grey_levels: npt.NDArray[np.integer], labels: npt.NDArray[np.integer], num_classes: int
) -> SplitStatistics:
    """Statistics from two histograms of 256 counts; NaN where nothing was counted."""
    values = np.arange(256, dtype=np.float64)
    pixels = int(labels.sum())
    labelled = int(labels[:num_classes].sum())
    counted = int(grey_levels.sum())
    mean = float(values @ grey_levels) / counted if counted else float("nan")
    variance = float((values - mean) ** 2 @ grey_levels) / counted if counted else float("nan")
    return SplitStatistics(
        images=images,
        pixels=pixels,
        grey_mean=mean,
        grey_std=variance**0.5,
        class_fractions=[int(count) / labelled if labelled else 0.0 for count in labels[:num_classes]],
        ignored_fraction=int(labels[IGNORE_INDEX]) / pixels if pixels else 0.0,
    )


def infer_classes(label_counts: npt.NDArray[np.integer], root: Path) -> tuple[list[ClassInfo], str]:
    """A class table from the mask values themselves, and the remark that says so.

    Raises :class:`BadInputFile` when the values are not 0, 1, 2, ... without a gap.
    """
    present = [int(value) for value in np.flatnonzero(label_counts[:IGNORE_INDEX])]
    if present != list(range(len(present))) or len(present) < 2:
        binary = " (255 is ignore: if it means a class here, rewrite it as 1)" if present == [0] else ""
        raise BadInputFile(
            f"the masks of {root} hold the values {_shortened(present)}, from which no class table can be "
            f"guessed{binary}; list the classes in {root / FILE_NAME}"
        )
    palette = default_palette(len(present))
    table = [ClassInfo(name=f"class {value}", color=palette[value]) for value in present]
    remark = f"{root} lists no classes; the masks hold 0 to {present[-1]}, taken as {len(present)} unnamed classes"
    return table, remark


def _shortened(values: list[int]) -> str:
    shown = ", ".join(str(value) for value in values[:10])
    return f"{shown}, ..." if len(values) > 10 else shown or "nothing but 255"


def _given_classes(classes: Sequence[ClassInfo | str]) -> list[ClassInfo]:
    if not 2 <= len(classes) <= IGNORE_INDEX:
        raise UsageError(f"a dataset has 2 to {IGNORE_INDEX} classes, {len(classes)} were given")
    palette = default_palette(len(classes))
    return [
        entry if isinstance(entry, ClassInfo) else ClassInfo(name=entry, color=color)
        for entry, color in zip(classes, palette, strict=True)
    ]


def _paired_samples(root: Path, layout: Layout, description: DatasetDescription) -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = {}
    for split in SPLITS:
        files = scan_split(root, layout, split, description)
        lonely = [*files.images_without_mask, *files.masks_without_image]
        if lonely:
            missing = "mask" if files.images_without_mask else "image"
            more = f" (and {len(lonely) - 1} more unpaired files)" if len(lonely) > 1 else ""
            raise BadInputFile(
                f"{lonely[0]} has no {missing} of the same name in its split{more}; "
                "add the missing file or remove this one"
            )
        if files.samples:
            samples[split] = files.samples
    if not samples:
        raise BadInputFile(f"dataset {root} is empty: no image with a mask in any of {', '.join(SPLITS)}")
    return samples


def _inferred_from_files(root: Path, samples: dict[str, list[Sample]]) -> tuple[list[ClassInfo], str]:
    labels = np.zeros(256, dtype=np.int64)
    everything = [sample for split in samples.values() for sample in split]
    for sample in progress_bar(everything, desc="looking for classes", unit="mask", delay=2):
        labels += np.bincount(read_mask(sample.mask).ravel(), minlength=256)
    table, remark = infer_classes(labels, root)
    log.warning("%s", remark)
    return table, remark


def image_files(path: str | Path) -> list[Path]:
    """The PNG, JPEG and TIFF files that ``path`` means: one file, a folder's, or those of a pattern.

    Folders are not searched deeper, hidden files are left out, the order is by name. Raises
    :class:`BadInputFile` when there is none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if path.is_dir():
        candidates = list(path.iterdir())
    elif any(sign in path.name for sign in "*?["):
        candidates = list(path.parent.glob(path.name))
    else:
        raise BadInputFile(f"{path} does not exist; give a micrograph, a folder or a pattern such as 'folder/*.tif'")
    files = sorted(
        item
        for item in candidates
        if item.is_file() and item.suffix.lower() in IMAGE_SUFFIXES and not item.name.startswith(".")
    )
    if not files:
        raise BadInputFile(f"no micrograph found for {path}; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    return files


def find_images(source: str | Path | Sequence[str | Path], split: str = "train") -> list[Path]:
    """Micrographs meant by ``source``: one split of a dataset folder, a folder, a pattern, or files.

    Masks are not needed. Raises :class:`UsageError` for an empty split or list and what
    :func:`image_files` raises.
    """
    if not isinstance(source, str | Path):
        images = [path for entry in source for path in image_files(entry)]
    elif (layout := dataset_layout(source)) is not None:
        files = scan_split(Path(source), layout, split, DatasetDescription())
        images = sorted([*(sample.image for sample in files.samples), *files.images_without_mask])
    else:
        images = image_files(source)
    if not images:
        raise UsageError(f"no micrograph in split {split!r} of {source}; choose another split, folder or files")
    return images


def dataset_layout(source: str | Path) -> Layout | None:
    """The layout of a dataset folder; None for a plain folder of micrographs, a file or a pattern."""
    try:
        return detect_layout(source)
    except BadInputFile:
        return None


def evenly(items: Sequence[_Item], most: int) -> list[_Item]:
    """At most so many of ``items``, spread evenly, in their order."""
    count = min(len(items), most)
    return [items[place * len(items) // count] for place in range(count)]
