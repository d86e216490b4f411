"""The example opens a window on a virtual display; its screenshot shows the classes on the micrograph."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpddrnet_trt.integrations.napari_layers import OPACITY
from tests.integrations.napari_viewer import application
from tests.toy import CLASSES, grey_image, manifest, write_toy_onnx
from tests.virtual_display import virtual_display

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "segment_in_napari.py"


def test_the_screenshot_shows_the_classes(tmp_path: Path) -> None:
    application()  # skips without a Qt that works
    micrograph, screenshot = tmp_path / "sample.png", tmp_path / "seen.png"
    Image.fromarray(grey_image(64, 96)).save(micrograph)
    model = write_toy_onnx(tmp_path / "toy.onnx", manifest())
    options = ["--model", str(model), "--pixel-size-nm", "5", "--screenshot", str(screenshot)]
    with virtual_display(tmp_path) as environment:
        child = subprocess.run(
            [sys.executable, str(EXAMPLE), str(micrograph), *options], env=environment, cwd=tmp_path,
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
    assert child.returncode == 0, child.stderr
    assert "Traceback" not in child.stderr
    seen = np.asarray(Image.open(screenshot).convert("RGB")).astype(int)
    assert seen.shape == (pytest.approx(880, abs=60), pytest.approx(1400, abs=60), 3)
    canvas = seen[:, 350:1050]
    for info in CLASSES[1:]:
        # A class's colour over a grey: channels differ as the colour's do, by the layer's share of them.
        tint = np.array(info.color) - np.mean(info.color)
        here = canvas - canvas.mean(axis=2, keepdims=True)
        assert (np.abs(here - OPACITY * tint).max(axis=2) < 12).mean() > 0.02, info.name
