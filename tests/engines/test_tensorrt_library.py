"""NVIDIA's libraries behind one face: versions, messages, and a build that can be interrupted."""

from __future__ import annotations

import _thread
import importlib.util
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpddrnet_trt.core.errors import MissingDependency, UsageError
from hpddrnet_trt.engines.tensorrt_library import (
    choose_tensorrt,
    compute_capability,
    load_tensorrt,
    progress_monitor,
    readable,
    run_cancellable,
)
from tests.graph.parsed_rtx import needs_rtx
from tests.tiny_onnx import tiny_model


@needs_rtx
def test_compute_capabilities_are_those_of_the_library() -> None:
    api = load_tensorrt("tensorrt-rtx")
    assert compute_capability(api, "8.9") == api.module.ComputeCapability.SM89
    assert compute_capability(api, "12.0") == api.module.ComputeCapability.SM120
    with pytest.raises(UsageError, match=r"7\.5, .*8\.9"):
        compute_capability(api, "current")


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed here")
@needs_rtx
def test_missing_runtime_names_its_extra() -> None:
    with pytest.raises(MissingDependency, match=r"hpddrnet-trt\[tensorrt\]"):
        load_tensorrt("tensorrt")
    assert choose_tensorrt("auto").name == "tensorrt-rtx"


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ("8.6.1", r"tensorrt 8\.6\.1 is not supported, 10\.x or 11\.x is needed; install it with: pip install"),
        ("10.0.1", r"TensorRT 10\.0\.1 is too old, 10\.1 is the oldest that works; update it"),
        ("12.0.0", r"10\.x or 11\.x is needed"),
    ],
)
def test_other_versions_are_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch, version: str, says: str) -> None:
    module = types.ModuleType("tensorrt")
    module.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    with pytest.raises(MissingDependency, match=says):
        load_tensorrt("tensorrt")


def test_library_messages_become_readable() -> None:
    message = (
        "IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error (Input tensor image has static dimensions. "
        "In operator() at /_src/optimizer/api/network.cpp:4067)"
    )
    assert readable(message) == "API Usage Error (Input tensor image has static dimensions)"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, also where a shell started the tests in the background and had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.set_wakeup_fd(-1)  # a library may have left one, whose number is another file's by now
    yield
    signal.signal(signal.SIGINT, before)


@needs_rtx
@pytest.mark.usefixtures("interruptible")
def test_interrupt_ends_a_running_build(tmp_path: Path) -> None:
    """Ctrl-C during the build cancels it at its next step instead of waiting for its end."""
    api = load_tensorrt("tensorrt-rtx")
    trt, cancel, plans = api.module, threading.Event(), []
    builder = trt.Builder(api.log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, api.log)
    assert parser.parse_from_file(str(tiny_model(tmp_path / "m.onnx", shape=(1, 64, 64))))
    config = builder.create_builder_config()

    class Bar:
        """Stands at the first step until the interrupt has come."""

        total, n = 1, 0

        def reset(self, total: int) -> None:
            _thread.interrupt_main()
            deadline = time.monotonic() + 5
            while not cancel.is_set() and time.monotonic() < deadline:
                time.sleep(0.01)

        def update(self, _: int) -> None: ...

        def set_postfix_str(self, _: str) -> None: ...

    config.progress_monitor = progress_monitor(trt, Bar(), cancel.is_set)
    with pytest.raises(KeyboardInterrupt):
        run_cancellable(lambda: plans.append(builder.build_serialized_network(network, config)), cancel)
    assert cancel.is_set()
    assert plans == [None]


def test_errors_of_the_worker_reach_the_caller() -> None:
    def work() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_cancellable(work, threading.Event())
    assert run_cancellable(lambda: 7, threading.Event()) == 7
