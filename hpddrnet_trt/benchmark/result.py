"""What a benchmark found: one model, saved as JSON, from which every report can be made again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hpddrnet_trt.benchmark.machine import GpuState, Machine
from hpddrnet_trt.benchmark.timing import BURST_S, Ratio
from hpddrnet_trt.core.errors import BadInputFile, UsageError, first_problem
from hpddrnet_trt.core.files import existing_file
from hpddrnet_trt.core.intervals import Interval
from hpddrnet_trt.core.manifest import SIZE_MULTIPLE, ClassInfo

SCHEMA_VERSION = 5
Measure = Literal["end_to_end", "inference", "throughput"]  # as the fields of a row
MEASURES: dict[Measure, str] = {  # what people call them
    "end_to_end": "end-to-end latency",
    "inference": "inference latency",
    "throughput": "throughput",
}
QUOTED = (1024, 1024)  # the size at which publications on this network quote their speed


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shape(NamedTuple):
    """Frames of one inference."""

    height: int
    width: int
    batch: int

    @property
    def pixels(self) -> int:
        """Of one frame."""
        return self.height * self.width

    @property
    def size(self) -> str:
        return f"{self.height}×{self.width}"

    def __str__(self) -> str:
        return self.size if self.batch == 1 else f"batch {self.batch} of {self.size}"


class _Shaped(_Record):
    """What was found at one size and batch."""

    height: int
    width: int
    batch: int

    @property
    def shape(self) -> Shape:
        return Shape(self.height, self.width, self.batch)


class Settings(_Record):
    """How to measure.

    ``sizes``: (height, width) of the timed frames, multiples of 8; empty: the first image's own size.
    ``batches``: frames per inference; every size is timed with every batch. ``rounds``: timed rounds.
    ``warmup``: least number of untimed runs of each engine; more follow until its times are steady.
    ``inference``, ``throughput``, ``layers``: which measures are taken beside the end-to-end latency;
    ``roofline``: whether the least time by a GPU's data sheet is counted. ``memory_sizes``: frames whose
    peak memory is measured beside that of the timed ones, e.g. too large to be timed. ``threads``: CPU
    threads of one inference, None for each engine's own choice.
    ``reference``: label of the entry to compare with, None for the first PyTorch entry that
    runs, or the FP32 ONNX file in ONNX Runtime where none does.
    ``pause_ms``: rest before each turn of an entry on the processor; ``burst_ms``: of its counted runs; see
    :class:`~hpddrnet_trt.benchmark.timing.Loop`. ``gallery``: images shown in the report.
    ``alone``: one entry is loaded at a time, in the order of the entries at each size, without a process of its own
    before. ``minutes``: what has not begun by then is dropped, and said so; None for as long as it takes."""

    sizes: tuple[tuple[int, int], ...] = ()
    batches: tuple[int, ...] = Field(default=(1,), min_length=1)
    rounds: int = Field(default=30, ge=1)
    warmup: int = Field(default=3, ge=1)
    inference: bool = True
    throughput: bool = True
    layers: bool = True
    roofline: bool = True
    memory_sizes: tuple[tuple[int, int], ...] = ()
    threads: int | None = Field(default=None, ge=1)
    reference: str | None = None
    seed: int = 0
    pause_ms: float = Field(default=20.0, ge=0, le=10_000)
    burst_ms: float = Field(default=1000 * BURST_S, ge=0, le=10_000)
    alone: bool = False
    minutes: float | None = Field(default=None, gt=0)
    gallery: int = Field(default=3, ge=0)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Settings:
        for height, width in (*self.sizes, *self.memory_sizes):
            if min(height, width) < SIZE_MULTIPLE or height % SIZE_MULTIPLE or width % SIZE_MULTIPLE:
                raise ValueError(f"size {height}x{width} is not a multiple of {SIZE_MULTIPLE} in both directions")
        if min(self.batches) < 1:
            raise ValueError(f"batch {min(self.batches)} is less than 1")
        return self


class Timing(_Shaped):
    """One measure at one size and batch: milliseconds, ``burst`` samples per round.

    For latencies a sample is one batch, one at a time; for throughput it is the time of a round of many
    batches in flight, divided by their number, so that all samples mean milliseconds per batch.
    """

    samples_ms: list[float]
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float
    images_per_s: float  # batch / median
    ratio: Ratio | None = None
    warmup: int | None = None  # untimed runs before the first timed one
    steady: bool | None = None  # whether times had become steady by then
    joules_per_image: float | None = None  # where the driver reports energy, of the whole GPU
    burst: int = 1  # counted runs of a turn, one after the other
    uncounted: int = 0  # runs before them that are not counted
    cold_ms: float | None = None  # median of the first runs of the turns: after others have run, or a rest
    by_events: bool = False  # timed by the GPU, between CUDA events

    @model_validator(mode="after")
    def _whole_rounds(self) -> Timing:
        if self.burst < 1 or len(self.samples_ms) % self.burst:
            raise ValueError(f"{len(self.samples_ms)} samples are no rounds of {self.burst}")
        return self

    @property
    def rounds(self) -> int:
        return len(self.samples_ms) // self.burst

    @property
    def by_round(self) -> npt.NDArray[np.float64]:
        """Samples as ``[rounds, burst]``."""
        return np.asarray(self.samples_ms, dtype=np.float64).reshape(-1, self.burst)


class Start(_Record):
    """What a fresh process pays for this engine, measured in a child process of its own."""

    load_s: float  # import of the runtime's library and loading of the file
    first_s: float  # first inference at the largest size, where some runtimes compile
    host_peak_mib: float  # highest resident memory over that of a bare interpreter with numpy
    device_mib: float | None  # GPU memory in use after the inference minus before loading, None without a GPU
    frame: str  # size of the largest frame, e.g. 1x1024x1024


class Memory(_Shaped):
    """Highest memory of a fresh process that ran one size only; as in :class:`Start`."""

    host_peak_mib: float
    device_mib: float | None = None


class MemoryFailure(_Shaped):
    """A size at which the fresh process did not get through, e.g. because memory ran out."""

    reason: str


class LayerGroups(_Shaped):
    """Time by part of the network, milliseconds of one batch, from the runtime's own profiler.

    Layers are timed one by one, so their sum is more than an undisturbed run. ``groups`` keeps the
    network's order (see :mod:`hpddrnet_trt.graph.layers`)."""

    groups: dict[str, float]


