"""An output of pooled features for the domain guard (:mod:`hpddrnet_trt.core.domain`), on any segmentation network.

What is pooled are the features at 1/4 of the image, the last ones before the network goes on at a lower resolution:
they tell texture and grey levels, and of what was tried they part foreign pictures from the model's own best
(``docs/results/domain-2026-11.md``). The nodes are ordinary ones, called ``domain/...``, and have no weights; labels do
not change. :mod:`hpddrnet_trt.models.domain` is the same in PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hpddrnet_trt.core.domain import CELL, FINE, OUTPUT
from hpddrnet_trt.core.errors import UserError, require
from hpddrnet_trt.graph.nodes import copied, enlarges, producers, tensor_types
from hpddrnet_trt.graph.work import Sizes, at_size

if TYPE_CHECKING:
    import onnx

PREFIX = "domain/"  # of the added nodes
_ANY_SIZE = 512  # pixels: where the graph leaves its size open, tensors are looked up at this one


def with_domain(model: onnx.ModelProto, tensor: str | None = None) -> onnx.ModelProto:
    """A copy of ``model`` that also gives ``domain_features``, float32 ``[N, 2 C, rows, columns]``.

    Means, then root mean squares, of the ``C`` channels of ``tensor`` (default: :func:`domain_tensor`), halved, over
    each cell. Cell ``i`` of a direction covers the pixels from ``(i - 1/2) CELL`` to ``(i + 1/2) CELL``, as far as they
    are in the image; there are ``size // CELL + 1``. A model that has the output comes back as it is. Raises
    :class:`UserError` where ``tensor`` is no feature map that divides a cell.
    """
    onnx = require("onnx", "export", "add an output to ONNX files")
    if any(entry.name == OUTPUT for entry in model.graph.output):
        return model
    result, sizes = copied(model), _sizes(model)
    graph, real = result.graph, int(onnx.TensorProto.FLOAT)
    tensor = domain_tensor(model, sizes) if tensor is None else tensor
    shape, image = sizes.shape(tensor), sizes.shape(graph.input[0].name)
    stride = image[-1] // shape[-1] if len(shape) == 4 else 0
    if not stride or CELL % (2 * stride) or image[-2] // stride != shape[-2]:
        raise UserError(f"the tensor {tensor!r} of shape {list(shape)} is no feature map; name another one")
    window = CELL // (2 * stride)

    def add(operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
        output = OUTPUT if operator == "Concat" else PREFIX + name
        graph.node.append(onnx.helper.make_node(operator, inputs, [output], PREFIX + name, **attributes))
        return output

    def pooled(values: str, name: str) -> str:
        return add(
            "AveragePool", [values], name, kernel_shape=[window] * 2, strides=[window] * 2, pads=[window // 2] * 4,
            count_include_pad=0,
        )  # fmt: skip

    # Halved by a resize, for OpenVINO: in BF16 it computes in FP32 what lies between an output and the nearest
    # convolution, matrix product or resize before it, which without this one would be a part of the network.
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 1, 0.5, 0.5], np.float32), f"{PREFIX}scales"))
    values = add(
        "Resize", [tensor, "", f"{PREFIX}scales"], "half", mode="linear", coordinate_transformation_mode="half_pixel"
    )
    if tensor_types(model)[tensor] != real:
        values = add("Cast", [values], "real", to=real)
    # Not standard deviations: the difference of two large numbers does not stand a runtime that computes in BF16.
    mean = pooled(values, "mean")
    squares = pooled(add("Mul", [values, values], "square"), "mean_square")
    add("Concat", [mean, add("Sqrt", [squares], "root_mean_square")], "features", axis=1)
    output = onnx.helper.make_tensor_value_info(OUTPUT, real, [None, 2 * shape[1], None, None])
    output.type.tensor_type.shape.dim[0].CopyFrom(graph.input[0].type.tensor_type.shape.dim[0])
    graph.output.append(output)
    return result


def domain_tensor(model: onnx.ModelProto, sizes: Sizes | None = None) -> str:
    """The feature map at 1/4 of the image that the first node which reduces it further reads.

    In a network that has none, what the last convolution reads. Raises :class:`UserError` for one without convolutions.
    """
    graph = model.graph
    sizes = sizes or _sizes(model)
    width = sizes.shape(graph.input[0].name)[-1]
    for node in graph.node:
        read, made = (sizes.shapes.get(name, ()) for name in (node.input[0] if node.input else "", node.output[0]))
        reduces = node.op_type in ("Conv", "MaxPool", "AveragePool") and len(read) == len(made) == 4
        if reduces and read[-1] * FINE == width and made[-1] < read[-1]:
            return str(node.input[0])
    makers = producers(graph)
    last = next((node for node in reversed(graph.node) if node.op_type == "Conv" and not enlarges(node, makers)), None)
    if last is None:
        raise UserError("the graph has no convolution whose features could tell one kind of picture from another")
    return str(last.input[0])


def domain_nodes(graph: onnx.GraphProto) -> set[str]:
    """Names of the nodes that compute in FP32 whatever the graph does: sums of many values, and their squares."""
    return {node.name for node in graph.node if node.name.startswith(PREFIX) and node.op_type != "Resize"}


def _sizes(model: onnx.ModelProto) -> Sizes:
    axes = model.graph.input[0].type.tensor_type.shape.dim
    shape = [axis.dim_value or default for axis, default in zip(axes, (1, 1, _ANY_SIZE, _ANY_SIZE), strict=True)]
    return Sizes(at_size(model, shape).graph)
