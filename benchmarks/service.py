"""A shared service under load: is every answer right, how fast is it, and does an update lose a request?

Starts NVIDIA Triton Inference Server with a repository that `hpddrnet-trt export-triton --backend python` writes, lets
several client processes segment pictures without a pause, puts a second version with other weights in its place
halfway, and compares every answer, pixel by pixel, with that of the same version on the spot. Then come requests that
must be refused.

    python benchmarks/service.py [MODEL] --server TRITONSERVER [--seconds 120] [--clients 4] [--size 512]

TRITONSERVER is the server's program (default: HPDDRNET_TRITON, or `tritonserver` on the PATH). That of the wheel
nvidia-pytriton will do: lib/python3.11/site-packages/pytriton/tritonserver/bin/tritonserver in its environment.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import urllib.request
import venv
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpddrnet_trt import load_segmenter
from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.data.simulate import simulate
from hpddrnet_trt.graph.model import load_model, save_model
from hpddrnet_trt.packages.triton import TritonSettings, export_triton
from hpddrnet_trt.weights import locate

NAME = "service"
REPOSITORY = Path(__file__).resolve().parent.parent


# -- the server --------------------------------------------------------------------------------------


class Server(NamedTuple):
    """A running server on this machine: its ports, its process and what it has said."""

    http: int
    grpc: int
    metrics: int
    process: subprocess.Popen[bytes]
    log: Path

    def counts(self) -> bool:
        """Whether it counts, which comes a moment after it is ready."""
        with suppress(OSError):
            return bool(self.page())
        return False

    def page(self) -> dict[str, float]:
        """The page of metrics: value by name and labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[:1] not in "#")}

    def ready(self, path: str = "health/ready") -> bool:
        """Whether the server, or ``models/NAME/versions/N/ready``, answers that it is."""
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.http}/v2/{path}", timeout=10) as answer:
            return bool(answer.status == 200)
        return False

    def wait(self, path: str = "health/ready", seconds: float = 120) -> None:
        """Until it is ready and counts; RuntimeError with the end of the log when it does not become so."""
        end = time.monotonic() + seconds
        while not (self.ready(path) and self.counts()):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{path} is not ready: {self.log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.1)


def program() -> Path | None:
    """The server's program on this machine."""
    found = os.environ.get("HPDDRNET_TRITON") or shutil.which("tritonserver")
    return None if found is None else Path(found)


