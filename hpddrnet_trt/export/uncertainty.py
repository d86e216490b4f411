"""The temperature of class scores and the errors of area fractions, from pictures with masks into a model file."""

from __future__ import annotations

import logging
from pathlib import Path

from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.manifest import Manifest, read_manifest, write_described
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.inference import load_segmenter
from hpddrnet_trt.inference.uncertainty import with_uncertainty

log = logging.getLogger(__name__)


def describe_uncertainty(model: Path, dataset: FolderDataset, split: str = "val") -> Manifest:
    """Write a checkpoint or ONNX file again with what its class scores and fractions are worth on a held-out split.

    Weights stay. A model for which that cannot be measured (no class scores, no such split, other classes) stays as it
    is, and a warning says why. Returns the description.
    """
    manifest = read_manifest(model)
    try:
        with load_segmenter(model, precision="file", intervals=True) as segmenter:
            described = with_uncertainty(manifest, segmenter, dataset, split, progress=False)
    except UserError as exc:
        log.warning("area fractions of %s will have no interval: %s", model, exc)
        return manifest
    if described == manifest:
        return manifest
    if model.suffix.lower() == ".safetensors":
        write_described(model, model, described)
    else:
        from hpddrnet_trt.graph.model import load_model, save_model

        save_model(load_model(model)[0], model, described)
    return described
