"""Pictures with masks beside them, as programs and people save them: which belongs to which, and what its numbers or
colours are, for :mod:`~hpddrnet_trt.data.importer`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import BadInputFile, UserError
from hpddrnet_trt.core.files import read_file
from hpddrnet_trt.data.annotations import PICTURE_FOLDER, UNLABELED, Annotated, Found, Labels, Tree, split_of
from hpddrnet_trt.data.decode import decode
from hpddrnet_trt.data.labels import MaskColors

_MASK = r"(?:cp[-_ ])?(?:masks?|labels?|lbl|gt|ground[-_ ]?truth|(?:simple )?seg(?:mentation)?|annot(?:ation)?s?)"
_MASK_FOLDER = re.compile(rf"(?:.*[-_ ])?(?:{_MASK}|segmentationclass(?:raw|png)?)(?:[-_ ].*)?", re.I)
_MASK_NAME = re.compile(rf"(?:(?:{_MASK})[-_. ]+(?P<after>.+)|(?P<before>.+?)[-_. ]+(?:{_MASK}))", re.I)
_PICTURE_NAME = re.compile(r"(?:image|img|picture)[-_. ]+(?P<after>.+)|(?P<before>.+?)[-_. ]+(?:image|img|raw)", re.I)
_PICTURE_FOLDER = re.compile(PICTURE_FOLDER, re.I)
_MOST_GREYS = 32  # grey levels of a colour picture that can be classes; more are a micrograph painted over
_SMOOTH = 64  # colours of a file that are still taken for a mask when two files have one name


def read_masks(tree: Tree, *, mark: str = "", by_color: bool = False, lossy: bool = False) -> Found:
    """Pair pictures with their masks by folder and name.

    Masks lie in a folder called like one (``masks``, ``labels``, ``train_annot``, ...) or have a name like one
    (``NAME_mask``, ``NAME-labels``, ``mask_NAME``, ...; ``mark`` is one more ending); of two files with one name, the
    one with few colours is the mask. ``labelmap.txt`` of CVAT's segmentation masks names the colours. ``by_color``:
    colours count, also where a palette has numbers for them. ``lossy``: take JPEG masks and smoothed borders.
    """
    found = Found(values=True)
    for path in tree.ending(".txt"):
        if path.name == "labelmap.txt":
            _read_labelmap(path, found)
    pictures: dict[str, list[Path]] = {}
    masks: dict[str, list[Path]] = {}
    for path in tree.pictures:
        is_mask, key = _key(tree.name(path), mark)
        (masks if is_mask else pictures).setdefault(key, []).append(path)
    if not masks:
        _masks_of_one_name(pictures, masks)
    _without_folders_where_unique(pictures, masks)
    pairs: list[tuple[Path, Path]] = []
    for key, of_key in masks.items():
        partners = pictures.get(key, [])
        if len(of_key) == 1 and len(partners) == 1:
            pairs.append((partners[0], of_key[0]))
        elif not partners:
            found.left_out |= dict.fromkeys(map(tree.name, of_key), "a mask without a picture of its name")
        else:
            names = sorted(map(tree.name, [*of_key, *partners]))
            reason = f"{' and '.join(names)} have one name; keep one picture and one mask"
            found.left_out |= dict.fromkeys(names, reason)
    by_color = _by_color([mask for _, mask in pairs], by_color or bool(found.known), found)
    for picture, mask in pairs:
        labels = partial(_read, mask, by_color, lossy)
        split = split_of(*tree.name(mask).split("/")[:-1])
        found.pictures.append(Annotated(picture, labels, f"{tree.name(picture)}, {tree.name(mask)}", None, split))
    return found


def _read_labelmap(path: Path, found: Found) -> None:
    """CVAT's table: ``label:color_rgb:parts:actions``."""
    for line in read_file(path, "label map").decode("utf-8", "replace").splitlines():
        if entry := re.fullmatch(r"([^#].*?):(\d+),(\d+),(\d+):.*", line.strip()):
            red, green, blue = (min(255, int(value)) for value in entry.groups()[1:])
            found.known[f"#{red:02x}{green:02x}{blue:02x}"] = entry[1]
            found.colors[entry[1]] = (red, green, blue)
            found.order.append(entry[1])


def _key(name: str, mark: str) -> tuple[bool, str]:
    """Whether a file is a mask, and what it has in common with its partner."""
    *folders, file = name.split("/")
    stem = re.sub(r"\.ome$", "", file.rsplit(".", 1)[0])
    is_mask = any(_MASK_FOLDER.fullmatch(folder) for folder in folders)
    kept = [folder for folder in folders if not (_MASK_FOLDER.fullmatch(folder) or _PICTURE_FOLDER.fullmatch(folder))]
    kept += [split for folder in folders if folder not in kept and (split := split_of(folder))]
    if mark and stem.endswith(mark) and stem != mark:
        is_mask, stem = True, stem.removesuffix(mark)
    elif marked := _MASK_NAME.fullmatch(stem):
        is_mask, stem = True, marked["after"] or marked["before"]
    if marked := _PICTURE_NAME.fullmatch(stem):
        stem = marked["after"] or marked["before"]
    return is_mask, "/".join([*kept, stem]).casefold()


