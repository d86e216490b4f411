"""The comparison: start every entry, time them in interleaved rounds, score their labels."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PillowImage
from tqdm import tqdm

from hpddrnet_trt.benchmark.frame import frame_to_labels
from hpddrnet_trt.benchmark.images import Grey8, Image, ImageSet, own_size, timing_frames
from hpddrnet_trt.benchmark.machine import CpuMeter, busy_warnings, describe_machine
from hpddrnet_trt.benchmark.probe import probe
from hpddrnet_trt.benchmark.result import (
    Accuracy,
    BenchmarkResult,
    Picture,
    Ratio,
    Row,
    Settings,
    Start,
    Timing,
)
from hpddrnet_trt.benchmark.timing import Laps, Runner, describe, latency_of, ratio_of_medians, time_interleaved
from hpddrnet_trt.engines import available_engines, engine_status, load_engine
from hpddrnet_trt.engines.base import input_contract
from hpddrnet_trt.errors import BadInputFile, UsageError, UserError
from hpddrnet_trt.files import existing_file
from hpddrnet_trt.manifest import ClassInfo, Manifest, read_manifest
from hpddrnet_trt.metrics import ConfusionMatrix
from hpddrnet_trt.provenance import command_line
from hpddrnet_trt.views import network_input

logger = logging.getLogger(__name__)

CHECKPOINTS = (".safetensors", ".pth", ".pt")
GALLERY_EDGE = 512  # pixels of an image shown in the report
_NAMES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
_FLAVOURS = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}


@dataclass(frozen=True)
class Entry:
    """One thing to compare: a model file, the engine that runs it and that engine's options."""

    label: str
    path: Path
    engine: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_torch(self) -> bool:
        return self.engine == "torch" or (self.engine == "auto" and self.path.suffix.lower() in CHECKPOINTS)


def entries_for(files: Sequence[str | Path]) -> list[Entry]:
    """Every file with every engine of this installation that runs its kind, labelled for people.

    Checkpoints run in PyTorch, ONNX files in ONNX Runtime and, where installed, OpenVINO (except
    files quantised in ONNX Runtime's own form), ``.engine`` files in TensorRT. Raises
    :class:`BadInputFile` for a file that does not exist; one that cannot be read becomes a row
    with the reason.
    """
    openvino = engine_status("openvino").usable
    entries: list[Entry] = []
    for path in (existing_file(file, "model file") for file in files):
        manifest = _manifest_or_none(path)
        for engine in _engines_of(path, manifest, openvino):
            parts = [_name_of(engine, manifest), _precision(path, manifest), _form(engine, manifest)]
            label = " ".join(part for part in parts if part)
            if manifest is None or any(entry.label == label for entry in entries):
                label = f"{label} ({path.name})"
            # Labels only, like the others: logits need not leave the GPU.
            entries.append(Entry(label, path, engine, {"output": "labels"} if engine == "torch" else {}))
    return entries


def _engines_of(path: Path, manifest: Manifest | None, openvino: bool) -> list[str]:
    if path.suffix.lower() in CHECKPOINTS:
        return ["torch"]
    if path.suffix.lower() != ".onnx":
        return ["auto"]
    safe = manifest is None or manifest.quantised_for != "onnxruntime"
    return ["onnxruntime", "openvino"] if openvino and safe else ["onnxruntime"]


def _name_of(engine: str, manifest: Manifest | None) -> str:
    if engine != "auto":
        return _NAMES[engine]
    return _FLAVOURS[manifest.engine.flavour] if manifest is not None and manifest.engine is not None else "TensorRT"


def _form(engine: str, manifest: Manifest | None) -> str | None:
    """Tells TensorRT's explicit quantisation, run by a CPU engine, from ONNX Runtime's own."""
    foreign = engine != "auto" and manifest is not None and manifest.quantised_for == "tensorrt"
    return "Q/DQ" if foreign else None


