"""An ONNX segmenter that is none of ours gets our contract and our description, and with them everything else.

A stranger's file takes a normalised colour image and gives scores, probabilities or labels, at full size or at a
fraction of it. The adopted file takes a grey 8-bit micrograph, normalises it in FP32 inside the graph, and gives labels
(or logits) of its size; the network between the two is untouched. Calibration, engines, the accuracy gate, the
benchmark and the runner then see one of our files. There is no PyTorch network to compare with: the reference is
the stranger's file itself in ONNX Runtime, and later the adopted FP32 file.

The new nodes are named ``input/...`` and ``output/...`` (``output.enlarge/Resize`` where scores are enlarged), those
of the stranger ``network....`` after their modules, as far as the file says them.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core import runtimes
from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError, one_line, require
from hpddrnet_trt.core.files import existing_file, sha256_of
from hpddrnet_trt.core.manifest import (
    AdoptedNetwork,
    AxisRange,
    ClassInfo,
    DataRecord,
    InputContract,
    IntensityRecord,
    Manifest,
    Normalization,
    OutputContract,
    ValidationRecord,
    default_palette,
)
from hpddrnet_trt.core.metrics import LabelComparison, arg_max
from hpddrnet_trt.export.onnx import OPSET, name_after_modules, simplified
from hpddrnet_trt.export.verify import feed_of, runtime_name, sample_batches, source_name
from hpddrnet_trt.graph.attention import expanded
from hpddrnet_trt.graph.check import load_checked
from hpddrnet_trt.graph.model import check_target, save_model
from hpddrnet_trt.graph.nodes import (
    consumers,
    copied,
    initializers,
    int_attribute,
    name_nodes,
    producers,
    replace_nodes,
)
from hpddrnet_trt.graph.scores import COMPARISON, ENLARGEMENT

if TYPE_CHECKING:
    import onnx

    from hpddrnet_trt.export.images import Grey

logger = logging.getLogger(__name__)

LEAST_AGREEMENT = 0.999  # of labels with the stranger's own, which only rounding and ties may change
_LEAST_SIZES = (32, 64, 128, 256, 512)  # tried in turn as the smallest input of a file with dynamic sizes
_MAX_BYTES = 2 << 30  # of one ONNX file, which protobuf limits
_ELSEWHERE = "some of its numbers are in another file"  # what the check says of weights beside the file
_LARGEST_UNIT = 4.0  # means and deviations up to this are of grey levels 0..1
_REMEDY = "export it again as plain FP32 with one image as input, or choose another file"
_SMALLEST_PROBABILITY = 1e-7

NORMALIZATIONS = {
    "imagenet": Normalization(),
    "half": Normalization(mean=(127.5,) * 3, std=(127.5,) * 3),
    "unit": Normalization(mean=(0.0,) * 3, std=(255.0,) * 3),
    "none": Normalization(mean=(0.0,) * 3, std=(1.0,) * 3),
}
"""By name: ImageNet's means and deviations, grey levels as -1..1, as 0..1, and as they are (0..255)."""


@dataclass(frozen=True)
class AdoptSettings:
    """What a stranger's file does not say of itself.

    ``classes``: in the order of the scores. ``normalization``: in grey levels 0..255, red first; a file with one
    channel takes the first of each. ``channel_order``: which channel the file takes first. ``scores``: name of the
    output to take, where there are several. ``align_corners``: how scores of lower resolution are enlarged.
    ``multiple``: of which height and width must be where they are dynamic. ``output``, ``confidence``: as
    :class:`~hpddrnet_trt.core.manifest.OutputContract`. ``name``: of the model, default the file's.
    ``data``: what it was trained on; its ``crop`` is the size of tiles. ``intensity``: which grey values are black and
    white for it.
    """

    classes: Sequence[ClassInfo]
    normalization: Normalization = field(default_factory=Normalization)
    channel_order: Literal["rgb", "bgr"] = "rgb"
    scores: str | None = None
    align_corners: bool = False
    multiple: int = 32
    output: Literal["labels", "logits"] = "labels"
    confidence: bool = False
    name: str | None = None
    data: DataRecord | None = None
    intensity: IntensityRecord | None = None

    def __post_init__(self) -> None:
        if not 2 <= len(self.classes) <= 255:
            raise UsageError(f"a segmenter has 2 to 255 classes, {len(self.classes)} are named")
        if not 1 <= self.multiple <= 1024:
            raise UsageError(f"sizes are multiples of 1 to 1024 pixels, not of {self.multiple}")
        if self.confidence and self.output != "labels":
            raise UsageError("a confidence map goes with labels; logits already carry the confidence")


