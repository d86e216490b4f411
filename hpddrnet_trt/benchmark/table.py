"""What is shown of a result: one list of columns, for the page, the terminal and the CSV file.

A column is one entry of :data:`COLUMNS`. A value that is already in the result needs nothing else; one that is newly
measured needs its field in :mod:`~hpddrnet_trt.benchmark.result` and the code that measures it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, NamedTuple

from hpddrnet_trt.benchmark.result import (
    MEASURES,
    Accuracy,
    BenchmarkResult,
    Measure,
    Memory,
    Row,
    Shape,
    Start,
    Timing,
    at,
    timed_shapes,
)
from hpddrnet_trt.benchmark.timing import Ratio
from hpddrnet_trt.core.text import aligned, number, percent


class Line(NamedTuple):
    """One entry at one size and batch; None for an entry that did not run."""

    result: BenchmarkResult
    row: Row
    shape: Shape | None

    @property
    def is_reference(self) -> bool:
        return self.row.label == self.result.reference

    def timing(self, measure: Measure = "end_to_end") -> Timing | None:
        return None if self.shape is None else at(getattr(self.row, measure), self.shape)

    @property
    def memory(self) -> Memory | None:
        """Of this size alone, or of the process that started the engine when that ran this size."""
        start, shape = self.row.start, self.shape
        if shape is None:
            return None
        alone = at(self.row.memory, shape)
        if alone is None and start is not None and start.frame == f"{shape.batch}x{shape.height}x{shape.width}":
            return Memory(**shape._asdict(), host_peak_mib=start.host_peak_mib, device_mib=start.device_mib)
        return alone


@dataclass(frozen=True)
class Column:
    """One value of a line.

    ``key``: its heading in the CSV file, empty for what is not there. ``value``: None where there is none. On the page
    ``group`` stands above columns that belong together; ``title`` is empty for what is not shown there.
    ``plain``: the heading in a terminal, empty likewise. ``text``: how the value is written; ``note``: small
    print beside it.
    """

    key: str
    value: Callable[[Line], Any]
    group: str = ""
    title: str = ""
    unit: str = ""
    plain: str = ""
    text: Callable[[Any], str] = str
    note: Callable[[Line], str] | None = None

    def cell(self, line: Line) -> Cell | None:
        value = self.value(line)
        if value is None:
            return None
        exact = float(value) if isinstance(value, int | float) else None
        return Cell(self.text(value), self.note(line) if self.note is not None else "", exact)


class Cell(NamedTuple):
    """A value and what is to be said about it in small print; ``value``: what it is sorted by instead of its text."""

    text: str
    note: str = ""
    value: float | None = None


# -- the columns -----------------------------------------------------------------------------------


def _of(part: str, name: str) -> Callable[[Line], Any]:
    """A field of a part of the row, or of the line's memory; None where there is no such part."""

    def value(line: Line) -> Any:
        record = line.memory if part == "memory" else getattr(line.row, part)
        return None if record is None else getattr(record, name)

    return value


def _timed(measure: Measure, name: str) -> Callable[[Line], Any]:
    """A field of a measure at the line's size."""

    def value(line: Line) -> Any:
        timing = line.timing(measure)
        return None if timing is None else getattr(timing, name)

    return value


def _ratio(name: str) -> Callable[[Line], Any]:
    def value(line: Line) -> Any:
        timing = line.timing()
        return None if timing is None or timing.ratio is None else getattr(timing.ratio, name)

    return value


def _interval(line: Line) -> str:
    timing = line.timing()
    if line.is_reference:
        return "reference"
    return "" if timing is None or timing.ratio is None else interval_text(timing.ratio)


def _miou_note(line: Line) -> str:
    change = miou_change(line.result, line.row)
    return "" if change is None else f"{points(change)} points"


def _miou_interval(line: Line, part: Literal["text", "low", "high", "units"]) -> Any:
    found = None if line.row.accuracy is None else line.row.accuracy.miou_interval
    if found is None:
        return None
    return (found.text(1, 100) or None) if part == "text" else getattr(found, part)


def _start_text(start: Start) -> str:
    return f"{number(start.load_s)} + {number(start.first_s)}"


def _whole(value: float) -> str:
    return f"{value:.0f}"


