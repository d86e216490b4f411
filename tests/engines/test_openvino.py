"""OpenVINO engine on small real graphs; skipped where OpenVINO is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError
from hpddrnet_trt.engines import openvino as module
from hpddrnet_trt.engines.onnxruntime import OnnxRuntimeEngine
from hpddrnet_trt.engines.openvino import OpenVINOEngine, verify_in_child
from hpddrnet_trt.graph.layers import group_of, tensor_owners
from tests.tiny_export import frames, write_fp32
from tests.toy import grey_image, manifest, write_toy_onnx

pytest.importorskip("openvino", reason="OpenVINO is an optional extra and not installed")


def _images(size: int, count: int = 1) -> np.ndarray:
    return np.stack([grey_image(size, size, seed) for seed in range(count)])[:, None]


def test_compiled_shapes_are_bounded(tmp_path: Path) -> None:
    with OpenVINOEngine(write_toy_onnx(tmp_path / "m.onnx", manifest())) as engine:
        for size in (8, 16, 24, 32, 40, 8):
            assert engine.infer(_images(size)).labels.shape == (1, size, size)
        assert [shape[2] for shape, _ in engine._graphs] == [24, 32, 40, 8]


def test_as_many_run_side_by_side_as_memory_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = OpenVINOEngine._compile

    def compiled(self: OpenVINOEngine, *arguments: Any) -> Any:
        model = real(self, *arguments)
        asked.append(int(model.get_property("PERFORMANCE_HINT_NUM_REQUESTS")))
        return model

    monkeypatch.setattr(OpenVINOEngine, "_compile", compiled)
    monkeypatch.setattr("hpddrnet_trt.engines.openvino.SIDE_BY_SIDE_PIXELS", 5 * 64 * 64)
    with OpenVINOEngine(write_toy_onnx(tmp_path / "toy.onnx", manifest())) as engine:
        assert len(list(engine.infer_many([_images(64)] * 3))) == 3
        assert len(list(engine.infer_many([_images(256)] * 3))) == 3
    assert asked == [5, 2]


def test_half_files_agree_with_onnxruntime(tmp_path: Path) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest("logits", confidence=True), half=True)
    with OpenVINOEngine(path, threads=1) as engine, OnnxRuntimeEngine(path) as other:
        assert "CPU, 1 thread" in engine.runtime
        found, expected = engine.infer(_images(24, 2)), other.infer(_images(24, 2))
    for prediction in (found, expected):
        assert prediction.logits.dtype == prediction.confidence.dtype == np.float32
    assert np.allclose(found.logits, expected.logits, atol=0.05)
    assert np.allclose(found.confidence, expected.confidence, atol=0.02)
    assert (found.labels == expected.labels).mean() > 0.99


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest())
    with pytest.raises(UsageError, match=r"precision 'fp16' is unknown; choose one of: auto, fp32, bf16"):
        OpenVINOEngine(path, precision="fp16")  # type: ignore[arg-type]
    monkeypatch.setattr(module, "computes_bf16", lambda: False)
    with pytest.raises(UsageError, match="does not compute in BF16; choose precision 'fp32' or 'auto'"):
        OpenVINOEngine(path, precision="bf16")
    model = onnx.load(str(path))
    model.graph.node[1].op_type, model.graph.node[1].domain = "NoSuchOperator", "elsewhere"
    model.opset_import.add(domain="elsewhere", version=1)
    onnx.save(model, str(path))
    with pytest.raises(BadInputFile, match="cannot be loaded by OpenVINO"):
        OpenVINOEngine(path)


def test_a_child_tries_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest())
    assert verify_in_child(path, _images(24)) > 0.99
    with pytest.raises(UserError, match="agree on"):
        verify_in_child(path, _images(24), minimum_agreement=1.01)
    path = write_toy_onnx(tmp_path / "int8.onnx", manifest(precision="int8", quantized_for="onnxruntime"))
    with pytest.raises(UserError, match=r"failed .*quantised in ONNX Runtime's own form"):
        verify_in_child(path, _images(24))
    crashing = tmp_path / "python"
    crashing.write_text("#!/bin/sh\nkill -SEGV $$\n")
    crashing.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(crashing))
    with pytest.raises(UserError, match="died by signal 11"):
        verify_in_child(path, _images(24))


# --- precision


@pytest.mark.parametrize(
    ("asked", "file", "has_bf16", "chosen"),
    [
        ("auto", "fp32", True, "fp32"),
        ("auto", "fp16", True, "bf16"),
        ("auto", "int8", True, "bf16"),
        ("auto", "fp16", False, "fp32"),
        ("fp32", "fp16", True, "fp32"),
        ("bf16", "fp32", True, "bf16"),
        ("default", "fp32", False, "fp32"),
        ("default", "fp32", True, "bf16"),
    ],
)
def test_precision_follows_file_and_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Any, file: Any, has_bf16: bool, chosen: str
) -> None:
    monkeypatch.setattr(module, "bf16_kernel", lambda: "brgconv_avx512_amx_bf16" if has_bf16 else "")
    path = write_toy_onnx(tmp_path / "m.onnx", manifest(precision=file))
    options: Any = {"defaults": True} if asked == "default" else {"precision": asked}
    with OpenVINOEngine(path, threads=1, **options) as engine:
        assert engine.float_precision == chosen
        assert ("BF16" in engine.runtime) == (chosen == "bf16")
        assert ("defaults" in engine.runtime) == (asked == "default")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "default"])
def test_every_precision_gives_the_labels(network: Path, precision: Any) -> None:
    if precision == "bf16" and not module.computes_bf16():
        pytest.skip("this processor does not compute in BF16")
    images = frames(1, 64, 96)
    options: Any = {"defaults": True} if precision == "default" else {"precision": precision}
    with OpenVINOEngine(network, threads=1, **options) as engine, OnnxRuntimeEngine(network) as other:
        found, expected = engine.infer(images).labels, other.infer(images).labels
        low = engine.float_precision == "bf16"
    assert len(np.unique(expected)) > 1
    assert (found == expected).mean() > (0.95 if low else 0.999)


# --- bound batches, layer times


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network with position attention."""
    return write_fp32(tmp_path_factory.mktemp("network") / "fp32.onnx")


def test_a_bound_batch_has_a_request_of_its_own(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = frames(2, 64, 96)
    taken: list[Any] = []
    take = module._Graph.take
    with OpenVINOEngine(network, threads=1) as engine:
        expected, other = engine.infer(images).labels, engine.infer(images[::-1]).labels
        assert not np.array_equal(expected, other)
        monkeypatch.setattr(module._Graph, "take", lambda graph: taken.append(take(graph)) or taken[-1])
        run = engine.bind(images)
        (request,) = taken
        run()
        np.testing.assert_array_equal(request.get_tensor("labels").data, expected)
        np.testing.assert_array_equal(engine.infer(images[::-1]).labels, other)  # in a request of its own
        run()
        np.testing.assert_array_equal(request.get_tensor("labels").data, expected)


def test_layers_are_named_after_the_files_nodes(network: Path) -> None:
    with OpenVINOEngine(network, threads=1) as engine:
        times = engine.layer_times(frames(1, 64, 96), runs=2)
    assert min(times.values()) >= 0
    owners = tensor_owners(network)
    known = [name for name in times if set(name.split(",")) & set(owners.values())]
    assert len(known) > 0.7 * len(times)
    groups = [group_of(name, owners) for name in times]
    assert "position attention" in groups
    assert groups.count("other") < 0.1 * len(groups)
