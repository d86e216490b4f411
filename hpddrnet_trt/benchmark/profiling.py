"""Where the time goes inside an engine, and how far it is from what the machine could do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpddrnet_trt.benchmark.entries import Entry
from hpddrnet_trt.benchmark.frame import prepared
from hpddrnet_trt.benchmark.measures import Case, runs_on_cpu
from hpddrnet_trt.benchmark.result import Ceilings, LayerGroups, Roof
from hpddrnet_trt.benchmark.timing import FAILURES
from hpddrnet_trt.core.errors import describe
from hpddrnet_trt.engines.base import Engine

PROFILE_S = 5.0  # about how long layers are profiled, per entry, size and batch
PROFILE_RUNS = (3, 20)  # fewest and most


def layer_groups(engine: Engine, path: Path, case: Case, latency_s: float) -> LayerGroups | None:
    """Time by part of the network, None for a runtime without a profiler.

    ``latency_s``: about how long one inference takes. Raises what the engine raises.
    """
    from hpddrnet_trt.graph.layers import group_times, tensor_owners

    runs = min(PROFILE_RUNS[1], max(PROFILE_RUNS[0], math.ceil(PROFILE_S / latency_s)))
    times = engine.layer_times(prepared(engine, case.frames[0]), runs)
    if not times:
        return None
    groups = group_times(times, tensor_owners(path))
    return LayerGroups(height=case.height, width=case.width, batch=case.batch, groups=groups)


def measure_roofs(
    entries: Sequence[Entry], engines: Mapping[str, Engine], cases: Sequence[Case], threads: int | None
) -> tuple[Ceilings, dict[str, list[Roof]], dict[str, str]]:
    """The machine's ceilings; by label, each entry's least times under them; and why some have none.

    A result has the ceilings of one device: the GPU where one was used. Entries that run elsewhere have
    no roof. Raises :class:`UserError` when the ceilings cannot be measured.
    """
    from hpddrnet_trt.benchmark.ceilings import measure_ceilings
    from hpddrnet_trt.benchmark.roofline import roofs

    gpu = not all(map(runs_on_cpu, engines.values()))
    ceilings = measure_ceilings(threads, "cuda" if gpu else "cpu")
    sizes = list(dict.fromkeys((case.height, case.width) for case in cases))
    batches = list(dict.fromkeys(case.batch for case in cases))
    graphs = [entry.path for entry in entries if entry.path.suffix.lower() == ".onnx"]
    found: dict[str, list[Roof]] = {}
    reasons: dict[str, str] = {}

    def add(entry: Entry, engine: Engine) -> None:
        try:
            lowered = _lowered_to(entry, engine)
            found[entry.label] = roofs(entry.path, engine.manifest, sizes, batches, ceilings, graphs, lowered)
        except FAILURES as exc:
            reasons[entry.label] = describe(exc)

    for entry in entries:
        if entry.label in engines and gpu != runs_on_cpu(engines[entry.label]):
            add(entry, engines[entry.label])
    return ceilings, found, reasons


def _lowered_to(entry: Entry, engine: Engine) -> str | None:
    """The type that an engine computes the FP32 layers of its file in, where that is another."""
    autocast = entry.options.get("autocast", "off")
    if autocast != "off":
        return str(autocast)
    return "bf16" if getattr(engine, "float_precision", "f32") == "bf16" else None
