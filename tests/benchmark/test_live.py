"""Measuring live operation: the arithmetic, a source with known behaviour, and the real simulated microscope."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from benchmarks import live
from benchmarks.live import Window, rate_ratio
from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.stream import State, Stream
from tests.toy import ToyEngine, grey_image, manifest, write_toy_onnx


def windows(pairs: list[tuple[int, int]], seconds: float = 2.0) -> list[Window]:
    """Pairs of frame counts (with, without), their order alternating."""
    made = []
    for number, (attached, alone) in enumerate(pairs):
        pair = [Window(attached=True, seconds=seconds, frames=attached),
                Window(attached=False, seconds=seconds, frames=alone)]  # fmt: skip
        made += pair if number % 2 else pair[::-1]
    return made


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(1, 500)), min_size=1, max_size=12))
def test_the_ratio_is_of_pairs_so_a_drifting_machine_does_not_matter(pairs: list[tuple[int, int]]) -> None:
    found = rate_ratio(windows(pairs))
    ratios = [attached / alone for attached, alone in pairs]
    assert found.ratio == pytest.approx(np.median(ratios))
    low, high = found.interval_95
    assert min(ratios) - 1e-12 <= low <= high <= max(ratios) + 1e-12
    assert found.held == (found.ratio >= 0.98)
    assert (found.with_stream, found.without_stream) == tuple(np.median(pairs, axis=0) / 2)  # windows of 2 s


def test_windows_that_are_no_pairs_are_refused_and_no_age_is_no_figure() -> None:
    for wrong in (windows([(1, 1)])[:1] * 2, []):
        with pytest.raises(UsageError, match="in pairs"):
            rate_ratio(wrong)
    assert live.milliseconds([0.1, 0.2, 0.3]) == pytest.approx({"p50": 200, "p95": 290, "p99": 298, "max": 300})
    assert math.isnan(live.milliseconds([])["p50"])


class KnownSource:
    """Ten frames in each window; nine in as long a time when a stream is attached, which gets ten all the same."""

    name = "known"

    def __init__(self) -> None:
        self.attached: list[bool] = []

    def acquire(self, seconds: float, stream: Stream | None) -> tuple[int, float]:
        self.attached.append(stream is not None)
        for number in range(10):
            if stream is not None:
                stream.submit(grey_image(16, 16, number))
            time.sleep(seconds / 10)
        return (10, seconds) if stream is None else (18, 2 * seconds)  # the window lasted twice as long

    def close(self) -> None:
        raise AssertionError("the caller closes it")


def test_windows_alternate_and_the_display_ages() -> None:
    source = KnownSource()
    with Stream(lambda: Segmenter(ToyEngine())) as stream:
        assert stream.wait_ready(10) is State.READY
        found, shown = live.measure(source, stream, pairs=3, seconds=0.2, warm_up_s=0.01)
        assert stream.statistics().submitted == 40
    assert source.attached == [True, False, True, True, False, False, True]  # the first is the warm-up
    assert [window.attached for window in found] == source.attached[1:]
    assert rate_ratio(found).ratio == pytest.approx(0.9)
    assert not rate_ratio(found).held
    assert 1 <= shown.results <= 30  # frames that were shown it
    assert shown.age_ms["p50"] > 0
    assert shown.runtime == "numpy"


@pytest.fixture
def _openfibsem(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fibsem")
    pytest.importorskip("psutil")
    monkeypatch.setenv("FIBSEM_SIM_NO_DELAY", "0")  # set by the source, put back afterwards


@pytest.mark.usefixtures("_openfibsem")
def test_the_whole_run_with_openfibsem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_toy_onnx(tmp_path / "toy.onnx", manifest("labels"))
    frames = tmp_path / "frames"
    frames.mkdir()
    for seed in range(3):
        Image.fromarray(grey_image(48, 64, seed)).save(frames / f"{seed}.png")
    output = tmp_path / "live.json"
    live.main(
        ["--source", "openfibsem", "--frames", str(frames), "--model", str(model), "--engine", "onnxruntime",
         "--threads", "1", "--seconds", "1", "--window", "0.5", "--warm-up", "0.1", "--output", str(output)]
    )  # fmt: skip
    result = live.LiveResult.model_validate(json.loads(output.read_text()))
    assert result.source == "OpenFIBSEM DemoMicroscope, 64x48, 3 micrographs"
    assert [window.attached for window in result.windows] == [False, True, True, False]
    assert all(window.frames > 0 for window in result.windows)
    stream = result.stream
    assert result.balanced
    assert stream["submitted"] == stream["processed"] + stream["dropped"]
    assert (stream["failed"], stream["pending"]) == (0, 0)
    attached = sum(window.frames for window in result.windows if window.attached)
    assert stream["submitted"] >= attached
    assert result.display.results > 0
    assert "onnxruntime" in str(result.display.runtime)
    assert 0 < stream["stages"]["total"]["p50_ms"] <= stream["stages"]["total"]["p99_ms"]
    printed = capsys.readouterr().out
    assert "balanced" in printed
    assert "NOT" not in printed


@pytest.mark.usefixtures("_openfibsem")
def test_micrographs_of_different_sizes_and_a_model_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--source", "openfibsem", "--frames", str(tmp_path), "--output", str(tmp_path / "live.json"),
              "--seconds", "0.1", "--window", "0.1", "--warm-up", "0.1"]  # fmt: skip
    for width, model, code, said in ((64, [str(tmp_path / "none.onnx")], 1, "none.onnx"), (65, [], 2, "of one size")):
        Image.fromarray(grey_image(48, width)).save(tmp_path / f"{width}.png")
        with pytest.raises(SystemExit) as ended:
            live.main([*common, *(["--model", *model] if model else [])])
        assert ended.value.code == code
        assert said in capsys.readouterr().err
    assert not (tmp_path / "live.json").exists()


def test_micromanagers_frames_are_counted_with_and_without_a_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    level = logging.getLogger().level
    monkeypatch.setenv("PYMM_LOG_FILE", "no")
    pytest.importorskip("pymmcore_plus")
    logging.getLogger().setLevel(level)  # importing it turns the root logger to DEBUG
    for seed in range(3):
        Image.fromarray(grey_image(32, 32, seed)).save(tmp_path / f"{seed}.png")
    source = live.MicroManagerSource(tmp_path, exposure_ms=20.0)
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
