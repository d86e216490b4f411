"""Layer-precision report: what an engine's convolutions and matrix products really compute in.

Two sources. The *engine inspector* shows what was built, but needs the GPU it was built for. The
*parsed network* is strongly typed, so its tensor types bind the builder; it needs no GPU, and it is
where multiply-accumulate counts come from. Each report says which it is.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.core.precisions import BY_TENSORRT_TYPE, PRECISIONS, is_calibrated, product_precision

if TYPE_CHECKING:
    import tensorrt as trt

PARSED_NETWORK = "parsed network"
MOST_ELEMENTS = 2**31 - 1  # of a tensor
ENGINE_INSPECTOR = "engine inspector"


def report_from_network(trt: trt.Module, network: trt.INetworkDefinition, shape: Sequence[int]) -> dict[str, Any]:
    """Per-layer types of a parsed, strongly typed network, and shares per precision.

    ``trt`` is the module, ``shape`` the input shape ``[N, C, H, W]`` at which the multiply-accumulates
    of convolutions and matrix products are counted (not those inside Attention operators). A
    convolution or matrix product counts as INT8 (FP8) when both its operands arrive from a
    DequantizeLinear of INT8 (FP8) values: that is the pattern the builder fuses into an integer kernel
    (TensorRT developer guide, explicit quantisation). Otherwise it computes in its input's type.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    producers = {layer.get_output(slot).name: layer for layer in layers for slot in range(layer.num_outputs)}
    with _at_shape(network, shape):
        rows = [_row(trt, layer, producers) for layer in layers if _is_product(trt, layer)]
    return {
        "source": PARSED_NETWORK,
        **_shares(rows),
        "at_shape": list(shape),
        "tensor_types": dict(
            Counter(layer.get_output(slot).dtype.name for layer in layers for slot in range(layer.num_outputs))
        ),
        "layers": rows,
        "graph": list(_graph(trt, layers, network.get_input(0).name, rows)),
    }


