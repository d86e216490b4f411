"""The stream itself, and taking a frame from somebody else's buffer."""

from __future__ import annotations

import atexit
import dataclasses
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, get_args

import numpy as np

from hpddrnet_trt.core.errors import ContractError, UsageError
from hpddrnet_trt.data.decoded import MAX_PIXELS
from hpddrnet_trt.data.micrograph import Micrograph
from hpddrnet_trt.stream.queue import FrameQueue, Job, bounded
from hpddrnet_trt.stream.records import Policy, State, StreamResult, StreamStatistics, describe
from hpddrnet_trt.stream.worker import Delivery, LiveSegmenter, Plan, Worker

GRACE_S = 0.1  # for threads that only waited for the time to be over
AT_EXIT_S = 2.0  # that the interpreter waits at its end for an inference of a stream nobody closed
_MAX_BYTES = 8 * MAX_PIXELS  # float64


class Stream:
    """Segments live frames without ever holding up or breaking what acquires them.

    ``Stream(partial(load_segmenter, "nasa-super1"), on_result=show)``, then :meth:`submit` from the
    acquisition thread, and :meth:`close` at the end (or use it as a context manager).

    Parameters:

    - ``open_segmenter``: called by each worker on its own thread, also after a fault; what it returns
      is closed on that thread.
    - ``policy``: what happens to a frame when ``capacity`` frames wait already. ``latest`` (live):
      the oldest waiting frame is dropped for the new one. ``block`` (batch): ``submit`` waits.
      ``reject``: the new frame is dropped.
    - ``workers``: threads with a segmenter each.
    - ``capacity``: frames that may wait; default 1 with ``latest``, otherwise 4.
    - ``on_result``: called with every :class:`StreamResult`, also of failed frames, on one thread of
      its own, in the order of frames. With ``latest`` a slow one misses results (the newest
      undelivered one replaces older ones); otherwise frames wait for it, and with ``block`` so does
      the producer. What it raises is counted and logged, and stops nothing.
    - ``on_state``: called with the new :class:`State` and its reason on the same thread, so after
      what ``on_result`` is busy with. States that passed meanwhile are left out, but for FAILED. The
      first may come before this constructor has returned.
    - ``warm_up``: ``(height, width)`` of frames to come; each worker runs them before READY. Without
      any, a frame that already waits gives the size; otherwise the first frame of each size is slow.
    - ``stall_after_s``: seconds in inference after which the stream is STALLED.
    - ``errors_before_restart``: failed frames in a row after which a worker opens its segmenter again.
      Frames that the model's contract does not admit are the frames' fault and do not count.
    - ``max_restarts``: restarts in a row, each after a longer pause, without one frame that succeeds
      before the stream is FAILED. Want of memory alone never makes it so: smaller frames may come.
    - ``max_rate``: frames that are begun per second, at most, over all workers; default: as many as the engine
      manages. With ``latest`` the newest frame is taken when the time has come, so labels stay fresh while the
      processor and its memory are left to acquisition. With ``block`` it slows the producer.
    - ``nice``: added to the niceness of worker threads and of the threads that their runtimes start,
      so that acquisition comes first; 0 leaves them alone. Linux only: does nothing elsewhere.

    Without ``on_result``, take results by :meth:`latest` or :meth:`results`; with ``block`` and
    ``reject`` somebody has to: ``capacity + workers`` untaken results stop the workers. With several
    workers, ``latest`` never goes back in time (a result older than one that is out is not delivered,
    and counted), and the other policies hold a result until those of older frames are out.

    Every method may be called from any thread, also from the callbacks. Raises :class:`UsageError`
    for parameters that make no sense.
    """

    def __init__(
        self,
        open_segmenter: Callable[[], LiveSegmenter],
        *,
        policy: Policy = "latest",
        workers: int = 1,
        capacity: int | None = None,
        on_result: Callable[[StreamResult], object] | None = None,
        on_state: Callable[[State, str | None], object] | None = None,
        warm_up: Sequence[tuple[int, int]] = (),
        stall_after_s: float = 10.0,
        errors_before_restart: int = 5,
        max_restarts: int = 3,
        max_rate: float | None = None,
        nice: int = 5,
    ) -> None:
        if policy not in get_args(Policy):
            raise UsageError(f"unknown policy {policy!r}; choose one of: {', '.join(get_args(Policy))}")
        if capacity is None:
            capacity = 1 if policy == "latest" else 4
        counts = {"workers": workers, "capacity": capacity, "errors_before_restart": errors_before_restart}
        for name, value in counts.items():
            if value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        if not stall_after_s > 0:
            raise UsageError(f"stall_after_s must be a positive number of seconds, got {stall_after_s}")
        if max_rate is not None and not 0 < max_rate < float("inf"):
            raise UsageError(f"max_rate must be a positive number of frames per second, got {max_rate}")
        if max_restarts < 0 or not 0 <= nice <= 19:
            raise UsageError(f"max_restarts must not be negative and nice be 0 to 19, got {max_restarts} and {nice}")
        sizes = _sizes(warm_up)
        self.policy: Policy = policy
        callbacks = on_result is not None or on_state is not None
        self._queue = FrameQueue(policy, capacity, workers, stall_after_s, pushed=on_result is not None,
                                 callbacks=callbacks, spacing_s=1 / max_rate if max_rate else 0.0)  # fmt: skip
        plan = Plan(open_segmenter, sizes, errors_before_restart, max_restarts, nice)
        self._threads: list[threading.Thread] = [Worker(self._queue, number, plan) for number in range(workers)]
        if callbacks:
            self._threads.append(Delivery(self._queue, on_result, on_state))
        # The threads know the queue, not the stream: one that is forgotten closes itself.
        weakref.finalize(self, self._queue.request_close, True, AT_EXIT_S).atexit = False
        self._at_exit = _CloseAtExit(self)
        atexit.register(self._at_exit)
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:
            self._threads = [thread for thread in self._threads if thread.ident is not None]
            self.close(drain=False)
            raise

    def submit(self, frame: Any, tag: Any = None, *, copy: bool = True) -> int | None:
        """Hand over a frame: its id (1, 2, ...), or None when it was dropped at once.

        ``frame``: ``[H, W]`` of uint8, uint16 or float, or a
        :class:`~hpddrnet_trt.data.micrograph.Micrograph` (for the pixel size). ``tag``: comes back
        with the result. ``copy``: the frame is copied before this returns, since acquisition software
        reuses its buffers; False only for an array that nobody will write to again.

        Never raises: anything that is no frame gives a result with ``error``. Never waits, but for
        room with policy ``block``, until the stream closes or fails; and there not from its own
        callbacks, which would wait for themselves: then the frame is dropped as ``rejected``.
        Ids count all submitted frames, so they have gaps where frames were dropped.
        """
        submitted_s = time.monotonic()
        may_wait = not self._is_own_thread()
        if self._queue.rejects(may_wait):
            return None
        image, error = accept_frame(frame, copy)
        return self._queue.enter(Job(image, error, tag, submitted_s), may_wait)

    def wait_ready(self, timeout_s: float | None = None) -> State:
        """Wait until the stream is no longer STARTING, at most ``timeout_s``; the state then."""
        return self._queue.wait_started(0.0 if self._is_own_thread() else timeout_s)

    @property
    def state(self) -> State:
        """The state now; :meth:`statistics` also gives the reason."""
        return self._queue.state()

    def latest(self) -> StreamResult | None:
        """The newest result that this method or :meth:`results` has not handed out yet, else None.

        Never gives the same result twice. Does not wait.
        """
        return self._queue.pull_newest()

    def results(self, timeout_s: float | None = None) -> Iterator[StreamResult]:
        """Results as they come, until the stream is closed or failed and the last one is out.

        Ends earlier when none comes for ``timeout_s``. Beside an ``on_result``, which gets them all,
        this gives the newest one each time. Each result goes to one of several iterators.
        """
        while (result := self._queue.pull_next(timeout_s)) is not None:
            yield result

    def statistics(self) -> StreamStatistics:
        """Counts, times, state and its reason, all of one instant."""
        return self._queue.statistics()

    def close(self, *, drain: bool = True, timeout_s: float = 10.0) -> bool:
        """Take no more frames, finish, and end all threads; True when they have ended in time.

        ``drain``: frames that wait are still processed, at once whatever ``max_rate`` says, and results
        delivered; otherwise both are
        dropped, and only the frame in inference is waited for. After ``timeout_s`` what still waits is
        dropped; an inference or a callback that hangs is left behind on its (daemon) thread,
        ``statistics().reason`` says so, and this returns False.

        Call it as often as you like: a later call waits again, and can only make it end sooner.
        From one of the stream's own callbacks it asks for the end and returns False at once.
        """
        timeout_s = max(timeout_s, 0.0)
        until = time.monotonic() + timeout_s
        self._queue.request_close(drain, timeout_s)
        if self._is_own_thread():
            return False
        in_time = self._join(until)
        if not in_time:
            self._queue.give_up()
            self._join(time.monotonic() + GRACE_S)
        if not any(thread.is_alive() for thread in self._threads):
            atexit.unregister(self._at_exit)
        return in_time

    def _join(self, until_s: float) -> bool:
        """Whether all threads have ended by then."""
        for thread in self._threads:
            thread.join(bounded(max(until_s - time.monotonic(), 0.0)))
        return not any(thread.is_alive() for thread in self._threads)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=kind is None)

    def _is_own_thread(self) -> bool:
        me = threading.get_ident()  # of an ended thread it may have been given to another
        return any(thread.ident == me and thread.is_alive() for thread in self._threads)


