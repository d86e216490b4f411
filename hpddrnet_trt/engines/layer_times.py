"""A file of layer times of a TensorRT engine, measured on the GPU at hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from hpddrnet_trt.core.files import write_text
from hpddrnet_trt.engines.base import input_contract
from hpddrnet_trt.engines.tensorrt import TensorRTEngine


def write_layer_times(path: str | Path, target: str | Path, size: tuple[int, int], *, runs: int = 50) -> Path:
    """Measure on a frame of noise of ``size`` (height, width); writes JSON: ``gpu``, ``shape``, ``milliseconds``.

    Raises what :class:`~hpddrnet_trt.engines.tensorrt.TensorRTEngine` raises.
    """
    with TensorRTEngine(path) as engine:
        contract = input_contract(engine.manifest)
        shape = (contract.batch.minimum, contract.channels, *size)
        noise = np.random.default_rng(0).integers(0, 256, shape)
        images = noise.astype(np.uint8) if contract.dtype == "uint8" else (noise / 255).astype(np.float32)
        times = engine.layer_times(images, runs)
        record = {"gpu": engine.runtime, "shape": list(shape), "milliseconds": times}
    return write_text(target, json.dumps(record, indent=1) + "\n")
