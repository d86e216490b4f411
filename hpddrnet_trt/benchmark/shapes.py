"""Sizes and batches of a result: which were measured, which one the report is about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple, Protocol, TypeVar

from hpddrnet_trt.benchmark.result import BenchmarkResult

QUOTED = (1024, 1024)  # the size at which publications on this network quote their speed


class Shaped(Protocol):
    """What was measured at one size and batch."""

    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def batch(self) -> int: ...


_Record = TypeVar("_Record", bound=Shaped)


class Shape(NamedTuple):
    """Frames of one inference."""

    height: int
    width: int
    batch: int

    @property
    def pixels(self) -> int:
        """Of one frame."""
        return self.height * self.width

    @property
    def size(self) -> str:
        return f"{self.height}×{self.width}"

    def __str__(self) -> str:
        return self.size if self.batch == 1 else f"batch {self.batch} of {self.size}"


def shape_of(record: Shaped) -> Shape:
    return Shape(record.height, record.width, record.batch)


def at(records: Iterable[_Record], shape: Shape) -> _Record | None:
    """The record of that size and batch."""
    return next((record for record in records if shape_of(record) == shape), None)


def timed_shapes(result: BenchmarkResult) -> list[Shape]:
    """Every size and batch with a latency from frame to labels: small batches first, then small sizes."""
    return _ordered(shape_of(timing) for row in result.measured for timing in row.timings)


def main_shape(result: BenchmarkResult) -> Shape | None:
    """The one to quote, None when nothing was timed; see :func:`shared_shape`."""
    return shared_shape([row.timings for row in result.measured])


def shared_shape(records: Iterable[Iterable[Shaped]]) -> Shape | None:
    """The size and batch that most entries have; among equals the smallest batch, then 1024x1024, then the largest."""
    counts = Counter(shape for of_entry in records for shape in {shape_of(record) for record in of_entry})
    if not counts:
        return None
    return max(counts, key=lambda shape: (counts[shape], -shape.batch, shape[:2] == QUOTED, shape.pixels))


def one_batch(records: Iterable[_Record], batch: int) -> list[_Record]:
    """The records of that batch, smallest frame first."""
    return sorted((record for record in records if record.batch == batch), key=lambda found: shape_of(found).pixels)


def _ordered(shapes: Iterable[Shape]) -> list[Shape]:
    return sorted(set(shapes), key=lambda shape: (shape.batch, shape.pixels, shape.height))
