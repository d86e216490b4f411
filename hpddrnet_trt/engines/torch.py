"""PyTorch: the reference every other engine is compared with.

Runs the unmodified network of a checkpoint, by default eagerly in FP32 with TF32 off, so that its
figures are those of the authors' implementation. The options for compilation, reduced precision and
memory layout exist to be measured against, not to be the reference.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hpddrnet_trt.core.domain import OUTPUT
from hpddrnet_trt.core.errors import NoGpu, UsageError, UserError, one_line
from hpddrnet_trt.core.manifest import InputContract, OutputContract
from hpddrnet_trt.engines.base import Bound, EngineBase, Prediction, check_input, expected_outputs
from hpddrnet_trt.models.checkpoints import load_any_checkpoint
from hpddrnet_trt.models.domain import predict_with_domain

AUTOCAST = {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}
COMPILE = ("off", "default", "max-autotune")
# PyTorch keeps cuDNN's switches and the number of threads, and Python its warnings' filters, once per process:
# whoever changes them and puts them back does so alone.
_SETTINGS = threading.RLock()
WARM_UP = 3  # profiled runs that are not counted
COMPILED_SHAPES = 64  # torch.compile gives up after 8 by default; each input shape is compiled once


class TorchEngine(EngineBase):
    """Runs a checkpoint: ours (``.safetensors``) or one of mmsegmentation's layout (``.pth``).

    Several threads may use one engine at once; on a GPU, and with ``threads``, they take turns. What PyTorch
    keeps for the whole process, cuDNN's switches and the number of threads, is changed during an inference
    only, and then put back.

    Parameters: ``device`` ``auto`` (a GPU when PyTorch has one), ``cpu``, ``cuda`` or ``cuda:1``;
    ``threads`` CPU threads of one inference (default: PyTorch's own number); ``input_dtype`` ``uint8`` takes
    grey images ``[N, 1, H, W]`` and normalises them, ``float32`` takes normalised RGB
    ``[N, 3, H, W]``; ``output`` ``logits`` gives logits at the input's resolution and their labels,
    ``labels`` the labels only (on a GPU the logits are then not copied to the host); ``autocast``
    ``off`` | ``fp16`` | ``bf16`` (FP16 overflows in a trained position attention: all logits become NaN);
    ``channels_last`` memory layout; ``cudnn_benchmark`` lets cuDNN time its algorithms at every new
    shape and keep the fastest.

    ``compile``: ``default`` or ``max-autotune`` runs everything from the image tensor to the labels
    through ``torch.compile``, once for every input shape (minutes with ``max-autotune``). On a GPU
    ``max-autotune`` records CUDA graphs; on a CPU, weights are constants that may be folded and
    re-ordered (``freezing``), as PyTorch advises for inference there, and a C++ compiler is needed.
    CUDA graphs belong to the thread that first ran a shape: use such an engine from one thread only.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str = "auto",
        threads: int | None = None,
        input_dtype: Literal["uint8", "float32"] = "uint8",
        output: Literal["logits", "labels"] = "logits",
        autocast: Literal["off", "fp16", "bf16"] = "off",
        channels_last: bool = False,
        compile: Literal["off", "default", "max-autotune"] = "off",
        cudnn_benchmark: bool = False,
    ) -> None:
        network, manifest = load_any_checkpoint(path)
        if output not in ("logits", "labels"):
            raise UsageError(f"output is logits or labels, got {output!r}")
        if input_dtype not in ("uint8", "float32") or autocast not in AUTOCAST or compile not in COMPILE:
            raise UsageError(
                f"input_dtype is uint8 or float32, autocast one of {', '.join(AUTOCAST)} and compile one of "
                f"{', '.join(COMPILE)}, got {input_dtype!r}, {autocast!r} and {compile!r}"
            )
        if threads is not None and threads < 1:
            raise UsageError(f"threads must be at least 1, got {threads}")
        self._threads = threads
        self.device = pick_device(device)
        self._contract = InputContract.model_validate(
            {"dtype": input_dtype, "channels": 1 if input_dtype == "uint8" else 3}
        )
        guarded = manifest.domain is not None
        self.manifest = manifest.replace(input=self._contract, output=OutputContract(kind=output, domain=guarded))
        features = (-1, 2 * network.config.channels, -1, -1)
        expected_outputs(self.manifest, {output: (), OUTPUT: features}, Path(path))
        self._gives_logits = output == "logits"
        self._autocast = autocast
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._cudnn_benchmark = cudnn_benchmark
        module: Any = network.eval().to(self.device)
        self._network: Any = module.to(memory_format=self._format)
        self._score: Callable[[Tensor], Any] = (
            partial(predict_with_domain, self._network) if guarded else self._network.predict_logits
        )
        mean, std = manifest.normalization.mean, manifest.normalization.std
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=self.device).view(1, 3, 1, 1) for values in (mean, std)
        )
        self._compile = compile
        self._compiled_shapes: set[tuple[int, ...]] = set()
        self._graph = self._label if compile == "off" else _compiled(self._label, compile, self.device)

    @property
    def runtime(self) -> str:
        where = "CPU" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        threads = f", {self._threads or torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        precision = "FP32" if self._autocast == "off" else f"autocast {self._autocast.upper()}"
        compiled = "" if self._compile == "off" else f", compiled {self._compile}"
        layout = ", channels last" if self._format is torch.channels_last else ""
        return f"torch {torch.__version__} ({where}{threads}, {precision}{compiled}{layout})"

    def infer(self, images: npt.NDArray[Any]) -> Prediction:
        """Run one batch; see :class:`~hpddrnet_trt.engines.base.Engine`."""
        self._check(images)
        with self._running(images.shape):
            labels, *others = self._compute(self._on_device(images))
            logits, features = (None if part is None else part.cpu().numpy() for part in others)
            return Prediction(labels.cpu().numpy(), logits=logits, domain_features=features)

    def bind(self, images: npt.NDArray[Any]) -> Callable[[], None]:
        """One batch on the device; a call runs from that tensor to the label tensor on the device."""
        self._check(images)
        x = self._on_device(images)

        def run() -> None:
            with self._running(x.shape):
                self._compute(x)
                self._synchronize()

        def burst(runs: int) -> list[float]:
            event: Any = torch.cuda.Event
            pairs = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(runs)]
            with self._running(x.shape):
                for place, (start, end) in enumerate(pairs):
                    start.record()
                    self._compute(x)
                    end.record()
                    if place:
                        pairs[place - 1][1].synchronize()
                self._synchronize()
            return [start.elapsed_time(end) / 1000 for start, end in pairs]

        return run if self.device.type == "cpu" else Bound(run, burst)

    def layer_times(self, images: npt.NDArray[Any], runs: int = 20) -> dict[str, float]:
        """Milliseconds by module path, see :func:`module_times`.

        Empty for a compiled network, whose kernels span modules.
        """
        self._check(images)
        if self._compile != "off":
            return {}
        x = self._on_device(images)
        with self._running(images.shape):
            return module_times(self._network, lambda: self._compute(x), self._synchronize, runs)

    def close(self) -> None:
        self._network = None
        self._score = self._graph = _closed  # they hold the weights, too
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # or PyTorch keeps the memory from other libraries of this process

    # -- parts -----------------------------------------------------------------------------------

    def _check(self, images: npt.NDArray[Any]) -> None:
        if self._network is None:
            _closed()
        check_input(images, self._contract)

    def _compute(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Device images to device labels uint8 ``[N, H, W]`` and, where asked for, logits, and features of the domain
        where the checkpoint has its statistics, float32."""
        if self._compile == "off" or tuple(x.shape) in self._compiled_shapes:
            return self._graph(x)
        with _SETTINGS, _compiling():
            result = self._graph(x)
        self._compiled_shapes.add(tuple(x.shape))
        return result

    def _label(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        dtype = AUTOCAST[self._autocast]
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            scored = self._score(self._normalised(x))
        logits, features = (scored, None) if isinstance(scored, Tensor) else scored
        # The index of torch.max is that of argmax, ties included, which on a CPU takes several times as long.
        labels = logits.max(dim=1).indices.to(torch.uint8)
        return labels, logits.float() if self._gives_logits else None, features

    def _normalised(self, x: Tensor) -> Tensor:
        if x.dtype == torch.uint8:
            x = (x.float() - self._mean) / self._std  # one grey channel becomes three
        return x.contiguous(memory_format=self._format)

    def _on_device(self, images: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(_as_source(images)).to(self.device)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def _running(self, shape: tuple[int, ...]) -> Iterator[None]:
        """What every inference runs in; errors of PyTorch become readable ones."""
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.inference_mode())
                if self._threads is not None or self.device.type == "cuda":
                    stack.enter_context(_SETTINGS)
                if self._threads is not None:
                    stack.enter_context(_threads(self._threads))
                if self.device.type == "cuda":
                    stack.enter_context(_cudnn_settings(self._cudnn_benchmark))
                yield
        except (torch.cuda.OutOfMemoryError, MemoryError) as exc:
            raise UserError(f"out of memory on an input of shape {tuple(shape)}; use a smaller image or batch") from exc
        except RuntimeError as exc:
            if self._compile == "off" or not _from_compiler(exc):
                raise
            raise UserError(_why_not_compiled(exc)) from exc


def _closed(*_: Any) -> Any:
    raise UsageError("this engine is closed; load it again")


def pick_device(name: str) -> torch.device:
    """The device called ``auto`` (a GPU when PyTorch has one), ``cpu``, ``cuda`` or ``cuda:1``.

    Raises :class:`UsageError` for another name and :class:`NoGpu` for a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise UsageError(f"unknown device {name!r} for PyTorch; choose auto, cpu, cuda or cuda:N") from exc
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise NoGpu(f"PyTorch {torch.__version__} finds no GPU {name!r}; check the driver, or use device='cpu'")
    return device


def _compiled(function: Callable[[Tensor], Any], mode: str, device: torch.device) -> Callable[[Tensor], Any]:
    """``function`` through ``torch.compile``, one whole graph for each input shape."""
    import torch._inductor
    from torch._inductor import config

    options: dict[str, Any] = dict(torch._inductor.list_mode_options(mode, dynamic=False))
    silent = {"autotune_num_choices_displayed": 0, "max_autotune_report_choices_stats": False}
    options |= {name: value for name, value in silent.items() if hasattr(config, name)}
    if device.type == "cpu":
        # Advised for a CPU in PyTorch's documentation of AOTInductor (pytorch pull request 128010).
        options["freezing"] = True
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


@contextmanager
def _compiling() -> Iterator[None]:
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=COMPILED_SHAPES), warnings.catch_warnings():
        # PyTorch's compiler still uses what PyTorch deprecates.
        warnings.filterwarnings("ignore", r"`torch\.jit\.script_method` is deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
        yield


def _from_compiler(exc: RuntimeError) -> bool:
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(exc, TorchDynamoException)


def _why_not_compiled(exc: BaseException) -> str:
    from torch._inductor.exc import InvalidCxxCompiler, TritonMissing

    inner: BaseException | None = exc
    while inner is not None:
        original = getattr(inner, "inner_exception", None) or inner.__cause__
        if isinstance(inner, InvalidCxxCompiler) or "C compiler" in str(inner):
            return (
                "torch.compile found no C++ compiler; install one (g++ or clang++), name it in the environment "
                "variable CXX, or use compile='off'"
            )
        if isinstance(inner, TritonMissing):
            return "torch.compile needs Triton on a GPU; install the triton package, or use compile='off'"
        inner = original
    return f"torch.compile of PyTorch {torch.__version__} failed ({one_line(exc)}); use compile='off'"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _cudnn_settings(benchmark: bool) -> Iterator[None]:
    """FP32 convolutions in FP32: PyTorch's default on a GPU is TF32, about 1 % off."""
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=benchmark or torch.backends.cudnn.benchmark,
        deterministic=torch.backends.cudnn.deterministic, allow_tf32=False,
    ):  # fmt: skip
        yield


