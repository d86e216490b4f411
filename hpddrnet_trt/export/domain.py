"""Statistics of a model's own pictures, for the domain guard: from pictures to a description, from a file to a file.

Crops of the training pictures are seen as they are and as training may show them (focus, noise, contrast, brightness,
gamma), so that what the model has learned to read does not count as foreign; nothing is turned or scaled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.domain import fit_domain
from hpddrnet_trt.core.errors import UsageError, UserError, require
from hpddrnet_trt.core.files import sha256_of
from hpddrnet_trt.core.manifest import (
    SIZE_MULTIPLE,
    DomainRecord,
    InputContract,
    Manifest,
    read_manifest,
    write_described,
)
from hpddrnet_trt.core.progress import progress_bar
from hpddrnet_trt.data.augment import Augmentation, AugmentConfig
from hpddrnet_trt.data.datasets import FolderDataset, dataset_layout, evenly, find_images
from hpddrnet_trt.data.intensity import range_of
from hpddrnet_trt.data.preprocess import network_input
from hpddrnet_trt.export.images import read_grey
from hpddrnet_trt.export.uncertainty import describe_uncertainty

Grey = npt.NDArray[np.uint8]
Features = Callable[[Grey], npt.NDArray[np.float32]]  # an image [H, W] to its features [F, rows, columns]

MOST_PICTURES = 64  # of a split; spread evenly over longer ones
MOST_CROPS = 512
CROPS = (8, 32)  # of a picture, least and most
LARGEST = 1024  # pixels: of a picture whose distance is measured, the middle
SHOWN = 5  # every so manieth crop is as training may show it
CROP = (256, 256)  # where nothing is known of the training's
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DomainPictures:
    """Where the statistics come from: ``training`` and ``held_out`` give grey pictures uint8 ``[H, W]`` one by one."""

    training: Sequence[Callable[[], Grey]]
    held_out: Sequence[Callable[[], Grey]]
    source: str
    augmentation: AugmentConfig  # its crop, and what it does to grey levels


def domain_record(features: Features, pictures: DomainPictures, size: tuple[int, int] | None = None) -> DomainRecord:
    """The statistics of ``features`` over the pictures; the same pictures give the same.

    ``size``: height and width of all images that ``features`` takes, where these are fixed. Raises what reading a
    picture raises, :class:`UsageError` for none, and :class:`UserError` for features that tell nothing.
    """
    training, held_out = (evenly(loads, MOST_PICTURES) for loads in (pictures.training, pictures.held_out))
    if not training:
        raise UsageError(f"{pictures.source} holds no picture; give the pictures that the model was trained on")
    crop = size or pictures.augmentation.crop
    plain = Augmentation(AugmentConfig.none(crop))
    still = {"crop": crop, "rotation_probability": 0.0, "flip": False, "scale_probability": 0.0, "class_balance": 0.0}
    shown = Augmentation(pictures.augmentation.model_copy(update=still))
    each = min(max(MOST_CROPS // len(training), CROPS[0]), CROPS[1])

    def cells(image: Grey) -> npt.NDArray[np.float32]:
        found = features(image)
        return found.reshape(len(found), -1).T

    found = []
    bar = progress_bar([*training, *held_out], desc="features of the domain", unit="picture", delay=2)
    for place, load in enumerate(bar):
        image = load()
        whole = cells(_middle(image, size))
        if place >= len(training):
            found.append((whole, whole))
            continue
        crops = [
            (plain if number % SHOWN else shown)(image, np.zeros_like(image), _generator(place, number))[0]
            for number in range(each)
        ]
        found.append((np.concatenate([cells(part) for part in crops]), whole))
    return fit_domain(
        found[: len(training)], [whole for whole, _ in found[len(training) :]],
        crops=each * len(training), source=pictures.source,
    )  # fmt: skip


def describe_domain(
    model: str | Path,
    data: str | Path | None,
    target: str | Path | None = None,
    *,
    split: str = "train",
    like: str | Path | None = None,
) -> Manifest:
    """Write ``model``, a checkpoint (``.safetensors``) or an ONNX file, with the statistics of ``data``.

    ``data``: a dataset folder, whose ``split`` the model was trained on and whose ``val`` split, if it has one, helps
    to say what is unusual, and with its masks how sure class scores are and how far fractions are off
    (:mod:`hpddrnet_trt.export.uncertainty`); or a folder of micrographs. ``target``: the file to write (default:
    ``model`` itself, replaced once the new one is complete). An ONNX file gets the output ``domain_features``; weights
    stay. ``like``: in place of ``data`` a file of the same model that has statistics, a checkpoint or an FP32 file,
    from which a converted or calibrated one takes them. Returns the new description. Raises :class:`UsageError` for
    other files and what reading raises; then nothing is written.
    """
    if (data is None) == (like is None):
        raise UsageError("give either the data that the model was trained on or a file to take the statistics from")
    model = Path(model)
    target = model if target is None else Path(target)
    manifest = read_manifest(model)
    kind = model.suffix.lower()
    if kind not in (".safetensors", ".onnx"):
        raise UsageError(f"{model} takes no statistics any more; describe the ONNX file and build the engine from it")
    if target.suffix.lower() != kind:
        raise UsageError(f"the file to write, {target}, must end with {kind} as {model} does")
    if data is None:
        return _take_over(model, target, Path(str(like)))
    pictures = _of_folder(data, split, manifest)
    described = (_describe_onnx if kind == ".onnx" else describe_checkpoint)(model, target, pictures)
    if dataset_layout(data) is None:
        return described
    try:
        dataset = FolderDataset.open(data)
    except UserError as exc:  # pictures without masks, which is enough for the statistics
        log.warning("area fractions of %s will have no interval: %s", target, exc)
        return described
    return describe_uncertainty(target, dataset)


def _take_over(model: Path, target: Path, like: Path) -> Manifest:
    known, manifest = read_manifest(like), read_manifest(model)
    if known.domain is None:
        raise UsageError(f"{like} has no statistics of its domain; describe it with its training pictures first")
    if differs := [
        name for name in ("network", "classes", "normalization") if getattr(known, name) != getattr(manifest, name)
    ]:
        raise UsageError(f"{like} is not the model of {model}: {', '.join(differs)} differ")
    manifest = manifest.replace(domain=known.domain)
    if manifest.output is None or not manifest.output.confidence:  # that is computed at a temperature in the file
        manifest = manifest.replace(temperature=known.temperature, fraction_errors=known.fraction_errors)
    if model.suffix.lower() == ".safetensors":
        write_described(model, target, manifest)
        return manifest
    from hpddrnet_trt.graph.domain import with_domain
    from hpddrnet_trt.graph.model import load_model, save_model

    assert manifest.output is not None
    made_from = sha256_of(like) if like.suffix.lower() == ".safetensors" else known.checkpoint_sha256
    output = manifest.output.model_copy(update={"domain": True})
    manifest = manifest.replace(output=output, checkpoint_sha256=made_from)
    save_model(with_domain(load_model(model)[0]), target, manifest)
    return manifest


def describe_checkpoint(model: Path, target: Path, pictures: DomainPictures) -> Manifest:
    """Write a checkpoint of ours with the statistics of ``pictures`` and return its description."""
    require("torch", "export", "compute a checkpoint's features")
    from hpddrnet_trt.models.checkpoints import load_checkpoint
    from hpddrnet_trt.models.domain import domain_features

    network, manifest = load_checkpoint(model)
    record = domain_record(partial(domain_features, network, normalization=manifest.normalization), pictures)
    manifest = manifest.replace(domain=record)
    write_described(model, target, manifest)
    return manifest


def _describe_onnx(model: Path, target: Path, pictures: DomainPictures) -> Manifest:
    import tempfile

    from hpddrnet_trt.engines.base import input_contract
    from hpddrnet_trt.engines.onnxruntime import OnnxRuntimeEngine
    from hpddrnet_trt.graph.domain import with_domain
    from hpddrnet_trt.graph.model import load_model, save_model

    graph, manifest = load_model(model)
    contract = input_contract(manifest)
    assert manifest.output is not None
    graph = with_domain(graph)
    manifest = manifest.replace(domain=None, output=manifest.output.model_copy(update={"domain": True}))
    with tempfile.TemporaryDirectory() as folder:
        measured = save_model(graph, Path(folder) / "model.onnx", manifest)
        with OnnxRuntimeEngine(measured) as engine:
            record = domain_record(partial(_engine_features, engine, contract), pictures, _fixed(contract))
    manifest = manifest.replace(domain=record)
    save_model(graph, target, manifest)
    return manifest


def _engine_features(engine: Any, contract: InputContract, image: Grey) -> npt.NDArray[np.float32]:
    batch = network_input(
        [image] * (contract.batch.fixed or contract.batch.minimum), contract, engine.manifest.normalization
    )
    found = engine.infer(batch).domain_features
    assert found is not None
    return np.asarray(found[0])


def _fixed(contract: InputContract) -> tuple[int, int] | None:
    height, width = contract.height.fixed, contract.width.fixed
    return None if height is None or width is None else (height, width)


def _of_folder(data: str | Path, split: str, manifest: Manifest) -> DomainPictures:
    levels = range_of(manifest.intensity)
    training = find_images(data, split)
    held_out: list[Path] = []
    if dataset_layout(data) is not None and split != "val":
        try:
            held_out = find_images(data, "val")
        except UsageError:
            log.info("%s has no split val; what is unusual is told from the training pictures alone", data)
    crop = CROP if manifest.data is None else manifest.data.crop or CROP
    return DomainPictures(
        training=[partial(read_grey, path, levels, manifest.read_at_m) for path in training],
        held_out=[partial(read_grey, path, levels, manifest.read_at_m) for path in held_out],
        source=f"{Path(data).name} ({split})",
        augmentation=AugmentConfig(crop=crop),
    )


def _middle(image: Grey, size: tuple[int, int] | None) -> Grey:
    """The middle of an image, up to :data:`LARGEST` and a multiple of 8, or of the one size (mirrored beyond it)."""
    edges = size or tuple(
        max(min(edge, LARGEST) // SIZE_MULTIPLE * SIZE_MULTIPLE, SIZE_MULTIPLE) for edge in image.shape
    )
    top, left = (max(0, edge - wanted) // 2 for edge, wanted in zip(image.shape, edges, strict=True))
    part = image[top : top + edges[0], left : left + edges[1]]
    if part.shape == tuple(edges):
        return np.ascontiguousarray(part)
    return np.pad(part, [(0, wanted - edge) for edge, wanted in zip(part.shape, edges, strict=True)], mode="symmetric")


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
