"""What converters produce, and what they share: finding files, pairing them, splitting by group."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import BadInputFile
from hpddrnet_trt.data.catalog.masks import refuse_pointer
from hpddrnet_trt.data.decode import IMAGE_SUFFIXES
from hpddrnet_trt.data.micrograph import read_micrograph, to_grey8

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labelled:
    """One micrograph with its mask, ready to be written.

    ``image``: uint8 or uint16 ``[H, W]``; ``mask``: uint8 ``[H, W]`` class indices and 255;
    ``group``: specimen or article, where names tell it; ``source``: the authors' file names.
    """

    image: npt.NDArray[Any]
    mask: npt.NDArray[np.uint8]
    split: str
    name: str
    group: str | None
    source: str


Converter = Callable[[Path], Iterator[Labelled]]


def read_image(path: Path) -> npt.NDArray[Any]:
    """A micrograph's grey values, 8 or 16 bits; other types are windowed to 8 bits."""
    refuse_pointer(path)
    pixels = read_micrograph(path).pixels
    return pixels if pixels.dtype in (np.uint8, np.uint16) else to_grey8(pixels)[0]


def plain_name(stem: str) -> str:
    """A file name that every system takes: runs of signs other than letters, digits, ``.`` and ``_`` become ``-``."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", stem).strip("-")


def find_folder(source: Path, inner: str) -> Path:
    """The folder whose path ends in ``inner`` (``"Super1/train"``), at whatever depth below ``source``.

    Raises :class:`BadInputFile` when there is none.
    """
    parts = Path(inner).parts
    candidates = [source, *sorted(path for path in source.rglob("*") if path.is_dir())]
    for base in candidates:
        if base.parts[-len(parts) :] == parts:
            return base
    raise BadInputFile(f"{source} has no folder {inner}; give the folder or archive that the authors publish")


def images_in(folder: Path) -> dict[str, Path]:
    """The pictures of one folder by the stem of their names, sorted."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    return {path.stem: path for path in found if not path.name.startswith(".")}


def pair(images: dict[str, Path], masks: dict[str, Path], where: Path) -> list[tuple[str, Path, Path]]:
    """Images and masks under the same key; unpaired ones are left out with a warning, none is an error."""
    common = sorted(images.keys() & masks.keys())
    if not common:
        raise BadInputFile(f"{where} holds no image with its mask; give the folder or archive that the authors publish")
    lonely = sorted(images.keys() ^ masks.keys())
    if lonely:
        log.warning("%s: %d files without a partner are left out, the first is %s", where, len(lonely), lonely[0])
    return [(key, images[key], masks[key]) for key in common]


def split_by_group(groups: Iterable[str], *, val: float = 0.15, test: float = 0.15) -> dict[str, str]:
    """A split where none is published: every group goes wholly into train, val or test.

    Groups are ordered by the SHA-256 of their names, which no one chose, and the first ones
    become test, the next ones val (at least one each, if there are three groups or more). The
    same names give the same split everywhere.
    """
    ordered = sorted(set(groups), key=lambda group: hashlib.sha256(group.encode()).hexdigest())
    if len(ordered) < 3:
        return dict.fromkeys(ordered, "train")
    tests = max(1, round(test * len(ordered)))
    vals = max(1, round(val * len(ordered)))
    return {
        group: "test" if place < tests else "val" if place < tests + vals else "train"
        for place, group in enumerate(ordered)
    }
