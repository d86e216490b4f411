"""Segment what an OpenFIBSEM microscope sees while it acquires.

    python examples/live_openfibsem.py --config microscope-configuration.yaml --seconds 60
    python examples/live_openfibsem.py --replay micrographs/ --seconds 10

The first command connects to the microscope that the configuration file describes and starts its live
acquisition; the second needs none: OpenFIBSEM's simulated microscope shows the pictures of a folder. One line per
result: beam, age, area fractions. Needs: pip install 'hpddrnet-trt[fibsem]'.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from hpddrnet_trt import load_segmenter
from hpddrnet_trt.core.errors import UserError, require
from hpddrnet_trt.data.datasets import image_files
from hpddrnet_trt.data.intensity import to_grey8
from hpddrnet_trt.data.micrograph import read_micrograph
from hpddrnet_trt.integrations.fibsem import LiveSegmentation, replay_microscope
from hpddrnet_trt.stream import State, Stream, StreamResult


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", help="configuration file of the microscope")
    source.add_argument("--replay", type=Path, help="folder of micrographs of one size, instead of a microscope")
    parser.add_argument("--beam", choices=("electron", "ion"), default="electron")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--model", default="nasa-super1", help="a model that comes with the package, or a file")
    parser.add_argument("--engine", default="auto")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        microscope = open_microscope(arguments.config, arguments.replay, folder)
        opener = partial(load_segmenter, arguments.model, engine=arguments.engine)
        try:
            # "latest": a model slower than the microscope leaves frames out instead of falling behind.
            with Stream(opener, policy="latest", on_result=show) as stream:
                if stream.wait_ready(120) is State.FAILED:
                    raise UserError(stream.statistics().reason)
                print(f"model {stream.state.value}")
                with LiveSegmentation(stream, microscope, beams=(arguments.beam,)):
                    acquire(microscope, arguments.beam, arguments.seconds)
        finally:
            microscope.disconnect()
    counts = stream.statistics()
    print(f"{counts.submitted} frames: {counts.processed} segmented, {counts.dropped} left out, {counts.failed} failed")


def open_microscope(config: str | None, replay: Path | None, folder: str) -> Any:
    if replay is not None:
        return replay_microscope([to_grey8(read_micrograph(path).pixels)[0] for path in image_files(replay)], folder)
    utils = require("fibsem.utils", "fibsem", "connect to a microscope")
    try:
        microscope, _ = utils.setup_session(config_path=config)
    except Exception as exc:  # OpenFIBSEM's, and those of the makers' libraries
        raise UserError(f"OpenFIBSEM cannot connect to the microscope of {config}: {exc}") from exc
    return microscope


def acquire(microscope: Any, beam: str, seconds: float) -> None:
    """For so long, or until Ctrl-C; in both cases the beam does not go on scanning."""
    beams = require("fibsem.structures", "fibsem", "name a beam").BeamType
    microscope.start_acquisition(beams[beam.upper()])
    try:
        time.sleep(seconds)
    except KeyboardInterrupt:
        print("stopped")
    finally:
        microscope.stop_acquisition()


def show(result: StreamResult) -> None:
    """One line per frame; called on a thread of the stream, not on the acquisition's."""
    if result.segmentation is None:
        print(f"{result.tag.beam}  failed: {result.error}")
        return
    size = result.segmentation.pixel_size_m
    scale = "pixel size unknown" if size is None else f"{size * 1e9:.3g} nm per pixel"
    areas = ", ".join(f"{name} {fraction:.1%}" for name, fraction in result.segmentation.fractions().items())
    if result.segmentation.domain.notice is not None:
        areas += f", {result.segmentation.domain.notice}"
    print(f"{result.tag.beam}  {result.latency_s * 1e3:.0f} ms  {areas}  ({scale})")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as exc:
        sys.exit(f"error: {exc}")
    except KeyboardInterrupt:
        sys.exit("stopped")
