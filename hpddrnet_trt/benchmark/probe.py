"""Start one engine in a process of its own: does it run here, how long does it take, what does it hold?

Only a fresh process gives an honest memory figure, and only another process survives a library
that crashes. Run as ``python -m hpddrnet_trt.benchmark.probe JOB.json`` by :func:`probe`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import hpddrnet_trt
from hpddrnet_trt.benchmark.frame import frame_to_labels
from hpddrnet_trt.benchmark.machine import device_memory_mib, peak_memory_mib, resident_memory_mib
from hpddrnet_trt.benchmark.result import Start
from hpddrnet_trt.benchmark.timing import Frames, describe
from hpddrnet_trt.engines import load_engine
from hpddrnet_trt.errors import UserError

TIMEOUT_S = 900.0


def probe(
    path: Path, engine: str, options: Mapping[str, Any], frames: Sequence[Frames], timeout_s: float = TIMEOUT_S
) -> Start:
    """Load ``path`` in a child process and run each of ``frames`` (``[N, H, W]``) twice.

    Raises :class:`UserError` with the reason when the engine cannot be loaded or run here, and
    when the process crashes or does not finish within ``timeout_s``.
    """
    with tempfile.TemporaryDirectory() as folder:
        job, answer = Path(folder) / "job.json", Path(folder) / "answer.json"
        files = [str(Path(folder) / f"{number}.npy") for number in range(len(frames))]
        for file, frame in zip(files, frames, strict=True):
            np.save(file, frame)
        content = {"path": str(path), "engine": engine, "options": dict(options), "frames": files}
        job.write_text(json.dumps({**content, "answer": str(answer)}), encoding="utf-8")
        _run_child(job, timeout_s)
        found = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in found:
        raise UserError(found["error"])
    return Start(**found)


def _run_child(job: Path, timeout_s: float) -> None:
    # The child must find this package also when it runs from a source tree.
    root = str(Path(hpddrnet_trt.__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "hpddrnet_trt.benchmark.probe", str(job)]
    try:
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as exc:
        raise UserError(f"loading and the first inferences did not finish within {timeout_s:.0f} s") from exc
    if child.returncode < 0:
        raise UserError(f"the process that ran it crashed ({signal.Signals(-child.returncode).name})")
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the process that ran it ended with code {child.returncode} ({reason})")


def measure_start(path: str, engine: str, options: Mapping[str, Any], frames: Sequence[Frames]) -> Start:
    """The figures of :class:`~hpddrnet_trt.benchmark.result.Start`, of this process."""
    host, device = resident_memory_mib(), device_memory_mib()
    begin = time.perf_counter()
    with load_engine(path, engine, **options) as loaded:
        load_s = time.perf_counter() - begin
        run = frame_to_labels(loaded)
        first_s = 0.0
        for frame in sorted(frames, key=lambda entry: entry.size):
            begin = time.perf_counter()
            run(frame)
            first_s = time.perf_counter() - begin
            run(frame)
        largest = "x".join(map(str, max(frames, key=lambda entry: entry.size).shape))
        after = device_memory_mib()
        used = None if device is None or after is None else max(0.0, after - device)
        return Start(
            load_s=load_s, first_s=first_s, host_peak_mib=max(0.0, peak_memory_mib() - host), device_mib=used,
            frame=largest,
        )  # fmt: skip


def _child(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    try:
        frames = [np.load(file) for file in job["frames"]]
        answer = measure_start(job["path"], job["engine"], job["options"], frames).model_dump_json()
    except Exception as exc:
        # Whatever a runtime raises here is the answer: the reason why this engine does not run.
        answer = json.dumps({"error": describe(exc)})
    Path(job["answer"]).write_text(answer, encoding="utf-8")


if __name__ == "__main__":
    _child(sys.argv[1])
