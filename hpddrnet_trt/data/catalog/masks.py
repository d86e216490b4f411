"""From the ways authors store masks (numbers, colours) to class indices; what is unknown is an error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import BadInputFile
from hpddrnet_trt.data.decode import decode

Colour = tuple[int, int, int]
_LFS = b"version https://git-lfs"


def read_values(path: Path) -> npt.NDArray[Any]:
    """The stored numbers of a mask, ``[H, W]`` of any integer type; equal RGB channels count as one."""
    values = _stored(path)
    if values.ndim == 3:
        values = values[..., :3] if values.shape[2] > 2 else values[..., :1]
        if np.any(values != values[..., :1]):
            raise BadInputFile(f"mask {path} is a colour picture, class numbers were expected; is it the right file?")
        values = values[..., 0]
    return values


def read_colours(path: Path) -> npt.NDArray[np.uint8]:
    """The colours of a mask, uint8 RGB ``[H, W, 3]``; opacity is left out, grey becomes three channels."""
    values = _stored(path)
    if values.dtype != np.uint8:
        raise BadInputFile(f"mask {path} holds {values.dtype} values where 8-bit colours were expected")
    if values.ndim == 2:
        values = np.repeat(values[..., None], 3, axis=2)
    if values.shape[2] < 3:
        values = np.repeat(values[..., :1], 3, axis=2)
    return np.ascontiguousarray(values[..., :3])


def classes_of_values(values: npt.NDArray[Any], table: Mapping[int, int], path: Path) -> npt.NDArray[np.uint8]:
    """Look every stored number up in ``table``; a number that is not there is an error."""
    labels = np.zeros(values.shape, dtype=np.uint8)
    known = np.zeros(values.shape, dtype=bool)
    for value, label in table.items():
        here = values == value
        labels[here] = label
        known |= here
    if not known.all():
        raise BadInputFile(
            f"mask {path} holds the value {values[~known][0]}; this dataset uses {', '.join(map(str, sorted(table)))}"
        )
    return labels


def classes_of_colours(
    colours: npt.NDArray[np.uint8], table: Mapping[Colour, int], path: Path, *, grey: int | None = None
) -> npt.NDArray[np.uint8]:
    """Look every RGB colour up in ``table``, exactly; ``grey`` is the class of all remaining greys.

    A colour that is neither is an error that names it.
    """
    packed = _packed(colours)
    labels = np.zeros(packed.shape, dtype=np.uint8)
    known = np.zeros(packed.shape, dtype=bool)
    if grey is not None:
        known = np.all(colours == colours[..., :1], axis=2)
        labels[known] = grey
    for colour, label in table.items():
        here = packed == _packed(np.array(colour, dtype=np.uint8))
        labels[here] = label
        known |= here
    if not known.all():
        raise BadInputFile(
            f"mask {path} holds the colour {tuple(int(v) for v in colours[~known][0])} (RGB); "
            f"this dataset uses {', '.join(map(str, table))}{' and greys' if grey is not None else ''}"
        )
    return labels


def _packed(colours: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    return colours.astype(np.uint32) @ np.array([65536, 256, 1], dtype=np.uint32)


def _stored(path: Path) -> npt.NDArray[Any]:
    refuse_pointer(path)
    decoded = decode(path, "mask")
    if decoded.format == "JPEG":
        raise BadInputFile(f"mask {path} is a JPEG, which alters label values; look for the authors' PNG or TIFF")
    return decoded.values  # of palette files the numbers, not the colours


def refuse_pointer(path: Path) -> None:
    """Git LFS leaves small text files where the pictures should be until it is told to fetch them."""
    with path.open("rb") as stream:
        if stream.read(len(_LFS)) == _LFS:
            raise BadInputFile(f"{path} is only a pointer of Git LFS; run 'git lfs pull' in that repository first")
