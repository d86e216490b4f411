"""When a file in a watched folder is complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpddrnet_trt.inference import watch as module
from hpddrnet_trt.inference.watch import Arrival, Arrivals, WatchSettings


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Folder:
    """A watched folder whose files get a modification time from the clock."""

    def __init__(self, path: Path, **options: object) -> None:
        path.mkdir(exist_ok=True)
        self.path, self.clock = path, Clock()
        self.arrivals = Arrivals(path, WatchSettings(**options), leave_out=path / "labels", clock=self.clock)  # type: ignore[arg-type]

    def write(self, name: str, size: int = 10) -> Path:
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * size)
        self.touch(name)
        return path

    def touch(self, name: str) -> None:
        nanoseconds = int(self.clock.now * 1e9)
        os.utime(self.path / name, ns=(nanoseconds, nanoseconds))

    def poll(self, seconds: float = 0.0) -> list[str]:
        """Names of what is due after so many seconds."""
        self.clock.now += seconds
        return [str(found.path.relative_to(self.path)) for found in self.arrivals.poll()]

    def take(self, seconds: float = 0.0) -> list[tuple[str, bool]]:
        self.clock.now += seconds
        found = self.arrivals.poll()
        for arrival in found:
            self.arrivals.taken(arrival)
        return [(str(arrival.path.relative_to(self.path)), arrival.again) for arrival in found]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "in", settle_s=2.0, patience_s=60.0)


def test_a_file_is_due_once_nothing_changed_for_the_settling_time(folder: Folder) -> None:
    folder.write("a.tif", 10)
    assert folder.poll() == []
    assert folder.poll(1.9) == []
    folder.write("a.tif", 20)
    assert folder.poll(0.1) == []  # it grew: the time starts anew
    folder.touch("a.tif")  # same size, other time: written within a preallocated file
    assert folder.poll(1.9) == []
    assert folder.poll(1.9) == []
    assert folder.poll(0.2) == ["a.tif"]
    assert folder.arrivals.waiting == 1
    assert folder.take() == [("a.tif", False)]
    assert folder.take(100) == []
    assert folder.arrivals.waiting == 0



def test_what_is_left_out(folder: Folder) -> None:
    for name in (".a.tif", "a.tif.part", "a.tif~", "a.tmp", "notes.txt", "sub/deep.tif", "B.TIF", "c.png"):
        folder.write(name)
    (folder.path / "folder.tif").mkdir()
    folder.poll()
    assert sorted(folder.poll(2)) == ["B.TIF", "c.png"]


def test_sub_folders_when_asked_for(tmp_path: Path) -> None:
    root = tmp_path / "in"
    folder = Folder(root, settle_s=0.0, recursive=True)
    for name in ("a.tif", "one/b.tif", "one/.c.tif", ".hidden/d.tif", "labels/a.png"):
        folder.write(name)
    (root / "link").symlink_to(root, target_is_directory=True)
    assert sorted(folder.poll()) == ["a.tif", str(Path("one/b.tif"))]


def test_a_file_that_changes_later_comes_again(folder: Folder) -> None:
    folder.write("a.tif")
    folder.poll()
    assert folder.take(2) == [("a.tif", False)]
    folder.clock.now += 1000
    folder.write("a.tif", 99)
    assert folder.take() == []
    assert folder.take(2) == [("a.tif", True)]
    folder.clock.now += 2
    folder.write("a.tif", 30)
    folder.poll()
    folder.clock.now += 2
    (arrival,) = folder.arrivals.poll()
    folder.write("a.tif", 40)
    folder.arrivals.taken(arrival)  # it changed while it was dealt with
    assert [folder.take(), folder.take(2), folder.take(100)] == [[], [("a.tif", True)], []]
    (folder.path / "a.tif").unlink()
    assert folder.take() == []
    folder.write("a.tif")  # a new file of the same name
    folder.write("z.tif")
    os.utime(folder.path / "z.tif", ns=(10**12, 10**12))
    folder.take()
    assert folder.take(2) == [("z.tif", False), ("a.tif", False)]  # the oldest first


def test_an_unreadable_file_is_tried_at_growing_intervals_until_patience_ends(folder: Folder) -> None:
    folder.write("a.tif")
    folder.poll()
    start, tries = folder.clock.now, []
    for _ in range(400):
        folder.clock.now += 0.5
        for arrival in folder.arrivals.poll():
            tries.append(folder.clock.now - start)
            given_up = folder.arrivals.unreadable(arrival)
            assert given_up == (folder.clock.now - start >= 60)
    assert tries == [2, 4, 8, 16, 32, 60]
    assert folder.arrivals.waiting == 0
    folder.write("a.tif", 40)
    folder.poll(1)
    folder.clock.now += 60
    (arrival,) = folder.arrivals.poll()
    folder.write("a.tif", 50)  # completed at last, while it was tried
    assert folder.arrivals.unreadable(arrival) is False
    folder.poll()
    assert folder.take(2) == [("a.tif", False)]


def test_files_that_leave_while_they_wait(folder: Folder) -> None:
    path = folder.write("a.tif")
    folder.write("b.tif")
    folder.poll()
    folder.clock.now += 2
    first, second = folder.arrivals.poll()
    path.unlink()
    folder.arrivals.taken(first)
    assert folder.arrivals.unreadable(second) is False
    assert folder.poll(2) == ["b.tif"]
    (folder.path / "b.tif").rename(folder.path / "renamed.tif")
    assert folder.poll() == []
    assert folder.poll(2) == ["renamed.tif"]
    folder.arrivals.taken(Arrival(folder.path / "never seen.tif", False))


@pytest.mark.parametrize("sidecar", ["a.txt", "A.TXT", "a-tif.hdr", "a.hdr"])
def test_a_sidecar_belongs_to_its_image(folder: Folder, sidecar: str) -> None:
    folder.write("a.tif")
    folder.write("other.tif")
    folder.poll()
    folder.write(sidecar)
    assert folder.poll(1) == []
    assert folder.poll(1) == ["other.tif"]  # the sidecar was seen a second later
    assert sorted(folder.take(1)) == [("a.tif", False), ("other.tif", False)]
    (folder.path / sidecar).write_bytes(b"more")  # after the image was taken
    folder.take()
    assert folder.take(2) == [("a.tif", True)]



def test_a_folder_that_vanishes_and_returns(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "in", settle_s=0.0)
    folder.write("done.tif")
    folder.take()
    folder.write("half.tif")
    (arrival,) = folder.arrivals.poll()
    away = tmp_path / "away"
    folder.path.rename(away)
    assert folder.poll() == []
    assert list(folder.arrivals.lost) == [folder.path]
    assert "No such file" in folder.arrivals.lost[folder.path]
    assert folder.arrivals.waiting == 0  # nothing to wait for now
    away.rename(folder.path)
    assert folder.poll() == ["half.tif"]  # and not done.tif
    assert folder.arrivals.lost == {}
    folder.arrivals.taken(arrival)
    folder.write("done.tif", 77)
    assert folder.take() == [("done.tif", True)]


def test_an_unreadable_sub_folder_is_lost_and_a_deleted_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(tmp_path / "in", settle_s=0.0, recursive=True)
    for name in ("sub/a.tif", "gone/b.tif"):
        folder.write(name)
    assert len(folder.take()) == 2
    real = os.scandir

    def scandir(path: str) -> object:
        if path.endswith("sub"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    shutil.rmtree(folder.path / "gone")
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "scandir", scandir)
        assert folder.take() == []
        assert folder.arrivals.lost == {folder.path / "sub": "Permission denied"}
    assert folder.take() == []  # known all the time
    assert folder.arrivals.lost == {}


def test_finished_files_are_rechecked_in_turn(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per poll, the number of files asked for size and time stays bounded, and every change is found in the end."""
    monkeypatch.setattr(module, "RECHECKED", 10)
    for number in range(95):
        folder.write(f"{number:03}.tif")
    folder.poll()
    assert len(folder.take(2)) == 95
    asked: list[str] = []
    real = os.stat
    monkeypatch.setattr(module.os, "stat", lambda path, **options: (asked.append(path), real(path, **options))[1])
    for _ in range(25):
        asked.clear()
        folder.poll()
        assert len(asked) <= 10
    folder.write("050.tif", 3)
    rounds = 0
    while not folder.arrivals.waiting:
        folder.poll()
        rounds += 1
    assert rounds <= 11


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.sampled_from("abc"), st.integers(0, 3)),
        st.tuples(st.just("delete"), st.sampled_from("abc"), st.just(0)),
        st.tuples(st.just("rename"), st.sampled_from("abc"), st.integers(0, 2)),
        st.tuples(st.just("sidecar"), st.sampled_from("abc"), st.integers(0, 3)),
        st.tuples(st.just("wait"), st.just(""), st.integers(1, 3)),
        st.tuples(st.just("poll"), st.sampled_from(["take", "refuse"]), st.just(0)),
    ),
    max_size=40,
)


