"""What changed between two results, and several installations' results as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpddrnet_trt.benchmark.compare import Change, compare, differences, format_changes, merge
from hpddrnet_trt.benchmark.machine import Gpu
from hpddrnet_trt.benchmark.result import BenchmarkResult, Environment, Row, Shape, Timing, load_result
from hpddrnet_trt.benchmark.timing import Ratio
from hpddrnet_trt.core.errors import UsageError

VERSION_1 = Path(__file__).parents[2] / "benchmarks" / "results" / "amd-epyc-2026-11-21.json"


def change_row(row: Row, factor: float, **changes: Any) -> Row:
    """A copy with all times multiplied."""
    times = {measure: [multiplied(timing, factor) for timing in timings] for measure, timings in row.measures()}
    return row.model_copy(update={**times, **changes})


def multiplied(timing: Timing, factor: float) -> Timing:
    samples = [factor * value for value in timing.samples_ms]
    return timing.model_copy(update={"samples_ms": samples, "p50_ms": factor * timing.p50_ms})


def by_label(changes: list[Change], label: str) -> list[Change]:
    return [change for change in changes if change.label == label]


def with_samples(result: BenchmarkResult, label: str, centre: float, seed: int, rounds: int = 40) -> BenchmarkResult:
    """The result with new frame-to-labels samples around ``centre`` ms for one entry."""
    rng = np.random.default_rng(seed)
    rows = []
    for row in result.rows:
        if row.label == label:
            samples = [(centre * rng.lognormal(0, 0.05, rounds)).tolist() for _ in row.end_to_end]
            timings = [
                timing.model_copy(update={"samples_ms": one, "p50_ms": float(np.median(one))})
                for timing, one in zip(row.end_to_end, samples, strict=True)
            ]
            row = row.model_copy(update={"end_to_end": timings})
        rows.append(row)
    return result.model_copy(update={"rows": rows})


def test_a_result_against_itself_shows_no_difference(measured: BenchmarkResult) -> None:
    changes = compare(measured, measured)
    assert len(changes) == sum(len(timings) for row in measured.rows for _, timings in row.measures())
    for change in changes:
        assert change.verdict == "no difference"
        assert change.ratio is not None
        assert (change.ratio.value, change.ratio.paired) == (1, False)
        assert (change.host_mib_change, change.device_mib_change) == (0, None)
        assert change.miou_change == 0
    assert differences(measured, measured) == []


def test_faster_slower_and_the_same_are_told(measured: BenchmarkResult) -> None:
    old = with_samples(with_samples(measured, "plain", 10, seed=1), "small", 10, seed=2)
    for centre, verdict in ((5, "faster"), (20, "slower"), (10, "no difference")):
        new = with_samples(old, "small", centre, seed=7, rounds=25)  # rounds need not be equal
        changes = [change for change in by_label(compare(old, new), "small") if change.measure == "end_to_end"]
        assert {change.verdict for change in changes} == {verdict}
        for change in changes:
            assert change.old_ms is not None
            assert change.new_ms is not None
            assert change.ratio is not None
            assert change.ratio.value == pytest.approx(change.old_ms / change.new_ms)
        assert {change.verdict for change in by_label(compare(old, new), "plain")} == {"no difference"}
    few = with_samples(old, "small", 5, seed=3, rounds=4)
    assert by_label(compare(old, few), "small")[0].verdict == "too few rounds"


def test_accuracy_and_memory_are_new_minus_old(measured: BenchmarkResult) -> None:
    plain = measured.rows[0]
    assert plain.accuracy is not None
    assert plain.accuracy.miou is not None
    accuracy = plain.accuracy.model_copy(update={"miou": plain.accuracy.miou - 0.25})
    memory = [
        one.model_copy(update={"host_peak_mib": one.host_peak_mib + 7, "device_mib": 5.0}) for one in plain.memory
    ]
    rows = [plain.model_copy(update={"accuracy": accuracy, "memory": memory}), *measured.rows[1:]]
    change = compare(measured, measured.model_copy(update={"rows": rows}))[0]
    assert change.miou_change == pytest.approx(-0.25)
    assert change.host_mib_change == pytest.approx(7)
    assert change.device_mib_change is None  # there was none before


def test_what_only_one_has_is_shown(measured: BenchmarkResult) -> None:
    renamed = measured.rows[1].model_copy(update={"label": "fresh"})
    new = measured.model_copy(update={"rows": [measured.rows[0], renamed]})
    changes = compare(measured, new)
    assert {change.verdict for change in by_label(changes, "fresh")} == {"only new"}
    assert {change.verdict for change in by_label(changes, "small")} == {"only old"}
    assert list(dict.fromkeys(change.label for change in changes)) == ["plain", "fresh", "small"]
    gone = by_label(changes, "small")[0]
    assert gone.old_ms == measured.rows[1].end_to_end[0].p50_ms
    assert (gone.new_ms, gone.ratio) == (None, None)


def test_what_else_could_explain_a_change_is_said(measured: BenchmarkResult) -> None:
    machine = measured.machine.model_copy(update={"cpu": "Another CPU"})
    environments = [
        one.model_copy(update={"libraries": {**one.libraries, "numpy": "9.9"}}) for one in measured.environments
    ]
    settings = measured.settings.model_copy(update={"threads": 2})
    new = measured.model_copy(
        update={"machine": machine, "environments": environments, "settings": settings, "complete": False}
    )
    found = differences(measured, new)
    assert len(found) == 4
    assert "Another CPU" in found[0]
    assert found[1] == f"numpy differs: {np.__version__} before, 9.9 now"
    assert found[2] == "setting threads differs: 1 before, 2 now"
    assert found[3] == "the new run was interrupted"


def test_the_table_says_when_a_ratio_is_wide(measured: BenchmarkResult) -> None:
    ratio = Ratio(value=2, low=1.95, high=2.1)
    narrow = Change("a", "end_to_end", Shape(64, 64, 1), "faster", 2.0, 1.0, ratio, 0.01, 3, None)
    wide = Change("b", "throughput", Shape(64, 64, 4), "faster", 2.0, 1.0, Ratio(value=2, low=1.2, high=3.0))
    none = Change("c", "inference", Shape(64, 64, 1), "too few rounds", 2.0, 1.0, Ratio(value=2))
    lines = format_changes([narrow, wide, none], ["GPU differs: A before, B now"]).splitlines()
    assert lines[0] == "note: GPU differs: A before, B now"
    assert lines[1].split()[:3] == ["entry", "measure", "size"]
    assert "2.00 [1.95, 2.10]" in lines[2]
    assert "wide" not in lines[2]
    assert "+0.0100" in lines[2]
    assert "2.00 [1.20, 3.00] (wide)" in lines[3]
    assert "batch 4 of 64×64" in lines[3]
    assert "2.00 (too few rounds for an interval)" in lines[4]


def test_a_published_result_of_the_first_format_can_be_compared() -> None:
    old = load_result(VERSION_1)
    faster = old.model_copy(update={"rows": [change_row(row, 0.5) for row in old.rows]})
    assert {change.verdict for change in compare(old, faster)} == {"faster"}


@pytest.fixture
def other(measured: BenchmarkResult) -> BenchmarkResult:
    """A second installation: another ONNX Runtime, an engine of its own that ran, and the lonely one now running."""
    plain, small, cut, lonely = measured.rows
    runtime = "onnxruntime 1.20.0 (CPU, 1 thread)"
    rows = [
        change_row(plain, 2.0, runtime=runtime),
        change_row(small, 2.0, label="own", runtime="TensorRT 10.13.3 (NVIDIA L4, int8)"),
        cut,
        change_row(plain, 0.5, label=lonely.label, runtime="TensorRT 10.13.3 (NVIDIA L4, fp16)", file=lonely.file),
    ]
    environment = Environment(created=measured.created, command="second", python="3.10.1", libraries={"numpy": "1.26"})
    return measured.model_copy(
        update={
            "rows": rows,
            "environments": [environment],
            "command": "second",
            "engines": {**measured.engines, "tensorrt": "10.13.3", "torch": "not available: not installed"},
        }
    )


def test_rows_of_the_other_installation_are_added(measured: BenchmarkResult, other: BenchmarkResult) -> None:
    assert merge([measured]) == measured
    merged = merge([measured, other])
    assert [(row.label, row.status, row.environment) for row in merged.rows] == [
        ("plain", "measured", 0),
        ("small", "measured", 0),
        ("cut", "not run", 0),
        ("plain (onnxruntime 1.20.0)", "measured", 1),
        ("own", "measured", 1),
        ("lonely", "measured", 1),  # did not run in the first one: that row is gone
    ]
    assert merged.rows[:3] == measured.rows[:3]
    assert [one.command for one in merged.environments] == ["python benchmark.py", "second"]
    assert merged.command == "python benchmark.py && second"
    assert merged.engines["tensorrt"] == "10.13.3"
    assert merged.engines["torch"] == measured.engines["torch"]
    assert merged.reference == "plain"
    assert any("2 installations were merged" in warning for warning in merged.warnings)
    assert BenchmarkResult.model_validate_json(merged.to_json()) == merged


def test_ratios_are_to_the_first_reference_and_not_paired(measured: BenchmarkResult, other: BenchmarkResult) -> None:
    merged = merge([measured, other])
    for row, value in ((merged.rows[3], 0.5), (merged.rows[5], 2.0)):
        for _, timings in row.measures():
            for timing in timings:
                assert timing.ratio is not None
                assert not timing.ratio.paired
                assert timing.ratio.value == pytest.approx(value)
                assert timing.ratio.low is not None
                assert timing.ratio.low <= value
    nothing = measured.model_copy(update={"reference": None})
    assert all(timing.ratio is None for timing in merge([nothing, other]).rows[3].end_to_end)


def test_agreement_with_another_reference_is_dropped(measured: BenchmarkResult, other: BenchmarkResult) -> None:
    same = merge([measured, other]).rows[4].accuracy
    assert same is not None
    assert same.agreement is not None
    foreign = other.model_copy(update={"reference": "own"})
    accuracy = merge([measured, foreign]).rows[4].accuracy
    assert accuracy is not None
    assert accuracy.agreement is None
    assert accuracy.miou == same.miou


def test_the_same_installation_twice_is_told_apart(measured: BenchmarkResult) -> None:
    merged = merge([measured, measured, measured])
    assert [row.label for row in merged.measured] == [
        "plain", "small", "plain (environment 2)", "small (environment 2)", "plain (environment 3)",
        "small (environment 3)",
    ]  # fmt: skip
    assert sum(row.status == "not run" for row in merged.rows) == 2
    assert set(merged.pictures[0].labels) == {row.label for row in merged.measured}
    assert merge([merge([measured, measured]), measured]).rows == merged.rows


def test_other_machines_data_and_classes_are_refused_and_other_settings_said(measured: BenchmarkResult) -> None:
    machine = measured.machine
    gpu = machine.model_copy(update={"gpus": [Gpu(name="NVIDIA L4", driver="580", memory_mib=23034)]})
    cpu = machine.model_copy(update={"cpu": "Another CPU"})
    for update, message in (
        ({"machine": gpu}, "their GPU differs: 'no GPU' and 'NVIDIA L4'"),
        ({"machine": cpu}, "their processor differs: .* and 'Another CPU"),
        ({"data": "other/test, 3 images"}, "their data differs: 'noise/test, 3 images' and 'other/test, 3 images'"),
        ({"classes": measured.classes[:2]}, "their classes differs: 'matrix, pore, grain' and 'matrix, pore'"),
    ):
        with pytest.raises(UsageError, match=message):
            merge([measured, measured.model_copy(update=update)])
    with pytest.raises(UsageError, match="nothing to merge"):
        merge([])
    slower = measured.model_copy(update={"settings": measured.settings.model_copy(update={"rounds": 90})})
    assert any("different settings: rounds" in warning for warning in merge([measured, slower]).warnings)
