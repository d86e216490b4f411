"""What every engine promises: one set of tests for all of them, beside the short files about each."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest

from hpddrnet_trt.core.errors import BadInputFile, ContractError, UserError
from hpddrnet_trt.engines import ENGINES, load_engine
from hpddrnet_trt.engines.base import Engine
from tests.engines.conftest import Bench
from tests.tiny_network import lively, tiny_manifest, tiny_network
from tests.toy import grey_image, manifest, write_toy_onnx

Images = npt.NDArray[np.uint8]
# OpenVINO twice: as it comes, and on a processor where it runs three batches side by side.
NAMES = ["torch", "onnxruntime", "openvino", "openvino, three at a time", "tensorrt"]


@dataclass(frozen=True)
class Subject:
    """An engine whose model gives logits, how to open one that gives labels only, and the truth."""

    name: str
    engine: Engine
    labels_only: Callable[[], Engine]
    scores: Callable[[Images], npt.NDArray[Any]]  # images [N, 1, H, W] to float32 [N, C, H, W]
    path: Path

    def check(self, images: Images, labels: npt.NDArray[Any]) -> None:
        """Labels are those of the truth's highest scores, but for ties within rounding."""
        scores = self.scores(images)
        taken = np.take_along_axis(scores, labels[:, None].astype(np.int64), axis=1)[:, 0]
        assert labels.shape == (len(images), *images.shape[2:])
        assert labels.dtype == np.uint8
        np.testing.assert_allclose(taken, scores.max(axis=1), atol=1e-4)


@pytest.fixture(params=NAMES)
def subject(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Subject]:
    name: str = request.param
    engine = name.split(",")[0]
    if importlib.util.find_spec(ENGINES[engine].library) is None and engine != "tensorrt":
        pytest.skip(f"{ENGINES[engine].label} is not installed")
    if engine == "tensorrt":
        bench: Callable[..., Bench] = request.getfixturevalue("bench")
        job = bench("logits")
        made = Subject(name, job.engine, lambda: bench().engine, job.truth, job.path)
    elif engine == "torch":
        made = _torch(tmp_path, name)
    else:
        if "three" in name:
            _three_at_a_time(monkeypatch)
        made = _onnx(tmp_path, name, engine)
    with made.engine:
        yield made


def _torch(folder: Path, name: str) -> Subject:
    import torch

    from hpddrnet_trt.models.checkpoints import save_checkpoint

    network = lively(tiny_network())
    description = tiny_manifest(network)
    path = save_checkpoint(folder / "m.safetensors", network, description)
    mean, std = (np.reshape(values, (1, 3, 1, 1)) for values in (description.normalization.mean,
                                                                 description.normalization.std))  # fmt: skip

    def scores(images: Images) -> npt.NDArray[Any]:
        with torch.inference_mode():
            rgb = torch.from_numpy(((images - mean) / std).astype(np.float32))
            return np.asarray(network.predict_logits(rgb).numpy())

    options = {"device": "cpu", "threads": 1}

    def labels_only() -> Engine:
        return load_engine(path, "torch", output="labels", **options)

    return Subject(name, load_engine(path, "torch", **options), labels_only, scores, path)


def _onnx(folder: Path, name: str, engine: str) -> Subject:
    path = write_toy_onnx(folder / "m.onnx", manifest("logits", confidence=True))
    labels = write_toy_onnx(folder / "labels.onnx", manifest())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def scores(images: Images) -> npt.NDArray[Any]:
        return np.asarray(session.run(["logits"], {"image": np.ascontiguousarray(images)})[0])

    opened = load_engine(path, engine, threads=1)
    return Subject(name, opened, lambda: load_engine(labels, engine, threads=1), scores, path)