def _sizes(warm_up: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    try:
        sizes = tuple((int(height), int(width)) for height, width in warm_up)
    except (TypeError, ValueError):
        sizes = ((0, 0),)
    if any(min(size) < 1 for size in sizes):
        raise UsageError(f"warm_up must be a list of (height, width), at least 1 pixel each, got {warm_up!r}")
    return sizes


def accept_frame(frame: Any, copy: bool) -> tuple[Any, str | None]:
    """What the worker shall segment, and None; or None, and why the frame cannot be taken. Never raises.

    Only what makes copying impossible or dangerous is looked at here, on the caller's thread: the
    segmenter says on the worker what is wrong with shape, type or values.
    """
    try:
        if not isinstance(frame, Micrograph):
            return _pixels(frame, copy), None
        return dataclasses.replace(frame, pixels=_pixels(frame.pixels, copy)), None
    except Exception as exc:
        # Whatever a foreign object raises belongs to that frame, never to the acquisition thread.
        return None, describe(exc)


def _pixels(pixels: Any, copy: bool) -> Any:
    if isinstance(pixels, np.ndarray):
        # np.broadcast_to makes arrays whose declared size costs no memory until they are copied.
        if pixels.nbytes > _MAX_BYTES or pixels.size > MAX_PIXELS:
            raise ContractError(f"a frame of shape {pixels.shape} is too large ({MAX_PIXELS} pixels at most); cut it")
        return np.array(pixels, order="C", subok=True) if copy else pixels  # a mask stays a mask
    on_device = hasattr(pixels, "__dlpack__") or hasattr(pixels, "__cuda_array_interface__")
    if not copy or not on_device:
        return pixels
    for name in ("clone", "copy"):  # torch; cupy and others
        method = getattr(pixels, name, None)
        if callable(method):
            return method()
    raise ContractError(f"a frame of type {type(pixels).__name__} cannot copy itself; submit it with copy=False")


class _CloseAtExit:
    """Closes a stream that is still open when the interpreter ends, without keeping it alive until then.

    A daemon thread that returns from a runtime into an ended interpreter can take the process down.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = weakref.ref(stream)

    def __call__(self) -> None:
        stream = self._stream()
        if stream is not None:
            stream.close(drain=False, timeout_s=AT_EXIT_S)
