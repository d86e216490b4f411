"""What changed between two results of the same benchmark: yesterday's code and today's, two drivers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hpddrnet_trt.benchmark.merge import environments_of
from hpddrnet_trt.benchmark.result import (
    MEASURES,
    BenchmarkResult,
    Measure,
    Ratio,
    Row,
    Timing,
    size_text,
)
from hpddrnet_trt.benchmark.timing import ratio_of_medians

Verdict = Literal["faster", "slower", "no difference", "too few rounds", "only old", "only new"]
_Key = tuple[str, Measure, int, int, int]


@dataclass(frozen=True)
class Change:
    """One measure of one entry at one size and batch, in both results; what one lacks is None.

    ``old_ms``, ``new_ms``: medians. ``ratio``: old over new, above 1 is faster now; both runs are resampled
    independently, so ``ratio.paired`` is False. ``verdict``: ``no difference`` when the interval contains 1.
    The changes are new minus old: mIoU as a fraction, peak memory in MiB (at this size, else of the start).
    """

    label: str
    measure: Measure
    height: int
    width: int
    batch: int
    verdict: Verdict
    old_ms: float | None = None
    new_ms: float | None = None
    ratio: Ratio | None = None
    miou_change: float | None = None
    host_mib_change: float | None = None
    device_mib_change: float | None = None

    @property
    def size(self) -> str:
        """E.g. ``1024x1024``, with the batch in front when it is not 1."""
        return size_text(self.height, self.width, self.batch)


def compare(old: BenchmarkResult, new: BenchmarkResult) -> list[Change]:
    """Every timing of either result, matched by label, measure, size and batch; the new one's order first."""
    before, after = _timings(old), _timings(new)
    return [_change(key, before.get(key), after.get(key), new.settings.seed) for key in {**after, **before}]


def differences(old: BenchmarkResult, new: BenchmarkResult) -> list[str]:
    """Sentences on everything but the code that could explain a change; empty when nothing differs."""
    found = []
    for name, value in _CONTEXT.items():
        first, second = value(old), value(new)
        if first != second:
            found.append(f"{name} differs: {first} before, {second} now")
    libraries = _libraries(old), _libraries(new)
    for library in sorted({*libraries[0], *libraries[1]}):
        before, now = (versions.get(library, "none") for versions in libraries)
        if before != now:
            found.append(f"{library} differs: {before} before, {now} now")
    plans = old.settings.model_dump(mode="json"), new.settings.model_dump(mode="json")
    found += [
        f"setting {setting} differs: {plans[0][setting]} before, {plans[1][setting]} now"
        for setting in ("rounds", "warmup", "threads", "pause_ms")
        if plans[0][setting] != plans[1][setting]
    ]
    found += [f"the {name} run was interrupted" for name, run in (("old", old), ("new", new)) if not run.complete]
    return found


def format_changes(changes: Sequence[Change], warnings: Sequence[str] = ()) -> str:
    """A table for the terminal, one line per change, below ``warnings``; ratios that are wide say so."""
    head = ("entry", "measure", "size", "old ms", "new ms", "old/new", "verdict", "mIoU", "host MiB", "GPU MiB")
    lines = [head, *(_cells(change) for change in changes)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    left = {0, 1, 2, 5, 6}
    table = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([*(f"note: {warning}" for warning in warnings), *table])


_CONTEXT: dict[str, Callable[[BenchmarkResult], str]] = {
    "processor": lambda result: f"{result.machine.cpu} ({result.machine.cores_usable} cores)",
    "GPU": lambda result: ", ".join(f"{gpu.name} (driver {gpu.driver})" for gpu in result.machine.gpus) or "none",
    "system": lambda result: result.machine.system,
    "data": lambda result: result.data,
}


def _libraries(result: BenchmarkResult) -> dict[str, str]:
    """Versions by library over all installations of a result."""
    found: dict[str, list[str]] = {}
    for environment in environments_of(result):
        for name, version in {"Python": environment.python, **environment.libraries}.items():
            found.setdefault(name, []).append(version)
    return {name: ", ".join(dict.fromkeys(versions)) for name, versions in found.items()}


def _timings(result: BenchmarkResult) -> Mapping[_Key, tuple[Row, Timing]]:
    return {
        (row.label, measure, timing.height, timing.width, timing.batch): (row, timing)
        for row in result.rows
        for measure, timings in row.measures()
        for timing in timings
    }


def _change(key: _Key, old: tuple[Row, Timing] | None, new: tuple[Row, Timing] | None, seed: int) -> Change:
    label, measure, height, width, batch = key
    if old is None or new is None:
        return Change(
            label, measure, height, width, batch, "only new" if old is None else "only old",
            old_ms=old[1].p50_ms if old else None, new_ms=new[1].p50_ms if new else None,
        )  # fmt: skip
    found = ratio_of_medians(old[1].samples_ms, new[1].samples_ms, paired=False, seed=seed)
    ratio = Ratio(value=found.value, low=found.low, high=found.high, paired=False)
    before, after = _memory(old[0], key), _memory(new[0], key)
    return Change(
        label, measure, height, width, batch, verdict_of(ratio), old[1].p50_ms, new[1].p50_ms, ratio,
        _difference(_miou(old[0]), _miou(new[0])), _difference(before[0], after[0]), _difference(before[1], after[1]),
    )  # fmt: skip


def verdict_of(ratio: Ratio) -> Verdict:
    """What a ratio old / new with its interval allows to say."""
    if ratio.low is None or ratio.high is None:
        return "too few rounds"
    if ratio.low <= 1 <= ratio.high:
        return "no difference"
    return "faster" if ratio.value > 1 else "slower"


def _memory(row: Row, key: _Key) -> tuple[float | None, float | None]:
    """Host and device MiB at this size, else those of the start."""
    for one in row.memory:
        if (one.height, one.width, one.batch) == key[2:]:
            return one.host_peak_mib, one.device_mib
    return (row.start.host_peak_mib, row.start.device_mib) if row.start is not None else (None, None)


def _miou(row: Row) -> float | None:
    return row.accuracy.miou if row.accuracy is not None else None


def _difference(old: float | None, new: float | None) -> float | None:
    return None if old is None or new is None else new - old


def _cells(change: Change) -> tuple[str, ...]:
    return (
        change.label, MEASURES[change.measure], change.size, _number(change.old_ms), _number(change.new_ms),
        _ratio(change.ratio), change.verdict, _signed(change.miou_change, 4), _signed(change.host_mib_change, 0),
        _signed(change.device_mib_change, 0),
    )  # fmt: skip


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _signed(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:+.{digits}f}"


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return "–"
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.3g} (no interval)"
    return f"{ratio.value:.3g} [{ratio.low:.3g}, {ratio.high:.3g}]{' (wide)' if ratio.wide else ''}"
