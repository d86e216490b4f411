"""Large images through the segmenter: what a local model gives whole it gives in tiles, and what the report says."""

from __future__ import annotations

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
from hpddrnet_trt.engines.base import Prediction
from hpddrnet_trt.inference import Segmenter, load_segmenter, runner
from hpddrnet_trt.inference.result import Segmentation
from hpddrnet_trt.inference.tiling import TilingReport
from hpddrnet_trt.weights import locate
from tests.threads import in_threads
from tests.toy import ToyEngine, grey_image, manifest, toy_logits, write_toy_onnx


def tiling_of(result: Segmentation) -> TilingReport:
    assert result.tiling is not None
    return result.tiling


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
    report = tiling_of(found)
    assert report.method == {"logits": "blended scores", "labels": "cut labels"}[kind]
    assert report.tile == (min(tile, height), min(tile, width))
    assert report.tiles > 1
    assert 0 <= report.seam_disagreement <= 1  # of as few as two pixels, and the outermost are wrong


@pytest.mark.parametrize(("mode", "views"), [("single", 1), ("flip", 2), ("multiscale", 12)])
def test_tiles_are_averaged_over_views_one_by_one(mode: Any, views: int) -> None:
    image, engine = grey_image(60, 83), ToyEngine()
    whole = Segmenter(ToyEngine(), mode=mode, confidence=True, tile="whole")
    segmenter = Segmenter(engine, mode=mode, confidence=True, tile=48)
    found, expected = segmenter.segment(image), whole.segment(image)
    assert (tiling_of(found).tiles, len(engine.shapes)) == (4, 4 * views)
    assert found.confidence is not None
    assert expected.confidence is not None
    scores = segmenter.class_scores(image)
    assert np.abs(scores.sum(axis=0) - 1).max() < 1e-5
    assert np.array_equal(scores.max(axis=0), found.confidence)
    if mode == "multiscale":  # a reduced view's pixel covers more than the outermost one
        assert (found.labels == expected.labels).mean() > 0.9
    else:
        assert (found.labels == expected.labels).mean() > 0.999  # averaged probabilities can tie
        assert np.abs(found.confidence - expected.confidence).max() < 1e-5
        assert np.abs(scores - whole.class_scores(image)).max() < 1e-5


DATA = DataRecord(name="d", crop=(32, 48))


def axes(height: tuple[int, int], width: tuple[int, int], batch: int = 1) -> InputContract:
    ranges = (AxisRange(minimum=low, maximum=high) for low, high in (height, width, (batch, batch)))
    return InputContract(**dict(zip(("height", "width", "batch"), ranges, strict=True)))


@pytest.mark.parametrize(
    ("description", "size", "options", "expected"),
    [
        (manifest(), (100, 100), {}, [(1, 1, 104, 104)]),  # fits as it is
        (manifest(), (100, 101), {}, [(1, 1, 64, 64)] * 4),
        (manifest(), (30, 400), {}, [(1, 1, 32, 64)] * 8),  # not as high as a tile: as high as the image
        (manifest(data=DATA), (100, 101), {}, [(1, 1, 32, 48)] * 12),  # as it was trained
        (manifest(size=40), (41, 40), {}, [(1, 1, 40, 40)] * 2),  # a size of its own
        (manifest(size=40, data=DATA), (40, 40), {}, [(1, 1, 40, 40)]),
        (manifest(input=axes((24, 24), (72, 72))), (30, 80), {}, [(1, 1, 24, 72)] * 4),
        (manifest(input=axes((8, 30), (56, 640)), data=DATA), (30, 99), {}, [(1, 1, 24, 56)] * 4),  # near the crop
        (manifest(input=axes((8, 999), (8, 999), 2)), (64, 164), {}, [(2, 1, 64, 64)] * 2),  # two at a time
        (manifest("logits", size=56), (60, 30), {"mode": "multiscale"}, [(1, 1, 56, 56)] * 36),  # all views must fit
        (manifest("logits"), (70, 60), {"mode": "multiscale"}, 24),  # the largest view counts
        (manifest("logits"), (60, 60), {"mode": "multiscale"}, 12),
        (manifest("logits"), (200, 200), {"resize": (200, 200)}, [(1, 1, 200, 200)]),
        (manifest("logits"), (200, 300), {"tile": "whole"}, [(1, 1, 200, 304)]),
    ],
)
def test_what_auto_does(
    description: Manifest, size: tuple[int, int], options: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "WHOLE_PIXELS", 100 * 100)
    monkeypatch.setattr(runner, "DEFAULT_TILE", 64)
    engine, image = ToyEngine(description), grey_image(*size)
    found = Segmenter(engine, **options).segment(image)
    assert "mode" in options or np.array_equal(found.labels, toy_logits(image).argmax(axis=0))
    assert (len(engine.shapes) if isinstance(expected, int) else engine.shapes) == expected


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
        Segmenter(ToyEngine(manifest("logits", size=8)), mode="multiscale").segment(grey_image(9, 9))


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
    found, expected = (Segmenter(ToyEngine(), tile=tile).segment(image) for tile in (40, "whole"))  # type: ignore[arg-type]
    assert found.window == expected.window
    assert np.array_equal(found.labels, expected.labels)
    assert set(found.labels.ravel()) == {0, 1, 2}