@given(STEPS)
@settings(max_examples=150, deadline=None)
def test_whatever_happens_the_last_state_of_every_file_is_taken(steps: list[tuple[str, str, int]]) -> None:
    """Files are written, deleted, renamed, taken and refused in any order; at rest, what is there has been taken in
    its last state, and never before it had settled."""
    taken: dict[str, tuple[int, int]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Folder(Path(place) / "in", settle_s=2.0, patience_s=1e9)
        changed: dict[str, float] = {}

        def state(path: Path) -> tuple[int, int]:
            return path.stat().st_size, path.stat().st_mtime_ns

        def poll(answer: str) -> None:
            for arrival in folder.arrivals.poll():
                assert folder.clock.now - changed[arrival.path.name] >= 2, "taken while it was being written"
                if answer == "refuse":
                    folder.arrivals.unreadable(arrival)
                else:
                    taken[arrival.path.name] = state(arrival.path)
                    folder.arrivals.taken(arrival)

        for action, name, number in steps:
            path = folder.path / f"{name}.tif"
            if action == "write":
                folder.clock.now += 0.001  # no two writes at the same instant
                folder.write(path.name, number)
                changed[path.name] = folder.clock.now
            elif action == "sidecar":
                folder.write(f"{name}.txt", number)
            elif action == "delete":
                path.unlink(missing_ok=True)
            elif action == "rename" and path.exists():
                target = folder.path / f"{'abc'[number]}.tif"
                os.replace(path, target)
                changed[target.name] = min(changed[path.name], folder.clock.now)
            elif action == "wait":
                folder.clock.now += number
            elif action == "poll":
                poll(name)
        for _ in range(200):
            folder.clock.now += 10_000
            poll("take")
        assert folder.arrivals.waiting == 0
        assert {path.name: state(path) for path in folder.path.glob("*.tif")}.items() <= taken.items()
