"""The columns of a result: on the page, in the terminal and in the CSV file."""

from __future__ import annotations

import csv
import io
import itertools

import pytest

from hpddrnet_trt.benchmark.result import BenchmarkResult, Shape, Timing, main_shape, shared_shape, timed_shapes
from hpddrnet_trt.benchmark.table import (
    COLUMNS,
    Cell,
    Table,
    format_table,
    miou_change,
    points,
    ratio_text,
    sentence,
    tables,
    to_csv,
)
from hpddrnet_trt.benchmark.timing import Ratio
from tests.benchmark import constructed


@pytest.fixture(scope="module")
def made() -> BenchmarkResult:
    return constructed.result()


def cells(table: Table, label: str) -> dict[tuple[str, str], Cell | None]:
    """An entry's cells, without what they are sorted by, by group and title of their columns."""
    found = next(cells for line, cells in table.lines if line.row.label == label)
    shown = [None if cell is None else cell._replace(value=None) for cell in found]
    return {(column.group, column.title): cell for column, cell in zip(table.columns, shown, strict=True)}


def at(result: BenchmarkResult, shape: Shape) -> Table:
    return next(table for table in tables(result) if table.shape == shape)


def test_a_table_per_size_and_batch(made: BenchmarkResult) -> None:
    shapes = [Shape(512, 512, 1), Shape(1024, 1024, 1), Shape(2048, 2048, 1), Shape(512, 512, 4), Shape(1024, 1024, 4)]
    assert [table.shape for table in tables(made)] == timed_shapes(made) == shapes
    assert main_shape(made) == Shape(1024, 1024, 1)
    assert main_shape(made.model_copy(update={"rows": made.not_run})) is None
    for table in tables(made):
        assert (len(table.lines), table.fastest) == (len(constructed.KINDS), "TensorRT FP16")
        assert sum(count for _, count in table.groups) == len(table.columns)
        assert all(any(cells[place] for _, cells in table.lines) for place in range(len(table.columns)))


def test_each_value_stands_in_its_column(made: BenchmarkResult) -> None:
    row = made.rows[5]
    found = cells(at(made, Shape(1024, 1024, 1)), "OpenVINO INT8 Q/DQ")
    timing = next(timing for timing in row.end_to_end if (timing.height, timing.batch) == (1024, 1))
    assert found["end-to-end latency, one at a time", "p99"] == Cell(f"{timing.p99_ms:.0f}")
    assert timing.ratio is not None
    assert found["end-to-end latency, one at a time", "speed-up"] == Cell(
        f"{timing.ratio.value:.2f}×", f"[{timing.ratio.low:.2f}, {timing.ratio.high:.2f}]"
    )
    assert found["pipelined", "images/s"] == Cell(f"{row.throughput[2].images_per_s:.2f}")
    assert found["inference", "p50"] == Cell(f"{row.inference[2].p50_ms:.0f}")
    assert found["accuracy", "mIoU"] == Cell("80.98 %", "−0.25 points")
    assert found["accuracy", "mIoU interval"] == Cell("[77.0, 84.0]")
    assert found["peak memory", "host"] == Cell("500")
    assert found["peak memory", "GPU"] is None
    assert found["energy", "J/image"] == Cell("0.400")
    assert found["file", "attention"] == Cell("row blocks of 1024")
    assert cells(at(made, Shape(1024, 1024, 1)), "TensorRT FP16")["peak memory", "GPU"] == Cell("530")
    assert cells(at(made, Shape(512, 512, 4)), "PyTorch FP32")["end-to-end latency, one at a time", "speed-up"] == Cell(
        "1.00×", "reference"
    )


def test_columns_without_any_value_are_left_out(made: BenchmarkResult) -> None:
    empty = {"inference": [], "throughput": [], "memory": [], "build_s": None, "attention": None, "accuracy": None}
    poor = made.model_copy(update={"rows": [row.model_copy(update=empty) for row in made.rows]})
    titles = [(column.group, column.title) for column in at(poor, Shape(512, 512, 1)).columns]
    assert [group for group, _ in itertools.groupby(titles, lambda title: title[0])] == [
        "", "end-to-end latency, one at a time", "file",
    ]  # fmt: skip
    # The process that measured the start ran the largest frame: its memory is that frame's.
    assert cells(at(poor, Shape(2048, 2048, 1)), "PyTorch FP32")["peak memory", "host"] == Cell("3600")


