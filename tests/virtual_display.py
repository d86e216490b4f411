"""A private X server for tests that open a window: Xvfb on a free display number, or the display there is."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes.util import find_library
from pathlib import Path

import pytest

# Qt's X11 plugin aborts the process without the first, vispy's canvas needs the second.
LIBRARIES = {"xcb-cursor": "libxcb-cursor0", "GL": "libgl1"}


@contextmanager
def virtual_display(folder: Path) -> Iterator[dict[str, str]]:
    """Environment for a child process that shows windows; napari's settings lie in ``folder``.

    Skips the test where there is neither Xvfb nor a display.
    """
    for library, package in LIBRARIES.items():
        if find_library(library) is None:
            pytest.skip(f"windows need lib{library} (Debian package {package})")
    environment = {**os.environ, "NAPARI_CONFIG": str(folder / "napari.yaml"), "QT_QPA_PLATFORM": "xcb"}
    if shutil.which("Xvfb") is None:
        if not os.environ.get("DISPLAY"):
            pytest.skip("no display, and no Xvfb on the PATH to make one")
        yield environment
        return
    read_end, write_end = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(write_end), "-screen", "0", "1600x1000x24", "-nolisten", "tcp"],
        pass_fds=[write_end], stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(write_end)
    try:
        with os.fdopen(read_end) as pipe:
            number = pipe.readline().strip()  # empty when the server ended instead
        assert number, "Xvfb did not start"
        yield {**environment, "DISPLAY": f":{number}"}
    finally:
        server.terminate()
        server.wait()
