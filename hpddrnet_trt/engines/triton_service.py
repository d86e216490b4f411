"""Talking to a Triton server: its address, one request over gRPC or HTTP, memory that both sides see.

``tritonclient`` knows the protocol (KServe's "Open Inference Protocol" with Triton's extensions). Its gRPC client is
used as it is; its HTTP client is bound to one thread, so that HTTP goes through the standard library, which sends what
``tritonclient`` wrote.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import queue
import re
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from math import prod
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.errors import UsageError, one_line, require

logger = logging.getLogger(__name__)

Places = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]  # shape and type of outputs by name

TOKEN = "HPDDRNET_TRITON_TOKEN"  # environment variable; what it holds is never in an address, a log or an error
_ADDRESS = re.compile(r"(triton(?:s|\+https?)?):/{1,2}([^/?#\s]+)/([^/?#\s]+)(?:/(\d{1,18}))?/?(?:\?([^#\s]*))?")
WANTS_TOKEN = f"it wants a token, or another one, in {TOKEN}"
MANY = "many"  # parameter of a request
LENGTH = "Inference-Header-Content-Length"  # of the JSON in front of the tensors
LARGEST_MESSAGE = 2**31 - 1  # bytes that gRPC can send or take at once
SLOWEST_COPY_S = 5.0  # beyond a time-out that gRPC keeps itself


class Unavailable(Exception):
    """Nobody answers, or not now: the same request may succeed later."""


class NotThere(Exception):
    """The server answers, and has no such model or version."""


class Refused(Exception):
    """The server does not do this, and will not later. ``of_input``: because of what was sent."""

    def __init__(self, text: str, *, of_input: bool = False) -> None:
        super().__init__(text)
        self.of_input = of_input


class Cancelled(Exception):
    """The request was cancelled from here."""


@dataclass(frozen=True)
class Address:
    """``triton://host[:port]/model[/version]``; ``options`` are those after a question mark."""

    scheme: str
    host: str
    port: int
    model: str
    version: str | None
    options: Mapping[str, str]
    follows: bool  # takes the newest version, whichever that is

    @property
    def server(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def http(self) -> bool:
        return "http" in self.scheme

    @property
    def tls(self) -> bool:
        return self.scheme.endswith("s")

    @property
    def loopback(self) -> bool:
        with suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return self.host == "localhost"

    def of(self, model: str, version: str) -> Address:
        """Another model or version of the same server."""
        return replace(self, model=model, version=version)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.server}/{self.model}" + (f"/{self.version}" if self.version else "")


def parse_address(text: str | Path) -> Address:
    """The parts of an address, also of one that has lost a slash as a :class:`Path`.

    Raises :class:`UsageError` for anything else; an address with a password in it is not repeated.
    """
    written = text.as_posix() if isinstance(text, Path) else text
    if "@" in written.partition("?")[0]:
        raise UsageError(f"an address of a Triton server holds no name and password; put a token into {TOKEN}")
    match = _ADDRESS.fullmatch(written)
    try:
        place = urlsplit(f"//{match[2]}") if match else None
        port = None if place is None else place.port
    except ValueError:
        place = port = None
    if match is None or place is None or not place.hostname or port == 0:
        raise UsageError(
            f"{written.partition('?')[0]!r} is no address of a model on a Triton server; write "
            "triton://host:8001/model, with /3 behind it for its version 3, or triton+http://host:8000/model"
        )
    options = dict(parse_qsl(match[5] or "", keep_blank_values=True))
    port = port or (8000 if "http" in match[1] else 8001)
    return Address(match[1], place.hostname, port, match[3], match[4], options, follows=match[4] is None)


def _nothing() -> None:
    """Ends nothing."""


class Call:
    """One request, which any thread may cancel; it also is what a pause between two tries waits on."""

    def __init__(self) -> None:
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._stop: Callable[[], Any] = _nothing

    @property
    def cancelled(self) -> bool:
        return self._ended.is_set()

    def stopped_by(self, stop: Callable[[], Any]) -> None:
        """What ends the try that has begun; called at once where the request is cancelled already."""
        with self._lock:
            self._stop = stop
        if self.cancelled:
            stop()

    def cancel(self) -> None:
        self._ended.set()
        with self._lock:
            stop = self._stop
        stop()

    def pause(self, seconds: float) -> None:
        self._ended.wait(seconds)


