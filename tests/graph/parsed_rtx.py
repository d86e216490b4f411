"""A graph as TensorRT-RTX's parser reads it, which needs no GPU; skips where TensorRT-RTX is missing."""

from __future__ import annotations

import importlib.util
from typing import Any

import onnx
import pytest

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx, which builds without a GPU, is missing"
)


class Parsed:
    """``network``: the network definition made of a strongly typed ``model``; ``trt``: the library."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.trt: Any = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
        self._logger = self.trt.Logger(self.trt.Logger.INTERNAL_ERROR)
        self._builder = self.trt.Builder(self._logger)
        self.network = self._builder.create_network(1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self._parser = self.trt.OnnxParser(self.network, self._logger)
        errors = (self._parser.get_error(number) for number in range(self._parser.num_errors))
        assert self._parser.parse(model.SerializeToString()), list(map(str, errors))

    def build(self, *shapes: tuple[int, ...], target: str | None = None) -> Any:
        """The serialized engine for a profile (least, best, largest shape of ``image``), or None."""
        config = self._builder.create_builder_config()
        if shapes:
            profile = self._builder.create_optimization_profile()
            profile.set_shape("image", *shapes)
            config.add_optimization_profile(profile)
        if target is not None:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(self.trt.ComputeCapability, target), 0)
        return self._builder.build_serialized_network(self.network, config)
