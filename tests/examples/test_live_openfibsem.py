"""The example acquires and segments with nothing but a folder of pictures."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import cv2
import pytest

from tests.toy import grey_image, manifest, write_toy_onnx

pytest.importorskip("fibsem")
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "live_openfibsem.py"


@pytest.mark.parametrize("beam", ["electron", "ion"])
def test_with_a_folder_of_pictures(
    tmp_path: Path, beam: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_toy_onnx(tmp_path / "toy.onnx", manifest("labels"))
    for seed in range(3):
        cv2.imwrite(str(tmp_path / f"{seed}.png"), grey_image(48, 64, seed))
    arguments = ["--replay", tmp_path, "--seconds", 1.5, "--model", model, "--engine", "onnxruntime", "--beam", beam]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *map(str, arguments)])
    monkeypatch.setenv("FIBSEM_SIM_NO_DELAY", "1")
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    results = [line for line in lines if line.startswith(beam)]
    assert "model ready" in lines
    assert results
    assert all("grain" in line and "10 nm per pixel" in line for line in results)
    counts = [int(word) for word in lines[-1].replace(":", "").split() if word.isdigit()]
    submitted, segmented, left_out, failed = counts
    assert failed == 0
    assert segmented + left_out == submitted
    assert len(results) <= segmented
