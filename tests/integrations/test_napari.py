"""What napari finds: the manifest, the reader, and the widget in a real window."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
import threading
import tomllib
import warnings
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from hpddrnet_trt.core.errors import BadInputFile, UserError
from hpddrnet_trt.integrations.napari import (
    WARNING_STYLE,
    SegmentPanel,
    _command,
    napari_get_reader,
    read_layer,
    segment_widget,
)
from hpddrnet_trt.integrations.napari_layers import find_layer
from tests.integrations.live import wait_until
from tests.integrations.napari_viewer import Image, Scripted, ToyModel, ViewerModel, application
from tests.toy import ToyEngine, grey_image, manifest, write_toy_onnx
from tests.virtual_display import virtual_display

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # as in napari_viewer
    from npe2 import PluginManager, PluginManifest

REPOSITORY = Path(__file__).resolve().parents[2]
YAML = Path(str(files("hpddrnet_trt.integrations") / "napari.yaml"))

# A person's way: the plugin's menu entry, Run, and the window closed while a second run is under way.
CHILD = """
import sys, time
import napari
from npe2 import PluginManager, PluginManifest
from qtpy.QtWidgets import QApplication
from hpddrnet_trt.integrations.napari import segment_widget
from tests.toy import grey_image

PluginManager.instance().register(PluginManifest.from_file(sys.argv[1]))
viewer = napari.Viewer()
viewer.add_image(grey_image(64, 96), scale=(5, 5), units=("nm", "nm"))
dock, widget = viewer.window.add_plugin_dock_widget("hpddrnet-trt", "Segment micrograph")
panel = widget.panel
assert panel.viewer is viewer or panel.viewer.__wrapped__ is viewer, panel.viewer
panel.choose_model(sys.argv[2])
panel.run_button.native.click()
until = time.monotonic() + 60
while panel.running:
    assert time.monotonic() < until
    QApplication.processEvents()
    time.sleep(0.01)
print(panel.message.value)
print(len(viewer.layers))
viewer.window.remove_dock_widget(widget.native)
second = segment_widget()
viewer.window.add_dock_widget(second)
second.panel.choose_model(sys.argv[2])
second.panel.run()
worker = second.panel._worker
viewer.close()
QApplication.processEvents()
until = time.monotonic() + 60
while worker.is_running:
    assert time.monotonic() < until
    time.sleep(0.01)
