"""The main table as data, one per size and batch: the same columns for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

from hpddrnet_trt.benchmark.result import BenchmarkResult, Memory, Row, Timing
from hpddrnet_trt.benchmark.shapes import Shape, at, timed_shapes
from hpddrnet_trt.benchmark.wording import interval_text, miou_change, points
from hpddrnet_trt.core.text import number, percent


class Cell(NamedTuple):
    """A value and what is to be said about it in small print."""

    text: str
    note: str = ""


class Line(NamedTuple):
    """One entry at one size and batch."""

    result: BenchmarkResult
    row: Row
    shape: Shape
    timing: Timing

    @property
    def is_reference(self) -> bool:
        return self.row.label == self.result.reference


class Column(NamedTuple):
    """``group`` stands above columns that belong together; ``cell`` gives None where there is no value.

    ``plain``: the heading in a terminal, empty for what only the page shows."""

    group: str
    title: str
    unit: str
    plain: str
    cell: Callable[[Line], Cell | None]


class Table(NamedTuple):
    """What is shown of one size and batch. Cells are in the order of ``columns``, those without any value left out."""

    shape: Shape
    columns: list[Column]
    lines: list[tuple[Line, list[Cell | None]]]
    fastest: str
    remarks: list[str]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Each group's name and number of columns."""
        return [(name, len(list(inside))) for name, inside in groupby(column.group for column in self.columns)]


def tables(result: BenchmarkResult) -> list[Table]:
    """A table per size and batch."""
    return [_table(result, shape) for shape in timed_shapes(result)]


def _table(result: BenchmarkResult, shape: Shape) -> Table:
    lines = [
        Line(result, row, shape, timing)
        for row in result.measured
        if (timing := at(row.timings, shape)) is not None
    ]  # fmt: skip
    cells = {column: [column.cell(line) for line in lines] for column in COLUMNS}
    columns = [column for column in COLUMNS if any(cell is not None for cell in cells[column])]
    shown = [(line, [cells[column][place] for column in columns]) for place, line in enumerate(lines)]
    return Table(shape, columns, shown, min(lines, key=lambda line: line.timing.p50_ms).row.label, _remarks(lines))


def _remarks(lines: Sequence[Line]) -> list[str]:
    unsteady = [line.row.label for line in lines if line.timing.steady is False]
    if not unsteady:
        return []
    return [f"times had not become steady when timing began: {', '.join(unsteady)}"]


# -- cells -----------------------------------------------------------------------------------------


def _engine(line: Line) -> Cell:
    return Cell(line.row.label, line.row.runtime)


def _speed_up(line: Line) -> Cell | None:
    ratio = line.timing.ratio
    if line.is_reference:
        return Cell("reference")
    return None if ratio is None else Cell(f"{number(ratio.value)}×", interval_text(ratio))


def _pipelined(line: Line) -> Cell | None:
    found = at(line.row.throughput, line.shape)
    return None if found is None else Cell(number(found.images_per_s))


def _network(line: Line) -> Cell | None:
    found = at(line.row.network, line.shape)
    return None if found is None else Cell(number(found.p50_ms))


def _joules(line: Line) -> Cell | None:
    """Of the run with several batches in flight: that is how many images are processed."""
    found = at(line.row.throughput, line.shape)
    return None if found is None or found.joules_per_image is None else Cell(number(found.joules_per_image))


def _miou(line: Line) -> Cell | None:
    accuracy = line.row.accuracy
    if accuracy is None or accuracy.miou is None:
        return None
    change = miou_change(line.result, line.row)
    return Cell(percent(accuracy.miou), "" if change is None else f"{points(change)} points")


def _agreement(line: Line) -> Cell | None:
    accuracy = line.row.accuracy
    return None if accuracy is None or accuracy.agreement is None else Cell(percent(accuracy.agreement, 3))


def _memory(line: Line) -> Memory | None:
    """Of this size alone, or of the process that started the engine when that ran this size."""
    found, start = at(line.row.memory, line.shape), line.row.start
    if found is not None or start is None:
        return found
    shape = line.shape
    if start.frame != f"{shape.batch}x{shape.height}x{shape.width}":
        return None
    return Memory(**shape._asdict(), host_peak_mib=start.host_peak_mib, device_mib=start.device_mib)


def _host(line: Line) -> Cell | None:
    memory = _memory(line)
    return None if memory is None else Cell(f"{memory.host_peak_mib:.0f}")


def _device(line: Line) -> Cell | None:
    memory = _memory(line)
    return None if memory is None or memory.device_mib is None else Cell(f"{memory.device_mib:.0f}")


def _start(line: Line) -> Cell | None:
    start = line.row.start
    return None if start is None else Cell(f"{number(start.load_s)} + {number(start.first_s)}")


def _build(line: Line) -> Cell | None:
    return None if line.row.build_s is None else Cell(number(line.row.build_s))


def _attention(line: Line) -> Cell | None:
    return None if line.row.attention is None else Cell(line.row.attention)


_LATENCY = "frame to labels, one at a time"
COLUMNS = (
    Column("", "engine", "", "engine", _engine),
    Column(_LATENCY, "p50", "ms", "p50 ms", lambda line: Cell(number(line.timing.p50_ms))),
    Column(_LATENCY, "p95", "ms", "p95 ms", lambda line: Cell(number(line.timing.p95_ms))),
    Column(_LATENCY, "p99", "ms", "p99 ms", lambda line: Cell(number(line.timing.p99_ms))),
    Column(_LATENCY, "max", "ms", "max ms", lambda line: Cell(number(line.timing.max_ms))),
    Column(_LATENCY, "images/s", "", "images/s", lambda line: Cell(number(line.timing.images_per_s))),
    Column(_LATENCY, "speed-up", "95 % interval", "speed-up [95 %]", _speed_up),
    Column("pipelined", "images/s", "", "pipelined/s", _pipelined),
    Column("network only", "p50", "ms", "network ms", _network),
    Column("accuracy", "mIoU", "change", "mIoU", _miou),
    Column("accuracy", "agreement", "with reference", "agreement", _agreement),
    Column("peak memory", "host", "MiB", "host MiB", _host),
    Column("peak memory", "GPU", "MiB", "GPU MiB", _device),
    Column("energy", "J/image", "", "J/image", _joules),
    Column("file", "MB", "", "file MB", lambda line: Cell(f"{line.row.file_bytes / 1e6:.1f}")),
    Column("file", "load + first", "s", "", _start),
    Column("file", "build", "s", "", _build),
    Column("file", "attention", "", "", _attention),
)
