"""A result for people: a folder with JSON, CSV, PNG and one HTML page.

The page carries everything inside it (styles, figures, pictures) and loads nothing from outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hpddrnet_trt.benchmark.result import BenchmarkResult
from hpddrnet_trt.benchmark.table import tables
from hpddrnet_trt.benchmark.text import state_of
from hpddrnet_trt.benchmark.wording import sentence
from hpddrnet_trt.core.files import write_bytes, write_text
from hpddrnet_trt.core.text import megabytes
from hpddrnet_trt.report.benchmark_figures import SCALING, SCATTER, SPEED, TIME, Drawn, draw_figures, main_png
from hpddrnet_trt.report.benchmark_gallery import gallery
from hpddrnet_trt.report.page import render
from hpddrnet_trt.report.style import png, svg_address
from hpddrnet_trt.report.summary import headline, method

__all__ = ["FIGURES", "ReportFiles", "render_html", "write_report"]

FIGURES = "figures"  # folder beside the page, one PNG for each figure in it
_SECTIONS = {TIME: "Where the time goes", SCATTER: "Latency distributions", SCALING: "Scaling and memory"}


class ReportFiles(NamedTuple):
    """What :func:`write_report` wrote; ``figure`` (speed and accuracy) is None when nothing was timed."""

    html: Path
    json: Path
    csv: Path
    figure: Path | None
    figures: tuple[Path, ...] = ()


def write_report(result: BenchmarkResult, folder: str | Path) -> ReportFiles:
    """Write ``report.html``, ``result.json``, ``result.csv``, ``benchmark.png`` and ``figures/*.png`` into ``folder``.

    Each file is written whole or not at all. Raises :class:`MissingDependency` without matplotlib
    or jinja2, after the JSON and CSV are safe.
    """
    folder = Path(folder)
    json_file = write_text(folder / "result.json", result.to_json())
    csv_file = write_text(folder / "result.csv", result.to_csv())
    drawn = draw_figures(result)
    html = write_text(folder / "report.html", _page(result, drawn))
    main = main_png(result)
    figure = None if main is None else write_bytes(folder / "benchmark.png", main)
    pictures = tuple(write_bytes(folder / FIGURES / f"{found.name}.png", png(found.figure)) for found in drawn)
    return ReportFiles(html, json_file, csv_file, figure, pictures)


def render_html(result: BenchmarkResult) -> str:
    """The page as text."""
    return _page(result, draw_figures(result))


def _page(result: BenchmarkResult, drawn: Sequence[Drawn]) -> str:
    figures: dict[str, list[tuple[str, str]]] = {section: [] for section in (SPEED, *_SECTIONS)}
    for found in drawn:
        figures[found.section].append((found.caption, svg_address(found.figure)))
    return render(
        "report/benchmark.html.j2",
        filters={"megabytes": megabytes, "sentence": sentence, "state": state_of},
        result=result,
        headline=headline(result),
        tables=tables(result),
        speed=figures.pop(SPEED),
        sections=[(_SECTIONS[section], inside) for section, inside in figures.items() if inside],
        gallery=gallery(result),
        method=method(result),
    )
