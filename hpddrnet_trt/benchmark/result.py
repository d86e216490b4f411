"""What a benchmark found: one model, saved as JSON, from which every report can be made again."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hpddrnet_trt.benchmark.machine import Machine
from hpddrnet_trt.core.errors import BadInputFile, UsageError, first_problem
from hpddrnet_trt.core.files import existing_file
from hpddrnet_trt.core.manifest import SIZE_MULTIPLE, ClassInfo

SCHEMA_VERSION = 2
Measure = Literal["timings", "network", "throughput"]  # as the fields of a row
MEASURES: dict[Measure, str] = {  # what people call them
    "timings": "frame to labels",
    "network": "network only",
    "throughput": "throughput",
}
WIDE = 0.2  # an interval wider than this share of its ratio is called wide wherever it is shown


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def size_text(height: int, width: int, batch: int) -> str:
    """E.g. ``1024x1024``, with the batch in front when it is not 1."""
    return f"{height}x{width}" if batch == 1 else f"{batch} x {height}x{width}"


class Settings(_Record):
    """How to measure.

    ``sizes``: (height, width) of the timed frames, multiples of 8; empty: the first image's own size.
    ``batches``: frames per inference; every size is timed with every batch. ``rounds``: timed rounds.
    ``warmup``: least number of untimed runs of each engine; more follow until its times are steady.
    ``network_only``, ``throughput``, ``layers``: which measures are taken beside the latency from frame
    to labels; ``roofline``: whether the machine's ceilings are measured. ``memory_sizes``: frames whose
    peak memory is measured beside that of the timed ones, e.g. too large to be timed. ``threads``: CPU
    threads of one inference, None for each engine's own choice.
    ``reference``: label of the entry to compare with, None for the first PyTorch entry that runs.
    ``pause_ms``: rest before each timed call, see :func:`~hpddrnet_trt.benchmark.timing.time_interleaved`.
    ``gallery``: images shown in the report."""

    sizes: tuple[tuple[int, int], ...] = ()
    batches: tuple[int, ...] = Field(default=(1,), min_length=1)
    rounds: int = Field(default=30, ge=1)
    warmup: int = Field(default=3, ge=1)
    network_only: bool = True
    throughput: bool = True
    layers: bool = True
    roofline: bool = True
    memory_sizes: tuple[tuple[int, int], ...] = ()
    threads: int | None = Field(default=None, ge=1)
    reference: str | None = None
    seed: int = 0
    pause_ms: float = Field(default=20.0, ge=0, le=10_000)
    gallery: int = Field(default=3, ge=0)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Settings:
        for height, width in (*self.sizes, *self.memory_sizes):
            if min(height, width) < SIZE_MULTIPLE or height % SIZE_MULTIPLE or width % SIZE_MULTIPLE:
                raise ValueError(f"size {height}x{width} is not a multiple of {SIZE_MULTIPLE} in both directions")
        if min(self.batches) < 1:
            raise ValueError(f"batch {min(self.batches)} is less than 1")
        return self


class Ratio(_Record):
    """Median latency of the reference over this entry's: above 1 is faster. 95 % bootstrap interval.

    ``paired``: both were timed in the same interleaved rounds; False for rows merged from another run."""

    value: float
    low: float | None = None
    high: float | None = None
    paired: bool = True

    @property
    def wide(self) -> bool:
        """Whether the interval is too wide, or missing, for the ratio to be quoted alone."""
        return self.low is None or self.high is None or (self.high - self.low) > WIDE * self.value


class Timing(_Record):
    """One measure at one size and batch: milliseconds, one sample per round.

    For latencies a sample is one batch, one at a time; for throughput it is the time of a round of many
    batches in flight, divided by their number, so that all samples mean milliseconds per batch.
    """

    height: int
    width: int
    batch: int
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

    @property
    def size(self) -> str:
        """E.g. ``1024x1024``, with the batch in front when it is not 1."""
        return size_text(self.height, self.width, self.batch)


class Start(_Record):
    """What a fresh process pays for this engine, measured in a child process of its own."""

    load_s: float  # import of the runtime's library and loading of the file
    first_s: float  # first inference at the largest size, where some runtimes compile
    host_peak_mib: float  # highest resident memory over that of a bare interpreter with numpy
    device_mib: float | None  # GPU memory in use after the inference minus before loading, None without a GPU
    frame: str  # size of the largest frame, e.g. 1x1024x1024


class Memory(_Record):
    """Highest memory of a fresh process that ran one size only; as in :class:`Start`."""

    height: int
    width: int
    batch: int
    host_peak_mib: float
    device_mib: float | None = None


class MemoryFailure(_Record):
    """A size at which the fresh process did not get through, e.g. because memory ran out."""

    height: int
    width: int
    batch: int
    reason: str


class LayerGroups(_Record):
    """Time by part of the network, milliseconds of one batch, from the runtime's own profiler.

    Layers are timed one by one, so their sum is more than an undisturbed run. ``groups`` keeps the
    network's order (see :mod:`hpddrnet_trt.graph.layers`)."""

    height: int
    width: int
    batch: int
    groups: dict[str, float]


class Roof(_Record):
    """The least time that this machine can need for an entry's graph at one size and batch."""

    height: int
    width: int
    batch: int
    gmac: float  # 10^9 multiply-accumulates of one batch
    megabytes: float  # read and written by all kernels: pointwise operators fused, attention scores not stored
    floor_ms: float  # sum over kernels of the larger of computing and moving, at the measured ceilings
    compute_ms: float  # computing alone
    note: str | None = None  # what the floor assumes, where a precision's own ceiling is not known


