"""Two files of one model, side by side: where do they differ, and which layer is the reason?

ONNX files are compared activation by activation, see :mod:`.comparison_layers`; a checkpoint is
exported first. A TensorRT engine shows its labels only.

A layer's error is the RMS of the difference over the RMS of A's values. What a layer *makes by itself*
is measured, not guessed from the growth of the error: B's layer runs on A's activations. The difference
matters: position attention's softmax multiplies an INT8 network's error by 6 to 13 without making any
(nasa-super1, calibrated with ``max`` and ``entropy``, 4 crops of 512x512 from val and test).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from hpddrnet_trt.accuracy.comparison import NEAR, Comparison, LabelAgreement, LayerError
from hpddrnet_trt.accuracy.comparison_layers import (
    Layer,
    Probe,
    Sums,
    constant_errors,
    match_layers,
    nearest_layer,
    quantiser_spans,
    ratio,
)
from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.manifest import AxisRange, InputContract, Manifest, read_manifest
from hpddrnet_trt.core.metrics import LabelComparison
from hpddrnet_trt.engines import load_engine
from hpddrnet_trt.engines.base import to_prediction
from hpddrnet_trt.export import images as micrographs
from hpddrnet_trt.graph.layers import block_of
from hpddrnet_trt.graph.model import load_model
from hpddrnet_trt.graph.rounding import RUNTIME_REMARK, simulate_rounding, uses_half
from hpddrnet_trt.weights import locate

if TYPE_CHECKING:
    import onnx

# A sound INT8 convolution makes 0.1 to 9 % by itself (nasa-super1, as above), one with a wrong scale far more.
LIMIT = 0.1
IMAGES = 8
Array = npt.NDArray[Any]
Labels = npt.NDArray[np.uint8]


def compare(
    a: str | Path,
    b: str | Path,
    images: Sequence[Path],
    *,
    limit: float = LIMIT,
    max_images: int = IMAGES,
    size: tuple[int, int] | None = None,
    layers: bool = True,
) -> Comparison:
    """Run model ``b`` beside the reference ``a`` on micrographs and find out where they differ.

    Both are model files of this package or names of models that come with it: ``.onnx``, a checkpoint,
    or ``.engine`` (labels only; needs its GPU). ``images``: at most ``max_images`` of them are used,
    chosen to span the grey levels, one crop each, more of fewer than eight. ``size``: height and width
    in pixels of the crops where both models are dynamic (the images' own by default, 1024 at most).
    ``limit``: the error, as a fraction of a layer's RMS, above which a layer counts as diverging when it
    makes it by itself.
    ``layers=False`` compares labels only, each file on the runtime that users run it on.

    Raises :class:`UsageError` for models of different classes, without a common input size or without a
    common activation, :class:`BadInputFile` for unreadable files, :class:`UserError` where a runtime fails.
    """
    if not images:
        raise UsageError("no micrograph was given to compare on; give a dataset, a folder or files")
    if not limit > 0 or max_images < 1:
        raise UsageError(f"the limit must be positive and at least one image used, got {limit} and {max_images}")
    paths = locate(a), locate(b)
    manifests = read_manifest(paths[0]), read_manifest(paths[1])
    _check_classes(paths, manifests)
    with tempfile.TemporaryDirectory(prefix="hpddrnet-trt-") as folder:
        engine = next((path for path in paths if path.suffix.lower() == ".engine"), None)
        inside = layers and engine is None
        remarks: list[str] = []
        if inside:
            files = [
                path if path.suffix.lower() == ".onnx" else _exported(path, other, Path(folder), images, remarks)
                for path, other in zip(paths, reversed(manifests), strict=True)
            ]
            models, manifests = _loaded(files, remarks)
        data = _Data(paths, manifests, images, max_images, size)
        tally = _Tally(manifests[0].class_names)
        found: list[LayerError] = []
        scores = None
        if inside:
            found, scores = _compare_layers(models, paths, data, tally)
            runtime = f"onnxruntime {version('onnxruntime')} (CPU), graph optimisations off"
        else:
            runtime = _compare_labels(paths, data, tally)
            remarks += [_engine_remark(engine, data)] if engine else []
    described = [f"{path} ({_precision(manifest)})" for path, manifest in zip(paths, manifests, strict=True)]
    return Comparison(
        a=described[0],
        b=described[1],
        layers=found,
        scores=scores,
        labels=tally.result(),
        crops=data.described,
        limit=limit,
        runtime=runtime,
        remarks=remarks,
    )


def _precision(manifest: Manifest) -> str:
    form = f" for {manifest.quantized_for}" if manifest.quantized_for else ""
    return f"{manifest.precision or 'fp32'}{form}"


def _check_classes(paths: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    first, second = (manifest.class_names for manifest in manifests)
    if first != second:
        raise UsageError(
            f"{paths[0]} has the classes {', '.join(first)} and {paths[1]} has {', '.join(second)}: "
            "give two files of the same model"
        )


# ------------------------------------------------------------------------------- models


def _exported(
    checkpoint: Path, other: Manifest, folder: Path, images: Sequence[Path], remarks: list[str]
) -> Path:
    """The checkpoint as FP32 ONNX file of the form that the other model has."""
    from hpddrnet_trt.export.onnx import export_onnx

    target = folder / f"{len(remarks)}.onnx"  # both models may be checkpoints of one name
    contract, output = other.input or InputContract(), other.output
    made = export_onnx(
        checkpoint,
        target,
        batch=contract.batch.fixed,
        height=contract.height.fixed,
        width=contract.width.fixed,
        attention=other.attention if other.attention in ("attention-op", "function") else "matmul",
        output=output.kind if output else "labels",
        grey_input=contract.dtype == "uint8",
        images=images,
    )
    parity = made.validation[-1].values["agreement"]
    remarks.append(
        f"{checkpoint} was exported to ONNX for this; the export's labels equal PyTorch's on {parity:.4%} of the pixels"
    )
    if other.checkpoint_sha256 not in (None, made.checkpoint_sha256):
        remarks.append(f"the other model was not made from {checkpoint}: its checksum of the checkpoint differs")
    return target


def _loaded(
    files: Sequence[Path], remarks: list[str]
) -> tuple[tuple[onnx.ModelProto, onnx.ModelProto], tuple[Manifest, Manifest]]:
    """The graphs typed FP32, other types simulated."""
    models, manifests = [], []
    for path, letter in zip(files, "AB", strict=True):
        model, manifest = load_model(path)
        if uses_half(model):
            remarks.append(
                f"{letter} computes in 16 or 8 bit floating point, which ONNX Runtime's CPU kernels do not show: "
                f"{RUNTIME_REMARK}. TensorRT rounds less often where it fuses layers"
            )
            model = simulate_rounding(model)
        models.append(model)
        manifests.append(manifest)
    return (models[0], models[1]), (manifests[0], manifests[1])


# --------------------------------------------------------------------------------- data


class _Data:
    """The crops, as each of the two models takes them."""

    def __init__(
        self,
        paths: Sequence[Path],
        manifests: tuple[Manifest, Manifest],
        images: Sequence[Path],
        max_images: int,
        size: tuple[int, int] | None,
    ) -> None:
        self.manifests = manifests
        given = [manifest.input or InputContract() for manifest in manifests]
        shared = {
            name: _overlap(name, getattr(given[0], name), getattr(given[1], name), paths)
            for name in ("batch", "height", "width")
        }
        multiple = math.lcm(given[0].multiple, given[1].multiple)
        self.contracts = [contract.model_copy(update={**shared, "multiple": multiple}) for contract in given]
        self.height, self.width = micrographs.crop_size(self.contracts[0], size, images)
        self.batch = shared["batch"].minimum
        chosen = micrographs.choose_images(images, max_images)
        self.crops = micrographs.plan_crops(chosen, self.height, self.width, IMAGES)
        self.described = (
            f"{len(self.crops)} crop{'s' * (len(self.crops) > 1)} of {self.height}x{self.width} from {len(chosen)} "
            f"micrograph{'s' * (len(chosen) > 1)}"
        )

    def batches(self) -> Iterator[tuple[Array, Array]]:
        """Pairs of inputs of the same crops."""
        feeds = [
            micrographs.batches(self.crops, self.height, self.width, contract, manifest.normalization)
            for contract, manifest in zip(self.contracts, self.manifests, strict=True)
        ]
        total = -(-len(self.crops) // self.batch)
        yield from tqdm(zip(*feeds, strict=True), total=total, desc="comparing", unit="batch")

    def crop(self, number: int) -> str:
        """Where a crop is, for people; crops are counted through all batches."""
        crop = self.crops[number % len(self.crops)]
        return f"{crop.image.name} (crop at row {crop.top}, column {crop.left})"


def _overlap(name: str, first: AxisRange, second: AxisRange, paths: Sequence[Path]) -> AxisRange:
    ends = [end for end in (first.maximum, second.maximum) if end is not None]
    low, high = max(first.minimum, second.minimum), min(ends, default=None)
    if high is not None and low > high:
        raise UsageError(
            f"{paths[0]} takes a {name} of {first} and {paths[1]} of {second}: nothing fits both; "
            "export one of them again with the other's size, or without a fixed one"
        )
    return AxisRange(minimum=low, maximum=high)


# ------------------------------------------------------------------------------- labels


class _Tally:
    """Labels of two models, added up."""

    def __init__(self, class_names: list[str]) -> None:
        self._names = class_names
        self._matrix = LabelComparison(len(class_names))
        self._worst = 1.0
        self._differing = self._near = 0

    def add(self, reference: Labels, labels: Labels) -> None:
        """Two label maps ``[N, H, W]``."""
        self._matrix.update(labels, reference)
        different = reference != labels
        self._worst = min(self._worst, float(1 - different.mean(axis=(1, 2)).max()))
        self._differing += int(different.sum())
        self._near += int((different & near_border(reference)).sum())

    def result(self) -> LabelAgreement:
        share = self._near / self._differing if self._differing else math.nan
        return LabelAgreement(self._names, self._matrix.counts, self._worst, share)


def near_border(labels: Labels) -> npt.NDArray[np.bool_]:
    """Pixels of label maps ``[N, H, W]`` with another class within ``NEAR`` pixels (a square around them)."""
    low, high = labels.copy(), labels.copy()
    for axis in (1, 2):
        for values, combine in ((low, np.minimum), (high, np.maximum)):
            source = values.copy()
            for step in range(1, NEAR + 1):
                front = tuple(slice(None, -step) if other == axis else slice(None) for other in range(3))
                back = tuple(slice(step, None) if other == axis else slice(None) for other in range(3))
                values[front] = combine(values[front], source[back])
                values[back] = combine(values[back], source[front])
    different: npt.NDArray[np.bool_] = low != high
    return different


def _compare_labels(paths: Sequence[Path], data: _Data, tally: _Tally) -> str:
    """Both models on their own runtimes; returns those."""
    with ExitStack() as stack:
        engines = [
            stack.enter_context(
                load_engine(path, **({} if path.suffix.lower() != ".safetensors" else {"input_dtype": contract.dtype}))
            )
            for path, contract in zip(paths, data.contracts, strict=True)
        ]
        for pair in data.batches():
            first, second = (engine.infer(image).labels for engine, image in zip(engines, pair, strict=True))
            tally.add(first, second)
        return "; ".join(f"{letter}: {engine.runtime}" for letter, engine in zip("AB", engines, strict=True))


def polygraphy_command(model: str | Path, height: int, width: int, *, batch: int = 1, channels: int = 1) -> str:
    """The command that shows a TensorRT engine's inner tensors beside ONNX Runtime's, on a GPU.

    It builds another engine from the ONNX file ``model``, with every tensor an output. Fewer layers are
    fused then than in the engine that is used. Needs Polygraphy 0.53 or later (older ones call ``'*'``
    ``mark all``) and TensorRT; for TensorRT-RTX set the variable ``POLYGRAPHY_USE_TENSORRT_RTX=1``.
    """
    shape = f"image:[{batch},{channels},{height},{width}]"
    shapes = " ".join(f"--trt-{name}-shapes {shape}" for name in ("min", "opt", "max"))
    return (
        f"polygraphy run {model} --trt --onnxrt --strongly-typed --trt-outputs '*' --onnx-outputs '*' {shapes} "
        f"--input-shapes {shape} --val-range image:[0,255] --check-error-stat median"
    )


def _engine_remark(engine: Path, data: _Data) -> str:
    command = polygraphy_command(
        "MODEL.onnx", data.height, data.width, batch=data.batch, channels=data.contracts[0].channels
    )
    return (
        f"only labels were compared: the layers of {engine} cannot be read, they are fused. Compare the ONNX file it "
        "was built from instead, whose rounding is simulated; or, on a machine with its GPU, see TensorRT's tensors "
        f"with: {command}"
    )


# ------------------------------------------------------------------------------- layers


def _compare_layers(
    models: tuple[onnx.ModelProto, onnx.ModelProto], paths: Sequence[Path], data: _Data, tally: _Tally
) -> tuple[list[LayerError], LayerError | None]:
    """Errors of the layers, and those of the class scores."""
    layers = match_layers(*models)
    if not layers:
        raise UsageError(
            f"{paths[0]} and {paths[1]} have no activation in common (by tensor and node names): they are not exports "
            "of one network by this package; export both again from their checkpoints"
        )
    probe = Probe(*models, layers)
    for first, second in data.batches():
        outputs = probe.run(first, second)
        tally.add(*(to_prediction(found).labels for found in outputs))
    constants = constant_errors(*models, layers)
    spans = quantiser_spans(models[1], layers)
    totals = [ratio(sums.difference, sums.reference) for sums in probe.sums]
    found = [
        _layer_error(layer, sums, max((totals[place] for place in layer.sources), default=0.0), constant, span, data)
        for layer, sums, constant, span in zip(layers, probe.sums, constants, spans, strict=True)
    ]
    place = nearest_layer(models[1], layers)
    return found, None if place is None else found[place]


def _layer_error(
    layer: Layer,
    sums: Sums,
    inherited: float,
    constants: float,
    spans: Sequence[tuple[float, float] | None],
    data: _Data,
) -> LayerError:
    error = ratio(sums.difference, sums.reference)
    lengths = math.sqrt(sums.reference) * math.sqrt(sums.other)
    product = (sums.reference + sums.other - sums.difference) / 2
    # A quantiser for positive and negative values of a tensor with one sign: the larger end counts.
    used = [
        max(abs(end) for end in held) / max(abs(end) for end in seen)
        if min(held) < 0 and abs(held[0] + held[1]) < 0.1 * held[1]
        else (held[1] - held[0]) / (seen[1] - seen[0])
        for held, seen in zip(spans, sums.spans, strict=True)
        if held is not None and 0 < seen[1] - seen[0] < math.inf
    ]
    first = sums.place[0] if sums.place else 0
    return LayerError(
        name=layer.name,
        operator=layer.operator,
        block=block_of(layer.name),
        tensor=layer.b,
        error=error,
        inherited=inherited,
        own=ratio(sums.alone, sums.reference),
        sqnr_db=math.inf if error == 0 else -math.inf if math.isinf(error) else -20 * math.log10(error),
        cosine=1.0 if error == 0 else product / lengths if 0 < lengths < math.inf else math.nan,
        input_rounding=max((ratio(*pair) for pair in sums.rounded), default=0.0),
        constants=constants,
        span=max(used, key=lambda value: abs(math.log(value)), default=None),
        largest=sums.largest,
        place=sums.place,
        image=data.crop(sums.batch * data.batch + first),
    )
