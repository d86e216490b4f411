"""What a model file says about itself.

One description travels with a model through its whole life: in the header of a checkpoint
(safetensors metadata), in the ``metadata_props`` of an ONNX file, and in the JSON file beside a
TensorRT engine (``model.engine`` + ``model.engine.json``). Each stage adds what it knows. This
module imports no heavy library, so a microscope PC reads every description.

A description may come from a stranger: its numbers have limits, so that no file makes its reader ask
for memory that no model needs.
"""

from __future__ import annotations

import colorsys
import json
import struct
from math import prod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from hpddrnet_trt.core.errors import BadInputFile, first_problem
from hpddrnet_trt.core.files import existing_file, read_file, write_bytes
from hpddrnet_trt.core.magnification import PLAUSIBLE_M, PixelSizes
from hpddrnet_trt.core.precisions import Precision
from hpddrnet_trt.core.protobuf import protobuf_fields

FORMAT_VERSION = 2  # 1 had other names for some entries, see the records' OLD_NAMES; it is read as well
METADATA_KEY = "hpddrnet_trt"
IGNORE_INDEX = 255
SIZE_MULTIPLE = 8  # the network's spatial branch works at one eighth of the input size
MAX_DESCRIPTION_BYTES = 16 << 20  # the largest of ours have some 100 KB
MAX_CHANNELS = 1 << 16  # of a layer, so that sizes can be computed; the largest network has 64 times 16
MAX_LEAST_VALUES = 1 << 28  # of the smallest input, which smaller images are padded to; 16384x16384 is admitted


class _Record(BaseModel):
    # Metrics of absent classes are NaN, which JSON cannot write as a number: "NaN" is read back.
    model_config = ConfigDict(extra="ignore", frozen=True, ser_json_inf_nan="strings")
    OLD_NAMES: ClassVar[dict[str, str]] = {}  # of entries in files of format version 1

    @model_validator(mode="before")
    @classmethod
    def _with_present_names(cls, content: Any) -> Any:
        return _renamed(content, cls.OLD_NAMES)


def _renamed(content: Any, names: dict[str, str]) -> Any:
    if not isinstance(content, dict):
        return content
    return {names.get(name, name): value for name, value in content.items()}


ShortText = Annotated[str, Field(max_length=100)]
ColorValue = Annotated[int, Field(ge=0, le=255)]


class ClassInfo(_Record):
    """One class: its name and the RGB colour (0..255) it is drawn in."""

    name: str = Field(min_length=1, max_length=1000)
    color: tuple[ColorValue, ColorValue, ColorValue]


# Distinguishable also with colour-vision deficiency (after M. Okabe and K. Ito, 2008).
_BASE_COLORS = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167),
    (86, 180, 233), (213, 94, 0), (240, 228, 66), (90, 90, 90),
)  # fmt: skip


def default_palette(count: int) -> list[tuple[int, int, int]]:
    """``count`` distinguishable RGB colours (0..255); the first are always the same."""
    colors = list(_BASE_COLORS[:count])
    for place in range(len(colors), count):
        hue = (place * 0.618034) % 1.0  # golden ratio: neighbours in the list are far apart in hue
        red, green, blue = colorsys.hsv_to_rgb(hue, 0.55 + 0.4 * (place % 2), 0.6 + 0.15 * (place % 3))
        colors.append((round(red * 255), round(green * 255), round(blue * 255)))
    return colors


class Normalization(_Record):
    """Grey levels (0..255, RGB order) are mapped to ``(value - mean) / std`` per channel."""

    mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat] = (123.675, 116.28, 103.53)  # ImageNet, as the authors train
    std: tuple[FiniteFloat, FiniteFloat, FiniteFloat] = (58.395, 57.12, 57.375)

    @model_validator(mode="after")
    def _positive_std(self) -> Normalization:
        if min(self.std) < 1e-6:
            raise ValueError(f"std must be positive (at least 1e-6 grey levels), got {self.std}")
        return self


