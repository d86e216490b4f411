"""Triton: a model that a server runs for several PCs, behind the interface of those that run here.

The server is NVIDIA's Triton Inference Server, its repository written by ``hpddrnet-trt export-triton``: a model's
configuration carries the description of each version.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import BadInputFile, ContractError, ModelReplaced, UsageError, UserError, one_line
from hpddrnet_trt.core.manifest import MAX_DESCRIPTION_BYTES, Manifest, parse_manifest
from hpddrnet_trt.engines.base import (
    EngineBase,
    Prediction,
    check_input,
    checked_prediction,
    expected_outputs,
    input_contract,
)
from hpddrnet_trt.engines.triton_service import (
    LARGEST_MESSAGE,
    Address,
    Call,
    Cancelled,
    NotThere,
    Places,
    Refused,
    Region,
    Regions,
    Request,
    Unavailable,
    layout_bytes,
    open_connection,
    parse_address,
)

logger = logging.getLogger(__name__)

TIMEOUT_S, PATIENCE_S = 30.0, 60.0
OPENING_S = 5.0  # of both, where nothing but a description is asked for
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0  # between two tries
LOOK_S = 1.0  # from one look for a newer version to the next
IN_FLIGHT = 4  # requests of a row
SCORES = "-scores"  # behind a model's name: the same with class scores as output
MOST_SETTINGS = 4 * MAX_DESCRIPTION_BYTES  # of a model's configuration, which has a description for each version
Answer = TypeVar("Answer")


class TritonEngine(EngineBase):
    """Asks one version of a model on a Triton server.

    ``path``: its address, ``triton://host[:8001]/model`` for gRPC, ``triton+http://host[:8000]/model`` for HTTP,
    ``tritons://`` and ``triton+https://`` with TLS. ``/3`` behind it takes version 3 and no other; without that it is
    the newest at the time of opening, and :meth:`newest` finds later ones. A token goes into the environment variable
    ``HPDDRNET_TRITON_TOKEN``. Parameters, also as ``?timeout=10&patience=0&shared-memory=1`` in the address:

    - ``timeout``: seconds for an answer (30).
    - ``patience``: seconds for which a server that does not answer, or has no time, is asked again (60), with pauses
      that double. What it refuses is not asked again.
    - ``shared_memory``: pictures and labels go through memory that both sides see; default: where the address is this
      PC's own and the server takes it.

    Several threads may use one engine at once. Ctrl-C, leaving a row early and :meth:`close` cancel what is under way.

    Raises :class:`MissingDependency` without ``tritonclient``, :class:`UserError` for a server that does not answer, or
    answers what the description does not promise, :class:`ContractError` for an input that it refuses, and
    :class:`ModelReplaced` when it has other versions now.
    """

    def __init__(
        self,
        path: str | Path | Address,
        *,
        timeout: float | None = None,
        patience: float | None = None,
        shared_memory: bool | None = None,
    ) -> None:
        self.address = path if isinstance(path, Address) else parse_address(path)
        self._options = {"timeout": timeout, "patience": patience, "shared_memory": shared_memory}
        self._timeout = self._seconds("timeout", TIMEOUT_S, 0.001)
        self._patience = self._seconds("patience", PATIENCE_S, 0.0)
        self._must_share = self._flag("shared_memory")
        if unknown := self.address.options.keys() - {name.replace("_", "-") for name in self._options}:
            raise UsageError(
                f"{self.address} has no option {', '.join(sorted(unknown))}; it takes timeout, patience, shared-memory"
            )
        self._shares = self.address.loopback if self._must_share is None else self._must_share
        self._running: set[Call] = set()
        self._closed, self._changed = False, threading.Condition()
        self._looked, self._looking, self._problem = time.monotonic(), threading.Lock(), ""
        self._next: TritonEngine | None = None  # of a newer version
        self._others: list[TritonEngine] = []  # that are closed with this one
        self._connection = open_connection(self.address, MOST_SETTINGS, min(self._timeout, OPENING_S))
        try:
            self._describe()
        finally:
            self._connection.close()
        largest = max(_largest_answer(self.manifest), MOST_SETTINGS)
        self._connection = open_connection(self.address, largest, min(self._timeout, OPENING_S))
        self._regions = Regions(self._connection)

    def _seconds(self, name: str, default: float, least: float) -> float:
        given = self._options[name]
        text = self.address.options.get(name, default) if given is None else given
        try:
            seconds = float(text)
        except ValueError:
            seconds = -1.0
        if not least <= seconds <= 86400:
            raise UsageError(f"{name} is a number of seconds from {least:g} to 86400, not {text!r}")
        return seconds

    def _flag(self, name: str) -> bool | None:
        text = self.address.options.get(name.replace("_", "-"))
        if text not in (None, "0", "1"):
            raise UsageError(f"shared-memory is 0 or 1, not {text!r}")
        given = self._options[name]
        return (None if text is None else text == "1") if given is None else bool(given)

    def _describe(self) -> None:
        """Find out which version it is, and what the server has of it."""
        model, server = self.address.model, self._about()
        try:
            if self.address.version is None:
                self.address = self.address.of(model, max(map(str, self._about(model)["versions"]), key=int))
            version = self.version = str(self.address.version)
            tensors, settings = self._about(model, version), self._about(model, version, "config")
            (source,) = tensors["inputs"]
            self._input, numbers = str(source["name"]), str(source["datatype"])
            outputs = {one["name"]: [int(size) for size in one["shape"]] for one in tensors["outputs"]}
            said = {name: str(entry["string_value"]) for name, entry in settings.get("parameters", {}).items()}
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise UserError(f"{self.address}: what the server says of it is not understood ({one_line(exc)})") from exc
        if f"description.{version}" not in said:
            raise BadInputFile(
                f"{self.address}: the server has no description of version {version} (classes, input contract); make "
                "its repository with hpddrnet-trt export-triton"
            )
        self.manifest = parse_manifest(said[f"description.{version}"], str(self.address))
        if numbers != {"uint8": "UINT8", "float32": "FP32"}[input_contract(self.manifest).dtype]:
            raise BadInputFile(f"{self.address} takes {numbers}, and its description says otherwise; export it again")
        self._names = expected_outputs(self.manifest, outputs, Path(str(self.address)))
        record = self.manifest.engine
        self.sha256 = said.get(f"sha256.{version}") or (None if record is None else record.sha256)
        self._arithmetic = said.get(f"arithmetic.{version}") or self.manifest.precision
        self._server = one_line(f"Triton {server.get('version', '')}", limit=50)

    def _about(self, *what: str) -> dict[str, Any]:
        return self._patiently(lambda: self._connection.about(*what), Call(), opening=True)

    @property
    def runtime(self) -> str:
        return f"{self._server} at {self.address.server} (model {self.address.model}, version {self.version})"

    @property
    def arithmetic(self) -> str | None:
        return self._arithmetic

    def newest(self, *, at_once: bool = False) -> TritonEngine:
        """This engine, or another for the version that the server has now; this one where the address names a version.

        The other is closed with this one. Looks once in :data:`LOOK_S`, or ``at_once``. Raises :class:`UserError` where
        the new version reads pictures in another way, or has other classes; from then on, until it is opened again.
        """
        with self._looking:
            if self._next is None and not self._look(at_once):
                return self
        assert self._next is not None
        return self._next.newest(at_once=at_once)

    def _look(self, at_once: bool) -> bool:
        """Whether there is another version, which is then opened."""
        if self._problem:
            raise UserError(self._problem)
        if not self.address.follows or not (at_once or time.monotonic() - self._looked > LOOK_S):
            return False
        self._looked = time.monotonic()
        version = max(self._versions(), key=int, default=self.version)
        if version == self.version:
            return False
        other = self._open(self.address.model, version)
        if _reading(other.manifest) != _reading(self.manifest):
            self._problem = (
                f"the server has version {version} of {self.address} now, with another input, outputs or classes; open "
                "the model again"
            )
            raise UserError(self._problem)
        logger.warning("%s: version %s of the model from now on", self.address, version)
        self._next = other
        self._regions.close()  # those that are idle
        return True

    def _open(self, model: str, version: str) -> TritonEngine:
        other = TritonEngine(self.address.of(model, version), **self._options)  # type: ignore[arg-type]
        with self._changed:
            closed = self._closed
            self._others.append(other)
        if closed:
            other.close()
        return other

    def scores(self) -> TritonEngine | None:
        """The same version with class scores as output, None where the server has none; both are closed together."""
        model = self.address.model + SCORES
        try:
            self._connection.about(model)
        except NotThere:
            return None
        except (Unavailable, Refused, Cancelled) as exc:
            logger.info("%s: %s", self.address, one_line(exc))  # and what follows finds out
        other = self._open(model, self.version)
        other._others.append(self)
        mine, its = self.manifest, other.manifest
        same = (mine.checkpoint_sha256, mine.classes, mine.input) == (its.checkpoint_sha256, its.classes, its.input)
        if not same or its.output is None or its.output.kind != "logits":
            raise UserError(f"{other.address} does not have the class scores of {self.address}; export both again")
        return other

    # -- inference

    def infer(self, images: npt.NDArray[Any]) -> Prediction:
        """Run one batch; see :class:`~hpddrnet_trt.engines.base.Engine`."""
        return self._infer(images, Call())

    def infer_many(self, batches: Iterable[npt.NDArray[Any]]) -> Generator[Prediction]:
        """Run batches with :data:`IN_FLIGHT` at the server; one that cannot be run ends the row after those before."""
        waiting: deque[tuple[Future[Prediction], Call]] = deque()
        pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="triton")
        try:
            for images in batches:
                if len(waiting) == IN_FLIGHT:
                    yield waiting[0][0].result()
                    waiting.popleft()
                call = Call()
                waiting.append((pool.submit(self._infer, images, call, many=True), call))
            while waiting:
                yield waiting[0][0].result()
                waiting.popleft()
        finally:
            for _, call in waiting:
                call.cancel()
            pool.shutdown()

    def bind(self, images: npt.NDArray[Any]) -> Callable[[], None]:
        """One batch, with its way to the server and back."""
        self._live()
        check_input(images, input_contract(self.manifest))
        kept = images.copy()

        def run() -> None:
            self.infer(kept)

        return run

    def layer_times(self, images: npt.NDArray[Any], runs: int = 20) -> dict[str, float]:
        self._live()
        check_input(images, input_contract(self.manifest))
        return {}

    def close(self) -> None:
        """Cancel what is under way, and take back the memory that was shared."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            running, opened = list(self._running), list(self._others)
        for call in running:
            call.cancel()
        for other in opened:
            other.close()
        with self._changed:
            self._changed.wait_for(lambda: not self._running, OPENING_S)
        self._regions.close()
        self._connection.close()

    # -- parts

    def _live(self) -> None:
        if self._closed:
            raise UsageError(f"the engine of {self.address} is closed; load it again")

    @contextmanager
    def _entered(self, call: Call) -> Iterator[None]:
        with self._changed:
            self._live()
            self._running.add(call)
        try:
            yield
        finally:
            with self._changed:
                self._running.discard(call)
                self._changed.notify_all()

    def _infer(self, images: npt.NDArray[Any], call: Call, *, many: bool = False) -> Prediction:
        with self._entered(call):
            check_input(images, input_contract(self.manifest))
            outputs = self._patiently(lambda: self._ask(images, call, many), call)
        try:
            return checked_prediction(outputs, self.manifest, images.shape)
        except BadInputFile as exc:
            raise UserError(f"{self.address}: {exc}") from exc

    def _ask(self, images: npt.NDArray[Any], call: Call, many: bool) -> dict[str, npt.NDArray[Any]]:
        """One try, through shared memory where the server takes it."""
        places = _known_outputs(self._names, self.manifest, images.shape)
        request = Request(self.address.model, self.version, self._input, images, self._names, many=many)
        if (region := self._region(images, places)) is not None:
            try:
                region.put(images, places)
                outputs = self._connection.infer(replace(request, region=region), self._timeout, call)
            except (Refused, NotThere) as exc:  # a server that was started again does not know the memory
                self._regions.drop(region)
                logger.info("%s: without shared memory, as %s", self.address, one_line(exc))
            except BaseException:
                self._regions.drop(region)
                raise
            else:
                self._regions.give(region)
                return outputs
        if layout_bytes(images, places) > LARGEST_MESSAGE:
            raise Refused("picture and result are more than 2 GiB; take smaller tiles or batches", of_input=True)
        return self._connection.infer(request, self._timeout, call)

    def _region(self, images: npt.NDArray[Any], places: Places) -> Region | None:
        if not self._shares:
            return None
        try:
            return self._regions.take(layout_bytes(images, places))
        except (Refused, NotThere) as exc:
            if self._must_share:
                raise Refused(f"its server does not take shared memory ({exc}); leave shared-memory out") from exc
            self._shares = False
            logger.info("%s: its server does not take shared memory (%s)", self.address, exc)
            return None

    def _versions(self) -> list[str]:
        """What the server has of the model now; nothing where it does not answer."""
        try:
            found = self._connection.about(self.address.model).get("versions")
        except (Unavailable, NotThere, Refused, Cancelled):
            return []
        return [version for version in map(str, found or []) if version.isdecimal()]

    def _patiently(self, attempt: Callable[[], Answer], call: Call, *, opening: bool = False) -> Answer:
        """What ``attempt`` gives, tried again while the server does not answer or has no time."""
        address, pause = self.address, FIRST_PAUSE_S
        patience = min(self._patience, OPENING_S) if opening else self._patience
        end = time.monotonic() + patience
        while True:
            problem: Exception
            try:
                return attempt()
            except Refused as exc:
                raise (ContractError if exc.of_input else UserError)(f"{address}: {one_line(exc)}") from exc
            except (Unavailable, NotThere, Cancelled) as exc:
                problem = exc
            if call.cancelled or self._closed:
                raise UsageError(f"the engine of {address} is closed; load it again") from problem
            if opening and isinstance(problem, NotThere) and not (address.follows and address.version):
                raise UserError(f"{address}: the server has no such model ({one_line(problem)})") from problem
            if not opening and (versions := self._versions()) and self.version not in versions:
                raise ModelReplaced(
                    f"{address}: the server has no such version any more, but {', '.join(versions)}; open it again"
                ) from problem
            wait = pause * random.uniform(0.5, 1)
            if time.monotonic() + wait > end:
                raise UserError(
                    f"{address}: no answer in {patience:g} s ({one_line(problem)}); try again later, or ask whoever "
                    "runs the server"
                ) from problem
            if pause == FIRST_PAUSE_S:
                logger.warning("%s: %s; asking again for up to %g s", address, one_line(problem), patience)
            call.pause(wait)
            pause = min(2 * pause, LONGEST_PAUSE_S)


