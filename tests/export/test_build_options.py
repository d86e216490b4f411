"""Options of the builder that only TensorRT has: what it is told, what the engine says of itself, what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError
from hpddrnet_trt.core.manifest import EngineRecord
from hpddrnet_trt.engines.cuda import Gpu
from hpddrnet_trt.engines.engine_file import check_gpu
from hpddrnet_trt.engines.tensorrt_library import TensorRT
from hpddrnet_trt.export.build_settings import BuildSettings
from hpddrnet_trt.export.tensorrt import build_engine
from tests.export.simulated_tensorrt import SimulatedBuilder, simulated_builder
from tests.tiny_onnx import tiny_model

CONVOLUTION = {"Name": "c", "LayerType": "CaskConvolution", "ParameterType": "Convolution", "Weights": {"Type": "Half"}}


def built(folder: Path, library: SimulatedBuilder, precision: Any = "fp16", **options: Any) -> EngineRecord:
    source = tiny_model(folder / "m.onnx", typing=precision, shape=(1, 64, 64))
    with simulated_builder(library):
        manifest = build_engine(
            source, folder / "m.engine", precision=precision, settings=BuildSettings(progress=False, **options)
        )
    assert manifest.engine is not None
    return manifest.engine


def test_a_version_compatible_plan_is_read_back_with_permission(tmp_path: Path) -> None:
    library = SimulatedBuilder()
    library.layers = [CONVOLUTION] * 2
    record = built(tmp_path, library, version_compatible=True)
    assert record.version_compatible
    assert "VERSION_COMPATIBLE" in library.told["flags"]
    assert record.layer_precision["source"] == "engine inspector"


@pytest.mark.parametrize(
    ("options", "flags", "told", "described"),
    [
        ({}, set(), {}, {"compute_capabilities": ["8.9"], "refittable": False, "platform": None}),
        ({"hardware_compatible": "ampere-plus"}, set(), {"hardware_compatibility_level": "AMPERE_PLUS"},
         {"compute_capabilities": ["portable"]}),
        ({"hardware_compatible": "same-compute-capability"}, set(),
         {"hardware_compatibility_level": "SAME_COMPUTE_CAPABILITY"}, {"compute_capabilities": ["8.9"]}),
        ({"for_windows": True}, set(), {"runtime_platform": "WINDOWS_AMD64"}, {"platform": "windows"}),
        ({"for_windows": True, "version_compatible": True}, {"VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"},
         {"runtime_platform": "WINDOWS_AMD64"}, {"platform": "windows", "version_compatible": True}),
        ({"refittable": True}, {"REFIT"}, {}, {"refittable": True, "stripped": False}),
        ({"stripped": True}, {"STRIP_PLAN"}, {}, {"refittable": False, "stripped": True}),
        ({"max_aux_streams": 0}, set(), {"max_aux_streams": 0}, {}),
        ({"tf32": True}, set(), {}, {}),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),  # the same in every process
)  # fmt: skip
@pytest.mark.skipif(sys.platform != "linux", reason="engines for Windows are built on Linux")
def test_what_the_builder_is_told(
    tmp_path: Path, options: dict[str, Any], flags: set[str], told: dict[str, Any], described: dict[str, Any]
) -> None:
    library = SimulatedBuilder()
    library.layers = [CONVOLUTION] * 2
    record = built(tmp_path, library, **options)
    assert library.told.get("flags", set()) - {"SPARSE_WEIGHTS"} == flags
    assert {name: getattr(library.told[name], "name", library.told[name]) for name in told} == told
    assert {name: getattr(record, name) for name in described} == described
    inspected = record.layer_precision["source"] == "engine inspector"
    assert inspected == (not options.keys() & {"for_windows", "stripped"})  # what cannot run here is not read back


def test_the_gpu_to_build_on(tmp_path: Path) -> None:
    library = SimulatedBuilder()
    library.layers = [CONVOLUTION] * 2
    source = tiny_model(tmp_path / "m.onnx", typing="fp16", shape=(1, 64, 64))
    settings = BuildSettings(progress=False, device=1)
    with simulated_builder(library, gpus=2) as selected:
        manifest = build_engine(source, tmp_path / "m.engine", precision="fp16", settings=settings)
    assert manifest.engine is not None
    assert manifest.engine.gpu == "Simulated 1"
    assert len(selected) >= 3  # for the builder, in the thread that builds, and to read the engine back
    assert set(selected) == {1}


@pytest.mark.parametrize(
    ("members", "options", "says"),
    [
        ({}, {"tiling": "fast"}, "no --tiling .TensorRT 10.8 and later have"),
        ({}, {"for_windows": True}, "no --for-windows .TensorRT 10.2 and later have"),
        ({"HardwareCompatibilityLevel": SimpleNamespace(AMPERE_PLUS=1)},
         {"hardware_compatible": "same-compute-capability"},
         "no --hardware-compatible same-compute-capability .TensorRT 10.9 and later have"),
        ({}, {"hardware_compatible": "turing"}, "choose ampere-plus, same-compute-capability"),
        ({}, {"max_aux_streams": -1}, "give 0 or more"),
        ({}, {"compute_capabilities": ["8.9"]}, "builds for the GPU it runs on"),
    ],
)  # fmt: skip
def test_what_an_older_tensorrt_lacks(members: dict[str, Any], options: dict[str, Any], says: str) -> None:
    api = TensorRT("tensorrt", SimpleNamespace(**members), "10.1.0", log=None)
    with pytest.raises(UsageError, match=says):
        BuildSettings(**options).check(api)


@pytest.mark.parametrize(
    "option",
    [{"version_compatible": True}, {"hardware_compatible": "ampere-plus"}, {"for_windows": True}, {"stripped": True},
     {"refittable": True}],
    ids=str,
)  # fmt: skip
def test_what_tensorrt_rtx_lacks(option: dict[str, Any]) -> None:
    api = TensorRT("tensorrt-rtx", SimpleNamespace(), "1.7.1", log=None)
    with pytest.raises(UsageError, match=r"TensorRT-RTX 1\.7\.1 cannot build .*; leave that option out"):
        BuildSettings(**option).check(api)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"platform": "windows"}, "was built for Windows; run it there"),
        ({"stripped": True}, r"without its weights; run: hpddrnet-trt refit m\.engine MODEL\.onnx"),
    ],
)
def test_what_does_not_run_here(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    library = SimulatedBuilder()
    library.layers = [CONVOLUTION] * 2
    record = built(tmp_path, library).model_copy(update=changes)
    with pytest.raises(BadInputFile, match=says):
        check_gpu(Path("m.engine"), record, Gpu(0, "Simulated 0", "8.9"))


def test_convolutions_inside_fused_nodes_are_not_missed(tmp_path: Path) -> None:
    """Of two FP16 convolutions the inspector lists one, in another type: no proof of anything."""
    library = SimulatedBuilder()
    library.layers = [{**CONVOLUTION, "Weights": {"Type": "Float"}}, {"Name": "rest", "LayerType": "Myelin"}]
    record = built(tmp_path, library)
    assert record.layer_precision["convolutions"] == {"fp32": 1}
    assert "1 of 2 convolutions" in record.layer_precision["remark"]
    library.layers = [{**CONVOLUTION, "Weights": {"Type": "Float"}}] * 2
    (tmp_path / "m.engine").unlink()
    with pytest.raises(UserError, match=r"labelled FP16, but none .*engine inspector: 2 in FP32"):
        built(tmp_path, library)
    assert not (tmp_path / "m.engine").exists()
