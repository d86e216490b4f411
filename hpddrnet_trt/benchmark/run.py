"""The comparison: start every entry, time them in interleaved rounds, score their labels, look inside."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from hpddrnet_trt.benchmark.entries import Entry, manifest_or_none, precision_of
from hpddrnet_trt.benchmark.images import Grey8, ImageSet, own_size, picture, timing_frames
from hpddrnet_trt.benchmark.machine import IDLE_SHARE, CpuMeter, GpuSensor, GpuWatch, busy_warnings, describe_machine
from hpddrnet_trt.benchmark.measures import (
    BenchmarkCase,
    Measured,
    Timer,
    end_to_end,
    known_device,
    layer_groups,
    prepared,
    roofline_bounds,
    runs_on_cpu,
)
from hpddrnet_trt.benchmark.probe import Startup, probed_sizes, start_entry
from hpddrnet_trt.benchmark.result import (
    MEASURES,
    BenchmarkResult,
    Environment,
    LayerGroups,
    Measure,
    RooflineBound,
    Row,
    Settings,
    Shape,
    Timing,
)
from hpddrnet_trt.benchmark.scores import Scores
from hpddrnet_trt.benchmark.timing import FAILURES
from hpddrnet_trt.core.errors import UsageError, UserError, describe
from hpddrnet_trt.core.files import existing_file, sha256_of
from hpddrnet_trt.core.manifest import ClassInfo, Manifest
from hpddrnet_trt.core.progress import progress_bar
from hpddrnet_trt.core.provenance import command_line
from hpddrnet_trt.engines import CHECKPOINTS, available_engines, load_engine
from hpddrnet_trt.engines.base import Engine


def run_benchmark(
    entries: Sequence[Entry],
    images: ImageSet,
    settings: Settings | None = None,
    *,
    command: str | None = None,
    progress: bool = True,
    keep: Callable[[BenchmarkResult], object] | None = None,
) -> BenchmarkResult:
    """Compare ``entries`` on ``images``.

    Each entry is first started in child processes (memory, start-up, and whether it runs here at all), then all that
    run are loaded side by side and timed by each measure of :mod:`~hpddrnet_trt.benchmark.measures`, those on a GPU in
    rounds of their own and then those on the processor, scored on the whole images, and profiled. With
    ``settings.alone`` one entry is loaded at a time instead. What does not run is a row with its reason; what does
    not run at one size or by one measure leaves a note. ``keep`` gets what was found so far, but for pictures, after
    every size and batch.

    After Ctrl-C the result holds the finished rounds and images and says ``complete=False``; with
    nothing finished the interrupt goes on to the caller.

    Raises :class:`UsageError` without entries, for equal labels and for an unknown reference,
    :class:`BadInputFile` for a missing file, :class:`MissingDependency` without ``psutil``.
    """
    settings = settings or Settings()
    _check_entries(entries, settings)
    run = _Run(entries, images, settings, progress)
    command = command or command_line()
    try:
        run.measure(lambda: keep(run.result(command, pictures=False)) if keep is not None else None)
    except KeyboardInterrupt:
        run.complete = False
    if not run.complete and not run.measured:
        raise KeyboardInterrupt
    return run.result(command)


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
        if entry.make is None:
            existing_file(entry.path, "model file")


@dataclass
class _Candidate:
    """An entry on its way to its row."""

    entry: Entry
    runtime: str
    manifest: Manifest | None = None
    startup: Startup = field(default_factory=Startup)
    engine: Engine | None = None
    on_gpu: bool = False
    untimed: dict[str, list[str]] = field(default_factory=dict)  # sizes by reason
    layers: list[LayerGroups] = field(default_factory=list)
    bounds: list[RooflineBound] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.startup.notes.append(text)

    @property
    def precision(self) -> str | None:
        return precision_of(self.entry, self.manifest)

    @property
    def can_be_reference(self) -> bool:
        return self.entry.can_be_reference

    @property
    def can_stand_in(self) -> bool:
        """The same labels as PyTorch's to within rounding, where no checkpoint or no PyTorch is."""
        return self.entry.engine == "onnxruntime" and self.precision == "FP32" and not self.entry.options

    @property
    def checkpoint(self) -> str | None:
        """SHA-256 of the checkpoint that the file is, or was made from."""
        if self.entry.path.suffix.lower() in CHECKPOINTS:
            return sha256_of(self.entry.path)
        return None if self.manifest is None else self.manifest.checkpoint_sha256


