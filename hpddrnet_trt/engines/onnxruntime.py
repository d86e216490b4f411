"""ONNX Runtime: the engine that needs nothing else, on any CPU (and on CUDA where its build has it)."""

from __future__ import annotations

import json
import re
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hpddrnet_trt.core import runtimes
from hpddrnet_trt.core.errors import BadInputFile, NoGpu, UsageError, UserError, one_line
from hpddrnet_trt.core.manifest import Manifest, read_manifest
from hpddrnet_trt.core.precisions import PRECISIONS, is_calibrated
from hpddrnet_trt.core.runtimes import CPU_PROVIDER as CPU
from hpddrnet_trt.engines.base import (
    EngineBase,
    Prediction,
    check_input,
    checked_prediction,
    expected_outputs,
    input_contract,
)
from hpddrnet_trt.graph.attention import in_blocks, in_type, position_attentions, uses_bf16
from hpddrnet_trt.graph.check import check_onnx, rewritten

if TYPE_CHECKING:
    import onnx

CUDA = "CUDAExecutionProvider"
WARM_UP = 3  # profiled runs that are not counted
_PROFILED = "_kernel_time"
TOKEN_STRIDE = 16  # pixels of the image per token and direction, at the finest of the attentions
# Scores of all pairs of tokens, FP32, above which attention works in blocks: reached at about 1450x1450.
LARGEST_SCORES_MIB = 256