_END, _INFERENCE, _PIPELINED = "end-to-end latency, one at a time", "inference", "pipelined"
COLUMNS = (
    Column("label", lambda line: line.row.label, "", "engine", "", "engine", note=lambda line: line.row.runtime),
    Column("precision", lambda line: line.row.precision),
    Column("runtime", lambda line: line.row.runtime),
    Column("status", lambda line: line.row.status),
    Column("reason", lambda line: line.row.reason),
    Column("height", lambda line: line.shape and line.shape.height),
    Column("width", lambda line: line.shape and line.shape.width),
    Column("batch", lambda line: line.shape and line.shape.batch),
    Column("end_to_end_p50_ms", _timed("end_to_end", "p50_ms"), _END, "p50", "ms", "p50 ms", number),
    Column("end_to_end_p95_ms", _timed("end_to_end", "p95_ms"), _END, "p95", "ms", "p95 ms", number),
    Column("end_to_end_p99_ms", _timed("end_to_end", "p99_ms"), _END, "p99", "ms", "p99 ms", number),
    Column("end_to_end_max_ms", _timed("end_to_end", "max_ms"), _END, "max", "ms", "max ms", number),
    Column("images_per_s", _timed("end_to_end", "images_per_s"), _END, "images/s", "", "images/s", number),
    Column("speed_up", _ratio("value"), _END, "speed-up", "95 % interval", "speed-up [95 %]",
           lambda value: f"{number(value)}×", _interval),
    Column("speed_up_low", _ratio("low")),
    Column("speed_up_high", _ratio("high")),
    Column("speed_up_wide", _ratio("wide")),
    Column("speed_up_paired", _ratio("paired")),
    Column("end_to_end_cold_ms", _timed("end_to_end", "cold_ms"), _END, "first of a turn", "ms", "first ms", number),
    Column("rounds", _timed("end_to_end", "rounds")),
    Column("burst", _timed("end_to_end", "burst")),
    Column("uncounted", _timed("end_to_end", "uncounted")),
    Column("warmup", _timed("end_to_end", "warmup")),
    Column("steady", _timed("end_to_end", "steady")),
    Column("throughput_images_per_s", _timed("throughput", "images_per_s"), _PIPELINED, "images/s", "", "pipelined/s",
           number),
    Column("inference_p50_ms", _timed("inference", "p50_ms"), _INFERENCE, "p50", "ms", "inference ms", number),
    Column("inference_by_events", _timed("inference", "by_events")),
    Column("inference_p95_ms", _timed("inference", "p95_ms")),
    Column("inference_p99_ms", _timed("inference", "p99_ms")),
    Column("inference_max_ms", _timed("inference", "max_ms")),
    Column("images", _of("accuracy", "images")),
    Column("miou", _of("accuracy", "miou"), "accuracy", "mIoU", "change", "mIoU", percent, _miou_note),
    Column("", lambda line: _miou_interval(line, "text"), "accuracy", "mIoU interval", "95 %", "mIoU [95 %]"),
    Column("miou_low", lambda line: _miou_interval(line, "low")),
    Column("miou_high", lambda line: _miou_interval(line, "high")),
    Column("miou_units", lambda line: _miou_interval(line, "units")),
    Column("masked_miou", _of("accuracy", "masked_miou")),
    Column("agreement", _of("accuracy", "agreement"), "accuracy", "agreement", "with reference", "agreement",
           lambda value: percent(value, 3)),
    Column("pixel_accuracy", _of("accuracy", "pixel_accuracy")),
    Column("host_peak_mib", _of("memory", "host_peak_mib"), "peak memory", "host", "MiB", "host MiB", _whole),
    Column("device_mib", _of("memory", "device_mib"), "peak memory", "GPU", "MiB", "GPU MiB", _whole),
    # Of the run with several batches in flight: that is how many images are processed.
    Column("joules_per_image", _timed("throughput", "joules_per_image"), "energy", "J/image", "", "J/image", number),
    Column("file", lambda line: line.row.file),
    Column("file_bytes", lambda line: line.row.file_bytes, "file", "MB", "", "file MB",
           lambda value: f"{value / 1e6:.1f}"),
    Column("", lambda line: line.row.start, "file", "load + first", "s", "", _start_text),
    Column("load_s", _of("start", "load_s")),
    Column("first_s", _of("start", "first_s")),
    Column("build_s", lambda line: line.row.build_s, "file", "build", "s", "", number),
    Column("attention", lambda line: line.row.attention, "file", "attention"),
)  # fmt: skip


