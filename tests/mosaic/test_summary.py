"""The figures of a mosaic are sums over its blocks, for people, for programs and as CSV."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hpddrnet_trt.core.text import plain
from hpddrnet_trt.mosaic.layout import NO_DATA, BlockRecord
from hpddrnet_trt.mosaic.summary import MAX_PROBLEMS, MosaicSummary, summarize
from tests.mosaic.mosaics import SIZE, block, labels_of, layout_of
from tests.toy import CLASSES

SHAPE = (2, 300, 400)
LABELS = labels_of(SHAPE)
LAYOUT = layout_of(SHAPE)


def _records(**about: object) -> list[BlockRecord]:
    return [block(box, LABELS, **about).record for box in LAYOUT]


def _summary(records: list[BlockRecord], size: float | None = SIZE) -> MosaicSummary:
    return summarize(iter(records), CLASSES, size, len(LAYOUT))


def test_sums_are_those_of_the_whole_mosaic() -> None:
    summary = _summary(_records(foreign_pixels=(0, 10, 0), own_tiles={"familiar": 2, "foreign": 1}))
    counts = np.bincount(LABELS.ravel(), minlength=256)
    assert [entry.pixels for entry in summary.fractions] == counts[:3].tolist()
    assert sum(entry.fraction for entry in summary.fractions) == pytest.approx(1)
    assert summary.fractions[1].area_m2 == pytest.approx(counts[1] * SIZE**2)
    assert summary.empty == counts[NO_DATA]
    assert summary.pixels == LABELS.size
    assert summary.foreign_pixels == (0, 10 * len(LAYOUT), 0)
    assert summary.tiles == {"familiar": 2 * len(LAYOUT), "foreign": len(LAYOUT)}
    assert summary.seam_disagreement == 0.01
    assert summary.seconds == {"read": len(LAYOUT), "compute": 3 * len(LAYOUT)}
    assert summary.pixels_per_second == LABELS.size / (4 * len(LAYOUT))
    assert summary.peak_bytes == 1000 + 256
    assert (summary.blocks, summary.all_blocks) == (len(LAYOUT), len(LAYOUT))


def test_the_checksum_is_of_the_labels() -> None:
    records = _records()
    same = _summary([replace(record, seconds={"read": 9.0}) for record in records])
    assert same.checksum == _summary(records).checksum
    other = [replace(records[0], checksum="0" * 64), *records[1:]]
    assert _summary(other).checksum != same.checksum


def test_nothing_is_done_yet() -> None:
    summary = _summary([], None)
    assert summary.blocks == 0
    assert [(entry.fraction, entry.area_m2) for entry in summary.fractions] == [(0, None)] * 3
    assert summary.pixels_per_second is None
    assert "0 of 8 blocks" in str(summary)
    assert "NaN" not in json.dumps(plain(summary.as_dict()), allow_nan=False)


def test_problems_are_told_and_not_without_end() -> None:
    records = _records(problems=("chunk 3/4 cannot be read: torn",) * 3, unreadable=5)
    summary = _summary(records)
    assert summary.problem_count == 3 * len(LAYOUT)
    assert len(summary.problems) == MAX_PROBLEMS
    assert str(summary).endswith(f"chunk 3/4 cannot be read: torn\nand {3 * len(LAYOUT) - MAX_PROBLEMS} more problems")


def test_for_people_and_as_files(tmp_path: Path) -> None:
    summary = _summary(_records(foreign_pixels=(0, 10, 0)))
    lines = str(summary).splitlines()
    assert lines[0].split() == ["class", "pixels", "fraction", "area", "µm²", "foreign", "to", "the", "model"]
    assert lines[2].startswith("pore ")
    assert "8 tiles (8 familiar); neighbors disagree in 1.00 % of the pixels that both see" in lines
    with summary.write_areas(tmp_path / "areas.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["class", "pixels", "fraction", "area_um2", "foreign_pixels", "foreign_fraction"]
    assert rows[1]["class"] == "pore"
    assert float(rows[1]["area_um2"]) == pytest.approx(summary.fractions[1].pixels * 0.0025)
    assert float(rows[1]["foreign_fraction"]) == pytest.approx(80 / summary.fractions[1].pixels)
    read = json.loads(json.dumps(summary.as_dict()))
    assert read["fractions"][1]["foreign_pixels"] == 80
    assert read["pixels"] == LABELS.size
