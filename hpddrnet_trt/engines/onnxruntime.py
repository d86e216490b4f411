"""ONNX Runtime: the engine that needs nothing else, on any CPU (and on CUDA where its build has it)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.engines.base import EngineBase, Prediction, check_input, input_contract
from hpddrnet_trt.engines.outputs import expected_outputs, to_prediction
from hpddrnet_trt.errors import BadInputFile, NoGpu, UsageError, UserError, require
from hpddrnet_trt.manifest import Manifest, read_manifest

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class OnnxRuntimeEngine(EngineBase):
    """Runs an exported ``.onnx`` file.

    On a CPU, FP16 and FP8 files are computed in FP32: FP16 shows no rounding at all, FP8 that of its
    pairs, slowly (:mod:`hpddrnet_trt.deploy.rounding` shows the rest). BF16 files run on CUDA at most.

    Parameters: ``threads`` CPU threads of one inference (default: all cores); ``device`` ``cpu``,
    ``cuda`` or ``auto`` (CUDA when this build of ONNX Runtime has it); ``providers`` names of
    execution providers, overrides ``device``.

    Raises :class:`BadInputFile` for a missing, truncated or foreign file, :class:`NoGpu` when CUDA
    was asked for and cannot be used, :class:`UserError` when an inference fails.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int | None = None,
        device: Literal["auto", "cpu", "cuda"] = "cpu",
        providers: list[str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        input_contract(self.manifest)
        self._ort = require("onnxruntime", "export", "run ONNX files")
        self._errors = _error_classes()
        wanted = providers or _providers(self._ort, device)
        self._session: Any = self._open(wanted, _session_options(self._ort, threads, self.manifest))
        self._check_session(wanted)
        self._threads = threads

    @property
    def runtime(self) -> str:
        provider = self._live().get_providers()[0].removesuffix("ExecutionProvider")
        threads = f", {self._threads} thread{'s' if self._threads > 1 else ''}" if self._threads else ""
        return f"onnxruntime {self._ort.__version__} ({provider}{threads})"

    def infer(self, images: npt.NDArray[Any]) -> Prediction:
        """Run one batch; see :class:`~hpddrnet_trt.engines.base.Engine`."""
        session = self._live()
        check_input(images, input_contract(self.manifest))
        try:
            outputs = session.run(self._names, {self._input: np.ascontiguousarray(images)})
        except self._errors as exc:
            raise UserError(
                f"ONNX Runtime could not run {self.path} on an input of shape {images.shape} "
                f"({_first_line(exc)}); try a smaller image or batch, or export the model again"
            ) from exc
        return to_prediction(dict(zip(self._names, outputs, strict=True)))

    def close(self) -> None:
        self._session = None

    def _live(self) -> Any:
        if self._session is None:
            raise UsageError(f"the engine of {self.path} is closed; load it again")
        return self._session

    def _open(self, providers: list[str], options: Any) -> Any:
        try:
            return self._ort.InferenceSession(
                str(self.path), options, providers=providers, disabled_optimizers=_disabled_optimizers(self.manifest)
            )
        except self._errors as exc:
            if self.manifest.precision == "bf16":
                raise UsageError(
                    f"{self.path} is BF16, which ONNX Runtime {self._ort.__version__} has no kernels for on "
                    f"{providers[0].removesuffix('ExecutionProvider')} ({_first_line(exc)}); build a TensorRT engine "
                    "from it, or run the FP32 or FP16 file here"
                ) from exc
            raise BadInputFile(
                f"{self.path} cannot be loaded by ONNX Runtime {self._ort.__version__} ({_first_line(exc)}); "
                "export it again"
            ) from exc

    def _check_session(self, providers: list[str]) -> None:
        # ONNX Runtime falls back to the CPU with no more than a log line when a provider fails.
        if self._session.get_providers()[0] != providers[0]:
            raise NoGpu(
                f"ONNX Runtime could not start {providers[0]}; check driver and libraries, or use device='cpu'"
            )
        self._input = self._session.get_inputs()[0].name
        self._names = expected_outputs(self.manifest, [out.name for out in self._session.get_outputs()], self.path)


def _session_options(ort: Any, threads: int | None, manifest: Manifest) -> Any:
    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel
    # The higher levels fuse FP8 pairs into integer operators, which do not take them (onnxruntime 1.31).
    options.graph_optimization_level = (
        levels.ORT_ENABLE_BASIC if manifest.precision == "fp8" else levels.ORT_ENABLE_ALL
    )
    options.log_severity_level = 3  # errors only
    if threads is not None:
        if threads < 1:
            raise UsageError(f"threads must be at least 1, got {threads}")
        options.intra_op_num_threads = threads
    return options


def _disabled_optimizers(manifest: Manifest) -> list[str]:
    # TensorRT's symmetric Q/DQ form leaves biases in floating point; this optimiser would quantise
    # them and lose 7 % of the labels in INT8, 27 % in FP8 with FP16, without a word (onnxruntime 1.31).
    # ONNX Runtime's own form already has integer biases.
    tensorrt = manifest.quantised_for == "tensorrt" or manifest.precision == "fp8"
    return ["WeightBiasQuantization"] if tensorrt else []


def _providers(ort: Any, device: str) -> list[str]:
    has_cuda = CUDA in ort.get_available_providers()
    if device == "cpu" or (device == "auto" and not has_cuda):
        return [CPU]
    if device not in ("auto", "cuda"):
        raise UsageError(f"unknown device {device!r} for ONNX Runtime; choose one of: auto, cpu, cuda")
    if not has_cuda:
        raise NoGpu(
            "this installation of ONNX Runtime has no CUDA support; "
            "replace onnxruntime by onnxruntime-gpu, or use device='cpu'"
        )
    return [CUDA, CPU]


def _error_classes() -> tuple[type[Exception], ...]:
    # They share no base class of their own.
    state = require("onnxruntime.capi.onnxruntime_pybind11_state", "export", "run ONNX files")
    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented",
             "RuntimeException", "EPFail")
    return tuple(getattr(state, name) for name in names if hasattr(state, name))


def _first_line(exc: Exception) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0][:300]
