"""What a benchmark found: one model, saved as JSON, from which every report can be made again."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hpddrnet_trt.benchmark.machine import Machine
from hpddrnet_trt.errors import BadInputFile, UsageError, first_problem
from hpddrnet_trt.files import existing_file
from hpddrnet_trt.manifest import SIZE_MULTIPLE, ClassInfo

SCHEMA_VERSION = 1
WIDE = 0.2  # an interval wider than this share of its ratio is called wide wherever it is shown


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Settings(_Record):
    """How to measure. ``sizes``: (height, width) of the timed frames, multiples of 8; empty: the first
    image's own size. ``threads``: CPU threads of one inference, None for each engine's own choice.
    ``reference``: label of the entry to compare with, None for the first PyTorch entry that runs.
    ``pause_ms``: rest before each timed call, see :func:`~hpddrnet_trt.benchmark.timing.time_interleaved`.
    ``gallery``: images shown in the report."""

    sizes: tuple[tuple[int, int], ...] = ()
    batch: int = Field(default=1, ge=1)
    rounds: int = Field(default=30, ge=1)
    warmup: int = Field(default=3, ge=1)
    threads: int | None = Field(default=None, ge=1)
    reference: str | None = None
    seed: int = 0
    pause_ms: float = Field(default=20.0, ge=0, le=10_000)
    gallery: int = Field(default=3, ge=0)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Settings:
        for height, width in self.sizes:
            if min(height, width) < SIZE_MULTIPLE or height % SIZE_MULTIPLE or width % SIZE_MULTIPLE:
                raise ValueError(f"size {height}x{width} is not a multiple of {SIZE_MULTIPLE} in both directions")
        return self


class Ratio(_Record):
    """Median latency of the reference over this entry's: above 1 is faster. 95 % bootstrap interval."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def wide(self) -> bool:
        """Whether the interval is too wide, or missing, for the ratio to be quoted alone."""
        return self.low is None or self.high is None or (self.high - self.low) > WIDE * self.value


class Timing(_Record):
    """Frame to labels at one size: latencies of one batch in milliseconds, one sample per round."""

    height: int
    width: int
    batch: int
    samples_ms: list[float]
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float
    images_per_s: float  # batch / median latency
    ratio: Ratio | None = None

    @property
    def size(self) -> str:
        """E.g. ``1024x1024``, with the batch in front when it is not 1."""
        return f"{self.height}x{self.width}" if self.batch == 1 else f"{self.batch} x {self.height}x{self.width}"


class Start(_Record):
    """What a fresh process pays for this engine, measured in a child process of its own."""

    load_s: float  # import of the runtime's library and loading of the file
    first_s: float  # first inference at the largest size, where some runtimes compile
    host_peak_mib: float  # highest resident memory over that of a bare interpreter with numpy
    device_mib: float | None  # GPU memory in use after the inference minus before loading, None without a GPU
    frame: str  # size of the largest frame, e.g. 1x1024x1024


class Accuracy(_Record):
    """Labels on whole images at their own size. Fractions 0..1, None where there is nothing to compare."""

    images: int
    agreement: float | None  # share of pixels labelled as the reference does
    masked_images: int = 0
    miou: float | None = None
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
    start: Start | None = None
    timings: list[Timing] = []
    accuracy: Accuracy | None = None


class Picture(_Record):
    """A part of one test image with everybody's labels; PNG files as base64."""

    name: str
    part: str
    image: str
    mask: str | None
    labels: dict[str, str]  # by entry; uint8 class indices


class BenchmarkResult(_Record):
    """Everything one run found."""

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

    @property
    def measured(self) -> list[Row]:
        return [row for row in self.rows if row.status == "measured"]

    @property
    def not_run(self) -> list[Row]:
        return [row for row in self.rows if row.status == "not run"]

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"

    def to_csv(self) -> str:
        """One row per entry and frame size; an entry that did not run is one row with its reason."""
        stream = io.StringIO()
        columns = [*_CSV_COLUMNS, *(f"iou_{entry.name}" for entry in self.classes)]
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            timings: list[Timing | None] = [*row.timings] if row.timings else [None]
            for timing in timings:
                writer.writerow(_csv_row(row, timing, self.classes))
        return stream.getvalue()


_CSV_COLUMNS = [
    "label", "precision", "runtime", "status", "reason", "height", "width", "batch", "rounds", "images_per_s",
    "p50_ms", "p95_ms", "p99_ms", "max_ms", "ratio", "ratio_low", "ratio_high", "load_s", "first_s",
    "host_peak_mib", "device_mib", "file", "file_bytes", "images", "agreement", "miou", "pixel_accuracy",
]  # fmt: skip


def _csv_row(row: Row, timing: Timing | None, classes: list[ClassInfo]) -> dict[str, Any]:
    values: dict[str, Any] = {
        **row.model_dump(include={"label", "precision", "runtime", "status", "reason", "file", "file_bytes"}),
    }
    if timing is not None:
        values |= timing.model_dump(exclude={"samples_ms", "ratio"})
        values["rounds"] = len(timing.samples_ms)
        if timing.ratio is not None:
            values |= {"ratio": timing.ratio.value, "ratio_low": timing.ratio.low, "ratio_high": timing.ratio.high}
    if row.start is not None:
        values |= row.start.model_dump(exclude={"frame"})
    if row.accuracy is not None:
        values |= row.accuracy.model_dump(include={"images", "agreement", "miou", "pixel_accuracy"})
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
    """Read a result file; raises :class:`BadInputFile` when it is missing, damaged or of a newer format."""
    path = existing_file(path, "benchmark result")
    try:
        return BenchmarkResult.model_validate_json(path.read_bytes())
    except ValidationError as exc:
        raise BadInputFile(
            f"{path} is not a benchmark result this version reads ({first_problem(exc, 'file')}); "
            "run the benchmark again, or use the version that wrote it"
        ) from exc
