"""The result as plain text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from hpddrnet_trt.benchmark.result import BenchmarkResult, Row
from hpddrnet_trt.benchmark.table import Cell, Table, tables


def format_table(result: BenchmarkResult) -> str:
    """A table per size and batch, then remarks, entries that did not run, and warnings."""
    text = [_block(table) for table in tables(result)]
    text += [f"{row.label}: {note}" for row in result.measured for note in row.notes]
    text += [f"{row.label}: {state_of(row)}: {row.reason}" for row in result.not_run]
    text += [f"warning: {warning}" for warning in result.warnings]
    return "\n".join(text)


def state_of(row: Row) -> str:
    """An engine file that is here was built, even if nothing here runs it."""
    if row.status == "measured":
        return "measured"
    return "built, not run" if row.file.endswith(".engine") else "not run"


def _block(table: Table) -> str:
    shown = [place for place, column in enumerate(table.columns) if column.plain]
    header = [table.columns[place].plain for place in shown]
    lines = [[_plain(cells[place], first=place == 0) for place in shown] for _, cells in table.lines]
    return "\n".join([f"{table.shape}, frame to labels", _align([header, *lines]), *table.remarks, ""])


def _plain(cell: Cell | None, *, first: bool) -> str:
    if cell is None:
        return "–"
    return cell.text if first or not cell.note else f"{cell.text} {cell.note}"


def _align(table: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    rows = [
        "  ".join(cell.rjust(width) if column else cell.ljust(width)
                  for column, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in table
    ]  # fmt: skip
    return "\n".join([rows[0], "-" * max(map(len, rows)), *rows[1:]])
