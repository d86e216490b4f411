"""One view on NVIDIA's two inference libraries: TensorRT (10, 11) and TensorRT for RTX (1).

Both have the same Python classes in modules ``tensorrt`` and ``tensorrt_rtx``. What differs, and what
both do without raising (return None, log, crash), is kept here. Nothing is imported before use.

=============================  ====================  ============================
what                           TensorRT 10, 11       TensorRT-RTX 1
=============================  ====================  ============================
GPU to build                   needed                not needed
context on our memory          allocation strategy   runtime configuration
tiling search                  from 10.8             no effect
recording CUDA graphs          is tried              a builder flag, can be asked
=============================  ====================  ============================

Names of TensorRT-RTX were read off 1.7.1, those of TensorRT off the bindings of 10 and 11.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

from hpddrnet_trt.core.errors import MissingDependency, UsageError, UserError, require
from hpddrnet_trt.engines.cuda import gpu_or_none

logger = logging.getLogger(__name__)

RuntimeName = Literal["tensorrt", "tensorrt-rtx"]
RUNTIMES: tuple[RuntimeName, ...] = get_args(RuntimeName)
INPUT = "image"  # name of the engines' one input
PORTABLE = "portable"  # in place of a compute capability: TensorRT-RTX's default build

_MODULES: dict[RuntimeName, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_MAJOR_VERSIONS: dict[RuntimeName, tuple[int, ...]] = {"tensorrt": (10, 11), "tensorrt-rtx": (1,)}
_OLDEST = (10, 1)  # the first with set_device_memory and device_memory_size_v2


@dataclass(frozen=True)
class TensorRT:
    """An imported library: ``module`` is ``tensorrt`` or ``tensorrt_rtx``, ``log`` its message collector."""

    name: RuntimeName
    module: Any
    version: str
    log: Any

    @property
    def label(self) -> str:
        """For people, e.g. ``TensorRT-RTX 1.7.1``."""
        return f"{'TensorRT-RTX' if self.is_rtx else 'TensorRT'} {'.'.join(self.version.split('.')[:3])}"

    @property
    def is_rtx(self) -> bool:
        return self.name == "tensorrt-rtx"

    def runtime(self, *, host_code: bool = False) -> Any:
        """A new ``Runtime``. Only where a GPU is known to exist: older versions crash without one.

        ``host_code``: let it load version-compatible plans, which carry a runtime library of their own; no other
        plan may run code on this machine.
        """
        runtime = self.module.Runtime(self.log)
        if runtime is None:
            raise UserError(f"{self.label} cannot start: {self.log.explain('no reason given')}")
        if host_code:
            runtime.engine_host_code_allowed = True
        return runtime

    def create_context(self, engine: Any) -> Any:
        """A new execution context, or None; it has no scratch memory until ``set_device_memory``."""
        ours = self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.is_rtx:
            return engine.create_execution_context(ours)
        # By default kernels for a new shape are compiled while substitutes already run, and a CUDA
        # graph would keep the substitutes: compile at once instead.
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(ours)
        config.dynamic_shapes_kernel_specialization_strategy = (
            self.module.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        return engine.create_execution_context(config)

    def capture_refusal(self, context: Any, stream: int) -> str | None:
        """Why the library says that a CUDA graph cannot be made of this context, None if it does not say so."""
        asked = getattr(context, "is_stream_capturable", None)
        if asked is None or asked(stream):
            return None
        return "the engine allocates memory or decides on the host while it runs; build it again"


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def load_tensorrt(runtime: RuntimeName) -> TensorRT:
    """Import the library of ``runtime``; raises :class:`MissingDependency` naming the extra that brings it."""
    module = require(_MODULES[runtime], runtime, "build and run TensorRT engines")
    version = str(module.__version__)
    majors = _MAJOR_VERSIONS[runtime]
    if int(version.split(".")[0]) not in majors:
        raise MissingDependency(
            f"{_MODULES[runtime]} {version} is not supported, {' or '.join(f'{major}.x' for major in majors)} is "
            f"needed; install it with: pip install 'hpddrnet-trt[{runtime}]'"
        )
    if runtime == "tensorrt" and _minor(version) < _OLDEST:
        raise MissingDependency(f"TensorRT {version} is too old, 10.1 is the oldest that works; update it")
    return TensorRT(runtime, module, version, _collector(_MODULES[runtime]))


def choose_tensorrt(runtime: str) -> TensorRT:
    """``auto``: TensorRT where it is installed and a GPU is present, else TensorRT-RTX."""
    if runtime != "auto":
        if runtime not in RUNTIMES:
            raise UsageError(f"runtime {runtime!r} is unknown; choose auto, {' or '.join(RUNTIMES)}")
        return load_tensorrt(runtime)
    if gpu_or_none() is not None:
        try:
            return load_tensorrt("tensorrt")
        except MissingDependency as exc:
            logger.debug("auto runtime: %s", exc)
    return load_tensorrt("tensorrt-rtx")


_ACTIVATIONS = re.compile(r"^Total Activation Memory: (\d+) bytes")


@cache
def _collector(module_name: str) -> Any:
    """The one logger of a library: it keeps the first it is given for the life of the process."""
    trt = require(module_name, "tensorrt", "build and run TensorRT engines")
    levels = {
        trt.ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.Severity.ERROR: logging.ERROR,
        trt.ILogger.Severity.WARNING: logging.INFO,  # mostly notes about scales, one per layer
        trt.ILogger.Severity.INFO: logging.DEBUG,
    }

    class Collector(trt.ILogger):  # type: ignore[name-defined]
        """Keeps errors, because the calls they belong to only return None, and a figure that nothing else tells."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._lock = threading.Lock()
            self._errors: list[str] = []
            self.activation_bytes: int | None = None  # of the last build since `clear`

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity)
            if level == logging.ERROR:
                with self._lock:
                    self._errors.append(message)
                logger.debug("%s: %s", module_name, message)
            elif level is not None:
                stated = _ACTIVATIONS.search(message)
                if stated is not None:
                    self.activation_bytes = int(stated[1])
                logger.log(level, "%s: %s", module_name, message.strip())

        def clear(self) -> None:
            """Forget messages of earlier calls."""
            with self._lock:
                self._errors.clear()
                self.activation_bytes = None

        def explain(self, otherwise: str) -> str:
            """The errors since :meth:`clear` as one line, or ``otherwise``."""
            with self._lock:
                messages = dict.fromkeys(readable(message) for message in self._errors)
            return "; ".join(list(messages)[:3]) or otherwise

    return Collector()


