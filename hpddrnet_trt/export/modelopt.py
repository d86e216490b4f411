"""NVIDIA ModelOpt (Apache-2.0) as a quantiser: its own choice of ranges and of places for the pairs.

ModelOpt replaces functions of ONNX Runtime in the process that calls it and loads PyTorch. So it runs
in a child process (``python -m hpddrnet_trt.export.modelopt FOLDER``) and nothing of it is imported
here. The folder carries the work: the float graph, one file per calibration batch, the request, and
what comes back. The child reads one batch at a time, so memory does not grow with their number
(0.8 GB with 10 crops of 512x512 and with 40). No GPU is needed.

What ModelOpt 0.47 gives, measured on nasa-super1 (calibrated on train; 4 images of val and test; mean
IoU against FP32 labels, and what :mod:`hpddrnet_trt.graph.lint` finds):

===================  ======  ======  ==================================================================
                     test    val     placement
===================  ======  ======  ==================================================================
INT8 ``max``         0.9925  0.9917  12 of 14 residual blocks sound, 24 conversions outside of them
our own, ``max``     0.9926  0.9923  14 of 14, 13 conversions
INT8 ``entropy``     0.9905  0.9853  as with ``max``
our own, entropy     0.9951  0.9912
===================  ======  ======  ==================================================================

With ``max`` its ranges equal ours to 1e-6. It pairs no tensor that only nodes outside of the plan read,
so the sum that ends a block in front of the channel attention stays in floating point; its entropy
histogram has 128 bins.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

import hpddrnet_trt
from hpddrnet_trt.core.errors import MissingDependency, UsageError, UserError, require
from hpddrnet_trt.core.precisions import LowPrecision
from hpddrnet_trt.core.runtimes import load_onnxruntime
from hpddrnet_trt.graph import qdq
from hpddrnet_trt.graph.nodes import name_nodes

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)

Method = Literal["max", "entropy"]
METHODS: tuple[str, ...] = get_args(Method)
TIMEOUT_S = 3600.0
# What ``import modelopt.onnx`` asks for; its own extra [onnx] brings CUDA packages as well.
_NEEDED = ("modelopt", "onnx", "onnxruntime", "onnx_graphsurgeon", "onnxslim", "lief", "torch")
_LOG_LINES = 12  # of the child's log, in an error's message
_ADVICE = "quantise with our own tool instead (--tool own)"
_MISSING = 3  # exit code of a child that could not import ModelOpt


def installed_version() -> str | None:
    """Version of ModelOpt, or None where it or a package it needs for ONNX is not installed. Imports nothing."""
    if any(importlib.util.find_spec(name) is None for name in _NEEDED):
        return None
    try:
        return importlib.metadata.version("nvidia-modelopt")
    except importlib.metadata.PackageNotFoundError:  # another package of that name
        return None


def allowed_nodes(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the nodes of a float graph that ModelOpt may quantise: those that our own plan gives pairs to.

    The convolutions of feature maps with constant kernels, and the sums and average poolings around them
    (:mod:`hpddrnet_trt.graph.qdq`, rules 2 to 4). ModelOpt's own choice is wider: it takes in the channel
    attention on 1x1 maps and its gates, all of the pyramid pooling, batch normalisation, and the class
    scores before the final resize. Nodes must be named (:func:`hpddrnet_trt.graph.nodes.name_nodes`).
    """
    plan = qdq.plan(model, "tensorrt")
    convolutions, paired = set(plan.nodes), set(plan.tensors)

    def allowed(node: onnx.NodeProto) -> bool:
        if node.op_type == "Add":
            return not paired.isdisjoint(node.input)
        return node.name in convolutions or (node.op_type == "AveragePool" and node.output[0] in paired)

    return tuple(node.name for node in model.graph.node if allowed(node))


