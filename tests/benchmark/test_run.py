"""The comparison itself, with real engines on small models."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpddrnet_trt.benchmark import measures, run
from hpddrnet_trt.benchmark import probe as probing
from hpddrnet_trt.benchmark.entries import Entry, entries_for, model_files, precision_of
from hpddrnet_trt.benchmark.images import load_images
from hpddrnet_trt.benchmark.machine import GpuWatch
from hpddrnet_trt.benchmark.probe import how_it_ended, probe
from hpddrnet_trt.benchmark.result import BenchmarkResult, Settings, Start
from hpddrnet_trt.benchmark.run import run_benchmark
from hpddrnet_trt.core.errors import BadInputFile, UserError
from hpddrnet_trt.core.metrics import LabelComparison
from hpddrnet_trt.engines import EngineStatus, load_engine
from hpddrnet_trt.inference import Segmenter
from tests.benchmark.conftest import image_set
from tests.tiny_onnx import CLASSES, tiny_model

LATENCY: dict[str, Any] = {"inference": False, "throughput": False, "layers": False}
QUICK: dict[str, Any] = {"rounds": 5, "warmup": 1, "threads": 1, "pause_ms": 0, "burst_ms": 0, "gallery": 0, **LATENCY}


def compared(entry: Entry | list[Entry], masks: bool = True, **settings: Any) -> BenchmarkResult:
    entries = entry if isinstance(entry, list) else [entry]
    return run_benchmark(entries, image_set(masks), Settings(**{**QUICK, **settings}), progress=False)


def test_every_entry_is_a_row_and_timings_follow_from_their_samples(measured: BenchmarkResult) -> None:
    assert [(row.label, row.status) for row in measured.rows] == [
        ("plain", "measured"), ("small", "measured"), ("cut", "not run"), ("lonely", "not run"),
    ]  # fmt: skip
    for row, reason in zip(measured.not_run, ("cut.onnx", "lonely.engine.json"), strict=True):
        assert reason in (row.reason or "")
    assert measured.complete
    plain, small = measured.measured
    for measure, timings in small.measures():
        shapes = ["32×48", "batch 2 of 32×48", "64×64", "batch 2 of 64×64"]
        assert [str(timing.shape) for timing in timings] == shapes
        for first, second in zip(getattr(plain, measure), timings, strict=True):
            assert second.rounds == 6
            assert len(second.samples_ms) == 6 * second.burst
            found = (second.p50_ms, second.p95_ms, second.p99_ms, second.max_ms)
            assert found == pytest.approx(np.percentile(second.samples_ms, (50, 95, 99, 100)), rel=1e-3, abs=1e-4)
            assert second.images_per_s == pytest.approx(1000 * second.batch / second.p50_ms)
            assert second.ratio is not None
            assert second.ratio.value == pytest.approx(first.p50_ms / second.p50_ms, rel=1e-3)
            assert first.ratio is not None
            assert first.ratio.value == 1
            assert (second.warmup is None) == (measure == "throughput")
    for row in measured.measured:  # memory and start are of processes of their own
        assert row.start is not None
        assert (row.start.frame, row.start.load_s > 0) == ("2x64x64", True)
        sizes = [(one.height, one.width, one.batch) for one in row.memory]
        assert sizes == [(32, 48, 1), (32, 48, 2), (64, 64, 1), (64, 64, 2), (96, 96, 1)]  # the last is not timed
        # A few MiB at least for the runtime, but not the memory of this test process with all it has imported.
        assert all(3 < peak.host_peak_mib < 400 for peak in (row.start, *row.memory))
        assert row.memory_failures == []


def test_accuracy_is_that_of_the_segmenter_on_whole_images(measured: BenchmarkResult, models: Path) -> None:
    images = image_set().images
    with load_engine(models / "fp32.onnx") as reference, load_engine(models / "int8.onnx") as engine:
        expected = [Segmenter(reference).segment(image.grey).labels for image in images]
        found = [Segmenter(engine).segment(image.grey).labels for image in images]
    matrix, equal = LabelComparison(3), LabelComparison(3)
    for image, labels, reference_labels in zip(images, found, expected, strict=True):
        assert image.mask is not None
        matrix.update(labels, image.mask)
        equal.update(labels, reference_labels)
    accuracy = measured.rows[1].accuracy
    assert accuracy is not None
    assert (accuracy.images, accuracy.masked_images) == (3, 3)
    assert accuracy.miou == pytest.approx(matrix.scores().miou)
    assert accuracy.masked_miou == pytest.approx(matrix.scores().masked_miou)
    assert accuracy.iou == pytest.approx(matrix.scores().iou)
    assert accuracy.agreement == pytest.approx(equal.agreement)
    assert 0.5 < equal.agreement < 1


def test_without_masks_only_agreement_is_reported(models: Path) -> None:
    entries = [Entry("a", models / "fp32.onnx"), Entry("b", models / "int8.onnx")]
    result = compared(entries, masks=False, reference="a")
    accuracy = result.rows[1].accuracy
    assert accuracy is not None
    assert (accuracy.miou, accuracy.iou, accuracy.masked_images) == (None, [], 0)
    assert accuracy.agreement is not None
    assert str(result.rows[1].end_to_end[0].shape) == "40×56"  # the first image's own size
    assert [entry.name for entry in result.classes] == [entry.name for entry in CLASSES]


def test_a_checkpoint_is_the_reference_by_itself_else_the_fp32_file_in_onnx_runtime(tmp_path: Path) -> None:
    from hpddrnet_trt.models.checkpoints import save_checkpoint
    from tests.tiny_network import tiny_manifest, tiny_network

    network = tiny_network()
    path = save_checkpoint(tmp_path / "model.safetensors", network, tiny_manifest(network))
    entries = [Entry("checkpoint", path), Entry("other classes", tiny_model(tmp_path / "other.onnx"))]
    result = compared(entries, masks=False, sizes=((64, 64),))
    assert result.reference == "checkpoint"
    accuracy = result.rows[0].accuracy
    assert accuracy is not None
    assert accuracy.agreement == 1
    assert "knows the classes matrix, pore, grain" in (result.rows[1].reason or "")
    result = compared(entries[1], batches=(3,), sizes=((16, 16),))
    assert result.reference is None
    assert [(str(timing.shape), timing.ratio) for timing in result.rows[0].end_to_end] == [("batch 3 of 16×16", None)]
    assert any("neither PyTorch nor an FP32 ONNX file ran" in warning for warning in result.warnings)
    files = [tiny_model(tmp_path / "int8.onnx", typing="int8"), tmp_path / "other.onnx"]
    result = compared([Entry(file.stem, file, "onnxruntime") for file in files], masks=False, sizes=((16, 16),))
    assert result.reference == "other"
    assert "no checkpoint ran in PyTorch, so the reference is other" in result.warnings
    assert [row.end_to_end[0].ratio is not None for row in result.rows] == [True, True]


def test_sizes_that_an_engine_does_not_take_leave_the_others(tmp_path: Path) -> None:
    fixed = Entry("fixed", tiny_model(tmp_path / "fixed.onnx", shape=(1, 32, 32)))
    row = compared(fixed, sizes=((32, 32), (64, 64)), batches=(1, 2)).rows[0]
    assert [str(timing.shape) for timing in row.end_to_end] == ["32×32"]
    assert [(one.height, one.batch) for one in row.memory_failures] == [(32, 2), (64, 1), (64, 2)]
    assert "batch 2 is outside this model's range" in row.memory_failures[0].reason
    assert row.accuracy is None  # images are larger
    assert any("accuracy not measured, image-0" in note for note in row.notes)
    (smaller,) = compared(fixed, sizes=((16, 24),)).rows
    assert any("frames of 16×24: they are padded to 32×32" in note for note in smaller.notes)
    (none,) = compared(fixed, sizes=((64, 64),)).rows
    assert none.status == "not run"
    assert "64 pixels does not fit this model" in (none.reason or "")


def test_ctrl_c_keeps_what_is_finished(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    true_factory = measures.end_to_end

    def factory(engine: Any) -> Any:
        run = true_factory(engine)

        def counted(frames: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 5:  # one warm-up, three rounds, Ctrl-C in the fourth
                raise KeyboardInterrupt
            return run(frames)

        return counted

    monkeypatch.setattr(measures, "end_to_end", factory)
    monkeypatch.setattr("hpddrnet_trt.benchmark.timing.MAX_WARMUP", 1)
    result = compared(Entry("a", models / "fp32.onnx"))
    assert not result.complete
    assert len(result.rows[0].end_to_end[0].samples_ms) == 3
    assert result.rows[0].accuracy is None
    assert any("interrupted" in warning and "3 at 40×56 of 5" in warning for warning in result.warnings)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(probing, "probe", stop)  # before anything is finished it goes to the caller
    with pytest.raises(KeyboardInterrupt):
        compared(Entry("a", models / "fp32.onnx"))


def test_a_size_that_kills_the_process_is_a_reason_and_keeps_what_was_found(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(job: Path, timeout_s: float) -> str | None:
        content = json.loads(job.read_text())
        content["frames"] = content["frames"][:1]
        job.write_text(json.dumps(content))
        assert true_run(job, timeout_s) is None
        return how_it_ended(-9, "")

    true_run = probing._run_child
    monkeypatch.setattr(probing, "_run_child", killed)
    frames = [np.zeros((batch, 32, 48), np.uint8) for batch in (1, 4)]
    first, second = probe(models / "fp32.onnx", "auto", {}, frames)
    assert isinstance(first, Start)
    assert first.frame == "1x32x48"
    assert second == "the process that ran it was killed (SIGKILL), most likely because memory ran out"
    row = compared(Entry("a", models / "fp32.onnx"), batches=(1, 4), sizes=((32, 48),)).rows[0]
    assert [timing.batch for timing in row.end_to_end] == [1]
    assert [(one.batch, one.reason) for one in row.memory_failures] == [(4, second)]
    assert any(f"does not run at batch 4 of 32×48: {second}" in note for note in row.notes)


def test_how_a_process_ends(models: Path) -> None:
    assert how_it_ended(0, "") is None
    assert how_it_ended(-11, "") == "the process that ran it crashed (SIGSEGV)"
    assert how_it_ended(3, "one\nlast line\n") == "the process that ran it ended with code 3 (last line)"
    with pytest.raises(UserError, match="did not finish within"):
        probe(models / "fp32.onnx", "auto", {}, [np.zeros((1, 8, 8), np.uint8)], timeout_s=0.05)
    (row,) = compared(Entry("a", models / "fp32.onnx", options={"colour": "blue"})).rows
    assert "no option colour" in (row.reason or "")


@pytest.mark.parametrize(
    ("labels", "reference", "message"),
    [
        ([], None, "nothing to measure"),
        (["a", "a"], None, "two entries are called 'a'"),
        (["a"], "b", "reference 'b' is not among the entries"),
        (["a"], None, "does not exist"),
    ],
)
def test_senseless_requests_are_refused(
    tmp_path: Path, labels: list[str], reference: str | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        compared([Entry(label, tmp_path / "none.onnx") for label in labels], reference=reference)
    with pytest.raises(BadInputFile, match="does not exist"):
        entries_for([tmp_path / "none.onnx"])


def test_entries_name_runtime_precision_and_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpddrnet_trt.benchmark.entries.engine_status", lambda name: EngineStatus(True, ""))
    monkeypatch.setattr("hpddrnet_trt.engines.openvino.computes_bf16", lambda: True)
    files = [
        tiny_model(tmp_path / "model.onnx"),
        tiny_model(tmp_path / "int8.onnx", typing="int8"),
        tiny_model(tmp_path / "cpu.onnx", typing="int8", quantized_for="onnxruntime"),
        tiny_model(tmp_path / "again.onnx"),
        tmp_path / "lonely.engine",
    ]
    files[-1].write_bytes(b"no description")
    found = [(entry.label, entry.engine) for entry in entries_for(files)]
    assert found == [
        ("ONNX Runtime FP32", "onnxruntime"),
        ("OpenVINO FP32", "openvino"),
        ("OpenVINO BF16", "openvino"),
        ("ONNX Runtime INT8 Q/DQ", "onnxruntime"),
        ("OpenVINO INT8 Q/DQ", "openvino"),
        ("ONNX Runtime INT8", "onnxruntime"),  # OpenVINO can crash on this form
        ("ONNX Runtime FP32 (again.onnx)", "onnxruntime"),
        ("OpenVINO FP32 (again.onnx)", "openvino"),
        ("OpenVINO BF16 (again.onnx)", "openvino"),
        ("TensorRT (lonely.engine)", "tensorrt"),
    ]
    monkeypatch.setattr("hpddrnet_trt.benchmark.entries.engine_status", lambda name: EngineStatus(False, ""))
    assert [entry.engine for entry in entries_for(files[:2])] == ["onnxruntime", "onnxruntime"]


def test_precision_follows_the_options_and_only_plain_pytorch_is_a_reference(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    entries = [
        Entry("plain", path, "torch", {"output": "labels", "threads": 2}),
        Entry("compiled", path, "torch", {"compile": "max-autotune"}),
        Entry("amp", path, options={"autocast": "bf16"}),
    ]
    assert [precision_of(entry, None) for entry in entries] == ["FP32", "FP32", "BF16"]
    assert [entry.can_be_reference for entry in entries] == [True, False, False]


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
def test_openvino_is_compared_with_onnx_runtime_before_it_is_trusted(models: Path) -> None:
    (row,) = compared(Entry("a", models / "fp32.onnx", "openvino")).rows
    assert row.status == "measured"
    assert "checked in a child process: 100.00% of labels" in row.notes[0]


def test_the_shipped_model_on_real_micrographs(sem_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "ROUND_S", 0.01)
    images = load_images(sem_data / "nasa-super1", "test", limit=1)
    plan = Settings(rounds=5, warmup=1, threads=1, pause_ms=0, sizes=((64, 64),))
    entries = [entry for entry in entries_for(model_files(["nasa-super1"])) if entry.engine != "openvino"]
    result = run_benchmark(entries, images, plan, progress=False)
    torch, ort = result.rows
    assert (result.reference, torch.label, ort.label) == (torch.label, "PyTorch FP32", "ONNX Runtime FP32")
    for row in result.rows:
        assert all(len(timings) == 1 for _, timings in row.measures()), row.notes
        assert row.accuracy is not None
        assert row.accuracy.miou is not None
        assert row.accuracy.miou > 0.6
        assert row.accuracy.agreement is not None
        assert row.accuracy.agreement > 0.999
    assert ort.attention is not None
    (groups,) = ort.layers
    assert {"stem", "position attention", "head"} <= set(groups.groups)
    assert sum(groups.groups.values()) > 0


def test_folders_give_their_models_checkpoints_first(tmp_path: Path) -> None:
    names = "b.onnx a.engine a.engine.json z.safetensors .half.onnx notes.txt a.onnx a.int8.onnx"
    for name in names.split():
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "deeper.onnx").touch()
    assert [path.name for path in model_files([tmp_path])] == [
        "z.safetensors", "a.onnx", "b.onnx", "a.int8.onnx", "a.engine",
    ]  # fmt: skip
    given = tmp_path / "missing.onnx"
    assert model_files([given, tmp_path / "sub"]) == [given, tmp_path / "sub" / "deeper.onnx"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInputFile, match="empty holds no model file"):
        model_files([tmp_path / "empty"])


class SimulatedGpu:
    """A GPU with a data sheet, which is idle in every second look."""

    name = "NVIDIA H200"

    def __init__(self) -> None:
        self.looks = 0

    def sm_clock_mhz(self) -> float:
        return 345.0

    def clock_reasons(self) -> int:
        self.looks += 1
        return self.looks % 2

    def sm_clock_limit_mhz(self) -> None: ...
    def power_w(self) -> None: ...
    def temperature_c(self) -> None: ...
    def joules(self) -> None: ...


def test_entries_on_a_gpu_have_rounds_of_their_own_and_bounds(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[list[str]] = []
    timed = measures.time_interleaved

    def noting(bursts: Any, *given: Any, **more: Any) -> Any:
        rounds.append(list(bursts))
        return timed(bursts, *given, **more)

    monkeypatch.setattr(measures, "time_interleaved", noting)
    monkeypatch.setattr(run.GpuSensor, "open", SimulatedGpu)
    monkeypatch.setattr(run, "GpuWatch", partial(GpuWatch, period_s=0.001))
    for module in (run, measures):
        monkeypatch.setattr(module, "runs_on_cpu", lambda engine: engine.manifest.precision == "fp32")
    files = {"host": "fp32.onnx", "gpu": "int8.onnx", "b": "int8.onnx"}
    entries = [Entry(label, models / name) for label, name in files.items()]
    plan: dict[str, Any] = {"sizes": ((32, 48),), "reference": "host", "burst_ms": 20}
    result = compared(entries, **plan)
    assert rounds == [["gpu", "b"], ["host"]]
    host, gpu, _ = result.rows
    assert [timing.ratio and timing.ratio.paired for timing in (host.end_to_end[0], gpu.end_to_end[0])] == [True, False]
    assert result.bound_source == "NVIDIA H200, from its data sheet"
    assert [bound.shape for bound in gpu.bounds] == [timing.shape for timing in gpu.end_to_end]
    assert host.bounds == []
    (state,) = result.gpu_states
    assert state.idle_share == pytest.approx(0.5, abs=0.3)
    assert any("had nothing to do in" in warning for warning in result.warnings)
    monkeypatch.setattr(SimulatedGpu, "name", "NVIDIA unknown")
    unknown = compared(entries[1], **plan | {"reference": None})
    assert (unknown.bound_source, unknown.rows[0].bounds) == (None, [])
