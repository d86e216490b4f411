"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Nothing that tests import or start reports over the network, or writes logs to the user's folders.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["PYMM_LOG_FILE"] = "no"

# Property tests look for new examples on a developer's machine and repeat the same ones in CI.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")

# A shell starts what runs in its background deaf to Ctrl-C, and programs that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Calibrations of tests leave nothing in the user's cache folder; traced networks are kept for one run, in a folder
    that its processes share (:mod:`tests.traces`)."""
    run = tmp_path_factory.getbasetemp()  # of this process
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPDDRNET_CACHE", str(tmp_path_factory.mktemp("cache")))
        shared = run.parent if "PYTEST_XDIST_WORKER" in os.environ else run
        patch.setenv("HPDDRNET_TEST_TRACES", str(shared / "traces"))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the repository (``HPDDRNET_SHARED`` or ``../shared``)."""
    folder = Path(os.environ.get("HPDDRNET_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"reference data not found at {folder}; set HPDDRNET_SHARED to its folder")
    return folder


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """Tensors computed by the authors' own implementation."""
    return shared / "golden"


@pytest.fixture(scope="session")
def sem_data(shared: Path) -> Path:
    """Real SEM micrographs with masks."""
    return shared / "data"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors in PyTorch: a second thread only waits, for long when the machine is busy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
