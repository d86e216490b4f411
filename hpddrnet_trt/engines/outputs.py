"""From a runtime's named output tensors to a :class:`Prediction`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.engines.base import Prediction
from hpddrnet_trt.errors import BadInputFile
from hpddrnet_trt.manifest import Manifest
from hpddrnet_trt.scores import arg_max


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
