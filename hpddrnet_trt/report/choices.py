"""Which entry to take for what: a stated rule each, applied to what was measured, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hpddrnet_trt.benchmark.result import BenchmarkResult, Row, Shape, Timing, at, main_shape
from hpddrnet_trt.benchmark.table import miou_change, points
from hpddrnet_trt.core.text import number, percent

QUOTABLE_LOSS = 0.5  # points of mIoU: an entry that loses more is not praised for its speed
QUOTABLE_AGREEMENT = 0.99  # of labels equal to the reference's, where there are no masks
_FOR_TENSORRT = ("INT8", "FP16", "FP32")  # fastest first, as published for GPUs with these units


class Choice(NamedTuple):
    """``purpose``: what for; ``rule``: by what; ``label``: the entry, or a file to build; ``why``: figures."""

    purpose: str
    rule: str
    label: str
    why: str


def keeps_labels(result: BenchmarkResult, row: Row) -> bool:
    """Whether an entry loses little against the reference; what was not scored is not held against it."""
    change = miou_change(result, row)
    if change is not None:
        return change >= -QUOTABLE_LOSS
    agreement = None if row.accuracy is None else row.accuracy.agreement
    return agreement is None or agreement >= QUOTABLE_AGREEMENT


def choices(result: BenchmarkResult) -> list[Choice]:
    """For live frames, for a batch of pictures, and for TensorRT; empty where nothing was timed."""
    shape = main_shape(result)
    if shape is None:
        return []
    good = [row for row in result.measured if at(row.end_to_end, shape) is not None and keeps_labels(result, row)]
    return [choice for choice in (_live(result, good, shape), _batch(result, good, shape),
                                  _tensorrt(result, good, shape)) if choice is not None]  # fmt: skip


def _live(result: BenchmarkResult, good: Sequence[Row], shape: Shape) -> Choice | None:
    timed = [(row, timing) for row in good if (timing := at(row.end_to_end, shape))]
    if not timed:
        return None
    row, timing = min(timed, key=lambda pair: pair[1].p95_ms)
    return Choice(
        "live frames", f"the smallest 95th percentile of end-to-end latency at {shape}, one at a time", row.label,
        f"{number(timing.p95_ms)} ms in 95 of 100 frames, {number(timing.p50_ms)} ms in the middle"
        f"{_loss(result, row)}",
    )  # fmt: skip


def _batch(result: BenchmarkResult, good: Sequence[Row], shape: Shape) -> Choice | None:
    def fastest(measure: str) -> tuple[Row, Timing] | None:
        timed = [(row, timing) for row in good if (timing := at(getattr(row, measure), shape))]
        return max(timed, key=lambda pair: pair[1].images_per_s, default=None)

    pipelined = fastest("throughput")
    found = pipelined or fastest("end_to_end")
    if found is None:
        return None
    row, timing = found
    return Choice(
        "many pictures", f"the most images per second at {shape}, {'pipelined' if pipelined else 'one at a time'}",
        row.label, f"{number(timing.images_per_s)} images/s{_loss(result, row)}",
    )  # fmt: skip


def _tensorrt(result: BenchmarkResult, good: Sequence[Row], shape: Shape) -> Choice | None:
    """The fastest engine; where none ran, the file of the lowest precision whose labels hold, to be built."""
    ran = [(row, timing) for row in good if (timing := at(row.end_to_end, shape))]
    engines = [pair for pair in ran if pair[0].runtime.startswith("tensorrt")]
    if engines:
        row, timing = min(engines, key=lambda pair: pair[1].p50_ms)
        return Choice(
            "TensorRT", f"the engine with the smallest median of end-to-end latency at {shape}", row.label,
            f"{number(timing.p50_ms)} ms{_loss(result, row)}",
        )  # fmt: skip
    rule = "the lowest precision (INT8, FP16, FP32) of the ONNX files whose labels hold, because no engine ran here"
    for precision in _FOR_TENSORRT:
        for row in good:
            explicit = precision != "INT8" or "Q/DQ" in row.label  # ONNX Runtime's own INT8 form is none of TensorRT's
            if row.precision == precision and explicit and row.file.endswith(".onnx"):
                return Choice("TensorRT", rule, row.file, f"to be built and timed on the GPU{_loss(result, row)}")
    return None


def _loss(result: BenchmarkResult, row: Row) -> str:
    """What its labels cost, as the end of a sentence."""
    change = miou_change(result, row)
    if change is not None:
        return f"; mIoU {points(change)} points"
    if row.label != result.reference and row.accuracy is not None and row.accuracy.agreement is not None:
        return f"; {percent(row.accuracy.agreement)} of labels as the reference"
    return ""
