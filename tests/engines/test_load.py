"""Choosing an engine by file and name."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpddrnet_trt.engines import ENGINES, available_engines, engine_status, load_engine
from hpddrnet_trt.errors import BadInputFile, UsageError
from tests.toy import manifest, write_toy_onnx


def test_auto_takes_onnxruntime_for_onnx(tmp_path: Path) -> None:
    with load_engine(write_toy_onnx(tmp_path / "m.onnx", manifest()), threads=None) as engine:
        assert engine.runtime.startswith("onnxruntime ")
        assert engine.manifest.name == "toy"


def test_openvino_when_asked(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is an optional extra and not installed")
    with load_engine(write_toy_onnx(tmp_path / "m.onnx", manifest()), "openvino", threads=1) as engine:
        assert engine.runtime.startswith("openvino ")


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
    with pytest.raises(BadInputFile, match="does not exist"):
        load_engine(tmp_path / "missing.onnx")


def test_status_of_every_engine() -> None:
    found = available_engines()
    assert tuple(found) == ENGINES
    assert engine_status("onnxruntime").usable
    assert found["onnxruntime"][0].isdigit()
    for name, text in found.items():
        assert text.startswith("not available: ") != engine_status(name).usable
    with pytest.raises(UsageError, match="unknown engine"):
        engine_status("tvm")


def test_missing_library_is_a_status(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else real(name))
    assert engine_status("openvino") == (False, "not installed; pip install 'hpddrnet-trt[openvino]'")
