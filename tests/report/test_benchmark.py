"""The report of a benchmark: the page, what it says, and the files beside it."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image as PillowImage

from hpddrnet_trt.benchmark.result import BenchmarkResult, GpuState, load_result
from hpddrnet_trt.benchmark.table import format_table
from hpddrnet_trt.report.benchmark import ReportFiles, headline, method, publish_report, render_html, write_report
from hpddrnet_trt.report.benchmark_figures import draw_figures
from tests.benchmark import constructed
from tests.report.pages import Page


def page_of(result: BenchmarkResult) -> str:
    return render_html(result, draw_figures(result))


def test_the_page_holds_everything_and_loads_nothing(measured: BenchmarkResult, tmp_path: Path) -> None:
    files = write_report(measured, tmp_path / "report")
    page = Page(files.html.read_text(encoding="utf-8"))
    words = page.text
    for row in measured.rows:
        assert row.label in words
        assert row.file in words or row.status == "measured"
        assert row.reason is None or row.reason in words
    assert "built, not run" in words
    assert "python benchmark.py" in words
    assert measured.machine.cpu in words
    # every figure; two pictures, each with mask, two entries and two differences
    assert len(page.sources) == len(page.alternatives) == len(draw_figures(measured)) + 2 * 5
    page.assert_complete_in_itself()
    for path in (files.html, files.json, files.csv, *files.figures):
        assert path.stat().st_size > 200
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "figures", "report.html", "result.csv", "result.json",
    ]  # fmt: skip
    assert sorted((tmp_path / "report/figures").iterdir()) == sorted(files.figures)
    with PillowImage.open(tmp_path / "report/figures/speed.png") as figure:
        assert figure.size[0] > 1000


def test_everything_that_was_measured_is_on_the_page() -> None:
    made = constructed.result()
    words = Page(page_of(made)).text
    for said in (
        "TensorRT FP16: 232×", "the speed of PyTorch FP32 compiled, the fastest of what others would run, and 432×",
        "that of PyTorch FP32 at 1024×1024",  # the finding
        "Which one to take", "for live frames", "Milliseconds by part of the network",
        "The driver does not report energy.",
        "End-to-end latency: a uint8 frame in host memory", "Inference latency: the frame already",
        "batch 4 of 512×512", "(wide)", "(not interleaved)", "−0.25 points", "row blocks of 1024", "0.400",
        "Times had not become steady when timing began: PyTorch FP32 compiled.",
        "Where the time goes", "Scaling and memory",
        "clock 1755, 1980, 1980 MHz (lowest, median, highest) of at most 1980 MHz, 312 W, at most 51 °C",
        "not slowed down", "nothing to do in 2 % of the looks", "between CUDA events", "first of a turn",
        "Engines on the processor have a rest of 20 ms",
        "roofline bound Example GPU, from its data sheet",
        "Python environment 2", "--merge", "tensorrt 10.9.0", "not with those of another",
    ):  # fmt: skip
        assert said in words, said


def test_a_weak_measurement_is_said_in_the_headline() -> None:
    made = constructed.result()
    state = GpuState(name="Example GPU", sm_clock_mhz=(300, 400, 1980), power_w=None, temperature_c=None,
                     throttled=["SW thermal slowdown"])  # fmt: skip
    slow = made.model_copy(update={"gpu_states": [state], "busy_share": 0.5})
    assert headline(slow).endswith("Measured on a busy machine and on a GPU that slowed itself down: do not quote.")
    assert "do not quote" not in headline(made)
    assert "slowed down: SW thermal slowdown" in Page(page_of(slow)).text


def test_speed_without_accuracy_is_not_the_finding() -> None:
    """The fastest entry loses 5 points of mIoU: the next one is praised, unless all are as bad."""
    bad = constructed.Kind("TensorRT FP8", "tensorrt 10.9", "FP8", 0.5, 0.1, 0.76, 600, 300)
    assert headline(constructed.result((*constructed.KINDS, bad))).startswith("TensorRT FP16: ")
    assert headline(constructed.result((constructed.KINDS[0], bad))).startswith("TensorRT FP8: ")


def test_only_what_was_measured_is_explained() -> None:
    made = constructed.result()
    rows = [row.model_copy(update={"throughput": [], "inference": [], "layers": [], "bounds": []}) for row in made.rows]
    plain = " ".join(method(made.model_copy(update={"rows": rows})))
    for word in ("pipelined", "Inference latency is", "profiler", "roofline bound"):
        assert word in " ".join(method(made))
        assert word not in plain


def test_every_page_says_how_its_own_figures_were_taken() -> None:
    made = constructed.result()
    for changes, said in (
        ({"burst_ms": 0.0}, "every engine ran once on the same frame"),  # as results before format 4 are
        ({"alone": True}, "one engine was loaded at a time"),
        ({}, "GPU engines apart from those on the processor"),
    ):
        text = " ".join(method(made.model_copy(update={"settings": made.settings.model_copy(update=changes)})))
        assert said in text
        assert ("burst of runs" in text) == ("burst_ms" not in changes)


def test_a_report_made_again_from_json_is_the_same_page(tmp_path: Path) -> None:
    files = write_report(constructed.result(constructed.KINDS[:1]), tmp_path)
    assert page_of(load_result(files.json)) == files.html.read_text(encoding="utf-8")


def test_pictures_show_the_labels_and_names_are_escaped(measured: BenchmarkResult) -> None:
    picture = measured.pictures[0]
    with PillowImage.open(io.BytesIO(base64.b64decode(picture.labels["plain"]))) as image:
        labels = np.asarray(image)
    assert (labels.shape, picture.part) == ((40, 56), "whole image, 40x56")
    assert labels.max() <= 2
    rows = [measured.rows[0].model_copy(update={"label": "<b>bold</b>"}), *measured.rows[1:]]
    text = page_of(measured.model_copy(update={"rows": rows}))
    assert "<b>bold" not in text
    assert "&lt;b&gt;bold" in text


def test_little_still_makes_a_page(measured: BenchmarkResult, tmp_path: Path) -> None:
    empty = measured.model_copy(update={"rows": measured.not_run, "pictures": [], "reference": None})
    files = write_report(empty, tmp_path)
    assert files.figures == ()
    assert "0 of 2 entries ran" in Page(files.html.read_text(encoding="utf-8")).text
    assert "lonely: built, not run" in format_table(empty)
    rows = [row.model_copy(update={"accuracy": None}) for row in measured.rows]
    Page(page_of(measured.model_copy(update={"rows": rows, "pictures": []}))).assert_complete_in_itself()


def test_published_report_is_named_after_device_and_day(measured: BenchmarkResult, tmp_path: Path) -> None:
    json_file, html_file = tmp_path / "result.json", tmp_path / "report.html"
    json_file.write_text("{}")
    html_file.write_text("<html></html>")
    machine = measured.machine.model_copy(update={"gpus": [], "cpu": "Some CPU (R) 9000"})
    outcome = measured.model_copy(update={"machine": machine, "created": "2031-02-03T04:05:06+00:00"})
    page = publish_report(ReportFiles(html_file, json_file, json_file), outcome, tmp_path / "results")
    assert page == tmp_path / "results" / "some-cpu-r-9000-2031-02-03.html"
    assert page.read_text() == "<html></html>"
    assert page.with_suffix(".json").read_text() == "{}"
