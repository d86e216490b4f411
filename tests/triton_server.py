"""A Triton server in this process: gRPC and HTTP as Triton speaks them, ONNX Runtime behind, faults on demand."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import prod
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype

from hpddrnet_trt.core.files import sha256_of
from hpddrnet_trt.core.manifest import read_manifest

LENGTH = "Inference-Header-Content-Length"
HTTP_STATUS = {"INVALID_ARGUMENT": 400, "NOT_FOUND": 404, "UNAVAILABLE": 503, "INTERNAL": 500, "UNAUTHENTICATED": 401}


class Fault(Exception):
    """What a server answers in place of a result: a gRPC code's name, and a sentence."""


class Model:
    """One version: an ONNX file of ours."""

    def __init__(self, path: Path) -> None:
        self.path, self.manifest, self.sha256 = path, read_manifest(path), sha256_of(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def tensors(self, kind: str) -> list[dict[str, Any]]:
        found = self.session.get_inputs() if kind == "inputs" else self.session.get_outputs()
        types = {"tensor(uint8)": "UINT8", "tensor(float)": "FP32"}
        sizes = [[size if isinstance(size, int) else -1 for size in one.shape] for one in found]
        return [{"name": one.name, "datatype": types[one.type], "shape": shape}
                for one, shape in zip(found, sizes, strict=True)]  # fmt: skip


class Server:
    """``models``: by name and version. Whatever is in ``faults`` happens to the next inferences, one each: it may wait,
    raise a :class:`Fault`, or return other outputs than those it is given. ``asked`` has what inferences there were."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, Model]] = {}
        self.settings: dict[str, dict[str, str]] = {}  # that stand in a configuration instead of the models' own
        self.faults: deque[Callable[[dict[str, np.ndarray]], dict[str, np.ndarray] | None]] = deque()
        self.asked: list[dict[str, Any]] = []
        self.regions: dict[str, SharedMemory] = {}
        self.registered, self.shares, self.token, self.version = 0, True, "", "2.51.0"
        self.answers_as: str | None = None  # the version that answers claim to be of
        self.life = 0  # what is left of an earlier one changes nothing
        self._grpc: Any = None
        self._http: ThreadingHTTPServer | None = None
        self.port = self.http_port = 0

    def add(self, path: Path, name: str = "toy", version: int = 1) -> None:
        self.models.setdefault(name, {})[str(version)] = Model(path)

    def start(self) -> None:
        threads = ThreadPoolExecutor(16, thread_name_prefix="server")
        self._grpc = grpc.server(threads, options=[("grpc.so_reuseport", 0)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Grpc(self), self._grpc)
        self.port = self._grpc.add_insecure_port(f"127.0.0.1:{self.port}")
        self._grpc.start()

    def start_http(self) -> None:
        handler = type("Handler", (_Http,), {"core": self, "life": self.life})
        self._http = ThreadingHTTPServer(("127.0.0.1", self.http_port), handler)
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that has gone
        self.http_port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Die: what is under way gets no answer; registered memory is forgotten."""
        self.life += 1
        if self._grpc is not None:
            self._grpc.stop(0).wait()
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
        self._grpc = self._http = None
        for name in list(self.regions):
            self.share(name, None, self.life)

    def address(self, model: str = "toy", *, http: bool = False) -> str:
        return f"triton+http://127.0.0.1:{self.http_port}/{model}" if http else f"triton://127.0.0.1:{self.port}/{model}"

    # -- what both protocols do

    def check(self, authorization: str) -> None:
        if self.token and authorization != f"Bearer {self.token}":
            raise Fault("UNAUTHENTICATED", "who is there?")

    def model(self, name: str, version: str) -> Model:
        versions = self.models.get(name, {})
        if not versions:
            raise Fault("NOT_FOUND", f"Request for unknown model: '{name}' is not found")
        version = version or max(versions, key=int)
        if version not in versions:
            raise Fault("UNAVAILABLE", f"Request for unknown model: '{name}' version {version} is not at ready state")
        return versions[version]

    def metadata(self, name: str, version: str) -> dict[str, Any]:
        model = self.model(name, version)
        return {"name": name, "versions": [version] if version else sorted(self.models[name]), "platform": "x",
                "inputs": model.tensors("inputs"), "outputs": model.tensors("outputs")}  # fmt: skip

    def parameters(self, name: str, version: str) -> dict[str, str]:
        self.model(name, version)
        if name in self.settings:
            return self.settings[name]
        found = {}
        for number, model in self.models[name].items():
            found |= {f"description.{number}": model.manifest.to_json(), f"sha256.{number}": model.sha256}
        return found

    def share(self, name: str, size: int | None, life: int | None = None) -> None:
        if life not in (None, self.life):
            raise Fault("UNAVAILABLE", "dead")
        if size is None:
            if (region := self.regions.pop(name, None)) is not None:
                region.close()
            return
        if not self.shares:
            raise Fault("INVALID_ARGUMENT", f"Unable to open shared memory region: '/{name}'")
        self.regions[name] = SharedMemory(name)
        # It is the client's to remove; in one process both are known to one tracker.
        resource_tracker.register(f"/{name}", "shared_memory")
        self.registered += 1

    def infer(self, name: str, version: str, images: np.ndarray, wanted: list[str]) -> dict[str, np.ndarray]:
        model = self.model(name, version)
        self.asked.append({"model": name, "version": version, "shape": images.shape})
        outputs = dict(zip(wanted, model.session.run(wanted, {"image": images}), strict=True))
        if self.faults:
            outputs = self.faults.popleft()(outputs) or outputs
        return outputs

    def read(self, name: str, start: int, shape: list[int], dtype: Any) -> np.ndarray:
        if name not in self.regions:
            raise Fault("INVALID_ARGUMENT", f"Unable to find shared memory region: '{name}'")
        return np.ndarray(shape, dtype, self.regions[name].buf, start).copy()

    def write(self, name: str, start: int, size: int, array: np.ndarray) -> None:
        if array.nbytes > size:
            raise Fault("INVALID_ARGUMENT", "shared memory size specified with the request is less than the output's")
        np.ndarray(array.shape, array.dtype, self.regions[name].buf, start)[...] = array


class _Grpc(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, core: Server) -> None:
        self.core, self.life = core, core.life

    @contextmanager
    def _faults(self, context: Any) -> Iterator[None]:
        try:
            self.core.check(dict(context.invocation_metadata()).get("authorization", ""))
            yield
        except Fault as exc:
            context.abort(getattr(grpc.StatusCode, exc.args[0]), exc.args[1])

    def ServerMetadata(self, request: Any, context: Any) -> Any:
        with self._faults(context):
            return pb.ServerMetadataResponse(name="triton", version=self.core.version)

    def ModelMetadata(self, request: Any, context: Any) -> Any:
        with self._faults(context):
            return pb.ModelMetadataResponse(**self.core.metadata(request.name, request.version))

    def ModelConfig(self, request: Any, context: Any) -> Any:
        with self._faults(context):
            answer = pb.ModelConfigResponse()
            for name, text in self.core.parameters(request.name, request.version).items():
                answer.config.parameters[name].string_value = text
            return answer

    def SystemSharedMemoryRegister(self, request: Any, context: Any) -> Any:
        with self._faults(context):
            self.core.share(request.name, request.byte_size, self.life)
        return pb.SystemSharedMemoryRegisterResponse()

    def SystemSharedMemoryUnregister(self, request: Any, context: Any) -> Any:
        with self._faults(context):
            self.core.share(request.name, None, self.life)
        return pb.SystemSharedMemoryUnregisterResponse()

    def ModelInfer(self, request: Any, context: Any) -> Any:
        core, (given,) = self.core, request.inputs
        shape, dtype = list(given.shape), triton_to_np_dtype(given.datatype)
        with self._faults(context):
            if given.parameters:
                name, offset = (given.parameters[f"shared_memory_{part}"] for part in ("region", "offset"))
                images = core.read(name.string_param, offset.int64_param, shape, dtype)
            else:
                images = np.frombuffer(request.raw_input_contents[0], dtype).reshape(shape)
            wanted = [output.name for output in request.outputs]
            outputs = core.infer(request.model_name, request.model_version, images, wanted)
            answer = pb.ModelInferResponse(
                model_name=request.model_name, model_version=core.answers_as or request.model_version
            )
            for asked in request.outputs:
                if asked.name not in outputs:
                    continue
                array = outputs[asked.name]
                told = answer.outputs.add(name=asked.name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
                if "shared_memory_region" in asked.parameters:
                    region, size, offset = (
                        asked.parameters[f"shared_memory_{part}"] for part in ("region", "byte_size", "offset")
                    )
                    core.write(region.string_param, offset.int64_param, size.int64_param, array)
                    answer.raw_output_contents.append(b"")
                    told.parameters["shared_memory_region"].string_param = region.string_param
                else:
                    answer.raw_output_contents.append(array.tobytes())
            return answer


class _Http(BaseHTTPRequestHandler):
    core: Server
    life: int

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])))

    def log_message(self, *_: Any) -> None:
        """Not here."""

    def _answer(self, body: bytes) -> None:
        status, length = 200, None
        try:
            self.core.check(self.headers.get("authorization", ""))
            content, length = self._content(self.path.strip("/").split("/")[1:], body)
        except Fault as exc:
            status, content = HTTP_STATUS[exc.args[0]], json.dumps({"error": exc.args[1]}).encode()
        with suppress(OSError):  # the client has gone
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            if length is not None:
                self.send_header(LENGTH, str(length))
            self.end_headers()
            self.wfile.write(content)

    def _content(self, words: list[str], body: bytes) -> tuple[bytes, int | None]:
        core = self.core
        if not words:
            return json.dumps({"name": "triton", "version": core.version}).encode(), None
        if words[0] == "systemsharedmemory":
            core.share(words[2], json.loads(body)["byte_size"] if words[3] == "register" else None, self.life)
            return b"", None
        name, version = words[1], words[3] if "versions" in words else ""
        if words[-1] == "infer":
            return self._infer(name, version, body)
        if words[-1] == "config":
            said = {key: {"string_value": text} for key, text in core.parameters(name, version).items()}
            return json.dumps({"name": name, "parameters": said}).encode(), None
        return json.dumps(core.metadata(name, version)).encode(), None

    def _infer(self, name: str, version: str, body: bytes) -> tuple[bytes, int]:
        core, length = self.core, int(self.headers.get(LENGTH, len(body)))
        asked = json.loads(body[:length])
        (given,) = asked["inputs"]
        shape, dtype, where = given["shape"], triton_to_np_dtype(given["datatype"]), given["parameters"]
        if "shared_memory_region" in where:
            images = core.read(where["shared_memory_region"], where.get("shared_memory_offset", 0), shape, dtype)
        else:
            images = np.frombuffer(body[length:], dtype)[: prod(shape)].reshape(shape)
        outputs = core.infer(name, version, images, [output["name"] for output in asked["outputs"]])
        told, contents = [], b""
        for output in asked["outputs"]:
            if output["name"] not in outputs:
                continue
            array, where = outputs[output["name"]], output["parameters"]
            entry = {"name": output["name"], "datatype": np_to_triton_dtype(array.dtype), "shape": array.shape}
            if "shared_memory_region" in where:
                region, size = where["shared_memory_region"], where["shared_memory_byte_size"]
                core.write(region, where.get("shared_memory_offset", 0), size, array)
            else:
                entry["parameters"] = {"binary_data_size": array.nbytes}
                contents += array.tobytes()
            told.append(entry)
        head = json.dumps({"model_name": name, "model_version": core.answers_as or version, "outputs": told}).encode()
        return head + contents, len(head)
