"""What a result advises: the stated rule picks what was measured to be best, and never what loses labels."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hpddrnet_trt.report.benchmark import parts_table, render_html
from hpddrnet_trt.report.choices import choices
from tests.benchmark import constructed
from tests.benchmark.constructed import KINDS, Kind


def advised(*kinds: Kind) -> dict[str, str]:
    return {choice.purpose: choice.label for choice in choices(constructed.result(kinds))}


def test_an_engine_that_ran_is_taken_and_without_one_the_file_to_build() -> None:
    assert advised(*KINDS) == dict.fromkeys(("live frames", "many pictures", "TensorRT"), "TensorRT FP16")
    on_cpu = dict.fromkeys(("live frames", "many pictures"), "OpenVINO INT8 Q/DQ")
    assert advised(*KINDS[:-1]) == {**on_cpu, "TensorRT": "int8.onnx"}
    own_form = Kind("ONNX Runtime INT8", "onnxruntime 1.31.1", "INT8", 100, 1, 0.8120, 300)
    assert advised(*KINDS[:5], own_form)["TensorRT"] == "fp32.onnx"  # TensorRT does not take that form


def test_what_loses_labels_is_never_advised() -> None:
    bad = Kind("OpenVINO INT8 Q/DQ", "openvino 2026.4.1", "INT8", 10, 1, 0.80, 300)  # 1.2 points less
    assert "OpenVINO INT8 Q/DQ" not in advised(*KINDS[:5], bad).values()
    made = constructed.result((*KINDS[:5], bad))
    rows = [row.model_copy(update={"accuracy": row.accuracy and row.accuracy.model_copy(update={"miou": None})})
            for row in made.rows]  # fmt: skip
    without_masks = made.model_copy(update={"rows": rows})
    assert {choice.label for choice in choices(without_masks)} == {"OpenVINO FP32", "fp32.onnx"}


def test_nothing_timed_gives_no_advice_and_no_table_of_parts() -> None:
    made = constructed.result()
    empty = made.model_copy(update={"rows": made.not_run})
    assert choices(empty) == []
    assert parts_table(empty) is None
    assert "Which one to take" not in render_html(empty, [])


def test_parts_stand_in_the_order_of_the_network_and_add_up() -> None:
    table = parts_table(constructed.result())
    assert table is not None
    assert table.parts[:3] == ["stem", "spatial branch", "context branch"]
    for _, total, cells in table.lines:
        assert sum(cell or 0 for cell in cells) == pytest.approx(total)


def test_headings_sort_their_table(tmp_path: Path) -> None:
    """In a browser, where one is installed: by value, what has none last, and back."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser is installed: apt-get install chromium")
    made = constructed.result()
    page = render_html(made, [])
    click = """<script>
      const heads = [...document.querySelectorAll("table.sortable thead tr:last-child th")].filter(
        head => head.firstChild.textContent === "p50");
      const read = () => [...heads[0].closest("table").tBodies[0].rows].map(row => row.cells[0].firstChild.textContent);
      heads[0].click(); const up = read(); heads[0].click();
      document.body.innerHTML = "<p>" + up.join("|") + "</p><p>" + read().join("|") + "</p>";
    </script>"""
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", f"{click}</body>"), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom",
               f"--user-data-dir={tmp_path}/user", file.as_uri()]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    up, down = (found.split("|") for found in re.findall(r"<p>([^<]*)</p>", shown))
    labels = [kind.label for kind in sorted(KINDS, key=lambda kind: kind.ms)]
    assert (up, down) == (labels, labels[::-1])


