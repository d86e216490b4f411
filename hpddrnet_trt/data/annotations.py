"""Shapes that people drew on pictures: which pixels lie within, which picture is meant, what was found in all.

The formats themselves are in :mod:`~hpddrnet_trt.data.annotation_formats`. One rule decides which pixels lie within a
shape, that of all these programs: coordinates are in pixels, the top left pixel reaches from (0, 0) to (1, 1), and a
pixel belongs to the shape in which its centre lies (a centre on an edge: to the right or lower one, so that shapes side
by side neither overlap nor leave a gap). Rings of one shape enclose by the even-odd rule: a ring within another is a
hole.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import BadInputFile, UserError, describe
from hpddrnet_trt.core.files import decoded_text, read_file
from hpddrnet_trt.data.decode import IMAGE_SUFFIXES

Color = tuple[int, int, int]
Block = tuple[int, int, npt.NDArray[np.bool_]]  # top row, left column, which pixels from there
Ring = npt.NDArray[np.float64]  # [N, 2] corners x, y; closed by itself
UNLABELED = "unlabeled"  # where nothing is drawn
# What foreign files make Python stumble over; each becomes a sentence about the file.
FAULTS = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError, struct.error)
# Beside the masks of classes: those of objects, and pictures for people.
_NOT_MEANT = {"SegmentationObject", "SegmentationClassVisualization", "SegmentationObjectVisualization"}
_SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


@dataclass(frozen=True)
class Labels:
    """``values``: int32 ``[H, W]``, places in ``names``; ``contested``: pixels that shapes of two labels cover."""

    values: npt.NDArray[np.int32]
    names: list[str]
    contested: int = 0


@dataclass(frozen=True)
class Annotated:
    """One picture and how to get its labels.

    ``labels`` is given the picture's height and width, information bar included. ``size``: width and height of the
    picture as the annotation states them. ``source``: the files' names, for the record.
    """

    picture: Path
    labels: Callable[[int, int], Labels]
    source: str
    size: tuple[int, int] | None = None
    split: str | None = None


@dataclass
class Found:
    """All that one source holds.

    ``known``: names that the source has for its values or colours; ``order`` and ``colors`` of names, where it says
    them. ``left_out``: files with the reason; ``passed_over``: kinds of shapes without an area, counted.
    """

    pictures: list[Annotated] = field(default_factory=list)
    values: bool = False  # its labels are numbers and colours, not names
    known: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    colors: dict[str, Color] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    passed_over: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def add(
        self,
        source: str,
        picture: Callable[[], Path],
        shapes: Callable[[], Iterable[Shape | None]],
        *,
        size: Callable[[], tuple[int, int]] | None = None,
        split: str | None = None,
        small_on_top: bool = False,
    ) -> None:
        """Take a picture with its shapes, or note why not; ``source`` is the annotation's name for people."""
        try:
            path = picture()
            drawn = [shape for shape in shapes() if shape is not None]
            stated = None if size is None else size()
        except (UserError, *FAULTS) as exc:
            self.left_out[source] = reason(exc)
            return
        labels = partial(paint, drawn, small_on_top)
        self.pictures.append(Annotated(path, labels, f"{source}, {path.name}", stated, split))

    def unmentioned(self, tree: Tree) -> list[str]:
        """The pictures that neither have labels nor were left out."""
        told = {part for entry in self.pictures for part in entry.source.split(", ")} | self.left_out.keys()
        told |= {tree.name(entry.picture) for entry in self.pictures}
        return [name for name in map(tree.name, tree.pictures) if name not in told]