def _masks_of_one_name(pictures: dict[str, list[Path]], masks: dict[str, list[Path]]) -> None:
    """A flat folder of ``NAME.jpg`` and ``NAME.png``: the mask is the one with few colours."""
    for key, paths in pictures.items():
        if len(paths) == 2:
            counts = [_count_colors(path) for path in paths]
            few, many = sorted(range(2), key=counts.__getitem__)
            if counts[few] <= _SMOOTH < counts[many]:
                masks[key] = [paths[few]]
                pictures[key] = [paths[many]]


def _count_colors(path: Path) -> float:
    try:
        return len(np.unique(decode(path, "mask").values))
    except UserError:
        return float("inf")


def _without_folders_where_unique(pictures: dict[str, list[Path]], masks: dict[str, list[Path]]) -> None:
    """Masks in folders of other names are found by name alone, where only one picture has it."""
    by_stem: dict[str, list[str]] = {}
    for key in pictures:
        by_stem.setdefault(key.rsplit("/", 1)[-1], []).append(key)
    for key in [key for key in masks if key not in pictures]:
        candidates = by_stem.get(key.rsplit("/", 1)[-1], [])
        if len(candidates) == 1 and candidates[0] not in masks:
            masks[candidates[0]] = masks.pop(key)


def _by_color(masks: Sequence[Path], by_color: bool, found: Found) -> bool:
    """Whether the colours of all masks count: one is coloured, or palettes number the same colours differently."""
    colors = MaskColors()
    for path in masks:
        try:
            decoded = decode(path, "mask")
        except UserError:
            continue  # said when it is read
        values = decoded.values[..., :-1] if decoded.alpha else decoded.values
        by_color |= values.ndim == 3 and bool(np.any(values != values[..., :1]))
        if decoded.palette is not None and not by_color:
            try:
                colors.add(path, values.astype(np.uint8), decoded.palette)
            except BadInputFile:
                by_color = True
                found.notes.append("the palettes of the masks differ: their colours count, not their indices")
    return by_color


def _read(path: Path, by_color: bool, lossy: bool, height: int, width: int) -> Labels:
    """A mask's labels: ``"12"`` for values, ``"#rrggbb"`` for colours."""
    decoded = decode(path, "mask")
    if decoded.format == "JPEG" and not lossy:
        raise BadInputFile(
            f"mask {path.name} is a JPEG, which alters colours and values; save it as PNG, "
            "or name all classes with --class and take the nearest with --nearest"
        )
    if decoded.pages > 1:
        raise BadInputFile(f"mask {path.name} holds {decoded.pages} pages, of which no one is the labels; save one")
    values, opaque = decoded.values, None
    if values.ndim == 3 and decoded.alpha and values.shape[2] > 1:
        opacity = values[..., -1]
        values = values[..., :-1]
        if opacity.min() != opacity.max():
            if not lossy and np.any((opacity != 0) & (opacity != opacity.max())):
                raise BadInputFile(
                    f"mask {path.name} is half transparent in places; save it without smoothing, or add --nearest"
                )
            opaque = opacity > opacity.max() // 2
    if decoded.palette is not None and by_color:
        values = decoded.palette[np.minimum(values.astype(np.int64), len(decoded.palette) - 1)]
    labels = _of_colors(values) if by_color else _of_numbers(values, path)
    if opaque is not None:  # nothing is drawn where it is transparent
        labels.values[~opaque] = len(labels.names)
        labels.names.append(UNLABELED)
    return labels


def _of_numbers(values: npt.NDArray[Any], path: Path) -> Labels:
    if values.ndim == 3:
        values = values[..., 0]
    numbers, places = np.unique(values, return_inverse=True)
    if not np.isfinite(numbers.astype(np.float64)).all() or np.any(numbers != np.floor(numbers.astype(np.float64))):
        raise BadInputFile(f"mask {path.name} holds fractions or NaN; class numbers are whole")
    names = [str(int(number)) for number in numbers]
    return Labels(places.reshape(values.shape).astype(np.int32), names)


def _of_colors(values: npt.NDArray[Any]) -> Labels:
    if values.dtype == bool:
        values = values.astype(np.uint8) * np.uint8(255)
    if values.dtype != np.uint8:
        raise BadInputFile(f"a coloured mask has 8 bits a channel, this one {values.dtype}; save it so")
    if values.ndim == 2:
        values = values[..., None]
    channels = (0, 1, 2) if values.shape[2] > 2 else (0, 0, 0)
    red, green, blue = (values[..., channel].astype(np.int32) for channel in channels)
    packed = red << 16 | green << 8 | blue
    present = np.zeros(1 << 24, np.bool_)
    present[packed] = True
    colors = np.flatnonzero(present)
    greys = colors[(colors >> 16 == (colors >> 8 & 255)) & (colors & 255 == (colors >> 8 & 255))]
    places = np.zeros(1 << 24, np.int32)
    names = [f"#{color:06x}" for color in colors]
    places[colors] = np.arange(len(colors))
    if len(greys) > _MOST_GREYS and len(greys) < len(colors):  # a micrograph that was painted over
        places[greys] = len(names)
        names.append(UNLABELED)
    return Labels(places[packed], names)
