"""How long each layer of a TensorRT engine takes on the GPU at hand."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.engines.base import input_contract
from hpddrnet_trt.engines.tensorrt import TensorRTEngine
from hpddrnet_trt.files import write_text

WARM_UP = 5  # runs that are not counted


def layer_times(path: str | Path, images: npt.NDArray[Any], *, runs: int = 50, device: int = 0) -> dict[str, float]:
    """Median milliseconds of each engine layer, by the layer's name, over ``runs`` inferences of one batch.

    Layers are timed one after the other, so their sum is more than the time of an undisturbed run.
    Raises what :class:`~hpddrnet_trt.engines.tensorrt.TensorRTEngine` raises.
    """
    with TensorRTEngine(path, device=device) as engine:
        return _medians(engine, images, runs)


def _medians(engine: TensorRTEngine, images: npt.NDArray[Any], runs: int) -> dict[str, float]:
    times: dict[str, list[float]] = defaultdict(list)
    for run in engine.profile(images, WARM_UP + runs)[WARM_UP:]:
        for name, milliseconds in run:
            times[name].append(milliseconds)
    return {name: median(values) for name, values in times.items()}


def write_layer_times(path: str | Path, target: str | Path, size: tuple[int, int], *, runs: int = 50) -> Path:
    """Measure on a frame of noise of ``size`` (height, width); writes JSON: ``gpu``, ``shape``, ``milliseconds``."""
    with TensorRTEngine(path) as engine:
        contract = input_contract(engine.manifest)
        shape = (contract.batch.minimum, contract.channels, *size)
        noise = np.random.default_rng(0).integers(0, 256, shape)
        images = noise.astype(np.uint8) if contract.dtype == "uint8" else (noise / 255).astype(np.float32)
        times = _medians(engine, images, runs)
        record = {"gpu": engine.runtime, "shape": list(shape), "milliseconds": times}
    return write_text(target, json.dumps(record, indent=1) + "\n")
