"""A live picture: a real stream of the toy model, shown in a viewer without a window."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from hpddrnet_trt.data.micrograph import Micrograph
from hpddrnet_trt.engines.base import Prediction
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.integrations.napari_live import OLD_S, TEXT_COLOURS, LiveLayer
from hpddrnet_trt.stream import Stream
from tests.integrations.napari_viewer import Image, Labels, ViewerModel, application
from tests.toy import ToyEngine, grey_image


@pytest.fixture
def viewer() -> Any:
    return ViewerModel()


@pytest.fixture
def live(viewer: Any) -> Iterator[LiveLayer]:
    with Stream(lambda: Segmenter(ToyEngine())) as stream:
        yield LiveLayer(viewer, stream)


def show(live: LiveLayer, frame: npt.NDArray[Any] | Micrograph) -> None:
    """Submit, and update until it is shown."""
    number = live.submit(frame)
    assert number is not None
    update_until(live, lambda: f"frame {number}," in text(live.viewer))


def update_until(live: LiveLayer, reached: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < until, text(live.viewer)
        live.update()
        time.sleep(0.005)


def overlay(viewer: Any) -> Any:
    return viewer.canvas.overlays.text if hasattr(viewer, "canvas") else viewer.text_overlay


def text(viewer: Any) -> str:
    return str(overlay(viewer).text)


def test_a_frame_and_its_labels_are_shown_together(viewer: Any, live: LiveLayer) -> None:
    frame = grey_image(40, 56)
    kept = frame.copy()
    number = live.submit(Micrograph(frame, pixel_size_m=5e-9))
    frame[:] = 0  # the camera's next picture, in the same buffer
    update_until(live, lambda: f"frame {number}," in text(viewer))
    image, labels = viewer.layers
    assert isinstance(image, Image)
    assert isinstance(labels, Labels)
    np.testing.assert_array_equal(image.data, kept)
    np.testing.assert_array_equal(labels.data, Segmenter(ToyEngine()).segment(kept).labels)
    for layer in (image, labels):
        assert tuple(layer.scale) == (5.0, 5.0)
        assert all(unit.is_compatible_with("m") for unit in layer.units)
    assert tuple(image.contrast_limits) == (0.0, 255.0)
    assert text(viewer).startswith("ready\n")
    assert "1 processed, 0 dropped, 0 failed" in text(viewer)


def test_the_same_layers_take_every_frame(viewer: Any, live: LiveLayer) -> None:
    show(live, Micrograph(grey_image(40, 56), pixel_size_m=5e-9))
    image, labels = viewer.layers
    deep = grey_image(24, 32, seed=3).astype(np.uint16) * 100
    show(live, Micrograph(deep, pixel_size_m=2e-9))
    assert list(viewer.layers) == [image, labels]
    np.testing.assert_array_equal(image.data, deep)
    assert labels.data.shape == (24, 32)
    assert tuple(image.scale) == tuple(labels.scale) == (2.0, 2.0)
    assert image.contrast_limits[1] > 255
    viewer.layers.remove(labels)
    show(live, grey_image(24, 32))
    assert len(viewer.layers) == 2
    assert {str(unit) for layer in viewer.layers for unit in layer.units} == {"pixel"}


def test_nothing_new_changes_nothing(viewer: Any, live: LiveLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    show(live, grey_image(40, 56))
    before = viewer.layers[0].data
    viewer.layers[1].data[:] = 2  # somebody paints
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + OLD_S + 1)
    live.update()
    assert viewer.layers[0].data is before
    assert viewer.layers[1].data.min() == 2
    assert "this picture is 3 s old" in text(viewer)


def test_a_pixel_size_of_one_nanometre_is_not_one_pixel(viewer: Any, live: LiveLayer) -> None:
    show(live, grey_image(40, 56))
    show(live, Micrograph(grey_image(40, 56), pixel_size_m=1e-9))
    assert {str(unit) for layer in viewer.layers for unit in layer.units} == {"nanometer"}
    show(live, grey_image(40, 56))
    assert {str(unit) for layer in viewer.layers for unit in layer.units} == {"pixel"}


def test_what_cannot_even_be_copied_is_counted_and_not_raised(viewer: Any, live: LiveLayer) -> None:
    for number, frame in enumerate((np.broadcast_to(np.uint8(0), (1 << 20, 1 << 20)), [[1, 2], [3]], None), 1):
        assert live.submit(frame) is not None  # type: ignore[arg-type]
        update_until(live, lambda number=number: f"{number} failed" in text(viewer))  # type: ignore[misc]
    assert len(viewer.layers) == 0


def test_a_bad_frame_is_counted_and_said(viewer: Any, live: LiveLayer) -> None:
    show(live, grey_image(40, 56))
    live.submit(np.full((8, 8), np.nan, np.float32))
    update_until(live, lambda: "1 failed" in text(viewer))
    assert "NaN" in text(viewer)
    assert viewer.layers[0].data.shape == (40, 56)


def test_a_stream_that_fails_says_so_in_red(viewer: Any) -> None:
    def refuse() -> Segmenter:
        raise ValueError("no model here")

    with Stream(refuse, max_restarts=0) as stream:
        live = LiveLayer(viewer, stream)
        update_until(live, lambda: text(viewer).startswith("failed: "))
        assert "no model here" in text(viewer)
        red = [int(TEXT_COLOURS[False][place : place + 2], 16) / 255 for place in (1, 3, 5)]
        np.testing.assert_allclose(np.asarray(overlay(viewer).color)[:3], red, atol=1e-6)
        assert live.submit(grey_image(8, 8)) is None


def test_the_timer_updates_until_it_is_stopped(
    viewer: Any, live: LiveLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    qt = application()
    live.start(poll_ms=5)
    live.submit(grey_image(40, 56))
    until = time.monotonic() + 20
    while len(viewer.layers) < 2:
        assert time.monotonic() < until
        qt.processEvents()
    live.stop()
    updates: list[Prediction] = []
    monkeypatch.setattr(live, "update", lambda: updates.append(Prediction(np.zeros((1, 1, 1), np.uint8))))
    stopped = time.monotonic() + 0.05
    while time.monotonic() < stopped:
        qt.processEvents()
    assert updates == []
    live.stop()
