"""What microscopes and image software write about a picture: one module per vendor, one answer.

Tags inside the file come first, texts beside it second; :func:`~.metadata.resolve` lets none
of them win against another that contradicts it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tifffile

from hpddrnet_trt.data.vendors import fei, hitachi, imagej, jeol, ome, openfibsem, tescan, zeiss
from hpddrnet_trt.data.vendors.metadata import Planes, VendorInfo, VendorMetadata, resolve
from hpddrnet_trt.data.vendors.texts import TooLarge, sidecar

__all__ = ["Planes", "VendorInfo", "VendorMetadata", "imagej", "read_planes", "read_sidecars", "read_tags", "resolve"]


def read_tags(page: tifffile.TiffPage) -> tuple[VendorMetadata, ...]:
    """What all tags of a TIFF's first page say; the resolution tags alone count only when nothing else speaks."""
    statements: list[VendorMetadata] = []
    for module in (fei, zeiss, tescan, openfibsem, ome, imagej):
        statements += _bounded(module.VENDOR, module.read, page)
    return tuple(statements or imagej.read_resolution(page))


def read_planes(page: tifffile.TiffPage) -> Planes:
    """How OME or ImageJ say that the planes of a file lie."""
    return ome.planes(page) or imagej.planes(page) or Planes()


def read_sidecars(picture: Path, stored: tuple[int, int]) -> tuple[VendorMetadata, ...]:
    """The metadata of the files that TESCAN, Hitachi and JEOL keep beside ``picture``, of ``(width, height)``.

    A text file of another kind is passed over; one of theirs that cannot be read becomes a doubt.
    """
    return (*_bounded(tescan.VENDOR, tescan.read_sidecar, picture, stored), *_bounded(None, _text, picture, stored))


def _text(picture: Path, stored: tuple[int, int]) -> list[VendorMetadata]:
    names = [picture.stem + ending for ending in (".txt", ".TXT", ".Txt")]
    beside = sidecar(picture.parent, names, (*hitachi.MARKS, *jeol.MARKS))
    if beside is None:
        return []
    name, text = beside
    statements = (module.read_sidecar_text(text, name, stored) for module in (hitachi, jeol))
    return [metadata for metadata in statements if metadata is not None]


def _bounded(vendor: str | None, read: Callable[..., list[VendorMetadata]], *arguments: Any) -> list[VendorMetadata]:
    try:
        return read(*arguments)
    except TooLarge as exc:
        return [VendorMetadata(vendor, doubts=[f"its metadata are not read ({exc})"])]
    except OSError as exc:
        return [VendorMetadata(vendor, doubts=[f"its metadata cannot be read ({exc.strerror or exc})"])]
