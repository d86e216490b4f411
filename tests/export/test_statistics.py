"""Statistics of activations: exact merging, what the graph reports, what is kept between runs."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from functools import reduce
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from PIL import Image

from hpddrnet_trt.core.cache import cache_folder
from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.core.manifest import Manifest, read_manifest
from hpddrnet_trt.export import statistics, statistics_cache
from hpddrnet_trt.export.histograms import BINS, Histogram, Statistics, from_bytes, histogram, merge, to_bytes
from hpddrnet_trt.export.images import plan_crops
from hpddrnet_trt.export.statistics import extremes, measure
from hpddrnet_trt.export.statistics_cache import StatisticsCache
from hpddrnet_trt.graph.nodes import copied, name_nodes, store
from tests.graph.residual_onnx import residual_model
from tests.tiny_export import pictures

SIZE = 96
TENSORS = ["grey", "stem_out", "shortcut", "scores"]


def exact(entry: Histogram) -> dict[str, Any]:
    """A histogram as something that compares."""
    counts = dict(zip(entry.bins.tolist(), entry.counts.tolist(), strict=True))
    return {"range": (entry.low, entry.high), "exponent": entry.exponent, "zeros": entry.zeros, "counts": counts}


def total(entry: Histogram) -> int:
    return entry.zeros + int(entry.counts.sum())


def same(first: Statistics, second: Statistics) -> bool:
    return {name: exact(entry) for name, entry in first.items()} == {
        name: exact(entry) for name, entry in second.items()
    }


def all_same(first: list[Statistics], second: list[Statistics]) -> bool:
    return all(same(one, other) for one, other in zip(first, second, strict=True))


# --- histograms

finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
some_values = st.lists(st.one_of(finite, st.floats(-3, 3, width=32), st.just(0.0)), min_size=1, max_size=40)


def of(values: list[float]) -> Histogram:
    return histogram(np.array(values, np.float32))


@given(some_values)
def test_counts_are_those_of_exact_arithmetic(values: list[float]) -> None:
    entry = of(values)
    largest = max(abs(value) for value in values)
    assert (entry.low, entry.high) == (min(values), max(values))
    assert largest < 2.0**entry.exponent
    if largest >= 2.0**-100:
        assert largest >= 2.0 ** (entry.exponent - 1)
    width = Fraction(2) ** entry.exponent / BINS
    bins = ((value, int(abs(Fraction(value)) // width)) for value in values if value != 0)
    assert exact(entry)["counts"] == dict(Counter(~size if value < 0 else size for value, size in bins))
    assert entry.zeros == values.count(0)
    assert sorted(entry.bins) == list(entry.bins)
    assert entry.width == width


@given(st.lists(some_values, min_size=1, max_size=6), st.randoms())
def test_parts_merge_to_the_whole_in_any_order_and_survive_as_bytes(parts: list[list[float]], random: Any) -> None:
    whole = {"x": of([value for part in parts for value in part])}
    assert same(reduce(merge, ({"x": of(part)} for part in random.sample(parts, len(parts)))), whole)
    kept = {f"tensor {index}": of(values) for index, values in enumerate(parts)}
    assert same(from_bytes(to_bytes(kept), list(kept)), kept)


@given(st.data())
def test_damaged_bytes_and_those_of_other_tensors_are_noticed(data: st.DataObject) -> None:
    content = to_bytes({"x": histogram(np.linspace(-1, 2, 500))})
    position = data.draw(st.integers(0, len(content) - 1))
    flipped = bytearray(content)
    flipped[position] ^= data.draw(st.integers(1, 255))
    for damaged in (bytes(flipped), content[:position], content + b"x"):
        with pytest.raises(ValueError, match="checksum"):
            from_bytes(damaged, ["x"])
    with pytest.raises(ValueError, match="other tensors"):
        from_bytes(content, ["y"])


# --- what the graph reports


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return pictures(tmp_path_factory.mktemp("micrographs"), 6, SIZE, SIZE)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return residual_model(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture
def model(source: Path) -> Any:
    loaded = onnx.load(str(source))
    name_nodes(loaded)
    return loaded


@pytest.fixture
def manifest(source: Path) -> Manifest:
    return read_manifest(source)


def activations(model: Any, path: Path) -> dict[str, npt.NDArray[np.float32]]:
    shown = copied(model)
    shown.graph.output.extend(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in TENSORS)
    session = onnxruntime.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(TENSORS, session.run(TENSORS, {"image": grey(path)}), strict=True))


def grey(path: Path) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(path))[np.newaxis, np.newaxis]


def weight(model: Any, name: str) -> Any:
    return next(entry for entry in model.graph.initializer if entry.name == name)


Measure = Callable[..., list[Statistics]]


@pytest.fixture
def measured(model: Any, manifest: Manifest, images: list[Path], tmp_path: Path) -> Measure:
    """Measure images one by one; by default all of them, with a cache in ``tmp_path``."""

    def run(paths: list[Path] | None = None, **options: Any) -> list[Statistics]:
        size = options.pop("size", 64)
        crops = plan_crops(images if paths is None else paths, size, size, each=options.pop("each", 1))
        arguments = {"model": model, "manifest": manifest, "tensors": TENSORS, "cache": tmp_path, **options}
        return [entry for _, entry in measure(crops=crops, size=(size, size), **arguments)]

    return run


@pytest.mark.parametrize("samples", [480, 400_000])
def test_activations_are_sampled_evenly_and_their_extremes_are_exact(
    measured: Measure, model: Any, images: list[Path], monkeypatch: pytest.MonkeyPatch, samples: int
) -> None:
    """With as many samples as values every one is counted."""
    monkeypatch.setattr(statistics, "SAMPLES", samples)
    (found,) = measured(images[:1], size=SIZE, cache=None)
    for name, values in activations(model, images[0]).items():
        entry = found[name]
        assert (entry.low, entry.high) == pytest.approx((values.min(), values.max()), rel=1e-6)
        step = statistics._next_prime(-(-values.size // samples))
        assert total(entry) == -(-values.size // step) <= samples
        expected = histogram(values.ravel()[::step], (entry.low, entry.high))
        # The same values, up to the rounding of another set of fusions.
        moved = Counter(exact(entry)["counts"])
        moved.subtract(exact(expected)["counts"])
        assert sum(abs(count) for count in moved.values()) <= 0.02 * entry.counts.sum()


@pytest.mark.parametrize(("value", "prime"), [(0, 1), (1, 1), (2, 2), (4, 5), (9, 11), (128, 131), (7919, 7919)])
def test_steps_are_prime(value: int, prime: int) -> None:
    assert statistics._next_prime(value) == prime


def test_statistics_come_per_image_in_the_order_given(measured: Measure, images: list[Path]) -> None:
    forward = measured()
    assert all_same(forward, measured(images[::-1])[::-1])
    for count, together in enumerate(accumulate(forward, merge), start=1):
        assert same(together, reduce(merge, measured(images[:count])))


def test_a_fixed_batch_sees_each_crop_by_itself(tmp_path: Path, measured: Measure) -> None:
    path = residual_model(tmp_path / "batch.onnx", batch=3, size=64)
    static = onnx.load(str(path))
    name_nodes(static)
    for single, repeated in zip(measured(), measured(model=static, manifest=read_manifest(path)), strict=True):
        assert total(repeated["grey"]) == 3 * total(single["grey"])
        assert repeated["stem_out"].high == pytest.approx(single["stem_out"].high, rel=1e-5)


def test_extremes_over_all_batches(model: Any, images: list[Path]) -> None:
    found = extremes(model, TENSORS, (grey(path) for path in images))
    values = [activations(model, path) for path in images]
    for name, (low, high) in found.items():
        assert low == pytest.approx(min(entry[name].min() for entry in values), rel=1e-6)
        assert high == pytest.approx(max(entry[name].max() for entry in values), rel=1e-6)
    with pytest.raises(UsageError, match="at least one micrograph"):
        extremes(model, TENSORS, [])


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_values_that_are_not_finite_are_named(model: Any, measured: Measure, images: list[Path], value: float) -> None:
    weights = np.array(numpy_helper.to_array(weight(model, "first.weight")))
    weights[3, 2, 1, 1] = value  # one channel of many: ReduceMin and ReduceMax pass over its NaN
    store(weight(model, "first.weight"), weights)
    with pytest.raises(UserError, match="'first' is not finite on a calibration image"):
        extremes(model, ["stem_out", "first"], [grey(images[0])])
    with pytest.raises(UserError, match="'first' is not finite"):
        measured(tensors=["stem_out", "first"])


PEAK = """
import json, resource, sys
from pathlib import Path
from functools import reduce
import onnx
from hpddrnet_trt.graph import qdq
from hpddrnet_trt.export.images import Crop
from hpddrnet_trt.export.histograms import merge
from hpddrnet_trt.export.statistics import measure
from hpddrnet_trt.core.manifest import read_manifest
from hpddrnet_trt.graph.nodes import name_nodes

