"""Peak memory by image size: the table, TensorRT's figures from a real builder, one real measurement."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from hpddrnet_trt.benchmark import attention_memory as module
from hpddrnet_trt.benchmark.attention_memory import MIB, Usage, attention_memory, table
from hpddrnet_trt.core.errors import BadInputFile, UsageError
from hpddrnet_trt.graph.attention import in_type
from hpddrnet_trt.graph.model import load_model, save_model
from tests.tiny_export import write_fp16, write_fp32
from tests.tiny_onnx import tiny_model

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx, which builds without a GPU, is missing"
)


def test_table() -> None:
    found = [
        Usage("large", 64, 12.4, "measured"),
        Usage("large", 4096, None, "measured", "killed"),
        Usage("small", 64, 0.2, "builder's log"),
        Usage("small", 4096, 12345.6, "builder's log"),
        Usage("never", 64, None, "builder's log", "no builder"),
    ]
    assert table(found).splitlines() == [
        "| peak memory, MiB | 64x64 | 4096x4096 | |",
        "|---|---:|---:|---|",
        "| large | 12 | – | measured |",
        "| small | 0 | 12,346 | builder's log |",
        "| never | – | – | builder's log |",
        "",
        "- large at 4096x4096: killed",
        "- never at 64x64: no builder",
    ]
    assert "\n\n" not in table(found[:1])


@pytest.mark.parametrize("size", [{"height": 64}, {"width": 64}])
def test_fixed_sizes_are_refused(tmp_path: Path, size: dict[str, int]) -> None:
    model, manifest = load_model(tiny_model(tmp_path / "m.onnx"))
    assert manifest.input is not None
    fixed = {name: {"minimum": side, "maximum": side} for name, side in size.items()}
    contract = type(manifest.input).model_validate({**manifest.input.model_dump(), **fixed})
    path = save_model(model, tmp_path / "fixed.onnx", manifest.replace(input=contract))
    with pytest.raises(UsageError, match=r"fixed\.onnx has a fixed size; export it again without"):
        attention_memory(path, [64])
    with pytest.raises(BadInputFile, match=r"none\.onnx"):
        attention_memory(tmp_path / "none.onnx", [64])


def test_larger_sizes_are_left_out_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails at one size is not tried at the next; the other forms are."""

    def measured(form: str, path: Path, engine: str, options: object, side: int) -> Usage:
        return Usage(form, side, None if "at once" in form and side > 64 else 1.0, "measured", "too large")

    monkeypatch.setattr(module, "_measured", measured)
    told: list[Usage] = []
    found = attention_memory(tiny_model(tmp_path / "m.onnx"), [256, 64, 128], build=False, on_result=told.append)
    assert found == told
    at_once = [usage.side for usage in found if "at once" in usage.form]
    in_blocks = [usage.side for usage in found if "in blocks" in usage.form]
    assert (at_once, in_blocks) == ([64, 128], [64, 128, 256])


def test_every_cpu_form_is_measured(tmp_path: Path) -> None:
    found = attention_memory(tiny_model(tmp_path / "m.onnx"), [64], build=False)
    assert len(found) in (2, 4)  # OpenVINO is optional
    for usage in found:
        assert (usage.source, usage.reason) == ("measured", None)
        assert usage.mib is not None
        assert usage.mib > 0


@needs_rtx
def test_fused_attention_needs_less_activation_memory(tmp_path: Path) -> None:
    fused = write_fp16(tmp_path / "fp16.onnx")
    graph, manifest = load_model(fused)
    scores = save_model(in_type(graph, "fp32"), tmp_path / "scores.onnx", manifest)
    small, large = (module._built("form", path, 1024) for path in (fused, scores))
    assert (small.source, small.reason, large.reason) == ("builder's log", None, None)
    assert small.mib is not None
    assert large.mib is not None
    # 4096 tokens at 1/16 of the image: their FP32 scores alone are 64 MiB.
    assert small.mib < large.mib - 60
    assert large.mib > 4096**2 * 4 / MIB


@needs_rtx
def test_failed_build_is_a_reason(tmp_path: Path) -> None:
    usage = module._built("form", tiny_model(tmp_path / "m.onnx"), 60)
    assert usage.mib is None
    assert "multiple of 8" in str(usage.reason)


@needs_rtx
def test_typed_files_are_built_with_both_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, typed = write_fp32(tmp_path / "fp32.onnx"), write_fp16(tmp_path / "fp16.onnx")
    monkeypatch.setattr(module, "_measured", lambda form, path, engine, options, side: Usage(form, side, 1, "measured"))
    found = [usage for usage in attention_memory(model, [64], typed=[typed]) if usage.source == "builder's log"]
    assert [usage.form for usage in found] == [
        "TensorRT FP32", "TensorRT FP16, attention scores in FP32", "TensorRT FP16, attention in BF16, fused",
    ]  # fmt: skip
    assert all(usage.mib for usage in found)
