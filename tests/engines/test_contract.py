"""What every engine promises, whichever runtime is behind it; the other files here hold what is one engine's own."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from hpddrnet_trt.core.domain import fit_domain
from hpddrnet_trt.core.errors import BadInputFile, ContractError, UserError
from hpddrnet_trt.core.manifest import DomainRecord, read_manifest, sidecar_path
from hpddrnet_trt.engines import ENGINES, load_engine
from hpddrnet_trt.engines.base import Engine, checked_prediction
from hpddrnet_trt.graph.domain import with_domain
from hpddrnet_trt.graph.model import save_model
from hpddrnet_trt.graph.precision import to_half
from hpddrnet_trt.inference import load_segmenter
from hpddrnet_trt.models.checkpoints import save_checkpoint
from tests.engines.conftest import Bench
from tests.threads import in_threads
from tests.tiny_export import exported
from tests.tiny_network import lively, tiny_manifest, tiny_network
from tests.toy import DOMAIN, grey_image, manifest, toy_features, write_toy_onnx

if TYPE_CHECKING:
    from tests.triton_server import Server

Images = npt.NDArray[np.uint8]
# OpenVINO twice: as it comes, and on a processor where it runs three batches side by side.
NAMES = ["torch", "onnxruntime", "openvino", "openvino, three at a time", "tensorrt", "triton"]


@dataclass(frozen=True)
class Subject:
    """An engine whose model gives logits, how to open one that gives labels only, and the truth."""

    name: str
    path: Path
    engine: Engine
    labels_only: Callable[[], Engine]
    scores: Callable[[Images], npt.NDArray[Any]]  # images [N, 1, H, W] to float32 [N, C, H, W]
    memory: Callable[[], object] = lambda: None  # what of the engine is still on the GPU
    pooled: Callable[[Images], npt.NDArray[Any]] | None = None  # as scores, where features are not means of these

    def features(self, images: Images) -> npt.NDArray[np.float32]:
        """The truth's ``domain_features``, by default means of its scores over every 8 x 8 pixels."""
        return toy_features(self.scores(images)) if self.pooled is None else self.pooled(images)

    def check(self, images: Images, labels: npt.NDArray[Any]) -> None:
        """Labels are those of the truth's highest scores, but for ties within rounding."""
        scores = self.scores(images)
        assert (labels.shape, labels.dtype) == ((len(images), *images.shape[2:]), np.uint8)
        taken = np.take_along_axis(scores, labels[:, None].astype(np.int64), axis=1)[:, 0]
        np.testing.assert_allclose(taken, scores.max(axis=1), atol=1e-4)

    @property
    def runtime(self) -> str:
        return self.name.split(",")[0]


@pytest.fixture(params=NAMES)
def subject(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Subject]:
    name: str = request.param
    runtime = name.split(",")[0]
    if runtime == "tensorrt":
        bench: Callable[..., Bench] = request.getfixturevalue("bench")
        job = bench("logits")
        made = Subject(name, job.path, job.engine, lambda: bench().engine, job.truth,
                       lambda: (job.cuda.memory, job.cuda.graphs))  # fmt: skip
    elif importlib.util.find_spec(ENGINES[runtime].library) is None:
        pytest.skip(f"{ENGINES[runtime].label} is not installed")
    elif runtime == "torch":
        made = _torch(tmp_path)
    else:
        if "three" in name:
            _three_at_a_time(monkeypatch)
        path = write_toy_onnx(tmp_path / "m.onnx", manifest("logits", confidence=True, domain=True))
        labels = write_toy_onnx(tmp_path / "labels.onnx", manifest())
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        opened: Callable[[Path], Engine] = lambda path: load_engine(path, runtime, threads=1)  # noqa: E731
        if runtime == "triton":
            server: Server = request.getfixturevalue("triton_server")
            for version, file in enumerate((path, labels)):
                server.add(file, file.stem, version + 1)
            opened = lambda path: load_engine(server.address(path.stem))  # noqa: E731
        made = Subject(name, path, opened(path), lambda: opened(labels),
                       lambda images: np.asarray(session.run(["logits"], {"image": np.array(images)})[0]))  # fmt: skip
    with made.engine:
        yield made


