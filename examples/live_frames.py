"""Segment frames as they come from any source: a generator here, your camera in its place.

    python examples/live_frames.py --frames 200 --rate 30
    python examples/live_frames.py --picture micrograph.tif --policy block

The source goes at its own rate; a slower model leaves frames out (policy `latest`). Prints area fractions and the
age of each result, then what became of all frames.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from hpddrnet_trt import load_segmenter
from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.data.micrograph import Micrograph, read_micrograph
from hpddrnet_trt.data.simulate import PIXEL_SIZE_M, simulate
from hpddrnet_trt.stream import State, Stream, StreamResult


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, help="a micrograph to pan over; default: a simulated one")
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--rate", type=float, default=30, help="frames per second; 0: no pauses")
    parser.add_argument("--size", type=int, default=256, help="height and width of a frame")
    parser.add_argument("--policy", choices=("latest", "block", "reject"), default="latest")
    parser.add_argument("--model", default="nasa-super1", help="a model that comes with the package, or a file")
    parser.add_argument("--engine", default="auto")
    arguments = parser.parse_args()

    opener = partial(load_segmenter, arguments.model, engine=arguments.engine)
    size = (arguments.size, arguments.size)
    with Stream(opener, policy=arguments.policy, on_result=show, on_state=tell, warm_up=[size]) as stream:
        if stream.wait_ready() is State.FAILED:
            raise SystemExit(1)
        for frame in pan(arguments.picture, arguments.size, arguments.frames):
            stream.submit(frame)
            time.sleep(1 / arguments.rate if arguments.rate > 0 else 0)
    counts = stream.statistics()
    why = ", ".join(f"{count} {reason}" for reason, count in counts.dropped_because.items())
    print(f"{counts.submitted} frames = {counts.processed} segmented + {counts.dropped} dropped ({why or 'none'}) "
          f"+ {counts.failed} failed + {counts.pending} pending")  # fmt: skip
    for name, times in counts.stages.items():
        print(f"{name}: median {times.p50_ms:.1f} ms, p99 {times.p99_ms:.1f} ms, longest {times.worst_ms:.1f} ms")


def pan(picture: Path | None, size: int, count: int) -> Iterator[Micrograph]:
    """The acquisition: ``count`` fields of view that move over one micrograph."""
    if picture is None:
        micrograph = Micrograph(simulate(2 * size, 2 * size, seed=0)[0], pixel_size_m=PIXEL_SIZE_M)
    else:
        micrograph = read_micrograph(picture)
    height, width = micrograph.pixels.shape
    for number in range(count):
        row = int((height - min(size, height)) * (0.5 - 0.5 * math.cos(number / 15)))
        column = int((width - min(size, width)) * (0.5 - 0.5 * math.cos(number / 23)))
        field = micrograph.pixels[row : row + size, column : column + size]
        yield Micrograph(field, pixel_size_m=micrograph.pixel_size_m)


def show(result: StreamResult) -> None:
    """Called on a thread of the stream: the source never waits for it."""
    if result.segmentation is None:
        print(f"frame {result.frame_id} failed: {result.error}")
        return
    areas = ", ".join(f"{name} {fraction:.1%}" for name, fraction in result.segmentation.fractions().items())
    if result.segmentation.domain.notice is not None:
        areas += f", {result.segmentation.domain.notice}"
    print(f"frame {result.frame_id}: {areas} ({1e3 * result.age_s():.0f} ms old)")


def tell(state: State, reason: str | None) -> None:
    """Show this where the operator looks: a picture that stands still must say why."""
    print(f"stream {state.value}" + (f": {reason}" if reason else ""))


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as exc:
        sys.exit(f"error: {exc}")
    except KeyboardInterrupt:
        sys.exit("stopped")
