"""Damaged and hostile model files: each ends in labels that make sense, or in one sentence.

Every case runs in a child process, so that a crash of a runtime is counted and not suffered. More cases
than the tests run, from the repository's folder:

    python -m tests.test_hostile_models --cases 2000
    python -m tests.test_hostile_models --cases 2000 --kinds onnx --first 10000
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
from tests.hostile_models import KINDS, write_case, write_seeds

REPOSITORY = Path(__file__).resolve().parents[1]
SECONDS = 60  # for one case, on a busy machine; most take milliseconds
MEMORY = 2 << 30  # that a case may take above what the runtimes need
ADDRESSES = 24 << 30  # so that a bomb ends in an error of the case, and not in one of the machine
LARGEST = 1 << 20  # values of an input that is worth running
LONGEST = 1_500  # characters
BUILDER = "tensorrt-rtx"  # builds an engine; the others run the file
SHAPES = "1x1x64x64:1x1x64x64:1x1x64x64"
_SAID_BY = re.compile(r"cannot be loaded by|could not run|TensorRT-RTX \S+ (cannot read|could not|refuses)")

Outcomes = dict[str, Counter[str]]


# --- the child: one case after the other


def _worker(kind: str, first: int, count: int, folder: Path) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    written = json.loads((folder / "seeds.json").read_text())
    seeds = {name: [Path(path) for path in paths] for name, paths in written.items()}
    work = folder / f"{kind}-{first}"
    work.mkdir(exist_ok=True)
    with _simulated_gpu(seeds["onnx"][0]):
        for engine in _engines(kind):  # what loading and running takes, without damage
            for path in dict.fromkeys(seeds[kind]):
                if engine in _engines(kind, path):
                    assert _outcome(path, engine) in ("labels", "built"), path
        for number in range(first, first + count):
            path = write_case(kind, number, seeds, work)
            for engine in _engines(kind, path):
                print(json.dumps(["begin", number, engine]), flush=True)
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                started = time.perf_counter()
                outcome = _outcome(path, engine)
                seconds = time.perf_counter() - started
                grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
                if grown > MEMORY:
                    outcome = f"MEMORY: {grown >> 20} MiB"
                print(json.dumps(["end", outcome, seconds]), flush=True)


def _engines(kind: str, path: Path | None = None) -> list[str]:
    by_suffix = {".onnx": ["onnxruntime"], ".safetensors": ["torch"], ".pth": ["torch"], ".engine": ["tensorrt"]}
    if kind == "build":
        return [BUILDER]
    if importlib.util.find_spec("openvino") is not None:
        by_suffix[".onnx"].append("openvino")
    if path is not None:
        return by_suffix[path.suffix]
    suffixes = [".onnx", ".safetensors", ".engine"] if kind == "description" else [f".{kind}"]
    return [engine for suffix in suffixes for engine in by_suffix[suffix]]


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
        build_engine(path, target, precision=precision, flavour="tensorrt-rtx", shapes=SHAPES, progress=False)
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
    from tests.engines.simulated_cuda import SimulatedCuda, SimulatedTensorRT

    cuda = SimulatedCuda(cuda_memory.cudart())
    profile = Profile((1, 1, 8, 8), (1, 1, 64, 64), (2, 1, 128, 128))
    library = SimulatedTensorRT(cuda, onnx_file, [profile], "tensorrt", "10.9.0.34")
    engine = library._engine

    def load(content: bytes) -> Any:
        return engine() if content == b"a plan " * 400 else None

    runtime = mock.Mock(deserialize_cuda_engine=load, spec_set=["deserialize_cuda_engine", "engine_host_code_allowed"])
    library.api.module.Runtime = lambda log: runtime
    with ExitStack() as stack:
        for target, value in (
            ("hpddrnet_trt.engines.cuda.cudart", cuda),
            ("hpddrnet_trt.engines.cuda.cuda_driver", cuda),
        ):  # fmt: skip
            stack.enter_context(mock.patch(target, lambda value=value: value))
        stack.enter_context(mock.patch.object(tensorrt, "load_flavour", return_value=library.api))
        yield


# --- the parent: counts, and starts another child after a crash


def run_cases(kind: str, first: int, count: int, folder: Path) -> tuple[Outcomes, list[str]]:
    """Outcomes by engine, and what must not have happened, for each such case."""
    outcomes: Outcomes = defaultdict(Counter)
    findings: list[str] = []
    number = first
    while number < first + count:
        number = _one_child(kind, number, first + count - number, folder, outcomes, findings)
    return outcomes, findings


def _one_child(
    kind: str, first: int, count: int, folder: Path, outcomes: Outcomes, findings: list[str]
) -> int:
    """Cases until the child ends; returns the number of the next one to run."""
    arguments = ["--worker", kind, str(first), str(count), str(folder)]
    lines: queue.Queue[str | None] = queue.Queue()
    with (folder / "child.txt").open("w+", encoding="utf-8", errors="replace") as said, subprocess.Popen(
        [sys.executable, "-m", "tests.test_hostile_models", *arguments], stdout=subprocess.PIPE, stderr=said,
        encoding="utf-8", errors="replace", cwd=REPOSITORY,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        reader = threading.Thread(target=_read, args=(child.stdout, lines))
        reader.start()
        running: tuple[int, str] | None = None
        last = first - 1
        while True:
            try:
                line = lines.get(timeout=SECONDS)
            except queue.Empty:
                child.kill()
                outcome = f"TIME: more than {SECONDS} s"
                break
            if line is None:
                child.wait()
                outcome = f"CRASH: exit code {child.returncode}"
                break
            try:
                word, *rest = json.loads(line)
            except ValueError:
                continue  # a runtime's own words
            if word == "begin":
                running = (rest[0], rest[1])
                last = rest[0]
            elif running is not None:
                _count(kind, *running, rest[0], outcomes, findings)
                running = None
        reader.join()
        said.seek(0)
        words = said.read().strip()[-500:]
    if running is not None:
        _count(kind, *running, f"{outcome} {words!r}", outcomes, findings)
    elif last < first + count - 1:
        raise AssertionError(f"the child of {kind} {first} ended before its work: {outcome} {words}")
    return last + 1


def _read(stream: Any, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _count(kind: str, number: int, engine: str, outcome: str, outcomes: Outcomes, findings: list[str]) -> None:
    word = outcome.split(":")[0]
    outcomes[engine][word] += 1
    if word.isupper():
        findings.append(f"{kind} {number} {engine}: {outcome}")


def prepare(folder: Path) -> Path:
    seeds = write_seeds(folder)
    (folder / "seeds.json").write_text(json.dumps(seeds, default=str))
    return folder


# --- tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("hostile"))


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_end_in_labels_or_in_a_sentence(kind: str, folder: Path) -> None:
    if kind in ("engine", "description"):
        pytest.importorskip("cuda.bindings", reason="cuda-python, which this test uses without a GPU, is missing")
    if kind == "build":
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX, which builds without a GPU, is missing")
    outcomes, findings = run_cases(kind, 0, 40, folder)
    assert findings == []
    for engine, counts in outcomes.items():
        assert counts["refused"] > 5, engine  # the damage is seen, and is not everywhere
    assert sum(counts["labels"] + counts["built"] for counts in outcomes.values()) > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=500, help="of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        kind, first, count, work = options.worker
        _worker(kind, int(first), int(count), Path(work))
        return
    found: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = prepare(Path(name))
        for kind in options.kinds:
            started = time.perf_counter()
            outcomes, findings = run_cases(kind, options.first, options.cases, folder)
            found += findings
            for finding in findings:
                print(finding, flush=True)
            for engine, counts in outcomes.items():
                print(f"{kind:12} {engine:12} {dict(counts)}", flush=True)
            print(f"{kind:12} {time.perf_counter() - started:.0f} s", flush=True)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