def _torch(folder: Path) -> Subject:
    import torch

    from hpddrnet_trt.models.domain import domain_features

    network = lively(tiny_network())
    known, plain = (
        save_checkpoint(folder / f"{name}.safetensors", network, tiny_manifest(network, domain=record))
        for name, record in (("m", _record(8)), ("plain", None))
    )
    norm = tiny_manifest(network).normalization

    def scores(images: Images) -> npt.NDArray[Any]:
        rgb = (images - np.reshape(norm.mean, (1, 3, 1, 1))) / np.reshape(norm.std, (1, 3, 1, 1))
        with torch.inference_mode():
            return np.asarray(network.predict_logits(torch.from_numpy(rgb.astype(np.float32))).numpy())

    def pooled(images: Images) -> npt.NDArray[Any]:
        return np.stack([domain_features(network, image[0], norm) for image in images])

    def opened(path: Path, output: str) -> Engine:
        return load_engine(path, "torch", output=output, device="cpu", threads=1)

    return Subject("torch", known, opened(known, "logits"), lambda: opened(plain, "labels"), scores, pooled=pooled)


def _record(features: int) -> DomainRecord:
    """Statistics of so many features, which nothing was trained on."""
    same = {**DOMAIN.model_dump(), "mean": [0.0] * features, "scale": [1.0] * features}
    return DomainRecord.model_validate(same)


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


def _varied(*sizes: int) -> list[Images]:
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
        if prediction.confidence is not None:
            shares = np.exp(prediction.logits) / np.exp(prediction.logits).sum(axis=1, keepdims=True)
            np.testing.assert_allclose(prediction.confidence, shares.max(axis=1), atol=1e-4)
    assert len(np.unique(prediction.labels)) > 1
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


def test_domain_features_are_the_files(subject: Subject) -> None:
    """Of single batches until they are recorded, where they are, and of rows; none from a file without them."""
    batches = [_images(64, 2), _images(72), *[_images(64, 2, seed=seed) for seed in range(6)]]
    for images, of_row in zip(batches, subject.engine.infer_many(batches), strict=True):
        for prediction in (subject.engine.infer(images), of_row):
            assert prediction.domain_features is not None
            np.testing.assert_allclose(prediction.domain_features, subject.features(images), atol=1e-4)
    with subject.labels_only() as engine:
        assert engine.infer(batches[0]).domain_features is None


# --- rows of batches


def _threads() -> set[threading.Thread]:
    """Those that run, but for a server's in this process and those of gRPC, which end a moment later."""
    found = {one for one in threading.enumerate() if "channel_spin" not in one.name}
    return {one for one in found if not one.name.startswith("server")}


@pytest.mark.parametrize("sizes", [[], [64], [64] * 8, [64, 64, 72, 64, 64, 64, 64, 64, 80]])
def test_a_row_is_as_one_by_one_and_in_order(subject: Subject, sizes: list[int]) -> None:
    batches = _varied(*sizes)
    before = _threads()
    predictions = list(subject.engine.infer_many(iter(batches)))
    assert _threads() <= before
    for images, prediction in zip(batches, predictions, strict=True):  # after all: results are their own memory
        expected = subject.engine.infer(images)
        np.testing.assert_array_equal(prediction.labels, expected.labels)
        np.testing.assert_allclose(prediction.logits, expected.logits, atol=1e-5)


