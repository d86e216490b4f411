"""The watched folder with real threads that write files: slowly, in pieces, renamed, truncated, with sidecars."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image

from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError
from hpddrnet_trt.inference import Segmenter, watch
from hpddrnet_trt.inference.files import FileSegmenter, ResultSettings
from hpddrnet_trt.inference.folder import segment_paths
from hpddrnet_trt.inference.journal import Task
from hpddrnet_trt.inference.watch import Happened, WatchEvent, WatchSettings, WatchSummary, stop_on_signal, watch_folder
from tests.interrupts import deliver
from tests.toy import ToyEngine, grey_image, manifest, write_toy_onnx

REPOSITORY = Path(__file__).resolve().parents[2]
QUICK: dict[str, Any] = {"settle_s": 0.3, "patience_s": 1.0, "poll_s": 0.02}


def tiff(seed: int = 0) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, grey_image(40, 60, seed), rowsperstrip=4)
    return stream.getvalue()


def toy() -> Segmenter:
    return Segmenter(ToyEngine(manifest("logits")))


def labels_of(path: Path) -> npt.NDArray[np.uint8]:
    with Image.open(path) as picture:
        return np.asarray(picture)


def expected(seed: int) -> npt.NDArray[np.uint8]:
    return toy().segment(grey_image(40, 60, seed)).labels


def watching(
    segmenter: Segmenter, folder: Path, output: Path, results: ResultSettings = ResultSettings(),
    on_event: Callable[[WatchEvent], None] | None = None, stop: threading.Event | None = None, **settings: Any,
) -> WatchSummary:  # fmt: skip
    """:func:`watch_folder` with its settings by name."""
    return watch_folder(segmenter, folder, output, results, WatchSettings(**settings), on_event=on_event, stop=stop)


class Clock:
    """Seconds that pass by looking at them, so that a busy machine changes nothing; with ``tick`` 0 they stand."""

    def __init__(self) -> None:
        self.now, self.tick = 1000.0, 0.01

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=clock))
    return clock


class Watched:
    """A watch on a thread of its own, ended and checked on leaving the block."""

    def __init__(self, folder: Path, output: Path, segmenter: Segmenter | None = None, **options: Any) -> None:
        self.events: list[WatchEvent] = []
        self.stop = threading.Event()
        self.summary: WatchSummary | None = None
        self._arguments = (segmenter or toy(), folder, output)
        self._options = {**QUICK, "on_event": self.events.append, "stop": self.stop, **options}
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self.summary = watching(*self._arguments, **self._options)

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def told(self) -> list[tuple[str, str]]:
        return [(event.path.name, event.happened.value) for event in self.events]

    def wait_for(self, *happened: tuple[str, Happened]) -> None:
        """Until all of these were told."""
        until = time.monotonic() + 60
        while not {(name, what.value) for name, what in happened} <= set(self.told()):
            assert time.monotonic() < until, self.told()
            assert self._thread.is_alive(), self.told()
            time.sleep(0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def once(folder: Path, output: Path, segmenter: Segmenter | None = None, **options: Any) -> WatchSummary:
    """What is there now, and nothing else."""
    return watching(segmenter or toy(), folder, output, **{**QUICK, "settle_s": 0, "stop_after_s": 0, **options})


def test_files_that_grow_in_pieces_are_taken_when_they_are_whole(folder: Path, tmp_path: Path, clock: Clock) -> None:
    """Four writers at once; two of them set the size aside first, as some acquisition programs do. One more file is
    renamed into place, and one saved again under its name."""

    def write(seed: int) -> None:
        content = tiff(seed)
        with (folder / f"{seed}.tif").open("wb") as stream:
            if seed % 2:
                stream.truncate(len(content))
            for start in range(0, len(content), 400):
                stream.write(content[start : start + 400])
                stream.flush()
                time.sleep(0.02)

    clock.tick = 0
    with Watched(folder, tmp_path / "out") as watched:
        writers = [threading.Thread(target=write, args=(seed,)) for seed in range(4)]
        for writer in writers:
            writer.start()
        (folder / "4.tif.part").write_bytes(tiff(4))
        for writer in writers:
            writer.join()
        assert watched.told() == []
        (folder / "4.tif.part").rename(folder / "4.tif")
        clock.tick = 0.01
        watched.wait_for(*((f"{seed}.tif", Happened.SEGMENTED) for seed in range(5)))
        assert sorted(watched.told()) == [(f"{seed}.tif", "segmented") for seed in range(5)]
        watched.events.clear()
        (folder / "2.tif").write_bytes(tiff(7))
        watched.wait_for(("2.tif", Happened.SEGMENTED))
    for seed in range(5):
        assert np.array_equal(labels_of(tmp_path / "out" / f"{seed}.png"), expected(7 if seed == 2 else seed))


def test_results_are_those_of_segment(folder: Path, tmp_path: Path) -> None:
    for seed in range(3):
        (folder / f"{seed}.tif").write_bytes(tiff(seed))
    summary = once(folder, tmp_path / "watched", results=ResultSettings(write=("png", "tiff")))
    assert (summary.segmented, summary.already_done, summary.failed, summary.exit_code) == (3, 0, {}, 0)
    segment_paths(toy(), folder, tmp_path / "segmented", ResultSettings(write=("png", "tiff")), progress=False)
    for path in (tmp_path / "segmented").rglob("*.*"):
        twin = tmp_path / "watched" / path.relative_to(tmp_path / "segmented")
        assert twin.is_file(), path
        assert path.suffix != ".png" or np.array_equal(labels_of(path), labels_of(twin))
        assert path.suffix != ".csv" or path.read_text() == twin.read_text()
    again = segment_paths(toy(), folder, tmp_path / "watched", ResultSettings(write=("png", "tiff")), progress=False)
    assert len(again.skipped) == 3  # one continues where the other ended


def test_a_truncated_file_is_reported_after_patience_and_done_when_it_is_completed(
    folder: Path, tmp_path: Path, clock: Clock
) -> None:
    content = tiff(1)
    (folder / "cut.tif").write_bytes(content[: len(content) // 2])
    (folder / "good.tif").write_bytes(tiff(2))
    with Watched(folder, tmp_path / "out") as watched:
        watched.wait_for(("cut.tif", Happened.FAILED), ("good.tif", Happened.SEGMENTED))
        assert ("cut.tif", "waiting") in watched.told()
        told = len(watched.events)
        clock.now += 1000
        time.sleep(0.2)
        assert len(watched.events) == told  # not tried for ever
        (folder / "cut.tif").write_bytes(content)
        watched.wait_for(("cut.tif", Happened.SEGMENTED))
    assert [what for name, what in watched.told() if name == "cut.tif"] == ["waiting", "failed", "segmented"]
    assert watched.summary is not None
    assert watched.summary.failed == {}
    assert np.array_equal(labels_of(tmp_path / "out" / "cut.png"), expected(1))


def test_what_no_patience_mends_fails_at_once(folder: Path, tmp_path: Path, clock: Clock) -> None:
    class Faulty(ToyEngine):
        def infer(self, images: npt.NDArray[Any]) -> Any:
            if images.shape[-1] > 64:
                raise RuntimeError("CUDA error 700")
            return super().infer(images)

    values = np.full((20, 20), np.nan, np.float32)
    tifffile.imwrite(folder / "nan.tif", values)
    (folder / "text.png").write_text("not a picture")
    cv2.imwrite(str(folder / "wide.png"), grey_image(40, 90))
    (folder / "good.tif").write_bytes(tiff())
    events: list[WatchEvent] = []
    start = clock.now
    segmenter = Segmenter(Faulty(manifest("logits")))
    summary = once(folder, tmp_path / "out", segmenter, patience_s=0.5, on_event=events.append)
    assert clock.now - start >= 0.5  # for text.png, which might have become one
    told = [(event.path.name, event.happened.value) for event in events]
    assert [entry for entry in told if entry[0] == "nan.tif"] == [("nan.tif", "failed")]
    assert [entry for entry in told if entry[0] == "text.png"] == [("text.png", "waiting"), ("text.png", "failed")]
    reasons = {path.name: reason for path, reason in summary.failed.items()}
    assert set(reasons) == {"nan.tif", "text.png", "wide.png"}
    assert reasons["wide.png"] == "RuntimeError: CUDA error 700"
    assert (summary.segmented, summary.exit_code) == (1, 1)
    assert "no finite value" in str(summary)
    assert "text.png" in str(summary)


def test_a_restart_leaves_what_is_done_and_does_the_rest(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for seed in range(3):
        (folder / f"{seed}.tif").write_bytes(tiff(seed))
    assert once(folder, out).segmented == 3
    engine = ToyEngine(manifest("logits"))
    (folder / "3.tif").write_bytes(tiff(3))
    (folder / "0.tif").write_bytes(tiff(7))  # taken anew while nobody watched
    summary = once(folder, out, Segmenter(engine))
    assert (summary.segmented, summary.already_done) == (2, 2)
    assert len(engine.shapes) == 2
    assert np.array_equal(labels_of(out / "0.png"), expected(7))
    assert once(folder, out, results=ResultSettings(resume=False)).segmented == 4



@pytest.mark.parametrize("late", [False, True])
def test_a_sidecar_that_comes_after_its_image(folder: Path, tmp_path: Path, clock: Clock, late: bool) -> None:
    """Within the settling time it is waited for; later, the micrograph is segmented once more."""
    image = folder / "S1.tif"
    sidecar = "[SemImageFile]\nInstructName=SU8000\nPixelSize=4.96\nDataSize=60x40\n"

    def pixel_size() -> float | None:
        lines = (tmp_path / "out" / "segmentations.jsonl").read_text().splitlines()
        size = json.loads(lines[-1])["pixel_size_m"]
        assert size is None or isinstance(size, float)
        return size

    clock.tick = 0.01 if late else 0
    with Watched(folder, tmp_path / "out") as watched:
        image.write_bytes(tiff(1))
        if late:
            watched.wait_for(("S1.tif", Happened.SEGMENTED))
            assert pixel_size() is None
            watched.events.clear()
        else:
            time.sleep(0.1)
        (folder / "S1.txt").write_text(sidecar)
        clock.tick = 0.01
        watched.wait_for(("S1.tif", Happened.SEGMENTED))
    assert pixel_size() == pytest.approx(4.96e-9)
    assert watched.told() == [("S1.tif", "segmented")]


def test_a_folder_that_vanishes_is_told_and_waited_for(folder: Path, tmp_path: Path) -> None:
    (folder / "a.tif").write_bytes(tiff(1))
    with Watched(folder, tmp_path / "out", settle_s=0.0) as watched:
        watched.wait_for(("a.tif", Happened.SEGMENTED))
        folder.rename(tmp_path / "away")
        watched.wait_for(("in", Happened.FOLDER_LOST))
        (tmp_path / "away" / "b.tif").write_bytes(tiff(2))
        (tmp_path / "away").rename(folder)
        watched.wait_for(("in", Happened.FOLDER_BACK), ("b.tif", Happened.SEGMENTED))
    assert watched.told() == [("a.tif", "segmented"), ("in", "folder lost"), ("in", "folder back"),
                              ("b.tif", "segmented")]  # fmt: skip
    lost = next(event for event in watched.events if event.happened is Happened.FOLDER_LOST)
    assert lost.reason == "No such file or directory"


def test_results_that_cannot_be_written_for_a_while(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk: tried again while patience lasts."""
    (folder / "a.tif").write_bytes(tiff(1))
    real, full = FileSegmenter.segment, [True]

    def segment(work: FileSegmenter, task: Task) -> Any:
        if full[0]:
            raise UserError(f"cannot write {task.name}: No space left on device; free some space")
        return real(work, task)

    monkeypatch.setattr(FileSegmenter, "segment", segment)
    with Watched(folder, tmp_path / "out", settle_s=0.0, patience_s=1e6) as watched:
        watched.wait_for(("a.tif", Happened.WAITING))
        full[0] = False
        watched.wait_for(("a.tif", Happened.SEGMENTED))
    assert "No space left" in str(watched.events[0].reason)


