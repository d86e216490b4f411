"""Model files get the temperature of their scores and the errors of their fractions from pictures with masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="makes the networks")

from hpddrnet_trt.core.manifest import read_manifest
from hpddrnet_trt.data.datasets import FolderDataset
from hpddrnet_trt.data.labels import write_pair
from hpddrnet_trt.export.uncertainty import describe_uncertainty
from hpddrnet_trt.inference import load_segmenter
from hpddrnet_trt.models.checkpoints import save_checkpoint
from tests.tiny_network import lively, tiny_manifest, tiny_network

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_checkpoint_gets_both_and_what_cannot_be_measured_leaves_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = lively(tiny_network())
    manifest = tiny_manifest(network)
    checkpoint = save_checkpoint(tmp_path / "m.safetensors", network, manifest)
    rng, palette = np.random.default_rng(0), [entry.color for entry in manifest.classes]
    for number in range(3):
        grey = rng.integers(0, 255, (64, 96), dtype=np.uint8)
        truth = rng.integers(0, len(palette), (64, 96), dtype=np.uint8)
        write_pair(tmp_path / "data", "val" if number else "train", f"p{number}", grey, truth, palette)
    dataset = FolderDataset.open(tmp_path / "data", classes=manifest.class_names)
    before = checkpoint.read_bytes()
    other = FolderDataset.open(tmp_path / "data", classes=["x", *manifest.class_names[1:]])
    for given, split in ((dataset, "test"), (other, "val")):
        assert describe_uncertainty(checkpoint, given, split).fraction_errors is None
    assert "will have no interval" in caplog.text
    assert checkpoint.read_bytes() == before
    described = describe_uncertainty(checkpoint, dataset)
    assert described.temperature is not None
    assert described.fraction_errors is not None
    assert described.fraction_errors.pictures == 2
    assert read_manifest(checkpoint).fraction_errors == described.fraction_errors
    with load_segmenter(checkpoint, intervals=None) as segmenter:  # by itself, where the model knows
        assert segmenter.segment(grey).half_widths() is not None
    with load_segmenter(checkpoint) as segmenter:
        assert segmenter.segment(grey).half_widths() is None