def quantise_with_modelopt(
    model: onnx.ModelProto,
    batches: Iterable[npt.NDArray[Any]],
    *,
    method: Method = "max",
    precision: LowPrecision = "int8",
    exclude: Collection[str] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> onnx.ModelProto:
    """A new ``ModelProto`` with explicit pairs, made by ModelOpt from the FP32 graph ``model``.

    ``batches``: calibration inputs as the graph's one input wants them (shape, dtype); they are written
    to a temporary folder one by one. ``method``: ``max`` takes the largest magnitude of each activation,
    ``entropy`` ModelOpt's histogram of 128 bins. ``precision``: ``int8``, or ``fp8`` (E4M3, ``max`` only:
    ModelOpt turns the INT8 scales into FP8 ones, which is right for the largest magnitude alone).
    Its factor is 448/127 where 127/448 is due, so the largest magnitude becomes 36, not 448
    (github.com/NVIDIA/Model-Optimizer/issues/215): coarser numbers near zero, but no harm was measured.
    ``exclude``: names of nodes that stay in floating point; by default all but :func:`allowed_nodes`, an
    empty collection leaves the choice to ModelOpt (but for matrix products, which are attention here).

    Pairs are symmetric, weights are stored as integers (or FP8 numbers) with one scale per output channel,
    biases are not quantised, everything else stays FP32 (type it with
    :func:`~hpddrnet_trt.graph.precision.to_half`). The same inputs give the same result.

    Raises :class:`UsageError` for a request that makes no sense, :class:`MissingDependency` without
    ModelOpt, :class:`UserError` when the child crashes, is slower than ``timeout_s`` seconds, or returns no
    sound graph; the end of its log is part of the message. On Ctrl-C the child ends and the folder goes.
    """
    onnx = require("onnx", "export", "quantise ONNX models")
    if method not in METHODS:
        raise UsageError(f"unknown ModelOpt method {method!r}; choose one of: {', '.join(METHODS)}")
    if precision not in get_args(LowPrecision):
        raise UsageError(f"ModelOpt is asked for {precision!r}; choose one of: {', '.join(get_args(LowPrecision))}")
    if precision == "fp8" and method != "max":
        raise UsageError(f"ModelOpt's FP8 needs the method 'max', not {method!r}: it derives FP8 scales from maxima")
    source = onnx.ModelProto()
    source.CopyFrom(model)
    name_nodes(source)
    excluded = _exclusions(source, exclude)
    with tempfile.TemporaryDirectory(prefix="hpddrnet-trt-modelopt-") as name:
        folder = Path(name)
        onnx.save(source, str(folder / "float.onnx"))
        count = _write_batches(folder, batches)
        request = {"method": method, "precision": precision, "exclude": sorted(excluded)}
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        logger.info("ModelOpt calibrates (%s, %s) on %d batches in a process of its own", precision, method, count)
        log = _run_child(folder, timeout_s)
        result = _read_result(folder / "quantised.onnx", source, log)
    del result.graph.value_info[:]  # shapes and types of the float graph
    return result


def _exclusions(model: onnx.ModelProto, asked: Collection[str] | None) -> set[str]:
    names = {node.name for node in model.graph.node}
    if asked is None:
        return names - set(allowed_nodes(model))
    if unknown := set(asked) - names:
        raise UsageError(f"the model has no node called {', '.join(sorted(unknown))}; nodes to exclude must exist")
    return set(asked)


# --------------------------------------------------------------------------- the parent's side


def _write_batches(folder: Path, batches: Iterable[npt.NDArray[Any]]) -> int:
    count = 0
    for count, batch in enumerate(batches, start=1):
        _write_batch(folder / f"batch_{count:06d}.npy", batch)
    if not count:
        raise UsageError("ModelOpt was given no calibration batch; give at least one")
    return count


def _write_batch(path: Path, batch: npt.NDArray[Any]) -> None:
    try:
        np.save(path, batch)
    except OSError as exc:
        raise UserError(
            f"cannot write {path} ({exc.strerror}); free some space, or set TMPDIR to a folder on a larger disk"
        ) from exc


def _run_child(folder: Path, timeout_s: float) -> str:
    """Run the child on ``folder``; the end of what it printed."""
    root = str(Path(hpddrnet_trt.__file__).resolve().parent.parent)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "PYTHONHASHSEED": "0",  # ModelOpt walks over sets of names: the same order every time
        "PYTHONUNBUFFERED": "1",  # a crash loses nothing of the log
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUTF8": "1",
        "TMPDIR": str(folder),  # what it leaves behind goes with the folder
        "TEMP": str(folder),
    }
    log = folder / "log.txt"
    command = [sys.executable, "-m", __name__, str(folder)]
    try:
        with log.open("wb") as stream:
            child = subprocess.run(
                command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=stream,
                stderr=subprocess.STDOUT, timeout=timeout_s, check=False,
            )  # fmt: skip
    except subprocess.TimeoutExpired as exc:
        raise UserError(
            f"ModelOpt did not finish within {timeout_s:.0f} s; use fewer images, or {_ADVICE}{_tail(log)}"
        ) from exc
    if child.returncode == _MISSING:
        raise MissingDependency(_last_line(log))
    if child.returncode < 0:
        raise UserError(f"ModelOpt's process died by signal {-child.returncode}; {_ADVICE}{_tail(log)}")
    if child.returncode:
        raise UserError(f"ModelOpt failed ({_last_line(log)}); {_ADVICE}{_tail(log)}")
    return _tail(log)


