"""Saving and loading the network: our own format, and conversion of foreign checkpoints.

Ours is a safetensors file whose header carries the :class:`~hpddrnet_trt.core.manifest.Manifest` as JSON:
weights and their description in one file, and nothing in it can run.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from hpddrnet_trt import __version__
from hpddrnet_trt.core.errors import BadInputFile, UsageError, one_line, require
from hpddrnet_trt.core.files import existing_file, read_file, sha256_of, write_bytes
from hpddrnet_trt.core.manifest import (
    METADATA_KEY,
    ClassInfo,
    DataRecord,
    Manifest,
    NetworkConfig,
    default_palette,
    parse_manifest,
)
from hpddrnet_trt.models.foreign import (
    NORM_EPSILON,
    ZIP_MAGIC,
    ForeignCheckpoint,
    described_classes,
    described_settings,
    infer_config,
    parse_safetensors,
    read_foreign,
)
from hpddrnet_trt.models.layouts import in_our_layout
from hpddrnet_trt.models.network import Head, HPDDRNet

SUFFIX = ".safetensors"
_COUNTER = ".num_batches_tracked"
# What a checkpoint pretrained for image classification does not have.
_SEGMENTATION_ONLY = ("spp.", "ecas.", "sps.")
log = logging.getLogger(__name__)


def save_checkpoint(path: str | Path, network: HPDDRNet, manifest: Manifest, *, half: bool = False) -> Path:
    """Write weights and description to ``path`` (``.safetensors``), whole or not at all.

    ``half`` stores kernels and matrices in FP16, for half the size; vectors (statistics, biases) stay
    FP32, since small variances would vanish. Raises :class:`UsageError` for another ending or a
    manifest of another network.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise UsageError(f"a checkpoint's name ends in {SUFFIX}, not {path.suffix or 'nothing'!r}: {path}")
    if manifest.network != network.config:
        raise UsageError(
            f"the description is of {manifest.network.name} with {manifest.network.num_classes} classes, the network "
            f"is {network.config.name} with {network.config.num_classes}"
        )
    description = manifest.replace(checkpoint_sha256=None)  # a file cannot hold its own checksum
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in network.state_dict().items()}
    if half:
        tensors = {name: value.half() if value.ndim > 1 else value for name, value in tensors.items()}
    content = _safetensors().save(tensors, metadata={METADATA_KEY: description.to_json()})
    return write_bytes(path, content)


def load_checkpoint(path: str | Path) -> tuple[HPDDRNet, Manifest]:
    """Read a checkpoint of ours: the network in evaluation mode on the CPU, and its description
    with ``checkpoint_sha256`` filled in.

    Raises :class:`BadInputFile` when the file is missing, damaged, without a description, or when
    its weights do not fit the network it describes.
    """
    path = Path(path)
    content = read_file(path, "checkpoint")
    weights, metadata = parse_safetensors(content, path)
    if METADATA_KEY not in metadata:
        raise BadInputFile(
            f"{path} carries no description of the model (classes, network); it was not written by this package: "
            "give a checkpoint of hpddrnet-trt train or convert-checkpoint"
        )
    manifest = parse_manifest(metadata[METADATA_KEY], path)
    if not isinstance(manifest.network, NetworkConfig):
        raise BadInputFile(f"{path} describes an adopted network, which has no checkpoint; give its ONNX file")
    network = _build(manifest.network, weights, path)
    return network, manifest.replace(checkpoint_sha256=hashlib.sha256(content).hexdigest())


def load_any_checkpoint(path: str | Path) -> tuple[HPDDRNet, Manifest]:
    """Like :func:`load_checkpoint` for our format and for foreign ones, told apart by content."""
    path = existing_file(path, "checkpoint")
    if not _is_foreign(path):
        return load_checkpoint(path)
    network, manifest = _from_foreign(read_foreign(path), path.stem, None, None)
    return network, manifest.replace(checkpoint_sha256=sha256_of(path))


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    name: str | None = None,
    classes: Sequence[str] | None = None,
    palette: Sequence[tuple[int, int, int]] | None = None,
    license: str | None = None,
) -> Manifest:
    """Write our format from a checkpoint of mmsegmentation, the HPDDRNet or DDRNet authors, or PaddleSeg.

    Their names of weights are told apart by content: see :mod:`hpddrnet_trt.models.layouts`.
    ``name`` of the model (default: the source's file name); ``classes`` and ``palette`` (RGB, 0..255)
    replace what the file says; ``license`` of the data the model was trained on. Returns the
    description, whose ``remarks`` tell what was dropped or assumed.

    Raises :class:`BadInputFile` for a file that does not hold such a network (one error lists every
    missing, unknown or misshapen weight) and :class:`UsageError` for classes that do not match it.
    """
    checkpoint = read_foreign(source)
    network, manifest = _from_foreign(checkpoint, name or checkpoint.path.stem, classes, palette)
    if license is not None:
        manifest = manifest.replace(data=DataRecord(name="unknown", license=license))
    written = save_checkpoint(target, network, manifest)
    for remark in manifest.remarks:
        log.info("%s: %s", source, remark)
    return manifest.replace(checkpoint_sha256=sha256_of(written))


