"""Whatever we call of TensorRT, TensorRT-RTX, cuda.core and cuda.bindings exists in the real ones, and so returns."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

from hpddrnet_trt.core.precisions import BY_TENSORRT_TYPE
from hpddrnet_trt.export.build_settings import _CAME_LATER, _FLAGS, Tiling
from tests.engines.real_modules import MODULES, Findings, RealModule, check, members, write_stub

WRONG = """
import tensorrt as trt

def wrong(module: trt.Module, context: trt.IExecutionContext, config: trt.IBuilderConfig) -> None:
    context.execute_async_v4(0)
    context.set_input_shape(tensor="image", shape=(1, 1, 8, 8))
    config.set_flag(module.BuilderFlag.FP17)
    config.set_flag(module.BuilderFlag.TF32, True)
    module.Bilder
    if config.set_flag(module.BuilderFlag.TF32):
        return

class Profiler(trt.IProfiler):
    def report_layer_time(self, layer_name: str) -> None: ...
"""


Look = Callable[[RealModule], tuple[Path, Findings]]


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory: pytest.TempPathFactory) -> Look:
    """A module's stub, and what was found with it; once for each module."""

    @cache
    def look(real: RealModule) -> tuple[Path, Findings]:
        stub = write_stub(real, tmp_path_factory.mktemp("real"))
        return stub, check(real, stub)

    return look


@pytest.mark.parametrize("real", MODULES, ids=lambda real: real.name)
def test_every_use_is_one_of_the_real_module(real: RealModule, looked_at: Look) -> None:
    if (missing := real.missing()) is not None:
        pytest.skip(missing)
    stub, findings = looked_at(real)
    assert findings.errors == ()
    assert len(findings.uses) >= real.least
    if "export/tensorrt.py" in real.files:  # names that the package makes of its own words
        known = members(stub)
        assert {tiling.upper() for tiling in get_args(Tiling)} <= known["TilingOptimizationLevel"]
        assert set(_FLAGS.values()) <= known["BuilderFlag"]
        assert {"FLOAT", "HALF", "BF16", "INT8", "FP8"} == set(BY_TENSORRT_TYPE) <= known["DataType"]


@pytest.mark.parametrize("real", [real for real in MODULES if real.libraries is not None], ids=lambda real: real.name)
def test_what_came_with_a_later_version_is_there_from_then_on(real: RealModule, looked_at: Look) -> None:
    if (missing := real.missing()) is not None:
        pytest.skip(missing)
    known = members(looked_at(real)[0])
    for *_, name, since in _CAME_LATER:
        place, _, member = name.partition(".")
        there = place in known and (not member or member in known[place])
        assert there == (numbers(str(real.folder)) >= numbers(since)), name


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


def test_what_is_asked_for_exists_in_one_of_them(looked_at: Look) -> None:
    present = [real for real in MODULES if real.missing() is None and real.alias == "tensorrt"]
    if not present:
        pytest.skip("neither TensorRT-RTX nor a wheel of TensorRT is here")
    asked = frozenset().union(*(looked_at(real)[1].asked for real in present))
    known = [entry for real in present for entry in members(looked_at(real)[0]).items()]
    offered = {f"{name}.{member}" for name, all_members in known for member in all_members}
    assert len(asked) >= 2
    assert asked <= offered


def test_wrong_uses_are_found(tmp_path: Path, looked_at: Look) -> None:
    real = next(real for real in MODULES if real.rtx)
    if (missing := real.missing()) is not None:
        pytest.skip(missing)
    file = tmp_path / "wrong.py"
    file.write_text(WRONG)
    errors = check(real, looked_at(real)[0], [file]).errors
    for line, word in (
        (5, "execute_async_v4"), (6, "set_input_shape"), (7, "FP17"), (8, "set_flag"), (9, "Bilder"),
        (10, "does not return a value"), (14, "report_layer_time"),
    ):  # fmt: skip
        assert any(f"wrong.py:{line}: error" in error and word in error for error in errors), (line, errors)