def test_a_row_that_cannot_go_on_ends_after_the_results_before(subject: Subject) -> None:
    """A bad batch, and a source with an error of its own."""
    batches = _varied(*[64] * 4)
    row = iter(subject.engine.infer_many([*batches, _images(68), *batches]))
    for images in batches:
        subject.check(images, next(row).labels)
    with pytest.raises(ContractError, match="multiples of 8"):
        next(row)

    def source() -> Iterator[Images]:
        yield from batches[:3]
        raise OSError("camera unplugged")

    with pytest.raises(OSError, match="camera unplugged"):
        list(subject.engine.infer_many(source()))
    assert len(list(subject.engine.infer_many(batches))) == 4


def test_rows_may_be_left_early_nested_and_mixed_with_single_batches(subject: Subject) -> None:
    batches = _varied(*[64] * 6)
    rows = zip(subject.engine.infer_many(batches), subject.engine.infer_many(batches[::-1]), strict=True)
    for index, (left, right) in enumerate(rows):
        subject.check(batches[index], left.labels)
        subject.check(batches[-1 - index], right.labels)
        subject.check(batches[0], subject.engine.infer(batches[0]).labels)
    row = iter(subject.engine.infer_many(batches))
    next(row)
    del row
    assert len(list(subject.engine.infer_many(batches))) == 6


# --- for measuring


def test_bound_batches_and_layer_times_disturb_nothing(subject: Subject) -> None:
    images, other = _images(64, 2), _images(72, seed=3)
    expected = subject.engine.infer(images).labels
    run, second = subject.engine.bind(images), subject.engine.bind(other)
    for _ in range(2):
        run()
        second()
    if "three" not in subject.name and subject.runtime != "triton":
        times = subject.engine.layer_times(images, runs=2)
        assert times
        assert min(times.values()) >= 0
    run()
    np.testing.assert_array_equal(subject.engine.infer(images).labels, expected)


# --- threads


def test_each_thread_gets_its_own_labels(subject: Subject) -> None:
    batches = _varied(64, 72, 64, 80, 64, 88)
    expected = [subject.engine.infer(images).labels for images in batches]
    assert len({labels.tobytes() for labels in expected}) == len(batches)

    def work(first: int) -> None:
        """All batches twice, each thread beginning with another; every result is looked at after all have come."""
        order = [*range(first, len(batches)), *range(first)] * 2
        images = [batches[index] for index in order]
        found = list(subject.engine.infer_many(images)) if first % 2 else [subject.engine.infer(one) for one in images]
        for index, prediction in zip(order, found, strict=True):
            np.testing.assert_array_equal(prediction.labels, expected[index])

    assert in_threads(*[lambda first=first: work(first) for first in range(6)], timeout_s=120) == []  # type: ignore[misc]


@pytest.mark.parametrize("seed", range(3))
def test_closing_while_others_work(subject: Subject, seed: int) -> None:
    """They finish what they are at, and then read one sentence; what the engine held is free."""
    images = _images(seed=seed)
    expected, run, started = subject.engine.infer(images).labels, subject.engine.bind(images), threading.Event()

    def endless(infer: Callable[[], list[Any]]) -> None:
        while True:
            for prediction in infer():
                np.testing.assert_array_equal(prediction.labels, expected)
            started.set()

    def close() -> None:
        started.wait(60)
        subject.engine.close()

    works = [
        lambda: [subject.engine.infer(images)], lambda: list(subject.engine.infer_many([images] * 3)),
        lambda: list(subject.engine.infer_many([images] * 3)), lambda: run() or [],  # type: ignore[func-returns-value]
    ]  # fmt: skip
    raised = in_threads(*[lambda work=work: endless(work) for work in works], close, timeout_s=120)  # type: ignore[misc]
    assert len(raised) == len(works)
    assert all(isinstance(exc, UserError) and "closed; load" in str(exc) for exc in raised), raised
    assert not any(subject.memory() or ())  # type: ignore[call-overload]