def load_backbone_weights(network: HPDDRNet, path: str | Path) -> list[str]:
    """Start training from pretrained weights: copy a checkpoint's backbone into ``network``.

    Reads backbone-only files (``stem.0.conv.weight`` ...), such as mmsegmentation's ImageNet models,
    full foreign checkpoints, and ours; the classifiers are left alone. Pyramid pooling and attention
    may be absent as a whole, since ImageNet models have none; they keep their values. Unknown weights
    are ignored. Both are in the returned remarks. Raises :class:`BadInputFile`, listing them
    all, when other weights are missing or any has another shape; ``network`` is then unchanged.
    """
    path = existing_file(path, "checkpoint")
    remarks: list[str] = []
    if _is_foreign(path):
        checkpoint = read_foreign(path)
        given, remarks = checkpoint.state_dict, list(checkpoint.remarks)
    else:
        given, _ = in_our_layout(parse_safetensors(read_file(path, "checkpoint"), path)[0])
    if any(key.startswith("backbone.") for key in given):
        given = {key[len("backbone.") :]: value for key, value in given.items() if key.startswith("backbone.")}
    expected = network.backbone.state_dict()
    absent = tuple(
        part for part in _SEGMENTATION_ONLY
        if any(key.startswith(part) for key in expected) and not any(key.startswith(part) for key in given)
    )  # fmt: skip
    if absent:
        expected = {key: value for key, value in expected.items() if not key.startswith(absent)}
        remarks.append(f"not in the file, trained from their initial values: {', '.join(part[:-1] for part in absent)}")
    unknown = sorted(key for key in given if key not in expected)
    if unknown:
        remarks.append(f"ignored {len(unknown)} weights that the backbone does not have: {', '.join(unknown)}")
    wanted = {key: value for key, value in given.items() if key in expected}
    weights = _fitting(expected, wanted, f"the backbone of {network.config.name}", path)
    network.backbone.load_state_dict(weights, strict=False)  # completeness was checked above
    return remarks


def with_classes(network: HPDDRNet, known: Sequence[int | None]) -> HPDDRNet:
    """A network of the same weights for other classes: ``known`` holds the index that each of them has in ``network``,
    None for one that is new, whose rows of the two classifiers are drawn as for a new network."""
    other = HPDDRNet(network.config.model_copy(update={"num_classes": len(known)}))
    weights = network.state_dict()
    with torch.no_grad():
        for name, value in other.state_dict().items():
            if "cls_seg" not in name and "conv_seg" not in name:
                value.copy_(weights[name])
                continue
            for index, before in enumerate(known):
                if before is not None:
                    value[index] = weights[name][before]
    return other


def _from_foreign(
    checkpoint: ForeignCheckpoint,
    name: str,
    classes: Sequence[str] | None,
    palette: Sequence[tuple[int, int, int]] | None,
) -> tuple[HPDDRNet, Manifest]:
    config = infer_config(checkpoint)
    settings = described_settings(checkpoint.meta)
    remarks = [*checkpoint.remarks, *settings.remarks]
    weights = _with_auxiliary(_with_epsilon(checkpoint.state_dict, settings.norm_epsilon), config, remarks)
    network = _build(config, weights, checkpoint.path)
    normalization = settings.normalization
    if normalization is None:
        normalization = checkpoint.layout.normalization
        remarks.append(f"the file names no normalisation; {checkpoint.layout.normalized_by} are assumed")
    manifest = Manifest(
        name=name,
        network=config,
        classes=_class_table(checkpoint, config.num_classes, classes, palette, remarks),
        normalization=normalization,
        remarks=remarks,
        versions={"hpddrnet_trt": __version__, "torch": str(torch.__version__)},
    )
    return network, manifest


