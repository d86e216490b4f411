"""Checkpoints of mmsegmentation, the HPDDRNet and DDRNet authors and PaddleSeg, in our terms.

Weights are named ``backbone.*`` and ``decode_head.*``, or as :mod:`hpddrnet_trt.models.layouts` lists, possibly
behind ``module.`` or ``model.``, and lie at the top of the file or under ``state_dict`` or ``model``. A full mmengine
runner checkpoint (with optimizer, schedulers, message hub) is read like any other; only weights and ``meta`` are used.
Arrays of NumPy (``.npz``) and safetensors files are read as well, which is how weights leave Paddle.

A pickle is a program: the standard unpickler imports whatever a file names and calls it. Here PyTorch's
own reader of weights reads it, which imports nothing; what it does not know (NumPy scalars, mmengine's history
buffers, any name in the file) is an inert :class:`StandIn`. Formats: the zip archive written since
PyTorch 1.6, and the older stream of pickles and storages, which published mmsegmentation models still use.
"""

from __future__ import annotations

import ast
import io
import json
import math
import pickle
import pickletools
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from hpddrnet_trt.core.errors import BadInputFile, first_problem, one_line, require
from hpddrnet_trt.core.files import existing_file, read_file
from hpddrnet_trt.core.manifest import METADATA_KEY, ClassInfo, NetworkConfig, Normalization, default_palette
from hpddrnet_trt.models.layouts import MMSEGMENTATION, Layout, in_our_layout

MAX_FILE_BYTES = 4 << 30
MAX_OPCODES = 5_000_000
MAX_TUPLE_ITEMS = 10_000  # in one tuple, counting those of the tuples inside it
ZIP_MAGIC = b"PK\x03\x04"
# Created by the authors' constructor, saved in every checkpoint, called by no forward pass.
UNUSED = ("backbone.ecas.2.", "backbone.sps.2.")
_WRAPPERS = ("module.", "model.")
_LOSSES = ("loss.", "criterion.")  # beside a wrapped network: weights of classes
PADDLE_LINE = (
    "python -c \"import numpy, paddle; numpy.savez('model.npz', **paddle.load('model.pdparams', return_numpy=True))\""
)
_MAX_CONFIG_CHARACTERS = 1 << 20
_MAX_DEPTH = 50  # of a configuration
NORM_EPSILON = 1e-5  # of batch normalisation, PyTorch's


class StandIn:
    """An object of a class that the file names: takes any arguments and any state, and is nothing."""

    def __new__(cls, *_: Any, **__: Any) -> StandIn:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


@dataclass(frozen=True)
class ForeignCheckpoint:
    """What a foreign file holds.

    ``state_dict``: weights by our names, without wrapper prefixes and without the unused modules, floating point as
    float32; ``layout``: where the file's names come from. ``meta``: the file's own ``meta`` dictionary of plain values
    and stand-ins. ``remarks``: what was dropped or changed, one sentence each.
    """

    path: Path
    state_dict: dict[str, Tensor]
    meta: dict[Any, Any] = field(repr=False)
    remarks: list[str]
    layout: Layout = MMSEGMENTATION


def read_foreign(path: str | Path) -> ForeignCheckpoint:
    """Read a checkpoint (``.pth``, ``.npz``, ``.safetensors``; its content decides) without executing anything in it.

    Raises :class:`BadInputFile` when the file is missing, too large, damaged, or holds no weights.
    """
    path = existing_file(path, "checkpoint")
    content = _content_of(path)
    weights = _weights_of(content)
    if not weights:
        raise BadInputFile(
            f"{path} holds no weights (a dictionary of tensors, possibly under 'state_dict'); "
            "give a checkpoint of mmsegmentation, HPDDRNet, DDRNet or PaddleSeg"
        )
    claimed, size = sum(value.numel() * value.element_size() for value in weights.values()), path.stat().st_size
    if claimed > 2 * size:  # many names for the same bytes would fill the memory
        raise BadInputFile(f"{path} claims {claimed} bytes of weights in a file of {size}; it is damaged")
    weights = _without_wrappers(weights)
    remarks = []
    unused = sorted({prefix[:-1] for prefix in UNUSED for name in weights if name.startswith(prefix)})
    if unused:
        remarks.append(f"dropped weights that the network never uses: {', '.join(unused)}")
    state_dict = {
        name: value.detach().to(torch.float32 if value.is_floating_point() else value.dtype, copy=True).contiguous()
        for name, value in weights.items()
        if not name.startswith(UNUSED)
    }
    state_dict, layout = in_our_layout(state_dict)
    remarks += [layout.remark] if layout.remark else []
    meta = content.get("meta") if isinstance(content, dict) else None
    return ForeignCheckpoint(path, state_dict, meta if isinstance(meta, dict) else {}, remarks, layout)


