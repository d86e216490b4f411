"""Frames of real pymmcore-plus acquisitions: pixel size, tags, colour, what must not reach the acquisition."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.integrations.micromanager import (
    FrameTag,
    MicroManagerFeed,
    on_emitting_thread,
    pixel_size_m,
    replay_core,
)
from hpddrnet_trt.stream import Stream, StreamResult
from tests.integrations.live import open_stream, toy_labels, wait_until
from tests.toy import ToyEngine, grey_image

_LEVEL = logging.getLogger().level
os.environ.setdefault("PYMM_LOG_FILE", "no")  # otherwise it writes one in the home folder
pytest.importorskip("pymmcore_plus")
logging.getLogger().setLevel(_LEVEL)  # importing it turns the root logger to DEBUG, for every test after these
REPOSITORY = Path(__file__).resolve().parents[2]


def frames(count: int = 3, size: tuple[int, int] = (48, 64)) -> list[npt.NDArray[np.uint8]]:
    return [grey_image(*size, seed) for seed in range(count)]


@pytest.fixture
def core(request: pytest.FixtureRequest) -> Iterator[Any]:
    core = replay_core(frames(), pixel_size_m=5e-9)
    yield core
    core.unloadAllDevices()


@pytest.fixture(scope="module")
def demo() -> Iterator[Any]:
    """Micro-Manager's own simulated microscope: camera, objectives with pixel sizes, binning, pixel types."""
    adapters = pytest.importorskip("mm_test_adapters")
    from pymmcore_plus import CMMCorePlus

    core = CMMCorePlus()
    core.setDeviceAdapterSearchPaths([adapters.device_adapter_path()])
    core.loadSystemConfiguration(Path(adapters.device_adapter_path(), "MMConfig_demo.cfg"))
    core.setExposure(1)
    yield core
    core.unloadAllDevices()


def run(core: Any, loops: int, **plan: Any) -> None:
    from useq import MDASequence

    core.run_mda(MDASequence(time_plan={"interval": 0, "loops": loops}, **plan)).join()


def results_of(core: Any, loops: int = 1, **plan: Any) -> list[StreamResult]:
    """What comes out for an MDA of so many time points."""
    found: list[StreamResult] = []
    with open_stream(on_result=found.append) as stream:
        with MicroManagerFeed(core, stream) as feed:
            run(core, loops, **plan)
        assert feed.errors == 0, feed.last_error
    return found


def test_every_frame_of_an_mda_is_segmented_as_it_was_taken(core: Any) -> None:
    before = set(threading.enumerate())
    found = results_of(core, 7)
    assert not [thread for thread in set(threading.enumerate()) - before if "hpddrnet" in thread.name]
    assert [result.tag.index for result in found] == [{"t": step} for step in range(7)]
    times = [result.tag.time_s for result in found]
    assert times == sorted(times)
    assert 0 <= times[0] < times[-1] < 60
    for step, result in enumerate(found):
        assert isinstance(result.tag, FrameTag)
        assert result.tag.camera == "Camera"
        assert result.tag.event.index["t"] == step
        assert result.segmentation is not None
        assert np.array_equal(result.segmentation.labels, toy_labels(frames()[step % 3]))
        assert result.segmentation.pixel_size_m == pytest.approx(5e-9)


@pytest.mark.parametrize(
    ("affine", "expected"),
    [
        ((1.0, 0.0, 0.0, 0.0, 1.0, 0.0), 5e-9),  # never calibrated
        ((0.005, 0.0, 9.0, 0.0, 0.005, 9.0), 5e-9),
        ((0.0, -0.005, 0.0, -0.005, 0.0, 0.0), 5e-9),  # turned and mirrored
        ((0.003, -0.004, 0.0, 0.004, 0.003, 0.0), 5e-9),  # turned by 53 degrees
        ((0.005, 0.0, 0.0, 0.0, 0.0051, 0.0), None),  # 2 percent from square
        ((0.006, 0.0, 0.0, 0.0, 0.006, 0.0), None),  # square, of another size
        ((0.0, 0.0, 0.0, 0.0, 0.0, 0.0), None),
    ],
)
def test_affine_matrix(core: Any, affine: tuple[float, ...], expected: float | None) -> None:
    core.setPixelSizeAffine("replay", affine)
    assert pixel_size_m(core) == (None if expected is None else pytest.approx(expected))
    for unknown in (0.0, -1.0, float("nan"), float("inf")):
        assert pixel_size_m(core, {"pixel_size_um": unknown}) is None