class IntensityRecord(_Record):
    """Which grey values are black and white for the model, as they were in its training.

    ``full-scale``: shares of what a picture's bit depth holds; ``bits`` is the depth of the training pictures.
    ``value``: grey values in the picture's own unit. ``percentile``: of each picture's pixels, in percent.
    """

    unit: Literal["full-scale", "value", "percentile"] = "full-scale"
    black: FiniteFloat = 0.0
    white: FiniteFloat = 1.0
    bits: int | None = Field(default=None, ge=8, le=16)

    @model_validator(mode="after")
    def _not_empty(self) -> IntensityRecord:
        if not self.black < self.white:
            raise ValueError(f"an intensity range needs black < white, got {self.black:g} and {self.white:g}")
        return self


class NetworkConfig(_Record):
    """The network's variant as data.

    ``eca`` and ``pam`` say where efficient channel attention and position attention sit.
    ``context`` / ``fusion`` is the authors' code, which every published checkpoint comes from;
    ``spatial`` / ``context`` is the placement that the paper's abstract describes.

    ``detail`` and ``pool_border`` are ours, off in every published checkpoint: a second look at the
    stem's features at 1/4 before classifying, for what is smaller than the 8 pixels of the
    branches; and average pooling that leaves out the zeros beyond the border, so that a network
    trained on crops sees the same means in a whole micrograph.
    """

    channels: int = Field(default=32, ge=1, le=MAX_CHANNELS)  # 32: 23-slim, 64: 23
    ppm_channels: int = Field(default=128, ge=1, le=MAX_CHANNELS)
    head_channels: int = Field(default=64, ge=1, le=MAX_CHANNELS)
    num_classes: int = Field(ge=2, le=255)
    eca: Literal["context", "spatial", "none"] = "context"
    pam: Literal["fusion", "context", "none"] = "fusion"
    detail: bool = False
    pool_border: Literal["zeros", "ignored"] = "zeros"

    @property
    def logit_stride(self) -> int:
        """Pixels of the image per logit, in each direction."""
        return SIZE_MULTIPLE // 2 if self.detail else SIZE_MULTIPLE

    @property
    def name(self) -> str:
        """A short readable name, e.g. ``hpddrnet-23-slim`` or ``hpddrnet-23-no-eca``."""
        size = {32: "23-slim", 64: "23"}.get(self.channels, f"{self.channels}ch")
        own = ["detail"] * self.detail + ["borderless"] * (self.pool_border == "ignored")
        if self.eca == "none" and self.pam == "none":
            return "-".join([f"ddrnet-{size}", *own])
        tags = [f"{'no-' if where == 'none' else where + '-'}{what}"
                for what, where, usual in (("eca", self.eca, "context"), ("pam", self.pam, "fusion"))
                if where != usual]
        return "-".join(["hpddrnet", size, *tags, *own])


class AdoptedNetwork(_Record):
    """A network that is none of ours (:mod:`hpddrnet_trt.export.adopt`): its graph is all that is known of it."""

    kind: Literal["adopted"]  # always written: tells it from the variants of our network
    name: str = Field(default="adopted", max_length=1000)
    num_classes: int = Field(ge=2, le=255)


CropEdge = Annotated[int, Field(ge=1, le=1 << 14)]
PixelSize = Annotated[float, Field(ge=PLAUSIBLE_M[0], le=PLAUSIBLE_M[1])]  # metres


class DataRecord(_Record):
    """The data a model was trained on."""

    OLD_NAMES = {"licence": "license"}

    name: str
    sha256: str | None = None  # of all images and masks, see FolderDataset.checksum
    license: str | None = None
    train_images: int | None = None
    grey_mean: float | None = None
    grey_std: float | None = None
    crop: tuple[CropEdge, CropEdge] | None = None  # height and width of the training crops, pixels: the size of tiles
    pixel_size_m: tuple[PixelSize, PixelSize] | None = None  # least and greatest of the training pictures, metres
    common_pixel_size_m: PixelSize | None = None  # to which all of them were brought, where they were

    @model_validator(mode="after")
    def _ordered(self) -> DataRecord:
        if self.pixel_size_m is not None and self.pixel_size_m[0] > self.pixel_size_m[1]:
            raise ValueError(f"the least pixel size exceeds the greatest: {self.pixel_size_m}")
        return self

    @property
    def read_at_m(self) -> PixelSizes | None:
        """Pixel sizes that the network has seen, in metres; None where they are not known."""
        common = self.common_pixel_size_m
        return self.pixel_size_m if common is None else (common, common)


