"""A mosaic from its source to its labels: what ``hpddrnet-trt mosaic`` does.

Everything is chosen once (:mod:`.prepare`); then each block that has no record in the store is handed to a worker
(:mod:`.cluster`), which reads, segments and writes it (:mod:`.work`). What is done is known from the store alone, so a
run goes on where one ended, whatever ended it.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any

from tqdm.contrib.logging import logging_redirect_tqdm

from hpddrnet_trt.core.lock import locked
from hpddrnet_trt.core.progress import progress_bar
from hpddrnet_trt.core.text import duration
from hpddrnet_trt.mosaic.cluster import (
    BlockFailed,
    Client,
    ClusterSettings,
    RunEnds,
    Workers,
    dashboard,
    open_client,
)
from hpddrnet_trt.mosaic.create import create_store, labels_folder
from hpddrnet_trt.mosaic.layout import BlockRecord, Box
from hpddrnet_trt.mosaic.prepare import MosaicOptions, Prepared, prepare_on
from hpddrnet_trt.mosaic.regions import RegionTask, write_table
from hpddrnet_trt.mosaic.store import MosaicStore
from hpddrnet_trt.mosaic.summary import MosaicSummary, summarize
from hpddrnet_trt.mosaic.work import PYRAMID, REGIONS, SEGMENT, SMOOTH, MosaicWork
from hpddrnet_trt.weights import DEFAULT

logger = logging.getLogger(__name__)
MOST_LISTED = 5  # sentences or names in one line of the summary


@dataclass
class MosaicRun:
    """What became of a mosaic.

    ``store``: the group of the labels; ``files``: what else was written, by what it is. ``summary``: of all blocks that
    are done. ``computed``: blocks of this run; ``kept``: those that were done before. ``failed``: a sentence for each
    block without labels; ``changed``: names of blocks whose pixels were changed after they were read, which the next
    run does again. ``workers``: at the beginning, 0 when there was nothing to do. ``seconds``: of all tasks, with the
    start of the workers. ``interrupted``: Ctrl-C ended the run.
    """

    store: Path
    remarks: tuple[str, ...]
    kept: int = 0
    computed: int = 0
    failed: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    workers: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    files: dict[str, str] = field(default_factory=dict)
    summary: MosaicSummary | None = None

    @property
    def exit_code(self) -> int:
        """1 when something has no label that should have one, or another one than it should have."""
        damaged = self.summary is not None and self.summary.problem_count > 0
        return 1 if self.failed or self.changed or damaged else 0

    def record(self) -> dict[str, Any]:
        """JSON-able: the fields by their names."""
        fields = {name: value for name, value in vars(self).items() if name != "summary"}
        summary = None if self.summary is None else self.summary.as_dict()
        return {**fields, "store": str(self.store), "summary": summary}

    def __str__(self) -> str:
        lines = [f"{self.computed} blocks segmented, {self.kept} done before, {len(self.failed)} failed"]
        if self.interrupted:
            lines[0] += ", interrupted: run again to continue"
        if self.computed and self.seconds:
            lines[0] += f"; {duration(self.seconds)} with {self.workers} worker{'s' * (self.workers > 1)}"
        lines += [f"note: {remark}" for remark in self.remarks]
        lines += [f"  {reason}" for reason in self.failed[:MOST_LISTED]]
        if len(self.failed) > MOST_LISTED:
            lines.append(f"  and {len(self.failed) - MOST_LISTED} more")
        if self.changed:
            names = ", ".join(self.changed[:MOST_LISTED]) + " ..." * (len(self.changed) > MOST_LISTED)
            lines.append(
                f"the pixels of {len(self.changed)} blocks have changed since they were read ({names}); run again to "
                "do them again"
            )
        if self.summary is not None:
            lines.append(str(self.summary))
        lines += [f"{what}: {where}" for what, where in self.files.items()]
        return "\n".join(lines)


def segment_mosaic(
    path: str | Path,
    model: str | Path = DEFAULT,
    options: MosaicOptions = MosaicOptions(),
    cluster: ClusterSettings = ClusterSettings(),
    *,
    progress: bool = True,
) -> MosaicRun:
    """Segment a mosaic or volume of any size, block by block, on the workers of ``cluster``.

    ``path``: what :func:`~hpddrnet_trt.mosaic.sources.open_source` reads. ``model``: as
    :func:`~hpddrnet_trt.load_segmenter` takes it, and as the workers find it. The labels are the same for any number
    of workers and any order of blocks. What is in the store already is kept, if it was made with the same settings
    from the same pixels. Ctrl-C ends the run; what is done stays, and the next call goes on. In a script, call it
    under ``if __name__ == "__main__":``, as everything that starts processes.

    Raises :class:`UsageError` for options that make no sense and for a store made with other settings,
    :class:`UserError` when the disk is full, a worker does not fit, the scheduler is gone, or another process writes
    there.
    """
    source = options.open_source(path)
    folder, image = labels_folder(options.output, options.name, source)
    root = image or folder
    with locked(root.with_name(f".{root.name}.lock"), str(root)):
        with ExitStack() as at_work:
            client, prepared = prepare_on(at_work, source, model, options, cluster)
            regions = prepared.regions(options)
            store = create_store(
                options.output, options.name, prepared.source, prepared.layout, prepared.settings, prepared.manifest,
                prepared.provenance, smooth=options.smooth_slices, overwrite=options.restart,
            )  # fmt: skip
            run = MosaicRun(store.folder, prepared.remarks)
            begun = monotonic()
            try:
                _Run(prepared, store, cluster, client, at_work, run, progress).all_tasks(regions)
            except KeyboardInterrupt:
                run.interrupted = True
            except RunEnds as exc:
                raise RunEnds(f"{exc} ({run.kept + run.computed} of {len(prepared.layout)} blocks are done)") from exc
            run.seconds = monotonic() - begun
        if run.summary is None:  # interrupted before
            run.summary = _sums(prepared, store.records())
        if not run.interrupted:
            store.finish(run.summary, {"seconds": run.seconds, "workers": run.workers})
            run.files["areas"] = str(run.summary.write_areas(store.beside(".areas.csv")))
        return run


def _sums(prepared: Prepared, records: Iterable[BlockRecord]) -> MosaicSummary:
    classes, pixel_size = prepared.manifest.classes, prepared.source.pixel_size_m
    return summarize(records, classes, pixel_size, len(prepared.layout))


class _Run:
    """The tasks of one run, one after the other; workers are there from the first that has a block to do."""

    def __init__(
        self, prepared: Prepared, store: MosaicStore, cluster: ClusterSettings, client: Client | None,
        at_work: ExitStack, run: MosaicRun, progress: bool,
    ) -> None:  # fmt: skip
        self._prepared, self._store, self._cluster, self._client = prepared, store, cluster, client
        self._at_work, self._run, self._progress = at_work, run, progress
        self._workers: Workers | None = None

    def all_tasks(self, regions: RegionTask | None) -> None:
        """``regions``: which are to be measured, at last."""
        prepared, store, run = self._prepared, self._store, self._run
        done = prepared.done(store.records())
        blocks = [box for box in prepared.layout if box not in done]
        run.kept = len(done)
        if self._cluster.shuffle is not None:
            random.Random(self._cluster.shuffle).shuffle(blocks)
        self._do(SEGMENT, blocks)
        if not run.failed:  # else some slices have no vote yet
            self._do(SMOOTH, store.smooth_parts())
        for level in range(1, len(store.factors)):
            self._do(PYRAMID, store.pyramid_parts(level), level)
        records = list(store.records())
        run.changed = [box.name for box in prepared.changed(records)]
        run.summary = _sums(prepared, records)
        if regions is None:
            return
        if run.failed or run.changed:
            logger.warning("regions are measured when no block is missing or changed any more: run again")
            return
        task = replace(regions, labels=run.summary.checksum)
        self._do(REGIONS, task.remaining(), task)
        write_table(task)
        run.files["regions"] = str(task.table)

    def _do(self, task: str, boxes: list[Box], about: Any = None) -> None:
        if not boxes:
            return
        workers, run, ended = self._opened(len(boxes)), self._run, 0
        pixels = sum(box.height * box.width for box in boxes)
        bar = progress_bar(total=pixels, desc=task, unit="px", unit_scale=True, show=self._progress)

        def tell(box: Box, outcome: Any) -> None:
            nonlocal ended
            ended += 1
            if isinstance(outcome, BlockFailed):
                run.failed.append(str(outcome))
                logger.warning("%s", outcome)
            elif task == SEGMENT:
                run.computed += 1
            bar.set_postfix_str(f"{ended}/{len(boxes)} blocks", refresh=False)
            bar.update(box.height * box.width)

        with bar, logging_redirect_tqdm():
            workers.do(task, boxes, tell, about)

    def _opened(self, blocks: int) -> Workers:
        """The workers; where they are our own, not more of them than there are blocks."""
        if self._workers is None:
            prepared, cluster = self._prepared, self._cluster
            if self._client is None:
                count = min(prepared.workers(cluster), blocks)
                self._client = self._at_work.enter_context(open_client(cluster, count))
            work = MosaicWork(prepared, self._store, spread=cluster.scheduler is None)
            self._workers = self._at_work.enter_context(Workers(self._client, work, cluster.patience))
            self._run.workers = len(self._client.nthreads())
            if (address := dashboard(self._client)) is not None:
                logger.info("Dask's dashboard: %s", address)
        return self._workers
