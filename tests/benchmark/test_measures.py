"""Latency, network only and throughput of engines that only simulate their time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from hpddrnet_trt.benchmark import measures
from hpddrnet_trt.benchmark.frame import frames_to_labels
from hpddrnet_trt.benchmark.measures import Case, Stopwatch, batches_per_round
from hpddrnet_trt.benchmark.result import Settings
from hpddrnet_trt.benchmark.telemetry import Gpu, GpuWatch
from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.manifest import InputContract, Manifest, OutputContract
from hpddrnet_trt.engines.base import EngineBase, Prediction
from tests.tiny_network import tiny_manifest, tiny_network


class FakeEngine(EngineBase):
    """Labels are the grey levels modulo 3; counts what it is asked."""

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


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return tiny_manifest(tiny_network())


@pytest.fixture
def case() -> Case:
    rng = np.random.default_rng(0)
    return Case(12, 16, 2, [rng.integers(0, 256, (2, 12, 16), np.uint8) for _ in range(3)])


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    monkeypatch.setattr(measures, "ROUND_S", 1e-9)
    return Stopwatch(Settings(rounds=6, warmup=2, pause_ms=0), GpuWatch(None), quiet=True)


def test_a_stream_of_frames_gives_their_labels_in_order_and_size(manifest: Manifest, case: Case) -> None:
    engine = FakeEngine(manifest)
    mixed = [*case.frames, np.full((1, 8, 8), 4, np.uint8)]
    found = list(frames_to_labels(engine)(iter(mixed)))
    assert [labels.shape for labels in found] == [frames.shape for frames in mixed]  # 12 rows were padded to 16
    for labels, frames in zip(found, mixed, strict=True):
        np.testing.assert_array_equal(labels, frames % 3)


def test_network_only_runs_what_was_bound_and_nothing_else(
    manifest: Manifest, case: Case, stopwatch: Stopwatch
) -> None:
    engines = {"good": FakeEngine(manifest), "plain": Plain(manifest), "broken": Broken(manifest)}
    found = stopwatch.network(engines, case)
    assert list(found.laps.samples) == ["good"]
    assert engines["good"].bound == 6 + found.laps.warmups["good"].runs
    assert engines["good"].inferences == 0
    assert found.laps.failures == {"plain": "this engine cannot run the network alone", "broken": "out of memory"}


class Counter(Gpu):
    """A GPU whose energy counter gains 3 J with every reading."""

    def __init__(self) -> None:
        self.total = 0.0

    def joules(self) -> float:
        self.total += 3
        return self.total


def test_throughput_runs_rounds_of_batches_and_counts_their_energy(
    manifest: Manifest, case: Case, stopwatch: Stopwatch
) -> None:
    engines = {"good": FakeEngine(manifest), "unmetered": FakeEngine(manifest), "plain": Plain(manifest)}
    found = stopwatch.throughput(engines, case, {"good": Counter(), "unmetered": None})
    assert list(found.laps.samples) == ["good", "unmetered"]
    assert engines["good"].streams == [2, 4] + 6 * [4]  # two to warm up and choose, then the rounds
    assert found.joules == {"good": pytest.approx(6 * 3 / (6 * 4 * 2))}
    assert found.laps.failures == {"plain": "this engine does not offer it"}
    timing = found.timing("good", "unmetered", seed=0)
    assert timing.joules_per_image == pytest.approx(3 / 8)
    assert (timing.warmup, timing.steady) == (None, None)
    assert timing.images_per_s == pytest.approx(2000 / timing.p50_ms)
    assert timing.ratio is not None
    assert found.timing("good", "plain", seed=0).ratio is None


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


def test_unsteady_engines_are_named(manifest: Manifest, case: Case, stopwatch: Stopwatch) -> None:
    found = stopwatch.latency({"a": FakeEngine(manifest)}, case)
    found.laps.warmups["a"] = found.laps.warmups["a"]._replace(steady=False)
    assert found.unsteady == ["a"]
    found.laps.warmups["a"] = found.laps.warmups["a"]._replace(steady=None)
    assert found.unsteady == []
