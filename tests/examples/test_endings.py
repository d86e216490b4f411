"""Every example ends readably: without what it needs, and when somebody presses Ctrl-C."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from tests.toy import grey_image, manifest, write_toy_onnx

pytest.importorskip("onnxruntime")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NEEDED = {
    "live_micromanager": "pymmcore_plus",
    "live_openfibsem": "fibsem",
    "detect_features_openfibsem": "fibsem",
    "segment_in_napari": "napari",
}
FEATURES = ("--model", "nasa-super1", "--classes", "matrix=0", "--features", "NeedleTip")


def example(name: str, *arguments: str | Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("embed_in_your_program", ["none"]),
        ("large_micrograph", ["none", "labels.png"]),
        ("live_frames", ["--picture", "none"]),
        ("segment_a_folder", ["none", "results"]),
        ("segment_a_folder", ["here", "results", "none"]),
        ("watch_a_folder", ["none"]),
        ("watch_a_folder", ["here", "--table", "none/fractions.csv"]),
        ("live_micromanager", ["--replay", "none"]),
        ("live_micromanager", ["--config", "none"]),
        ("live_micromanager", ["--replay", "here", "--model", "none"]),
        ("live_openfibsem", ["--replay", "none"]),
        ("live_openfibsem", ["--config", "none"]),
        ("live_openfibsem", ["--replay", "here", "--model", "none"]),
        ("detect_features_openfibsem", ["none", *FEATURES]),
        ("segment_in_napari", ["none"]),
        ("segment_pycuda_arrays", ["model.engine", "none"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:4]),
)
def test_what_is_not_there_is_said(
    name: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    (tmp_path / "here").mkdir()
    cv2.imwrite(str(tmp_path / "here" / "a.png"), grey_image(32, 48))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^error: .*none"):
        example(name, *arguments)


@pytest.mark.parametrize(
    ("name", "module", "arguments"),
    [
        ("live_micromanager", "useq", ["--config", "none"]),
        ("live_micromanager", "pymmcore_plus.experimental.unicore", ["--replay", "."]),
        ("live_openfibsem", "fibsem.utils", ["--config", "none"]),
        ("live_openfibsem", "fibsem.microscopes.simulator", ["--replay", "."]),
        ("detect_features_openfibsem", "fibsem.detection.detection", ["a.png", *FEATURES]),
        ("segment_in_napari", "napari", ["a.png"]),
    ],
)
def test_a_missing_extra_is_named(
    name: str, module: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), grey_image(32, 48))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    if name == "live_micromanager" and module != "useq":
        pytest.importorskip("useq")
    with pytest.raises(SystemExit, match=r"^error: the Python package .* pip install 'hpddrnet-trt\[\w+\]'"):
        example(name, *arguments)


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
@pytest.mark.parametrize(
    ("name", "arguments", "first", "last"),
    [
        ("live_frames", ["--frames", "100000", "--size", "64"], "frame ", "stopped"),
        ("live_micromanager", ["--replay", "in", "--frames", "100000"], "t=", "frames: "),
        ("live_openfibsem", ["--replay", "in", "--seconds", "100000"], "electron ", "frames: "),
        ("watch_a_folder", ["in", "--settle", "0"], "a.png: segmented", "1 segmented, "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ctrl_c_ends_it(name: str, arguments: list[str], first: str, last: str, tmp_path: Path) -> None:
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in" / "a.png"), grey_image(48, 64))
    model = write_toy_onnx(tmp_path / "toy.onnx", manifest("labels"))
    child = subprocess.Popen(
        [sys.executable, "-u", EXAMPLES / f"{name}.py", *arguments, "--model", model], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYMM_LOG_FILE": "no"},
    )  # fmt: skip
    try:
        assert child.stdout is not None
        assert any(line.startswith(first) for line in child.stdout)  # reads until then; false when it ends before
        child.send_signal(signal.SIGINT)
        printed, errors = child.communicate(timeout=120)
    finally:
        child.kill()
        child.communicate()
    assert last in printed + errors
    assert "Traceback" not in printed + errors