def _known_outputs(names: list[str], manifest: Manifest, shape: tuple[int, ...]) -> Places:
    """Shape and type of the outputs of an input ``[N, C, H, W]``, of those whose shape follows from it."""
    batch, _, height, width = shape
    kinds: Places = {
        "labels": ((batch, height, width), np.dtype(np.uint8)),
        "confidence": ((batch, height, width), np.dtype(np.float32)),
        "logits": ((batch, manifest.network.num_classes, height, width), np.dtype(np.float32)),
    }
    return {name: kinds[name] for name in names if name in kinds}


def _largest_answer(manifest: Manifest) -> int:
    """Bytes of the outputs for the largest input; features are of cells of at least 8 x 8 pixels."""
    contract = input_contract(manifest)
    batch, height, width = (axis.maximum for axis in (contract.batch, contract.height, contract.width))
    if batch is None or height is None or width is None:
        return LARGEST_MESSAGE
    features = 0 if manifest.domain is None else len(manifest.domain.mean)
    return batch * (height + 8) * (width + 8) * (5 + 4 * manifest.network.num_classes + features // 16 + 1)


def _reading(manifest: Manifest) -> tuple[Any, ...]:
    """What a picture is brought to for a model, and what its results mean."""
    crop = None if manifest.data is None else manifest.data.crop
    return manifest.input, manifest.output, manifest.classes, manifest.intensity, manifest.read_at_m, crop
