"""Stacks: micrographs that follow each other in depth, as pages of one TIFF or as files of one folder."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hpddrnet_trt.core.errors import BadInputFile
from hpddrnet_trt.data.tiff import SIGNATURES, tiff_series

Slice = tuple[Path, int | None]  # a file and, of a TIFF with several pages, which one


@dataclass(frozen=True)
class Stack:
    """``slices`` in their order. ``source``: the TIFF or the folder. ``spacing_m``: metres from one slice to the next,
    None where unknown."""

    source: Path
    slices: tuple[Slice, ...]
    spacing_m: float | None = None


def stack_in_file(path: Path) -> Stack | None:
    """The pages of a TIFF that holds several full-size pictures of one kind; None for any other file, or a damaged one.

    Thumbnails, masks and pages of another kind are passed over, and of several channels the first counts. Slices of
    OME-TIFF and ImageJ come with their distance.
    """
    try:
        with path.open("rb") as stream:
            if not stream.read(4).startswith(SIGNATURES):
                return None
        series = tiff_series(path)
    except (BadInputFile, OSError):
        return None
    except Exception:  # what tifffile stumbles over in a damaged file is told when the picture is read
        return None
    count = len(series.places)
    return Stack(path, tuple((path, page) for page in range(count)), series.spacing_m) if count > 1 else None


def stacks_in_folders(paths: Iterable[Path]) -> list[Stack]:
    """The files of each folder as one stack, in the order of the numbers in their names: 2 before 10."""
    folders: dict[Path, list[Path]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path)
    ordered = {folder: sorted(files, key=_by_number) for folder, files in folders.items()}
    return [Stack(folder, tuple((path, None) for path in files)) for folder, files in ordered.items()]


def _by_number(path: Path) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part.lower()) for part in parts]