def test_demo_microscope_binning_and_objective(demo: Any) -> None:
    """Micro-Manager computes the pixel size from objective and binning; it arrives with each frame."""
    demo.setProperty("Camera", "PixelType", "8bit")
    for objective, binning, expected_um, width in (
        ("Nikon 10X S Fluor", 1, 1.0, 512),
        ("Nikon 40X Plan Fluor ELWD", 2, 0.5, 256),
        ("Objective-2", 1, None, 512),  # no pixel size is defined for it
    ):
        demo.setProperty("Camera", "Binning", binning)
        demo.setStateLabel("Objective", objective)
        (result,) = results_of(demo)
        assert result.segmentation is not None
        assert result.segmentation.labels.shape == (width, width)
        found = result.segmentation.pixel_size_m
        assert found == (None if expected_um is None else pytest.approx(expected_um * 1e-6)), objective
    demo.setProperty("Camera", "Binning", 1)


def test_demo_camera_pixel_types(demo: Any) -> None:
    for kind in ("16bit", "32bitRGB", "64bitRGB", "32bit"):
        demo.setProperty("Camera", "PixelType", kind)
        (result,) = results_of(demo)
        if kind == "32bit":
            assert result.segmentation is None
            assert "uint32" in str(result.error)
        else:
            assert result.error is None
            assert result.segmentation is not None
            assert result.segmentation.labels.shape == (512, 512)
    demo.setProperty("Camera", "PixelType", "8bit")


def test_channels_and_snapped_frames_of_the_demo_microscope(demo: Any) -> None:
    """One frame per channel, each commanded on its own (no hardware sequence)."""
    demo.setProperty("Camera", "PixelType", "8bit")
    found = results_of(demo, 2, channels=["DAPI", "FITC"])
    assert [result.tag.index for result in found] == [
        {"t": 0, "c": 0}, {"t": 0, "c": 1}, {"t": 1, "c": 0}, {"t": 1, "c": 1}
    ]  # fmt: skip
    assert [result.tag.event.channel.config for result in found] == ["DAPI", "FITC"] * 2


def test_grey_stored_as_rgb_comes_back_exactly_and_an_unknown_pixel_size_stays_unknown() -> None:
    grey = frames(1)[0]
    core = replay_core([np.repeat(grey[..., None], 3, axis=2)])
    try:
        assert core.getPixelSizeUm() == 0.0
        (result,) = results_of(core)
    finally:
        core.unloadAllDevices()
    assert result.segmentation is not None
    assert np.array_equal(result.segmentation.labels, toy_labels(grey))
    assert result.segmentation.pixel_size_m is None