def _three_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from hpddrnet_trt.engines.openvino import OpenVINOEngine

    class Compiled:
        """A compiled graph that asks for three requests, however few threads there are."""

        def __init__(self, real: Any) -> None:
            self.create_infer_request = real.create_infer_request

        def get_property(self, name: str) -> int:
            assert name == "OPTIMAL_NUMBER_OF_INFER_REQUESTS"
            return 3

    compile_ = OpenVINOEngine._compile
    monkeypatch.setattr(OpenVINOEngine, "_compile", lambda *arguments: Compiled(compile_(*arguments)))


def _images(size: int = 64, count: int = 1, seed: int = 0) -> Images:
    return np.stack([grey_image(size, 64, seed + number) for number in range(count)])[:, None]


def _varied(sizes: list[int]) -> list[Images]:
    return [_images(size, seed=seed) for seed, size in enumerate(sizes)]


# --- one batch


def test_labels_and_scores_are_the_models(subject: Subject) -> None:
    assert isinstance(subject.engine, Engine)
    assert subject.engine.runtime
    for images in (_images(64, 2), _images(72), _images(64, 2, seed=5)):
        prediction = subject.engine.infer(images)
        assert prediction.logits is not None
        assert prediction.logits.dtype == np.float32
        np.testing.assert_allclose(prediction.logits, subject.scores(images), atol=1e-4)
        np.testing.assert_array_equal(prediction.labels, prediction.logits.argmax(axis=1))
        assert prediction.labels.dtype == np.uint8
        if prediction.confidence is not None:
            shares = np.exp(prediction.logits) / np.exp(prediction.logits).sum(axis=1, keepdims=True)
            np.testing.assert_allclose(prediction.confidence, shares.max(axis=1), atol=1e-4)
    assert len(np.unique(prediction.labels)) > 1


def test_labels_only(subject: Subject) -> None:
    with subject.labels_only() as engine:
        prediction = engine.infer(_images(64, 2))
    assert (prediction.logits, prediction.confidence) == (None, None)
    assert (prediction.labels.shape, prediction.labels.dtype) == ((2, 64, 64), np.uint8)


def test_arrays_of_any_layout_are_taken_and_left_as_they_are(subject: Subject) -> None:
    images = _images(64, 2)
    strided = np.repeat(images, 2, axis=3)[..., ::2]
    backwards = np.asfortranarray(images)[:, :, ::-1][:, :, ::-1]
    frozen = images.copy()
    frozen.flags.writeable = backwards.flags.writeable = False
    expected = subject.engine.infer(images).labels
    for given in (strided, backwards, frozen):
        np.testing.assert_array_equal(subject.engine.infer(given).labels, expected)
        np.testing.assert_array_equal(next(iter(subject.engine.infer_many([given]))).labels, expected)
        subject.engine.bind(given)()
        np.testing.assert_array_equal(given, images)


def test_what_the_description_does_not_admit_is_refused_and_the_engine_goes_on(subject: Subject) -> None:
    good = _images()
    bad: list[tuple[Any, str]] = [
        (good[0, 0], "expected an array"),
        ([[1]], "expected an array"),
        (good.astype(np.float32), "dtype uint8"),
        (good.repeat(3, axis=1), "channel"),
        (_images(68), "multiples of 8"),
        (good[:0], "batch 0"),
    ]
    for images, says in bad:
        for call in (subject.engine.infer, subject.engine.bind, subject.engine.layer_times):
            with pytest.raises(ContractError, match=says):
                call(images)  # type: ignore[operator]
    subject.check(good, subject.engine.infer(good).labels)


def test_a_result_is_the_callers_own(subject: Subject) -> None:
    batches = _varied([64, 64, 72, 64])
    predictions = [subject.engine.infer(images) for images in batches]
    for images, prediction in zip(batches, predictions, strict=True):
        subject.check(images, prediction.labels)


# --- rows of batches


