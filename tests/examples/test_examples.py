"""The examples do what they say; those of OpenFIBSEM's detection and of napari have files of their own."""

from __future__ import annotations

import csv
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from hpddrnet_trt.engines import load_engine
from hpddrnet_trt.inference import Segmenter, runner
from tests.toy import grey_image, manifest, write_toy_onnx

pytest.importorskip("onnxruntime")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
Example = Callable[..., list[str]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_toy_onnx(tmp_path / "toy.onnx", manifest("labels"))


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Example:
    """Run an example in this process; the lines it prints."""

    def run(name: str, *arguments: object) -> list[str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def child(name: str, *arguments: object, code: int = 0, **environment: str) -> str:
    """Run an example in a process of its own; what it prints."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)], capture_output=True, text=True, check=False,
        timeout=120, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def pictures(folder: Path, count: int = 3) -> Path:
    folder.mkdir(exist_ok=True)
    for seed in range(count):
        cv2.imwrite(str(folder / f"{seed}.png"), grey_image(48, 64, seed))
    return folder


def test_a_folder_is_segmented(example: Example, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("roifile")
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in" / "a.png"), grey_image(64, 200))
    lines = example("segment_a_folder", tmp_path / "in", tmp_path / "out", model)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a.overlay.png", "a.png", "a.regions.csv", "a.rois.zip"
    ]  # fmt: skip
    assert lines[0] == "a.png: 200 x 64 pixels, pixel size unknown, by toy"
    assert any("regions, mean diameter" in line for line in lines)
    assert "pixels" in lines[-1]


def test_the_table_of_a_watched_folder_grows_over_two_runs(model: Path, tmp_path: Path) -> None:
    folder, table = tmp_path / "in", tmp_path / "fractions.csv"
    folder.mkdir()
    for seed in range(2):
        cv2.imwrite(str(folder / f"{seed}.png"), grey_image(30, 40, seed))
        printed = child("watch_a_folder", folder, "--output", tmp_path / "labels", "--table", table, "--model", model,
                        "--settle", 0, "--stop-after", 0)  # fmt: skip
        assert f"1 segmented, {seed} already done, 0 failed" in printed
    with table.open(newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["micrograph", "grain", "pore", "clay"]
    assert [Path(row[0]).name for row in rows] == ["0.png", "1.png"]
    assert all(sum(map(float, row[1:])) == pytest.approx(1, abs=1e-3) for row in rows)
    assert (tmp_path / "labels" / "1.png").is_file()


def test_a_large_micrograph(example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "WHOLE_PIXELS", 256 * 256)
    model = write_toy_onnx(tmp_path / "toy.onnx", manifest("logits", size=128))
    any_size = Segmenter(load_engine(write_toy_onnx(tmp_path / "any.onnx", manifest("logits")), threads=1))
    for height, width, last in ((128, 128, "in one piece"), (200, 300, "6 tiles of 128 x 128 pixels, blended scores")):
        image = grey_image(height, width)
        cv2.imwrite(str(tmp_path / "a.png"), image)
        lines = example("large_micrograph", tmp_path / "a.png", tmp_path / "labels.png", model)
        with Image.open(tmp_path / "labels.png") as picture:
            labels = np.asarray(picture)
        truth = any_size.segment(image).labels
        # This model sees zeros beyond the border, and `auto` may compute it in BF16.
        assert (labels[1:-1, 1:-1] == truth[1:-1, 1:-1]).mean() > 0.98
        assert lines[0].startswith(f"a.png: {width} x {height} pixels")
        assert any(line.startswith(last) for line in lines)
        assert lines[-1] == f"written to {tmp_path / 'labels.png'}"


FRAMES = ("--engine", "onnxruntime", "--size", 64, "--rate", 500)


def test_frames_of_a_simulated_micrograph(model: Path) -> None:
    printed = child("live_frames", *FRAMES, "--model", model, "--frames", 20, "--policy", "block")
    assert "stream ready\n" in printed
    line = r"^frame \d+: grain [\d.]+%, pore [\d.]+%, clay [\d.]+% \(\d+ ms old\)$"
    assert len(re.findall(line, printed, re.M)) == 20
    assert "20 frames = 20 segmented + 0 dropped (none) + 0 failed + 0 pending\n" in printed
    assert re.search(r"^total: median [\d.]+ ms, p99 [\d.]+ ms, longest [\d.]+ ms$", printed, re.M)
    assert printed.index("stream closed") > printed.rindex("frame 20")


def test_frames_of_a_real_micrograph_with_the_shipped_model(sem_data: Path) -> None:
    picture = next(path for path in sorted((sem_data / "nasa-super1").rglob("*.png")) if "mask" not in path.name)
    printed = child("live_frames", *FRAMES, "--picture", picture, "--frames", 5)
    counts = re.search(r"^5 frames = (\d+) segmented \+ (\d+) dropped .* \+ 0 failed \+ 0 pending$", printed, re.M)
    assert counts is not None
    assert int(counts[1]) + int(counts[2]) == 5
    assert int(counts[1]) >= 1


def test_a_model_that_is_not_there_is_said(tmp_path: Path) -> None:
    printed = child("live_frames", "--model", tmp_path / "none.onnx", code=1)
    assert "stream failed: the segmenter could not be opened" in printed


def check_results(lines: list[str], begin: str, scale: str) -> tuple[int, int, int]:
    """Frames submitted, segmented and left out, none of which failed; and the lines of the results."""
    results = [line for line in lines if line.startswith(begin)]
    assert "model ready" in lines
    assert results
    assert all("grain" in line and scale in line for line in results)
    counts = [int(word) for word in lines[-1].replace(":", "").split() if word.isdigit()]
    submitted, segmented, left_out, failed = counts
    assert failed == 0
    assert segmented + left_out == submitted
    assert len(results) <= segmented
    return submitted, segmented, len(results)


MICROMANAGER = ("--frames", 4, "--interval", 0.05, "--model")


def test_micromanager_with_a_folder_of_pictures(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("pymmcore_plus")
    folder = pictures(tmp_path / "in")
    printed = child("live_micromanager", "--replay", folder, *MICROMANAGER, model, PYMM_LOG_FILE="no")
    submitted, segmented, results = check_results(printed.splitlines(), "t=", "pixel size unknown")
    assert (submitted, results) == (4, segmented)


def test_micromanagers_own_demo_microscope_where_a_pixel_is_one_micrometre(model: Path) -> None:
    pytest.importorskip("pymmcore_plus")
    adapters = pytest.importorskip("mm_test_adapters").device_adapter_path()
    printed = child("live_micromanager", "--config", Path(adapters, "MMConfig_demo.cfg"), *MICROMANAGER, model,
                    MICROMANAGER_PATH=adapters, PYMM_LOG_FILE="no")  # fmt: skip
    submitted, segmented, results = check_results(printed.splitlines(), "t=", "1e+03 nm per pixel")
    assert (submitted, results) == (4, segmented)


@pytest.mark.parametrize("beam", ["electron", "ion"])
def test_openfibsem_with_a_folder_of_pictures(
    example: Example, model: Path, tmp_path: Path, beam: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fibsem")
    monkeypatch.setenv("FIBSEM_SIM_NO_DELAY", "1")
    lines = example("live_openfibsem", "--replay", pictures(tmp_path / "in"), "--seconds", 1.5, "--model", model,
                    "--engine", "onnxruntime", "--beam", beam)  # fmt: skip
    check_results(lines, beam, "10 nm per pixel")
