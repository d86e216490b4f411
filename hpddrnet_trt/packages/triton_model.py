"""What the Python backend of NVIDIA Triton runs: an engine of ours (:mod:`hpddrnet_trt.packages.triton` writes it).

Each request is an inference of its own, whatever else comes at the same time: what others send never changes
anybody's labels, which are those of the engine on the spot, bit for bit. Where that is asked for one batch it is
:meth:`~hpddrnet_trt.engines.Engine.infer` here too, and :meth:`~hpddrnet_trt.engines.Engine.infer_many` where it is
asked for a row of them, which may round otherwise: OpenVINO then gives an inference fewer threads.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core.domain import OUTPUT as DOMAIN_OUTPUT
from hpddrnet_trt.core.domain import DomainState, domain_of
from hpddrnet_trt.core.errors import ContractError, UserError
from hpddrnet_trt.core.manifest import Manifest
from hpddrnet_trt.engines import ENGINES, Opening, Prediction
from hpddrnet_trt.engines.base import check_input, input_contract
from hpddrnet_trt.engines.tensorrt_library import INPUT
from hpddrnet_trt.engines.triton_service import MANY

logger = logging.getLogger(__name__)

OPENED = "opened"  # parameter of a version: file, engine and its options, as JSON
LARGEST = "largest_pixels"  # likewise: of one picture
_TAKEN = b"used_dltensor"  # what whoever takes a DLPack capsule writes on it; the memory must stay


class TritonPythonModel:
    """The interface that Triton's Python backend asks for; one object an instance, each in a process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the version's file; what is wrong with it is in the server's log and in its answer to readiness."""
        self._server: Any = importlib.import_module("triton_python_backend_utils")
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        file, engine, options = json.loads(parameters[f"{OPENED}.{args['model_version']}"])
        folder = Path(args["model_repository"], args["model_version"])
        if args["model_instance_kind"] == "GPU":
            number = int(args["model_instance_device_id"])
            options["device"] = number if ENGINES[engine].gpu else f"cuda:{number}"
        try:
            self._engine = Opening(folder / file, engine, options).open()
        except UserError as exc:
            raise self._server.TritonModelException(str(exc)) from None
        self._manifest: Manifest = self._engine.manifest
        self._contract = input_contract(self._manifest)
        self._largest = int(parameters[LARGEST])
        self._warm_ups = len(config.get("model_warmup", []))  # the server's own requests come first
        self._families: list[Any] = []
        labels = {"model": args["model_name"], "version": args["model_version"]}
        self._pictures = self._counters(
            "hpddrnet_pictures", "Pictures by how near they are to those of the training", labels,
            "state", get_args(DomainState),
        )  # fmt: skip
        self._requests = self._counters(
            "hpddrnet_requests", "Requests by how they ended", labels, "end", ("answered", "refused", "failed")
        )
        logger.warning("%s runs with %s", folder / file, self._engine.runtime)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response each."""
        batches: dict[int, npt.NDArray[Any]] = {}
        results: dict[int, Prediction | Exception] = {}
        for index, request in enumerate(requests):
            try:
                if request.is_cancelled():
                    raise ContractError("nobody waits for this request any more")
                batches[index] = self._batch(request)
            except UserError as exc:
                results[index] = exc
        for of_row in (False, True):
            chosen = [index for index in batches if _is_of_row(requests[index]) == of_row]
            results |= zip(chosen, self._results([batches[index] for index in chosen], of_row), strict=True)
        return [self._response(request, results[index]) for index, request in enumerate(requests)]

    def finalize(self) -> None:
        """The server unloads the version."""
        self._engine.close()
        self._pictures.clear()
        self._requests.clear()

    # -- parts -----------------------------------------------------------------------------------

    def _counters(
        self, name: str, description: str, labels: dict[str, str], label: str, values: Sequence[str]
    ) -> dict[str, Any]:
        """Counters on the server's page of metrics, by the value of ``label``."""
        kind = self._server.MetricFamily
        family = kind(name=name, description=description, kind=kind.COUNTER)
        self._families.append(family)  # which must outlive its metrics
        return {value: family.Metric(labels={**labels, label: value}) for value in values}

    def _batch(self, request: Any) -> npt.NDArray[Any]:
        """The request's input, in the server's memory; :class:`UserError` where the engine is not to see it."""
        # By DLPack: as_numpy and Tensor of servers until 2.51 at least were compiled for numpy 1, and give arrays
        # without content in numpy 2.
        batch = np.from_dlpack(self._server.get_input_tensor_by_name(request, INPUT))
        check_input(batch, self._contract)
        height, width = batch.shape[2:]
        if height * width > self._largest:
            raise ContractError(
                f"a picture of {height}x{width} pixels is larger than the {self._largest} pixels that this service "
                "takes; send it in tiles"
            )
        if batch.dtype.kind == "f" and not np.isfinite(batch).all():
            raise ContractError("the picture has values that are not numbers (NaN or infinite); correct them first")
        return batch

    def _results(self, batches: list[npt.NDArray[Any]], of_row: bool) -> list[Prediction | Exception]:
        """One a batch; where one of a row fails, each is a row of its own."""
        with suppress(Exception):
            if of_row:
                return list(self._engine.infer_many(batches))
        return [self._result(batch, of_row) for batch in batches]

    def _result(self, batch: npt.NDArray[Any], of_row: bool) -> Prediction | Exception:
        try:
            return next(iter(self._engine.infer_many([batch]))) if of_row else self._engine.infer(batch)
        except Exception as exc:
            if not isinstance(exc, UserError):
                logger.exception("an inference of shape %s failed", batch.shape)
            return exc

    def _response(self, request: Any, result: Prediction | Exception) -> Any:
        if isinstance(result, Exception):
            return self._server.InferenceResponse(error=self._error(result))
        self._requests["answered"].increment(1)
        if self._warm_ups:
            self._warm_ups -= 1
        else:
            features = result.domain_features
            for index in range(len(result.labels)):
                cells = None if features is None else features[index]
                self._pictures[domain_of([cells], self._manifest.domain).state].increment(1)
        outputs = {
            "labels": result.labels, "confidence": result.confidence, "logits": result.logits,
            DOMAIN_OUTPUT: result.domain_features,
        }  # fmt: skip
        wanted = [(name, outputs[name]) for name in request.requested_output_names()]
        return self._server.InferenceResponse([self._tensor(name, array) for name, array in wanted])

    def _error(self, problem: Exception) -> Any:
        """One sentence for the client."""
        kinds, text = self._server.TritonError, str(problem)
        if isinstance(problem, ContractError):
            self._requests["refused"].increment(1)
            return kinds(text, kinds.INVALID_ARG)
        self._requests["failed"].increment(1)
        if isinstance(problem, MemoryError):
            return kinds("the server has no memory left for this picture; send a smaller one", kinds.UNAVAILABLE)
        known = isinstance(problem, UserError)
        return kinds(text if known else "the model failed on this picture; the server's log says how", kinds.INTERNAL)

    def _tensor(self, name: str, array: Any) -> Any:
        capsule = np.require(array, requirements=["C", "W"]).__dlpack__()
        tensor = self._server.Tensor.from_dlpack(name, capsule)
        # The server takes it and writes another name on it than the standard says, of which numpy would complain.
        ctypes.pythonapi.PyCapsule_SetName(ctypes.py_object(capsule), _TAKEN)
        return tensor


def _is_of_row(request: Any) -> bool:
    """Whether the sender's engine was asked for a row of batches."""
    return bool(json.loads(request.parameters() or "{}").get(MANY))
