"""What napari finds: the manifest, the reader, and the widget in a real window."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from hpddrnet_trt.core.errors import BadInputFile
from hpddrnet_trt.integrations.napari_reader import napari_get_reader, read_layer
from tests.integrations.napari_viewer import Image, application
from tests.toy import grey_image, manifest, write_toy_onnx
from tests.virtual_display import virtual_display

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # as in napari_viewer
    from npe2 import PluginManager, PluginManifest

REPOSITORY = Path(__file__).resolve().parents[2]
YAML = Path(str(files("hpddrnet_trt.integrations") / "napari.yaml"))

# A person's way: the plugin's menu entry, Run, and the window closed while a second run is under way.
CHILD = """
import sys, threading, time
import napari
from npe2 import PluginManager, PluginManifest
from qtpy.QtWidgets import QApplication
from hpddrnet_trt.integrations import napari_job
from hpddrnet_trt.integrations.napari_widget import segment_widget
from tests.toy import grey_image

PluginManager.instance().register(PluginManifest.from_file(sys.argv[1]))
viewer = napari.Viewer()
viewer.add_image(grey_image(64, 96), scale=(5, 5), units=("nm", "nm"))
dock, widget = viewer.window.add_plugin_dock_widget("hpddrnet-trt", "Segment micrograph")
panel = widget.panel
assert panel.viewer is viewer or panel.viewer.__wrapped__ is viewer, panel.viewer
panel.choose_model(sys.argv[2])
panel.run_button.click()
until = time.monotonic() + 60
while panel.running:
    assert time.monotonic() < until
    QApplication.processEvents()
    time.sleep(0.01)
print(panel.message.text())
print(len(viewer.layers), panel.table.rowCount())
viewer.window.remove_dock_widget(widget)
second = segment_widget()
viewer.window.add_dock_widget(second)
closed, segment_planes = threading.Event(), napari_job.segment_planes
napari_job.segment_planes = lambda *arguments: (closed.wait(20), (yield from segment_planes(*arguments)))
second.panel.choose_model(sys.argv[2])
second.panel.run()
job = second.panel._job
viewer.close()
QApplication.processEvents()
closed.set()
assert job.wait(20)
print(job.end.text)
"""


def test_the_manifest_is_valid_and_names_what_exists() -> None:
    described = PluginManifest.from_file(YAML)
    assert described.name == "hpddrnet-trt"
    for command in described.contributions.commands or []:
        assert callable(command.python_name and _resolve(command.python_name))
    (reader,) = described.contributions.readers or []
    assert set(reader.filename_patterns) == {"*.tif", "*.tiff", "*.dm3", "*.dm4"}


def test_the_package_announces_its_manifest() -> None:
    """In the project's own file: an installation made before it was written does not know it yet."""
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"]["napari.manifest"][project["name"]].partition(":")
    assert Path(str(files(module) / name)) == YAML


@pytest.mark.parametrize("number", [0, 1])
def test_vendor_files_open_with_their_pixel_size(sem_data: Path, number: int) -> None:
    expected = json.loads((sem_data / "vendor-tiff/expected.json").read_text(encoding="utf-8"))["files"][number]
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


def test_a_file_without_a_pixel_size_stays_in_pixels(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "plain.tif", grey_image(16, 24))
    ((pixels, arguments, _),) = read_layer(str(tmp_path / "plain.tif"))
    layer = Image(pixels, **arguments)
    assert layer.name == "plain"
    assert {str(unit) for unit in layer.units} == {"pixel"}
    assert tuple(layer.scale) == (1.0, 1.0)


def test_stacks_and_broken_files_are_left_to_other_readers(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros((3, 16, 24), np.uint8), photometric="minisblack")
    tifffile.imwrite(tmp_path / "colour.tif", np.zeros((16, 24, 3), np.uint8), photometric="rgb")
    (tmp_path / "broken.tif").write_bytes(b"II*\0 not really")
    assert napari_get_reader(str(tmp_path / "stack.tif")) is None
    assert napari_get_reader(str(tmp_path / "broken.tif")) is None
    assert napari_get_reader([str(tmp_path / "colour.tif")] * 2) is None
    assert napari_get_reader(str(tmp_path / "colour.tif")) is read_layer
    assert napari_get_reader("series.dm4") is read_layer
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
    assert layers == "2 3"
    assert second == "cancelled"


def _resolve(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(__import__(module, fromlist=[attribute]), attribute)
