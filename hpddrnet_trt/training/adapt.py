"""Carry a trained network to another material, instrument or day without masks.

Batch normalisation remembers mean and variance of every channel over the training pictures. On other pictures these are
others, and everything behind them is read wrongly. Here they are measured anew on pictures without masks and mixed with
those of the training (Schneider et al., "Improving robustness against common corruptions by covariate shift
adaptation", NeurIPS 2020; arXiv:2006.16971): the mean of few pictures of one kind is not to be trusted alone. The
weights stay.

Without masks nobody can say whether labels became better. What can be said is whether the pictures came nearer to those
of the training, as the domain guard sees it, and whether the network agrees better with itself on the same picture
turned and shown in another contrast; where either became worse, :attr:`Adaptation.doubts` says so.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from hpddrnet_trt.core.domain import domain_of
from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.magnification import PixelSizes, in_words, rescaling
from hpddrnet_trt.core.manifest import SIZE_MULTIPLE, Manifest
from hpddrnet_trt.core.metrics import LabelComparison
from hpddrnet_trt.core.progress import progress_bar
from hpddrnet_trt.data.augment import contrast
from hpddrnet_trt.data.datasets import evenly, find_images
from hpddrnet_trt.data.intensity import range_of
from hpddrnet_trt.data.micrograph import read_micrograph
from hpddrnet_trt.export.images import Crop, cut, plan_crops, read_grey, windows, with_content
from hpddrnet_trt.models.checkpoints import load_checkpoint, save_checkpoint
from hpddrnet_trt.models.domain import predict_with_domain
from hpddrnet_trt.models.network import HPDDRNet
from hpddrnet_trt.weights import CHECKPOINT, locate

MIXES = (0.3, 0.6, 1.0)  # shares of the new statistics: tried where none is given
MOST_PICTURES = 64
LOOKED_AT = 12  # pictures that the network is judged on, before and after
LARGEST = 768  # pixels: of such a picture, the middle
CROPS = 96  # at least, from all pictures together
BATCH = 8
CROP = (256, 256)  # where nothing is known of the training's
_FADED = 0.7  # contrast of the second look at a picture
Grey = npt.NDArray[np.uint8]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Look:
    """How a network sees some pictures. ``distance``: the domain guard's, median over the pictures; None for a model
    without statistics. ``agreement``: share of pixels with the same label in a picture and in the same picture turned
    by 180 degrees with 0.7 of its contrast."""

    distance: float | None
    agreement: float


@dataclass(frozen=True)
class Adaptation:
    """What became of a model. ``mix``: share of the new statistics; ``changed``: of pixels with another label than
    before."""

    manifest: Manifest
    pictures: int
    mix: float
    before: Look
    after: Look
    changed: float

    @property
    def doubts(self) -> list[str]:
        """Sentences about what became worse; empty where nothing did."""
        found = []
        if (self.after.distance or 0) > (self.before.distance or 0):
            found.append("the pictures lie farther from those of the training than before")
        if self.after.agreement < self.before.agreement:
            found.append("the model agrees less with itself on a picture that is turned and faded")
        return found


def adapt(
    model: str | Path,
    data: str | Path,
    target: str | Path,
    *,
    split: str = "train",
    mix: float | None = None,
) -> Adaptation:
    """Write the checkpoint ``model`` (or a shipped model's) to ``target`` with the batch-norm statistics of ``data``.

    ``data``: a folder of micrographs, a pattern, or a dataset, of which ``split`` is taken; masks are not looked
    at. ``mix``: share of their statistics, above 0 to 1; None: that of :data:`MIXES` with which the network agrees best
    with itself. The description loses what was measured with the former statistics: metrics, temperature and errors of
    fractions. The statistics of the domain guard stay those of the training pictures. The same pictures give the same
    file. Warns of pictures that are not at the pixel size of the model. Raises :class:`UsageError` for another ``mix``,
    for an ONNX file, for ``model`` as its own ``target`` and for pictures that show nothing, and what reading model and
    pictures raises; then nothing is written.
    """
    if mix is not None and not 0 < mix <= 1:
        raise UsageError(f"the share of the new statistics must be above 0 and at most 1, not {mix:g}")
    path = locate(model, CHECKPOINT)
    if path.suffix.lower() == ".onnx":
        raise UsageError(
            f"{model} is an ONNX file, where batch normalization is part of the convolutions or another program's; "
            "give the checkpoint (.safetensors) that it was exported from"
        )
    if path.resolve() == Path(target).resolve():
        raise UsageError(f"{target} would overwrite the model it is made from; choose another output path")
    network, manifest = load_checkpoint(path)
    images = evenly(find_images(data, split), MOST_PICTURES)
    crop = manifest.data.crop if manifest.data is not None and manifest.data.crop else CROP
    levels, read_at = range_of(manifest.intensity), manifest.read_at_m
    if read_at is not None:
        _tell_sizes(images, read_at)
    crops, _ = with_content(plan_crops(images, *crop, CROPS, intensity_range=levels, read_at_m=read_at), *crop)
    if len(crops) < 2:
        raise UsageError(f"{data} shows next to nothing ({len(images)} pictures); give micrographs of the material")
    shown = [_middle(read_grey(path, levels, read_at)) for path in evenly(images, LOOKED_AT)]
    before, labels = _look(network, manifest, shown)
    seen = measured(network, manifest, crops, crop)
    trained = {name: network.state_dict()[name].clone() for name in seen}
    looks: dict[float, tuple[Look, list[Grey]]] = {}
    for share in MIXES if mix is None else (mix,):
        network.load_state_dict(mixed(trained, seen, share), strict=False)
        looks[share] = _look(network, manifest, shown)
    mix = max(looks, key=lambda share: looks[share][0].agreement)
    network.load_state_dict(mixed(trained, seen, mix), strict=False)
    after, others = looks[mix]
    remark = (
        f"batch-norm statistics: {mix:.0%} those of {len(images)} pictures without masks ({Path(data).name}); "
        "not evaluated"
    )
    described = manifest.replace(
        metrics={}, temperature=None, fraction_errors=None, remarks=[*manifest.remarks, remark], checkpoint_sha256=None
    )
    save_checkpoint(target, network, described)
    return Adaptation(described, len(images), mix, before, after, 1 - _agreement(labels, others))


def _tell_sizes(images: Sequence[Path], read_at_m: PixelSizes) -> None:
    """Warn of pictures that are not brought to the pixel size of the model, or not without loss."""
    pictures = [(path, read_micrograph(path)) for path in images]
    unknown = sum(picture.pixel_size_m is None for _, picture in pictures)
    if unknown:
        log.warning(
            "%d of %d pictures come without a pixel size and are read as they are, though the model was trained at %s",
            unknown, len(images), in_words(read_at_m),
        )  # fmt: skip
    scales = [(path, rescaling(each.pixel_size_m, read_at_m, each.pixels.shape[:2]).remark) for path, each in pictures]
    if remarks := [f"{path}: {remark}" for path, remark in scales if remark]:
        log.warning("%s%s", remarks[0], f"; {len(remarks) - 1} more are like it" if len(remarks) > 1 else "")


def measured(
    network: HPDDRNet, manifest: Manifest, crops: Sequence[Crop], size: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """Batch-norm statistics of crops of ``size`` (height, width), by their names in ``network``, which keeps its own.

    Those of the auxiliary head, which is not run, are not among them."""
    norms = {name: module for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}
    trained = {name: (norm.momentum, copy.deepcopy(norm.state_dict())) for name, norm in norms.items()}
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
        norm.train()
    # Every batch holds crops from all over the pictures; one of a single crop has no variance after global pooling.
    pictures = np.stack([grey for _, grey in windows(crops, *size)])
    count = max(1, len(pictures) // BATCH)
    for first in progress_bar(range(count), desc="batch-norm statistics", unit="batch", delay=2):
        with torch.no_grad():
            network(_normalized(pictures[first::count], manifest))
    found: dict[str, torch.Tensor] = {}
    for name, norm in norms.items():
        if norm.num_batches_tracked:
            found |= {f"{name}.{kind}": getattr(norm, kind).clone() for kind in ("running_mean", "running_var")}
        norm.momentum, known = trained[name]
        norm.load_state_dict(known)
        norm.eval()
    return found


def mixed(trained: Mapping[str, torch.Tensor], seen: Mapping[str, torch.Tensor], mix: float) -> dict[str, torch.Tensor]:
    """Statistics of which ``mix`` are those of ``seen``."""
    return {name: (1 - mix) * trained[name] + mix * value for name, value in seen.items()}


def _look(network: HPDDRNet, manifest: Manifest, pictures: Sequence[Grey]) -> tuple[Look, list[Grey]]:
    """How the network sees pictures, and their labels."""
    labels, again, distances = [], [], []
    for picture in pictures:
        seen, features = _predict(network, manifest, picture)
        labels.append(seen)
        if manifest.domain is not None:
            distances.append(domain_of([features], manifest.domain).distance)
        faded, _ = contrast(picture, picture, _FADED, np.random.default_rng(0))
        again.append(_predict(network, manifest, faded[::-1, ::-1])[0][::-1, ::-1])
    known = [distance for distance in distances if distance is not None]
    return Look(float(np.median(known)) if known else None, _agreement(labels, again)), labels


def _predict(network: HPDDRNet, manifest: Manifest, picture: Grey) -> tuple[Grey, npt.NDArray[np.float32]]:
    """Labels of a picture, and its features for the domain guard."""
    with torch.inference_mode():
        logits, features = predict_with_domain(network, _normalized(picture[None], manifest))
    return logits.argmax(dim=1)[0].to(torch.uint8).numpy(), features[0].numpy()


def _normalized(pictures: Grey, manifest: Manifest) -> torch.Tensor:
    """``[N, H, W]`` to the network's input."""
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1) for values in (manifest.normalization.mean, manifest.normalization.std)
    )
    return (torch.from_numpy(pictures.astype(np.float32))[:, None] - mean) / std


def _agreement(some: Sequence[Grey], others: Sequence[Grey]) -> float:
    compared = LabelComparison(256)
    for one, other in zip(some, others, strict=True):
        compared.update(one, other)
    return compared.agreement


def _middle(picture: Grey) -> Grey:
    """The middle, up to :data:`LARGEST` pixels and a multiple of 8; small pictures are continued to one."""
    height, width = (max(min(edge, LARGEST) // SIZE_MULTIPLE, 1) * SIZE_MULTIPLE for edge in picture.shape)
    top, left = max(picture.shape[0] - height, 0) // 2, max(picture.shape[1] - width, 0) // 2
    return cut(picture, Crop(Path(), top, left), height, width)