class Tree:
    """The files of a source; ``images``: where its pictures lie if elsewhere; ``scratch``: a folder to write to."""

    def __init__(self, root: Path, scratch: Path, images: Path | None = None) -> None:
        self.root, self.scratch = root, scratch
        self._places = [root, scratch, *([] if images is None else [images])]
        self.files = list(_files(root))
        elsewhere = [] if images is None else [path for path in _files(images) if path not in set(self.files)]
        pictures = (path for path in self.files + elsewhere if path.suffix.lower() in IMAGE_SUFFIXES)
        self.pictures = [path for path in pictures if not _NOT_MEANT.intersection(path.parts)]
        self._by_name: dict[str, list[Path]] = {}
        for path in self.pictures:
            for key in {path.name.casefold(), path.stem.casefold(), path.stem.casefold().removesuffix(".ome")}:
                self._by_name.setdefault(key, []).append(path)

    def name(self, path: Path) -> str:
        """A file's path within the source, or within the folder of pictures."""
        return next(path.relative_to(place).as_posix() for place in self._places if path.is_relative_to(place))

    def ending(self, *endings: str) -> list[Path]:
        return [path for path in self.files if path.suffix.lower() in endings]

    def json(self, kind: str, found: Found) -> Iterator[tuple[Path, Any]]:
        """The JSON files of one kind (:func:`json_kind`) with their content; damaged ones are left out."""
        for path in self.ending(".json", ".geojson"):
            try:
                content = read_json(path)
            except UserError as exc:
                found.left_out[self.name(path)] = describe(exc)
                continue
            if json_kind(content) == kind:
                yield path, content

    def picture(self, name: str, near: Path) -> Path:
        """The picture that an annotation calls ``name``: as much of the path as fits, whatever system wrote it.

        Raises :class:`BadInputFile` when there is none, or more than one.
        """
        parts = [part.casefold() for part in PureWindowsPath(name).parts] or [""]
        stem = PureWindowsPath(parts[-1]).stem
        candidates = self._by_name.get(parts[-1]) or self._by_name.get(stem, [])
        if len(candidates) > 1:
            candidates = _closest(candidates, parts, near)
        if not candidates:
            raise BadInputFile(f"its picture {name} is not there; add it, or say where with --images")
        if len(candidates) > 1:
            both = " and ".join(self.name(path) for path in candidates[:2])
            raise BadInputFile(f"it may belong to {both}; keep one of them")
        return candidates[0]

    def picture_beside(self, annotation: Path) -> Path:
        """The picture whose name an annotation file bears, with what programs add to it (``NAME_RoiSet.zip``)."""
        plain = re.sub(r"[-_. ]*(roi[-_ ]?set|rois?|annotations?|objects)[-_. ]*", "", annotation.stem, flags=re.I)
        for name in (annotation.stem, plain):
            if name and name.casefold() in self._by_name:
                return self.picture(name, annotation)
        beside = [path for path in self.pictures if path.parent == annotation.parent]
        if len(beside) == 1:
            return beside[0]
        raise BadInputFile("no picture has its name; name both alike")


def _closest(candidates: list[Path], parts: list[str], near: Path) -> list[Path]:
    """Those whose folders agree with most of ``parts``; among them the one in the annotation's own folder."""
    def agreeing(path: Path) -> int:
        own = [part.casefold() for part in path.parts[:-1]]
        count = 0
        while count < min(len(own), len(parts) - 1) and own[-1 - count] == parts[-2 - count]:
            count += 1
        return count

    best = max(map(agreeing, candidates))
    candidates = [path for path in candidates if agreeing(path) == best]
    return [path for path in candidates if path.parent == near.parent] or candidates


def _files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(root).parts)
        if not hidden and path.is_file():
            yield path


def reason(exc: BaseException) -> str:
    """Why a file is left out: our own sentences as they are, what Python stumbled over as one."""
    told = describe(exc)
    return told if isinstance(exc, UserError) else f"not as its program writes it ({told}); save it again"


# Folders that hold pictures of any kind.
PICTURE_FOLDER = r"images?|imgs?|pictures?|raw|micrographs?|jpegimages|data|default"


def split_of(*places: str) -> str | None:
    """The split that a folder or file name says (``train``, ``valid``, ``instances_val2017``)."""
    for place in places:
        for word in re.findall(r"[a-z]+", place.casefold()):
            if word in _SPLIT_NAMES:
                return _SPLIT_NAMES[word]
    return None


def read_json(path: Path) -> Any:
    """A JSON file's content, :class:`BadInputFile` when it is none."""
    try:
        return json.loads(decoded_text(read_file(path, "annotation")))
    except (ValueError, RecursionError) as exc:
        raise BadInputFile(f"it is no JSON in UTF-8 ({describe(exc)}); save it again") from exc


def json_kind(content: Any) -> str | None:
    """``labelme``, ``coco`` or ``qupath``, told by the keys; None for anything else."""
    if isinstance(content, dict) and {"shapes", "imagePath"} <= content.keys():
        return "labelme"
    if isinstance(content, dict) and {"images", "annotations", "categories"} <= content.keys():
        return "coco"
    first = content[0] if isinstance(content, list) and content else content
    is_feature = isinstance(first, dict) and first.get("type") in ("FeatureCollection", "Feature")
    return "qupath" if is_feature else None


