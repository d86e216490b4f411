"""A folder of pictures: tiles whose positions are known, as one mosaic, or equal slices, as a volume.

Tiles are placed, not registered. Their positions, to whole pixels, come from a table or from their names; where tiles
overlap, the one that comes later in the table (or further down and to the right) is seen.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError, one_line
from hpddrnet_trt.core.files import decoded_text, read_file
from hpddrnet_trt.data.decode import IMAGE_SUFFIXES, decode
from hpddrnet_trt.data.micrograph import Micrograph, Stored, grey_pixels, read_micrograph, stored_picture
from hpddrnet_trt.data.stack import stacks_in_folders
from hpddrnet_trt.mosaic.layout import Box, Piece
from hpddrnet_trt.mosaic.reading import FileState, OpenedSource, Options, check_unit, file_state, log, signature_of

TABLE = "positions.csv"  # looked for in the folder
SLICES = "slices"  # as positions: not tiles, whatever the names are
# In the names of tiles: r001_c002, Row3-Col4; Tile_001-002-000000_0-000 (Thermo Fisher MAPS); x003_y001.
_NAMES = (
    re.compile(r"(?<![a-z])r(?:ow)?[ _-]*(?P<row>\d+)[ _-]*c(?:ol(?:umn)?)?[ _-]*(?P<column>\d+)", re.IGNORECASE),
    re.compile(r"^tile[ _-]*(?P<row>\d+)-(?P<column>\d+)", re.IGNORECASE),
    re.compile(r"(?<![a-z])x[ _-]*(?P<column>\d+)[ _-]*y[ _-]*(?P<row>\d+)", re.IGNORECASE),
)
_COLUMNS = (("x", "y"), ("x_um", "y_um"), ("column", "row"))
_FURTHEST = 1 << 40  # pixels
_SPARSE = 0.1  # share of a mosaic below which positions look wrong
_READERS = 8  # headers that are read at once


class _Position(NamedTuple):
    """``x``, ``y`` to the right and downwards, in pixels, micrometers or tiles; ``z``: the slice."""

    file: Path
    x: float
    y: float
    z: int


@dataclass(frozen=True)
class _Plan:
    """``unit``: a pair of :data:`_COLUMNS`. ``overlap``: percent of a tile's side. ``mirror``: "", "x", "y" or "xy"."""

    positions: Sequence[_Position]
    unit: tuple[str, str]
    overlap: float = 0.0
    mirror: str = ""


@dataclass
class PlacedPictures(OpenedSource):
    """``files``: from the lowest to the uppermost. ``boxes``: where each lies, int64 ``[n, 5]`` as
    :class:`~hpddrnet_trt.mosaic.layout.Box`. ``stored_rows``: rows of each with an information bar."""

    files: tuple[Path, ...]
    boxes: npt.NDArray[np.int64] = field(repr=False)

    def read(self, box: Box) -> Piece:
        """See :class:`~hpddrnet_trt.mosaic.layout.Source`: where no picture lies is the fill value."""
        pixels = self._filled(box)
        seen: list[Box] = []
        failed: list[tuple[Box, str]] = []
        for index in self._within(box):
            place = Box(*map(int, self.boxes[index]))
            part = place.common(box)
            try:
                values = _pixels(self.files[index], _state(self.files[index]), (place.height, place.width), self.dtype)
            except UserError as exc:
                failed.append((part, str(exc)))
                continue
            pixels[part.within(box)] = self._grey(values[part.within(place)])
            seen.append(part)
        return Piece(pixels, tuple((rest, why) for part, why in failed for rest in _without(part, seen)))

    def signature(self, box: Box) -> str:
        """See :class:`~hpddrnet_trt.mosaic.layout.Source`: of the pictures that lie there, and where."""
        indices = self._within(box)
        places = "".join(f"-{z}.{top}.{left}" for z, top, left, _, _ in self.boxes[indices])
        return signature_of([Path(places), *(self.files[index] for index in indices)])

    def _within(self, box: Box) -> list[int]:
        z, top, left, height, width = self.boxes.T
        hit = (z == box.z) & (top < box.rows.stop) & (top + height > box.top)
        hit &= (left < box.columns.stop) & (left + width > box.left)
        return [int(index) for index in np.flatnonzero(hit)]