def test_a_confidence_map_of_the_model_is_cut_like_its_labels(tmp_path: Path) -> None:
    path = write_toy_onnx(tmp_path / "m.onnx", manifest("labels", confidence=True))
    image = grey_image(72, 96)  # this model sees zeros beyond the border: no padding
    with load_segmenter(path, confidence=True, threads=1, tile=32) as segmenter:
        found = segmenter.segment(image)
        whole = Segmenter(segmenter.engine, confidence=True, tile="whole").segment(image)
    assert tiling_of(found).method == "cut labels"  # this file ends in another way than ours
    assert np.array_equal(found.labels, whole.labels)
    assert found.confidence is not None
    assert found.confidence.min() > 1 / 3
    assert found.confidence == pytest.approx(whole.confidence, abs=1e-6)


def test_progress_and_ending_early() -> None:
    image, engine = grey_image(100, 100), ToyEngine()
    segmenter = Segmenter(engine, tile=40)
    seen: list[tuple[int, int]] = []

    def note(done: int, of: int) -> None:
        seen.append((done, of))

    Segmenter(ToyEngine()).segment(image, progress=note)
    assert seen == [(1, 1)]  # a whole image is reported once
    plain = segmenter.segment(image, progress=note)
    tiles = tiling_of(plain).tiles
    assert seen[1:] == [(number, tiles) for number in range(1, tiles + 1)]
    segmenter.class_scores(image, progress=note)
    assert len(seen) == 1 + 2 * tiles

    def stop(done: int, of: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    engine.shapes.clear()
    out = np.empty((100, 100), np.uint8)
    with pytest.raises(KeyboardInterrupt):
        segmenter.segment(image, out, progress=stop)
    assert len(engine.shapes) == 3
    assert segmenter.segment(image, out).labels is out
    assert np.array_equal(out, plain.labels)


@pytest.mark.parametrize("kind", ["logits", "labels"])
def test_an_early_end_closes_what_the_engine_has_in_flight(kind: str) -> None:
    class Pipelined(ToyEngine):
        running, good = 0, 99

        def infer_many(self, batches: Iterable[Any]) -> Iterator[Prediction]:
            self.running += 1
            try:
                for batch in batches:
                    yield self.infer(batch)
            finally:
                self.running -= 1

        def infer(self, images: Any) -> Prediction:
            if len(self.shapes) == self.good:
                raise UserError("the GPU is gone")
            return super().infer(images)

    def stop(done: int, of: int) -> None:
        assert engine.running == 1
        raise RuntimeError("enough")

    engine = Pipelined(manifest(kind))
    try:
        Segmenter(engine, tile=40).segment(grey_image(100, 100), progress=stop)
    except RuntimeError:  # while the traceback holds every frame
        assert engine.running == 0
    engine.good = len(engine.shapes) + 4
    with pytest.raises(UserError, match="the GPU is gone"):
        Segmenter(engine, tile=40).segment(grey_image(100, 100))
    assert engine.running == 0


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


@pytest.fixture(scope="module")
def micrograph(sem_data: Path) -> Any:
    with Image.open(min((sem_data / "nasa-super1" / "images" / "test").iterdir())) as picture:
        return np.asarray(picture.convert("L"))


def test_a_shipped_model_blends_its_scores(micrograph: Any) -> None:
    image = micrograph[:384, :384]
    with load_segmenter("nasa-super1", threads=1, tile=256) as segmenter:
        found = segmenter.segment(image)
        whole = Segmenter(segmenter.engine, tile="whole").segment(image)
        cut = Segmenter(segmenter.engine, tile=256).segment(image)  # without the scores
        scores = segmenter.class_scores(image)
    assert tiling_of(found) == TilingReport((256, 256), 64, 4, "blended scores", tiling_of(found).seam_disagreement)
    assert tiling_of(cut).method == "cut labels"
    assert min((found.labels == other.labels).mean() for other in (whole, cut)) > 0.98
    assert np.array_equal(scores.argmax(axis=0), found.labels)
    assert found.provenance is not None
    assert found.provenance.model_sha256 == sha256_of(locate("nasa-super1"))


def test_a_shipped_model_averages_views_and_tells_its_confidence(micrograph: Any) -> None:
    image = micrograph[:128, :160]
    with load_segmenter("nasa-super1", threads=1) as plain:
        labels = plain.segment(image).labels
        with pytest.raises(ContractError, match="averages class scores"):
            plain.with_mode("flip")
    with load_segmenter("nasa-super1", threads=1, mode="flip", confidence=True) as flipping:
        result, mirrored = flipping.segment(image), flipping.segment(image[:, ::-1])
        assert np.array_equal(flipping.with_mode("single").segment(image).labels, labels)
    assert np.array_equal(mirrored.labels[:, ::-1], result.labels)
    assert result.confidence is not None
    assert mirrored.confidence is not None
    np.testing.assert_allclose(mirrored.confidence[:, ::-1], result.confidence, atol=1e-5)
    assert 1 / 3 <= result.confidence.min() < 0.7 < result.confidence.mean() <= 1
    assert 0.97 < (result.labels == labels).mean() < 1


def test_threads_share_the_scores_of_a_shipped_model() -> None:
    found: list[Segmentation] = []
    with load_segmenter("nasa-super1", threads=1, tile=64) as segmenter:
        image = grey_image(64, 100)
        assert in_threads(*[lambda: found.append(segmenter.segment(image))] * 4, timeout_s=60) == []
    assert len(found) == 4
    assert all(np.array_equal(each.labels, found[0].labels) for each in found)
    assert {tiling_of(each).method for each in found} == {"blended scores"}
