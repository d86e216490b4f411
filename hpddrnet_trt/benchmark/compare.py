"""Several results: what changed between two, and those of several Python installations on one machine as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from hpddrnet_trt.benchmark.result import (
    MEASURES,
    BenchmarkResult,
    Environment,
    Measure,
    Picture,
    Row,
    Shape,
    Timing,
    at,
)
from hpddrnet_trt.benchmark.table import interval_text, miou
from hpddrnet_trt.benchmark.timing import Ratio, ratio_of_medians
from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.text import aligned, number

Verdict = Literal["faster", "slower", "no difference", "too few rounds", "only old", "only new"]


@dataclass(frozen=True)
class Change:
    """One measure of one entry at one size and batch, in both results; what one lacks is None.

    ``old_ms``, ``new_ms``: medians. ``ratio``: old over new, above 1 is faster now; both runs are resampled
    independently, so ``ratio.paired`` is False. ``verdict``: ``no difference`` when the interval contains 1.
    The changes are new minus old: mIoU as a fraction, peak memory in MiB (at this size, else of the start).
    """

    label: str
    measure: Measure
    shape: Shape
    verdict: Verdict
    old_ms: float | None = None
    new_ms: float | None = None
    ratio: Ratio | None = None
    miou_change: float | None = None
    host_mib_change: float | None = None
    device_mib_change: float | None = None


def compare(old: BenchmarkResult, new: BenchmarkResult) -> list[Change]:
    """Every timing of either result, matched by label, measure, size and batch; the new one's order first."""
    before, after = _timings(old.rows), _timings(new.rows)
    return [_change(key, before.get(key), after.get(key), new.settings.seed) for key in {**after, **before}]


def differences(old: BenchmarkResult, new: BenchmarkResult) -> list[str]:
    """Sentences on everything but the code that could explain a change; empty when nothing differs."""
    before, now = _context(old), _context(new)
    return [
        *(
            f"{name} differs: {before.get(name, 'none')} before, {now.get(name, 'none')} now"
            for name in {**before, **now}
            if before.get(name, "none") != now.get(name, "none")
        ),
        *(f"the {name} run was interrupted" for name, run in (("old", old), ("new", new)) if not run.complete),
    ]


def format_changes(changes: Sequence[Change], warnings: Sequence[str] = ()) -> str:
    """A table for the terminal, one line per change, below ``warnings``; ratios that are wide say so."""
    head = ("entry", "measure", "size", "old ms", "new ms", "old/new", "verdict", "mIoU", "host MiB", "GPU MiB")
    table = aligned([head, *map(_cells, changes)], left={0, 1, 2, 5, 6})
    return "\n".join([*(f"note: {warning}" for warning in warnings), *table])


def _context(result: BenchmarkResult) -> dict[str, str]:
    """By name everything but the code that figures depend on."""
    machine, plan = result.machine, result.settings
    versions: dict[str, list[str]] = {}
    for environment in environments_of(result):
        for name, version in {"Python": environment.python, **environment.libraries}.items():
            versions.setdefault(name, []).append(version)
    return {
        "processor": f"{machine.cpu} ({machine.cores_usable} cores)",
        "GPU": ", ".join(f"{gpu.name} (driver {gpu.driver})" for gpu in machine.gpus) or "none",
        "system": machine.system,
        "data": result.data,
        **{name: ", ".join(dict.fromkeys(versions[name])) for name in sorted(versions)},
        **{f"setting {name}": str(getattr(plan, name)) for name in _PLAN},
    }


_Key = tuple[str, Measure, Shape]
_PLAN = ("rounds", "warmup", "threads", "pause_ms", "burst_ms", "alone")  # settings that change what a figure means


def _timings(rows: Sequence[Row]) -> dict[_Key, tuple[Row, Timing]]:
    return {
        (row.label, measure, timing.shape): (row, timing)
        for row in rows
        for measure, timings in row.measures()
        for timing in timings
    }


def _change(key: _Key, old: tuple[Row, Timing] | None, new: tuple[Row, Timing] | None, seed: int) -> Change:
    if old is None or new is None:
        return Change(
            *key, "only new" if old is None else "only old",
            old_ms=old[1].p50_ms if old else None, new_ms=new[1].p50_ms if new else None,
        )  # fmt: skip
    ratio = ratio_of_medians(old[1].by_round, new[1].by_round, paired=False, seed=seed)
    before, after = (_peaks(row, key[2]) for row, _ in (old, new))
    return Change(
        *key, verdict_of(ratio), old[1].p50_ms, new[1].p50_ms, ratio,
        _difference(miou(old[0].accuracy), miou(new[0].accuracy)),
        _difference(before[0], after[0]), _difference(before[1], after[1]),
    )  # fmt: skip


def _peaks(row: Row, shape: Shape) -> tuple[float | None, float | None]:
    """Host and device MiB at this size, else those of the start."""
    record = at(row.memory, shape) or row.start
    return (None, None) if record is None else (record.host_peak_mib, record.device_mib)


def verdict_of(ratio: Ratio) -> Verdict:
    """What a ratio old / new with its interval allows to say."""
    if ratio.low is None or ratio.high is None:
        return "too few rounds"
    if ratio.low <= 1 <= ratio.high:
        return "no difference"
    return "faster" if ratio.value > 1 else "slower"


def _difference(old: float | None, new: float | None) -> float | None:
    return None if old is None or new is None else new - old


