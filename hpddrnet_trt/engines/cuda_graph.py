"""CUDA graphs: work recorded from a stream once and then launched as a whole.

A launch costs the processor one call instead of one for each kernel and copy (CUDA programming guide,
"CUDA Graphs"). Addresses and sizes are recorded with the work: they must stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.engines.cuda import Stream, check, cudart, freed_with


class CaptureError(Exception):
    """The work cannot be recorded; the message says why. The stream goes on working."""


class CudaGraph:
    """What ``record`` queues on ``stream``, recorded without running it. Create with the device current.

    Raises :class:`CaptureError`. Freed by :meth:`close` or with the object.
    """

    def __init__(self, stream: Stream, record: Callable[[], None]) -> None:
        runtime = cudart()
        # Other threads may go on allocating memory meanwhile ("thread local"); this one must not.
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        try:
            _check(runtime.cudaStreamBeginCapture(stream.object, mode), "starting to record")
            try:
                record()
            finally:
                recorded = runtime.cudaStreamEndCapture(stream.object)  # also ends what has failed
            graph = _check(recorded, "recording")
            try:
                # Of the ways to instantiate, the one with the same arguments in CUDA 11, 12 and 13.
                self._graph = _check(runtime.cudaGraphInstantiateWithFlags(graph, 0), "preparing the graph")
            finally:
                runtime.cudaGraphDestroy(graph)
        except (CaptureError, UserError) as exc:
            runtime.cudaGetLastError()  # forget it, so that no other library takes it for its own
            raise CaptureError(str(exc)) from exc
        self._launch, self._stream = runtime.cudaGraphLaunch, stream.object
        self.close = freed_with(self, runtime.cudaGraphExecDestroy, self._graph)

    def launch(self) -> None:
        """Queue the work on its stream."""
        check(self._launch(self._graph, self._stream), "launching a CUDA graph")


def _check(result: tuple[Any, ...], doing: str) -> Any:
    status, *values = result
    if status:
        raise CaptureError(f"CUDA reports {status.name} while {doing}")
    return values[0] if values else None
