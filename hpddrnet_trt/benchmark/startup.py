"""Whether each entry runs at all, at which sizes, and what memory it takes there: before anything is timed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpddrnet_trt.benchmark.entries import Entry
from hpddrnet_trt.benchmark.images import Grey8, Image, timing_frames
from hpddrnet_trt.benchmark.measures import Case
from hpddrnet_trt.benchmark.probe import probe
from hpddrnet_trt.benchmark.result import Memory, MemoryFailure, Settings, Start, size_text
from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.manifest import read_manifest
from hpddrnet_trt.data.preprocess import network_input
from hpddrnet_trt.engines.base import input_contract


@dataclass(frozen=True)
class Probed:
    """One size: a frame of each batch, smallest first, and whether it is one of those that are timed."""

    frames: Sequence[Grey8]
    timed: bool


@dataclass
class Started:
    """What the child processes of one entry found. ``start`` is that of the largest timed frame."""

    start: Start | None = None
    memory: list[Memory] = field(default_factory=list)
    failures: list[MemoryFailure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reason: str | None = None  # why it does not run at all

    def ran(self, case: Case) -> bool:
        """Whether the entry got through this size and batch."""
        key = (case.height, case.width, case.batch)
        return any((one.height, one.width, one.batch) == key for one in self.memory)


def probed_sizes(cases: Sequence[Case], images: Sequence[Image], settings: Settings) -> list[Probed]:
    """The timed sizes with all batches, then those of which only memory is asked, with the smallest batch."""
    timed: dict[tuple[int, int], list[Grey8]] = {}
    for case in cases:
        timed.setdefault((case.height, case.width), []).append(case.frames[0])
    batch = min(settings.batches)
    others = [size for size in dict.fromkeys(settings.memory_sizes) if size not in timed]
    return [
        *(Probed(frames, True) for frames in timed.values()),
        *(Probed(timing_frames(images[:batch], *size, batch)[0][:1], False) for size in others),
    ]


def start_entry(entry: Entry, options: Mapping[str, Any], sizes: Sequence[Probed]) -> Started:
    """Start ``entry`` in a process of its own for each size, and run all its batches there."""
    found = Started()
    try:
        if entry.engine == "openvino":
            found.notes.append(_verify_openvino(entry, sizes[0].frames[0]))
        for size in sizes:
            for frame, answer in zip(size.frames, _probe(entry, options, size.frames, found), strict=True):
                _add(found, frame, answer, size.timed)
    except UserError as exc:
        found.reason = str(exc)
    if found.reason is None and found.start is None:
        found.reason = "; ".join(found.notes)
    return found


def _probe(entry: Entry, options: Mapping[str, Any], frames: Sequence[Grey8], found: Started) -> list[Start | str]:
    try:
        return probe(entry.path, entry.engine, options, frames)
    except UserError as exc:
        if not found.memory and not found.failures:
            raise  # not even the first size: it does not run here
        return [str(exc)] * len(frames)


def _add(found: Started, frame: Grey8, answer: Start | str, timed: bool) -> None:
    batch, height, width = frame.shape
    size = {"height": height, "width": width, "batch": batch}
    if isinstance(answer, str):
        found.failures.append(MemoryFailure(**size, reason=answer))
        if timed:
            found.notes.append(f"does not run at {size_text(**size)}: {answer}")
        return
    found.memory.append(Memory(**size, host_peak_mib=answer.host_peak_mib, device_mib=answer.device_mib))
    if timed and (found.start is None or frame.size >= math.prod(map(int, found.start.frame.split("x")))):
        found.start = answer


def _verify_openvino(entry: Entry, frame: Grey8) -> str:
    # OpenVINO has been seen to crash, and to give wrong labels: compare before it is trusted.
    from hpddrnet_trt.engines.openvino import verify_in_child

    manifest = read_manifest(entry.path)
    batch = network_input(list(frame), input_contract(manifest), manifest.normalization)
    share = verify_in_child(entry.path, batch, precision=entry.options.get("precision", "auto"))
    return f"checked in a child process: {share:.2%} of labels as ONNX Runtime's"
