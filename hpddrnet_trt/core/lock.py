"""One process at a time: a lock that ends with the process that holds it, however that ends."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hpddrnet_trt.core.errors import UserError


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file ``path``, which is there only meanwhile; ``what`` it guards is named when another process
    holds it.

    The kernel keeps the lock for the open file: nothing is left of it after a crash, a kill or a power cut, though the
    file itself may be. Over NFS from version 4 on it holds for all machines; other network file systems may keep it for
    one machine only (Lustre unless mounted with ``flock``). On Windows (untried) the same by ``msvcrt``.

    Raises :class:`UserError` when another process holds it, or when no file can be made there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                _lock(descriptor)
            except OSError as exc:
                with os.fdopen(descriptor, encoding="utf-8", errors="replace") as stream:
                    holder = stream.read().strip() or "another process"
                raise UserError(f"{holder} writes {what} already; wait for it, or end it first") from exc
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    break
            os.close(descriptor)  # removed by the one that held it: the file of that name is another one now
    except OSError as exc:
        raise UserError(f"cannot write {path}: {exc.strerror}; free some space or choose another place") from exc
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Lock an open file, or raise OSError at once."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
