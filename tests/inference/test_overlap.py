"""Reading ahead, writing behind, and many images in flight: order, errors, bounds, and threads that end."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.manifest import AxisRange, InputContract
from hpddrnet_trt.data import labels
from hpddrnet_trt.engines.base import Prediction
from hpddrnet_trt.inference import Segmenter
from hpddrnet_trt.inference.files import FileSegmenter, ResultSettings
from hpddrnet_trt.inference.folder import segment_paths
from hpddrnet_trt.inference.overlap import AHEAD, WRITERS, Held, ReadAhead, WriteBehind
from hpddrnet_trt.inference.result import Segmentation
from tests.interrupts import deliver
from tests.toy import ToyEngine, grey_image, manifest


class Pipelined(ToyEngine):
    """Keeps up to three batches in flight, as an engine with several requests does; ``broken`` ones fail."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.most = 0
        self.broken: set[int] = set()  # numbers of batches, counted from 0
        self.error: BaseException = UserError("the engine failed")

    def infer_many(self, batches: Iterable[npt.NDArray[Any]]) -> Iterator[Prediction]:
        waiting: list[npt.NDArray[Any]] = []
        for number, batch in enumerate(batches):
            if number in self.broken:
                self.broken.discard(number)
                raise self.error
            waiting.append(batch)
            self.most = max(self.most, len(waiting))
            if len(waiting) == 3:
                yield self.infer(waiting.pop(0))
        yield from map(self.infer, waiting)


def _folder(folder: Path, count: int) -> Path:
    folder.mkdir()
    for index in range(count):
        cv2.imwrite(str(folder / f"{index:02d}.png"), grey_image(20 + index % 3, 30, index))
    return folder


def _names(folder: Path) -> list[str]:
    return [json.loads(line)["name"] for line in (folder / "segmentations.jsonl").read_text().splitlines()]


IMAGES = [grey_image(20 + index % 3, 30, index) for index in range(9)]


def _labels(results: Iterable[Any]) -> list[npt.NDArray[np.uint8]]:
    found = list(results)
    assert all(isinstance(result, Segmentation) for result in found), found
    return [result.labels for result in found]


@pytest.mark.parametrize(
    ("output", "options"),
    [
        *itertools.product(("labels", "logits"), ({}, {"tile": 16}, {"resize": (40, 20)})),
        ("logits", {"mode": "flip"}),
        ("logits", {"confidence": True}),
    ],
)
def test_many_give_what_each_gives(output: str, options: dict[str, Any]) -> None:
    engine = Pipelined(manifest(output))
    segmenter = Segmenter(engine, **options)
    results = list(segmenter.segment_many(iter(IMAGES)))
    for found, image in zip(results, IMAGES, strict=True):
        assert isinstance(found, Segmentation)
        alone = segmenter.segment(image)
        np.testing.assert_array_equal(found.labels, alone.labels)
        assert found.labels.flags.c_contiguous
        assert (found.confidence is None) == (alone.confidence is None)
        if alone.confidence is not None:
            np.testing.assert_array_equal(found.confidence, alone.confidence)
    assert engine.most == (3 if "mode" not in options else 0)


def test_a_fixed_batch_is_filled_with_equal_sizes_only() -> None:
    axis = AxisRange(minimum=8)
    contract = InputContract(batch=AxisRange(minimum=2, maximum=2), height=axis, width=axis)
    engine = Pipelined(manifest("logits", input=contract))
    images = [grey_image(16 if index < 3 else 24, 32, index) for index in range(7)]
    for found, image in zip(_labels(Segmenter(engine).segment_many(images)), images, strict=True):
        np.testing.assert_array_equal(found, Segmenter(ToyEngine()).segment(image).labels)


def test_a_bad_image_gives_its_error_in_its_place() -> None:
    bad = np.full((20, 30), np.nan, np.float32)
    found = list(Segmenter(Pipelined()).segment_many([IMAGES[0], IMAGES[3], bad, IMAGES[6], np.zeros((3, 3, 2))]))
    assert [isinstance(result, Segmentation) for result in found] == [True, True, False, True, False]
    assert "no finite value" in str(found[2])


