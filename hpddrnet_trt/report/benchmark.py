"""A benchmark's result for people: a folder with JSON, CSV, one HTML page and its figures.

The page carries everything inside it (styles, figures, pictures) and loads nothing from outside.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from hpddrnet_trt.benchmark.machine import BUSY_SHARE
from hpddrnet_trt.benchmark.result import (
    BenchmarkResult,
    Picture,
    Row,
    Settings,
    Shape,
    Timing,
    at,
    main_shape,
    shared_shape,
)
from hpddrnet_trt.benchmark.table import (
    miou,
    miou_change,
    miou_remarks,
    points,
    ratio_text,
    sentence,
    state_of,
    tables,
    to_csv,
)
from hpddrnet_trt.benchmark.timing import MOST_COUNTED, UNCOUNTED, Ratio, ratio_of_medians
from hpddrnet_trt.core.files import write_bytes, write_text
from hpddrnet_trt.core.manifest import IGNORE_INDEX
from hpddrnet_trt.core.text import percent
from hpddrnet_trt.report.benchmark_figures import SPEED, TIME, Drawn, draw_figures, in_order
from hpddrnet_trt.report.choices import QUOTABLE_AGREEMENT, QUOTABLE_LOSS, choices, keeps_labels
from hpddrnet_trt.report.style import (
    DIFFERENT,
    DIMMED,
    WIDTH,
    Gallery,
    Grey8,
    Panel,
    gallery,
    overlay_colors,
    palette_png,
    png,
    render,
    svg_address,
)

FIGURES = "figures"  # folder beside the page, one PNG for each figure in it


class ReportFiles(NamedTuple):
    """What :func:`write_report` wrote."""

    html: Path
    json: Path
    csv: Path
    figures: tuple[Path, ...] = ()


def write_report(result: BenchmarkResult, folder: str | Path) -> ReportFiles:
    """Write ``report.html``, ``result.json``, ``result.csv`` and ``figures/*.png`` into ``folder``.

    Each file is written whole or not at all. Raises :class:`MissingDependency` without matplotlib
    or jinja2, after the JSON and CSV are safe.
    """
    folder = Path(folder)
    json_file = write_text(folder / "result.json", result.to_json())
    csv_file = write_text(folder / "result.csv", to_csv(result))
    drawn = draw_figures(result)
    html = write_text(folder / "report.html", render_html(result, drawn))
    figures = tuple(write_bytes(folder / FIGURES / f"{one.name}.png", png(one.figure)) for one in drawn)
    return ReportFiles(html, json_file, csv_file, figures)


def publish_report(files: ReportFiles, result: BenchmarkResult, folder: str | Path) -> Path:
    """Copy the JSON and HTML to ``folder`` as ``<gpu or cpu>-<date>.json|html``; returns the HTML's path."""
    machine = result.machine
    device = machine.gpus[0].name if machine.gpus else machine.cpu
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    stem = f"{name}-{result.created[:10]}"
    write_bytes(Path(folder) / f"{stem}.json", files.json.read_bytes())
    return write_bytes(Path(folder) / f"{stem}.html", files.html.read_bytes())


def render_html(result: BenchmarkResult, drawn: Sequence[Drawn]) -> str:
    """The page as text, with its figures."""
    sections: dict[str, list[tuple[str, str, str, bool]]] = {SPEED: []}
    for one in drawn:
        wide = one.figure.get_figwidth() > WIDTH
        pictures = svg_address(one.figure), svg_address(one.narrow)
        sections.setdefault(one.section, []).append((one.caption, *pictures, wide))
    return render(
        "benchmark.html.j2",
        filters={"state": state_of},
        result=result,
        headline=headline(result),
        choices=choices(result),
        loss=QUOTABLE_LOSS,
        agreement=QUOTABLE_AGREEMENT,
        time=TIME,
        parts=parts_table(result),
        tables=tables(result),
        speed=sections.pop(SPEED),
        sections=sections,
        warnings=result.warnings,
        command=result.command,
        different=DIFFERENT,
        gallery=[_gallery(result, *numbered) for numbered in enumerate(result.pictures, 1)],
        method=method(result),
    )


class PartsTable(NamedTuple):
    """Milliseconds by part of the network, in the network's order; a line: entry, its sum, and each part or None."""

    shape: Shape
    parts: list[str]
    lines: list[tuple[str, float, list[float | None]]]


def parts_table(result: BenchmarkResult) -> PartsTable | None:
    """At the size that most entries were profiled at; None where none was."""
    shape = shared_shape([row.layers for row in result.measured])
    if shape is None:
        return None
    found = [(row.label, times.groups) for row in result.measured if (times := at(row.layers, shape)) is not None]
    parts = in_order(name for _, groups in found for name in groups)
    return PartsTable(
        shape, parts, [(label, sum(groups.values()), [groups.get(part) for part in parts]) for label, groups in found]
    )


# -- the gallery -----------------------------------------------------------------------------------


def _gallery(result: BenchmarkResult, number: int, picture: Picture) -> Gallery:
    grey, mask = _decode(picture.image), None if picture.mask is None else _decode(picture.mask)
    labels = {label: _decode(content) for label, content in picture.labels.items()}
    colors = overlay_colors([entry.color for entry in result.classes])
    reference = labels.get(result.reference) if result.reference is not None else None
    pairs = [[Panel("micrograph", picture.part, None)]]
    if mask is not None:
        pairs[0].append(Panel("mask", "as annotated", palette_png(mask, colors)))
    for label, plane in labels.items():
        pair = [Panel(label, _score(plane, mask), palette_png(plane, colors))]
        if label != result.reference and reference is not None:
            pair.append(_difference(f"{label}, against reference", plane != reference))
        elif mask is not None:
            pair.append(_difference(f"{label}, against mask", (plane != mask) & (mask != IGNORE_INDEX)))
        pairs.append(pair)
    return gallery(number, picture.name, picture.part, grey, pairs)


def _difference(title: str, different: npt.NDArray[np.bool_]) -> Panel:
    count = int(np.count_nonzero(different))
    # Grown by one pixel on each side, or single pixels would vanish on the page.
    grown = cv2.dilate(different.astype(np.uint8), np.ones((3, 3), dtype=np.uint8))
    colors = np.zeros((256, 4), dtype=np.uint8)
    colors[0], colors[1] = (*DIMMED, 150), (*DIFFERENT, 255)
    note = f"{count:,} of {different.size:,} pixels differ ({percent(count / different.size, 3)})"
    return Panel(title, note, palette_png(np.asarray(grown, dtype=np.uint8), colors))


def _score(labels: Grey8, mask: Grey8 | None) -> str:
    if mask is None:
        return "labels"
    valid = mask != IGNORE_INDEX
    return f"{percent(float(np.mean(labels[valid] == mask[valid])) if valid.any() else None)} of pixels as annotated"


def _decode(content: str) -> Grey8:
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        return np.asarray(image, dtype=np.uint8)


# -- what it says ----------------------------------------------------------------------------------


def headline(result: BenchmarkResult) -> str:
    """The finding in one sentence, the best that others would run named first, with its weakness when it has one."""
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
        if shape is not None and (timing := at(row.end_to_end, shape)) is not None
        and timing.ratio is not None and row.label != result.reference
    ]  # fmt: skip
    if shape is None or not timed:
        return f"{len(result.measured)} of {len(result.rows)} entries ran on this machine."
    accurate = [pair for pair in timed if keeps_labels(result, pair[0])] or timed
    row, timing = _fastest([pair for pair in accurate if not pair[0].is_peer] or accurate)
    speed = f"{ratio_text(timing.ratio)} the speed of {result.reference}"
    if peers := [pair for pair in accurate if pair[0].is_peer and pair[0] is not row]:
        peer, its_timing = _fastest(peers)
        speed = f"{ratio_text(_between(its_timing, timing, result.settings.seed))} the speed of {peer.label}, the " \
                f"fastest of what others would run, and {ratio_text(timing.ratio)} that of {result.reference}"
    text = f"{row.label}: {speed} at {shape}, end to end"
    change = miou_change(result, row)
    if change is not None:
        return f"{text}, mIoU {percent(miou(row.accuracy))} ({points(change)} points)."
    if row.accuracy is not None and row.accuracy.agreement is not None:
        return f"{text}, {percent(row.accuracy.agreement)} of labels the same."
    return text + "."


def _fastest(timed: Sequence[tuple[Row, Timing]]) -> tuple[Row, Timing]:
    return min(timed, key=lambda pair: pair[1].p50_ms)


def _between(peer: Timing, own: Timing, seed: int) -> Ratio:
    """How many times as fast as the peer; by pairs of rounds where both were interleaved with the reference."""
    paired = all(one.ratio is not None and one.ratio.paired for one in (peer, own)) and peer.rounds == own.rounds
    return ratio_of_medians(peer.by_round, own.by_round, paired=paired, seed=seed)


def method(result: BenchmarkResult) -> list[str]:
    """How it was measured, in sentences."""
    plan = result.settings
    return [
        *_loop(plan),
        *_other_measures(result),
        "Speed-up is the ratio of median end-to-end latencies to the reference, with a 95 % interval from resampling "
        "whole rounds (percentile bootstrap); it is called wide when the interval is wider than a fifth of the ratio.",
        "The interval covers the scatter from round to round within this run, not what differs between two runs "
        "(placement of memory, temperature, neighbours on the machine): another run may fall outside it. Compare "
        "several runs before quoting a difference of a few per cent.",
        *_merged(result),
        "Start-up and memory come from fresh processes, one per engine and size. Host memory is the highest resident "
        "memory above that of a Python process with numpy, so it includes the runtime's libraries.",
        "Accuracy is measured on whole images at their own size; agreement is the share of pixels labelled as the "
        "reference does. A point of mIoU is 1 %.",
        *map(sentence, miou_remarks(result)),
        *map(sentence, result.data_notes),
    ]


def _loop(plan: Settings) -> list[str]:
    threads = "each engine's own number of threads" if plan.threads is None else f"{plan.threads} CPU threads each"
    few = f" With {plan.rounds} rounds, p99 lies close to the maximum." if plan.rounds < 200 else ""
    rest = f"a rest of {plan.pause_ms:g} ms"
    if plan.burst_ms:
        turns = [
            f"A turn is a burst of runs without a pause. About {plan.burst_ms:g} ms of them are counted, at least one "
            f"run and at most {MOST_COUNTED}; the first {UNCOUNTED} (one, of an engine whose turn has one counted run) "
            "are not: they find the caches and clocks that others have left. “First of a turn” is the median of the "
            f"very first ones, what one picture costs now and then. Engines on the processor have {rest} before each "
            "turn, those on a GPU none.",
        ]
        who = "one engine was loaded at a time" if plan.alone else "GPU engines apart from those on the processor"
        order = f"every engine had a turn on the same frame, in changing order (seed {plan.seed}), {who}; {threads}."
    else:
        turns, order = [], (
            f"every engine ran once on the same frame, in changing order (seed {plan.seed}), with {rest} before each "
            f"timed run; {threads}."
        )  # fmt: skip
    return [
        f"{'Rounds' if plan.alone else 'Interleaved'}: in each of {plan.rounds} rounds {order}",
        *turns,
        f"Warm-up: at least {plan.warmup} untimed runs of each engine and size, more until its times were steady; the "
        "table says where they did not become so.",
        f"Latency is the time of one batch, one at a time; images/s one at a time is the batch over its median.{few}",
    ]


def _other_measures(result: BenchmarkResult) -> list[str]:
    rows = result.measured
    said = []
    if any(row.throughput for row in rows):
        said.append(
            "Images/s pipelined: also end to end, with as many batches in flight as suits the engine; the time of "
            "a round of many batches is divided by their number."
        )
    if any(row.inference for row in rows):
        said.append(
            "Inference latency is measured in rounds of its own, by the host's clock: the call returns when the labels "
            "are complete."
        )
    if any(timing.by_events for row in rows for timing in row.inference):
        said.append(
            "On a GPU it is by the GPU's own clock, between CUDA events before and after each inference on its stream, "
            "each queued while the one before runs: what trtexec calls GPU Compute Time (TensorRT entries with a CUDA "
            "graph, unless their name says without; trtexec's --useCudaGraph). Unlike trtexec's default, no copies run "
            "beside it."
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
    if any(row.bounds for row in rows):
        said.append(
            f"The roofline bound ({result.bound_source}) is the sum over products of the larger of two times, "
            "computing and moving weights, inputs and outputs; what lies between products counts as fused. What stays "
            "in a cache need not be moved, so an engine may come below it."
        )
    return said


def _merged(result: BenchmarkResult) -> list[str]:
    timings = [timing for row in result.measured for timing in row.end_to_end]
    if len(result.environments) < 2 and all(timing.ratio is None or timing.ratio.paired for timing in timings):
        return []
    return [
        "Rows of several Python environments were merged: rows of one environment were interleaved with each other, "
        "not with those of another. Their ratios resample both sides separately and are marked “not interleaved”."
    ]
