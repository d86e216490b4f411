"""The trained network that the package ships, read once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from hpddrnet_trt.graph.nodes import fold_constants, name_nodes
from tests.graph import residual_onnx

SHIPPED = Path(__file__).resolve().parents[2] / "hpddrnet_trt" / "weights" / "nasa-super1.onnx"


@pytest.fixture(scope="session")
def shipped() -> Any:
    """Its FP32 graph, constants folded (the kernels are stored in FP16), nodes named; not to be changed."""
    model = onnx.load(str(SHIPPED))
    fold_constants(model.graph)
    name_nodes(model)
    return model


@pytest.fixture(scope="session")
def quantized(shipped: Any) -> Any:
    """The same with INT8 pairs for TensorRT and invented ranges; not to be changed."""
    return residual_onnx.quantized(shipped)
