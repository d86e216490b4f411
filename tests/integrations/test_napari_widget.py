"""The dock widget, on Qt's offscreen platform: no display, no canvas."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpddrnet_trt.integrations.napari_results import find_layer
from hpddrnet_trt.integrations.napari_widget import SegmentPanel, segment_widget
from tests.integrations.napari_viewer import ToyModel, ViewerModel, application
from tests.integrations.test_napari_job import Scripted
from tests.toy import CLASSES, grey_image, manifest, write_toy_onnx

NM = {"scale": (5.0, 5.0), "units": ("nm", "nm")}


@pytest.fixture
def viewer() -> Any:
    application()
    return ViewerModel()


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ToyModel:
    return ToyModel(monkeypatch)


@pytest.fixture
def panel(viewer: Any, toy: ToyModel) -> Iterator[SegmentPanel]:
    panel = segment_widget(viewer).panel
    yield panel
    panel.close()
    finish(panel)


def process_until(reached: Callable[[], bool]) -> None:
    from qtpy.QtWidgets import QApplication

    until = time.monotonic() + 20
    while not reached():
        assert time.monotonic() < until, "the widget did not get there in time"
        QApplication.processEvents()
        time.sleep(0.005)


def finish(panel: SegmentPanel) -> None:
    process_until(lambda: not panel.running)


def table(panel: SegmentPanel) -> list[list[str]]:
    return [
        [panel.table.item(row, column).text() for column in range(panel.table.columnCount())]
        for row in range(panel.table.rowCount())
    ]


def test_run_segments_the_chosen_layer(viewer: Any, panel: SegmentPanel, toy: ToyModel) -> None:
    go = threading.Event()
    toy.engine = Scripted(lambda number: go.wait(10))
    source = viewer.add_image(grey_image(40, 50), name="sample", **NM)
    other = viewer.add_image(np.zeros((9, 9), np.uint8), name="other")
    panel.choose_layer(source)
    panel.run_button.click()
    assert panel.running
    assert not panel.run_button.isEnabled()
    assert not panel.controls.isEnabled()
    assert panel.cancel_button.isEnabled()
    viewer.layers.selection.active = other
    go.set()
    finish(panel)
    labels = find_layer(viewer, source, "labels")
    assert labels is not None
    assert labels.metadata["hpddrnet_trt"]["source_layer"] == "sample"
    assert panel.message.text().startswith("1 picture in ")
    counts = np.bincount(labels.data.ravel(), minlength=3)
    assert table(panel) == [
        [info.name, f"{count / 2000:.2%}", f"{count * 25e-6:.4g}"] for info, count in zip(CLASSES, counts, strict=True)
    ]
    assert panel.run_button.isEnabled()
    assert panel.controls.isEnabled()
    assert not panel.cancel_button.isEnabled()
    panel.choose_layer(other)
    assert table(panel) == []
    panel.choose_layer(source)
    assert len(table(panel)) == 3


def test_controls_become_the_request(viewer: Any, panel: SegmentPanel) -> None:
    viewer.add_image(grey_image(40, 50).astype(np.uint16) * 100, contrast_limits=(300, 20000))
    assert panel.request().window is None
    panel.window.setCurrentText("layer's contrast limits")
    panel.mode.setCurrentText("with mirror image")
    panel.tile.setCurrentText("1024 pixels")
    panel.confidence.setChecked(True)
    panel.choose_model("/models/mine.onnx")
    panel.choose_engine("tensorrt")
    request = panel.request()
    assert (request.window, request.mode, request.tile, request.confidence) == ((300.0, 20000.0), "flip", 1024, True)
    assert (request.model, request.engine) == ("/models/mine.onnx", "tensorrt")
    assert panel.model.currentText() == "mine.onnx"
    panel.choose_model("nasa-super1")
    assert panel.request().model == "nasa-super1"


def test_the_list_of_layers_follows_the_viewer(viewer: Any, panel: SegmentPanel) -> None:
    def listed() -> list[str]:
        return [panel.layers.itemText(place) for place in range(panel.layers.count())]

    assert listed() == []
    assert not panel.run_button.isEnabled()
    assert panel.facts.text() == "no image layer: open a micrograph"
    first = viewer.add_image(grey_image(16, 24), name="first", **NM)
    viewer.add_labels(np.zeros((16, 24), np.uint8))
    second = viewer.add_image(np.zeros((3, 16, 24), np.float32), name="second", scale=(1, 2, 3), units=("um",) * 3)
    assert listed() == ["first", "second"]
    assert panel.layer is first
    assert panel.facts.text() == "16 × 24, uint8, pixel 5 nm"
    first.name = "renamed"
    assert listed() == ["renamed", "second"]
    viewer.layers.remove(first)
    assert panel.layer is second
    assert panel.facts.text() == "3 × 16 × 24, float32, pixel 2 µm × 3 µm"
    viewer.layers.remove(second)
    assert panel.layer is None


def test_planes_can_be_chosen_for_stacks_only(viewer: Any, panel: SegmentPanel) -> None:
    picture = viewer.add_image(grey_image(16, 24))
    stack = viewer.add_image(np.stack([grey_image(16, 24, seed) for seed in range(4)]))
    assert panel.layer is picture
    assert panel.planes.isHidden()
    panel.choose_layer(stack)
    assert not panel.planes.isHidden()
    viewer.dims.set_point(0, 2)
    panel.run()
    finish(panel)
    labels = find_layer(viewer, stack, "labels")
    assert labels is not None
    assert [int(plane.max()) for plane in labels.data] == [255, 255, 2, 255]
    panel.planes.setCurrentText("all")
    panel.run()
    finish(panel)
    assert panel.message.text().startswith("4 planes in ")
    assert [int(plane.max()) for plane in labels.data] == [2, 2, 2, 2]


def test_a_tick_shows_a_class(viewer: Any, panel: SegmentPanel) -> None:
    from qtpy.QtCore import Qt

    source = viewer.add_image(grey_image(40, 50))
    panel.run()
    finish(panel)
    labels = find_layer(viewer, source, "labels")
    assert labels is not None
    panel.table.item(0, 0).setCheckState(Qt.CheckState.Checked)
    panel.table.item(1, 0).setCheckState(Qt.CheckState.Unchecked)
    assert [labels.colormap.color_dict[index][3] for index in range(3)] == [1, 0, 1]
    panel.run()
    finish(panel)
    checked = [panel.table.item(row, 0).checkState() == Qt.CheckState.Checked for row in range(3)]
    assert checked == [True, False, True]


def test_errors_are_one_sentence_in_the_widget(viewer: Any, panel: SegmentPanel, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from napari.utils.notifications import notification_manager

    monkeypatch.undo()  # the real load_segmenter
    panel.run()
    assert panel.message.text() == "open a micrograph first: there is no image layer"
    viewer.add_image(grey_image(40, 50))
    panel.choose_model(str(tmp_path / "missing.onnx"))
    seen = len(notification_manager.records)
    panel.run()
    finish(panel)
    assert "missing.onnx" in panel.message.text()
    assert "color" in panel.message.styleSheet()
    assert len(notification_manager.records) == seen
    panel.choose_model(str(write_toy_onnx(tmp_path / "labels.onnx", manifest("labels"))))
    panel.confidence.setChecked(True)
    panel.run()
    finish(panel)
    assert panel.message.text().startswith("model 'toy' gives no confidence; export it")
    panel.confidence.setChecked(False)
    panel.run()
    finish(panel)
    assert panel.message.styleSheet() == ""
    assert len(viewer.layers) == 2


def test_a_bug_is_said_and_shown_with_its_traceback(
    viewer: Any, panel: SegmentPanel, toy: ToyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from napari.utils.notifications import notification_manager

    reported: list[BaseException] = []
    monkeypatch.setattr(notification_manager, "receive_error", lambda kind, value, trace: reported.append(value))

    def then(number: int) -> None:
        raise RuntimeError("code 7")

    toy.engine = Scripted(then)
    viewer.add_image(grey_image(40, 50))
    panel.run()
    finish(panel)
    assert panel.message.text() == "unexpected RuntimeError: code 7"
    assert [str(error) for error in reported] == ["code 7"]
    assert panel.run_button.isEnabled()


def test_cancel_stops_and_keeps_what_is_done(viewer: Any, panel: SegmentPanel, toy: ToyModel) -> None:
    reached, go = threading.Event(), threading.Event()

    def then(number: int) -> None:
        if number == 2:
            reached.set()
            assert go.wait(10)

    toy.engine = Scripted(then)
    stack = viewer.add_image(np.stack([grey_image(16, 24, seed) for seed in range(9)]))
    panel.planes.setCurrentText("all")
    panel.run()
    process_until(reached.is_set)
    process_until(lambda: panel.message.text() == "plane 3 of 9")
    assert (panel.bar.maximum(), panel.bar.value()) == (1000, 222)
    panel.cancel_button.click()
    assert panel.message.text() == "stopping after this inference"
    go.set()
    finish(panel)
    assert panel.message.text() == "cancelled; 2 of 9 done"
    labels = find_layer(viewer, stack, "labels")
    assert labels is not None
    assert [int(plane.max()) for plane in labels.data] == [2, 2, *[255] * 7]


def test_the_result_of_a_removed_layer_is_dropped(viewer: Any, panel: SegmentPanel, toy: ToyModel) -> None:
    go = threading.Event()
    toy.engine = Scripted(lambda number: go.wait(10))
    source = viewer.add_image(grey_image(16, 24), name="frame")
    panel.run()
    viewer.layers.remove(source)
    go.set()
    finish(panel)
    assert panel.message.text() == "layer 'frame' was removed while it was segmented; its result is dropped"
    assert not viewer.layers


def test_a_widget_whose_dock_is_removed_lets_go(viewer: Any, toy: ToyModel) -> None:
    """napari takes the widget out of the dock and deletes only that."""
    from qtpy.QtWidgets import QVBoxLayout, QWidget

    source = viewer.add_image(grey_image(16, 24))
    signals = [*(getattr(viewer.layers.events, name) for name in ("inserted", "removed", "reordered")),
               source.events.name]  # fmt: skip
    before = [len(signal.callbacks) for signal in signals]
    panel = segment_widget(viewer).panel
    dock = QWidget()
    QVBoxLayout(dock).addWidget(panel.widget)
    panel.run()
    finish(panel)
    assert find_layer(viewer, source, "labels") is not None
    assert not toy.engine.closed  # kept for the next run
    panel.widget.setParent(None)
    assert toy.engine.closed
    assert [len(signal.callbacks) for signal in signals] == before


def test_a_deleted_widget_lets_go(viewer: Any, toy: ToyModel) -> None:
    reached, go = threading.Event(), threading.Event()

    def then(number: int) -> None:
        reached.set()
        assert go.wait(10)

    toy.engine = Scripted(then)
    viewer.add_image(grey_image(16, 24))
    widget = segment_widget(viewer)
    panel = widget.panel
    panel.run()
    job = panel._job
    assert job is not None
    assert reached.wait(10)
    from qtpy.QtCore import QCoreApplication, QEvent

    widget.deleteLater()
    QCoreApplication.sendPostedEvents(None, QEvent.Type.DeferredDelete)
    go.set()
    assert job.wait(10)
    assert job.end is not None
    assert job.end.text == "cancelled"
    assert toy.engine.closed
    # What a viewer tells its widgets, to one that no longer exists.
    viewer.add_image(grey_image(16, 24))
    viewer.layers[0].name = "renamed"
    viewer.layers.clear()
