"""Wrong usages of the commands a newcomer meets first: one sentence each, no traceback, nothing written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpddrnet_trt.cli.program import app, run

WRONG = {
    "dataset import nowhere new": (1, "nowhere does not exist; give a folder or archive"),
    "dataset import empty new": (1, "empty holds no picture with labels"),
    "dataset import file.txt new": (1, "file.txt is neither a folder nor a ZIP or TAR archive"),
    "dataset import empty new --format nothing": (2, "'nothing' is not one of 'labelme'"),
    "dataset import empty new --class pore": (2, "--class takes WHAT=NAME"),
    "dataset import": (2, "Missing argument"),
    "recipes demo nothing": (2, "unexpected extra argument"),
    "train": (2, "nothing says what to train on; give a dataset folder"),
    "train nowhere": (1, "dataset folder nowhere does not exist"),
    "train empty": (1, "empty holds no dataset; expected"),
    "train empty other": (2, "one dataset folder is trained on, not 2"),
    "train empty --recipe nothing": (2, "no recipe is called 'nothing'; choose one of demo"),
    "train empty --from nowhere.safetensors": (1, "nowhere.safetensors does not exist"),
    "segment": (2, "Missing argument"),
    "segment file.txt --json --quiet --verbose": (2, "give either --verbose or --quiet, not both"),
    "segment file.txt --threads 0": (2, "Invalid value for '--threads'"),
    "segment file.txt --precision fp7": (2, "'fp7' is not one of"),
    "segment file.txt --write all,nothing": (2, "--write takes"),
    "segment file.txt --pixel-size 5": (2, "'5' is no length; give a number and its unit"),
    "segment file.txt --tile big": (2, "--tile takes auto, whole or a number of pixels"),
    "segment file.txt --model nowhere.onnx": (1, "nowhere.onnx"),
    "watch": (2, "Missing argument"),
    "export nasa-super1 model.trt": (2, "must end with .onnx; write model.onnx"),
    "export nowhere.safetensors model.onnx": (1, "nowhere.safetensors does not exist"),
    "convert-checkpoint file.txt ours.safetensors": (1, "file.txt is not a PyTorch checkpoint"),
    "convert-checkpoint nowhere.npz ours.safetensors": (1, "nowhere.npz does not exist"),
    "package nasa-super1 -o a.czann": (2, "must end with .zip; write a.zip, or choose another --format"),
    "package nowhere.onnx -o a.zip": (1, "nowhere.onnx does not exist"),
    "adopt file.zip ours.onnx": (1, "file.zip does not exist"),
    "datasets check nowhere": (1, "dataset folder nowhere does not exist"),
    "datasets list nothing": (2, "nothing"),
    "check-dataset empty": (2, "the command `check-dataset` has gone; use `datasets check`"),
    "nothing": (2, "No such command"),
}


@pytest.mark.parametrize("line", WRONG)
def test_one_sentence(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = WRONG[line]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["hpddrnet-trt", *line.split()])
    monkeypatch.setenv("HPDDRNET_CACHE", str(tmp_path.parent / "cache"))
    with pytest.raises(SystemExit) as ended:
        run(app)
    text = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == code
    assert said in text
    assert "Traceback" not in text
    assert sorted(os.listdir(tmp_path)) == ["empty", "file.txt"]