class RooflineBound(_Shaped):
    """The least time of one batch of an entry's graph on the device of the result's ``bound_source``."""

    milliseconds: float
    note: str | None = None  # what it assumes


class Accuracy(_Record):
    """Labels on whole images at their own size. Fractions 0..1, None where there is nothing to compare."""

    images: int
    agreement: float | None  # share of pixels labelled as the reference does
    masked_images: int = 0
    miou: float | None = None
    masked_miou: float | None = None  # of the classes in the masks; see hpddrnet_trt.core.metrics
    miou_interval: Interval | None = None  # over the masked images, or their specimens
    pixel_accuracy: float | None = None
    iou: list[float | None] = []


class Row(_Record):
    """One entry of the comparison."""

    label: str
    file: str
    file_bytes: int
    runtime: str  # version and device, or the requested engine's name when it did not run
    precision: str | None
    status: Literal["measured", "not run"]
    reason: str | None = None  # why it did not run
    notes: list[str] = []
    attention: str | None = None  # form of position attention in the file
    build_s: float | None = None  # time to build the engine (TensorRT) or to compile it (others), where known
    start: Start | None = None
    memory: list[Memory] = []
    memory_failures: list[MemoryFailure] = []
    end_to_end: list[Timing] = []  # latency, host frame to host labels
    inference: list[Timing] = []  # latency of the network alone: data resident where the engine computes
    throughput: list[Timing] = []  # host frames to host labels, several batches in flight
    layers: list[LayerGroups] = []
    bounds: list[RooflineBound] = []
    accuracy: Accuracy | None = None
    environment: int = 0  # index into the result's environments

    @property
    def is_peer(self) -> bool:
        """Whether others would run it without this package: PyTorch in its ways, the authors' plain export."""
        return self.label.startswith("PyTorch") or self.label.endswith("plain export")

    def measures(self) -> Iterator[tuple[Measure, list[Timing]]]:
        """Each measure's name with its timings."""
        yield "end_to_end", self.end_to_end
        yield "inference", self.inference
        yield "throughput", self.throughput


class Picture(_Record):
    """A part of one test image with everybody's labels; PNG files as base64."""

    name: str
    part: str
    image: str
    mask: str | None
    labels: dict[str, str]  # by entry; uint8 class indices


class Environment(_Record):
    """One Python installation that contributed rows; a merged result has several."""

    created: str  # ISO 8601, UTC
    command: str
    python: str
    libraries: dict[str, str]


class BenchmarkResult(_Record):
    """Everything one run found, or several runs on one machine that were merged."""

    schema_version: int = SCHEMA_VERSION
    created: str  # ISO 8601, UTC
    command: str
    complete: bool  # False after Ctrl-C, or SIGTERM: figures are of the finished rounds and images only
    settings: Settings
    machine: Machine
    engines: dict[str, str]  # every engine's version, or why it is not available
    busy_share: float | None  # of all cores, used by other processes while timing
    data: str
    data_notes: list[str]
    classes: list[ClassInfo]
    reference: str | None
    rows: list[Row]
    warnings: list[str] = []
    pictures: list[Picture] = []
    environments: list[Environment] = []
    bound_source: str | None = None  # whose rates the rows' bounds are of
    gpu_states: list[GpuState] = []

    @property
    def measured(self) -> list[Row]:
        return [row for row in self.rows if row.status == "measured"]

    @property
    def not_run(self) -> list[Row]:
        return [row for row in self.rows if row.status == "not run"]

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"


