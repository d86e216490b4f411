"""Frame to labels: what is timed, the same for every engine."""

from __future__ import annotations

from collections.abc import Callable

from hpddrnet_trt.benchmark.timing import Frames
from hpddrnet_trt.engines.base import Engine, input_contract
from hpddrnet_trt.views import network_input


def frame_to_labels(engine: Engine) -> Callable[[Frames], Frames]:
    """A function from host uint8 grey frames ``[N, H, W]`` to host uint8 labels ``[N, H, W]``.

    Everything between is included: padding and, for three-channel float models, normalisation on
    the host; copies to and from a device; inference; resizing and arg-max.
    """
    contract, normalisation = input_contract(engine.manifest), engine.manifest.normalisation

    def run(frames: Frames) -> Frames:
        height, width = frames.shape[1:]
        batch = network_input(list(frames), contract, normalisation)
        return engine.infer(batch).labels[:, :height, :width]

    return run