class _Run:
    """State of one benchmark."""

    def __init__(self, entries: Sequence[Entry], images: ImageSet, settings: Settings, progress: bool) -> None:
        self.images, self.settings, self.quiet = images, settings, not progress
        self.candidates = {entry.label: _Candidate(entry, entry.engine) for entry in entries}
        self.machine = describe_machine()
        self.complete = True
        self.classes: list[ClassInfo] | None = list(images.classes) if images.classes is not None else None
        self.measured: list[Measured] = []
        self.busy_share: float | None = None
        self.scores = Scores(images.images)
        self.bound_source: str | None = None
        self.cases: list[BenchmarkCase] = []
        self.data_notes: list[str] = []
        for size in settings.sizes or (own_size(images.images),):
            for batch in sorted(set(settings.batches)):
                frames, note = timing_frames(images.images, *size, batch)
                self.cases.append(BenchmarkCase(Shape(*size, batch), frames))
                self.data_notes += [] if note in self.data_notes else [note]
        self._timings: dict[tuple[int, str, int, str | None], Timing] = {}
        self._loaded_ever: set[str] = set()
        self._dropped: dict[str, list[str]] = {}  # sizes by label
        self._end = None if settings.minutes is None else time.monotonic() + 60 * settings.minutes
        self._gpu = GpuSensor.open()
        self._watch = GpuWatch(self._gpu)
        self._timer = Timer(settings, self._watch, self.quiet)

    @property
    def reference(self) -> str | None:
        """The entry that ratios and agreement refer to: PyTorch as it comes, else the FP32 ONNX file in ONNX Runtime.

        None when it did not run.
        """
        ran = [label for label in self.candidates if label in self._loaded_ever]
        if self.settings.reference is not None:
            return self.settings.reference if self.settings.reference in ran else None
        ways = ("can_be_reference", "can_stand_in")
        return next((label for way in ways for label in ran if getattr(self.candidates[label], way)), None)

    @property
    def latencies(self) -> list[Measured]:
        return [measured for measured in self.measured if measured.measure == "end_to_end"]

    def measure(self, keep: Callable[[], object]) -> None:
        """Everything, in the order that the settings ask for."""
        meter = CpuMeter()
        if self.settings.alone:
            self._one_by_one(meter, keep)
        else:
            self._side_by_side(meter, keep)
        if self.complete and self.settings.roofline:
            self._bound()

    # -- steps ---------------------------------------------------------------------------------

    def _side_by_side(self, meter: CpuMeter, keep: Callable[[], object]) -> None:
        for one in self.candidates.values():
            one.manifest = manifest_or_none(one.entry.path)
        sizes = probed_sizes(self.cases, self.images.images, self.settings)
        for one in progress_bar(self.candidates.values(), desc="start each engine", unit="engine", show=not self.quiet):
            one.startup = start_entry(one.entry, self._options(one.entry), sizes)
        ready = [label for label, one in self.candidates.items() if one.startup.start is not None]
        with self._loaded(ready) as engines:
            # Beside engines on the processor a GPU would rest for seconds in every round, and slow down.
            groups = [
                {label: engine for label, engine in engines.items() if self.candidates[label].on_gpu == on_gpu}
                for on_gpu in (True, False)
            ]
            try:
                for case in self.cases:
                    for group in groups:
                        if group and self.complete:
                            able = {label: engine for label, engine in group.items() if self._takes(label, case)}
                            self._time(case, able)
                            keep()
            finally:
                self.busy_share = meter.others()
            if self.complete:
                self._score(engines)
                profiled = self.latencies if self.settings.layers else []
                for measured in progress_bar(profiled, desc="layers", unit="size", show=not self.quiet):
                    for label in measured.samples.seconds:
                        self._profile(label, measured)

    def _one_by_one(self, meter: CpuMeter, keep: Callable[[], object]) -> None:
        for size in dict.fromkeys(case.shape[:2] for case in self.cases):
            for label, one in self.candidates.items():
                cases = [case for case in self.cases if case.shape[:2] == size and one.entry.takes(case.shape)]
                if one.startup.reason is not None or not cases or not self.complete:
                    continue
                if self._late():
                    self._drop(label, cases)
                    continue
                with self._loaded([label]) as engines:
                    for case in cases if engines else ():
                        if self._late():
                            self._drop(label, [case])
                        elif self.complete:
                            self._time(case, engines)
                            self.busy_share = meter.others()
                            keep()
                    if label in engines and self.complete and not self._late():
                        self._look_once(label, engines)
                        keep()

    def _look_once(self, label: str, engines: Mapping[str, Engine]) -> None:
        """Accuracy, and time by layer at the first size that was timed, of an entry that has neither yet."""
        if self.scores.accuracy(label, None, len(self.classes or [])) is None:
            self._score(engines)
        timed = next((one for one in self.latencies if label in one.samples.seconds), None)
        if self.settings.layers and timed is not None and not self.candidates[label].layers:
            self._profile(label, timed)

    # -- parts of the steps --------------------------------------------------------------------

    @contextmanager
    def _loaded(self, labels: Sequence[str]) -> Iterator[dict[str, Engine]]:
        """Those that can be loaded, made before where they do not exist yet; closed at the end."""
        with ExitStack() as stack:
            engines: dict[str, Engine] = {}
            for label in labels:
                one = self.candidates[label]
                entry = one.entry
                try:
                    if entry.make is not None and not entry.path.exists():
                        entry.make()
                    one.manifest = manifest_or_none(entry.path)
                    engine = stack.enter_context(load_engine(entry.path, entry.engine, **self._options(entry)))
                    self._check_classes(engine.manifest)
                except FAILURES as exc:
                    one.startup.reason = describe(exc)
                else:
                    one.runtime, one.on_gpu = engine.runtime, not runs_on_cpu(engine)
                    engines[label] = one.engine = engine
            self._loaded_ever |= set(engines)
            try:
                yield engines
            finally:
                for label in engines:
                    self.candidates[label].engine = None

    def _takes(self, label: str, case: BenchmarkCase) -> bool:
        one = self.candidates[label]
        return one.startup.ran(case) and one.entry.takes(case.shape)

    def _late(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end

    def _drop(self, label: str, cases: Sequence[BenchmarkCase]) -> None:
        self._dropped.setdefault(label, []).extend(str(case.shape) for case in cases)

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

    def _time(self, case: BenchmarkCase, able: Mapping[str, Engine]) -> None:
        """Every measure in interleaved rounds of the engines that are ``able`` to run this size."""
        if not able:
            return
        timer = self._timer
        latency = timer.end_to_end(able, case)
        # A failure may leave an engine in any state: it is not asked again at this size.
        engines = {label: able[label] for label in latency.samples.seconds}
        for label, engine in engines.items():
            height, width = prepared(engine, case.frames[0]).shape[2:]
            if (height, width) != case.shape[:2]:
                self.candidates[label].note(
                    f"takes no frames of {case.shape}: they are padded to {height}×{width} and times include that"
                )
        self._keep(latency)
        if self.complete and self.settings.inference:
            self._keep(timer.inference(engines, case))
        if self.complete and self.settings.throughput:
            gpus = {label: self._gpu if self.candidates[label].on_gpu else None for label in engines}
            self._keep(timer.throughput(engines, case, gpus))

    def _keep(self, measured: Measured) -> None:
        if measured.samples.rounds:
            self.measured.append(measured)
        self.complete = not measured.samples.interrupted
        for label, reason in measured.samples.failures.items():
            sizes = self.candidates[label].untimed.setdefault(f"{MEASURES[measured.measure]}: {reason}", [])
            sizes.append(str(measured.case.shape))

    def _score(self, engines: Mapping[str, Engine]) -> None:
        """Labels of the engines on every whole image."""
        for label, engine in progress_bar(engines.items(), desc="accuracy", unit="engine", show=not self.quiet):
            planes: list[Grey8] = []
            try:
                planes.extend(end_to_end(engine)(image.grey[None])[0] for image in self.images.images)
            except FAILURES as exc:
                name = self.images.images[len(planes)].name
                self.candidates[label].note(f"accuracy not measured, {name}: {describe(exc)}")
            else:
                self.scores.add(label, planes)

    def _profile(self, label: str, measured: Measured) -> None:
        """Time by layer group, last, since profiling may disturb."""
        one = self.candidates[label]
        assert one.engine is not None  # only entries that are loaded are profiled
        median_s = float(np.median(measured.samples.seconds[label]))
        try:
            groups = layer_groups(one.engine, one.entry.path, measured.case, median_s)
        except FAILURES as exc:
            one.note(f"layers not timed at {measured.case.shape}: {describe(exc)}")
            return
        if groups is not None:
            one.layers.append(groups)

    def _bound(self) -> None:
        """The least time that a known GPU can need, of entries that ran on it, by an ONNX file of their checkpoint."""
        device = None if self._gpu is None else known_device(self._gpu.name)
        on_gpu = [label for label in self._loaded_ever if self.candidates[label].on_gpu]
        if device is None or not on_gpu:
            return
        self.bound_source = f"{device.name}, from its data sheet"
        onnx = [one for one in self.candidates.values() if one.entry.path.suffix.lower() == ".onnx"]
        graphs = {one.checkpoint: one.entry.path for one in onnx if one.checkpoint is not None}
        for label in on_gpu:
            one = self.candidates[label]
            graph = one.entry.path if one in onnx else graphs.get(one.checkpoint or "")
            if graph is None:
                one.note("no roofline bound: no ONNX file of its checkpoint is among the entries")
                continue
            shapes = [measured.case.shape for measured in self.latencies if label in measured.samples.seconds]
            try:
                one.bounds = roofline_bounds(graph, (one.precision or "FP32").lower(), shapes, device)
            except UserError as exc:
                one.note(f"no roofline bound: {exc}")

    # -- result --------------------------------------------------------------------------------

    def result(self, command: str, *, pictures: bool = True) -> BenchmarkResult:
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
            rows=[self._row(label, one) for label, one in self.candidates.items()],
            warnings=self._warnings(),
            pictures=[
                picture(image, self.scores.labels(index))
                for index, image in enumerate(self.images.images[: self.settings.gallery if pictures else 0])
            ],
            environments=[
                Environment(created=created, command=command, python=machine.python, libraries=machine.libraries)
            ],
            bound_source=self.bound_source,
            gpu_states=self._watch.states(),
        )

    def _row(self, label: str, one: _Candidate) -> Row:
        entry, manifest, startup = one.entry, one.manifest, one.startup
        timings: dict[Measure, list[Timing]] = {measure: [] for measure in MEASURES}
        for of in self.measured:
            if label in of.samples.seconds:
                timings[of.measure].append(self._timing(of, label))
        notes = [*startup.notes, *(f"not timed at {', '.join(sizes)}, {why}" for why, sizes in one.untimed.items())]
        if label in self._dropped:
            notes.append(f"not measured at {', '.join(self._dropped[label])}: the time was over before its turn")
        measured = bool(timings["end_to_end"])
        reason = startup.reason or "; ".join(notes) or "the run was interrupted before its turn"
        return Row(
            label=label,
            file=entry.path.name,
            file_bytes=entry.path.stat().st_size if entry.path.exists() else 0,
            runtime=one.runtime,
            precision=one.precision,
            status="measured" if measured else "not run",
            reason=None if measured else reason,
            notes=notes if measured else [],
            attention=manifest.attention if manifest is not None else None,
            build_s=manifest.engine.build_seconds if manifest is not None and manifest.engine is not None else None,
            start=startup.start,
            memory=startup.memory,
            memory_failures=startup.failures,
            end_to_end=timings["end_to_end"],
            inference=timings["inference"],
            throughput=timings["throughput"],
            layers=one.layers,
            bounds=one.bounds if measured else [],
            accuracy=self.scores.accuracy(label, self.reference, len(self.classes or [])) if measured else None,
        )

    def _timing(self, measured: Measured, label: str) -> Timing:
        """Beside the reference by the same measure at the same size, in the same rounds if it was there; made once."""
        reference = self.reference
        same = [one for one in self.measured if one.measure == measured.measure and one.case is measured.case]
        beside = next((one for one in [measured, *same] if reference in one.samples.seconds), None)
        key = (id(measured), label, id(beside), reference)
        if key not in self._timings:
            given = None if beside is None or reference is None else (beside, reference)
            self._timings[key] = measured.timing(label, given, self.settings.seed)
        return self._timings[key]

    def _warnings(self) -> list[str]:
        warnings, plan = list(self.machine.warnings), self.settings
        if self.busy_share is not None:
            warnings += busy_warnings(self.busy_share, "while timing")
        if not self.complete:
            fewest: dict[str, int] = {}
            for one in self.latencies:
                fewest[str(one.case.shape)] = min(one.samples.rounds, fewest.get(str(one.case.shape), plan.rounds))
            rounds = ", ".join(f"{count} at {shape}" for shape, count in fewest.items())
            warnings.append(
                f"the run was interrupted; figures are of the finished rounds ({rounds} of {plan.rounds}) "
                "and images"
            )
        if self._dropped:
            sizes = [f"{label} at {', '.join(dropped)}" for label, dropped in self._dropped.items()]
            warnings.append(
                f"the time of {plan.minutes:.2g} minutes was over; not measured were: {'; '.join(sizes)}"
            )
        if self.reference is None:
            warnings.append("neither PyTorch nor an FP32 ONNX file ran, so there are no ratios and no agreement")
        elif self.settings.reference is None and not self.candidates[self.reference].entry.is_torch:
            warnings.append(f"no checkpoint ran in PyTorch, so the reference is {self.reference}")
        unsteady = [
            f"{label} ({MEASURES[one.measure]}, {one.case.shape})" for one in self.measured for label in one.unsteady
        ]
        if unsteady:
            warnings.append(f"times were not steady after warm-up: {', '.join(unsteady)}")
        for state in self._watch.states():
            if state.throttled:
                warnings.append(f"{state.name} was slowed down while timing: {', '.join(state.throttled)}")
            if (state.idle_share or 0) > IDLE_SHARE:
                warnings.append(
                    f"{state.name} had nothing to do in {state.idle_share:.0%} of the looks while timing, and an idle "
                    "GPU lowers its clocks: figures are of a GPU that was not kept busy"
                )
        return warnings
