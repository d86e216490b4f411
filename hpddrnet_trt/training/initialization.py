"""What a training starts from: random weights, a pretrained backbone, or a whole trained network."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.core.manifest import Manifest, Normalization
from hpddrnet_trt.data.datasets import FolderDataset, SplitStatistics
from hpddrnet_trt.models.checkpoints import load_backbone_weights, load_checkpoint
from hpddrnet_trt.models.network import HPDDRNet
from hpddrnet_trt.training.config import TrainConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """A network before its first step."""

    network: HPDDRNet
    normalization: Normalization
    remarks: list[str]  # for the description of the model


def starting_point(config: TrainConfig, dataset: FolderDataset, statistics: SplitStatistics, data_sha256: str) -> Start:
    """The network that ``config`` starts from, for the classes of ``dataset``.

    ``statistics`` of the training split give the normalisation, unless ``network.initial`` does;
    ``data_sha256`` is the dataset's checksum. Seeds PyTorch with ``run.seed``. Raises
    :class:`UsageError` when the checkpoint does not fit the settings or the data,
    :class:`~hpddrnet_trt.core.errors.BadInputFile` when it cannot be read.
    """
    torch.manual_seed(config.run.seed)
    if config.network.initial is not None:
        return _whole(config, config.network.initial, dataset, data_sha256)
    if config.quantisation.enabled:
        raise UsageError(
            "quantisation.enabled fine-tunes a trained network; give its checkpoint with "
            "network.initial=runs/x/x.safetensors"
        )
    network = HPDDRNet(config.network.resolve(len(dataset.classes)))
    return Start(network, _normalization(config, statistics), _pretrain(network, config.network.pretrained))


def _whole(config: TrainConfig, path: Path, dataset: FolderDataset, data_sha256: str) -> Start:
    network, manifest = load_checkpoint(path)
    names = [entry.name for entry in dataset.classes]
    if manifest.class_names != names:
        raise UsageError(
            f"{path} tells apart {', '.join(manifest.class_names)}, but the classes of {dataset.root} are "
            f"{', '.join(names)}; give a network with the same classes in this order, or start from its "
            "backbone with network.pretrained"
        )
    _check_settings(config, path, manifest)
    if manifest.data is not None and manifest.data.sha256 not in (None, data_sha256):
        log.warning(
            "%s was trained on other images or masks (%s); what it has seen may be in the validation split",
            path, manifest.data.name,
        )  # fmt: skip
    remark = f"training started from {path.name} (SHA-256 {str(manifest.checkpoint_sha256)[:12]})"
    return Start(network.train(), manifest.normalization, [*manifest.remarks, remark])


def _check_settings(config: TrainConfig, path: Path, manifest: Manifest) -> None:
    """Settings that were given must not contradict the file; those left out are the file's."""
    section, own = config.network, dict(manifest.network)
    given = {key for key in section.model_fields_set if getattr(section, key) is not None}
    asked = dict(section.resolve(manifest.network.num_classes))
    compared = set(asked) & (set(asked) if "variant" in given else given)
    wrong = [f"{key} is {own[key]}, not {asked[key]}" for key in sorted(compared) if asked[key] != own[key]]
    if wrong:
        raise UsageError(
            f"{path} holds {manifest.network.name} ({'; '.join(wrong)}); leave out the network.* settings, which "
            "the file brings along"
        )
    if "normalisation" in config.data.model_fields_set:
        imagenet = manifest.normalization == Normalization()
        if imagenet != (config.data.normalisation == "imagenet"):
            raise UsageError(
                f"{path} was trained with {'ImageNet' if imagenet else 'its data set'}'s normalisation, not "
                f"data.normalisation={config.data.normalisation}; leave the setting out"
            )


def _pretrain(network: HPDDRNet, path: Path | None) -> list[str]:
    if path is None:
        return []
    remarks = load_backbone_weights(network, path)
    for remark in remarks:
        log.info("%s: %s", path, remark)
    return [f"training started from the backbone in {path.name}"]


def _normalization(config: TrainConfig, statistics: SplitStatistics) -> Normalization:
    if config.data.normalisation == "imagenet":
        return Normalization()
    mean, std = statistics.grey_mean, max(statistics.grey_std, 1.0)
    return Normalization(mean=(mean, mean, mean), std=(std, std, std))
