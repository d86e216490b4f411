"""The precisions that a model can be in: the one table that everything else reads.

A new precision is an entry here; the graph passes that make it (:mod:`hpddrnet_trt.graph`) and the peak rates
of devices (:mod:`hpddrnet_trt.accuracy.cost`) are all that must know more about it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Half = Literal["fp16", "bf16"]  # types that a whole graph is given
LowPrecision = Literal["int8", "fp8"]  # what pairs of quantize and dequantize nodes quantize to
Precision = Literal["fp32", Half, LowPrecision]


@dataclass(frozen=True)
class PrecisionInfo:
    """What is known of one precision.

    ``least_compute_capability``: the oldest GPUs that TensorRT and TensorRT-RTX build it for.
    """

    bits: int  # of a stored value
    onnx_types: tuple[str, ...]  # names of ``onnx.TensorProto.DataType``
    tensorrt_type: str  # name of ``tensorrt.DataType``
    shown_as: str  # regular expression for what TensorRT's engine inspector calls it, in lower case
    calibrated: bool = False  # ranges of activations are needed, and pairs of nodes show where it is used
    cpu_kernels: bool = False  # ONNX Runtime computes in it on a CPU
    least_compute_capability: str = "7.5"

    @property
    def bytes(self) -> float:
        """Bytes of a stored value."""
        return self.bits / 8


PRECISIONS: dict[str, PrecisionInfo] = {
    "fp32": PrecisionInfo(32, ("FLOAT",), "FLOAT", "fp32|float", cpu_kernels=True),
    "fp16": PrecisionInfo(16, ("FLOAT16",), "HALF", "fp16|half|float16"),
    "bf16": PrecisionInfo(16, ("BFLOAT16",), "BF16", "bf16|bfloat16", least_compute_capability="8.0"),
    "int8": PrecisionInfo(8, ("INT8", "UINT8"), "INT8", r"int8|\bi8\b", calibrated=True, cpu_kernels=True),
    "fp8": PrecisionInfo(
        8, ("FLOAT8E4M3FN",), "FP8", "fp8|e4m3", calibrated=True, least_compute_capability="8.9"
    ),
}

BY_ONNX_TYPE: Mapping[str, str] = {kind: name for name, entry in PRECISIONS.items() for kind in entry.onnx_types}
BY_TENSORRT_TYPE: Mapping[str, str] = {entry.tensorrt_type: name for name, entry in PRECISIONS.items()}


def is_calibrated(precision: str | None) -> bool:
    """Whether a precision comes from calibration; False where none is given or it is another library's type."""
    return precision is not None and precision in PRECISIONS and PRECISIONS[precision].calibrated


def product_precision(operands: Sequence[str]) -> str:
    """What a product of such operands computes in: low precision only if all are, else the type of the one that is not.

    That is when a builder fuses the dequantize nodes of both into a kernel of low precision (TensorRT developer
    guide, explicit quantization).
    """
    return next((kind for kind in operands if not is_calibrated(kind)), operands[0])
