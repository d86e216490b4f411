"""Statistics of activations kept on disk, so that no micrograph is measured twice.

The folder is ``calibration`` in the user's cache folder (:mod:`hpddrnet_trt.core.cache`), with one folder per
graph and one file per crop, about 0.1 MB each for HPDDRNet. Deleting any of it is safe at any
time and only costs the time to measure again; above :data:`LIMIT_BYTES` the files that were not
used for longest go by themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from hpddrnet_trt.core.cache import cache_folder, prune, used_now
from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.files import write_bytes
from hpddrnet_trt.export.histograms import Statistics, from_bytes, to_bytes

logger = logging.getLogger(__name__)

LIMIT_BYTES = 512 * 2**20
Cache = Path | Literal["user"] | None  # a folder, the user's cache folder, or none


class StatisticsCache:
    """The kept statistics of one graph and list of tensors.

    Files appear whole or not at all, under names that follow from their content's source, so
    several runs may share a folder. A damaged file counts as missing. A folder that cannot be
    written gives one warning and is only read.
    """

    def __init__(self, cache: Cache, graph: str, tensors: Sequence[str]) -> None:
        self._root = None if cache is None else (cache_folder() if cache == "user" else cache) / "calibration"
        self._graph = graph
        self._tensors = tensors
        self._grown = False
        self._writable = True

    def load(self, key: str) -> Statistics | None:
        """What is kept under this key, or None."""
        if self._root is None:
            return None
        path = self._path(self._root, key)
        try:
            statistics = from_bytes(path.read_bytes(), self._tensors)
        except OSError:
            return None
        except ValueError as exc:
            logger.warning("%s is damaged (%s): measuring again", path, exc)
            return None
        used_now(path)
        return statistics

    def store(self, key: str, statistics: Statistics) -> None:
        """Keep statistics under a key."""
        if self._root is None or not self._writable:
            return
        try:
            write_bytes(self._path(self._root, key), to_bytes(statistics))
            self._grown = True
        except (OSError, UserError) as exc:
            logger.warning("calibration statistics are not kept for the next run: %s", exc)
            self._writable = False

    def prune(self, limit: int | None = None) -> None:
        """Delete the files of any graph that were not used for longest, down to the limit in bytes."""
        if self._root is not None and self._grown:
            prune(self._root, LIMIT_BYTES if limit is None else limit)

    def _path(self, root: Path, key: str) -> Path:
        return root / self._graph / f"{key}.npz"
