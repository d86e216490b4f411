"""From corrected labels in napari to a dataset that training reads: ``images|masks/SPLIT/NAME``, ``dataset.json``."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tifffile

from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.files import atomic_path
from hpddrnet_trt.core.manifest import IGNORE_INDEX, ClassInfo
from hpddrnet_trt.data.datasets import detect_layout
from hpddrnet_trt.data.description import (
    FILE_NAME,
    DatasetDescription,
    DescribedClass,
    description_of,
    write_description,
)
from hpddrnet_trt.data.labels import scale_options, write_label_png
from hpddrnet_trt.data.micrograph import read_micrograph
from hpddrnet_trt.inference.rank import read_ranking
from hpddrnet_trt.integrations.napari_layers import METADATA_KEY, find_layer, layer_planes, plane_name

Split = Literal["auto", "train", "val", "test"]
PER_VAL = 5  # about every fifth picture is for choosing the best step of a training


@dataclass(frozen=True)
class SavedMask:
    """Where a plane's mask went, and how many pictures each split has now."""

    mask: Path
    counts: dict[str, int]


def save_mask(folder: str | Path, viewer: Any, source: Any, split: Split = "auto") -> SavedMask:
    """Add the plane that the viewer shows of the image layer ``source``, with its labels, to a dataset.

    The picture goes to ``images`` as TIFF, as the layer holds it and with its pixel size, the labels to ``masks``. A
    picture that the dataset has already stays as it is, in its split, and only its mask is replaced. ``auto``: every
    fifth new picture to val, and the second. ``dataset.json`` with the classes is written where there is none.

    Raises :class:`UserError` when there is nothing to save, labels are no classes, or the dataset has other classes, or
    another picture of that name.
    """
    folder = Path(folder)
    labels = find_layer(viewer, source, "labels")
    if labels is None:
        raise UserError(f"layer {source.name!r} has no labels yet; press Run, then correct them")
    planes = layer_planes(source, viewer.dims)
    index = planes.indices[0]
    classes = [ClassInfo.model_validate(entry) for entry in labels.metadata[METADATA_KEY]["classes"]]
    if tuple(labels.data.shape) != planes.shape:
        raise UserError(f"layer {source.name!r} has another size than its labels; press Run again")
    mask = _checked(np.asarray(labels.data[index]), classes)
    picture = planes.read(index)
    description = _described(folder, classes)
    plane = re.sub(r"\D+", "-", plane_name(index))
    name = _file_name(source.name) + (f"_{plane}" if plane else "")
    known = next((path for path in sorted(folder.glob("images/*/*")) if path.stem == name), None)
    if known is None:
        split = _next_split(folder) if split == "auto" else split
        target = folder / "images" / split / f"{name}.tif"
    elif not np.array_equal(read_micrograph(known).pixels, picture.pixels):
        raise UserError(f"{known} is another picture; rename the layer {source.name!r}, after which files are called")
    else:
        target = known
    if not (folder / FILE_NAME).is_file():
        write_description(folder / FILE_NAME, description)
    mask_path = folder / "masks" / target.parent.name / f"{name}.png"
    palette = [entry.color for entry in classes]
    write_label_png(mask_path, mask, palette, pixel_size_m=picture.pixel_size_m)
    if known is None:
        with atomic_path(target) as temporary:
            tifffile.imwrite(
                temporary, picture.pixels, compression="zlib", metadata=None, **scale_options(picture.pixel_size_m)
            )
    return SavedMask(mask_path, {split: _count(folder, split) for split in ("train", "val", "test")})


def next_picture(ranking: str | Path, folder: str | Path | None, passed: Collection[Path] = ()) -> Path | None:
    """The first picture of a file of ``hpddrnet-trt rank`` that is not in the dataset ``folder`` and not one of
    ``passed``; None after the last. Raises :class:`~hpddrnet_trt.core.errors.BadInputFile` for another file."""
    known = set() if folder is None else {path.stem for path in Path(folder).glob("images/*/*")}
    left = (path for path in read_ranking(ranking) if path not in passed and _file_name(path.stem) not in known)
    return next(left, None)


def _file_name(layer: str) -> str:
    return re.sub(r"[^\w.-]+", "_", layer)


def _checked(mask: Any, classes: list[ClassInfo]) -> Any:
    values = np.unique(mask)
    strange = [int(value) for value in values if not (0 <= value < len(classes) or value == IGNORE_INDEX)]
    if strange:
        table = ", ".join(f"{number} {entry.name}" for number, entry in enumerate(classes))
        raise UserError(f"the label {strange[0]} is no class; paint with {table}, or {IGNORE_INDEX} for unknown")
    if values.size == 1 and values[0] == IGNORE_INDEX:
        raise UserError("nothing is labelled in this plane; press Run, or paint classes first")
    return mask.astype(np.uint8)


def _described(folder: Path, classes: list[ClassInfo]) -> DatasetDescription:
    """The dataset's description, which has these classes; a new one where the folder is no dataset yet."""
    names = [entry.name for entry in classes]
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose a folder for the dataset")
    if (folder / FILE_NAME).is_file() or (folder / "images").is_dir() or any(folder.glob("*/imgs")):
        if detect_layout(folder) != "folders":
            raise UserError(f"{folder} has the layout of Cityscapes; choose one with images and masks, or a new one")
        table = description_of(folder).class_table()
        if table is not None and [entry.name for entry in table] != names:
            raise UserError(
                f"{folder} has the classes {', '.join(entry.name for entry in table)}, the labels have "
                f"{', '.join(names)}; choose another folder"
            )
    described = [DescribedClass(name=entry.name, index=n, color=entry.color) for n, entry in enumerate(classes)]
    return DatasetDescription(name=folder.name, classes=described)


def _count(folder: Path, split: str) -> int:
    return sum(path.is_file() for path in folder.glob(f"images/{split}/*"))


def _next_split(folder: Path) -> Literal["train", "val"]:
    train, val = _count(folder, "train"), _count(folder, "val")
    return "val" if train and val * PER_VAL < train + val else "train"
