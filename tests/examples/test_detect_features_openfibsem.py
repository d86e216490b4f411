"""The example finds what is in a constructed image, and says what is not."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from hpddrnet_trt.integrations.fibsem import replay_microscope
from tests.toy import manifest, write_toy_onnx

pytest.importorskip("fibsem")

from fibsem.structures import BeamType

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "detect_features_openfibsem.py"
MAP = ("grain=0", "pore=0", "clay=2")
Run = Callable[..., list[str]]


@pytest.fixture
def image() -> np.ndarray:
    """A bright needle from the left on dark ground, its tip at column 70, row 63.5."""
    image = np.full((192, 256), 20, np.uint8)
    image[60:68, :71] = 235
    return image


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The example on a file with a model of dark, middle and bright; its lines."""
    model = write_toy_onnx(tmp_path / "toy.onnx", manifest("labels"))

    def run(path: Path, *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(path), "--model", str(model), *arguments])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_a_needle_with_the_pixel_size_of_openfibsems_own_file(
    run: Run, image: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIBSEM_SIM_NO_DELAY", "1")
    microscope = replay_microscope([image], tmp_path, pixel_size_m=1e-8)
    path = Path(microscope.acquire_image(beam_type=BeamType.ELECTRON).save(tmp_path / "acquired.tif"))
    drawing = tmp_path / "found.png"
    (line,) = run(path, "--classes", *MAP, "--features", "NeedleTip", "--drawing", str(drawing))
    words = line.replace(",", "").split()
    x, y, x_um, y_um = (float(words[index]) for index in (2, 4, 7, 8))
    assert (x, y) == (pytest.approx(70, abs=1), pytest.approx(63.5, abs=1))
    assert (x_um, y_um) == (pytest.approx((x - 128) * 0.01, abs=1e-3), pytest.approx((96 - y) * 0.01, abs=1e-3))
    with Image.open(drawing) as drawn:
        assert drawn.size == (800, 600)


def test_what_is_not_there_is_said(run: Run, image: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(image[100:]).save(tmp_path / "ground.png")
    lines = run(tmp_path / "ground.png", "--classes", *MAP[:2], "clay=1", "--features", "LamellaCentre", "ImageCentre",
                "--pixel-size-nm", "10")  # fmt: skip
    assert lines == ["LamellaCentre: not found", "ImageCentre: x 128.0, y 46.0 px = 0.000, 0.000 um"]


def test_what_cannot_be_found_is_refused(run: Run, image: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "plain.tif"
    tifffile.imwrite(path, image)
    with pytest.raises(SystemExit, match="does not say its pixel size; give --pixel-size-nm"):
        run(path, "--classes", *MAP, "--features", "NeedleTip")
    with pytest.raises(SystemExit, match="LandingPost is found by class 3"):
        run(path, "--classes", *MAP, "--features", "LandingPost", "--pixel-size-nm", "10")
