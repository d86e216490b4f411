"""OpenVINO: the faster CPU engine on many Intel and AMD machines, an optional extra.

Guards, each for a hazard measured with OpenVINO 2026.4: inference precision is set to f32 (its
own choice was slower and less exact), graphs are compiled for one static shape each (INT8 with
dynamic shapes gave wrong labels), and graphs quantised in ONNX Runtime's own form are refused
(some crashed the process). :func:`verify_in_child` checks a file before it is trusted.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import hpddrnet_trt
from hpddrnet_trt.engines.base import EngineBase, Prediction, check_input, input_contract
from hpddrnet_trt.engines.onnxruntime import OnnxRuntimeEngine
from hpddrnet_trt.engines.outputs import expected_outputs, to_prediction
from hpddrnet_trt.errors import BadInputFile, UsageError, UserError, require
from hpddrnet_trt.manifest import read_manifest
from hpddrnet_trt.metrics import agreement

COMPILED_SHAPES = 4  # compiled graphs kept per engine, the least recently used goes first


class OpenVINOEngine(EngineBase):
    """Runs an exported ``.onnx`` file on the CPU with OpenVINO.

    ``threads``: CPU threads of one inference (default: OpenVINO's choice). The first inference of
    a new input shape compiles the graph for it (0.3 s to 2 s).

    Raises :class:`MissingDependency` without OpenVINO, :class:`BadInputFile` for a missing,
    truncated or foreign file, :class:`UsageError` for a graph quantised for ONNX Runtime,
    :class:`UserError` when an inference fails.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        input_contract(self.manifest)
        if self.manifest.quantised_for == "onnxruntime":
            raise UsageError(
                f"{self.path} is quantised in ONNX Runtime's own form, which can crash OpenVINO; run it with the "
                "onnxruntime engine, or calibrate with form 'tensorrt', which OpenVINO runs well"
            )
        if threads is not None and threads < 1:
            raise UsageError(f"threads must be at least 1, got {threads}")
        self._ov = require("openvino", "openvino", "run models with OpenVINO")
        self._threads = threads
        self._core: Any = self._ov.Core()
        self._names = self._read_outputs()
        self._compiled: OrderedDict[tuple[int, ...], Any] = OrderedDict()

    @property
    def runtime(self) -> str:
        threads = f", {self._threads} thread{'s' if self._threads > 1 else ''}" if self._threads else ""
        return f"openvino {self._ov.__version__.split('-')[0]} (CPU{threads})"

    def infer(self, images: npt.NDArray[Any]) -> Prediction:
        """Run one batch; see :class:`~hpddrnet_trt.engines.base.Engine`."""
        if self._core is None:
            raise UsageError(f"the engine of {self.path} is closed; load it again")
        check_input(images, input_contract(self.manifest))
        try:
            request = self._request(images.shape)
            results = request.infer([np.ascontiguousarray(images)], share_inputs=True)
        except RuntimeError as exc:
            raise UserError(
                f"OpenVINO could not run {self.path} on an input of shape {images.shape} ({_reason(exc)}); "
                "try a smaller image or batch, or the onnxruntime engine"
            ) from exc
        return to_prediction({name: results[name] for name in self._names})

    def close(self) -> None:
        self._compiled.clear()
        self._core = None

    def _read(self) -> Any:
        try:
            return self._core.read_model(str(self.path))
        except RuntimeError as exc:
            raise BadInputFile(f"{self.path} cannot be loaded by OpenVINO ({_reason(exc)}); export it again") from exc

    def _read_outputs(self) -> list[str]:
        present = [name for port in self._read().outputs for name in port.get_names()]
        return expected_outputs(self.manifest, present, self.path)

    def _request(self, shape: tuple[int, ...]) -> Any:
        """The inference request compiled for ``shape``."""
        if shape not in self._compiled:
            model = self._read()
            model.reshape({model.inputs[0]: self._ov.PartialShape(list(shape))})
            settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
            if self._threads is not None:
                settings["INFERENCE_NUM_THREADS"] = self._threads
            self._compiled[shape] = self._core.compile_model(model, "CPU", settings).create_infer_request()
            if len(self._compiled) > COMPILED_SHAPES:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(shape)
        return self._compiled[shape]


def verify_in_child(
    path: str | Path, images: npt.NDArray[Any], *, minimum_agreement: float = 0.99, timeout_s: float = 300.0
) -> float:
    """Run ``path`` with OpenVINO in a child process and compare its labels with ONNX Runtime's.

    ``images``: one batch that follows the model's input contract. Returns the share of equal
    labels. Raises :class:`UserError` when the child crashes, hangs, or agrees on less than
    ``minimum_agreement``; the calling process is never at risk.
    """
    with OnnxRuntimeEngine(path) as engine:
        expected = engine.infer(images).labels
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "images.npy", Path(folder) / "labels.npy"
        np.save(source, images)
        _run_child([str(path), str(source), str(target)], Path(path), timeout_s)
        share = agreement(np.load(target), expected)
    if not share >= minimum_agreement:
        raise UserError(
            f"OpenVINO and ONNX Runtime agree on {share:.2%} of the labels of {path}, less than "
            f"{minimum_agreement:.2%}; use the onnxruntime engine for this file"
        )
    return share


def _run_child(arguments: list[str], path: Path, timeout_s: float) -> None:
    root = str(Path(hpddrnet_trt.__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "hpddrnet_trt.engines.openvino", *arguments]
    try:
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as exc:
        raise UserError(f"OpenVINO did not finish {path} within {timeout_s:.0f} s; use the onnxruntime engine") from exc
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or ["no message"])[-1]
        died = f"died by signal {-child.returncode}" if child.returncode < 0 else f"failed ({reason})"
        raise UserError(f"OpenVINO {died} on {path}; use the onnxruntime engine for this file")


def _child(path: str, source: str, target: str) -> int:
    try:
        with OpenVINOEngine(path) as engine:
            np.save(target, engine.infer(np.load(source)).labels)
    except UserError as exc:
        print(exc, file=sys.stderr)
        return exc.exit_code
    return 0


def _reason(exc: RuntimeError) -> str:
    # OpenVINO's messages begin with source file names; the last line says what happened.
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"


if __name__ == "__main__":
    sys.exit(_child(*sys.argv[1:]))
