"""FP8 (E4M3): explicit quantise/dequantise pairs in 8-bit floating point, for TensorRT.

E4M3 has 4 significant bits, a largest value of 448, subnormal steps of 2^-9 and no infinity; ONNX calls
it FLOAT8E4M3FN. Pairs stand where the INT8 pairs of :mod:`hpddrnet_trt.graph.qdq` stand. A scale maps
the largest magnitude to 448 (activations, one per tensor), or close below it where that rounds with less
error (weights, one per output channel, rounded anew from their FP32 values).

Which convolutions: TensorRT has no FP8 kernels for grouped convolutions and for windows of more than
32 taps (7x7), which then run slower than without pairs (TensorRT 10.13.3 release notes, Limitations:
https://docs.nvidia.com/deeplearning/tensorrt/10.13.3/getting-started/release-notes.html), and with 16
or fewer input or output channels FP8 is slower than FP16 (NVIDIA's Model Optimizer leaves these out:
https://github.com/NVIDIA/Model-Optimizer/pull/1083). :func:`suits_fp8` leaves all of these out.

Which GPUs: compute capability 8.9 and later. TensorRT-RTX *builds* FP8 convolutions, but its guide
promises FP8 for matrix products only
(https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/work-quantized-types.html).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.graph.nodes import along, copied, initializers, int_attribute, store
from hpddrnet_trt.graph.precision import half_scale

if TYPE_CHECKING:
    import onnx

E4M3_MAX = 448.0
MOST_TAPS = 32  # of a convolution's window
_SCALES_TRIED = 32  # of a channel's weights
FEWEST_CHANNELS = 17  # of input and output
_INT8_MAX = 127.0  # the magnitude that the scale of a symmetric INT8 pair maps to
_FIRST_OPSET = 19  # FP8 and FP16 scales of quantise and dequantise nodes


def suits_fp8(node: onnx.NodeProto, kernel: Sequence[int]) -> bool:
    """Whether TensorRT has a fast FP8 kernel for a convolution; ``kernel``: shape ``[out, in, height, width]``."""
    suitable = min(kernel[:2]) >= FEWEST_CHANNELS and math.prod(kernel[2:]) <= MOST_TAPS
    return suitable and int_attribute(node, "group", 1) == 1


def to_fp8(quantized: onnx.ModelProto, source: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``quantized`` (INT8 pairs of :func:`qdq.quantize`, form ``tensorrt``) with FP8 pairs instead.

    ``source`` is the FP32 graph it was made from, which holds the weights. Scales are FP16 numbers,
    so that :func:`~hpddrnet_trt.graph.precision.to_half` changes none. Raises :class:`UsageError` for an opset
    before 19 and for weights that ``source`` lacks.
    """
    from onnx import TensorProto, numpy_helper

    if any(entry.domain in ("", "ai.onnx") and entry.version < _FIRST_OPSET for entry in quantized.opset_import):
        raise UsageError(f"FP8 needs ONNX opset {_FIRST_OPSET} or later; export the network again")
    result = copied(quantized)
    weights = initializers(source.graph)
    entries = {entry.name: entry for entry in result.graph.initializer}
    done: set[str] = set()
    for node in result.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        stored, scale, zero = node.input
        if stored in entries:
            name = stored.removesuffix("_quantized")
            if name not in weights:
                raise UsageError(f"the FP32 graph holds no weights called {name!r}; give the one that was quantised")
            axis = int_attribute(node, "axis", 1)
            values = weights[name].astype(np.float32)
            steps = weight_steps(values, axis)
            store(entries[scale], steps)
            store(entries[stored], _rounded(values / along(steps, axis, values.ndim)))
        elif scale not in done:
            steps = numpy_helper.to_array(entries[scale]) * np.float32(_INT8_MAX / E4M3_MAX)
            store(entries[scale], half_scale(steps))
        done.add(scale)
        if entries[zero].data_type != TensorProto.FLOAT8E4M3FN:
            store(entries[zero], _rounded(np.zeros(list(entries[zero].dims), np.float32)))
    return result


def weight_steps(weights: npt.NDArray[np.float32], axis: int) -> npt.NDArray[np.float32]:
    """Scale of each output channel: the one with the smallest squared error, FP16 numbers as float32.

    Powers of two apart scales give the same rounding (but for subnormals), so one octave above the
    smallest admissible scale is searched. On nasa-super1 (calibrated on train with ``max``; the first 512x512
    pixels of the four images of val and test, simulated rounding) mean IoU against FP32 labels is 0.9894
    instead of 0.9879.
    """
    others = tuple(index for index in range(weights.ndim) if index != axis)
    least = np.abs(weights).max(axis=others) / np.float32(E4M3_MAX)
    best, best_error = half_scale(least), np.full(least.shape, np.inf)
    for factor in np.linspace(1, 2, _SCALES_TRIED, endpoint=False, dtype=np.float32):
        steps = half_scale(least * factor)
        scale = along(steps, axis, weights.ndim)
        error = np.square(_rounded(weights / scale).astype(np.float32) * scale - weights).sum(axis=others)
        best, best_error = np.where(error < best_error, steps, best), np.minimum(error, best_error)
    return best


def _rounded(values: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """Round to E4M3, saturating as quantise nodes do."""
    from onnx import TensorProto, helper

    dtype = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)
    return np.clip(values, -E4M3_MAX, E4M3_MAX).astype(dtype)
