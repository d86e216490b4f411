"""Every kind of result file: an ending of its own, a writer, and a reader that finds what was written."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from hpddrnet_trt.core.errors import UsageError
from hpddrnet_trt.inference.result import Segmentation
from hpddrnet_trt.results import ALWAYS_POSSIBLE, FORMATS, KINDS, check_kinds, format_of
from tests.toy import manifest

# ome-zarr still has a class that it deprecates as default of an argument.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated class Scaler:DeprecationWarning")

LABELS = np.zeros((96, 160), np.uint8)
LABELS[10:40, 20:60] = 1
LABELS[50:90, 100:160] = 2
GREY = np.random.default_rng(0).integers(0, 256, LABELS.shape, dtype=np.uint8)
RESULT = Segmentation(LABELS, manifest(), np.full(LABELS.shape, 0.75, np.float32), pixel_size_m=50e-9)
AREAS = [11760, 1200, 2400]


def _areas(labels: np.ndarray) -> list[int]:
    return np.bincount(labels.ravel(), minlength=3).tolist()


def _picture(path: Path) -> list[int]:
    with Image.open(path) as picture:
        return _areas(np.asarray(picture))


def _ome_zarr(path: Path) -> list[int]:
    zarr: Any = pytest.importorskip("zarr")
    root = zarr.open_group(str(path), mode="r")
    return _areas(root["s0"][:])


def _rois(path: Path) -> list[int]:
    roifile: Any = pytest.importorskip("roifile")
    return [AREAS[index] for index, _ in enumerate(roifile.roiread(path))]


def _confidence(path: Path) -> list[int]:
    assert (tifffile.imread(path) == 0.75).all()
    return AREAS


def _column(name: str) -> Callable[[Path], list[int]]:
    def read(path: Path) -> list[int]:
        with path.open(newline="") as stream:
            return [int(row[name]) for row in csv.DictReader(stream)]

    return read


READERS = {
    "png": _picture, "tiff": _picture, "ome-tiff": _picture, "ome-zarr": _ome_zarr, "rois": _rois,
    "regions": _column("area_px"), "confidence": _confidence, "fractions": _column("pixels"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_written_by_its_ending_and_read(kind: str, tmp_path: Path) -> None:
    form = FORMATS[kind]
    for module in form.modules:
        pytest.importorskip(module)
    assert form.description
    assert form.ending.startswith(".")
    for ending in form.endings:
        for name in (f"a.b{ending}", f"A{ending.upper()}"):
            assert format_of(Path(name)) is form
            assert READERS[kind](RESULT.save(tmp_path / name)) == AREAS
    if not form.image:
        with pytest.raises(UsageError, match="holds the micrograph"):
            RESULT.save(tmp_path / f"b{form.ending}", image=GREY)
    assert len(list(tmp_path.iterdir())) == 2 * len(form.endings)


def test_endings_are_told_apart_and_others_refused(tmp_path: Path) -> None:
    endings = [ending for form in FORMATS.values() for ending in form.endings]
    assert len(endings) == len(set(endings))
    for name in ("a.jpg", "a", "a.zarr", "a.txt"):
        with pytest.raises(UsageError, match=r"results are written as \.png, .*change the ending"):
            RESULT.save(tmp_path / name)
    with pytest.raises(UsageError, match="gave no confidence"):
        replace(RESULT, confidence=None).save(tmp_path / "a.confidence.tif")
    assert list(tmp_path.iterdir()) == []


def test_kinds_of_segment() -> None:
    assert set(READERS) == set(FORMATS)
    assert set(KINDS) == set(FORMATS) - {"fractions"}  # of which there is one table for all images
    assert set(ALWAYS_POSSIBLE) == set(KINDS) - {"confidence"}
    check_kinds(["png", "confidence"])
    with pytest.raises(UsageError, match="not 'fractions'"):
        check_kinds(["png", "fractions"])