def test_stopping_ends_after_the_image_under_way(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def locked(work: FileSegmenter) -> Path:
        raise PermissionError(13, "Permission denied", str(work.folder / "fractions.csv"))

    class Moving(ToyEngine):
        def infer(self, images: npt.NDArray[Any]) -> Any:
            (folder / "late.tif").unlink(missing_ok=True)  # the user tidies up, which is nobody's failure
            return super().infer(images)

    (folder / "first.tif").write_bytes(tiff())
    (folder / "late.tif").write_bytes(tiff())
    os.utime(folder / "first.tif", ns=(0, 0))
    with monkeypatch.context() as patch:
        patch.setattr(FileSegmenter, "write_table", locked)
        summary = once(folder, tmp_path / "moved", Segmenter(Moving(manifest("logits"))))
    assert (summary.segmented, summary.failed) == (1, {})
    assert "table of area fractions could not be written" in caplog.text
    (folder / "first.tif").unlink()
    for seed in range(5):
        (folder / f"{seed}.tif").write_bytes(tiff(seed))
    stop = threading.Event()
    summary = once(folder, tmp_path / "out", stop=stop, on_event=lambda event: stop.set())
    assert summary.segmented == 1
    assert len(list((tmp_path / "out").glob("*.png"))) == 1
    assert (tmp_path / "out" / "fractions.csv").is_file()
    assert once(folder, tmp_path / "out").segmented == 4


def test_settings_that_make_no_sense(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputFile, match="not a folder"):
        once(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UsageError, match="watched folder"):
        once(folder, folder)
    with pytest.raises(UsageError, match="negative"):
        once(folder, tmp_path / "out", settle_s=-1)
    with pytest.raises(UsageError, match="not 'gif'"):
        once(folder, tmp_path / "out", results=ResultSettings(write=("gif",)))


def test_signals_outside_the_main_thread_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    inside: list[Any] = []

    def enter() -> None:
        with stop_on_signal() as stop:
            inside.append((signal.getsignal(signal.SIGINT), stop.is_set()))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert inside == [(before, False)]
    with stop_on_signal() as stop:
        deliver(signal.SIGTERM)
        assert stop.wait(5)
        with pytest.raises(KeyboardInterrupt):
            deliver(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_command_until_nothing_comes(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = write_toy_onnx(tmp_path / "toy.onnx", manifest("labels"))
    (folder / "a.tif").write_bytes(tiff(1))
    (folder / "bad.tif").write_bytes(tiff(2)[:500])
    arguments = ("watch", folder, "--output", tmp_path / "out", "--model", model, "--settle", "0", "--patience", "0",
                 "--stop-after", "0", "--write", "tiff,png", "--info-bar", "none", "--tile", "whole",
                 "--percentiles", "1", "99")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "hpddrnet_trt", *map(str, arguments)], cwd=REPOSITORY, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("a.tif") and "grain" in line and "%" in line for line in lines), lines
    assert any(line.startswith("bad.tif") and "failed" in line for line in lines), lines
    assert "1 segmented, 0 already done, 1 failed" in lines
    assert lines[-1].count("bad.tif") == 1  # the reason names it already
    assert (tmp_path / "out" / "a.png").is_file()
    assert (tmp_path / "out" / "a.tif").is_file()
    (entry,) = map(json.loads, (tmp_path / "out" / "segmentations.jsonl").read_text().splitlines())
    assert (entry["job"]["info_bar"], entry["job"]["tile"]) == ("none", "whole")
    assert entry["job"]["given_window"] == {"black": 1, "white": 99}