def test_a_closed_engine_says_so(subject: Subject) -> None:
    images = _images()
    run = subject.engine.bind(images)
    row = iter(subject.engine.infer_many(_varied(*[64] * 9)))
    next(row)
    subject.engine.close()
    subject.engine.close()
    calls: list[Callable[[], object]] = [
        run, lambda: list(row), lambda: subject.engine.infer(images), lambda: subject.engine.bind(images),
        lambda: subject.engine.layer_times(images), lambda: list(subject.engine.infer_many([images])),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(UserError, match="closed; load"):
            call()


# --- files


def test_damaged_files_are_named(subject: Subject) -> None:
    if subject.name == "triton":
        pytest.skip("opens no file")
    content = subject.path.read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 60):
        subject.path.write_bytes(content[:length])
        with pytest.raises(BadInputFile, match=subject.path.name):
            load_engine(subject.path, subject.runtime if subject.runtime != "tensorrt" else "auto")
    with pytest.raises(BadInputFile, match="does not exist"):
        load_engine(subject.path.with_name(f"none{subject.path.suffix}"))


def test_threads_are_counted_from_one(subject: Subject) -> None:
    if subject.name in ("tensorrt", "triton"):
        pytest.skip("has no such option")
    with pytest.raises(UserError, match="threads must be at least 1"):
        load_engine(subject.path, subject.runtime, threads=0)


def test_one_network_has_one_distance_in_every_form(tmp_path: Path) -> None:
    """From the checkpoint to files of two precisions, whole and in tiles, for whose sake scores are looked for."""
    from hpddrnet_trt.models.domain import domain_features

    network = lively(tiny_network())
    norm = tiny_manifest(network).normalization
    at_home = [domain_features(network, grey_image(320, 320, seed), norm).reshape(8, -1).T for seed in range(4)]
    record = fit_domain([(cells, cells) for cells in at_home], crops=16, source="toy")
    checkpoint = save_checkpoint(tmp_path / "m.safetensors", network, tiny_manifest(network, domain=record))
    graph, described = exported()
    described = described.replace(domain=record, output={"kind": "labels", "domain": True})
    fp32 = save_model(with_domain(graph), tmp_path / "m.onnx", described)
    fp16 = save_model(to_half(with_domain(graph)), tmp_path / "h.onnx", described.replace(precision="fp16"))
    forms = [(checkpoint, "torch", 0.0), (fp32, "onnxruntime", 2e-3)]
    if importlib.util.find_spec("openvino"):
        forms.append((fp16, "openvino", 0.2))  # in BF16, where the processor has it
    images = [grey_image(320, 520, 7), np.full((320, 520), 200, np.uint8), grey_image(40, 56, 8)]
    found = {}
    for path, name, within in forms:
        for tile in ("whole", 256):
            with load_segmenter(path, engine=name, precision="file", threads=1, device="cpu", tile=tile) as segmenter:
                results = segmenter.segment_batch(images)
            assert (results[0].tiling is not None) == (tile == 256)
            found[name, tile] = [result.domain.distance for result in results]
            assert found[name, tile] == pytest.approx(found["torch", tile], rel=within), name
        assert float(found[name, tile][1]) > 2 * float(found[name, tile][0])


def _labels_changed(path: Path, how: Callable[[Any], None], *nodes: Any, **constants: list[int] | int) -> Path:
    """The toy model with ``nodes`` between what ``how`` renames and its labels."""
    model = onnx.load(str(write_toy_onnx(path, manifest())))
    how(model.graph)
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    place = 1 + max(index for index, node in enumerate(model.graph.node) if node.output[0].startswith("real"))
    for node in reversed(nodes):
        model.graph.node.insert(place, node)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("labels", TensorProto.UINT8, [None] * 3))
    onnx.save(model, str(path))
    return path