MAX_FEATURES = 4096  # of a cell; the largest of ours has some hundred
MAX_COMPONENTS = 256
FeatureVector = Annotated[list[FiniteFloat], Field(min_length=1, max_length=MAX_FEATURES)]
PositiveFloat = Annotated[FiniteFloat, Field(ge=1e-30)]
PositiveVector = Annotated[list[PositiveFloat], Field(min_length=1, max_length=MAX_FEATURES)]


class DomainRecord(_Record):
    """How the training pictures look to the network, so that another picture's distance can be told.

    A Gaussian of low rank over the ``domain_features`` of a cell (M. E. Tipping, C. M. Bishop, "Probabilistic
    principal component analysis", J. R. Stat. Soc. B 61, 1999), compressed by ``arcsinh(feature / unit)``, so that far
    above its unit a feature's factor counts: :func:`hpddrnet_trt.core.domain.distances`. Distances are in units of the
    training pictures' own, each measured without itself.
    """

    unit: list[PositiveFloat] = Field(default=[], max_length=MAX_FEATURES)  # empty: the features are not compressed
    mean: FeatureVector
    scale: PositiveVector
    components: Annotated[list[FeatureVector], Field(max_length=MAX_COMPONENTS)] = []  # orthonormal, of scaled features
    variances: list[PositiveFloat] = []  # along each component
    residual: PositiveFloat  # variance along every other direction
    unusual: PositiveFloat  # distances from which a picture is called so
    foreign: PositiveFloat
    crops: int = Field(ge=1)  # what the figures come from
    pictures: int = Field(ge=1)
    source: str = Field(default="", max_length=1000)  # dataset and split

    @model_validator(mode="after")
    def _sizes_agree(self) -> DomainRecord:
        features = len(self.mean)
        if any(len(row) != features for row in (self.unit or self.mean, self.scale, *self.components)):
            raise ValueError(f"unit, mean, scale and components must all have {features} features")
        if len(self.variances) != len(self.components):
            raise ValueError(f"{len(self.components)} components have {len(self.variances)} variances")
        if self.foreign < self.unusual:
            raise ValueError(f"foreign ({self.foreign:g}) must not be below unusual ({self.unusual:g})")
        return self


MAX_TEMPERATURE = 20.0  # of class scores, and one over it the least


class FractionErrorRecord(_Record):
    """How far area fractions were off on held-out pictures, in units of the uncertain share of a class.

    ``shared`` and ``patch`` (in pixels): see :mod:`hpddrnet_trt.core.uncertainty`; ``pixels`` of a picture there.
    """

    shared: FiniteFloat = Field(ge=0)
    patch: FiniteFloat = Field(ge=0)
    pixels: int = Field(ge=1)
    pictures: int = Field(ge=1)
    source: str = Field(default="", max_length=1000)  # dataset and split


class AxisRange(_Record):
    """Admitted sizes of one input axis, inclusive; ``maximum=None`` means no upper bound."""

    minimum: int = Field(default=1, ge=1)
    maximum: int | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> AxisRange:
        if self.maximum is not None and self.maximum < self.minimum:
            raise ValueError(f"the range {self.minimum}..{self.maximum} admits nothing")
        return self

    @property
    def fixed(self) -> int | None:
        """The one admitted size, or None when the axis is dynamic."""
        return self.minimum if self.minimum == self.maximum else None

    def admits(self, size: int) -> bool:
        return size >= self.minimum and (self.maximum is None or size <= self.maximum)

    def __str__(self) -> str:
        if self.fixed is not None:
            return str(self.fixed)
        return f"{self.minimum}..{self.maximum if self.maximum is not None else 'any'}"


