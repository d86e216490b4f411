"""A segmenter and a dataset with masks that go together."""

from __future__ import annotations

from dataclasses import replace

from hpddrnet_trt.core.errors import ContractError, UsageError
from hpddrnet_trt.core.manifest import Manifest
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.data.intensity import FullScale, range_of
from hpddrnet_trt.inference.segmenter import Segmenter


def matched(segmenter: Segmenter, dataset: FolderDataset) -> tuple[Segmenter, FolderDataset]:
    """Both for 8-bit images in the intensity range of the model, which the dataset makes.

    Raises :class:`ContractError` unless they name the same classes in the same order, and :class:`UsageError` for a
    segmenter with a grey window of its own.
    """
    if segmenter.window not in (None, FullScale()):
        raise UsageError(
            "a dataset gives 8-bit images, which a second grey window would change; "
            "evaluate with a segmenter without window"
        )
    check_classes(segmenter.manifest, dataset)
    return segmenter.taking_8_bits(), replace(dataset, intensity_range=range_of(segmenter.manifest.intensity))


def check_classes(manifest: Manifest, dataset: FolderDataset) -> None:
    """Raise :class:`ContractError` unless model and dataset name the same classes in the same order."""
    model, data = manifest.class_names, dataset.class_names
    if model != data:
        raise ContractError(
            f"model {manifest.name!r} knows the classes {', '.join(model)}, but dataset {dataset.name!r} "
            f"is labelled with {', '.join(data)}; use a dataset with the model's classes in the same order"
        )
