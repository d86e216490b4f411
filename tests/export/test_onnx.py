"""The exported file: its contract, its graph, and that it computes what PyTorch computes."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from PIL import Image

from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError
from hpddrnet_trt.core.files import sha256_of
from hpddrnet_trt.core.manifest import Manifest, read_manifest
from hpddrnet_trt.engines import load_engine
from hpddrnet_trt.export import onnx as onnx_export
from hpddrnet_trt.export.onnx import ExportOptions, export_network, export_onnx, ship, simplified, store_in_half, trace
from hpddrnet_trt.export.verify import compare_with_pytorch
from hpddrnet_trt.graph.model import load_model
from hpddrnet_trt.graph.nodes import consumers, producers, store, tensor_types
from hpddrnet_trt.graph.precision import to_half
from hpddrnet_trt.inference import load_segmenter
from hpddrnet_trt.models.checkpoints import load_checkpoint, save_checkpoint
from tests.graph.parsed_rtx import Parsed
from tests.tiny_export import frames
from tests.tiny_network import lively, tiny_manifest, tiny_network

STATIC = ExportOptions(1, 72, 104, confidence=True, pixel_size_m=5e-9)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = lively(tiny_network())
    return save_checkpoint(
        tmp_path_factory.mktemp("export") / "tiny.safetensors", network, tiny_manifest(network, name="tiny")
    )


@pytest.fixture(scope="module")
def dynamic(checkpoint: Path) -> Path:
    target = checkpoint.with_name("dynamic.onnx")
    export_onnx(checkpoint, target)
    return target


@pytest.fixture(scope="module")
def static(checkpoint: Path) -> Path:
    target = checkpoint.with_name("static.onnx")
    export_onnx(checkpoint, target, STATIC)
    return target


def run(path: Path, image: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return list(session.run(None, {"image": image}))


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node)


def reference(checkpoint: Path, image: npt.NDArray[np.uint8]) -> torch.Tensor:
    network, manifest = load_checkpoint(checkpoint)
    with torch.inference_mode():
        return network.predict_logits(normalized(image, manifest))


def normalized(image: npt.NDArray[np.uint8], manifest: Manifest) -> torch.Tensor:
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1) for values in (manifest.normalization.mean, manifest.normalization.std)
    )
    return (torch.from_numpy(image).float() - mean) / std


def assert_same_labels(labels: npt.NDArray[Any], logits: torch.Tensor) -> None:
    """Equal wherever the margin is above FP32 rounding."""
    top = logits.topk(2, dim=1).values
    clear = (top[:, 0] - top[:, 1] > 1e-4 * max(1.0, float(logits.std()))).numpy()
    assert labels.dtype == np.uint8
    assert clear.mean() > 0.9
    assert np.array_equal(labels[clear], logits.argmax(1).numpy()[clear])


def axes(entry: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in entry.type.tensor_type.shape.dim]


def test_file_describes_itself(checkpoint: Path, dynamic: Path) -> None:
    manifest = read_manifest(dynamic)
    assert manifest.name == "tiny"
    assert manifest.precision == "fp32"
    assert manifest.attention == "matmul"
    assert manifest.checkpoint_sha256 == sha256_of(checkpoint)
    assert {"torch", "onnx", "onnxsim"} <= manifest.versions.keys()
    assert manifest.input is not None
    assert (manifest.input.dtype, manifest.input.channels) == ("uint8", 1)
    assert manifest.input.height.fixed is None
    evidence = manifest.validation[-1]
    assert evidence.what == "export parity"
    assert evidence.values["agreement"] > 0.9999
    assert evidence.values["max_abs_difference"] < 1e-3 * max(1, evidence.values["reference_std"])
    assert evidence.images == 4


def test_a_pixel_size_can_be_stated_at_export(dynamic: Path, static: Path) -> None:
    assert read_manifest(dynamic).read_at_m is None
    assert read_manifest(static).read_at_m == (5e-9, 5e-9)
    with pytest.raises(UsageError, match="no microscope"):
        ExportOptions(pixel_size_m=1.0)


def test_names_of_inputs_outputs_axes_and_nodes(dynamic: Path, static: Path) -> None:
    graph, fixed = (onnx.load(str(path)).graph for path in (dynamic, static))
    assert [(entry.name, axes(entry)) for entry in graph.input] == [("image", ["batch", 1, "height", "width"])]
    assert [(entry.name, axes(entry)) for entry in graph.output] == [("labels", ["batch", "height", "width"])]
    assert [(entry.name, axes(entry)) for entry in fixed.output] == [
        ("labels", [1, 72, 104]),
        ("confidence", [1, 72, 104]),
    ]
    names = [node.name for node in fixed.node]
    assert len(names) == len(set(names))
    assert {"backbone.stem.0.conv.conv/Conv", "backbone.sps.1/Softmax", "conv_seg/Conv"} <= set(names)


def test_bytes_touch_only_casts(dynamic: Path) -> None:
    graph = onnx.load(str(dynamic)).graph
    for entry in (*graph.input, *graph.output):
        assert entry.type.tensor_type.elem_type == TensorProto.UINT8
    assert {node.op_type for node in consumers(graph)["image"]} == {"Cast"}


@pytest.mark.parametrize("classes", [2, 3, 9])
def test_labels_become_bytes_from_floating_point(classes: int) -> None:
    """TensorRT documents no other way: not from the comparison of two classes, not from an arg-max's integers."""
    network = lively(tiny_network(num_classes=classes))
    model = simplified(trace(network, tiny_manifest(network), ExportOptions(1, 64, 64)))
    cast = producers(model.graph)["labels"]
    assert (cast.op_type, tensor_types(model)[cast.input[0]]) == ("Cast", TensorProto.FLOAT)
    half = to_half(model)
    assert tensor_types(half)[producers(half.graph)["labels"].input[0]] == TensorProto.FLOAT16
    assert Parsed(half).build() is not None


