"""The comparison: start every entry, time them in interleaved rounds, score their labels, look inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hpddrnet_trt.benchmark.entries import Entry, entries_for, manifest_or_none, precision_of
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
from hpddrnet_trt.benchmark.timing import FAILURES, latency_of
from hpddrnet_trt.core.errors import UsageError, UserError, describe
from hpddrnet_trt.core.files import existing_file, sha256_of
from hpddrnet_trt.core.manifest import ClassInfo, Manifest
from hpddrnet_trt.core.metrics import LabelComparison
from hpddrnet_trt.core.provenance import command_line
from hpddrnet_trt.engines import CHECKPOINTS, available_engines, load_engine
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


class _Run:
    """State of one benchmark; the steps are called in order by :func:`run_benchmark`."""

    def __init__(self, entries: list[Entry], images: ImageSet, settings: Settings, progress: bool) -> None:
        self.entries, self.images, self.settings = entries, images, settings
        self.quiet = not progress
        self.machine = describe_machine()
        self.complete = True
        self.started: dict[str, Startup] = {}
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
        self.bounds: dict[str, list[RooflineBound]] = {}
        self.bound_source: str | None = None
        self._stack = ExitStack()
        self._gpu = GpuSensor.open()
        self._watch = GpuWatch(self._gpu)
        self._cases()

    def _cases(self) -> None:
        images, plan = self.images.images, self.settings
        self.cases: list[BenchmarkCase] = []
        self.data_notes: list[str] = []
        for size in plan.sizes or (own_size(images),):
            for batch in sorted(set(plan.batches)):
                frames, note = timing_frames(images, *size, batch)
                self.cases.append(BenchmarkCase(Shape(*size, batch), frames))
                self.data_notes += [] if note in self.data_notes else [note]

    # -- steps ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Start every entry in processes of its own, one for each size."""
        sizes = probed_sizes(self.cases, self.images.images, self.settings)
        for entry in tqdm(self.entries, desc="start each engine", unit="engine", disable=self.quiet):
            startup = self.started[entry.label] = start_entry(entry, self._options(entry), sizes)
            self.notes[entry.label] += startup.notes
            if startup.reason is not None:
                self.reasons[entry.label] = startup.reason

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
            labelled = ((label, self._labels(label, image)) for label in scores.entries)
            planes = {label: labels for label, labels in labelled if labels is not None}
            scores.add(planes, image.mask)
            if len(self.pictures) < self.settings.gallery:
                self.pictures.append(picture(image, planes))

    def profile(self) -> None:
        """Time by layer group, last, since profiling may disturb; and the least time that a known GPU can need."""
        paths = {entry.label: entry.path for entry in self.entries}
        if self.settings.layers:
            for measured in tqdm(self._latencies(), desc="layers", unit="size", disable=self.quiet):
                for label in measured.samples.seconds:
                    self._profile(label, paths[label], measured)
        if self.settings.roofline:
            self._bound()

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

    def _time(self, timer: Timer, case: BenchmarkCase) -> None:
        able = {label: engine for label, engine in self.engines.items() if self.started[label].ran(case)}
        latency = timer.end_to_end(able, case)
        for label in latency.samples.seconds:
            self._note_padding(label, case)
        self._keep(latency)
        # A failure may leave an engine in any state: it is not asked again at this size.
        engines = {label: self.engines[label] for label in latency.samples.seconds}
        if self.complete and self.settings.inference:
            self._keep(timer.inference(engines, case))
        if self.complete and self.settings.throughput:
            gpus = {label: None if runs_on_cpu(engine) else self._gpu for label, engine in engines.items()}
            self._keep(timer.throughput(engines, case, gpus))

    def _note_padding(self, label: str, case: BenchmarkCase) -> None:
        height, width = prepared(self.engines[label], case.frames[0]).shape[2:]
        if (height, width) != case.shape[:2]:
            self.notes[label].append(
                f"takes no frames of {case.shape}: they are padded to {height}×{width} and times include that"
            )

    def _keep(self, measured: Measured) -> None:
        if measured.samples.rounds:
            self.measured.append(measured)
        self.complete = not measured.samples.interrupted
        for label, reason in measured.samples.failures.items():
            named = f"{MEASURES[measured.measure]}: {reason}"
            self.untimed.setdefault((label, named), []).append(str(measured.case.shape))

    def _latencies(self) -> list[Measured]:
        return [measured for measured in self.measured if measured.measure == "end_to_end"]

    def _labels(self, label: str, image: Image) -> Grey8 | None:
        try:
            labels: Grey8 = end_to_end(self.engines[label])(image.grey[None])[0]
        except FAILURES as exc:
            self.notes[label].append(f"accuracy not measured, {image.name}: {describe(exc)}")
            return None
        return labels

    def _profile(self, label: str, path: Path, measured: Measured) -> None:
        median_s = latency_of(measured.samples.seconds[label]).p50
        try:
            groups = layer_groups(self.engines[label], path, measured.case, median_s)
        except FAILURES as exc:
            self.notes[label].append(f"layers not timed at {measured.case.shape}: {describe(exc)}")
            return
        if groups is not None:
            self.layers[label].append(groups)

    def _bound(self) -> None:
        """Of entries that ran on a GPU with a known data sheet, by an ONNX file of the same checkpoint."""
        device = None if self._gpu is None else known_device(self._gpu.name)
        on_gpu = {label for label, engine in self.engines.items() if not runs_on_cpu(engine)}
        if device is None or not on_gpu:
            return
        self.bound_source = f"{device.name}, from its data sheet"
        graphs = [entry.path for entry in self.entries if entry.path.suffix.lower() == ".onnx"]
        by_checkpoint = {_checkpoint(path): path for path in graphs}
        for entry in (entry for entry in self.entries if entry.label in on_gpu):
            label, checkpoint = entry.label, _checkpoint(entry.path)
            graph = entry.path if entry.path in graphs else by_checkpoint.get(checkpoint) if checkpoint else None
            if graph is None:
                self.notes[label].append("no roofline bound: no ONNX file of its checkpoint is among the entries")
                continue
            shapes = [one.case.shape for one in self._latencies() if label in one.samples.seconds]
            try:
                precision = (precision_of(entry, manifest_or_none(entry.path)) or "FP32").lower()
                self.bounds[label] = roofline_bounds(graph, precision, shapes, device)
            except UserError as exc:
                self.notes[label].append(f"no roofline bound: {exc}")

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
            bound_source=self.bound_source,
            gpu_states=self._watch.states(),
        )

    def _row(self, entry: Entry) -> Row:
        label, manifest = entry.label, manifest_or_none(entry.path)
        end_to_end_times = self._timings("end_to_end", label)
        untimed = [(reason, sizes) for (whose, reason), sizes in self.untimed.items() if whose == label]
        notes = [*self.notes[label], *(f"not timed at {', '.join(sizes)}, {reason}" for reason, sizes in untimed)]
        reason, measured = None, bool(end_to_end_times)
        if not measured:
            reason = self.reasons.get(label) or "; ".join(notes) or "the run was interrupted before its turn"
        built = manifest.engine if manifest is not None else None
        startup = self.started.get(label, Startup())
        return Row(
            label=label,
            file=entry.path.name,
            file_bytes=entry.path.stat().st_size,
            runtime=self.runtimes.get(label, entry.engine),
            precision=precision_of(entry, manifest),
            status="measured" if measured else "not run",
            reason=reason,
            notes=notes if measured else [],
            attention=manifest.attention if manifest is not None else None,
            build_s=built.build_seconds if built is not None else None,
            start=startup.start,
            memory=startup.memory,
            memory_failures=startup.failures,
            end_to_end=end_to_end_times,
            inference=self._timings("inference", label),
            throughput=self._timings("throughput", label),
            layers=self.layers[label],
            bounds=self.bounds.get(label, []) if measured else [],
            accuracy=self.scores.accuracy(label) if self.scores is not None and measured else None,
        )

    def _timings(self, measure: Measure, label: str) -> list[Timing]:
        own = (one for one in self.measured if one.measure == measure and label in one.samples.seconds)
        return [one.timing(label, self.reference, self.settings.seed) for one in own]

    def _all_warnings(self) -> list[str]:
        warnings = list(self.machine.warnings)
        if self.busy_share is not None:
            warnings += busy_warnings(self.busy_share, "while timing")
        if not self.complete:
            rounds = ", ".join(f"{one.samples.rounds} at {one.case.shape}" for one in self._latencies())
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


def _checkpoint(path: Path) -> str | None:
    """SHA-256 of the checkpoint that a model file is, or was made from."""
    if path.suffix.lower() in CHECKPOINTS:
        return sha256_of(path)
    manifest = manifest_or_none(path)
    return None if manifest is None else manifest.checkpoint_sha256
