"""The user's cache folder: what can be made again, kept so that the next run is quick.

Deleting any of it is safe at any time and only costs the time to make it again.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """``HPDDRNET_CACHE`` when set, else the place that the operating system has for caches of a user."""
    if chosen := os.environ.get("HPDDRNET_CACHE"):
        return Path(chosen)
    home = Path.home()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "hpddrnet-trt" / "cache"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "hpddrnet-trt"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "hpddrnet-trt"


def used_now(path: Path) -> None:
    """Note that a kept file was used, which :func:`prune` goes by."""
    with contextlib.suppress(OSError):  # a folder that is only read
        os.utime(path)


def prune(folder: Path, limit_bytes: int) -> None:
    """Delete the files below ``folder`` that were not used for longest, until at most ``limit_bytes`` are left."""
    files = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another run may have deleted it
            if path.is_file():
                files.append((path.stat().st_mtime, path.stat().st_size, path))
    excess = sum(size for _, size, _ in files) - limit_bytes
    for _, size, path in sorted(files):
        if excess <= 0:
            break
        with contextlib.suppress(OSError):
            path.unlink()
            excess -= size