def _precision(path: Path, manifest: Manifest | None) -> str | None:
    if path.suffix.lower() in CHECKPOINTS:
        return "FP32"
    return manifest.precision.upper() if manifest is not None and manifest.precision is not None else None


def _manifest_or_none(path: Path) -> Manifest | None:
    if path.suffix.lower() in (".pth", ".pt"):
        return None  # foreign checkpoints describe themselves only through their weights
    try:
        return read_manifest(path)
    except BadInputFile as exc:
        logger.info("%s", exc)
        return None


def run_benchmark(
    entries: Sequence[Entry],
    images: ImageSet,
    settings: Settings | None = None,
    *,
    command: str | None = None,
    progress: bool = True,
) -> BenchmarkResult:
    """Compare ``entries`` on ``images``, frame to labels, in one interleaved run.

    Each entry is first started in a child process (memory, start-up, and whether it runs here at
    all), then all that run are loaded side by side, timed in rounds, and scored on the whole images.
    What does not run is a row with its reason.

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
    except KeyboardInterrupt:
        run.complete = False
    finally:
        run.close()
    if not run.complete and not run.laps:
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
        self.reasons: dict[str, str] = {}
        self.notes: dict[str, list[str]] = {entry.label: [] for entry in entries}
        self.starts: dict[str, Start] = {}
        self.runtimes: dict[str, str] = {}
        self.runners: dict[str, Runner] = {}
        self.classes: list[ClassInfo] | None = list(images.classes) if images.classes is not None else None
        self.laps: dict[tuple[int, int], Laps] = {}
        self.busy_share: float | None = None
        self.scores: _Scores | None = None
        self.pictures: list[Picture] = []
        self._stack = ExitStack()
        sizes = settings.sizes or (own_size(images.images),)
        made = {size: timing_frames(images.images, *size, settings.batch) for size in sizes}
        self.frames = {size: frames for size, (frames, _) in made.items()}
        self.data_notes = [note for _, note in made.values()]

    # -- steps ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Start every entry in a process of its own."""
        firsts = [frames[0] for frames in self.frames.values()]
        for entry in tqdm(self.entries, desc="start each engine", unit="engine", disable=self.quiet):
            self._start(entry, firsts)

    def load(self) -> None:
        """Load those that run into this process, side by side."""
        for entry in self.entries:
            if entry.label in self.starts:
                self._load(entry)

    def time(self) -> None:
        """Interleaved rounds at each size."""
        if not self.runners:
            return
        meter, plan = CpuMeter(), self.settings
        for (height, width), frames in self.frames.items():
            steps = (plan.rounds + plan.warmup) * len(self.runners)
            with tqdm(total=steps, desc=f"time {height}x{width}", unit="run", disable=self.quiet) as bar:
                laps = time_interleaved(
                    self.runners, frames, rounds=plan.rounds, warmup=plan.warmup, seed=plan.seed,
                    pause_s=plan.pause_ms / 1000, on_step=bar.update,
                )  # fmt: skip
            for label, reason in laps.failures.items():
                self.notes[label].append(f"not timed at {height}x{width}: {reason}")
            if laps.rounds:
                self.laps[height, width] = laps
            if laps.interrupted:
                self.complete = False
                break
        self.busy_share = meter.others()

    def score(self) -> None:
        """Labels of every entry on every whole image: accuracy, agreement, gallery."""
        if not self.runners:
            return
        scores = self.scores = _Scores(list(self.runners), self.reference, len(self.classes or []))
        for image in tqdm(self.images.images, desc="accuracy", unit="image", disable=self.quiet):
            labelled = ((label, self._labels(label, image)) for label in scores.entries)
            found = {label: labels for label, labels in labelled if labels is not None}
            scores.add(found, image.mask)
            if len(self.pictures) < self.settings.gallery:
                self.pictures.append(_picture(image, found))

    def close(self) -> None:
        self._stack.close()

    # -- parts ---------------------------------------------------------------------------------

    @property
    def reference(self) -> str | None:
        """The entry that ratios and agreement refer to; None when it did not run."""
        if self.settings.reference is not None:
            return self.settings.reference if self.settings.reference in self.runners else None
        return next((entry.label for entry in self.entries if entry.is_torch and entry.label in self.runners), None)

    def _start(self, entry: Entry, frames: Sequence[Grey8]) -> None:
        try:
            if entry.engine == "openvino":
                self._verify_openvino(entry)
            self.starts[entry.label] = probe(entry.path, entry.engine, self._options(entry), frames)
        except UserError as exc:
            self.reasons[entry.label] = str(exc)

    def _load(self, entry: Entry) -> None:
        try:
            engine = self._stack.enter_context(load_engine(entry.path, entry.engine, **self._options(entry)))
            self._check_classes(engine.manifest)
        except (UserError, RuntimeError, MemoryError) as exc:
            self.reasons[entry.label] = describe(exc)
            return
        self.runtimes[entry.label] = engine.runtime
        self.runners[entry.label] = frame_to_labels(engine)

    def _labels(self, label: str, image: Image) -> Grey8 | None:
        try:
            labels: Grey8 = self.runners[label](image.grey[None])[0]
        except (UserError, RuntimeError, MemoryError, ValueError) as exc:
            self.notes[label].append(f"accuracy not measured, {image.name}: {describe(exc)}")
            return None
        return labels

    def _options(self, entry: Entry) -> dict[str, Any]:
        threads = None if entry.path.suffix.lower() == ".engine" else self.settings.threads
        return {**({} if threads is None else {"threads": threads}), **entry.options}

    def _verify_openvino(self, entry: Entry) -> None:
        # OpenVINO has been seen to crash, and to give wrong labels: compare before it is trusted.
        from hpddrnet_trt.engines.openvino import verify_in_child

        manifest = read_manifest(entry.path)
        frame = next(iter(self.frames.values()))[0]
        batch = network_input(list(frame), input_contract(manifest), manifest.normalisation)
        share = verify_in_child(entry.path, batch)
        self.notes[entry.label].append(f"checked in a child process: {share:.2%} of labels as ONNX Runtime's")

    def _check_classes(self, manifest: Manifest) -> None:
        if self.classes is None:
            self.classes = list(manifest.classes)
        known, wanted = manifest.class_names, [entry.name for entry in self.classes]
        if known != wanted:
            raise UserError(
                f"it knows the classes {', '.join(known)}, the others or the masks {', '.join(wanted)}: "
                "labels cannot be compared"
            )

    # -- result --------------------------------------------------------------------------------

    def result(self, command: str) -> BenchmarkResult:
        return BenchmarkResult(
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=command,
            complete=self.complete,
            settings=self.settings,
            machine=self.machine,
            engines=available_engines(),
            busy_share=self.busy_share,
            data=f"{self.images.name}, {len(self.images.images)} images",
            data_notes=self.data_notes,
            classes=self.classes or [],
            reference=self.reference,
            rows=[self._row(entry) for entry in self.entries],
            warnings=self._warnings(),
            pictures=self.pictures,
        )

    def _row(self, entry: Entry) -> Row:
        label, manifest = entry.label, _manifest_or_none(entry.path)
        timings = [self._timing(size, laps, label) for size, laps in self.laps.items() if label in laps.samples]
        notes = list(self.notes[label])
        reason = None
        if not timings:
            reason = self.reasons.get(label) or "; ".join(notes) or "the run was interrupted before its turn"
        return Row(
            label=label,
            file=entry.path.name,
            file_bytes=entry.path.stat().st_size,
            runtime=self.runtimes.get(label, entry.engine),
            precision=_precision(entry.path, manifest),
            status="measured" if timings else "not run",
            reason=reason,
            notes=notes if timings else [],
            start=self.starts.get(label),
            timings=timings,
            accuracy=self.scores.accuracy(label) if self.scores is not None and timings else None,
        )

    def _timing(self, size: tuple[int, int], laps: Laps, label: str) -> Timing:
        samples = laps.samples[label]
        latency = latency_of(samples)
        ratio = None
        if self.reference in laps.samples:
            found = ratio_of_medians(laps.samples[self.reference], samples, seed=self.settings.seed)
            ratio = Ratio(value=found.value, low=found.low, high=found.high)
        batch = self.settings.batch
        return Timing(
            height=size[0], width=size[1], batch=batch,
            samples_ms=[round(1000 * value, 4) for value in samples],
            p50_ms=1000 * latency.p50, p95_ms=1000 * latency.p95, p99_ms=1000 * latency.p99,
            max_ms=1000 * latency.maximum, images_per_s=batch / latency.p50, ratio=ratio,
        )  # fmt: skip

    def _warnings(self) -> list[str]:
        found = list(self.machine.warnings)
        if self.busy_share is not None:
            found += busy_warnings(self.busy_share, "while timing")
        if not self.complete:
            rounds = ", ".join(f"{laps.rounds} at {h}x{w}" for (h, w), laps in self.laps.items())
            found.append(
                f"the run was interrupted; figures are of the finished rounds ({rounds} of {self.settings.rounds}) "
                "and images"
            )
        if self.reference is None:
            found.append("no PyTorch reference ran, so there are no ratios and no agreement")
        return found


