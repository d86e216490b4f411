"""Result files and the report."""

from __future__ import annotations

import base64
import csv
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage

from hpddrnet_trt.benchmark import BenchmarkResult, Settings, format_table, load_result, make_settings, write_report
from hpddrnet_trt.benchmark.plots import number
from hpddrnet_trt.benchmark.report import headline, ratio_text, render_html
from hpddrnet_trt.benchmark.result import Ratio
from hpddrnet_trt.errors import BadInputFile, UsageError

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Collects sources and text, and checks that tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text: list[str] = []
        self.alternatives = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attrs)
        self.sources += [value for key, value in attrs if key in {"src", "href"} and value is not None]
        self.alternatives += tag == "img" and bool(values.get("alt"))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return page


def test_results_survive_the_way_through_json(measured: BenchmarkResult, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(measured.to_json())
    assert load_result(tmp_path / "result.json") == measured


def test_a_foreign_or_damaged_result_is_refused(measured: BenchmarkResult, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    for content in ("{}", measured.to_json()[:200], "[]", ""):
        path.write_text(content)
        with pytest.raises(BadInputFile, match="not a benchmark result"):
            load_result(path)
    with pytest.raises(BadInputFile, match="does not exist"):
        load_result(tmp_path / "none.json")


def test_the_table_of_values_has_a_row_per_entry_and_size(measured: BenchmarkResult) -> None:
    rows = list(csv.DictReader(io.StringIO(measured.to_csv())))
    assert [(row["label"], row["height"]) for row in rows] == [
        ("plain", "32"), ("plain", "64"), ("small", "32"), ("small", "64"), ("cut", ""), ("lonely", ""),
    ]  # fmt: skip
    assert float(rows[2]["p50_ms"]) == measured.rows[1].timings[0].p50_ms
    assert "cut.onnx" in rows[4]["reason"]
    assert measured.rows[0].accuracy is not None
    assert float(rows[0]["iou_pore"]) == measured.rows[0].accuracy.iou[1]


def test_the_page_holds_everything_and_loads_nothing(measured: BenchmarkResult, tmp_path: Path) -> None:
    files = write_report(measured, tmp_path / "report")
    text = files.html.read_text(encoding="utf-8")
    page = parse(text)
    words = " ".join(page.text)
    for row in measured.rows:
        assert row.label in words
        assert row.file in words or row.status == "measured"
        assert row.reason is None or row.reason in words
    assert "built, not run" in words
    assert "python benchmark.py" in words
    assert measured.machine.cpu in words
    # main figure, two latency figures; two pictures, each with mask, two entries and two differences
    assert len(page.sources) == page.alternatives == 3 + 2 * 5
    assert all(source.startswith("data:image/") for source in page.sources)
    assert all(address.startswith("data:image/jpeg") for address in re.findall(r"url\(([^)]*)\)", text))
    assert not re.search(r"https?://|//cdn|@import|<script|<link", re.sub(r"data:image/[^\"')]*", "", text))
    for path in files:
        assert path is not None
        assert path.stat().st_size > 200
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "benchmark.png", "report.html", "result.csv", "result.json",
    ]  # fmt: skip
    with PillowImage.open(tmp_path / "report/benchmark.png") as figure:
        assert figure.size[0] > 1000


def test_a_report_made_again_from_json_is_the_same_page(measured: BenchmarkResult, tmp_path: Path) -> None:
    files = write_report(measured, tmp_path)
    assert render_html(load_result(files.json)) == files.html.read_text(encoding="utf-8")


def test_pictures_show_the_labels(measured: BenchmarkResult) -> None:
    picture = measured.pictures[0]
    with PillowImage.open(io.BytesIO(base64.b64decode(picture.labels["plain"]))) as image:
        labels = np.asarray(image)
    assert labels.shape == (40, 56)
    assert labels.max() <= 2
    assert picture.part == "whole image, 40x56"


def test_names_from_files_are_escaped(measured: BenchmarkResult) -> None:
    rows = [measured.rows[0].model_copy(update={"label": "<b>bold</b>"}), *measured.rows[1:]]
    text = render_html(measured.model_copy(update={"rows": rows}))
    assert "<b>bold" not in text
    assert "&lt;b&gt;bold" in text


def test_nothing_measured_still_makes_a_page(measured: BenchmarkResult, tmp_path: Path) -> None:
    empty = measured.model_copy(update={"rows": measured.not_run, "pictures": [], "reference": None})
    files = write_report(empty, tmp_path)
    assert files.figure is None
    assert "0 of 2 entries ran" in " ".join(parse(files.html.read_text(encoding="utf-8")).text)
    assert "lonely: built, not run" in format_table(empty)


def test_a_result_without_accuracy_still_makes_a_page(measured: BenchmarkResult) -> None:
    rows = [row.model_copy(update={"accuracy": None}) for row in measured.rows]
    parse(render_html(measured.model_copy(update={"rows": rows, "pictures": []})))


def test_the_terminal_table_names_every_entry(measured: BenchmarkResult) -> None:
    lines = format_table(measured).splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["plain", "plain", "small", "small"]
    assert "reference" in lines[2]
    assert any(line.startswith("lonely: built, not run: ") for line in lines)
    assert any(line.startswith("cut: not run: ") for line in lines)


def test_a_wide_or_missing_interval_is_said() -> None:
    assert ratio_text(Ratio(value=2.461, low=2.41, high=2.523)) == "2.46× [2.41, 2.52]"
    assert ratio_text(Ratio(value=2.0, low=1.5, high=2.5)).endswith("(wide)")
    assert "too few rounds" in ratio_text(Ratio(value=2.0))
    assert ratio_text(None) == "–"


def test_a_busy_machine_is_said_in_the_headline(measured: BenchmarkResult) -> None:
    assert "busy machine" in headline(measured.model_copy(update={"busy_share": 0.5}))
    assert "busy machine" not in headline(measured.model_copy(update={"busy_share": 0.01}))


def test_numbers_keep_three_digits() -> None:
    values = {0.0: "0", 0.01234: "0.0123", 4.5678: "4.57", 45.678: "45.7", 1234.5: "1234"}
    assert {value: number(value) for value in values} == values


def test_senseless_settings_are_sentences() -> None:
    with pytest.raises(UsageError, match="size 100x64 is not a multiple of 8"):
        make_settings(sizes=[(100, 64)])
    with pytest.raises(UsageError, match="setting rounds is 0"):
        make_settings(rounds=0)
    assert make_settings(rounds=3) == Settings(rounds=3)
