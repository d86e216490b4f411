"""Segmenting a layer's planes in the background: results, progress, cancellation, errors."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.engines.base import Prediction
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.integrations.napari_job import Cancelled, Job, OpenModel, Progress, Request, segment_planes
from hpddrnet_trt.integrations.napari_layers import LayerPlanes
from tests.integrations.napari_viewer import ToyModel
from tests.toy import ToyEngine, grey_image, manifest, write_toy_onnx

TOY = Request("toy")


def planes_of(data: npt.NDArray[Any], pixel_m: tuple[float, float] | None = None) -> LayerPlanes:
    return LayerPlanes("stack", data, False, data.shape, tuple(np.ndindex(data.shape[:-2])), pixel_m)


class Scripted(ToyEngine):
    """Calls ``then(number)`` before inference ``number``."""

    def __init__(self, then: Any) -> None:
        super().__init__()
        self.then = then

    def infer(self, images: npt.NDArray[Any]) -> Prediction:
        self.then(len(self.shapes))
        return super().infer(images)


def test_every_plane_gets_what_the_segmenter_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    ToyModel(monkeypatch)
    stack = np.stack([grey_image(40, 56, seed) for seed in range(3)])
    progress = Progress()
    results = list(segment_planes(planes_of(stack, (5e-9, 5e-9)), TOY, OpenModel(), progress))
    assert [result.index for result in results] == [(0,), (1,), (2,)]
    for result, picture in zip(results, stack, strict=True):
        np.testing.assert_array_equal(result.segmentation.labels, Segmenter(ToyEngine()).segment(picture).labels)
        assert result.segmentation.pixel_size_m == pytest.approx(5e-9)
    assert progress.fraction == 1.0


def test_the_window_is_the_one_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ToyModel(monkeypatch)
    deep = grey_image(40, 56).astype(np.uint16) * 17
    (result,) = segment_planes(planes_of(deep), Request("toy", window=(0.0, 255.0 * 17)), OpenModel(), Progress())
    assert result.segmentation.window == (0.0, 255.0 * 17)
    np.testing.assert_array_equal(
        result.segmentation.labels, Segmenter(ToyEngine()).segment((deep // 17).astype(np.uint8)).labels
    )


def test_progress_counts_tiles_within_planes(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[str, float | None]] = []

    class Heard(Progress):
        def report(self, text: str, fraction: float | None) -> None:
            super().report(text, fraction)
            heard.append((text, fraction))

    ToyModel(monkeypatch)
    stack = np.stack([grey_image(40, 100, seed) for seed in range(2)])
    list(segment_planes(planes_of(stack), Request("toy", tile=40), OpenModel(), Heard()))
    tiles = [(text, fraction) for text, fraction in heard if "tile" in text]
    count = len(tiles) // 2
    assert count > 1
    assert tiles[0] == (f"plane 1 of 2, tile 1 of {count}", pytest.approx(1 / count / 2))
    assert tiles[-1] == (f"plane 2 of 2, tile {count} of {count}", 1.0)
    fractions = [fraction for _, fraction in heard if fraction is not None]
    assert fractions == sorted(fractions)


def test_cancel_ends_between_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress()
    engine = Scripted(lambda number: progress.cancel() if number == 1 else None)
    ToyModel(monkeypatch, engine)
    with pytest.raises(Cancelled):
        list(segment_planes(planes_of(grey_image(40, 400)), Request("toy", tile=40), OpenModel(), progress))
    assert len(engine.shapes) == 2


def test_cancel_keeps_what_was_taken_and_drops_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    reached, go = threading.Event(), threading.Event()

    def then(number: int) -> None:
        if number == 2:
            reached.set()
            assert go.wait(10)

    ToyModel(monkeypatch, Scripted(then))
    job = Job(planes_of(np.stack([grey_image(16, 24, seed) for seed in range(9)])), TOY, OpenModel())
    job.start()
    assert reached.wait(10)
    assert [result.index for result in job.take()] == [(0,), (1,)]
    job.progress.cancel()
    go.set()
    assert job.wait(10)
    assert job.take() == []
    assert job.end is not None
    assert (job.end.text, job.end.error) == ("cancelled", False)


def test_a_result_says_time_engine_and_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    ToyModel(monkeypatch)
    job = Job(planes_of(grey_image(40, 100)), Request("toy", tile=40), OpenModel())
    job.start()
    assert job.wait(10)
    assert job.end is not None
    assert not job.end.error
    assert job.end.text.startswith("1 picture in 0.")
    (result,) = job.take()
    tiling = result.segmentation.tiling
    assert tiling is not None
    assert tiling.tiles > 1
    said = f"with numpy; {tiling.tiles} tiles, which disagree on {tiling.seam_disagreement:.1%} of their overlaps"
    assert job.end.text.endswith(said)


@pytest.mark.parametrize(
    ("raised", "text", "is_bug"),
    [
        (UserError("the GPU is gone; restart"), "the GPU is gone; restart", False),
        (MemoryError(), "there is not enough memory for this; choose smaller tiles", False),
        (RuntimeError("code 7"), "unexpected RuntimeError: code 7", True),
    ],
)
def test_every_end_is_said(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, text: str, is_bug: bool
) -> None:
    def then(number: int) -> None:
        raise raised

    ToyModel(monkeypatch, Scripted(then))
    job = Job(planes_of(grey_image(16, 24)), TOY, OpenModel())
    job.start()
    assert job.wait(10)
    assert job.end is not None
    assert (job.end.text, job.end.error) == (text, True)
    assert job.end.bug is (raised if is_bug else None)


def test_a_missing_model_file_is_a_sentence(tmp_path: Path) -> None:
    job = Job(planes_of(grey_image(16, 24)), Request(str(tmp_path / "nothing.onnx")), OpenModel())
    job.start()
    assert job.wait(10)
    assert job.end is not None
    assert job.end.error
    assert job.end.bug is None
    assert "nothing.onnx" in job.end.text


def test_the_model_stays_open_until_something_changes(tmp_path: Path) -> None:
    file = write_toy_onnx(tmp_path / "toy.onnx", manifest())
    opened = OpenModel()
    first = opened.segmenter(Request(str(file)))
    assert opened.segmenter(Request(str(file))) is first
    other = opened.segmenter(Request(str(file), window=(0.0, 99.0)))
    assert other is not first
    os.utime(file, ns=(1, 1))
    assert opened.segmenter(Request(str(file), window=(0.0, 99.0))) is not other
    opened.close()
    opened.close()


def test_closing_waits_for_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    reached, go = threading.Event(), threading.Event()

    def then(number: int) -> None:
        reached.set()
        assert go.wait(10)

    engine = Scripted(then)
    ToyModel(monkeypatch, engine)
    opened = OpenModel()
    job = Job(planes_of(grey_image(16, 24)), TOY, opened)
    job.start()
    assert reached.wait(10)
    opened.close()
    assert not engine.closed
    go.set()
    assert job.wait(10)
    assert engine.closed
