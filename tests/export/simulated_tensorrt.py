"""TensorRT's builder on a machine without a GPU: TensorRT-RTX's real one, told what only TensorRT takes.

Options that TensorRT-RTX refuses or ignores are noted and not passed on. What is said about TensorRT (which plans
load, what an engine without weights can do) is from the documentation of its 11.4 bindings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from hpddrnet_trt.engines.cuda import Gpu
from hpddrnet_trt.engines.tensorrt_library import TensorRT, load_tensorrt

NOT_PASSED_ON = {"VERSION_COMPATIBLE", "REFIT", "STRIP_PLAN", "EXCLUDE_LEAN_RUNTIME"}
WEIGHTS = b" with the weights of "  # in a refitted plan, before the name of the ONNX file


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
        self.missing: list[str] = []
        self.refitted: str | None = None
        self.api = TensorRT("tensorrt", self, "11.4.0.106", rtx.log)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def Builder(self, log: Any) -> _Builder:
        return _Builder(self.real.Builder(log), self.told)

    def Runtime(self, log: Any) -> Any:
        return _Runtime(self)

    # --- refitting: ``missing``: weights that the ONNX file is said not to have

    SerializationFlag = SimpleNamespace(EXCLUDE_WEIGHTS="EXCLUDE_WEIGHTS", INCLUDE_REFIT="INCLUDE_REFIT")

    def Refitter(self, engine: Any, log: Any) -> Any:
        return SimpleNamespace(refit_cuda_engine=lambda: not self.missing, get_missing_weights=lambda: self.missing)

    def OnnxParserRefitter(self, refitter: Any, log: Any) -> Any:
        def refit_from_file(path: str) -> bool:
            self.refitted = Path(path).name
            return not self.missing

        return SimpleNamespace(refit_from_file=refit_from_file, num_errors=0)


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
            create_execution_context=lambda _: context, create_engine_inspector=lambda: inspector, refitted=None,
            create_serialization_config=lambda: _Serialization(), serialize_with_config=self._serialized(bytes(plan)),
        )  # fmt: skip

    def _serialized(self, plan: bytes) -> Any:
        def serialize(config: _Serialization) -> Any:
            assert self._library.refitted is not None
            assert config.flags == {"INCLUDE_REFIT"}
            return memoryview(plan + WEIGHTS + self._library.refitted.encode())

        return serialize


class _Serialization:
    """A stripped engine's is set to leave the weights out."""

    def __init__(self) -> None:
        self.flags = {"EXCLUDE_WEIGHTS"}

    def set_flag(self, flag: str) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: str) -> None:
        self.flags.discard(flag)


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

    with ExitStack() as stack:
        for room in ("hpddrnet_trt.export.tensorrt", "hpddrnet_trt.export.refit"):
            stack.enter_context(mock.patch(f"{room}.find_gpu", find_gpu))
            stack.enter_context(mock.patch(f"{room}.current_device", current_device))
        stack.enter_context(mock.patch("hpddrnet_trt.export.tensorrt.choose_tensorrt", return_value=library.api))
        stack.enter_context(mock.patch("hpddrnet_trt.export.refit.load_tensorrt", return_value=library.api))
        yield selected


