"""TensorRT's builder on a machine without a GPU: TensorRT-RTX's real one, told what only TensorRT takes.

Options that TensorRT-RTX refuses or ignores are noted and not passed on. What is said about TensorRT (which plans
load, what an engine without weights can do) is from the documentation of its 11.4 bindings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from hpddrnet_trt.engines.cuda import Gpu
from hpddrnet_trt.engines.tensorrt_library import TensorRT, load_tensorrt

NOT_PASSED_ON = {"VERSION_COMPATIBLE", "REFIT", "STRIP_PLAN", "EXCLUDE_LEAN_RUNTIME"}
WEIGHTS = b"weights of "  # stands for them in a plan, before the name of the ONNX file


class _Config:
    def __init__(self, real: Any, told: dict[str, Any]) -> None:
        self.__dict__.update(real=real, told=told)

    def set_flag(self, flag: Any) -> None:
        self.told.setdefault("flags", set()).add(flag.name)
        if flag.name not in NOT_PASSED_ON:
            self.real.set_flag(flag)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.told[name] = value
        if name not in ("hardware_compatibility_level", "runtime_platform"):
            setattr(self.real, name, value)


class _Builder:
    def __init__(self, real: Any, told: dict[str, Any]) -> None:
        self.real, self.told = real, told

    def create_builder_config(self) -> _Config:
        return _Config(self.real.create_builder_config(), self.told)

    def build_serialized_network(self, network: Any, config: _Config) -> Any:
        return self.real.build_serialized_network(network, config.real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


class SimulatedBuilder:
    """The module ``tensorrt``; ``told``: what the builder was told; ``layers``: what the inspector lists."""

    def __init__(self) -> None:
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX, which builds without a GPU, is missing")
        rtx = load_tensorrt("tensorrt-rtx")
        self.real, self.told = rtx.module, dict[str, Any]()
        self.layers: list[Any] = []
        self.api = TensorRT("tensorrt", self, "11.4.0.106", rtx.log)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def Builder(self, log: Any) -> _Builder:
        return _Builder(self.real.Builder(log), self.told)

    def Runtime(self, log: Any) -> Any:
        return _Runtime(self)


class _Runtime:
    def __init__(self, library: SimulatedBuilder) -> None:
        self._library = library
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, plan: Any) -> Any:
        """None for a plan with a runtime library of its own that was not allowed, and for one for another system."""
        flags = self._library.told.get("flags", set())
        if "VERSION_COMPATIBLE" in flags and not self.engine_host_code_allowed:
            return None
        if "runtime_platform" in self._library.told:
            return None
        inspector = SimpleNamespace(
            get_engine_information=lambda _: json.dumps({"Layers": self._library.layers, "Bindings": []})
        )
        context = None if "STRIP_PLAN" in flags else SimpleNamespace(set_input_shape=lambda *_: True)
        return SimpleNamespace(
            create_execution_context=lambda _: context, create_engine_inspector=lambda: inspector, plan=bytes(plan)
        )


@contextmanager
def simulated_builder(library: SimulatedBuilder, gpus: int = 1) -> Iterator[list[int]]:
    """Builds with TensorRT go to ``library``; gives the GPUs that were made current, in order."""
    selected: list[int] = []

    def find_gpu(index: int = 0) -> Gpu:
        assert index < gpus
        return Gpu(index, f"Simulated {index}", "8.9")

    def current_device(index: int) -> Any:
        selected.append(index)
        return nullcontext()

    where = "hpddrnet_trt.export.tensorrt"
    with (
        mock.patch(f"{where}.choose_tensorrt", return_value=library.api),
        mock.patch(f"{where}.find_gpu", find_gpu),
        mock.patch(f"{where}.current_device", current_device),
    ):
        yield selected