# -- the page's tables -----------------------------------------------------------------------------


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
    timed = [(Line(result, row, shape), timing) for row in result.measured if (timing := at(row.end_to_end, shape))]
    cells = {column: [column.cell(line) for line, _ in timed] for column in COLUMNS if column.title}
    columns = [column for column, values in cells.items() if any(values)]
    lines = [(line, [cells[column][place] for column in columns]) for place, (line, _) in enumerate(timed)]
    fastest = min(timed, key=lambda pair: pair[1].p50_ms)[0].row.label
    unsteady = [line.row.label for line, timing in timed if timing.steady is False]
    remarks = [f"times had not become steady when timing began: {', '.join(unsteady)}"] if unsteady else []
    return Table(shape, columns, lines, fastest, remarks)


# -- terminal and CSV ------------------------------------------------------------------------------


def format_table(result: BenchmarkResult) -> str:
    """A table per size and batch, then remarks, entries that did not run, and warnings."""
    text = [_block(table) for table in tables(result)]
    text += miou_remarks(result)
    text += [f"{row.label}: {note}" for row in result.measured for note in row.notes]
    text += [f"{row.label}: {state_of(row)}: {row.reason}" for row in result.not_run]
    text += [f"warning: {warning}" for warning in result.warnings]
    return "\n".join(text)


def miou_remarks(result: BenchmarkResult) -> list[str]:
    """What is to be known of the intervals of the mIoU, or why there are none; the same of all entries."""
    found = [row.accuracy.miou_interval for row in result.measured if row.accuracy and row.accuracy.miou_interval]
    return list(dict.fromkeys(
        f"mIoU: {interval.remark or f'95 % interval over {interval.units} {interval.of}'}" for interval in found
    ))  # fmt: skip


def state_of(row: Row) -> str:
    """An engine file that is here was built, even if nothing here runs it."""
    if row.status == "measured":
        return "measured"
    return "built, not run" if row.file.endswith(".engine") else "not run"


def _block(table: Table) -> str:
    shown = [place for place, column in enumerate(table.columns) if column.plain]
    header = [table.columns[place].plain for place in shown]
    lines = [[_plain(cells[place], first=place == 0) for place in shown] for _, cells in table.lines]
    rows = aligned([header, *lines], left={0})
    rule = "-" * max(map(len, rows))
    return "\n".join([f"{table.shape}, {MEASURES['end_to_end']}", rows[0], rule, *rows[1:], *table.remarks, ""])


def _plain(cell: Cell | None, *, first: bool) -> str:
    if cell is None:
        return "–"
    return cell.text if first or not cell.note else f"{cell.text} {cell.note}"


def to_csv(result: BenchmarkResult) -> str:
    """A row per entry, frame size and batch; an entry that did not run is one row with its reason."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*(column.key for column in COLUMNS if column.key),
                     *(f"iou_{entry.name}" for entry in result.classes)])  # fmt: skip
    for row in result.rows:
        ious = row.accuracy.iou if row.accuracy is not None else []
        shapes: list[Shape | None] = [timing.shape for timing in row.end_to_end]
        for line in [Line(result, row, shape) for shape in shapes or [None]]:
            writer.writerow([*(column.value(line) for column in COLUMNS if column.key), *ious])
    return stream.getvalue()


# -- words -----------------------------------------------------------------------------------------


def ratio_text(ratio: Ratio | None) -> str:
    """E.g. ``2.46× [2.41, 2.52]``; says so when the interval is wide or missing, or the rows were not interleaved."""
    return "–" if ratio is None else f"{number(ratio.value)}× {interval_text(ratio)}"


def interval_text(ratio: Ratio) -> str:
    """E.g. ``[2.41, 2.52] (wide, not interleaved)``."""
    if ratio.low is None or ratio.high is None:
        return "(too few rounds for an interval)"
    doubts = [word for word, said in (("wide", ratio.wide), ("not interleaved", not ratio.paired)) if said]
    text = f"[{number(ratio.low)}, {number(ratio.high)}]"
    return f"{text} ({', '.join(doubts)})" if doubts else text


def miou(accuracy: Accuracy | None) -> float | None:
    return None if accuracy is None else accuracy.miou


def miou_change(result: BenchmarkResult, row: Row) -> float | None:
    """mIoU minus the reference's, in points (hundredths); None for the reference and without masks."""
    reference = next((other.accuracy for other in result.rows if other.label == result.reference), None)
    own, best = miou(row.accuracy), miou(reference)
    return None if row.label == result.reference or own is None or best is None else 100 * (own - best)


def points(change: float) -> str:
    """E.g. ``−0.12`` or ``+0.03``, with a real minus sign; ``±0.00`` for what rounds to nothing."""
    text = f"{change:+.2f}"
    return "±0.00" if text[1:] == "0.00" else text.replace("-", "−")


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith((".", "!", "?")) else ".")