def module_times(
    network: nn.Module, run: Callable[[], object], synchronize: Callable[[], object], runs: int
) -> dict[str, float]:
    """Median milliseconds of each module in one call of ``run``, by its path (``backbone.stem.0.conv``).

    A module with children counts what happens between them: sums, resizes, and in position attention
    (``backbone.sps.0.pa``) the products and the softmax. What ``run`` does outside of ``network``
    (normalisation, resize to full size, arg-max) is ``output``. ``synchronize`` waits for the device,
    before and after each module, so the sum is more than an undisturbed run.
    """
    samples: dict[str, list[float]] = defaultdict(list)
    own: dict[str, float] = {}  # of one inference
    open_: list[tuple[float, float]] = []  # of the modules that run: begin, time spent in children so far

    def enter(*_: Any) -> None:
        synchronize()
        open_.append((time.perf_counter(), 0.0))

    def leave(path: str, *_: Any) -> None:
        synchronize()
        begin, inside = open_.pop()
        total = time.perf_counter() - begin
        own[path] = own.get(path, 0.0) + total - inside  # a module that runs twice in one inference counts twice
        if open_:
            outer, other = open_.pop()
            open_.append((outer, other + total))

    with ExitStack() as hooks:
        for path, module in network.named_modules():
            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(partial(leave, path or "network")).remove)
        for number in range(WARM_UP + runs):
            own.clear()
            enter()
            run()
            leave("output")
            for path, seconds in own.items() if number >= WARM_UP else ():
                samples[path].append(seconds * 1000)
    return {path: median(values) for path, values in samples.items()}


def _as_source(images: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A contiguous array that PyTorch takes without a copy of its own (it warns of read-only memory)."""
    return np.require(images, requirements=("C", "W"))
