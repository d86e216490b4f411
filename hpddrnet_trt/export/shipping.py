"""A trained checkpoint in the small form in which models are shared: half the bytes, the same labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hpddrnet_trt.core.errors import require
from hpddrnet_trt.core.files import existing_file
from hpddrnet_trt.export.onnx import ExportOptions, export_network
from hpddrnet_trt.graph.model import load_model, save_model

if TYPE_CHECKING:
    import onnx

_SMALLEST = 1024  # values; below, nothing is won


class ShippedFiles(NamedTuple):
    """What :func:`ship` wrote."""

    checkpoint: Path
    onnx: Path


def ship(
    checkpoint: str | Path, folder: str | Path, *, name: str | None = None, images: Sequence[Path] = ()
) -> ShippedFiles:
    """Write ``<name>.safetensors`` and ``<name>.onnx`` with FP16 kernels and matrices to ``folder``.

    Both compute in FP32: the ONNX file casts its constants once, when a runtime loads it. It is
    exported from the rounded checkpoint and compared with it on ``images``, or on simulated ones.
    ``name`` (default: the checkpoint's) goes into both descriptions. Raises as
    :func:`~hpddrnet_trt.export.onnx.export_onnx` does.
    """
    checkpoint, folder = existing_file(checkpoint, "checkpoint"), Path(folder)
    require("torch", "export", "ship a checkpoint")
    from hpddrnet_trt.models.checkpoints import load_checkpoint, save_checkpoint

    network, manifest = load_checkpoint(checkpoint)
    manifest = manifest.replace(name=name or manifest.name)
    small = save_checkpoint(folder / f"{manifest.name}.safetensors", network, manifest, half=True)
    network, manifest = load_checkpoint(small)
    target = folder / f"{manifest.name}.onnx"
    export_network(network, manifest, target, ExportOptions(), images=images)
    model, description = load_model(target)
    store_in_half(model)
    save_model(model, target, description)
    return ShippedFiles(small, target)


def store_in_half(model: onnx.ModelProto) -> None:
    """Store large FP32 constants of ``model`` in FP16, each behind a cast back; changes ``model``.

    Vectors stay as they are (folded shifts, a thousandth of the bytes), and so does what FP16 cannot hold.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    casts = []
    for entry in graph.initializer:
        values = numpy_helper.to_array(entry)
        if values.dtype != np.float32 or values.ndim < 2 or values.size < _SMALLEST:
            continue
        if np.abs(values).max() > np.finfo(np.float16).max:
            continue
        stored = f"{entry.name}.half"
        casts.append(helper.make_node("Cast", [stored], [entry.name], f"{entry.name}/Cast", to=TensorProto.FLOAT))
        entry.CopyFrom(numpy_helper.from_array(values.astype(np.float16), stored))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
