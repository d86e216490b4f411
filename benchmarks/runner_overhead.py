"""What a `Segmenter` adds to the bare engine: `python benchmarks/runner_overhead.py --output overhead.json`.

For each engine, in turn and in one run, so that the machine's moods meet all three alike:

- `segment`: `segmenter.segment(frame)`, from a frame in memory to the result,
- `infer`: `engine.infer(batch)`, the same inference without the segmenter,
- `bound`: `engine.bind(batch)()`, the network alone where the engine computes.

The engine `nothing` infers nothing at once: what remains is this package's own share of a frame, without
the noise of an inference. Prints medians, the median of the pairwise differences and of the pairwise ratios with
their 95 % intervals (bootstrap), and writes them with versions and command.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import hpddrnet_trt
from hpddrnet_trt import load_segmenter
from hpddrnet_trt.benchmark.machine import describe_machine
from hpddrnet_trt.benchmark.timing import median_interval
from hpddrnet_trt.core.files import write_text
from hpddrnet_trt.core.manifest import ClassInfo, InputContract, Manifest, NetworkConfig, OutputContract
from hpddrnet_trt.core.provenance import command_line
from hpddrnet_trt.engines.base import EngineBase, Prediction, check_input, input_contract
from hpddrnet_trt.inference import Segmenter

NOTHING = "nothing"
ENGINES = (NOTHING, "onnxruntime", "openvino")
Real = npt.NDArray[np.float64]


class NoEngine(EngineBase):
    """Checks its input as every engine does, and returns the same labels at once."""

    def __init__(self, size: int) -> None:
        classes = [ClassInfo(name=name, color=(0, 0, 0)) for name in "abc"]
        self.manifest = Manifest(
            name=NOTHING, network=NetworkConfig(num_classes=3), classes=classes, input=InputContract(),
            output=OutputContract(),
        )  # fmt: skip
        self._found = Prediction(np.zeros((1, size, size), np.uint8))

    @property
    def runtime(self) -> str:
        return NOTHING

    def infer(self, images: npt.NDArray[Any]) -> Prediction:
        check_input(images, input_contract(self.manifest))
        return self._found

    def bind(self, images: npt.NDArray[Any]) -> Callable[[], None]:
        return lambda: None


def measure(segmenter: Segmenter, size: int, runs: int, warm_up: int) -> dict[str, Real]:
    """Milliseconds of each way, ``[runs]``; one after the other in every round, in changing order."""
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (size, size), dtype=np.uint8)
    batch = frame[None, None]
    ways: dict[str, Callable[[], object]] = {
        "segment": lambda: segmenter.segment(frame),
        "infer": lambda: segmenter.engine.infer(batch),
        "bound": segmenter.engine.bind(batch),
    }
    times = {name: np.empty(runs) for name in ways}
    for number in range(-warm_up, runs):
        for name in rng.permutation(list(ways)):
            started = time.perf_counter_ns()
            ways[name]()
            spent = time.perf_counter_ns() - started
            if number >= 0:
                times[name][number] = spent / 1e6
    return times


def summary(times: dict[str, Real]) -> dict[str, Any]:
    """Medians and 95th percentiles in milliseconds; what `segment` adds to the others, each round by itself."""
    result: dict[str, Any] = {
        name: {"p50_ms": float(np.median(values)), "p95_ms": float(np.percentile(values, 95))}
        for name, values in times.items()
    }
    for other in ("infer", "bound"):
        added, ratio = times["segment"] - times[other], times["segment"] / times[other]
        result[f"segment over {other}"] = {
            "added_ms": float(np.median(added)), "added_ms_95": median_interval(added),
            "ratio": float(np.median(ratio)), "ratio_95": median_interval(ratio),
        }  # fmt: skip
    return result


def told(name: str, runtime: str, found: dict[str, Any]) -> str:
    lines = [f"{name} ({runtime})"]
    lines += [
        f"  {way:8} p50 {found[way]['p50_ms']:9.3f} ms   p95 {found[way]['p95_ms']:9.3f} ms"
        for way in ("segment", "infer", "bound")
    ]
    for other in ("infer", "bound") if name != NOTHING else ("infer",):
        part = found[f"segment over {other}"]
        low, high = part["added_ms_95"]
        line = f"  segment adds {part['added_ms']:.3f} ms ({low:.3f} to {high:.3f}) to {other}"
        if name != NOTHING:
            low, high = part["ratio_95"]
            line += f", ratio {part['ratio']:.4f} ({low:.4f} to {high:.4f})"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nasa-super1", help="a model that comes with the package, or a file")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--size", type=int, default=1024, help="height and width of the frame")
    parser.add_argument("--runs", type=int, default=60, help=f"rounds of each engine; {NOTHING} takes 20 times as many")
    parser.add_argument("--warm-up", type=int, default=5, help="rounds before those that count")
    parser.add_argument("--threads", type=int, help="CPU threads of an inference; default: the engine's own choice")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    machine = describe_machine()
    print(*machine.warnings, sep="\n")
    found: dict[str, Any] = {}
    for name in arguments.engines:
        if name == NOTHING:
            segmenter, runs = Segmenter(NoEngine(arguments.size)), 20 * arguments.runs
        else:
            segmenter = load_segmenter(arguments.model, engine=name, threads=arguments.threads)
            runs = arguments.runs
        with segmenter:
            runtime = segmenter.engine.runtime
            figures = summary(measure(segmenter, arguments.size, runs, arguments.warm_up))
        print(told(name, runtime, figures), flush=True)
        found[name] = {"runtime": runtime, "runs": runs, **figures}
    if arguments.output is not None:
        record = {
            "command": command_line(), "size": arguments.size, "model": arguments.model,
            "version": hpddrnet_trt.__version__, "machine": machine.model_dump(), "engines": found,
        }  # fmt: skip
        print(f"written: {write_text(arguments.output, json.dumps(record, indent=1))}")


if __name__ == "__main__":
    main()
