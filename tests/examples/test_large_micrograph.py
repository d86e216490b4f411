"""The example for large micrographs."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from hpddrnet_trt.engines import load_engine
from hpddrnet_trt.inference import Segmenter, runner
from tests.toy import grey_image, manifest, write_toy_onnx

REPOSITORY = Path(__file__).resolve().parents[2]


def _example(*arguments: Path | str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["large_micrograph.py", *map(str, arguments)])
        runpy.run_path(str(REPOSITORY / "examples" / "large_micrograph.py"), run_name="__main__")


def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(runner, "WHOLE_PIXELS", 256 * 256)
    model = write_toy_onnx(tmp_path / "toy.onnx", manifest("logits", size=128))
    any_size = Segmenter(load_engine(write_toy_onnx(tmp_path / "any.onnx", manifest("logits")), threads=1))
    for height, width, last in ((128, 128, "in one piece"), (200, 300, "6 tiles of 128 x 128 pixels, blended scores")):
        image = grey_image(height, width)
        cv2.imwrite(str(tmp_path / "a.png"), image)
        _example(tmp_path / "a.png", tmp_path / "labels.png", model)
        with Image.open(tmp_path / "labels.png") as picture:
            labels = np.asarray(picture)
        truth = any_size.segment(image).labels
        assert (labels[1:-1, 1:-1] == truth[1:-1, 1:-1]).all()  # this model sees zeros beyond the border
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"a.png: {width} x {height} pixels")
        assert any(line.startswith(last) for line in lines)
        assert lines[-1] == f"written to {tmp_path / 'labels.png'}"
