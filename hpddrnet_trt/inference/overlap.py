"""Reading and writing beside inference: threads that work ahead and behind, with bounds on what they hold."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")
Picture = TypeVar("Picture")

# Pixels of pictures that are read and not written yet: 16 of 2048 x 2048. A larger picture is alone.
MOST_PIXELS = 1 << 26
AHEAD = 8  # pictures that are read before they are asked for
WRITERS = max(1, min(4, os.cpu_count() or 1))


class Held:
    """How many pixels are held by reading, inference and writing together."""

    def __init__(self, limit: int = MOST_PIXELS) -> None:
        self.limit, self.pixels = limit, 0
        self.changed = threading.Condition()

    @property
    def full(self) -> bool:
        return self.pixels >= self.limit

    def add(self, pixels: int) -> None:
        """Take so many, or give back if negative."""
        with self.changed:
            self.pixels += pixels
            self.changed.notify_all()


class ReadAhead(Generic[Item, Picture]):
    """Iterate over ``read(item)`` of each item in order, read by another thread before they are asked for.

    It reads ahead while fewer than :data:`AHEAD` pictures wait and ``held`` is at most half full; what is waited for is
    read in any case. ``read`` returns whatever it likes and its number of pixels, which the taker gives back
    (:meth:`Held.add`) when it is done with them. What it raises comes out of the iteration, which ends.

    Use it as a context manager: leaving ends the thread after the picture under way.
    """

    def __init__(self, read: Callable[[Item], tuple[Picture, int]], items: Iterable[Item], held: Held) -> None:
        self._read, self._items, self._held = read, items, held
        self._ready: deque[Picture] = deque()
        self._wanted = self._ended = self._stop = False
        self._error: BaseException | None = None
        # A daemon: a read that hangs on a lost network share must not keep the program from ending.
        self._thread = threading.Thread(target=self._run, name="read ahead", daemon=True)

    def _may_read(self) -> bool:
        room = len(self._ready) < AHEAD and 2 * self._held.pixels < self._held.limit  # the rest is for what follows
        return self._stop or self._wanted or room

    def _run(self) -> None:
        changed = self._held.changed
        try:
            for item in self._items:
                with changed:
                    changed.wait_for(self._may_read)
                    if self._stop:
                        return
                picture, pixels = self._read(item)
                with changed:
                    self._ready.append(picture)
                    self._wanted = False
                    self._held.add(pixels)
        except BaseException as exc:
            self._error = exc
        finally:
            with changed:
                self._ended = True
                changed.notify_all()

    def __iter__(self) -> Iterator[Picture]:
        changed = self._held.changed
        while True:
            with changed:
                self._wanted = not self._ready
                changed.notify_all()
                changed.wait_for(lambda: self._ready or self._ended)
                if not self._ready:
                    break
                picture = self._ready.popleft()
                changed.notify_all()
            yield picture
        if self._error is not None:
            raise self._error

    def __enter__(self) -> ReadAhead[Item, Picture]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._held.changed:
            self._stop = True
            self._held.changed.notify_all()
        self._thread.join()


class WriteBehind(Generic[Picture]):
    """Runs jobs in other threads and hands their results over in the order given: ``finished(result)`` in the caller's.

    :meth:`put` waits while more than twice :data:`WRITERS` jobs are under way or ``held`` is full. Leaving the context
    waits for all jobs, and hands over their results also after an error. Jobs are not to raise.
    """

    def __init__(self, finished: Callable[[Picture], None], held: Held) -> None:
        self._finished, self._held = finished, held
        self._jobs: deque[tuple[Future[Picture], int]] = deque()
        self._threads = ThreadPoolExecutor(WRITERS, thread_name_prefix="write behind")

    def put(self, job: Callable[[], Picture], pixels: int) -> None:
        """Run ``job``; its ``pixels`` are held until it has ended. Ctrl-C comes through when all is in order again."""
        with _uninterrupted():
            self._jobs.append((self._threads.submit(job), pixels))
            while self._jobs and (self._jobs[0][0].done() or len(self._jobs) > 2 * WRITERS or self._held.full):
                self._hand_over()

    def _hand_over(self) -> None:
        job, pixels = self._jobs[0]
        result = job.result()
        self._jobs.popleft()
        self._held.add(-pixels)
        self._finished(result)

    def __enter__(self) -> WriteBehind[Picture]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while self._jobs:
                self._jobs[0][0].exception()  # a second Ctrl-C ends this wait
                with _uninterrupted():
                    self._hand_over()
        finally:
            self._threads.shutdown(cancel_futures=True)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Within the block SIGINT and SIGTERM wait, so that what has been begun is also noted down."""
    came: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in before.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        handlers[signal.Signals(came[0])](came[0], None)
