"""Grains of a folder: every grain weighs alike, whatever picture it is in; distributions have the border's weights."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from hpddrnet_trt.core.errors import BadInputFile, UsageError
from hpddrnet_trt.report.grains import HEADER, read_grains, write_grain_report
from hpddrnet_trt.results.grains import write_grains
from hpddrnet_trt.results.regions import regions
from hpddrnet_trt.results.tables import write_regions
from tests.toy import CLASSES

pytest.importorskip("skimage")
pytest.importorskip("matplotlib")


def written(folder: Path, edges: list[int], pixel_size_m: float | None = 1e-6) -> None:
    """A picture for each number: 100 x 100 pixels with squares of that edge."""
    folder.mkdir(exist_ok=True)
    for place, edge in enumerate(edges):
        labels = np.zeros((100, 100), np.uint8)
        for corner in range(1, 100 - edge, edge + 2):
            labels[corner : corner + edge, 10 : 10 + edge] = 1
        found = regions(labels, CLASSES, pixel_size_m, background=["grain"])
        write_regions(folder / f"{place}.regions.csv", found)
        write_grains(folder / f"{place}.grains.csv", found)


def test_a_folder_is_summed_up_with_intervals(tmp_path: Path) -> None:
    written(tmp_path / "in", [8, 8, 8, 18, 18, 18])
    table, figure = write_grain_report(tmp_path / "in", tmp_path / "out")
    with table.open(newline="") as stream:
        rows = {row["figure"]: row for row in csv.DictReader(stream)}
    assert list(next(iter(rows.values()))) == list(HEADER)
    small, large = 10, 5  # squares in a picture
    assert float(rows["number_density"]["value"]) == pytest.approx((small + large) / 2 / 1e-2)
    chords = (small * 8 + large * 18, small * 64 + large * 18 * 18)
    assert float(rows["mean_intercept_rows"]["value"]) == pytest.approx(chords[1] / chords[0])
    for row in rows.values():
        assert float(row["low_95"]) < float(row["value"]) < float(row["high_95"])
        assert (row["class"], row["pictures"]) == ("pore", "6")
    assert figure.read_bytes().startswith(b"\x89PNG")
    grains = read_grains(tmp_path / "in")["pore"]
    assert len(grains.diameter_um) == 3 * (small + large)


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--write regions,grains"):
        write_grain_report(tmp_path, tmp_path / "out")
    written(tmp_path / "unknown", [8], None)
    with pytest.raises(BadInputFile, match=r"0\.grains\.csv: the pixel size is not known"):
        write_grain_report(tmp_path / "unknown", tmp_path / "out")
    written(tmp_path / "alone", [8])
    (tmp_path / "alone" / "0.regions.csv").write_text("region,class\n1,pore\n")
    with pytest.raises(BadInputFile, match="no table of this version"):
        write_grain_report(tmp_path / "alone", tmp_path / "out")
    (tmp_path / "alone" / "0.regions.csv").unlink()
    with pytest.raises(BadInputFile, match="does not exist"):
        write_grain_report(tmp_path / "alone", tmp_path / "out")
    assert not (tmp_path / "out").exists()
