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
from hpddrnet_trt.engines import load_engine
from hpddrnet_trt.engines.base import Engine
from hpddrnet_trt.engines.torch import TorchEngine, module_times
from hpddrnet_trt.models.checkpoints import save_checkpoint
from hpddrnet_trt.models.network import HPDDRNet
from tests.toy import CLASSES, grey_image

CONFIG = NetworkConfig(channels=4, ppm_channels=8, head_channels=8, num_classes=3)


@pytest.fixture(scope="module")
def network() -> HPDDRNet:
    torch.manual_seed(0)
    return HPDDRNet(CONFIG).eval()


@pytest.fixture(scope="module")
def description() -> Manifest:
    return Manifest(name="tiny", network=CONFIG, classes=CLASSES)


def test_grey_input_equals_the_network_on_normalised_rgb(network: HPDDRNet, description: Manifest) -> None:
    images = np.stack([grey_image(40, 64, seed) for seed in range(2)])[:, None]
    mean = torch.tensor(description.normalization.mean).view(1, 3, 1, 1)
    std = torch.tensor(description.normalization.std).view(1, 3, 1, 1)
    rgb = (torch.from_numpy(images).float().expand(-1, 3, -1, -1) - mean) / std
    with torch.inference_mode():
        expected = network.predict_logits(rgb).numpy()
    grey = TorchEngine.from_network(network, description, device="cpu")
    assert isinstance(grey, Engine)
    found = grey.infer(images)
    assert found.logits is not None
    assert found.logits.shape == (2, 3, 40, 64)
    assert np.abs(found.logits - expected).max() < 1e-5
    assert np.array_equal(found.labels, found.logits.argmax(axis=1))
    normalised = TorchEngine.from_network(network, description, device="cpu", input_dtype="float32")
    frozen = np.ascontiguousarray(rgb.numpy())
    frozen.flags.writeable = False
    assert np.abs(normalised.infer(frozen).logits - expected).max() < 1e-5


def test_file_options_and_status(tmp_path: Path, network: HPDDRNet, description: Manifest) -> None:
    path = save_checkpoint(tmp_path / "tiny.safetensors", network, description)
    images = grey_image(24, 32)[None, None]
    with load_engine(path, device="cpu") as engine:
        assert engine.runtime.startswith("torch ")
        assert "FP32" in engine.runtime
        expected = engine.infer(images).logits
    for options in ({"channels_last": True}, {"autocast": "bf16"}):
        with TorchEngine(path, device="cpu", **options) as other:  # type: ignore[arg-type]
            found = other.infer(images).logits
            assert found.dtype == np.float32
            assert np.abs(found - expected).max() < 0.05
            assert ("channels last" in other.runtime) == ("channels_last" in options)


def test_weights_are_not_changed_by_inference(network: HPDDRNet, description: Manifest) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()  # the engine must switch batch norm to its running statistics
    engine = TorchEngine.from_network(network, description, device="cpu")
    first = engine.infer(grey_image(16, 16)[None, None]).logits
    assert np.array_equal(first, engine.infer(grey_image(16, 16)[None, None]).logits)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_refusals(tmp_path: Path, network: HPDDRNet, description: Manifest) -> None:
    path = save_checkpoint(tmp_path / "tiny.safetensors", network, description)
    for options, words in (
        ({"device": "gpu9"}, "unknown device 'gpu9'"),
        ({"autocast": "int4"}, "autocast one of off, fp16, bf16"),
        ({"input_dtype": "int8"}, "input_dtype is uint8 or float32"),
        ({"compile": "fast"}, "compile one of off, default, max-autotune"),
    ):
        with pytest.raises(UsageError, match=words):
            TorchEngine(path, **options)  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(NoGpu, match="finds no GPU 'cuda'"):
            TorchEngine(path, device="cuda")


@pytest.mark.parametrize("size", ["1x136x200", "2x128x192"])
def test_golden_logits(golden: Path, size: str) -> None:
    images = np.load(golden / "inputs.npz")[f"x_{size}"].astype(np.float32)
    expected = np.load(golden / "hpddrnet" / f"eval_{size}.npz")["logits_full"]
    with TorchEngine(golden / "hpddrnet" / "checkpoint.pth", device="cpu", input_dtype="float32") as engine:
        assert engine.manifest.class_names == ["grains", "pores", "clay"]
        assert np.abs(engine.infer(images).logits - expected).max() < 5e-4