def _with_epsilon(weights: Mapping[str, Tensor], epsilon: float | None) -> Mapping[str, Tensor]:
    """Weights that give under PyTorch's epsilon of batch normalisation what these give under another."""
    if epsilon is None:
        return weights
    return {
        name: value.double().add(epsilon - NORM_EPSILON).float() if name.endswith(".running_var") else value
        for name, value in weights.items()
    }


def _with_auxiliary(weights: Mapping[str, Tensor], config: NetworkConfig, remarks: list[str]) -> Mapping[str, Tensor]:
    """``weights`` with an auxiliary classifier where the file has none at all, as after training without."""
    hidden = weights.get("decode_head.head.0.conv.weight")
    # Its size is that of what the file does hold, so nothing larger than the file is made.
    fits = hidden is not None and hidden.shape == (config.head_channels, 4 * config.channels, 3, 3)
    if not fits or any(name.startswith("decode_head.aux_") for name in weights):
        return weights
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        new = Head(config).state_dict()
    remarks.append("the file has no auxiliary classifier, which only training uses; it starts anew")
    return {**{f"decode_head.{name}": value for name, value in new.items() if name.startswith("aux_")}, **weights}


def _class_table(
    checkpoint: ForeignCheckpoint,
    count: int,
    names: Sequence[str] | None,
    palette: Sequence[tuple[int, int, int]] | None,
    remarks: list[str],
) -> list[ClassInfo]:
    """Classes from the arguments, else from the file, else numbered (with a remark)."""
    for what, given in (("class names", names), ("colours", palette)):
        if given is not None and len(given) != count:
            raise UsageError(f"{len(given)} {what} were given but {checkpoint.path} has {count} classes")
    described = described_classes(checkpoint.meta)
    if described is not None and len(described) != count:
        remarks.append(f"the file describes {len(described)} classes but its network has {count}; ignored")
        described = None
    if names is None and described is None:
        remarks.append("the file names no classes; they are numbered")
    chosen = names or [entry.name for entry in described or []] or [f"class {index}" for index in range(count)]
    colors = palette or [entry.color for entry in described or []] or default_palette(count)
    try:
        return [ClassInfo(name=name, color=color) for name, color in zip(chosen, colors, strict=True)]
    except ValidationError as exc:
        raise UsageError(f"class names must be text and colours three values each: {exc.errors()[0]['msg']}") from exc


def _build(config: NetworkConfig, weights: Mapping[str, Tensor], source: Path) -> HPDDRNet:
    """The network with these weights, in evaluation mode."""
    # On the meta device a network costs no memory, so a lying shape is found before it is allocated,
    # and the random state that training is seeded with is left alone.
    with torch.device("meta"):
        network = HPDDRNet(config)
    what = f"{config.name} with {config.num_classes} classes"
    network.load_state_dict(_fitting(network.state_dict(), weights, what, source), assign=True)
    return network.eval()


def _fitting(
    expected: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str, source: Path
) -> dict[str, Tensor]:
    """``given`` in the types of ``expected``, or an error that says how many do not fit, and names the first."""
    missing = [name for name in expected if name not in given and not name.endswith(_COUNTER)]
    unknown = sorted(name for name in given if name not in expected)
    misshapen = [
        f"{name} is {tuple(given[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in given and given[name].shape != value.shape
    ]
    lists = (("missing", missing), ("unknown", unknown), ("misshapen", misshapen))
    parts = [f"{len(names)} {kind}: {one_line(', '.join(names))}" for kind, names in lists if names]
    if parts:
        raise BadInputFile(
            f"the weights in {source} do not fit {what} ({'; '.join(parts)}); "
            "give a checkpoint of this network, or train one"
        )
    for name, value in given.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise BadInputFile(f"{source} holds a weight that is not finite ({one_line(name)}): its training diverged")
    # Files older than the batch counter lack it; it plays no part in inference.
    return {
        name: given[name].to(value.dtype) if name in given else torch.zeros(value.shape, dtype=value.dtype)
        for name, value in expected.items()
    }


def _is_foreign(path: Path) -> bool:
    # A safetensors file starts with the length of its header, whose third byte on is small or zero,
    # and with "{" at the ninth byte; a pickle starts with 0x80 and its protocol number.
    with path.open("rb") as stream:
        head = stream.read(9)
    return head.startswith(ZIP_MAGIC) or (head[:1] == b"\x80" and head[8:9] != b"{")


def _safetensors() -> Any:
    return require("safetensors.torch", "train", "read and write checkpoints")
