"""Whole files or no files."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpddrnet_trt.core.errors import BadInputFile, MissingDependency, UserError, require
from hpddrnet_trt.core.files import (
    atomic_path,
    check_writable,
    existing_file,
    printable,
    read_file,
    sha256_of,
    write_bytes,
    write_text,
)


def test_write_and_replace(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "file.bin"
    assert write_bytes(target, b"one") == target
    assert write_text(target, "zwö") == target
    assert target.read_bytes() == "zwö".encode()
    assert [entry.name for entry in target.parent.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, interruption: type[BaseException]) -> None:
    target = write_bytes(tmp_path / "model.onnx", b"old")

    def write_half() -> None:
        with atomic_path(target) as temporary:
            assert temporary.suffix == ".onnx"
            assert temporary.parent == tmp_path
            temporary.write_bytes(b"half")
            raise interruption

    with pytest.raises(interruption):
        write_half()
    assert target.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        target = write_bytes(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert target.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_full_or_protected_disk(tmp_path: Path, code: int) -> None:
    target = tmp_path / "file"
    with pytest.raises(UserError, match=f"cannot write {target}: {os.strerror(code)}"), atomic_path(target):
        raise OSError(code, os.strerror(code))
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_way(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"")
    with pytest.raises(UserError, match="cannot write"):
        write_bytes(tmp_path / "file" / "below", b"")
    (tmp_path / "target").mkdir()
    with pytest.raises((UserError, OSError)):
        write_bytes(tmp_path / "target", b"")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "target"]


def test_other_errors_are_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="odd") as caught, atomic_path(tmp_path / "file"):
        raise OSError(errno.EBADF, "odd")
    assert not isinstance(caught.value, UserError)


def test_a_folder_is_tried_before_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"cannot write into .*b: Not a directory; choose another output folder"):
        check_writable(write_text(tmp_path / "a", "") / "b")

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(UserError, match="Read-only file system; choose another output folder"):
        check_writable(tmp_path)


def test_existing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_bytes(tmp_path / "file", b"")
    assert existing_file(str(path), "image") == path
    with pytest.raises(BadInputFile, match=r"image .*none does not exist; check the path"):
        existing_file(tmp_path / "none", "image")
    with pytest.raises(BadInputFile, match=r"image .* is not a file"):
        existing_file(tmp_path, "image")
    assert read_file(path, "image") == path.read_bytes()

    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(BadInputFile, match=r"cannot be read \(Permission denied\)"):
        read_file(path, "image")


@given(st.binary(max_size=3_000_000))
def test_checksum(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "checksum"
    path.write_bytes(content)
    assert sha256_of(path) == hashlib.sha256(content).hexdigest()


def test_require() -> None:
    assert require("os.path", "train", "join paths") is os.path
    with pytest.raises(MissingDependency) as caught:
        require("no_such_package.part", "export", "fly")
    message = str(caught.value)
    assert "the Python package 'no_such_package' is needed to fly" in message
    assert message.endswith("pip install 'hpddrnet-trt[export]'")


def test_names_of_files_are_printable_whatever_their_bytes_and_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsencode", None)  # which knows the locale's letters only
    assert printable("Gr\udcf6\udcdfe 倍率.png") == "Gr\\xf6\\xdfe 倍率.png"
