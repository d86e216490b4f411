"""NASA's MicroNet benchmark: ``<subset>/{train,val,test}`` with ``<subset>/{train,val,test}_annot``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from hpddrnet_trt.data.catalog.labelled import Labelled, find_folder, images_in, pair, plain_name, read_image
from hpddrnet_trt.data.catalog.masks import classes_of_colours, classes_of_values, read_colours, read_values
from hpddrnet_trt.data.datasets import SPLITS

# The annotated files are the micrographs themselves with the precipitates painted over: what is
# still grey is matrix. The authors' notebook names the colours in OpenCV's order, blue first.
SUPER_COLOURS = {(0, 0, 255): 1, (255, 0, 0): 2}
EBC_VALUES = {0: 0, 1: 1, 2: 2}


def superalloy(source: Path, *, subset: str) -> Iterator[Labelled]:
    """Super-1 to Super-4; masks are called ``NAME_mask.tif``."""
    for split, name, image, mask in _published(source, subset, "_mask"):
        labels = classes_of_colours(read_colours(mask), SUPER_COLOURS, mask, grey=0)
        spot = re.match(r"spot\d+", name)
        group = spot[0] if spot else re.sub(r"_\d+$", "", name)
        yield Labelled(read_image(image), labels, split, name, group, f"{image.name}, {mask.name}")


def ebc(source: Path, *, subset: str) -> Iterator[Labelled]:
    """EBC-1 to EBC-3; masks have the micrographs' names and hold 0, 1, 2."""
    for split, name, image, mask in _published(source, subset, ""):
        labels = classes_of_values(read_values(mask), EBC_VALUES, mask)
        yield Labelled(read_image(image), labels, split, name, name.split("_")[0], f"{image.name}, {mask.name}")


def _published(source: Path, subset: str, mask_mark: str) -> Iterator[tuple[str, str, Path, Path]]:
    root = find_folder(source, subset)
    for split in SPLITS:
        folder = find_folder(root, f"{subset}/{split}")
        masks = images_in(find_folder(root, f"{subset}/{split}_annot"))
        by_name = {stem.removesuffix(mask_mark): path for stem, path in masks.items()}
        for stem, image, mask in pair(images_in(folder), by_name, folder):
            yield split, plain_name(stem), image, mask
