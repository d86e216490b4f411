"""Budgets, and the check: what keeps its budget is written with the record of it, what does not is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpddrnet_trt.accuracy.acceptance import WHAT, AcceptanceCheck, Budget, reference_for
from hpddrnet_trt.accuracy.build import build_verified
from hpddrnet_trt.core.errors import ContractError, UsageError, UserError
from hpddrnet_trt.core.manifest import CalibrationRecord, MixedPrecisionRecord, read_manifest, sidecar_path
from hpddrnet_trt.engines.cuda import gpu_or_none
from hpddrnet_trt.export import tensorrt
from hpddrnet_trt.graph import qdq
from hpddrnet_trt.graph.model import load_model, save_model
from hpddrnet_trt.graph.nodes import name_nodes
from hpddrnet_trt.graph.precision import to_half
from hpddrnet_trt.inference import load_segmenter
from tests.accuracy.builds import build
from tests.accuracy.fakes import accuracy
from tests.graph.parsed_rtx import needs_rtx
from tests.tiny_onnx import QUIET

without_gpu = pytest.mark.skipif(gpu_or_none() is not None, reason="shows what happens without a GPU; here is one")
RECORD = CalibrationRecord(method="max", images=1, images_sha256="0", source="one image", tool="a test")
Write = Callable[[str, float], Path]


@pytest.fixture
def write(tmp_path: Path, fp32: Path) -> Write:
    """Write an INT8 file whose activations are clipped at a given value, beside the FP32 file."""
    shutil.copy(fp32, tmp_path / "model.onnx")

    def call(name: str, clip: float) -> Path:
        model, manifest = load_model(fp32)
        name_nodes(model)
        plan = qdq.plan(model, "tensorrt")
        graph = to_half(qdq.quantize(model, "tensorrt", plan, dict.fromkeys(plan.tensors, (-clip, clip))))
        described = manifest.replace(precision="int8", quantized_for="tensorrt", calibration=RECORD)
        return save_model(graph, tmp_path / name, described)

    return call


def test_a_sound_file_passes_with_evidence(write: Write, data: Path, tmp_path: Path) -> None:
    acceptance = AcceptanceCheck(data, Budget(max_miou_drop=3.0, min_agreement=0.9))
    evidence = acceptance.verify(write("model.int8.onnx", 8.0), tmp_path / "model.int8.onnx", tmp_path / "m.engine")
    assert evidence.what == WHAT
    assert evidence.images == 2
    assert evidence.values["allowed_masked_miou_drop_percentage_points"] == 3.0
    assert evidence.values["required_agreement"] == 0.9
    assert evidence.values["masked_miou_drop_percentage_points"] <= 3.0
    assert "simulated/test, FP32: model.onnx on onnxruntime" in evidence.source
    assert "simulated rounding" in evidence.runtime


def test_a_broken_calibration_is_refused(write: Write, data: Path, tmp_path: Path) -> None:
    acceptance = AcceptanceCheck(data, Budget(max_miou_drop=0.5))
    with pytest.raises(UserError) as refused:
        acceptance.verify(write("model.int8.onnx", 1.0), tmp_path / "model.int8.onnx", tmp_path / "m.engine")
    words = str(refused.value)
    assert words.startswith("INT8 misses the budget on simulated/test: masked mIoU falls by ")
    assert "0.5 are allowed" in words
    assert "calibrated on 1 image (method max)" in words
    assert f"{tmp_path / 'm.engine'} was not written: calibrate on more" in words


def test_an_engine_is_judged_on_the_gpu_it_was_built_on(
    data: Path, tmp_path: Path, fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-in: the ONNX file runs in the engine's place."""
    engine, asked = tmp_path / "m.engine", list[dict[str, Any]]()
    engine.write_bytes(b"a plan")
    sidecar_path(engine).write_text(read_manifest(fp32).to_json(), encoding="utf-8")

    def load(path: Path, **options: Any) -> Any:
        asked.append(options)
        return load_segmenter(fp32 if path == engine else path, precision="file")

    monkeypatch.setattr("hpddrnet_trt.accuracy.acceptance.load_segmenter", load)
    check = AcceptanceCheck(data, Budget(max_miou_drop=0.5), reference=fp32, device=1)
    assert check.verify(engine, fp32, engine).values["agreement"] == 1
    assert asked == [{"precision": "file"}, {"precision": "file", "device": 1}]  # never the fastest arithmetic


