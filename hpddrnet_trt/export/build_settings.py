"""How an engine is built: the options, what a library lacks of them, and what the builder is told."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from hpddrnet_trt.core.cache import cache_folder
from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.core.files import write_bytes
from hpddrnet_trt.engines.cuda import gpu_or_none
from hpddrnet_trt.engines.tensorrt_library import TensorRT, compute_capability
from hpddrnet_trt.export.statistics_cache import Cache

if TYPE_CHECKING:
    import tensorrt as trt

logger = logging.getLogger(__name__)

Tiling = Literal["none", "fast", "moderate", "full"]
Hardware = Literal["ampere-plus", "same-compute-capability"]

# What TensorRT-RTX's builder lacks: with these flags it makes no engine, or ignores them (1.7.1).
_TENSORRT_ONLY = {
    "version_compatible": "version-compatible engines",
    "hardware_compatible": "hardware-compatible engines (its default one runs on compute capability 8.0 and later)",
    "for_windows": "engines for another operating system",
    "stripped": "engines without weights",
    "refittable": "engines that take other weights",
}
# What came with a later TensorRT 10: option and value, the name in the module, the version (read off the bindings).
_CAME_LATER = (
    ("tiling", None, "TilingOptimizationLevel", "10.8"),
    ("for_windows", None, "RuntimePlatform.WINDOWS_AMD64", "10.2"),
    ("hardware_compatible", "same-compute-capability", "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY", "10.9"),
)
_FLAGS = {
    "version_compatible": "VERSION_COMPATIBLE",
    "sparsity": "SPARSE_WEIGHTS",
    "refittable": "REFIT",
    "stripped": "STRIP_PLAN",  # with REFIT it takes other weights, too, else only those that it was built with
}
OF_THE_BUILD = ("timing_cache", "device", "progress")  # settings that say nothing of the engine


@dataclass(frozen=True)
class BuildSettings:
    """How the builder works; the defaults suit every machine.

    ``timing_cache``: file of kernel timings, read if there and written afterwards (runtime tensorrt
    only); ``user``: one for this GPU and version in the user's cache folder.
    ``compute_capabilities``: GPUs an RTX engine is for, like ``["8.9", "12.0"]``; None is the
    portable default (8.0 and later). ``workspace_mib``: upper bound of scratch memory in MiB.
    ``optimization_level``: 0 (quick build) to 5 (fast engine). ``tiling``: how long the builder looks
    for ways to run neighbouring layers tile by tile in the cache. ``sparsity``: let it use kernels for
    weights with two zeros in four, which changes nothing for other weights. ``max_aux_streams``: CUDA streams
    that branches of the network may run on beside the engine's own; 0 for none, None for the library's choice.
    ``tf32``: let FP32 layers round their inputs to TF32; off, because position attention's scores do not survive it.
    ``device``: CUDA index of the GPU to build on.

    Runtime tensorrt only: ``version_compatible``: also runs on later TensorRT versions, somewhat slower.
    ``hardware_compatible``: also runs on other GPUs, somewhat slower: all of compute capability 8.0 and later, or
    those of the building GPU's. ``for_windows``: for TensorRT on 64-bit Windows; built on Linux, where it does not
    run. ``stripped``: written without its weights, which :func:`~hpddrnet_trt.export.refit.refit_engine` puts back.
    ``refittable``: that takes other weights of the same network, too, without a build. It may be slower, and NVIDIA
    warns of it: a matrix product's bias may be lost, even before any refit (documentation of TensorRT 11.3,
    "Refitting an Engine").
    """

    timing_cache: Cache = "user"
    compute_capabilities: Sequence[str] | None = None
    workspace_mib: int | None = None
    optimization_level: int | None = None
    tiling: Tiling | None = None
    sparsity: bool = False
    max_aux_streams: int | None = None
    version_compatible: bool = False
    hardware_compatible: Hardware | None = None
    for_windows: bool = False
    refittable: bool = False
    stripped: bool = False
    tf32: bool = False
    device: int = 0
    progress: bool = True

    @property
    def runs_here(self) -> bool:
        """Whether what is built could run on the machine that builds it."""
        return not (self.for_windows or self.stripped)

    def check(self, api: TensorRT) -> None:
        """Raise :class:`UsageError` for what does not exist, or this library cannot do."""
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise UsageError(f"the workspace limit is {self.workspace_mib} MiB; give at least 1, or leave it out")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise UsageError(f"builder optimization level {self.optimization_level} does not exist; give 0 to 5")
        if self.max_aux_streams is not None and self.max_aux_streams < 0:
            raise UsageError(f"the number of auxiliary streams is {self.max_aux_streams}; give 0 or more")
        for what, value, known in (
            ("tiling", self.tiling, get_args(Tiling)),
            ("hardware compatibility", self.hardware_compatible, get_args(Hardware)),
        ):
            if value is not None and value not in known:
                raise UsageError(f"{what} {value!r} is unknown; choose {', '.join(known)}")
        self._check_library(api)

    def _check_library(self, api: TensorRT) -> None:
        for option, what in _TENSORRT_ONLY.items():
            if api.is_rtx and getattr(self, option):
                raise UsageError(f"{api.label} cannot build {what}; leave that option out")
        for option, value, name, version in _CAME_LATER:
            asked = getattr(self, option)
            if asked and value in (None, asked) and not _has(api, name):
                said = f"--{option.replace('_', '-')}{f' {value}' if value else ''}"
                raise UsageError(f"{api.label} has no {said} (TensorRT {version} and later have); leave it out")
        if not api.is_rtx and self.compute_capabilities:
            raise UsageError(
                f"{api.label} builds for the GPU it runs on; leave the compute capabilities out, "
                "or choose --runtime tensorrt-rtx"
            )
        if self.for_windows and sys.platform != "linux":
            raise UsageError("engines for Windows are built on Linux; on Windows itself leave that option out")
        for written in self.compute_capabilities or ():
            compute_capability(api, written)
        if self.refittable:
            logger.warning(
                "%s may lose the bias of a matrix product in a refittable engine (NVIDIA's documentation of 11.3): "
                "judge it with --verify", api.label,
            )  # fmt: skip
        if api.is_rtx and isinstance(self.timing_cache, Path):
            logger.warning("%s has no timing cache: %s is ignored", api.label, self.timing_cache)
        chosen = (self.optimization_level, self.tiling, self.max_aux_streams)
        if api.is_rtx and (self.sparsity or any(value is not None for value in chosen)):
            logger.warning(
                "%s chooses kernels on the machine that runs the engine: optimization level, tiling, sparsity and "
                "auxiliary streams do not change the file", api.label,
            )  # fmt: skip

    def apply(self, api: TensorRT, config: trt.IBuilderConfig) -> None:
        """Tell the builder's configuration; raises :class:`UserError` for a GPU that the library refuses."""
        trt = api.module
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # what the inspector can show later
        if not self.tf32:
            config.clear_flag(trt.BuilderFlag.TF32)
        for option, flag in _FLAGS.items():
            if getattr(self, option):
                config.set_flag(getattr(trt.BuilderFlag, flag))
        if self.workspace_mib is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self.workspace_mib << 20)
        if self.optimization_level is not None:
            config.builder_optimization_level = self.optimization_level
        if self.tiling is not None:
            config.tiling_optimization_level = getattr(trt.TilingOptimizationLevel, self.tiling.upper())
        if self.max_aux_streams is not None:
            config.max_aux_streams = self.max_aux_streams
        if self.hardware_compatible is not None:
            config.hardware_compatibility_level = getattr(
                trt.HardwareCompatibilityLevel, self.hardware_compatible.upper().replace("-", "_")
            )
        if self.for_windows:
            config.runtime_platform = trt.RuntimePlatform.WINDOWS_AMD64
            if self.version_compatible:  # the runtime library inside would be this system's
                config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)
        if api.is_rtx and hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
            # The engine then never allocates while it runs, which a CUDA graph needs (the flag's documentation).
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        self._target_gpus(api, config)
        self._load_timings(api, config)

    def _target_gpus(self, api: TensorRT, config: trt.IBuilderConfig) -> None:
        targets = list(dict.fromkeys(self.compute_capabilities or ()))
        if not (targets and api.is_rtx):
            return
        config.num_compute_capabilities = len(targets)
        for index, written in enumerate(targets):
            if not config.set_compute_capability(compute_capability(api, written), index):
                raise UserError(f"{api.label} refuses the compute capability {written}")

    def _load_timings(self, api: TensorRT, config: trt.IBuilderConfig) -> None:
        path = self._timings(api)
        if path is None:
            return
        content = path.read_bytes() if path.is_file() else b""
        if not config.set_timing_cache(config.create_timing_cache(content), False):
            logger.warning("the timing cache %s is of another GPU or version: starting a new one", path)
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def keep_timings(self, api: TensorRT, config: trt.IBuilderConfig) -> None:
        """Write the kernel timings of a build that has ended."""
        path = self._timings(api)
        if path is None:
            return
        try:
            write_bytes(path, bytes(config.get_timing_cache().serialize()))
        except (UserError, OSError) as exc:  # the engine has been built all the same
            logger.warning("kernel timings are not kept for the next build (%s)", exc)

    def _timings(self, api: TensorRT) -> Path | None:
        if api.is_rtx or self.timing_cache is None:
            return None
        if self.timing_cache != "user":
            return Path(self.timing_cache)
        gpu = gpu_or_none(self.device)
        name = re.sub(r"[^\w.]+", "-", f"{gpu and gpu.name}-{api.version}")
        return None if gpu is None else cache_folder() / "timings" / f"{name}.cache"

    def record(self) -> dict[str, Any]:
        """What is not as by default, of what changes the engine."""
        defaults, own = BuildSettings(), (field.name for field in fields(self))
        values = {name: getattr(self, name) for name in own if name not in OF_THE_BUILD}
        return {name: value for name, value in values.items() if value != getattr(defaults, name)}


def _has(api: TensorRT, name: str) -> bool:
    """Whether the library has ``Name`` or ``Name.MEMBER``."""
    try:
        attrgetter(name)(api.module)
    except AttributeError:
        return False
    return True
