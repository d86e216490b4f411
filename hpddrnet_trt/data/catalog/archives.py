"""Unpack ZIP and TAR files that came from elsewhere: nothing lands outside the folder."""

from __future__ import annotations

import errno
import lzma
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from hpddrnet_trt.core.errors import BadInputFile

MAX_BYTES = 64 << 30  # unpacked; the largest set of the catalog is far below
MAX_MEMBERS = 200_000
_BLOCK = 1 << 20
_MAX_PADDING = 64 << 20
_DRIVE = re.compile("[A-Za-z]:")


@dataclass(frozen=True)
class _Member:
    name: str
    size: int
    is_folder: bool
    is_plain: bool  # a file or folder: no link, device or pipe
    source: zipfile.ZipInfo | tarfile.TarInfo


def is_archive(path: Path) -> bool:
    """True for a ZIP or (compressed) TAR, told by the content."""
    return path.is_file() and (zipfile.is_zipfile(path) or tarfile.is_tarfile(path))


def unpack(path: Path, folder: Path, *, max_bytes: int = MAX_BYTES, max_members: int = MAX_MEMBERS) -> None:
    """Unpack ``path`` into ``folder``.

    Every member is checked before the first is written: names that lead outside, links, devices,
    and declared sizes beyond ``max_bytes`` or the free space raise :class:`BadInputFile`, as do
    damaged and encrypted archives. Files already there are never replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                _unpack_zip(archive, path, folder, max_bytes, max_members)
        else:
            with tarfile.open(path) as tar:
                _unpack_tar(tar, path, folder, max_bytes, max_members)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError) as exc:
        raise BadInputFile(f"archive {path} is damaged ({exc}); download it again") from exc
    except (RuntimeError, NotImplementedError) as exc:  # how zipfile says "encrypted" and "unknown method"
        raise BadInputFile(f"archive {path} cannot be unpacked here ({exc}); unpack it by hand") from exc
    except (FileExistsError, NotADirectoryError) as exc:
        raise BadInputFile(f"archive {path} holds the file {exc.filename} twice; unpack it by hand") from exc
    except OSError as exc:
        # Without a number: gzip's and bz2's own. EINVAL: a place before the file's start, from a wrong offset.
        if exc.errno not in {None, errno.EINVAL}:
            raise
        raise BadInputFile(f"archive {path} is damaged ({exc}); download it again") from exc


def _unpack_zip(archive: zipfile.ZipFile, path: Path, folder: Path, max_bytes: int, max_members: int) -> None:
    found = (
        _Member(info.filename, info.file_size, info.is_dir(), (info.external_attr >> 28) in {0, 0o4, 0o10}, info)
        for info in archive.infolist()
    )
    for member in _progress(_checked(found, path, folder, max_bytes, max_members), path):
        assert isinstance(member.source, zipfile.ZipInfo)
        with archive.open(member.source) as stream:
            _write(stream, folder / member.name, member.size, path)


def _unpack_tar(archive: tarfile.TarFile, path: Path, folder: Path, max_bytes: int, max_members: int) -> None:
    found = (_Member(info.name, info.size, info.isdir(), info.isreg() or info.isdir(), info) for info in archive)
    members = _checked(found, path, folder, max_bytes, max_members)
    _read_to_the_end(archive, path)
    for member in _progress(members, path):
        assert isinstance(member.source, tarfile.TarInfo)
        stream = archive.extractfile(member.source)
        assert stream is not None  # only links and folders have none
        with stream:
            _write(stream, folder / member.name, member.size, path)


def _read_to_the_end(archive: tarfile.TarFile, path: Path) -> None:
    """A tar ends before its compressed stream does, and only there is the stream's checksum compared."""
    assert archive.fileobj is not None
    padding = 0
    while block := archive.fileobj.read(_BLOCK):
        padding += len(block)
        if padding > _MAX_PADDING:
            raise BadInputFile(f"archive {path} goes on after its end; unpack it by hand if you trust it")


def _checked(
    members: Iterable[_Member], path: Path, folder: Path, max_bytes: int, max_members: int
) -> list[_Member]:
    """The members, looked at one by one: a compressed tar must be read to find the next one."""
    free = shutil.disk_usage(folder).free
    total = 0
    found: list[_Member] = []
    for member in members:
        found.append(member)
        total += member.size
        parts = PurePosixPath(member.name)
        if parts.is_absolute() or ".." in parts.parts or "\\" in member.name or _DRIVE.match(member.name):
            raise BadInputFile(f"archive {path} wants to write to {member.name!r}, outside its folder; do not use it")
        if not member.is_plain:
            raise BadInputFile(
                f"archive {path} holds {member.name!r}, a link or device; unpack it by hand if you trust it"
            )
        if len(found) > max_members:
            raise BadInputFile(f"archive {path} holds more files than the limit of {max_members}")
        if total > max_bytes:
            raise BadInputFile(f"archive {path} would unpack to more bytes than the limit of {max_bytes}")
        if total > free:
            raise BadInputFile(f"archive {path} needs more than the {free} bytes that {folder} has; free some space")
    return found


def _progress(members: list[_Member], path: Path) -> Iterator[_Member]:
    files = [member for member in members if not member.is_folder]
    yield from tqdm(files, desc=f"unpacking {path.name}", unit="file", delay=2)


def _write(stream: IO[bytes], target: Path, size: int, path: Path) -> None:
    """Copy at most the declared size: an archive that declares too little is damaged or hostile."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as output:
        left = size
        while block := stream.read(_BLOCK):
            left -= len(block)
            if left < 0:
                break
            output.write(block)
    if left:
        raise BadInputFile(f"archive {path} is damaged: {target.name} has not the declared size; download it again")
