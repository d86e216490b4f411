"""One view on NVIDIA's inference libraries: TensorRT (10, 11), its lean runtime, and TensorRT for RTX (1).

All have the same Python classes, in modules ``tensorrt``, ``tensorrt_lean`` (without a builder: it runs
version-compatible engines only) and ``tensorrt_rtx``. What differs, and what they do without raising (return None,
log, crash), is kept here. Nothing is imported before use.

=============================  ====================  ============================
what                           TensorRT 10, 11       TensorRT-RTX 1
=============================  ====================  ============================
GPU to build                   needed                not needed
context on our memory          allocation strategy   runtime configuration
kernels                        in the engine         compiled here, kept in a cache
tiling search                  from 10.8             no effect
recording CUDA graphs          is tried              a builder flag, can be asked
=============================  ====================  ============================

Names of TensorRT-RTX were read off 1.7.1, of TensorRT off the bindings of 10 and 11, of the lean runtime off 11.4.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from hpddrnet_trt.core.errors import MissingDependency, UsageError, UserError, require
from hpddrnet_trt.core.files import write_bytes
from hpddrnet_trt.engines.cuda import gpu_or_none

if TYPE_CHECKING:  # types made of the real libraries by tests/engines/real_modules.py; Module is the module itself
    import tensorrt as trt

logger = logging.getLogger(__name__)

RuntimeName = Literal["tensorrt", "tensorrt-rtx"]  # what engines are built for
RUNTIMES: tuple[RuntimeName, ...] = get_args(RuntimeName)
LEAN = "tensorrt-lean"  # runs engines for "tensorrt"
INPUT = "image"  # name of the engines' one input
PORTABLE = "portable"  # in place of a compute capability: TensorRT-RTX's default build

# By the name of the extra that brings it: the module, its name for people, its major versions.
_LIBRARIES: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "tensorrt": ("tensorrt", "TensorRT", (10, 11)),
    LEAN: ("tensorrt_lean", "TensorRT lean runtime", (10, 11)),
    "tensorrt-rtx": ("tensorrt_rtx", "TensorRT-RTX", (1,)),
}
_OLDEST = (10, 1)  # the first with set_device_memory and device_memory_size_v2


@dataclass(frozen=True)
class TensorRT:
    """An imported library: ``name`` of its engines, its message collector ``log``, whether it is the lean runtime."""

    name: RuntimeName
    module: trt.Module
    version: str
    log: Any
    lean: bool = False

    @property
    def label(self) -> str:
        """For people, e.g. ``TensorRT-RTX 1.7.1``."""
        return f"{_LIBRARIES[LEAN if self.lean else self.name][1]} {'.'.join(self.version.split('.')[:3])}"

    @property
    def is_rtx(self) -> bool:
        return self.name == "tensorrt-rtx"

    def runtime(self, *, host_code: bool = False) -> trt.Runtime:
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

    def create_context(self, engine: trt.ICudaEngine) -> trt.IExecutionContext | None:
        """A new execution context of an engine that is only looked at, or None; see :class:`EngineContexts`."""
        return EngineContexts(self, engine).create()

    def capture_refusal(self, context: trt.IExecutionContext, stream: int) -> str | None:
        """Why the library says that a CUDA graph cannot be made of this context, None if it does not say so."""
        asked = getattr(context, "is_stream_capturable", None)
        if asked is None or asked(stream):
            return None
        return "the engine allocates memory or decides on the host while it runs; build it again"


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def load_tensorrt(library: str) -> TensorRT:
    """Import ``tensorrt``, ``tensorrt-lean`` or ``tensorrt-rtx``.

    Raises :class:`MissingDependency` naming the extra that brings it.
    """
    name, _, majors = _LIBRARIES[library]
    module: Any = require(name, library, f"{'run' if library == LEAN else 'build and run'} TensorRT engines")
    version = str(module.__version__)
    if int(version.split(".")[0]) not in majors:
        raise MissingDependency(
            f"{name} {version} is not supported, {' or '.join(f'{major}.x' for major in majors)} is "
            f"needed; install it with: pip install 'hpddrnet-trt[{library}]'"
        )
    if library != "tensorrt-rtx" and _minor(version) < _OLDEST:
        raise MissingDependency(f"TensorRT {version} is too old, 10.1 is the oldest that works; update it")
    runtime: RuntimeName = "tensorrt-rtx" if library == "tensorrt-rtx" else "tensorrt"
    return TensorRT(runtime, module, version, _collector(name), library == LEAN)


def installed_library(runtime: RuntimeName) -> str:
    """Which library runs engines for ``runtime`` here: the lean runtime where it is there and TensorRT is not."""
    only_lean = importlib.util.find_spec("tensorrt") is None and importlib.util.find_spec("tensorrt_lean") is not None
    return LEAN if runtime == "tensorrt" and only_lean else runtime


class EngineContexts:
    """Makes the execution contexts of one engine, on memory of ours: none has any until ``set_device_memory``.

    TensorRT-RTX compiles kernels on the machine that runs the engine, which takes up to half a minute. All contexts
    share one runtime configuration and with it what has been compiled, and ``kernels``, a file, keeps it for the next
    start. TensorRT-RTX itself checks what it reads there: version, GPU and driver must fit (its reference,
    ``IRuntimeCache.deserialize``). Create with the GPU's context current. Has run on a simulated library only.
    """

    def __init__(self, api: TensorRT, engine: trt.ICudaEngine, kernels: Path | None = None) -> None:
        self._api, self._engine, self._file = api, engine, kernels
        self._lock = threading.Lock()
        self._config: Any = api.module.ExecutionContextAllocationStrategy.USER_MANAGED
        self._kernels: Any = None
        self._stored = b""  # what the file holds
        if not api.is_rtx:
            return
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._config)
        self._config = config
        if kernels is not None:
            self._kernels = config.create_runtime_cache()
            with suppress(OSError):  # none yet, or none that can be read
                self._stored = kernels.read_bytes()
            if self._stored and not self._kernels.deserialize(self._stored):
                logger.info("%s is of another GPU, driver or version: kernels are compiled again", kernels)
            config.set_runtime_cache(self._kernels)

    def create(self, *, specialized: bool = False) -> trt.IExecutionContext | None:
        """A new context, or None. ``specialized``: kernels for a new shape are compiled before it runs.

        Else substitutes run meanwhile, which suits shapes that come once; a CUDA graph would keep them.
        """
        with self._lock:  # streams may ask at the same time, for different ones
            if self._api.is_rtx:
                strategies = self._api.module.DynamicShapesKernelSpecializationStrategy
                config: trt.IRuntimeConfig = self._config
                config.dynamic_shapes_kernel_specialization_strategy = (
                    strategies.EAGER if specialized else strategies.LAZY
                )
            return self._engine.create_execution_context(self._config)

    def save_kernels(self) -> None:
        """Write what has been compiled to the file, if there is more now; where it cannot be written, say so."""
        if self._kernels is None or self._file is None:
            return
        with self._lock:
            content = bytes(self._kernels.serialize() or b"")
            if content in (b"", self._stored):
                return
            try:
                write_bytes(self._file, content)
                self._stored = content
            except (UserError, OSError) as exc:
                logger.info("compiled kernels are not kept for the next start (%s)", exc)


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
    if TYPE_CHECKING:
        from tensorrt import ILogger
    else:
        ILogger = require(module_name, "tensorrt", "build and run TensorRT engines").ILogger
    levels = {
        ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
        ILogger.Severity.ERROR: logging.ERROR,
        ILogger.Severity.WARNING: logging.INFO,  # mostly notes about scales, one per layer
        ILogger.Severity.INFO: logging.DEBUG,
    }

    class Collector(ILogger):
        """Keeps errors, because the calls they belong to only return None, and a figure that nothing else tells."""

        def __init__(self) -> None:
            ILogger.__init__(self)
            self._lock = threading.Lock()
            self._errors: list[str] = []
            self.activation_bytes: int | None = None  # of the last build since `clear`

        def log(self, severity: ILogger.Severity, message: str) -> None:
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


def progress_monitor(module: trt.Module, bar: Any, cancelled: Callable[[], bool]) -> Any:
    """An ``IProgressMonitor`` that moves a tqdm ``bar`` and ends the build once ``cancelled()`` is true.

    Phases are nested; the bar counts the steps of the outermost and names the innermost.
    """

    if TYPE_CHECKING:
        from tensorrt import IProgressMonitor
    else:
        IProgressMonitor = module.IProgressMonitor

    class Monitor(IProgressMonitor):
        def __init__(self) -> None:
            IProgressMonitor.__init__(self)
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


def layer_profiler(module: trt.Module) -> Any:
    """An ``IProfiler`` that collects (layer, milliseconds) in its list ``layers``."""

    if TYPE_CHECKING:
        from tensorrt import IProfiler
    else:
        IProfiler = module.IProfiler

    class Profiler(IProfiler):
        def __init__(self) -> None:
            IProfiler.__init__(self)
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


def compute_capability(api: TensorRT, written: str) -> Any:
    """``"8.9"`` -> ``ComputeCapability.SM89``; raises :class:`UsageError` listing what the library knows."""
    known: dict[str, Any] = {}
    if api.is_rtx:
        members = api.module.ComputeCapability.__members__
        known = {f"{name[2:-1]}.{name[-1]}": value for name, value in members.items() if name.startswith("SM")}
    if written not in known:
        raise UsageError(f"compute capability {written!r} is not one that {api.label} builds for: {', '.join(known)}")
    return known[written]