def readable(message: str) -> str:
    """A library message without the source locations and call names that mean nothing to its users."""
    message = re.sub(r"^\[?[\w:. ]+\]?(?:::\w+)*\]?:? Error Code \d+: ", "", message.strip())
    message = re.sub(r"\[\w+\.(?:cpp|h):\d+: \w+\] ", "", " ".join(message.split()))
    message = re.sub(r"(?:[.;]?\s+|(?<=\())In \S+ at /[^\s)]*:\d+", "", message)
    return re.sub(r"\(\s*\(", "((", message).strip()


def progress_monitor(trt: Any, bar: Any, cancelled: Callable[[], bool]) -> Any:
    """An ``IProgressMonitor`` that moves a tqdm ``bar`` and ends the build once ``cancelled()`` is true.

    Phases are nested; the bar counts the steps of the outermost and names the innermost.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._lock = threading.Lock()  # the library calls from several threads
            self._phases: list[str] = []

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                if not self._phases:
                    bar.reset(total=num_steps)
                self._phases.append(phase_name)
                bar.set_postfix_str(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                if phase_name in self._phases:
                    self._phases.reverse()
                    self._phases.remove(phase_name)  # the innermost of that name
                    self._phases.reverse()
                if not self._phases:
                    bar.update(bar.total - bar.n)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                if self._phases and phase_name == self._phases[0]:
                    bar.update(step + 1 - bar.n)
            return not cancelled()

    return Monitor()


def layer_profiler(trt: Any) -> Any:
    """An ``IProfiler`` that collects (layer, milliseconds) in its list ``layers``."""

    class Profiler(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.layers: list[tuple[str, float]] = []

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.layers.append((layer_name, ms))

    return Profiler()


def run_cancellable(work: Callable[[], Any], cancel: threading.Event) -> Any:
    """Run ``work`` in a thread, so that Ctrl-C reaches Python while the library is busy.

    On Ctrl-C ``cancel`` is set, the work is awaited (it must heed ``cancel``), and the interrupt goes on.
    """
    outcome: list[Any] = []
    failure: list[BaseException] = []
    done = threading.Event()  # not Thread.join: interrupted, Python 3.11's takes a running thread for ended

    def target() -> None:
        try:
            if not cancel.is_set():
                outcome.append(work())
        except BaseException as exc:  # handed to the caller's thread below
            failure.append(exc)
        finally:
            done.set()

    thread = threading.Thread(target=target, name="tensorrt-build")
    try:
        thread.start()
        while not done.wait(0.1):
            pass
    except BaseException:
        cancel.set()
        if thread.ident is not None:  # one that has not begun will see `cancel`
            done.wait()
        raise
    if failure:
        raise failure[0]
    return outcome[0]


def compute_capability(trt: TensorRT, written: str) -> Any:
    """``"8.9"`` -> ``ComputeCapability.SM89``; raises :class:`UsageError` listing what the library knows."""
    known = {
        f"{name[2:-1]}.{name[-1]}": value
        for name, value in trt.module.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    if written not in known:
        raise UsageError(f"compute capability {written!r} is not one that {trt.label} builds for: {', '.join(known)}")
    return known[written]
