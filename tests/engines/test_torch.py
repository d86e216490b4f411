"""The PyTorch reference engine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpddrnet_trt.core.errors import NoGpu, UsageError, UserError
from hpddrnet_trt.core.manifest import Manifest, NetworkConfig
from hpddrnet_trt.engines.base import Bound
from hpddrnet_trt.engines.torch import TorchEngine, module_times
from hpddrnet_trt.models.checkpoints import save_checkpoint
from hpddrnet_trt.models.network import HPDDRNet
from tests.tiny_network import tiny_manifest, tiny_network
from tests.toy import CLASSES, grey_image


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = tiny_network()
    return save_checkpoint(tmp_path_factory.mktemp("torch") / "tiny.safetensors", network, tiny_manifest(network))


def test_what_every_option_computes(checkpoint: Path) -> None:
    """Normalised RGB in place of grey images, another layout of memory, BF16; the weights stay as they are."""
    images = np.stack([grey_image(40, 64, seed) for seed in range(2)])[:, None]
    with TorchEngine(checkpoint, device="cpu") as engine:
        assert "FP32" in engine.runtime
        before = {name: value.clone() for name, value in engine._network.state_dict().items()}
        expected = engine.infer(images).logits
        np.testing.assert_array_equal(engine.infer(images).logits, expected)
        assert all(torch.equal(before[name], value) for name, value in engine._network.state_dict().items())
        rgb = ((images - engine._mean.numpy()) / engine._std.numpy()).astype(np.float32)
        engine._score = lambda x: torch.zeros(1, 3, 16, 16)
        assert not engine.infer(grey_image(16, 16)[None, None]).labels.any()  # ties go to the first class
    rgb.flags.writeable = False
    for options, given, close in (
        ({"input_dtype": "float32"}, rgb, 1e-5),
        ({"channels_last": True}, images, 0.05),
        ({"autocast": "bf16"}, images, 0.05),
    ):
        with TorchEngine(checkpoint, device="cpu", **options) as other:  # type: ignore[arg-type]
            found = other.infer(given).logits
            assert found.dtype == np.float32
            assert np.abs(found - expected).max() < close
            assert ("channels last" in other.runtime) == ("channels_last" in options)


def test_a_burst_on_a_gpu_is_timed_by_events_one_ahead(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch.cuda on the processor: events that count the milliseconds at 5 an event."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")
            self.place = 5.0 * log.count("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return end.place - self.place

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: log.append("all"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: log.append("freed"))
    with TorchEngine(checkpoint, device="cpu") as engine:
        images = grey_image(16, 16)[None, None]
        assert not isinstance(engine.bind(images), Bound)  # a processor has no events
        monkeypatch.setattr(engine, "_on_device", torch.from_numpy)
        monkeypatch.setattr(engine, "_compute", lambda _: log.append("run"))
        engine.device = torch.device("cuda")
        bound = engine.bind(images)
        assert isinstance(bound, Bound)
        assert bound.burst(3) == [0.005] * 3
        assert "-".join(log) == "record-run-record-record-run-record-wait-record-run-record-wait-all"
        log.clear()
        bound()
        assert log == ["run", "all"]
    assert log[-1] == "freed"


def test_refusals(checkpoint: Path) -> None:
    for options, words in (
        ({"device": "gpu9"}, "unknown device 'gpu9'"),
        ({"autocast": "int4"}, "autocast one of off, fp16, bf16"),
        ({"input_dtype": "int8"}, "input_dtype is uint8 or float32"),
        ({"output": "scores"}, "output is logits or labels"),
        ({"compile": "fast"}, "compile one of off, default, max-autotune"),
    ):
        with pytest.raises(UsageError, match=words):
            TorchEngine(checkpoint, **options)  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(NoGpu, match="finds no GPU 'cuda'"):
            TorchEngine(checkpoint, device="cuda")


def test_layer_times_are_of_modules(checkpoint: Path) -> None:
    with TorchEngine(checkpoint, device="cpu") as engine:
        times = engine.layer_times(grey_image(32, 32)[None, None], runs=3)
        modules = list(engine._network.modules())
    assert {"backbone.stem.0.conv", "backbone.sps.0.pa", "backbone", "decode_head.conv_seg", "output"} <= set(times)
    assert not any("aux" in name for name in times)  # not called
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


@pytest.mark.parametrize("size", ["1x136x200", "2x128x192"])
def test_golden_logits(golden: Path, size: str) -> None:
    images = np.load(golden / "inputs.npz")[f"x_{size}"].astype(np.float32)
    expected = np.load(golden / "hpddrnet" / f"eval_{size}.npz")["logits_full"]
    with TorchEngine(golden / "hpddrnet" / "checkpoint.pth", device="cpu", input_dtype="float32") as engine:
        assert engine.manifest.class_names == ["grains", "pores", "clay"]
        assert np.abs(engine.infer(images).logits - expected).max() < 5e-4


def test_time_between_children_is_their_parents() -> None:
    """Exclusive times add up to the whole, with a clock that ticks only where told."""
    child = torch.nn.Identity()
    parent = torch.nn.Sequential(child, child)
    ticks = iter(range(1000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.perf_counter", lambda: float(next(ticks)))
        times = module_times(parent, lambda: parent(torch.zeros(1)), lambda: None, runs=2)
    # whole: 0..7; parent 1..6; children 2..3 and 4..5
    assert times == {"0": 2000.0, "network": 3000.0, "output": 2000.0}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A checkpoint that compiles quickly."""
    config = NetworkConfig(channels=4, ppm_channels=8, head_channels=8, num_classes=3, eca="none", pam="none")
    torch.manual_seed(0)
    manifest = Manifest(name="small", network=config, classes=CLASSES)
    return save_checkpoint(tmp_path / "small.safetensors", HPDDRNet(config).eval(), manifest)