def _renamed(output: str) -> Callable[[Any], None]:
    def rename(graph: Any) -> None:
        next(node for node in graph.node if node.output[0] == output).output[0] = "real"

    return rename


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_files_that_lie(tmp_path: Path, name: str) -> None:
    """Labels that are 7 too high, and labels of half the height."""
    pytest.importorskip(name)
    images, path = grey_image(16, 24)[None, None], tmp_path / "m.onnx"
    shifted = _labels_changed(path.with_stem("a"), _renamed("indices"),
                              helper.make_node("Add", ["real", "seven"], ["indices"]), seven=7)  # fmt: skip
    halved = _labels_changed(path, _renamed("labels"),
                             helper.make_node("Slice", ["real", "starts", "ends", "axes", "steps"], ["labels"]),
                             starts=[0], ends=[2**62], axes=[1], steps=[2])  # fmt: skip
    for file, says in ((shifted, r"gave the label [789], and has the classes 0 to 2"), (halved, r"shape \(1, 8, 24\)")):
        with load_engine(file, name, threads=1) as engine:
            with pytest.raises(BadInputFile, match=says):
                engine.infer(images)
            with pytest.raises(BadInputFile, match=says):
                list(engine.infer_many([images]))


def _outputs(**changes: Any) -> dict[str, Any]:
    return {"labels": np.zeros((1, 16, 24), np.uint8), **changes}


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        (_outputs(labels=np.zeros((1, 8, 24), np.uint8)), r"labels has the shape \(1, 8, 24\) instead of \(1, 16, 24"),
        (_outputs(labels=np.zeros((1, 1, 16, 24), np.uint8)), "has the shape"),
        (_outputs(labels=np.zeros((1, 16, 24), np.int64)), "its output labels is of type int64"),
        (_outputs(labels=np.full((1, 16, 24), 3, np.uint8)), "it gave the label 3, and has the classes 0 to 2"),
        (_outputs(confidence=np.zeros((2, 16, 24), np.float32)), "its output confidence has the shape"),
        (_outputs(domain_features=np.zeros((1, 4, 2, 3), np.float32)), r"domain_features has the shape \(1, 4, 2, 3\)"),
        (_outputs(domain_features=np.zeros((2, 3, 2, 3), np.float32)), "domain_features has the shape"),
        (_outputs(domain_features=np.zeros((1, 3, 0, 3), np.float32)), "domain_features has the shape"),
        (_outputs(domain_features=np.zeros((1, 3, 2, 3), np.int8)), "its output domain_features is of type int8"),
        ({"logits": np.zeros((1, 4, 16, 24), np.float32)}, r"its output logits has the shape \(1, 4, 16, 24\)"),
        ({"logits": np.zeros((1, 3, 16, 24), np.uint8)}, "its output logits is of type uint8"),
    ],
)  # fmt: skip
def test_what_is_not_promised_is_refused(outputs: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInputFile, match=rf"model 'toy' does not do what its description promises .*{says}.*export"):
        checked_prediction(outputs, manifest(domain=True), (1, 1, 16, 24))


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "tensorrt", "torch"])
def test_statistics_of_other_features_are_refused_at_opening(
    tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    others = _record(5)
    if name == "tensorrt":
        path = request.getfixturevalue("bench")("logits").path
        changed = read_manifest(path).replace(domain=others)
        sidecar_path(path).write_text(changed.to_json())
    elif name == "torch":
        network = tiny_network()
        path = save_checkpoint(tmp_path / "m.safetensors", network, tiny_manifest(network, domain=others))
    else:
        pytest.importorskip(name)
        path = write_toy_onnx(tmp_path / "m.onnx", manifest(domain=True).replace(domain=others))
    with pytest.raises(BadInputFile, match=rf"{path.name} gives [38] features of a cell, .* of 5; export it again"):
        load_engine(path, "auto" if name == "tensorrt" else name)


def test_what_is_promised_passes_uncopied() -> None:
    outputs = _outputs(confidence=np.ones((1, 16, 24), np.float32), unknown=np.zeros(3))
    outputs["labels"][0, 3, 4] = 2
    found = checked_prediction(outputs, manifest(), (1, 1, 16, 24))
    assert (found.labels is outputs["labels"], found.confidence is outputs["confidence"]) == (True, True)