def open_folder(folder: Path, options: Options) -> PlacedPictures:
    """The tiles or slices in a folder, by ``options.positions``: a table, a pattern of names, or "slices"; by default
    the table :data:`TABLE` in it, else what all the names say, else slices.

    Raises :class:`BadInputFile` where no picture can be read or a table makes no sense, :class:`UsageError` for
    positions that make none.
    """
    plan = _plan(folder, options.positions)
    if plan is None:
        return _opened(folder, _slices(folder), None, options)
    return _opened(folder, plan.positions, plan, options)


def open_picture(path: Path, options: Options) -> PlacedPictures:
    """A single picture of any format that :func:`~hpddrnet_trt.data.micrograph.read_micrograph` knows."""
    return _opened(path, [_Position(path, 0, 0, 0)], _Plan((), ("x", "y")), options)


def _opened(path: Path, positions: Sequence[_Position], plan: _Plan | None, options: Options) -> PlacedPictures:
    """``plan``: of tiles; None for slices, which must be equal."""
    with ThreadPoolExecutor(_READERS) as pool:
        stored = list(pool.map(_stored, [position.file for position in positions]))
    index, first = _first_readable(positions, stored)
    model = stored[index]
    assert isinstance(model, Stored)
    size = options.pixel_size or first.pixel_size_m
    others = [(entry, place.file) for entry, place in zip(stored, positions, strict=True) if isinstance(entry, Stored)]
    for entry, file in others:
        if plan is None and (entry.height, entry.width) != (model.height, model.width):
            raise BadInputFile(
                f"{file} has {entry.width} x {entry.height} pixels but {first.source} {model.width} x {model.height}: "
                "these are no slices of one volume; give --positions for tiles, or a folder with the slices alone"
            )
    _tell_scales(path, others, size)
    kept = first.pixels.shape[0]
    extents = [
        (kept if entry.height == model.height else entry.height, entry.width) if isinstance(entry, Stored)
        else (kept, model.width) for entry in stored
    ]  # fmt: skip
    places = [(0, 0)] * len(positions) if plan is None else _places(plan, first, size)
    boxes = np.array([(p.z, *place, *extent) for p, place, extent in zip(positions, places, extents, strict=True)])
    boxes[:, :3] -= boxes[:, :3].min(axis=0)
    shape = (int(boxes[:, 0].max()) + 1, int((boxes[:, 1] + boxes[:, 3]).max()), int((boxes[:, 2] + boxes[:, 4]).max()))
    if boxes[:, 3:].prod(axis=1).sum() < _SPARSE * math.prod(shape):
        log.warning("%s: its %d tiles cover less than a tenth of %d x %d pixels: are their positions right?",
                    path, len(boxes), shape[2], shape[1])  # fmt: skip
    check_unit(path, boxes[:, 3:].max(axis=0).tolist(), first.pixels.dtype.itemsize, "pictures")
    return PlacedPictures(
        path=path, shape=shape, dtype=first.pixels.dtype, fill_value=0.0, pixel_size_m=size, spacing_m=options.spacing,
        unit=(int(boxes[:, 3].max()), int(boxes[:, 4].max())),
        files=tuple(position.file for position in positions), boxes=boxes.astype(np.int64),
    )  # fmt: skip


def _stored(file: Path) -> Stored | UserError:
    try:
        return stored_picture(file)
    except UserError as exc:  # told when its pixels are read
        return exc


def _first_readable(positions: Sequence[_Position], stored: Sequence[Stored | UserError]) -> tuple[int, Micrograph]:
    """The first picture that can be read, with information bar and pixel size as all of them."""
    problem: UserError | None = None
    for index, (position, entry) in enumerate(zip(positions, stored, strict=True)):
        try:
            if isinstance(entry, UserError):
                raise entry
            return index, read_micrograph(position.file)
        except UserError as exc:
            problem = problem or exc
    raise BadInputFile(f"none of {len(positions)} pictures can be read, the first of them because {problem}")


def _tell_scales(path: Path, stored: Iterable[tuple[Stored, Path]], size: float | None) -> None:
    if size is None:
        return
    others = [
        (file, entry.pixel_size_m)
        for entry, file in stored
        if entry.pixel_size_m is not None and not math.isclose(size, entry.pixel_size_m, rel_tol=1e-2)
    ]
    if others:
        log.warning(
            "%s: %d of its pictures state another pixel size than %.6g m, such as %s with %.6g m: none is rescaled",
            path, len(others), size, *others[0],
        )  # fmt: skip


