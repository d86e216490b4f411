"""From the authors' files to labelled micrographs: one function per layout they publish, and what these share."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import BadInputFile
from hpddrnet_trt.core.manifest import IGNORE_INDEX
from hpddrnet_trt.data.datasets import SPLITS
from hpddrnet_trt.data.decode import IMAGE_SUFFIXES, decode
from hpddrnet_trt.data.intensity import to_grey8
from hpddrnet_trt.data.labels import read_mask
from hpddrnet_trt.data.micrograph import read_micrograph

log = logging.getLogger(__name__)

Color = tuple[int, int, int]
Position = tuple[int, int]  # top row, left column
_LFS = b"version https://git-lfs"


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


# NASA's MicroNet benchmark: <subset>/{train,val,test} with <subset>/{train,val,test}_annot

# The annotated files are the micrographs themselves with the precipitates painted over: what is
# still grey is matrix. The authors' notebook names the colours in OpenCV's order, blue first.
SUPER_COLORS = {(0, 0, 255): 1, (255, 0, 0): 2}
EBC_VALUES = {0: 0, 1: 1, 2: 2}


def superalloy(source: Path, *, subset: str) -> Iterator[Labelled]:
    """Super-1 to Super-4; masks are called ``NAME_mask.tif``."""
    for split, name, image, mask in _published(source, subset, "_mask"):
        labels = classes_of_colors(read_colors(mask), SUPER_COLORS, mask, grey=0)
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


# Mudrocks and shales

MUDROCK_VALUES = {0: 0, 1: 1, 2: 2}
SHALE_VALUES = {255: 0, 0: 1}
_TILE, _STRIDE = 256, 128
_ROWS = 46  # of tiles in the mosaic's strip: 6016 pixels
_WIDE_ROWS = 9  # the upper rows of tiles have a third column
_WIDE_END = 1024  # blocks of 512 pixels above, of 384 below


def mudrocknet(source: Path) -> Iterator[Labelled]:
    """``JPEGImages/*.jpg``, ``SegmentationClassRaw/*.png`` and the lists in ``ImageSets``.

    Without the lists the split is by group. Group: the first number of ``11_10_a``.
    """
    image_folder = find_folder(source, "JPEGImages")
    masks = images_in(find_folder(source, "SegmentationClassRaw"))
    pairs = pair(images_in(image_folder), masks, image_folder)
    splits = _listed(image_folder.parent / "ImageSets")
    if splits is None:
        log.warning("%s: the authors' lists are missing, so the split is made by group", source)
        by_group = split_by_group(stem.split("_")[0] for stem, _, _ in pairs)
        splits = {stem: by_group[stem.split("_")[0]] for stem, _, _ in pairs}
    for stem, image, mask in pairs:
        if stem in splits:
            labels = classes_of_values(read_values(mask), MUDROCK_VALUES, mask)
            group = stem.split("_")[0]
            yield Labelled(read_image(image), labels, splits[stem], stem, group, f"{image.name}, {mask.name}")


def _listed(folder: Path) -> dict[str, str] | None:
    lists = {split: folder / f"{split}.txt" for split in SPLITS}
    if not all(path.is_file() for path in lists.values()):
        return None
    return {name.strip(): split for split, path in lists.items() for name in path.read_text().split() if name.strip()}


def shale_duvernay(source: Path) -> Iterator[Labelled]:
    """``Images/*_NNNN.tif`` and ``Masks/*_MASK_NNNN.tif``: overlapping tiles of one mosaic strip.

    The tiles overlap by half, so a split of tiles would test on what was trained on. They are
    put together again, and the strip is cut into blocks without overlap; the upper 60 % are
    train, then val and test.
    """
    images = images_in(find_folder(source, "TrainData/Images"))
    masks = images_in(find_folder(source, "TrainData/Masks"))
    pairs = pair(images, {stem.replace("_MASK", ""): path for stem, path in masks.items()}, source)
    positions = _positions(pairs, source)
    strip = _stitch([read_image(image) for _, image, _ in pairs], positions)
    tiles = [classes_of_values(read_values(mask), SHALE_VALUES, mask) for _, _, mask in pairs]
    labels = _stitch(tiles, positions)
    if strip is None or labels is None:
        raise BadInputFile(f"the tiles in {source} do not fit together; give the folder that the authors publish")
    labels = _without_border_artefact(labels)
    blocks = _blocks(strip.shape[0])
    for place, (top, size) in enumerate(blocks):
        split = "train" if place < 0.6 * len(blocks) else "val" if place < 0.8 * len(blocks) else "test"
        window = (slice(top, top + size), slice(0, size))
        name = f"p7_y{top:04d}_x0000_{size}"
        yield Labelled(strip[window], labels[window], split, name, "P7 r1-c1", f"rows {top} to {top + size - 1}")


def _without_border_artefact(labels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The first row and the two leftmost columns are clay where grain begins right beside them: 255 there."""
    grain, clay = SHALE_VALUES[255], SHALE_VALUES[0]
    result = labels.copy()
    result[:, :2][(labels[:, :2] == clay) & (labels[:, 2:3] == grain)] = IGNORE_INDEX
    result[0][(labels[0] == clay) & (labels[1] == grain)] = IGNORE_INDEX
    return result


def _positions(pairs: Sequence[tuple[str, Path, Path]], source: Path) -> list[Position]:
    """Where the tiles lie, in the order of their numbers: the authors say neither rows nor columns
    first, so the order whose overlaps agree is taken."""
    by_rows = [(row, column) for row in range(_ROWS) for column in range(3 if row < _WIDE_ROWS else 2)]
    by_columns = sorted(by_rows, key=lambda place: (place[1], place[0]))
    if len(pairs) != len(by_rows):
        raise BadInputFile(f"{source} holds {len(pairs)} tiles with masks; the published set has {len(by_rows)}")
    tiles = [read_image(image) for _, image, _ in pairs]
    for order in (by_rows, by_columns):
        positions = [(row * _STRIDE, column * _STRIDE) for row, column in order]
        if _stitch(tiles, positions) is not None:
            return positions
    raise BadInputFile(f"the tiles in {source} do not fit together; give the folder that the authors publish")


def _stitch(tiles: Sequence[npt.NDArray[np.uint8]], positions: Sequence[Position]) -> npt.NDArray[np.uint8] | None:
    """Put tiles side by side; None when two of them disagree about a pixel."""
    height = max(top for top, _ in positions) + _TILE
    width = max(left for _, left in positions) + _TILE
    strip = np.zeros((height, width), dtype=tiles[0].dtype)
    done = np.zeros((height, width), dtype=bool)
    for tile, (top, left) in zip(tiles, positions, strict=True):
        if tile.shape != (_TILE, _TILE):
            return None
        window = (slice(top, top + _TILE), slice(left, left + _TILE))
        if np.any((strip[window] != tile) & done[window]):
            return None
        strip[window] = tile
        done[window] = True
    return strip


def _blocks(height: int) -> list[tuple[int, int]]:
    """``(top row, size)`` of the square blocks."""
    wide, narrow = _TILE + 2 * _STRIDE, _TILE + _STRIDE
    upper = [(top, wide) for top in range(0, _WIDE_END, wide)]
    return upper + [(top, narrow) for top in range(_WIDE_END, height - narrow + 1, narrow)]


# AxonDeepSeg's SEM set: a BIDS folder of rat spinal cord

_MASK_MARK = "_seg-axonmyelin-manual"
# 127 and 128 are myelin, 255 is axon; 130 and 233 occur at some borders and mean nothing.
AXON_VALUES = {0: 0, 127: 1, 128: 1, 255: 2, 130: IGNORE_INDEX, 233: IGNORE_INDEX}


def axondeepseg(source: Path) -> Iterator[Labelled]:
    """``sub-*/micr/*_SEM.png`` and ``derivatives/labels/sub-*/micr/*_seg-axonmyelin-manual.png``.

    No split is published: it is made by animal.
    """
    images = {path.stem: path for path in source.rglob("sub-*_SEM.*") if path.suffix in {".png", ".tif"}}
    masks = {path.stem.removesuffix(_MASK_MARK): path for path in source.rglob(f"*{_MASK_MARK}.png")}
    pairs = pair(images, masks, source)
    splits = split_by_group(_animal(stem) for stem, _, _ in pairs)
    for stem, image, mask in pairs:
        labels = classes_of_values(read_values(mask), AXON_VALUES, mask)
        animal = _animal(stem)
        yield Labelled(
            read_image(image), labels, splits[animal], plain_name(stem), animal, f"{image.name}, {mask.name}"
        )


def _animal(stem: str) -> str:
    return stem.split("_")[0]


CONVERTERS: dict[str, Converter] = {
    **{f"nasa-super{number}": partial(superalloy, subset=f"Super{number}") for number in (1, 2, 3, 4)},
    **{f"nasa-ebc{number}": partial(ebc, subset=f"EBC{number}") for number in (1, 2, 3)},
    "mudrocknet": mudrocknet,
    "shale-duvernay": shale_duvernay,
    "axondeepseg-sem": axondeepseg,
}


# What they share


def read_image(path: Path) -> npt.NDArray[Any]:
    """A micrograph's grey values, 8 or 16 bits; other types are brought to 8 bits."""
    _refuse_pointer(path)
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
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    return {path.stem: path for path in files if not path.name.startswith(".")}


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


def read_values(path: Path) -> npt.NDArray[np.uint8]:
    """The stored numbers of a mask, see :func:`~hpddrnet_trt.data.labels.read_mask`."""
    _refuse_pointer(path)
    return read_mask(path)


def read_colors(path: Path) -> npt.NDArray[np.uint8]:
    """The colours of a mask, uint8 RGB ``[H, W, 3]``; opacity is left out, grey becomes three channels."""
    _refuse_pointer(path)
    values = decode(path, "mask").values
    if values.dtype != np.uint8:
        raise BadInputFile(f"mask {path} holds {values.dtype} values where 8-bit colours were expected")
    if values.ndim == 2:
        values = np.repeat(values[..., None], 3, axis=2)
    if values.shape[2] < 3:
        values = np.repeat(values[..., :1], 3, axis=2)
    return np.ascontiguousarray(values[..., :3])


def classes_of_values(values: npt.NDArray[Any], table: Mapping[int, int], path: Path) -> npt.NDArray[np.uint8]:
    """Look every stored number up in ``table``; a number that is not there is an error."""
    labels, known = _looked_up(values, table)
    if not known.all():
        raise BadInputFile(
            f"mask {path} holds the value {values[~known][0]}; this dataset uses {', '.join(map(str, sorted(table)))}"
        )
    return labels


def classes_of_colors(
    colors: npt.NDArray[np.uint8], table: Mapping[Color, int], path: Path, *, grey: int | None = None
) -> npt.NDArray[np.uint8]:
    """Look every RGB colour up in ``table``, exactly; ``grey`` is the class of all remaining greys.

    A colour that is neither is an error that names it.
    """
    packed = _packed(colors)
    labels, known = _looked_up(packed, {int(_packed(np.array(color))): label for color, label in table.items()})
    if grey is not None:
        remaining = ~known & np.all(colors == colors[..., :1], axis=2)
        labels[remaining] = grey
        known |= remaining
    if not known.all():
        raise BadInputFile(
            f"mask {path} holds the colour {tuple(int(v) for v in colors[~known][0])} (RGB); "
            f"this dataset uses {', '.join(map(str, table))}{' and greys' if grey is not None else ''}"
        )
    return labels


def _packed(colors: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    return colors.astype(np.uint32) @ np.array([65536, 256, 1], dtype=np.uint32)


def _looked_up(
    values: npt.NDArray[Any], table: Mapping[int, int]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Labels, and where there are any."""
    labels, known = np.zeros(values.shape, dtype=np.uint8), np.zeros(values.shape, dtype=bool)
    for value, label in table.items():
        here = values == value
        labels[here] = label
        known |= here
    return labels, known


def _refuse_pointer(path: Path) -> None:
    """Git LFS leaves small text files where the pictures should be until it is told to fetch them."""
    with path.open("rb") as stream:
        if stream.read(len(_LFS)) == _LFS:
            raise BadInputFile(f"{path} is only a pointer of Git LFS; run 'git lfs pull' in that repository first")