class InputContract(_Record):
    """What goes in: ``[batch, channels, height, width]``.

    ``uint8`` with one channel is a grey 8-bit micrograph, normalisation happens in the graph;
    ``float32`` with three channels is an already normalised image.
    """

    dtype: Literal["uint8", "float32"] = "uint8"
    channels: Literal[1, 3] = 1
    batch: AxisRange = AxisRange()
    height: AxisRange = AxisRange(minimum=SIZE_MULTIPLE)
    width: AxisRange = AxisRange(minimum=SIZE_MULTIPLE)
    multiple: int = Field(default=SIZE_MULTIPLE, ge=1, le=1024)

    @model_validator(mode="after")
    def _smallest_input_fits_memory(self) -> InputContract:
        least = (self.batch.minimum, self.channels, self.height.minimum, self.width.minimum)
        if prod(least) > MAX_LEAST_VALUES:
            written = "x".join(map(str, least))
            raise ValueError(f"the smallest input, {written}, has more than {MAX_LEAST_VALUES} values")
        return self


class OutputContract(_Record):
    """What comes out.

    ``labels``: class indices, uint8 ``[batch, height, width]``, and with ``confidence`` the
    softmax probability of that class, float32 of the same shape. ``logits``: float32
    ``[batch, classes, height, width]`` at full resolution (needed for flip, multi-scale, tiling).
    With ``domain`` also ``domain_features``, float32 ``[batch, features, rows, columns]``: the network's features
    pooled over each cell of the image, for :mod:`hpddrnet_trt.core.domain`.
    """

    kind: Literal["labels", "logits"] = "labels"
    confidence: bool = False
    domain: bool = False


class CalibrationRecord(_Record):
    """How the ranges of an INT8 model were found."""

    method: str
    images: int
    images_sha256: str
    source: str
    tool: str


class MixedPrecisionRecord(_Record):
    """Which layers a search for the fastest file within an accuracy budget left in FP16."""

    OLD_NAMES = {"points": "candidates"}

    budget: str
    floating: list[str]  # node names, of the layers that could have been quantised
    layers: int  # how many could have been
    searched_on: str  # dataset and split
    candidates: list[dict[str, float]]  # measured: floating layers, milliseconds, masked mIoU lost, agreement
    cost_source: str  # where the milliseconds come from


class ValidationRecord(_Record):
    """One measured comparison of this file with the PyTorch FP32 reference."""

    what: str  # e.g. "export parity", "accuracy"
    runtime: str  # engine that ran the file
    values: dict[str, float]  # e.g. masked_miou, agreement, max_abs_difference
    images: int
    source: str  # dataset and split, or "random input 1x1x256x256"


class EngineRecord(_Record):
    """What only a built TensorRT engine knows."""

    OLD_NAMES = {"flavour": "runtime", "precision_proof": "layer_precision"}

    runtime: Literal["tensorrt", "tensorrt-rtx"]
    version: ShortText
    compute_capabilities: list[ShortText] = Field(max_length=100)  # ["8.9"], or ["portable"] for an RTX default build
    gpu: ShortText | None = None  # name of the GPU it was built on, None when built without one
    profiles: list[dict[str, list[int]]] = Field(max_length=100)  # {"min": [...], "opt": [...], "max": [...]}
    sha256: str
    bytes: int
    layer_precision: dict[str, Any]  # where it comes from and the share of layers per type
    build_seconds: float
    version_compatible: bool = False  # built to run on later TensorRT versions as well
    refittable: bool = False  # takes other weights of the same network
    stripped: bool = False  # holds no weights: it runs only after a refit
    weights_sha256: str | None = None  # of the weights left out
    platform: Literal["windows"] | None = None  # the operating system it was built for, where that is another
    source: str | None = Field(default=None, max_length=1000)  # name of the ONNX file that it was built from
    settings: dict[str, Any] = {}  # of the builder, those that were not the defaults
    # Memory for activations while it runs, by the builder's log; for one fixed shape only: with a range of shapes
    # the log does not count what position attention needs at the largest.
    activation_bytes: int | None = None


