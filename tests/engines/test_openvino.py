"""OpenVINO engine on small real graphs; skipped where OpenVINO is not installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpddrnet_trt.engines import openvino as module
from hpddrnet_trt.engines.base import Engine
from hpddrnet_trt.engines.onnxruntime import OnnxRuntimeEngine
from hpddrnet_trt.engines.openvino import OpenVINOEngine, verify_in_child
from hpddrnet_trt.errors import BadInputFile, ContractError, UsageError, UserError
from tests.toy import grey_image, manifest, write_toy_onnx

pytest.importorskip("openvino", reason="OpenVINO is an optional extra and not installed")


def _images(size: int, count: int = 1) -> np.ndarray:
    return np.stack([grey_image(size, size, seed) for seed in range(count)])[:, None]


@pytest.mark.parametrize("half", [False, True])
def test_agrees_with_onnxruntime(tmp_path: Path, half: bool) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest("logits", confidence=True), half=half)
    with OpenVINOEngine(path, threads=1) as engine, OnnxRuntimeEngine(path) as other:
        assert isinstance(engine, Engine)
        assert "CPU, 1 thread" in engine.runtime
        for size, count in ((24, 2), (40, 1), (24, 2)):
            found, expected = engine.infer(_images(size, count)), other.infer(_images(size, count))
            assert np.allclose(found.logits, expected.logits, atol=0.05 if half else 1e-4)
            assert np.allclose(found.confidence, expected.confidence, atol=0.02 if half else 1e-4)
            assert (found.labels == expected.labels).mean() > 0.99


def test_results_survive_the_next_inference(tmp_path: Path) -> None:
    with OpenVINOEngine(write_toy_onnx(tmp_path / "m.onnx", manifest())) as engine:
        first = engine.infer(_images(24))
        kept = first.labels.copy()
        engine.infer(np.full((1, 1, 24, 24), 255, np.uint8))
        assert np.array_equal(first.labels, kept)


def test_compiled_shapes_are_bounded(tmp_path: Path) -> None:
    with OpenVINOEngine(write_toy_onnx(tmp_path / "m.onnx", manifest())) as engine:
        for size in (8, 16, 24, 32, 40, 8):
            assert engine.infer(_images(size)).labels.shape == (1, size, size)
        assert [shape[2] for shape in engine._compiled] == [24, 32, 40, 8]


def test_refuses_onnxruntime_form(tmp_path: Path) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest(precision="int8", quantised_for="onnxruntime"))
    with pytest.raises(UsageError, match="quantised in ONNX Runtime's own form"):
        OpenVINOEngine(path)


def test_damaged_files_and_contract(tmp_path: Path) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest())
    engine = OpenVINOEngine(path)
    with pytest.raises(ContractError, match="multiples of 8"):
        engine.infer(np.zeros((1, 1, 12, 8), np.uint8))
    engine.close()
    engine.close()
    with pytest.raises(UserError, match="closed"):
        engine.infer(_images(8))
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(BadInputFile, match=r"m\.onnx"):
        OpenVINOEngine(path)


def test_graph_that_openvino_refuses(tmp_path: Path) -> None:
    import onnx

    path = write_toy_onnx(tmp_path / "m.onnx", manifest())
    model = onnx.load(str(path))
    model.graph.node[1].op_type = "NoSuchOperator"
    onnx.save(model, str(path))
    with pytest.raises(BadInputFile, match="cannot be loaded by OpenVINO"):
        OpenVINOEngine(path)


def test_child_confirms_a_good_file(tmp_path: Path) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest())
    assert verify_in_child(path, _images(24)) > 0.99
    with pytest.raises(UserError, match="agree on"):
        verify_in_child(path, _images(24), minimum_agreement=1.01)


def test_child_reports_failure_and_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest(precision="int8", quantised_for="onnxruntime"))
    with pytest.raises(UserError, match=r"failed .*ONNX Runtime's own form"):
        verify_in_child(path, _images(24))
    crashing = tmp_path / "python"
    crashing.write_text("#!/bin/sh\nkill -SEGV $$\n")
    crashing.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(crashing))
    with pytest.raises(UserError, match="died by signal 11"):
        verify_in_child(path, _images(24))
