"""How long each module of a PyTorch network takes, without what its children take."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

from torch import nn

WARM_UP = 3  # runs that are not counted


def module_times(
    network: nn.Module, run: Callable[[], object], synchronise: Callable[[], object], runs: int
) -> dict[str, float]:
    """Median milliseconds of each module in one call of ``run``, by its path (``backbone.stem.0.conv``).

    A module with children counts what happens between them: sums, resizes, and in position attention
    (``backbone.sps.0.pa``) the products and the softmax. What ``run`` does outside of ``network``
    (normalisation, resize to full size, arg-max) is ``output``. ``synchronise`` waits for the device,
    before and after each module, so the sum is more than an undisturbed run.
    """
    clock = _Clock(synchronise)
    samples: dict[str, list[float]] = defaultdict(list)
    handles: list[Any] = []
    for path, module in network.named_modules():
        handles.append(module.register_forward_pre_hook(clock.enter))
        handles.append(module.register_forward_hook(clock.leave(path or "network")))
    try:
        for number in range(WARM_UP + runs):
            for path, seconds in clock.measure(run).items():
                if number >= WARM_UP:
                    samples[path].append(seconds * 1000)
    finally:
        for handle in handles:
            handle.remove()
    return {path: median(values) for path, values in samples.items()}


class _Clock:
    """Nested stop-watches: each measures its own time, its children's taken off."""

    def __init__(self, synchronise: Callable[[], object]) -> None:
        self._synchronise = synchronise
        self._open: list[tuple[float, float]] = []  # begin, time spent in children so far
        self._own: dict[str, float] = {}

    def measure(self, run: Callable[[], object]) -> dict[str, float]:
        self._own = {}
        self.enter()
        run()
        self._close("output")
        return self._own

    def enter(self, *_: Any) -> None:
        self._synchronise()
        self._open.append((time.perf_counter(), 0.0))

    def leave(self, path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._close(path)

        return hook

    def _close(self, path: str) -> None:
        self._synchronise()
        begin, inside = self._open.pop()
        total = time.perf_counter() - begin
        # A module that runs twice in one inference counts twice.
        self._own[path] = self._own.get(path, 0.0) + total - inside
        if self._open:
            outer, other = self._open.pop()
            self._open.append((outer, other + total))
