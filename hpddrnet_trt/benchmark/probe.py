"""Start each entry in processes of its own before anything is timed: does it run here, how long does loading take,
what memory does it hold at each size?

Only a fresh process gives an honest memory figure, and only another process survives a library
that crashes or a machine that runs out of memory. Run as
``python -m hpddrnet_trt.benchmark.probe JOB.json`` by :func:`probe`.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import hpddrnet_trt
from hpddrnet_trt.benchmark.entries import Entry
from hpddrnet_trt.benchmark.images import Grey8, Image, timing_frames
from hpddrnet_trt.benchmark.machine import GpuSensor, device_memory_mib
from hpddrnet_trt.benchmark.measures import BenchmarkCase, end_to_end
from hpddrnet_trt.benchmark.result import Memory, MemoryFailure, Settings, Shape, Start
from hpddrnet_trt.benchmark.timing import Frames
from hpddrnet_trt.core.errors import UserError, describe, one_line
from hpddrnet_trt.core.manifest import read_manifest
from hpddrnet_trt.core.memory import peak_memory_mib, resident_memory_mib
from hpddrnet_trt.data.preprocess import network_input
from hpddrnet_trt.engines import Engine, load_engine
from hpddrnet_trt.engines.base import input_contract

TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Probed:
    """One size: a frame of each batch, smallest first, and whether it is one of those that are timed."""

    frames: Sequence[Grey8]
    timed: bool


@dataclass
class Startup:
    """What the child processes of one entry found. ``start`` is that of the largest timed frame."""

    start: Start | None = None
    memory: list[Memory] = field(default_factory=list)
    failures: list[MemoryFailure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reason: str | None = None  # why it does not run at all

    def ran(self, case: BenchmarkCase) -> bool:
        """Whether the entry got through this size and batch."""
        return any(one.shape == case.shape for one in self.memory)


def probed_sizes(cases: Sequence[BenchmarkCase], images: Sequence[Image], settings: Settings) -> list[Probed]:
    """The timed sizes with all batches, then those of which only memory is asked, with the smallest batch."""
    timed: dict[tuple[int, int], list[Grey8]] = {}
    for case in cases:
        timed.setdefault(case.shape[:2], []).append(case.frames[0])
    batch = min(settings.batches)
    others = [size for size in dict.fromkeys(settings.memory_sizes) if size not in timed]
    return [
        *(Probed(frames, True) for frames in timed.values()),
        *(Probed(timing_frames(images[:batch], *size, batch)[0][:1], False) for size in others),
    ]


def start_entry(entry: Entry, options: Mapping[str, Any], sizes: Sequence[Probed]) -> Startup:
    """Start ``entry`` in a process of its own for each size, and run all its batches there."""
    startup = Startup()
    try:
        if entry.engine == "openvino":
            startup.notes.append(_verify_openvino(entry, sizes[0].frames[0]))
        for size in sizes:
            for frame, answer in zip(size.frames, _answers(entry, options, size.frames, startup), strict=True):
                _add(startup, frame, answer, size.timed)
    except UserError as exc:
        startup.reason = str(exc)
    if startup.reason is None and startup.start is None:
        startup.reason = "; ".join(startup.notes)
    return startup


def _answers(
    entry: Entry, options: Mapping[str, Any], frames: Sequence[Grey8], startup: Startup
) -> list[Start | str]:
    try:
        return probe(entry.path, entry.engine, options, frames)
    except UserError as exc:
        if not startup.memory and not startup.failures:
            raise  # not even the first size: it does not run here
        return [str(exc)] * len(frames)


def _add(startup: Startup, frame: Grey8, answer: Start | str, timed: bool) -> None:
    batch, height, width = frame.shape
    shape = Shape(height, width, batch)
    if isinstance(answer, str):
        startup.failures.append(MemoryFailure(**shape._asdict(), reason=answer))
        startup.notes.append(f"does not run at {shape}: {answer}")
        return
    startup.memory.append(
        Memory(**shape._asdict(), host_peak_mib=answer.host_peak_mib, device_mib=answer.device_mib)
    )
    largest = 0 if startup.start is None else math.prod(map(int, startup.start.frame.split("x")))
    if timed and frame.size >= largest:
        startup.start = answer


def _verify_openvino(entry: Entry, frame: Grey8) -> str:
    # OpenVINO has been seen to crash, and to give wrong labels: compare before it is trusted.
    from hpddrnet_trt.engines.openvino import verify_in_child

    manifest = read_manifest(entry.path)
    batch = network_input(list(frame), input_contract(manifest), manifest.normalization)
    share = verify_in_child(entry.path, batch, precision=entry.options.get("precision", "auto"))
    return f"checked in a child process: {share:.2%} of labels as ONNX Runtime's"


def probe(
    path: Path, engine: str, options: Mapping[str, Any], frames: Sequence[Frames], timeout_s: float = TIMEOUT_S
) -> list[Start | str]:
    """Load ``path`` in a child process and run each of ``frames`` (``[N, H, W]``, smallest first) twice.

    The answer for each frame is what it took, or the reason why the engine could not run it; after a
    crash or ``timeout_s`` the rest have that reason. Memory is the highest so far: the honest figure of
    a size is that of the first frame. Raises :class:`UserError` when the engine cannot even be loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        job, answers = Path(folder) / "job.json", Path(folder) / "answers.jsonl"
        files = [str(Path(folder) / f"{number}.npy") for number in range(len(frames))]
        for file, frame in zip(files, frames, strict=True):
            np.save(file, frame)
        content = {"path": str(path), "engine": engine, "options": dict(options), "frames": files}
        job.write_text(json.dumps({**content, "answers": str(answers)}), encoding="utf-8")
        end = _run_child(job, timeout_s)
        lines = answers.read_text(encoding="utf-8").splitlines() if answers.exists() else []
    silent = {"error": end or "the process that ran it gave no answer"}
    loaded, *records = [json.loads(line) for line in lines] or [silent]
    if "error" in loaded:
        raise UserError(loaded["error"])
    records += [silent] * (len(frames) - len(records))
    return [record["error"] if "error" in record else Start(**record) for record in records]


