"""Class scores from an ONNX graph that was exported with labels, so that tiles of a large image can be blended.

The network computes scores at 1/4 or 1/8 of the image's size; the last nodes of a labels file only enlarge and
compare them (``hpddrnet_trt/export/reformulate.py``: ``Phases``, ``LabelOutput``). Here those nodes give way to one
bilinear enlargement, which is what a logits file ends with: the result is such a file. Adopted files
(``hpddrnet_trt/export/adopt.py``) end in a resize, or in nothing but the comparison.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hpddrnet_trt.core.domain import OUTPUT as DOMAIN_OUTPUT
from hpddrnet_trt.core.errors import require
from hpddrnet_trt.core.manifest import METADATA_KEY, Manifest, NetworkConfig, OutputContract
from hpddrnet_trt.graph.nodes import renamed, replace_nodes

if TYPE_CHECKING:
    import onnx

ENLARGEMENT = "output.enlarge/"  # nodes are named after the exported module
COMPARISON = "output/ArgMax"
_NAME = "hpddrnet_scores_"  # of what is added


def with_scores(model: onnx.ModelProto, manifest: Manifest) -> onnx.ModelProto | None:
    """``model`` with logits in place of labels, and ``manifest`` in it that says so.

    Nothing is copied: ``model`` itself is changed. None, and ``model`` as it was, where it ends in another way than
    our exports with labels do.
    """
    onnx = require("onnx", "export", "read ONNX files")
    helper, real = onnx.helper, onnx.TensorProto.FLOAT
    graph = model.graph
    network, low = manifest.network, f"{_NAME}low"
    found = [node for node in graph.node if node.name.startswith(ENLARGEMENT)]
    first = next(iter([*found, *(node for node in graph.node if node.name == COMPARISON)]), None)
    constants: dict[str, tuple[int, list[Any]]] = {}
    if first is None:
        return None
    if first.op_type == "Resize":
        graph.node.append(renamed(first, {first.input[0]: low, first.output[0]: "logits"}))
        graph.node[-1].name = f"{first.name}_{_NAME}"
    elif first.op_type == "ArgMax":
        low = "logits"
    elif first.op_type == "Pad" and isinstance(network, NetworkConfig):
        constants["scales"] = real, [1.0, 1.0, *[float(network.logit_stride)] * 2]
        scores = low
        if network.num_classes == 2:
            # One channel: by how much the second class's logit is above the first one's.
            constants["pads"] = onnx.TensorProto.INT64, [0, 1, 0, 0, 0, 0, 0, 0]
            scores = f"{_NAME}classes"
            graph.node.append(helper.make_node("Pad", [low, f"{_NAME}pads"], [scores]))
        graph.node.append(
            helper.make_node(
                "Resize", [scores, "", f"{_NAME}scales"], ["logits"], mode="linear",
                coordinate_transformation_mode="half_pixel",
            )
        )  # fmt: skip
    else:
        return None
    graph.node.append(helper.make_node("Cast", [first.input[0]], [low], to=real))
    graph.initializer.extend(
        helper.make_tensor(f"{_NAME}{name}", kind, [len(values)], values) for name, (kind, values) in constants.items()
    )
    batch, _, height, width = graph.input[0].type.tensor_type.shape.dim
    output = helper.make_tensor_value_info("logits", real, [None, network.num_classes, None, None])
    for place, dim in ((0, batch), (2, height), (3, width)):
        output.type.tensor_type.shape.dim[place].CopyFrom(dim)
    others = [entry for entry in graph.output if entry.name == DOMAIN_OUTPUT]
    del graph.output[:]
    graph.output.extend([output, *others])
    replace_nodes(graph, graph.node)
    description = manifest.replace(output=OutputContract(kind="logits", domain=bool(others)))
    helper.set_model_props(model, {METADATA_KEY: description.to_json()})
    return model
