"""Segment every frame of a Micro-Manager acquisition while it runs.

    python examples/live_micromanager.py --config MMConfig_microscope.cfg --frames 100 --interval 0.2
    python examples/live_micromanager.py --replay micrographs/ --frames 20

The first command acquires with the microscope that the configuration file describes; the second needs none: a
simulated camera shows the pictures of a folder. One line per result: which frame, its age, area fractions.
Needs: pip install 'hpddrnet-trt[micromanager]' (and Micro-Manager's device adapters for a microscope).
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from hpddrnet_trt import load_segmenter
from hpddrnet_trt.core.errors import UserError, require
from hpddrnet_trt.data.datasets import image_files
from hpddrnet_trt.data.micrograph import read_micrograph
from hpddrnet_trt.integrations.micromanager import MicroManagerFeed, replay_core
from hpddrnet_trt.stream import State, Stream, StreamResult


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", help="Micro-Manager configuration file of the microscope")
    source.add_argument("--replay", type=Path, help="folder of micrographs of one size, instead of a microscope")
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--interval", type=float, default=0.1, help="seconds from frame to frame")
    parser.add_argument("--model", default="nasa-super1", help="a model that comes with the package, or a file")
    parser.add_argument("--engine", default="auto")
    arguments = parser.parse_args()

    useq = require("useq", "micromanager", "describe an acquisition")
    plan = useq.TIntervalLoops(interval=arguments.interval, loops=arguments.frames)
    core = open_core(arguments.config, arguments.replay)
    opener = partial(load_segmenter, arguments.model, engine=arguments.engine)
    try:
        # "latest": a model slower than the microscope leaves frames out instead of falling behind.
        with Stream(opener, policy="latest", on_result=show) as stream:
            if stream.wait_ready(120) is State.FAILED:
                raise UserError(stream.statistics().reason)
            print(f"model {stream.state.value}")
            with MicroManagerFeed(core, stream):
                acquire(core, useq.MDASequence(time_plan=plan))
    finally:
        core.unloadAllDevices()
    counts = stream.statistics()
    print(f"{counts.submitted} frames: {counts.processed} segmented, {counts.dropped} left out, {counts.failed} failed")


def open_core(config: str | None, replay: Path | None) -> Any:
    if replay is not None:
        return replay_core([read_micrograph(path).pixels for path in image_files(replay)])
    core = require("pymmcore_plus", "micromanager", "acquire with Micro-Manager").CMMCorePlus()
    try:
        core.loadSystemConfiguration(config or "")
    except (OSError, RuntimeError) as exc:
        raise UserError(f"Micro-Manager cannot use the configuration {config}: {exc}") from exc
    return core


def acquire(core: Any, acquisition: Any) -> None:
    """Until it is through, or Ctrl-C; in both cases nothing acquires any more afterwards."""
    thread = core.run_mda(acquisition)
    try:
        thread.join()
    except KeyboardInterrupt:
        print("stopped")
        core.mda.cancel()
        thread.join()


def show(result: StreamResult) -> None:
    """One line per frame; called on a thread of the stream, not on the acquisition's."""
    index = " ".join(f"{axis}={place}" for axis, place in result.tag.index.items())
    if result.segmentation is None:
        print(f"{index}  failed: {result.error}")
        return
    size = result.segmentation.pixel_size_m
    scale = "pixel size unknown" if size is None else f"{size * 1e9:.3g} nm per pixel"
    areas = ", ".join(f"{name} {fraction:.1%}" for name, fraction in result.segmentation.fractions().items())
    if result.segmentation.domain.notice is not None:
        areas += f", {result.segmentation.domain.notice}"
    print(f"{index}  {result.latency_s * 1e3:.0f} ms  {areas}  ({scale})")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as exc:
        sys.exit(f"error: {exc}")
    except KeyboardInterrupt:
        sys.exit("stopped")
