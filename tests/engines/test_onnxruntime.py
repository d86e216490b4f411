"""ONNX Runtime engine on small real graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from hpddrnet_trt.core.errors import BadInputFile, NoGpu, UsageError
from hpddrnet_trt.engines.onnxruntime import OnnxRuntimeEngine
from tests.toy import grey_image, manifest, write_toy_onnx


def _batch(*seeds: int, size: int = 24) -> np.ndarray:
    return np.stack([grey_image(size, size, seed) for seed in seeds])[:, None]


def test_symmetric_int8_graph_stays_close(tmp_path: Path) -> None:
    exact = write_toy_onnx(tmp_path / "f.onnx", manifest("logits"))
    quantised = write_toy_onnx(
        tmp_path / "q.onnx", manifest("logits", precision="int8", quantized_for="tensorrt"), symmetric_int8=True
    )
    images = _batch(4)
    with OnnxRuntimeEngine(exact) as first, OnnxRuntimeEngine(quantised) as second:
        difference = np.abs(first.infer(images).logits - second.infer(images).logits).max()
    assert 0 < difference <= 0.05 * 255 / 127 / 2 + 1e-3  # half a step of the grey scale, times the slope


def test_graphs_that_are_refused(tmp_path: Path) -> None:
    """One with an operator that there is not, and one with less than its description promises."""
    path = write_toy_onnx(tmp_path / "m.onnx", manifest())
    model = onnx.load(str(path))
    model.graph.node[1].op_type = "NoSuchOperator"
    onnx.save(model, str(path))
    with pytest.raises(BadInputFile, match="cannot be loaded by ONNX Runtime"):
        OnnxRuntimeEngine(path)
    write_toy_onnx(path, manifest())
    model = onnx.load(str(path))
    onnx.helper.set_model_props(model, {"hpddrnet_trt": manifest("logits").to_json()})
    onnx.save(model, str(path))
    with pytest.raises(BadInputFile, match="no output logits"):
        OnnxRuntimeEngine(path)


def test_devices(tmp_path: Path) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest())
    for device in ("tpu", "cuda:", "cuda:x", "cpu:1"):
        with pytest.raises(UsageError, match=f"unknown device '{device}'.*cuda:1"):
            OnnxRuntimeEngine(path, device=device)
    with OnnxRuntimeEngine(path, device="auto", threads=1) as engine:
        assert "1 thread" in engine.runtime
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(NoGpu, match="no CUDA support"):
            OnnxRuntimeEngine(path, device="cuda")


def test_bound_batch_stays_in_place(tmp_path: Path) -> None:
    engine = OnnxRuntimeEngine(write_toy_onnx(tmp_path / "m.onnx", manifest()), threads=1)
    images = _batch(1)
    expected = engine.infer(images).labels
    binding = engine._bound(engine._session, images)
    images[:] = 0  # the engine has its own copy
    places = set()
    for _ in range(3):
        engine._session.run_with_iobinding(binding)
        (labels,) = binding.get_outputs()
        places.add(labels.data_ptr())
    assert len(places) == 1
    np.testing.assert_array_equal(labels.numpy(), expected)


def test_layer_times_of_every_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with OnnxRuntimeEngine(write_toy_onnx(tmp_path / "m.onnx", manifest()), threads=1) as engine:
        times = engine.layer_times(_batch(1), runs=4)
    assert len(times) >= 4
    assert all(value >= 0 for value in times.values())
    assert any("Conv" in name or "nchwc" in name or "scores" in name for name in times)
    assert not any(name.endswith("_kernel_time") for name in times)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]  # no profile is left behind


def test_defaults_are_onnxruntimes_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest())
    asked: list[tuple[Any, dict[str, Any]]] = []
    real = onnxruntime.InferenceSession

    def recorded(source: str, options: Any, **others: Any) -> Any:
        asked.append((options, others))
        return real(source, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", recorded)
    with OnnxRuntimeEngine(path, defaults=True) as engine:
        assert "defaults" in engine.runtime
        plain = engine.infer(_batch(1)).labels
    assert asked[-1] == (None, {"providers": ["CPUExecutionProvider"]})
    with OnnxRuntimeEngine(path, defaults=True, threads=1) as engine:
        np.testing.assert_array_equal(engine.infer(_batch(1)).labels, plain)
    assert asked[-1][0].intra_op_num_threads == 1
    assert asked[-1][0].log_severity_level == onnxruntime.SessionOptions().log_severity_level
    with OnnxRuntimeEngine(path, threads=1) as engine:
        np.testing.assert_array_equal(engine.infer(_batch(1)).labels, plain)
    assert asked[-1][1]["disabled_optimizers"] == []


class _CudaSession:
    """A session of ONNX Runtime with CUDA, as far as opening and running it is asked about."""

    def __init__(self, source: str, options: Any, *, providers: list[Any], **others: Any) -> None:
        self.real = onnxruntime.capi.onnxruntime_inference_collection.InferenceSession(
            source, options, providers=["CPUExecutionProvider"]
        )
        self.asked = providers

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def test_settings_of_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(onnxruntime, "InferenceSession", _CudaSession)
    path = write_toy_onnx(tmp_path / "m.onnx", manifest())
    engine = OnnxRuntimeEngine(path, device="cuda")
    (name, settings), cpu = engine._session.asked
    assert (name, cpu) == tuple(providers)
    assert settings["use_tf32"] == "0"  # FP32 is FP32
    assert engine.layer_times(_batch(1)) == {}
    assert "device_id" not in settings
    (name, settings), _ = OnnxRuntimeEngine(path, device="cuda:1")._session.asked
    assert (name, settings["device_id"], settings["use_tf32"]) == ("CUDAExecutionProvider", "1", "0")
    (name, settings), _ = OnnxRuntimeEngine(path, device="cuda:2", defaults=True)._session.asked
    assert settings == {"device_id": "2"}
    assert OnnxRuntimeEngine(path, device="auto", defaults=True)._session.asked == providers