source, images = sys.argv[1], json.loads(sys.argv[2])
model = onnx.load(source)
name_nodes(model)
crops = [Crop(Path(path), 0, 0) for path in images]
found = measure(model, read_manifest(source), qdq.plan(model, "tensorrt").tensors, crops, (128, 128), cache=None)
reduce(merge, (entry for _, entry in found))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux reports it")
def test_peak_memory_does_not_grow_with_the_images(source: Path, tmp_path: Path) -> None:
    paths = list(map(str, pictures(tmp_path, 4, 128, 128)))
    children = []
    for repeats in (1, 16):
        command = [sys.executable, "-c", PEAK, str(source), json.dumps(paths * repeats)]
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True))
    few, many = (int(child.communicate(timeout=60)[0]) for child in children)  # KiB
    # The activations of 60 more images would be some 500 MiB.
    assert many - few < 24 * 1024


# --- what is kept


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every crop that is computed."""
    computed: list[int] = []
    original = statistics._Probe.statistics

    def counted(self: Any, batch: Any) -> Statistics:
        computed.append(1)
        return original(self, batch)

    monkeypatch.setattr(statistics._Probe, "statistics", counted)
    return computed


def kept_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.npz"))


def test_what_was_measured_is_not_measured_again(
    measured: Measure, images: list[Path], tmp_path: Path, runs: list[int]
) -> None:
    first = measured(images[:4])
    assert (len(runs), len(kept_files(tmp_path))) == (4, 4)
    second = measured()  # a larger set: only what is missing
    assert len(runs) == 6
    assert all_same(first, second[:4])
    assert all_same(second, measured(cache=None))
    assert len(runs) == 12
    assert max(path.stat().st_size for path in kept_files(tmp_path)) < 100_000


def test_several_crops_of_an_image_are_one_entry_and_reuse_the_fewer(
    measured: Measure, tmp_path: Path, runs: list[int]
) -> None:
    large = pictures(tmp_path / "large", 1, 192, 192)
    for each in (1, 2, 5, 9):
        (found,) = measured(large, each=each)
        assert len(runs) == each
        assert total(found["grey"]) == each * 64 * 64


def test_another_network_other_tensors_or_another_image_are_measured(
    measured: Measure, model: Any, images: list[Path], tmp_path: Path, runs: list[int]
) -> None:
    measured(images[:1])
    measured(images[:1], tensors=TENSORS[::-1])
    copy = tmp_path / "copy.png"
    Image.fromarray(grey(images[0])[0, 0]).save(copy)
    measured([copy])  # the same pixels under another name
    assert len(runs) == 2
    Image.fromarray(255 - grey(images[0])[0, 0]).save(copy)
    measured([copy])
    assert len(runs) == 3
    store(weight(model, "stem.bias"), numpy_helper.to_array(weight(model, "stem.bias")) + 1)
    measured(images[:1])
    assert len(runs) == 4


def test_damaged_files_are_measured_again(
    measured: Measure, tmp_path: Path, runs: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    expected = measured()
    first, second, third = kept_files(tmp_path)[:3]
    first.write_bytes(first.read_bytes()[:-40])
    second.write_bytes(b"")
    content = bytearray(third.read_bytes())
    content[len(content) // 2] ^= 1
    third.write_bytes(content)
    assert all_same(expected, measured())
    assert len(runs) == 9
    assert sum("damaged" in message for message in caplog.messages) == 3
    measured()
    assert len(runs) == 9


def test_several_runs_at_once_share_a_folder(measured: Measure, tmp_path: Path) -> None:
    expected = measured(cache=None)
    results: list[list[Statistics]] = []
    threads = [threading.Thread(target=lambda: results.append(measured())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert all(all_same(expected, found) for found in results)
    assert len(kept_files(tmp_path)) == 6
    assert not [path for path in tmp_path.rglob("*.tmp*") if path.is_file()]


def test_a_folder_that_cannot_be_written_is_read_and_no_error(
    measured: Measure, images: list[Path], runs: list[int], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    expected = measured(images[2:])

    def refused(*_: Any) -> None:
        raise UserError("cannot write: read-only file system")

    monkeypatch.setattr(statistics_cache, "write_bytes", refused)
    with caplog.at_level(logging.WARNING):
        found = measured()
    assert len(runs) == len(images)
    assert all_same(expected, found[2:])
    assert sum("not kept for the next run" in message for message in caplog.messages) == 1  # one a run


def test_the_files_used_least_recently_go_first_whichever_model_left_them(tmp_path: Path) -> None:
    kept = {"x": histogram(np.linspace(0, 1, 100))}
    cache, other = (StatisticsCache(tmp_path, graph, ["x"]) for graph in ("graph", "other"))
    cache.prune(0)  # nothing is there
    other.store("a", kept)
    os.utime(kept_files(tmp_path)[0], (0, 0))
    for index, name in enumerate("abcd", start=1):
        cache.store(name, kept)
        path = tmp_path / "calibration" / "graph" / f"{name}.npz"
        os.utime(path, (index, index))
    found = cache.load("a")
    assert found is not None  # used: now the newest
    assert same(found, kept)
    cache.prune(2 * path.stat().st_size)
    assert [path.stem for path in kept_files(tmp_path)] == ["a", "d"]
    assert cache.load("b") is None
    assert other.load("a") is None


def test_pruning_follows_a_run(measured: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured()
    monkeypatch.setattr(statistics_cache, "LIMIT_BYTES", 0)
    measured()
    assert len(kept_files(tmp_path)) == 6  # nothing new, nothing to do
    measured(tensors=TENSORS[:1])
    assert not kept_files(tmp_path)


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "home/.cache/hpddrnet-trt"),
        ("linux", {"XDG_CACHE_HOME": "xdg"}, "xdg/hpddrnet-trt"),
        ("darwin", {}, "home/Library/Caches/hpddrnet-trt"),
        ("win32", {"LOCALAPPDATA": "local"}, "local/hpddrnet-trt/cache"),
        ("win32", {}, "home/AppData/Local/hpddrnet-trt/cache"),
        ("win32", {"LOCALAPPDATA": "local", "HPDDRNET_CACHE": "chosen"}, "chosen"),
    ],
)
def test_the_users_cache_folder(
    monkeypatch: pytest.MonkeyPatch, platform: str, variables: dict[str, str], expected: str
) -> None:
    for name in ("HPDDRNET_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path("home"))
    assert cache_folder() == Path(expected)


def test_the_users_folder_is_the_default(measured: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPDDRNET_CACHE", str(tmp_path))
    measured(cache="user")
    assert len(kept_files(tmp_path / "calibration")) == 6
