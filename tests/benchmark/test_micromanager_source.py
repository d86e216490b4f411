"""The source that live measurements drive: it counts what it delivered, with a listener and without."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import cv2
import pytest

from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.stream import Stream
from tests.toy import ToyEngine, grey_image, manifest

_LEVEL = logging.getLogger().level
os.environ.setdefault("PYMM_LOG_FILE", "no")
pytest.importorskip("pymmcore_plus")
logging.getLogger().setLevel(_LEVEL)  # importing it turns the root logger to DEBUG


def test_frames_are_counted_with_and_without_a_stream(tmp_path: Path) -> None:
    from benchmarks.micromanager_source import MicroManagerSource

    for seed in range(3):
        cv2.imwrite(str(tmp_path / f"{seed}.png"), grey_image(32, 32, seed))
    source = MicroManagerSource(tmp_path, exposure_ms=20.0)
    try:
        alone, lasted = source.acquire(0.4, None)
        assert lasted >= 0.4
        assert 1 <= alone <= lasted / 0.02 + 1  # 50 frames/s at most
        with Stream(lambda: Segmenter(ToyEngine(manifest("logits"))), nice=0) as stream:
            stream.wait_ready(10)
            together, _ = source.acquire(0.4, stream)
            submitted = stream.statistics().submitted
            assert 1 <= together <= submitted  # frames before the count and during the cancel come on top
            source.acquire(0.1, None)
            assert stream.statistics().submitted == submitted  # not connected any more
    finally:
        source.close()
