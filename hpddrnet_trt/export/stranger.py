"""An ONNX segmenter of another program as it came: read within limits, and run in ONNX Runtime."""

from __future__ import annotations

import tempfile
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from hpddrnet_trt.core import runtimes
from hpddrnet_trt.core.errors import BadInputFile, UsageError, first_problem, one_line, require
from hpddrnet_trt.core.manifest import AxisRange, InputContract
from hpddrnet_trt.export.adopt_settings import AdoptSettings
from hpddrnet_trt.export.onnx import OPSET
from hpddrnet_trt.graph.attention import expanded
from hpddrnet_trt.graph.check import load_checked
from hpddrnet_trt.graph.nodes import initializers

if TYPE_CHECKING:
    import onnx

    from hpddrnet_trt.export.images import Grey

REMEDY = "export it again as plain FP32 with one image as input, or choose another file"
_LEAST_SIZES = (32, 64, 128, 256, 512)  # tried in turn as the smallest input of a file with dynamic sizes
_MAX_BYTES = 2 << 30  # of one ONNX file, which protobuf limits
_ELSEWHERE = "some of its numbers are in another file"  # what the check says of weights beside the file


def read_stranger(path: Path) -> onnx.ModelProto:
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


class Stranger:
    """The file as it came, opened in ONNX Runtime: what goes in, what comes out."""

    def __init__(self, path: Path, model: onnx.ModelProto, settings: AdoptSettings) -> None:
        import onnx

        self.path, self.model, self.settings = path, model, settings
        constant = initializers(model.graph).keys()
        inputs = [entry for entry in model.graph.input if entry.name not in constant]
        if len(inputs) != 1:
            named = ", ".join(entry.name for entry in inputs) or "none"
            raise BadInputFile(f"{path} has the inputs {named}, and a segmenter has one image; {REMEDY}")
        (image,) = inputs
        self.image, kind = image.name, image.type.tensor_type
        if kind.elem_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8) or len(kind.shape.dim) != 4:
            raise BadInputFile(
                f"{path} takes {onnx.TensorProto.DataType.Name(kind.elem_type)} of {len(kind.shape.dim)} axes, not "
                f"float32 images [batch, channels, height, width]; {REMEDY}"
            )
        self.is_uint8 = kind.elem_type == onnx.TensorProto.UINT8
        sizes = [int(axis.dim_value) for axis in kind.shape.dim]  # 0 where dynamic
        self.channels_last = sizes[1] not in (0, 1, 3) and sizes[3] in (1, 3)
        batch, self.channels, height, width = (
            sizes[place] for place in ((0, 3, 1, 2) if self.channels_last else range(4))
        )
        self.channels = self.channels or 3
        if self.channels not in (1, 3):
            raise BadInputFile(f"{path} takes {self.channels} channels, and a micrograph makes 1 or 3; {REMEDY}")
        self.mean, self.std = self._by_channel()
        try:
            self.session = runtimes.session(model, "adopt ONNX files")
        except runtimes.onnxruntime_errors() as exc:
            raise BadInputFile(f"ONNX Runtime cannot open {path} ({one_line(exc)}); {REMEDY}") from exc
        try:
            self.contract, self.smallest = self._smallest(batch, height, width)
        except ValidationError as exc:
            raise BadInputFile(f"{path} takes images of a size that cannot be ({first_problem(exc, 'input')})") from exc
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
            raise BadInputFile(f"{self.path} does not run on an image {shape} ({one_line(exc)}); {REMEDY}") from exc
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
