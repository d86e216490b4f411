"""What a report says about its own making."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from hpddrnet_trt import __version__
from hpddrnet_trt.core.provenance import command_line, library_versions


def test_the_command_can_be_repeated() -> None:
    assert command_line().split()[0] == Path(sys.orig_argv[0]).name


def test_versions_are_those_of_the_installed_libraries() -> None:
    found = library_versions()
    assert found["hpddrnet-trt"] == __version__
    assert found["numpy"] == np.__version__
