"""Small real models for tests: a 3x3 mean and three straight-line class scores, in numpy and as ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.manifest import (
    METADATA_KEY,
    AxisRange,
    ClassInfo,
    DomainRecord,
    InputContract,
    Manifest,
    NetworkConfig,
    OutputContract,
)
from hpddrnet_trt.core.metrics import arg_max
from hpddrnet_trt.engines.base import EngineBase, Prediction, check_input, input_contract

CLASSES = [
    ClassInfo(name="grain", color=(0, 0, 0)),
    ClassInfo(name="pore", color=(250, 100, 0)),
    ClassInfo(name="clay", color=(0, 90, 200)),
]
# Score of class k is SLOPE[k] * mean grey + OFFSET[k]: dark, middle and bright win in turn.
SLOPE = (-0.05, 0.0, 0.05)
OFFSET = (4.0, 0.0, -8.0)
CELL = 8  # pixels along an edge of what the toy's domain features are means of
# Trained on middle greys: distances grow by 1 for every 20 grey levels from 120, in each score's own units.
DOMAIN = DomainRecord(
    mean=[a * 120 + b for a, b in zip(SLOPE, OFFSET, strict=True)], scale=[1.0, 1.0, 1.0], residual=2 / 3,
    unusual=2.0, foreign=4.0, crops=64, pictures=4, source="toy (train)",
)  # fmt: skip


def manifest(
    output: str = "labels", confidence: bool = False, size: int | None = None, *, domain: bool = False, **changes: Any
) -> Manifest:
    """A description of the toy model; ``size`` fixes height and width, with ``domain`` it knows its own."""
    axis = AxisRange(minimum=8) if size is None else AxisRange(minimum=size, maximum=size)
    return Manifest.model_validate(
        {
            "name": "toy",
            "network": NetworkConfig(num_classes=3),
            "classes": CLASSES,
            "input": InputContract(height=axis, width=axis),
            "output": OutputContract.model_validate({"kind": output, "confidence": confidence, "domain": domain}),
            "domain": DOMAIN if domain else None,
            "precision": "fp32",
            **changes,
        }
    )


def toy_logits(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Class scores ``[3, H, W]``; the image continues beyond its border by reflection."""
    mean = cv2.blur(image, (3, 3), borderType=cv2.BORDER_REFLECT_101).reshape(image.shape).astype(np.float32)
    return np.stack([np.float32(a) * mean + np.float32(b) for a, b in zip(SLOPE, OFFSET, strict=True)])


def toy_features(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Means ``[N, 3, H / 8, W / 8]`` of class scores ``[N, 3, H, W]``."""
    count, classes, height, width = logits.shape
    return logits.reshape(count, classes, height // CELL, CELL, width // CELL, CELL).mean(axis=(3, 5))


class ToyEngine(EngineBase):
    """The toy model in numpy; counts its inferences and remembers their shapes."""

    def __init__(self, description: Manifest | None = None) -> None:
        self.manifest = description or manifest("logits")
        self.shapes: list[tuple[int, ...]] = []
        self.closed = False

    @property
    def runtime(self) -> str:
        return "numpy"

    def infer(self, images: npt.NDArray[Any]) -> Prediction:
        check_input(images, input_contract(self.manifest))
        self.shapes.append(images.shape)
        logits = np.stack([toy_logits(image[0]) for image in images])
        labels = arg_max(logits)
        assert self.manifest.output is not None
        output = self.manifest.output
        features = toy_features(logits) if output.domain else None
        return Prediction(labels, logits=logits if output.kind == "logits" else None, domain_features=features)

    def close(self) -> None:
        self.closed = True


def write_toy_onnx(
    path: Path, description: Manifest, *, half: bool = False, attach: bool = True, symmetric_int8: bool = False
) -> Path:
    """The toy model as an ONNX file (with zero padding at the border), following ``description``."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    assert description.input is not None
    assert description.output is not None
    real = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    dtype = np.float16 if half else np.float32
    weights = {
        "mean": np.full((1, 1, 3, 3), 1 / 9, dtype),
        "slope": np.asarray(SLOPE, dtype).reshape(3, 1, 1, 1),
        "offset": np.asarray(OFFSET, dtype),
        "axis": np.asarray([1], np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["grey"], to=real),
        helper.make_node("Conv", ["grey", "mean"], ["smooth"], pads=[1, 1, 1, 1]),
    ]
    source = "smooth"
    if symmetric_int8:
        weights |= {"scale": np.asarray(255 / 127, dtype), "zero": np.asarray(0, np.int8)}
        nodes += [
            helper.make_node("QuantizeLinear", ["smooth", "scale", "zero"], ["quantised"]),
            helper.make_node("DequantizeLinear", ["quantised", "scale", "zero"], ["dequantised"]),
        ]
        source = "dequantised"
    nodes += [
        helper.make_node("Conv", [source, "slope", "offset"], ["scores"]),
        helper.make_node("Cast", ["scores"], ["logits"], to=TensorProto.FLOAT),
        helper.make_node("ArgMax", ["logits"], ["indices"], axis=1, keepdims=0),
        helper.make_node("Cast", ["indices"], ["labels"], to=TensorProto.UINT8),
        helper.make_node("AveragePool", ["logits"], ["domain_features"], kernel_shape=[CELL] * 2, strides=[CELL] * 2),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        helper.make_node("ReduceMax", ["probabilities", "axis"], ["confidence"], keepdims=0),
    ]
    size = [description.input.height.fixed or "H", description.input.width.fixed or "W"]
    shapes = {
        "labels": helper.make_tensor_value_info("labels", TensorProto.UINT8, ["N", *size]),
        "confidence": helper.make_tensor_value_info("confidence", TensorProto.FLOAT, ["N", *size]),
        "logits": helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3, *size]),
        "domain_features": helper.make_tensor_value_info("domain_features", TensorProto.FLOAT, ["N", 3, "h", "w"]),
    }
    wanted = {"confidence": description.output.confidence, "domain_features": description.output.domain}
    names = [description.output.kind, *(name for name, given in wanted.items() if given)]
    graph = helper.make_graph(
        nodes, "toy", [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 1, *size])],
        [shapes[name] for name in names], [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if attach:
        helper.set_model_props(model, {METADATA_KEY: description.to_json()})
    onnx.save(model, str(path))
    return path


def grey_image(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Smooth random grey levels over the whole range."""
    noise = np.random.default_rng(seed).uniform(-80, 335, (height, width)).astype(np.float32)
    return np.clip(cv2.blur(noise, (3, 3)).reshape(height, width), 0, 255).astype(np.uint8)