class OnnxRuntimeEngine(EngineBase):
    """Runs an exported ``.onnx`` file.

    On a CPU, FP16 and FP8 files are computed in FP32: FP16 shows no rounding at all, FP8 that of its
    pairs, slowly (:mod:`hpddrnet_trt.graph.rounding` shows the rest). BF16 files run on CUDA at most.
    Position attention is computed in FP32, for large images in blocks (:func:`source_for_cpu`): memory then grows
    linearly with the image.

    Several threads may use one engine at once: ONNX Runtime then runs their inferences side by side.

    Parameters: ``threads`` CPU threads of one inference (default: all cores); ``device`` ``cpu``,
    ``cuda``, ``cuda:1`` or ``auto`` (CUDA when this build of ONNX Runtime has it); ``defaults`` opens the
    session without any setting of ours but ``threads`` and the provider, to compare with.

    On CUDA, FP32 is computed in FP32, not in TF32; cuDNN tries all its convolution algorithms
    (https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html).
    What concerns CUDA has not been run on a GPU yet.

    Raises :class:`BadInputFile` for a missing, truncated or foreign file, :class:`NoGpu` when CUDA
    was asked for and cannot be used, :class:`UserError` when an inference fails.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int | None = None,
        device: str = "cpu",
        defaults: bool = False,
    ) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        input_contract(self.manifest)
        check_onnx(self.path)
        if threads is not None and threads < 1:
            raise UsageError(f"threads must be at least 1, got {threads}")
        self._ort = runtimes.load_onnxruntime()
        self._errors = runtimes.onnxruntime_errors()
        self._wanted = _providers(self._ort, device)
        self._device_id = int(device.partition(":")[2] or 0)
        self._threads, self._defaults = threads, defaults
        self._opening = threading.Lock()
        self._session: Any = self._open()
        self._in_blocks: Any = None  # for large images, opened with the first of them
        self._check_session()

    @property
    def runtime(self) -> str:
        provider = self._live().get_providers()[0].removesuffix("ExecutionProvider")
        threads = f", {self._threads} thread{'s' if self._threads > 1 else ''}" if self._threads else ""
        defaults = ", defaults" if self._defaults else ""
        return f"onnxruntime {self._ort.__version__} ({provider}{threads}{defaults})"

    def infer(self, images: npt.NDArray[Any]) -> Prediction:
        """Run one batch; see :class:`~hpddrnet_trt.engines.base.Engine`."""
        session = self._checked(images)
        with self._readable_errors(images.shape):
            outputs = session.run(self._names, {self._input: np.ascontiguousarray(images)})
        return checked_prediction(dict(zip(self._names, outputs, strict=True)), self.manifest, images.shape)

    def bind(self, images: npt.NDArray[Any]) -> Callable[[], None]:
        """One batch, and the outputs, in memory of the device that computes."""
        session = self._checked(images)
        with self._readable_errors(images.shape):
            binding = self._bound(session, images)

        def run() -> None:
            self._live()
            with self._readable_errors(images.shape):
                session.run_with_iobinding(binding)
                binding.synchronize_outputs()

        return run

    def layer_times(self, images: npt.NDArray[Any], runs: int = 20) -> dict[str, float]:
        """Median milliseconds of each operator over ``runs``, in a second session with its profiler on.

        Names are ONNX Runtime's: the file's node, or the tensor that a convolution in its own layout makes
        (``relu_2_nchwc``). Empty on CUDA, where the profiler times launches, not kernels.
        """
        self._checked(images)
        if self._device != "cpu":
            return {}
        source = np.ascontiguousarray(images)
        with tempfile.TemporaryDirectory() as folder:
            profiled = self._open(blocks=needs_blocks(images.shape), profile=Path(folder) / "profile")
            try:
                with self._readable_errors(images.shape):
                    for _ in range(WARM_UP + runs):
                        profiled.run(self._names, {self._input: source})
            finally:
                profile = Path(profiled.end_profiling())  # also closes the file
            return _operator_times(profile, runs)

    def close(self) -> None:
        """Free the sessions, once the inferences that other threads are in have ended."""
        with self._opening:
            self._session = self._in_blocks = None

    # -- parts -----------------------------------------------------------------------------------

    def _live(self) -> Any:
        if self._session is None:
            raise UsageError(f"the engine of {self.path} is closed; load it again")
        return self._session

    def _checked(self, images: npt.NDArray[Any]) -> Any:
        session = self._live()
        check_input(images, input_contract(self.manifest))
        if self._device != "cpu" or self._defaults or not needs_blocks(images.shape):
            return session
        with self._opening:
            self._live()
            if self._in_blocks is None:
                self._in_blocks = self._open(blocks=True)
            return self._in_blocks

    @contextmanager
    def _readable_errors(self, shape: tuple[int, ...]) -> Iterator[None]:
        try:
            yield
        except self._errors as exc:
            raise UserError(
                f"ONNX Runtime could not run {self.path} on an input of shape {shape} "
                f"({one_line(exc, 'first')}); try a smaller image or batch, or export the model again"
            ) from exc

    def _bound(self, session: Any, images: npt.NDArray[Any]) -> Any:
        """A binding of one input and the outputs to fixed addresses of the device; a run allocates none of them."""
        # A copy: on a CPU the value would be the caller's own memory.
        value = self._ort.OrtValue.ortvalue_from_numpy(images.copy(order="C"), self._device, self._device_id)
        finding, binding = session.io_binding(), session.io_binding()
        for output in self._names:
            finding.bind_output(output, self._device, self._device_id)
        finding.bind_ortvalue_input(self._input, value)
        session.run_with_iobinding(finding)  # finds out the outputs' shapes
        binding.bind_ortvalue_input(self._input, value)
        for output, place in zip(self._names, finding.get_outputs(), strict=True):
            binding.bind_ortvalue_output(output, place)
        return binding

    def _open(self, *, blocks: bool = False, profile: Path | None = None) -> Any:
        """A session of the file; ``blocks``: attention in blocks, ``profile``: where its profiler writes to."""
        source: Path | bytes = self.path
        if self._wanted[0] == CPU and not self._defaults:
            source = source_for_cpu(self.path, self.manifest, blocks)
        settings: dict[str, Any] = {}
        if not self._defaults:
            # The higher levels fuse FP8 pairs into integer operators, which do not take them (onnxruntime 1.31).
            precision = str(self.manifest.precision)
            foreign = is_calibrated(precision) and not PRECISIONS[precision].cpu_kernels
            settings = {"graph_optimization_level": "ORT_ENABLE_BASIC" if foreign else "ORT_ENABLE_ALL"}
        if profile is not None:
            settings |= {"enable_profiling": True, "profile_file_prefix": str(profile)}
        try:
            return runtimes.session(
                source, threads=self._threads, settings=settings, defaults=self._defaults,
                providers=self._providers_with_settings(),
                disabled_optimizers=None if self._defaults else _disabled_optimizers(self.manifest, blocks),
            )  # fmt: skip
        except self._errors as exc:
            if self.manifest.precision == "bf16":
                raise UsageError(
                    f"{self.path} is BF16, which ONNX Runtime {self._ort.__version__} has no kernels for on "
                    f"{self._wanted[0].removesuffix('ExecutionProvider')} ({one_line(exc, 'first')}); build a TensorRT "
                    "engine from it, or run the FP32 or FP16 file here"
                ) from exc
            raise BadInputFile(
                f"{self.path} cannot be loaded by ONNX Runtime {self._ort.__version__} ({one_line(exc, 'first')}); "
                "export it again"
            ) from exc

    def _providers_with_settings(self) -> list[Any]:
        settings: dict[str, str] = {}
        if self._wanted[0] == CUDA and not self._defaults:
            settings = {"use_tf32": "0", "cudnn_conv_algo_search": "EXHAUSTIVE"}
        if self._device_id:
            settings["device_id"] = str(self._device_id)
        first, *others = self._wanted
        return [(first, settings) if settings else first, *others]

    def _check_session(self) -> None:
        # ONNX Runtime falls back to the CPU with no more than a log line when a provider fails.
        if self._session.get_providers()[0] != self._wanted[0]:
            raise NoGpu(
                f"ONNX Runtime could not start {self._wanted[0]}; check driver and libraries, or use device='cpu'"
            )
        self._device = "cuda" if self._wanted[0] == CUDA else "cpu"
        self._input = self._session.get_inputs()[0].name
        outputs = {output.name: output.shape for output in self._session.get_outputs()}
        self._names = expected_outputs(self.manifest, outputs, self.path)


def _operator_times(profile: Path, runs: int) -> dict[str, float]:
    """Median milliseconds of each operator over the last ``runs`` inferences of a profile (Chrome's trace format)."""
    events = json.loads(profile.read_text(encoding="utf-8"))
    nodes = [event for event in events if event["cat"] == "Node" and event["name"].endswith(_PROFILED)]
    # The nodes inside a Scan are reported besides it, once per turn: they end while it is running.
    scans = [(event["ts"], event["ts"] + event["dur"]) for event in nodes if event["args"].get("op_name") == "Scan"]
    microseconds: dict[str, list[float]] = defaultdict(list)
    for event in nodes:
        if not any(start < event["ts"] + event["dur"] < end for start, end in scans):
            microseconds[event["name"].removesuffix(_PROFILED)].append(event["dur"])
    return {name: median(values[-runs:]) / 1000 for name, values in microseconds.items()}


def _disabled_optimizers(manifest: Manifest, blocks: bool) -> list[str]:
    if not is_calibrated(manifest.precision):
        return []
    if manifest.quantized_for == "onnxruntime":
        # Its own form has quantised tensors around attention, which this optimiser moves across the Scan of blocks;
        # it aborts the process as it does (onnxruntime 1.31).
        return ["QDQPropagationTransformer"] if blocks else []
    # TensorRT's symmetric Q/DQ form leaves biases in floating point; this optimiser would quantise
    # them and lose 7 % of the labels in INT8, 27 % in FP8 with FP16, without a word (onnxruntime 1.31).
    # ONNX Runtime's own form already has integer biases.
    return ["WeightBiasQuantization"]


def _providers(ort: Any, device: str) -> list[str]:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
        raise UsageError(f"unknown device {device!r} for ONNX Runtime; choose one of: auto, cpu, cuda, cuda:1")
    has_cuda = CUDA in ort.get_available_providers()
    if device == "cpu" or (device == "auto" and not has_cuda):
        return [CPU]
    if not has_cuda:
        raise NoGpu(
            "this installation of ONNX Runtime has no CUDA support; "
            "replace onnxruntime by onnxruntime-gpu, or use device='cpu'"
        )
    return [CUDA, CPU]


def needs_blocks(shape: Sequence[int]) -> bool:
    """Whether the scores of an image batch ``[N, C, H, W]`` are more than :data:`LARGEST_SCORES_MIB`."""
    batch, _, height, width = shape
    tokens = -(-height // TOKEN_STRIDE) * -(-width // TOKEN_STRIDE)
    return batch * tokens**2 * 4 > LARGEST_SCORES_MIB << 20


def source_for_cpu(path: Path, manifest: Manifest, blocks: bool) -> Path | bytes:
    """The file's path, or what to load in place of a file whose position attention does not run well as it is.

    Two cases, both exact but for rounding: attention in BF16, for which CPU kernels are missing, gets FP32
    scores; and where the scores of all tokens would fill the memory (``blocks``), attention works in blocks.
    """
    typed = manifest.precision not in (None, "fp32", "bf16")
    if not (blocks or typed):
        return path

    def change(model: onnx.ModelProto) -> onnx.ModelProto | None:
        changed = None
        if typed and uses_bf16(model):
            model = changed = in_type(model, "fp32")
        if blocks and position_attentions(model):
            changed = in_blocks(model)
        return changed

    graph = rewritten(path, change)
    return path if graph is None else graph
