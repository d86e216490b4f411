"""Go the round of docs/correct.md, measure it, and make its pictures.

    python docs/pictures/correct.py DATA WORK

DATA holds the dataset `nasa-ebc`, as `hpddrnet-trt datasets get` writes it. WORK keeps datasets and models; called
again, what is trained stays. The published masks stand in for the person who corrects. napari's window needs a display
(`xvfb-run -a`).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hpddrnet_trt import load_segmenter, read_micrograph
from hpddrnet_trt.core.errors import require
from hpddrnet_trt.data.labels import overlay, read_mask
from hpddrnet_trt.integrations.napari import read_layer, segment_widget
from hpddrnet_trt.integrations.napari_layers import find_layer

HERE = Path(__file__).parent
FIRST = {"train": "train/010417-4_S2480009", "val": "train/021519-3_1426C-100cyc0008"}
CORRECTED = ("040617-3_S0410018", "111418-4_1426_100Cyc0034", "032919-6_100cyc0007", "S879_062216-3-31cyc0030")
UNSEEN = "test/070516-1_S1160030.png"
# Far less than `train` would choose: the pictures are to be made in minutes.
FIRST_SHORT = ["augmentation.crop=[256, 256]", "optimization.batch_size=4", "optimization.max_steps=60"]
MORE_SHORT = ["optimization.batch_size=2", "optimization.max_steps=90", "optimization.lr=0.001", "run.val_every=45"]


def main(data: Path, work: Path) -> None:
    data = data.resolve() / "nasa-ebc"
    for split, name in FIRST.items():
        for kind in ("images", "masks"):
            (work / "first" / kind / split).mkdir(parents=True, exist_ok=True)
            shutil.copy(data / kind / f"{name}.png", work / "first" / kind / split)
    shutil.copy(data / "dataset.json", work / "first")
    call(work, "train", "first", *FIRST_SHORT, "run.val_every=60")
    correct(data, work)
    call(work, "train", "corrected", "--from", "runs/first/first.safetensors", *MORE_SHORT)
    for name in ("first", "corrected"):
        call(work, "evaluate", f"runs/{name}/{name}.onnx", "--data", str(data), "--split", "test")
    compare(data, work)


def call(work: Path, *arguments: str) -> None:
    started = time.monotonic()
    subprocess.run(["hpddrnet-trt", *arguments], cwd=work, check=True)
    print(f"# {arguments[0]}: {time.monotonic() - started:.0f} s", flush=True)


def correct(data: Path, work: Path) -> None:
    """Run, correct and save in napari's window; a picture of it before and after the first correction."""
    napari = require("napari", "napari", "open a viewer")
    viewer = napari.Viewer(title="HPDDRNet-TRT")
    viewer.window.resize(1400, 880)
    widget = segment_widget(viewer)
    viewer.window.add_dock_widget(widget, name="Segment micrograph")
    panel = widget.panel
    panel.choose_model(str(work / "runs/first/first.onnx"))
    panel.dataset.value = work / "corrected"
    for number, name in enumerate(CORRECTED):
        viewer.layers.clear()
        pixels, layer_arguments, _ = read_layer(str(data / "images" / "train" / f"{name}.png"))[0]
        layer = viewer.add_image(pixels, **layer_arguments)
        panel.layers.value = layer
        panel.run()
        drawn(panel)
        labels = find_layer(viewer, layer, "labels")
        if labels is None:
            sys.exit(f"error: {panel.message.value}")
        viewer.layers.selection.active = labels
        viewer.reset_view()
        if number == 0:
            write_window(viewer, panel, "correct-1-run.jpg")
        labels.data = read_mask(data / "masks" / "train" / f"{name}.png")
        panel.save()
        if number == 0:
            labels.mode, labels.selected_label, labels.brush_size = "paint", 2, 6
            write_window(viewer, panel, "correct-2-save.jpg")
    print(panel.message.value)
    viewer.close()


def drawn(panel: Any) -> None:
    """Wait until the run has ended and the window shows it."""
    application = require("qtpy.QtWidgets", "napari", "wait for the window").QApplication
    until = time.monotonic() + 1
    while panel.running or time.monotonic() < until:
        application.processEvents()
        time.sleep(0.02)


def write_window(viewer: Any, panel: Any, name: str) -> None:
    drawn(panel)
    window = viewer.screenshot(canvas_only=False)[..., :3]
    Image.fromarray(window).save(HERE / name, quality=86)


def compare(data: Path, work: Path) -> None:
    """A picture that neither training has seen: as it is, with both models' labels, with the published mask."""
    micrograph = read_micrograph(data / "images" / UNSEEN).pixels
    mask = read_mask(data / "masks" / UNSEEN)
    part = np.s_[512:, :512]
    panels = [np.repeat(micrograph[..., None], 3, axis=2)[part]]
    for name in ("first", "corrected"):
        with load_segmenter(str(work / f"runs/{name}/{name}.onnx")) as segmenter:
            palette = segmenter.manifest.palette
            panels.append(overlay(micrograph, segmenter.segment(micrograph).labels, palette)[part])
    panels.append(overlay(micrograph, mask, palette)[part])
    gap = np.full((len(panels[0]), 8, 3), 255, np.uint8)
    row = np.hstack([one for panel in panels for one in (gap, panel)][1:])
    Image.fromarray(row).save(HERE / "correct-3-on.jpg", quality=86)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