def _places(plan: _Plan, first: Micrograph, size: float | None) -> list[tuple[int, int]]:
    """Top and left of each tile, in pixels, from anywhere."""
    steps = (1.0, 1.0)
    if plan.unit == ("column", "row"):
        height, width = first.pixels.shape
        steps = (width * (1 - plan.overlap / 100), height * (1 - plan.overlap / 100))
    elif plan.unit == ("x_um", "y_um"):
        if size is None:
            raise UsageError(
                f"positions in micrometers need a pixel size, which {first.source} does not state; give --pixel-size"
            )
        steps = (1e-6 / size, 1e-6 / size)
    signs = (-1 if "x" in plan.mirror else 1, -1 if "y" in plan.mirror else 1)
    return [
        (round(position.y * steps[1] * signs[1]), round(position.x * steps[0] * signs[0]))
        for position in plan.positions
    ] or [(0, 0)]


def _plan(folder: Path, positions: str | Path | None) -> _Plan | None:
    """Where tiles lie; None for slices."""
    if positions is None and (folder / TABLE).is_file():
        positions = folder / TABLE
    text = "" if positions is None else str(positions)
    if text == SLICES:
        return None
    if text and (Path(text).suffix.lower() in (".csv", ".tsv", ".txt") or Path(text).is_file()):
        return _from_table(Path(text))
    words = text.split()
    patterns = [word for word in words if "=" not in word]
    options = _said(" ".join(word for word in words if "=" in word), "--positions")
    if len(patterns) > 1 or any("{row}" not in word or "{column}" not in word for word in patterns):
        raise UsageError(
            f"positions are a table (.csv), a pattern of names such as r{{row}}_c{{column}}, or {SLICES!r}, "
            f"not {one_line(text)}"
        )
    named = _from_names(_pictures(folder), [_pattern(word) for word in patterns] or list(_NAMES))
    if named is None and positions is not None:
        raise BadInputFile(f"the names in {folder} do not all say row and column ({text or 'no pattern'}); use a table")
    if named is None:
        return None
    if positions is None:
        log.warning(
            "%s: its pictures are taken as tiles by their names; --positions %s if they are slices", folder, SLICES
        )
    return _Plan(named, ("column", "row"), **options)


def _pattern(text: str) -> re.Pattern[str]:
    escaped = re.escape(text)
    for key in ("row", "column", "z"):
        escaped = escaped.replace(re.escape(f"{{{key}}}"), rf"(?P<{key}>\d+)", 1)
    try:
        return re.compile(escaped)
    except re.error as exc:
        raise UsageError(f"the pattern {one_line(text)} names a place twice ({exc})") from exc


def _from_names(files: Sequence[Path], patterns: Sequence[re.Pattern[str]]) -> list[_Position] | None:
    """Positions that all names state by one of the patterns, each another one; None otherwise."""
    for pattern in patterns:
        found = [(file, match) for file in files if (match := pattern.search(file.name))]
        if len(found) < len(files):
            continue
        positions = [
            _Position(file, int(match["column"]), int(match["row"]), int(match.groupdict().get("z") or 0))
            for file, match in found
        ]
        if len({position[1:] for position in positions}) == len(files) > 1:
            return sorted(positions, key=lambda position: (position.z, position.y, position.x))
    return None


def _from_table(path: Path) -> _Plan:
    """A table with the columns file, x and y (or x_um and y_um, or row and column), and where wanted z."""
    try:
        text = decoded_text(read_file(path, "table of positions"))
    except ValueError as exc:
        raise BadInputFile(f"the table of positions {path} is no text; save it as CSV in UTF-8") from exc
    lines = text.splitlines()
    comments = " ".join(line.lstrip("# \t") for line in lines if line.startswith("#"))
    body = [line for line in lines if line.strip() and not line.startswith("#")]
    delimiter = next((sign for sign in "\t;," if body and sign in body[0]), ",")
    table = csv.DictReader(io.StringIO("\n".join(body)), delimiter=delimiter, skipinitialspace=True)
    names = [name.strip().lower() for name in table.fieldnames or []]
    table.fieldnames = names
    unit = next((pair for pair in _COLUMNS if set(pair) <= set(names)), None)
    if unit is None or "file" not in names:
        raise BadInputFile(
            f"the table of positions {path} has the columns {one_line(', '.join(names) or 'of nothing')}; it needs "
            "file, and x and y (pixels), x_um and y_um, or row and column"
        )
    positions = [_row(path, number, row, unit) for number, row in enumerate(table, 1)]
    if not positions:
        raise BadInputFile(f"the table of positions {path} lists no tiles; check what wrote it")
    file, times = Counter(position.file for position in positions).most_common(1)[0]
    if times > 1:
        raise BadInputFile(f"the table of positions {path} lists {file.name} {times} times; keep one line of it")
    return _Plan(positions, unit, **_said(comments, str(path)))


