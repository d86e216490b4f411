"""Several batches in flight on one GPU with PyTorch: copies run beside the computing.

A batch goes through three stages, each on a stream of its own: into the GPU, computing, out again.
While one batch computes, the next one is copied in and the one before is copied out. Host memory is
page-locked, since only then a copy returns at once (PyTorch, "CUDA semantics", section
"Use pinned memory buffers").
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpddrnet_trt.engines.base import Prediction

IN_FLIGHT = 3  # one in each stage

Compute = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # device images to device labels and logits


@dataclass
class _Slot:
    """Buffers of one batch in flight, used again for later batches of the same shape."""

    host_input: Tensor
    device_input: Tensor
    loaded: torch.cuda.Event
    computed: torch.cuda.Event
    done: torch.cuda.Event
    device_outputs: tuple[Tensor, Tensor | None] | None = None  # alive until they are copied
    host_outputs: list[Tensor | None] = field(default_factory=list)


class Overlap:
    """Runs batches on ``device`` with copies beside the computing.

    ``compute`` maps device images to device labels uint8 ``[N, H, W]`` and logits float32
    ``[N, C, H, W]`` or None, and only enqueues work. ``clone`` copies its outputs within the GPU
    first: those of a CUDA graph are overwritten by the next run.
    """

    def __init__(self, compute: Compute, device: torch.device, clone: bool) -> None:
        self._compute, self._device, self._clone = compute, device, clone
        self._copy_in, self._copy_out = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
        self._free: defaultdict[tuple[torch.dtype, torch.Size], list[_Slot]] = defaultdict(list)

    def run(self, batches: Iterable[npt.NDArray[Any]]) -> Iterator[Prediction]:
        """Predictions in the order of ``batches``; contiguous arrays of any shapes and dtypes."""
        waiting: deque[_Slot] = deque()
        try:
            for images in batches:
                waiting.append(self._launch(images))
                if len(waiting) == IN_FLIGHT:
                    yield self._finish(waiting.popleft())
            while waiting:
                yield self._finish(waiting.popleft())
        finally:
            # Nothing may still run when the buffers are freed, also when the caller stops half way.
            for slot in waiting:
                slot.done.synchronize()

    def _launch(self, images: npt.NDArray[Any]) -> _Slot:
        source = torch.from_numpy(images)
        slots = self._free[_kind(source)]
        slot = slots.pop() if slots else self._new_slot(source)
        slot.host_input.copy_(source)
        compute_stream = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copy_in):
            slot.device_input.copy_(slot.host_input, non_blocking=True)
            slot.loaded.record(self._copy_in)
        compute_stream.wait_event(slot.loaded)
        labels, logits = self._compute(slot.device_input)
        if self._clone:
            labels, logits = labels.clone(), None if logits is None else logits.clone()
        slot.computed.record(compute_stream)
        slot.device_outputs = (labels, logits)
        if not slot.host_outputs:
            slot.host_outputs = [None if part is None else pinned(part) for part in slot.device_outputs]
        self._copy_out.wait_event(slot.computed)
        with torch.cuda.stream(self._copy_out):
            for target, part in zip(slot.host_outputs, slot.device_outputs, strict=True):
                if target is not None and part is not None:
                    target.copy_(part, non_blocking=True)
            slot.done.record(self._copy_out)
        return slot

    def _finish(self, slot: _Slot) -> Prediction:
        slot.done.synchronize()
        labels, logits = (None if part is None else part.numpy().copy() for part in slot.host_outputs)
        slot.device_outputs = None
        self._free[_kind(slot.host_input)].append(slot)
        assert labels is not None
        return Prediction(labels, logits=logits)

    def _new_slot(self, like: Tensor) -> _Slot:
        loaded, computed, done = (torch.cuda.Event() for _ in range(3))  # type: ignore[no-untyped-call]
        return _Slot(pinned(like), torch.empty_like(like, device=self._device), loaded, computed, done)


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.Size]:
    return tensor.dtype, tensor.shape


def pinned(like: Tensor) -> Tensor:
    """Uninitialised page-locked host memory of the same shape and dtype."""
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


def as_source(images: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A contiguous array that PyTorch takes without a copy of its own (it warns of read-only memory)."""
    array = np.ascontiguousarray(images)
    return array if array.flags.writeable else array.copy()