def _content_of(path: Path) -> Any:
    """What the file holds: whatever ``torch.save`` was given, or tensors by their names."""
    with path.open("rb") as stream:
        head = stream.read(300)
    first_name = head[30 : 30 + int.from_bytes(head[26:28], "little")]  # of a zip archive
    if head.startswith(ZIP_MAGIC) and first_name.endswith(b".npy"):
        return _read_arrays(path)
    if head[8:9] == b"{":
        tensors, metadata = parse_safetensors(_limited(path), path)
        if METADATA_KEY in metadata:
            raise BadInputFile(f"{path} is a checkpoint of this package already; use it as it is")
        return tensors
    if path.suffix == ".pdparams":
        raise BadInputFile(f"{path} is Paddle's own format; where Paddle is installed, save its arrays: {PADDLE_LINE}")
    return read_torch_file(path)


def _read_arrays(path: Path) -> dict[str, Tensor]:
    """Arrays of numbers in a file that ``numpy.savez`` wrote."""
    data = _limited(path)
    try:
        names = [entry.filename for entry in _stored(data).infolist()]
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            loaded = {name.removesuffix(".npy"): arrays[name.removesuffix(".npy")] for name in names}
        return {
            name: torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape))
            for name, array in loaded.items()
            if array.dtype.kind in "fiu"
        }
    except Exception as exc:  # a damaged file makes zipfile and NumPy raise of every kind
        raise BadInputFile(
            f"{path} is damaged or no archive of NumPy's arrays ({one_line(exc)}); write it again with numpy.savez"
        ) from exc


def parse_safetensors(content: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; :class:`BadInputFile` when it is none."""
    library = require("safetensors.torch", "train", "read checkpoints")
    error = require("safetensors", "train", "read checkpoints").SafetensorError
    try:
        tensors = library.load(content)
    except (error, ValueError, KeyError) as exc:
        raise BadInputFile(
            f"{path} is not a safetensors file or is truncated ({one_line(exc)}); copy it again, or convert a foreign "
            "checkpoint with: hpddrnet-trt convert-checkpoint"
        ) from exc
    length = int.from_bytes(content[:8], "little")
    return tensors, json.loads(content[8 : 8 + length]).get("__metadata__", {})


def read_torch_file(path: Path) -> Any:
    """Content of a file written by ``torch.save``, on the CPU; nothing of it is run.

    Classes and functions that the file names become :class:`StandIn`. Raises :class:`BadInputFile` when it
    is too large, damaged, in another format, or calls what PyTorch blocks altogether (``os.system``).
    """
    data = _limited(path)
    if not data.startswith((ZIP_MAGIC, b"\x80")):
        raise BadInputFile(
            f"{path} is not a PyTorch checkpoint (neither a zip archive nor a pickle); "
            "give the .pth file that training wrote, or save it again with PyTorch 1.6 or newer"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in damaged text, odd pickle protocols
            names = _names_in_zip(data) if data.startswith(ZIP_MAGIC) else _names_in_stream(data)
            stand_ins: list[Any] = [(StandIn, name) for name in names - {"collections.defaultdict"}]
            with torch.serialization.safe_globals([*stand_ins, (lambda *_: {}, "collections.defaultdict")]):
                return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as exc:  # a damaged file makes PyTorch, zipfile and pickletools raise of every kind
        reason = str(exc) or type(exc).__name__
        if isinstance(exc, pickle.UnpicklingError) and "\n\n" in reason:  # advice and links around the cause
            reason = reason.split("\n\n")[1]
        raise BadInputFile(
            f"{path} is damaged, truncated or no PyTorch checkpoint ({one_line(reason)}); copy or download it again"
        ) from exc


def _limited(path: Path) -> bytes:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise BadInputFile(f"{path} is larger than {MAX_FILE_BYTES >> 30} GiB, too large for a checkpoint")
    return read_file(path, "checkpoint")


def _stored(data: bytes) -> zipfile.ZipFile:
    """A zip archive, held against records that unfold to more than the file has."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it holds compressed records, which neither PyTorch nor numpy.savez writes")
    if sum(entry.file_size for entry in entries) > len(data):
        raise ValueError("its records claim more bytes than the file has")
    return archive


