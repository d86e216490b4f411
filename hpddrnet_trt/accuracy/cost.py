"""What a layer costs in each precision, in milliseconds: estimated, or measured on a GPU.

The estimate is a roofline (Williams, Waterman and Patterson, Commun. ACM 52, 2009): an operator takes
as long as its operations at the device's peak rate, or its bytes at the memory's bandwidth, whichever
is longer, plus the launch of its kernel. It ignores tactics, caches and how well a kernel fills the
device: good for ranking layers, not for predicting frames per second.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hpddrnet_trt.accuracy.candidates import QuantizationConfig
from hpddrnet_trt.core.errors import BadInputFile, UsageError
from hpddrnet_trt.core.files import existing_file
from hpddrnet_trt.core.precisions import PRECISIONS
from hpddrnet_trt.graph.nodes import consumers, producers
from hpddrnet_trt.graph.work import Work

if TYPE_CHECKING:
    import onnx

_BYTES = {name: entry.bytes for name, entry in PRECISIONS.items()}
# Fused into the convolution before them: they cost no kernel and no bytes of their own.
_EPILOGUES = ("Relu", "Add")
_POINTWISE = ("Add", "BatchNormalization", "Mul", "Relu", "Sigmoid")  # their kernels also quantise what they write


class Cost(Protocol):
    """Milliseconds per frame by the layers that are quantised."""

    @property
    def source(self) -> str:
        """Where the milliseconds come from, for people."""
        ...

    def __call__(self, quantized: Collection[str]) -> float: ...


@dataclass(frozen=True)
class Device:
    """Peak rates of one accelerator, from its vendor's data sheet, without sparsity."""

    name: str
    tera_operations: Mapping[str, float]  # per second, a multiply-accumulate counts as two
    gigabytes_per_second: float
    launch_us: float = 3.0  # of one kernel, order of magnitude

    def seconds(self, macs: float, moved: float, precision: str) -> float:
        """The roofline: what takes longer, computing so many multiply-accumulates or moving so many bytes."""
        return max(2 * macs / (self.tera_operations[precision] * 1e12), moved / (self.gigabytes_per_second * 1e9))


DEFAULT_DEVICE = "l4"
DEVICES: dict[str, Device] = {
    "l4": Device("NVIDIA L4", {"fp32": 30.3, "fp16": 121, "bf16": 121, "int8": 242.5, "fp8": 242.5}, 300),
    "agx-orin": Device("Jetson AGX Orin 64GB", {"fp32": 5.3, "fp16": 42.5, "bf16": 42.5, "int8": 85}, 204.8),
    "h200": Device("NVIDIA H200", {"fp32": 67, "fp16": 989, "bf16": 989, "int8": 1979, "fp8": 1979}, 4800),
}


@dataclass(frozen=True)
class Estimate:
    """Milliseconds per frame of a network by the layers quantised; call it with their names.

    ``model``: the FP32 graph; ``operations``: of it, at the shape the time is for.
    """

    model: onnx.ModelProto
    operations: Mapping[str, Work]
    device: Device
    precision: str = "int8"

    @property
    def source(self) -> str:
        return f"estimated for {self.device.name} from operations and bytes"

    def __call__(self, quantized: Collection[str]) -> float:
        chosen = set(quantized)
        made, readers = producers(self.model.graph), consumers(self.model.graph)
        stored_low = {node.input[0] for node in self.model.graph.node if node.name in chosen}
        total = 0.0
        for node in self.model.graph.node:
            operation = self.operations.get(node.name)
            if operation is None:
                continue
            if node.op_type in ("Conv", "MatMul"):
                total += self._product(node, operation, node.name in chosen, stored_low, readers)
            elif node.op_type not in _EPILOGUES or all(_convolution_before(name, made) is None for name in node.output):
                total += self._milliseconds(0, _BYTES["fp16"] * (operation.inputs + operation.outputs), "fp16")
        for name in stored_low:
            origin = _convolution_before(name, made)
            pointwise = origin is None and name in made and made[name].op_type in _POINTWISE
            if origin not in chosen and not pointwise:  # a kernel of its own quantises
                elements = self._elements(name, made)
                total += self._milliseconds(0, elements * (_BYTES["fp16"] + _BYTES[self.precision]), "fp16")
        return total

    def _product(
        self, node: Any, operation: Work, low: bool, stored_low: set[str], readers: Mapping[str, list[Any]]
    ) -> float:
        kind = self.precision if low else "fp16"
        result = _after_epilogue(node, readers)
        read = operation.inputs * _BYTES[self.precision if node.input[0] in stored_low else "fp16"]
        written = operation.outputs * _BYTES[self.precision if low and result in stored_low else "fp16"]
        return self._milliseconds(operation.macs, read + operation.weights * _BYTES[kind] + written, kind)

    def _elements(self, name: str, made: Mapping[str, Any]) -> int:
        node = made.get(name)
        operation = None if node is None else self.operations.get(node.name)
        return 0 if operation is None else operation.outputs

    def _milliseconds(self, macs: int, moved: float, kind: str) -> float:
        return 1e3 * self.device.seconds(macs, moved, kind) + 1e-3 * self.device.launch_us


