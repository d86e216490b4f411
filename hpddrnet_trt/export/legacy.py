"""Building with TensorRT 8.5 and 8.6, as on Jetsons with JetPack 5.1 and 6.0.

**Nothing here has run on TensorRT 8 or on a Jetson.** It follows the published interface (TensorRT 8.6
developer guide, API reference and header files) and the names in its Python module, and is tested
against a stand-in for it.

These versions know no strongly typed networks. The builder may lower every layer to the precisions
that its flags admit, so the flags must admit what the file is made for, and position attention's
scores, which do not fit into FP16, must be held in FP32 layer by layer. :func:`for_tensorrt8` writes a
file as their ONNX parser reads it:

- opset 17, the last one that it knows, where the scales of quantise and dequantise nodes are FP32;
- FP32 typing throughout, whatever the file's own: values of an FP16 (BF16) file are kept as they are, and
  the flags decide what is computed in FP16;
- weights in FP32 with a quantise node behind them, which gives the very integers that the file held:
  the form that NVIDIA's tools wrote for these versions (INT8 constants are restricted there);
- labels through FP32 on their way from integers to uint8, because these versions convert uint8 from
  and to floating point only (``DataType::kUINT8`` in NvInferRuntimeCommon.h).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hpddrnet_trt.core.errors import UsageError, UserError, require

if TYPE_CHECKING:
    import onnx

LAST_OPSET = 17
_UNTOUCHED = "hpddrnet.untouched"  # domain of nodes that the version converter is to leave alone
_LAST_IR = 8  # of ONNX 1.12, the first release with opset 17
_FLAGS: dict[str, tuple[str, ...]] = {"fp32": (), "fp16": ("FP16",), "int8": ("INT8", "FP16")}
# Tactics that need neither cuBLAS nor cuDNN: neither is to be installed for us, and 8.6 itself uses
# them for plugins only (its preview feature DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805).
_TACTICS = ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
_SHARED_PROFILES = "PROFILE_SHARING_0806"  # lets several contexts run one profile; missing in 8.5


def configure_weak_typing(trt: Any, network: Any, config: Any, precision: str) -> list[str]:
    """Flags, tactics and layer precisions for TensorRT 8; returns the names of the layers held in FP32.

    ``trt`` is the module, ``network`` the parsed network, ``config`` the builder's configuration.
    INT8 admits FP16 as well, for what is not quantised. Raises :class:`UsageError` for a precision
    that these versions do not have.
    """
    if precision not in _FLAGS:
        raise UsageError(
            f"TensorRT before 10 has no {precision.upper()}; choose one of: {', '.join(_FLAGS)}"
        )
    config.set_tactic_sources(sum(1 << int(getattr(trt.TacticSource, name)) for name in _TACTICS))
    if hasattr(trt.PreviewFeature, _SHARED_PROFILES):
        config.set_preview_feature(getattr(trt.PreviewFeature, _SHARED_PROFILES), True)
    for name in _FLAGS[precision]:
        config.set_flag(getattr(trt.BuilderFlag, name))
    if not _FLAGS[precision]:
        return []
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    held = _score_layers(trt, network)
    for layer in held:
        layer.precision = trt.DataType.FLOAT
        for slot in range(layer.num_outputs):
            layer.set_output_type(slot, trt.DataType.FLOAT)
    return [str(layer.name) for layer in held]


def _score_layers(trt: Any, network: Any) -> list[Any]:
    """Every softmax of a matrix product, the product and the arithmetic between the two."""
    kinds = trt.LayerType
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    makers = {layer.get_output(slot).name: layer for layer in layers for slot in range(layer.num_outputs)}
    moving = {kinds.SHUFFLE, kinds.IDENTITY, getattr(kinds, "CAST", kinds.IDENTITY)}  # no CAST in 8.5
    between = {kinds.ELEMENTWISE, kinds.SCALE, kinds.UNARY, *moving}
    held: list[Any] = []
    for layer in layers:
        if layer.type != kinds.SOFTMAX:
            continue
        path = [layer]
        before = makers.get(layer.get_input(0).name)
        while before is not None and before.type in between:
            path.append(before)
            before = makers.get(before.get_input(0).name)
        # A softmax of class scores has no product before it and may be lowered.
        if before is not None and before.type == kinds.MATRIX_MULTIPLY:
            held += [entry for entry in (before, *path[::-1]) if entry.type not in moving]
    return held


def for_tensorrt8(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` as TensorRT 8 reads it, computing the same but for FP16 rounding.

    Raises :class:`UserError` for what has no form there (FP8, the Attention operator, uint8
    quantisation) and for a graph that cannot be written at opset 17.
    """
    if problems := legacy_problems(model):
        raise UserError(f"it has {'; '.join(problems)}; give the FP32 file that export wrote")
    result = type(model)()
    result.CopyFrom(model)
    _to_single(result)
    result = _lower_opset(result)
    _quantise_weights(result)
    _cast_through_float(result)
    return result


def legacy_problems(model: onnx.ModelProto) -> list[str]:
    """What keeps ``model`` from :func:`for_tensorrt8`, each in words for people; empty if nothing."""
    from onnx import TensorProto

    graph = model.graph
    types = {entry.name: entry.data_type for entry in graph.initializer}
    used = {*types.values(), *_cast_types(graph)}
    pairs = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    images = {entry.name for entry in graph.input if entry.type.tensor_type.elem_type == TensorProto.UINT8}
    uncast = [node for node in graph.node if images.intersection(node.input) and node.op_type != "Cast"]
    found = [
        (bool(used & _fp8_types()), "FP8 values"),
        (
            any(types.get(name) == TensorProto.UINT8 for node in pairs for name in node.input[2:]),
            "uint8 quantisation (calibrate for TensorRT)",
        ),
        (any(node.op_type == "Attention" for node in graph.node), "the Attention operator (export MatMul)"),
        (bool(uncast), f"a uint8 input read by {', '.join(sorted({node.op_type for node in uncast}))} (only Cast may)"),
    ]
    return [text for wrong, text in found if wrong]


