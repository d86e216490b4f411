"""Blocks on the workers of a Dask cluster: a few at a time, until each has given its result or its fault.

Workers read and write for themselves; what travels is a block's place and its figures. The scheduler knows a few blocks
for each worker, however many there are. A worker opens the model once (:class:`BlockWork`, in a ``WorkerPlugin``).
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from queue import Empty, SimpleQueue
from time import monotonic
from types import ModuleType
from typing import Any, Protocol

from hpddrnet_trt.core.errors import UsageError, UserError, describe, one_line, require
from hpddrnet_trt.mosaic.layout import Box

Client = Any  # distributed.Client, and distributed.Future
Future = Any

PURPOSE = "segment mosaics"
AHEAD = 2  # blocks that the scheduler knows for each place at a worker: the next one is there when one is done
LOOK_AGAIN = 5.0  # seconds from one look at the workers to the next
ANSWER = 30.0  # seconds for a scheduler to answer at all
CRASHES = 1  # lost workers after which a block is put back, on workers of our own; others have their own rule
FAILED_IN_A_ROW = 20  # blocks, after which others are not tried any more


@dataclass(frozen=True)
class ClusterSettings:
    """Where blocks are computed.

    ``scheduler``: address of a Dask scheduler (``tcp://host:8786``) whose workers have this package; None: workers of
    our own on this machine, ``workers`` of them (None: one for each GPU that the model runs on, else one for each
    processor core), which end with this process, however that ends. ``patience``: seconds without a worker that
    could take a block, after which the run ends. ``processes``: False: workers are threads of this process.
    ``shuffle``: seed of a random order of the blocks, on which nothing depends.
    """

    scheduler: str | None = None
    workers: int | None = None
    patience: float = 300.0
    processes: bool = True
    shuffle: int | None = None

    def __post_init__(self) -> None:
        if self.scheduler is not None and self.workers is not None:
            raise UsageError("workers are started here or are those of a scheduler: give a number or an address")
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"at least one worker is needed, not {self.workers}")


class BlockWork(Protocol):
    """What a worker does with blocks. It is pickled to every worker; ``name`` says whose results it makes."""

    name: str

    def place(self, worker: object) -> None:
        """Told once at the worker, by its name (0, 1 ... for workers of our own), before anything else."""
        ...

    def check(self) -> None:
        """Open what is needed; raises :class:`RunEnds` where this worker would give other results, or none."""
        ...

    def do(self, task: str, box: Box, about: Any) -> Any:
        """One of its tasks on one block; its result travels to the client. :class:`RunEnds` where other blocks would
        fail alike, any other exception for this block alone."""
        ...

    def close(self) -> None:
        """Give back what was opened."""
        ...


class RunEnds(UserError):
    """A fault that the blocks to come would meet as well; what is done stays."""


class BlockFailed(UserError):
    """Why there is no result of a block; the others go on."""


_CRASHED = object()


@contextmanager
def open_client(settings: ClusterSettings, workers: int) -> Iterator[Client]:
    """A client of the scheduler that is asked for, or of ``workers`` workers of our own, which end with it.

    Raises :class:`UserError` where nobody answers or nothing can be started.
    """
    dask, distributed = require("dask", "mosaic", PURPOSE), _distributed()
    for name in [name for name in logging.Logger.manager.loggerDict if name.startswith("distributed")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what happens is told here, in sentences
    if settings.scheduler is not None:
        try:
            client = distributed.Client(settings.scheduler, timeout=ANSWER, set_as_default=False)
        except (OSError, ValueError, TypeError) as exc:
            raise UserError(
                f"no Dask scheduler answers at {settings.scheduler} ({one_line(exc)}); give its address as "
                "`dask scheduler` prints it, such as tcp://host:8786"
            ) from exc
        with client:
            yield client
        return
    own = {
        "distributed.scheduler.allowed-failures": CRASHES,
        "distributed.scheduler.worker-ttl": "2 minutes",  # then a worker that has come to a standstill counts as lost
        "distributed.scheduler.worker-saturation": 1.0,
        "distributed.admin.low-level-log-length": 100,
        "logging": {"distributed": "critical"},
    }
    if settings.processes:
        require("cryptography", "mosaic", PURPOSE)  # so that nobody else on this machine can hand our workers anything
    with (
        dask.config.set(own),
        distributed.LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=settings.processes,
            host="127.0.0.1" if settings.processes else None,
            dashboard_address="127.0.0.1:0", silence_logs=logging.CRITICAL,
            security=settings.processes or None,
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):  # fmt: skip
        yield client


def on_a_worker(client: Client, patience: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function`` gives at one of the workers; raises what it raises there."""
    with _at_workers(client, patience):
        return client.submit(function, *arguments, pure=False).result()


def default_workers(gpus: int) -> int:
    """One for each GPU; without any, one for each core that this process may use."""
    if gpus:
        return gpus
    psutil = require("psutil", "mosaic", PURPOSE)
    usable = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count()
    return max(1, min(psutil.cpu_count(logical=False) or 1, usable))


def dashboard(client: Client) -> str | None:
    """Address of Dask's own pages about this run, where there are any."""
    return client.dashboard_link if _installed("bokeh") else None


class Workers:
    """``work`` at every worker of ``client``, of today and of later ones, for the time of a ``with`` block."""

    def __init__(self, client: Client, work: BlockWork, patience: float) -> None:
        self._client, self._work, self._patience = client, work, patience

    def __enter__(self) -> Workers:
        with _at_workers(self._client, self._patience):
            self._client.register_plugin(_plugin(self._work), self._work.name)
            addresses = self._client.nthreads()
            self._client.gather([self._submit(_check, self._work.name, workers=[address]) for address in addresses])
        return self

    def __exit__(self, *about: object) -> None:
        with suppress(Exception):  # of a scheduler that is gone
            self._client.unregister_worker_plugin(self._work.name)

    def _submit(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Future:
        """Have one worker call ``function``, once."""
        return self._client.submit(function, *arguments, pure=False, **options)

    def do(self, task: str, boxes: Iterable[Box], tell: Callable[[Box, Any], None], about: Any = None) -> None:
        """Have ``task`` done to every block; ``tell`` gets each with its result, or with a :class:`BlockFailed`.

        ``about``: what the task is told in addition. Raises :class:`RunEnds` when going on makes no sense: the disk is
        full, a worker has another version of this package, the scheduler is gone. Blocks under way are dropped then,
        as they are on Ctrl-C.
        """
        crashed: list[Box] = []
        again: list[Box] = []
        with _gone_as_error(self._client):
            self._round((task, about), boxes, AHEAD, crashed.append, tell)
            # One that only shared its worker with a block that crashes it is innocent: now they go one by one.
            self._round((task, about), crashed, 0, again.append, tell)
        for box in again:
            tell(box, BlockFailed(
                f"{box.name}: its workers died, {2 * (CRASHES + 1)} times or more; if memory is short, "
                "give --block a smaller number or start fewer --workers"
            ))  # fmt: skip

    def _round(
        self, task: tuple[str, Any], boxes: Iterable[Box], ahead: int, crashed: Callable[[Box], object],
        tell: Callable[[Box, Any], None],
    ) -> None:  # fmt: skip
        """Each block once, ``ahead`` for each place at a worker; 0: one at a time. ``crashed`` gets those that took
        their workers with them."""
        waiting, ended, in_flight = iter(boxes), SimpleQueue[Future](), dict[Future, Box]()
        token, watch, failed_in_a_row = secrets.token_hex(8), _Watch(self._client, self._patience), 0
        try:
            while True:
                for box in islice(waiting, max(0, max(1, watch.places() * ahead) - len(in_flight))):
                    key = (f"{task[0]}-{token}", box.z, box.top, box.left)
                    future = self._submit(_do, self._work.name, *task, box, key=key)
                    in_flight[future] = box
                    future.add_done_callback(ended.put)
                if not in_flight:
                    return
                try:
                    future = ended.get(timeout=1.0)
                except Empty:
                    continue
                box = in_flight.pop(future)
                outcome = _outcome(self._client, future, box)
                failed_in_a_row = failed_in_a_row + 1 if isinstance(outcome, BlockFailed) else 0
                if outcome is _CRASHED:
                    crashed(box)
                else:
                    tell(box, outcome)
                if failed_in_a_row == FAILED_IN_A_ROW:
                    raise RunEnds(f"{FAILED_IN_A_ROW} blocks in a row have failed, the last one so: {outcome}")
        finally:
            for future in in_flight:
                with suppress(Exception):  # of a scheduler that is gone
                    future.cancel()


def _plugin(work: BlockWork) -> Any:
    class Plugin(_distributed().WorkerPlugin):  # type: ignore[misc]  # here, as its base is imported here
        def __init__(self) -> None:
            self.work = work

        def setup(self, worker: Any) -> None:
            self.work.place(worker.name)

        def teardown(self, worker: Any) -> None:
            self.work.close()

    return Plugin()


def _check(name: str) -> None:
    _distributed().get_worker().plugins[name].work.check()


def _do(name: str, task: str, about: Any, box: Box) -> Any:
    return _distributed().get_worker().plugins[name].work.do(task, box, about)


def _outcome(client: Client, future: Future, box: Box) -> Any:
    """The result, :class:`BlockFailed`, or :data:`_CRASHED`; raises :class:`RunEnds`."""
    try:
        if future.status == "finished":
            return future.result()
        exc = future.exception(timeout=ANSWER) if future.status == "error" else None
    finally:
        future.release()
    if exc is None:
        raise _gone(client)
    if isinstance(exc, RunEnds):
        raise exc
    if isinstance(exc, _distributed().KilledWorker):
        return _CRASHED
    if isinstance(exc, MemoryError):
        return BlockFailed(f"{box.name}: not enough memory; give --block a smaller number or start fewer --workers")
    return BlockFailed(f"{box.name}: {describe(exc)}")


class _Watch:
    """How many blocks the workers can compute at a time; an error when that is none for too long."""

    def __init__(self, client: Client, patience: float) -> None:
        self._client, self._patience = client, patience
        self._places, self._looked, self._last_able = 0, -LOOK_AGAIN, monotonic()

    def places(self) -> int:
        if monotonic() - self._looked < LOOK_AGAIN:
            return self._places
        states = _workers(self._client)
        self._looked, self._places = monotonic(), sum(threads for state, threads in states if state == "running")
        if self._places:
            self._last_able = monotonic()
        elif monotonic() - self._last_able > self._patience:
            raise RunEnds(
                "all workers are paused as their memory is full; give --block a smaller number, or start fewer "
                "--workers, and run the same command again" if any(state == "paused" for state, _ in states) else
                f"there has been no worker for {self._patience:g} s; start some and run the same command again"
            )  # fmt: skip
        return self._places


def _workers(client: Client) -> Sequence[tuple[str, int]]:
    """State and threads of each worker, as the scheduler knows it."""
    if client.status != "running":
        raise _gone(client)

    def states(dask_scheduler: Any) -> list[tuple[str, int]]:  # goes there as it is: a scheduler needs no copy of us
        return [(worker.status.name, worker.nthreads) for worker in dask_scheduler.workers.values()]

    return client.run_on_scheduler(states)


@contextmanager
def _at_workers(client: Client, patience: float) -> Iterator[None]:
    """For what is asked of workers before the first block: what may go wrong with them, as sentences."""
    try:
        client.wait_for_workers(1, timeout=patience)
    except TimeoutError as exc:
        raise RunEnds(f"no worker has come within {patience:g} s; start some, then run again") from exc
    try:
        with _gone_as_error(client):
            yield
    except ImportError as exc:
        raise RunEnds(
            f"a worker cannot import what it needs ({one_line(exc)}); install the same version of "
            "hpddrnet-trt[mosaic] on every machine of the cluster"
        ) from exc


@contextmanager
def _gone_as_error(client: Client) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as exc:  # what a client raises when its connection is gone, TimeoutError as well
        if client.status == "running":
            raise
        raise _gone(client) from exc


def _gone(client: Client) -> RunEnds:
    address = client.scheduler.address if client.scheduler is not None else "its address"
    return RunEnds(f"the Dask scheduler at {address} is gone; start it again and run the same command, which continues")


def _distributed() -> ModuleType:
    return require("distributed", "mosaic", PURPOSE)


def _installed(module: str) -> bool:
    return find_spec(module) is not None
