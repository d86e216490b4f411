"""Result files: what is stored comes back, old formats are still read, new ones are refused."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from hpddrnet_trt.benchmark.result import BenchmarkResult, Ratio, load_result, make_settings
from hpddrnet_trt.core.errors import BadInputFile, UsageError

VERSION_1 = Path(__file__).parents[2] / "benchmarks" / "results" / "amd-epyc-2026-11-21.json"


def test_results_come_back_as_they_were(measured: BenchmarkResult, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(measured.to_json())
    assert load_result(path) == measured


def test_a_result_of_the_first_format_is_still_read() -> None:
    stored = json.loads(VERSION_1.read_text())
    assert stored["schema_version"] == 1
    result = load_result(VERSION_1)
    assert result.schema_version == 2
    assert result.settings.batches == (stored["settings"]["batch"],)
    assert not result.settings.throughput  # was not measured then
    assert [row.label for row in result.rows] == [row["label"] for row in stored["rows"]]
    for row, old in zip(result.rows, stored["rows"], strict=True):
        assert [timing.samples_ms for timing in row.timings] == [timing["samples_ms"] for timing in old["timings"]]
        assert (row.network, row.throughput, row.memory) == ([], [], [])
        assert all(timing.ratio is None or timing.ratio.paired for timing in row.timings)
    (environment,) = result.environments
    assert environment.libraries == stored["machine"]["libraries"]
    assert environment.command == stored["command"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"schema_version": 3}', "has the format 3 of benchmark results, this version reads up to 2"),
        ('{"schema_version": 2}', "not a benchmark result"),
        ('{"schema_version": 1, "settings": 5}', "not a benchmark result"),
        ("[]", "not a benchmark result"),
        ("{", "not a benchmark result"),
        ("\xff", "not a benchmark result"),
    ],
)
def test_files_that_cannot_be_read_say_why(content: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(BadInputFile, match=reason):
        load_result(path)


def test_csv_has_a_row_for_every_measure_size_and_batch(measured: BenchmarkResult) -> None:
    rows = list(csv.DictReader(io.StringIO(measured.to_csv())))
    plain = [row for row in rows if row["label"] == "plain"]
    timings = [(measure, timing) for measure, found in measured.rows[0].measures() for timing in found]
    assert [float(row["p50_ms"]) for row in plain] == [timing.p50_ms for _, timing in timings]
    assert {row["measure"] for row in plain} >= {"frame to labels", "throughput"}
    assert {(row["batch"], row["height"]) for row in plain} == {("1", "32"), ("2", "32"), ("1", "64"), ("2", "64")}
    assert all(row["ratio_wide"] in ("True", "False") for row in plain)
    (cut,) = [row for row in rows if row["label"] == "cut"]
    assert cut["reason"]
    assert cut["measure"] == ""


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="size 100x96 is not a multiple of 8"):
        make_settings(memory_sizes=((100, 96),))
    with pytest.raises(UsageError, match="batch 0 is less than 1"):
        make_settings(batches=(4, 0))
    with pytest.raises(UsageError, match="batches"):
        make_settings(batches=())


def test_a_ratio_without_a_narrow_interval_is_wide() -> None:
    assert Ratio(value=2).wide
    assert Ratio(value=2, low=1.7, high=2.2).wide
    assert not Ratio(value=2, low=1.9, high=2.1).wide
