"""One result as the kinds of file that its path asks for, and in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.inference.result import Provenance, Segmentation
from hpddrnet_trt.inference.tiling import TilingReport
from tests.toy import manifest

LABELS = np.zeros((96, 160), np.uint8)
LABELS[10:40, 20:60] = 1
LABELS[50:90, 100:160] = 2
GREY = np.random.default_rng(0).integers(0, 256, LABELS.shape, dtype=np.uint8)
ORIGIN = Provenance("toy", "ab12", None, "numpy", "fp32", "0.1", "single", (0.0, 255.0), "2026-01-01T00:00:00+00:00")


def _result(**changes: Any) -> Segmentation:
    tiling = TilingReport((64, 64), 16, 6, "blended scores", 0.01)
    return Segmentation(
        **{"labels": LABELS, "manifest": manifest(), "pixel_size_m": 50e-9, "source": Path("in/a.tif"),
           "provenance": ORIGIN, "tiling": tiling, **changes}
    )  # fmt: skip


def test_the_old_name_of_saving_labels_warns(tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match=r"is Segmentation\.save now"):
        path = _result().save_labels(tmp_path / "a.png")
    with Image.open(path) as picture:
        assert np.array_equal(np.asarray(picture), LABELS)


def test_words() -> None:
    lines = str(_result()).splitlines()
    assert lines[0] == "a.tif: 160 x 96 pixels, 50 nm each, 8 x 4.8 µm, by toy"
    assert [line.split() for line in lines[1:]] == [
        ["grain", "76.56", "%", "29.4", "µm²"], ["pore", "7.81", "%", "3", "µm²"], ["clay", "15.62", "%", "6", "µm²"]
    ]  # fmt: skip
    unknown = str(_result(pixel_size_m=None, source=None))
    assert unknown.startswith("160 x 96 pixels, pixel size unknown, by toy\n")
    assert "µm" not in unknown


def test_overlay_with_and_without_caption(tmp_path: Path) -> None:
    plain = _result().save_overlay(tmp_path / "plain.png", GREY, alpha=0.5, caption=False)
    captioned = _result().save_overlay(tmp_path / "captioned.png", GREY, 0.5)
    with Image.open(plain) as a, Image.open(captioned) as b:
        assert a.size == (160, 96)
        assert b.size[0] == 160
        assert b.size[1] > 96
        assert np.array_equal(np.asarray(a), np.asarray(b)[:96])
    with pytest.raises(UsageError, match=r"written as \.png"):
        _result().save_overlay(tmp_path / "overlay.jpg", GREY)
