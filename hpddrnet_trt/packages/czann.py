"""CZANN files, which ZEN (AI Toolkit) and arivis run: a zip file of ``model.json`` and ``model.model``, an ONNX file.

After the specification that comes with ZEISS's package czmodel 6.2.0, version 2.1.0
of the format: one input of fixed size, float32 ``[batch, height, width, channels]`` from 0 to 1, and one output, the
probability of each class in the same order of axes; operators of version 18. The graph is given both ends here, around
the network as it is. Looked at with czmodel, not in ZEN.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from typing import TYPE_CHECKING, Any

import numpy as np

from hpddrnet_trt.core.errors import BadInputFile, UsageError, one_line, require
from hpddrnet_trt.core.files import read_file
from hpddrnet_trt.graph.model import load_model
from hpddrnet_trt.graph.nodes import replace_nodes
from hpddrnet_trt.graph.scores import with_scores
from hpddrnet_trt.inference.tiling import plan_tiles
from hpddrnet_trt.packages.contents import (
    Files,
    PackageSettings,
    Packed,
    input_size,
    labels_of,
    license_of,
    run_plainly,
    test_picture,
)

if TYPE_CHECKING:
    import onnx

FORMAT_VERSION = "2.1.0"
OPSET = 18
IR_VERSION = 8  # the one that came with this version of operators
USUAL_TILE = 1024
LEAST_AGREEMENT = 0.999  # of the labels with those of the file; ties between scores are decided by rounding
MODEL, METADATA, LICENSE = "model.model", "model.json", "license.txt"
SOURCE_KEY = "hpddrnet_trt_source"  # description of the file this was made from: its input and output are others
_NAME = "czann_"  # of what is added
_IMAGE, _PROBABILITIES = f"{_NAME}image", f"{_NAME}probabilities"


def czann_files(packed: Packed, settings: PackageSettings) -> Files:
    """The files of a CZANN file; its labels have been compared with those of the ONNX file."""
    manifest = packed.manifest
    crop = manifest.data.crop if manifest.data is not None else None
    size = input_size(packed.input, settings.size, min(crop) if crop else USUAL_TILE)
    pixel = packed.pixel_size_m
    content = _with_ends(packed, size).SerializeToString()
    _compare(packed, content, size)
    metadata: dict[str, Any] = {
        "FormatVersion": FORMAT_VERSION,
        "Id": str(uuid.uuid5(uuid.NAMESPACE_OID, hashlib.sha256(content).hexdigest())),
        "Type": "SingleClassSemanticSegmentation",  # one class for each pixel
        "InputShape": [*size, packed.input.channels],
        "OutputShape": [*size, len(manifest.classes)],
        "MinOverlap": [plan_tiles(*size, size).overlap // 2 * 2] * 2,
        "Classes": manifest.class_names,
        "ModelName": manifest.name,
        **({} if pixel is None else {"Scaling": [pixel, pixel]}),
    }
    license = license_of(packed, settings)
    return {
        METADATA: json.dumps(metadata, indent=1).encode(),
        MODEL: content,
        **({LICENSE: (license + "\n").encode()} if license else {}),
    }


def _with_ends(packed: Packed, size: tuple[int, int]) -> onnx.ModelProto:
    """The file's graph behind what makes its input, and before what makes probabilities of its scores."""
    onnx = require("onnx", "export", "write ONNX files")
    model, manifest = load_model(packed.path, "operators")
    if packed.output.kind == "labels" and with_scores(model, manifest) is None:
        raise UsageError(
            f"{packed.path} gives labels, and a CZANN file holds class scores; export it with --output logits"
        )
    helper, graph = onnx.helper, model.graph
    source = graph.input[0].name
    constants: dict[str, Any] = {"levels": np.float32(255)}
    before = [
        helper.make_node("Transpose", [_IMAGE], [f"{_NAME}planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Mul", [f"{_NAME}planes", f"{_NAME}levels"], [f"{_NAME}grey"]),
    ]
    if packed.input.dtype == "uint8":
        before += [
            helper.make_node("Round", [f"{_NAME}grey"], [f"{_NAME}whole"]),
            helper.make_node("Cast", [f"{_NAME}whole"], [source], to=onnx.TensorProto.UINT8),
        ]
    else:
        for name, values in (("mean", manifest.normalization.mean), ("std", manifest.normalization.std)):
            constants[name] = np.array(values[: packed.input.channels], np.float32).reshape(1, -1, 1, 1)
        before += [
            helper.make_node("Sub", [f"{_NAME}grey", f"{_NAME}mean"], [f"{_NAME}centered"]),
            helper.make_node("Div", [f"{_NAME}centered", f"{_NAME}std"], [source]),
        ]
    constants["temperature"] = np.float32(manifest.temperature or 1)
    after = [
        helper.make_node("Div", ["logits", f"{_NAME}temperature"], [f"{_NAME}scores"]),
        helper.make_node("Softmax", [f"{_NAME}scores"], [f"{_NAME}shares"], axis=1),
        helper.make_node("Transpose", [f"{_NAME}shares"], [_PROBABILITIES], perm=[0, 2, 3, 1]),
    ]
    for ends, name, channels in (
        (graph.input, _IMAGE, packed.input.channels), (graph.output, _PROBABILITIES, len(manifest.classes)),
    ):  # fmt: skip
        del ends[:]
        ends.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", *size, channels]))
    graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(value), f"{_NAME}{name}") for name, value in constants.items()
    )
    del graph.value_info[:]  # of other sizes
    replace_nodes(graph, [*before, *graph.node, *after])
    # Of the operators that our exports use, none has changed its meaning since; the checker sees new attributes.
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", OPSET))
    model.ir_version, model.producer_name = IR_VERSION, "hpddrnet-trt"
    helper.set_model_props(model, {SOURCE_KEY: manifest.to_json()})
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
        raise BadInputFile(
            f"{packed.path} has operators that a CZANN file cannot hold, which takes those of version {OPSET} "
            f"({one_line(exc, 'first')}); package the FP32 file that hpddrnet-trt export wrote"
        ) from exc
    return model


def _compare(packed: Packed, content: bytes, size: tuple[int, int]) -> None:
    """Raise :class:`BadInputFile` unless both files give the same labels for the test picture."""
    grey = test_picture(size)
    expected = run_plainly(packed, read_file(packed.path, "model file"), packed.feed(grey))
    planes = np.repeat(grey[None, ..., None], packed.input.channels, axis=-1).astype(np.float32) / np.float32(255)
    got = run_plainly(packed, content, planes)[_PROBABILITIES].argmax(axis=-1)
    agreement = float((got == labels_of(expected)).mean())
    if agreement < LEAST_AGREEMENT:
        raise BadInputFile(
            f"the CZANN file made of {packed.path} gives other labels (equal on {100 * agreement:.2f} % of the "
            "pixels); package the FP32 file that hpddrnet-trt export wrote"
        )