def _cast_types(graph: onnx.GraphProto) -> set[int]:
    return {entry.i for node in graph.node if node.op_type == "Cast" for entry in node.attribute if entry.name == "to"}


def _fp8_types() -> set[int]:
    from onnx import TensorProto

    return {value for name, value in TensorProto.DataType.items() if name.startswith("FLOAT8")}


def _to_single(model: onnx.ModelProto) -> None:
    """FP16 and BF16 typing become FP32 typing: constants, casts and outputs."""
    from onnx import AttributeProto, TensorProto, numpy_helper

    halves, single = (TensorProto.FLOAT16, TensorProto.BFLOAT16), TensorProto.FLOAT
    tensors = list(model.graph.initializer)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                tensors.append(attribute.t)
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i in halves:
                attribute.i = single
    for tensor in tensors:
        if tensor.data_type in halves:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for value in model.graph.output:
        if value.type.tensor_type.elem_type in halves:
            value.type.tensor_type.elem_type = single
    del model.graph.value_info[:]


def _lower_opset(source: onnx.ModelProto) -> onnx.ModelProto:
    onnx = require("onnx", "export", "lower a file's opset")
    from onnx import version_converter

    for node in source.graph.node:
        if node.op_type == "ReduceMean":
            # The converter keeps this attribute of opset 18. Our reductions name their axes, so it says nothing.
            kept = [entry for entry in node.attribute if entry.name != "noop_with_empty_axes"]
            del node.attribute[:]
            node.attribute.extend(kept)
    set_aside = [node for node in source.graph.node if _is_as_before_18(node)]
    for node in set_aside:
        node.domain = _UNTOUCHED
    if set_aside:
        source.opset_import.append(onnx.helper.make_opsetid(_UNTOUCHED, 1))
    try:
        result = version_converter.convert_version(source, LAST_OPSET)
        _remove_domain(result, _UNTOUCHED)
        onnx.checker.check_model(result, full_check=True)
    except (RuntimeError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
        raise UserError(f"it cannot be written at opset {LAST_OPSET}: {' '.join(str(exc).split())}") from exc
    result.ir_version = _LAST_IR
    del result.metadata_props[:]
    result.metadata_props.extend(source.metadata_props)
    return result


def _is_as_before_18(node: onnx.NodeProto) -> bool:
    """Whether a Pad or Split means the same since opset 13: the version converter knows no way back for these two.

    Pad has had an input for axes since 18, Split a number of outputs, which must be with us where sizes are
    not given: channels into equal parts. That attribute is dropped.
    """
    if node.op_type == "Split":
        kept = [entry for entry in node.attribute if entry.name != "num_outputs"]
        _replace(node.attribute, kept)
        return True
    return node.op_type == "Pad" and len(node.input) <= 3


def _remove_domain(model: onnx.ModelProto, domain: str) -> None:
    """Nodes of ``domain`` become ONNX's own again."""
    for node in model.graph.node:
        if node.domain == domain:
            node.domain = ""
    kept = [entry for entry in model.opset_import if entry.domain != domain]
    _replace(model.opset_import, kept)


def _quantise_weights(model: onnx.ModelProto) -> None:
    """INT8 constants become FP32 ones with a quantise node in front of their dequantise node."""
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    constants = {entry.name: entry for entry in graph.initializer}
    nodes = []
    for node in graph.node:
        weights = constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if weights is not None and weights.data_type == TensorProto.INT8:
            integers = numpy_helper.to_array(weights)
            scale = numpy_helper.to_array(constants[node.input[1]])
            axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1)
            per_channel = [-1 if place == axis else 1 for place in range(integers.ndim)]
            wide = scale.reshape(per_channel if scale.ndim else ())
            name = f"{weights.name}_float"
            graph.initializer.append(numpy_helper.from_array((integers * wide).astype(np.float32), name))
            quantised = f"{weights.name}_quantised"
            entry = helper.make_node(
                "QuantizeLinear", [name, *node.input[1:]], [quantised], name=f"{node.name}_quantise"
            )
            entry.attribute.extend(node.attribute)
            nodes.append(entry)
            node.input[0] = quantised
        nodes.append(node)
    used = {name for node in nodes for name in node.input}
    kept = [entry for entry in graph.initializer if entry.name in used]
    _replace(graph.node, nodes)
    _replace(graph.initializer, kept)


def _cast_through_float(model: onnx.ModelProto) -> None:
    """A cast to uint8 gets one to FP32 in front: the source may hold integers."""
    from onnx import TensorProto, helper

    nodes = []
    for node in model.graph.node:
        if node.op_type == "Cast" and any(entry.i == TensorProto.UINT8 for entry in node.attribute):
            between = f"{node.output[0]}_float"
            nodes.append(
                helper.make_node("Cast", [node.input[0]], [between], name=f"{node.name}_float", to=TensorProto.FLOAT)
            )
            node.input[0] = between
        nodes.append(node)
    _replace(model.graph.node, nodes)


def _replace(field: Any, entries: list[Any]) -> None:
    """Fill a repeated field anew, also from its own entries."""
    copies = [type(entry).FromString(entry.SerializeToString()) for entry in entries]
    del field[:]
    field.extend(copies)