class _Scores:
    """Confusion matrices and agreement counts of all entries over the images seen so far."""

    def __init__(self, labels: Sequence[str], reference: str | None, classes: int) -> None:
        self.entries, self.reference = list(labels), reference
        self._matrices = {label: ConfusionMatrix(classes) for label in labels}
        self._equal = dict.fromkeys(labels, 0)
        self._pixels = dict.fromkeys(labels, 0)
        self._images = dict.fromkeys(labels, 0)

    def add(self, found: Mapping[str, Grey8], mask: Grey8 | None) -> None:
        """One image; an entry without labels for it is not scored from here on."""
        self.entries = [label for label in self.entries if label in found]
        reference = found.get(self.reference) if self.reference is not None else None
        for label, labels in found.items():
            self._images[label] += 1
            if mask is not None:
                self._matrices[label].update(labels, mask)
            if reference is not None:
                self._equal[label] += int(np.count_nonzero(labels == reference))
                self._pixels[label] += labels.size

    def accuracy(self, label: str) -> Accuracy | None:
        """Figures of an entry that labelled every image seen, else None."""
        if label not in self.entries or not self._images[label]:
            return None
        matrix = self._matrices[label]
        scores = matrix.scores() if matrix.images else None
        return Accuracy(
            images=self._images[label],
            agreement=self._equal[label] / self._pixels[label] if self._pixels[label] else None,
            masked_images=matrix.images,
            miou=_number(scores.miou) if scores else None,
            pixel_accuracy=_number(scores.pixel_accuracy) if scores else None,
            iou=[_number(value) for value in scores.iou] if scores else [],
        )


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


def _picture(image: Image, found: Mapping[str, Grey8]) -> Picture:
    """The centre of an image, at most :data:`GALLERY_EDGE` pixels wide and high, with all labels."""
    height, width = image.grey.shape
    top, left = max(0, (height - GALLERY_EDGE) // 2), max(0, (width - GALLERY_EDGE) // 2)
    part = (slice(top, top + GALLERY_EDGE), slice(left, left + GALLERY_EDGE))
    shown = image.grey[part].shape
    whole = shown == (height, width)
    return Picture(
        name=image.name,
        part=f"whole image, {height}x{width}" if whole else f"centre {shown[0]}x{shown[1]} of {height}x{width}",
        image=_png(image.grey[part]),
        mask=None if image.mask is None else _png(image.mask[part]),
        labels={label: _png(labels[part]) for label, labels in found.items()},
    )


def _png(plane: Grey8) -> str:
    stream = io.BytesIO()
    PillowImage.fromarray(np.ascontiguousarray(plane)).save(stream, format="PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode("ascii")