def _names_in_zip(data: bytes) -> set[str]:
    archive = _stored(data)
    pickles = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("it is a zip archive without the one data.pkl of a PyTorch file")
    return _names_in_pickle(io.BytesIO(archive.read(pickles[0])))[0]


def _names_in_stream(data: bytes) -> set[str]:
    """The older format: magic number, protocol, machine, content, storage keys; then the storages."""
    stream = io.BytesIO(data)
    names: set[str] = set()
    for part in range(5):
        more, opcodes = _names_in_pickle(stream)
        names |= more
        if part == 2 and "NEWFALSE" in opcodes:  # the only truth value there is "little_endian"
            raise ValueError("it was written on a big-endian machine")
    return names


def _names_in_pickle(stream: BinaryIO) -> tuple[set[str], set[str]]:
    """Names of classes and functions in one pickle, and its opcodes; the stream is left behind it.

    Walks over the opcodes with the number of items that each tuple unfolds to, and refuses monsters: as the key
    of a dictionary a tuple nested 100,000 deep ends the process, and one of twice the same tuple, thirty times
    over, is never done hashing. Only tuples can: lists and dictionaries are no keys, stand-ins hash as objects.
    """
    names, opcodes = set(), set()
    stack: list[int] = []
    marked: list[list[int]] = []  # stacks set aside by MARK
    memo: dict[int, int] = {}
    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count > MAX_OPCODES:
            raise ValueError("its pickle is too large")
        opcodes.add(opcode.name)
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif opcode.name == "MARK":
            marked.append(stack)
            stack = []
        else:
            items, taken = [], len(opcode.stack_before)
            if pickletools.markobject in opcode.stack_before:
                items, stack, taken = stack, marked.pop(), opcode.stack_before.index(pickletools.markobject)
            items += [stack.pop() for _ in range(taken)]
            size = 1 + sum(items) if opcode.name.startswith("TUPLE") else 1
            if size > MAX_TUPLE_ITEMS:
                raise ValueError("a tuple in its pickle unfolds to too many items")
            stack += [size] * len(opcode.stack_after)
        if opcode.name == "GLOBAL":
            module, _, name = argument.partition(" ")
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            names.add(f"{module}.{name}")
    return names, opcodes