_Found = TypeVar("_Found", bound=_Shaped)


def at(records: Iterable[_Found], shape: Shape) -> _Found | None:
    """The record of that size and batch."""
    return next((record for record in records if record.shape == shape), None)


def one_batch(records: Iterable[_Found], batch: int) -> list[_Found]:
    """The records of that batch, smallest frame first."""
    return sorted((record for record in records if record.batch == batch), key=lambda record: record.shape.pixels)


def timed_shapes(result: BenchmarkResult) -> list[Shape]:
    """Every size and batch with an end-to-end latency: small batches first, then small sizes."""
    shapes = {timing.shape for row in result.measured for timing in row.end_to_end}
    return sorted(shapes, key=lambda shape: (shape.batch, shape.pixels, shape.height))


def main_shape(result: BenchmarkResult) -> Shape | None:
    """The one to quote, None when nothing was timed; see :func:`shared_shape`."""
    return shared_shape([row.end_to_end for row in result.measured])


def shared_shape(records: Iterable[Iterable[_Shaped]]) -> Shape | None:
    """The size and batch that most entries have; among equals the smallest batch, then 1024x1024, then the largest."""
    counts = Counter(shape for of_entry in records for shape in {record.shape for record in of_entry})
    if not counts:
        return None
    return max(counts, key=lambda shape: (counts[shape], -shape.batch, shape[:2] == QUOTED, shape.pixels))


def make_settings(**values: Any) -> Settings:
    """:class:`Settings`, or a :class:`UsageError` naming the value that makes no sense."""
    try:
        return Settings(**values)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        problem = first["msg"].removeprefix("Value error, ")
        if not where:  # the check of the sizes names them itself
            raise UsageError(f"{problem}; choose another size") from exc
        raise UsageError(f"benchmark setting {where} is {first['input']!r}: {problem}; choose another value") from exc


def load_result(path: str | Path) -> BenchmarkResult:
    """Read a result file, also one of an earlier format; raises :class:`BadInputFile` when it is missing,
    damaged or of a newer format."""
    path = existing_file(path, "benchmark result")
    try:
        content = json.loads(path.read_bytes())
        version = content.get("schema_version") if isinstance(content, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise BadInputFile(
                f"{path} has the format {version} of benchmark results, this version reads up to {SCHEMA_VERSION}; "
                "use the version that wrote it"
            )
        if version == 1:
            content = _from_version_1(content)
        if version in (1, 2):
            content = _from_version_2(content)
        if version in (1, 2, 3):  # one run a turn, with a rest before it
            plan = {"burst_ms": 0.0, **content["settings"]}
            content = {**content, "settings": plan}
        if version in (1, 2, 3, 4):  # mIoU without interval
            content = {**content, "schema_version": SCHEMA_VERSION}
        return BenchmarkResult.model_validate(content)
    except (ValidationError, ValueError, AttributeError, TypeError, KeyError) as exc:
        problem = first_problem(exc, "file") if isinstance(exc, ValidationError) else str(exc)
        raise BadInputFile(
            f"{path} is not a benchmark result this version reads ({problem}); "
            "run the benchmark again, or use the version that wrote it"
        ) from exc


def _from_version_1(content: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had one batch, end-to-end latency only, and one environment, that of the machine's record."""
    settings, machine = dict(content["settings"]), content["machine"]
    settings["batches"] = [settings.pop("batch")]
    settings |= dict.fromkeys(("network_only", "throughput", "layers", "roofline"), False)
    environment = {"created": content.get("created"), "command": content.get("command"),
                   "python": machine.get("python"), "libraries": machine.get("libraries")}  # fmt: skip
    return {**content, "settings": settings, "environments": [environment]}


def _from_version_2(content: dict[str, Any]) -> dict[str, Any]:
    """Version 2 called the measures otherwise, and its bounds were of rates measured on the machine."""
    settings, rows = dict(content["settings"]), [dict(row) for row in content["rows"]]
    settings["inference"] = settings.pop("network_only", True)
    for row in rows:
        row["end_to_end"], row["inference"] = row.pop("timings", []), row.pop("network", [])
        row["bounds"] = [
            {**{key: roof.get(key) for key in ("height", "width", "batch", "note")}, "milliseconds": roof["floor_ms"]}
            for roof in row.pop("roofs", [])
        ]
    migrated = {**content, "settings": settings, "rows": rows}
    rates = migrated.pop("ceilings", None)
    if rates is not None:
        migrated["bound_source"] = f"{rates['device']}, measured: {rates['how']}"
    return migrated
