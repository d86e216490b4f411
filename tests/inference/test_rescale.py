"""Pictures of another pixel size than the model was trained at: brought to it, and their labels back."""

from __future__ import annotations

import logging
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from hpddrnet_trt.core.manifest import DataRecord
from hpddrnet_trt.data.micrograph import Micrograph
from hpddrnet_trt.data.preprocess import magnified, nearest
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.inference.result import Segmentation
from tests.toy import ToyEngine, grey_image, manifest, toy_logits

TRAINED = DataRecord(name="steel", pixel_size_m=(10e-9, 10e-9))


def smooth(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.asarray(cv2.resize(grey_image(8, 8, seed), (width, height), interpolation=cv2.INTER_CUBIC))


IMAGE = smooth(60, 44)


def engine(output: str = "labels", **changes: Any) -> ToyEngine:
    return ToyEngine(manifest(output, **{"data": TRAINED, **changes}))


def expected(image: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    labels = toy_logits(magnified(image, height, width)).argmax(axis=0).astype(np.uint8)
    return nearest(labels, *image.shape)


@pytest.mark.parametrize(("size_m", "seen"), [(5e-9, (30, 22)), (20e-9, (120, 88)), (7e-9, (42, 31))])
def test_the_network_sees_the_trained_pixel_size_and_labels_come_back(size_m: float, seen: tuple[int, int]) -> None:
    toy = engine()
    found = Segmenter(toy).segment(Micrograph(IMAGE, pixel_size_m=size_m))
    padded = tuple(-(-edge // 8) * 8 for edge in seen)
    assert toy.shapes == [(1, 1, *padded)]
    assert np.array_equal(found.labels, expected(IMAGE, *seen))
    assert (found.pixel_size_m, found.rescale) == (size_m, pytest.approx(size_m / 10e-9))
    assert found.remarks == ()
    assert found.record()["rescale"] == found.rescale
    # Areas are those of the picture's own pixels.
    areas = found.areas_m2()
    assert areas is not None
    assert sum(areas.values()) == pytest.approx(IMAGE.size * size_m**2)


def test_every_way_through_gives_the_same() -> None:
    sizes = [20e-9, 20e-9, 10e-9, None, 5e-9, 20e-9]
    images = [Micrograph(smooth(40, 48, seed), pixel_size_m=size) for seed, size in enumerate(sizes)]
    for output in ("labels", "logits"):
        alone = [Segmenter(engine(output), confidence=output == "logits").segment(image) for image in images]
        segmenter = Segmenter(engine(output), confidence=output == "logits")
        for together in (segmenter.segment_batch(images), list(segmenter.segment_many(images))):
            for one, other in zip(alone, together, strict=True):
                assert isinstance(other, Segmentation)
                assert np.array_equal(one.labels, other.labels)
                assert one.rescale == other.rescale
                if one.confidence is not None:
                    np.testing.assert_allclose(one.confidence, other.confidence, rtol=1e-5)
        assert [result.rescale for result in alone] == [2.0, 2.0, 1.0, None, pytest.approx(0.5), 2.0]
    scores = Segmenter(engine("logits")).class_scores(images[0])
    assert np.array_equal(scores.argmax(axis=0), Segmenter(engine("logits")).segment(images[0]).labels)


@pytest.mark.parametrize("output", ["labels", "logits"])
@pytest.mark.parametrize("size_m", [5e-9, 20e-9, 7e-9])
def test_tiles_lie_in_the_rescaled_picture(output: str, size_m: float) -> None:
    image = Micrograph(smooth(110, 90), pixel_size_m=size_m)
    tiled = Segmenter(engine(output), tile=32, confidence=output == "logits").segment(image)
    factor = size_m / 10e-9
    seen = [int(edge * factor + 0.5) for edge in image.pixels.shape]
    assert tiled.tiling is not None
    assert np.array_equal(tiled.labels, expected(image.pixels, *seen))
    if tiled.confidence is not None:
        scores = Segmenter(engine(output), tile=32).class_scores(image)
        assert scores.shape == (3, *image.pixels.shape)
        assert tiled.confidence.shape == image.pixels.shape
        assert abs(scores.max(axis=0) - tiled.confidence).mean() < 0.05  # bilinear and nearest
    out = np.empty(image.pixels.shape, np.uint8)
    assert Segmenter(engine(output), tile=32).segment(image, out).labels is out
    assert np.array_equal(out, tiled.labels)


def test_a_picture_that_fits_only_enlarged_runs_in_tiles_by_itself() -> None:
    fixed = ToyEngine(manifest("labels", size=48, data=TRAINED))
    found = Segmenter(fixed).segment(Micrograph(smooth(40, 40), pixel_size_m=20e-9))
    assert found.tiling is not None
    assert set(fixed.shapes) == {(1, 1, 48, 48)}
    assert np.array_equal(found.labels, expected(smooth(40, 40), 80, 80))


@pytest.mark.parametrize(
    ("options", "data"),
    [({"rescale": False}, TRAINED), ({"resize": (44, 60)}, TRAINED), ({}, DataRecord(name="steel")), ({}, None)],
)
def test_it_stays_as_it_is_when_told_so_or_when_the_model_does_not_know(
    options: dict[str, Any], data: DataRecord | None, caplog: pytest.LogCaptureFixture
) -> None:
    plain = Segmenter(ToyEngine()).segment(IMAGE).labels
    segmenter = Segmenter(engine(data=data), **options)
    for size in (20e-9, None):
        found = segmenter.segment(Micrograph(IMAGE, pixel_size_m=size))
        assert np.array_equal(found.labels, plain)
        assert (found.rescale, found.remarks) == (None, ())
    assert not caplog.records
    assert segmenter.with_mode("single").rescale == options.get("rescale", True)


def test_an_unknown_pixel_size_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    segmenter = Segmenter(engine())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            found = segmenter.segment(Micrograph(IMAGE))
            list(segmenter.segment_many([Micrograph(IMAGE)]))
    assert found.rescale is None
    assert len(caplog.records) == 1
    assert "trained at 10 nm a pixel" in caplog.text


def test_what_cannot_be_made_good_is_a_remark_with_both_figures() -> None:
    segmenter = Segmenter(engine())
    far = segmenter.segment(Micrograph(IMAGE, pixel_size_m=30e-9))
    assert "30 nm" in far.remarks[0]
    assert "10 nm" in far.remarks[0]
    assert far.rescale == pytest.approx(3)
    senseless = segmenter.segment(Micrograph(IMAGE, pixel_size_m=1e-15))
    assert "no microscope" in senseless.remarks[0]
    assert senseless.rescale is None


def test_a_model_of_several_pixel_sizes_reads_those_between_as_they_are() -> None:
    segmenter = Segmenter(engine(data=DataRecord(name="steel", pixel_size_m=(10e-9, 20e-9))))
    found = [segmenter.segment(Micrograph(IMAGE, pixel_size_m=size)).rescale for size in (15e-9, 30e-9, 5e-9)]
    assert found == [1.0, pytest.approx(1.5), pytest.approx(0.5)]