def _cells(change: Change) -> tuple[str, ...]:
    ratio = "–" if change.ratio is None else f"{number(change.ratio.value)} {_interval(change.ratio)}"
    return (
        change.label, MEASURES[change.measure], str(change.shape), _number(change.old_ms), _number(change.new_ms),
        ratio, change.verdict, _signed(change.miou_change, 4), _signed(change.host_mib_change, 0),
        _signed(change.device_mib_change, 0),
    )  # fmt: skip


def _interval(ratio: Ratio) -> str:
    """That the rounds of two runs were not interleaved goes without saying."""
    return interval_text(ratio.model_copy(update={"paired": True}))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _signed(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:+.{digits}f}"


# -- several installations as one ------------------------------------------------------------------


class _Part(NamedTuple):
    """One of the results to merge, with the rows it contributes under their new labels."""

    result: BenchmarkResult
    rows: list[Row]
    labels: Mapping[str, str]  # old label -> new label


def merge(results: Sequence[BenchmarkResult]) -> BenchmarkResult:
    """Rows of all results in one, compared with the first result's reference.

    The first keeps its rows, labels, settings and pictures as they are. Rows of the others are
    added: a label that is taken gets the version of its runtime appended, a row that did not run and
    has been measured by another installation is left out. Their ratios are computed against the
    first result's reference; the two were not timed in the same rounds, so each is resampled by
    itself and the ratio says ``paired=False``. Agreement is kept only where both references are the
    same file, roofline bounds only where both are of the same device.

    Raises :class:`UsageError` without results, and for results of different machines, data or classes.
    """
    if not results:
        raise UsageError("there is nothing to merge; give at least one benchmark result")
    first, *others = results
    for place, other in enumerate(others, 2):
        _check_same(first, other, place)
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
            "bound_source": _bound_source(results),
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


def _check_same(first: BenchmarkResult, other: BenchmarkResult, place: int) -> None:
    for name, value in _SAME.items():
        if value(first) != value(other):
            raise UsageError(
                f"results 1 and {place} cannot be merged, their {name} differs: {value(first)!r} and "
                f"{value(other)!r}; measure both on the same machine and images"
            )


def _parts(results: Sequence[BenchmarkResult]) -> list[_Part]:
    first, source = results[0], _bound_source(results)
    reference = _timings([row for row in first.rows if row.label == first.reference])
    measured = {row.label for result in results for row in result.measured}
    parts: list[_Part] = []
    taken: dict[str, Row] = {}
    offset = 0
    for result in results:
        rows, labels = list[Row](), dict[str, str]()
        for row in result.rows:
            if row.status == "not run" and (row.label in measured or row.label in taken):
                continue
            environment = row.environment + offset
            label = labels[row.label] = _free_label(row, taken, environment + 1)
            update: dict[str, object] = {"label": label, "environment": environment}
            if parts:
                if result.bound_source != source:
                    update["bounds"] = []
                for measure, timings in row.measures():
                    update[measure] = [_compared(timing, measure, first, reference) for timing in timings]
                if row.accuracy is not None and _reference_file(result) != _reference_file(first):
                    update["accuracy"] = row.accuracy.model_copy(update={"agreement": None})
            taken[label] = row.model_copy(update=update)
            rows.append(taken[label])
        parts.append(_Part(result, rows, labels))
        offset += len(environments_of(result))
    return parts


def _bound_source(results: Sequence[BenchmarkResult]) -> str | None:
    """The first that there is."""
    return next((result.bound_source for result in results if result.bound_source is not None), None)


def _compared(
    timing: Timing, measure: Measure, first: BenchmarkResult, reference: Mapping[_Key, tuple[Row, Timing]]
) -> Timing:
    """A timing of another run with its ratio to the reference of the first one."""
    of_reference = reference.get((str(first.reference), measure, timing.shape))
    ratio = None
    if of_reference is not None:
        ratio = ratio_of_medians(of_reference[1].by_round, timing.by_round, paired=False, seed=first.settings.seed)
    return timing.model_copy(update={"ratio": ratio})


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
    engines: dict[str, str] = {}
    for name in dict.fromkeys(name for result in results for name in result.engines):
        states = [result.engines[name] for result in results if name in result.engines]
        versions = [state for state in states if not state.startswith("not available")]
        engines[name] = "; ".join(dict.fromkeys(versions)) or states[0]
    return engines


def _warnings(results: Sequence[BenchmarkResult]) -> list[str]:
    warnings = list(dict.fromkeys(warning for result in results for warning in result.warnings))
    if results[0].reference is not None:  # another installation need not have the reference
        about_theirs = ("no PyTorch reference ran", "neither PyTorch nor", "no checkpoint ran in PyTorch")
        own = results[0].warnings
        warnings = [warning for warning in warnings if warning in own or not warning.startswith(about_theirs)]
    differing = [name for name in _PLAN if len({getattr(result.settings, name) for result in results}) > 1]
    if differing:
        warnings.append(f"the merged results were measured with different settings: {', '.join(differing)}")
    if len(results) > 1:
        kinds = ", ".join(MEASURES.values())
        warnings.append(
            f"results of {len(results)} installations were merged: ratios between them ({kinds}) are of separate "
            "runs, not of interleaved rounds"
        )
    return warnings


def _picture(first: Picture, parts: Sequence[_Part]) -> Picture:
    """A picture of the first result with the labels of the others' pictures of the same part."""
    labels = dict(first.labels)
    for part in parts[1:]:
        same = (one for one in part.result.pictures if (one.name, one.part) == (first.name, first.part))
        for one in same:
            labels |= {part.labels[label]: png for label, png in one.labels.items() if label in part.labels}
    return first.model_copy(update={"labels": labels})