def _graph(trt: Any, layers: Sequence[Any], image: str, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The layers on the image, without those on sizes, for :mod:`hpddrnet_trt.report.engine_graph`."""
    conversions = {trt.LayerType.CAST, trt.LayerType.QUANTIZE, trt.LayerType.DEQUANTIZE}
    computes, reached = {row["name"]: row["precision"] for row in rows}, {image}
    for layer in layers:
        inputs = [layer.get_input(slot) for slot in range(layer.num_inputs)]
        read = [tensor.name for tensor in inputs if tensor is not None]  # None: an optional one that is left out
        if layer.type == trt.LayerType.SHAPE or reached.isdisjoint(read):
            continue
        outputs = [layer.get_output(slot) for slot in range(layer.num_outputs)]
        reached.update(tensor.name for tensor in outputs)
        result = str(outputs[0].dtype.name)
        yield {
            "name": layer.name,
            "type": layer.type.name,
            "inputs": read,
            "outputs": [tensor.name for tensor in outputs],
            "precision": computes.get(layer.name) or BY_TENSORRT_TYPE.get(result, result.lower()),
            "conversion": layer.type in conversions,
        }


@contextmanager
def _at_shape(network: trt.INetworkDefinition, shape: Sequence[int]) -> Iterator[None]:
    """The network with its image of this shape; the library infers all shapes anew."""
    image = network.get_input(0)
    declared = tuple(image.shape)
    image.shape = tuple(shape)
    try:
        yield
    finally:
        image.shape = declared


def check_sizes(trt: trt.Module, network: trt.INetworkDefinition, shape: Sequence[int]) -> None:
    """Raise :class:`UsageError` for an image shape at which a tensor has more elements than TensorRT's kernels address.

    That is 2^31 - 1 ("Volume Limits" of its operators' documentation). BF16 scores of position attention are let pass:
    TensorRT-RTX 1.7.1 stores none of them, and builds; whether TensorRT does is its own to say.
    """
    scores = (trt.LayerType.MATRIX_MULTIPLY, trt.LayerType.SOFTMAX, trt.LayerType.SHUFFLE)
    with _at_shape(network, shape):
        for layer in (network.get_layer(index) for index in range(network.num_layers)):
            for tensor in (layer.get_output(slot) for slot in range(layer.num_outputs)):
                fused = tensor.dtype == trt.DataType.BF16 and layer.type in scores
                elements = math.prod(tensor.shape)
                if elements > MOST_ELEMENTS and not fused:
                    raise UsageError(
                        f"at {'x'.join(map(str, shape))} {layer.name} makes {elements} numbers, more than the "
                        f"{MOST_ELEMENTS} that TensorRT's kernels address; give a smaller largest batch or size"
                    )


def _is_product(trt: trt.Module, layer: trt.ILayer) -> bool:
    kinds = trt.LayerType
    return layer.type in (kinds.CONVOLUTION, kinds.DECONVOLUTION, kinds.MATRIX_MULTIPLY)


def _row(trt: trt.Module, layer: trt.ILayer, producers: dict[str, trt.ILayer]) -> dict[str, Any]:
    operands = [_operand_type(trt, layer.get_input(slot), producers) for slot in range(min(layer.num_inputs, 2))]
    kind = layer.type
    product: Any = layer
    if kind == trt.LayerType.MATRIX_MULTIPLY:
        layer.__class__ = trt.IMatrixMultiplyLayer  # the binding hands out the base class
        macs = _matrix_multiply_macs(trt, product)
    elif kind == trt.LayerType.CONVOLUTION:
        layer.__class__ = trt.IConvolutionLayer
        operands += [_weights_type(product)] if len(operands) == 1 else []
        macs = _convolution_macs(product, per_output=True)
    else:
        layer.__class__ = trt.IDeconvolutionLayer
        operands += [_weights_type(product)] if len(operands) == 1 else []
        macs = _convolution_macs(product, per_output=False)
    return {
        "name": layer.name,
        "type": kind.name,
        "operands": operands,
        "output": layer.get_output(0).dtype.name,
        "precision": product_precision([BY_TENSORRT_TYPE.get(name, name.lower()) for name in operands]),
        "macs": macs,
    }


def _operand_type(trt: trt.Module, tensor: trt.ITensor, producers: dict[str, trt.ILayer]) -> str:
    """Type name of the values behind an operand: a dequantised tensor counts as what it was before."""
    producer = producers.get(tensor.name)
    if producer is not None and producer.type == trt.LayerType.DEQUANTIZE:
        return str(producer.get_input(0).dtype.name)
    return str(tensor.dtype.name)


def _weights_type(layer: trt.IConvolutionLayer | trt.IDeconvolutionLayer) -> str:
    # A numpy array's type, or the library's own (``DataType.BF16``) where numpy has none.
    kernel: Any = layer.kernel
    name = str(kernel.dtype).rpartition(".")[2]
    return {"float32": "FLOAT", "float16": "HALF"}.get(name, name.upper())


def _convolution_macs(layer: trt.IConvolutionLayer | trt.IDeconvolutionLayer, *, per_output: bool) -> int:
    source, result = tuple(layer.get_input(0).shape), tuple(layer.get_output(0).shape)
    window = math.prod(layer.kernel_size_nd)
    if per_output:  # each output value sums kernel x (input channels of its group) products
        return math.prod(result) * window * source[1] // layer.num_groups
    return math.prod(source) * window * result[1] // layer.num_groups


def _matrix_multiply_macs(trt: trt.Module, layer: trt.IMatrixMultiplyLayer) -> int:
    left = tuple(layer.get_input(0).shape)
    inner = left[-2] if layer.op0 == trt.MatrixOperation.TRANSPOSE else left[-1]
    return math.prod(layer.get_output(0).shape) * inner


def _shares(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    convolutions: Counter[str] = Counter()
    macs: Counter[str] = Counter()
    convolution_macs: Counter[str] = Counter()
    for row in rows:
        macs[row["precision"]] += row["macs"]
        if row["type"] != "MATRIX_MULTIPLY":
            convolutions[row["precision"]] += 1
            convolution_macs[row["precision"]] += row["macs"]
    return {
        "convolutions": dict(convolutions),
        "convolution_share": _fractions(convolutions),
        "convolution_macs_share": _fractions(convolution_macs),
        "macs_share": _fractions(macs),  # convolutions and matrix products
        "macs": sum(macs.values()),
    }


def _fractions(counts: Counter[str]) -> dict[str, float]:
    total = sum(counts.values())
    return {kind: round(count / total, 6) for kind, count in counts.most_common()} if total else {}


def report_from_inspector(information: str, parsed: dict[str, Any]) -> dict[str, Any]:
    """Precision of the convolutions in a built engine.

    ``information``: the engine inspector's JSON of a build with detailed profiling verbosity
    (``Format/Datatype`` of TensorRT 10 and the split ``Format`` and ``DataType`` of TensorRT 11 are
    both read). ``parsed``: the report from the network it was built from, kept inside. Where the
    inspector shows no convolution by type (fused into opaque kernels), the parsed report is returned
    with a remark; a remark also says when it shows only some of them.
    """
    try:
        listed = json.loads(information)["Layers"]
    except (ValueError, KeyError, TypeError):
        return {**parsed, "remark": "the engine inspector gave no readable list of layers"}
    layers = [layer for layer in listed if isinstance(layer, dict)]
    kinds = [kind for kind in map(_built_precision, layers) if kind is not None]
    if not kinds:
        remark = f"the engine inspector shows {len(listed)} layers but no typed convolution"
        return {**parsed, "remark": remark}
    convolutions, total = Counter(kinds), sum(parsed["convolutions"].values())
    remark = f"the engine inspector shows {len(kinds)} of {total} convolutions by type; the others are in fused nodes"
    return {
        "source": ENGINE_INSPECTOR,
        "convolutions": dict(convolutions),
        "convolution_share": _fractions(convolutions),
        "layer_types": dict(Counter(str(layer.get("LayerType", "?")) for layer in layers)),
        "layers_in_engine": len(layers),
        "macs_share": parsed["macs_share"],
        "parsed_network": {key: value for key, value in parsed.items() if key != "graph"},
        "graph": [_listed_entry(layer) for layer in layers],
        **({"remark": remark} if len(kinds) < total else {}),
    }


def _listed_entry(layer: dict[str, Any]) -> dict[str, Any]:
    """One layer that the inspector lists, in the form of :func:`_graph`."""
    inputs, outputs = (
        [entry for entry in layer.get(side, []) if isinstance(entry, dict)] for side in ("Inputs", "Outputs")
    )
    return {
        "name": str(layer.get("Name", "")),
        "type": str(layer.get("LayerType", "?")),
        "inputs": [str(tensor.get("Name", "")) for tensor in inputs],
        "outputs": [str(tensor.get("Name", "")) for tensor in outputs],
        "precision": _built_precision(layer) or next(filter(None, map(_datatype, map(_tensor_type, outputs))), ""),
        "conversion": _reformat_name(layer) is not None,
    }


def _built_precision(layer: dict[str, Any]) -> str | None:
    """Precision of one inspector entry, None when it is no convolution or its types are not shown."""
    kind = f"{layer.get('ParameterType', '')} {layer.get('LayerType', '')}".lower()
    if "conv" not in kind:
        return None
    weights = layer.get("Weights")
    operands = [_datatype(str(weights.get("Type", "")))] if isinstance(weights, dict) else []
    operands += [_datatype(_tensor_type(entry)) for entry in layer.get("Inputs", [])[:1]]
    shown = [kind for kind in operands if kind is not None]
    return product_precision(shown) if shown else None


def _tensor_type(entry: Any) -> str:
    if not isinstance(entry, dict):
        return ""
    return " ".join(str(entry.get(key, "")) for key in ("DataType", "Datatype", "Format/Datatype", "Format"))


def _datatype(text: str) -> str | None:
    """``Thirty-two wide channel vectorized row major Int8 format`` -> ``int8``."""
    # The narrowest first: "float" is in the names of others, too.
    return next((kind for kind in reversed(PRECISIONS) if re.search(PRECISIONS[kind].shown_as, text.lower())), None)


def check_report(report: dict[str, Any], precision: str, label: str) -> None:
    """Raise :class:`UserError` when nothing in the engine computes in the precision it would be labelled with.

    Convolutions that the inspector does not show by type may be in that precision: they are no ground to refuse.
    """
    convolutions: dict[str, int] = report["convolutions"]
    all_shown = sum(convolutions.values()) >= sum(report.get("parsed_network", report)["convolutions"].values())
    if convolutions.get(precision, 0) == 0 and all_shown:
        counted = ", ".join(f"{count} in {kind.upper()}" for kind, count in convolutions.items()) or "none at all"
        raise UserError(
            f"{label} would be labelled {precision.upper()}, but none of its convolutions is ({report['source']}: "
            f"{counted}); no file was written: {_remedy(precision)}"
        )


def _remedy(precision: str) -> str:
    label = precision.upper()
    if precision == "fp32":
        return "give the FP32 ONNX file, or ask for the precision that this one has"
    if is_calibrated(precision):
        return f"calibrate the FP32 ONNX file to {label} for TensorRT again"
    return f"convert the FP32 ONNX file to {label} again, or ask for --precision fp32"


def summary(report: dict[str, Any]) -> str:
    """One line for people: ``int8 50 of 55 convolutions and 93% of all multiply-accumulates; ... (parsed network)``."""
    convolutions: dict[str, int] = report["convolutions"]
    total = sum(convolutions.values())
    parts = []
    for kind, count in sorted(convolutions.items(), key=lambda entry: -entry[1]):
        share = report["macs_share"].get(kind, 0.0)
        parts.append(f"{kind} {count} of {total} convolutions and {share:.0%} of all multiply-accumulates")
    products = {kind: share for kind, share in report["macs_share"].items() if kind not in convolutions and share > 0}
    parts += [f"{kind} {share:.0%} of all multiply-accumulates, in matrix products" for kind, share in products.items()]
    return f"{'; '.join(parts)} ({report['source']})"


def reformats_from_inspector(information: str) -> dict[str, Any]:
    """Conversion layers in a built engine: ``{layers, reformats, share, names}``.

    ``information``: the engine inspector's JSON. Its layers are objects (detailed verbosity; type
    ``Reformat``) or bare names (``Reformatting CopyNode for Input Tensor 0 to ...``). ``share`` is of
    the layers, not of time. A text that lists no layers gives zeros and a ``remark``.
    """
    try:
        listed = list(json.loads(information)["Layers"])
    except (ValueError, KeyError, TypeError):
        return {
            "layers": 0, "reformats": 0, "share": 0.0, "names": [],
            "remark": "the engine inspector gave no readable list of layers",
        }  # fmt: skip
    names = [name for name in map(_reformat_name, listed) if name is not None]
    share = round(len(names) / len(listed), 6) if listed else 0.0
    return {"layers": len(listed), "reformats": len(names), "share": share, "names": names}


def _reformat_name(layer: Any) -> str | None:
    """Name of an inspector entry that converts a tensor, else None."""
    if isinstance(layer, dict):
        name = str(layer.get("Name", ""))
        kinds: Iterable[str] = (str(layer.get(key, "")) for key in ("LayerType", "ParameterType"))
        return name if "Reformat" in kinds or name.startswith("Reformatting CopyNode") else None
    return str(layer) if str(layer).startswith("Reformatting CopyNode") else None
