"""Confidence maps as TIFF."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

from hpddrnet_trt.core.files import atomic_path
from hpddrnet_trt.data.labels import scale_options


def write_confidence(
    path: str | Path,
    confidence: npt.NDArray[np.float32],
    *,
    pixel_size_m: float | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write the probability of the chosen class, float32 ``[H, W]`` from 0 to 1, as a one-channel TIFF."""
    with atomic_path(path) as temporary:
        tifffile.imwrite(
            temporary,
            np.asarray(confidence, np.float32),
            photometric="minisblack",
            compression="zlib",
            predictor=True,
            description=None if provenance is None else json.dumps(provenance),
            metadata=None,
            **scale_options(pixel_size_m),
        )
    return Path(path)
