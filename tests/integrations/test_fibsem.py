"""Against the real OpenFIBSEM: its simulated microscope and its own feature detection."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpddrnet_trt.core.errors import ContractError, UsageError
from hpddrnet_trt.integrations.fibsem import (
    FEATURE_CLASSES,
    FibsemSegmentationModel,
    FrameTag,
    LiveSegmentation,
    pixel_size_m,
    replay_microscope,
)
from hpddrnet_trt.stream import Stream, StreamResult
from tests.integrations.live import open_stream, toy_labels, toy_segmenter, wait_until
from tests.toy import grey_image, manifest, write_toy_onnx

pytest.importorskip("fibsem")

from fibsem.detection import detection
from fibsem.structures import BeamType, FibsemImage, Point

PIXEL_M = 1e-8
PICTURES = [grey_image(40, 56, seed=number) for number in range(3)]
CLASS_MAP = {"grain": 0, "pore": 1, "clay": 2}  # dark: background, middle: lamella, bright: manipulator


@pytest.fixture(autouse=True)
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIBSEM_SIM_NO_DELAY", "1")


@pytest.fixture
def microscope(tmp_path: Path) -> Iterator[Any]:
    made = replay_microscope(PICTURES, tmp_path, pixel_size_m=PIXEL_M)
    yield made
    made.stop_acquisition()


def acquire(microscope: Any, enough: Callable[[], bool], beam: BeamType = BeamType.ELECTRON) -> None:
    microscope.start_acquisition(beam)
    wait_until(enough)
    microscope.stop_acquisition()
    wait_until(lambda: not microscope.is_acquiring)


class Recorder:
    """Another subscriber, as a viewer would be; keeps its own copies."""

    def __init__(self) -> None:
        self.frames: dict[float, np.ndarray] = {}
        self.threads: set[int] = set()

    def take(self, image: FibsemImage) -> None:
        self.frames[image.metadata.microscope_state.timestamp] = image.data.copy()
        self.threads.add(threading.get_ident())


# --- live ---


def test_results_equal_those_of_the_same_frames_with_pixel_size_beam_and_time(microscope: Any) -> None:
    results: list[StreamResult] = []
    recorder = Recorder()
    microscope.sem_acquisition_signal.connect(recorder.take)
    started = time.time()
    with open_stream(policy="latest", on_result=results.append) as stream:
        with LiveSegmentation(stream, microscope) as live:
            acquire(microscope, lambda: len(results) >= 5)
        assert stream.close(drain=True)
        statistics = stream.statistics()
    assert live.errors == 0
    assert statistics.submitted == len(recorder.frames)
    assert statistics.submitted == statistics.processed + statistics.dropped + statistics.failed + statistics.pending
    assert statistics.failed == 0
    for result in results:
        assert isinstance(result.tag, FrameTag)
        assert result.tag.beam == "electron"
        assert result.tag.acquired_s is not None
        assert started <= result.tag.acquired_s <= time.time()
        assert result.segmentation is not None
        assert result.segmentation.pixel_size_m == pytest.approx(PIXEL_M, rel=1e-9)
        frame = recorder.frames[result.tag.acquired_s]
        np.testing.assert_array_equal(result.segmentation.labels, toy_labels(frame))
    # fibsem resizes what it replays, here to the same size: within a grey level, and in turn.
    for number, frame in enumerate(recorder.frames.values()):
        assert np.abs(frame.astype(int) - PICTURES[number % 3]).max() <= 1
    assert recorder.threads == {next(iter(recorder.threads))}
    assert threading.get_ident() not in recorder.threads  # slots run on the acquisition thread


def test_the_ion_beam_has_its_own_signal(microscope: Any) -> None:
    results: list[StreamResult] = []
    with open_stream(policy="latest", on_result=results.append) as stream:
        with LiveSegmentation(stream, microscope, beams=("electron", "ion")):
            acquire(microscope, lambda: bool(results), BeamType.ION)
        with LiveSegmentation(stream, microscope):
            before = stream.statistics().submitted
            microscope.fib_acquisition_signal.emit(microscope.last_image(BeamType.ION))
            assert stream.statistics().submitted == before  # only the electron beam was asked for
    assert {result.tag.beam for result in results} == {"ion"}


def test_connecting_twice_takes_each_frame_once_and_disconnecting_ends_it(microscope: Any) -> None:
    """So does letting go: psygnal holds slots weakly, and that must not depend on the garbage collector's mood."""
    image = microscope.acquire_image(beam_type=BeamType.ELECTRON)
    with Stream(toy_segmenter) as stream:
        live = LiveSegmentation(stream, microscope)
        live.connect()
        live.connect()
        microscope.sem_acquisition_signal.emit(image)
        assert stream.statistics().submitted == 1
        live.disconnect()
        live.disconnect()
        microscope.sem_acquisition_signal.emit(image)
        assert stream.statistics().submitted == 1
        live.connect()
        del live
        microscope.sem_acquisition_signal.emit(image)
        assert stream.statistics().submitted == 1