@contextmanager
def serving(tritonserver: Path, repository: Path, folder: Path, *options: str) -> Iterator[Server]:
    """The server of a repository, as docs/service.md starts it; ``folder`` takes its log and what it needs.

    Its Python backend runs this Python's packages and the package beside this script.
    """
    environment = folder / "environment"  # the backend reads no PYTHONPATH
    venv.create(environment, symlinks=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "here.pth").write_text(f"{REPOSITORY}\n{sysconfig.get_path('purelib')}\n")
    libraries = [sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH", "")]
    ports = free_ports(3)
    log = folder / "server.log"
    command = [
        str(tritonserver), f"--model-repository={repository}",
        f"--backend-directory={backends(tritonserver, folder)}",
        *(f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc", "metrics")),
        *(f"--{kind}-port={port}" for kind, port in zip(("http", "grpc", "metrics"), ports, strict=True)),
        "--model-control-mode=poll", "--repository-poll-secs=1", "--exit-timeout-secs=10",
        "--disable-auto-complete-config", *options,
    ]  # fmt: skip
    surroundings = {
        **os.environ, "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
    }  # fmt: skip
    with log.open("wb") as said:
        process = subprocess.Popen(command, env=surroundings, stdout=said, stderr=subprocess.STDOUT)
    try:
        yield Server(ports[0], ports[1], ports[2], process, log)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def backends(tritonserver: Path, folder: Path) -> Path:
    """The folder of backends; in the wheel, which keeps the interpreters of the Python backend elsewhere, a new one."""
    home = tritonserver.resolve().parent.parent
    stub = "python_backend_stubs/{}.{}/triton_python_backend_stub".format(*sys.version_info)
    if not (home / stub).exists():
        return home / "backends"
    made = folder / "backends" / "python"
    made.mkdir(parents=True)
    for path in (home / stub, *(path for path in (home / "backends/python").iterdir() if path.is_file())):
        (made / path.name).symlink_to(path)
    return made.parent


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


# -- clients -----------------------------------------------------------------------------------------


class Answers(NamedTuple):
    """What a client saw: when each picture was asked for, of the clock, and how many seconds it took; by which version
    they were answered; how many wrongly; what failed."""

    asked: list[float]
    seconds: list[float]
    versions: Counter[str]
    wrong: int
    failures: Counter[str]


def client(address: str, size: int, seed: int, end: float, expected: dict[str, list[str]]) -> Answers:
    """Segments the pictures in turn until ``end``; ``expected``: checksums of their labels by the model's checksum."""
    answers = Answers([], [], Counter(), 0, Counter())
    wrong, turn = 0, seed
    shown = pictures(size)
    with load_segmenter(address, tile=size) as segmenter:
        while (now := time.time()) < end:
            turn += 1
            begin = time.perf_counter()
            try:
                result = segmenter.segment(shown[turn % len(shown)])
            except UserError as exc:
                answers.failures[str(exc)] += 1
                continue
            answers.seconds.append(time.perf_counter() - begin)
            answers.asked.append(now)
            assert result.provenance is not None
            model = str(result.provenance.model_sha256)
            answers.versions[model] += 1
            wrong += checksum(result.labels) != expected[model][turn % len(shown)]
    return answers._replace(wrong=wrong)


def pictures(size: int) -> list[npt.NDArray[np.uint8]]:
    """Simulated micrographs of different sizes, one of them in two tiles of ``size``, blended from class scores."""
    sizes = [(size, size), (size - 3, size + 40), (size // 2, size), (size, size - 8), (size // 3, size // 3)]
    return [simulate(*each, seed=seed)[0] for seed, each in enumerate(sizes)]


def checksum(labels: npt.NDArray[np.uint8]) -> str:
    return hashlib.sha256(labels.tobytes() + str(labels.shape).encode()).hexdigest()


def other_version(model: Path, target: Path) -> Path:
    """The same network with some weights changed by a little: other labels, the same contract."""
    from onnx import numpy_helper

    graph, manifest = load_model(model)
    weights = max(graph.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = numpy_helper.to_array(weights)
    weights.CopyFrom(numpy_helper.from_array((values * 1.01).astype(values.dtype), weights.name))
    return save_model(graph, target, manifest)


# -- what must be refused ----------------------------------------------------------------------------


def refusals(server: Server) -> dict[str, str]:
    """What the server says to requests that it must not answer; RuntimeError where it answers one."""
    grpc: Any = importlib.import_module("tritonclient.grpc")
    service = grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}")

    def infer(array: npt.NDArray[Any], model: str = NAME, kind: str = "UINT8", version: str = "") -> None:
        given = grpc.InferInput("image", array.shape, kind)
        given.set_data_from_numpy(array)
        service.infer(model, [given], model_version=version)

    grey = np.zeros((1, 1, 64, 64), np.uint8)
    requests = {
        "a size that is no multiple": lambda: infer(grey[:, :, :63]),
        "three channels": lambda: infer(np.repeat(grey, 3, axis=1)),
        "no batch": lambda: infer(grey[0]),
        "NaN in place of grey levels": lambda: infer(np.full(grey.shape, np.nan, np.float32), kind="FP32"),
        "too many at once": lambda: infer(np.zeros((200, 1, 8, 8), np.uint8)),
        "too large": lambda: infer(np.zeros((1, 1, 8192, 4096), np.uint8)),
        "an unknown model": lambda: infer(grey, "unknown"),
        "an unknown version": lambda: infer(grey, version="99"),
        "loading a model": lambda: service.load_model(NAME),
        "unloading a model": lambda: service.unload_model(NAME),
    }
    said = {}
    for what, request in requests.items():
        try:
            request()  # type: ignore[no-untyped-call]
        except Exception as exc:
            said[what] = " ".join(str(exc).split())[:160]
        else:
            raise RuntimeError(f"the server answered a request with {what}")
    infer(grey)  # and it goes on
    return said


# -- the measurement ---------------------------------------------------------------------------------


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    first = locate(Path(args.model))
    models = [first, other_version(first, folder / "other.onnx")]
    settings = TritonSettings(name=NAME, backend="python", precision=args.precision)
    expected = {}
    for model in models:
        with load_segmenter(model, precision=args.precision, tile=args.size) as local:
            labels = [local.segment(picture).labels for picture in pictures(args.size)]
            expected[str(local.model_sha256)] = [checksum(each) for each in labels]
    if any(ones == others for ones, others in zip(*expected.values(), strict=True)):
        raise RuntimeError("both versions give the same labels: nobody could tell which one answered")
    numbers = {sha: str(index) for index, sha in enumerate(expected, 1)}
    repository = folder / "repository"
    export_triton(models[0], repository, settings)
    with serving(args.server, repository, folder) as server:
        server.wait()
        before, end = server.page(), time.time() + args.seconds
        work = [
            (f"triton://127.0.0.1:{server.grpc}/{NAME}", args.size, seed, end, expected) for seed in range(args.clients)
        ]
        update_at = end - args.seconds / 2
        update = threading.Timer(args.seconds / 2, export_triton, (models[1], repository, settings))
        update.start()
        with multiprocessing.get_context("spawn").Pool(args.clients) as pool:
            answers = pool.starmap(client, work)
        update.join()
        page, said = server.page(), refusals(server)
    return {**summary(answers, end, update_at, numbers), **batches(before, page), "refused": said}


def summary(
    answers: Sequence[Answers], end: float, update_at: float, numbers: dict[str, str]
) -> dict[str, Any]:
    times = np.concatenate([each.seconds for each in answers])
    asked = np.concatenate([each.asked for each in answers])
    begin, calm = min(asked, default=end), times[asked < update_at]  # clients start for some seconds
    versions: Counter[str] = sum((each.versions for each in answers), Counter())
    return {
        "clients": len(answers),
        "seconds": round(end - begin, 1),
        "answered": len(times),
        "per_second": round(len(times) / (end - begin), 2),
        "per_second_before_update": round(len(calm) / (update_at - begin), 2),
        "ms_before_update": milliseconds(calm),
        "ms": milliseconds(times),
        "compared": sum(versions.values()),
        "wrong": sum(each.wrong for each in answers),
        "failed": dict(sum((each.failures for each in answers), Counter())),
        "by_version": {numbers[sha]: count for sha, count in versions.items()},
    }


def milliseconds(times: npt.NDArray[np.float64]) -> dict[str, int]:
    ranks = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: round(float(np.quantile(times, rank)) * 1000) for name, rank in ranks.items() if len(times)}


def batches(before: dict[str, float], page: dict[str, float]) -> dict[str, Any]:
    """Requests that the server handed over together, and states of the domain, from its page of metrics."""
    grown = {name: value - before.get(name, 0) for name, value in page.items()}

    def total(name: str, where: str = "") -> float:
        return sum(value for key, value in grown.items() if key.startswith(f"{name}{{") and where in key)

    states = {match[1] for match in (re.search(r'state="([^"]*)"', key) for key in grown) if match}
    return {
        "requests": total("nv_inference_request_success"),
        "executions": total("nv_inference_exec_count"),
        "refused_by_server": total("nv_inference_request_failure"),
        "pictures_by_domain": {state: total("hpddrnet_pictures", f'state="{state}"') for state in sorted(states)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="nasa-super1")
    parser.add_argument("--server", type=Path, default=program())
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--size", type=int, default=512, help="pixels of a picture's edge")
    parser.add_argument("--precision", default="auto")
    args = parser.parse_args()
    if args.server is None:
        parser.error("there is no tritonserver here; give --server")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(args, Path(folder)), indent=1))


if __name__ == "__main__":
    main()
