"""The comparison: start every entry, time them in interleaved rounds, score their labels, look inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from tqdm import tqdm

from hpddrnet_trt.benchmark.entries import Entry, manifest_or_none, precision_of
from hpddrnet_trt.benchmark.images import Grey8, Image, ImageSet, own_size, picture, timing_frames
from hpddrnet_trt.benchmark.machine import CpuMeter, GpuSensor, GpuWatch, busy_warnings, describe_machine
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
    Accuracy,
    BenchmarkResult,
    Environment,
    LayerGroups,
    Measure,
    Picture,
    RooflineBound,
    Row,
    Settings,
    Shape,
    Timing,
)
from hpddrnet_trt.benchmark.timing import FAILURES
from hpddrnet_trt.core.errors import UsageError, UserError, describe
from hpddrnet_trt.core.files import existing_file, sha256_of
from hpddrnet_trt.core.manifest import ClassInfo, Manifest
from hpddrnet_trt.core.metrics import LabelComparison
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
    run = _Run(entries, images, settings, progress)
    try:
        run.start()
        run.load()
        run.time()
        if run.complete:
            run.score()
            run.profile()
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


class Scores:
    """Labels of all entries against the masks, and against the reference's, over the images seen so far.

    ``labels``: the entries' labels; ``reference``: the one that agreement refers to, or None;
    ``classes``: their number.
    """

    def __init__(self, labels: Sequence[str], reference: str | None, classes: int) -> None:
        self.entries, self.reference = list(labels), reference
        self._against_masks = {label: LabelComparison(classes) for label in labels}
        self._against_reference = {label: LabelComparison(classes) for label in labels}
        self._images = dict.fromkeys(labels, 0)

    def add(self, labels: Mapping[str, Grey8], mask: Grey8 | None) -> None:
        """One image; an entry without labels for it is not scored from here on."""
        self.entries = [label for label in self.entries if label in labels]
        reference = labels.get(self.reference) if self.reference is not None else None
        for label, plane in labels.items():
            self._images[label] += 1
            if mask is not None:
                self._against_masks[label].update(plane, mask)
            if reference is not None:
                self._against_reference[label].update(plane, reference)

    def accuracy(self, label: str) -> Accuracy | None:
        """Figures of an entry that labelled every image seen, else None."""
        if label not in self.entries or not self._images[label]:
            return None
        comparison = self._against_masks[label]
        scores = comparison.scores()
        return Accuracy(
            images=self._images[label],
            agreement=_number(self._against_reference[label].agreement),
            masked_images=comparison.images,
            miou=_number(scores.miou),
            masked_miou=_number(scores.masked_miou),
            pixel_accuracy=_number(scores.pixel_accuracy),
            iou=[_number(value) for value in scores.iou] if comparison.images else [],
        )


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


@dataclass
class _Candidate:
    """An entry on its way to its row."""

    entry: Entry
    manifest: Manifest | None
    runtime: str
    startup: Startup = field(default_factory=Startup)
    engine: Engine | None = None
    untimed: dict[str, list[str]] = field(default_factory=dict)  # sizes by reason
    layers: list[LayerGroups] = field(default_factory=list)
    bounds: list[RooflineBound] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.startup.notes.append(text)

    @property
    def precision(self) -> str | None:
        return precision_of(self.entry, self.manifest)

    @property
    def checkpoint(self) -> str | None:
        """SHA-256 of the checkpoint that the file is, or was made from."""
        if self.entry.path.suffix.lower() in CHECKPOINTS:
            return sha256_of(self.entry.path)
        return None if self.manifest is None else self.manifest.checkpoint_sha256


class _Run:
    """State of one benchmark; the steps are called in order by :func:`run_benchmark`."""

    def __init__(self, entries: Sequence[Entry], images: ImageSet, settings: Settings, progress: bool) -> None:
        self.images, self.settings, self.quiet = images, settings, not progress
        self.candidates = {
            entry.label: _Candidate(entry, manifest_or_none(entry.path), entry.engine) for entry in entries
        }
        self.machine = describe_machine()
        self.complete = True
        self.classes: list[ClassInfo] | None = list(images.classes) if images.classes is not None else None
        self.measured: list[Measured] = []
        self.busy_share: float | None = None
        self.scores: Scores | None = None
        self.pictures: list[Picture] = []
        self.bound_source: str | None = None
        self.cases: list[BenchmarkCase] = []
        self.data_notes: list[str] = []
        for size in settings.sizes or (own_size(images.images),):
            for batch in sorted(set(settings.batches)):
                frames, note = timing_frames(images.images, *size, batch)
                self.cases.append(BenchmarkCase(Shape(*size, batch), frames))
                self.data_notes += [] if note in self.data_notes else [note]
        self._stack = ExitStack()
        self._gpu = GpuSensor.open()
        self._watch = GpuWatch(self._gpu)

    @property
    def engines(self) -> dict[str, Engine]:
        """Those that are loaded, by label."""
        return {label: one.engine for label, one in self.candidates.items() if one.engine is not None}

    @property
    def reference(self) -> str | None:
        """The entry that ratios and agreement refer to; None when it did not run."""
        if self.settings.reference is not None:
            return self.settings.reference if self.settings.reference in self.engines else None
        return next((label for label in self.engines if self.candidates[label].entry.can_be_reference), None)

    @property
    def latencies(self) -> list[Measured]:
        return [measured for measured in self.measured if measured.measure == "end_to_end"]

    # -- steps ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Start every entry in processes of its own, one for each size."""
        sizes = probed_sizes(self.cases, self.images.images, self.settings)
        for one in tqdm(self.candidates.values(), desc="start each engine", unit="engine", disable=self.quiet):
            one.startup = start_entry(one.entry, self._options(one.entry), sizes)

    def load(self) -> None:
        """Load those that run into this process, side by side."""
        for one in self.candidates.values():
            if one.startup.start is None:
                continue
            entry = one.entry
            try:
                engine = self._stack.enter_context(load_engine(entry.path, entry.engine, **self._options(entry)))
                self._check_classes(engine.manifest)
            except FAILURES as exc:
                one.startup.reason = describe(exc)
            else:
                one.engine, one.runtime = engine, engine.runtime

    def time(self) -> None:
        """Every measure in interleaved rounds, at each size and batch."""
        if not self.engines:
            return
        meter = CpuMeter()
        timer = Timer(self.settings, self._watch, self.quiet)
        try:
            for case in self.cases:
                if self.complete:
                    self._time(timer, case)
        finally:
            self.busy_share = meter.others()

    def score(self) -> None:
        """Labels of every entry on every whole image: accuracy, agreement, gallery."""
        if not self.engines:
            return
        scores = self.scores = Scores(list(self.engines), self.reference, len(self.classes or []))
        for image in tqdm(self.images.images, desc="accuracy", unit="image", disable=self.quiet):
            labelled = ((label, self._labels(self.candidates[label], image)) for label in scores.entries)
            planes = {label: labels for label, labels in labelled if labels is not None}
            scores.add(planes, image.mask)
            if len(self.pictures) < self.settings.gallery:
                self.pictures.append(picture(image, planes))

    def profile(self) -> None:
        """Time by layer group, last, since profiling may disturb; and the least time that a known GPU can need."""
        if self.settings.layers:
            for measured in tqdm(self.latencies, desc="layers", unit="size", disable=self.quiet):
                for label in measured.samples.seconds:
                    self._profile(label, measured)
        if self.settings.roofline:
            self._bound()

    def close(self) -> None:
        self._stack.close()

    # -- parts of the steps --------------------------------------------------------------------

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

    def _time(self, timer: Timer, case: BenchmarkCase) -> None:
        able = {label: engine for label, engine in self.engines.items() if self.candidates[label].startup.ran(case)}
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
            gpus = {label: None if runs_on_cpu(engine) else self._gpu for label, engine in engines.items()}
            self._keep(timer.throughput(engines, case, gpus))

    def _keep(self, measured: Measured) -> None:
        if measured.samples.rounds:
            self.measured.append(measured)
        self.complete = not measured.samples.interrupted
        for label, reason in measured.samples.failures.items():
            sizes = self.candidates[label].untimed.setdefault(f"{MEASURES[measured.measure]}: {reason}", [])
            sizes.append(str(measured.case.shape))

    def _labels(self, one: _Candidate, image: Image) -> Grey8 | None:
        assert one.engine is not None  # only entries that are loaded are scored
        try:
            labels: Grey8 = end_to_end(one.engine)(image.grey[None])[0]
        except FAILURES as exc:
            one.note(f"accuracy not measured, {image.name}: {describe(exc)}")
            return None
        return labels

    def _profile(self, label: str, measured: Measured) -> None:
        one = self.candidates[label]
        median_s = float(np.median(measured.samples.seconds[label]))
        try:
            groups = layer_groups(self.engines[label], one.entry.path, measured.case, median_s)
        except FAILURES as exc:
            one.note(f"layers not timed at {measured.case.shape}: {describe(exc)}")
            return
        if groups is not None:
            one.layers.append(groups)

    def _bound(self) -> None:
        """Of entries that ran on a GPU with a known data sheet, by an ONNX file of the same checkpoint."""
        device = None if self._gpu is None else known_device(self._gpu.name)
        on_gpu = [label for label, engine in self.engines.items() if not runs_on_cpu(engine)]
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
            rows=[self._row(label, one) for label, one in self.candidates.items()],
            warnings=self._warnings(),
            pictures=self.pictures,
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
                timings[of.measure].append(of.timing(label, self.reference, self.settings.seed))
        notes = [*startup.notes, *(f"not timed at {', '.join(sizes)}, {why}" for why, sizes in one.untimed.items())]
        measured = bool(timings["end_to_end"])
        reason = startup.reason or "; ".join(notes) or "the run was interrupted before its turn"
        return Row(
            label=label,
            file=entry.path.name,
            file_bytes=entry.path.stat().st_size,
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
            accuracy=self.scores.accuracy(label) if self.scores is not None and measured else None,
        )

    def _warnings(self) -> list[str]:
        warnings = list(self.machine.warnings)
        if self.busy_share is not None:
            warnings += busy_warnings(self.busy_share, "while timing")
        if not self.complete:
            rounds = ", ".join(f"{one.samples.rounds} at {one.case.shape}" for one in self.latencies)
            warnings.append(
                f"the run was interrupted; figures are of the finished rounds ({rounds} of {self.settings.rounds}) "
                "and images"
            )
        if self.reference is None:
            warnings.append("no PyTorch reference ran, so there are no ratios and no agreement")
        unsteady = [
            f"{label} ({MEASURES[one.measure]}, {one.case.shape})" for one in self.measured for label in one.unsteady
        ]
        if unsteady:
            warnings.append(f"times were not steady after warm-up: {', '.join(unsteady)}")
        for state in self._watch.states():
            if state.throttled:
                warnings.append(f"{state.name} was slowed down while timing: {', '.join(state.throttled)}")
        return warnings