@pytest.mark.parametrize("state", ["failed", "closed"])
def test_acquisition_goes_on_when_the_stream_does_not(microscope: Any, state: str) -> None:
    recorder = Recorder()
    stream = Stream((lambda: 1 / 0) if state == "failed" else toy_segmenter)  # type: ignore[arg-type,return-value]
    stream.wait_ready(10)
    if state == "closed":
        stream.close()
    with LiveSegmentation(stream, microscope) as live:
        microscope.sem_acquisition_signal.connect(recorder.take)
        acquire(microscope, lambda: len(recorder.frames) >= 5)
    assert stream.statistics().state.value.lower() == state
    assert live.errors == 0  # a stream that takes nothing is its own affair
    stream.close()


@pytest.mark.parametrize("pictures", [[], [np.zeros((4, 4), np.uint8), np.zeros((4, 5), np.uint8)], [np.zeros((4, 4))]])
def test_pictures_that_cannot_be_replayed_are_refused(pictures: list[np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="8-bit pictures of one size"):
        replay_microscope(pictures, tmp_path)


def test_a_microscope_without_the_signal_or_an_unknown_beam_is_refused() -> None:
    with Stream(toy_segmenter) as stream:
        for beam, message in (("electron", "SimpleNamespace has no sem_acq"), ("laser", "unknown beam 'laser'")):
            with pytest.raises(UsageError, match=message):
                LiveSegmentation(stream, SimpleNamespace(), beams=(beam,))  # type: ignore[arg-type]


class Trap:
    """Raises whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        raise ValueError(f"no {name} today")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "image",
    [
        None, 7, "image", Trap(), SimpleNamespace(data=None), SimpleNamespace(data=Trap(), metadata=Trap()),
        SimpleNamespace(data=np.zeros((0, 4), np.uint8)), SimpleNamespace(data=np.zeros((4, 4, 4), np.uint8)),
        SimpleNamespace(data=np.full((8, 8), np.nan), metadata=SimpleNamespace(pixel_size=SimpleNamespace(x="a", y=1))),
        SimpleNamespace(data=np.zeros((8, 8), complex), metadata=SimpleNamespace(pixel_size=None)),
    ],
    ids=range(10),
)  # fmt: skip
def test_whatever_arrives_nothing_is_raised_and_the_stream_goes_on(image: Any, microscope: Any) -> None:
    results: list[StreamResult] = []
    with open_stream(on_result=results.append) as stream:
        with LiveSegmentation(stream, microscope) as live:
            microscope.sem_acquisition_signal.emit(image)
            microscope.sem_acquisition_signal.emit(microscope.acquire_image(beam_type=BeamType.ELECTRON))
        assert stream.close(drain=True)
        statistics = stream.statistics()
    assert results[-1].segmentation is not None
    assert statistics.processed == 1
    assert live.errors + statistics.failed + statistics.dropped == 1
    assert (live.last_error is not None) == (live.errors == 1)


@given(st.floats(), st.floats())
def test_pixel_size_is_metres_or_unknown(x: float, y: float) -> None:
    size = pixel_size_m(SimpleNamespace(metadata=SimpleNamespace(pixel_size=Point(x, y))))
    if size is None:
        assert not (x > 0 and y > 0 and math.isfinite(x) and math.isfinite(y)) or abs(x - y) > 0.99e-3 * x
    else:
        assert size == x > 0
        assert y == pytest.approx(x, rel=1.01e-3)
    assert pixel_size_m(SimpleNamespace(metadata=None)) is None


# --- feature detection ---


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_toy_onnx(tmp_path / "toy.onnx", manifest())


@pytest.fixture
def model(checkpoint: Path) -> Iterator[FibsemSegmentationModel]:
    with FibsemSegmentationModel(checkpoint, CLASS_MAP, engine="onnxruntime") as made:
        yield made


def lamella_and_needle() -> np.ndarray:
    """A grey lamella at rows 120..159, columns 100..179, and a bright needle from the left, its tip at column 70."""
    image = np.full((192, 256), 20, np.uint8)
    image[120:160, 100:180] = 120
    image[60:68, :71] = 235
    return image


def test_detect_features_finds_what_is_there(model: FibsemSegmentationModel) -> None:
    image = FibsemImage.generate_blank_image((256, 192), hfw=256 * PIXEL_M)
    image.data = lamella_and_needle()
    features = [detection.NeedleTip(), detection.LamellaCentre(), detection.LamellaRightEdge()]
    model.check_features(features)
    found = detection.detect_features(image, model, features, pixelsize=pixel_size_m(image), point=Point(140, 140))
    assert isinstance(found, detection.DetectedFeatures)
    assert found.checkpoint == model.checkpoint
    tip, centre, edge = found.features
    # The model looks at 3x3 means, so outlines may be off by a pixel; fibsem rounds contours by another.
    assert (tip.px.x, tip.px.y) == (pytest.approx(70, abs=1), pytest.approx(63.5, abs=1))
    assert (centre.px.x, centre.px.y) == (pytest.approx(139.5, abs=2), pytest.approx(139.5, abs=2))
    assert edge.px.x == pytest.approx(179, abs=2)
    # Metres from the middle of the image, up is positive.
    assert tip.feature_m.x == pytest.approx((tip.px.x - 128) * PIXEL_M)
    assert tip.feature_m.y == pytest.approx((96 - tip.px.y) * PIXEL_M)
    assert found.distance.x == pytest.approx((centre.px.x - tip.px.x) * PIXEL_M)
    assert found.mask.shape == (192, 256)
    assert set(np.unique(found.mask)) == {0, 1, 2}
    assert found.rgb.shape == (192, 256, 3)
    assert tuple(found.rgb[140, 140]) == (255, 0, 0)  # fibsem draws lamella red


def test_masks_and_colours(model: FibsemSegmentationModel) -> None:
    image = lamella_and_needle()
    mask = model.inference(image, rgb=False)
    assert (mask.dtype, mask.shape) == (np.uint8, (1, 192, 256))
    np.testing.assert_array_equal(mask[0], model.segmenter.segment(image).labels)  # numbers as the model's own
    coloured = model.inference(image)
    assert (coloured.dtype, coloured.shape) == (np.uint8, (192, 256, 3))
    assert tuple(coloured[63, 10]) == (0, 128, 0)
    assert tuple(coloured[0, 0]) == (0, 0, 0)
    both = np.stack([image, image[::-1]])
    np.testing.assert_array_equal(model.inference(both, rgb=False)[1, ::-1], mask[0])
    assert model.inference(both).shape == (2, 192, 256, 3)
    np.testing.assert_array_equal(model.postprocess(mask[0], model.num_classes), coloured)
    assert model.num_classes == 3
    assert "onnxruntime" in model.device
    with pytest.raises(ContractError, match=r"\[H, W\]"):
        model.inference(np.zeros(5, np.uint8))


def test_classes_go_to_their_numbers(checkpoint: Path) -> None:
    with FibsemSegmentationModel(checkpoint, {"clay": 5, "pore": 5, "grain": 4}, engine="onnxruntime") as model:
        mask = model.inference(lamella_and_needle(), rgb=False)[0]
        assert (mask[0, 0], mask[140, 140], mask[63, 10]) == (4, 5, 5)
        assert model.num_classes == 6


@pytest.mark.parametrize(
    ("class_map", "says"),
    [
        ({"grain": 0, "pore": 1}, "its class 'clay' has no number"),
        ({**CLASS_MAP, "needle": 2}, "it has no class 'needle'"),
        ({**CLASS_MAP, "clay": -1}, "maps 'clay' to -1; fibsem's classes are numbered 0 to"),
        ({**CLASS_MAP, "clay": 200}, "maps 'clay' to 200"),
        ({**CLASS_MAP, "clay": 1.5}, "maps 'clay' to 1.5"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(checkpoint: Path, class_map: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        FibsemSegmentationModel(checkpoint, class_map, engine="onnxruntime")


def test_a_refused_model_leaves_the_old_one_and_a_closed_one_says_so(
    model: FibsemSegmentationModel, tmp_path: Path
) -> None:
    classes = [{"name": name, "color": [0, 0, 0]} for name in ("a", "b", "c")]
    other = write_toy_onnx(tmp_path / "other.onnx", manifest(classes=classes))
    before = model.checkpoint
    with pytest.raises(UsageError, match="it has no class 'grain'"):
        model.load_model(other)
    assert model.checkpoint == before
    assert model.inference(lamella_and_needle(), rgb=False).any()
    model.close()
    model.close()
    with pytest.raises(UsageError, match="is closed; call load_model"):
        model.inference(lamella_and_needle())


def test_features_whose_class_the_model_lacks_are_refused(model: FibsemSegmentationModel) -> None:
    model.check_features([detection.ImageCentre(), detection.NeedleTip(), detection.CoreFeature()])
    with pytest.raises(UsageError, match="VolumeBlockCentre is found by class 5 of fibsem, and no class of model"):
        model.check_features([detection.LamellaCentre(), detection.VolumeBlockCentre()])
    with pytest.raises(UsageError, match="str is not a feature"):
        model.check_features(["NeedleTip"])


class FixedMask:
    """A model that answers with one mask."""

    checkpoint, num_classes = "fixed", 6

    def __init__(self, number: int) -> None:
        self.mask = np.zeros((1, 96, 128), np.uint8)
        self.mask[0, 33:66, 48:84] = number

    def inference(self, img: np.ndarray, rgb: bool = True) -> np.ndarray:
        return self.mask

    def postprocess(self, masks: np.ndarray, nc: int) -> np.ndarray:
        return np.zeros((*masks.shape[1:], 3), np.uint8)


def test_the_table_says_which_class_each_feature_looks_for() -> None:
    """By trying: the answer of fibsem differs from that for an empty mask for this class alone."""
    image = np.zeros((96, 128), np.uint8)
    wanted = {}
    for feature in detection.__FEATURES__:
        found = [detection.detect_features(image, FixedMask(number), [feature()]).features[0] for number in range(6)]
        answers = [(float(entry.px.x), float(entry.px.y)) for entry in found]
        wanted[feature.__name__] = [number for number in range(6) if answers[number] != answers[0]]
    assert wanted == {name: [] if needed is None else [needed] for name, needed in FEATURE_CLASSES.items()}


def test_no_pytorch_is_needed(checkpoint: Path, tmp_path: Path) -> None:
    """In a fresh interpreter in which torch cannot be imported."""
    script = tmp_path / "without_torch.py"
    script.write_text(
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np\n"
        "from fibsem.detection import detection\n"
        "from hpddrnet_trt.integrations.fibsem import FibsemSegmentationModel\n"
        f"model = FibsemSegmentationModel({str(checkpoint)!r}, {CLASS_MAP!r}, engine='onnxruntime')\n"
        "image = np.full((64, 64), 20, np.uint8); image[20:40, :31] = 230\n"
        "(tip,) = detection.detect_features(image, model, [detection.NeedleTip()], pixelsize=1e-8).features\n"
        "assert abs(tip.px.x - 30) <= 1, tip\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
