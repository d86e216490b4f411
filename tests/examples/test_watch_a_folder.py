"""The example watches, writes results and keeps its table."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from tests.toy import grey_image, manifest, write_toy_onnx

pytest.importorskip("onnxruntime")
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "watch_a_folder.py"


def test_a_table_grows_over_two_runs(tmp_path: Path) -> None:
    model = write_toy_onnx(tmp_path / "toy.onnx", manifest("labels"))
    folder, table = tmp_path / "in", tmp_path / "fractions.csv"
    folder.mkdir()
    for seed in range(2):
        cv2.imwrite(str(folder / f"{seed}.png"), grey_image(30, 40, seed))
        child = subprocess.run(
            [sys.executable, EXAMPLE, folder, "--output", tmp_path / "labels", "--table", table, "--model", model,
             "--settle", "0", "--stop-after", "0"],
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert child.returncode == 0, child.stderr
        assert f"1 segmented, {seed} already done, 0 failed" in child.stdout
    with table.open(newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["micrograph", "grain", "pore", "clay"]
    assert [Path(row[0]).name for row in rows] == ["0.png", "1.png"]
    assert all(sum(map(float, row[1:])) == pytest.approx(1, abs=1e-3) for row in rows)
    assert (tmp_path / "labels" / "1.png").is_file()
