"""Class scores from an ONNX graph that was exported with labels, so that tiles of a large image can be blended.

The network computes scores at 1/4 or 1/8 of the image's size; the last nodes of a labels file only enlarge and
compare them (``hpddrnet_trt/export/reformulate.py``: ``Phases``, ``LabelOutput``). Here those nodes give way to one
bilinear enlargement, which is what a logits file ends with: the result is such a file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpddrnet_trt.core.errors import require
from hpddrnet_trt.core.manifest import METADATA_KEY, Manifest, OutputContract

if TYPE_CHECKING:
    import onnx

ENLARGEMENT = "output.enlarge/"  # nodes are named after the exported module
_NAME = "hpddrnet_scores_"  # of what is added


def with_scores(model: onnx.ModelProto, manifest: Manifest) -> onnx.ModelProto | None:
    """``model`` with logits in place of labels, and ``manifest`` in it that says so.

    Nothing is copied: ``model`` itself is changed. None, and ``model`` as it was, where it ends in another way than
    our exports with labels do.
    """
    onnx = require("onnx", "export", "read ONNX files")
    helper, real = onnx.helper, onnx.TensorProto.FLOAT
    graph = model.graph
    first = next((node for node in graph.node if node.name.startswith(ENLARGEMENT)), None)
    if first is None or first.op_type not in ("Pad", "Resize"):
        return None
    # Two classes are one channel: by how much the second one's logit is above the first one's.
    margin = manifest.network.num_classes == 2
    constants = {"scales": (real, [1.0, 1.0, *[float(manifest.network.logit_stride)] * 2])}
    nodes = [helper.make_node("Cast", [first.input[0]], [f"{_NAME}low"], to=real)]
    if margin:
        constants["pads"] = (onnx.TensorProto.INT64, [0, 1, 0, 0, 0, 0, 0, 0])
        nodes.append(helper.make_node("Pad", [f"{_NAME}low", f"{_NAME}pads"], [f"{_NAME}classes"]))
    scores = f"{_NAME}classes" if margin else f"{_NAME}low"
    nodes.append(
        helper.make_node(
            "Resize", [scores, "", f"{_NAME}scales"], ["logits"], mode="linear",
            coordinate_transformation_mode="half_pixel",
        )
    )  # fmt: skip
    graph.node.extend(nodes)
    graph.initializer.extend(
        helper.make_tensor(f"{_NAME}{name}", kind, [len(values)], values) for name, (kind, values) in constants.items()
    )
    batch, _, height, width = graph.input[0].type.tensor_type.shape.dim
    output = helper.make_tensor_value_info("logits", real, [None, manifest.network.num_classes, None, None])
    for place, dim in ((0, batch), (2, height), (3, width)):
        output.type.tensor_type.shape.dim[place].CopyFrom(dim)
    others = [entry for entry in graph.output if entry.name == "domain_features"]
    del graph.output[:]
    graph.output.extend([output, *others])
    description = manifest.replace(output=OutputContract(kind="logits", domain=bool(others)))
    helper.set_model_props(model, {METADATA_KEY: description.to_json()})
    return model