def _run_child(job: Path, timeout_s: float) -> str | None:
    """How the child failed, None when it ended well."""
    # The child must find this package also when it runs from a source tree.
    root = str(Path(hpddrnet_trt.__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "hpddrnet_trt.benchmark.probe", str(job)]
    try:
        child = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"loading and the first inferences did not finish within {timeout_s:.0f} s"
    return how_it_ended(child.returncode, child.stderr)


def how_it_ended(code: int, errors: str) -> str | None:
    """A child's exit code in words, None for 0."""
    if code < 0:
        name = signal.Signals(-code).name
        if name == "SIGKILL":
            return f"the process that ran it was killed ({name}), most likely because memory ran out"
        return f"the process that ran it crashed ({name})"
    if code:
        return f"the process that ran it ended with code {code} ({one_line(errors, 'last')})"
    return None


class _Meter:
    """Memory of this process over that at the meter's start, MiB."""

    def __init__(self) -> None:
        self._host, self._device = resident_memory_mib(), device_memory_mib()
        self._gpu = GpuSensor.open() if self._device is not None else None

    def host(self) -> float:
        return max(0.0, peak_memory_mib() - self._host)

    def device(self) -> float | None:
        """This process's GPU memory as the driver counts it, else the change of what all processes use."""
        own = self._gpu.process_mib(os.getpid()) if self._gpu is not None else None
        if own is not None:
            return own
        now = device_memory_mib()
        return None if self._device is None or now is None else max(0.0, now - self._device)


def _child(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    # Linux: when memory runs out, this process is to go, not the benchmark that waits for it.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    # Line by line, so that what was found before a crash is kept.
    with Path(job["answers"]).open("w", encoding="utf-8", buffering=1) as answers:
        meter, begin = _Meter(), time.perf_counter()
        try:
            engine = load_engine(job["path"], job["engine"], **job["options"])
        except Exception as exc:
            # Whatever a runtime raises here is the answer: the reason why this engine does not run.
            answers.write(json.dumps({"error": describe(exc)}) + "\n")
            return
        load_s = time.perf_counter() - begin
        answers.write(json.dumps({"load_s": load_s}) + "\n")
        with engine:
            for file in job["frames"]:
                answers.write(_answer(engine, np.load(file), load_s, meter) + "\n")


def _answer(engine: Engine, frame: Frames, load_s: float, meter: _Meter) -> str:
    run = end_to_end(engine)
    try:
        begin = time.perf_counter()
        run(frame)
        first_s = time.perf_counter() - begin
        run(frame)
    except Exception as exc:
        # As above; the next size may well run.
        return json.dumps({"error": describe(exc)})
    return Start(
        load_s=load_s, first_s=first_s, host_peak_mib=meter.host(), device_mib=meter.device(),
        frame="x".join(map(str, frame.shape)),
    ).model_dump_json()  # fmt: skip


if __name__ == "__main__":
    _child(sys.argv[1])