# Which pixels lie within


def polygon(rings: Sequence[Ring], height: int, width: int) -> Block:
    """The pixels whose centres lie within ``rings``: each edge toggles, in the rows it crosses, all that is right."""
    rings = [ring for ring in rings if len(ring) >= 3]
    if not rings:
        return 0, 0, np.zeros((0, 0), np.bool_)
    edges = np.concatenate([np.hstack([ring, np.roll(ring, -1, axis=0)]) for ring in rings]).astype(np.float64)
    if not np.isfinite(edges).all():
        raise ValueError("a corner is no finite number")
    first = np.clip(np.ceil(np.minimum(edges[:, 1], edges[:, 3]) - 0.5), 0, height).astype(np.int64)
    last = np.clip(np.ceil(np.maximum(edges[:, 1], edges[:, 3]) - 0.5), 0, height).astype(np.int64)
    top, bottom = int(first.min()), int(last.max())
    left = int(np.clip(math.floor(edges[:, 0].min()), 0, width))
    right = int(np.clip(math.ceil(edges[:, 0].max()), left, width))
    counts = last - first
    edge = np.repeat(np.arange(len(edges)), counts)
    row = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
    x0, y0, x1, y1 = edges[edge].T
    crossing = x0 + (row + 0.5 - y0) * (x1 - x0) / (y1 - y0)
    column = np.clip(np.ceil(crossing - 0.5), left, right).astype(np.int64) - left
    span = right - left + 1
    toggles = np.bincount((row - top) * span + column, minlength=(bottom - top) * span)
    inside = np.cumsum(toggles.reshape(bottom - top, span), axis=1)[:, :-1] % 2 == 1
    return top, left, inside


def ellipse(sizes: Sequence[float], height: int, width: int) -> Block:
    """The pixels whose centres lie within an ellipse: centre x, y, radii along and across, degrees clockwise."""
    x, y, rx, ry, degrees = sizes
    if not all(map(math.isfinite, sizes)):
        raise ValueError("an ellipse has no finite size")
    reach = max(rx, ry)
    top, left = (max(0, math.floor(center - reach)) for center in (y, x))
    bottom, right = min(height, math.ceil(y + reach)), min(width, math.ceil(x + reach))
    rows, columns = np.ogrid[top : max(top, bottom), left : max(left, right)]
    dx, dy = columns + 0.5 - x, rows + 0.5 - y
    turn = math.radians(degrees)
    along, across = dx * math.cos(turn) + dy * math.sin(turn), dy * math.cos(turn) - dx * math.sin(turn)
    return top, left, (along / max(rx, 1e-9)) ** 2 + (across / max(ry, 1e-9)) ** 2 <= 1


def bitmap(top: int, left: int, pixels: npt.NDArray[np.bool_], height: int, width: int) -> Block:
    """Pixels as they are, cut where they reach beyond the picture."""
    pixels = pixels[max(0, -top) : max(0, height - top), max(0, -left) : max(0, width - left)]
    return max(0, top), max(0, left), pixels


@dataclass(frozen=True)
class Shape:
    label: str
    draw: Callable[[int, int], Block]  # from the picture's height and width


def paint(shapes: Sequence[Shape], small_on_top: bool, height: int, width: int) -> Labels:
    """Draw shapes over each other, the later ones on top, or the smaller ones where the program keeps no order."""
    blocks = [(shape.label, *shape.draw(height, width)) for shape in shapes]
    if small_on_top:
        blocks.sort(key=lambda block: -int(block[3].sum()))
    names = list(dict.fromkeys([UNLABELED, *(label for label, *_ in blocks)]))
    values = np.zeros((height, width), np.int32)
    contested = np.zeros((height, width), np.bool_)
    for label, top, left, inside in blocks:
        place = np.s_[top : top + inside.shape[0], left : left + inside.shape[1]]
        number = names.index(label)
        contested[place] |= inside & (values[place] != 0) & (values[place] != number)
        values[place][inside] = number
    return Labels(values, names, int(contested.sum()))


def box(x0: float, y0: float, x1: float, y1: float) -> Ring:
    """The corners of a rectangle."""
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.float64)
