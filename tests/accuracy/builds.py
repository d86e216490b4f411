"""Engines of TensorRT-RTX behind the acceptance check, built without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpddrnet_trt.accuracy.acceptance import AcceptanceCheck, Budget
from hpddrnet_trt.accuracy.build import build_verified
from hpddrnet_trt.core.manifest import Manifest
from tests.tiny_onnx import QUIET


def build(
    source: Path, target: Path, data: Path, budget: Budget, *, size: int = 96, reference: Path | None = None,
    precision: Any = "int8", under_shift: bool = False, **options: Any,
) -> Manifest:  # fmt: skip
    """``source`` built for square pictures of one size, and judged on the test split of ``data``."""
    return build_verified(
        source, target, precision=precision,
        acceptance=AcceptanceCheck(data, budget, reference=reference, under_shift=under_shift),
        runtime="tensorrt-rtx", shapes=f"1x1x{size}x{size}", settings=QUIET, **options,
    )  # fmt: skip
