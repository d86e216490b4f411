"""Runs of a whole mosaic: the same labels however it is computed, and after whatever went wrong."""

from __future__ import annotations

import _thread
import csv
import errno
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from hpddrnet_trt.core.errors import UsageError, UserError, require
from hpddrnet_trt.core.lock import locked
from hpddrnet_trt.inference.segmenter import load_segmenter
from hpddrnet_trt.mosaic import cluster, prepare, work
from hpddrnet_trt.mosaic.cluster import ClusterSettings, RunEnds
from hpddrnet_trt.mosaic.layout import NO_DATA, BlockRecord, BlockResult, Box
from hpddrnet_trt.mosaic.plan import plan_mosaic
from hpddrnet_trt.mosaic.prepare import MosaicOptions
from hpddrnet_trt.mosaic.run import MosaicRun, segment_mosaic
from hpddrnet_trt.mosaic.store import MosaicStore, open_store
from hpddrnet_trt.results.regions import regions
from tests.mosaic.source_files import zarr_store
from tests.tiny_onnx import CLASSES, tiny_model

pytest.importorskip("distributed")
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated class Scaler:DeprecationWarning")
BLOCK, TILE = 128, 128
HERE = ClusterSettings(workers=1, processes=False)
SHAPE = (320, 448)  # 3 x 4 blocks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny.onnx", domain=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return mosaic(tmp_path / "mosaic.zarr", SHAPE)