def _convolution_before(tensor: str, made: Mapping[str, Any]) -> str | None:
    """The convolution whose kernel writes a tensor: itself, or through the additions and ReLUs fused into it."""
    node = made.get(tensor)
    while node is not None and node.op_type in _EPILOGUES:
        # Of an addition's two operands the later one is computed into the kernel.
        node = next((made[name] for name in node.input if name in made and made[name].op_type in ("Conv", "Add")), None)
    return str(node.name) if node is not None and node.op_type == "Conv" else None


def _after_epilogue(node: Any, readers: Mapping[str, list[Any]]) -> str:
    """The tensor that a convolution's kernel writes once additions and ReLUs are fused into it."""
    name = str(node.output[0])
    while len(readers[name]) == 1 and readers[name][0].op_type in _EPILOGUES:
        name = str(readers[name][0].output[0])
    return name


@dataclass(frozen=True)
class Measured:
    """Milliseconds from an engine's layer times, as ``hpddrnet-trt inspect --layer-times`` writes them.

    ``low`` and ``high``: layer times in milliseconds of the fully quantised and of the FP16 engine.
    A time belongs to every convolution named in the engine's layer (fused layers name all their parts).
    """

    low: Mapping[str, float]
    high: Mapping[str, float]
    layers: tuple[str, ...]
    device: str

    @property
    def source(self) -> str:
        return f"layer times measured on {self.device}"

    def __call__(self, quantized: Collection[str]) -> float:
        chosen = set(quantized)
        base = sum(self.low.values())
        low, high = by_convolution(self.low, self.layers), by_convolution(self.high, self.layers)
        return base + sum(high[name] - low[name] for name in self.layers if name not in chosen)


def by_convolution(times: Mapping[str, float], layers: Collection[str]) -> dict[str, float]:
    """Layer times of an engine, shared out to the convolutions that each engine layer names."""
    found = dict.fromkeys(layers, 0.0)
    patterns = {layer: re.compile(rf"(?<![\w.]){re.escape(layer)}(?!\w)") for layer in layers}
    for written, value in times.items():
        named = [layer for layer, pattern in patterns.items() if pattern.search(written)]
        for layer in named:
            found[layer] += value / len(named)
    return found


def check_device(device: str, precision: str) -> None:
    """Raise :class:`UsageError` for a device without a data sheet, or one without this precision."""
    if device not in DEVICES:
        raise UsageError(f"no data sheet of a device called {device!r} is known; choose one of: {', '.join(DEVICES)}")
    if precision not in DEVICES[device].tera_operations:
        raise UsageError(f"{DEVICES[device].name} has no {precision.upper()}; choose another device or precision")


def cost_model(
    config: QuantizationConfig,
    operations: Mapping[str, Work],
    *,
    device: str = DEFAULT_DEVICE,
    layer_times: tuple[Path, Path] | None = None,
) -> Cost:
    """The cost of a configuration's layers: estimated for a device of :data:`DEVICES`, or from files of layer times.

    Raises :class:`UsageError` for an unknown device, :class:`BadInputFile` for files that hold no layer times.
    """
    if layer_times is not None:
        (low, name), (high, _) = (_read_times(path, config.layers) for path in layer_times)
        return Measured(low, high, config.layers, name)
    check_device(device, config.precision)
    return Estimate(config.model, operations, DEVICES[device], config.precision)


def _read_times(path: Path, layers: Collection[str]) -> tuple[dict[str, float], str]:
    try:
        content = json.loads(existing_file(path, "file of layer times").read_text(encoding="utf-8"))
        times = {str(name): float(value) for name, value in content["milliseconds"].items()}
        gpu = str(content["gpu"])
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise BadInputFile(
            f"{path} holds no layer times; write it on a GPU with: hpddrnet-trt inspect ENGINE --layer-times FILE"
        ) from exc
    if not any(by_convolution(times, layers).values()):
        raise BadInputFile(f"{path} names no layer of this network; time engines built from its ONNX files")
    return times, gpu
