"""Result files: what is stored comes back, old formats are still read, new ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpddrnet_trt.benchmark.result import BenchmarkResult, Settings, load_result, make_settings
from hpddrnet_trt.core.errors import BadInputFile, UsageError
from hpddrnet_trt.report.benchmark import write_report

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_results_come_back_as_they_were(measured: BenchmarkResult, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(measured.to_json())
    assert load_result(path) == measured
    record = json.loads(measured.to_json())
    before = json.loads(measured.to_json())  # as version 4 wrote it, without intervals of the mIoU
    for row in before["rows"]:
        if row["accuracy"]:
            del row["accuracy"]["miou_interval"]
    path.write_text(json.dumps({**before, "schema_version": 4}))
    older = load_result(path)
    assert [row.end_to_end for row in older.rows] == [row.end_to_end for row in measured.rows]
    assert all(row.accuracy is None or row.accuracy.miou_interval is None for row in older.rows)
    record["rows"][0]["end_to_end"][0]["burst"] += 100
    path.write_text(json.dumps(record))
    with pytest.raises(BadInputFile, match="samples are no rounds of"):
        load_result(path)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_committed_result_is_read_and_reported(path: Path, tmp_path: Path) -> None:
    stored, result = json.loads(path.read_text()), load_result(path)
    for row, old in zip(result.rows, stored["rows"], strict=True):
        assert row.label == old["label"]
        for measure, name in (("end_to_end", "timings"), ("inference", "network"), ("throughput", "throughput")):
            samples = [timing["samples_ms"] for timing in old.get(name, [])]
            assert [timing.samples_ms for timing in getattr(row, measure)] == samples
        assert [bound.milliseconds for bound in row.bounds] == [roof["floor_ms"] for roof in old.get("roofs", [])]
    if stored.get("ceilings"):
        assert result.bound_source is not None
        assert stored["ceilings"]["device"] in result.bound_source
    assert result.settings.inference == stored["settings"].get("network_only", False)
    assert (result.schema_version, len(result.rows)) == (5, len(stored["rows"]))
    assert result.settings.burst_ms == 0  # one run a turn then
    assert {timing.burst for row in result.rows for timing in row.end_to_end} == {1}
    if stored["schema_version"] == 1:  # what was not measured then
        assert result.settings.batches == (stored["settings"]["batch"],)
        assert not result.settings.throughput
        assert not any([*row.inference, *row.throughput, *row.memory] for row in result.rows)
        (environment,) = result.environments
        assert environment.libraries == stored["machine"]["libraries"]
        assert environment.command == stored["command"]
    assert load_result(write_report(result, tmp_path).json) == result


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"schema_version": 6}', "has the format 6 of benchmark results, this version reads up to 5"),
        ('{"schema_version": 5}', "not a benchmark result"),
        ('{"schema_version": 4}', "not a benchmark result"),
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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"memory_sizes": ((100, 96),)}, "size 100x96 is not a multiple of 8"),
        ({"batches": (4, 0)}, "batch 0 is less than 1"),
        ({"batches": ()}, "batches"),
        ({"rounds": 0}, "setting rounds is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_settings(**given)
    assert make_settings(rounds=3) == Settings(rounds=3)
