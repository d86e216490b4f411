"""A result for people: a table for the terminal, and a folder with JSON, CSV, PNG and one HTML page.

The page carries everything inside it (styles, figures, pictures) and loads nothing from outside.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image as PillowImage

from hpddrnet_trt.benchmark.machine import BUSY_SHARE
from hpddrnet_trt.benchmark.plots import figures, main_png
from hpddrnet_trt.benchmark.result import BenchmarkResult, Picture, Ratio, Row, Timing
from hpddrnet_trt.files import write_bytes, write_text
from hpddrnet_trt.manifest import IGNORE_INDEX
from hpddrnet_trt.pages.page import render
from hpddrnet_trt.pages.pictures import jpeg, palette_png
from hpddrnet_trt.pages.text import number, percent

_ALPHA = 115  # of 255, opacity of the labels over the micrograph
_DIFFERENCE = (255, 176, 0)  # bright amber: told from grey by brightness alone
_DIMMED = (10, 14, 22)


class ReportFiles(NamedTuple):
    """What :func:`write_report` wrote; ``figure`` is None when nothing was timed."""

    html: Path
    json: Path
    csv: Path
    figure: Path | None


class Panel(NamedTuple):
    """One overlay of the gallery: PNG data address drawn over the micrograph."""

    title: str
    note: str
    overlay: str | None  # None: the micrograph alone


class Gallery(NamedTuple):
    """One test image with its panels, in pairs that belong together."""

    name: str
    part: str
    ratio: str  # CSS aspect ratio, width / height
    base: str  # data address of the micrograph
    pairs: list[list[Panel]]


def write_report(result: BenchmarkResult, folder: str | Path) -> ReportFiles:
    """Write ``report.html``, ``result.json``, ``result.csv`` and ``benchmark.png`` into ``folder``.

    Each file is written whole or not at all. Raises :class:`MissingDependency` without matplotlib
    or jinja2, after the JSON and CSV are safe.
    """
    folder = Path(folder)
    json_file = write_text(folder / "result.json", result.to_json())
    csv_file = write_text(folder / "result.csv", result.to_csv())
    html = write_text(folder / "report.html", render_html(result))
    figure = write_bytes(folder / "benchmark.png", main_png(result)) if result.measured else None
    return ReportFiles(html, json_file, csv_file, figure)


def render_html(result: BenchmarkResult) -> str:
    """The page as text."""
    return render(
        "benchmark/report.html.j2",
        filters={"ratio": ratio_text, "mib": mib, "megabytes": megabytes},
        result=result,
        headline=headline(result),
        figures=figures(result),
        gallery=[_gallery(result, picture) for picture in result.pictures],
        method=method(result),
        best=_best(result),
    )


def headline(result: BenchmarkResult) -> str:
    """The finding in one sentence, with its weakness when it has one."""
    disturbed = result.busy_share is not None and result.busy_share > BUSY_SHARE
    return _finding(result) + (" Measured on a busy machine: do not quote." if disturbed else "")


def _finding(result: BenchmarkResult) -> str:
    rows = [row for row in result.measured if row.label != result.reference and row.timings[-1].ratio is not None]
    if not rows:
        return f"{len(result.measured)} of {len(result.rows)} entries ran on this machine."
    fastest = max(rows, key=_last_ratio)
    timing = fastest.timings[-1]
    assert timing.ratio is not None
    text = f"{fastest.label}: {ratio_text(timing.ratio)} the speed of {result.reference} at {timing.size}"
    accuracy, reference = fastest.accuracy, _accuracy_of(result, result.reference)
    if accuracy is not None and accuracy.miou is not None and reference is not None and reference.miou is not None:
        change = 100 * (accuracy.miou - reference.miou)
        return f"{text}, mIoU {percent(accuracy.miou)} ({change:+.2f} points)."
    if accuracy is not None and accuracy.agreement is not None:
        return f"{text}, {percent(accuracy.agreement)} of labels the same."
    return text + "."


def _last_ratio(row: Row) -> float:
    ratio = row.timings[-1].ratio
    return ratio.value if ratio is not None else 0.0


def _accuracy_of(result: BenchmarkResult, label: str | None) -> Any:
    return next((row.accuracy for row in result.rows if row.label == label), None)


def method(result: BenchmarkResult) -> list[str]:
    """How it was measured, in sentences."""
    plan = result.settings
    batch = "one frame" if plan.batch == 1 else f"a batch of {plan.batch} frames"
    threads = "each engine's own number of threads" if plan.threads is None else f"{plan.threads} CPU threads each"
    return [
        f"Frame to labels: {batch} of host uint8 grey levels in, host uint8 labels out; all copies, normalisation, "
        "resizing and arg-max are inside.",
        f"Interleaved: in each of {plan.rounds} rounds every engine ran once on the same frame, in changing order "
        f"(seed {plan.seed}), after {plan.warmup} untimed runs each and a rest of {plan.pause_ms:g} ms before each "
        f"timed run; {threads}.",
        "Images per second follow from the median latency of one call at a time. Speed-up is the ratio of medians to "
        "the reference, with a 95 % interval from resampling whole rounds (percentile bootstrap)."
        + (f" With {plan.rounds} rounds, p99 lies close to the maximum." if plan.rounds < 200 else ""),
        "Start-up and memory come from a process of its own per engine. Host memory is the highest resident memory "
        "above that of a Python process with numpy, so it includes the runtime's libraries.",
        "Accuracy is measured on whole images at their own size; agreement is the share of pixels labelled as the "
        "reference does.",
        *[note[0].upper() + note[1:] + "." for note in result.data_notes],
    ]


def _best(result: BenchmarkResult) -> dict[str, str]:
    """Label of the fastest entry for each size."""
    best: dict[str, tuple[float, str]] = {}
    for row in result.measured:
        for timing in row.timings:
            best[timing.size] = max(best.get(timing.size, (0.0, "")), (timing.images_per_s, row.label))
    return {size: label for size, (_, label) in best.items()}


# -- text ------------------------------------------------------------------------------------------


def mib(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f} MiB"


def megabytes(value: float) -> str:
    return f"{value / 1e6:.1f} MB"


def ratio_text(ratio: Ratio | None) -> str:
    """E.g. ``2.46× [2.41, 2.52]``; says so when the interval is wide or missing."""
    if ratio is None:
        return "–"
    if ratio.low is None or ratio.high is None:
        return f"{number(ratio.value)}× (too few rounds for an interval)"
    low, value, high = (number(part) for part in (ratio.low, ratio.value, ratio.high))
    return f"{value}× [{low}, {high}]{' (wide)' if ratio.wide else ''}"


def format_table(result: BenchmarkResult) -> str:
    """The result as plain text for a terminal."""
    header = ["engine", "size", "images/s", "p50 ms", "p95 ms", "p99 ms", "max ms", "speed-up [95 %]", "host MiB"]
    gpu = any(row.start is not None and row.start.device_mib is not None for row in result.measured)
    header += [*(["GPU MiB"] if gpu else []), "mIoU", "agreement", "file MB"]
    lines = [_cells(row, timing, result, gpu) for row in result.measured for timing in row.timings]
    text = [_align([header, *lines])] if lines else []
    for row in result.measured:
        text += [f"{row.label}: {note}" for note in row.notes]
    for row in result.not_run:
        built = "built, not run" if row.file.endswith(".engine") else "not run"
        text.append(f"{row.label}: {built}: {row.reason}")
    text += [f"warning: {warning}" for warning in result.warnings]
    return "\n".join(text)


def _cells(row: Row, timing: Timing, result: BenchmarkResult, gpu: bool) -> list[str]:
    speed = "reference" if row.label == result.reference else ratio_text(timing.ratio)
    start, accuracy = row.start, row.accuracy
    device = [f"{start.device_mib:.0f}" if start is not None and start.device_mib is not None else "–"] if gpu else []
    return [
        row.label, timing.size, number(timing.images_per_s), f"{timing.p50_ms:.1f}", f"{timing.p95_ms:.1f}",
        f"{timing.p99_ms:.1f}", f"{timing.max_ms:.1f}", speed,
        f"{start.host_peak_mib:.0f}" if start is not None else "–", *device,
        percent(accuracy.miou if accuracy else None), percent(accuracy.agreement if accuracy else None, 3),
        f"{row.file_bytes / 1e6:.1f}",
    ]  # fmt: skip


def _align(table: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    rows = [
        "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in table
    ]  # fmt: skip
    return "\n".join([rows[0], "-" * max(map(len, rows)), *rows[1:]])


# -- pictures --------------------------------------------------------------------------------------


def _gallery(result: BenchmarkResult, picture: Picture) -> Gallery:
    grey = _decode(picture.image)
    mask = None if picture.mask is None else _decode(picture.mask)
    labels = {label: _decode(content) for label, content in picture.labels.items()}
    palette = [entry.color for entry in result.classes]
    reference = labels.get(result.reference) if result.reference is not None else None
    mask_panel = [] if mask is None else [Panel("mask", "as annotated", _label_overlay(mask, palette))]
    pairs = [[Panel("micrograph", picture.part, None), *mask_panel]]
    for label, found in labels.items():
        pair = [Panel(label, _score(found, mask), _label_overlay(found, palette))]
        if label != result.reference and reference is not None:
            pair.append(_difference(f"{label}, against reference", found != reference))
        elif mask is not None:
            pair.append(_difference(f"{label}, against mask", (found != mask) & (mask != IGNORE_INDEX)))
        pairs.append(pair)
    height, width = grey.shape
    return Gallery(picture.name, picture.part, f"{width} / {height}", jpeg(grey), pairs)


def _difference(title: str, different: npt.NDArray[np.bool_]) -> Panel:
    count = int(np.count_nonzero(different))
    note = f"{count:,} of {different.size:,} pixels differ ({percent(count / different.size, 3)})"
    return Panel(title, note, _difference_overlay(different))


def _score(labels: npt.NDArray[np.uint8], mask: npt.NDArray[np.uint8] | None) -> str:
    if mask is None:
        return "labels"
    valid = mask != IGNORE_INDEX
    return f"{percent(float(np.mean(labels[valid] == mask[valid])) if valid.any() else None)} of pixels as annotated"


def _label_overlay(labels: npt.NDArray[np.uint8], palette: Sequence[tuple[int, int, int]]) -> str:
    colours = np.zeros((256, 4), dtype=np.uint8)
    colours[: len(palette), :3] = palette
    colours[: len(palette), 3] = _ALPHA
    return palette_png(labels, colours)


def _difference_overlay(different: npt.NDArray[np.bool_]) -> str:
    # Grown by one pixel on each side, or single pixels would vanish on the page.
    grown = cv2.dilate(different.astype(np.uint8), np.ones((3, 3), dtype=np.uint8))
    colours = np.zeros((256, 4), dtype=np.uint8)
    colours[0], colours[1] = (*_DIMMED, 150), (*_DIFFERENCE, 255)
    return palette_png(np.asarray(grown, dtype=np.uint8), colours)


def _decode(content: str) -> npt.NDArray[np.uint8]:
    with PillowImage.open(io.BytesIO(base64.b64decode(content))) as image:
        return np.asarray(image, dtype=np.uint8)
