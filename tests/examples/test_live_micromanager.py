"""The example acquires and segments with nothing but a folder of pictures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from tests.toy import grey_image, manifest, write_toy_onnx

pytest.importorskip("onnxruntime")
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "live_micromanager.py"


def run(*arguments: str | Path, **environment: str) -> str:
    child = subprocess.run(
        [sys.executable, EXAMPLE, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYMM_LOG_FILE": "no", **environment},
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    return child.stdout


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_toy_onnx(tmp_path / "toy.onnx", manifest("labels"))


def check(output: str, scale: str) -> None:
    lines = output.splitlines()
    results = [line for line in lines if line.startswith("t=")]
    assert lines[0] == "model ready"
    assert results
    assert all("grain" in line and scale in line for line in results)
    counts = [int(word) for word in lines[-1].replace(":", "").split() if word.isdigit()]
    submitted, segmented, left_out, failed = counts
    assert (submitted, failed) == (4, 0)
    assert segmented + left_out == 4
    assert segmented == len(results)


def test_with_a_folder_of_pictures(tmp_path: Path, model: Path) -> None:
    pytest.importorskip("pymmcore_plus")
    for seed in range(3):
        cv2.imwrite(str(tmp_path / f"{seed}.png"), grey_image(48, 64, seed))
    check(run("--replay", tmp_path, "--frames", "4", "--interval", "0.05", "--model", model), "pixel size unknown")


def test_with_a_configuration_file(model: Path) -> None:
    """Micro-Manager's own demo microscope, where a pixel is 1 micrometre."""
    pytest.importorskip("pymmcore_plus")
    adapters = pytest.importorskip("mm_test_adapters").device_adapter_path()
    output = run("--config", Path(adapters, "MMConfig_demo.cfg"), "--frames", "4", "--interval", "0.05",
                 "--model", model, MICROMANAGER_PATH=adapters)  # fmt: skip
    check(output, "1e+03 nm per pixel")
