"""The round: a model's labels, corrected in napari and saved; the command that the widget names; its model's labels."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("lightning")

from hpddrnet_trt import load_segmenter
from hpddrnet_trt.cli.program import app, run
from hpddrnet_trt.core.manifest import read_manifest
from hpddrnet_trt.integrations.napari import segment_widget
from hpddrnet_trt.integrations.napari_layers import find_layer
from hpddrnet_trt.models.checkpoints import save_checkpoint
from tests.integrations.live import wait_until
from tests.integrations.napari_viewer import ViewerModel, application
from tests.tiny_network import tiny_manifest, tiny_network

# What makes the run small enough for tests; the network is that of the model which is gone on from.
SMALL = [
    "augmentation.crop=[64, 64]", "optimization.max_steps=40", "optimization.batch_size=4", "optimization.lr=0.02",
    "optimization.ema_decay=null", "run.val_every=20", "run.threads=1", "run.progress=false",
]  # fmt: skip


def grains(seed: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Noisy pixels of bright grains in a dark phase, and the labels that a person gives them."""
    rng = np.random.default_rng(seed)
    bright = np.kron(rng.random((3, 3)) < 0.5, np.ones((32, 32))).astype(bool)
    pixels = np.where(bright, 190, 60) + rng.normal(0, 8, bright.shape)
    return pixels.astype(np.uint8), np.where(bright, 2, 1).astype(np.uint8)


def test_the_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    application()
    network = tiny_network()
    checkpoint = save_checkpoint(tmp_path / "mine.safetensors", network, tiny_manifest(network))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPDDRNET_CACHE", str(tmp_path / "cache"))
    viewer: Any = ViewerModel()
    widget = segment_widget(viewer)
    panel = widget.panel
    panel.choose_model(str(checkpoint))
    panel.dataset.value = tmp_path / "corrected labels"
    for number in range(3):
        pixels, seen = grains(number)
        layer = viewer.add_image(pixels, name=f"sample {number}")
        panel.layers.value = layer
        panel.run()
        wait_until(lambda: (application().processEvents(), not panel.running)[1], 20)
        labels = find_layer(viewer, layer, "labels")
        assert labels is not None, panel.message.value
        assert not np.array_equal(labels.data, seen)
        labels.data = seen
        panel.save()
    _, _, command = panel.message.value.partition("train on it: ")
    widget.panel.close()
    widget.native.deleteLater()
    assert command == f"hpddrnet-trt train '{tmp_path / 'corrected labels'}' --from {checkpoint}"

    monkeypatch.setattr("sys.argv", [*shlex.split(command), *SMALL])
    level = logging.getLogger("hpddrnet_trt.training").level
    with pytest.raises(SystemExit) as ended:
        run(app)
    logging.getLogger("hpddrnet_trt.training").setLevel(level)
    said = capsys.readouterr()
    assert ended.value.code in (0, None), said.err
    trained = Path("runs/corrected-labels/corrected-labels.onnx")
    assert f"exported: {trained}" in said.out
    assert read_manifest(trained).class_names == read_manifest(checkpoint).class_names
    agreement = []
    for model in (checkpoint, trained):
        with load_segmenter(str(model)) as segmenter:
            same = [segmenter.segment(pixels).labels == seen for pixels, seen in map(grains, range(3, 6))]
        agreement.append(float(np.mean(same)))
    assert agreement[1] > agreement[0] + 0.1, agreement
