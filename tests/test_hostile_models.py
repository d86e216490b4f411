"""Damaged and hostile model files: each ends in labels that make sense, or in one sentence.

Every case runs in a child process, so that a crash of a runtime is counted and not suffered. More cases
than the tests run: ``HOSTILE_CASES=2000 pytest tests/test_hostile_models.py`` (``HOSTILE_FIRST``: the first).
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.manifest import read_manifest
from hpddrnet_trt.data.preprocess import padded_size
from hpddrnet_trt.engines import load_engine
from hpddrnet_trt.engines.base import Engine, input_contract
from hpddrnet_trt.export.tensorrt import build_engine
from tests.hostile_models import KINDS, Seeds, write_case, write_seeds
from tests.tiny_onnx import QUIET

CASES, FIRST = (int(os.environ.get(f"HOSTILE_{name}", default)) for name, default in (("CASES", 40), ("FIRST", 0)))
SECONDS = 60  # for one case, on a busy machine; most take milliseconds
MEMORY = 2 << 30  # that a case may take above what the runtimes need
ADDRESSES = 24 << 30  # so that a bomb ends in an error of the case, and not in one of the machine
LARGEST = 1 << 20  # values of an input that is worth running
LONGEST = 1_500  # characters
BUILDER = "tensorrt-rtx"  # builds an engine; the others run the file
SHAPES = "1x1x64x64:1x1x64x64:1x1x64x64"
_SAID_BY = re.compile(r"cannot be loaded by|could not run|TensorRT-RTX \S+ (cannot read|could not|refuses)")
_SPAWN = multiprocessing.get_context("spawn")


# --- the child: one case after the other


def _serve(wanted: Connection, seeds: Seeds) -> None:
    """Answer each (file, engine) with the outcome."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with _simulated_gpu(seeds["onnx"][0]):
        while True:
            path, engine = wanted.recv()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            outcome = _outcome(path, engine)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
            wanted.send(f"MEMORY: {grown >> 20} MiB" if grown > MEMORY else outcome)


def _engines(kind: str, path: Path) -> list[str]:
    by_suffix = {".onnx": ["onnxruntime"], ".safetensors": ["torch"], ".pth": ["torch"], ".engine": ["tensorrt"]}
    if kind == "build":
        return [BUILDER]
    if importlib.util.find_spec("openvino") is not None:
        by_suffix[".onnx"].append("openvino")
    return by_suffix[path.suffix]


def _outcome(path: Path, name: str) -> str:
    """``labels``, ``built``, ``loaded`` (not run: its input is too large), ``refused: ...`` (by us, before the runtime
    sees it), ``refused by the runtime: ...``, or ``WRONG: ...``.
    """
    try:
        if name == BUILDER:
            return _build(path)
        options: dict[str, Any] = {} if name == "tensorrt" else {"threads": 1}
        with load_engine(path, name, **options) as engine:
            return _run(engine)
    except UserError as exc:
        message = str(exc)
        if len(message) > LONGEST or "\n" in message or "Traceback" in message:
            return f"WRONG: a sentence of {len(message)} characters: {message[:300]!r}"
        by = " by the runtime" if _SAID_BY.search(message) else ""
        return f"refused{by}: {type(exc).__name__}: {message}"
    except BaseException as exc:  # whatever it is, it is a finding
        import traceback

        place = traceback.extract_tb(exc.__traceback__)[-1]
        return f"WRONG: {type(exc).__name__}: {str(exc)[:200]} ({Path(place.filename).name}:{place.lineno})"


def _build(path: Path) -> str:
    precision = read_manifest(path).precision or "fp32"
    target = path.with_suffix(".engine")
    try:
        build_engine(path, target, precision=precision, runtime="tensorrt-rtx", shapes=SHAPES, settings=QUIET)
    except UserError:
        if target.exists():
            return f"WRONG: {target.name} was written and then refused"
        raise
    target.unlink()
    return "built"


