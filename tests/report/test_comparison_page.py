"""The page on what changed between two results."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.benchmark.test_report import assert_complete_in_itself, parse

from hpddrnet_trt.benchmark.compare import compare
from hpddrnet_trt.benchmark.result import BenchmarkResult
from hpddrnet_trt.report.changes import changes_figure
from hpddrnet_trt.report.comparison_page import render_comparison, summary, write_comparison
from tests.benchmark import constructed

SLOW, FAST = constructed.KINDS[3], constructed.KINDS[3]._replace(ms=180, miou=0.8101, mib=400)


@pytest.fixture(scope="module")
def old() -> BenchmarkResult:
    return constructed.result((constructed.KINDS[0], SLOW))


@pytest.fixture(scope="module")
def new() -> BenchmarkResult:
    made = constructed.result((constructed.KINDS[0], FAST, constructed.KINDS[5]))
    machine = made.machine.model_copy(update={"cpu": "Newer <CPU>"})
    return made.model_copy(update={"machine": machine, "command": "python benchmarks/benchmark.py runs/new"})


def test_the_page_says_what_changed_and_what_else_differs(
    old: BenchmarkResult, new: BenchmarkResult, tmp_path: Path
) -> None:
    changes = compare(old, new)
    page_file = write_comparison(old, new, changes, tmp_path / "changes.html")
    text = page_file.read_text(encoding="utf-8")
    page = parse(text)
    words = " ".join(" ".join(page.text).split())
    assert_complete_in_itself(text, page)
    assert "Processor differs: Example CPU (2 cores) before, Newer <CPU> (2 cores) now." in words
    assert words.index("Processor differs") < words.index("before / now")  # what else differs is on top
    assert summary(changes) == "Frame to labels: 5 no difference, 5 faster, 5 only new."
    assert "only new" in words
    assert "−0.22" in words  # points of mIoU
    assert "−20" in words  # MiB at 1024x1024
    assert text.count('class="text faster"') == 15  # five shapes in each of three measures
    for heading in ("Frame to labels", "Network only", "Throughput"):
        assert heading in words
    for run in (old, new):
        assert run.command in words


def test_equal_results_differ_in_nothing(old: BenchmarkResult) -> None:
    words = " ".join(parse(render_comparison(old, old, compare(old, old))).text)
    assert "Machine, versions and settings are the same." in words
    assert summary(compare(old, old)) == "Frame to labels: 10 no difference."


def test_results_without_a_common_entry_make_a_page_without_a_figure(old: BenchmarkResult) -> None:
    other = constructed.result((constructed.KINDS[5],))
    changes = compare(old, other)
    assert changes_figure(changes) is None
    assert parse(render_comparison(old, other, changes)).sources == []
    assert summary([]) == "Neither result has a latency from frame to labels."


def test_the_figure_has_a_line_per_entry_and_size(old: BenchmarkResult, new: BenchmarkResult) -> None:
    figure = changes_figure(compare(old, new))
    assert figure is not None
    names = [label.get_text().replace("\n", " ") for label in figure.axes[0].get_yticklabels()]
    assert len(names) == 10
    assert "ONNX Runtime FP32, 1024×1024" in names
