"""What an engine's results must be, whatever the file does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hpddrnet_trt.core.errors import BadInputFile
from hpddrnet_trt.engines import load_engine
from hpddrnet_trt.engines.base import checked_prediction
from tests.toy import CLASSES, grey_image, manifest, write_toy_onnx

IMAGES = grey_image(16, 24)[None, None]
ENGINES = ["onnxruntime", *(["openvino"] if importlib.util.find_spec("openvino") else [])]


def _labels(**changes: Any) -> dict[str, Any]:
    return {"labels": np.zeros((1, 16, 24), np.uint8), **changes}


def test_what_is_promised_passes_uncopied() -> None:
    outputs = _labels(confidence=np.ones((1, 16, 24), np.float32), unknown=np.zeros(3))
    outputs["labels"][0, 3, 4] = 2
    found = checked_prediction(outputs, manifest(), IMAGES.shape)
    assert found.labels is outputs["labels"]
    assert found.confidence is outputs["confidence"]
    logits = np.random.default_rng(0).normal(size=(1, 3, 16, 24)).astype(np.float32)
    found = checked_prediction({"logits": logits}, manifest("logits"), IMAGES.shape)
    np.testing.assert_array_equal(found.labels, logits.argmax(1))


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        (_labels(labels=np.zeros((1, 8, 24), np.uint8)), r"labels has the shape \(1, 8, 24\) instead of \(1, 16, 24\)"),
        (_labels(labels=np.zeros((1, 1, 16, 24), np.uint8)), "has the shape"),
        (_labels(labels=np.zeros((1, 16, 24), np.int64)), "its output labels is of type int64"),
        (_labels(labels=np.full((1, 16, 24), 3, np.uint8)), "it gave the label 3, and has the classes 0 to 2"),
        (_labels(confidence=np.zeros((2, 16, 24), np.float32)), "its output confidence has the shape"),
        ({"logits": np.zeros((1, 4, 16, 24), np.float32)}, r"its output logits has the shape \(1, 4, 16, 24\)"),
        ({"logits": np.zeros((1, 3, 16, 24), np.uint8)}, "its output logits is of type uint8"),
    ],
)  # fmt: skip
def test_what_is_not_promised_is_refused(outputs: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInputFile, match=rf"model 'toy' does not do what its description promises .*{says}.*export"):
        checked_prediction(outputs, manifest(), IMAGES.shape)


def _shifted(path: Path) -> Path:
    """A file whose labels are 7 too high."""
    write_toy_onnx(path, manifest())
    model = onnx.load(str(path))
    index = next(node for node in model.graph.node if node.op_type == "ArgMax")
    index.output[0] = "real_indices"
    model.graph.initializer.append(numpy_helper.from_array(np.array(7, np.int64), "seven"))
    place = list(model.graph.node).index(index) + 1
    model.graph.node.insert(place, helper.make_node("Add", ["real_indices", "seven"], ["indices"]))
    onnx.save(model, str(path))
    return path


def _other_size(path: Path) -> Path:
    """A file whose labels have half the height."""
    write_toy_onnx(path, manifest())
    model = onnx.load(str(path))
    cast = next(node for node in model.graph.node if node.output[0] == "labels")
    cast.output[0] = "all_labels"
    for name, values in (("starts", [0]), ("ends", [2**62]), ("axes", [1]), ("steps", [2])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
    model.graph.node.append(helper.make_node("Slice", ["all_labels", "starts", "ends", "axes", "steps"], ["labels"]))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("labels", TensorProto.UINT8, [None] * 3))
    onnx.save(model, str(path))
    return path


@pytest.mark.parametrize("name", ENGINES)
def test_files_that_lie(tmp_path: Path, name: str) -> None:
    for make, says in ((_shifted, rf"gave the label [789], and has the classes 0 to {len(CLASSES) - 1}"),
                       (_other_size, r"has the shape \(1, 8, 24\)")):  # fmt: skip
        with load_engine(make(tmp_path / "m.onnx"), name, threads=1) as engine:
            with pytest.raises(BadInputFile, match=says):
                engine.infer(IMAGES)
            with pytest.raises(BadInputFile, match=says):
                list(engine.infer_many([IMAGES]))
