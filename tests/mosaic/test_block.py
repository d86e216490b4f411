"""Blocks of a mosaic: the same labels and figures however it is cut, and those of the whole picture."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hpddrnet_trt.core.domain import domain_of
from hpddrnet_trt.core.errors import ContractError, UsageError
from hpddrnet_trt.core.manifest import DataRecord, IntensityRecord
from hpddrnet_trt.data.intensity import FullScale, Percentiles, range_of, to_grey8
from hpddrnet_trt.data.preprocess import magnified
from hpddrnet_trt.inference import Segmenter, load_segmenter
from hpddrnet_trt.inference.tiling import own_parts
from hpddrnet_trt.mosaic.block import segment_block
from hpddrnet_trt.mosaic.choices import chosen_factor, chosen_window, grid_for
from hpddrnet_trt.mosaic.layout import CELL, NO_DATA, BlockRecord, Box, Layout, MosaicSettings, Piece, Source
from hpddrnet_trt.mosaic.pixels import read_pixels
from hpddrnet_trt.mosaic.sources import open_source
from tests.mosaic.source_files import zarr_store
from tests.mosaic.sources import ArraySource
from tests.toy import ToyEngine, grey_image, manifest, toy_features, toy_logits


def chosen(**changes: Any) -> MosaicSettings:
    values: dict[str, Any] = {
        "model": "m.onnx", "model_sha256": "0", "engine": "auto", "precision": "auto", "threads": 1, "device": None,
        "window": (0.0, 255.0), "factor": 1.0, "tile": "auto", **changes,
    }  # fmt: skip
    return MosaicSettings(**values)


class Whole(NamedTuple):
    """A mosaic put together: maps, and what the records add up to."""

    labels: npt.NDArray[np.uint8]
    confidence: npt.NDArray[np.float32]
    distance: npt.NDArray[np.float32]
    total: tuple[Any, ...]
    records: list[BlockRecord]


def segmented(segmenter: Segmenter, source: Source, how: MosaicSettings, order: Sequence[int] = ()) -> Whole:
    grid = grid_for(segmenter.manifest, source.shape, how.factor, how.tile)
    labels = np.full(source.shape, 77, np.uint8)
    cells = (source.shape[0], *(-(-size // CELL) for size in source.shape[1:]))
    confidence, distance = np.full(cells, -1, np.float32), np.full(cells, -1, np.float32)
    boxes = list(Layout(source.shape, how.block))
    records = []
    for number in order or range(len(boxes)):
        box = boxes[number]
        result = segment_block(segmenter, source, grid, how, box)
        labels[box.z, box.rows, box.columns] = result.labels
        here = np.s_[box.z, box.top // CELL :, box.left // CELL :]
        for target, given_map in ((confidence, result.confidence), (distance, result.distance)):
            target[here][: given_map.shape[0], : given_map.shape[1]] = given_map
        assert BlockRecord.from_dict(json.loads(json.dumps(result.record.as_dict()))) == result.record
        records.append(result.record)
    states: Counter[str] = Counter()
    for record in records:
        states.update(record.own_tiles)
    total = (
        *(np.sum([getattr(record, name) for record in records], axis=0).tolist()
          for name in ("pixels", "foreign_pixels", "empty", "unreadable", "seam_pixels")),
        dict(states), {problem for record in records for problem in record.problems},
    )  # fmt: skip
    return Whole(labels, confidence, distance, total, records)


@st.composite
def mosaics(draw: st.DrawFn) -> ArraySource:
    """Grey areas, some of them empty, some of them damaged."""
    height, width = draw(st.integers(1, 200)), draw(st.integers(1, 200))
    pixels = np.maximum(grey_image(height, width, draw(st.integers(0, 3))), 1)
    for _ in range(draw(st.integers(0, 3))):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        pixels[top : top + draw(st.integers(1, 200)), left : left + draw(st.integers(1, 200))] = 0
    damaged = []
    if draw(st.booleans()):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        damaged.append(Box(0, top, left, min(draw(st.integers(1, 90)), height - top), min(70, width - left)))
    return ArraySource(pixels, unit=(draw(st.sampled_from([16, 50, 64, 128])), 32), damaged=tuple(damaged))


@settings(deadline=None, max_examples=25)
@given(
    source=mosaics(),
    blocks=st.lists(st.sampled_from([64, 128, 192]), min_size=1, max_size=2, unique=True),
    tile=st.sampled_from([24, 40, 72, 136]),
    kind=st.sampled_from(["logits", "labels"]),
    factor=st.sampled_from([1.0, 1.0, 0.5, 0.23, 1.7, 2.0]),
    data=st.data(),
)
def test_a_mosaic_is_the_same_however_it_is_cut(
    source: ArraySource, blocks: list[int], tile: int, kind: str, factor: float, data: st.DataObject
) -> None:
    segmenter = Segmenter(ToyEngine(manifest(kind, domain=True)))
    whole = segmented(segmenter, source, chosen(tile=tile, factor=factor, block=4096))
    for block in blocks:
        order = data.draw(st.permutations(range(len(Layout(source.shape, block)))))
        found = segmented(segmenter, source, chosen(tile=tile, factor=factor, block=block), order)
        for one, other in zip(found[:3], whole[:3], strict=True):
            np.testing.assert_array_equal(one, other)
        assert found.total == whole.total


@pytest.fixture(scope="module")
def micrograph(sem_data: Path) -> Any:
    with Image.open(min((sem_data / "nasa-super1" / "images" / "test").iterdir())) as picture:
        return np.asarray(picture.convert("L"))


def test_the_labels_are_those_of_the_whole_picture(micrograph: Any) -> None:
    picture = micrograph[:320, :384]
    with load_segmenter("nasa-super1", threads=1, tile=256, confidence=True) as segmenter:
        expected = segmenter.segment(picture)
        found = segmented(segmenter, ArraySource(picture, fill_value=-1), chosen(tile=256, block=128))
    assert np.array_equal(found.labels[0], expected.labels)
    assert expected.tiling is not None
    assert expected.confidence is not None
    shared, different = found.total[4]
    assert different / shared == expected.tiling.seam_disagreement
    means = expected.confidence.reshape(5, CELL, 6, CELL).mean(axis=(1, 3))
    assert np.abs(found.confidence[0] - means).max() < 0.02  # every fourth pixel of each direction


@pytest.mark.parametrize("kind", ["logits", "labels"])
def test_what_is_empty_or_unreadable_has_no_label_and_tiles_of_it_alone_are_not_run(kind: str) -> None:
    pixels = np.full((256, 320), 120, np.uint8)
    pixels[:, 128:] = 0  # all but one of the cells to the right of 128 are empty
    pixels[200, 319] = 9
    source = ArraySource(pixels, damaged=(Box(0, 10, 20, 30, 50), Box(0, 30, 60, 40, 90)))
    engine = ToyEngine(manifest(kind))
    found = segmented(Segmenter(engine), source, chosen(tile=64, block=320))
    (record,) = found.records
    seen = pixels.copy()
    seen[10:40, 20:70] = seen[30:70, 60:150] = 0
    expected = toy_logits(seen).argmax(axis=0)
    expected[:192, 128:] = expected[:, 128:256] = NO_DATA
    expected[192:, 256:][pixels[192:, 256:] == 0] = NO_DATA  # next to empty cells, and nothing else up to the edges
    expected[10:40, 20:70] = expected[30:70, 60:150] = NO_DATA
    assert np.array_equal(found.labels[0], expected)
    known = expected != NO_DATA
    assert record.unreadable == 30 * 50 + 40 * 90 - 10 * 10
    assert record.empty + record.unreadable == np.count_nonzero(~known)
    assert sum(record.pixels) == np.count_nonzero(known)
    assert record.problems == ("chunk z0-y10-x20 is damaged", "chunk z0-y30-x60 is damaged")
    grid = grid_for(engine.manifest, source.shape, 1.0, 64)
    skipped = sum(columns.start >= 128 and not (rows.stop > 192 and columns.stop > 256) for rows, columns in grid.whole)
    assert skipped > 4
    assert record.tiles == sum(record.own_tiles.values()) == len(engine.shapes) == len(grid.whole) - skipped
    assert np.isnan(found.confidence[0, :3, 2:]).all()
    assert np.isnan(found.confidence).all() == (kind == "labels")  # this model does not say how sure it is


def test_what_is_empty_ends_where_the_picture_does() -> None:
    pixels = np.maximum(grey_image(300, 410), 1)
    pixels[77:230, 85:301] = 0  # an area that was never acquired, in the middle of others
    pixels[40, 10:40] = 0  # black pixels far from it
    pixels[70, 20:30] = pixels[71, 90] = 0  # and some in cells that touch cells which are empty
    engine = ToyEngine()
    for block in (64, 128, 512):
        found = segmented(Segmenter(engine), ArraySource(pixels), chosen(tile=72, block=block))
        expected = toy_logits(pixels).argmax(axis=0)
        expected[77:230, 85:301] = NO_DATA
        assert np.array_equal(found.labels[0], expected)
        assert sum(record.empty for record in found.records) == (230 - 77) * (301 - 85)


def test_black_pixels_have_labels_where_nothing_is_taken_as_empty() -> None:
    pixels = np.maximum(grey_image(200, 260), 1)
    pixels[:, 128:] = 0
    found = segmented(Segmenter(ToyEngine()), ArraySource(pixels), chosen(tile=64, block=128, skip_empty=False))
    assert np.array_equal(found.labels[0], toy_logits(pixels).argmax(axis=0))
    assert [record.empty for record in found.records] == [0] * 6


def test_a_damaged_chunk_of_a_store_has_no_label_and_all_else_has(tmp_path: Path) -> None:
    pixels = (1 + 250 * grey_image(200, 230)[np.newaxis].astype(np.uint16)).repeat(2, axis=0)
    store = zarr_store(tmp_path / "m.zarr", pixels)
    (store / "0" / "c" / "1" / "2" / "3").write_bytes(b"no blosc")  # rows 64 to 96, columns 96 to 128
    source = open_source(store)
    engine = ToyEngine()
    window, _ = chosen_window(source, engine.manifest)
    found = [
        segmented(Segmenter(engine), source, chosen(window=window, tile=72, block=block), order)
        for block, order in ((256, ()), (64, range(31, -1, -1)), (128, ()))
    ]
    for other in found[1:]:
        assert np.array_equal(other.labels, found[0].labels)
        assert other.total == found[0].total
    damaged = np.zeros(pixels.shape, np.bool_)
    damaged[1, 64:96, 96:128] = True
    assert np.array_equal(found[0].labels == NO_DATA, damaged)
    assert found[0].total[3] == 32 * 32
    (problem,) = found[0].total[-1]
    assert "0/c/1/2/3" in problem


@pytest.mark.parametrize(("value", "fill"), [(0, 0), (255, 0), (77, 0), (np.nan, np.nan), (0.4, np.nan), (5, -1)])
def test_mosaics_of_one_value(value: float, fill: float) -> None:
    kind = np.float32 if isinstance(value, float) else np.uint16
    source = ArraySource(np.full((2, 100, 90), value, kind), fill_value=fill)
    engine = ToyEngine()
    window, _ = chosen_window(source, engine.manifest)
    found = segmented(Segmenter(engine), source, chosen(window=window, tile=40, block=64))
    if value == fill or np.isnan(value):
        assert not engine.shapes
        assert (found.labels == NO_DATA).all()
        assert (found.total[2], found.total[4]) == (18000, [0, 0])
        assert np.isnan(found.confidence).all()
    else:
        assert len(set(found.labels.ravel())) == 1
        assert max(found.total[0]) == 18000


def test_foreign_tiles_and_distances_are_told_where_they_decide() -> None:
    pixels = np.full((128, 320), 120, np.uint8)
    pixels[:, 160:] = 250
    segmenter = Segmenter(ToyEngine(manifest("logits", domain=True)))
    found = segmented(segmenter, ArraySource(pixels), chosen(tile=64, block=128))
    known = segmenter.manifest.domain
    assert known is not None
    grid = grid_for(segmenter.manifest, (1, 128, 320), 1.0, 64)
    foreign, distance = np.zeros(3, int), np.zeros((128, 320))
    states = []
    for (rows, columns), (here, _) in zip(grid.whole, own_parts(grid.whole), strict=True):
        tile = domain_of([toy_features(toy_logits(pixels[rows, columns])[None])[0]], known)
        distance[here] = tile.distance
        states.append(tile.state)
        if tile.state == "foreign":
            foreign += np.bincount(found.labels[0][here].ravel(), minlength=3)
    assert 0 < foreign.sum() < pixels.size
    assert found.total[1] == foreign.tolist()
    assert found.total[5] == Counter(states)
    assert np.array_equal(found.distance[0], distance[32::64, 32::64].astype(np.float32))


@pytest.mark.parametrize("factor", [0.5, 1 / 3, 0.23, 0.9, 1.7, 2.0])
@pytest.mark.parametrize("smooth", [True, False])
def test_tiles_see_the_magnified_mosaic(factor: float, smooth: bool) -> None:
    shape = 1, 150, 190
    pixels = np.random.default_rng(1).integers(1, 256, shape[1:], dtype=np.uint8)
    source = ArraySource(grey_image(*shape[1:]) if smooth else pixels, fill_value=-1)
    grid = grid_for(manifest(), shape, factor, 24)
    whole = magnified(source.pixels[0], grid.height, grid.width)
    seen = read_pixels(source, grid, (0.0, 255.0), Box(0, *(0, 0), *shape[1:]))
    for place in grid.whole:
        tile = seen.picture(place)
        assert tile is not None
        assert np.abs(tile.astype(int) - whole[place]).max() <= 1


def test_a_block_reads_its_tiles_and_whole_cells_once_along_the_borders_of_chunks() -> None:
    source = ArraySource(grey_image(4096, 300), unit=(96, 96))
    grid = grid_for(manifest(), source.shape, 1.0, 128)
    segment_block(Segmenter(ToyEngine()), source, grid, chosen(), Box(0, 1024, 64, 1024, 64))
    rows = [(box.top, box.top + box.height) for box in source.boxes]
    assert [end for _, end in rows][:-1] == [start for start, _ in rows[1:]]
    assert all(end % 96 == 0 for _, end in rows[:-1])
    assert {(box.left, box.width) for box in source.boxes} == {(0, 256)}
    assert 1024 - 128 <= rows[0][0] < 1024
    assert 2048 < rows[-1][1] <= 2048 + 128


class Endless(ArraySource):
    """A mosaic of any size that is made where it is read."""

    def read(self, box: Box) -> Piece:
        rows, columns = (np.arange(of.start, of.stop) for of in (box.rows, box.columns))
        return Piece(((rows[:, np.newaxis] * 7 + columns) % 251 + 1).astype(np.uint8))


def test_memory_is_that_of_a_block_whatever_the_mosaic() -> None:
    def peak(size: int) -> int:
        source = Endless(np.ones((1, 1), np.uint8))
        source.shape = (1, size, size)
        grid = grid_for(manifest(), source.shape, 1.0, 256)
        middle = size // 2 // 512 * 512
        tracemalloc.start()
        try:
            segment_block(Segmenter(ToyEngine()), source, grid, chosen(), Box(0, middle, middle, 512, 512))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(2048)  # what is made once
    assert peak(1 << 16) < 1.1 * peak(2048) + (1 << 21)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_the_grey_window_is_that_of_one_picture(dtype: Any) -> None:
    pixels = (grey_image(90, 90).astype(np.float64) * {1: 1, 2: 13, 4: 0.01}[np.dtype(dtype).itemsize]).astype(dtype)
    model = manifest("logits", intensity=IntensityRecord(unit="percentile", black=1, white=98))
    for wanted in (None, FullScale(), Percentiles(5, 95), (3.0, 70.0)):
        for described in (manifest("logits"), model):
            found = chosen_window(ArraySource(pixels, fill_value=-1), described, wanted)
            expected = to_grey8(pixels, range_of(described.intensity) if wanted is None else wanted)
            assert found == (expected.window, expected.remarks)
    with pytest.raises(ContractError, match="is empty; give black < white"):
        chosen_window(ArraySource(pixels), model, (5.0, 5.0))


def test_magnification_and_tiles_are_chosen_as_for_a_picture_of_any_size() -> None:
    trained = manifest(data=DataRecord(name="steel", pixel_size_m=(10e-9, 10e-9), crop=(64, 96)))
    source = ArraySource(np.ones((8, 8), np.uint8), pixel_size_m=20e-9)
    source.shape = (1, 1 << 20, 1 << 20)  # enlarged, more pixels than one picture may have
    assert chosen_factor(source, trained) == (2.0, None)
    assert chosen_factor(source, trained, rescale=False) == (1.0, None)
    assert chosen_factor(source, manifest()) == (1.0, None)
    grid = grid_for(trained, source.shape, 2.0, "auto")
    assert (grid.height, grid.tile) == (1 << 21, (64, 96))
    assert grid_for(trained, source.shape, 2.0, 128).tile == (128, 128)
    source.pixel_size_m = None
    factor, remark = chosen_factor(source, trained)
    assert factor == 1.0
    assert remark is not None
    assert "does not tell its pixel size" in remark
    source.pixel_size_m = 1e-6
    factor, remark = chosen_factor(source, trained)
    assert factor == 1.0
    assert remark is not None
    assert "too far apart" in remark
    with pytest.raises(UsageError, match="does not run in one piece"):
        grid_for(trained, source.shape, 1.0, "whole")
    with pytest.raises(UsageError, match="a multiple of 8; got 20"):
        grid_for(trained, source.shape, 1.0, 20)