@pytest.mark.usefixtures("one_thread")
def test_whole_network_is_one_graph(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's tracer takes everything from the image to the labels; compiling it takes minutes, so not here."""
    compile_really = torch.compile

    def traced_only(function: Any, *, fullgraph: bool, dynamic: bool, options: Any) -> Any:
        return compile_really(function, fullgraph=fullgraph, dynamic=dynamic, backend="eager")

    monkeypatch.setattr(torch, "compile", traced_only)
    with TorchEngine(small, device="cpu") as eager, TorchEngine(small, device="cpu", compile="default") as compiled:
        for size in (16, 24):
            images = grey_image(size, 40)[None, None]
            expected, found = eager.infer(images), compiled.infer(images)
            assert np.abs(found.logits - expected.logits).max() < 1e-5
            np.testing.assert_array_equal(found.labels, expected.labels)
        assert "compiled default" in compiled.runtime
        compiled.bind(images)()
        assert compiled.layer_times(images) == {}


@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_compilation_is_of_the_whole_graph(small: Path, monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    asked: list[dict[str, Any]] = []
    calls: list[tuple[int, ...]] = []

    def stand_in(function: Any, **options: Any) -> Any:
        asked.append(options)
        return lambda x: calls.append(tuple(x.shape)) or function(x)

    monkeypatch.setattr(torch, "compile", stand_in)
    with TorchEngine(small, device="cpu", output="labels", compile=mode) as engine:
        for size in (16, 24, 16):
            engine.infer(grey_image(size, 32)[None, None])
    assert calls == [(1, 1, 16, 32), (1, 1, 24, 32), (1, 1, 16, 32)]
    (options,) = asked
    assert options["fullgraph"] is True
    assert options["dynamic"] is False
    assert options["options"]["freezing"] is True
    assert bool(options["options"].get("max_autotune")) == (mode == "max-autotune")


@pytest.mark.usefixtures("one_thread")
def test_compiler_runs(small: Path) -> None:
    """The real compiler on one convolution instead of the network, with normalisation and arg-max."""
    if shutil.which("g++") is None:
        pytest.skip("torch.compile on a CPU needs a C++ compiler; g++ is missing")
    torch.manual_seed(3)
    score = torch.nn.Conv2d(3, 3, 1).eval()
    images = grey_image(16, 24)[None, None]
    predictions = []
    for mode in ("off", "default"):
        with TorchEngine(small, device="cpu", compile=mode) as engine:  # type: ignore[arg-type]
            engine._score = score
            predictions.append(engine.infer(images))
    expected, found = predictions
    assert np.abs(found.logits - expected.logits).max() < 1e-4
    np.testing.assert_array_equal(found.labels, expected.labels)


def test_the_compilers_errors_and_others(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing compiler is a sentence; what is not the compiler's passes as it is."""
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    missing = InductorError(InvalidCxxCompiler(), None)
    missing.__cause__ = InvalidCxxCompiler()
    for raised, kind, says in (
        (missing, UserError, r"no C\+\+ compiler; install one"),
        (RuntimeError("shape mismatch"), RuntimeError, "shape mismatch"),
    ):

        def run(x: torch.Tensor, raised: Exception = raised) -> Any:
            raise raised

        monkeypatch.setattr(torch, "compile", lambda function, run=run, **options: run)
        with pytest.raises(kind, match=says):
            TorchEngine(small, device="cpu", compile="default").infer(grey_image(16, 16)[None, None])
