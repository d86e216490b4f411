"""What a report says about its own making."""

from __future__ import annotations

import sys
from pathlib import Path

from hpddrnet_trt.core.provenance import command_line


def test_the_command_can_be_repeated() -> None:
    assert command_line().split()[0] == Path(sys.orig_argv[0]).name
