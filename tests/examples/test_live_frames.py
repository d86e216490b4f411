"""The example segments frames of its own and accounts for all of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.toy import manifest, write_toy_onnx

pytest.importorskip("onnxruntime")
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "live_frames.py"


def run(*arguments: str | Path) -> str:
    child = subprocess.run(
        [sys.executable, EXAMPLE, "--engine", "onnxruntime", "--size", "64", "--rate", "500", *arguments],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert child.returncode == 0, child.stdout + child.stderr
    return child.stdout


def test_frames_of_a_simulated_micrograph(tmp_path: Path) -> None:
    printed = run("--model", write_toy_onnx(tmp_path / "toy.onnx", manifest("labels")), "--frames", "20",
                  "--policy", "block")  # fmt: skip
    assert "stream ready\n" in printed
    line = r"^frame \d+: grain [\d.]+%, pore [\d.]+%, clay [\d.]+% \(\d+ ms old\)$"
    assert len(re.findall(line, printed, re.M)) == 20
    assert "20 frames = 20 segmented + 0 dropped (none) + 0 failed + 0 pending\n" in printed
    assert re.search(r"^total: median [\d.]+ ms, p99 [\d.]+ ms, longest [\d.]+ ms$", printed, re.M)
    assert printed.index("stream closed") > printed.rindex("frame 20")


def test_frames_of_a_real_micrograph_with_the_shipped_model(sem_data: Path) -> None:
    picture = next(path for path in sorted((sem_data / "nasa-super1").rglob("*.png")) if "mask" not in path.name)
    counts = re.search(
        r"^5 frames = (\d+) segmented \+ (\d+) dropped .* \+ 0 failed \+ 0 pending$",
        run("--picture", picture, "--frames", "5"), re.M,
    )  # fmt: skip
    assert counts is not None
    assert int(counts[1]) + int(counts[2]) == 5
    assert int(counts[1]) >= 1


def test_a_model_that_is_not_there_is_said(tmp_path: Path) -> None:
    child = subprocess.run(
        [sys.executable, EXAMPLE, "--model", tmp_path / "none.onnx"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert child.returncode == 1
    assert "stream failed: the segmenter could not be opened" in child.stdout