def test_labels_only_output_gives_the_same_labels_and_no_logits(
    network: HPDDRNet, description: Manifest, tmp_path: Path
) -> None:
    checkpoint = save_checkpoint(tmp_path / "tiny.safetensors", network, description)
    image = np.random.default_rng(3).integers(0, 256, (2, 1, 32, 40), dtype=np.uint8)
    with TorchEngine(checkpoint) as full, TorchEngine(checkpoint, output="labels") as labels_only:
        expected, found = full.infer(image), labels_only.infer(image)
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert found.logits is None
    assert expected.logits is not None
    with pytest.raises(UsageError, match="output"):
        TorchEngine(checkpoint, output="scores")  # type: ignore[arg-type]


def test_ties_go_to_the_first_class(network: HPDDRNet, description: Manifest) -> None:
    engine = TorchEngine.from_network(network, description, device="cpu")
    engine._score = lambda x: torch.zeros(1, 3, 16, 16)
    assert not engine.infer(grey_image(16, 16)[None, None]).labels.any()


def test_bound_batch_runs_the_same_inference(network: HPDDRNet, description: Manifest) -> None:
    engine = TorchEngine.from_network(network, description, device="cpu")
    seen: list[Any] = []
    compute = engine._compute
    engine._compute = lambda x: seen.append(compute(x)) or seen[-1]  # type: ignore[method-assign, func-returns-value]
    images = grey_image(16, 24)[None, None]
    run = engine.bind(images)
    run()
    run()
    assert len(seen) == 2
    np.testing.assert_array_equal(seen[1][0].numpy(), engine.infer(images).labels)


def test_layer_times_are_of_modules(network: HPDDRNet, description: Manifest) -> None:
    engine = TorchEngine.from_network(network, description, device="cpu")
    images = grey_image(32, 32)[None, None]
    before = engine.infer(images).logits
    times = engine.layer_times(images, runs=3)
    assert {"backbone.stem.0.conv", "backbone.sps.0.pa", "backbone", "decode_head.conv_seg", "output"} <= set(times)
    assert not any("aux" in name for name in times)  # not called
    assert all(value >= 0 for value in times.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    np.testing.assert_array_equal(engine.infer(images).logits, before)


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


@pytest.mark.usefixtures("one_thread")
def test_compiler_runs(network: HPDDRNet, description: Manifest) -> None:
    """The real compiler on one convolution instead of the network, with normalisation and arg-max."""
    if shutil.which("g++") is None:
        pytest.skip("torch.compile on a CPU needs a C++ compiler; g++ is missing")
    torch.manual_seed(3)
    score = torch.nn.Conv2d(3, 3, 1).eval()
    engines = []
    for compile in ("off", "default"):
        engine = TorchEngine.__new__(TorchEngine)
        engine._setup(network, description, device="cpu", compile=compile)
        engine._score = score
        engines.append(engine)
    images = grey_image(16, 24)[None, None]
    expected, found = (engine.infer(images) for engine in engines)
    assert np.abs(found.logits - expected.logits).max() < 1e-4
    np.testing.assert_array_equal(found.labels, expected.labels)


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


def test_missing_compiler_is_a_sentence(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    def stand_in(function: Any, **options: Any) -> Any:
        def run(x: torch.Tensor) -> Any:
            try:
                raise InvalidCxxCompiler
            except InvalidCxxCompiler as exc:
                raise InductorError(exc, None) from exc

        return run

    monkeypatch.setattr(torch, "compile", stand_in)
    engine = TorchEngine(small, device="cpu", compile="default")
    with pytest.raises(UserError, match=r"no C\+\+ compiler; install one"):
        engine.infer(grey_image(16, 16)[None, None])


def test_foreign_errors_are_not_the_compilers(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(x: torch.Tensor) -> Any:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(torch, "compile", lambda function, **options: broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        TorchEngine(small, device="cpu", compile="default").infer(grey_image(16, 16)[None, None])
