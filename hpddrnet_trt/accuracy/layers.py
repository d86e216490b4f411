"""Two ONNX files of one network, tensor by tensor: where does the lower precision go wrong?

A short use of Polygraphy's Python interface, which runs both files with every tensor that they share marked as an
output. A tensor's error is the RMS of the difference over the RMS of A's values, by Polygraphy's signal-to-noise
ratio; it holds what was inherited from the tensors before as well as what its own layer adds. With ``tensorrt`` B runs
on TensorRT instead of ONNX Runtime (TensorRT-RTX where the variable ``POLYGRAPHY_USE_TENSORRT_RTX`` is 1); fewer
layers are fused then than in the engine that is used, because every tensor leaves it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import UsageError, UserError, one_line, require
from hpddrnet_trt.core.manifest import InputContract, Manifest
from hpddrnet_trt.core.runtimes import onnxruntime_errors, session
from hpddrnet_trt.core.text import percent
from hpddrnet_trt.data.intensity import range_of
from hpddrnet_trt.engines.base import input_contract
from hpddrnet_trt.export import images as micrographs
from hpddrnet_trt.graph.attention import expanded
from hpddrnet_trt.graph.layers import block_of, short
from hpddrnet_trt.graph.model import load_model
from hpddrnet_trt.graph.rounding import RUNTIME_REMARK, simulate_rounding, uses_half
from hpddrnet_trt.weights import locate

if TYPE_CHECKING:
    import onnx

LIMIT = 0.1  # relative error: a sound INT8 convolution of nasa-super1 adds 0.1 to 9 %, one with a wrong scale far more
IMAGES = 4
_SHOWN = 10


@dataclass(frozen=True)
class LayerError:
    """One layer of B: ``error`` is relative to the RMS of A's values, of the crop where it is largest."""

    name: str
    operator: str
    block: str
    tensor: str
    error: float


@dataclass(frozen=True)
class LayerComparison:
    """Errors of the layers that both files have, in the order of B's graph."""

    a: str
    b: str
    runtime: str
    crops: str
    limit: float
    layers: tuple[LayerError, ...]

    @property
    def first(self) -> LayerError | None:
        """The first layer that goes wrong: its error is above the limit, or no number."""
        return next((layer for layer in self.layers if not layer.error <= self.limit), None)

    def record(self) -> dict[str, Any]:
        """The same for JSON."""
        return {**asdict(self), "first": None if self.first is None else self.first.name}

    def text(self) -> str:
        """For people: the first layer that goes wrong, the worst ones, and the way the error takes."""
        largest = max(self.layers, key=lambda layer: layer.error)
        verdict = (
            f"no layer goes wrong: the largest error is {percent(largest.error)}, of {short(largest.name)} "
            f"(limit {percent(self.limit)})"
            if self.first is None
            else f"first layer that goes wrong: {self.first.name} ({self.first.operator}, tensor {self.first.tensor}): "
            f"its values are off by {percent(self.first.error)} of their RMS (limit {percent(self.limit)})"
        )
        worst = sorted(self.layers, key=lambda layer: -layer.error)[:_SHOWN]
        blocks = {layer.block: layer for layer in self.layers}  # the last layer of each
        return "\n".join([
            f"A: {self.a}\nB: {self.b}\n{self.crops}; {self.runtime}\n",
            f"{verdict}\n\nlargest errors",
            *(f"  {percent(layer.error):>10}  {short(layer.name)} ({layer.operator})" for layer in worst),
            "\nerror at the end of each block",
            *(f"  {percent(layer.error):>10}  {name}" for name, layer in blocks.items()),
        ])  # fmt: skip


def compare_layers(
    a: str | Path, b: str | Path, images: Sequence[Path], *, tensorrt: bool = False
) -> LayerComparison:
    """Run ONNX file ``b`` beside the reference ``a`` on micrographs and compare every tensor that both have.

    ``images``: at most :data:`IMAGES` of them are used, a crop each, as large as the images where the files are
    dynamic. A layer counts as wrong above :data:`LIMIT`.
    ``tensorrt``: run B on this machine's GPU, with its own types; otherwise what is FP16, BF16 or FP8 in a file is
    rounded so by arithmetic (:mod:`hpddrnet_trt.graph.rounding`).

    Raises :class:`MissingDependency` without Polygraphy, :class:`UsageError` for files that are no ONNX files, take
    different inputs or share no tensor, :class:`UserError` where a runtime fails.
    """
    if not images:
        raise UsageError("no micrograph was given to compare on; give a dataset, a folder or files")
    paths = [locate(a, ".onnx"), locate(b, ".onnx")]
    if wrong := next((path for path in paths if path.suffix.lower() != ".onnx"), None):
        raise UsageError(f"layers of ONNX files are compared, and {wrong} is none; export it, or compare labels")
    loaded = [load_model(path) for path in paths]
    manifest, contract = _shared_input(paths, [manifest for _, manifest in loaded])
    chosen = micrographs.choose_images(images, IMAGES)
    height, width = micrographs.crop_size(contract, None, chosen)
    crops = micrographs.plan_crops(
        chosen, height, width, len(chosen), intensity_range=range_of(manifest.intensity), read_at_m=manifest.read_at_m
    )
    models = [expanded(model) if model.functions else model for model, _ in loaded]
    tensors = _shared_tensors(models, paths)
    feeds = list(micrographs.batches(crops, height, width, contract, manifest.normalization))
    errors = _errors(models, list(tensors), feeds, tensorrt=tensorrt)
    simulated = any(uses_half(model) for model in (models[:1] if tensorrt else models))
    return LayerComparison(
        a=_described(paths[0], loaded[0][1]),
        b=_described(paths[1], loaded[1][1]),
        runtime=f"B on {'TensorRT' if tensorrt else 'ONNX Runtime'}{f', {RUNTIME_REMARK}' if simulated else ''}",
        crops=f"{len(crops)} crop{'s' * (len(crops) > 1)} of {height}x{width}",
        limit=LIMIT,
        layers=tuple(
            LayerError(node.name, node.op_type, block_of(node.name), name, errors[name])
            for name, node in tensors.items()
            if name in errors
        ),
    )