class Manifest(_Record):
    """Description of a model file; see the module docstring."""

    OLD_NAMES = {
        "normalisation": "normalization",
        "quantised_for": "quantized_for",
        "placement": "qdq_report",
        "evidence": "validation",
    }

    format_version: int = FORMAT_VERSION
    name: str = Field(default="model", max_length=1000)
    network: AdoptedNetwork | NetworkConfig = Field(union_mode="left_to_right")
    classes: list[ClassInfo]
    normalization: Normalization = Normalization()
    intensity: IntensityRecord | None = None
    data: DataRecord | None = None
    domain: DomainRecord | None = None
    temperature: Annotated[FiniteFloat, Field(ge=1 / MAX_TEMPERATURE, le=MAX_TEMPERATURE)] | None = None  # of scores
    fraction_errors: FractionErrorRecord | None = None
    metrics: dict[str, float] = {}  # of the checkpoint, fractions: {"val/miou": 0.81}
    remarks: list[str] = []
    checkpoint_sha256: str | None = None
    versions: dict[str, str] = {}
    # from ONNX export on
    input: InputContract | None = None
    output: OutputContract | None = None
    attention: Literal["matmul", "attention-op", "function", "plain"] | None = None
    precision: Precision | None = None
    quantized_for: Literal["tensorrt", "onnxruntime"] | None = None
    calibration: CalibrationRecord | None = None
    mixed: MixedPrecisionRecord | None = None
    qdq_report: dict[str, Any] | None = None  # of Q/DQ pairs: residual stages, float regions, expected reformats
    validation: list[ValidationRecord] = []
    # from the engine build on
    engine: EngineRecord | None = None

    @model_validator(mode="before")
    @classmethod
    def _in_present_format(cls, content: Any) -> Any:
        """Files of version 1 are taken over into the present one, which is what is written again."""
        if not isinstance(content, dict) or content.get("format_version") != 1:
            return content
        content = {**content, "format_version": FORMAT_VERSION}
        if isinstance(report := content.get("placement"), dict):
            report = _renamed(report, {"islands": "float_regions"})
            report["counts"] = _renamed(report.get("counts"), {"float_islands": "float_regions"})
            content["placement"] = report
        return content

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"format version {self.format_version} is newer than this package reads "
                f"({FORMAT_VERSION}); upgrade hpddrnet-trt"
            )
        if len(self.classes) != self.network.num_classes:
            raise ValueError(
                f"{len(self.classes)} classes are described but the network has {self.network.num_classes}"
            )
        return self

    @property
    def class_names(self) -> list[str]:
        return [entry.name for entry in self.classes]

    @property
    def palette(self) -> list[tuple[int, int, int]]:
        return [entry.color for entry in self.classes]

    @property
    def read_at_m(self) -> PixelSizes | None:
        """Pixel sizes that the network has seen, in metres; None where they are not known."""
        return None if self.data is None else self.data.read_at_m

    def replace(self, **changes: Any) -> Manifest:
        """A copy with ``changes`` applied and validated."""
        return Manifest.model_validate({**dict(self), **changes})

    def to_json(self) -> str:
        return self.model_dump_json(exclude_none=True, indent=1)


def parse_manifest(text: str, source: str | Path) -> Manifest:
    """Validate a JSON description; ``source`` names the file in errors."""
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as exc:
        raise BadInputFile(
            f"the description in {source} is not valid ({first_problem(exc, 'description')[:500]}); "
            "the file was damaged or written by another program: export it again"
        ) from exc