def test_graph_is_lean_and_carries_no_local_paths(static: Path, dynamic: Path) -> None:
    small, large = operators(static), operators(dynamic)
    assert small["Shape"] == 0
    assert small["Transpose"] == 4  # to tokens and back, in each of two attention modules
    assert small["MatMul"] == 8
    assert small["Identity"] + small["Gemm"] + small["Expand"] == 0
    assert small["Conv"] == large["Conv"]
    # Sizes are read from tensors, nothing is computed from them.
    assert small["Add"] == large["Add"] + 2  # the confidence's sum over three classes
    assert large["Div"] + large["Gather"] + large["Slice"] == 0
    for path in (static, dynamic):
        content = path.read_bytes()
        assert str(Path.cwd()).encode() not in content
        assert b"stack_trace" not in content


@pytest.mark.parametrize("size", [(1, 8, 8), (1, 16, 64), (3, 136, 200), (2, 128, 192), (1, 264, 248)])
def test_dynamic_sizes(checkpoint: Path, dynamic: Path, size: tuple[int, int, int]) -> None:
    batch, height, width = size
    image = np.ascontiguousarray(frames(batch, max(height, 16), max(width, 16))[..., :height, :width])
    (labels,) = run(dynamic, image)
    assert labels.shape == size
    assert_same_labels(labels, reference(checkpoint, image))


@pytest.mark.parametrize("typed", ["fp32", "fp16"])
def test_tensorrt_rtx_builds_dynamic_sizes(dynamic: Path, typed: str) -> None:
    model = onnx.load(str(dynamic))
    parsed = Parsed(to_half(model) if typed == "fp16" else model)
    assert parsed.build((1, 1, 8, 8), (1, 1, 256, 256), (4, 1, 1024, 1024)) is not None


@pytest.mark.parametrize("classes", [2, 3])
def test_confidence(checkpoint: Path, static: Path, tmp_path: Path, classes: int) -> None:
    if classes == 2:
        network = lively(tiny_network(num_classes=2))
        described = tiny_manifest(network).replace(temperature=2.0)
        checkpoint = save_checkpoint(tmp_path / "two.safetensors", network, described)
        static = tmp_path / "two.onnx"
        export_onnx(checkpoint, static, STATIC)
        assert operators(static)["ArgMax"] == 0
    image = frames(1, 72, 104)
    labels, confidence = run(static, image)
    logits = reference(checkpoint, image)
    assert_same_labels(labels, logits)
    assert confidence.dtype == np.float32
    want = torch.softmax(logits / (2 if classes == 2 else 1), 1).amax(1).numpy()
    np.testing.assert_allclose(confidence, want, atol=1e-3)
    for model, engine in ((checkpoint, "torch"), (static, "onnxruntime"), (static, "openvino")):
        with load_segmenter(model, engine=engine, precision="file", confidence=True) as segmenter:
            result = segmenter.segment(image[0, 0])
        assert result.confidence is not None
        np.testing.assert_allclose(result.confidence, want[0], atol=1e-3)
    assert read_manifest(static).validation[-1].values["max_confidence_difference"] < 1e-3


