"""Large images through the segmenter: what a local model gives whole it gives in tiles, and what the report says."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hpddrnet_trt.core.errors import ContractError, UsageError, UserError
from hpddrnet_trt.core.files import sha256_of
from hpddrnet_trt.core.manifest import AxisRange, DataRecord, InputContract, Manifest
from hpddrnet_trt.data.micrograph import read_micrograph
from hpddrnet_trt.engines.base import Prediction
from hpddrnet_trt.inference import Segmenter, load_segmenter, runner
from hpddrnet_trt.inference.tiling import TilingReport
from hpddrnet_trt.weights import locate
from tests.toy import ToyEngine, grey_image, manifest, toy_logits, write_toy_onnx


@settings(deadline=None)  # machines can be busy
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    tile=st.sampled_from([8, 16, 24, 40]),
    kind=st.sampled_from(["logits", "labels"]),
    seed=st.integers(0, 3),
)
def test_a_local_model_gives_exactly_the_whole_image(height: int, width: int, tile: int, kind: str, seed: int) -> None:
    # The toy model sees one pixel to each side, and continues a tile by reflection: its outermost pixels are wrong.
    image = grey_image(height, width, seed)
    found = Segmenter(ToyEngine(manifest(kind)), tile=tile).segment(image)
    assert np.array_equal(found.labels, toy_logits(image).argmax(axis=0))
    if max(height, width) <= tile:
        assert found.tiling is None
        return
    assert found.tiling is not None
    assert found.tiling.method == {"logits": "blended scores", "labels": "cut labels"}[kind]
    assert found.tiling.tile == (min(tile, height), min(tile, width))
    assert found.tiling.tiles > 1
    assert 0 <= found.tiling.seam_disagreement <= 1  # of as few as two pixels, and the outermost are wrong


@pytest.mark.parametrize("mode", ["single", "flip", "multiscale"])
def test_tiles_are_averaged_over_views_one_by_one(mode: Any) -> None:
    image, engine = grey_image(60, 83), ToyEngine()
    whole = Segmenter(ToyEngine(), mode=mode, confidence=True, tile="whole")
    segmenter = Segmenter(engine, mode=mode, confidence=True, tile=48)
    found, expected = segmenter.segment(image), whole.segment(image)
    assert found.tiling is not None
    assert found.tiling.tiles == 4
    views = {"single": 1, "flip": 2, "multiscale": 12}[mode]
    assert len(engine.shapes) == 4 * views
    assert found.confidence is not None
    assert expected.confidence is not None
    scores = segmenter.class_scores(image)
    assert scores.shape == (3, 60, 83)
    assert np.abs(scores.sum(axis=0) - 1).max() < 1e-5
    assert np.array_equal(scores.max(axis=0), found.confidence)
    if mode != "multiscale":  # a reduced view's pixel covers more than the outermost one
        assert np.abs(found.confidence - expected.confidence).max() < 1e-5
        assert (found.labels == expected.labels).mean() > 0.999  # averaged probabilities can tie
        assert np.abs(scores - whole.class_scores(image)).max() < 1e-5
    else:
        assert (found.labels == expected.labels).mean() > 0.9


def test_what_auto_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "WHOLE_PIXELS", 100 * 100)
    monkeypatch.setattr(runner, "DEFAULT_TILE", 64)

    def tiles(description: Manifest, height: int, width: int, **options: Any) -> list[tuple[int, ...]]:
        engine = ToyEngine(description)
        image = grey_image(height, width)
        found = Segmenter(engine, **options).segment(image)
        if options.get("mode") != "multiscale":
            assert np.array_equal(found.labels, toy_logits(image).argmax(axis=0))
        views = 12 if options.get("mode") == "multiscale" else 1
        assert sum(shape[0] for shape in engine.shapes) == views * (found.tiling.tiles if found.tiling else 1)
        return engine.shapes

    free, data = manifest("labels"), DataRecord(name="d", crop=(32, 48))
    assert tiles(free, 100, 100) == [(1, 1, 104, 104)]  # fits as it is
    assert tiles(free, 100, 101) == [(1, 1, 64, 64)] * 4
    assert tiles(free, 30, 400) == [(1, 1, 32, 64)] * 8  # not as high as a tile: as high as the image
    assert tiles(manifest("labels", data=data), 100, 101) == [(1, 1, 32, 48)] * 12  # as it was trained
    # A size of its own.
    assert tiles(manifest("labels", size=40), 41, 40) == [(1, 1, 40, 40)] * 2
    assert tiles(manifest("labels", size=40, data=data), 40, 40) == [(1, 1, 40, 40)]
    oblong = InputContract(height=AxisRange(minimum=24, maximum=24), width=AxisRange(minimum=72, maximum=72))
    assert tiles(manifest("labels", input=oblong), 30, 80) == [(1, 1, 24, 72)] * 4
    # A range around the training crop.
    small = InputContract(height=AxisRange(minimum=8, maximum=30), width=AxisRange(minimum=56, maximum=640))
    assert tiles(manifest("labels", input=small, data=data), 30, 99) == [(1, 1, 24, 56)] * 4
    # Two at a time.
    pair = InputContract(batch=AxisRange(minimum=2, maximum=2))
    assert tiles(manifest("labels", input=pair), 64, 164) == [(2, 1, 64, 64)] * 2
    # All views must fit: those of 1.75 times the tile.
    shapes = tiles(manifest("logits", size=56), 60, 30, mode="multiscale")
    assert shapes == [(1, 1, 56, 56)] * 12 * 3
    # The largest view counts, and one tile is the whole image.
    assert len(tiles(manifest("logits"), 70, 60, mode="multiscale")) == 12 * 2
    assert len(tiles(manifest("logits"), 60, 60, mode="multiscale")) == 12
    # Brought to another size, or when it shall be whole, it is not tiled.
    assert tiles(manifest("logits"), 200, 200, resize=(200, 200)) == [(1, 1, 200, 200)]
    assert tiles(manifest("logits"), 200, 300, tile="whole") == [(1, 1, 200, 304)]


@pytest.mark.parametrize(
    ("tile", "options", "words"),
    [
        (20, {}, "a multiple of 8; got 20"),
        (0, {}, "got 0"),
        (-8, {}, "got -8"),
        (True, {}, "got True"),
        ("big", {}, "got 'big'"),
        (32, {"resize": (64, 64)}, "use it with tile='auto' or 'whole'"),
    ],
)
def test_unusable_tiles(tile: Any, options: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Segmenter(ToyEngine(), tile=tile, **options)


def test_tiles_that_the_model_does_not_take() -> None:
    with pytest.raises(ContractError, match="a tile of 32 pixels does not fit this model's height, 48; use"):
        Segmenter(ToyEngine(manifest(size=48)), tile=32)
    with pytest.raises(ContractError, match="needs several sizes of each tile, and this model takes 8 only"):
        runner.tile_size(manifest(), "multiscale", InputContract(height=AxisRange(minimum=8, maximum=8)))


def test_batches_of_small_and_large_images() -> None:
    engine = ToyEngine(manifest("labels"))
    images = [grey_image(*size, seed) for seed, size in enumerate([(32, 32), (70, 40), (32, 32), (70, 40), (8, 8)])]
    found = Segmenter(engine, tile=32).segment_batch(images)
    assert sorted(set(engine.shapes)) == [(1, 1, 8, 8), (1, 1, 32, 32), (2, 1, 32, 32)]
    for image, result in zip(images, found, strict=True):
        assert np.array_equal(result.labels, toy_logits(image).argmax(axis=0))
        assert (result.tiling is None) == (max(image.shape) <= 32)


def test_one_grey_window_for_the_whole_image() -> None:
    # Bright to the left, dark to the right: a window for each tile would make both alike.
    image = np.linspace(0, 60000, 200, dtype=np.uint16)[None].repeat(40, axis=0)
    found = Segmenter(ToyEngine(), tile=40).segment(image)
    expected = Segmenter(ToyEngine(), tile="whole").segment(image)
    assert found.window == expected.window
    assert np.array_equal(found.labels, expected.labels)
    assert set(found.labels.ravel()) == {0, 1, 2}


def test_a_confidence_map_of_the_model_is_cut_like_its_labels(tmp_path: Path) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest("labels", confidence=True))
    image = grey_image(72, 96)  # this model sees zeros beyond the border: no padding
    with load_segmenter(path, confidence=True, threads=1, tile=32) as segmenter:
        found = segmenter.segment(image)
        whole = Segmenter(segmenter.engine, confidence=True, tile="whole").segment(image)
    assert found.tiling is not None
    assert found.tiling.method == "cut labels"  # this file ends in another way than ours
    assert np.array_equal(found.labels, whole.labels)
    assert found.confidence is not None
    assert whole.confidence is not None
    assert np.abs(found.confidence - whole.confidence).max() < 1e-6
    assert found.confidence.min() > 1 / 3


def test_progress_and_ending_early() -> None:
    image, engine = grey_image(100, 100), ToyEngine()
    segmenter = Segmenter(engine, tile=40)
    seen: list[tuple[int, int]] = []
    Segmenter(ToyEngine()).segment(image, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(1, 1)]  # a whole image is reported once
    seen.clear()
    plain = segmenter.segment(image, progress=lambda done, of: seen.append((done, of)))
    assert plain.tiling is not None
    assert seen == [(number, plain.tiling.tiles) for number in range(1, plain.tiling.tiles + 1)]
    seen.clear()
    segmenter.class_scores(image, progress=lambda done, of: seen.append((done, of)))
    assert len(seen) == plain.tiling.tiles

    def stop(done: int, of: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    engine.shapes.clear()
    out = np.empty((100, 100), np.uint8)
    with pytest.raises(KeyboardInterrupt):
        segmenter.segment(image, out, progress=stop)
    assert len(engine.shapes) == 3
    again = segmenter.segment(image, out)
    assert again.labels is out
    assert np.array_equal(out, plain.labels)


def test_an_early_end_closes_what_the_engine_has_in_flight() -> None:
    class Pipelined(ToyEngine):
        running = 0

        def infer_many(self, batches: Iterable[Any]) -> Iterator[Prediction]:
            self.running += 1
            try:
                for batch in batches:
                    yield self.infer(batch)
            finally:
                self.running -= 1

    class Failing(Pipelined):
        def infer(self, images: Any) -> Prediction:
            if len(self.shapes) == 4:
                raise UserError("the GPU is gone")
            return super().infer(images)

    def stop(done: int, of: int) -> None:
        assert engine.running == 1
        raise RuntimeError("enough")

    for kind in ("logits", "labels"):
        engine = Pipelined(manifest(kind))
        try:
            Segmenter(engine, tile=40).segment(grey_image(100, 100), progress=stop)
        except RuntimeError:  # while the traceback holds every frame
            assert engine.running == 0
        failing = Failing(manifest(kind))
        with pytest.raises(UserError, match="the GPU is gone"):
            Segmenter(failing, tile=40).segment(grey_image(100, 100))
        assert failing.running == 0


@pytest.mark.parametrize("options", [{"tile": 40}, {"mode": "flip", "tile": "whole"}], ids=["tiles", "transforms"])
def test_overflowed_scores_are_reported(options: Any) -> None:
    class Overflowing(ToyEngine):
        def infer(self, images: Any) -> Prediction:
            prediction = super().infer(images)
            assert prediction.logits is not None
            if len(self.shapes) == 2:
                prediction.logits[0, 1, 20, 20] = np.nan
            return prediction

    with pytest.raises(UserError, match="scores that are not numbers"):
        Segmenter(Overflowing(), **options).segment(grey_image(100, 100))


@pytest.mark.parametrize("kind", ["logits", "labels"])
def test_memory_does_not_grow_with_the_height(kind: str) -> None:
    def peak(height: int) -> int:
        image, out = np.tile(grey_image(256, 512), (height // 256, 1)), np.empty((height, 512), np.uint8)
        segmenter = Segmenter(ToyEngine(manifest(kind)), tile=128)
        tracemalloc.start()
        try:
            segmenter.segment(image, out)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(512)  # what is made once
    small, large = peak(512), peak(8192)
    assert large < small * 1.2 + 65536


def test_a_shipped_model_blends_its_scores(sem_data: Path) -> None:
    with Image.open(min((sem_data / "nasa-super1" / "images" / "test").iterdir())) as picture:
        image = np.asarray(picture.convert("L"))[:384, :384]
    with load_segmenter("nasa-super1", threads=1, tile=256) as segmenter:
        found = segmenter.segment(image)
        whole = Segmenter(segmenter.engine, tile="whole").segment(image)
        cut = Segmenter(segmenter.engine, tile=256).segment(image)  # without the scores
        scores = segmenter.class_scores(image)
    assert found.tiling == TilingReport((256, 256), 64, 4, "blended scores", found.tiling.seam_disagreement)  # type: ignore[union-attr]
    assert cut.tiling is not None
    assert cut.tiling.method == "cut labels"
    assert (found.labels == whole.labels).mean() > 0.98
    assert (found.labels == cut.labels).mean() > 0.98
    assert np.array_equal(scores.argmax(axis=0), found.labels)
    assert found.provenance is not None
    assert found.provenance.model_sha256 == sha256_of(locate("nasa-super1"))


def test_a_shipped_model_averages_views_and_tells_its_confidence(sem_data: Path) -> None:
    image = read_micrograph(sem_data / "nasa-super1" / "images" / "test" / "spot1_0d_1.png").pixels[:128, :160]
    with load_segmenter("nasa-super1", threads=1) as plain:
        labels = plain.segment(image).labels
        with pytest.raises(ContractError, match="averages class scores"):
            plain.with_mode("flip")
    with load_segmenter("nasa-super1", threads=1, mode="flip", confidence=True) as flipping:
        result = flipping.segment(image)
        mirrored = flipping.segment(image[:, ::-1])
        single = flipping.with_mode("single").segment(image)
    assert np.array_equal(single.labels, labels)
    assert result.confidence is not None
    assert mirrored.confidence is not None
    assert np.array_equal(mirrored.labels[:, ::-1], result.labels)
    np.testing.assert_allclose(mirrored.confidence[:, ::-1], result.confidence, atol=1e-5)
    assert 1 / 3 <= result.confidence.min() < 0.7 < result.confidence.mean() <= 1
    assert 0.97 < (result.labels == labels).mean() < 1
    assert result.provenance is not None
    assert single.provenance is not None
    assert result.provenance.model_sha256 == single.provenance.model_sha256


def test_threads_share_the_scores_of_a_shipped_model() -> None:
    with load_segmenter("nasa-super1", threads=1, tile=64) as segmenter:
        image = grey_image(64, 100)
        found: list[Any] = []
        threads = [threading.Thread(target=lambda: found.append(segmenter.segment(image))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4
    assert all(np.array_equal(each.labels, found[0].labels) for each in found)
    assert {each.tiling.method for each in found} == {"blended scores"}

