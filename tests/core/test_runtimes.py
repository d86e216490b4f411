"""Runtimes are imported without their reports, and a program that has decided for itself is left alone."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from hpddrnet_trt.core import runtimes as quiet
from hpddrnet_trt.core.errors import MissingDependency


class Imports:
    """What each import would have met."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.switch: list[str | None] = []
        self.reporter: list[Any] = []
        monkeypatch.setattr(quiet, "require", self._require)
        for name in ("onnxruntime", "openvino", "openvino_telemetry"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)

    def _require(self, module: str, extra: str, purpose: str) -> ModuleType:
        self.switch.append(os.environ.get("ORT_DISABLE_TELEMETRY"))
        self.reporter.append(sys.modules.get("openvino_telemetry", "not imported"))
        return ModuleType(module)


@pytest.fixture
def imports(monkeypatch: pytest.MonkeyPatch) -> Imports:
    return Imports(monkeypatch)


def test_they_are_switched_off_during_the_import_only(imports: Imports) -> None:
    assert quiet.load_onnxruntime().__name__ == "onnxruntime"
    assert imports.switch == ["1"]
    assert "ORT_DISABLE_TELEMETRY" not in os.environ
    assert quiet.load_openvino().__name__ == "openvino"
    assert imports.reporter[-1] is None  # cannot be imported
    assert "openvino_telemetry" not in sys.modules


def test_a_program_that_imported_them_has_decided(imports: Imports, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    quiet.load_onnxruntime()
    quiet.load_openvino()
    assert imports.switch == [None, None]
    assert imports.reporter == ["not imported"] * 2


def test_settings_of_the_program_stay(imports: Imports, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    reporter = ModuleType("openvino_telemetry")
    monkeypatch.setitem(sys.modules, "openvino_telemetry", reporter)
    quiet.load_onnxruntime()
    quiet.load_openvino()
    assert imports.switch == ["0", "0"]
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"
    assert sys.modules["openvino_telemetry"] is reporter


def test_nothing_stays_behind_where_they_are_missing(imports: Imports, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str, extra: str, purpose: str) -> ModuleType:
        raise MissingDependency(f"{module} is needed to {purpose}")

    monkeypatch.setattr(quiet, "require", missing)
    with pytest.raises(MissingDependency, match="onnxruntime is needed to fly"):
        quiet.load_onnxruntime("fly")
    with pytest.raises(MissingDependency, match="openvino is needed to fly"):
        quiet.load_openvino("fly")
    assert "ORT_DISABLE_TELEMETRY" not in os.environ
    assert "openvino_telemetry" not in sys.modules


def test_a_session_is_opened_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[2] x) => (float[2] y) { y = Neg(x) }'
    )
    asked: list[tuple[Any, dict[str, Any]]] = []
    real = onnxruntime.InferenceSession

    def recorded(source: bytes, options: Any, **others: Any) -> Any:
        asked.append((options, others))
        return real(source, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", recorded)
    settings = {"graph_optimization_level": "ORT_DISABLE_ALL", "session.intra_op.allow_spinning": "0"}
    opened = quiet.session(model, threads=2, settings=settings, disabled_optimizers=["WeightBiasQuantization"])
    assert opened.run(None, {"x": np.array([1, 2], np.float32)})[0].tolist() == [-1, -2]
    options, others = asked.pop()
    assert (options.intra_op_num_threads, options.log_severity_level) == (2, 3)
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert others == {"providers": ["CPUExecutionProvider"], "disabled_optimizers": ["WeightBiasQuantization"]}
    quiet.session(model, defaults=True)
    assert asked.pop() == (None, {"providers": ["CPUExecutionProvider"]})
    with pytest.raises(quiet.onnxruntime_errors()):
        quiet.session(b"no model")
