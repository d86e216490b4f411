"""What changed between two results, as a page: what differs around them first, then every measure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from hpddrnet_trt.benchmark.compare import Change, differences
from hpddrnet_trt.benchmark.result import MEASURES, BenchmarkResult
from hpddrnet_trt.benchmark.wording import points, ratio_text, sentence
from hpddrnet_trt.core.files import write_text
from hpddrnet_trt.report.changes import changes_figure
from hpddrnet_trt.report.page import render
from hpddrnet_trt.report.style import svg_address


def write_comparison(old: BenchmarkResult, new: BenchmarkResult, changes: Sequence[Change], target: str | Path) -> Path:
    """Write :func:`render_comparison` to ``target``, whole or not at all; returns its path."""
    return write_text(target, render_comparison(old, new, changes))


def render_comparison(old: BenchmarkResult, new: BenchmarkResult, changes: Sequence[Change]) -> str:
    """The page as text: complete in itself. Raises :class:`MissingDependency` without matplotlib or jinja2."""
    figure = changes_figure(changes)
    by_measure = [(MEASURES[measure], list(inside)) for measure, inside in groupby(
        sorted(changes, key=lambda change: list(MEASURES).index(change.measure)), lambda change: change.measure
    )]  # fmt: skip
    return render(
        "report/comparison.html.j2",
        filters={"ratio": ratio_text, "points": points, "sentence": sentence, "signed": _signed, "ms": _ms},
        runs=[("before", old), ("now", new)],
        headline=summary(changes),
        differences=differences(old, new),
        measures=by_measure,
        figure=None if figure is None else svg_address(figure),
    )


def summary(changes: Sequence[Change]) -> str:
    """E.g. ``Frame to labels: 3 faster, 1 no difference.``; the measure with which results are quoted."""
    counted = Counter(change.verdict for change in changes if change.measure == "timings")
    if not counted:
        return "Neither result has a latency from frame to labels."
    return f"Frame to labels: {', '.join(f'{number} {verdict}' for verdict, number in counted.most_common())}."


def _signed(value: float) -> str:
    """A change in whole units, with a real minus sign."""
    return "±0" if round(value) == 0 else f"{value:+.0f}".replace("-", "−")


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