def test_logits_from_normalized_input_with_attention_operator(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "logits.onnx"
    options = ExportOptions(2, 64, 96, attention="attention-op", output="logits", grey_input=False)
    manifest = export_onnx(checkpoint, target, options)
    assert manifest.input is not None
    assert (manifest.input.dtype, manifest.input.channels) == ("float32", 3)
    assert manifest.output is not None
    assert manifest.output.kind == "logits"
    assert manifest.attention == "attention-op"
    assert (operators(target)["Attention"], operators(target)["Softmax"]) == (2, 0)
    opsets = {entry.domain: entry.version for entry in onnx.load(str(target)).opset_import}
    assert opsets[""] == 23
    image = frames(2, 64, 96)
    (logits,) = run(target, normalized(image, manifest).numpy())
    want = reference(checkpoint, image).numpy()
    assert np.abs(logits - want).max() < 1e-4 * max(1, want.std())


def test_comparison_is_logged_and_uses_the_micrographs_given(
    checkpoint: Path, static: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    micrograph = tmp_path / "grains.png"
    Image.fromarray(frames(1, 50, 70)[0, 0]).save(micrograph)
    model, manifest = load_model(static)
    network, _ = load_checkpoint(checkpoint)
    with caplog.at_level(logging.INFO):
        evidence = compare_with_pytorch(model, network, manifest, [micrograph])
    assert (evidence.source, evidence.images) == ("grains.png", 2)
    assert "labels agree on 100.0000 %" in caplog.text


@pytest.mark.parametrize(
    "broken", ["conv_seg.weight", "backbone.sps.1.out.bias", "backbone.stem.0.conv.shift", "output.enlarge.conv.weight"]
)
def test_broken_graph_leaves_no_file(
    checkpoint: Path, static: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """An exporter that changes one weight by a few percent is found out; behind the scores by the labels alone."""
    model, _ = load_model(static)
    weight = next(entry for entry in model.graph.initializer if entry.name == broken)
    values = 1.05 * numpy_helper.to_array(weight)
    store(weight, values[::-1] if broken.startswith("output") else values)
    monkeypatch.setattr(onnx_export, "trace", lambda *_: model)
    with pytest.raises(UserError, match="differs from PyTorch"):
        export_onnx(checkpoint, tmp_path / "broken.onnx", STATIC)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 100}, "height must be a positive multiple of 8"),
        ({"width": 0}, "width must be a positive multiple of 8"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"opset": 17}, "opset must be at least 20"),
        ({"attention": "attention-op", "opset": 20}, "opset must be at least 23"),
        ({"output": "logits", "confidence": True, "batch": 1, "height": 64, "width": 64}, "confidence map"),
    ],
)
def test_bad_options(checkpoint: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        export_onnx(checkpoint, tmp_path / "x.onnx", ExportOptions(**options))
    assert list(tmp_path.iterdir()) == []


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(BadInputFile, match="does not exist"):
        export_onnx(tmp_path / "none.safetensors", tmp_path / "x.onnx")


def test_reference_weights(golden: Path, tmp_path: Path) -> None:
    """The authors' architecture at full width, from a converted checkpoint's weights."""
    from tests.export.test_reformulate import reference_network

    network, manifest = reference_network(golden)
    options = ExportOptions(batch=1, height=136, width=200)
    written = export_network(network, manifest, tmp_path / "golden.onnx", options)
    assert written.validation[-1].values["agreement"] > 0.9999
    assert written.validation[-1].values["max_abs_difference"] < 1e-4


def test_ship_writes_half_the_bytes_and_the_same_labels(tmp_path: Path) -> None:
    network = tiny_network(detail=True)
    source = save_checkpoint(tmp_path / "run.safetensors", network, tiny_manifest(network))
    files = ship(source, tmp_path / "out", name="small")
    assert [path.name for path in files] == ["small.safetensors", "small.onnx"]
    assert files.checkpoint.stat().st_size < 0.6 * source.stat().st_size
    rounded, manifest = load_checkpoint(files.checkpoint)
    assert manifest.name == "small"
    for name, value in network.state_dict().items():
        stored = rounded.state_dict()[name]
        assert stored.dtype == value.dtype
        assert torch.equal(stored, value if value.ndim < 2 else value.half().float())
    image = frames(1, 64, 96)
    with load_engine(files.onnx) as deployed, load_engine(files.checkpoint) as reference:
        assert np.mean(deployed.infer(image).labels == reference.infer(image).labels) > 0.999


def test_only_large_constants_that_fit_are_stored_in_half() -> None:
    values = {
        "large": np.full((64, 64), 0.1, np.float32), "small": np.ones((2, 2), np.float32),
        "huge": np.full((64, 64), 1e6, np.float32), "vector": np.ones(4096, np.float32),
        "indices": np.ones((64, 64), np.int64),
    }  # fmt: skip
    graph = onnx.GraphProto()
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    model = onnx.ModelProto(graph=graph)
    store_in_half(model)
    types = {entry.name: entry.data_type for entry in model.graph.initializer}
    assert types == {"large.half": TensorProto.FLOAT16, "small": 1, "huge": 1, "vector": 1, "indices": 7}
    (cast,) = model.graph.node
    assert (list(cast.input), list(cast.output)) == (["large.half"], ["large"])
