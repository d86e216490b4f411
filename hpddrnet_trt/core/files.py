"""Whole files or no files, and folders likewise: writes go to a temporary name beside the target, then rename."""

from __future__ import annotations

import codecs
import errno
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the target's folder; rename it to ``target`` on success.

    The temporary file keeps the target's suffix (libraries choose a format by it) and is removed
    when the block raises, also on Ctrl-C. A full or read-only disk becomes a :class:`UserError`.
    """
    target = Path(target)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _created_beside(target)
        yield temporary
        os.replace(temporary, target)
    except OSError as exc:
        if exc.errno in {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EEXIST}:
            raise UserError(
                f"cannot write {target}: {exc.strerror}; free some space or choose another output path"
            ) from exc
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _created_beside(target: Path) -> Path:
    """A new empty file that nobody else has, with the permissions that any new file of this process gets."""
    # tempfile makes files private, and asking for the umask means setting it, for all threads of the program.
    path = target.with_name(f".{target.stem[:80]}.{secrets.token_hex(8)}.tmp{target.suffix}")
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return path


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``target``; it takes the target's place on success.

    An existing target is replaced, and stays as it was when the block raises. (Folders cannot be exchanged in one
    step: for an instant there is none.) Raises :class:`UsageError` when the target is a file, :class:`UserError`
    when the disk does not take it.
    """
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} is a file, and a folder is to be written there; remove it or choose another name")
    workplace: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        workplace = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        fresh = workplace / "new" / target.name
        fresh.mkdir(parents=True)  # mkdtemp makes folders private, this one follows the umask
        yield fresh
        old = workplace / "old"
        if target.exists():
            os.rename(target, old)
        try:
            os.rename(fresh, target)
        except BaseException:
            if old.exists():
                os.rename(old, target)
            raise
    except OSError as exc:
        raise UserError(
            f"cannot write {target}: {exc.strerror or exc}; free some space or choose another output path"
        ) from exc
    finally:
        if workplace is not None:
            shutil.rmtree(workplace, ignore_errors=True)


def check_writable(folder: str | Path) -> None:
    """Raise :class:`UserError` when no file can be made in ``folder``, or where it is to be; ask before long work.

    Nothing is left there: a folder that is missing stays so.
    """
    folder = Path(folder)
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as exc:
        raise UserError(f"cannot write into {folder}: {exc.strerror}; choose another output folder") from exc


def write_bytes(target: str | Path, content: bytes) -> Path:
    """Write ``content`` to ``target`` atomically and return the path."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)
    return Path(target)


def write_text(target: str | Path, content: str) -> Path:
    """Write UTF-8 ``content`` to ``target`` atomically and return the path; names of files may hold any bytes."""
    return write_bytes(target, printable(content).encode("utf-8"))


def printable(text: object) -> str:
    """``text`` with the bytes of a file's name that are no UTF-8 as ``\\xNN``: files and terminals take it."""
    # Not os.fsencode: outside UTF-8 locales that takes no other letters.
    return str(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def decoded_text(content: bytes) -> str:
    """Text of a file in UTF-8 or, marked by its first bytes, UTF-16 (editors and shells of Windows).

    Raises UnicodeDecodeError, which is a ValueError.
    """
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if utf16 else "utf-8-sig")


def existing_file(path: str | Path, what: str) -> Path:
    """Return ``path`` as a :class:`Path`, or raise :class:`BadInputFile` saying what was expected."""
    path = Path(path)
    if not path.exists():
        raise BadInputFile(f"{what} {path} does not exist; check the path")
    if not path.is_file():
        raise BadInputFile(f"{what} {path} is not a file; give the path of a file")
    return path


def read_file(path: str | Path, what: str) -> bytes:
    """A file's content; :class:`BadInputFile` when there is none or it may not be read."""
    path = existing_file(path, what)
    try:
        return path.read_bytes()
    except OSError as exc:
        raise BadInputFile(f"{path} cannot be read ({exc.strerror}); check its permissions") from exc


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's content, as lower-case hexadecimal."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
