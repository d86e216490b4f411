"""Blocks of a mosaic: the same labels and figures however it is cut, and those of the whole picture."""

from __future__ import annotations

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

from hpddrnet_trt.inference import Segmenter, load_segmenter
from hpddrnet_trt.mosaic.block import segment_block
from hpddrnet_trt.mosaic.choices import grid_for
from hpddrnet_trt.mosaic.layout import CELL, BlockRecord, Box, Layout, MosaicSettings
from tests.mosaic.sources import ArraySource
from tests.toy import ToyEngine, grey_image, manifest


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


def segmented(segmenter: Segmenter, source: ArraySource, how: MosaicSettings, order: Sequence[int] = ()) -> Whole:
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
