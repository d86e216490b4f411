"""Labelled micrographs into a dataset folder of this package, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from hpddrnet_trt.core.errors import BadInputFile, UsageError
from hpddrnet_trt.core.files import atomic_folder, atomic_path, write_text
from hpddrnet_trt.data.catalog.entry import Entry
from hpddrnet_trt.data.catalog.labelled import Labelled
from hpddrnet_trt.data.datasets import FILE_NAME, DatasetDescription, DescribedFile, unknown_values
from hpddrnet_trt.data.labels import write_label_png


def write_converted(
    entry: Entry, samples: Iterable[Labelled], folder: Path, *, downloads: Iterable[dict[str, Any]] = ()
) -> None:
    """Write ``images|masks/SPLIT/NAME.png`` and ``dataset.json`` into ``folder``, which must be new or empty.

    Everything is written beside it and renamed at the end. ``downloads`` goes into ``dataset.json``
    (address, SHA-256). Raises :class:`BadInputFile` for masks that do not fit their image or the
    classes, for two samples of one name, and when there is none.
    """
    with new_folder(folder) as temporary:
        files: dict[tuple[str, str], dict[str, Any]] = {}
        for sample in tqdm(samples, desc=f"converting {entry.name}", unit="image"):
            _check(entry, sample)
            if (sample.split, sample.name) in files:
                raise BadInputFile(f"{entry.name}: two images are called {sample.name} in the split {sample.split}")
            _write_pair(entry, sample, temporary)
            known = DescribedFile(split=sample.split, name=sample.name, group=sample.group)
            files[sample.split, sample.name] = {**known.model_dump(exclude_none=True), "source": sample.source}
        if not files:
            raise BadInputFile(f"{entry.name}: no labelled image was found; give what the authors publish")
        text = json.dumps(_description(entry, list(files.values()), list(downloads)), indent=1, ensure_ascii=False)
        write_text(temporary / FILE_NAME, text + "\n")


def require_new(folder: Path) -> None:
    """Raise :class:`UsageError` when ``folder`` exists and is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not an empty folder; choose a new one, nothing is overwritten")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``folder`` that takes its place on success and vanishes otherwise."""
    require_new(folder)
    with atomic_folder(folder) as temporary:
        yield temporary


def _check(entry: Entry, sample: Labelled) -> None:
    if sample.image.shape != sample.mask.shape:
        (height, width), (mask_height, mask_width) = sample.image.shape, sample.mask.shape
        raise BadInputFile(
            f"{entry.name}: {sample.source}: the image has {width} x {height} pixels, its mask "
            f"{mask_width} x {mask_height}; are they the authors' files?"
        )
    unknown = unknown_values(np.bincount(sample.mask.ravel(), minlength=256), len(entry.classes))
    if unknown:
        raise BadInputFile(f"{entry.name}: {sample.source}: the mask holds {unknown[0]}, which is no class")


def _write_pair(entry: Entry, sample: Labelled, root: Path) -> None:
    _write_grey(root / "images" / sample.split / f"{sample.name}.png", sample.image)
    palette = [known.color or (0, 0, 0) for known in entry.classes]
    write_label_png(root / "masks" / sample.split / f"{sample.name}.png", np.ascontiguousarray(sample.mask), palette)


def _write_grey(path: Path, pixels: npt.NDArray[Any]) -> None:
    with atomic_path(path) as temporary:
        Image.fromarray(np.ascontiguousarray(pixels)).save(temporary, format="PNG")


def _description(entry: Entry, files: list[dict[str, Any]], downloads: list[dict[str, Any]]) -> dict[str, Any]:
    """What the package reads back, and around it what people want to know; their keys are left alone."""
    read_back = DatasetDescription(name=entry.name, license=entry.licence, classes=list(entry.classes))
    return {
        **read_back.model_dump(exclude_none=True, exclude={"files"}),
        "title": entry.title,
        "licence_note": entry.licence_note,
        "citation": entry.citation,
        "doi": entry.doi,
        "homepage": entry.homepage,
        "split": entry.split,
        "notes": entry.notes,
        "downloads": downloads,
        "files": files,
    }
