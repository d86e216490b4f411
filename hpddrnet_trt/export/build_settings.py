"""How an engine is built: the options, what a library lacks of them, and what the builder is told."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from hpddrnet_trt.core.errors import UsageError, UserError
from hpddrnet_trt.core.files import write_bytes
from hpddrnet_trt.engines.tensorrt_library import TensorRT, compute_capability

logger = logging.getLogger(__name__)

Tiling = Literal["none", "fast", "moderate", "full"]
TILINGS: tuple[Tiling, ...] = get_args(Tiling)


@dataclass(frozen=True)
class BuildSettings:
    """How the builder works; the defaults suit every machine.

    ``timing_cache``: file of kernel timings, read if there and written afterwards (runtime tensorrt
    only). ``compute_capabilities``: GPUs an RTX engine is for, like ``["8.9", "12.0"]``; None is the
    portable default (8.0 and later). ``workspace_mib``: upper bound of scratch memory in MiB.
    ``optimization_level``: 0 (quick build) to 5 (fast engine). ``tiling``: how long the builder looks
    for ways to run neighbouring layers tile by tile in the cache. ``sparsity``: let it use kernels for
    weights with two zeros in four, which changes nothing for other weights. ``version_compatible``: also runs on
    later TensorRT versions, somewhat slower (runtime tensorrt only). ``tf32``: let FP32 layers round
    their inputs to TF32; off, because position attention's scores do not survive it.
    """

    timing_cache: Path | None = None
    compute_capabilities: Sequence[str] | None = None
    workspace_mib: int | None = None
    optimization_level: int | None = None
    tiling: Tiling | None = None
    sparsity: bool = False
    version_compatible: bool = False
    tf32: bool = False
    progress: bool = True

    def check(self, api: TensorRT) -> None:
        """Raise :class:`UsageError` for what this library cannot do."""
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise UsageError(f"the workspace limit is {self.workspace_mib} MiB; give at least 1, or leave it out")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise UsageError(f"builder optimization level {self.optimization_level} does not exist; give 0 to 5")
        if self.tiling is not None and self.tiling not in TILINGS:
            raise UsageError(f"tiling {self.tiling!r} is unknown; choose {', '.join(TILINGS)}")
        self._check_library(api)

    def _check_library(self, api: TensorRT) -> None:
        if self.tiling is not None and not hasattr(api.module, "TilingOptimizationLevel"):
            raise UsageError(f"{api.label} has no tiling search (TensorRT 10.8 and later have); leave --tiling out")
        if api.is_rtx and self.version_compatible:
            raise UsageError(f"{api.label} cannot build version-compatible engines; leave that option out")
        if not api.is_rtx and self.compute_capabilities:
            raise UsageError(
                f"{api.label} builds for the GPU it runs on; leave the compute capabilities out, "
                "or choose --runtime tensorrt-rtx"
            )
        for written in self.compute_capabilities or ():
            compute_capability(api, written)
        if api.is_rtx and self.timing_cache is not None:
            logger.warning("%s has no timing cache: %s is ignored", api.label, self.timing_cache)
        if api.is_rtx and (self.optimization_level is not None or self.tiling is not None or self.sparsity):
            logger.warning(
                "%s chooses kernels on the machine that runs the engine: optimization level, tiling and sparsity "
                "do not change the file", api.label,
            )  # fmt: skip

    def apply(self, api: TensorRT, config: Any) -> None:
        """Tell the builder's configuration; raises :class:`UserError` for a GPU that the library refuses."""
        trt = api.module
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # what the inspector can show later
        if not self.tf32:
            config.clear_flag(trt.BuilderFlag.TF32)
        if self.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if self.workspace_mib is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self.workspace_mib << 20)
        if self.optimization_level is not None:
            config.builder_optimization_level = self.optimization_level
        if self.tiling is not None:
            config.tiling_optimization_level = getattr(trt.TilingOptimizationLevel, self.tiling.upper())
        if self.sparsity:
            config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
        if api.is_rtx and hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
            # The engine then never allocates while it runs, which a CUDA graph needs (the flag's documentation).
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        self._target_gpus(api, config)
        self._load_timings(api, config)

    def _target_gpus(self, api: TensorRT, config: Any) -> None:
        targets = list(dict.fromkeys(self.compute_capabilities or ()))
        if not targets:
            return
        config.num_compute_capabilities = len(targets)
        for index, written in enumerate(targets):
            if not config.set_compute_capability(compute_capability(api, written), index):
                raise UserError(f"{api.label} refuses the compute capability {written}")

    def _load_timings(self, api: TensorRT, config: Any) -> None:
        path = self.timing_cache
        if path is None or api.is_rtx:
            return
        content = path.read_bytes() if path.is_file() else b""
        if not config.set_timing_cache(config.create_timing_cache(content), False):
            logger.warning("the timing cache %s is of another GPU or version: starting a new one", path)
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def keep_timings(self, api: TensorRT, config: Any) -> None:
        """Write the kernel timings of a build that has ended."""
        path = self.timing_cache
        if path is not None and not api.is_rtx:
            write_bytes(path, bytes(config.get_timing_cache().serialize()))
