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

from hpddrnet_trt.benchmark import BenchmarkResult, Settings, format_table, load_result, make_settings
from hpddrnet_trt.benchmark.result import GpuState, Ratio
from hpddrnet_trt.benchmark.wording import ratio_text
from hpddrnet_trt.core.errors import BadInputFile, UsageError
from hpddrnet_trt.core.text import number
from hpddrnet_trt.report.benchmark import render_html, write_report
from hpddrnet_trt.report.benchmark_figures import draw_figures
from hpddrnet_trt.report.summary import headline, method
from tests.benchmark import constructed

REPOSITORY = Path(__file__).resolve().parents[2]
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


def assert_complete_in_itself(text: str, page: Page) -> None:
    assert all(source.startswith("data:image/") for source in page.sources)
    assert all(address.startswith("data:image/jpeg") for address in re.findall(r"url\(([^)]*)\)", text))
    assert not re.search(r"https?://|//cdn|@import|<script|<link", re.sub(r"data:image/[^\"')]*", "", text))


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


def test_the_table_of_values_has_a_row_per_entry_measure_and_shape() -> None:
    made = constructed.result()
    rows = list(csv.DictReader(io.StringIO(made.to_csv())))
    assert len(rows) == len(constructed.KINDS) * 3 * 5 + 1
    assert {row["measure"] for row in rows[:-1]} == {"frame to labels", "network only", "throughput"}
    assert float(rows[0]["p50_ms"]) == made.rows[0].timings[0].p50_ms
    assert "another GPU" in rows[-1]["reason"]
    assert made.rows[0].accuracy is not None
    assert float(rows[0]["iou_secondary"]) == made.rows[0].accuracy.iou[1]


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
    # every figure; two pictures, each with mask, two entries and two differences
    assert len(page.sources) == page.alternatives == len(draw_figures(measured)) + 2 * 5
    assert_complete_in_itself(text, page)
    for path in (files.html, files.json, files.csv, files.figure, *files.figures):
        assert path is not None
        assert path.stat().st_size > 200
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "benchmark.png", "figures", "report.html", "result.csv", "result.json",
    ]  # fmt: skip
    assert sorted((tmp_path / "report/figures").iterdir()) == sorted(files.figures)
    with PillowImage.open(tmp_path / "report/benchmark.png") as figure:
        assert figure.size[0] > 1000


def test_everything_that_was_measured_is_on_the_page() -> None:
    made = constructed.result()
    words = " ".join(" ".join(parse(render_html(made)).text).split())
    for said in (
        "TensorRT FP16: 432×", "the speed of PyTorch FP32 at 1024×1024",  # the finding
        "The driver does not report energy of the processor.",
        "Frame to labels: a uint8 frame in host memory", "Network only: the frame already",
        "batch 4 of 512×512", "(wide)", "(not interleaved)", "−0.25 points", "row blocks of 1024", "0.400",
        "Times had not become steady when timing began: PyTorch FP32 compiled.",
        "Where the time goes", "Latency distributions", "Scaling and memory",
        "clock 1755, 1980, 1980 MHz (lowest, median, highest), 312 W, at most 51 °C", "not slowed down",
        "FP32 140 GMAC/s, INT8 610 GMAC/s, 21.3 GB/s (best of 20 products",
        "Python environment 2", "--merge", "tensorrt 10.9.0", "not with those of another",
    ):  # fmt: skip
        assert said in words, said


def test_a_gpu_that_slowed_down_is_said_in_the_headline() -> None:
    made = constructed.result()
    state = GpuState(name="Example GPU", sm_clock_mhz=(300, 400, 1980), power_w=None, temperature_c=None,
                     throttled=["SW thermal slowdown"])  # fmt: skip
    slow = made.model_copy(update={"gpu_states": [state]})
    assert headline(slow).endswith("Measured on a GPU that slowed itself down: do not quote.")
    assert "slowed down: SW thermal slowdown" in " ".join(" ".join(parse(render_html(slow)).text).split())


def test_speed_without_accuracy_is_not_the_finding() -> None:
    """The fastest entry loses 5 points of mIoU: the next one is praised, unless all are as bad."""
    bad = constructed.Kind("TensorRT FP8", "tensorrt 10.9", "FP8", 0.5, 0.1, 0.76, 600, 300)
    assert headline(constructed.result((*constructed.KINDS, bad))).startswith("TensorRT FP16: ")
    assert headline(constructed.result((constructed.KINDS[0], bad))).startswith("TensorRT FP8: ")


def test_only_what_was_measured_is_explained() -> None:
    made = constructed.result()
    rows = [row.model_copy(update={"throughput": [], "network": [], "layers": [], "roofs": []}) for row in made.rows]
    plain = " ".join(method(made.model_copy(update={"rows": rows})))
    for word in ("pipelined", "Network only", "profiler", "limit of this machine"):
        assert word in " ".join(method(made))
        assert word not in plain


def test_a_committed_result_of_a_real_run_still_makes_a_page() -> None:
    """Also one of schema version 1."""
    files = sorted((REPOSITORY / "benchmarks/results").glob("*.json"))
    assert files
    for file in files:
        result = load_result(file)
        text = render_html(result)
        assert_complete_in_itself(text, page := parse(text))
        assert all(row.label in " ".join(page.text) for row in result.rows)


def test_a_report_made_again_from_json_is_the_same_page(tmp_path: Path) -> None:
    files = write_report(constructed.result(constructed.KINDS[:1]), tmp_path)
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
    assert files.figures == ()
    assert "0 of 2 entries ran" in " ".join(parse(files.html.read_text(encoding="utf-8")).text)
    assert "lonely: built, not run" in format_table(empty)


def test_a_result_without_accuracy_still_makes_a_page(measured: BenchmarkResult) -> None:
    rows = [row.model_copy(update={"accuracy": None}) for row in measured.rows]
    parse(render_html(measured.model_copy(update={"rows": rows, "pictures": []})))


def test_a_wide_or_missing_interval_is_said() -> None:
    assert ratio_text(Ratio(value=2.461, low=2.41, high=2.523)) == "2.46× [2.41, 2.52]"
    assert ratio_text(Ratio(value=2.0, low=1.5, high=2.5)).endswith("(wide)")
    assert "too few rounds" in ratio_text(Ratio(value=2.0))
    assert ratio_text(Ratio(value=2.0, low=1.9, high=2.1, paired=False)).endswith("(not interleaved)")
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
