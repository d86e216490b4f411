"""Segment a micrograph in napari: the dock widget beside the picture, the classes on top of it.

    python examples/segment_in_napari.py micrograph.tif
    python examples/segment_in_napari.py picture.png --pixel-size-nm 12.5 --engine openvino --screenshot seen.png

The first command opens the viewer and runs the model that comes with the package; choose another one, other
layers and settings in the widget. With --screenshot the whole window is written to a PNG when the result is there,
and the viewer closes. Needs: pip install 'hpddrnet-trt[napari]' and a Qt, such as pyside6-essentials.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from hpddrnet_trt.core.errors import UserError, require
from hpddrnet_trt.integrations.napari import read_layer, segment_widget


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("micrograph", type=Path)
    parser.add_argument("--model", default="nasa-super1", help="a model that comes with the package, or a file")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--pixel-size-nm", type=float, help="for files that do not say it")
    parser.add_argument("--screenshot", type=Path, help="write the window to this PNG and close")
    arguments = parser.parse_args()

    napari = require("napari", "napari", "open a viewer")
    pixels, layer_arguments, _ = read_layer(str(arguments.micrograph))[0]
    if arguments.pixel_size_nm is not None:
        layer_arguments.update(scale=(arguments.pixel_size_nm,) * 2, units=("nm", "nm"))
    viewer = napari.Viewer(title="HPDDRNet-TRT")
    viewer.window.resize(1400, 880)
    viewer.add_image(pixels, **layer_arguments)
    scale_bar = viewer.canvas.overlays.scale_bar if hasattr(viewer, "canvas") else viewer.scale_bar  # before 0.9
    scale_bar.visible = True

    widget = segment_widget(viewer)
    viewer.window.add_dock_widget(widget, name="Segment micrograph")
    widget.panel.choose_model(arguments.model)
    widget.panel.choose_engine(arguments.engine)
    widget.panel.run()
    if arguments.screenshot is not None:
        close_when_done(viewer, widget.panel, arguments.screenshot)
    napari.run()


def close_when_done(viewer: Any, panel: Any, screenshot: Path) -> None:
    """Look every tenth of a second whether the segmentation has ended."""
    clock = require("qtpy.QtCore", "napari", "wait for the result").QTimer
    timer = clock(panel.widget.native)

    def look() -> None:
        if panel.running:
            return
        timer.stop()
        viewer.reset_view()
        clock.singleShot(500, write)  # when all is drawn

    def write() -> None:
        viewer.screenshot(str(screenshot), canvas_only=False)
        viewer.close()

    timer.timeout.connect(look)
    timer.start(100)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as exc:
        sys.exit(f"error: {exc}")
    except KeyboardInterrupt:
        sys.exit("stopped")