def test_the_terminal_table_names_every_entry(measured: BenchmarkResult, made: BenchmarkResult) -> None:
    blocks = format_table(measured).split("\n\n")
    assert [block.splitlines()[0] for block in blocks[:4]] == [
        "32×48, end-to-end latency", "64×64, end-to-end latency", "batch 2 of 32×48, end-to-end latency",
        "batch 2 of 64×64, end-to-end latency",
    ]  # fmt: skip
    for block in blocks[:4]:
        lines = block.splitlines()
        assert [line.split()[0] for line in lines[3:5]] == ["plain", "small"]
        assert "reference" in lines[3]
    remarks = blocks[-1].splitlines()
    assert any(line.startswith("lonely: built, not run: ") for line in remarks)
    assert any(line.startswith("cut: not run: ") for line in remarks)
    lines = format_table(made).split("\n\n")[0].splitlines()
    first, second = (line.index(word) + len(word) for line, word in zip(lines[1:4:2], ("p50 ms", "157"), strict=True))
    assert first == second  # columns are aligned
    assert "times had not become steady when timing began: PyTorch FP32 compiled" in lines
    assert "mIoU: 95 % interval over 6 pictures" in format_table(made).splitlines()
    said = [line for line in format_table(measured).splitlines() if line.startswith("mIoU: ")]
    assert said == [f"mIoU: {measured.measured[0].accuracy.miou_interval.remark}"]  # type: ignore[union-attr]
    assert said[0].startswith("mIoU: no interval: ")


def timing(height: int, width: int, batch: int = 1) -> Timing:
    return Timing(height=height, width=width, batch=batch, samples_ms=[1], p50_ms=1, p95_ms=1, p99_ms=1, max_ms=1,
                  images_per_s=1000)  # fmt: skip


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([], None),
        ([[timing(64, 64)], [timing(64, 64), timing(1024, 1024)]], Shape(64, 64, 1)),  # most entries
        ([[timing(512, 512), timing(1024, 1024), timing(2048, 2048)]], Shape(1024, 1024, 1)),  # as publications
        ([[timing(512, 512), timing(256, 512)]], Shape(512, 512, 1)),  # the largest
        ([[timing(512, 512, 8), timing(256, 256)]], Shape(256, 256, 1)),  # the smallest batch
    ],
)
def test_the_size_that_is_quoted(records: list[list[Timing]], expected: Shape | None) -> None:
    assert shared_shape(records) == expected


def test_changes_of_accuracy_are_points(made: BenchmarkResult) -> None:
    assert miou_change(made, made.rows[0]) is None
    assert miou_change(made, made.rows[5]) == pytest.approx(-0.25)
    assert [points(value) for value in (-0.12, 0.034, -0.001, 0.0)] == ["−0.12", "+0.03", "±0.00", "±0.00"]
    assert [sentence(text) for text in ("a b", "A.", "")] == ["A b.", "A.", "."]


def test_csv_has_a_row_per_entry_and_shape(made: BenchmarkResult, measured: BenchmarkResult) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(made))))
    assert len(rows) == len(constructed.KINDS) * 5 + 1
    first, accuracy = made.rows[0], made.rows[0].accuracy
    assert accuracy is not None
    for row, timing, alone in zip(rows, first.end_to_end, first.inference, strict=False):
        assert (int(row["height"]), int(row["batch"])) == (timing.height, timing.batch)
        assert float(row["end_to_end_p50_ms"]) == timing.p50_ms
        assert float(row["inference_max_ms"]) == alone.max_ms
        assert (row["rounds"], row["speed_up_wide"]) == (str(constructed.ROUNDS // 2), "False")
        assert float(row["iou_secondary"]) == accuracy.iou[1]
    assert "another GPU" in rows[-1]["reason"]
    (cut,) = [row for row in csv.DictReader(io.StringIO(to_csv(measured))) if row["label"] == "cut"]
    assert cut["reason"]
    assert cut["end_to_end_p50_ms"] == cut["height"] == cut["rounds"] == ""


def test_every_column_is_shown_somewhere_under_a_name_of_its_own() -> None:
    keys = [column.key for column in COLUMNS if column.key]
    assert len(set(keys)) == len(keys)
    headings = [(column.group, column.title) for column in COLUMNS if column.title]
    assert len(set(headings)) == len(headings)
    assert all(column.key or column.title for column in COLUMNS)
    assert all(column.title for column in COLUMNS if column.plain)


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (Ratio(value=2.461, low=2.41, high=2.523), "2.46× [2.41, 2.52]"),
        (Ratio(value=2.0, low=1.5, high=2.5), "2.00× [1.50, 2.50] (wide)"),
        (Ratio(value=2.0), "2.00× (too few rounds for an interval)"),
        (Ratio(value=2.0, low=1.9, high=2.1, paired=False), "2.00× [1.90, 2.10] (not interleaved)"),
        (None, "–"),
    ],
)
def test_a_wide_or_missing_interval_is_said(ratio: Ratio | None, text: str) -> None:
    assert ratio_text(ratio) == text
