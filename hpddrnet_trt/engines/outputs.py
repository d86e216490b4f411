"""From a runtime's named output tensors to a :class:`Prediction`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import BadInputFile
from hpddrnet_trt.core.manifest import Manifest
from hpddrnet_trt.core.metrics import arg_max
from hpddrnet_trt.engines.base import Prediction


def expected_outputs(manifest: Manifest, present: Collection[str], path: Path) -> list[str]:
    """Names of the outputs that the manifest promises; :class:`BadInputFile` when the file lacks one."""
    assert manifest.output is not None  # engines ask input_contract first
    names: list[str] = [manifest.output.kind]
    # Where there are logits, the confidence follows from them and need not be an output of its own.
    if manifest.output.confidence and (manifest.output.kind == "labels" or "confidence" in present):
        names.append("confidence")
    missing = [name for name in names if name not in present]
    if missing:
        raise BadInputFile(
            f"{path} has no output {' and '.join(missing)} (it has: {', '.join(present) or 'none'}) although its "
            "description promises it; export it again"
        )
    return names


def to_prediction(outputs: Mapping[str, npt.NDArray[Any]]) -> Prediction:
    """Wrap output arrays without copying them; labels come from logits where the model gives those."""
    logits, confidence = (
        None if outputs.get(name) is None else np.asarray(outputs[name], dtype=np.float32)
        for name in ("logits", "confidence")
    )
    labels = arg_max(logits) if logits is not None else np.asarray(outputs["labels"], dtype=np.uint8)
    return Prediction(labels, confidence, logits)


def checked_prediction(
    outputs: Mapping[str, npt.NDArray[Any]], manifest: Manifest, shape: Sequence[int]
) -> Prediction:
    """:func:`to_prediction` of what came from an input ``[N, C, H, W]``.

    Raises :class:`BadInputFile` for what the description does not promise: other shapes or types, or labels
    of classes that there are not (10 us at 1024x1024).
    """
    batch, _, height, width = shape
    classes = manifest.network.num_classes
    for name in outputs.keys() & {"labels", "confidence", "logits"}:
        array = outputs[name]
        promised = (batch, classes, height, width) if name == "logits" else (batch, height, width)
        if array.shape != promised:
            raise _broken(manifest, f"its output {name} has the shape {array.shape} instead of {promised}")
        if array.dtype.kind != ("u" if name == "labels" else "f"):
            raise _broken(manifest, f"its output {name} is of type {array.dtype}")
    if "logits" not in outputs and (largest := int(outputs["labels"].max())) >= classes:
        raise _broken(manifest, f"it gave the label {largest}, and has the classes 0 to {classes - 1}")
    return to_prediction(outputs)


def _broken(manifest: Manifest, why: str) -> BadInputFile:
    return BadInputFile(
        f"the file of model {manifest.name!r} does not do what its description promises ({why}); export it again"
    )
