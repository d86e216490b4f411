"""Building with TensorRT before 10: TensorRT 8.5 and 8.6, as on Jetsons with JetPack 5.1 and 6.0.

**Nothing here has run on TensorRT 8 or on a Jetson.** It follows the published interface (TensorRT 8.6
developer guide and Python API reference) and is tested against a stand-in for it.

These versions know no strongly typed networks. The builder may lower every layer to the precisions
that its flags admit, so the flags must admit what the file is made for, and position attention's
scores, which do not fit into FP16, must be held in FP32 layer by layer. Their ONNX parser ends at
opset 17, where the scales of quantise and dequantise nodes are FP32.

An INT8 file for them is therefore calibrated with ``half=False`` (FP32 scales; the builder chooses
FP16 for the rest by itself) and taken through :func:`lower_opset`. An FP16 file is needless: give the
FP32 file, lowered, with precision ``fp16``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hpddrnet_trt.errors import UsageError, UserError, require

if TYPE_CHECKING:
    import onnx

LAST_OPSET = 17
_LAST_IR = 8  # of ONNX 1.12, the first release with opset 17
_STRONG_TYPING = 10  # first major version with strongly typed networks
_FLAGS: dict[str, tuple[str, ...]] = {"fp32": (), "fp16": ("FP16",), "int8": ("INT8", "FP16")}


def needs_weak_typing(version: str) -> bool:
    """Whether a TensorRT version, like ``8.6.1``, has no strongly typed networks."""
    return int(version.split(".")[0]) < _STRONG_TYPING


def creation_flags(trt: Any, version: str) -> int:
    """Argument of ``create_network``: explicit batch before version 10, strong typing since."""
    kinds = trt.NetworkDefinitionCreationFlag
    return 1 << int(kinds.EXPLICIT_BATCH if needs_weak_typing(version) else kinds.STRONGLY_TYPED)


def configure_weak_typing(trt: Any, network: Any, config: Any, precision: str) -> list[str]:
    """Flags and layer precisions for a weakly typed build; returns the names of the layers held in FP32.

    ``trt`` is the module, ``network`` the parsed network, ``config`` the builder's configuration.
    INT8 admits FP16 as well, for what is not quantised. Raises :class:`UsageError` for a precision
    that these versions do not have.
    """
    if precision not in _FLAGS:
        raise UsageError(
            f"TensorRT before {_STRONG_TYPING} has no {precision.upper()}; choose one of: {', '.join(_FLAGS)}"
        )
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
    between = {kinds.ELEMENTWISE, kinds.SCALE, kinds.UNARY, kinds.SHUFFLE, kinds.CAST, kinds.IDENTITY}
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
            held += [entry for entry in (before, *path[::-1]) if entry.type not in (kinds.SHUFFLE, kinds.CAST)]
    return held


def legacy_problems(model: onnx.ModelProto, *, any_opset: bool = False) -> list[str]:
    """What TensorRT 8.5 and 8.6 cannot parse in ``model``, each in words for people; empty if nothing.

    Integer and floating-point types, the opset (unless ``any_opset``), scales and the uint8 image, which
    may only be cast.
    """
    from onnx import TensorProto

    graph = model.graph
    types = {entry.name: entry.data_type for entry in graph.initializer}
    used = {*types.values(), *_cast_types(graph)}
    pairs = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    images = {entry.name for entry in graph.input if entry.type.tensor_type.elem_type == TensorProto.UINT8}
    uncast = [node for node in graph.node if images.intersection(node.input) and node.op_type != "Cast"]
    found = [
        (opset > LAST_OPSET and not any_opset, f"opset {opset} (at most {LAST_OPSET})"),
        (TensorProto.BFLOAT16 in used, "BF16 values"),
        (bool(used & _fp8_types()), "FP8 values"),
        (
            any(types.get(node.input[1]) == TensorProto.FLOAT16 for node in pairs),
            "FP16 scales (calibrate with FP32 typing)",
        ),
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


def lower_opset(model: onnx.ModelProto, opset: int = LAST_OPSET) -> onnx.ModelProto:
    """A copy of ``model`` at an older opset, computing the same.

    Raises :class:`UserError` for a graph with operators or types that the older opset lacks (FP16 scales).
    """
    onnx = require("onnx", "export", "lower a file's opset")
    from onnx import version_converter

    source = onnx.ModelProto()
    source.CopyFrom(model)
    for node in source.graph.node:
        if node.op_type == "ReduceMean":
            # The converter keeps this attribute of opset 18. Our reductions name their axes, so it says nothing.
            kept = [entry for entry in node.attribute if entry.name != "noop_with_empty_axes"]
            del node.attribute[:]
            node.attribute.extend(kept)
    del source.graph.value_info[:]
    try:
        result = version_converter.convert_version(source, opset)
        onnx.checker.check_model(result, full_check=True)
    except (RuntimeError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
        raise UserError(f"the graph cannot be written at opset {opset}: {' '.join(str(exc).split())}") from exc
    result.ir_version = _LAST_IR
    del result.metadata_props[:]
    result.metadata_props.extend(model.metadata_props)
    return result
