"""Whole folders or none."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.core.files import atomic_folder


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.zarr"
    for content in ("first", "second"):
        with atomic_folder(target) as folder:
            (folder / content).write_text(content)
            assert not (target / content).exists()
        assert [entry.name for entry in target.iterdir()] == [content]
    assert [entry.name for entry in target.parent.iterdir()] == ["a.zarr"]
    (tmp_path / "plain").mkdir()
    assert stat.S_IMODE(os.stat(target).st_mode) == stat.S_IMODE(os.stat(tmp_path / "plain").st_mode)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a.zarr"
    with atomic_folder(target) as folder:
        (folder / "old").touch()

    def fail() -> None:
        with atomic_folder(target) as folder:
            (folder / "new").touch()
            raise error

    with pytest.raises(error):
        fail()
    assert [entry.name for entry in tmp_path.rglob("*")] == ["a.zarr", "old"]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = tmp_path / "a.zarr", os.rename
    with atomic_folder(target) as folder:
        (folder / "old").touch()

    def refuse_new(source: Path, destination: Path) -> None:
        if Path(source).parent.name == "new":
            raise OSError(28, "No space left on device")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", refuse_new)
    with pytest.raises(UserError, match=r"cannot write .*a\.zarr: No space left"), atomic_folder(target):
        pass
    assert [entry.name for entry in tmp_path.rglob("*")] == ["a.zarr", "old"]


def test_a_file_in_the_way_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.zarr").write_text("mine")
    with pytest.raises(UsageError, match="is a file"), atomic_folder(tmp_path / "a.zarr"):
        pass
    assert (tmp_path / "a.zarr").read_text() == "mine"
