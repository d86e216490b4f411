"""Segmenter: any size, modes, contracts; geometry on a small real model, numbers on the authors' pipeline."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hpddrnet_trt import __version__
from hpddrnet_trt.core.errors import ContractError, UsageError
from hpddrnet_trt.core.manifest import AxisRange, InputContract
from hpddrnet_trt.core.metrics import arg_max, softmax
from hpddrnet_trt.data.micrograph import Micrograph
from hpddrnet_trt.data.preprocess import Mode, plan_tta
from hpddrnet_trt.engines import load_engine
from hpddrnet_trt.engines.base import Prediction
from hpddrnet_trt.inference import Segmenter, Tile, load_segmenter
from hpddrnet_trt.inference.result import Provenance
from tests.toy import ToyEngine, grey_image, manifest, toy_logits, write_toy_onnx

SIZES = st.integers(1, 70)


@settings(deadline=None)  # machines can be busy
@given(height=SIZES, width=SIZES, seed=st.integers(0, 3))
def test_any_size_equals_the_unpadded_computation(height: int, width: int, seed: int) -> None:
    # The toy model continues an image by reflection, just as the padding does: padding may change nothing.
    image = grey_image(height, width, seed)
    for description in (manifest("logits"), manifest("labels")):
        found = Segmenter(ToyEngine(description)).segment(image)
        assert found.labels.shape == image.shape
        assert found.labels.dtype == np.uint8
        assert np.array_equal(found.labels, toy_logits(image).argmax(axis=0))
        assert found.confidence is None


@settings(deadline=None)  # machines can be busy
@given(height=SIZES, width=SIZES)
def test_flip_mode_is_equivariant(height: int, width: int) -> None:
    segmenter, image = Segmenter(ToyEngine(), mode="flip", confidence=True), grey_image(height, width)
    found, mirrored = segmenter.segment(image), segmenter.segment(image[:, ::-1])
    assert np.array_equal(found.labels, mirrored.labels[:, ::-1])
    assert found.confidence is not None
    assert mirrored.confidence is not None
    assert np.array_equal(found.confidence, mirrored.confidence[:, ::-1])



def test_multiscale_is_the_mean_of_softmax_over_views() -> None:
    image, engine = grey_image(37, 50), ToyEngine()
    found = Segmenter(engine, mode="multiscale").class_scores(image)
    total = np.zeros((3, 37, 50))
    for ratio in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75):
        height, width = int(37 * ratio + 0.5), int(50 * ratio + 0.5)
        for flip in (False, True):
            view = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
            logits = toy_logits(np.ascontiguousarray(view[:, ::-1]) if flip else view)
            logits = logits[:, :, ::-1] if flip else logits
            back = np.stack([cv2.resize(np.ascontiguousarray(plane), (50, 37)) for plane in logits])
            total += softmax(back[None])[0]
    assert len(engine.shapes) == 12
    assert np.abs(found - total / 12).max() < 1e-6


def test_batches_keep_order_and_group_equal_sizes() -> None:
    engine = ToyEngine()
    images = [grey_image(*size, seed) for seed, size in enumerate([(16, 16), (9, 20), (16, 16), (16, 16), (9, 20)])]
    segmenter = Segmenter(engine, batch_size=2)
    found = segmenter.segment_batch(images)
    assert engine.shapes == [(2, 1, 16, 16), (1, 1, 16, 16), (2, 1, 16, 24)]
    for image, result in zip(images, found, strict=True):
        assert np.array_equal(result.labels, Segmenter(ToyEngine()).segment(image).labels)
    assert segmenter.segment_batch([]) == []
    fixed = ToyEngine(manifest("logits", input=InputContract(batch=AxisRange(minimum=3, maximum=3))))
    images = [grey_image(8, 8, seed) for seed in range(4)]
    with Segmenter(fixed, batch_size=8, confidence=True) as segmenter:
        found = segmenter.segment_batch(images)
    assert fixed.shapes == [(3, 1, 8, 8)] * 2  # it is filled
    for image, result in zip(images, found, strict=True):
        assert np.array_equal(result.labels, toy_logits(image).argmax(axis=0))
    assert fixed.closed


def test_fixed_size_models() -> None:
    engine = ToyEngine(manifest("labels", size=48))
    image = grey_image(20, 31)
    assert np.array_equal(Segmenter(engine).segment(image).labels, toy_logits(image).argmax(axis=0))
    assert engine.shapes == [(1, 1, 48, 48)]
    with pytest.raises(ContractError, match=r"height of 49 pixels does not fit .* takes 48; cut"):
        Segmenter(engine, tile="whole").segment(grey_image(49, 48))
    assert Segmenter(engine, resize=(48, 48)).segment(grey_image(96, 60)).labels.shape == (96, 60)


def test_resize_with_labels_and_with_logits() -> None:
    image = cv2.resize(grey_image(16, 16), (64, 64), interpolation=cv2.INTER_CUBIC)
    whole = Segmenter(ToyEngine()).segment(image).labels
    for description in (manifest("labels"), manifest("logits")):
        engine = ToyEngine(description)
        reduced = Segmenter(engine, resize=(32, 32)).segment(image).labels
        assert engine.shapes == [(1, 1, 32, 32)]
        assert reduced.shape == image.shape
        assert 0.8 < (reduced == whole).mean() < 1


def test_confidence() -> None:
    image = grey_image(21, 33)
    found = Segmenter(ToyEngine(), confidence=True).segment(image)
    scores = softmax(toy_logits(image)[None])[0]
    assert np.allclose(found.confidence, scores.max(axis=0), atol=1e-6)
    assert np.array_equal(found.labels, scores.argmax(axis=0))
    with pytest.raises(ContractError, match="gives no confidence"):
        Segmenter(ToyEngine(manifest("labels")), confidence=True)



def test_unusable_options(tmp_path: Path) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest("labels"))
    modes: tuple[Mode, ...] = ("flip", "multiscale")
    for mode in modes:
        with pytest.raises(ContractError, match=f"mode '{mode}' averages class scores"):
            load_segmenter(path, mode=mode)
    with pytest.raises(ContractError, match="gives labels only"):
        load_segmenter(path).class_scores(grey_image(8, 8))
    for options, words in (
        ({"mode": "double"}, "unknown mode"),
        ({"batch_size": 0}, "batch_size"),
        ({"resize": (0, 5)}, "resize"),
    ):
        with pytest.raises(UsageError, match=words):
            Segmenter(ToyEngine(), **options)  # type: ignore[arg-type]



def test_provenance(tmp_path: Path) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest("logits", checkpoint_sha256="c" * 64))
    image = Micrograph(grey_image(20, 30).astype(np.uint16), tmp_path / "a.tif", pixel_size_m=5e-9)
    before = datetime.now(UTC)
    with load_segmenter(path, threads=1, mode="flip", window=(10, 200)) as segmenter:
        result = segmenter.segment(image)
        found = result.provenance
        single = segmenter.with_mode("single").segment(image).provenance
        runtime, arithmetic = segmenter.engine.runtime, segmenter.engine.arithmetic
    assert (result.source, result.pixel_size_m) == (tmp_path / "a.tif", 5e-9)
    assert [entry.name for entry in result.classes] == ["grain", "pore", "clay"]
    assert found is not None
    assert timedelta(seconds=-1) < datetime.fromisoformat(found.time) - before < timedelta(seconds=60)
    assert found == Provenance(
        model="toy", model_sha256=hashlib.sha256(path.read_bytes()).hexdigest(), checkpoint_sha256="c" * 64,
        engine=runtime, precision=arithmetic, version=__version__, mode="flip",
        window=(10.0, 200.0), time=found.time,
    )  # fmt: skip
    assert single == replace(found, mode="single", time=single.time if single else "")
    assert json.loads(json.dumps(found.as_dict()))["window"] == [10.0, 200.0]



@pytest.mark.parametrize("kind", ["labels", "logits"])
def test_labels_in_an_array_of_the_caller(kind: str) -> None:
    segmenter, image = Segmenter(ToyEngine(manifest(kind)), confidence=kind == "logits"), grey_image(21, 33)
    expected = segmenter.segment(image).labels
    wide = np.full((21, 66), 9, np.uint8)
    for out in (np.full((21, 33), 9, np.uint8), np.full((33, 21), 9, np.uint8).T, wide[:, ::2]):
        found = segmenter.segment(image, out)
        assert found.labels is out
        assert np.array_equal(out, expected)
    assert (wide[:, 1::2] == 9).all()


def test_an_engine_that_writes_where_it_is_told_saves_the_copy() -> None:
    class Writing(ToyEngine):
        def infer(self, images: np.ndarray, out: np.ndarray | None = None) -> Prediction:
            given.append(out)
            found = super().infer(images)
            if out is None:
                return found
            out[...] = found.labels
            return Prediction(out)

    given: list[np.ndarray | None] = []
    segmenter = Segmenter(Writing(manifest("labels")))
    for height, width, order, handed_on in ((16, 24, "C", True), (16, 24, "F", False), (15, 24, "C", False)):
        image = grey_image(height, width)
        out = np.empty((height, width), np.uint8, order=order)  # type: ignore[call-overload]
        found = segmenter.segment(image, out)
        assert found.labels is out
        assert np.array_equal(out, toy_logits(image).argmax(axis=0))
        passed = given.pop()
        assert (passed is not None) == handed_on
        assert passed is None or np.shares_memory(passed, out)


def test_unusable_output_arrays() -> None:
    segmenter, image = Segmenter(ToyEngine()), grey_image(20, 30)
    frozen = np.empty((20, 30), np.uint8)
    frozen.flags.writeable = False
    for out in (np.empty((20, 31), np.uint8), np.empty((1, 20, 30), np.uint8), np.empty((20, 30), np.int8), frozen, []):
        with pytest.raises(ContractError, match=r"out must be a writable uint8 array of shape \(20, 30\), got"):
            segmenter.segment(image, out)  # type: ignore[arg-type]
    with pytest.raises(ContractError, match="out shares memory with the image"):
        segmenter.segment(image, image)



@pytest.mark.parametrize("tile", ["auto", 32])
def test_one_segmenter_in_many_threads(tmp_path: Path, tile: Tile) -> None:
    images = [grey_image(*size, seed) for seed, size in enumerate([(70, 90), (20, 30), (64, 64), (33, 100)] * 6)]
    path = write_toy_onnx(tmp_path / "m.onnx", manifest("logits"))
    engines = [ToyEngine(), ToyEngine(manifest("labels")), load_engine(path, threads=1)]
    for engine in engines:
        with Segmenter(engine, tile=tile, confidence=engine is engines[0]) as segmenter:
            alone = [segmenter.segment(image) for image in images]
            with ThreadPoolExecutor(8) as pool:
                together = list(pool.map(segmenter.segment, images))
        for one, other in zip(alone, together, strict=True):
            assert np.array_equal(one.labels, other.labels)
            assert one.tiling == other.tiling
            assert one.confidence is other.confidence is None or np.array_equal(one.confidence, other.confidence)


# --- the authors' pipeline ---------------------------------------------------------------------


def _reference(golden: Path, **options: object) -> Segmenter:
    torch_engine = pytest.importorskip("hpddrnet_trt.engines.torch", reason="the reference needs PyTorch")
    engine = torch_engine.TorchEngine(golden / "hpddrnet" / "checkpoint.pth", device="cpu", input_dtype="float32")
    return Segmenter(engine, **options)  # type: ignore[arg-type]


def _rgb(golden: Path, name: str) -> np.ndarray:
    with Image.open(golden / "pipeline" / f"{name}.png") as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize("name", ["sq160", "rect120x150"])
def test_authors_test_pipeline(golden: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    expected = np.load(golden / "pipeline" / "pipeline.npz")
    facts = json.loads((golden / "pipeline" / "pipeline.json").read_text())["images"][name]
    image, segmenter = _rgb(golden, name), _reference(golden, resize=(2048, 1024))
    height, width = image.shape[:2]
    (transform,) = plan_tta("single", height, width, (2048, 1024))
    assert [transform.height, transform.width] == facts["resized_hw"]
    bgr = np.ascontiguousarray(transform.apply(image)[:, :, ::-1].transpose(2, 0, 1))
    difference = bgr[:, ::8, ::8].astype(int) - expected[f"{name}_resized_sub8_bgr"]
    assert np.abs(difference).max() <= 1  # versions of cv2 differ by 1

    seen: list[tuple[np.ndarray, Prediction]] = []
    infer = segmenter.engine.infer

    def watched(images: np.ndarray) -> Prediction:
        seen.append((images, infer(images)))
        return seen[-1][1]

    monkeypatch.setattr(segmenter.engine, "infer", watched)
    labels = segmenter.segment(image).labels
    ((batch, prediction),) = seen
    assert np.abs(batch[0, :, ::16, ::16] - expected[f"{name}_input_sub16"]).max() <= 1 / 57
    if hashlib.sha256(bgr.tobytes()).hexdigest() == facts["sha256_resized_chw_bgr_uint8"]:
        assert hashlib.sha256(batch[0].tobytes()).hexdigest() == facts["sha256_input_f32"]
    assert prediction.logits is not None
    reference = expected[f"{name}_logits_ori"]
    assert np.abs(transform.restore_scores(prediction.logits[0], height, width) - reference).max() < 5e-4
    best = np.sort(reference, axis=0)
    certain = best[-1] - best[-2] > 2e-3
    assert certain.mean() > 0.99
    assert np.array_equal(labels[certain], expected[f"{name}_pred"][certain])


def test_authors_multiscale_flip(golden: Path) -> None:
    expected = np.load(golden / "pipeline" / "pipeline.npz")
    segmenter = _reference(golden, mode="multiscale")
    image = _rgb(golden, "tta128")
    scores = segmenter.class_scores(image)
    assert np.abs(scores - expected["tta128_mean_prob"]).max() < 2e-4
    best = np.sort(expected["tta128_mean_prob"], axis=0)
    certain = best[-1] - best[-2] > 1e-3
    labels = arg_max(scores[None])[0]
    assert np.array_equal(labels[certain], expected["tta128_pred"][certain])
    single = segmenter.with_mode("single").segment(image).labels
    assert np.count_nonzero(single != labels) > 5000  # averaging is not a no-op on these weights