class Ceilings(_Record):
    """What the machine reaches on the simplest work of each kind, measured here."""

    device: str  # processor or GPU, with the number of threads for a CPU
    gmacs_per_s: dict[str, float]  # by precision: 10^9 multiply-accumulates per second of a large matrix product
    gigabytes_per_s: float  # large copy: bytes read plus bytes written
    how: str


class GpuState(_Record):
    """Clocks, power and temperature read while timing; ``throttled``: the driver's reasons for slowing down."""

    name: str
    sm_clock_mhz: tuple[float, float, float]  # lowest, median, highest
    power_w: float | None  # median
    temperature_c: float | None  # highest
    throttled: list[str]


class Accuracy(_Record):
    """Labels on whole images at their own size. Fractions 0..1, None where there is nothing to compare."""

    images: int
    agreement: float | None  # share of pixels labelled as the reference does
    masked_images: int = 0
    miou: float | None = None
    masked_miou: float | None = None  # of the classes in the masks; see hpddrnet_trt.core.metrics
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
    timings: list[Timing] = []  # latency, frame to labels
    network: list[Timing] = []  # latency, network only: data resident where the engine computes
    throughput: list[Timing] = []  # frame to labels, several batches in flight
    layers: list[LayerGroups] = []
    roofs: list[Roof] = []
    accuracy: Accuracy | None = None
    environment: int = 0  # index into the result's environments

    def measures(self) -> Iterator[tuple[Measure, list[Timing]]]:
        """Each measure's name with its timings."""
        yield "timings", self.timings
        yield "network", self.network
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
    complete: bool  # False after Ctrl-C: figures are of the finished rounds and images only
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
    ceilings: Ceilings | None = None
    gpu_states: list[GpuState] = []

    @property
    def measured(self) -> list[Row]:
        return [row for row in self.rows if row.status == "measured"]

    @property
    def not_run(self) -> list[Row]:
        return [row for row in self.rows if row.status == "not run"]

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"

    def to_csv(self) -> str:
        """One row per entry, measure, frame size and batch; an entry that did not run is one row with its reason."""
        stream = io.StringIO()
        columns = [*_CSV_COLUMNS, *(f"iou_{entry.name}" for entry in self.classes)]
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            values = _csv_row(row, self.classes)
            taken = [(MEASURES[measure], timing) for measure, timings in row.measures() for timing in timings]
            writer.writerows({**values, "measure": measure, **_csv_timing(timing)} for measure, timing in taken)
            if not taken:
                writer.writerow(values)
        return stream.getvalue()


_CSV_COLUMNS = [
    "label", "precision", "attention", "runtime", "status", "reason", "measure", "height", "width", "batch", "rounds",
    "warmup", "steady", "images_per_s", "p50_ms", "p95_ms", "p99_ms", "max_ms", "ratio", "ratio_low", "ratio_high",
    "ratio_wide", "ratio_paired", "joules_per_image", "build_s", "load_s", "first_s", "host_peak_mib", "device_mib",
    "file", "file_bytes", "images", "agreement", "miou", "masked_miou", "pixel_accuracy",
]  # fmt: skip


def _csv_timing(timing: Timing) -> dict[str, Any]:
    values = {**timing.model_dump(exclude={"samples_ms", "ratio"}), "rounds": len(timing.samples_ms)}
    if (ratio := timing.ratio) is not None:
        values |= {"ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high}
        values |= {"ratio_wide": ratio.wide, "ratio_paired": ratio.paired}
    return values


def _csv_row(row: Row, classes: list[ClassInfo]) -> dict[str, Any]:
    plain = {"label", "precision", "attention", "runtime", "status", "reason", "build_s", "file", "file_bytes"}
    values: dict[str, Any] = row.model_dump(include=plain)
    if row.start is not None:
        values |= row.start.model_dump(exclude={"frame"})
    if row.accuracy is not None:
        values |= row.accuracy.model_dump(include={"images", "agreement", "miou", "masked_miou", "pixel_accuracy"})
        values |= {f"iou_{entry.name}": iou for entry, iou in zip(classes, row.accuracy.iou, strict=False)}
    return values


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
    """Read a result file, also one of schema version 1; raises :class:`BadInputFile` when it is missing,
    damaged or of a newer format."""
    path = existing_file(path, "benchmark result")
    try:
        content = json.loads(path.read_bytes())
        found = content.get("schema_version") if isinstance(content, dict) else None
        if isinstance(found, int) and found > SCHEMA_VERSION:
            raise BadInputFile(
                f"{path} has the format {found} of benchmark results, this version reads up to {SCHEMA_VERSION}; "
                "use the version that wrote it"
            )
        return BenchmarkResult.model_validate(_from_version_1(content) if found == 1 else content)
    except (ValidationError, ValueError) as exc:
        problem = first_problem(exc, "file") if isinstance(exc, ValidationError) else str(exc)
        raise BadInputFile(
            f"{path} is not a benchmark result this version reads ({problem}); "
            "run the benchmark again, or use the version that wrote it"
        ) from exc


def _from_version_1(content: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had one batch, frame-to-labels latency only, and one environment, that of the machine's record."""
    settings, machine = content.get("settings"), content.get("machine")
    if not isinstance(settings, dict) or "batch" not in settings or not isinstance(machine, dict):
        return content  # validation says what is wrong
    settings = {name: value for name, value in settings.items() if name != "batch"} | {"batches": [settings["batch"]]}
    settings |= dict.fromkeys(("network_only", "throughput", "layers", "roofline"), False)
    environment = {"created": content.get("created"), "command": content.get("command"),
                   "python": machine.get("python"), "libraries": machine.get("libraries")}  # fmt: skip
    return {**content, "schema_version": SCHEMA_VERSION, "settings": settings, "environments": [environment]}