def with_description(content: bytes, manifest: Manifest) -> bytes:
    """The content of a checkpoint (safetensors) of ours with another description; its tensors stay bit for bit."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    description = manifest.replace(checkpoint_sha256=None)  # a file cannot hold its own checksum
    header["__metadata__"] = {**header["__metadata__"], METADATA_KEY: description.to_json()}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text + content[end:]


def write_described(source: Path, target: Path, manifest: Manifest) -> None:
    """Write the checkpoint ``source`` with another description to ``target``, whole or not at all."""
    write_bytes(target, with_description(read_file(source, "checkpoint"), manifest))


def sidecar_path(engine: str | Path) -> Path:
    """``model.engine`` -> ``model.engine.json``."""
    return Path(f"{engine}.json")


def read_manifest(path: str | Path) -> Manifest:
    """Read the description of a ``.safetensors``, ``.onnx`` or ``.engine`` file.

    Raises :class:`BadInputFile` when the file is missing, unreadable, damaged, or carries no description.
    """
    path = existing_file(path, "model file")
    readers = {".safetensors": _from_safetensors, ".onnx": _from_onnx, ".engine": _from_sidecar}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise BadInputFile(
            f"{path} is not a model file of this package (known endings: {', '.join(readers)}); "
            "checkpoints of mmsegmentation become ours with: hpddrnet-trt convert-checkpoint"
        )
    try:
        text = reader(path)
    except OSError as exc:
        raise BadInputFile(f"{path} cannot be read ({exc.strerror}); check its permissions and the disk") from exc
    if text is None:
        others = ", or see docs/modelopt.md" if path.suffix.lower() == ".onnx" else ""
        raise BadInputFile(
            f"{path} carries no description of the model (classes, input contract); "
            f"it was not written by this package: export it again with hpddrnet-trt export{others}"
        )
    return parse_manifest(text, path)


def _from_sidecar(path: Path) -> str | None:
    sidecar = sidecar_path(path)
    if not sidecar.is_file():
        raise BadInputFile(f"{sidecar} is missing; keep it beside {path.name}, or build the engine again")
    try:
        with sidecar.open("rb") as stream:
            return _limited(stream.read(MAX_DESCRIPTION_BYTES + 1)).decode("utf-8")
    except (OSError, ValueError) as exc:
        raise BadInputFile(f"{sidecar} cannot be read ({exc}); build the engine again") from exc


def _limited(text: bytes) -> bytes:
    if len(text) > MAX_DESCRIPTION_BYTES:
        raise ValueError(f"its description has more than {MAX_DESCRIPTION_BYTES >> 20} MiB")
    return text


def _from_onnx(path: Path) -> str | None:
    # Read from the file's bytes: importing the onnx package takes a tenth of a start.
    # ONNX is a protobuf; ModelProto's field 7 is the graph, field 14 a key (1) and value (2).
    key, text, graph = METADATA_KEY.encode(), None, False
    try:
        with path.open("rb") as stream:
            for field in protobuf_fields(stream, 0, path.stat().st_size):
                graph = graph or field.number == 7
                if field.number != 14:
                    continue
                pair = {part.number: part for part in protobuf_fields(stream, field.start, field.end)}
                if 1 in pair and 2 in pair and pair[1].read(stream, len(key) + 1) == key:
                    text = _limited(pair[2].read(stream, MAX_DESCRIPTION_BYTES + 1)).decode("utf-8")
        if not graph:
            raise ValueError("it holds no graph")
    except ValueError as exc:
        raise BadInputFile(f"{path} is not a readable ONNX file ({exc}); export it again") from exc
    return text


def _from_safetensors(path: Path) -> str | None:
    # Layout: 8 bytes little-endian header length, JSON header, tensors.
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(size - 8, MAX_DESCRIPTION_BYTES):
            raise BadInputFile(f"{path} is not a safetensors file or is truncated; copy or train it again")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as exc:  # the latter: lists in lists in lists
            raise BadInputFile(f"{path} has a damaged header ({exc}); copy or train it again") from exc
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    text = metadata.get(METADATA_KEY) if isinstance(metadata, dict) else None
    return str(text) if text is not None else None