def test_acquisition_goes_on_whatever_happens_here(core: Any, caplog: pytest.LogCaptureFixture) -> None:
    """An error of ours does not reach the signal: with psygnal it would hide the frame from later listeners."""

    class Broken:
        def submit(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("boom")

    seen: list[Any] = []
    feed = MicroManagerFeed(core, Broken())  # type: ignore[arg-type]
    with feed:
        on_emitting_thread(core.mda.events.frameReady, lambda image, event, metadata: seen.append(event))
        run(core, 4)
    assert len(seen) == 4
    assert (feed.errors, feed.last_error) == (4, "RuntimeError: boom")
    assert feed.submit(np.zeros((4, 4), np.uint8)) is None
    ours = [record for record in caplog.records if record.name.startswith("hpddrnet_trt")]
    assert len(ours) == 1  # said once, counted always


def test_connecting_twice_and_disconnecting(core: Any) -> None:
    with open_stream() as stream:
        feed = MicroManagerFeed(core, stream)
        feed.connect().connect()
        run(core, 2)
        assert stream.statistics().submitted == 2
        feed.disconnect()
        feed.disconnect()
        run(core, 2)
        assert stream.statistics().submitted == 2
        feed.connect()
        del feed  # one that nobody keeps stays connected
        gc.collect()
        run(core, 1)
        assert stream.statistics().submitted == 3


def test_the_acquisition_does_not_wait_for_a_slow_model(core: Any) -> None:
    """40 frames with a model that is still busy with its first when the MDA is through, and accounts balance."""
    go_on = threading.Event()

    class Slow(ToyEngine):
        def infer(self, images: npt.NDArray[Any]) -> Any:
            go_on.wait(60)
            return super().infer(images)

    with Stream(lambda: Segmenter(Slow()), policy="latest", nice=0) as stream:
        stream.wait_ready(10)
        with MicroManagerFeed(core, stream):
            run(core, 40)
        busy = stream.statistics()
        go_on.set()
        stream.close()
        counts = stream.statistics()
    assert (busy.submitted, busy.processed) == (40, 0)
    assert counts.submitted == 40
    assert counts.submitted == counts.processed + counts.dropped + counts.failed + counts.pending
    assert counts.dropped > 0
    assert counts.processed >= 1


def test_a_frame_is_copied_before_other_listeners_touch_it(core: Any) -> None:
    found: list[StreamResult] = []
    with open_stream(on_result=found.append) as stream, MicroManagerFeed(core, stream):

        def paint(image: npt.NDArray[Any], event: Any, metadata: Any) -> None:
            image[:] = 0

        on_emitting_thread(core.mda.events.frameReady, paint)
        run(core, 1)
        core.mda.events.frameReady.disconnect(paint)
    assert found[0].segmentation is not None
    assert np.array_equal(found[0].segmentation.labels, toy_labels(frames()[0]))


def test_frames_of_a_live_view_are_handed_over_by_who_shows_it(core: Any) -> None:
    found: list[StreamResult] = []
    with open_stream(on_result=found.append) as stream:
        feed = MicroManagerFeed(core, stream)
        core.startContinuousSequenceAcquisition(0)
        wait_until(core.getRemainingImageCount, 5)
        assert feed.submit(core.getLastImage(), tag="live") == 1
        core.stopSequenceAcquisition()
    assert found[0].tag == "live"
    assert found[0].segmentation is not None
    assert found[0].segmentation.pixel_size_m == pytest.approx(5e-9)


def test_replayed_frames_are_all_alike() -> None:
    with pytest.raises(UsageError, match="all of the same shape"):
        replay_core([np.zeros((4, 4), np.uint8), np.zeros((4, 5), np.uint8)])
    with pytest.raises(UsageError, match="at least one"):
        replay_core([])


QT_PROGRAM = """
    import sys, threading
    import numpy as np
    from PySide6.QtCore import QCoreApplication
    from hpddrnet_trt.integrations.micromanager import MicroManagerFeed, replay_core
    from useq import MDASequence

    class Recorder:
        def __init__(self):
            self.threads = []
        def submit(self, frame, tag, copy):
            self.threads.append(threading.current_thread())

    def main():
        application = QCoreApplication([])
        core, recorder = replay_core([np.zeros((8, 8), np.uint8)]), Recorder()
        assert type(core.mda.events).__name__ == "QMDASignaler"
        feed = MicroManagerFeed(core, recorder).connect()
        acquisition = core.run_mda(MDASequence(time_plan={"interval": 0, "loops": 3}))
        acquisition.join()  # the window is busy: no Qt event is processed
        assert recorder.threads == [acquisition] * 3, recorder.threads
        feed.disconnect()
        core.run_mda(MDASequence(time_plan={"interval": 0, "loops": 3}), block=True)
        application.processEvents()
        assert len(recorder.threads) == 3
        core.unloadAllDevices()

    main()
"""


def test_in_a_qt_program_frames_do_not_wait_for_the_window() -> None:
    pytest.importorskip("PySide6")
    pytest.importorskip("qtpy")
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(QT_PROGRAM)],
        cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "QT_QPA_PLATFORM": "offscreen", "QT_API": "pyside6"},
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