@pytest.mark.parametrize("sizes", [[], [64], [64] * 8, [64, 64, 72, 64, 64, 64, 64, 64, 80]])
def test_a_row_is_as_one_by_one_and_in_order(subject: Subject, sizes: list[int]) -> None:
    batches = _varied(sizes)
    before = threading.active_count()
    predictions = list(subject.engine.infer_many(iter(batches)))
    assert threading.active_count() == before
    for images, prediction in zip(batches, predictions, strict=True):  # after all: results are their own memory
        expected = subject.engine.infer(images)
        np.testing.assert_array_equal(prediction.labels, expected.labels)
        np.testing.assert_allclose(prediction.logits, expected.logits, atol=1e-5)


def test_a_bad_batch_ends_the_row_after_the_results_before_it(subject: Subject) -> None:
    batches = _varied([64] * 4)
    row = iter(subject.engine.infer_many([*batches, _images(68), *batches]))
    for images in batches:
        subject.check(images, next(row).labels)
    with pytest.raises(ContractError, match="multiples of 8"):
        next(row)
    assert len(list(subject.engine.infer_many(batches))) == 4


def test_rows_may_be_left_early_nested_and_mixed_with_single_batches(subject: Subject) -> None:
    batches = _varied([64] * 6)
    rows = zip(subject.engine.infer_many(batches), subject.engine.infer_many(batches[::-1]), strict=True)
    for index, (left, right) in enumerate(rows):
        subject.check(batches[index], left.labels)
        subject.check(batches[-1 - index], right.labels)
        subject.check(batches[0], subject.engine.infer(batches[0]).labels)
    row = iter(subject.engine.infer_many(batches))
    next(row)
    del row
    assert len(list(subject.engine.infer_many(batches))) == 6


def test_a_source_that_fails_passes_its_own_error_on(subject: Subject) -> None:
    def source() -> Iterator[Images]:
        yield from _varied([64] * 3)
        raise OSError("camera unplugged")

    with pytest.raises(OSError, match="camera unplugged"):
        list(subject.engine.infer_many(source()))
    assert len(list(subject.engine.infer_many(_varied([64] * 3)))) == 3


# --- for measuring


def test_bound_batches_and_layer_times_disturb_nothing(subject: Subject) -> None:
    images, other = _images(64, 2), _images(72, seed=3)
    expected = subject.engine.infer(images).labels
    run, second = subject.engine.bind(images), subject.engine.bind(other)
    for _ in range(2):
        run()
        second()
    if "three" not in subject.name:
        times = subject.engine.layer_times(images, runs=2)
        assert times
        assert min(times.values()) >= 0
    run()
    np.testing.assert_array_equal(subject.engine.infer(images).labels, expected)


# --- the end


def test_a_closed_engine_says_so(subject: Subject) -> None:
    images = _images()
    run = subject.engine.bind(images)
    row = iter(subject.engine.infer_many(_varied([64] * 9)))
    next(row)
    subject.engine.close()
    subject.engine.close()
    calls: list[Callable[[], object]] = [
        run, lambda: list(row), lambda: subject.engine.infer(images), lambda: subject.engine.bind(images),
        lambda: subject.engine.layer_times(images), lambda: list(subject.engine.infer_many([images])),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(UserError, match="closed"):
            call()


def test_damaged_files_are_named(subject: Subject) -> None:
    content = subject.path.read_bytes()
    name = subject.name.split(",")[0]
    for length in (0, 1, len(content) // 2, len(content) - 60):
        subject.path.write_bytes(content[:length])
        with pytest.raises(BadInputFile, match=subject.path.name):
            load_engine(subject.path, name if name != "tensorrt" else "auto")
    with pytest.raises(BadInputFile, match="does not exist"):
        load_engine(subject.path.with_name(f"none{subject.path.suffix}"))


def test_threads_are_counted_from_one(subject: Subject) -> None:
    if subject.name == "tensorrt":
        pytest.skip("TensorRT has no such option")
    with pytest.raises(UserError, match="threads must be at least 1"):
        load_engine(subject.path, subject.name.split(",")[0], threads=0)