def mosaic(folder: Path, shape: tuple[int, int]) -> Path:
    rng = np.random.default_rng(5)
    coarse = rng.integers(1, 255, (shape[0] // 16, shape[1] // 16)).repeat(16, 0).repeat(16, 1)
    pixels = np.clip(coarse + rng.integers(-20, 20, shape), 1, 255).astype(np.uint8)
    return zarr_store(folder, pixels, axes="yx", chunks=(64, 64))


def options(**changes: Any) -> MosaicOptions:
    return MosaicOptions(**{"engine": "onnxruntime", "tile": TILE, "block": BLOCK, **changes})


def whole(run: MosaicRun) -> str:
    assert run.summary is not None
    assert run.summary.blocks == run.summary.all_blocks
    return run.summary.checksum


@pytest.fixture(scope="module")
def checksum(model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the labels of a run that nothing happened to."""
    with warnings.catch_warnings(action="ignore"):  # marks do not reach fixtures of a module
        require("ome_zarr.writer", "mosaic", "test")
    source = mosaic(tmp_path_factory.mktemp("source") / "mosaic.zarr", SHAPE)
    return whole(segment_mosaic(source, model, options(), HERE, progress=False))


Writes = Callable[[Callable[[int, BlockResult], None]], None]


@pytest.fixture
def at_each_write(monkeypatch: pytest.MonkeyPatch) -> Writes:
    """Have something happen before a block is written, told how many were before."""
    write = MosaicStore.write

    def install(happen: Callable[[int, BlockResult], None]) -> None:
        written = 0

        def wrapped(store: MosaicStore, result: BlockResult) -> BlockRecord:
            nonlocal written
            happen(written, result)
            written += 1
            return write(store, result)

        monkeypatch.setattr(MosaicStore, "write", wrapped)

    return install


def test_labels_are_those_of_the_whole_picture(source: Path, model: Path, checksum: str) -> None:
    run = segment_mosaic(source, model, options(), HERE, progress=False)
    assert (run.computed, run.kept, run.exit_code, whole(run)) == (12, 0, 0, checksum)
    zarr = pytest.importorskip("zarr")
    pixels = zarr.open_array(str(source / "0"), mode="r")[...]
    with load_segmenter(model, engine="onnxruntime", threads=1, tile=TILE) as segmenter:
        alone = segmenter.segment(pixels)
    np.testing.assert_array_equal(zarr.open_array(str(source / "labels/classes/0"), mode="r")[...], alone.labels)
    assert run.summary is not None
    assert alone.tiling is not None
    assert run.summary.seam_disagreement == pytest.approx(alone.tiling.seam_disagreement)
    assert len(set(np.unique(alone.labels))) > 1
    assert not list(source.parent.glob(".*"))  # no lock is left


def test_neither_workers_nor_order_nor_blocks_change_a_label(source: Path, model: Path, checksum: str) -> None:
    for number, settings in enumerate((
        ClusterSettings(workers=2, processes=False, shuffle=1), ClusterSettings(workers=1, processes=False, shuffle=2),
    )):  # fmt: skip
        other = options(output=source.parent / f"{number}.zarr")
        assert whole(segment_mosaic(source, model, other, settings, progress=False)) == checksum
    # Blocks of another size have other checksums, and the same labels.
    larger = segment_mosaic(source, model, options(output=source.parent / "b.zarr", block=192), HERE, progress=False)
    zarr = pytest.importorskip("zarr")
    stores = (source.parent / "0.zarr", larger.store)
    first, second = (zarr.open_array(str(store / "0"), mode="r")[...] for store in stores)
    np.testing.assert_array_equal(first, second)


def test_a_finished_mosaic_is_left_as_it_is(source: Path, model: Path, checksum: str) -> None:
    segment_mosaic(source, model, options(), HERE, progress=False)
    again = segment_mosaic(source, model, options(), HERE, progress=False)
    assert (again.computed, again.kept, again.workers, whole(again)) == (0, 12, 0, checksum)
    with pytest.raises(UsageError, match="threads 1, not 2"):
        segment_mosaic(source, model, options(threads=2), HERE, progress=False)
    anew = segment_mosaic(source, model, options(threads=2, restart=True), HERE, progress=False)
    assert (anew.computed, anew.kept) == (12, 0)


def test_a_full_disk_ends_the_run_and_the_next_one_goes_on(
    source: Path, model: Path, checksum: str, at_each_write: Writes, monkeypatch: pytest.MonkeyPatch
) -> None:
    zarr = pytest.importorskip("zarr")
    with monkeypatch.context() as patch:
        array, written = MosaicStore._array, 0

        def full(store: MosaicStore, name: str, mode: str = "r+") -> Any:
            nonlocal written
            written += name == "0"
            if written > 4:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return array(store, name, mode)

        patch.setattr(MosaicStore, "_array", full)
        with pytest.raises(RunEnds, match=r"No space left on device; free some space.* \(4 of 12 blocks are done\)"):
            segment_mosaic(source, model, options(), HERE, progress=False)
    assert zarr.open_group(str(source / "labels/classes"), mode="r") is not None
    run = segment_mosaic(source, model, options(), HERE, progress=False)
    assert (run.kept, run.computed, whole(run)) == (4, 8, checksum)


def test_ctrl_c_keeps_what_is_done(source: Path, model: Path, checksum: str, at_each_write: Writes) -> None:
    at_each_write(lambda number, _: _thread.interrupt_main() if number == 3 else None)
    run = segment_mosaic(source, model, options(), HERE, progress=False)
    assert run.interrupted
    assert "interrupted: run again to continue" in str(run)
    rest = segment_mosaic(source, model, options(), HERE, progress=False)
    assert rest.kept + rest.computed == 12
    assert rest.kept >= 1
    assert whole(rest) == checksum


def test_a_block_that_fails_does_not_stop_the_others(
    source: Path, model: Path, checksum: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        segment = work.segment_block

        def failing(*arguments: Any) -> BlockResult:
            if arguments[-1].top == arguments[-1].left == 128:
                raise MemoryError
            return segment(*arguments)

        patch.setattr(work, "segment_block", failing)
        run = segment_mosaic(source, model, options(), HERE, progress=False)
        assert run.exit_code == 1
        assert run.failed == ["z0-y128-x128: not enough memory; give --block a smaller number or start fewer --workers"]
        assert run.computed == 11
        labels = pytest.importorskip("zarr").open_array(str(run.store / "0"), mode="r")
        assert (labels[128:256, 128:256] == NO_DATA).all()
        monkeypatch.setattr(cluster, "FAILED_IN_A_ROW", 1)
        with pytest.raises(RunEnds, match="1 blocks in a row have failed, the last one so: z0-y128-x128: not enough"):
            segment_mosaic(source, model, options(), HERE, progress=False)
    rest = segment_mosaic(source, model, options(), HERE, progress=False)
    assert (rest.computed, rest.exit_code, whole(rest)) == (1, 0, checksum)


def test_a_source_that_changes_is_noticed_and_done_again(source: Path, model: Path, at_each_write: Writes) -> None:
    zarr = pytest.importorskip("zarr")

    def change(number: int, result: BlockResult) -> None:
        if number == 11:  # when all others have been read
            zarr.open_array(str(source / "0"), mode="r+")[:64, :64] = 77

    at_each_write(change)
    run = segment_mosaic(source, model, options(), HERE, progress=False)
    assert run.changed[0] == "z0-y0-x0"
    assert run.exit_code == 1
    assert 1 <= len(run.changed) <= 4  # the block, and those whose tiles see it
    assert "have changed since they were read (z0-y0-x0" in str(run)
    again = segment_mosaic(source, model, options(), HERE, progress=False)
    assert (again.computed, again.changed, again.exit_code) == (len(run.changed), [], 0)
    fresh = segment_mosaic(source, model, options(output=source.parent / "fresh.zarr"), HERE, progress=False)
    assert whole(fresh) == whole(again)


def test_pixels_that_change_while_they_are_read_give_no_labels(
    source: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = work.segment_block

    def changing(*arguments: Any) -> BlockResult:
        result = segment(*arguments)
        if arguments[-1].top == arguments[-1].left == 256:
            (source / "0/c/4/4").write_bytes(b"more")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(work, "segment_block", changing)
        run = segment_mosaic(source, model, options(), HERE, progress=False)
    assert run.exit_code == 1
    assert any("z0-y256-x256: its pixels have changed while they were read" in reason for reason in run.failed)


def test_damaged_chunks_are_named_and_the_rest_is_done(source: Path, model: Path) -> None:
    (source / "0/c/2/3").write_bytes(b"no chunk")
    run = segment_mosaic(source, model, options(), HERE, progress=False)
    assert run.exit_code == 1
    assert run.summary is not None
    assert run.summary.unreadable == 64 * 64
    assert "c/2/3" in str(run)
    labels = pytest.importorskip("zarr").open_array(str(run.store / "0"), mode="r")[...]
    assert (labels[128:192, 192:256] == NO_DATA).all()
    assert np.count_nonzero(labels == NO_DATA) == 64 * 64


def test_regions_are_those_of_the_whole_picture(source: Path, model: Path) -> None:
    table = source.parent / "regions.csv"
    asked = options(regions=table, background=["matrix"], smallest=9)
    with pytest.raises(UsageError, match=r"\.parquet or \.csv"):
        segment_mosaic(source, model, options(regions=source.parent / "regions.txt"), HERE, progress=False)
    assert not (source / "labels").exists()
    run = segment_mosaic(source, model, asked, HERE, progress=False)
    assert run.files["regions"] == str(table)
    labels = open_store(run.store).read(Box(0, 0, 0, *SHAPE))
    alone = regions(labels, CLASSES, background=["matrix"], smallest=9)
    with table.open() as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["area_px"]) for row in rows] == alone.area_px.tolist()
    assert len({row["class"] for row in rows}) > 1
    assert not list(source.parent.glob(".*"))


def test_another_client_is_refused(source: Path, model: Path) -> None:
    with locked(source.with_name(f".{source.name}.lock"), "x"), pytest.raises(UserError, match=r"writes .* already"):
        segment_mosaic(source, model, options(), HERE, progress=False)
    assert not (source / "labels").exists()


def test_workers_with_another_model_or_version_are_refused(
    source: Path, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    examine = prepare.examine
    copy = tiny_model(tmp_path / "copy.onnx", domain=True)

    def then_replaced(*arguments: Any) -> prepare.Examined:
        found = examine(*arguments)
        tiny_model(copy, domain=True, name="other")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "examine", then_replaced)
        with pytest.raises(RunEnds, match=r"worker 0 has another file under .*copy\.onnx"):
            segment_mosaic(source, copy, options(), HERE, progress=False)
    monkeypatch.setattr(work.MosaicWork, "check", lambda self: setattr(self, "_version", "0.0.1") or self.segmenter())
    with pytest.raises(RunEnds, match=r"worker 0 has hpddrnet-trt .*, and this is 0\.0\.1: labels of two versions"):
        segment_mosaic(source, model, options(restart=True), HERE, progress=False)


@pytest.fixture
def scheduler() -> Iterator[Any]:
    """A Dask cluster that is there already, reached by its address."""
    import dask
    from distributed import LocalCluster

    calm = {"distributed.comm.timeouts.connect": "1s", "distributed.worker.memory.pause": False}
    with dask.config.set(calm), LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address=None
    ) as running:  # fmt: skip
        yield running


def test_a_scheduler_by_address_and_one_that_goes(
    source: Path, model: Path, checksum: str, scheduler: Any, at_each_write: Writes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "ANSWER", 0.5)
    there = ClusterSettings(scheduler=scheduler.scheduler_address)
    assert whole(segment_mosaic(source, model, options(), there, progress=False)) == checksum
    assert plan_mosaic(source, model, options(restart=True), there).workers == 1
    at_each_write(lambda number, _: threading.Thread(target=scheduler.close).start() if number == 2 else None)
    with pytest.raises(RunEnds, match=r"the Dask scheduler at tcp://.* is gone; start it again .* blocks are done"):
        segment_mosaic(source, model, options(restart=True), there, progress=False)
    with pytest.raises(UserError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1"):
        segment_mosaic(source, model, options(), there, progress=False)
    rest = segment_mosaic(source, model, options(), HERE, progress=False)
    assert whole(rest) == checksum
    assert rest.kept >= 1


def test_paused_workers_are_waited_for_and_then_told(
    source: Path, model: Path, checksum: str, scheduler: Any, at_each_write: Writes, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = pytest.importorskip("distributed").Status
    monkeypatch.setattr(cluster, "LOOK_AGAIN", 0.1)
    (worker,) = scheduler.workers.values()

    def pause(number: int, _: BlockResult) -> None:
        if number == 2:
            worker.loop.add_callback(setattr, worker, "status", status.paused)
            wait_for(lambda: worker.status == status.paused)

    at_each_write(pause)
    there = ClusterSettings(scheduler=scheduler.scheduler_address, patience=1.5)
    with pytest.raises(RunEnds, match=r"all workers are paused as their memory is full; give --block .* are done"):
        segment_mosaic(source, model, options(), there, progress=False)
    worker.loop.add_callback(setattr, worker, "status", status.running)
    wait_for(lambda: worker.status == status.running)
    run = segment_mosaic(source, model, options(), there, progress=False)
    assert (run.kept >= 3, whole(run)) == (True, checksum)


def test_settings_of_workers_that_make_no_sense() -> None:
    with pytest.raises(UsageError, match="a number or an address"):
        ClusterSettings(scheduler="tcp://a:1", workers=2)
    with pytest.raises(UsageError, match="at least one worker"):
        ClusterSettings(workers=0)


def test_the_plan_is_what_is_done(source: Path, model: Path, at_each_write: Writes) -> None:
    plan = plan_mosaic(source, model, options(), ClusterSettings(workers=3), cost_per_hour=2.0)
    assert (plan.blocks, plan.done, plan.workers) == (12, 0, 3)
    assert not (source / "labels").exists()
    assert plan.seconds is not None
    assert plan.cost == pytest.approx(plan.seconds / 3600 * 2.0 * 3)
    run = segment_mosaic(source, model, options(), HERE, progress=False)
    assert run.summary is not None
    assert plan.tiles == run.summary.tiles_computed
    assert plan.bytes_read == run.summary.bytes_read
    assert plan.overhead == pytest.approx(plan.tiles / sum(run.summary.tiles.values()) - 1)
    assert plan.bytes_written < plan.bytes_at_most
    after = plan_mosaic(source, model, options(), HERE)
    assert (after.done, after.tiles, after.bytes_at_most) == (12, 0, 0)
    assert "12 blocks, of which 12 are done" in str(after)


LARGE = (768, 768)  # 36 blocks, so that some are done and some are not


def own_children(parent: psutil.Process) -> list[psutil.Process]:
    return [child for child in parent.children(recursive=True) if "spawn_main" in " ".join(child.cmdline())]


def records(store: Path) -> int:
    return len(list(store.glob("0/run/records/*.json")))


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_killed_worker_and_a_killed_client(tmp_path: Path, model: Path) -> None:
    """Real processes: the client is killed, leaves no worker and no lock; then a worker of the next run is killed."""
    source = mosaic(tmp_path / "mosaic.zarr", LARGE)
    wanted = whole(segment_mosaic(source, model, options(output=tmp_path / "wanted.zarr"), HERE, progress=False))
    arguments = ["mosaic", source, "--model", model, "--engine", "onnxruntime", "--tile", TILE, "--block", BLOCK,
                 "--workers", 2]  # fmt: skip
    store = source / "labels/classes"
    command = [sys.executable, "-m", "hpddrnet_trt", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as client:
        wait_for(lambda: records(store) >= 3)
        workers = own_children(psutil.Process(client.pid))
        client.kill()
    assert len(workers) >= 2
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == []
    kept = records(store)
    assert 3 <= kept < 36

    def kill_one() -> None:
        wait_for(lambda: records(store) > kept)
        own_children(psutil.Process())[0].send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    run = segment_mosaic(source, model, options(), ClusterSettings(workers=2), progress=False)
    killer.join()
    assert (run.kept >= kept - 2, run.failed, run.exit_code) == (True, [], 0)
    assert whole(run) == wanted
    assert own_children(psutil.Process()) == []
    assert open_store(store).settings["threads"] == 1
