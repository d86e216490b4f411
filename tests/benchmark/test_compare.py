"""What changed between two results, and several installations' results as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpddrnet_trt.benchmark.compare import Change, compare, differences, format_changes, merge
from hpddrnet_trt.benchmark.machine import Gpu
from hpddrnet_trt.benchmark.result import BenchmarkResult, Environment, Row, Shape, load_result
from hpddrnet_trt.benchmark.timing import Ratio
from hpddrnet_trt.core.errors import UsageError

VERSION_1 = Path(__file__).parents[2] / "benchmarks" / "results" / "amd-epyc-2026-11-21.json"


def slower(row: Row, factor: float, **changes: Any) -> Row:
    """A copy with all times multiplied."""
    times = {
        measure: [
            timing.model_copy(
                update={"samples_ms": [factor * ms for ms in timing.samples_ms], "p50_ms": factor * timing.p50_ms}
            )
            for timing in timings
        ]
        for measure, timings in row.measures()
    }
    return row.model_copy(update={**times, **changes})


def with_samples(row: Row, centre: float, seed: int, rounds: int = 40) -> Row:
    """A copy with new end-to-end samples around ``centre`` ms."""
    rng, timings = np.random.default_rng(seed), []
    for timing in row.end_to_end:
        samples = (centre * rng.lognormal(0, 0.05, rounds)).tolist()
        changed = {"samples_ms": samples, "p50_ms": float(np.median(samples)), "burst": 1}
        timings.append(timing.model_copy(update=changed))
    return row.model_copy(update={"end_to_end": timings})


def with_rows(result: BenchmarkResult, *rows: Row) -> BenchmarkResult:
    return result.model_copy(update={"rows": list(rows)})


def test_a_result_against_itself_shows_no_difference(measured: BenchmarkResult) -> None:
    changes = compare(measured, measured)
    assert len(changes) == sum(len(timings) for row in measured.rows for _, timings in row.measures())
    for change in changes:
        assert change.ratio is not None
        assert (change.verdict, change.ratio.value, change.ratio.paired) == ("no difference", 1, False)
        assert (change.miou_change, change.host_mib_change, change.device_mib_change) == (0, 0, None)
    assert differences(measured, measured) == []


@pytest.mark.parametrize(
    ("centre", "rounds", "verdict"),
    [(5, 25, "faster"), (20, 25, "slower"), (10, 25, "no difference"), (5, 4, "too few rounds")],
)
def test_faster_slower_and_the_same_are_told(
    measured: BenchmarkResult, centre: float, rounds: int, verdict: str
) -> None:
    plain, small = with_samples(measured.rows[0], 10, seed=1), with_samples(measured.rows[1], 10, seed=2)
    new = with_rows(measured, plain, with_samples(small, centre, seed=7, rounds=rounds))
    for change in compare(with_rows(measured, plain, small), new):
        if change.measure == "end_to_end":
            assert change.verdict == (verdict if change.label == "small" else "no difference")
            assert change.ratio is not None
            assert change.ratio.value == pytest.approx((change.old_ms or 0) / (change.new_ms or 0))


def test_accuracy_and_memory_are_new_minus_old_and_what_only_one_has_is_shown(measured: BenchmarkResult) -> None:
    plain, small, *_ = measured.rows
    assert plain.accuracy is not None
    accuracy = plain.accuracy.model_copy(update={"miou": (plain.accuracy.miou or 0) - 0.25})
    memory = [
        one.model_copy(update={"host_peak_mib": one.host_peak_mib + 7, "device_mib": 5.0}) for one in plain.memory
    ]
    changed = plain.model_copy(update={"accuracy": accuracy, "memory": memory})
    changes = compare(measured, with_rows(measured, changed, small.model_copy(update={"label": "fresh"})))
    assert changes[0].miou_change == pytest.approx(-0.25)
    assert changes[0].host_mib_change == pytest.approx(7)
    assert changes[0].device_mib_change is None  # there was none before
    verdicts = {change.label: change.verdict for change in changes}
    assert list(verdicts.items())[1:] == [("fresh", "only new"), ("small", "only old")]
    gone = next(change for change in changes if change.label == "small")
    assert (gone.old_ms, gone.new_ms, gone.ratio) == (small.end_to_end[0].p50_ms, None, None)


def test_what_else_could_explain_a_change_is_said(measured: BenchmarkResult) -> None:
    environments = [
        one.model_copy(update={"libraries": {**one.libraries, "numpy": "9.9"}}) for one in measured.environments
    ]
    new = measured.model_copy(
        update={
            "machine": measured.machine.model_copy(update={"cpu": "Another CPU"}), "environments": environments,
            "settings": measured.settings.model_copy(update={"threads": 2}), "complete": False,
        }
    )  # fmt: skip
    processor, *others = differences(measured, new)
    assert "Another CPU" in processor
    assert others == [
        f"numpy differs: {np.__version__} before, 9.9 now", "setting threads differs: 1 before, 2 now",
        "the new run was interrupted",
    ]  # fmt: skip


def test_the_table_says_when_a_ratio_is_wide() -> None:
    ratio = Ratio(value=2, low=1.95, high=2.1)
    narrow = Change("a", "end_to_end", Shape(64, 64, 1), "faster", 2.0, 1.0, ratio, 0.01, 3, None)
    wide = Change("b", "throughput", Shape(64, 64, 4), "faster", 2.0, 1.0, Ratio(value=2, low=1.2, high=3.0))
    none = Change("c", "inference", Shape(64, 64, 1), "too few rounds", 2.0, 1.0, Ratio(value=2))
    lines = format_changes([narrow, wide, none], ["GPU differs: A before, B now"]).splitlines()
    assert lines[0] == "note: GPU differs: A before, B now"
    assert lines[1].split()[:3] == ["entry", "measure", "size"]
    for line, words in zip(
        lines[2:],
        (("2.00 [1.95, 2.10]  ", "+0.0100"), ("2.00 [1.20, 3.00] (wide)", "batch 4 of 64×64"),
         ("2.00 (too few rounds for an interval)",)), strict=True,
    ):  # fmt: skip
        assert all(word in line for word in words)


def test_a_published_result_of_the_first_format_can_be_compared() -> None:
    old = load_result(VERSION_1)
    faster = with_rows(old, *(slower(row, 0.5) for row in old.rows))
    assert {change.verdict for change in compare(old, faster)} == {"faster"}


@pytest.fixture
def other(measured: BenchmarkResult) -> BenchmarkResult:
    """A second installation: another ONNX Runtime, an engine of its own that ran, and the lonely one now running."""
    plain, small, cut, lonely = measured.rows
    rows = [
        slower(plain, 2.0, runtime="onnxruntime 1.20.0 (CPU, 1 thread)"),
        slower(small, 2.0, label="own", runtime="TensorRT 10.13.3 (NVIDIA L4, int8)"),
        cut,
        slower(plain, 0.5, label=lonely.label, runtime="TensorRT 10.13.3 (NVIDIA L4, fp16)", file=lonely.file),
    ]
    environment = Environment(created=measured.created, command="second", python="3.10.1", libraries={"numpy": "1.26"})
    engines = {**measured.engines, "tensorrt": "10.13.3", "torch": "not available: not installed"}
    return measured.model_copy(
        update={"rows": rows, "environments": [environment], "command": "second", "engines": engines}
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
    assert (merged.command, merged.reference) == ("python benchmark.py && second", "plain")
    assert (merged.engines["tensorrt"], merged.engines["torch"]) == ("10.13.3", measured.engines["torch"])
    assert any("2 installations were merged" in warning for warning in merged.warnings)
    assert BenchmarkResult.model_validate_json(merged.to_json()) == merged
    for row, value in ((merged.rows[3], 0.5), (merged.rows[5], 2.0)):  # to the first reference, of separate runs
        ratios = [timing.ratio for _, timings in row.measures() for timing in timings]
        assert all(ratio is not None and not ratio.paired and ratio.low is not None for ratio in ratios)
        assert [ratio.value for ratio in ratios if ratio is not None] == pytest.approx([value] * len(ratios))
    nothing = measured.model_copy(update={"reference": None})
    assert all(timing.ratio is None for timing in merge([nothing, other]).rows[3].end_to_end)


def test_agreement_with_another_reference_is_dropped(measured: BenchmarkResult, other: BenchmarkResult) -> None:
    foreign = other.model_copy(update={"reference": "own"})
    same, accuracy = (merge([measured, one]).rows[4].accuracy for one in (other, foreign))
    assert same is not None
    assert same.agreement is not None
    assert accuracy == same.model_copy(update={"agreement": None})


def test_the_same_installation_twice_is_told_apart(measured: BenchmarkResult) -> None:
    merged = merge([measured, measured, measured])
    assert [row.label for row in merged.measured] == [
        "plain", "small", "plain (environment 2)", "small (environment 2)", "plain (environment 3)",
        "small (environment 3)",
    ]  # fmt: skip
    assert len(merged.not_run) == 2
    assert set(merged.pictures[0].labels) == {row.label for row in merged.measured}
    assert merge([merge([measured, measured]), measured]).rows == merged.rows


def test_other_machines_data_and_classes_are_refused_and_other_settings_said(measured: BenchmarkResult) -> None:
    machine = measured.machine
    gpu = machine.model_copy(update={"gpus": [Gpu(name="NVIDIA L4", driver="580", memory_mib=23034)]})
    for update, message in (
        ({"machine": gpu}, "their GPU differs: 'no GPU' and 'NVIDIA L4'"),
        ({"machine": machine.model_copy(update={"cpu": "Another CPU"})}, "their processor differs: .* 'Another CPU"),
        ({"data": "other/test, 3 images"}, "their data differs: 'noise/test, 3 images' and 'other/test, 3 images'"),
        ({"classes": measured.classes[:2]}, "their classes differs: 'matrix, pore, grain' and 'matrix, pore'"),
    ):
        with pytest.raises(UsageError, match=message):
            merge([measured, measured.model_copy(update=update)])
    with pytest.raises(UsageError, match="nothing to merge"):
        merge([])
    longer = measured.model_copy(update={"settings": measured.settings.model_copy(update={"rounds": 90})})
    assert any("different settings: rounds" in warning for warning in merge([measured, longer]).warnings)