@needs_rtx
@without_gpu
def test_an_engine_without_gpu_is_judged_by_its_onnx_file(
    write: Write, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "m.engine"
    manifest = build(write("model.int8.onnx", 8.0), target, data, Budget(max_miou_drop=3.0))
    stored = read_manifest(target)
    assert stored.validation[-1] == manifest.validation[-1]
    assert stored.validation[-1].what == WHAT
    assert "was verified on the ONNX file it was built from" in caplog.text


@needs_rtx
def test_a_refused_engine_leaves_nothing_behind(write: Write, data: Path, tmp_path: Path) -> None:
    source, target = write("model.int8.onnx", 1.0), tmp_path / "m.engine"
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="misses the budget"):
        build(source, target, data, Budget(max_miou_drop=0.5))
    assert sorted(tmp_path.iterdir()) == before


@needs_rtx
def test_the_engine_itself_is_judged_where_it_runs(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a GPU `accept` gets an engine file with its description beside it, not the ONNX file."""
    seen: list[tuple[str, str | None, bool]] = []

    def accept(candidate: Path) -> object:
        seen.append((candidate.suffix, read_manifest(candidate).precision, sidecar_path(candidate).is_file()))
        raise UserError("seen")

    monkeypatch.setattr(tensorrt._Job, "_inspected", lambda self, plan, parsed: (True, parsed))
    monkeypatch.setattr(tensorrt, "gpu_or_none", lambda index: SimpleNamespace(name="a GPU", index=index))
    monkeypatch.setattr(tensorrt, "current_device", lambda index: nullcontext())
    with pytest.raises(UserError, match="seen"):
        tensorrt.build_engine(
            write("model.int8.onnx", 8.0), tmp_path / "m.engine", precision="int8", runtime="tensorrt-rtx",
            shapes="1x1x96x96:1x1x96x96:1x1x96x96", accept=accept, settings=QUIET,  # type: ignore[arg-type]
        )  # fmt: skip
    assert seen == [(".engine", "int8", True)]


def test_the_reference_is_the_fp32_file_of_the_same_checkpoint(
    write: Write, tmp_path: Path, fp32: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write("model.int8.onnx", 8.0)
    described, (model, manifest) = read_manifest(source), load_model(fp32)
    save_model(model, tmp_path / "a-other.onnx", manifest.replace(checkpoint_sha256="of another checkpoint"))
    (tmp_path / "b-foreign.onnx").write_bytes(b"not ours")
    for given in (source, tmp_path / "model.onnx"):
        assert reference_for(None, given, described) == tmp_path / "model.onnx"
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(UsageError, match="--reference"):
        reference_for(None, source, described)
    with pytest.raises(UsageError, match=r"the reference .*model\.int8\.onnx is INT8"):
        reference_for(source, fp32, manifest)
    assert reference_for(fp32, source, described) == fp32
    assert not caplog.records
    assert reference_for(fp32, source, described.replace(checkpoint_sha256="another")) == fp32
    assert "is of another checkpoint" in caplog.text


def test_what_the_gate_needs_is_checked_before_building(
    fp32: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpddrnet_trt.accuracy.build.build_engine", lambda *_, **__: pytest.fail("built first"))
    budget, target = Budget(max_miou_drop=1.0), tmp_path / "m.engine"
    for acceptance, says in (
        (AcceptanceCheck(data, budget, split="tset"), "no split 'tset'"),
        (AcceptanceCheck(tmp_path / "none", budget), "does not exist"),
        (AcceptanceCheck(data, budget, reference=tmp_path / "none.onnx"), "does not exist"),
    ):
        with pytest.raises(UserError, match=says):
            build_verified(fp32, target, precision="fp16", acceptance=acceptance)
    with pytest.raises(UsageError, match="--precision auto needs a budget"):
        build_verified(fp32, target, precision="auto", acceptance=None)


@needs_rtx
@without_gpu
def test_an_engine_too_small_for_the_micrographs_is_not_accepted(write: Write, data: Path, tmp_path: Path) -> None:
    """Without a GPU the ONNX file is judged, but with the sizes that the engine takes."""
    with pytest.raises(ContractError, match="in tiles of 64 x 64 in this model and whole in the FP32 reference"):
        build(write("model.int8.onnx", 8.0), tmp_path / "m.engine", data, Budget(max_miou_drop=3.0), size=64)
    assert not (tmp_path / "m.engine").exists()


@needs_rtx
@without_gpu
def test_an_engine_is_calibrated_and_judged_at_other_settings_too(fp32: Path, data: Path, tmp_path: Path) -> None:
    train, target = str(data / "images" / "train"), tmp_path / "m.engine"
    options = {"calibration_images": train, "reference": fp32, "under_shift": True}
    manifest = build(fp32, target, data, Budget(min_agreement=0.9), **options)
    assert manifest.calibration is not None
    assert manifest.calibration.source.endswith(": 15 crops of 96x96")  # five, each at two of nine settings, too
    assert 0.9 < manifest.validation[-1].values["agreement_under_shift"] < 1
    target.unlink()
    with pytest.raises(UserError, match=r"labels are equal on 9\d\.\d\d % of the pixels at other settings.*engine was"):
        build(fp32, target, data, Budget(min_agreement=1.0), **options)
    assert not target.exists()


def test_a_refused_choice_is_not_told_to_choose(write: Write, data: Path, tmp_path: Path) -> None:
    path = write("model.int8.onnx", 1.0)
    model, manifest = load_model(path)
    mixed = MixedPrecisionRecord(
        budget="none", floating=["stem"], layers=5, searched_on="simulated/val", candidates=[], cost_source="a test"
    )
    save_model(model, path, manifest.replace(mixed=mixed))
    with pytest.raises(UserError, match=r"1 of 5 layers are FP16.*choose on more micrographs") as refused:
        AcceptanceCheck(data, Budget(max_miou_drop=0.5)).verify(path, path, tmp_path / "m.engine")
    assert "choose-precision" not in str(refused.value)


@pytest.mark.parametrize(
    ("budget", "inside", "beyond"),
    [
        (Budget(max_miou_drop=1.0), 0.009, 0.011),
        (Budget(min_agreement=0.95), 0.049, 0.051),
        (Budget(max_miou_drop=0), 0.0, 0.0001),
        (Budget(max_miou_drop=0), -0.01, 0.0001),  # a better candidate keeps any budget
        (Budget(max_miou_drop=100), 1.0, float("nan")),
        (Budget(min_agreement=0), 1.0, float("nan")),
    ],
)
def test_a_budget_ends_where_it_says(budget: Budget, inside: float, beyond: float) -> None:
    assert budget.kept_by(accuracy(inside))
    assert not budget.kept_by(accuracy(beyond))
    assert len(budget.breaches(accuracy(beyond))) == 1


def test_budgets_in_words_and_senseless_ones() -> None:
    budget = Budget(max_miou_drop=0.3, min_agreement=0.995)
    assert budget.breaches(accuracy(0.01)) == [
        "masked mIoU falls by 1.00 points, 0.3 are allowed",
        "labels are equal on 99.00 % of the pixels, 99.5 % are needed",
    ]
    assert str(budget) == "at most 0.3 points of masked mIoU lost and labels equal on at least 99.5 % of the pixels"
    elsewhere = replace(accuracy(0.001), agreement_under_shift=0.98)
    assert budget.breaches(elsewhere) == [
        "labels are equal on 98.00 % of the pixels at other settings of the microscope, 99.5 % are needed"
    ]
    assert Budget(max_miou_drop=0.3).kept_by(elsewhere)
    for drop, agreement, words in ((None, None, "needs a limit"), (-1, None, "0 and 100"), (None, 99, "0 and 1")):
        with pytest.raises(UsageError, match=words):
            Budget(drop, agreement)
