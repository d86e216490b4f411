"""What the parts of a mosaic run hand each other: where blocks lie, what is read of them, what is known afterwards.

A mosaic is a stack of slices ``[Z, H, W]``, mostly of one. All tiles of a slice lie on one grid
(:func:`hpddrnet_trt.inference.tiling.plan_tiles` of the whole slice), so a pixel's scores do not depend on the block it
is computed in. A block is what one worker does at a time: it is read, segmented with every tile that has a say in it,
and written; tiles at its border are computed by the neighboring block as well, which is the price of blocks that
need nothing of each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.manifest import IGNORE_INDEX
from hpddrnet_trt.inference.runner import Tile

NO_DATA = IGNORE_INDEX  # label of pixels that are empty or could not be read
CELL = 64  # pixels along each side that are one pixel of the coarse maps; what is empty is known of whole cells
CHUNK = 1024  # pixels along each side of a chunk of the labels
SHARD = 4096  # and of a shard, which one worker writes at a time
BLOCK = 8192  # pixels along each side of a block, unless told otherwise; a multiple of SHARD


class Box(NamedTuple):
    """A rectangle of slice ``z``, in pixels of the mosaic."""

    z: int
    top: int
    left: int
    height: int
    width: int

    @property
    def rows(self) -> slice:
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        return slice(self.left, self.left + self.width)

    def common(self, other: Box) -> Box:
        """What lies in both, without height or width where nothing does."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        bottom, right = min(self.rows.stop, other.rows.stop), min(self.columns.stop, other.columns.stop)
        return Box(self.z, top, left, max(0, bottom - top), max(0, right - left))

    def within(self, outer: Box) -> tuple[slice, slice]:
        """Its rows and columns in an array of ``outer``, which it lies in."""
        top, left = self.top - outer.top, self.left - outer.left
        return slice(top, top + self.height), slice(left, left + self.width)

    @property
    def name(self) -> str:
        """``z0-y8192-x0``: unique in a layout, and how people and files name a block."""
        return f"z{self.z}-y{self.top}-x{self.left}"


@dataclass(frozen=True)
class Layout:
    """Blocks of at most ``block`` pixels along each side that cover a mosaic of ``shape`` = (slices, height, width)."""

    shape: tuple[int, int, int]
    block: int = BLOCK

    def __iter__(self) -> Iterator[Box]:
        """All blocks: slice by slice, row by row, from left to right."""
        slices, height, width = self.shape
        for z in range(slices):
            for top in range(0, height, self.block):
                for left in range(0, width, self.block):
                    yield Box(z, top, left, min(self.block, height - top), min(self.block, width - left))

    def __len__(self) -> int:
        slices, height, width = self.shape
        return slices * -(-height // self.block) * -(-width // self.block)


class Piece(NamedTuple):
    """Pixels of a source: ``pixels`` ``[h, w]`` in its own type, its ``fill_value`` where there are none;
    ``unreadable``: the parts of them that are damaged (and hold ``fill_value``), each with one sentence of why."""

    pixels: npt.NDArray[Any]
    unreadable: tuple[tuple[Box, str], ...] = ()


class Source(Protocol):
    """A mosaic or volume that is read in pieces. Can be pickled; what it opens, it opens where it reads.

    ``path``: what people call it. ``shape``: (slices, height, width). ``dtype``: uint8, uint16 or float32, as
    :meth:`read` gives it. ``fill_value``: the grey value of pixels that were never acquired. ``pixel_size_m``,
    ``spacing_m``: metres from pixel to pixel and from slice to slice, None where unknown. ``unit``: rows and columns
    that are decoded together (a chunk, a shard, a tile of a TIFF); reads along these borders cost least.
    """

    path: Path
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    fill_value: float
    pixel_size_m: float | None
    spacing_m: float | None
    unit: tuple[int, int]

    def read(self, box: Box) -> Piece:
        """The pixels of ``box``, which lies inside the mosaic; damaged parts are named, not raised."""
        ...

    def signature(self, box: Box) -> str:
        """Another one when the files of ``box`` have changed (their sizes and times, not their content)."""
        ...

    def sample(self, pixels: int) -> npt.NDArray[Any]:
        """About so many pixels of the whole mosaic, evenly spread and always the same, without ``fill_value``; one
        dimension. For the grey window."""
        ...


@dataclass(frozen=True)
class MosaicSettings:
    """How every block is segmented: what the result depends on, chosen once for the mosaic. JSON-able.

    ``model``: the file as people give it; ``model_sha256`` of it. ``engine``, ``precision``, ``threads``, ``device``:
    as :func:`~hpddrnet_trt.inference.segmenter.load_segmenter` takes them; ``threads`` of each worker, since another
    number may round differently. ``window``: grey values that become black and white. ``factor``: the network sees so
    many pixels for one of the mosaic, along each side. ``runtime``: what the engine says of itself, with version,
    processor and arithmetic; that of every worker says the same. ``skip_empty``: whether cells of nothing but the
    source's ``fill_value`` are empty.
    """

    model: str
    model_sha256: str
    engine: str
    precision: str
    threads: int | None
    device: str | None
    window: tuple[float, float]
    factor: float
    tile: Tile
    block: int = BLOCK
    runtime: str = ""
    skip_empty: bool = True

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@dataclass(frozen=True)
class BlockRecord:
    """What is known of a block that is done; all figures of the whole mosaic are sums over records. JSON-able.

    ``pixels``: of each class; ``foreign_pixels``: those of them that tiles foreign to the model decide.
    ``empty``, ``unreadable``: pixels without a label. ``problems``: one sentence for each damaged part.
    ``tiles``: the tiles computed; ``own_tiles``: those whose say begins in the block (the first pixel in which their
    weight is not 0), by the domain's state, so that each of the mosaic counts once. ``seam_pixels``: pixels that two
    neighboring tiles both see (counted by the block that owns the second of them), and to how many of them the two give
    different labels. Tiles that see empty cells alone are not computed, and count nowhere.
    ``signature``: of what was read. ``checksum``: SHA-256 of the block's labels. ``seconds``: by stage (``read``,
    ``compute``, ``write``). ``bytes_read``: of pixels. ``peak_bytes``: the worker's greatest resident memory so far.
    """

    block: Box
    pixels: tuple[int, ...]
    foreign_pixels: tuple[int, ...]
    empty: int
    unreadable: int
    problems: tuple[str, ...]
    tiles: int
    own_tiles: dict[str, int]
    seam_pixels: tuple[int, int]
    signature: str
    checksum: str
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_read: int = 0
    peak_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "block": list(self.block)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BlockRecord:
        """The inverse of :meth:`as_dict`, also after a way through JSON."""
        lists = ("pixels", "foreign_pixels", "problems", "seam_pixels")
        tuples = {key: tuple(values[key]) for key in lists}
        return cls(**{**values, **tuples, "block": Box(*values["block"])})


@dataclass(frozen=True)
class BlockResult:
    """A segmented block: ``labels`` uint8 ``[h, w]``, :data:`NO_DATA` where there are none; for each :data:`CELL` of it
    (the last ones of a row or column may be smaller) ``confidence`` and ``distance``, float32, NaN where not known: the
    mean probability of the label, and the distance from the training pictures of the tile that decides the cell's
    middle."""

    labels: npt.NDArray[np.uint8]
    confidence: npt.NDArray[np.float32]
    distance: npt.NDArray[np.float32]
    record: BlockRecord
