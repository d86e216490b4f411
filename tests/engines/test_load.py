"""Choosing an engine by file and name."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import hpddrnet_trt
from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.engines import (
    ENGINES,
    available_engines,
    engine_of,
    engine_status,
    library_versions,
    load_engine,
)
from tests.toy import manifest, write_toy_onnx


def test_file_and_name_choose_the_engine(tmp_path: Path) -> None:
    with load_engine(write_toy_onnx(tmp_path / "m.onnx", manifest()), threads=None) as engine:
        assert engine.runtime.startswith("onnxruntime ")
        assert engine.manifest.name == "toy"
    with load_engine("nasa-super1", "torch", device="cpu") as engine:  # a model of the package, as its engine runs it
        assert engine.runtime.startswith("torch ")


def test_files_quantized_for_tensorrt_go_to_openvino_or_warn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("openvino")
    path = write_toy_onnx(tmp_path / "m.onnx", manifest(quantized_for="tensorrt", precision="int8"))
    assert engine_of(path) == "openvino"
    assert engine_of(path, on_gpu=True) == "onnxruntime"
    assert engine_of(path, "onnxruntime") == "onnxruntime"
    assert caplog.messages == []
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else real(name))
    load_engine(path).close()
    assert "pip install openvino and leave the engine to auto, or calibrate with --runtime" in caplog.messages[0]
    caplog.clear()
    load_engine(path, "onnxruntime").close()  # measured as it is
    assert caplog.messages == []
    load_engine(path, "onnxruntime", precision="auto").close()
    assert "OpenVINO runs it several times faster than ONNX Runtime" in caplog.messages[0]


def test_refusals_name_the_choices(tmp_path: Path) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest())
    with pytest.raises(UsageError, match=r"unknown engine 'tvm'; choose one of: auto, torch, onnxruntime, openvino"):
        load_engine(path, "tvm")
    with pytest.raises(UsageError, match=r"onnxruntime engine has no option turbo; it has: threads, device"):
        load_engine(path, turbo=True)
    with pytest.raises(UsageError, match=r"tensorrt engine runs \.engine files"):
        load_engine(path, "tensorrt")
    with pytest.raises(UsageError, match="known endings"):
        load_engine(tmp_path / "model.pb")
    with pytest.raises(UsageError, match=r"torch engine runs \.safetensors and \.pth and \.pt files"):
        load_engine(path, "torch")


def test_status_of_every_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = available_engines()
    assert list(found) == list(ENGINES)
    assert engine_status("onnxruntime").usable
    assert found["onnxruntime"][0].isdigit()
    for name, text in found.items():
        assert text.startswith("not available: ") != engine_status(name).usable
    with pytest.raises(UsageError, match="unknown engine"):
        engine_status("tvm")
    versions = library_versions()
    assert (versions["hpddrnet-trt"], versions["numpy"]) == (hpddrnet_trt.__version__, np.__version__)
    assert versions["onnxruntime"] == engine_status("onnxruntime").detail
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else real(name))
    assert engine_status("openvino") == (False, "not installed; pip install 'hpddrnet-trt[openvino]'")


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_is_complete(name: str) -> None:
    """A class that takes a path, an extra that brings its library, a file ending and a name of its own."""
    kind = ENGINES[name]
    if kind.library != "torch" or importlib.util.find_spec("torch"):
        assert "path" in inspect.signature(kind.load_class()).parameters
    project = tomllib.loads((Path(hpddrnet_trt.__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert kind.extra in project["optional-dependencies"]
    assert kind.suffixes
    assert [other for other, entry in ENGINES.items() if entry.label == kind.label] == [name]


def test_asking_what_is_there_loads_nothing() -> None:
    code = (
        "import sys; from hpddrnet_trt.engines import available_engines; available_engines(); "
        "print([name for name in ('torch', 'onnxruntime', 'openvino', 'onnx', 'tensorrt') if name in sys.modules])"
    )
    root = Path(hpddrnet_trt.__file__).parent.parent
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert child.stdout.strip() == "[]"
