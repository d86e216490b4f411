"""The soak in short: every kind of fault, through the functions of the long run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("psutil")
from benchmarks import soak


def test_every_fault_on_a_real_engine(tmp_path: Path) -> None:
    report = soak.soak(soak.ThresholdScene(tmp_path), 300, episode_frames=12, deadlock_s=60)
    assert report.problems == []
    assert report.frames >= 300
    steps = {*soak.EPISODES, *soak.ENDINGS}
    assert report.episodes.keys() == {step.__name__.replace("_", " ") for step in steps}
    assert report.faults_struck.keys() == {"engine error", "worker death", "out of memory", "hang"}
    assert report.counts["submitted"] == report.frames == sum(
        report.counts[name] for name in ("processed", "dropped", "failed", "pending")
    )
    assert report.counts["pending"] == report.threads_left == 0
    assert report.counts["restarts"] > 0
    assert report.counts["callback_errors"] > 0
    assert report.results_checked > 50
    assert report.accounts_checked > 50
    assert report.states_told["stalled"] > 0
    assert "no problem found" in soak.as_text(report)


class Mixed(soak.ThresholdScene):
    """Hands out the frame after the one that was asked for: what a mixed-up buffer looks like."""

    def wrong(self, number: int, labels: soak.Grey) -> str | None:
        return super().wrong(number + 1, labels)


def test_the_soak_sees_results_of_another_frame(tmp_path: Path) -> None:
    scene = Mixed(tmp_path)
    with scene.open() as segmenter:
        labels = segmenter.segment(scene.frame(41)).labels
    problem = scene.wrong(41, labels)
    assert problem is not None
    assert "of frame 41" in problem
    assert soak.ThresholdScene(tmp_path).wrong(41, labels) is None


def test_frames_are_the_same_every_time_and_differ_from_each_other(tmp_path: Path) -> None:
    scene = soak.ThresholdScene(tmp_path)
    for number in (1, 7, 65536):
        np.testing.assert_array_equal(scene.frame(number), scene.frame(number))
    shapes = {scene.frame(number).shape for number in range(1, 500)}
    assert shapes == {size[:2] for size in soak.SIZES}
    assert len({scene.frame(number).tobytes() for number in range(1, 500)}) == 499
