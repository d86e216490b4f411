"""Steels: UHCS (ultrahigh carbon) and MetalDAM (additively manufactured)."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from hpddrnet_trt.core.errors import BadInputFile
from hpddrnet_trt.core.manifest import IGNORE_INDEX
from hpddrnet_trt.data.catalog.labelled import Labelled, find_folder, images_in, pair, read_image, split_by_group
from hpddrnet_trt.data.catalog.masks import classes_of_values, read_values
from hpddrnet_trt.data.decode import IMAGE_SUFFIXES

UHCS_VALUES = {0: 0, 1: 1, 2: 2, 3: 3, -1: IGNORE_INDEX}
UHCS_ROWS, UHCS_BANNER = 522, 38  # of a frame, and the instrument's banner at its bottom
# Of the authors' six validation sets (data/uhcs-validation-sets.json) the first is test, the second val.
UHCS_TEST = {1176, 1219, 357, 333}
UHCS_VAL = {235, 360, 1528, 579}
METALDAM_VALUES = {value: value for value in range(5)}


def uhcs(source: Path) -> Iterator[Labelled]:
    """Labels ``labels/uhcsNNNN.tif`` and micrographs ``micrographN.*`` or ``uhcsNNNN.*``, at any depth.

    Group: the sample, when the authors' ``microstructures.sqlite`` is there.
    """
    masks: dict[str, Path] = {}
    images: dict[str, Path] = {}
    for path in sorted(source.rglob("*")):
        found = re.fullmatch(r"(?:uhcs|micrograph)0*(\d+)", path.stem)
        if found and path.suffix.lower() in IMAGE_SUFFIXES:
            (masks if path.parent.name == "labels" else images)[found[1]] = path
    # Most of the 961 micrographs have no labels: that is no reason for a warning.
    pairs = pair({number: images[number] for number in images.keys() & masks.keys()}, masks, source)
    samples = _uhcs_samples(source)
    for number, image, mask in pairs:
        pixels, values = read_image(image), read_values(mask)
        if values.shape[0] == UHCS_ROWS:
            values = values[:-UHCS_BANNER]
        if pixels.shape[0] == UHCS_ROWS:
            pixels = pixels[:-UHCS_BANNER]
        labels = classes_of_values(values, UHCS_VALUES, mask)
        split = "test" if int(number) in UHCS_TEST else "val" if int(number) in UHCS_VAL else "train"
        name = f"uhcs{int(number):04d}"
        yield Labelled(pixels, labels, split, name, samples.get(int(number)), f"{image.name}, {mask.name}")


def _uhcs_samples(source: Path) -> dict[int, str]:
    database = next(iter(sorted(source.rglob("microstructures.sqlite"))), None)
    if database is None:
        return {}
    try:
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            rows = connection.execute(
                "SELECT micrograph_id, sample_key FROM micrograph WHERE sample_key IS NOT NULL"
            ).fetchall()
    except sqlite3.Error as exc:
        raise BadInputFile(f"{database} cannot be read as the authors' database ({exc}); remove or replace it") from exc
    return {int(micrograph): f"sample {sample}" for micrograph, sample in rows}


def metaldam(source: Path) -> Iterator[Labelled]:
    """``images/*.jpg`` with an information bar and ``labels/*.png`` without it; values 0 to 4."""
    image_folder = find_folder(source, "images")
    pairs = pair(images_in(image_folder), images_in(find_folder(source, "labels")), image_folder)
    splits = split_by_group(name for name, _, _ in pairs)
    for name, image, mask in pairs:
        labels = classes_of_values(read_values(mask), METALDAM_VALUES, mask)
        pixels = read_image(image)[: labels.shape[0]]
        yield Labelled(pixels, labels, splits[name], name, None, f"{image.name}, {mask.name}")
