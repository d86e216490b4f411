"""The example that segments a folder."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import cv2
import pytest

from tests.toy import grey_image, manifest, write_toy_onnx

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "segment_a_folder.py"


def test_it_writes_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("roifile")
    model = write_toy_onnx(tmp_path / "toy.onnx", manifest())
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in" / "a.png"), grey_image(64, 200))
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(tmp_path / "in"), str(tmp_path / "out"), str(model)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a.overlay.png", "a.png", "a.regions.csv", "a.rois.zip"
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.startswith("a.png: 200 x 64 pixels, pixel size unknown, by toy\n")
    assert "regions, mean diameter" in printed
    assert "pixels" in printed.splitlines()[-1]
