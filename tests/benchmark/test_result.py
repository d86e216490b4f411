"""Result files: what is stored comes back, old formats are still read, new ones are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpddrnet_trt.benchmark.result import BenchmarkResult, Ratio, Settings, load_result, make_settings
from hpddrnet_trt.core.errors import BadInputFile, UsageError
from hpddrnet_trt.report.benchmark import write_report

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
VERSION_1 = RESULTS / "amd-epyc-2026-11-21.json"


def test_results_come_back_as_they_were(measured: BenchmarkResult, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(measured.to_json())
    assert load_result(path) == measured


def test_a_result_of_the_first_format_is_still_read() -> None:
    stored = json.loads(VERSION_1.read_text())
    assert stored["schema_version"] == 1
    result = load_result(VERSION_1)
    assert result.schema_version == 3
    assert result.settings.batches == (stored["settings"]["batch"],)
    assert not result.settings.throughput  # was not measured then
    assert [row.label for row in result.rows] == [row["label"] for row in stored["rows"]]
    for row, old in zip(result.rows, stored["rows"], strict=True):
        assert [timing.samples_ms for timing in row.end_to_end] == [timing["samples_ms"] for timing in old["timings"]]
        assert (row.inference, row.throughput, row.memory) == ([], [], [])
        assert all(timing.ratio is None or timing.ratio.paired for timing in row.end_to_end)
    (environment,) = result.environments
    assert environment.libraries == stored["machine"]["libraries"]
    assert environment.command == stored["command"]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_committed_result_is_read_and_reported(path: Path, tmp_path: Path) -> None:
    stored, result = json.loads(path.read_text()), load_result(path)
    for row, old in zip(result.rows, stored["rows"], strict=True):
        for measure, name in (("end_to_end", "timings"), ("inference", "network"), ("throughput", "throughput")):
            samples = [timing["samples_ms"] for timing in old.get(name, [])]
            assert [timing.samples_ms for timing in getattr(row, measure)] == samples
        assert [bound.milliseconds for bound in row.bounds] == [roof["floor_ms"] for roof in old.get("roofs", [])]
    if stored.get("ceilings"):
        assert result.bound_source is not None
        assert stored["ceilings"]["device"] in result.bound_source
    assert result.settings.inference == stored["settings"].get("network_only", False)
    assert load_result(write_report(result, tmp_path).json) == result


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"schema_version": 4}', "has the format 4 of benchmark results, this version reads up to 3"),
        ('{"schema_version": 3}', "not a benchmark result"),
        ('{"schema_version": 2}', "not a benchmark result"),
        ('{"schema_version": 2, "settings": {}, "rows": [5]}', "not a benchmark result"),
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
    with pytest.raises(BadInputFile, match="does not exist"):
        load_result(tmp_path / "none.json")


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="size 100x96 is not a multiple of 8"):
        make_settings(memory_sizes=((100, 96),))
    with pytest.raises(UsageError, match="batch 0 is less than 1"):
        make_settings(batches=(4, 0))
    with pytest.raises(UsageError, match="batches"):
        make_settings(batches=())
    with pytest.raises(UsageError, match="setting rounds is 0"):
        make_settings(rounds=0)
    assert make_settings(rounds=3) == Settings(rounds=3)


def test_a_ratio_without_a_narrow_interval_is_wide() -> None:
    assert Ratio(value=2).wide
    assert Ratio(value=2, low=1.7, high=2.2).wide
    assert not Ratio(value=2, low=1.9, high=2.1).wide
