"""The comparison: start every entry, time them in interleaved rounds, score their labels, look inside."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hpddrnet_trt.benchmark.accuracy import Scores
from hpddrnet_trt.benchmark.entries import Entry, entries_for, manifest_or_none, precision_of
from hpddrnet_trt.benchmark.frame import frame_to_labels, prepared
from hpddrnet_trt.benchmark.images import Grey8, Image, ImageSet, own_size, timing_frames
from hpddrnet_trt.benchmark.machine import CpuMeter, busy_warnings, describe_machine
from hpddrnet_trt.benchmark.measures import Case, Measured, Stopwatch, runs_on_cpu
from hpddrnet_trt.benchmark.pictures import picture
from hpddrnet_trt.benchmark.profiling import layer_groups, measure_roofs
from hpddrnet_trt.benchmark.result import (
    MEASURES,
    BenchmarkResult,
    Ceilings,
    Environment,
    LayerGroups,
    Measure,
    Picture,
    Roof,
    Row,
    Settings,
    Timing,
)
from hpddrnet_trt.benchmark.startup import Started, probed_sizes, start_entry
from hpddrnet_trt.benchmark.telemetry import Gpu, GpuWatch
from hpddrnet_trt.benchmark.timing import FAILURES, latency_of
from hpddrnet_trt.core.errors import UsageError, UserError, describe
from hpddrnet_trt.core.files import existing_file
from hpddrnet_trt.core.manifest import ClassInfo, Manifest
from hpddrnet_trt.core.provenance import command_line
from hpddrnet_trt.engines import available_engines, load_engine
from hpddrnet_trt.engines.base import Engine

__all__ = ["Entry", "entries_for", "run_benchmark"]


def run_benchmark(
    entries: Sequence[Entry],
    images: ImageSet,
    settings: Settings | None = None,
    *,
    command: str | None = None,
    progress: bool = True,
) -> BenchmarkResult:
    """Compare ``entries`` on ``images`` in one interleaved run.

    Each entry is first started in child processes (memory, start-up, and whether it runs here at
    all), then all that run are loaded side by side, timed in rounds by each measure of
    :mod:`~hpddrnet_trt.benchmark.measures`, scored on the whole images, and profiled. What does not
    run is a row with its reason; what does not run at one size or by one measure leaves a note.

    After Ctrl-C the result holds the finished rounds and images and says ``complete=False``; with
    nothing finished the interrupt goes on to the caller.

    Raises :class:`UsageError` without entries, for equal labels and for an unknown reference,
    :class:`BadInputFile` for a missing file, :class:`MissingDependency` without ``psutil``.
    """
    settings = settings or Settings()
    _check_entries(entries, settings)
    run = _Run(list(entries), images, settings, progress)
    try:
        run.start()
        run.load()
        run.time()
        if run.complete:
            run.score()
            run.look_inside()
    except KeyboardInterrupt:
        run.complete = False
    finally:
        run.close()
    if not run.complete and not run.measured:
        raise KeyboardInterrupt
    return run.result(command or command_line())


def _check_entries(entries: Sequence[Entry], settings: Settings) -> None:
    if not entries:
        raise UsageError("there is nothing to measure; give at least one model file")
    labels = [entry.label for entry in entries]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise UsageError(f"two entries are called {', '.join(map(repr, twice))}; give each its own label")
    if settings.reference is not None and settings.reference not in labels:
        raise UsageError(f"reference {settings.reference!r} is not among the entries: {', '.join(labels)}")
    for entry in entries:
        existing_file(entry.path, "model file")


class _Run:
    """State of one benchmark; the steps are called in order by :func:`run_benchmark`."""

    def __init__(self, entries: list[Entry], images: ImageSet, settings: Settings, progress: bool) -> None:
        self.entries, self.images, self.settings = entries, images, settings
        self.quiet = not progress
        self.machine = describe_machine()
        self.complete = True
        self.started: dict[str, Started] = {}
        self.reasons: dict[str, str] = {}
        self.notes: dict[str, list[str]] = {entry.label: [] for entry in entries}
        self.untimed: dict[tuple[str, str], list[str]] = {}  # sizes by label and reason
        self.engines: dict[str, Engine] = {}
        self.runtimes: dict[str, str] = {}
        self.classes: list[ClassInfo] | None = list(images.classes) if images.classes is not None else None
        self.measured: list[Measured] = []
        self.busy_share: float | None = None
        self.scores: Scores | None = None
        self.pictures: list[Picture] = []
        self.layers: dict[str, list[LayerGroups]] = {entry.label: [] for entry in entries}
        self.ceilings: Ceilings | None = None
        self.roofs: dict[str, list[Roof]] = {}
        self.warnings: list[str] = []
        self._stack = ExitStack()
        self._gpu = Gpu.open()
        self._watch = GpuWatch(self._gpu)
        self._cases()

    def _cases(self) -> None:
        images, plan = self.images.images, self.settings
        self.cases: list[Case] = []
        self.data_notes: list[str] = []
        for size in plan.sizes or (own_size(images),):
            for batch in sorted(set(plan.batches)):
                frames, note = timing_frames(images, *size, batch)
                self.cases.append(Case(*size, batch, frames))
                self.data_notes += [] if note in self.data_notes else [note]

    # -- steps ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Start every entry in processes of its own, one for each size."""
        sizes = probed_sizes(self.cases, self.images.images, self.settings)
        for entry in tqdm(self.entries, desc="start each engine", unit="engine", disable=self.quiet):
            found = self.started[entry.label] = start_entry(entry, self._options(entry), sizes)
            self.notes[entry.label] += found.notes
            if found.reason is not None:
                self.reasons[entry.label] = found.reason

    def load(self) -> None:
        """Load those that run into this process, side by side."""
        for entry in self.entries:
            if self.started[entry.label].start is not None:
                self._load(entry)

    def time(self) -> None:
        """Every measure in interleaved rounds, at each size and batch."""
        if not self.engines:
            return
        meter = CpuMeter()
        stopwatch = Stopwatch(self.settings, self._watch, self.quiet)
        try:
            for case in self.cases:
                if self.complete:
                    self._time(stopwatch, case)
        finally:
            self.busy_share = meter.others()

    def score(self) -> None:
        """Labels of every entry on every whole image: accuracy, agreement, gallery."""
        if not self.engines:
            return
        scores = self.scores = Scores(list(self.engines), self.reference, len(self.classes or []))
        for image in tqdm(self.images.images, desc="accuracy", unit="image", disable=self.quiet):
            labelled = ((label, self._labels(label, image)) for label in scores.entries)
            found = {label: labels for label, labels in labelled if labels is not None}
            scores.add(found, image.mask)
            if len(self.pictures) < self.settings.gallery:
                self.pictures.append(picture(image, found))

    def look_inside(self) -> None:
        """Time by layer group and distance from the machine's ceilings; last, since profiling may disturb."""
        paths = {entry.label: entry.path for entry in self.entries}
        if self.settings.layers:
            for found in tqdm(self._latencies(), desc="layers", unit="size", disable=self.quiet):
                for label in found.laps.samples:
                    self._profile(label, paths[label], found)
        if self.settings.roofline and self.engines:
            try:
                found_roofs = measure_roofs(self.entries, self.engines, self.cases, self.settings.threads)
            except UserError as exc:
                self.warnings.append(f"no roofline: {exc}")
                return
            self.ceilings, self.roofs, reasons = found_roofs
            for label, reason in reasons.items():
                self.notes[label].append(f"no roofline: {reason}")

    def close(self) -> None:
        self._stack.close()

    # -- loading -------------------------------------------------------------------------------

    def _load(self, entry: Entry) -> None:
        try:
            engine = self._stack.enter_context(load_engine(entry.path, entry.engine, **self._options(entry)))
            self._check_classes(engine.manifest)
        except FAILURES as exc:
            self.reasons[entry.label] = describe(exc)
            return
        self.runtimes[entry.label] = engine.runtime
        self.engines[entry.label] = engine

    def _options(self, entry: Entry) -> dict[str, Any]:
        threads = None if entry.path.suffix.lower() == ".engine" else self.settings.threads
        return {**({} if threads is None else {"threads": threads}), **entry.options}

    def _check_classes(self, manifest: Manifest) -> None:
        if self.classes is None:
            self.classes = list(manifest.classes)
        known, wanted = manifest.class_names, [entry.name for entry in self.classes]
        if known != wanted:
            raise UserError(
                f"it knows the classes {', '.join(known)}, the others or the masks {', '.join(wanted)}: "
                "labels cannot be compared"
            )

    # -- timing --------------------------------------------------------------------------------

    @property
    def reference(self) -> str | None:
        """The entry that ratios and agreement refer to; None when it did not run."""
        if self.settings.reference is not None:
            return self.settings.reference if self.settings.reference in self.engines else None
        able = (entry.label for entry in self.entries if entry.can_be_reference and entry.label in self.engines)
        return next(able, None)

    def _time(self, stopwatch: Stopwatch, case: Case) -> None:
        able = {label: engine for label, engine in self.engines.items() if self.started[label].ran(case)}
        latency = stopwatch.latency(able, case)
        for label in latency.laps.samples:
            self._note_padding(label, case)
        self._keep(latency)
        # A failure may leave an engine in any state: it is not asked again at this size.
        engines = {label: self.engines[label] for label in latency.laps.samples}
        if self.complete and self.settings.network_only:
            self._keep(stopwatch.network(engines, case))
        if self.complete and self.settings.throughput:
            self._keep(stopwatch.throughput(engines, case, self._counters()))

    def _note_padding(self, label: str, case: Case) -> None:
        height, width = prepared(self.engines[label], case.frames[0]).shape[2:]
        if (height, width) != (case.height, case.width):
            self.notes[label].append(
                f"takes no frames of {case.size}: they are padded to {height}x{width} and times include that"
            )

    def _keep(self, found: Measured) -> None:
        if found.laps.rounds:
            self.measured.append(found)
        self.complete = not found.laps.interrupted
        for label, reason in found.laps.failures.items():
            self.untimed.setdefault((label, f"{MEASURES[found.measure]}: {reason}"), []).append(found.case.size)

    def _counters(self) -> dict[str, Gpu | None]:
        """The GPU that counts each engine's energy; None for those on the processor."""
        return {label: None if runs_on_cpu(engine) else self._gpu for label, engine in self.engines.items()}

    def _latencies(self) -> list[Measured]:
        return [found for found in self.measured if found.measure == "timings"]

    def _labels(self, label: str, image: Image) -> Grey8 | None:
        try:
            labels: Grey8 = frame_to_labels(self.engines[label])(image.grey[None])[0]
        except FAILURES as exc:
            self.notes[label].append(f"accuracy not measured, {image.name}: {describe(exc)}")
            return None
        return labels

    def _profile(self, label: str, path: Path, found: Measured) -> None:
        median_s = latency_of(found.laps.samples[label]).p50
        try:
            groups = layer_groups(self.engines[label], path, found.case, median_s)
        except FAILURES as exc:
            self.notes[label].append(f"layers not timed at {found.case.size}: {describe(exc)}")
            return
        if groups is not None:
            self.layers[label].append(groups)

    # -- result --------------------------------------------------------------------------------

    def result(self, command: str) -> BenchmarkResult:
        created = datetime.now(UTC).isoformat(timespec="seconds")
        machine = self.machine
        return BenchmarkResult(
            created=created,
            command=command,
            complete=self.complete,
            settings=self.settings,
            machine=machine,
            engines=available_engines(),
            busy_share=self.busy_share,
            data=f"{self.images.name}, {len(self.images.images)} images",
            data_notes=self.data_notes,
            classes=self.classes or [],
            reference=self.reference,
            rows=[self._row(entry) for entry in self.entries],
            warnings=self._all_warnings(),
            pictures=self.pictures,
            environments=[
                Environment(created=created, command=command, python=machine.python, libraries=machine.libraries)
            ],
            ceilings=self.ceilings,
            gpu_states=self._watch.states(),
        )

    def _row(self, entry: Entry) -> Row:
        label, manifest = entry.label, manifest_or_none(entry.path)
        timings = self._timings("timings", label)
        untimed = [(reason, sizes) for (whose, reason), sizes in self.untimed.items() if whose == label]
        notes = [*self.notes[label], *(f"not timed at {', '.join(sizes)}, {reason}" for reason, sizes in untimed)]
        reason = None
        if not timings:
            reason = self.reasons.get(label) or "; ".join(notes) or "the run was interrupted before its turn"
        built = manifest.engine if manifest is not None else None
        started = self.started.get(label, Started())
        return Row(
            label=label,
            file=entry.path.name,
            file_bytes=entry.path.stat().st_size,
            runtime=self.runtimes.get(label, entry.engine),
            precision=precision_of(entry, manifest),
            status="measured" if timings else "not run",
            reason=reason,
            notes=notes if timings else [],
            attention=manifest.attention if manifest is not None else None,
            build_s=built.build_seconds if built is not None else None,
            start=started.start,
            memory=started.memory,
            memory_failures=started.failures,
            timings=timings,
            network=self._timings("network", label),
            throughput=self._timings("throughput", label),
            layers=self.layers[label],
            roofs=self.roofs.get(label, []) if timings else [],
            accuracy=self.scores.accuracy(label) if self.scores is not None and timings else None,
        )

    def _timings(self, measure: Measure, label: str) -> list[Timing]:
        found = (one for one in self.measured if one.measure == measure and label in one.laps.samples)
        return [one.timing(label, self.reference, self.settings.seed) for one in found]

    def _all_warnings(self) -> list[str]:
        found = [*self.machine.warnings, *self.warnings]
        if self.busy_share is not None:
            found += busy_warnings(self.busy_share, "while timing")
        if not self.complete:
            rounds = ", ".join(f"{one.laps.rounds} at {one.case.size}" for one in self._latencies())
            found.append(
                f"the run was interrupted; figures are of the finished rounds ({rounds} of {self.settings.rounds}) "
                "and images"
            )
        if self.reference is None:
            found.append("no PyTorch reference ran, so there are no ratios and no agreement")
        unsteady = [
            f"{label} ({MEASURES[one.measure]}, {one.case.size})" for one in self.measured for label in one.unsteady
        ]
        if unsteady:
            found.append(f"times were not steady after warm-up: {', '.join(unsteady)}")
        for state in self._watch.states():
            if state.throttled:
                found.append(f"{state.name} was slowed down while timing: {', '.join(state.throttled)}")
        if self.machine.gpus and self._gpu is None:
            found.append("clocks, power and energy of the GPU were not read; pip install nvidia-ml-py")
        return found