def _row(path: Path, number: int, row: dict[str, str], unit: tuple[str, str]) -> _Position:
    try:
        x, y = (float(row[name]) for name in unit)
        z = int(row.get("z") or 0)
        file = row["file"].strip()
        if not file or not (abs(x) < _FURTHEST and abs(y) < _FURTHEST and abs(z) < _FURTHEST):
            raise ValueError
    except (TypeError, ValueError, AttributeError) as exc:
        raise BadInputFile(
            f"tile {number} in the table of positions {path} has no file or no number as position "
            f"({one_line(list(row.values()))}); correct that line"
        ) from exc
    return _Position(path.parent / file, x, y, z)


def _said(text: str, where: str) -> dict[str, Any]:
    """``overlap=10 mirror=xy`` as arguments of :class:`_Plan`."""
    said: dict[str, Any] = {}
    for key, value in re.findall(r"(\w+)\s*[=:]\s*([^\s,;]+)", text):
        if key == "mirror" and value in ("x", "y", "xy", "none"):
            said[key] = value.replace("none", "")
            continue
        try:
            percent = float(value.rstrip("%"))
        except ValueError:
            percent = math.nan
        if key != "overlap" or not -1000 < percent < 100:
            raise UsageError(f"{where}: {key}={value} makes no sense; there are overlap=PERCENT and mirror=x, y or xy")
        if percent < 0:
            log.warning("%s: an overlap of %g %% leaves gaps between the tiles, which are empty", where, percent)
        said[key] = percent
    return said


def _pictures(folder: Path) -> list[Path]:
    """The files of a folder that are pictures by their names; :class:`BadInputFile` where there are none."""
    try:
        files = sorted(entry for entry in folder.iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES)
    except OSError as exc:
        raise BadInputFile(f"{folder} cannot be read ({exc.strerror}); check its permissions") from exc
    if not files:
        raise BadInputFile(f"there is no picture in {folder} ({', '.join(IMAGE_SUFFIXES)}); check the path")
    return files


def _slices(folder: Path) -> list[_Position]:
    (stack,) = stacks_in_folders(_pictures(folder))
    return [_Position(file, 0, 0, z) for z, (file, _) in enumerate(stack.slices)]


def _state(file: Path) -> FileState:
    try:
        return file_state(file)
    except OSError as exc:
        raise BadInputFile(f"{file} cannot be read ({exc.strerror}); copy it again") from exc


@lru_cache(maxsize=2)  # blocks that lie beside each other share pictures
def _pixels(file: Path, state: FileState, extent: tuple[int, int], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Grey pixels of one picture, without the rows of the information bar."""
    values = grey_pixels(decode(file), file)[0]
    height, width = extent
    if values.shape[0] < height or values.shape[1] != width:
        raise BadInputFile(
            f"{file} has {values.shape[1]} x {values.shape[0]} pixels instead of {width} x {height}; copy it again"
        )
    if values.dtype != dtype:
        raise BadInputFile(f"{file} has {values.dtype} pixels, other pictures {dtype}; save all of them alike")
    return np.ascontiguousarray(values[:height])


def _without(box: Box, others: Iterable[Box]) -> list[Box]:
    """What of ``box`` none of ``others`` covers."""
    rest = [box]
    for other in others:
        rest = [piece for part in rest for piece in _outside(part, part.common(other))]
    return rest


def _outside(box: Box, hole: Box) -> list[Box]:
    """``box`` without ``hole``, which lies in it: above, below, to the left, to the right."""
    if not hole.height or not hole.width:
        return [box]
    pieces = [
        Box(box.z, box.top, box.left, hole.top - box.top, box.width),
        Box(box.z, hole.rows.stop, box.left, box.rows.stop - hole.rows.stop, box.width),
        Box(box.z, hole.top, box.left, hole.height, hole.left - box.left),
        Box(box.z, hole.top, hole.columns.stop, hole.height, box.columns.stop - hole.columns.stop),
    ]
    return [piece for piece in pieces if piece.height and piece.width]