def parse_classes(text: str) -> list[ClassInfo]:
    """``matrix,pore=#d55e00``: names with or without a colour; raises :class:`UsageError`."""
    entries = [part.strip() for part in text.split(",")]
    names, palette = [], default_palette(len(entries))
    for place, entry in enumerate(entries):
        name, _, color = (part.strip() for part in entry.partition("="))
        if not name or name in names or (color and not re.fullmatch(r"#[0-9a-fA-F]{6}", color)):
            raise UsageError(
                f"{entry!r} of the classes {text!r} is not a name of its own, alone or as NAME=#RRGGBB; "
                "write them as matrix,pore=#d55e00"
            )
        names.append(name)
        if color:
            red, green, blue = bytes.fromhex(color[1:])
            palette[place] = red, green, blue
    return [ClassInfo(name=name, color=color) for name, color in zip(names, palette, strict=True)]


def parse_normalization(text: str) -> Normalization:
    """A name in :data:`NORMALIZATIONS`, or ``MEAN/STD`` with one or three numbers each.

    Numbers are of grey levels 0..1 where all are small, and of 0..255 where each mean is either 0 or large and all
    deviations are large; raises :class:`UsageError` for anything between, where only the name can tell.
    """
    if text in NORMALIZATIONS:
        return NORMALIZATIONS[text]
    known = f"one of {', '.join(NORMALIZATIONS)}, or MEAN/STD such as 123.7,116.3,103.5/58.4,57.1,57.4"
    try:
        mean, std = ([float(number) for number in part.split(",")] for part in text.split("/"))
        if {len(mean), len(std)} - {1, 3} or not np.isfinite([*mean, *std]).all() or min(std) <= 0:
            raise ValueError
    except ValueError as exc:
        raise UsageError(f"the normalization {text!r} is not understood; give {known}") from exc
    small = max(map(abs, mean)) <= _LARGEST_UNIT and max(std) <= _LARGEST_UNIT
    large = min(std) > _LARGEST_UNIT and all(value == 0 or abs(value) > _LARGEST_UNIT for value in mean)
    plain = not any(mean) and set(std) == {1.0}
    if plain or not (small or large):
        raise UsageError(
            f"the normalization {text!r} may be of grey levels 0..1 or 0..255; give both in one unit, or 'unit' for "
            "grey levels brought to 0..1 and 'none' for those left as they are"
        )
    factor = 255.0 if small else 1.0
    red, green, blue = (factor * value for value in mean * (3 // len(mean)))
    of_red, of_green, of_blue = (factor * value for value in std * (3 // len(std)))
    return Normalization(mean=(red, green, blue), std=(of_red, of_green, of_blue))


def adopt(source: str | Path, target: str | Path, settings: AdoptSettings, *, images: Sequence[Path] = ()) -> Manifest:
    """Write ``source``, an ONNX segmenter of another program, as a file of this package, and return its description.

    Weights beside the file are taken in. The result is compared with ``source`` on ``images`` (micrographs), or on
    simulated ones: labels must agree on :data:`LEAST_AGREEMENT` of the pixels; the figures go into the description.

    Raises :class:`BadInputFile` for a file that is damaged, refused (:mod:`hpddrnet_trt.graph.check`), no FP32
    segmenter, or not what it says; :class:`UsageError` for settings that do not go with it; :class:`UserError` where
    the result differs. Nothing is written then.
    """
    source = existing_file(source, "ONNX file")
    check_target(source, target)
    stranger = _Stranger(source, _read(source), settings)
    model, found = _with_our_contract(stranger, settings)
    manifest = Manifest(
        name=settings.name or source.stem,
        network=AdoptedNetwork(kind="adopted", name=settings.name or source.stem, num_classes=len(settings.classes)),
        classes=list(settings.classes),
        normalization=settings.normalization,
        intensity=settings.intensity,
        data=settings.data,
        remarks=[
            f"adopted from {source.name} ({stranger.producer}): its output {stranger.output!r}, {found.gives}; "
            f"{settings.channel_order.upper() if stranger.channels == 3 else 'one channel'} in"
        ],
        checkpoint_sha256=sha256_of(source),
        versions=_versions(),
        input=stranger.contract,
        output=OutputContract(kind=settings.output, confidence=settings.confidence),
        precision="fp32",
    )
    manifest = manifest.replace(validation=[_compare(model, stranger, found, manifest, images)])
    save_model(model, target, manifest)
    return manifest


# ------------------------------------------------------------------------------- the stranger's file


def _read(path: Path) -> onnx.ModelProto:
    """Its graph with all weights, functions written out, in our version of the operators."""
    onnx = require("onnx", "export", "adopt ONNX files")
    if path.suffix.lower() != ".onnx":
        raise UsageError(f"{path} is not an ONNX file; export the network as .onnx first")
    try:
        model = load_checked(path, "operators")
    except BadInputFile as refused:
        if _ELSEWHERE not in str(refused):
            raise
        model = _with_weights(path)
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node):
        raise BadInputFile(f"{path} is quantized already; give the FP32 file, which `hpddrnet-trt calibrate` quantizes")
    narrow = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    if any(entry.data_type in narrow for entry in model.graph.initializer):
        raise BadInputFile(f"{path} holds FP16 weights; give the FP32 file, which `export --precision fp16` converts")
    model = expanded(model) if model.functions else model
    version = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)
    if version < OPSET:
        try:
            model = onnx.version_converter.convert_version(model, OPSET)
        except Exception as exc:  # whatever its adapters raise
            raise BadInputFile(
                f"{path} is of version {version} of ONNX's operators and could not be brought to {OPSET} "
                f"({one_line(exc)}); export it with opset_version={OPSET}"
            ) from exc
    return model


def _with_weights(path: Path) -> onnx.ModelProto:
    """A graph whose weights are beside it. The onnx package opens plain files of the same folder only."""
    onnx = require("onnx", "export", "adopt ONNX files")
    try:
        held = onnx.load(str(path), load_external_data=False).graph.initializer
        size = sum(int(np.prod(entry.dims, dtype=np.float64)) * 4 for entry in held)
        if size > _MAX_BYTES:
            raise ValueError(f"{size / 2**30:.1f} GiB are more than a file holds")
        model = onnx.load(str(path))
    except Exception as exc:  # its own errors, protobuf's and the system's
        raise BadInputFile(
            f"{path} has weights in another file, which cannot be read ({one_line(exc)}); keep both in one folder, "
            "with the names that they were exported with"
        ) from exc
    with tempfile.TemporaryDirectory(prefix="hpddrnet-trt-") as folder:
        whole = Path(folder) / path.name
        onnx.save(model, str(whole))
        try:
            return load_checked(whole, "operators")
        except BadInputFile as exc:
            raise BadInputFile(str(exc).replace(str(whole), str(path))) from exc


class _Stranger:
    """The file as it came, opened in ONNX Runtime: what goes in, what comes out."""

    def __init__(self, path: Path, model: onnx.ModelProto, settings: AdoptSettings) -> None:
        import onnx

        self.path, self.model, self.settings = path, model, settings
        constant = initializers(model.graph).keys()
        inputs = [entry for entry in model.graph.input if entry.name not in constant]
        if len(inputs) != 1:
            named = ", ".join(entry.name for entry in inputs) or "none"
            raise BadInputFile(f"{path} has the inputs {named}, and a segmenter has one image; {_REMEDY}")
        (image,) = inputs
        self.image, kind = image.name, image.type.tensor_type
        if kind.elem_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8) or len(kind.shape.dim) != 4:
            raise BadInputFile(
                f"{path} takes {onnx.TensorProto.DataType.Name(kind.elem_type)} of {len(kind.shape.dim)} axes, not "
                f"float32 images [batch, channels, height, width]; {_REMEDY}"
            )
        self.is_uint8 = kind.elem_type == onnx.TensorProto.UINT8
        sizes = [int(axis.dim_value) for axis in kind.shape.dim]  # 0 where dynamic
        self.channels_last = sizes[1] not in (0, 1, 3) and sizes[3] in (1, 3)
        batch, self.channels, height, width = (
            sizes[place] for place in ((0, 3, 1, 2) if self.channels_last else range(4))
        )
        self.channels = self.channels or 3
        if self.channels not in (1, 3):
            raise BadInputFile(f"{path} takes {self.channels} channels, and a micrograph makes 1 or 3; {_REMEDY}")
        self.mean, self.std = self._by_channel()
        try:
            self.session = runtimes.session(model, "adopt ONNX files")
        except runtimes.onnxruntime_errors() as exc:
            raise BadInputFile(f"ONNX Runtime cannot open {path} ({one_line(exc)}); {_REMEDY}") from exc
        self.contract, self.smallest = self._smallest(batch, height, width)
        self.example = self.run(self.smallest)
        self.output = self._chosen(self.example)
        self.producer = " ".join(filter(None, (model.producer_name, model.producer_version))) or "producer not stated"

    def _by_channel(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        given = self.settings.normalization
        if self.channels == 1 and len({*given.mean}) + len({*given.std}) > 2:
            raise UsageError(f"{self.path} takes one channel; give --normalization with one mean and one deviation")
        step = -1 if self.settings.channel_order == "bgr" else 1
        mean, std = (np.array(values[::step][: self.channels], np.float32) for values in (given.mean, given.std))
        return mean, std

    def run(self, batch: Grey, session: Any = None) -> dict[str, npt.NDArray[Any]]:
        """Every output, by name, for grey images ``[N, H, W]``, of the file or of a part of it, opened as ``session``.

        Raises :class:`BadInputFile`.
        """
        session = session or self.session
        image = ((batch[..., None] - self.mean) / self.std).astype(np.uint8 if self.is_uint8 else np.float32)
        image = image if self.channels_last else image.transpose(0, 3, 1, 2)
        names = [entry.name for entry in session.get_outputs()]
        try:
            found = session.run(names, {self.image: np.ascontiguousarray(image)})
        except runtimes.onnxruntime_errors() as exc:
            shape = "x".join(map(str, image.shape))
            raise BadInputFile(f"{self.path} does not run on an image {shape} ({one_line(exc)}); {_REMEDY}") from exc
        return dict(zip(names, found, strict=True))

    def _smallest(self, batch: int, height: int, width: int) -> tuple[InputContract, Grey]:
        """What goes in, and the smallest image that the file runs on (sizes of 0 are dynamic)."""

        def axis(size: int, least: int) -> AxisRange:
            return AxisRange(minimum=size, maximum=size) if size else AxisRange(minimum=least)

        multiple = gcd(self.settings.multiple, height, width)
        least_sizes = list(dict.fromkeys(-(-size // multiple) * multiple for size in _LEAST_SIZES))
        for least in least_sizes:
            contract = InputContract(
                batch=axis(batch, 1), height=axis(height, least), width=axis(width, least), multiple=multiple
            )
            shape = (batch or 1, contract.height.minimum, contract.width.minimum)
            grey = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
            try:
                self.run(grey)
            except BadInputFile:
                if (height and width) or least == least_sizes[-1]:
                    raise
            else:
                break
        return contract, grey

    def _chosen(self, outputs: dict[str, npt.NDArray[Any]]) -> str:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in outputs.items())
        wanted = self.settings.scores
        if wanted is not None:
            if wanted not in outputs:
                raise UsageError(f"{self.path} has no output {wanted!r}; it has: {shapes}")
            return wanted
        fitting = [name for name, array in outputs.items() if self._fits(array)]
        if len(fitting) == 1:
            return fitting[0]
        names = ", ".join(entry.name for entry in self.settings.classes)
        if fitting:
            raise UsageError(f"{self.path} has several outputs with scores of {names}: {shapes}; choose with --scores")
        raise UsageError(
            f"{self.path} gives no scores of the {len(self.settings.classes)} classes {names}, and no labels: its "
            f"outputs are {shapes}; name its own classes, in their order"
        )

    def _fits(self, array: npt.NDArray[Any]) -> bool:
        """Whether an output may be scores of the classes (for two of them also one channel), or labels."""
        classes = len(self.settings.classes)
        if array.dtype.kind in "iub" or array.ndim == 3:
            return array.ndim == 3 or (array.ndim == 4 and array.shape[1] == 1)
        channels = {array.shape[1], array.shape[3] if self.channels_last else 0} if array.ndim == 4 else set[int]()
        return classes in channels or (classes == 2 and 1 in channels)


# ------------------------------------------------------------------------------- our contract


class _Found(NamedTuple):
    """What the stranger's network gives, before its own softmax and arg-max."""

    tensor: str
    gives: Literal["logits", "probabilities", "labels"]
    example: npt.NDArray[Any]  # of the smallest image
    axis: int  # of the classes
    threshold: float = 0.0  # of the stranger's own output, where the second class alone has scores


def _with_our_contract(stranger: _Stranger, settings: AdoptSettings) -> tuple[onnx.ModelProto, _Found]:
    """The graph with our input and outputs, and what of the stranger's is in it."""
    from onnx import compose, helper

    model = stranger.model
    _name_after_modules(model, stranger.path)
    found = _network_output(stranger)
    if found.gives == "labels" and (settings.confidence or settings.output == "logits"):
        raise UsageError(f"{stranger.path} gives labels without scores: neither logits nor a confidence come from it")
    kind = helper.np_dtype_to_tensor_dtype(found.example.dtype)
    del model.graph.output[:], model.graph.value_info[:]
    model.graph.output.append(helper.make_tensor_value_info(found.tensor, kind, [None] * found.example.ndim))
    for entry in [entry for entry in model.graph.input if entry.name != stranger.image]:
        model.graph.input.remove(entry)  # weights, as old exporters list them
    replace_nodes(model.graph, model.graph.node)
    try:
        model = simplified(model)
    except Exception as exc:  # of a C++ library, on a graph that ONNX Runtime runs
        logger.info("%s is not simplified: %s", stranger.path, one_line(exc))
    model = compose.add_prefix(model, "network.")
    ours = _Nodes(model)
    _add_input(ours, stranger)
    _add_output(ours, found, stranger.contract, settings)
    name_nodes(model)
    replace_nodes(model.graph, [*ours.nodes, *model.graph.node])
    del model.graph.value_info[:]
    return model, found


def _name_after_modules(model: onnx.ModelProto, path: Path) -> None:
    """Names after modules: by the notes of PyTorch's exporter, or by the paths that its older one made of them."""
    if any(entry.key == "pkg.torch.onnx.name_scopes" for node in model.graph.node for entry in node.metadata_props):
        try:
            name_after_modules(model)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as exc:
            raise BadInputFile(f"{path} has damaged notes of its exporter ({one_line(exc)}); {_REMEDY}") from exc
    for node in model.graph.node:
        module, _, operator = node.name.strip("/").rpartition("/")
        node.name = f"{module.replace('/', '.')}/{operator}" if module else operator
        node.doc_string = ""
        del node.metadata_props[:]
    name_nodes(model)


def _network_output(stranger: _Stranger) -> _Found:
    """What stands before the arg-max, softmax or sigmoid that the file may end with."""
    from onnx import TensorProto, helper

    graph, classes = stranger.model.graph, len(stranger.settings.classes)
    made, name = producers(graph), stranger.output

    def before(name: str, *operators: str) -> onnx.NodeProto | None:
        node = made.get(name)
        return node if node is not None and node.op_type in operators else None

    inside, logits, threshold = name, False, 0.0
    while (node := before(inside, "Cast", "Identity", "Squeeze", "Unsqueeze")) is not None:
        inside = node.input[0]
    if (node := before(inside, "ArgMax")) is not None:
        name = node.input[0]
    elif stranger.example[name].dtype.kind in "iub" or stranger.example[name].ndim == 3:
        return _Found(name, "labels", stranger.example[name], 1)
    if (node := before(name, "Softmax", "LogSoftmax", "Sigmoid")) is not None:
        name, logits, threshold = node.input[0], True, 0.5
    example = stranger.example.get(name)
    if example is None:
        part = copied(stranger.model)
        del part.graph.output[:]
        part.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        example = stranger.run(stranger.smallest, runtimes.session(part))[name]
    axis = 3 if stranger.channels_last and example.shape[3] in (1, classes) else 1
    if example.shape[axis] != classes and (example.shape[axis], classes) != (1, 2):
        raise UsageError(
            f"{stranger.path} has scores of {example.shape[axis]} classes, and {classes} are named: "
            f"{', '.join(entry.name for entry in stranger.settings.classes)}; name them all, in their order"
        )
    shares = bool(example.min() >= 0 and example.max() <= 1)
    if example.shape[axis] > 1:
        shares = shares and np.allclose(example.sum(axis=axis), 1, atol=1e-3)
    if shares and not logits:
        return _Found(name, "probabilities", example, axis, 0.5)
    return _Found(name, "logits", example, axis, threshold)


class _Nodes:
    """Nodes and constants of ours, around a graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph, self.nodes = model.graph, list[Any]()

    def add(self, operator: str, inputs: Sequence[str], name: str, output: str | None = None, **attributes: Any) -> str:
        """A node called ``name``, and what it makes."""
        from onnx import helper

        made = output or name.replace("/", ".")
        self.nodes.append(helper.make_node(operator, list(inputs), [made], name, **attributes))
        return made

    def constant(self, name: str, values: Any, dtype: Any = np.float32) -> str:
        from onnx import numpy_helper

        self.graph.initializer.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def by_class(self, name: str, values: Sequence[float]) -> str:
        """The same, one value a channel."""
        return self.constant(name, np.reshape(values, (1, -1, 1, 1)))


def _add_input(ours: _Nodes, stranger: _Stranger) -> None:
    """Grey levels become the stranger's image: one factor and one shift a channel, which also make the channels."""
    from onnx import TensorProto, helper

    graph, contract = ours.graph, stranger.contract
    levels = ours.add("Cast", ["image"], "input/Cast", to=TensorProto.FLOAT)
    mean, std = (values.astype(np.float64).reshape(1, -1, 1, 1) for values in (stranger.mean, stranger.std))
    levels = ours.add("Mul", [levels, ours.constant("input.factor", 1 / std)], "input/Mul")
    inner, last = graph.input[0].name, stranger.channels_last
    levels = ours.add("Add", [levels, ours.constant("input.shift", -mean / std)], "input/Add", None if last else inner)
    if last:
        ours.add("Transpose", [levels], "input/Transpose", inner, perm=[0, 2, 3, 1])
    if stranger.is_uint8:  # a uint8 tensor of three channels would be no type that TensorRT computes with
        casts = consumers(graph)[inner]
        if any(node.op_type != "Cast" or int_attribute(node, "to", 0) != TensorProto.FLOAT for node in casts):
            raise BadInputFile(f"{stranger.path} computes with a uint8 image; {_REMEDY}")
    del graph.input[:]
    sizes = [
        axis.fixed or name
        for axis, name in ((contract.batch, "batch"), (contract.height, "height"), (contract.width, "width"))
    ]
    graph.input.append(helper.make_tensor_value_info("image", TensorProto.UINT8, [sizes[0], 1, *sizes[1:]]))


def _add_output(ours: _Nodes, found: _Found, contract: InputContract, settings: AdoptSettings) -> None:
    from onnx import TensorProto, helper

    graph, tensor = ours.graph, f"network.{found.tensor}"
    sizes: list[int | str] = [
        axis.fixed or name
        for axis, name in ((contract.batch, "batch"), (contract.height, "height"), (contract.width, "width"))
    ]
    outputs = [helper.make_tensor_value_info("labels", TensorProto.UINT8, sizes)]
    if found.gives == "labels":
        if found.example.ndim == 4:
            tensor = ours.add("Squeeze", [tensor, ours.constant("output.axis", [1], np.int64)], "output/Squeeze")
        real = ours.add("Cast", [tensor], "output/Cast", to=TensorProto.FLOAT)
    else:
        tensor = _full_size(ours, tensor, found, contract, settings)
        if settings.output == "logits":
            ours.add("Identity", [tensor], "output/Identity", "logits")
            logits = [sizes[0], len(settings.classes), *sizes[1:]]
            outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, logits)]
        index = ours.add("ArgMax", [tensor], COMPARISON, axis=1, keepdims=0)
        real = ours.add("Cast", [index], "output/Cast", to=TensorProto.FLOAT)
        if settings.confidence:
            axis = ours.constant("output.axis", [1], np.int64)
            best = ours.add("ReduceMax", [tensor, axis], "output/ReduceMax", keepdims=1)
            below = ours.add("Sub", [tensor, best], "output/Sub")
            shares = ours.add("Exp", [below], "output/Exp")
            total = ours.add("ReduceSum", [shares, axis], "output/ReduceSum", keepdims=0)
            ours.add("Reciprocal", [total], "output/Reciprocal", "confidence")
            outputs.append(helper.make_tensor_value_info("confidence", TensorProto.FLOAT, sizes))
    # By way of floating point, the only type that TensorRT documents to become uint8.
    ours.add("Cast", [real], "output/Cast_1", "labels", to=TensorProto.UINT8)
    del graph.output[:]
    graph.output.extend(outputs)


def _full_size(ours: _Nodes, tensor: str, found: _Found, contract: InputContract, settings: AdoptSettings) -> str:
    """One logit a class for every pixel of the image."""
    if found.axis == 3:
        tensor = ours.add("Transpose", [tensor], "output/Transpose", perm=[0, 3, 1, 2])
    binary = found.example.shape[found.axis] == 1
    if found.gives == "probabilities":
        if binary:  # of the second class
            tensor = ours.add("Mul", [tensor, ours.by_class("output.factor", [-1, 1])], "output/Mul")
            tensor = ours.add("Add", [tensor, ours.by_class("output.shift", [1, 0])], "output/Add")
        tensor = ours.add("Max", [tensor, ours.constant("output.least", _SMALLEST_PROBABILITY)], "output/Max")
        tensor = ours.add("Log", [tensor], "output/Log")
    elif binary:  # by how much the second class is above the first one
        tensor = ours.add("Mul", [tensor, ours.by_class("output.factor", [0, 1])], "output/Mul")
    height, width = (found.example.shape[place] for place in ((1, 2) if found.axis == 3 else (2, 3)))
    image = contract.height.minimum, contract.width.minimum
    if image == (height, width):
        return tensor
    how = "align_corners" if settings.align_corners else "half_pixel"
    if image[0] % height == 0 and image[1] % width == 0:
        scales = ours.constant("output.scales", [1, 1, image[0] // height, image[1] // width])
        return ours.add(
            "Resize", [tensor, "", scales], f"{ENLARGEMENT}Resize", mode="linear", coordinate_transformation_mode=how
        )
    if contract.height.fixed is None or contract.width.fixed is None:
        raise BadInputFile(
            f"the file gives scores of {height}x{width} for an image of {image[0]}x{image[1]}, which is no "
            "whole factor; give --multiple as its network needs it, or export it with fixed sizes"
        )
    whole = ours.constant("output.sizes", image, np.int64)
    return ours.add(
        "Resize", [tensor, "", "", whole], f"{ENLARGEMENT}Resize", mode="linear", axes=[2, 3],
        coordinate_transformation_mode=how,
    )  # fmt: skip


# ------------------------------------------------------------------------------- the comparison


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("onnx", "onnxsim", "onnxruntime")}


def _compare(
    model: onnx.ModelProto, stranger: _Stranger, found: _Found, manifest: Manifest, images: Sequence[Path]
) -> ValidationRecord:
    """Labels of the adopted graph beside those of the file as it came, enlarged by OpenCV where that is needed."""
    try:
        session = runtimes.session(model, "check the adopted file")
    except runtimes.onnxruntime_errors() as exc:
        raise UserError(
            f"the adopted form of {stranger.path} does not run ({one_line(exc)}); please report this"
        ) from exc
    comparison, seen = LabelComparison(manifest.network.num_classes), set[int]()
    for batch in sample_batches(manifest, images):
        image = feed_of(batch, manifest)
        (ours, *others) = session.run(None, image)
        theirs = stranger.run(image["image"][:, 0])[stranger.output]
        height, width = image["image"].shape[2:]
        if ours.shape[-2:] != (height, width):
            raise BadInputFile(
                f"{stranger.path} gives {ours.shape[-2]}x{ours.shape[-1]} labels for an image of {height}x{width}, so "
                "it is not as dynamic as it says; export it with fixed sizes"
            )
        if not all(np.isfinite(values).all() for values in (ours, theirs, *others)):
            raise BadInputFile(
                f"{stranger.path} gives values that are not finite for a micrograph; check --normalization, and the "
                "file in the program that it comes from"
            )
        labels = arg_max(ours) if ours.ndim == 4 else ours
        if labels.max() >= manifest.network.num_classes:
            raise UsageError(
                f"{stranger.path} gives the label {labels.max()}, and {manifest.network.num_classes} classes are "
                "named; name them all, in their order"
            )
        seen |= set(np.unique(labels).tolist())
        for got, wanted in zip(labels, _labels(theirs, found, height, width, stranger.settings), strict=True):
            comparison.update(got, wanted)
    if not comparison.agreement >= LEAST_AGREEMENT:
        raise UserError(
            f"the adopted form of {stranger.path} labels only {comparison.agreement:.2%} of the pixels as the file "
            "itself does, so it was not written; please report this"
        )
    if len(seen) == 1:
        logger.warning(
            "%s gives class %r for every pixel of the %d pictures tried; is the normalization the one of its training?",
            stranger.path.name, manifest.class_names[seen.pop()], comparison.images,
        )  # fmt: skip
    return ValidationRecord(
        what="adoption parity", runtime=runtime_name(), values={"agreement": comparison.agreement},
        images=comparison.images, source=source_name(images[: comparison.images]),
    )  # fmt: skip


def _labels(
    output: npt.NDArray[Any], found: _Found, height: int, width: int, settings: AdoptSettings
) -> npt.NDArray[np.uint8]:
    """Labels ``[N, H, W]`` of what the stranger's file gives, worked out without ONNX."""
    if output.dtype.kind in "iub" or output.ndim == 3:
        return output.reshape(len(output), height, width).astype(np.uint8)
    scores = np.moveaxis(output, found.axis, 1).astype(np.float32)
    if scores.shape[2:] != (height, width):
        rows, columns = (
            _interpolation(*sizes, settings.align_corners)
            for sizes in zip((height, width), scores.shape[2:], strict=True)
        )
        scores = np.asarray(rows @ scores @ columns.T, dtype=np.float32)
    return (scores[:, 0] > found.threshold).astype(np.uint8) if scores.shape[1] == 1 else arg_max(scores)


def _interpolation(size: int, source: int, align_corners: bool) -> npt.NDArray[np.float32]:
    """The matrix ``[size, source]`` of linear interpolation."""
    places: npt.NDArray[Any] = (np.arange(size) + 0.5) * source / size - 0.5
    if align_corners:
        places = np.linspace(0, source - 1, size)
    return np.stack([np.interp(places, np.arange(source), unit) for unit in np.eye(source)], axis=1).astype(np.float32)
