"""Several installations' results as one."""

from __future__ import annotations

from typing import Any

import pytest

from hpddrnet_trt.benchmark.machine import Gpu
from hpddrnet_trt.benchmark.merge import merge
from hpddrnet_trt.benchmark.result import BenchmarkResult, Environment, Row
from hpddrnet_trt.core.errors import UsageError


def change_row(row: Row, factor: float, **changes: Any) -> Row:
    """A copy with all times multiplied."""
    times = {
        measure: [
            timing.model_copy(
                update={
                    "samples_ms": [factor * value for value in timing.samples_ms],
                    "p50_ms": factor * timing.p50_ms,
                }
            )
            for timing in timings
        ]
        for measure, timings in row.measures()
    }
    return row.model_copy(update={**times, **changes})


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


def test_one_result_stays_as_it_is(measured: BenchmarkResult) -> None:
    assert merge([measured]) == measured


def test_rows_of_the_other_installation_are_added(measured: BenchmarkResult, other: BenchmarkResult) -> None:
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
    assert all(timing.ratio is None for timing in merge([nothing, other]).rows[3].timings)


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


def test_other_machines_data_and_classes_are_refused(measured: BenchmarkResult) -> None:
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


def test_different_settings_are_said(measured: BenchmarkResult) -> None:
    slower = measured.model_copy(update={"settings": measured.settings.model_copy(update={"rounds": 90})})
    assert any("different settings: rounds" in warning for warning in merge([measured, slower]).warnings)