def _run(engine: Engine) -> str:
    contract = input_contract(engine.manifest)
    height, width = (
        padded_size(64, axis, contract.multiple, name)
        for axis, name in ((contract.height, "height"), (contract.width, "width"))
    )
    shape = (contract.batch.minimum, contract.channels, height, width)
    if np.prod(shape) > LARGEST:
        return "loaded"
    images = np.random.default_rng(0).integers(0, 256, shape).astype(contract.dtype)
    labels = engine.infer(images).labels
    if labels.shape != (shape[0], height, width) or labels.dtype != np.uint8:
        return f"WRONG: labels {labels.dtype} {labels.shape} of an input {shape}"
    if labels.max() >= engine.manifest.network.num_classes:
        return f"WRONG: label {labels.max()} of {engine.manifest.network.num_classes} classes"
    return "labels"


@contextmanager
def _simulated_gpu(onnx_file: Path) -> Iterator[None]:
    """A TensorRT that takes only the one plan that is no damage, and runs the ONNX file for it."""
    if importlib.util.find_spec("cuda.bindings") is None:
        yield
        return
    from hpddrnet_trt.engines import cuda as cuda_memory
    from hpddrnet_trt.engines import tensorrt
    from hpddrnet_trt.engines.profiles import Profile
    from tests.engines.simulated_cuda import SimulatedCuda
    from tests.engines.simulated_tensorrt import SimulatedTensorRT

    cuda = SimulatedCuda(cuda_memory.cudart())
    profile = Profile((1, 1, 8, 8), (1, 1, 64, 64), (2, 1, 128, 128))
    library = SimulatedTensorRT(cuda, onnx_file, [profile], "tensorrt", "10.9.0.34")
    engine = library._engine

    def load(content: bytes) -> Any:
        return engine() if content == b"a plan " * 400 else None

    runtime = mock.Mock(deserialize_cuda_engine=load, spec_set=["deserialize_cuda_engine", "engine_host_code_allowed"])
    library.api.module.Runtime = lambda log: runtime
    with (
        mock.patch.object(cuda_memory, "cudart", return_value=cuda),
        mock.patch.object(cuda_memory, "cuda_driver", return_value=cuda),
        mock.patch.object(tensorrt, "load_tensorrt", return_value=library.api),
    ):
        yield


# --- the parent: counts, and starts another child after a crash


class Child:
    """A process that is replaced when a case has ended it."""

    def __init__(self, seeds: Seeds, kind: str) -> None:
        self._seeds, self._kind = seeds, kind
        self._start()

    def _start(self) -> None:
        self._wanted, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(theirs, self._seeds), daemon=True)
        self._process.start()
        theirs.close()
        for path in dict.fromkeys(self._seeds[self._kind]):  # what loading and running takes, without damage
            for engine in _engines(self._kind, path):
                self._wanted.send((path, engine))
                assert self._wanted.recv() in ("labels", "built"), path

    def outcome(self, path: Path, engine: str) -> str:
        """The child's word; in capitals what must not happen."""
        self._wanted.send((path, engine))
        try:
            if self._wanted.poll(SECONDS):
                return str(self._wanted.recv())
            found = f"TIME: more than {SECONDS} s"
        except EOFError:
            found = "CRASH"
        self.close()
        found += f": exit code {self._process.exitcode}"
        self._start()
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._wanted.close()


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Seeds:
    return write_seeds(tmp_path_factory.mktemp("hostile"))


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_end_in_labels_or_in_a_sentence(kind: str, seeds: Seeds, tmp_path: Path) -> None:
    if kind in ("engine", "description"):
        pytest.importorskip("cuda.bindings", reason="cuda-python, which this test uses without a GPU, is missing")
    if kind == "build":
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX, which builds without a GPU, is missing")
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    wrong = []
    child = Child(seeds, kind)
    try:
        for number in range(FIRST, FIRST + CASES):
            path = write_case(kind, number, seeds, tmp_path)
            for engine in _engines(kind, path):
                outcome = child.outcome(path, engine)
                word = outcome.partition(":")[0]
                outcomes[engine][word] += 1
                if word.isupper():
                    wrong.append(f"{kind} {number} {engine}: {outcome}")
    finally:
        child.close()
    print({engine: dict(counts) for engine, counts in outcomes.items()})
    assert wrong == []
    for engine, counts in outcomes.items():
        assert counts["refused"] > 5, engine  # the damage is seen, and is not everywhere
    assert sum(counts["labels"] + counts["built"] for counts in outcomes.values()) > 0
