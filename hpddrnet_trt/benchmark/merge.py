"""Results of several Python installations on one machine, as one: TensorRT 10 beside 11, say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from hpddrnet_trt.benchmark.result import (
    MEASURES,
    BenchmarkResult,
    Ceilings,
    Environment,
    Measure,
    Picture,
    Ratio,
    Row,
    Timing,
)
from hpddrnet_trt.benchmark.timing import ratio_of_medians
from hpddrnet_trt.core.errors import UsageError

_Key = tuple[Measure, int, int, int]


class _Part(NamedTuple):
    """One of the results to merge, with the rows it contributes under their new labels."""

    result: BenchmarkResult
    rows: list[Row]
    labels: Mapping[str, str]  # old label -> new label


def merge(results: Sequence[BenchmarkResult]) -> BenchmarkResult:
    """Rows of all results in one, compared with the first result's reference.

    The first keeps its rows, labels, settings, ceilings and pictures as they are. Rows of the others are
    added: a label that is taken gets the version of its runtime appended, a row that did not run and
    has been measured by another installation is left out. Their ratios are computed against the
    first result's reference; the two were not timed in the same rounds, so each is resampled by
    itself and the ratio says ``paired=False``. Agreement is kept only where both references are the
    same file, the distance from the limit only where both ceilings are of the same device.

    Raises :class:`UsageError` without results, and for results of different machines, data or classes.
    """
    if not results:
        raise UsageError("there is nothing to merge; give at least one benchmark result")
    first, *others = results
    for number, other in enumerate(others, 2):
        _check_same(first, other, number)
    parts = _parts(results)
    rows = [row for part in parts for row in part.rows]
    return first.model_copy(
        update={
            "created": max(result.created for result in results),
            "command": " && ".join(dict.fromkeys(result.command for result in results)),
            "complete": all(result.complete for result in results),
            "engines": _engines(results),
            "busy_share": max((one.busy_share for one in results if one.busy_share is not None), default=None),
            "data_notes": list(dict.fromkeys(note for result in results for note in result.data_notes)),
            "rows": rows,
            "warnings": _warnings(results),
            "pictures": [_picture(one, parts) for one in first.pictures],
            "environments": [one for result in results for one in environments_of(result)],
            "ceilings": _ceilings(results),
            "gpu_states": [state for result in results for state in result.gpu_states],
        }
    )


def environments_of(result: BenchmarkResult) -> list[Environment]:
    """The installations behind a result; older files name one only through the machine's record."""
    if result.environments:
        return list(result.environments)
    machine = result.machine
    return [
        Environment(created=result.created, command=result.command, python=machine.python, libraries=machine.libraries)
    ]


# What must be equal, with its name for people.
_SAME: dict[str, Callable[[BenchmarkResult], object]] = {
    "GPU": lambda result: ", ".join(gpu.name for gpu in result.machine.gpus) or "no GPU",
    "processor": lambda result: f"{result.machine.cpu}, {result.machine.cores_usable} cores",
    "data": lambda result: result.data,
    "classes": lambda result: ", ".join(entry.name for entry in result.classes),
}


def _check_same(first: BenchmarkResult, other: BenchmarkResult, number: int) -> None:
    for name, value in _SAME.items():
        if value(first) != value(other):
            raise UsageError(
                f"results 1 and {number} cannot be merged, their {name} differs: {value(first)!r} and "
                f"{value(other)!r}; measure both on the same machine and images"
            )


