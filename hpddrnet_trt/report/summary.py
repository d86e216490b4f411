"""What a result says, in sentences: the finding, and how it was measured."""

from __future__ import annotations

from hpddrnet_trt.benchmark.machine import BUSY_SHARE
from hpddrnet_trt.benchmark.result import BenchmarkResult, Row, Settings, Timing
from hpddrnet_trt.benchmark.shapes import Shape, at, main_shape
from hpddrnet_trt.benchmark.wording import miou, miou_change, points, ratio_text, sentence
from hpddrnet_trt.core.text import percent

QUOTABLE_LOSS = 0.5  # points of mIoU: an entry that loses more is not praised for its speed


def headline(result: BenchmarkResult) -> str:
    """The finding in one sentence, with its weakness when it has one."""
    weak = []
    if result.busy_share is not None and result.busy_share > BUSY_SHARE:
        weak.append("on a busy machine")
    if any(state.throttled for state in result.gpu_states):
        weak.append("on a GPU that slowed itself down")
    return _finding(result) + (f" Measured {' and '.join(weak)}: do not quote." if weak else "")


def _finding(result: BenchmarkResult) -> str:
    shape = main_shape(result)
    timed = [
        (row, timing)
        for row in result.measured
        if shape is not None and (timing := at(row.timings, shape)) is not None
        and timing.ratio is not None and row.label != result.reference
    ]  # fmt: skip
    if shape is None or not timed:
        return f"{len(result.measured)} of {len(result.rows)} entries ran on this machine."
    accurate = [(row, timing) for row, timing in timed if (miou_change(result, row) or 0.0) >= -QUOTABLE_LOSS]
    row, timing = min(accurate or timed, key=lambda found: found[1].p50_ms)
    return _praise(result, row, timing, shape)


def _praise(result: BenchmarkResult, row: Row, timing: Timing, shape: Shape) -> str:
    text = f"{row.label}: {ratio_text(timing.ratio)} the speed of {result.reference} at {shape}, frame to labels"
    change = miou_change(result, row)
    if change is not None:
        return f"{text}, mIoU {percent(miou(row.accuracy))} ({points(change)} points)."
    if row.accuracy is not None and row.accuracy.agreement is not None:
        return f"{text}, {percent(row.accuracy.agreement)} of labels the same."
    return text + "."


def method(result: BenchmarkResult) -> list[str]:
    """How it was measured, in sentences."""
    plan = result.settings
    return [
        *_loop(plan),
        *_other_measures(result),
        "Speed-up is the ratio of medians, frame to labels, to the reference, with a 95 % interval from resampling "
        "whole rounds (percentile bootstrap); it is called wide when the interval is wider than a fifth of the ratio.",
        "The interval covers the scatter from round to round within this run, not what differs between two runs "
        "(placement of memory, temperature, neighbours on the machine): another run may fall outside it. Compare "
        "several runs before quoting a difference of a few per cent.",
        *_merged(result),
        "Start-up and memory come from fresh processes, one per engine and size. Host memory is the highest resident "
        "memory above that of a Python process with numpy, so it includes the runtime's libraries.",
        "Accuracy is measured on whole images at their own size; agreement is the share of pixels labelled as the "
        "reference does. A point of mIoU is 1 %.",
        *map(sentence, result.data_notes),
    ]


def _loop(plan: Settings) -> list[str]:
    threads = "each engine's own number of threads" if plan.threads is None else f"{plan.threads} CPU threads each"
    few = f" With {plan.rounds} rounds, p99 lies close to the maximum." if plan.rounds < 200 else ""
    return [
        f"Interleaved: in each of {plan.rounds} rounds every engine ran once on the same frame, in changing order "
        f"(seed {plan.seed}), with a rest of {plan.pause_ms:g} ms before each timed run; {threads}.",
        f"Warm-up: at least {plan.warmup} untimed runs of each engine and size, more until its times were steady; the "
        "table says where they did not become so.",
        f"Latency is the time of one batch, one at a time; images/s one at a time is the batch over its median.{few}",
    ]


def _other_measures(result: BenchmarkResult) -> list[str]:
    rows = result.measured
    said = []
    if any(row.throughput for row in rows):
        said.append(
            "Images/s pipelined: also frame to labels, with as many batches in flight as suits the engine; the time of "
            "a round of many batches is divided by their number."
        )
    if any(row.network for row in rows):
        said.append(
            "Network only is measured in interleaved rounds of its own; the call returns when the labels are complete."
        )
    if any(timing.joules_per_image is not None for row in rows for timing in row.throughput):
        said.append(
            "J/image is what the whole GPU board used in the pipelined rounds, idle power included and the processor "
            "left out, divided by the images of those rounds."
        )
    if any(row.layers for row in rows):
        said.append(
            "Time by part of the network comes from each runtime's own profiler, which times layers one by one: their "
            "sum is more than an undisturbed run."
        )
    if any(row.roofs for row in rows):
        said.append(
            "The limit of this machine is the sum over layers of the larger of two times, computing and moving "
            "weights, inputs and outputs, at ceilings measured here; pointwise operators count as fused. What stays in "
            "a cache need not be moved, so an engine may come below it."
        )
    return said


def _merged(result: BenchmarkResult) -> list[str]:
    timings = [timing for row in result.measured for timing in row.timings]
    if len(result.environments) < 2 and all(timing.ratio is None or timing.ratio.paired for timing in timings):
        return []
    return [
        "Rows of several Python environments were merged: rows of one environment were interleaved with each other, "
        "not with those of another. Their ratios resample both sides separately and are marked “not interleaved”."
    ]