@dataclass(frozen=True)
class Request:
    """One inference. ``outputs``: names; ``region``: memory that holds the input and takes some of the outputs;
    ``many``: one of a row, which our engine on the server then runs as one of a row too."""

    model: str
    version: str
    input: str
    images: npt.NDArray[Any]
    outputs: Sequence[str]
    region: Region | None = None
    many: bool = False

    @property
    def parameters(self) -> dict[str, bool]:
        """Of the request, beside its tensors; servers leave alone what they do not know."""
        return {MANY: True} if self.many else {}

    def tensors(self, client: Any) -> tuple[list[Any], list[Any]]:
        """Input and outputs in the words of ``tritonclient.grpc`` or ``.http``."""
        utils = require("tritonclient.utils", "triton", "ask a Triton server")
        given = client.InferInput(self.input, list(self.images.shape), utils.np_to_triton_dtype(self.images.dtype))
        wanted = [client.InferRequestedOutput(name) for name in self.outputs]
        if self.region is None:
            given.set_data_from_numpy(np.ascontiguousarray(self.images))
        else:
            given.set_shared_memory(self.region.name, self.images.nbytes)
            for name, output in zip(self.outputs, wanted, strict=True):
                if name in self.region.places:
                    start, shape, dtype = self.region.places[name]
                    output.set_shared_memory(self.region.name, prod(shape) * dtype.itemsize, start)
        return [given], wanted

    def outputs_of(self, read: Callable[[], Any]) -> dict[str, npt.NDArray[Any]]:
        """The outputs in an answer, which ``read`` gives as ``tritonclient`` has it; :class:`Refused` for garbage."""
        try:
            answer = read()
            if (version := _part(answer.get_response(), "model_version")) != self.version:
                raise ValueError(f"it is of version {version}")
            return {name: self._output(answer, name) for name in self.outputs}
        except Exception as exc:  # whatever a parser makes of garbage
            raise Refused(f"the server's answer is not what was asked for ({one_line(exc)})") from exc

    def _output(self, answer: Any, name: str) -> npt.NDArray[Any]:
        told = answer.get_output(name)
        if told is None:
            raise ValueError(f"there is no {name} in it")
        if self.region is None or name not in self.region.places:
            return np.array(answer.as_numpy(name))  # a copy: answers are read-only
        _, shape, dtype = self.region.places[name]
        given = [int(size) for size in _part(told, "shape")], _part(told, "datatype")
        if given != (list(shape), {"uint8": "UINT8", "float32": "FP32"}[dtype.name]):
            raise ValueError(f"{name} is {given[1]} of shape {given[0]}")
        return self.region.take(name)


def _part(told: Any, name: str) -> Any:
    """An entry of a protobuf message or of JSON."""
    return told[name] if isinstance(told, dict) else getattr(told, name)


def open_connection(address: Address, largest: int, timeout: float) -> Connection:
    """``largest``: bytes of an answer, beyond which there is something wrong; ``timeout``: of all but inferences."""
    token = os.environ.get(TOKEN, "")
    if not re.fullmatch(r"[\x21-\x7e]*", token):
        raise UsageError(f"the environment variable {TOKEN} holds a sign that no token has; set it again")
    if token and not (address.tls or address.loopback):
        logger.warning("the token goes to %s unencrypted; use tritons:// or triton+https://", address.server)
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return (_Http if address.http else _Grpc)(address, headers, largest, timeout)


