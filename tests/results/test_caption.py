"""The bar below an overlay: a round length of the right number of pixels, colours that are the classes'."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpddrnet_trt.core.manifest import ClassInfo
from hpddrnet_trt.results import caption
from hpddrnet_trt.results.caption import scale_bar, with_caption
from hpddrnet_trt.results.regions import AreaFraction, area_fractions
from tests.toy import CLASSES

METRES = {"nm": 1e-9, "µm": 1e-6, "mm": 1e-3, "m": 1.0}


@given(st.integers(128, 8192), st.floats(1e-11, 1e-4))
def test_scale_bar_is_a_round_length_of_about_a_fifth(width: int, size: float) -> None:
    bar = scale_bar(width, size)
    assert 0.12 * width - 1 <= bar.pixels <= 0.33 * width + 1
    assert bar.pixels == pytest.approx(bar.length_m / size, abs=0.5)
    text, unit = bar.label.split(" ")
    assert float(text) * METRES[unit] == pytest.approx(bar.length_m)
    digits = re.sub(r"e.*|\.|^0+", "", f"{float(text):.9e}".rstrip("0")).rstrip("0")
    assert digits in ("1", "2", "5")
    assert 1 <= float(text) < 1000 or unit in ("nm", "m")
    assert (scale_bar(1536, 97.6562e-9).label, scale_bar(1000, 1e-12).label) == ("20 µm", "0.2 nm")


def _captioned(width: int, size: float | None, classes: list[ClassInfo] = CLASSES) -> np.ndarray:
    labels = np.arange(40 * width, dtype=np.uint32).reshape(40, width) % len(classes)
    picture = np.full((40, width, 3), 90, np.uint8)
    fractions = area_fractions(labels.astype(np.uint8), classes)
    found = with_caption(picture, classes, fractions, size)
    assert np.array_equal(found[:40], picture)
    return found[40:]


def _longest_run(picture: np.ndarray) -> int:
    """Most true pixels beside each other in a row."""
    rows = ("".join("x" if pixel else " " for pixel in row) for row in picture)
    return max(len(run) for row in rows for run in row.split())


@pytest.mark.parametrize("width", [128, 300, 1024, 8192])
def test_bar_and_legend_are_drawn_from_small_to_large(width: int) -> None:
    strip = _captioned(width, 10e-9)
    bar = scale_bar(width, 10e-9)
    light = (strip >= 235).all(axis=2)
    assert _longest_run(light) == bar.pixels
    for entry in CLASSES:
        assert (strip == entry.color).all(axis=2).sum() >= (0.6 * max(12, width / 50)) ** 2
    assert strip.shape[0] < 0.6 * max(width, 180)
    assert light[:, -2:].sum() == 0  # nothing is cut off
    legend = (_captioned(width, None) >= 235).all(axis=2)  # without a pixel size no bar
    assert legend.any()
    assert _longest_run(legend) < 0.11 * max(width, 250)
    assert _captioned(127, 1e-9).shape[0] == 0




def test_many_classes_with_long_names(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(caption._Pen, "write", lambda pen, on, x, middle, text: written.append(text))
    names = [f"a class whose name goes on and on, number {index}" for index in range(30)]
    classes = [ClassInfo(name=name, color=(0, 0, 9)) for name in names]
    fractions = [AreaFraction(entry.name, index, index / 435, None) for index, entry in enumerate(classes)]
    with_caption(np.zeros((10, 200, 3), np.uint8), classes, fractions, 5e-9)
    assert written[0] == "200 nm"
    assert written[-1] == "and 18 more"
    assert len(written) == 14
    assert all(re.fullmatch(r"a class.*\.\.\.  \d\.\d %", text) for text in written[1:-1])
    shares = {"grain": 1 - 2e-4, "pore": 1e-4, "clay": 0.0}
    few = [AreaFraction(name, 0, share, None) for name, share in shares.items()]
    with_caption(np.zeros((10, 500, 3), np.uint8), CLASSES, few)
    assert written[14:] == ["grain  100.0 %", "pore  <0.1 %", "clay  0.0 %"]


def test_letters_that_the_font_lacks() -> None:
    pen = caption._Pen(20)
    for text in ("γ′", "Grundmaße", "Ω–phase", "晶"):
        assert caption._drawable(text).isascii()
    assert caption._drawable("γ′ and Δ") == "gamma' and Delta"
    assert caption._drawable("précipité 晶") == "precipite ?"
    assert pen.length("5 µm") == pen.length("5 um")