def _parts(results: Sequence[BenchmarkResult]) -> list[_Part]:
    first, ceilings = results[0], _ceilings(results)
    reference = _samples(first, first.reference)
    measured = {row.label for result in results for row in result.measured}
    same_reference = [_reference_file(result) == _reference_file(first) for result in results]
    parts: list[_Part] = []
    taken: dict[str, Row] = {}
    offset = 0
    for result, comparable in zip(results, same_reference, strict=True):
        rows, labels = list[Row](), dict[str, str]()
        for row in result.rows:
            if row.status == "not run" and (row.label in measured or row.label in taken):
                continue
            environment = row.environment + offset
            label = labels[row.label] = _free_label(row, taken, environment + 1)
            update: dict[str, object] = {"label": label, "environment": environment}
            if parts:
                if result.ceilings is None or ceilings is None or result.ceilings.device != ceilings.device:
                    update["roofs"] = []  # under ceilings that the merged result does not show
                for measure, timings in row.measures():
                    update[measure] = [_compared(timing, measure, reference, first.settings.seed) for timing in timings]
                if row.accuracy is not None and not comparable:
                    update["accuracy"] = row.accuracy.model_copy(update={"agreement": None})
            taken[label] = row.model_copy(update=update)
            rows.append(taken[label])
        parts.append(_Part(result, rows, labels))
        offset += len(environments_of(result))
    return parts


def _ceilings(results: Sequence[BenchmarkResult]) -> Ceilings | None:
    """The first that were measured."""
    return next((result.ceilings for result in results if result.ceilings is not None), None)


def _samples(result: BenchmarkResult, label: str | None) -> dict[_Key, list[float]]:
    rows = [row for row in result.rows if row.label == label]
    return {
        (measure, timing.height, timing.width, timing.batch): timing.samples_ms
        for row in rows
        for measure, timings in row.measures()
        for timing in timings
    }


def _compared(timing: Timing, measure: Measure, reference: Mapping[_Key, Sequence[float]], seed: int) -> Timing:
    samples = reference.get((measure, timing.height, timing.width, timing.batch))
    if samples is None:
        return timing.model_copy(update={"ratio": None})
    found = ratio_of_medians(samples, timing.samples_ms, paired=False, seed=seed)
    return timing.model_copy(update={"ratio": Ratio(value=found.value, low=found.low, high=found.high, paired=False)})


def _reference_file(result: BenchmarkResult) -> tuple[str, int] | None:
    return next(((row.file, row.file_bytes) for row in result.rows if row.label == result.reference), None)


def _free_label(row: Row, taken: Mapping[str, Row], number: int) -> str:
    """The row's label, with its runtime's version, or else the installation's number, where it is taken."""
    if row.label not in taken:
        return row.label
    version = row.runtime.partition(" (")[0]  # e.g. "torch 2.13.0" of "torch 2.13.0 (CPU)"
    same = taken[row.label].runtime.partition(" (")[0] == version
    label = f"{row.label} ({f'environment {number}' if same else version})"
    return label if label not in taken else f"{row.label} (environment {number})"


def _engines(results: Sequence[BenchmarkResult]) -> dict[str, str]:
    """By name: the versions that ran, or the first reason why none did."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(name for result in results for name in result.engines):
        states = [result.engines[name] for result in results if name in result.engines]
        versions = [state for state in states if not state.startswith("not available")]
        found[name] = "; ".join(dict.fromkeys(versions)) or states[0]
    return found


def _warnings(results: Sequence[BenchmarkResult]) -> list[str]:
    found = list(dict.fromkeys(warning for result in results for warning in result.warnings))
    if results[0].reference is not None:  # another installation need not have the reference
        found = [warning for warning in found if not warning.startswith("no PyTorch reference ran")]
    plans = [result.settings.model_dump(include={"rounds", "threads", "pause_ms", "warmup"}) for result in results]
    differing = [name for name in plans[0] if any(plan[name] != plans[0][name] for plan in plans)]
    if differing:
        found.append(f"the merged results were measured with different settings: {', '.join(differing)}")
    if len(results) > 1:
        kinds = ", ".join(MEASURES.values())
        found.append(
            f"results of {len(results)} installations were merged: ratios between them ({kinds}) are of separate "
            "runs, not of interleaved rounds"
        )
    return found


def _picture(first: Picture, parts: Sequence[_Part]) -> Picture:
    """A picture of the first result with the labels of the others' pictures of the same part."""
    labels = dict(first.labels)
    for part in parts[1:]:
        same = (one for one in part.result.pictures if (one.name, one.part) == (first.name, first.part))
        for one in same:
            labels |= {part.labels[label]: png for label, png in one.labels.items() if label in part.labels}
    return first.model_copy(update={"labels": labels})