class _Grpc:
    """Usable from several threads, like :class:`_Http`; both raise the errors above."""

    def __init__(self, address: Address, headers: dict[str, str], largest: int, timeout: float) -> None:
        self._client = require("tritonclient.grpc", "triton", f"ask {address}")
        self._error = require("tritonclient.utils", "triton", f"ask {address}").InferenceServerException
        # A Triton server that keeps its own door wants the header under a name of its own.
        headers = {**headers, **{f"triton-grpc-protocol-{name}": value for name, value in headers.items()}}
        self._settings: dict[str, Any] = {"headers": headers, "client_timeout": timeout}
        self._server = self._client.InferenceServerClient(
            address.server,
            ssl=address.tls,
            root_certificates=os.environ.get("SSL_CERT_FILE") if address.tls else None,
            channel_args=[
                ("grpc.max_send_message_length", LARGEST_MESSAGE),
                ("grpc.max_receive_message_length", min(largest, LARGEST_MESSAGE)),
                ("grpc.initial_reconnect_backoff_ms", 100),  # a server that is there again is found soon
                ("grpc.max_reconnect_backoff_ms", 2000),
                ("grpc.use_local_subchannel_pool", 1),  # closing this channel ends its connection
            ],
        )

    def about(self, model: str = "", version: str = "", part: str = "") -> dict[str, Any]:
        """What the server says of itself, or of a model: its tensors and versions, or, as ``part``, its ``config``."""
        if not model:
            return self._ask(self._server.get_server_metadata, as_json=True)
        if part == "config":
            return self._ask(self._server.get_model_config, model, version, as_json=True).get("config", {})
        return self._ask(self._server.get_model_metadata, model, version, as_json=True)

    def infer(self, request: Request, timeout: float, call: Call) -> dict[str, npt.NDArray[Any]]:
        """The outputs by name; ``timeout``: seconds that it may take."""
        inputs, outputs = request.tensors(self._client)
        came: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        try:
            under_way = self._server.async_infer(
                request.model, inputs, lambda result, error: came.put((result, error)),
                model_version=request.version, outputs=outputs, headers=self._settings["headers"],
                client_timeout=timeout, timeout=int(timeout * 1e6), parameters=request.parameters,
            )  # fmt: skip
        except ValueError as exc:  # the channel was closed
            raise Cancelled(one_line(exc)) from exc
        call.stopped_by(under_way.cancel)
        try:
            result, error = came.get(timeout=timeout + SLOWEST_COPY_S)
        except queue.Empty:
            raise Unavailable(f"no answer in {timeout:g} s") from None
        finally:
            under_way.cancel()  # what Ctrl-C has left; nothing to what is there
        if error is not None:
            raise self._fault(error)
        return request.outputs_of(lambda: result)

    def share(self, name: str, size: int | None) -> None:
        """Make this PC's shared memory of that name and size known to the server; without a size take it back."""
        if size is None:
            self._ask(self._server.unregister_system_shared_memory, name)
        else:
            self._ask(self._server.register_system_shared_memory, name, f"/{name}", size)

    def close(self) -> None:
        self._server.close()

    def _ask(self, question: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return question(*arguments, **options, **self._settings)
        except self._error as exc:
            raise self._fault(exc) from exc
        except ValueError as exc:
            raise Cancelled(one_line(exc)) from exc

    @staticmethod
    def _fault(error: Any) -> Exception:
        code, text = str(error.status()).rpartition(".")[2], one_line(error.message() or error.status())
        if code == "CANCELLED":
            return Cancelled(text)
        if code in ("UNAUTHENTICATED", "PERMISSION_DENIED") or "protocol is restricted" in text:
            return Refused(f"{text}; {WANTS_TOKEN}")
        if code in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED"):
            return Unavailable(text)
        if code == "NOT_FOUND":
            return NotThere(text)
        return Refused(text, of_input=code in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "OUT_OF_RANGE"))


class _Http:
    """A connection for each request."""

    def __init__(self, address: Address, headers: dict[str, str], largest: int, timeout: float) -> None:
        self._client = require("tritonclient.http", "triton", f"ask {address}")
        self._address, self._headers, self._largest, self._timeout = address, headers, largest, timeout
        self._tls = ssl.create_default_context() if address.tls else None

    def about(self, model: str = "", version: str = "", part: str = "") -> dict[str, Any]:
        content, _ = self._ask("GET", self._path(model, version, part), b"", {}, self._timeout, Call())
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise Refused("its answer is no JSON object")
        return found

    def infer(self, request: Request, timeout: float, call: Call) -> dict[str, npt.NDArray[Any]]:
        inputs, outputs = request.tensors(self._client)
        client = self._client.InferenceServerClient
        body, length = client.generate_request_body(
            inputs, outputs=outputs, timeout=int(timeout * 1e6), parameters=request.parameters
        )
        headers = {} if length is None else {LENGTH: str(length)}
        path = self._path(request.model, request.version, "infer")
        content, length = self._ask("POST", path, body, headers, timeout, call)
        header = None if length is None else int(length)
        return request.outputs_of(lambda: client.parse_response_body(content, header_length=header))

    def share(self, name: str, size: int | None) -> None:
        path = f"/v2/systemsharedmemory/region/{name}/{'unregister' if size is None else 'register'}"
        content = json.dumps({"key": f"/{name}", "offset": 0, "byte_size": size or 0})
        self._ask("POST", path, content.encode(), {}, self._timeout, Call())

    def close(self) -> None:
        """Nothing is kept."""

    @staticmethod
    def _path(model: str, version: str, part: str) -> str:
        words = ["models", model] * bool(model) + ["versions", version] * bool(version) + [part] * bool(part)
        return "/".join(["/v2", *(quote(word, safe="") for word in words if word)])

    def _ask(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], timeout: float, call: Call
    ) -> tuple[bytes, str | None]:
        """The answer, and how much of it is JSON."""
        deadline = time.monotonic() + timeout
        secure: dict[str, Any] = {} if self._tls is None else {"context": self._tls}
        kind = HTTPConnection if self._tls is None else HTTPSConnection
        with closing(kind(self._address.host, self._address.port, timeout=timeout, **secure)) as connection:
            try:
                connection.connect()
                call.stopped_by(lambda: _shut(connection))
                connection.request(method, path, body, {**self._headers, **headers})
                response = connection.getresponse()
                content = bytearray()
                while part := response.read(1 << 20):
                    content += part
                    if len(content) > self._largest:
                        raise Refused(f"its answer has more than {self._largest} bytes")
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"no whole answer in {timeout:g} s")
            except ssl.SSLCertVerificationError as exc:
                raise Refused(f"its certificate is not trusted ({one_line(exc)}); SSL_CERT_FILE names what is") from exc
            except (OSError, HTTPException) as exc:
                raise (Cancelled if call.cancelled else Unavailable)(one_line(exc)) from exc
        if response.status != 200:
            raise _http_fault(response.status, bytes(content))
        return bytes(content), response.headers.get(LENGTH)


