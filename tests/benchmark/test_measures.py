"""End-to-end and inference latency, throughput of engines that only simulate their time, and roofline bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from hpddrnet_trt.accuracy.cost import DEVICES
from hpddrnet_trt.benchmark import measures
from hpddrnet_trt.benchmark.machine import GpuSensor, GpuWatch
from hpddrnet_trt.benchmark.measures import (
    BenchmarkCase,
    Timer,
    batches_per_round,
    end_to_end_stream,
    known_device,
    roofline_bounds,
)
from hpddrnet_trt.benchmark.result import Settings, Shape
from hpddrnet_trt.benchmark.timing import WarmUp
from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.manifest import InputContract, Manifest, OutputContract
from hpddrnet_trt.engines.base import Bound, EngineBase, Prediction
from hpddrnet_trt.weights import locate
from tests.tiny_network import tiny_manifest, tiny_network


class FakeEngine(EngineBase):
    """Labels are the grey levels modulo 3; counts what it is asked."""

    runtime = "numpy (CPU)"

    def __init__(self, manifest: Manifest) -> None:
        contract = InputContract.model_validate({"dtype": "uint8", "channels": 1})
        self.manifest = manifest.replace(input=contract, output=OutputContract(kind="labels"))
        self.inferences, self.bound, self.streams = 0, 0, list[int]()

    def infer(self, images: npt.NDArray[Any]) -> Prediction:
        self.inferences += 1
        return Prediction((images[:, 0] % 3).astype(np.uint8))

    def bind(self, images: npt.NDArray[Any]) -> Callable[[], None]:
        def run() -> None:
            self.bound += 1

        return run

    def infer_many(self, batches: Iterable[npt.NDArray[Any]]) -> Iterator[Prediction]:
        waiting = list(batches)  # as an engine that takes many at once
        self.streams.append(len(waiting))
        return map(self.infer, waiting)


class Plain(FakeEngine):
    """Without a measure of the network alone, and with one frame at a time only."""

    bind = None  # type: ignore[assignment]

    def infer_many(self, batches: Iterable[npt.NDArray[Any]]) -> Iterator[Prediction]:
        raise NotImplementedError


class Broken(FakeEngine):
    def bind(self, images: npt.NDArray[Any]) -> Callable[[], None]:
        raise UserError("out of memory")


class OnGpu(FakeEngine):
    """Each inference takes a quarter of a second by its events, and no time of the host."""

    runtime = "TensorRT 11 (Example GPU)"

    def bind(self, images: npt.NDArray[Any]) -> Callable[[], None]:
        return Bound(lambda: None, lambda runs: [0.25] * runs)


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return tiny_manifest(tiny_network())


@pytest.fixture
def case() -> BenchmarkCase:
    rng = np.random.default_rng(0)
    return BenchmarkCase(Shape(12, 16, 2), [rng.integers(0, 256, (2, 12, 16), np.uint8) for _ in range(3)])


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> Timer:
    monkeypatch.setattr(measures, "ROUND_S", 1e-9)
    return Timer(Settings(rounds=6, warmup=2, pause_ms=0, burst_ms=0), GpuWatch(None), quiet=True)


def test_a_stream_of_frames_gives_their_labels_in_order_and_size(manifest: Manifest, case: BenchmarkCase) -> None:
    engine = FakeEngine(manifest)
    mixed = [*case.frames, np.full((1, 8, 8), 4, np.uint8)]
    found = list(end_to_end_stream(engine)(iter(mixed)))
    assert [labels.shape for labels in found] == [frames.shape for frames in mixed]  # 12 rows were padded to 16
    for labels, frames in zip(found, mixed, strict=True):
        np.testing.assert_array_equal(labels, frames % 3)


def test_inference_runs_what_was_bound_and_nothing_else(
    manifest: Manifest, case: BenchmarkCase, timer: Timer
) -> None:
    kinds = {"good": FakeEngine, "plain": Plain, "broken": Broken, "gpu": OnGpu}
    engines = {label: kind(manifest) for label, kind in kinds.items()}
    found = timer.inference(engines, case)
    assert list(found.samples.seconds) == ["good", "gpu"]
    assert engines["good"].bound == 6 + found.samples.warmups["good"].runs
    assert engines["good"].inferences == 0
    assert found.samples.seconds["gpu"] == [[0.25]] * 6  # what its events say, not the host's clock
    assert [found.timing(label, None, 0).by_events for label in ("good", "gpu")] == [False, True]
    for steady, named in ((False, ["good"]), (None, []), (True, [])):
        found.samples.warmups["good"] = WarmUp(2, steady)
        assert found.unsteady == named
    assert found.samples.failures == {"plain": "this engine cannot run the network alone", "broken": "out of memory"}


def test_latencies_are_of_bursts_and_only_the_processor_rests(
    manifest: Manifest, case: BenchmarkCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[float] = []
    monkeypatch.setattr("hpddrnet_trt.benchmark.timing.time.sleep", rests.append)
    timer = Timer(Settings(rounds=3, warmup=1, pause_ms=30, burst_ms=50), GpuWatch(None), quiet=True)
    found = timer.inference({"gpu": OnGpu(manifest)}, case)
    assert set(rests) == {0}
    timing = found.timing("gpu", None, 0)
    assert (timing.burst, timing.uncounted, timing.rounds, timing.cold_ms) == (1, 1, 3, 250)
    rests.clear()
    found = timer.end_to_end({"cpu": FakeEngine(manifest), "gpu": OnGpu(manifest)}, case)
    assert set(rests) == {0.03}
    timing = found.timing("cpu", (found, "gpu"), 0)
    assert timing.burst > 1
    assert timing.uncounted == 2
    assert len(timing.samples_ms) == 3 * timing.burst
    other = timer.end_to_end({"gpu": OnGpu(manifest)}, case)
    apart = found.timing("cpu", (other, "gpu"), 0).ratio
    assert timing.ratio is not None
    assert apart is not None
    assert (timing.ratio.paired, apart.paired) == (True, False)  # the reference was timed in rounds of its own


class Counter(GpuSensor):
    """A GPU whose energy counter gains 3 J with every reading."""

    def __init__(self) -> None:
        self.total = 0.0

    def joules(self) -> float:
        self.total += 3
        return self.total


def test_throughput_runs_rounds_of_batches_and_counts_their_energy(
    manifest: Manifest, case: BenchmarkCase, timer: Timer
) -> None:
    engines = {"good": FakeEngine(manifest), "unmetered": FakeEngine(manifest), "plain": Plain(manifest)}
    found = timer.throughput(engines, case, {"good": Counter(), "unmetered": None})
    assert list(found.samples.seconds) == ["good", "unmetered"]
    assert engines["good"].streams == [2, 4] + 6 * [4]  # two to warm up and choose, then the rounds
    assert found.joules == {"good": pytest.approx(6 * 3 / (6 * 4 * 2))}
    assert found.samples.failures == {"plain": "this engine does not offer it"}
    timing = found.timing("good", (found, "unmetered"), seed=0)
    assert timing.joules_per_image == pytest.approx(3 / 8)
    assert (timing.warmup, timing.steady, found.unsteady) == (None, None, [])
    assert timing.images_per_s == pytest.approx(2000 / timing.p50_ms)
    assert timing.ratio is not None
    assert (timing.burst, timing.uncounted, timing.cold_ms) == (1, 0, None)


@pytest.mark.parametrize(
    ("first_s", "each_s", "count"),
    [(0, 0.001, 330), (1.0, 0.001, 330), (0, 0.05, 7), (0, 0.1, 4), (0, 0.9, 4), (0, 1.5, 2), (0, 1e-9, 5000)],
)
def test_a_round_lasts_long_enough_but_not_longer_than_needed(first_s: float, each_s: float, count: int) -> None:
    now, calls = 0.0, 0

    def run(batches: int) -> None:
        nonlocal now, calls
        calls += 1
        now += batches * each_s + (first_s if calls == 1 else 0)

    assert batches_per_round(run, clock=lambda: now) == count
    assert calls <= 4


def test_a_known_gpu_is_its_data_sheet() -> None:
    assert known_device("NVIDIA H200") is DEVICES["h200"]
    assert known_device("NVIDIA H200 NVL") is DEVICES["h200"]
    assert known_device("NVIDIA L40S") is None  # not an L4
    assert known_device("NVIDIA GeForce RTX 4090") is None


def test_bounds_follow_the_shipped_networks_work() -> None:
    graph, device = locate("nasa-super1", ".onnx"), DEVICES["h200"]
    shapes = [Shape(1024, 1024, 1), Shape(1024, 1024, 2), Shape(512, 512, 1)]
    bounds = {name: roofline_bounds(graph, name, shapes, device) for name in ("fp32", "fp16", "int8")}
    assert [bound.shape for bound in bounds["fp16"]] == shapes
    for name, found in bounds.items():
        one, two, small = (bound.milliseconds for bound in found)
        # 24.7 GMAC at 1024x1024, of which attention grows faster than pixels; weights are read once a batch.
        computing = 2e3 * 24.7e9 / (device.tera_operations[name] * 1e12)
        assert 0.85 * computing < one < 8 * computing
        assert 1.8 * one < two <= 2 * one
        assert small < one / 3
    assert bounds["int8"][0].milliseconds < bounds["fp16"][0].milliseconds < bounds["fp32"][0].milliseconds
    assert roofline_bounds(graph, "fp8", shapes, DEVICES["agx-orin"]) == []  # which has none
    with pytest.raises(UserError):
        roofline_bounds(graph, "fp16", [Shape(12, 12, 1)], device)
