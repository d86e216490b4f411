"""CSV of fractions and regions, as the csv module and numpy read them."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hpddrnet_trt.core.errors import UserError
from hpddrnet_trt.core.manifest import ClassInfo
from hpddrnet_trt.results.regions import area_fractions, regions
from hpddrnet_trt.results.tables import FRACTIONS, INTERVAL, REGIONS, write_fractions, write_regions, write_rows

CLASSES = [ClassInfo(name='matrix, "γ"', color=(0, 0, 0)), ClassInfo(name="pore", color=(9, 9, 9))]
LABELS = np.zeros((10, 20), np.uint8)
LABELS[2:5, 3:9] = LABELS[9, 19] = 1


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_fractions(tmp_path: Path) -> None:
    matrix, pore = _read(write_fractions(tmp_path / "f.csv", area_fractions(LABELS, CLASSES, 50e-9)))
    assert tuple(matrix) == (*FRACTIONS, *INTERVAL)
    assert matrix["class"] == 'matrix, "γ"'
    assert (pore["pixels"], pore["fraction"]) == ("19", "0.095")
    assert float(pore["area_um2"]) == pytest.approx(19 * 0.05**2)
    rows = _read(write_fractions(tmp_path / "f.csv", area_fractions(LABELS, CLASSES)))
    assert [row["area_um2"] for row in rows] == ["", ""]


def test_regions(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    background = [CLASSES[0].name]
    for size in (50e-9, None):
        path = write_regions(tmp_path / "r.csv", regions(LABELS, CLASSES, size, background=background))
        large, small = _read(path)
        assert tuple(large) == REGIONS
        assert (large["region"], large["class"], large["area_px"]) == ("1", "pore", "18")
        assert (float(large["centroid_x_px"]), float(large["centroid_y_px"])) == (5.5, 3)
        assert [large[key] for key in ("left_px", "top_px", "width_px", "height_px")] == ["3", "2", "6", "3"]
        assert float(large["orientation_deg"]) == 0
        assert small["orientation_deg"] == ""
        assert (large["touches_border"], small["touches_border"]) == ("0", "1")
        diameter = 2 * math.sqrt(18 / math.pi)
        assert float(large["equivalent_diameter_px"]) == pytest.approx(diameter)
        if size is None:
            assert large["area_um2"] == large["equivalent_diameter_um"] == ""
        else:
            assert float(large["area_um2"]) == pytest.approx(18 * 0.05**2)
            assert float(large["equivalent_diameter_um"]) == pytest.approx(diameter * 0.05)


def test_a_table_is_written_row_by_row_and_whole(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("old")

    def rows() -> Iterator[list[int]]:
        yield [1]
        assert (tmp_path / "t.csv").read_text() == "old"
        raise UserError("stopped")

    with pytest.raises(UserError):
        write_rows(tmp_path / "t.csv", ["n"], rows())
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.csv"]
    assert (tmp_path / "t.csv").read_text() == "old"
