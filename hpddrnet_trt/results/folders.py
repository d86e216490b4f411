"""Whole folders or no folders: for kinds of file that are folders."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpddrnet_trt.errors import UsageError, UserError


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