def _described(path: Path, manifest: Manifest) -> str:
    runtime = f" for {manifest.quantized_for}" if manifest.quantized_for else ""
    return f"{path} ({manifest.precision or 'fp32'}{runtime})"


def _shared_input(paths: Sequence[Path], manifests: Sequence[Manifest]) -> tuple[Manifest, InputContract]:
    """What both files take, by B's contract, which may be the narrower one."""
    first, second = (input_contract(manifest) for manifest in manifests)
    axes = [(getattr(first, name), getattr(second, name)) for name in ("batch", "height", "width")]
    if (first.dtype, first.channels) != (second.dtype, second.channels) or not all(
        wide.admits(narrow.minimum) and (wide.fixed is None or wide.fixed == narrow.fixed) for wide, narrow in axes
    ):
        raise UsageError(
            f"{paths[0]} and {paths[1]} do not take the same input; export one of them again, with the other's size "
            "or without a fixed one"
        )
    return manifests[1], second


def _shared_tensors(models: Sequence[onnx.ModelProto], paths: Sequence[Path]) -> dict[str, onnx.NodeProto]:
    """Tensors that nodes of both graphs write, in B's order, each with its node in B."""
    written = {name for node in models[0].graph.node for name in node.output}
    shared = {name: node for node in models[1].graph.node for name in node.output if name and name in written}
    if not shared:
        raise UsageError(
            f"{paths[0]} and {paths[1]} have no tensor in common: they are not exports of one network by this package; "
            "export both again from their checkpoint"
        )
    return shared


def _errors(
    models: Sequence[onnx.ModelProto], names: list[str], feeds: Sequence[npt.NDArray[Any]], *, tensorrt: bool
) -> dict[str, float]:
    """Relative error of every tensor that holds numbers, of the input where it is largest."""
    purpose = "compare layers"
    comparator = require("polygraphy.comparator", "polygraphy", purpose)
    logger = require("polygraphy.logger", "polygraphy", purpose).G_LOGGER
    failures = (*onnxruntime_errors(), require("polygraphy.exception", "polygraphy", purpose).PolygraphyException)
    errors: dict[str, float] = {}

    def measure(first: Any, second: Any) -> dict[str, bool]:
        """Signal-to-noise ratios of one input, by Polygraphy's own function, as errors; NaN counts as infinite."""
        kept = [name for name in first if np.issubdtype(first[name].dtype, np.floating)]  # no shapes, masks or labels
        pair = [  # position attention has one axis more in typed files, of its one head
            comparator.IterationResult({name: np.squeeze(result[name]) for name in kept}, result.runner_name)
            for result in (first, second)
        ]
        compared = comparator.SnrCompareFunc(snr_threshold=0)(*pair)
        for name, result in compared.items():
            snr = float(getattr(result, "snr", np.nan))  # a plain False where shapes differ
            error = 0.0 if snr == math.inf else 10 ** (-snr / 20) if not math.isnan(snr) else math.inf
            errors[name] = max(errors.get(name, 0.0), error)
        return dict.fromkeys(compared, True)

    with logger.verbosity(logger.CRITICAL):
        try:
            runners = [
                _onnxruntime(models[0], names, "A"),
                _tensorrt(models[1], names, feeds[0].shape) if tensorrt else _onnxruntime(models[1], names, "B"),
            ]
            run = comparator.Comparator.run(runners, [{"image": feed} for feed in feeds], streaming=True)
            comparator.Comparator.compare_accuracy(run, compare_func=measure)
        except failures as exc:
            raise UserError(f"the layers could not be compared ({one_line(exc, 'last')}); compare labels") from exc
    return errors


def _onnxruntime(model: onnx.ModelProto, names: list[str], name: str) -> Any:
    """A runner on ONNX Runtime's CPU kernels, each operator by itself."""
    polygraphy = require("polygraphy.backend.onnx", "polygraphy", "compare layers")
    runner = require("polygraphy.backend.onnxrt", "polygraphy", "compare layers").OnnxrtRunner
    marked = polygraphy.modify_outputs(simulate_rounding(model) if uses_half(model) else model, outputs=names)
    plain = {"graph_optimization_level": "ORT_DISABLE_ALL"}
    return runner(session(marked, "compare layers", settings=plain), name=name)


def _tensorrt(model: onnx.ModelProto, names: list[str], shape: tuple[int, ...]) -> Any:
    """A runner on TensorRT, built when it starts; not run where this was written, which had no GPU."""
    trt = require("polygraphy.backend.trt", "polygraphy", "compare layers on TensorRT")
    network = trt.NetworkFromOnnxBytes(model.SerializeToString(), strongly_typed=True)
    config = trt.CreateConfig(profiles=[trt.Profile().add("image", shape, shape, shape)])
    marked = trt.ModifyNetworkOutputs(network, outputs=names)
    return trt.TrtRunner(trt.EngineFromNetwork(marked, config=config), name="B")