@pytest.mark.parametrize("error", [UserError("the engine failed"), MemoryError()])
def test_an_inference_that_fails_is_done_again_alone(error: BaseException) -> None:
    engine = Pipelined()
    engine.broken, engine.error = {4}, error
    alone = [Segmenter(ToyEngine()).segment(image).labels for image in IMAGES]
    for found, expected in zip(_labels(Segmenter(engine).segment_many(IMAGES)), alone, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert not engine.broken


def test_an_image_that_always_fails_does_not_stop_the_others() -> None:
    class Poisoned(Pipelined):
        def infer(self, images: Any) -> Prediction:
            if images.max() == 0:
                raise UserError("not this one")
            return super().infer(images)

    images = [*IMAGES[:4], np.zeros((20, 30), np.uint8), *IMAGES[4:]]
    found = list(Segmenter(Poisoned()).segment_many(images))
    assert [type(result).__name__ for result in found] == ["Segmentation"] * 4 + ["UserError"] + ["Segmentation"] * 5


def test_what_the_source_raises_comes_through() -> None:
    def source() -> Iterator[Any]:
        yield from IMAGES[:4]
        raise UserError("the source is broken")

    with pytest.raises(UserError, match="source is broken"):
        list(Segmenter(Pipelined()).segment_many(source()))


def _ended(name: str) -> bool:
    deadline = time.monotonic() + 5
    while any(thread.name.startswith(name) for thread in threading.enumerate()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_reading_ahead_is_bounded_and_in_order() -> None:
    read: list[int] = []

    def reader(item: int) -> tuple[int, int]:
        read.append(item)
        return item, 10

    held = Held(limit=60)
    with ReadAhead(reader, range(20), held) as ahead:
        source = iter(ahead)
        assert next(source) == 0
        time.sleep(0.1)
        assert read == [0, 1, 2]  # half of the room
        assert [next(source), next(source), next(source)] == [1, 2, 3]  # what is waited for comes all the same
        held.add(-40)
        time.sleep(0.1)
        assert read == list(range(7))
    assert _ended("read ahead")
    with ReadAhead(lambda item: (item, 0), range(50), Held()) as ahead:
        source = iter(ahead)
        next(source)
        time.sleep(0.1)
        assert list(source) == list(range(1, 50))
    read.clear()
    with ReadAhead(lambda item: (read.append(item), 0), range(50), Held()):
        time.sleep(0.1)
    assert len(read) == AHEAD


def test_a_fault_of_the_reader_comes_out_after_what_was_read() -> None:
    def reader(item: int) -> tuple[int, int]:
        if item == 2:
            raise ZeroDivisionError
        return item, 1

    with ReadAhead(reader, range(9), Held()) as ahead:
        source = iter(ahead)
        assert [next(source), next(source)] == [0, 1]
        with pytest.raises(ZeroDivisionError):
            next(source)


def test_writing_behind_is_in_order_and_bounded_and_ends() -> None:
    done: list[int] = []
    gate, held = threading.Event(), Held()
    held.add(10)

    def job(number: int) -> int:
        if number == 0:
            gate.wait(5)
        return number

    with WriteBehind(done.append, held) as behind:
        for number in range(2 * WRITERS):
            behind.put(lambda number=number: job(number), 1)
        assert done == []  # the first is under way
        gate.set()
        behind.put(lambda: job(99), 1)
    assert done == [*range(2 * WRITERS), 99]
    assert held.pixels == 10 - 2 * WRITERS - 1
    assert _ended("write behind")


def test_a_picture_that_fills_the_room_is_written_before_the_next() -> None:
    done: list[int] = []
    held = Held(limit=100)
    with WriteBehind(done.append, held) as behind:
        for number in range(3):
            held.add(100)
            behind.put(lambda number=number: number, 100)
            assert done == list(range(number + 1))


def test_writing_ends_also_after_an_error() -> None:
    done: list[int] = []
    with pytest.raises(ZeroDivisionError), WriteBehind(done.append, Held()) as behind:  # noqa: PT012
        for number in range(3):
            behind.put(lambda number=number: number, 1)
        raise ZeroDivisionError
    assert done == [0, 1, 2]
    assert _ended("write behind")


def test_a_folder_is_segmented_as_one_by_one(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "in", 12)
    (folder / "04.png").write_bytes(b"broken")
    (folder / "11.png").write_bytes(b"")
    engine, out = Pipelined(), tmp_path / "out"
    engine.broken = {6}
    summary = segment_paths(Segmenter(engine), folder, out, progress=False)
    assert engine.most == 3
    assert [path.name for path, _ in summary.failed] == ["04.png", "11.png"]
    expected = [f"{index:02d}" for index in range(12) if index not in (4, 11)]
    assert _names(out) == expected == [path.stem for path in summary.written]
    one_by_one = FileSegmenter(Segmenter(ToyEngine()), tmp_path / "alone")
    for name in expected:
        one_by_one.segment(one_by_one.task(folder / f"{name}.png", name))
        for file in (f"{name}.png", f"overlays/{name}.png"):
            with Image.open(out / file) as found, Image.open(tmp_path / "alone" / file) as alone:
                np.testing.assert_array_equal(np.asarray(found), np.asarray(alone))
    again = segment_paths(Segmenter(Pipelined()), folder, out, progress=False)
    assert (len(again.written), len(again.skipped), len(again.failed)) == (0, 10, 2)
    assert _ended("read ahead")
    assert _ended("write behind")


def test_ctrl_c_writes_what_is_segmented_and_no_more(tmp_path: Path) -> None:
    class Interrupted(Pipelined):
        def infer(self, images: Any) -> Prediction:
            if len(self.shapes) == 5:
                raise KeyboardInterrupt
            return super().infer(images)

    folder, out = _folder(tmp_path / "in", 30), tmp_path / "out"
    summary = segment_paths(Segmenter(Interrupted()), folder, out, progress=False)
    assert summary.interrupted
    assert _names(out) == [f"{index:02d}" for index in range(5)] == [path.stem for path in summary.written]
    assert sorted(path.name for path in out.glob("*.png")) == [f"{name}.png" for name in _names(out)]
    again = segment_paths(Segmenter(Pipelined()), folder, out, progress=False)
    assert (len(again.written), len(again.skipped), again.interrupted) == (25, 5, False)
    assert _ended("read ahead")


def test_a_disk_that_fills_up_fails_the_rest_and_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = _folder(tmp_path / "in", 6), tmp_path / "out"
    real = labels.write_label_png

    def full(path: Any, *arguments: Any, **options: Any) -> Path:
        if Path(path).stem > "02":
            raise UserError(f"cannot write {path}: No space left on device")
        return real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("hpddrnet_trt.data.labels.write_label_png", full)
        summary = segment_paths(Segmenter(Pipelined()), folder, out, ResultSettings(overlay=False), progress=False)
    assert [path.stem for path, _ in summary.failed] == ["03", "04", "05"]
    assert _names(out) == ["00", "01", "02"]
    assert not [path for path in out.iterdir() if ".tmp" in path.name]
    again = segment_paths(Segmenter(Pipelined()), folder, out, ResultSettings(overlay=False), progress=False)
    assert (len(again.written), len(again.skipped)) == (3, 3)


def test_ctrl_c_during_bookkeeping_comes_afterwards() -> None:
    done: list[int] = []

    def note(number: int) -> None:
        deliver()
        done.append(number)

    with pytest.raises(KeyboardInterrupt), WriteBehind(note, Held()) as behind:  # noqa: PT012
        for number in range(4 * WRITERS):
            behind.put(lambda number=number: number, 1)
    assert done == list(range(len(done)))
    assert len(done) >= 1


def test_of_pictures_that_fill_the_room_one_is_held_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Told(FileSegmenter):
        def read(self, task: Any) -> Any:
            events.append(f"read {task.name}")
            return super().read(task)

        def write(self, task: Any, *arguments: Any) -> Any:
            written = super().write(task, *arguments)
            events.append(f"wrote {task.name}")
            return written

    monkeypatch.setattr("hpddrnet_trt.inference.folder.FileSegmenter", Told)
    monkeypatch.setattr("hpddrnet_trt.inference.folder.Held", partial(Held, limit=600))
    folder = _folder(tmp_path / "in", 4)
    assert len(segment_paths(Segmenter(Pipelined(), tile=16), folder, tmp_path / "out", progress=False).written) == 4
    assert events == [f"{what} {index:02d}" for index in range(4) for what in ("read", "wrote")]
