"""Checkpoints of mmsegmentation and of the HPDDRNet authors: their layout, in our terms.

Weights are named ``backbone.*`` and ``decode_head.*``, possibly behind ``module.`` or ``model.``, and
lie at the top of the file or under ``state_dict`` or ``model``. A full mmengine runner checkpoint
(with optimizer, schedulers, message hub) is read like any other; only weights and ``meta`` are used.
Nothing in the file is executed: see :mod:`hpddrnet_trt.models.unpickle`.
"""

from __future__ import annotations

import ast
import colorsys
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from hpddrnet_trt.core.errors import BadInputFile
from hpddrnet_trt.core.manifest import ClassInfo, NetworkConfig, Normalisation
from hpddrnet_trt.models.unpickle import TensorRecord, TorchFile, read_torch_file

# Created by the authors' constructor, saved in every checkpoint, called by no forward pass.
UNUSED = ("backbone.ecas.2.", "backbone.sps.2.")
_WRAPPERS = ("module.", "model.")
_MAX_CONFIG_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class ForeignCheckpoint:
    """What was found in a foreign file.

    ``state_dict``: weights by their name in the layout above, without wrapper prefixes and without
    the unused modules, floating point as float32. ``meta``: the file's own ``meta`` dictionary of
    plain values and inert records. ``remarks``: what was dropped or changed, one sentence each.
    """

    path: Path
    state_dict: dict[str, Tensor]
    meta: dict[Any, Any] = field(repr=False)
    remarks: list[str]


def read_foreign(path: str | Path) -> ForeignCheckpoint:
    """Read a ``.pth`` checkpoint without executing anything in it.

    Raises :class:`BadInputFile` when the file is missing, damaged, or holds no weights.
    """
    file = read_torch_file(path)
    content = file.content
    records = _weights_of(content)
    if not records:
        raise BadInputFile(
            f"{file.path} holds no weights (a dictionary of tensors, possibly under 'state_dict'); "
            "give a checkpoint of mmsegmentation or of HPDDRNet"
        )
    records = _without_wrappers(records)
    remarks = []
    unused = sorted({prefix[:-1] for prefix in UNUSED for name in records if name.startswith(prefix)})
    if unused:
        remarks.append(f"dropped weights that the network never uses: {', '.join(unused)}")
        records = {name: value for name, value in records.items() if not name.startswith(UNUSED)}
    meta = content.get("meta") if isinstance(content, dict) else None
    return ForeignCheckpoint(file.path, _tensors(file, records), meta if isinstance(meta, dict) else {}, remarks)


def _weights_of(content: Any) -> dict[str, TensorRecord]:
    if not isinstance(content, dict):
        return {}
    for nested in ("state_dict", "model"):
        if isinstance(content.get(nested), dict):
            content = content[nested]
            break
    return {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, TensorRecord)}


def _without_wrappers(records: dict[str, TensorRecord]) -> dict[str, TensorRecord]:
    """Strip ``module.`` and ``model.`` while all names carry them."""
    while (prefix := next((p for p in _WRAPPERS if all(name.startswith(p) for name in records)), None)) is not None:
        records = {name[len(prefix) :]: value for name, value in records.items()}
    return records


def _tensors(file: TorchFile, records: dict[str, TensorRecord]) -> dict[str, Tensor]:
    total = sum(math.prod(record.size) * record.storage.itemsize for record in records.values())
    if total > 2 * file.size:  # many names for the same bytes would fill the memory
        raise BadInputFile(f"{file.path} claims {total} bytes of weights in a file of {file.size}; it is damaged")
    return {name: _tensor(file, record) for name, record in records.items()}


def _tensor(file: TorchFile, record: TensorRecord) -> Tensor:
    dtype: torch.dtype = getattr(torch, record.storage.dtype)
    target = torch.float32 if dtype.is_floating_point else dtype
    if 0 in record.size:
        return torch.empty(record.size, dtype=target)
    flat = torch.frombuffer(bytearray(file.storage_bytes(record.storage)), dtype=dtype)
    return flat.as_strided(record.size, record.stride, record.offset).to(target, copy=True).contiguous()


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

    if not any(name.startswith("backbone.stem.") for name in weights):
        examples = ", ".join(list(weights)[:3])
        raise BadInputFile(
            f"{checkpoint.path} holds no HPDDRNet or DDRNet in mmsegmentation's layout (weights named backbone.* "
            f"and decode_head.*); it has {examples}"
        )
    try:
        return NetworkConfig(
            channels=width("backbone.stem.0.conv.weight", 0, 32),
            ppm_channels=width("backbone.spp.scales.0.conv.weight", 0, 128),
            head_channels=width("decode_head.conv_seg.weight", 1, 64),
            num_classes=width("decode_head.conv_seg.weight", 0, 2),
            eca="context" if any(name.startswith("backbone.ecas.") for name in weights) else "none",
            pam="fusion" if any(name.startswith("backbone.sps.") for name in weights) else "none",
        )
    except ValidationError as exc:
        first = exc.errors()[0]
        raise BadInputFile(
            f"{checkpoint.path} describes an impossible network ({first['loc'][0]}: {first['msg']})"
        ) from exc


def described_classes(meta: dict[Any, Any]) -> list[ClassInfo] | None:
    """Class names and palette from ``meta``, as mmengine (``dataset_meta``) or mmcv (``CLASSES``) write
    them; None where absent or not usable. Classes without a colour get one of :func:`distinct_colours`."""
    dataset = meta.get("dataset_meta")
    source = dataset if isinstance(dataset, dict) else meta
    names = source.get("classes", source.get("CLASSES"))
    palette = source.get("palette", source.get("PALETTE"))
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
        return None
    colours = palette if isinstance(palette, list | tuple) and len(palette) == len(names) else None
    try:
        return [
            ClassInfo(name=name, color=colour)
            for name, colour in zip(names, colours or distinct_colours(len(names)), strict=True)
        ]
    except ValidationError:
        return None


def distinct_colours(count: int) -> list[tuple[int, int, int]]:
    """``count`` RGB colours that differ well: hues a golden angle apart, bright and dark in turn."""
    colours = []
    for index in range(count):
        value = 230 if index % 2 == 0 else 150
        red, green, blue = colorsys.hsv_to_rgb((index * 0.618034) % 1.0, 0.85, value)
        colours.append((round(red), round(green), round(blue)))
    return colours


def described_normalisation(meta: dict[Any, Any]) -> Normalisation | None:
    """Mean and standard deviation from the configuration text in ``meta['cfg']``, or None.

    The text is Python source; it is parsed, never run, and only literals are read.
    """
    text = meta.get("cfg")
    if not isinstance(text, str) or len(text) > _MAX_CONFIG_CHARACTERS:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in somebody's configuration
            config = _literal_assignments(ast.parse(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    model = config.get("model")
    places = [model.get("data_preprocessor") if isinstance(model, dict) else None,
              config.get("data_preprocessor"), config.get("img_norm_cfg")]  # fmt: skip
    for place in places:
        if isinstance(place, dict) and "mean" in place and "std" in place:
            return _normalisation(place["mean"], place["std"])
    return None


def _normalisation(mean: Any, std: Any) -> Normalisation | None:
    try:
        found = Normalisation(mean=mean, std=std)
    except ValidationError:
        return None
    return found if all(math.isfinite(value) for value in (*found.mean, *found.std)) else None


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
