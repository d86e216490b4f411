"""OpenVINO: the faster CPU engine on many Intel and AMD machines, an optional extra.

Guards, each for a hazard measured with OpenVINO 2026.4: FP32 files are computed in FP32 unless BF16 is asked for
(its own choice is BF16, also where that is emulated), graphs are compiled for one static shape each (INT8 with
dynamic shapes gave wrong labels), and graphs quantised in ONNX Runtime's own form are refused
(some crashed the process). :func:`verify_in_child` checks a file before it is trusted.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt

import hpddrnet_trt
from hpddrnet_trt.core.errors import BadInputFile, UsageError, UserError, one_line, require
from hpddrnet_trt.core.files import sha256_of
from hpddrnet_trt.core.manifest import read_manifest
from hpddrnet_trt.core.metrics import LabelComparison
from hpddrnet_trt.core.precisions import is_calibrated
from hpddrnet_trt.core.runtimes import load_openvino
from hpddrnet_trt.engines.base import (
    EngineBase,
    Prediction,
    check_input,
    checked_prediction,
    expected_outputs,
    input_contract,
)
from hpddrnet_trt.engines.compiled import FOLDER, cache_key, compiled, remembered
from hpddrnet_trt.engines.onnxruntime import OnnxRuntimeEngine
from hpddrnet_trt.graph.check import check_onnx, rewritten

KERNELS = "kernels"  # folder in the user's cache folder
COMPILED_GRAPHS = 4  # kept per engine (a shape, for latency or for throughput); the least recently used goes first
# Of all batches that run side by side: 16 of 1024 x 1024, some 3 GiB, however many cores there are.
SIDE_BY_SIDE_PIXELS = 1 << 24

_ERRORS = (RuntimeError, ValueError, MemoryError)  # what OpenVINO raises for files and inputs

Precision = Literal["auto", "fp32", "bf16"]
Hint = Literal["LATENCY", "THROUGHPUT"]
_HINTS = {"fp32": "f32", "bf16": "bf16"}  # what OpenVINO calls them


class OpenVINOEngine(EngineBase):
    """Runs an exported ``.onnx`` file on the CPU with OpenVINO.

    ``threads``: CPU threads of one inference (default: OpenVINO's choice). ``precision``: what
    floating-point layers are computed in. ``auto``: FP32 for an FP32 file; for one of reduced precision
    (FP16, BF16, INT8, FP8) BF16 where that is faster (:func:`fast_bf16`), else FP32. ``fp32`` and ``bf16`` ask for
    one. Position attention runs as OpenVINO's fused operator (:func:`fuse_attention`). ``defaults`` gives OpenVINO no
    instruction at all but ``threads``, to compare with.

    The first inference of a new input shape compiles the graph for it (0.3 s to 2 s), and keeps it for the next
    start (:mod:`hpddrnet_trt.engines.compiled`; not with ``defaults`` or without ``keep``);
    :meth:`infer_many` compiles a second one, which runs several batches side by side. Several threads
    may use one engine at once; OpenVINO gives each inference all its threads, one after the other.

    Raises :class:`MissingDependency` without OpenVINO, :class:`BadInputFile` for a missing,
    truncated or foreign file, :class:`UsageError` for a graph quantised for ONNX Runtime,
    :class:`UserError` when an inference fails.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int | None = None,
        precision: Precision = "auto",
        defaults: bool = False,
        keep: bool = True,
    ) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        input_contract(self.manifest)
        if self.manifest.quantized_for == "onnxruntime":
            raise UsageError(
                f"{self.path} is quantised in ONNX Runtime's own form, which can crash OpenVINO; run it with the "
                "onnxruntime engine, or calibrate for the target runtime tensorrt, which OpenVINO runs well"
            )
        if threads is not None and threads < 1:
            raise UsageError(f"threads must be at least 1, got {threads}")
        if precision not in get_args(Precision):
            raise UsageError(f"precision {precision!r} is unknown; choose one of: {', '.join(get_args(Precision))}")
        self._ov = load_openvino()
        self._threads = threads
        self._core: Any = self._ov.Core()
        self._defaults, self._keep = defaults, keep and not defaults
        self._floats = self._choose_precision(precision)
        self._sha256 = sha256_of(self.path)
        # A file that this user has opened before is not checked and read again.
        present = remembered(FOLDER, cache_key("outputs", self._sha256), self._checked_outputs, _are_sizes)
        self._names = expected_outputs(self.manifest, present, self.path)
        self._graphs: OrderedDict[tuple[tuple[int, ...], Hint], _Graph] = OrderedDict()
        self._lock = threading.Lock()  # of the table above
        self._compiling = threading.Lock()  # held for seconds: inferences of known shapes go on

    def _checked_outputs(self) -> dict[str, list[int]]:
        """Sizes of the outputs (-1: any), after all that is checked of a file before OpenVINO may have it."""
        check_onnx(self.path, "operators")
        return {
            name: [-1 if size.is_dynamic else size.get_length() for size in port.get_partial_shape()]
            for port in self._read().outputs
            for name in port.get_names()
        }

    def _choose_precision(self, asked: Precision) -> Literal["fp32", "bf16"]:
        if self._defaults:
            return "bf16" if computes_bf16() else "fp32"
        if asked == "bf16" and not computes_bf16():
            raise UsageError("this processor does not compute in BF16; choose precision 'fp32' or 'auto'")
        if asked != "auto":
            return asked
        return "bf16" if self.manifest.precision not in (None, "fp32") and fast_bf16() else "fp32"

    @property
    def runtime(self) -> str:
        threads = f", {self._threads} thread{'s' if self._threads > 1 else ''}" if self._threads else ""
        kind = ", BF16" if self._floats == "bf16" else ""
        kind += ", defaults" if self._defaults else ""
        return f"openvino {self._ov.__version__.split('-')[0]} (CPU{threads}{kind})"

    def infer(self, images: npt.NDArray[Any]) -> Prediction:
        """Run one batch; see :class:`~hpddrnet_trt.engines.base.Engine`."""
        check_input(images, input_contract(self.manifest))
        with self._errors(images.shape):
            graph = self._graph(images.shape, "LATENCY")
        return self._finish(*self._start(graph, images))

    @property
    def float_precision(self) -> Literal["fp32", "bf16"]:
        """What floating-point layers are computed in."""
        return self._floats

    @property
    def arithmetic(self) -> str:
        """See :class:`~hpddrnet_trt.engines.base.EngineBase`; of a quantized file its own precision."""
        return str(self.manifest.precision) if is_calibrated(self.manifest.precision) else self.float_precision

    def infer_many(self, batches: Iterable[npt.NDArray[Any]]) -> Iterator[Prediction]:
        """Run batches side by side, each on few threads: more of them per second than one after the other.

        A batch that does not follow the contract ends the iteration after the results before it.
        """
        waiting: deque[_Started] = deque()
        shape: tuple[int, ...] = ()
        graph: _Graph | None = None
        problem: UserError | None = None
        try:
            for images in batches:
                try:
                    self._live()
                    check_input(images, input_contract(self.manifest))
                except UserError as exc:
                    problem = exc
                    break
                if graph is None or images.shape != shape:
                    while waiting:
                        yield self._finish(*waiting.popleft())
                    shape, graph = images.shape, self._graph(images.shape, "THROUGHPUT")
                if len(waiting) == graph.side_by_side:
                    yield self._finish(*waiting.popleft())
                waiting.append(self._start(graph, images))
            while waiting:
                yield self._finish(*waiting.popleft())
            if problem is not None:
                raise problem
        finally:
            for _, request, _ in waiting:  # an abandoned generator leaves nothing running
                with suppress(RuntimeError):  # it would hide what ended the loop
                    request.wait()

    def _start(self, graph: _Graph, images: npt.NDArray[Any]) -> _Started:
        """Begin an inference.

        The steps of its own ``infer``, without the Python around them, which holds up the other threads of a program.
        """
        array = _shareable(images)
        with self._errors(images.shape):
            request = graph.take()
            request.set_input_tensor(self._ov.Tensor(array, shared_memory=True))
            request.start_async()
        return graph, request, array

    def _finish(self, graph: _Graph, request: Any, images: npt.NDArray[Any]) -> Prediction:
        """Wait for an inference of ``images``, and copy its results out."""
        with self._errors(images.shape):
            request.wait()
            results = {name: request.get_tensor(name).data.copy() for name in self._names}
            graph.free.append(request)
        return checked_prediction(results, self.manifest, images.shape)

    def bind(self, images: npt.NDArray[Any]) -> Callable[[], None]:
        """See :class:`~hpddrnet_trt.engines.base.Engine`."""
        check_input(images, input_contract(self.manifest))
        with self._errors(images.shape):
            request = self._graph(images.shape, "LATENCY").take()  # and never given back
            request.set_input_tensor(self._ov.Tensor(_shareable(images), shared_memory=True))

        def run() -> None:
            self._live()
            with self._errors(images.shape):
                request.start_async()
                request.wait()

        return run

    def layer_times(self, images: npt.NDArray[Any], runs: int = 20) -> dict[str, float]:
        """See :class:`~hpddrnet_trt.engines.base.Engine`; compiles the graph once more, with counters."""
        check_input(images, input_contract(self.manifest))
        # A layer that takes less than a microsecond is reported as not run, in that inference or in all.
        counted: list[dict[str, float]] = []
        with self._errors(images.shape):
            compiled = self._compile(images.shape, "LATENCY", {"PERF_COUNT": True})
            request = compiled.create_infer_request()
            for _ in range(runs + 1):
                request.infer([np.ascontiguousarray(images)], share_inputs=True)
                counted.append(
                    {
                        layer.node_name: 1e3 * layer.real_time.total_seconds()
                        for layer in request.profiling_info
                        if layer.status == layer.Status.EXECUTED
                    }
                )
        del counted[0]  # prepares weights
        names = _names_in_file(compiled)
        times: dict[str, float] = defaultdict(float)
        for name in dict.fromkeys(name for run in counted for name in run):
            times[names.get(name) or name] += median(run.get(name, 0.0) for run in counted)
        return dict(times)

    def close(self) -> None:
        """Free the graphs, once the inferences that other threads are in have ended."""
        with self._lock:
            self._graphs.clear()
            self._core = None

    def _live(self) -> Any:
        if self._core is None:
            raise UsageError(f"the engine of {self.path} is closed; load it again")
        return self._core

    @contextmanager
    def _errors(self, shape: tuple[int, ...]) -> Iterator[None]:
        try:
            yield
        except _ERRORS as exc:
            raise UserError(
                f"OpenVINO could not run {self.path} on an input of shape {shape} ({one_line(exc, 'last')}); "
                "try a smaller image or batch, or the onnxruntime engine"
            ) from exc

    def _read(self) -> Any:
        core = self._live()
        # OpenVINO does not read functions (2026.4).
        functions = self.manifest.attention == "function"
        try:
            return core.read_model((functions and rewritten(self.path, lambda model: None)) or str(self.path))
        except _ERRORS as exc:
            raise BadInputFile(
                f"{self.path} cannot be loaded by OpenVINO ({one_line(exc, 'last')}); export it again"
            ) from exc

    def _graph(self, shape: tuple[int, ...], hint: Hint) -> _Graph:
        """The graph compiled for ``shape``, now if need be."""
        key = (shape, hint)
        graph = self._known(key)
        if graph is not None:
            return graph
        with self._compiling:
            graph = self._known(key)  # another thread may have been faster
            if graph is not None:
                return graph
            made = _Graph(self._compile(shape, hint), hint)
            with self._lock:
                self._live()
                self._graphs[key] = made
                if len(self._graphs) > COMPILED_GRAPHS:
                    self._graphs.popitem(last=False)
            return made

    def _known(self, key: tuple[tuple[int, ...], Hint]) -> _Graph | None:
        with self._lock:
            self._live()
            if key in self._graphs:
                self._graphs.move_to_end(key)
            return self._graphs.get(key)

    def _compile(self, shape: tuple[int, ...], hint: Hint, more: Mapping[str, Any] | None = None) -> Any:
        settings: dict[str, Any] = dict(more or {})
        if not self._defaults:
            settings |= {"INFERENCE_PRECISION_HINT": _HINTS[self._floats], "PERFORMANCE_HINT": hint}
        elif hint == "THROUGHPUT":
            settings["PERFORMANCE_HINT"] = hint
        if hint == "THROUGHPUT":
            settings["PERFORMANCE_HINT_NUM_REQUESTS"] = max(2, SIDE_BY_SIDE_PIXELS // (shape[0] * shape[2] * shape[3]))
        if self._threads is not None:
            settings["INFERENCE_NUM_THREADS"] = self._threads
            # Else every process with fewer threads than cores sits on the first of them, and two share it.
            settings["ENABLE_CPU_PINNING"] = False
        core = self._live()

        def compile_graph() -> Any:
            model = self._read()
            model.reshape({model.inputs[0]: self._ov.PartialShape(list(shape))})
            if not self._defaults:
                fuse_attention(model)
            return core.compile_model(model, "CPU", settings)

        if more or not self._keep:
            return compile_graph()
        return compiled(core, cache_key(self._sha256, shape, settings), settings, compile_graph)


class _Graph:
    """A graph compiled for one shape, and its requests (inputs, outputs and state of one inference) that are free."""

    def __init__(self, compiled: Any, hint: Hint) -> None:
        self._compiled = compiled
        # Batches that run at the same time; more would wait for each other.
        self.side_by_side = 1 if hint == "LATENCY" else int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        self.free: deque[Any] = deque()

    def take(self) -> Any:
        """A request that nobody else uses; append it to :attr:`free` afterwards, unless it has failed."""
        try:
            return self.free.pop()  # as a whole, whatever other threads do
        except IndexError:
            return self._compiled.create_infer_request()


_Started = tuple[_Graph, Any, npt.NDArray[Any]]  # the last: the input that the request reads until it has ended


def _shareable(images: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """``images`` as OpenVINO reads them in place: contiguous, and writable, which it insists on (2026.4)."""
    return np.require(images, requirements=("C", "W"))


def verify_in_child(
    path: str | Path,
    images: npt.NDArray[Any],
    *,
    precision: Precision = "auto",
    minimum_agreement: float = 0.99,
    timeout_s: float = 300.0,
) -> float:
    """Run ``path`` with OpenVINO in a child process and compare its labels with ONNX Runtime's.

    ``images``: one batch that follows the model's input contract; ``precision``: as the engine's.
    Returns the share of equal labels. Raises :class:`UserError` when the child crashes, hangs, or agrees
    on less than ``minimum_agreement``; the calling process is never at risk.
    """
    with OnnxRuntimeEngine(path) as engine:
        expected = engine.infer(images).labels
        comparison = LabelComparison(engine.manifest.network.num_classes)
    path = Path(path)
    root = str(Path(hpddrnet_trt.__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "images.npy", Path(folder) / "labels.npy"
        np.save(source, images)
        command = [sys.executable, "-m", "hpddrnet_trt.engines.openvino", *map(str, (path, source, target)), precision]
        try:
            child = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace",
                                   timeout=timeout_s, check=False)  # fmt: skip
        except subprocess.TimeoutExpired as exc:
            raise UserError(
                f"OpenVINO did not finish {path} within {timeout_s:.0f} s; use the onnxruntime engine"
            ) from exc
        if child.returncode:
            reason = one_line(child.stderr, "last")
            died = f"died by signal {-child.returncode}" if child.returncode < 0 else f"failed ({reason})"
            raise UserError(f"OpenVINO {died} on {path}; use the onnxruntime engine for this file")
        comparison.update(np.load(target), expected)
    share = comparison.agreement
    if not share >= minimum_agreement:
        raise UserError(
            f"OpenVINO and ONNX Runtime agree on {share:.2%} of the labels of {path}, less than "
            f"{minimum_agreement:.2%}; use the onnxruntime engine for this file"
        )
    return share


def _child(path: str, source: str, target: str, precision: str) -> int:
    try:
        with OpenVINOEngine(path, precision=cast(Precision, precision)) as engine:
            np.save(target, engine.infer(np.load(source)).labels)
    except UserError as exc:
        print(exc, file=sys.stderr)
        return exc.exit_code
    return 0


@cache
def bf16_kernel() -> str:
    """The kernel that OpenVINO convolves with in BF16 on this processor, ``brgconv_avx512_amx_bf16``; "" for none.

    Its list of capabilities does not tell: it names BF16 also where that is emulated (2026.4). A small graph is
    compiled to see it, and a kernel that was found is remembered.
    """
    return str(remembered(KERNELS, cache_key("bf16"), _find_bf16_kernel, _is_name))


def _find_bf16_kernel() -> str:
    openvino = load_openvino()
    ops = require("openvino.opset13", "openvino", "run models with OpenVINO")
    image = ops.parameter([1, 64, 16, 16], np.float32)
    convolved = ops.convolution(image, np.ones((64, 64, 3, 3), np.float32), [1, 1], [1, 1], [1, 1], [1, 1])
    model = openvino.Model([ops.softmax(convolved, 1)], [image])
    try:
        graph = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    except RuntimeError:  # it may find no kernel at all
        return ""
    kernels = {
        layer.get_rt_info()["primitiveType"].astype(str)
        for layer in graph.get_runtime_model().get_ops()
        if layer.get_rt_info()["layerType"].astype(str) == "Convolution"
    }
    return next((kernel for kernel in kernels if kernel.endswith("bf16")), "")


def computes_bf16() -> bool:
    """Whether OpenVINO computes in BF16 on this processor."""
    return bf16_kernel() != ""


def fast_bf16() -> bool:
    """Whether BF16 is faster than FP32 here: where the processor has AMX.

    Measured on one processor, limited by ``ONEDNN_MAX_CPU_ISA``: 2.7 times FP32 with AMX, 0.66 with AVX-512 BF16,
    0.14 with AVX-512 alone (HPDDRNet-23-slim, 512x512, OpenVINO 2026.4).
    """
    return "amx" in bf16_kernel()


def _is_name(known: Any) -> bool:
    return isinstance(known, str) and known != ""


def _are_sizes(known: Any) -> bool:
    return isinstance(known, dict) and bool(known) and all(isinstance(sizes, list) for sizes in known.values())


def _names_in_file(compiled: Any) -> dict[str, str]:
    """Names of the file's nodes, joined by commas, that each layer of a compiled graph was made from."""
    layers = compiled.get_runtime_model().get_ops()
    return {layer.get_friendly_name(): layer.get_rt_info()["originalLayersNames"].astype(str) for layer in layers}


def fuse_attention(model: Any) -> int:
    """Replace each softmax of a matrix product in an ``openvino.Model`` by the fused operator; returns how many.

    Its CPU plugin runs ``ScaledDotProductAttention`` as one kernel that works on blocks of queries and stores no
    scores; MatMul, Softmax, MatMul it runs as three, with all scores in memory. OpenVINO's own passes recognise
    the pattern only with heads and without conversions, so it is replaced here, exactly.

    What does not fit (tensors of rank 3, or 4 with heads, one reader of each, weights that sum to one in each row
    and are multiplied from the left) is left as it is.
    """
    openvino = load_openvino()
    count = 0
    for softmax in model.get_ordered_ops():
        if softmax.get_type_name() == "Softmax" and _fuse(softmax, openvino):
            count += 1
    if count:
        model.validate_nodes_and_infer_types()
    return count


def _fuse(softmax: Any, openvino: Any) -> bool:
    before = _past_converts(softmax, _source)
    after = _past_converts(softmax, _only_reader)
    if any(node is None or node.get_type_name() != "MatMul" for node in (before, after)):
        return False
    rank, axis = softmax.get_output_partial_shape(0).rank, softmax.get_attributes()["axis"]
    scores, mix = before.get_attributes(), after.get_attributes()
    if rank.is_dynamic or rank.get_length() not in (3, 4) or axis not in (-1, rank.get_length() - 1):
        return False
    if scores["transpose_a"] or mix["transpose_a"] or _past_converts(after, _source) != softmax:
        return False
    ops = require("openvino.opset13", "openvino", "run models with OpenVINO")
    has_heads = rank.get_length() == 4

    def part(value: Any, transposed: bool) -> Any:
        """FP32 ``[N, heads, T, C]`` of a product's operand, transposed or not, ``[N, T, C]`` where it has no heads."""
        if not has_heads:
            value = ops.unsqueeze(value, np.array(1, np.int64)).output(0)
        if transposed:
            value = ops.transpose(value, np.array([0, 1, 3, 2], np.int64)).output(0)
        return value if value.get_element_type() == openvino.Type.f32 else ops.convert(value, "f32").output(0)

    fused = ops.scaled_dot_product_attention(
        part(before.input_value(0), scores["transpose_a"]),
        # A product with plain operands multiplies with the keys' columns.
        part(before.input_value(1), not scores["transpose_b"]),
        part(after.input_value(1), mix["transpose_b"]),
        attention_mask=np.array(0, np.float32),
        scale=np.array(1, np.float32),
    )
    result = fused if has_heads else ops.squeeze(fused, np.array([1], np.int64))
    kind = after.output(0).get_element_type()
    if kind != openvino.Type.f32:
        result = ops.convert(result, kind)
    result.set_friendly_name(after.get_friendly_name())
    fused.set_friendly_name(softmax.get_friendly_name())
    for reader in list(after.output(0).get_target_inputs()):
        reader.replace_source_output(result.output(0))
    return True


def _source(node: Any) -> Any:
    return node.input_value(0).get_node()


def _only_reader(node: Any) -> Any | None:
    readers = list(node.output(0).get_target_inputs())
    return readers[0].get_node() if len(readers) == 1 else None


def _past_converts(start: Any, step: Any) -> Any:
    """What is beside ``start``, behind nothing but type conversions; None at a fork."""
    node = step(start)
    while node is not None and node.get_type_name() == "Convert":
        node = step(node)
    return node


if __name__ == "__main__":
    sys.exit(_child(*sys.argv[1:]))
