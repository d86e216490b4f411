"""What is timed, the same for every engine: frame to labels, one at a time or many, and the network alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy.typing as npt

from hpddrnet_trt.benchmark.timing import Frames
from hpddrnet_trt.data.preprocess import network_input
from hpddrnet_trt.engines.base import Engine, input_contract


def prepared(engine: Engine, frames: Frames) -> npt.NDArray[Any]:
    """Grey frames ``[N, H, W]`` as the batch that ``engine`` takes: padded and, for float models, normalised."""
    return network_input(list(frames), input_contract(engine.manifest), engine.manifest.normalization)


def frame_to_labels(engine: Engine) -> Callable[[Frames], Frames]:
    """A function from host uint8 grey frames ``[N, H, W]`` to host uint8 labels ``[N, H, W]``.

    Everything between is included: padding and, for three-channel float models, normalisation on
    the host; copies to and from a device; inference; resizing and arg-max.
    """

    def run(frames: Frames) -> Frames:
        height, width = frames.shape[1:]
        return engine.infer(prepared(engine, frames)).labels[:, :height, :width]

    return run


def frames_to_labels(engine: Engine) -> Callable[[Iterable[Frames]], Iterator[Frames]]:
    """:func:`frame_to_labels` for a stream of batches, as many in flight as suits the engine; order is kept."""

    def run(stream: Iterable[Frames]) -> Iterator[Frames]:
        sizes: deque[tuple[int, int]] = deque()

        def batches() -> Iterator[npt.NDArray[Any]]:
            for frames in stream:
                sizes.append((frames.shape[1], frames.shape[2]))
                yield prepared(engine, frames)

        for prediction in engine.infer_many(batches()):
            height, width = sizes.popleft()
            yield prediction.labels[:, :height, :width]

    return run


def network_only(engine: Engine, frames: Frames) -> Callable[[object], None]:
    """The network alone on ``frames``, which are placed where it computes once, here.

    The result ignores its argument. Raises :class:`NotImplementedError` when the engine has no such measure.
    """
    bind = getattr(engine, "bind", None)
    if bind is None:
        raise NotImplementedError("this engine cannot run the network alone")
    run: Callable[[], None] = bind(prepared(engine, frames))
    return lambda _: run()