def _weights_of(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        return {}
    for nested in ("state_dict", "model"):
        if isinstance(content.get(nested), dict):
            content = content[nested]
            break
    return {key: value for key, value in content.items() if isinstance(key, str) and _is_weight(value)}


def _is_weight(value: Any) -> bool:
    """An ordinary tensor of numbers: not sparse, quantized or complex, and with values."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_complex()
    )


def _without_wrappers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Strip ``module.`` and ``model.`` while all names carry them, but for those of a loss, which go."""
    while True:
        network = {name: value for name, value in weights.items() if not name.startswith(_LOSSES)}
        prefix = next((p for p in _WRAPPERS if network and all(name.startswith(p) for name in network)), None)
        if prefix is None:
            return weights
        weights = {name[len(prefix) :]: value for name, value in network.items()}


def infer_config(checkpoint: ForeignCheckpoint) -> NetworkConfig:
    """The network's variant, read off names and shapes of the weights.

    A foreign file cannot say where its attention modules sit: the authors' placement is taken.
    Raises :class:`BadInputFile` when these are not weights of HPDDRNet or DDRNet.
    """
    weights = checkpoint.state_dict

    def width(name: str, axis: int, default: int) -> int:
        # A missing or misshapen weight is reported later, together with all others.
        weight = weights.get(name)
        return weight.shape[axis] if weight is not None and weight.ndim > axis else default

    if any(name.startswith(("layer3_1.", "backbone.stem.2.2.")) for name in weights):  # three blocks in a stage of two
        raise BadInputFile(
            f"{checkpoint.path} holds a deeper network, such as DDRNet-39, but this package has DDRNet-23 and "
            "DDRNet-23-slim only"
        )
    if not any(name.startswith("backbone.stem.") for name in weights):
        examples = ", ".join(list(weights)[:3])
        raise BadInputFile(
            f"{checkpoint.path} holds no HPDDRNet or DDRNet with weights named as in mmsegmentation (backbone.*, "
            f"decode_head.*), the DDRNet repository or PaddleSeg (conv1.*, layer3_.*); it has {examples}"
        )
    try:
        return NetworkConfig(
            channels=width("backbone.stem.0.conv.weight", 0, 32),
            ppm_channels=width("backbone.spp.scales.0.conv.weight", 0, 128),
            head_channels=width("decode_head.conv_seg.weight", 1, 64),
            num_classes=width("decode_head.conv_seg.weight", 0, 2),
            eca="context" if any(name.startswith("backbone.ecas.") for name in weights) else "none",
            pam="fusion" if any(name.startswith("backbone.sps.") for name in weights) else "none",
            pool_border=checkpoint.layout.pool_border,
        )
    except ValidationError as exc:
        raise BadInputFile(
            f"{checkpoint.path} describes an impossible network ({first_problem(exc, 'network')})"
        ) from exc


def described_classes(meta: dict[Any, Any]) -> list[ClassInfo] | None:
    """Class names and palette from ``meta``, as mmengine (``dataset_meta``) or mmcv (``CLASSES``) write
    them; None where absent or not usable. Classes without a colour get one of the default palette."""
    dataset = meta.get("dataset_meta")
    source = dataset if isinstance(dataset, dict) else meta
    names = source.get("classes", source.get("CLASSES"))
    palette = source.get("palette", source.get("PALETTE"))
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
        return None
    colors = palette if isinstance(palette, list | tuple) and len(palette) == len(names) else None
    try:
        return [
            ClassInfo(name=name, color=color)
            for name, color in zip(names, colors or default_palette(len(names)), strict=True)
        ]
    except ValidationError:
        return None


@dataclass(frozen=True)
class ForeignSettings:
    """What the configuration in a foreign checkpoint says beside its weights.

    ``normalization``: None where it says nothing usable. ``norm_epsilon``: of the batch normalisations, where it is not
    PyTorch's. ``remarks``: settings of the trained network, or of its tests, that this network does not have.
    """

    normalization: Normalization | None = None
    norm_epsilon: float | None = None
    remarks: tuple[str, ...] = ()


def described_settings(meta: dict[Any, Any]) -> ForeignSettings:
    """Settings from the configuration in ``meta``: ``cfg`` of mmengine, ``config`` of mmsegmentation 0.x.

    A text is Python source; it is parsed, never run, and only literals are read.
    """
    config: dict[Any, Any] | None = None
    for key in ("cfg", "config"):
        config = config or _configuration(meta.get(key))
    if not config:
        return ForeignSettings()
    records = list(_records(config))
    # The first that is complete: preprocessors come before the steps of pipelines in both versions' files.
    places = [config.get("model", {}), config] if isinstance(config.get("model"), dict) else [config]
    preprocessors = [place.get("data_preprocessor") for place in places] + [config.get("img_norm_cfg")]
    steps = [record for record in records if record.get("type") == "Normalize"]
    normalization = None
    for record in [*preprocessors, *steps]:
        if isinstance(record, dict) and "mean" in record and "std" in record:
            normalization = _normalization(record)
            break
    remarks = []
    if any(record.get("align_corners") is True for record in records):
        remarks.append(
            "its configuration says align_corners=True, but this network enlarges without aligning corners, so labels "
            "will differ from those it was trained to give: train it again, or compare before use"
        )
    activations = {str(record["act_cfg"].get("type")) for record in records if isinstance(record.get("act_cfg"), dict)}
    if others := sorted(activations - {"ReLU", "None"}):
        remarks.append(f"its configuration has activations that this network does not have ({', '.join(others)})")
    if scale := _test_scale(config):
        remarks.append(f"it was tested on images brought to within {scale[0]} x {scale[1]} pixels (--resize)")
    norms = [record["norm_cfg"] for record in records if isinstance(record.get("norm_cfg"), dict)]
    norms += [config["norm_cfg"]] if isinstance(config.get("norm_cfg"), dict) else []
    epsilons = {float(norm["eps"]) for norm in norms if isinstance(norm.get("eps"), int | float)}
    epsilon = epsilons.pop() if len(epsilons) == 1 else None
    if epsilons:
        remarks.append("its configuration has several values of eps for batch normalisation; PyTorch's is taken")
    if epsilon is not None and not 0 < epsilon < 1:
        remarks.append(f"its eps for batch normalisation, {epsilon:g}, makes no sense; PyTorch's is taken")
        epsilon = None
    return ForeignSettings(normalization, None if epsilon == NORM_EPSILON else epsilon, tuple(remarks))


def _configuration(value: Any) -> dict[Any, Any] | None:
    if isinstance(value, dict):
        return value
    if not isinstance(value, str) or len(value) > _MAX_CONFIG_CHARACTERS:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in somebody's configuration
            return _literal_assignments(ast.parse(value))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _records(value: Any, depth: int = 0) -> Iterator[dict[Any, Any]]:
    """All dictionaries inside a configuration."""
    if depth > _MAX_DEPTH:
        return
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        yield from _records(inner, depth + 1)


def _test_scale(config: dict[Any, Any]) -> tuple[int, int] | None:
    """The size within which its tests bring images (``Resize`` of mmsegmentation 1.x, ``img_scale`` of 0.x)."""
    steps = list(_records(config.get("test_pipeline")))
    scales = [step.get("scale") for step in steps if step.get("type") == "Resize" and step.get("keep_ratio") is True]
    scales += [step.get("img_scale") for step in steps if step.get("type") == "MultiScaleFlipAug"]
    for scale in scales:
        if isinstance(scale, list | tuple) and len(scale) == 2 and all(isinstance(edge, int) for edge in scale):
            return scale[0], scale[1]
    return None


def _normalization(record: dict[Any, Any]) -> Normalization | None:
    mean, std = record["mean"], record["std"]
    blue_first = False in (record.get("to_rgb"), record.get("bgr_to_rgb"))
    try:
        if blue_first:
            mean, std = mean[::-1], std[::-1]
        normalization = Normalization(mean=mean, std=std)
    except (ValidationError, TypeError):
        return None
    values = (*normalization.mean, *normalization.std)
    return normalization if all(math.isfinite(value) for value in values) else None


def _literal_assignments(module: ast.Module) -> dict[str, Any]:
    values = {}
    for statement in module.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            values[statement.targets[0].id] = _literal(statement.value)
    return values


def _literal(node: ast.AST | None) -> Any:
    """A literal, also ``dict(a=1)``; None for anything else."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {
                key.value: _literal(value)
                for key, value in zip(keys, values, strict=True)
                if isinstance(key, ast.Constant)
            }
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
            return {keyword.arg: _literal(keyword.value) for keyword in keywords if keyword.arg is not None}
    return None
