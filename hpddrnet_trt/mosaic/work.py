"""What a worker does with the blocks of a mosaic: read, segment, write; and what comes after all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from signal import SIG_IGN, SIGINT, signal
from threading import Lock, current_thread, main_thread
from typing import Any, cast

from hpddrnet_trt import __version__
from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.engines import Arithmetic
from hpddrnet_trt.inference.segmenter import Segmenter, load_segmenter
from hpddrnet_trt.mosaic.block import segment_block
from hpddrnet_trt.mosaic.cluster import RunEnds
from hpddrnet_trt.mosaic.layout import BlockRecord, Box, MosaicSettings
from hpddrnet_trt.mosaic.prepare import Prepared
from hpddrnet_trt.mosaic.regions import regions_of_block
from hpddrnet_trt.mosaic.store import MosaicStore, open_store

SEGMENT, SMOOTH, PYRAMID, REGIONS = "segment", "smooth slices", "pyramid", "regions"


def open_model(settings: MosaicSettings) -> Segmenter:
    """The model that computes every block; raises what :func:`~hpddrnet_trt.load_segmenter` raises."""
    return load_segmenter(
        settings.model, engine=settings.engine, precision=cast("Arithmetic", settings.precision),
        threads=settings.threads, device=settings.device,
    )  # fmt: skip


class MosaicWork:
    """Tasks on blocks of one mosaic, for :class:`~hpddrnet_trt.mosaic.cluster.Workers`.

    ``spread``: workers are those of this machine, and each takes one of its GPUs, by its number.
    """

    def __init__(self, prepared: Prepared, store: MosaicStore, *, spread: bool) -> None:
        self.name = f"hpddrnet-mosaic-{store.folder}"
        self._prepared, self._store, self._version = prepared, store, __version__
        self._settings = prepared.settings
        self._own_workers = spread
        self._spread = spread and prepared.gpus > 1 and self._settings.device is None

    def place(self, worker: object) -> None:
        """Told once at a worker, by its name, before anything else."""
        self._worker, self._opening = worker, Lock()
        self._segmenter: Segmenter | None = None
        if self._own_workers and current_thread() is main_thread():  # of a process of its own
            signal(SIGINT, SIG_IGN)  # Ctrl-C reaches all processes of a terminal, and the client ends its workers
        if self._spread and isinstance(worker, int):
            self._settings = replace(self._settings, device=f"cuda:{worker % self._prepared.gpus}")

    def check(self) -> None:
        """Open the model; :class:`RunEnds` where this worker has another one, another version, or none."""
        self.segmenter()

    def close(self) -> None:
        """Close the model."""
        if self._segmenter is not None:
            self._segmenter.close()

    def do(self, task: str, box: Box, about: Any = None) -> Any:
        """``segment`` or ``smooth slices`` a block, which gives its record; write a part of the ``pyramid``, of the
        level ``about``; measure ``regions``, of the task ``about``.

        Raises :class:`RunEnds` where the disk does not take it.
        """
        if task == SEGMENT:
            return self._segment(box)
        with _ends_the_run():
            if task == REGIONS:
                return regions_of_block(about, self._store.read, box)
            if task == SMOOTH:
                return self._store.write_smoothed(box)
            return self._store.write_pyramid_part(about, box)

    def _segment(self, box: Box) -> BlockRecord:
        prepared = self._prepared
        result = segment_block(self.segmenter(), prepared.source, prepared.grid, self._settings, box)
        if prepared.changed([result.record]):
            raise UserError("its pixels have changed while they were read; run again when nobody writes them")
        with _ends_the_run():
            if open_store(self._store.folder).settings != self._store.settings:
                raise UserError(f"another run has begun {self._store.folder} anew, with other settings")
            return self._store.write(result)

    def segmenter(self) -> Segmenter:
        """The model, opened when it is first asked for."""
        with self._opening:
            if self._segmenter is None:
                self._segmenter = self._open()
            return self._segmenter

    def _open(self) -> Segmenter:
        wanted = self._settings
        if self._version != __version__:
            raise RunEnds(
                f"worker {self._worker} has hpddrnet-trt {__version__}, and this is {self._version}: labels of two "
                "versions may differ; install the same one everywhere"
            )
        try:
            segmenter = open_model(wanted)
        except UserError as exc:
            raise RunEnds(f"worker {self._worker} cannot open the model: {exc}") from exc
        here, there = (segmenter.model_sha256 or "", segmenter.engine.runtime), (wanted.model_sha256, wanted.runtime)
        if here != there:
            segmenter.close()
            what = f"another file under {wanted.model}" if here[0] != there[0] else f"{here[1]}, not {there[1]}"
            raise RunEnds(f"worker {self._worker} has {what}: its labels might differ; use equal workers")
        return segmenter


@contextmanager
def _ends_the_run() -> Iterator[None]:
    """What the store refuses of one block it refuses of all: the disk is full, or not there any more."""
    try:
        yield
    except UserError as exc:
        raise RunEnds(str(exc)) from exc
