"""Two ONNX files compared tensor by tensor with Polygraphy: the first layer that goes wrong is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from hpddrnet_trt.accuracy import layers
from hpddrnet_trt.accuracy.layers import compare_layers
from hpddrnet_trt.core.errors import MissingDependency, UsageError, UserError
from hpddrnet_trt.core.manifest import AxisRange
from hpddrnet_trt.data.datasets import find_images
from hpddrnet_trt.graph import qdq
from hpddrnet_trt.graph.model import load_model, save_model
from hpddrnet_trt.graph.nodes import name_nodes
from hpddrnet_trt.graph.precision import to_half


def quantized(fp32: Path, target: Path, wrong: str | None = None) -> Path:
    """The file in INT8 with FP16 around it; the tensor ``wrong`` is clipped to a hundredth of its range."""
    model, manifest = load_model(fp32)
    name_nodes(model)
    plan = qdq.plan(model, "tensorrt")
    ranges = {name: (-0.05, 0.05) if name == wrong else (-8.0, 8.0) for name in plan.tensors}
    graph = to_half(qdq.quantize(model, "tensorrt", plan, ranges))
    return save_model(graph, target, manifest.replace(precision="int8", quantized_for="tensorrt"))


def test_the_same_file_has_no_error(fp32: Path, data: Path, tmp_path: Path) -> None:
    model, manifest = load_model(fp32)
    sign = onnx.helper.make_node("Greater", [model.graph.node[2].output[0]] * 2, ["truth values"], name="compare")
    model.graph.node.insert(3, sign)  # exports hold such tensors too
    path = save_model(model, tmp_path / "model.onnx", manifest)
    compared = compare_layers(path, path, find_images(data, "test"))
    assert compared.first is None
    assert len(compared.layers) > 10
    assert "compare" not in {layer.name for layer in compared.layers}
    assert {layer.error for layer in compared.layers} == {0.0}
    assert "no layer goes wrong" in compared.text()


def test_the_first_layer_that_goes_wrong_is_named(
    fp32: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_model(fp32)
    second = next(node for node in model.graph.node if node.name == "second")
    wrong = compare_layers(
        fp32, quantized(fp32, tmp_path / "int8.onnx", wrong=second.input[0]), find_images(data, "test")
    )
    assert wrong.first is not None
    assert wrong.first.name == wrong.record()["first"] == "second"
    assert wrong.first.error > 0.5
    assert all(layer.error < 0.1 for layer in wrong.layers[: wrong.layers.index(wrong.first)])
    assert "first layer that goes wrong: second (Conv" in wrong.text()
    monkeypatch.setattr(layers, "LIMIT", 0.5)  # of a network of random weights
    sound = compare_layers(fp32, quantized(fp32, tmp_path / "sound.onnx"), find_images(data, "test"))
    assert sound.first is None
    assert max(layer.error for layer in sound.layers) > 1e-3
    assert "2 crops of 96x96" in sound.text()
    assert "rounding" in sound.runtime  # of FP16, by arithmetic


def test_values_that_are_not_finite_are_wrong(fp32: Path, data: Path, tmp_path: Path) -> None:
    model, manifest = load_model(fp32)
    bias = next(entry for entry in model.graph.initializer if entry.name == "classifier.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(bias.dims, np.nan, np.float32), bias.name))
    compared = compare_layers(fp32, save_model(model, tmp_path / "nan.onnx", manifest), find_images(data, "test"))
    assert compared.first is not None
    assert (compared.first.name, compared.first.error) == ("classifier", np.inf)


def test_refusals(fp32: Path, data: Path, tmp_path: Path) -> None:
    images = find_images(data, "test")
    (tmp_path / "m.engine").write_bytes(b"engine")
    model, manifest = load_model(fp32)
    assert manifest.input is not None
    small = manifest.input.model_copy(update={"height": AxisRange(minimum=64, maximum=64)})
    fixed = save_model(model, tmp_path / "fixed.onnx", manifest.replace(input=small))
    weights = {entry.name for entry in model.graph.initializer} | {"image", ""}
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [name if name in weights else f"other/{name}" for name in names]
    for entry in model.graph.output:
        entry.name = f"other/{entry.name}"
    other = save_model(model, tmp_path / "other.onnx", manifest)
    for a, b, used, message in (
        (fp32, tmp_path / "m.engine", images, r"layers of ONNX files are compared, and .*m\.engine is none"),
        (fp32, fp32, [], "no micrograph was given"),
        (fixed, fp32, images, "do not take the same input"),
        (fp32, other, images, "no tensor in common"),
    ):
        with pytest.raises(UsageError, match=message):
            compare_layers(a, b, used)


def test_what_a_runtime_refuses_is_one_sentence(fp32: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("file.cc:12\nno room for this")

    monkeypatch.setattr(layers, "session", fails)
    with pytest.raises(UserError, match=r"could not be compared \(no room for this\); compare labels"):
        compare_layers(fp32, fp32, find_images(data, "test"))


def test_without_polygraphy(fp32: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "polygraphy.comparator", None)
    with pytest.raises(MissingDependency, match=r"hpddrnet-trt\[polygraphy\]"):
        compare_layers(fp32, fp32, find_images(data, "test"))