def _lines(log: Path) -> list[str]:
    text = log.read_text(encoding="utf-8", errors="replace")
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


def _last_line(log: Path) -> str:
    return (_lines(log) or ["no message"])[-1].strip()


def _tail(log: Path) -> str:
    lines = _lines(log)[-_LOG_LINES:]
    return "\nThe end of its log:\n" + "\n".join(f"  {line[:300]}" for line in lines) if lines else ""


def _read_result(path: Path, source: onnx.ModelProto, log: str) -> onnx.ModelProto:
    """The child's graph, if it is one and has the source's inputs and outputs."""
    import onnx

    protobuf: Any = importlib.import_module("google.protobuf.message")  # without type stubs
    advice = f"{_ADVICE}{log}"
    try:
        result = onnx.load(str(path))
        onnx.checker.check_model(result, full_check=True)
    except FileNotFoundError as exc:
        raise UserError(f"ModelOpt ended without an error and without a result; {advice}") from exc
    except (protobuf.DecodeError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
        raise UserError(f"what ModelOpt wrote is not a valid ONNX graph ({exc}); {advice}") from exc
    for kind in ("input", "output"):
        expected, got = (
            [(entry.name, entry.type.tensor_type.elem_type) for entry in getattr(graph, kind)]
            for graph in (source.graph, result.graph)
        )
        if got != expected:
            raise UserError(f"ModelOpt changed the model's {kind}s from {expected} to {got}; {advice}")
    if not any(node.op_type == "QuantizeLinear" for node in result.graph.node):
        raise UserError(f"ModelOpt quantised nothing in this model; {advice}")
    return result


# ---------------------------------------------------------------------------- the child's side


def _child(folder: Path) -> int:
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    try:
        modelopt = require("modelopt.onnx.quantization", "modelopt", "quantise with NVIDIA ModelOpt")
    except MissingDependency as exc:
        print(" ".join(str(exc).split()), flush=True)
        return _MISSING
    modelopt.quantize(
        str(folder / "float.onnx"),
        quantize_mode=request["precision"],
        calibration_method=request["method"],
        calibration_data_reader=_reader(folder),
        calibration_eps=["cpu"],
        # ModelOpt matches these as regular expressions from a name's beginning.
        nodes_to_exclude=[rf"{re.escape(name)}\Z" for name in request["exclude"]],
        op_types_to_exclude=["MatMul", "Gemm"],
        # Both look for matrix products to leave out, by running the model: there are none left.
        disable_mha_qdq=True,
        enable_gemv_detection_for_trt=False,
        high_precision_dtype="fp32",
        dq_only=True,
        output_path=str(folder / "quantised.onnx"),
    )
    return 0


def _reader(folder: Path) -> Any:
    import onnx

    load_onnxruntime("calibrate models")
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    paths = sorted(folder.glob("batch_*.npy"))
    name = onnx.load(str(folder / "float.onnx")).graph.input[0].name

    class Reader(CalibrationDataReader):
        """One batch in memory at a time."""

        def __init__(self) -> None:
            self._next = 0

        def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
            if self._next == len(paths):
                return None
            self._next += 1
            return {name: np.load(paths[self._next - 1])}

    return Reader()


if __name__ == "__main__":
    sys.exit(_child(Path(sys.argv[1])))
