"""One process at a time, and nobody after it has ended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.lock import locked

HOLD = """
import sys, time
from pathlib import Path
from hpddrnet_trt.core.lock import locked
with locked(Path(sys.argv[1]), 'x'):
    print('held', flush=True)
    time.sleep(60)
"""


def test_a_second_one_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / ".store.lock"
    refused = pytest.raises(UserError, match=r"process \d+ on .* writes the store already")
    with locked(path, "the store"), refused, locked(path, "the store"):
        pytest.fail("held twice")
    assert not path.exists()
    with locked(path, "the store"):
        assert path.exists()


def test_a_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    path = tmp_path / ".store.lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {holder.pid} on "), locked(path, "the store"):
            pytest.fail("held twice")
        holder.kill()
        holder.wait()
    assert path.exists()  # the file stays, and locks nobody out
    with locked(path, "the store"):
        pass


def test_a_place_that_takes_no_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="choose another place"), locked(tmp_path / "file" / "lock", "the store"):
        pytest.fail("held")
