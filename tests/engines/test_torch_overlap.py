"""Overlapped copies without a GPU: streams that run their work late, as far as the rules allow."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from hpddrnet_trt.engines import torch_overlap
from hpddrnet_trt.engines.torch_overlap import IN_FLIGHT, Overlap, as_source


class LateStream:
    """Keeps its work until somebody waits for it; an event done means everything before it is."""

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []

    def wait_event(self, event: LateEvent) -> None:
        self.work.append(event.synchronize)

    def drain(self, upto: Callable[[], object] | None = None) -> None:
        while self.work:
            step = self.work.pop(0)
            step()
            if step is upto:
                return


class LateEvent:
    def __init__(self) -> None:
        self.stream: LateStream | None = None
        self.mark: Callable[[], object] = lambda: None

    def record(self, stream: LateStream) -> None:
        self.stream, self.mark = stream, lambda: None
        stream.work.append(self.mark)

    def synchronize(self) -> None:
        assert self.stream is not None, "waited for an event that was never recorded"
        if self.mark in self.stream.work:
            self.stream.drain(self.mark)


class LateGpu:
    """Stands in for ``torch.cuda``; copies that may be late are, the host's are not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compute, self.active = LateStream(), None
        self.pinned = 0
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: LateStream())
        monkeypatch.setattr(torch.cuda, "Event", LateEvent)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.compute)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch_overlap, "pinned", self.page_locked)
        copy = Tensor.copy_

        def late_copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
            if not non_blocking:
                return copy(target, source)
            assert self.active is not None, "an asynchronous copy outside of the copying streams"
            self.active.work.append(lambda: copy(target, source))
            return target

        monkeypatch.setattr(Tensor, "copy_", late_copy)

    @contextmanager
    def on(self, stream: LateStream) -> Iterator[None]:
        self.active = stream
        yield
        self.active = None

    def page_locked(self, like: Tensor) -> Tensor:
        self.pinned += 1
        return torch.full(like.shape, 77).to(like.dtype)

    def kernel(self, logits: bool, shared: bool) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
        """Labels are the images plus one; ``shared`` writes every result to the same memory, like a CUDA graph."""
        memory: dict[tuple[int, ...], Tensor] = {}

        def compute(x: Tensor) -> tuple[Tensor, Tensor | None]:
            fresh = torch.zeros_like(x)
            labels = memory.setdefault(tuple(x.shape), fresh) if shared else fresh
            scores = torch.zeros(x.shape, dtype=torch.float32) if logits else None
            result = LateTensor.of(labels, self)

            def run() -> None:
                torch.add(x, 1, out=labels)
                if scores is not None:
                    torch.mul(x, 0.5, out=scores)

            self.compute.work.append(run)
            return result, scores

        return compute


class LateTensor(Tensor):
    """A kernel's output: cloning it is enqueued, too."""

    gpu: LateGpu

    @classmethod
    def of(cls, values: Tensor, gpu: LateGpu) -> LateTensor:
        tensor = values.as_subclass(cls)
        tensor.gpu = gpu
        return tensor

    def clone(self, *args: Any, **options: Any) -> Tensor:
        plain = self.as_subclass(Tensor)
        target = torch.zeros_like(plain)
        self.gpu.compute.work.append(lambda: torch.add(plain, 0, out=target))
        return target


def batch(number: int, size: int = 4) -> npt.NDArray[np.uint8]:
    return np.full((1, size, size), number, np.uint8)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> LateGpu:
    return LateGpu(monkeypatch)


CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [0, 1, IN_FLIGHT, 11])
@pytest.mark.parametrize("logits", [False, True])
def test_results_in_order_however_late(late: LateGpu, count: int, logits: bool) -> None:
    overlap = Overlap(late.kernel(logits, shared=False), CPU, clone=False)
    found = list(overlap.run(batch(number) for number in range(count)))
    assert [prediction.labels.flat[0] for prediction in found] == list(range(1, count + 1))
    assert all((prediction.labels == number + 1).all() for number, prediction in enumerate(found))
    if logits:
        assert all((prediction.logits == number / 2).all() for number, prediction in enumerate(found))
    else:
        assert all(prediction.logits is None for prediction in found)


def test_outputs_of_a_graph_are_copied_before_the_next_run(late: LateGpu) -> None:
    overlap = Overlap(late.kernel(False, shared=True), CPU, clone=True)
    assert [p.labels.flat[0] for p in _greedy(overlap, late)] == list(range(1, 10))


def test_simulation_shows_a_graph_without_copies(late: LateGpu) -> None:
    """The test above can fail: without the copy, later runs overwrite earlier results."""
    overlap = Overlap(late.kernel(False, shared=True), CPU, clone=False)
    assert [p.labels.flat[0] for p in _greedy(overlap, late)] != list(range(1, 10))


def _greedy(overlap: Overlap, late: LateGpu) -> Iterator[Any]:
    """The GPU computes everything it was given before the copying stream starts."""
    launch = overlap._launch

    def eager(images: npt.NDArray[Any]) -> Any:
        slot = launch(images)
        late.compute.drain()
        return slot

    overlap._launch = eager  # type: ignore[method-assign]
    return overlap.run(batch(number) for number in range(9))


def test_buffers_are_few_and_used_again(late: LateGpu) -> None:
    overlap = Overlap(late.kernel(False, shared=False), CPU, clone=False)
    sizes = itertools.cycle((4, 6))
    images = [batch(number, next(sizes)) for number in range(20)]
    found = list(overlap.run(images))
    assert [p.labels.shape for p in found] == [image.shape for image in images]
    assert late.pinned <= 2 * 2 * IN_FLIGHT  # input and labels, of two shapes


def test_results_do_not_share_memory(late: LateGpu) -> None:
    overlap = Overlap(late.kernel(False, shared=False), CPU, clone=False)
    found = list(overlap.run(batch(number) for number in range(8)))
    assert len({prediction.labels.ctypes.data for prediction in found}) == len(found)


def test_stopping_half_way_waits_for_the_rest(late: LateGpu) -> None:
    overlap = Overlap(late.kernel(False, shared=False), CPU, clone=False)
    results = overlap.run(batch(number) for number in itertools.count())
    assert next(results).labels.flat[0] == 1
    results.close()
    assert not any(callable(step) and step.__name__ == "run" for step in late.compute.work)


def test_sources_are_contiguous_and_writable() -> None:
    frozen = batch(3)
    frozen.flags.writeable = False
    assert as_source(frozen).flags.writeable
    assert as_source(np.zeros((1, 4, 6))[:, :, ::2]).flags.c_contiguous
    plain = batch(1)
    assert as_source(plain) is plain