Connection = _Grpc | _Http


def _http_fault(status: int, content: bytes) -> Exception:
    try:
        text = one_line(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError, RecursionError):
        text = f"HTTP status {status}"
    if status in (429, 502, 503, 504):
        return Unavailable(text)
    if status == 404:
        return NotThere(text)
    if status in (401, 403):
        return Refused(f"{text}; {WANTS_TOKEN}")
    return Refused(text, of_input=status in (400, 413))


def _shut(connection: HTTPConnection) -> None:
    """End what a thread waits for."""
    with suppress(OSError, AttributeError):  # there is no connection any more
        connection.sock.shutdown(socket.SHUT_RDWR)


class Region:
    """Memory of this PC that the server sees too: one request's input, and behind it the outputs whose size is known.

    ``places``: where each of these begins, its shape and type.
    """

    def __init__(self, size: int) -> None:
        self.name, self.size = f"hpddrnet-{secrets.token_hex(8)}", size
        self.places: dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]] = {}
        try:
            self._memory = SharedMemory(self.name, create=True, size=size)
        except OSError as exc:
            raise Refused(f"there are no {size} bytes of it here: {one_line(exc)}") from exc

    def put(self, images: npt.NDArray[Any], outputs: Places) -> None:
        """Lay out a request. What the server does not write reads as label 255, or as no number."""
        self._array(0, images.shape, images.dtype)[...] = images
        self._array(images.nbytes, (self.size - images.nbytes,), np.dtype(np.uint8)).fill(0xFF)
        start, self.places = images.nbytes, {}
        for name, (shape, dtype) in outputs.items():
            start += -start % 8
            self.places[name] = (start, shape, dtype)
            start += prod(shape) * dtype.itemsize

    def take(self, name: str) -> npt.NDArray[Any]:
        """A copy of an output."""
        array = self._array(*self.places[name]).copy()
        ends = array.flat[[0, -1]]
        if (np.isnan(ends) if array.dtype.kind == "f" else ends == 0xFF).any():
            raise ValueError(f"it did not write {name}")
        return array

    def free(self) -> None:
        """Remove it from this PC."""
        self._memory.close()
        self._memory.unlink()

    def _array(self, start: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        return np.ndarray(shape, dtype, self._memory.buf, start)


def layout_bytes(images: npt.NDArray[Any], outputs: Places) -> int:
    """What :meth:`Region.put` needs at most."""
    return images.nbytes + sum(prod(shape) * dtype.itemsize + 8 for shape, dtype in outputs.values())


class Regions:
    """Shared memory for as many requests as there are at once; registered with the server, in the end taken back."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()
        self._idle: list[Region] = []

    def take(self, size: int) -> Region:
        """One of at least ``size`` bytes; raises what the server answers to a new one."""
        with self._lock:
            region = self._idle.pop() if self._idle else None
        if region is not None:
            if region.size >= size:
                return region
            self.drop(region)
        region = Region(size)
        try:
            self._connection.share(region.name, size)
        except BaseException:
            self.drop(region)  # the server may have taken it, and the answer is lost
            raise
        return region

    def give(self, region: Region) -> None:
        """It may be used again, as its request has ended."""
        with self._lock:
            self._idle.append(region)

    def drop(self, region: Region) -> None:
        """It may not, as the server might still write into it."""
        region.free()
        try:
            self._connection.share(region.name, None)
        except (Unavailable, NotThere, Refused, Cancelled) as exc:
            logger.info("the server did not take back the shared memory %s: %s", region.name, one_line(exc))

    def close(self) -> None:
        while self._idle:
            self.drop(self._idle.pop())
