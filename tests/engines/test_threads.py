"""Several engines in one process, what they share with it, and no traces left."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import hpddrnet_trt
from hpddrnet_trt.engines import onnxruntime as onnxruntime_engine
from hpddrnet_trt.engines.base import Engine
from hpddrnet_trt.engines.onnxruntime import OnnxRuntimeEngine
from hpddrnet_trt.engines.openvino import OpenVINOEngine
from hpddrnet_trt.models.checkpoints import save_checkpoint
from tests.threads import in_threads
from tests.tiny_export import frames, write_fp16, write_fp32
from tests.tiny_network import lively, tiny_manifest, tiny_network

_in_threads = partial(in_threads, timeout_s=120)

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="OpenVINO is an optional extra and not installed"
)
ENGINES = ["onnxruntime", pytest.param("openvino", marks=needs_openvino), "torch"]
Images = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same small network with position attention, for each engine."""
    folder = tmp_path_factory.mktemp("threads")
    network = lively(tiny_network())
    checkpoint = save_checkpoint(folder / "m.safetensors", network, tiny_manifest(network))
    exported = write_fp32(folder / "m.onnx")
    return {"onnxruntime": exported, "openvino": exported, "torch": checkpoint, "fp16": write_fp16(folder / "h.onnx")}


def _open(files: dict[str, Path], name: str, file: str | None = None) -> Engine:
    if name == "torch":
        from hpddrnet_trt.engines.torch import TorchEngine

        return TorchEngine(files[name], device="cpu", output="labels", threads=1)
    path = files[file or name]
    return OnnxRuntimeEngine(path, threads=1) if name == "onnxruntime" else OpenVINOEngine(path, threads=1)


def test_first_large_images_at_the_same_time(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's second session, for attention in blocks, is opened once, by whoever comes first."""
    monkeypatch.setattr(onnxruntime_engine, "LARGEST_SCORES_MIB", 0)
    images, opened, open_ = frames(1, 64, 96), list[bool](), OnnxRuntimeEngine._open

    def counted(engine: Any, *, blocks: bool = False) -> Any:
        opened.append(blocks)
        return open_(engine, blocks=blocks)

    monkeypatch.setattr(OnnxRuntimeEngine, "_open", counted)
    with OnnxRuntimeEngine(files["onnxruntime"], threads=1) as engine:
        found: list[Images] = []
        assert _in_threads(*[lambda: found.append(engine.infer(images).labels)] * 5) == []
    assert opened == [False, True]
    for labels in found:
        np.testing.assert_array_equal(labels, found[0])


@needs_openvino
def test_engines_side_by_side(files: dict[str, Path]) -> None:
    """ONNX Runtime, OpenVINO and PyTorch in one process, two files, two engines of one kind."""
    images = frames(2, 64, 96)
    with ExitStack() as stack:
        kinds = (("onnxruntime",), ("onnxruntime", "fp16"), ("openvino",), ("torch",), ("torch",))
        engines = [stack.enter_context(_open(files, *kind)) for kind in kinds]
        alone = [engine.infer(images).labels for engine in engines]

        def work(number: int) -> None:
            for _ in range(4):
                np.testing.assert_array_equal(engines[number].infer(images).labels, alone[number])

        assert _in_threads(*[partial(work, number) for number in range(len(engines))]) == []
    for labels in alone[2:]:  # the same network and precision
        assert (labels == alone[0]).mean() > 0.999


def test_pytorchs_number_of_threads_stays_the_callers(files: dict[str, Path]) -> None:
    import torch

    from hpddrnet_trt.engines.torch import TorchEngine

    before = torch.get_num_threads()
    images = frames(1, 32, 48)
    seen: list[int] = []
    try:
        torch.set_num_threads(2)
        with TorchEngine(files["torch"], device="cpu", threads=1) as engine:
            assert engine.runtime.count("1 threads") == 1
            label = engine._label
            engine._graph = lambda x: [seen.append(torch.get_num_threads()), label(x)][1]  # type: ignore[func-returns-value]
            assert torch.get_num_threads() == 2
            assert _in_threads(*[lambda: engine.infer(images)] * 4) == []
            list(engine.infer_many([images]))
            engine.bind(images)()
        assert torch.get_num_threads() == 2
        assert seen == [1] * 6
    finally:
        torch.set_num_threads(before)


TRACES = """
import json, locale, logging, os, random, signal, sys, threading, warnings
import cv2, numpy as np
warnings.simplefilter("default")

def state():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGABRT, signal.SIGSEGV)
    handlers = {str(number): str(signal.getsignal(number)) for number in numbers}
    loggers = {name: (entry.level, len(entry.handlers), entry.propagate)
               for name, entry in sorted(logging.root.manager.loggerDict.items())
               if isinstance(entry, logging.Logger) and name.startswith("hpddrnet_trt")}
    umask = os.umask(0o22)
    os.umask(umask)
    return {
        "environment": dict(os.environ), "folder": os.getcwd(), "path": sys.path, "umask": umask,
        "filters": [str(entry) for entry in warnings.filters if entry[3] != 'hidden'], "signals": handlers,
        "root logger": (logging.root.level, len(logging.root.handlers)),
        "levels": sorted({(level, count) for level, count, _ in loggers.values()}),
        "numpy errors": np.geterr(), "numpy random": str(np.random.get_state()[1][:5]),
        "random": str(random.getstate()[1][:5]), "opencv threads": cv2.getNumThreads(), "hook": str(sys.excepthook),
        "recursion": sys.getrecursionlimit(), "thread hook": str(threading.excepthook), "locale": locale.setlocale(0),
    }

import hpddrnet_trt
from hpddrnet_trt.engines import load_engine
from hpddrnet_trt.core.runtimes import load_onnxruntime, load_openvino
path, name = sys.argv[1:]
frame = np.random.default_rng(0).integers(0, 256, (1, 1, 64, 96), dtype=np.uint8)
# What the runtime does to the process when it is imported is not ours.
if name == "openvino":
    load_openvino()
elif name == "onnxruntime":
    load_onnxruntime()
else:  # imports parts of itself with the first inference
    with load_engine(path, name) as engine:
        engine.infer(frame)
before = state()
with load_engine(path, name) as engine:
    engine.infer(frame)
    list(engine.infer_many([frame] * 2))
    engine.bind(frame)()
    engine.layer_times(frame, runs=1)
after = state()
changed = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
print(json.dumps([changed, [thread.name for thread in threading.enumerate()]]))
"""


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_leaves_no_traces_in_the_process(files: dict[str, Path], name: str, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", TRACES, str(files[name]), name]
    # Not as on a build server, where runtimes report nothing anyway.
    kept = {key: value for key, value in os.environ.items() if key in ("PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")}
    root = Path(hpddrnet_trt.__file__).parent.parent
    child = subprocess.run(
        arguments, capture_output=True, text=True, check=False, cwd=root, env={**kept, "HOME": str(tmp_path)}
    )
    assert child.returncode == 0, child.stderr
    assert child.stderr == ""
    assert json.loads(child.stdout) == [{}, ["MainThread"]]  # and nothing else was printed
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path for path in left if not path.startswith(".cache/hpddrnet-trt/openvino/")} == set()  # ours alone