print("ended")
"""


def test_the_manifest_is_valid_and_names_what_exists() -> None:
    described = PluginManifest.from_file(YAML)
    assert described.name == "hpddrnet-trt"
    for command in described.contributions.commands or []:
        assert command.python_name is not None
        assert callable(pkgutil.resolve_name(command.python_name))
    (reader,) = described.contributions.readers or []
    assert set(reader.filename_patterns) == {"*.tif", "*.tiff", "*.dm3", "*.dm4"}

    # In the project's own file: an installation made before it was written does not know it yet.
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"]["napari.manifest"][project["name"]].partition(":")
    assert Path(str(files(module) / name)) == YAML


def test_a_vendors_file_opens_with_its_pixel_size(sem_data: Path) -> None:
    expected = json.loads((sem_data / "vendor-tiff/expected.json").read_text(encoding="utf-8"))["files"][0]
    path = sem_data / "vendor-tiff" / expected["file"]
    manager = PluginManager()
    manager.register(PluginManifest.from_file(YAML))
    manager.activate("hpddrnet-trt")
    (contribution,) = manager.iter_compatible_readers([str(path)])
    reader = contribution.exec(kwargs={"path": [str(path)], "stack": False, "_registry": manager.commands})
    assert reader is not None
    ((pixels, arguments, kind),) = reader([str(path)], stack=False)
    layer = Image(pixels, **arguments)
    assert kind == "image"
    assert [str(unit) for unit in layer.units] == ["nanometer"] * 2
    np.testing.assert_allclose(layer.scale, expected["pixel_size_nm"], rtol=1e-4)
    rows = expected["image_rows"]
    assert layer.data.shape == (rows[1] - rows[0], expected["width"])
    assert layer.metadata["micrograph"]["vendor"] is not None


def test_what_the_reader_takes(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros((3, 16, 24), np.uint8), photometric="minisblack")
    tifffile.imwrite(tmp_path / "colour.tif", np.zeros((16, 24, 3), np.uint8), photometric="rgb")
    (tmp_path / "broken.tif").write_bytes(b"II*\0 not really")
    assert napari_get_reader(str(tmp_path / "stack.tif")) is None
    assert napari_get_reader(str(tmp_path / "broken.tif")) is None
    assert napari_get_reader([str(tmp_path / "colour.tif")] * 2) is None
    assert napari_get_reader(str(tmp_path / "colour.tif")) is read_layer
    assert napari_get_reader("series.dm4") is read_layer
    ((pixels, arguments, _),) = read_layer(str(tmp_path / "colour.tif"))
    layer = Image(pixels, **arguments)  # without a pixel size it stays in pixels
    assert (layer.name, {str(unit) for unit in layer.units}, tuple(layer.scale)) == ("colour", {"pixel"}, (1.0, 1.0))
    with pytest.raises(BadInputFile):
        read_layer(str(tmp_path / "missing.dm4"))


def test_the_widget_in_a_window(tmp_path: Path) -> None:
    application()  # skips without a Qt that works
    model = write_toy_onnx(tmp_path / "toy.onnx", manifest())
    with virtual_display(tmp_path) as environment:
        child = subprocess.run(
            [sys.executable, "-c", CHILD, str(YAML), str(model)], cwd=REPOSITORY, env=environment,
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
    assert child.returncode == 0, child.stderr
    first, layers, second = child.stdout.splitlines()[-3:]
    assert first.startswith("1 picture in ")
    assert layers == "2"
    assert second == "ended"


# The widget, on Qt's offscreen platform: no display, no canvas

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
    widget = segment_widget(viewer)
    widget.show()
    yield widget.panel
    widget.panel.cancel()
    finish(widget.panel)
    widget.panel.close()
    widget.native.deleteLater()


def process_until(reached: Callable[[], bool]) -> None:
    from qtpy.QtWidgets import QApplication

    def there() -> bool:
        QApplication.processEvents()
        return reached()

    wait_until(there, 20)


def finish(panel: SegmentPanel) -> None:
    process_until(lambda: not panel.running)


def test_run_segments_the_chosen_layer(viewer: Any, panel: SegmentPanel, toy: ToyModel) -> None:
    go = threading.Event()
    toy.engine = Scripted(lambda number: go.wait(10))
    source = viewer.add_image(grey_image(40, 50), name="sample", **NM)
    other = viewer.add_image(np.zeros((9, 9), np.uint8), name="other")
    panel.layers.value = source
    panel.run_button.native.click()
    assert panel.running  # and this thread goes on
    assert not panel.run_button.enabled
    assert not panel.mode.enabled
    assert panel.cancel_button.enabled
    viewer.layers.selection.active = other
    go.set()
    finish(panel)
    labels = find_layer(viewer, source, "labels")
    assert labels is not None
    assert labels.metadata["hpddrnet_trt"]["source_layer"] == "sample"
    assert panel.message.value.startswith("1 picture in ")
    assert panel.message.value.endswith("with numpy")
    assert panel.run_button.enabled
    assert panel.mode.enabled
    assert not panel.cancel_button.enabled


def test_controls_become_the_options(viewer: Any, panel: SegmentPanel, tmp_path: Path) -> None:
    viewer.add_image(grey_image(40, 50).astype(np.uint16) * 100, contrast_limits=(300, 20000))
    assert panel.options()["window"] is None
    panel.layer_range.value = panel.confidence.value = True
    panel.mode.value, panel.tile.value = "flip", 1024
    panel.choose_model(str(tmp_path / "mine.onnx"))
    panel.choose_engine("tensorrt")
    assert panel.options() == {
        "model_path": str(tmp_path / "mine.onnx"), "engine": "tensorrt", "mode": "flip", "tile": 1024,
        "confidence": True, "window": (300.0, 20000.0),
    }  # fmt: skip
    panel.choose_model("nasa-super1")
    assert panel.options()["model_path"] == "nasa-super1"


def test_the_list_of_layers_follows_the_viewer(viewer: Any, panel: SegmentPanel) -> None:
    assert list(panel.layers.choices) == [None]
    assert not panel.run_button.enabled
    assert panel.facts.value == "no image layer: open a micrograph"
    first = viewer.add_image(grey_image(16, 24), name="first", **NM)
    viewer.add_labels(np.zeros((16, 24), np.uint8))
    second = viewer.add_image(np.zeros((3, 16, 24), np.float32), name="second", scale=(1, 2, 3), units=("um",) * 3)
    assert [layer for layer in panel.layers.choices if layer is not None] == [first, second]
    assert panel.layer is first
    assert panel.facts.value == "16 × 24, uint8, pixel 5 nm"
    viewer.layers.remove(first)
    assert panel.layer is second
    assert panel.facts.value == "3 × 16 × 24, float32, pixel 2 µm × 3 µm"
    viewer.layers.remove(second)
    assert panel.layer is None


def test_planes_of_a_stack(viewer: Any, panel: SegmentPanel) -> None:
    viewer.add_image(grey_image(16, 24))
    stack = viewer.add_image(np.stack([grey_image(16, 24, seed) for seed in range(4)]))
    assert not panel.all_planes.visible
    panel.layers.value = stack
    assert panel.all_planes.visible
    viewer.dims.set_point(0, 2)
    panel.run()
    finish(panel)
    labels = find_layer(viewer, stack, "labels")
    assert labels is not None
    assert [int(plane.max()) for plane in labels.data] == [255, 255, 2, 255]
    panel.all_planes.value = True
    panel.run()
    finish(panel)
    assert panel.message.value.startswith("4 planes in ")
    assert [int(plane.max()) for plane in labels.data] == [2, 2, 2, 2]


def test_pictures_unlike_the_training_are_told(viewer: Any, panel: SegmentPanel, toy: ToyModel) -> None:
    toy.engine = ToyEngine(manifest("logits", domain=True))
    image = viewer.add_image(np.full((16, 24), 220, np.uint8), name="far")
    for level, ends in ((220, "; foreign to the model, at distance 5"), (120, "with numpy")):
        image.data = np.full((16, 24), level, np.uint8)
        panel.run()
        finish(panel)
        assert panel.message.value.endswith(ends)
        assert (panel.message.native.styleSheet() == WARNING_STYLE) == (level == 220)
    viewer.layers.remove(image)
    viewer.add_image(np.stack([np.full((16, 24), level, np.uint8) for level in (120, 170, 220, 0)]), name="stack")
    panel.all_planes.value = True
    panel.run()
    finish(panel)
    assert panel.message.value.endswith("; of the planes 2 are foreign to the model and 1 unusual for it")
    labels = find_layer(viewer, panel.layer, "labels")
    assert labels is not None
    planes = labels.metadata["hpddrnet_trt"]["planes"]
    states = [planes[str(number)]["result"]["domain"]["state"] for number in range(4)]
    assert states == ["familiar", "unusual", "foreign", "foreign"]


@pytest.mark.parametrize(
    ("raised", "text", "is_bug"),
    [
        (UserError("the GPU is gone; restart"), "the GPU is gone; restart", False),
        (MemoryError(), "there is not enough memory for this; choose smaller tiles", False),
        (RuntimeError("code 7"), "unexpected RuntimeError: code 7", True),
    ],
)
def test_every_error_is_one_sentence(
    viewer: Any, panel: SegmentPanel, toy: ToyModel, monkeypatch: pytest.MonkeyPatch, raised: Exception, text: str,
    is_bug: bool,
) -> None:  # fmt: skip
    from napari.utils.notifications import notification_manager

    reported: list[BaseException] = []
    monkeypatch.setattr(notification_manager, "receive_error", lambda kind, value, trace: reported.append(value))

    def then(number: int) -> None:
        raise raised

    toy.engine = Scripted(then)
    panel.run()
    assert panel.message.value == "open a micrograph first: there is no image layer"
    viewer.add_image(grey_image(40, 50))
    panel.run()
    finish(panel)
    assert panel.message.value == text
    assert "color" in panel.message.native.styleSheet()
    assert reported == ([raised] if is_bug else [])
    assert panel.run_button.enabled


def test_a_missing_model_and_the_next_run(
    viewer: Any, panel: SegmentPanel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the real load_segmenter
    viewer.add_image(grey_image(40, 50))
    panel.choose_model(str(tmp_path / "missing.onnx"))
    panel.run()
    finish(panel)
    assert "missing.onnx" in panel.message.value
    file = write_toy_onnx(tmp_path / "toy.onnx", manifest())
    panel.choose_model(str(file))
    panel.run()
    finish(panel)
    assert panel.message.native.styleSheet() == ""
    assert len(viewer.layers) == 2
    first = panel._open(panel.options())
    assert panel._open(panel.options()) is first  # open from run to run, until something changes
    os.utime(file, ns=(1, 1))
    assert panel._open(panel.options()) is not first


def test_a_model_on_a_server(
    viewer: Any, panel: SegmentPanel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tritonclient.grpc")
    from tests.triton_server import Server

    monkeypatch.undo()  # the real load_segmenter
    server = Server()
    server.add(write_toy_onnx(tmp_path / "toy.onnx", manifest()))
    server.start()
    viewer.add_image(grey_image(40, 50))
    panel.choose_model(server.address())
    panel.run()
    finish(panel)
    assert panel.message.value.endswith(f"with Triton 2.51.0 at 127.0.0.1:{server.port} (model toy, version 1)")
    assert len(viewer.layers) == 2
    assert _command("mine", panel.options()["model_path"]).startswith("hpddrnet-trt train mine --from CHECKPOINT")
    panel.close()
    assert server.regions == {}
    server.stop()


def test_cancel_stops_and_keeps_what_is_done(viewer: Any, panel: SegmentPanel, toy: ToyModel) -> None:
    reached, go = threading.Event(), threading.Event()

    def then(number: int) -> None:
        if number == 2:
            reached.set()
            assert go.wait(10)

    toy.engine = Scripted(then)
    stack = viewer.add_image(np.stack([grey_image(16, 24, seed) for seed in range(9)]))
    panel.all_planes.value = True
    panel.run()
    process_until(reached.is_set)
    process_until(lambda: panel.message.value == "plane 3 of 9")
    assert (panel.bar.max, panel.bar.value) == (1000, 222)
    panel.cancel_button.native.click()
    assert panel.message.value == "stopping after this inference"
    go.set()
    finish(panel)
    assert panel.message.value == "cancelled; 2 of 9 done"
    labels = find_layer(viewer, stack, "labels")
    assert labels is not None
    assert [int(plane.max()) for plane in labels.data] == [2, 2, *[255] * 7]


def test_cancel_ends_between_tiles(viewer: Any, panel: SegmentPanel, toy: ToyModel) -> None:
    def then(number: int) -> None:
        if number == 1:
            panel._worker.quit()

    toy.engine = Scripted(then)
    viewer.add_image(grey_image(40, 4000))
    panel.tile.value = 512
    panel.run()
    finish(panel)
    assert panel.message.value == "cancelled; 0 of 1 done"
    assert len(toy.engine.shapes) == 2


def test_the_result_of_a_removed_layer_is_dropped(viewer: Any, panel: SegmentPanel, toy: ToyModel) -> None:
    go = threading.Event()
    toy.engine = Scripted(lambda number: go.wait(10))
    source = viewer.add_image(grey_image(16, 24), name="frame")
    panel.run()
    viewer.layers.remove(source)
    go.set()
    finish(panel)
    assert panel.message.value == "layer 'frame' was removed while it was segmented; its result is dropped"
    assert not viewer.layers


def test_a_deleted_widget_lets_go(viewer: Any, toy: ToyModel) -> None:
    from qtpy.QtCore import QCoreApplication, QEvent

    reached, go = threading.Event(), threading.Event()

    def then(number: int) -> None:
        reached.set()
        assert go.wait(10)

    toy.engine = Scripted(then)
    viewer.add_image(grey_image(16, 24))
    widget = segment_widget(viewer)
    widget.panel.run()
    worker = widget.panel._worker
    assert reached.wait(10)
    widget.native.deleteLater()
    QCoreApplication.sendPostedEvents(None, QEvent.Type.DeferredDelete)
    go.set()
    process_until(lambda: not worker.is_running and toy.engine.closed)
    viewer.add_image(grey_image(16, 24))  # what a viewer tells its widgets, to one that no longer exists
    viewer.layers.clear()
